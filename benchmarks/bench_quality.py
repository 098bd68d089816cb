"""Rate against quality of every codec and of what others do: real text, real chats, retrieval.

The model computes in float32 and its K/V are kept as bfloat16. A history is read once; each codec
keeps it and gives it back; then 128 further tokens are scored over what came back and over the
exact K/V. Retrieval asks for something that stands in the history. Every byte that a codec must
keep with a conversation is counted: headers, scales, tables, exact tokens.

What is done is kept (see --parts), so that a run may be stopped, resumed, or extended by a codec:

    python -m benchmarks.bench_quality [--json FILE] [--quick] [--only text,chats,retrieval]
        [--codecs NAME,NAME] [--tasks NAME,NAME] [--seconds N] [--fresh]

Adding a codec: one more entry in `codecs`, a `baselines.Codec` or anything like it.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import krul
from krul import _core, guard
from krul.compressor import CODECS, token_runs
from krul.demo_model import load
from krul.predictor import choose_products, make_predictor
from krul.save import N_QUERIES

from . import baselines, bench_codecs, chats, harness, retrieval, texts
from .baselines import KEEP_FIRST, Codec, History, Restored

LENGTHS = (1024, 3072)
QUICK_LENGTHS = (1024,)
N_SCORED = bench_codecs.N_SCORED
N_TRIALS = 100
QUICK_TRIALS = 2
N_CALIBRATION_TOKENS = 3072
QUICK_CALIBRATION_TOKENS = 1024
QUICK_COMPONENTS = 1024
# Close to a neighbour on the same line: not asked, for each answer costs as much as a codec does.
NOT_ASKED = (
    "krul: exact",
    "krul share (paper's pairs): 1",
    "krul share (MiniCache's fixed pairs): 1",
    "krul share+int4 (paper's pairs): 1",
    "krul share+int4 (paper's pairs): 3",
    "krul share+int4 (MiniCache's fixed pairs): 1",
    "krul share+int4 (MiniCache's fixed pairs): 3",
    "integers in groups of 64: 8 bits",
    "integers in groups of 32: 8 bits",
    "krul predict: step 0.3",
    "krul predict: step 0.6",
    "krul predict: step 0.8",
    "krul predict: step 2.2",
    "krul predict, tokens alike: step 0.2",
    "krul predict, tokens alike: step 0.3",
    "krul predict, tokens alike: step 0.6",
    "krul predict, tokens alike: step 0.8",
    "krul predict, tokens alike: step 1.6",
    "H2O: 1/2 kept",
    "H2O: 1/12 kept",
    "KVTC (DEFLATE): 2.5 bits",
    "KVTC transform (one step and ideal entropy): 0.1",
)
# What stands for its family where there is no room for all.
BRIEF = (
    "uncompressed",
    "krul predict: step 0.45",
    "krul predict: step 0.8",
    "krul predict: step 1.1",
    "krul predict: step 1.5",
    "krul predict, tokens alike: step 0.45",
    "krul predict, tokens alike: step 1.1",
    "krul: int8",
    "krul: int4",
    "krul share (paper's pairs): 7",
    "krul share (MiniCache's fixed pairs): 7",
    "integers in groups of 64: 2 bits",
    "transformers' quantised cache (re-made): 4 bits",
    "H2O: 1/4 kept",
    "KVTC (DEFLATE): 1.25 bits",
    "KVTC (DEFLATE): 0.65 bits",
    "KVTC transform (one step and ideal entropy): 0.5",
)
SECTIONS = ("text", "chats", "retrieval")

COLUMNS = [
    ("section", "data", ""),
    ("n_tokens", "history", ",d"),
    ("codec", "codec", ""),
    ("n", "histories", "d"),
    ("ratio_bf16", "x smaller than bf16", ".2f"),
    ("mean_kl", "mean KL, nats", ".4f"),
    ("max_kl", "max KL, nats", ".3f"),
    ("top1", "top-1", ".3f"),
    ("perplexity_percent", "perplexity, %", "+.2f"),
    ("needle", "needle", ".2f"),
    ("keys", "keys", ".2f"),
    ("copy", "copy", ".2f"),
]


def uncompressed() -> Codec:
    return Codec("uncompressed", "", lambda h: Restored(h.layers, h.bf16_bytes))


def krul_codec(codec: str) -> Codec:
    """One of krul's codecs for single layers."""

    def run(history: History) -> Restored:
        coded = bench_codecs.code(history.layers, codec)
        return Restored(coded.layers, coded.n_bytes)

    return Codec("krul", codec, run)


