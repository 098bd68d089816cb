"""What a save costs: wall time by stage, peak memory, and how much decoding slows down beside it.

Decoding is timed in turns: transformers' own cache without krul, krul's cache with the estimator
watching, and krul's cache while a save runs in the background; means over the steps. Peak memory is
the growth of the process's resident set during a save, against the coded bytes plus the K/V of two
layers.
"""

from __future__ import annotations

import ctypes
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import krul
from krul.demo_model import load

from . import harness, texts

N_HISTORY = 3072
CODECS = ("exact", "int8", "int4", "auto")
COLUMNS = [
    ("what", "what", ""),
    ("codec", "codec", ""),
    ("seconds", "s", ".3f"),
    ("encode_s", "encode, s", ".3f"),
    ("guard_s", "guard, s", ".3f"),
    ("commit_s", "commit, s", ".3f"),
    ("peak_mb", "peak above the cache, MB", ".1f"),
    ("bound_mb", "coded + two layers, MB", ".1f"),
    ("step_ms", "decoding step, ms", ".1f"),
    ("slower", "slower than without krul", ".1%"),
]


def _status_bytes(name: str) -> int:
    """Return what the system says of this process's memory under a name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Bench:
    """The model and one history in its cache's K/V."""

    def __init__(self) -> None:
        self.tokenizer, self.model = load(torch.bfloat16)
        words = texts.text("manual")
        self.ids = self.tokenizer(words, return_tensors="pt").input_ids[:, :N_HISTORY]
        self.rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def steps(self, cache: Any, n_steps: int, while_running: Any = None) -> list[float]:
        """Time steps of one token; until `while_running` is done, if it is given."""
        token, times = self.ids[:, -1:], []
        while len(times) < n_steps and (while_running is None or not while_running.done()):
            start = time.perf_counter()
            out = self.model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - start)
        return times

    @torch.no_grad()
    def read(self, cache: Any) -> Any:
        """Read the history into a cache."""
        self.model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def save(self, store: krul.Store, codec: str) -> None:
        """Time one save and watch the resident set."""
        settings = krul.Settings(codec=codec)
        with store.open(f"save {codec}", self.model, settings=settings) as cache:
            self.read(cache)
            cache.estimator.wait()
            layer = cache.layers[0]
            two_layers = 2 * sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
            ctypes.CDLL(None).malloc_trim(0)  # else the save would live in what others freed
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
            before = _status_bytes("VmRSS")
            start = time.perf_counter()
            report = cache.save()
            seconds = time.perf_counter() - start
            peak = _status_bytes("VmHWM") - before
        with store.open(f"save {codec}", self.model) as cache:
            cache.restore()
            harness.check(cache.n_tokens == N_HISTORY, "the save lost tokens")
        stages = report.seconds_by_stage
        self.rows.append(
            {
                "what": f"save of {N_HISTORY:,} tokens",
                "codec": codec,
                "seconds": seconds,
                "encode_s": stages["encode"],
                "guard_s": stages["guard"],
                "commit_s": stages["commit"],
                "peak_mb": peak / 1e6,
                "bound_mb": (report.stored_bytes + two_layers) / 1e6,
            }
        )

    def decode(self, store: krul.Store, n_steps: int) -> None:
        """Time decoding without krul, with it, and beside a save, in turns."""
        plain = self.read(transformers.DynamicCache(config=self.model.config))
        with store.open("decode", self.model, settings=krul.Settings(codec="int4")) as cache:
            self.read(cache)
            cache.estimator.wait()
            without, with_krul, beside = [], [], []
            for _ in range(4):
                without += self.steps(plain, n_steps)
                with_krul += self.steps(cache, n_steps)
                cache.estimator.wait()
                beside += self.steps(cache, n_steps * 8, cache.save(wait=False))
        base = statistics.mean(without)
        for what, times in (
            ("decoding without krul", without),
            ("decoding, observed", with_krul),
            ("decoding beside a save", beside),
        ):
            mean = statistics.mean(times)
            self.rows.append(
                {
                    "what": f"{what}, {len(times)} steps",
                    "step_ms": mean * 1e3,
                    "slower": mean / base - 1,
                }
            )


def main() -> None:
    options = harness.parser(__doc__.splitlines()[0]).parse_args()
    bench = Bench()
    with tempfile.TemporaryDirectory() as folder, krul.Store(folder) as store:
        for codec in CODECS:
            bench.save(store, codec)
        bench.decode(store, 8 if options.quick else 32)
    notes = [" ".join(__doc__.split("\n\n")[1].split())]
    harness.finish(
        "save", bench.rows, COLUMNS, notes=notes, is_quick=options.quick, path=options.json
    )


if __name__ == "__main__":
    main()
