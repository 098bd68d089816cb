"""How fast column streams, the coefficients of `predict`, are encoded and decoded, by one thread.

512 tokens x 384 columns, a block of a layer whose K and V are 384 numbers side by side. Columns
follow Laplace distributions of the classes that their tables were made for, so that the size can be
compared with the entropy.

    python -m benchmarks.bench_entropy [--json FILE] [--quick]
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from krul import _core

from . import harness

N_COLUMNS = 384
N_TABLES = 32
COLUMNS = [
    ("n_tokens", "tokens", ",d"),
    ("entropy_bits", "entropy, bits", ".2f"),
    ("shifted", "tokens with a shift", ".0%"),
    ("escape_share", "escapes", ".1%"),
    ("backend", "backend", ""),
    ("stream_bits", "stream, bits", ".3f"),
    ("encode_gsymbol_s", "encode Gsymbol/s", ".2f"),
    ("decode_gsymbol_s", "decode Gsymbol/s", ".2f"),
]


def shares() -> np.ndarray:
    """Return how often each number from -127 to 127 occurs in every class."""
    widths = 0.15 * 1.2 ** np.arange(N_TABLES)
    found = np.exp(-np.abs(np.arange(-127, 128)) / widths[:, None])
    return found / found.sum(1, keepdims=True)


def tables(share: np.ndarray) -> np.ndarray:
    """Make the tables for that, every symbol at least 1."""
    found = np.ones((N_TABLES, 256), np.uint16)
    found[:, :255] += np.floor(share * (4096 - 256)).astype(np.uint16)
    found[:, 127] += 4096 - found.sum(1, dtype=np.uint16)
    return found


def measure(
    n_tokens: int, first_class: int, shifted: float, escape_share: float, n_runs: int
) -> list[dict[str, Any]]:
    """Time one kind of data on every backend; what comes back is checked first."""
    random = np.random.default_rng(0)
    share = shares()
    all_tables = tables(share)
    column_class = (first_class + np.arange(N_COLUMNS) * 12 // N_COLUMNS).astype(np.uint8)[::-1]
    column_class = np.ascontiguousarray(column_class)
    token_shift = np.zeros(n_tokens, np.int8)
    token_shift[random.random(n_tokens) < shifted] = 2
    which = np.clip(column_class[:, None].astype(int) + token_shift, 0, N_TABLES - 1)
    starts = np.cumsum(share, 1)
    drawn = random.random(which.shape)
    values = np.zeros(which.shape, np.int32)
    for table in np.unique(which):
        here = which == table
        values[here] = np.searchsorted(starts[table], drawn[here]).clip(0, 254) - 127
    entropy_bits = float(-(np.log2(np.maximum(share, 1e-300)) * share).sum(1)[which].mean())
    if escape_share:
        values[random.random(values.shape) < escape_share] = 300
    about = (all_tables, column_class, token_shift if shifted else None)
    stream = _core.entropy_encode_columns(values, *about)
    encode = harness.measure(
        lambda: _core.entropy_encode_columns(values, *about), n_runs=min(n_runs, 5)
    )
    rows = []
    for backend in (name for name, is_usable, _ in reversed(_core.backends()) if is_usable):
        out = np.full(values.shape, np.nan, np.float32)
        _core.entropy_decode_columns(stream, out, *about, backend)
        harness.check(bool((out == values).all()), f"{backend}: wrong values")
        n_repeats = 20
        arguments = (stream, out, *about, backend)
        once, more = (
            harness.measure(
                partial(_core.entropy_decode_columns, *arguments, n), n_runs=n_runs
            ).minimum_s
            for n in (1, 1 + n_repeats)
        )
        rows.append(
            {
                "n_tokens": n_tokens,
                "entropy_bits": entropy_bits,
                "shifted": shifted,
                "escape_share": escape_share,
                "backend": backend,
                "stream_bits": 8 * len(stream) / values.size,
                "encode_gsymbol_s": values.size / encode.minimum_s / 1e9,
                "decode_gsymbol_s": values.size * n_repeats / (more - once) / 1e9,
            }
        )
    return rows


def main() -> None:
    """Measure data of low and of high entropy, with and without shifts and escapes."""
    options = harness.parser(__doc__).parse_args()
    n_runs = 5 if options.quick else 15
    cases = [(512, 0, 0.0, 0.0), (512, 3, 0.0, 0.0), (512, 6, 0.0, 0.0), (512, 14, 0.0, 0.0)]
    if not options.quick:
        cases += [(512, 3, 0.02, 0.0), (512, 3, 1.0, 0.0), (512, 3, 0.0, 0.001)]
        cases += [(500, 3, 0.0, 0.0), (64, 3, 0.0, 0.0)]
    rows = [row for case in cases for row in measure(*case, n_runs)]
    harness.finish(
        "entropy",
        rows,
        COLUMNS,
        notes=[
            "one thread; decoding writes float32, what a matrix product takes; tables are ready "
            "when the clock starts for decoding, but not for encoding",
            "fastest of the runs, over and over the same stream: stream, tables and output are in "
            "the second- and third-level caches",
        ],
        is_quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
