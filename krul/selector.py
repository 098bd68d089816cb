"""Which layer pairs share their KV: small, exact, deterministic.

The paper's choice (Krul, arXiv 2507.08045, section 4): input-sensitive layers are left alone; of
the others the closest pairs are taken greedily, each layer once. The baseline (MiniCache,
arXiv 2405.14366) joins adjacent layers from the middle upwards whatever the conversation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core
from .errors import ShapeError

__all__ = ["choose_pairs", "fixed_pairs", "pair_count", "token_fineness"]

# Levels, of which three halve a step, for twice the attention.
_LEVELS_PER_DOUBLING = 1.5
_LEAST_FINENESS, _MOST_FINENESS = -4, 12
_LEAST_SHARE = 1e-12
# What fewer queries than these see is not known, and taken to be like so many before it.
_MIN_SEEN = 8
_N_NEWEST = 64


def pair_count(n_layers: int, ratio: float) -> int:
    """Return how many pairs leave at most `ratio` of the layers' bytes, each pair saving one layer.

    Parameters
    ----------
    n_layers : int
        Layers that could share.
    ratio : float
        Part of the bytes that may be left, 0.5 to 1.

    Returns
    -------
    int
        ``ceil((1 - ratio) * n_layers)``, at most ``n_layers // 2``.

    Examples
    --------
    >>> pair_count(30, 0.75)
    8
    """
    return _core.pair_count(n_layers, ratio)


def choose_pairs(
    distances: Any, importance: Any, layer_class: Any, n_sensitive: int, n_pairs: int
) -> np.ndarray:
    """Choose the pairs of layers that attend most alike.

    Parameters
    ----------
    distances : array_like
        float64, n_layers x n_layers; the upper triangle is used. NaN: never paired.
    importance : array_like
        float64, n_layers x 2 (mass on the first and last tokens) or n_layers (their sum). NaN
        counts as most important.
    layer_class : array_like
        int32, n_layers: only layers of one class may share (same window, rotary base, shapes).
    n_sensitive : int
        Layers with the largest importance that are left alone; ties: the lower layer.
    n_pairs : int
        Pairs wanted; fewer are returned when no more can be found.

    Returns
    -------
    numpy.ndarray
        int32, n x 2: lower and upper layer, closest pair first. Ties go to the nearer pair, then to
        the lower layer.

    Raises
    ------
    krul.ShapeError
        The arrays do not have the same number of layers.
    ValueError
        A count is below 0.

    Examples
    --------
    >>> distances = [[0, 5, 1], [5, 0, 2], [1, 2, 0]]
    >>> choose_pairs(distances, [0.1, 0.9, 0.2], [0, 0, 0], n_sensitive=0, n_pairs=1).tolist()
    [[0, 2]]
    >>> choose_pairs(distances, [0.9, 0.1, 0.2], [0, 0, 0], n_sensitive=1, n_pairs=1).tolist()
    [[1, 2]]
    """
    distances = np.asarray(distances, np.float64)
    importance = np.asarray(importance, np.float64)
    layer_class = np.asarray(layer_class, np.int32)
    if importance.ndim == 1:
        importance = np.stack([importance, np.zeros_like(importance)], axis=1)
    if distances.ndim != 2 or importance.ndim != 2 or layer_class.ndim != 1:
        raise ShapeError(
            f"distances is {distances.shape}, importance {importance.shape} and layer_class "
            f"{layer_class.shape} but they must have 2, 2 (or 1) and 1 dimensions"
        )
    return _core.choose_pairs(distances, importance, layer_class, n_sensitive, n_pairs)


def fixed_pairs(layer_class: Any, n_pairs: int) -> np.ndarray:
    """Return adjacent pairs of one class from the middle upwards, whatever the conversation.

    Parameters
    ----------
    layer_class : array_like
        int32, n_layers.
    n_pairs : int
        Pairs wanted; fewer are returned when the last layer is reached.

    Returns
    -------
    numpy.ndarray
        int32, n x 2: lower and upper layer.

    Raises
    ------
    krul.ShapeError
        `layer_class` has not one dimension.
    ValueError
        `n_pairs` is below 0.

    Examples
    --------
    >>> fixed_pairs([0] * 8, 2).tolist()
    [[4, 5], [6, 7]]
    """
    layer_class = np.asarray(layer_class, np.int32)
    if layer_class.ndim != 1:
        raise ShapeError(f"layer_class is {layer_class.shape} but must have 1 dimension")
    return _core.fixed_pairs(layer_class, n_pairs)


def token_fineness(received: Any, n_seen: Any, first: int = 0) -> np.ndarray:
    """Say how much finer than others a token is to be quantised, by the attention that it gets.

    An error in K or V does harm in proportion to the attention that is paid to it, which tokens
    share by orders of magnitude: most goes to the newest, and to more or fewer of them by layer.

    Parameters
    ----------
    received : array_like
        n_layers x n_tokens: attention mass that each token received.
    n_seen : array_like
        n_tokens: queries that could see it.
    first : int
        The first of the tokens that are to be coded; those before it are no measure for others.

    Returns
    -------
    numpy.ndarray
        int8, n_layers x n_tokens: a token's step is ``2 ** (-fineness / 3)`` times the step of all.
        0 for the median of a layer's tokens, and for layers of which nothing is known. Tokens that
        too few queries see, which are the newest, are taken to be like those before them.

    Raises
    ------
    krul.ShapeError
        The arrays do not fit together.

    Examples
    --------
    >>> token_fineness([[1.0, 1.0, 4.0, 64.0, 1.0]], [20] * 5).tolist()
    [[0, 0, 3, 9, 0]]
    """
    received, n_seen = np.asarray(received, np.float64), np.asarray(n_seen)
    if received.ndim != 2 or n_seen.shape != received.shape[1:]:
        raise ShapeError(
            f"received is {received.shape} and n_seen {n_seen.shape} but they must be layers x "
            "tokens, and tokens"
        )
    fineness = np.zeros(received.shape, np.int8)
    is_known = n_seen >= _MIN_SEEN
    is_usual = is_known & (np.arange(len(n_seen)) >= first)
    if not is_usual.any():
        return fineness
    for layer, mass in enumerate(received):
        if not np.isfinite(mass).all() or not mass.any():
            continue
        share = np.log2(np.maximum(mass / np.maximum(n_seen, 1), _LEAST_SHARE))
        levels = np.rint(_LEVELS_PER_DOUBLING * (share - np.median(share[is_usual])))
        levels[~is_known] = np.rint(np.median(levels[is_usual][-_N_NEWEST:]))
        fineness[layer] = np.clip(levels, _LEAST_FINENESS, _MOST_FINENESS)
    return fineness
