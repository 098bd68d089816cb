"""How long a chat waits for its first token after a pause, and what was kept meanwhile.

For each length of history: reading it all again; a cache that never left memory; the cache saved
with torch.save, with safetensors, as transformers' own quantised cache; krul with each codec. Every
way brings back a cache, and `generate` then runs the same 32 new tokens and picks one. Before a way
is timed, 128 further tokens are run on what it brings back and compared with the uninterrupted run.

    python -m benchmarks.bench_resume [--json FILE] [--quick] [--texts python|debian]
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import krul
from krul import profiles
from krul.demo_model import load

from . import bench_quality, harness, texts

HISTORIES = (512, 1024, 2048, 4096, 7936)
QUICK_HISTORIES = (512, 2048)
N_PROMPT = 64
N_SCORED = 128
CODECS = ("exact", "int8", "int4", "share", "share+int8", "share+int4", "predict", "auto")
IN_MEMORY, RECOMPUTE = "never left memory", "recompute"

COLUMNS = [
    ("n_tokens", "history", ",d"),
    ("way", "way", ""),
    ("first_token_s", "first token, s", ".3f"),
    ("iqr_s", "IQR, s", ".3f"),
    ("cold_s", "not in page cache, s", ".3f"),
    ("times_memory", "x never left", ".2f"),
    ("faster_than_recompute", "x faster than recompute", ".1f"),
    ("stored_bytes", "bytes", ",d"),
    ("ratio_bf16", "x smaller than bf16", ".2f"),
    ("mean_kl", "mean KL, nats", ".4f"),
    ("top1", "top-1", ".3f"),
]


@dataclass
class Way:
    """One way to bring a cache back."""

    name: str
    restore: Callable[[], Any]
    files: tuple[Path, ...] = ()
    max_kl: float = 0.0  # more than this and the way is wrong, not slow
    n_runs: int = 7
    note: str = ""


class Bench:
    """The model, one text, and what was measured."""

    def __init__(self, options: Any) -> None:
        self.tokenizer, self.model = load(torch.bfloat16)
        self.model.generation_config.pad_token_id = 0
        self.words = texts.text("manual", options.texts)
        self.ids = self.tokenizer(self.words, return_tensors="pt").input_ids
        self.is_quick = options.quick
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.profile = (
            None if options.quick else bench_quality.fitted_profile(self.model, self.tokenizer)
        )

    def first_token(self, cache: Any, n_history: int) -> int:
        """Run the new prompt as a user would and return the token that comes out."""
        ids = self.ids[:, : n_history + N_PROMPT]
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=1,
            min_new_tokens=1,
            do_sample=False,
        )
        return int(out[0, -1])

    def fill(self, cache: Any, n_history: int) -> Any:
        """Read the history into a cache."""
        with torch.no_grad():
            self.model(
                self.ids[:, :n_history], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        return cache

    def scored_logits(self, cache: Any, n_history: int) -> torch.Tensor:
        """Log-probabilities over the tokens after the history, given a cache of it."""
        with torch.no_grad():
            out = self.model(
                self.ids[:, n_history : n_history + N_SCORED],
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits[0].float().log_softmax(-1)

    def empty(self) -> Any:
        """Return transformers' own cache."""
        return transformers.DynamicCache(config=self.model.config)

    def from_tensors(self, tensors: dict[str, torch.Tensor]) -> Any:
        """Return transformers' own cache of these tensors."""
        cache = self.empty()
        for layer in range(len(tensors) // 2):
            cache.update(tensors[f"{layer}.keys"], tensors[f"{layer}.values"], layer)
        return cache


def _close(cache: Any) -> None:
    if isinstance(cache, krul.Cache):
        cache.close()


def _drop_from_page_cache(files: tuple[Path, ...]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _quantised(bench: Bench, tensors: dict[str, torch.Tensor], folder: Path) -> Way:
    """Take transformers' quantised cache, saved and loaded with torch as the plain one is."""
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    name = "transformers' quantised cache, 4 bit"
    backends = []
    if is_optimum_quanto_available():
        backends.append("quanto")
    if is_hqq_available():
        backends.append("hqq")
    if not backends:
        return Way(name, bench.empty, note="needs optimum-quanto or hqq; neither is installed")
    cache = transformers.QuantizedCache(backend=backends[0], config=bench.model.config, nbits=4)
    for layer in range(len(tensors) // 2):
        cache.update(tensors[f"{layer}.keys"], tensors[f"{layer}.values"], layer)
    path = folder / "quantised.pt"
    torch.save(cache, path)

    def restore() -> Any:
        return torch.load(path, weights_only=False)  # our own file; it has no plain form

    return Way(f"{name} ({backends[0]})", restore, (path,), max_kl=1.0)


def _krul_ways(bench: Bench, n_history: int, folder: Path) -> list[Way]:
    ways = []
    for codec in CODECS:
        if codec == "predict" and bench.profile is None:
            continue
        # Each strategy as it is named: the guard would step a coarse one up.
        as_named = krul.Settings(codec=codec, guard_tokens=64 if codec == "auto" else 0)
        where = folder / codec
        store = krul.Store(where)
        if codec in ("predict", "auto") and bench.profile is not None:
            store.add_profile(bench.profile)
        with store.open("history", bench.model, settings=as_named) as cache:
            bench.fill(cache, n_history)
            report = cache.save()
        codecs = ", ".join(sorted(set(report.codec_by_layer)))
        label = f"krul {codec}" + (f" ({codecs})" if codec == "auto" else "")
        # Without the profile, which is there once for all conversations of the model.
        files = tuple(
            path
            for path in where.rglob("*")
            if path.is_file() and profiles.FOLDER not in path.relative_to(where).parts
        )

        def restore(store: krul.Store = store) -> Any:
            return store.open("history", bench.model)

        limit = {"exact": 0.0, "int8": 0.01, "int4": 0.1}.get(codec, math.inf)
        ways.append(Way(label, restore, files, max_kl=limit))
    return ways


def _ways(bench: Bench, history: Any, n_history: int, folder: Path) -> list[Way]:
    """Save the history every way there is and return how each comes back."""
    tensors = {}
    for index, layer in enumerate(history.layers):
        tensors[f"{index}.keys"] = layer.keys.contiguous()
        tensors[f"{index}.values"] = layer.values.contiguous()
    torch.save(tensors, folder / "plain.pt")
    save_file(tensors, folder / "plain.safetensors")
    n_slow_runs = 1 if n_history > 2048 or bench.is_quick else 3

    def back_in_time() -> Any:
        history.crop(n_history - history.get_seq_length())  # below zero: so many from the end
        return history

    def from_pt() -> Any:
        return bench.from_tensors(torch.load(folder / "plain.pt", weights_only=True))

    def from_safetensors() -> Any:
        return bench.from_tensors(load_file(folder / "plain.safetensors"))

    return [
        Way(IN_MEMORY, back_in_time),
        Way(RECOMPUTE, bench.empty, max_kl=0.01, n_runs=n_slow_runs),
        Way("torch.save, torch.load", from_pt, (folder / "plain.pt",)),
        Way("safetensors", from_safetensors, (folder / "plain.safetensors",)),
        _quantised(bench, tensors, folder),
        *_krul_ways(bench, n_history, folder),
    ]


def _quality(bench: Bench, way: Way, n_history: int, expected: torch.Tensor) -> dict[str, float]:
    """Compare what a way brings back with the uninterrupted run, and stop if it is wrong."""
    cache = way.restore()
    if way.name == RECOMPUTE:
        bench.fill(cache, n_history)
    got = bench.scored_logits(cache, n_history)
    if way.name != IN_MEMORY:
        _close(cache)
    mean_kl = float((expected.exp() * (expected - got)).sum(-1).mean())
    harness.check(
        mean_kl <= way.max_kl,
        f"{way.name} at {n_history} tokens: mean KL {mean_kl} but at most {way.max_kl}",
    )
    same = expected.argmax(-1) == got.argmax(-1)
    return {"mean_kl": mean_kl, "top1": float(same.float().mean())}


def _wait_s(bench: Bench, way: Way, n_history: int) -> float:
    """Return how long the first token takes."""
    if way.name == IN_MEMORY:
        way.restore()  # cropping what the last run added is not part of the wait
    start = time.perf_counter()
    cache = way.restore()
    bench.first_token(cache, n_history)
    seconds = time.perf_counter() - start
    if way.name != IN_MEMORY:
        _close(cache)
    return seconds


def _one_history(bench: Bench, n_history: int) -> None:
    """Check every way, then time them in rounds, so that what disturbs one disturbs all."""
    folder = Path(tempfile.mkdtemp(prefix="krul-bench-"))
    try:
        history = bench.fill(bench.empty(), n_history)
        bf16_bytes = sum(2 * t.numel() for x in history.layers for t in (x.keys, x.values))
        ways = _ways(bench, history, n_history, folder)
        expected = bench.scored_logits(history, n_history)
        bench.notes += [f"{way.name}: {way.note}." for way in ways if way.note]
        rows = {way.name: {"n_tokens": n_history, "way": way.name} for way in ways}
        ways = [way for way in ways if not way.note]
        for way in ways:
            rows[way.name] |= _quality(bench, way, n_history, expected)

        warm: dict[str, list[float]] = {way.name: [] for way in ways}
        cold: dict[str, list[float]] = {way.name: [] for way in ways if way.files}
        n_rounds = 3 if bench.is_quick else 7
        for index in range(-1, n_rounds):
            for way in ways:
                if index >= way.n_runs or (index < 0 and way.n_runs == 1):
                    continue
                seconds = _wait_s(bench, way, n_history)
                if index >= 0:
                    warm[way.name].append(seconds)
                if way.files and 0 <= index < 3:
                    _drop_from_page_cache(way.files)
                    cold[way.name].append(_wait_s(bench, way, n_history))
        times = {name: harness.summarise(seconds) for name, seconds in warm.items()}
        for way in ways:
            timing = times[way.name]
            rows[way.name] |= {
                "first_token_s": timing.median_s,
                "minimum_s": timing.minimum_s,
                "iqr_s": timing.iqr_s,
                "n_runs": timing.n_runs,
                "times_memory": timing.median_s / times[IN_MEMORY].median_s,
                "faster_than_recompute": times[RECOMPUTE].median_s / timing.median_s,
            }
            if way.files:
                stored_bytes = sum(path.stat().st_size for path in way.files)
                rows[way.name] |= {
                    "cold_s": harness.summarise(cold[way.name]).median_s,
                    "stored_bytes": stored_bytes,
                    "ratio_bf16": bf16_bytes / stored_bytes,
                }
        bench.rows += rows.values()
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--texts", choices=texts.SOURCES, default="python")
    parser.add_argument("--histories", type=int, nargs="+", help="numbers of tokens")
    options = parser.parse_args()
    bench = Bench(options)
    histories = options.histories or (QUICK_HISTORIES if options.quick else HISTORIES)
    n_needed = max(histories) + N_SCORED
    harness.check(
        bench.ids.shape[1] >= n_needed, f"text has {bench.ids.shape[1]} but needs {n_needed} tokens"
    )
    krul.attach(bench.model)  # asks the model once; not part of any wait
    bench.first_token(bench.fill(bench.empty(), 64), 64)
    for n_history in histories:
        print(f"history of {n_history:,} tokens ...", file=sys.stderr, flush=True)
        _one_history(bench, n_history)
    notes = [
        f"SmolLM2-135M-Instruct in bfloat16, {torch.get_num_threads()} threads; one text, a manual "
        f"(SHA-256 {texts.digest(bench.words)}...); the first token after {N_PROMPT} new ones.",
        "Mean KL and top-1 over the next 128 tokens, against the uninterrupted run. Codecs are "
        "taken as named, without the guard, but for auto.",
        *(
            [f"The profile of predict has {bench.profile.n_bytes:,} bytes, once; not counted."]
            if bench.profile is not None
            else []
        ),
        "All ways of one length are timed in turns, round by round. "
        "Model and tokeniser are in memory, and krul has asked the model what it can do; that is "
        "done once per process.",
        *dict.fromkeys(bench.notes),
    ]
    harness.finish(
        "resume", bench.rows, COLUMNS, notes=notes, is_quick=options.quick, path=options.json
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
