"""Which coding each part gets: least bytes for an allowed error, by one multiplier."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

__all__ = ["least_bytes"]

Key = TypeVar("Key", bound=Hashable)

# Halvings of the multiplier's logarithm, over a range that no real ratio of error and bytes leaves.
_N_HALVINGS = 100
_RANGE = (1e-30, 1e30)


def _cheapest(options: Sequence[tuple[float, float]], multiplier: float) -> int:
    costs = [n_bytes + multiplier * error for n_bytes, error in options]
    return min(range(len(options)), key=lambda x: (costs[x], options[x][1], x))


def _finest(options: Sequence[tuple[float, float]]) -> int:
    return min(range(len(options)), key=lambda x: (options[x][1], options[x][0]))


def least_bytes(
    options: Mapping[Key, Sequence[tuple[float, float]]], error: float
) -> dict[Key, int]:
    """Choose an option for each part, so that all errors together are at most `error`.

    Parameters
    ----------
    options : mapping of key to sequence of (float, float)
        What each part may be: bytes and error, both finite and not negative.
    error : float
        The most that errors may add up to.

    Returns
    -------
    dict of key to int
        Which option each part gets. Where even the least errors are too much, those.

    Notes
    -----
    Every part takes what is least in bytes plus a multiplier times its error; the multiplier is
    found by bisection. No other choice has both fewer bytes and less error; one between two
    multipliers may have fewer bytes and still be allowed, but by no more than one part's step.

    Examples
    --------
    >>> coarse_or_fine = [(40.0, 0.9), (80.0, 0.1)]
    >>> least_bytes({"a": coarse_or_fine, "b": [(40.0, 0.2), (80.0, 0.1)]}, 0.5)
    {'a': 1, 'b': 0}
    """

    def at(multiplier: float) -> dict[Key, int]:
        return {key: _cheapest(rows, multiplier) for key, rows in options.items()}

    def error_of(chosen: dict[Key, int]) -> float:
        return sum(options[key][index][1] for key, index in chosen.items())

    low, high = _RANGE
    best = at(low)
    if error_of(best) <= error:
        return best
    best = {key: _finest(rows) for key, rows in options.items()}
    for _ in range(_N_HALVINGS):
        middle = (low * high) ** 0.5
        chosen = at(middle)
        if error_of(chosen) <= error:
            best, high = chosen, middle
        else:
            low = middle
    return best