def krul_sharing(codec: str, n_pairs: int, is_fixed: bool) -> Codec:
    """Krul's sharing: with fixed pairs it is MiniCache, with observed ones the paper's method."""

    def run(history: History) -> Restored:
        pairs = history.pairs[:n_pairs]
        if is_fixed:
            found = krul.selector.fixed_pairs([0] * len(history.layers), n_pairs)
            pairs = tuple((int(lower), int(upper)) for lower, upper in found)
        coded = bench_codecs.code(history.layers, codec, pairs)
        return Restored(coded.layers, coded.n_bytes, {"pairs": [list(pair) for pair in pairs]})

    name = "MiniCache's fixed pairs" if is_fixed else "paper's pairs"
    needs = frozenset() if is_fixed else frozenset({"pairs"})
    return Codec(f"krul {codec} ({name})", f"{n_pairs}", run, needs)


def krul_predict(
    profile: Callable[[], krul.Profile], step: float, *, are_alike: bool = False
) -> Codec:
    """Krul's predictive coding with a profile of the calibration texts, at one step.

    As it saves, tokens that get more attention have finer steps, unless `are_alike`.
    """

    def run(history: History) -> Restored:
        coded = code_predicted(history, profile(), step, are_alike=are_alike)
        return Restored(coded.layers, coded.n_bytes)

    name = "krul predict, tokens alike" if are_alike else "krul predict"
    return Codec(name, f"step {step}", run, frozenset() if are_alike else frozenset({"fineness"}))


def code_predicted(
    history: History, profile: krul.Profile, step: float, *, are_alike: bool = False
) -> bench_codecs.Coded:
    """Encode and decode a whole cache as a save and a restore do; table rows of blocks counted."""
    harness.check(are_alike or history.fineness is not None, "nobody asked for the fineness")
    fineness = None if are_alike else history.fineness
    layers, n_tokens = history.layers, history.n_tokens
    back = [tuple(torch.empty_like(t) for t in layer) for layer in layers]
    kept = [
        (CODECS["exact"], kv, (layer[kv][:, :, :KEEP_FIRST],)) for layer in layers for kv in (0, 1)
    ]
    n_bytes = sum(_stored(payload) for payload, *_ in _core.encode_blocks(kept))
    for layer, out in zip(layers, back, strict=True):
        for tensor, copy in zip(layer, out, strict=True):
            copy[:, :, :KEEP_FIRST] = tensor[:, :, :KEEP_FIRST]
    runs = token_runs(KEEP_FIRST, n_tokens, 2 * layers[0][0][:, :, 0].nbytes, 0)
    products = choose_products(profile, step)
    encoder = make_predictor(profile, range(n_tokens), products, is_encoding=True)
    chains = encoder.encode(
        [
            [
                (
                    i,
                    start,
                    *(t[:, :, start:end] for t in layer),
                    None if fineness is None else fineness[i, start:end],
                )
                for i, layer in enumerate(layers)
            ]
            for start, end in runs
        ],
        step,
    )
    jobs = []
    for (start, end), chain in zip(runs, chains, strict=True):
        harness.check(chain is not None, f"predict cannot hold tokens {start} to {end}")
        assert chain is not None
        n_bytes += sum(_stored(payload) for payload, _, _ in chain)
        jobs.append(
            [
                (i, start, end - start, payload, *(t[:, :, start:end] for t in out))
                for i, ((payload, _, _), out) in enumerate(zip(chain, back, strict=True))
            ]
        )
    make_predictor(profile, range(n_tokens), products).decode(jobs)
    return bench_codecs.Coded(back, n_bytes)


