"""Takes keys back to what they were before rotary embedding, and proves for a model that it does.

A model turns pairs of numbers of a key by an angle that grows with the position. Which numbers make
a pair, where they stand in the head and how fast each pair turns differs from family to family.
Nothing here knows a family: every rule that the model's own frequencies allow is tried on keys of
one prompt at several positions, and the one that brings back the same keys each time is taken.
Where none does, there is a reason instead.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .model import (
    Recorder,
    decoder_layers,
    generation_model,
    input_device,
    own_layers,
    run_apart,
    short_prompt,
    text_config,
    undisturbed,
)

__all__ = ["CONVENTIONS", "Rotary", "find_rotary", "rotate", "unrotate"]

# "half": number i of the part that is rotated belongs to number i + half of it; "interleaved":
# number 2 i to 2 i + 1; "none": nothing is rotated.
CONVENTIONS = ("none", "half", "interleaved")

# Frequencies that follow the length of the history: what is stored would turn with every new token.
_BY_LENGTH = ("dynamic", "longrope")

_N_PROMPT_TOKENS = 16
_NEAR_SHIFT = 37


@dataclass(frozen=True, eq=False)
class Rotary:
    """How one layer turns its keys.

    Attributes
    ----------
    convention : str
        One of :data:`CONVENTIONS`.
    start : int
        The first number of a head that is rotated.
    frequencies : numpy.ndarray
        float32 [n_pairs], radians per position; negative where a model turns the other way.
    scaling : float
        What the model multiplies cosine and sine with (yarn).
    """

    convention: str
    start: int
    frequencies: np.ndarray
    scaling: float

    @property
    def n_rotated(self) -> int:
        """Numbers of a head that are rotated."""
        return 2 * len(self.frequencies)

    def tables(self, positions: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine and sine for some positions.

        Parameters
        ----------
        positions : array of int
            Shape (n_tokens,).

        Returns
        -------
        cos, sin : numpy.ndarray
            float32 [n_tokens, n_pairs] each, `scaling` included.
        """
        places = np.asarray(positions)
        if places.ndim != 1:
            raise ValueError(f"positions has {places.ndim} dimensions but must have 1")
        # The angle is rounded to float32 as the models round it; at position 100,000 that matters.
        angles = places.astype(np.float32)[:, None] * self.frequencies[None, :]
        wide = angles.astype(np.float64)
        cos = (np.cos(wide) * self.scaling).astype(np.float32)
        sin = (np.sin(wide) * self.scaling).astype(np.float32)
        return cos, sin

    def to_dict(self) -> dict[str, Any]:
        """Return all but the frequencies as plain JSON values."""
        return {"convention": self.convention, "start": self.start, "scaling": self.scaling}


def _parts(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, convention: str, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the second number of every pair, as views of `keys`."""
    if convention not in CONVENTIONS[1:]:
        raise ValueError(
            f"convention is {convention!r} but must be one of {', '.join(CONVENTIONS[1:])}"
        )
    n_pairs, head_dim = cos.shape[-1], keys.shape[-1]
    if cos.shape != sin.shape or cos.shape != (keys.shape[-2], n_pairs):
        raise ValueError(
            f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)} but keys of shape "
            f"{tuple(keys.shape)} need ({keys.shape[-2]}, pairs) of both"
        )
    if start < 0 or start + 2 * n_pairs > head_dim:
        raise ValueError(
            f"start is {start} and {2 * n_pairs} numbers are rotated but a head has {head_dim}"
        )
    rotated = keys[..., start : start + 2 * n_pairs]
    if convention == "half":
        return rotated[..., :n_pairs], rotated[..., n_pairs:]
    return rotated[..., 0::2], rotated[..., 1::2]


def rotate(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    convention: str = "half",
    start: int = 0,
) -> torch.Tensor:
    """Turn keys or queries as the model does.

    Parameters
    ----------
    keys : torch.Tensor
        float32 or float64, shape (..., n_tokens, head_dim).
    cos, sin : torch.Tensor
        Shape (n_tokens, n_pairs), of the same dtype; see :meth:`Rotary.tables`.
    convention : str
        See :data:`CONVENTIONS`.
    start : int
        The first number of a head that is rotated.

    Returns
    -------
    torch.Tensor
        As `keys`, with memory of its own.

    Examples
    --------
    >>> keys, angle = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]])
    >>> turned = rotate(keys, angle.cos(), angle.sin())
    >>> bool(torch.allclose(unrotate(turned, angle.cos(), angle.sin()), keys))
    True
    """
    out = keys.clone()
    if convention == "none":
        return out
    first, second = _parts(keys, cos, sin, convention, start)
    to_first, to_second = _parts(out, cos, sin, convention, start)
    to_first.copy_(first * cos - second * sin)
    to_second.copy_(second * cos + first * sin)
    return out


def unrotate(
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    convention: str = "half",
    start: int = 0,
) -> torch.Tensor:
    """Undo :func:`rotate`, a scaling of cosine and sine included; the parameters are the same."""
    out = keys.clone()
    if convention == "none":
        return out
    first, second = _parts(keys, cos, sin, convention, start)
    to_first, to_second = _parts(out, cos, sin, convention, start)
    size = cos * cos + sin * sin
    to_first.copy_((first * cos + second * sin) / size)
    to_second.copy_((second * cos - first * sin) / size)
    return out


# ---- which rule a model follows ------------------------------------------------------------------


def _by_length(module: torch.nn.Module, prefix: str) -> str | None:
    """Return the kind of a rotary module whose frequencies follow the length of the history."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, dict):
        kind = kind.get(prefix)
    return next((word for word in _BY_LENGTH if isinstance(kind, str) and word in kind), None)


