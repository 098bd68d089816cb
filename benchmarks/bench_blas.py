"""What a matrix product costs through the library found at run time, beside torch.matmul.

Shapes are those of decoding `predict`: tokens x width of a layer's K and V side by side. One
product from one thread stands beside torch.matmul with one thread, and two products at once from
two threads, each keeping to its own, beside two products one after the other by torch.matmul with
two threads.

    python -m benchmarks.bench_blas [--json FILE] [--quick]

The library is the one that is used here; ``KRUL_BLAS`` names another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from krul import _core, blas

from . import harness

COLUMNS = [
    ("library", "library", ""),
    ("m", "m", ",d"),
    ("k", "k", ",d"),
    ("n", "n", ",d"),
    ("n_threads", "threads", "d"),
    ("gflop_s", "GFLOP/s", ".1f"),
    ("torch_gflop_s", "torch.matmul GFLOP/s", ".1f"),
    ("of_torch", "of torch.matmul", ".0%"),
]
SHAPES = [(m, k, n) for m in (512, 4096) for k, n in ((384, 384), (1152, 384), (2048, 2048))]


class Partner:
    """A thread that runs one call at the same time as the caller's, so that no start is timed."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.barrier = threading.Barrier(2)
        self.is_over = False
        self.call = call
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        while True:
            self.barrier.wait()
            if self.is_over:
                return
            self.call()
            self.barrier.wait()

    def run_beside(self, call: Callable[[], Any]) -> None:
        """Run both calls at once and wait for both."""
        self.barrier.wait()
        call()
        self.barrier.wait()

    def close(self) -> None:
        """End the thread."""
        self.is_over = True
        self.barrier.wait()
        self.thread.join()


def measure(
    library: blas.Library, shape: tuple[int, int, int], n_threads: int, n_runs: int
) -> dict[str, Any]:
    """Time one shape; the products are checked first, and the two sides take turns."""
    m, k, n = shape
    random = np.random.default_rng(0)
    a = [random.standard_normal((m, k), np.float32) for _ in range(n_threads)]
    b = random.standard_normal((k, n), np.float32)
    outs = [np.full((m, n), np.nan, np.float32) for _ in range(n_threads)]
    tensors = [(torch.from_numpy(each), torch.empty(m, n)) for each in a]
    b_tensor = torch.from_numpy(b)
    n_repeats = max(1, int(2e9 / (2 * m * k * n * n_threads)))

    def ours(index: int) -> None:
        for _ in range(n_repeats):
            _core.blas_sgemm(library.handle, a[index], b, outs[index])

    def torchs() -> None:
        for _ in range(n_repeats):
            for tensor, out in tensors:
                torch.matmul(tensor, b_tensor, out=out)

    partner = Partner(lambda: ours(1)) if n_threads == 2 else None
    torch.set_num_threads(n_threads)

    def run() -> None:
        if partner is None:
            ours(0)
        else:
            partner.run_beside(lambda: ours(0))

    run()
    for left, out in zip(a, outs, strict=True):
        value = np.float64(left[:64]) @ np.float64(b)
        bound = (k + 2) * 2.0**-23 * (abs(np.float64(left[:64])) @ abs(np.float64(b)))
        harness.check(bool((abs(out[:64] - value) <= bound).all()), f"{shape}: wrong product")
    our_s, torch_s = [], []
    for _ in range(n_runs):
        our_s.append(harness.measure(run, n_runs=1, n_warmups=1).minimum_s)
        torch_s.append(harness.measure(torchs, n_runs=1, n_warmups=1).minimum_s)
    if partner is not None:
        partner.close()
    gflop = 2e-9 * m * k * n * n_threads * n_repeats
    name = "/".join(library.path.split("/")[-3:])
    return {
        "library": f"{name} ({library.symbol})",
        "m": m,
        "k": k,
        "n": n,
        "n_threads": n_threads,
        "gflop_s": gflop / min(our_s),
        "torch_gflop_s": gflop / min(torch_s),
        "of_torch": min(torch_s) / min(our_s),
    }


def main() -> None:
    """Measure every shape with every library."""
    options = harness.parser(__doc__).parse_args()
    n_runs = 3 if options.quick else 5
    shapes = SHAPES[:2] if options.quick else SHAPES
    rows = [
        measure(blas.find(), shape, n_threads, n_runs) for shape in shapes for n_threads in (1, 2)
    ]
    harness.finish(
        "blas",
        rows,
        COLUMNS,
        notes=[
            "float32, all in the caches or not as the shapes have it; fastest of the runs, the two "
            "sides taking turns",
            "two threads: two products at once, one from each thread, beside the same two by "
            "torch.matmul with two threads, one after the other",
        ],
        is_quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
