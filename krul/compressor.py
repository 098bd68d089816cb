"""Compress one block of keys or values: the codecs, for experiments and for the save path.

A *block* is a run of tokens of one tensor, keys or values, of one layer, or of two layers that
share what they have in common. Arrays are ``n_batch x n_kv_heads x n_tokens x head_dim``, or fewer
dimensions with the missing ones in front; float32, float16 or bfloat16; NumPy, torch or anything
else with DLPack or the buffer protocol, on the CPU.

========== ====== ======================================================================
codec      layers what is stored
========== ====== ======================================================================
exact      1 or 2 every bit; exponents entropy-coded
int8, int4 1      codes with a bfloat16 scale and minimum: keys per channel over groups of
                  64 tokens, values per token over groups of 64 channels
share      2      per token and head one direction between the two layers, weighted 0.6 towards
                  the upper one (SLERP), and two magnitudes; the 5 % of tokens whose directions
                  differ most in full (arXiv 2507.08045; the operator is arXiv 2405.14366)
share+int8 2      the same, the direction as int8
share+int4 2      the same, the direction as int4
========== ====== ======================================================================

Codec `predict` is not here: it codes chains of layers with a profile, see `krul.predictor`.

A block with a value that is not finite, or beyond what the codec can hold, is stored `exact`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import _core
from .errors import DTypeError, ShapeError

__all__ = [
    "BLOCK_CODECS",
    "CODECS",
    "GROUP_TOKENS",
    "MAX_BLOCK_BYTES",
    "MAX_BLOCK_TOKENS",
    "Block",
    "compress",
    "decompress",
    "token_runs",
]

#: The number of every codec, by name; the numbers are in files and never change.
CODECS: dict[str, int] = _core.codecs()

#: Keys are quantised over groups of so many tokens, so blocks are cut at multiples of it.
GROUP_TOKENS = 64

#: Most raw bytes of one tensor in a block.
MAX_BLOCK_BYTES = 4 * 1024 * 1024

#: Most tokens in a block: a block is read whole, so this is how finely a restore can divide a layer
#: into what is recomputed and what is loaded.
MAX_BLOCK_TOKENS = 512

#: Those that code blocks one by one; `predict` codes chains of layers with a profile.
BLOCK_CODECS: dict[str, int] = {
    name: number for name, number in CODECS.items() if name != "predict"
}

_NAMES = {number: name for name, number in CODECS.items()}
_KV = {"key": 0, "value": 1}


@dataclass(frozen=True)
class Block:
    """A compressed block, and what it takes to have it back.

    Attributes
    ----------
    codec : str
        What the block was coded with: the codec asked for, or ``"exact"`` where that one could not
        hold it.
    kv : str
        ``"key"`` or ``"value"``.
    payload : bytes
        The compressed bytes; ``csrc/FORMAT.md`` says how they are laid out.
    shape : tuple of int
        Of each array.
    n_arrays : int
        1, or 2 where two layers share.
    dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    relative_error : float
        Root of ``sum |x - decoded|^2 / sum |x|^2`` over all arrays.
    raw_bytes : int
        Bytes of the arrays.
    """

    codec: str
    kv: str
    payload: bytes
    shape: tuple[int, ...]
    n_arrays: int
    dtype: str
    relative_error: float
    raw_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the payload."""
        return len(self.payload)

    @property
    def ratio(self) -> float:
        """How many times smaller the payload is than the arrays."""
        return self.raw_bytes / self.n_bytes if self.payload else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def compress(codec: str, kv: str, *arrays: Any) -> Block:
    """Compress one array, or the arrays of two layers that share.

    Parameters
    ----------
    codec : str
        One of `BLOCK_CODECS`.
    kv : str
        ``"key"`` or ``"value"``: which way groups of codes run.
    *arrays : array
        One, or the lower and the upper layer's; n_batch x n_kv_heads x n_tokens x head_dim or fewer
        dimensions; float32, float16 or bfloat16; rows along the last axis contiguous.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        A codec or kv that does not exist; arrays of which there are too many.
    krul.ShapeError
        Arrays of different shapes, or another number of them than the codec takes.
    krul.DTypeError
        Arrays of different or other dtypes.

    Notes
    -----
    One thread, GIL released. The order of 1 GB of input per second.

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.random.default_rng(0).standard_normal((1, 2, 128, 64)).astype(np.float32)
    >>> block = compress("int8", "key", keys)
    >>> block.codec, block.n_bytes, block.relative_error < 0.01
    ('int8', 17408, True)
    >>> back = decompress(block)
    >>> bool(abs(back - keys).max() < 0.03)
    True
    """
    _check_name("codec", codec, BLOCK_CODECS)
    _check_name("kv", kv, _KV)
    ((payload, used, error, power),) = _core.encode_blocks([(CODECS[codec], _KV[kv], arrays)], 1)
    shape = tuple(int(extent) for extent in arrays[0].shape)
    dtype = str(arrays[0].dtype).rpartition(".")[2]
    return Block(
        codec=_NAMES[used],
        kv=kv,
        payload=payload,
        shape=shape,
        n_arrays=len(arrays),
        dtype=dtype,
        relative_error=math.sqrt(error / power) if power > 0 else 0.0,
        raw_bytes=len(arrays) * math.prod(shape) * (4 if dtype == "float32" else 2),
    )


