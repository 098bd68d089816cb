"""What hypothesis draws: blocks of every shape, dtype and layout, ordinary values and ugly ones."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np

N_TOKENS = (1, 2, 3, 31, 32, 33, 63, 64, 65, 257)
HEAD_DIMS = (1, 3, 64, 80, 96, 128, 256)
FLOAT_DTYPES = ("float32", "float16", "bfloat16")

#: Values of every kind that float32 has.
any_float = st.floats(width=32)
finite_float = st.floats(width=32, allow_nan=False, allow_infinity=False)

shapes = st.tuples(
    st.integers(1, 2),
    st.integers(1, 3),
    st.one_of(st.sampled_from(N_TOKENS), st.integers(1, 140)),
    st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 140)),
)


@st.composite
def arrays(draw, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Float32 values: noise, some channels and tokens larger, some values from a short list."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.standard_normal(shape)
    values *= np.exp(draw(st.sampled_from((0.0, 1.0, 2.0))) * generator.standard_normal(shape[-1]))
    values += draw(st.sampled_from((0.0, 5.0))) * generator.standard_normal(shape[-1])
    if draw(st.booleans()):
        values[..., generator.integers(shape[-2]), :] *= 20
    if draw(st.booleans()):
        values[..., generator.integers(shape[-1])] = draw(st.sampled_from((0.0, -0.0, 1.5, 1e-30)))
    return (values * scale).astype(np.float32)
