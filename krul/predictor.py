"""Makes a profile ready for one conversation: what the C codec `predict` works with."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from . import _core, blas
from .profile import TABLE_SCALES, Profile
from .rotary import Rotary

__all__ = ["UNIT_TABLE", "check_products", "choose_products", "make_predictor"]

#: The table for coefficients with a standard deviation of one step.
UNIT_TABLE = int(np.flatnonzero(TABLE_SCALES == 1.0)[0])

#: What the factors of a conversation's products are rounded to, by writer and readers alike.
PRODUCTS = ("bfloat16", "float32")

# Below, rounding would be seen beside the step.
_ROUNDED_FROM_STEP = 0.1

_CONVENTIONS = {"none": 0, "half": 1, "interleaved": 2}


def choose_products(profile: Profile, step: float) -> str:
    """Return what products are to be of where blocks are written with this step.

    Rounded ones where K and V are themselves bfloat16, and else where this processor multiplies
    bfloat16 several times as fast: writer and readers round alike, so that all that is lost is 2^-9
    of each number, little beside half a step while most numbers are some dozens of steps.

    Raises
    ------
    ValueError, NotImplementedError
        There is no library for matrix products; see `krul.blas.find`.
    """
    is_narrow = profile.fingerprint.parts.get("dtype") == "bfloat16"
    is_fast = blas.find().has_bf16 and step >= _ROUNDED_FROM_STEP
    return "bfloat16" if is_narrow or is_fast else "float32"


def check_products(value: object) -> str:
    """Return what a manifest says of products, if this version knows it; raise LookupError."""
    if value not in PRODUCTS:
        raise LookupError(f"products are of {value!r} but must be of {' or '.join(PRODUCTS)}")
    return str(value)


def make_predictor(
    profile: Profile,
    positions: Any,
    products: str,
    *,
    n_batch: int = 1,
    token_start: int = 0,
    is_encoding: bool = False,
) -> _core.Predict:
    """Return the profile's matrices, and the rotation of every token, as the codec takes them.

    Parameters
    ----------
    profile : Profile
    positions : array of int
        What the model was given as positions: shape (n_tokens,), or (n_batch, n_tokens) where
        batches differ.
    products : str
        What the conversation's products are of: "bfloat16" (rounded, however they are multiplied)
        or "float32"; see `choose_products`.
    n_batch : int
        Conversations side by side.
    token_start : int
        The token that the first position is of.
    is_encoding : bool
        Whether the forward bases are wanted, too.

    Returns
    -------
    krul._core.Predict
        For one pass over the chains of a conversation at a time.

    Raises
    ------
    LookupError
        There are no such products.
    ValueError, NotImplementedError
        There is no library for matrix products; see `krul.blas.find`.
    """
    library = blas.find()
    is_rounded = check_products(products) == "bfloat16"
    is_narrow = is_rounded and library.has_bf16
    places = np.asarray(positions, np.int64)
    n_tokens = places.shape[-1]
    are_usual = places.ndim == 1 and bool((places == np.arange(n_tokens)).all())
    tables: dict[tuple[bytes, float], tuple[np.ndarray, np.ndarray]] = {}  # mostly one for all
    layers: list[tuple[Any, ...] | None] = []
    narrow: list[tuple[np.ndarray | None, ...] | None] = []
    for layer in profile.layers:
        if layer is None:
            layers.append(None)
            narrow.append(None)
            continue
        if is_narrow:
            narrow.append((layer.narrow_forward if is_encoding else None, *layer.narrow))
        rotary = layer.rotary
        cos = sin = None
        if rotary.convention != "none":
            key = (rotary.frequencies.tobytes(), rotary.scaling)
            if key not in tables:
                tables[key] = (
                    _usual_tables(rotary, n_tokens)
                    if are_usual
                    else rotary.tables(places.reshape(-1))
                )
            cos, sin = tables[key]
        is_low = layer.left is not None
        layers.append(
            (
                layer.n_heads,
                layer.key_dim,
                layer.sources,
                layer.left.shape[1] if layer.left is not None else 0,
                layer.mean,
                layer.deviation,
                layer.forward if is_encoding else None,
                layer.backward,
                None if is_low or not layer.sources else layer.maps,
                layer.left,
                layer.right,
                _CONVENTIONS[rotary.convention],
                rotary.start,
                len(rotary.frequencies),
                cos,
                sin,
            )
        )
    return _core.Predict(
        library.handle,
        profile.tables,
        UNIT_TABLE,
        layers,
        n_batch,
        token_start,
        n_tokens,
        bytes.fromhex(profile.digest),
        narrow if is_narrow else None,
        is_rounded,
    )


# Cosine and sine of the positions from 0 on, by what makes them: the next conversation of the model
# needs the same, and making them takes longer than all else here.
_made: dict[tuple[bytes, float], tuple[np.ndarray, np.ndarray]] = {}
_MOST_MADE = 4
_lock = threading.Lock()


def _usual_tables(rotary: Rotary, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what `rotary.tables(range(n_tokens))` does, made once for a while."""
    key = (rotary.frequencies.tobytes(), rotary.scaling)
    with _lock:
        made = _made.pop(key, None)
        if made is None or len(made[0]) < n_tokens:
            made = rotary.tables(np.arange(n_tokens + n_tokens // 4))  # conversations grow
        if len(_made) == _MOST_MADE:
            del _made[next(iter(_made))]
        _made[key] = made  # the last, as the one that was wanted last
    cos, sin = made
    return cos[:n_tokens], sin[:n_tokens]
