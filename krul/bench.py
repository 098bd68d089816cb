"""``krul bench``: how fast each codec runs on this machine, beside a plain copy in the same run.

A look, not a measurement to quote: random float16 blocks of a typical shape, all processors. The
benchmarks with real text, real models and their notes are in the source tree, in ``benchmarks``.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from . import _core, backends
from .compressor import BLOCK_CODECS, CODECS
from .costs import cost_books

__all__ = ["costs", "costs_to_text", "run", "to_text"]

SHAPE = (1, 8, 2048, 64)
N_BLOCKS = 8


def _seconds(function: Any, budget_s: float) -> float:
    """Return the shortest of as many runs as fit in the time."""
    function()
    best, end = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def run(*, is_quick: bool = False) -> dict[str, Any]:
    """Time encoding and decoding of every codec.

    Parameters
    ----------
    is_quick : bool
        About a second instead of about ten.

    Returns
    -------
    dict
        ``backend``, ``n_threads``, ``copy_gb_s`` and ``codecs``: rows with ``codec``,
        ``encode_gb_s``, ``decode_gb_s`` (of uncompressed bytes) and ``ratio``.

    Examples
    --------
    >>> found = run(is_quick=True)
    >>> [row["codec"] for row in found["codecs"]]
    ['exact', 'int8', 'int4', 'share', 'share+int8', 'share+int4']
    """
    random = np.random.default_rng(0)
    scale = random.gamma(2.0, size=(1, SHAPE[1], 1, SHAPE[3]))
    blocks = [
        (random.standard_normal(SHAPE) * scale).astype(np.float16) for _ in range(2 * N_BLOCKS)
    ]
    outs = [np.empty_like(block) for block in blocks]
    n_bytes = sum(block.nbytes for block in blocks)
    budget_s = 0.04 if is_quick else 0.7

    def copy() -> None:
        for block, out in zip(blocks, outs, strict=True):
            np.copyto(out, block)

    rows = []
    for codec, number in BLOCK_CODECS.items():
        n_arrays = 2 if codec.startswith("share") else 1
        groups = range(0, len(blocks), n_arrays)
        jobs = [(number, 0, tuple(blocks[i : i + n_arrays])) for i in groups]
        coded = _core.encode_blocks(jobs)
        back = [
            (used, 0, payload, tuple(outs[i : i + n_arrays]))
            for (payload, used, _, _), i in zip(coded, groups, strict=True)
        ]
        encode_s = _seconds(lambda jobs=jobs: _core.encode_blocks(jobs), budget_s)
        decode_s = _seconds(lambda back=back: _core.decode_blocks(back), budget_s)
        rows.append(
            {
                "codec": codec,
                "encode_gb_s": n_bytes / encode_s / 1e9,
                "decode_gb_s": n_bytes / decode_s / 1e9,
                "ratio": n_bytes / sum(len(payload) for payload, *_ in coded),
            }
        )
    return {
        "backend": backends()["chosen"],
        "n_threads": _core.n_processors(),
        "copy_gb_s": n_bytes / _seconds(copy, budget_s) / 1e9,
        "codecs": rows,
    }


def to_text(result: dict[str, Any]) -> str:
    """Return the table that people read."""
    lines = [
        f"backend {result['backend']}, {result['n_threads']} threads; random float16, GB/s of "
        "uncompressed bytes",
        f"{'codec':<12}{'encode':>8}{'decode':>8}{'ratio':>8}",
    ]
    lines += [
        f"{row['codec']:<12}{row['encode_gb_s']:>8.2f}{row['decode_gb_s']:>8.2f}{row['ratio']:>8.2f}"
        for row in result["codecs"]
    ]
    lines.append(f"a copy on one thread: {result['copy_gb_s']:.2f}")
    return "\n".join(lines)


def costs(store_path: str) -> list[dict[str, Any]]:
    """Return what restores from a store plan with, one dict per model and machine.

    Parameters
    ----------
    store_path : str
        The store's directory; one that is not there holds nothing.

    Returns
    -------
    list of dict
        ``model`` (its fingerprint), ``machine``, ``read_bytes_per_s``, ``decode_bytes_per_s`` by
        the codec's name, ``n_passes`` and ``forward``, what `krul.costs.ForwardCost` says.

    Examples
    --------
    >>> costs("/nowhere")
    []
    """
    names = {str(number): name for name, number in CODECS.items()}
    return [
        {
            "model": book.get("model"),
            "machine": book.get("machine"),
            "read_bytes_per_s": book.get("read_bytes_per_s"),
            "decode_bytes_per_s": {
                names.get(codec, codec): rate
                for codec, rate in (book.get("decode_bytes_per_s") or {}).items()
            },
            "n_passes": len(book.get("passes") or ()),
            "forward": book.get("forward"),
        }
        for book in cost_books(store_path)
    ]


def costs_to_text(books: list[dict[str, Any]]) -> str:
    """Return what `costs` found as lines to read."""
    if not books:
        return "nothing has been measured: open the store and use a model"
    lines = []
    for book in books:
        lines.append(f"model {str(book['model'])[:16]} on {book['machine']}")
        forward, read = book["forward"], book["read_bytes_per_s"]
        if forward is not None:
            lines.append(
                f"  forward pass of n tokens, s: {forward['overhead_s']:.2e} + "
                f"{forward['linear_s_per_token']:.2e} n + "
                f"{forward['quadratic_s_per_token2']:.2e} n^2, of {book['n_passes']} passes"
            )
        lines.append(
            "  reading from the store: "
            + ("not measured" if read is None else f"{read / 1e9:.2f} GB/s")
        )
        lines += [
            f"  decoding {name}: {rate / 1e9:.2f} GB/s per thread"
            for name, rate in book["decode_bytes_per_s"].items()
        ]
    return "\n".join(lines)
