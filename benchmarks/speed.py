"""What is wanted of speed on a GPU, line by line, beside what was measured.

A line finds its figures among the rows of `bench_gpu`, and says so where there are none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LINES", "Line", "Ratio", "judge"]

Rows = Sequence[dict[str, Any]]


def matching(rows: Rows, **where: Any) -> list[dict[str, Any]]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


@dataclass(frozen=True)
class Line:
    """One figure that is wanted.

    Attributes
    ----------
    name : str
    limit : float
    unit : str
        How both figures are written: ``"%"`` of a part, else behind the number.
    find : callable
        Returns the figures among the rows; the worst counts.
    is_least : bool
        At least the limit is wanted, else at most.
    """

    name: str
    limit: float
    unit: str
    find: Callable[[Rows], Iterable[float | None]]
    is_least: bool = True

    def judge(self, rows: Rows) -> dict[str, Any]:
        """Return the row of the table."""
        found = [value for value in self.find(rows) if value is not None]
        worst = None
        if found:
            worst = min(found) if self.is_least else max(found)
        compare = operator.ge if self.is_least else operator.le
        return {
            "section": "speed",
            "what": self.name,
            "wanted": f"{'>=' if self.is_least else '<='} {_shown(self.limit, self.unit)}",
            "measured": "not measured" if worst is None else _shown(worst, self.unit),
            "holds": "-" if worst is None else ("yes" if compare(worst, self.limit) else "no"),
            "value": worst,
            "limit": self.limit,
        }


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    return f"{value:.3g}{unit}" if unit == "x" else f"{value:.3g} {unit}".rstrip()


@dataclass(frozen=True)
class Ratio:
    """How many times sooner one way has the first token than another, of one history."""

    shape: str
    n_tokens: int
    place: str
    way: str
    other: str
    n_prompt: int = 128

    def __call__(self, rows: Rows) -> list[float | None]:
        """Return the ratio, or nothing where one of the two is missing."""
        where = {
            "section": "restore",
            "shape": self.shape,
            "n_tokens": self.n_tokens,
            "place": self.place,
            "n_prompt": self.n_prompt,
        }
        mine = matching(rows, **where, way=self.way)
        others = matching(rows, **where, way=self.other)
        return [other["first_token_s"] / own["first_token_s"] for own in mine for other in others]


def _values(key: str, /, **where: Any) -> Callable[[Rows], list[float | None]]:
    return lambda rows: [row.get(key) for row in matching(rows, **where)]


def _of_krul(key: str, n_least: int) -> Callable[[Rows], list[float | None]]:
    def find(rows: Rows) -> list[float | None]:
        return [
            row.get(key)
            for row in matching(rows, section="alone")
            if row["way"].startswith("krul") and row["n_tokens"] >= n_least
        ]

    return find


def _ratios(
    shape: str, n_tokens: int, place: str, way: str, wanted: dict[str, float]
) -> list[Line]:
    name = f"{shape}, {n_tokens:,} tokens, {place}, {way}: sooner than"
    return [
        Line(f"{name} {other}", least, "x", Ratio(shape, n_tokens, place, way, other))
        for other, least in wanted.items()
    ]


_LOADED, _SERIAL = "load, layer by layer", "load, then run"
_PAIRS, _ENDS = "fixed pairs, layer by layer", "from both ends"

LINES: tuple[Line, ...] = (
    Line(
        "host to device during a restore, of a 1 GiB pinned copy",
        0.95,
        "%",
        _values("copy_share", section="kernels", is_counted=True),
    ),
    Line(
        "the same end to end, decoded",
        0.90,
        "%",
        _values("link_share", section="kernels", is_counted=True),
    ),
    *(
        Line(
            f"decode of {codec}, of a device copy",
            0.85,
            "%",
            _values("decode_share", section="kernels", codec=codec),
        )
        for codec in ("int8", "int4", "share")
    ),
    Line("rANS, output", 200, "GB/s", _values("decoded_gb_s", section="kernels", codec="exact")),
    Line(
        "host work on the way to the first token",
        0.5,
        "ms",
        _values("host_ms", section="host"),
        is_least=False,
    ),
    Line(
        "allocations, pinnings inside the model's forward",
        0,
        "",
        _values("n_allocations", section="host"),
        is_least=False,
    ),
    *_ratios(
        "7b",
        4096,
        "memory",
        "krul share+int8",
        {
            "recompute": 6.0,
            _SERIAL: 2.7,
            _PAIRS: 2.1,
            _ENDS: 1.9,
            "hidden states": 1.5,
            _LOADED: 2.4,
        },
    ),
    *_ratios(
        "8b",
        16384,
        "memory",
        "krul share+int8",
        {
            "recompute": 25,
            _SERIAL: 2.5,
            _PAIRS: 2.0,
            _ENDS: 2.3,
            _LOADED: 2.2,
        },
    ),
    *_ratios(
        "8b",
        4096,
        "disk",
        "krul share+int8",
        {
            "recompute": 3.8,
            _SERIAL: 3.1,
            _PAIRS: 2.3,
            _ENDS: 1.7,
        },
    ),
    *_ratios("8b-8", 16384, "memory", "krul predict", {_LOADED: 1.5}),
    *_ratios("8b-8", 16384, "disk", "krul predict", {_LOADED: 6.0, "krul int4": 1.5}),
    Line(
        "restore alone, of T*, from 2k tokens",
        1.10,
        "x",
        _of_krul("times_bound", 2048),
        is_least=False,
    ),
    Line(
        "estimator, of prefill from 2k tokens",
        0.015,
        "%",
        _values("share", section="estimator", what="prefill"),
        is_least=False,
    ),
    Line(
        "estimator, of decode",
        0.01,
        "%",
        _values("share", section="estimator", what="decode"),
        is_least=False,
    ),
    Line("estimator, memory", 100, "MB", _values("memory_mb", section="estimator"), is_least=False),
    Line("save, decode slowed", 0.02, "%", _values("share", section="save"), is_least=False),
)


def judge(rows: Rows, lines: Iterable[Line] = LINES) -> list[dict[str, Any]]:
    """Return the table: what is wanted, what was measured, whether it holds."""
    return [line.judge(rows) for line in lines]