def _stored(payload: bytes) -> int:
    """Bytes of a block in a file: its payload, padded, and its row in the table."""
    return len(payload) + -len(payload) % 64 + 64


def codecs(
    basis: Callable[[], baselines.Basis], profile: Callable[[], krul.Profile]
) -> list[Codec]:
    """Return everything that is measured, in the order of the table."""
    return [
        uncompressed(),
        *(krul_predict(profile, step) for step in (0.3, 0.45, 0.6, 0.8, 1.1, 1.5, 2.2)),
        *(
            krul_predict(profile, step, are_alike=True)
            for step in (0.2, 0.3, 0.45, 0.6, 0.8, 1.1, 1.6)
        ),
        *(krul_codec(name) for name in bench_codecs.SINGLE),
        *(
            krul_sharing(codec, n_pairs, is_fixed)
            for codec in ("share", "share+int4")
            for is_fixed in (False, True)
            for n_pairs in (1, 3, bench_codecs.N_PAIRS)
        ),
        *(baselines.grouped_integers(bits, group) for group in (64, 32) for bits in (8, 4, 3, 2)),
        *(baselines.quanto_like(bits) for bits in (4, 2)),
        *(baselines.heavy_hitters(ratio) for ratio in (2, 4, 8, 12)),
        *(baselines.transform_coding(basis, bits) for bits in (2.5, 1.75, 1.25, 0.9, 0.65, 0.45)),
        *(baselines.one_step_transform(basis, step) for step in (0.1, 0.2, 0.3, 0.5, 0.8)),
    ]


@functools.cache
def fitted_profile(
    model: Any, tokenizer: Any, n_tokens: int = N_CALIBRATION_TOKENS
) -> krul.Profile:
    """Return a profile of the calibration texts, fitted the first time and kept on disk."""
    words = texts.calibration_texts()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    name = f"{n_tokens}-{texts.digest(''.join(words))}" + (
        "" if dtype == "float32" else f"-{dtype}"
    )
    path = baselines.cache_folder() / f"{name}.profile"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print("fitting a profile ...", file=sys.stderr)
        checkpoint = path.with_suffix(".checkpoint")
        krul.Profile.fit(
            model, tokenizer, words, context_tokens=n_tokens, checkpoint=checkpoint
        ).save(path)
    return krul.Profile.load(path)