def decompress(block: Block, out: Any = None) -> Any:
    """Bring a block back.

    Parameters
    ----------
    block : Block
        As `compress` returned it.
    out : array, or sequence of arrays and None, optional
        Where to, of the block's shape and dtype; None in a sequence for an array that is not
        wanted. Without `out`, NumPy arrays are made; NumPy has no bfloat16, those blocks need
        `out`.

    Returns
    -------
    array, or tuple of arrays
        `out`, or what was made: one array, or a tuple of two where two layers share.

    Raises
    ------
    krul.DTypeError
        A bfloat16 block without `out`, or `out` of another dtype.
    krul.ShapeError
        `out` of another shape.
    krul.CorruptionError
        A payload that no encoder wrote; `out` may then be partly written.

    Notes
    -----
    One thread, GIL released; about as fast as memory can be copied.

    Examples
    --------
    >>> import numpy as np
    >>> lower = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> block = compress("share", "value", lower, 2 * lower)
    >>> only_upper = np.empty_like(lower)
    >>> _ = decompress(block, [None, only_upper])
    >>> bool(np.allclose(only_upper, 2 * lower, rtol=1e-6))
    True
    """
    if out is None:
        if block.dtype == "bfloat16":
            raise DTypeError("block is bfloat16, which NumPy has not: pass out=torch.empty(...)")
        arrays: tuple[Any, ...] = tuple(
            np.empty(block.shape, block.dtype) for _ in range(block.n_arrays)
        )
    else:
        arrays = tuple(out) if isinstance(out, Sequence) else (out,)
    if len(arrays) != block.n_arrays:
        raise ShapeError(f"out has {len(arrays)} arrays but block has {block.n_arrays}")
    for index, array in enumerate(arrays):
        if array is None:
            continue
        name = "out" if out is None or array is out else f"out[{index}]"
        dtype = str(array.dtype).rpartition(".")[2]
        if tuple(array.shape) != block.shape:
            raise ShapeError(f"{name} is {tuple(array.shape)} but block is {block.shape}")
        if dtype != block.dtype:
            raise DTypeError(f"{name} is {dtype} but block is {block.dtype}")
    _core.decode_blocks([(CODECS[block.codec], _KV[block.kv], block.payload, arrays)], 1)
    if out is not None:
        return out
    return arrays[0] if block.n_arrays == 1 else arrays


def token_runs(
    token_start: int, token_end: int, bytes_per_token: int, first_exact: int
) -> list[tuple[int, int]]:
    """Cut a range of tokens into the runs that become blocks.

    The conversation's first `first_exact` tokens are runs of their own. All others are cut at
    multiples of `GROUP_TOKENS` from where they begin, at most `MAX_BLOCK_BYTES` and
    `MAX_BLOCK_TOKENS` each.

    Parameters
    ----------
    token_start, token_end : int
        Positions in the conversation, the end excluded.
    bytes_per_token : int
        Raw bytes of one token in one layer's keys or values, over batch and heads.
    first_exact : int
        How many tokens at the conversation's beginning stand apart.

    Returns
    -------
    list of (int, int)
        Start and end of each run, in order, without gaps; empty for an empty range.

    Raises
    ------
    ValueError
        A range that ends before it starts, a negative number, or tokens of no bytes.

    Examples
    --------
    >>> token_runs(0, 1200, 2048, 4)
    [(0, 4), (4, 516), (516, 1028), (1028, 1200)]
    >>> token_runs(5000, 5100, 2048, 4)
    [(5000, 5100)]
    """
    if not 0 <= token_start <= token_end:
        raise ValueError(f"token_start is {token_start} but token_end is {token_end}")
    if bytes_per_token < 1:
        raise ValueError(f"bytes_per_token is {bytes_per_token} but must be at least 1")
    if first_exact < 0:
        raise ValueError(f"first_exact is {first_exact} but must be at least 0")
    n_tokens = min(max(MAX_BLOCK_BYTES // bytes_per_token, 1), MAX_BLOCK_TOKENS)
    if n_tokens > GROUP_TOKENS:
        n_tokens -= n_tokens % GROUP_TOKENS
    first_end = min(max(first_exact, token_start), token_end)
    return [
        (start, min(start + n_tokens, end))
        for begin, end in ((token_start, first_end), (first_end, token_end))
        for start in range(begin, end, n_tokens)
    ]


def _check_name(argument: str, value: str, known: dict[str, int]) -> None:
    if value not in known:
        raise ValueError(f"{argument} is {value!r} but must be one of {', '.join(known)}")