def _frequencies(
    decoder: torch.nn.Module,
) -> tuple[list[tuple[np.ndarray, float]], list[str]]:
    """Return every table of frequencies with its scaling, and kinds that cannot be used."""
    found: list[tuple[np.ndarray, float]] = []
    refused: list[str] = []
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            prefix = name.removesuffix("inv_freq").rstrip("_")
            if name.endswith("inv_freq") and not prefix.endswith("original"):
                kind = _by_length(module, prefix)
                if kind is not None:
                    refused.append(kind)
                    continue
                scaling = getattr(module, f"{prefix}_attention_scaling", None)
                if scaling is None:
                    scaling = getattr(module, "attention_scaling", 1.0)
                numbers = buffer.detach().float().cpu().numpy().reshape(-1)
            elif name == "embed_positions" and buffer.dim() == 2 and len(buffer) > 1:
                # A table of sines and cosines; nothing turns by more than a radian per position.
                sin, cos = buffer[1].detach().double().cpu().chunk(2)
                numbers, scaling = torch.atan2(sin, cos).float().numpy(), 1.0
            else:
                continue
            if not any(
                np.array_equal(numbers, other) and scaling == known for other, known in found
            ):
                found.append((numbers, float(scaling)))
    # Buffers of some models appear only once they have run.
    for module in decoder.modules():
        table = getattr(module, "embed_positions", None)
        if isinstance(table, torch.Tensor) and table.dim() == 2 and len(table) > 1:
            sin, cos = table[1].detach().double().cpu().chunk(2)
            numbers = torch.atan2(sin, cos).float().numpy()
            if not any(np.array_equal(numbers, other) for other, _ in found):
                found.append((numbers, 1.0))
    return found, sorted(set(refused))


def _candidates(tables: list[tuple[np.ndarray, float]], key_dim: int) -> list[Rotary]:
    out = [Rotary("none", 0, np.zeros(0, np.float32), 1.0)]
    for numbers, scaling in tables:
        n_rotated = 2 * len(numbers)
        if n_rotated > key_dim or n_rotated == 0:
            continue
        starts = sorted({0, key_dim - n_rotated})
        for sign, convention, start in itertools.product((1, -1), CONVENTIONS[1:], starts):
            out.append(Rotary(convention, start, (sign * numbers).astype(np.float32), scaling))
    return out