class Parts:
    """What earlier runs measured: one JSON line each, under a key that says what it is."""

    def __init__(self, path: Path, *, is_fresh: bool = False) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_fresh:
            path.unlink(missing_ok=True)
        if path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.found[row["key"]] = row

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; a later one under the same key takes its place."""
        self.found[key] = {"key": key, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[key]) + "\n")


class OutOfTimeError(Exception):
    """The seconds that were given are used up; what was done is kept."""


class Bench:
    """The model, the codecs chosen, and what has been measured."""

    def __init__(self, parts: Parts, seconds: float = math.inf, *, is_quick: bool = False) -> None:
        self.tokenizer, self.model = load(torch.float32)
        self.reader = bench_codecs.Bench()
        self.reader.tokenizer, self.reader.model = self.tokenizer, self.model
        self.parts = parts
        self.deadline = time.monotonic() + seconds
        self.commit = harness._first_line("git", "rev-parse", "--short", "HEAD")
        self.n_calibration_tokens = QUICK_CALIBRATION_TOKENS if is_quick else N_CALIBRATION_TOKENS
        self.n_components = QUICK_COMPONENTS if is_quick else baselines.N_COMPONENTS
        self.codecs: list[Codec] = codecs(self.basis, self.profile)

    def encode(self, words: str) -> list[int]:
        """Turn words into token ids, adding none."""
        return self.tokenizer(words, add_special_tokens=False).input_ids

    def read(self, ids: torch.Tensor, needs: Iterable[str] = ()) -> History:
        """Run the model over a history, under krul's eyes where pairs are asked for."""
        queries: dict[int, torch.Tensor] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
                if output.shape[1] == ids.shape[1]:  # krul asks the model some shorter things too
                    queries[index] = output[0].detach()

            return hook

        handles = []
        if "queries" in needs:
            handles = [
                layer.self_attn.q_proj.register_forward_hook(keep(index))
                for index, layer in enumerate(self.model.model.layers)
            ]
        pairs: baselines.Pairs = ()
        try:
            if "pairs" in needs:
                layers, pairs = self.reader.read(ids)
            else:
                cache = transformers.DynamicCache(config=self.model.config)
                with torch.no_grad():
                    self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                layers = [(x.keys.bfloat16(), x.values.bfloat16()) for x in cache.layers]
        finally:
            for handle in handles:
                handle.remove()
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            cos, sin = self.model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        fineness = self.fineness(ids, layers) if "fineness" in needs else None
        return History(ids, layers, cos[0], sin[0], pairs, list(queries.values()), fineness)

    def fineness(self, ids: torch.Tensor, layers: baselines.KeysAndValues) -> Any:
        """Ask the last tokens of a history what they look at, as a save does."""

        def exact(n_before: int) -> guard.Held:
            return guard.Held(
                [
                    lambda own=layer: tuple(t[:, :, :n_before].float() for t in own)
                    for layer in layers
                ],
                [n_before] * len(layers),
            )

        watch = guard.Guard(
            self.model,
            token_ids=ids,
            attention_mask=None,
            position_ids=None,
            exact=exact,
            n_guard=0,
        )
        return krul.selector.token_fineness(*watch.received(N_QUERIES), KEEP_FIRST)

    @functools.cache  # noqa: B019 - there is one bench
    def basis(self) -> baselines.Basis:
        """Return KVTC's transform, fitted to the calibration texts the first time."""
        words = texts.calibration_texts()

        def histories() -> Iterator[History]:
            for number, text in enumerate(words):
                print(f"calibration text {number + 1} of {len(words)} ...", file=sys.stderr)
                yield self.read(torch.tensor([self.encode(text)[: self.n_calibration_tokens]]))

        digest = texts.digest("".join(words))
        what = f"SmolLM2-135M-Instruct {self.n_calibration_tokens} {digest}"
        return baselines.load_basis(what, histories, self.n_components)

    def profile(self) -> krul.Profile:
        """Return the profile for predict, fitted to the same texts the first time."""
        return fitted_profile(self.model, self.tokenizer, self.n_calibration_tokens)

    def log_probabilities(
        self, layers: baselines.KeysAndValues, ids: torch.Tensor, n_before: int
    ) -> torch.Tensor:
        """Log-probabilities after each of some further tokens, over a cache of those before.

        The cache may hold fewer tokens than there were: positions count from `n_before`.
        """
        cache = transformers.DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(layers):
            cache.update(keys.float(), values.float(), index)
        positions = torch.arange(n_before, n_before + ids.shape[1])[None]
        with torch.no_grad():
            out = self.model(ids, past_key_values=cache, position_ids=positions, use_cache=True)
        return out.logits[0].log_softmax(-1)

    def missing(self, keys: dict[str, Codec]) -> dict[str, Codec]:
        """Return those of the keys that are not measured yet; stop where time is up."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        return {key: codec for key, codec in keys.items() if key not in self.parts.found}

    def one_history(self, section: str, name: str, ids: torch.Tensor, n_tokens: int) -> None:
        """Measure every codec on the tokens that follow a history."""
        harness.check(ids.shape[1] >= n_tokens + N_SCORED, f"{name} has only {ids.shape[1]} tokens")
        ids = ids[:, : n_tokens + N_SCORED]
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12]
        wanted = {f"{section} {name} {n_tokens} {digest} {c.name}": c for c in self.codecs}
        todo = self.missing(wanted)
        if not todo:
            return
        print(f"{section}: {name}, {n_tokens:,} tokens, {len(todo)} codecs ...", file=sys.stderr)
        history = self.read(ids[:, :n_tokens], set().union(*(c.needs for c in todo.values())))
        after = ids[:, n_tokens:]
        expected = self.log_probabilities(history.layers, after, n_tokens)
        for key, codec in todo.items():
            start = time.perf_counter()
            restored = codec.roundtrip(history)
            seconds = time.perf_counter() - start
            got = self.log_probabilities(restored.layers, after, n_tokens)
            row = scores(expected, got, after[0])
            if codec.family == "uncompressed" or codec.name == "krul: exact":
                harness.check(row["mean_kl"] == 0.0, f"{codec.name} changed the logits on {name}")
            harness.check(math.isfinite(row["mean_kl"]), f"{codec.name} is not finite on {name}")
            about = {
                "section": section,
                "item": name,
                "n_tokens": n_tokens,
                "family": codec.family,
                "codec": codec.name,
                "stored_bytes": restored.stored_bytes,
                "ratio_bf16": history.bf16_bytes / restored.stored_bytes,
            }
            self.parts.add(
                key, about | row | restored.about | {"seconds": seconds, "commit": self.commit}
            )

    def text(self, lengths: Iterable[int]) -> None:
        """Held-out texts of three kinds."""
        for kind, words in texts.held_out_texts().items():
            ids = torch.tensor([self.encode(words[:40_000])])
            for n_tokens in lengths:
                self.one_history("text", kind, ids, n_tokens)

    def chats(self, lengths: Iterable[int], topics: Iterable[str]) -> None:
        """Chats of several turns that the model wrote itself."""
        longest = max(lengths)
        for topic in topics:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            ids = chats.chat(
                self.tokenizer, self.model, topic, longest + N_SCORED, baselines.cache_folder()
            )
            for n_tokens in lengths:
                self.one_history("chats", topic, ids, n_tokens)

    def retrieval(self, n_trials: int, tasks: Iterable[str] = retrieval.TASKS) -> None:
        """Ask for what stands in the history; the exact answer, greedily, or none."""
        haystack = self.encode("\n\n".join(texts.held_out_texts().values()))
        for number in range(n_trials):
            for task in tasks:
                self.one_trial(retrieval.make(task, number, self.encode, haystack))

    def one_trial(self, trial: retrieval.Trial) -> None:
        """Put one question to every codec; the history is read once."""
        ids = torch.tensor([trial.history + trial.question + trial.answer])
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12]
        about = f"retrieval {trial.task} {trial.number} {digest}"
        asked = (codec for codec in self.codecs if codec.name not in NOT_ASKED)
        wanted = {f"{about} {codec.name}": codec for codec in asked}
        todo = self.missing(wanted)
        if not todo:
            return
        n_tokens = len(trial.history)
        print(f"{trial.task} {trial.number}, {n_tokens:,} tokens ...", file=sys.stderr)
        history = self.read(ids[:, :n_tokens], set().union(*(c.needs for c in todo.values())))
        for key, codec in todo.items():
            start = time.perf_counter()
            restored = codec.roundtrip(history)
            seconds = time.perf_counter() - start
            row = {
                "section": "retrieval",
                "task": trial.task,
                "item": trial.number,
                "n_tokens": n_tokens,
                "family": codec.family,
                "codec": codec.name,
                "stored_bytes": restored.stored_bytes,
                "ratio_bf16": history.bf16_bytes / restored.stored_bytes,
                "is_right": self.answers(restored.layers, trial),
                "seconds": seconds,
                "commit": self.commit,
            }
            self.parts.add(key, row)

    def answers(self, layers: baselines.KeysAndValues, trial: retrieval.Trial) -> bool:
        """Tell whether the greedy answer over some K/V is the right one, token by token."""
        after = torch.tensor([trial.question + trial.answer])
        got = self.log_probabilities(layers, after, len(trial.history)).argmax(-1)
        n = len(trial.answer)
        return got[-n - 1 : -1].tolist() == trial.answer


def scores(expected: torch.Tensor, got: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """Compare two sets of log-probabilities, n_tokens x vocabulary, after the tokens `ids`."""
    divergence = (expected.exp() * (expected - got)).sum(-1)
    next_ids = ids[1:, None]
    lost = float((expected[:-1].gather(1, next_ids) - got[:-1].gather(1, next_ids)).mean())
    return {
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "top1": float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
        "nll_change": lost,
        "perplexity_percent": 100 * math.expm1(min(lost, 50.0)),
    }


def means(details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each kind of data, length and codec.

    A ratio is that of all bytes together; perplexity is that of the mean log-likelihood; the
    largest divergence is the largest of all.
    """
    rows: list[dict[str, Any]] = []
    for section in SECTIONS:
        mine = [r for r in details if r["section"] == section]
        lengths = [None] if section == "retrieval" else sorted({r["n_tokens"] for r in mine})
        for n_tokens in lengths:
            here = [r for r in mine if n_tokens in (None, r["n_tokens"])]
            for codec in dict.fromkeys(r["codec"] for r in here):
                rows.append(_mean(section, n_tokens, [r for r in here if r["codec"] == codec]))
    return rows


