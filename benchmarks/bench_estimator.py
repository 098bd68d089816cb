"""What observing attention costs: its share of a prefill and of decoding, and its memory.

SmolLM2-135M-Instruct, bfloat16. Prefills with and without the observer alternate, so that a
machine that slows down slows both; the share is also given as the time spent inside observation
itself, which the noise of a prefill does not reach. Logits are compared bit by bit first.
What it does not show: other models, and machines with more than the processors named.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from krul import _core, observe
from krul.estimator import Estimator

COLUMNS = [
    ("what", "what", ""),
    ("n_tokens", "tokens", "d"),
    ("rows", "rows", ""),
    ("n_threads", "threads", "d"),
    ("model_ms", "model ms", ".1f"),
    ("observe_ms", "observing ms", ".2f"),
    ("share_inside", "share, inside", ".2%"),
    ("share_paired", "share, paired runs", ".2%"),
    ("scratch_mb", "scratch MB", ".1f"),
]


def load(path: Path | None) -> Any:
    """Load the model from a folder, or the one that the demo uses."""
    if path is None:
        from krul.demo_model import model_path

        path = model_path()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


class Clocked:
    """Adds up the time inside the observer's own code, C included."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.originals = (observe._Watch.see, observe._Watch.end)

    def __enter__(self) -> Clocked:
        observe._Watch.see = self._timed(self.originals[0])
        observe._Watch.end = self._timed(self.originals[1])
        return self

    def __exit__(self, *exception: object) -> None:
        observe._Watch.see, observe._Watch.end = self.originals

    def _timed(self, function: Any) -> Any:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.total_s += time.perf_counter() - start

        return run


def wait_for(estimator: Estimator) -> float:
    """Wait for the estimator's thread, as if nothing of it ran beside the model; seconds."""
    start = time.perf_counter()
    estimator.wait()
    return time.perf_counter() - start


