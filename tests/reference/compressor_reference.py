"""The lossy codecs in float64 NumPy, and readers of their payloads; imports nothing from krul.

Elements of every dtype are float64 arrays here; `round_to` rounds them as a dtype would. The
readers follow csrc/FORMAT.md and share no code with the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 64
UPPER_WEIGHT = 0.6
MAGNITUDE = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the nearest value of a dtype, ties to even."""
    with np.errstate(over="ignore"):
        single = np.asarray(values, np.float64).astype(np.float32)
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        bits = single.view(np.uint32).astype(np.uint64)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    return single.astype(np.float64)


def read_elements(payload: bytes, dtype: str, n_elements: int, offset: int = 0) -> np.ndarray:
    """Read little-endian elements as float64."""
    if dtype == "bfloat16":
        bits = np.frombuffer(payload, "<u2", n_elements, offset).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    letter = {"float32": "<f4", "float16": "<f2"}[dtype]
    return np.frombuffer(payload, letter, n_elements, offset).astype(np.float64)


# ---- int8 and int4 ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantised:
    """One plane: codes (n_tokens x head_dim), with scale and minimum spread to the same shape."""

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray

    def decode(self) -> np.ndarray:
        """Minimum + code * scale; every value is one that float32 can hold."""
        return round_to(self.minimum + self.codes * self.scale, "float32")


def spread(parameters: np.ndarray, kv: str, n_tokens: int, head_dim: int) -> np.ndarray:
    """Repeat [group, channel] of keys, or [token, group] of values, over the groups."""
    if kv == "key":
        return np.repeat(parameters, GROUP, axis=0)[:n_tokens]
    return np.repeat(parameters, GROUP, axis=1)[:, :head_dim]


def quantise(plane: np.ndarray, kv: str, bits: int) -> Quantised:
    """Quantise n_tokens x head_dim values."""
    n_tokens, head_dim = plane.shape
    axis = 0 if kv == "key" else 1
    starts = np.arange(0, plane.shape[axis], GROUP)
    least = np.minimum.reduceat(plane, starts, axis=axis)
    greatest = np.maximum.reduceat(plane, starts, axis=axis)
    top = 2**bits - 1
    scale = spread(round_to((greatest - least) / top, "bfloat16"), kv, n_tokens, head_dim)
    minimum = spread(round_to(least, "bfloat16"), kv, n_tokens, head_dim)
    codes = np.rint((plane - minimum) / np.where(scale > 0, scale, 1)).clip(0, top)
    return Quantised(codes, scale, minimum)


def row_bytes(bits: int, head_dim: int) -> int:
    """Bytes of one token's codes."""
    return head_dim if bits == 8 else (head_dim + 1) // 2