def _mean(section: str, n_tokens: int | None, group: list[dict[str, Any]]) -> dict[str, Any]:
    stored = sum(r["stored_bytes"] for r in group)
    row: dict[str, Any] = {
        "section": section,
        "n_tokens": n_tokens,
        "codec": group[0]["codec"],
        "family": group[0]["family"],
        "brief": "yes" if group[0]["codec"] in BRIEF else "no",
        "n": len(group),
        "ratio_bf16": sum(r["ratio_bf16"] * r["stored_bytes"] for r in group) / stored,
        "seconds": statistics.fmean(r["seconds"] for r in group),
    }
    if section == "retrieval":
        for task in retrieval.TASKS:
            right = [r["is_right"] for r in group if r["task"] == task]
            row[task] = statistics.fmean(right) if right else None
        row["score"] = statistics.fmean(r["is_right"] for r in group)
        return row
    lost = statistics.fmean(r["nll_change"] for r in group)
    row |= {name: statistics.fmean(r[name] for r in group) for name in ("mean_kl", "top1")}
    row |= {"max_kl": max(r["max_kl"] for r in group), "nll_change": lost}
    row["perplexity_percent"] = 100 * math.expm1(min(lost, 50.0))
    if all("ideal_bytes" in r for r in group):
        total = sum(r["ratio_bf16"] * r["stored_bytes"] for r in group)
        row["ideal_ratio_bf16"] = total / sum(r["ideal_bytes"] for r in group)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw mean divergence, and right answers, over the ratio: one line per family."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {row["section"] for row in rows}
    panels = [name for name in SECTIONS if name in measured]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.5), squeeze=False)
    families = list(dict.fromkeys(row["family"] for row in rows))
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(families)}
    for axis, section in zip(axes[0], panels, strict=True):
        what = "score" if section == "retrieval" else "mean_kl"
        mine = [row for row in rows if row["section"] == section]
        longest = max(row["n_tokens"] or 0 for row in mine)
        mine = [row for row in mine if (row["n_tokens"] or 0) == longest]
        for family in families:
            line = sorted((r["ratio_bf16"], r[what]) for r in mine if r["family"] == family)
            line = [point for point in line if what == "score" or point[1] > 0]
            style = {"marker": "o", "linewidth": 3} if family == "krul" else {"marker": "."}
            if line:
                axis.plot(*zip(*line, strict=True), color=colours[family], **style)
        ratios = [2**i for i in range(6)]
        axis.set(xscale="log", xlabel="times smaller than bf16")
        axis.set_xticks(ratios, [str(ratio) for ratio in ratios])
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3, which="both")
        if what == "mean_kl":
            axis.set(yscale="log", ylabel="mean KL, nats", title=f"{section}, {longest:,} tokens")
        else:
            axis.set(ylabel="exact answers", ylim=(-0.02, 1.02), title="retrieval, all tasks")
    handles = [plt.Line2D([], [], color=colours[name], marker=".", label=name) for name in families]
    figure.legend(handles=handles, loc="lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=110)


def notes(details: list[dict[str, Any]]) -> list[str]:
    commits = sorted({row["commit"] for row in details})
    return [
        f"SmolLM2-135M-Instruct in float32, K/V kept as bfloat16; {N_SCORED} tokens scored after "
        "the history. The first 4 tokens are exact and counted, but for the quantised cache of "
        "transformers, which keeps none, and KVTC, which keeps the first 4 and the last 128.",
        "Bytes are of what a conversation needs; a basis or profile, once per model, is not in "
        "them. KVTC (DEFLATE) is coded by zlib; for one step the ideal code length with tables is "
        "given, which no coder reaches.",
        "The quantised cache of transformers is made again here after its scheme (per token, "
        "groups of 64, bfloat16 scale and shift). H2O is pruned once, at the end of the history, "
        "by attention from all its queries. KVTC's groups have 16 components each; the paper "
        "lets its dynamic programme choose their sizes too.",
        f"krul predict looks at what the last {N_QUERIES} tokens of the history attend to, as a "
        "save does, and has finer steps for that; with tokens alike it does not.",
        f"Fitted codecs saw {len(texts.calibration_texts())} calibration texts and no chat. "
        "Held-out texts, by SHA-256: "
        + ", ".join(f"{k} {texts.digest(w)}..." for k, w in texts.held_out_texts().items())
        + ".",
        "Retrieval: the answer is begun, and must then be right token by token, greedily.",
        f"Measured at {', '.join(commits)}; a share of 1 in a task's column is every trial.",
    ]


def chosen(every: list[Codec], wanted: str | None) -> list[Codec]:
    """Return the codecs whose name contains one of the words, or all."""
    if not wanted:
        return every
    words = [word.strip().lower() for word in wanted.split(",")]
    found = [codec for codec in every if any(word in codec.name.lower() for word in words)]
    for word in words:
        if not any(word in codec.name.lower() for codec in every):
            raise ValueError(f"--codecs names {word!r} but no codec's name has it")
    return found


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="text,chats,retrieval")
    parser.add_argument("--codecs", help="only codecs whose name contains one of these words")
    parser.add_argument("--tasks", default=",".join(retrieval.TASKS), help="needle,keys,copy")
    parser.add_argument("--trials", type=int, help="questions per retrieval task")
    parser.add_argument("--topics", type=int, help="chats")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--parts", type=Path, metavar="FILE", help="where parts are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the parts of earlier runs")
    parser.add_argument("--png", type=Path, help="where the picture goes")
    options: argparse.Namespace = parser.parse_args()
    sections = options.only.split(",")
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"--only is {name!r} but must be among {', '.join(SECTIONS)}")

    file = "quick.jsonl" if options.quick else "full.jsonl"
    parts = Parts(options.parts or baselines.cache_folder() / file, is_fresh=options.fresh)
    bench = Bench(parts, options.seconds, is_quick=options.quick)
    bench.codecs = chosen(bench.codecs, options.codecs)
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    n_topics = options.topics or (1 if options.quick else len(chats.TOPICS))
    n_trials = options.trials or (QUICK_TRIALS if options.quick else N_TRIALS)
    work: dict[str, Callable[[], None]] = {
        "text": lambda: bench.text(lengths),
        "chats": lambda: bench.chats(lengths, list(chats.TOPICS)[:n_topics]),
        "retrieval": lambda: bench.retrieval(n_trials, options.tasks.split(",")),
    }
    is_whole = True
    try:
        for name in sections:
            work[name]()
    except OutOfTimeError:
        is_whole = False
        print("out of time; the same command goes on from here", file=sys.stderr)

    order = {codec.name: index for index, codec in enumerate(bench.codecs)}
    details = [row for row in parts.found.values() if row["codec"] in order]
    details.sort(key=lambda row: order[row["codec"]])
    rows = means(details)
    about = notes(details) + ([] if is_whole else ["The run was stopped before its end."])
    if options.quick:
        about.append(
            f"Quick: KVTC's basis has {QUICK_COMPONENTS:,} components, fitted to "
            f"{QUICK_CALIBRATION_TOKENS:,} tokens of each text; what it leaves out bounds its "
            "finest steps, and more than 1.4 bits find no use."
        )
    harness.finish(
        "quality",
        rows,
        COLUMNS,
        notes=about,
        is_quick=options.quick,
        path=options.json,
        details=[{k: v for k, v in row.items() if k != "key"} for row in details],
    )
    path = options.png or (None if options.quick else harness.RESULTS / "quality.png")
    if path is not None and rows:
        plot(rows, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