def prefill(model: Any, n_tokens: int, rows: int, n_pairs: int) -> dict[str, Any]:
    """Time a prefill, plain and observed in turn."""
    ids = torch.randint(0, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    n_layers = model.config.num_hidden_layers
    plain_s, observed_s, inside_s, _logits = [], [], [], []
    with observe.install(model) as handle, torch.no_grad():
        for index in range(n_pairs + 1):
            start = time.perf_counter()
            plain = model(ids, logits_to_keep=1).logits
            middle = time.perf_counter()
            with Clocked() as clock, observe.observing(Estimator(n_layers, rows=rows), handle) as e:
                seen = model(ids, logits_to_keep=1).logits
            waited_s = wait_for(e)
            stop = time.perf_counter()
            harness.check(torch.equal(plain, seen), "observation changed the logits")
            harness.check(e.result().n_prefill_rows == n_tokens, "rows are missing")
            if index:
                plain_s.append(middle - start)
                observed_s.append(stop - middle)
                inside_s.append(clock.total_s + waited_s)
    base = statistics.median(plain_s)
    inside = statistics.median(inside_s)
    return {
        "what": "prefill",
        "n_tokens": n_tokens,
        "rows": str(rows),
        "n_threads": torch.get_num_threads(),
        "model_ms": base * 1e3,
        "observe_ms": inside * 1e3,
        "share_inside": inside / base,
        "share_paired": statistics.median(
            b / a - 1 for a, b in zip(plain_s, observed_s, strict=True)
        ),
        "scratch_mb": scratch_bytes(model, n_tokens) / 1e6,
    }


def decode(model: Any, n_tokens: int, n_steps: int) -> dict[str, Any]:
    """Time single-token steps after a history, one in 16 observed."""
    from krul.cache import Cache

    ids = torch.randint(0, 1000, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    n_layers = model.config.num_hidden_layers
    cache = Cache(config=model.config)
    estimator = Estimator(n_layers)
    step_s, inside_s = [], []
    with observe.install(model) as handle, torch.no_grad():
        with observe.observing(estimator, handle):
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        estimator.wait()
        for _ in range(n_steps):
            start = time.perf_counter()
            with Clocked() as clock, observe.observing(estimator, handle):
                model(ids[:, :1], past_key_values=cache, use_cache=True)
            waited_s = wait_for(estimator)
            step_s.append(time.perf_counter() - start)
            inside_s.append(clock.total_s + waited_s)
    harness.check(estimator.result().n_decode_rows >= n_steps - 16, "steps are missing")
    model_s = sum(step_s) - sum(inside_s)
    return {
        "what": "decode",
        "n_tokens": n_tokens,
        "rows": "1 step in 16",
        "n_threads": torch.get_num_threads(),
        "model_ms": model_s / n_steps * 1e3,
        "observe_ms": sum(inside_s) / n_steps * 1e3,
        "share_inside": sum(inside_s) / model_s,
        "share_paired": None,
        "scratch_mb": scratch_bytes(model, n_tokens) / 1e6,
    }


def scratch_bytes(model: Any, n_tokens: int) -> int:
    """Return what observation holds by design: rows, sums, and one worker's share of each."""
    layers = model.config.num_hidden_layers
    n_workers = _core.n_processors()
    tile = min(n_workers * layers * 16 * n_tokens * 4, 1 << 26)
    per_worker = layers * (n_tokens + 16 * model.config.head_dim) * 4
    queries = 2 * layers * model.config.num_attention_heads * 64 * model.config.head_dim * 2
    return tile + n_workers * per_worker + queries + 2 * layers * n_tokens * 4


def kernel(backend: str, n_threads: int, n_runs: int) -> dict[str, Any]:
    """Time the C call alone, on the same shapes."""
    n_layers, n_tokens, n_rows = 30, 2048, 64
    generator = torch.Generator().manual_seed(0)
    layers = [
        (
            torch.randn(1, 9, n_rows, 64, generator=generator).bfloat16(),
            torch.randn(1, n_tokens, 3, 64, generator=generator).bfloat16().transpose(1, 2),
            0.125, 0.0, None, None, 0,
        )
        for _ in range(n_layers)
    ]  # fmt: skip
    positions = np.arange(n_rows) * (n_tokens // n_rows) + n_tokens // n_rows // 2
    sums = (
        np.zeros((n_layers, n_layers)),
        np.zeros((n_layers, 2)),
        np.zeros((n_layers, n_tokens), np.float32),
        np.zeros(1),
    )

    def run() -> None:
        _core.estimator_observe(
            layers, positions, n_tokens, 1.0, *sums, 1 << 26, n_threads, backend=backend
        )

    run()
    mass = sums[2].sum(1)
    harness.check(bool(np.allclose(mass, 9 * n_rows, rtol=1e-5)), "rows do not sum to 1")
    timing = harness.measure(run, n_runs=n_runs)
    return {
        "what": f"C call alone, {backend}",
        "n_tokens": n_tokens,
        "rows": str(n_rows),
        "n_threads": n_threads,
        "model_ms": None,
        "observe_ms": timing.median_s * 1e3,
        "share_inside": None,
        "share_paired": None,
        "scratch_mb": None,
    }


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0])
    options.add_argument("--model", type=Path, metavar="FOLDER", help="default: the demo's model")
    options = options.parse_args()
    rows = []
    for name, is_usable, _ in _core.backends():
        for n_threads in (1, 2) if is_usable else ():
            rows.append(kernel(name, n_threads, 5 if options.quick else 15))
    model = load(options.model)
    for n_tokens in (2048,) if options.quick else (512, 1024, 2048):
        rows.append(prefill(model, n_tokens, 64, 2 if options.quick else 5))
    rows.append(decode(model, 2048, 32 if options.quick else 128))
    notes = [" ".join(__doc__.split("\n\n")[1].split())]
    harness.finish(
        "estimator", rows, COLUMNS, notes=notes, is_quick=options.quick, path=options.json
    )


if __name__ == "__main__":
    main()
