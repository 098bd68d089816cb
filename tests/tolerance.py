"""How far a result may be from the reference, and why: error models, not guesses."""

from __future__ import annotations

import numpy as np

#: Unit roundoff, 2 ** -(bits of the significand): what one rounding can cost, relative to a value.
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

#: Half the smallest subnormal: what rounding near zero can cost.
FLOOR = {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}


def one_rounding(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return what rounding `values` to a dtype can change."""
    return np.abs(values) * UNIT[dtype] + FLOOR[dtype]


def quantised(plane: np.ndarray, scale: np.ndarray, minimum: np.ndarray, top: int, dtype: str):
    """Bound |x - decoded| of an integer codec for finite x.

    Half a step; what the codes cannot reach because scale and minimum were rounded to bfloat16 (the
    lower end moves by the minimum's rounding, the upper by that and `top` times the scale's); the
    roundings of the subtraction, of the division and of the sum in float32, each relative to values
    no larger than |minimum| + top * scale; the rounding of the result.
    """
    reach = np.abs(minimum) + top * scale
    ends = one_rounding(minimum, "bfloat16") + top * one_rounding(scale, "bfloat16")
    single = 4 * one_rounding(reach, "float32")
    return scale / 2 + ends + single + one_rounding(np.abs(plane) + scale + ends, dtype)


def shared(layer: np.ndarray, dtype: str) -> np.ndarray:
    """Bound |restored - reference| of `share`, per element, for the reference's restored values.

    The direction, the magnitude and the product are rounded once each. The direction itself is
    computed in float32 from unit vectors: its angle (two square roots and an arc tangent; the
    weights magnify its error by up to 1 / sine), the weights and the sums move an element by some
    float32 units of the vector's length.
    """
    magnitude = "bfloat16" if dtype == "bfloat16" else "float32"
    length = np.linalg.norm(layer, axis=-1, keepdims=True)
    relative = 2 * UNIT[dtype] + UNIT[magnitude]
    single = 64 * UNIT["float32"] * length
    return np.abs(layer) * relative * 1.01 + single + FLOOR[dtype] * (1 + length)
