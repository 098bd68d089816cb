"""Models of published shapes with random weights, and a profile for them that nobody fitted.

What they say is noise, and what they cost is real: time depends on shapes, and the bytes of all
codecs but `exact` and `predict` do too. A profile is made so that the numbers of such a model come
out as small as was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers

import krul
from krul import arrays, profile
from krul.moments import model_form
from krul.simulate import MODELS

__all__ = ["SHAPES", "TINY", "Shape", "random_ids", "random_model", "random_profile"]

#: The step that a save takes while its guard is off.
_STEP = 0.5
_MAX_POSITIONS = 40_960
_VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """What a model's time depends on.

    `n_layers` of `of_layers` are there: times are of those, and what is said of the whole model is
    a multiple of them.
    """

    name: str
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    n_layers: int
    of_layers: int
    vocabulary: int = _VOCABULARY

    @property
    def label(self) -> str:
        """The name, and how much of the model is there."""
        if self.n_layers == self.of_layers:
            return self.name
        return f"{self.name} ({self.n_layers} of {self.of_layers} layers)"

    @property
    def values_per_token(self) -> int:
        """Numbers of K and V that one token has."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    @property
    def bf16_bytes_per_token(self) -> int:
        """Bytes of those as 16-bit numbers."""
        return 2 * self.values_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        """Bytes of the inputs of all layers as 16-bit numbers."""
        return 2 * self.n_layers * self.hidden_size

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights as 16-bit numbers."""
        wide, narrow = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * wide + 2 * narrow + 3 * self.intermediate_size)
        return 2 * (self.n_layers * layer + 2 * self.vocabulary * self.hidden_size)

    def cut(self, n_layers: int) -> Shape:
        """Return the shape with the first layers only."""
        return replace(self, n_layers=n_layers)


def _published(name: str) -> Shape:
    form = MODELS[name]
    return Shape(
        name,
        form.hidden_size,
        form.n_heads,
        form.n_kv_heads,
        form.head_dim,
        form.intermediate_size,
        form.n_layers,
        form.n_layers,
    )


SHAPES = {
    "7b": _published("llama-7b"),
    "8b": _published("llama-3.1-8b"),
    "8b-8": _published("llama-3.1-8b").cut(8),
    "72b-8": _published("qwen2.5-72b").cut(8),
}
#: For a look at the benchmark itself, where there is no GPU.
TINY = Shape("tiny", 128, 4, 2, 32, 192, 4, 4, 256)


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model with weights that spread attention over some tokens, not over all alike.

    So a wrong mask or position changes the logits.
    """
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=_MAX_POSITIONS,
        initializer_range=1.28 / shape.hidden_size**0.5,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_ids(shape: Shape, n_tokens: int, device: torch.device) -> torch.Tensor:
    """Draw token ids, shape (1, n_tokens)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8, shape.vocabulary, (1, n_tokens), generator=generator).to(device)


def step_for(bits: float) -> float:
    """Return the standard deviation, in steps, of normal numbers that take so many bits each."""
    edges = np.arange(-127, 129) - 0.5
    tables = np.maximum(np.stack([profile.frequency_table(profile.laplace_counts(scale))
                                  for scale in profile.TABLE_SCALES]), 1)  # fmt: skip
    costs = -np.log2(tables[:, :-1] / profile.TABLE_TOTAL)
    deviations = 2.0 ** np.arange(-3, 5, 0.05)
    found = []
    for deviation in deviations:
        below = np.array([_normal_below(edge / deviation) for edge in edges])
        found.append((costs @ np.diff(below)).min())
    return float(np.interp(bits, found, deviations))


def _normal_below(x: float) -> float:
    return 0.5 * float(torch.erfc(torch.tensor(-x / 2**0.5, dtype=torch.float64)))


def random_profile(model: Any, layers: Any, ratio: float) -> krul.Profile:
    """Make a profile with which codec `predict` makes a random model's numbers `ratio` smaller.

    Parameters
    ----------
    model : transformers model
    layers : sequence of (keys, values)
        What its layers hold of some tokens; how large the numbers are is read from them.
    ratio : float
        Against 16-bit numbers. The maps are small and the bases orthogonal, as they are of no use.
    """
    form = model_form(model)
    deviation = step_for(16 / ratio) * _STEP
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    meta, form_arrays = form.to_parts()
    shared: dict[int, np.ndarray] = {}
    for index, layer in enumerate(form.layers):
        if layer is None:
            continue
        if layer.width not in shared:
            drawn = random.standard_normal((layer.width, layer.width), np.float32)
            shared[layer.width] = np.linalg.qr(drawn)[0].astype(np.float16)
        made[f"{index} mean"] = np.zeros(layer.width, np.float32)
        made[f"{index} deviation"] = np.full(layer.width, deviation, np.float32)
        made[f"{index} basis"] = shared[layer.width]
        kinds = (("key", layer.key_dim), ("value", layer.value_dim))
        for (kind, dim), tensor in zip(kinds, layers[index], strict=True):
            size = float(tensor.float().square().mean().sqrt())
            triangle = np.eye(dim, dtype=np.float16)[np.triu_indices(dim)]
            made[f"{index} {kind} weight"] = np.tile(triangle, (layer.n_heads, 1))
            made[f"{index} {kind} scale"] = np.full(layer.n_heads, deviation / size, np.float32)
        if layer.sources:
            n_rows = len(layer.sources) * layer.width
            drawn = random.standard_normal((n_rows, layer.width), np.float32)
            made[f"{index} map"] = drawn.astype(np.float16)
            made[f"{index} map scale"] = np.full(1, 0.05 / n_rows**0.5, np.float32)
    made["sensitivities"] = np.zeros((2, len(form.layers)))
    made["tables"] = np.stack(
        [profile.frequency_table(profile.laplace_counts(s)) for s in profile.TABLE_SCALES]
    )
    contents = arrays.encode(
        profile.PROFILE_MAGIC,
        profile.PROFILE_VERSION,
        meta | {"n_tokens": 0, "rank": None},
        made | form_arrays,
    )
    return krul.Profile(contents)