def group_shape(kv: str, n_tokens: int, head_dim: int) -> tuple[int, int]:
    """Return how scales and minima of a plane are arranged."""
    rows, columns = (GROUP, 1) if kv == "key" else (1, GROUP)
    return -(-n_tokens // rows), -(-head_dim // columns)


def plane_bytes(kv: str, bits: int, n_tokens: int, head_dim: int) -> int:
    """Bytes of one plane: a bfloat16 scale and minimum per group, and the codes."""
    n_rows, n_columns = group_shape(kv, n_tokens, head_dim)
    return 4 * n_rows * n_columns + n_tokens * row_bytes(bits, head_dim)


def read_plane(
    payload: bytes, offset: int, kv: str, bits: int, n_tokens: int, head_dim: int
) -> Quantised:
    """Read one plane."""
    shape = group_shape(kv, n_tokens, head_dim)
    n_groups = shape[0] * shape[1]
    scale = read_elements(payload, "bfloat16", n_groups, offset).reshape(shape)
    minimum = read_elements(payload, "bfloat16", n_groups, offset + 2 * n_groups).reshape(shape)
    n_bytes = n_tokens * row_bytes(bits, head_dim)
    packed = np.frombuffer(payload, np.uint8, n_bytes, offset + 4 * n_groups)
    packed = packed.reshape(n_tokens, -1)
    if bits == 8:
        codes = packed
    else:
        codes = np.zeros((n_tokens, head_dim), np.uint8)
        for start in range(0, head_dim, GROUP):
            width = min(GROUP, head_dim - start)
            half = (width + 1) // 2
            pairs = packed[:, start // 2 : start // 2 + half]
            codes[:, start : start + half] = pairs & 15
            codes[:, start + half : start + width] = (pairs >> 4)[:, : width - half]
    return Quantised(
        codes.astype(np.float64),
        spread(scale, kv, n_tokens, head_dim),
        spread(minimum, kv, n_tokens, head_dim),
    )


def read_int(payload: bytes, kv: str, bits: int, shape: tuple[int, ...]) -> list[Quantised]:
    """Read the planes of a block of n_batch x n_heads x n_tokens x head_dim."""
    n_batch, n_heads, n_tokens, head_dim = shape
    size = plane_bytes(kv, bits, n_tokens, head_dim)
    assert len(payload) == n_batch * n_heads * size
    return [
        read_plane(payload, plane * size, kv, bits, n_tokens, head_dim)
        for plane in range(n_batch * n_heads)
    ]


# ---- share --------------------------------------------------------------------------------------


def n_kept_tokens(n_tokens: int) -> int:
    """How many of a block's tokens are kept in full."""
    return n_tokens * 5 // 100


def angles(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Angle between vectors along the last axis, in radians; 0 for a zero vector."""
    norms = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (lower, upper)]
    units = [x / np.where(n > 0, n, 1) for x, n in zip((lower, upper), norms, strict=True)]
    apart = np.linalg.norm(units[0] - units[1], axis=-1)
    along = np.linalg.norm(units[0] + units[1], axis=-1)
    is_zero = ((norms[0] == 0) | (norms[1] == 0))[..., 0]
    return np.where(is_zero, 0, 2 * np.arctan2(apart, along))


def kept_tokens(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Positions of the tokens with the largest angles summed over batch and heads, ascending."""
    total = angles(lower, upper).sum(axis=(0, 1))
    order = np.lexsort((np.arange(total.size), -total))
    return np.sort(order[: n_kept_tokens(total.size)])


def merge(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Return the direction between two layers' vectors, of length 1 (0 where both are zero)."""
    norms = [np.linalg.norm(x, axis=-1, keepdims=True) for x in (lower, upper)]
    units = [x / np.where(n > 0, n, 1) for x, n in zip((lower, upper), norms, strict=True)]
    omega = angles(lower, upper)[..., None]
    sine = np.sin(omega)
    is_arc = sine > 1e-3
    safe = np.where(is_arc, sine, 1)
    weights = [1 - UPPER_WEIGHT, UPPER_WEIGHT]
    weights = [np.where(is_arc, np.sin(w * omega) / safe, w) for w in weights]
    weights[0] = np.where(norms[0] == 0, 0, np.where(norms[1] == 0, 1, weights[0]))
    weights[1] = np.where(norms[1] == 0, 0, np.where(norms[0] == 0, 1, weights[1]))
    direction = weights[0] * units[0] + weights[1] * units[1]
    length = np.linalg.norm(direction, axis=-1, keepdims=True)
    return direction / np.where(length > 0, length, 1)


def share(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both layers as `share` would restore them if nothing were rounded."""
    direction = merge(lower, upper)
    kept = kept_tokens(lower, upper)
    restored = []
    for layer in (lower, upper):
        back = direction * np.linalg.norm(layer, axis=-1, keepdims=True)
        back[:, :, kept] = layer[:, :, kept]
        restored.append(back)
    return restored[0], restored[1]


@dataclass(frozen=True)
class Shared:
    """The parts of a payload of `share` or `share+int`."""

    kept: np.ndarray
    kept_rows: list[np.ndarray]
    magnitudes: list[np.ndarray]
    directions: np.ndarray

    def decode(self, dtype: str) -> list[np.ndarray]:
        """Put both layers together."""
        n_batch, n_heads, n_merged, head_dim = self.directions.shape
        n_tokens = n_merged + self.kept.size
        merged = np.setdiff1d(np.arange(n_tokens), self.kept)
        layers = []
        for rows, magnitudes in zip(self.kept_rows, self.magnitudes, strict=True):
            layer = np.empty((n_batch, n_heads, n_tokens, head_dim))
            layer[:, :, self.kept] = rows
            layer[:, :, merged] = round_to(self.directions * magnitudes[..., None], dtype)
            layers.append(layer)
        return layers


def read_share(payload: bytes, bits: int, dtype: str, shape: tuple[int, ...]) -> Shared:
    """Read a payload; bits 0 is plain `share`."""
    n_batch, n_heads, n_tokens, head_dim = shape
    n_planes = n_batch * n_heads
    n_kept = n_kept_tokens(n_tokens)
    n_merged = n_tokens - n_kept
    kept = np.frombuffer(payload, "<u4", n_kept).astype(np.int64)
    offset = 4 * n_kept
    kept_rows, magnitudes = [], []
    for _ in range(2):
        rows = read_elements(payload, dtype, n_planes * n_kept * head_dim, offset)
        kept_rows.append(rows.reshape(n_batch, n_heads, n_kept, head_dim))
        offset += n_planes * n_kept * head_dim * ITEM_BYTES[dtype]
    for _ in range(2):
        numbers = read_elements(payload, MAGNITUDE[dtype], n_planes * n_merged, offset)
        magnitudes.append(numbers.reshape(n_batch, n_heads, n_merged))
        offset += n_planes * n_merged * ITEM_BYTES[MAGNITUDE[dtype]]
    if bits == 0:
        directions = read_elements(payload, dtype, n_planes * n_merged * head_dim, offset)
        offset += n_planes * n_merged * head_dim * ITEM_BYTES[dtype]
    else:
        planes = []
        for _ in range(n_planes):
            planes.append(read_plane(payload, offset, "value", bits, n_merged, head_dim).decode())
            offset += plane_bytes("value", bits, n_merged, head_dim)
        directions = np.stack(planes)
    assert offset == len(payload)
    return Shared(kept, kept_rows, magnitudes, directions.reshape(*shape[:2], n_merged, head_dim))