def _states_at(
    inner: torch.nn.Module, decoder: torch.nn.Module, shift: int
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return K and V of a fixed prompt from position `shift` on, [heads, tokens, dim] each."""
    ids = short_prompt(inner, _N_PROMPT_TOKENS)
    cache = Recorder(text_config(inner))
    takes = inspect.signature(inspect.unwrap(type(decoder).forward)).parameters
    inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if "position_ids" in takes:
        positions = torch.arange(shift, shift + ids.shape[1], device=ids.device)[None]
        inputs |= {"input_ids": ids, "position_ids": positions}
    else:
        # Tokens that nothing sees stand before the prompt.
        before = ids[:, :1].expand(-1, min(shift, _NEAR_SHIFT))
        mask = torch.cat([torch.zeros_like(before), torch.ones_like(ids)], dim=1)
        inputs |= {"input_ids": torch.cat([before, ids], dim=1), "attention_mask": mask}
    run_apart(lambda: decoder(**inputs), input_device(inner))
    n_tokens = ids.shape[1]
    return {
        layer: tuple(x[0, :, -n_tokens:].float().cpu() for x in cache.key_value(layer))
        for layer in cache.seen
    }


def _difference(rotary: Rotary, keys: dict[int, torch.Tensor]) -> float:
    """Return how far the keys before rotation are apart at the shifts in `keys`."""
    first, worst = None, 0.0
    for shift, rotated in keys.items():
        tables = rotary.tables(np.arange(shift, shift + rotated.shape[1]))
        cos, sin = (torch.from_numpy(table).double() for table in tables)
        one = unrotate(rotated.double(), cos, sin, convention=rotary.convention, start=rotary.start)
        if first is None:
            first = one
            continue
        size = max(first.norm().item(), one.norm().item())
        distance = (first - one).norm().item()
        if not np.isfinite(distance):
            return float("inf")
        worst = max(worst, distance / size if size > 0 else 0.0)
    return worst


def find_rotary(model: Any) -> tuple[list[Rotary | None], list[str | None]]:
    """Return for each layer how its keys are rotated, or why that cannot be told.

    Parameters
    ----------
    model : torch.nn.Module
        A model that krul supports, or a wrapper of one; left as it was.

    Returns
    -------
    rotary : list of Rotary or None
        One per decoder layer. Layers that rotate alike share one object.
    reasons : list of str or None
        For each layer without a rule, why.

    Notes
    -----
    A prompt of 16 tokens runs at positions from 0, 37 and the last ones that the configuration
    allows, and the un-rotated keys must be the same to 0.001 of their size in float32; a wrong rule
    gives 0.1 and more. In 16 bits, where layers of rounding reach 0.03, the limit is 0.1. Models
    that take no positions get as many masked tokens before the prompt.
    """
    inner = generation_model(model)
    decoder, _ = decoder_layers(inner)
    config = text_config(inner)
    own = own_layers(inner)
    limit = getattr(config, "max_position_embeddings", None)
    far = limit - _N_PROMPT_TOKENS if isinstance(limit, int) else 1000
    shifts = [0] if far <= 0 else sorted({0, min(_NEAR_SHIFT, far), far})
    with undisturbed(inner):
        # Far first: what the model then remembers of lengths is gone after the short ones.
        by_shift = {shift: _states_at(inner, decoder, shift) for shift in reversed(shifts)}
    tables, by_length = _frequencies(decoder)
    is_wide = next(inner.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if is_wide else 1e-1
    made: dict[Any, Rotary] = {}
    rotary: list[Rotary | None] = []
    reasons: list[str | None] = []
    for layer, is_own in enumerate(own):
        if not is_own or layer not in by_shift[0]:
            rotary.append(None)
            reasons.append(f"layer {layer} keeps no K and V of its own")
            continue
        keys = {shift: by_shift[shift][layer][0] for shift in shifts}
        values = {shift: by_shift[shift][layer][1] for shift in shifts}
        tried = _candidates(tables, keys[0].shape[-1])
        distances = [_difference(one, keys) for one in tried]
        best = int(np.argmin(distances))
        if len(shifts) < 3 or not distances[best] <= tolerance:
            rotary.append(None)
            reasons.append(_reason(layer, distances[best], tolerance, len(tried), by_length))
            continue
        unmoved = _difference(tried[0], values)
        if not unmoved <= tolerance:
            rotary.append(None)
            reasons.append(
                f"layer {layer}: what the cache holds as values changes with its position "
                f"(relative difference {unmoved:.2g} > {tolerance:g})"
            )
            continue
        one = tried[best]
        key = (one.convention, one.start, one.frequencies.tobytes(), one.scaling)
        rotary.append(made.setdefault(key, one))
        reasons.append(None)
    return rotary, reasons


def _reason(
    layer: int, distance: float, tolerance: float, n_tried: int, by_length: list[str]
) -> str:
    if by_length:
        return (
            f"layer {layer}: the rotary frequencies follow the length of the history "
            f"({', '.join(by_length)}), so keys of one conversation would be un-rotated in more "
            "ways than one"
        )
    return (
        f"layer {layer}: keys change with their position by more than a rotary embedding that krul "
        f"can undo (none of {n_tried} rules brings back the same keys at other positions: relative "
        f"difference {distance:.2g} > {tolerance:g}); learned positions, or a norm after rotation"
    )
