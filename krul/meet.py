"""Where loading and recomputing meet: what is left of a restore under way, divided anew.

A plan divides a history by what was measured before; while it is carried out both sides turn out
faster or slower. So the model runs over the history in columns of tokens, from the first, and
before each it is decided again how many of them, and of the last one how many layers, are
recomputed. The other blocks are loaded: those at the end, and of a column the deepest layers, which
nothing above needs to be recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Block", "columns_between", "meet"]


class Block(NamedTuple):
    """What the channel may bring beside what it must, in the order in which it does.

    Attributes
    ----------
    column : int
        Which column its tokens are in.
    layers : tuple of int
        Whose it is.
    read_s, decode_s : float
        What bringing it takes of the channel, and of the model's processors.
    """

    column: int
    layers: tuple[int, ...]
    read_s: float
    decode_s: float


def columns_between(starts: Sequence[int], end: int, at_least: int) -> list[int]:
    """Return where columns end: where blocks begin, at least so many tokens apart, and `end`.

    Examples
    --------
    >>> columns_between([0, 4, 516, 1028, 1540], 1300, 256)
    [516, 1028, 1300]
    """
    ends: list[int] = []
    for start in sorted(starts):
        if start - (ends[-1] if ends else 0) >= at_least and start < end:
            ends.append(start)
    return [*ends, end]


def meet(
    work_s: Sequence[Sequence[float]],
    blocks: Sequence[Block],
    stuck: Iterable[tuple[int, int]],
    prompt_by_layer_s: Sequence[float],
) -> list[int]:
    """Say up to which layer each column is best recomputed, from now on.

    Parameters
    ----------
    work_s : sequence of sequences of float
        What recomputing takes, by column, from the one that is next, and by layer. Layers that are
        to be loaded there anyway are left out: they lie above those that are not.
    blocks : sequence of Block
        What the channel may bring, the first so many of these. What is not mentioned is there.
    stuck : iterable of (int, int)
        Columns and layers that cannot come.
    prompt_by_layer_s : sequence of float
        The new prompt's pass, for all layers: the deepest, which it reaches last, may come last.

    Returns
    -------
    list of int
        For each column how many layers, from the first, are recomputed.

    Examples
    --------
    Two columns of two equal layers: two blocks come while one of the others is recomputed.

    >>> blocks = [Block(1, (1,), 0.5, 0), Block(1, (0,), 0.5, 0), Block(0, (1,), 0.5, 0)]
    >>> meet([[1.0, 1.0], [1.0, 1.0]], blocks, [(0, 0)], [0.0, 0.0])
    [1, 0]
    """
    missing: list[list[float]] = [[0.0] * len(column) for column in work_s]
    for column, layer in stuck:
        if layer < len(missing[column]):
            missing[column][layer] = math.inf
    for block in blocks:
        for layer in block.layers:
            if layer < len(missing[block.column]):
                missing[block.column][layer] += 1
    n_layers = [len(column) for column in work_s]
    work_left_s = sum(map(sum, work_s))

    def take_what_is_there(column: int) -> None:
        nonlocal work_left_s
        while n_layers[column] > 0 and missing[column][n_layers[column] - 1] == 0:
            n_layers[column] -= 1
            work_left_s -= work_s[column][n_layers[column]]

    for column in range(len(work_s)):
        take_what_is_there(column)
    best_s, best = work_left_s, list(n_layers)
    early_s = sum(prompt_by_layer_s[:-1])
    channel_s = decode_s = 0.0
    for block in blocks:
        channel_s += block.read_s
        decode_s += block.decode_s
        for layer in block.layers:
            if layer < len(missing[block.column]):
                missing[block.column][layer] -= 1
        take_what_is_there(block.column)
        end_s = max(work_left_s + decode_s, channel_s - early_s)
        if end_s < best_s * (1 - 1e-9):
            best_s, best = end_s, list(n_layers)
    return best
