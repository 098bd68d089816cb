"""Time to first token over a store of any speed: loading, recomputing, and both at once.

Each way reads through a limit, set so that recomputing the history takes x times as long as reading
its K/V as 16-bit numbers would. A way that keeps fewer bytes is given the time that its own bytes
take; one whose bytes here differ from what it stands for (float32 models store more than 16 bits)
has its limit scaled so that it is not. All ways run on krul's own reader and threads.

Then from a store without a limit, in the page cache: against a cache that never left memory, krul's
and transformers' own, by turns, for prompts of several lengths. ``--only 4096:0.5,1 512:fast`` runs
a part and replaces its rows in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import krul
from krul import _core, probe
from krul.compressor import CODECS
from krul.demo_model import load

from . import bench_quality, harness, texts
from .hidden_states import layer_inputs, make_layer

Part = float | str  # an x, or the fast store
FAST = "fast"
HISTORIES: dict[int, tuple[Part, ...]] = {
    512: (0.1, 0.3, 1, 3, 10, 30, 100, FAST),
    4096: (0.5, 1, 2, 5, FAST),
    7936: (0.1, 1, 10, 100),
}
QUICK_HISTORIES: dict[int, tuple[Part, ...]] = {512: (1, 10, FAST)}
N_PROMPT = 64
IN_MEMORY, PLAIN = "in memory", "transformers' DynamicCache, in memory"
WRITTEN = "in memory, as many bytes written first"
FAST_PROMPTS = (16, 64, 128, 256)
N_FAST_RUNS = 15
# Two correct runs of the model in float32; products of other shapes add in another order.
CLOSE = 2e-3

COLUMNS = [
    ("n_tokens", "history", ",d"),
    ("x", "x", "g"),
    ("n_prompt", "prompt", "d"),
    ("way", "way", ""),
    ("first_token_s", "first token, s", ".3f"),
    ("faster_than_recompute", "x faster than recompute", ".2f"),
    ("times_bound", "x the bound", ".2f"),
    ("times_memory", "x memory", ".2f"),
    ("times_plain", "x DynamicCache", ".2f"),
    ("plan", "plan", ""),
    ("recomputed", "recomputed", ".0%"),
    ("predicted_s", "predicted, s", ".3f"),
    ("mean_kl", "mean KL, nats", ".4f"),
]


@dataclass(frozen=True)
class Way:
    """One way to bring the history back under a limit of bytes per second.

    `counted_bytes` is what it reads in the story, `stored_bytes` what it reads here.
    """

    name: str
    restore: Callable[[float], Any]
    stored_bytes: float
    counted_bytes: float
    max_kl: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What no restore is faster than, in seconds.

    `recompute_s` and `prompt_s` are those of history and prompt, and of the prompt over a history
    that is there; `tail_s` is what is left of the latter when the deepest layer's K and V are in.
    """

    recompute_s: float
    prompt_s: float
    tail_s: float

    def bound_s(self, load_s: float, decode_s: float) -> float:
        """Return T*: the best split of what is read in `load_s` and decoded in `decode_s`.

        Recomputing a part, decoding the rest and the new prompt share the processors; what is read
        comes beside them, and the last of it before the tail. Both sides end at once.
        """
        history_s = self.recompute_s - self.prompt_s
        gained_s = load_s + self.tail_s - self.prompt_s - decode_s
        part = 0.0
        if gained_s > 0:
            part = gained_s / max(gained_s, history_s - decode_s + load_s)
        return max(
            part * history_s + self.prompt_s + (1 - part) * decode_s,
            (1 - part) * load_s + self.tail_s,
        )


class HiddenStates:
    """HCache's way: the input of each layer is loaded, and its K and V are made from it."""

    def __init__(self, model: Any, ids: torch.Tensor, path: Path) -> None:
        self.model = model
        hidden, self.rotation = layer_inputs(model, ids)
        self.n_tokens, self.shape = ids.shape[1], (1, 1, *hidden[0].shape[1:])
        constants = _core.store_constants()
        self.entries, self.stored_bytes = [], 0
        with path.open("wb") as file:
            for layer, states in enumerate(hidden):
                job = (CODECS["exact"], 0, (states[None].contiguous(),))
                ((payload, codec, _, _),) = _core.encode_blocks([job])
                file.write(payload)
                self.entries.append(
                    (
                        constants["ENTRY_BLOCK"], codec, 0, 1, layer, -1, 1, 1, self.shape[3],
                        0, self.n_tokens, self.stored_bytes, len(payload), _core.crc32c(payload),
                    )
                )  # fmt: skip
                self.stored_bytes += len(payload)
        self.path = path

    def open(self, max_bytes_per_s: float) -> krul.Cache:
        """Return a cache whose layers are made from what is being loaded."""
        cache = krul.Cache(model=self.model)
        config = self.model.config
        shape = (1, config.num_key_value_heads, self.n_tokens, config.head_dim)
        for layer in cache.layers:
            layer.allocate(shape, shape, torch.float32, torch.float32)
        cache.record_history(torch.zeros(1, self.n_tokens, dtype=torch.int64))
        cache.begin_restore(_HiddenSource(self, cache, max_bytes_per_s), range(len(cache.layers)))
        return cache


class _HiddenSource:
    def __init__(self, ways: HiddenStates, cache: krul.Cache, max_bytes_per_s: float) -> None:
        self.ways, self.cache = ways, cache
        self.file = ways.path.open("rb")
        self.states = [torch.empty(ways.shape) for _ in ways.entries]
        self.restore = _core.Restore(
            [
                (self.file.fileno(), None, entry, (states,))
                for entry, states in zip(ways.entries, self.states, strict=True)
            ],
            len(ways.entries),
            max_bytes_per_s=max_bytes_per_s,
        )

    @torch.no_grad()
    def wait(self, layer: int, can_recompute: bool = False) -> None:
        self.restore.wait(layer)
        make_layer(self.ways.model, layer, self.states[layer][0], self.ways.rotation, self.cache)

    def cancel(self) -> None:
        self.restore.cancel()

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        self.restore.close()
        self.file.close()


class Bench:
    """The model, a text, and stores that hold it."""

    def __init__(self, folder: Path, *, has_profile: bool = False) -> None:
        # float32: what every processor multiplies fast, and where equal means equal.
        self.tokenizer, self.model = load(torch.float32)
        self.folder = folder
        self.words = texts.text("manual")
        self.ids = self.tokenizer(self.words, return_tensors="pt").input_ids
        self.rows: list[dict[str, Any]] = []
        self.profile = (
            bench_quality.fitted_profile(self.model, self.tokenizer) if has_profile else None
        )

    @torch.no_grad()
    def first_token(self, cache: Any, n_tokens: int, n_prompt: int = N_PROMPT) -> torch.Tensor:
        """Run the new prompt; return its last logits."""
        new = self.ids[:, n_tokens : n_tokens + n_prompt]
        return self.model(
            new, past_key_values=cache, use_cache=True, logits_to_keep=N_PROMPT
        ).logits[0]

    @torch.no_grad()
    def recompute(self, n_tokens: int) -> torch.Tensor:
        """Run history and prompt without any store."""
        whole = self.ids[:, : n_tokens + N_PROMPT]
        return self.model(whole, use_cache=True, logits_to_keep=N_PROMPT).logits[0]

    @torch.no_grad()
    def run(self, cache: Any, n_tokens: int) -> Any:
        """Run the history over a cache that then holds it and never left memory."""
        self.model(self.ids[:, :n_tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def save(self, n_tokens: int, name: str, **settings: Any) -> tuple[krul.Store, int]:
        """Store the history under a codec as it is named; return the store and the bytes."""
        store = krul.Store(self.folder / f"{name.replace('/', '-')}-{n_tokens}")
        if name == "predict":
            assert self.profile is not None
            store.add_profile(self.profile)
        chosen = krul.Settings(guard_tokens=0, **settings)
        with store.open("history", self.model, settings=chosen) as cache:
            self.run(cache, n_tokens)
            # A few prompts more, so that the store's book of costs knows what passes take.
            for _ in range(2):
                self.first_token(cache, n_tokens)
                cache.crop(-N_PROMPT)
            return store, cache.save().stored_bytes

    def decode_s(self, store: krul.Store) -> float:
        """Return what decoding the history takes of all processors when nothing else does."""
        found = []
        for _ in range(2):
            with store.open("history", self.model, settings=krul.Settings(restore="load")) as cache:
                cache.restore()
                found.append(cache.restore_report.seconds_by_stage["decode"])
        return min(found) / torch.get_num_threads()

    def ways(self, n_tokens: int) -> list[Way]:
        """Save the history in every form and return how it comes back."""
        config = self.model.config
        n_values = 2 * n_tokens * config.num_hidden_layers * config.num_key_value_heads
        bf16_bytes = 2.0 * n_values * config.head_dim
        exact, exact_bytes = self.save(n_tokens, "exact", codec="exact", estimator_rows=0)
        pairs, pairs_bytes = self.save(
            n_tokens, "pairs", codec="share", estimator_rows=0, share_ratio=0.75
        )
        hidden = HiddenStates(self.model, self.ids[:, :n_tokens], self.folder / f"hidden{n_tokens}")
        hidden_bytes = 2.0 * n_tokens * config.hidden_size * config.num_hidden_layers

        def opened(store: krul.Store, restore: str, is_blocking: bool = False) -> Any:
            def open_it(max_bytes_per_s: float) -> krul.Cache:
                settings = krul.Settings(restore=restore, max_read_bytes_per_s=max_bytes_per_s)
                cache = store.open("history", self.model, settings=settings)
                if is_blocking:
                    cache.restore()
                return cache

            return open_it

        def whole(name: str, restore: Callable[[float], Any]) -> Way:
            return Way(name, restore, exact_bytes, bf16_bytes, decode_s=exact_s)

        exact_s = self.decode_s(exact)
        found = [
            whole("load, then run", opened(exact, "load", True)),
            whole("load, layer by layer", opened(exact, "load")),
            Way(
                "fixed pairs, layer by layer",
                opened(pairs, "load"),
                pairs_bytes,
                0.75 * bf16_bytes,
                max_kl=math.inf,
                decode_s=self.decode_s(pairs),
            ),
            whole("from both ends, uncompressed", opened(exact, "uniform")),
            Way("hidden states", hidden.open, hidden.stored_bytes, hidden_bytes),
        ]
        chosen, chosen_bytes = self.save(n_tokens, "share", codec="share", share_ratio=0.75)
        found.append(
            Way(
                "krul share",
                opened(chosen, "auto"),
                chosen_bytes,
                0.75 * bf16_bytes,
                max_kl=math.inf,
                decode_s=self.decode_s(chosen),
            )
        )
        for codec in ("int8", "int4", *(["predict"] if self.profile else [])):
            store, n_bytes = self.save(n_tokens, codec, codec=codec, estimator_rows=0)
            found.append(
                Way(
                    f"krul {codec}",
                    opened(store, "auto"),
                    n_bytes,
                    n_bytes,
                    max_kl=math.inf,
                    decode_s=self.decode_s(store),
                )
            )
        return found

    def fast_store(self, n_tokens: int, ways: list[Way], recompute_s: float) -> None:
        """Time krul's ways without a limit against a cache in memory, by turns."""
        mine = [way for way in ways if way.name.startswith("krul")]
        # With what a stored one has too: hooks, and the estimator that sees the attention.
        memory = self.run(krul.Store(self.folder / "memory").open("history", self.model), n_tokens)
        kept = {
            IN_MEMORY: memory,
            PLAIN: self.run(transformers.DynamicCache(config=self.model.config), n_tokens),
            WRITTEN: memory,
        }
        kv = [x for layer in memory.layers for x in (layer.keys, layer.values)]
        written = torch.ones(sum(x.nbytes for x in kv) // torch.float32.itemsize)
        for n_prompt in FAST_PROMPTS:
            seconds: dict[str, list[float]] = {
                name: [] for name in (*kept, *(x.name for x in mine))
            }
            for _ in range(N_FAST_RUNS):
                for name, cache in kept.items():
                    started = time.perf_counter()
                    if name == WRITTEN:
                        written.fill_(0.0)
                    self.first_token(cache, n_tokens, n_prompt)
                    seconds[name].append(time.perf_counter() - started)
                    cache.crop(-n_prompt)
                for way in mine:
                    started = time.perf_counter()
                    with way.restore(0.0) as cache:
                        self.first_token(cache, n_tokens, n_prompt)
                        seconds[way.name].append(time.perf_counter() - started)
            memory_s, plain_s = (statistics.median(seconds[name]) for name in (IN_MEMORY, PLAIN))
            for name, found in seconds.items():
                self.rows.append(
                    {
                        "n_tokens": n_tokens,
                        "x": None,
                        "part": FAST,
                        "n_prompt": n_prompt,
                        "way": name if name in kept else f"{name}, fast store",
                        "first_token_s": statistics.median(found),
                        "minimum_s": min(found),
                        "n_runs": len(found),
                        # Which has N_PROMPT new tokens; more would make it longer.
                        "faster_than_recompute": recompute_s / statistics.median(found),
                        "times_memory": statistics.median(found) / memory_s,
                        "times_plain": statistics.median(found) / plain_s,
                    }
                )
        memory.close()

    def one_history(self, n_tokens: int, parts: tuple[Part, ...]) -> None:
        """Time every way at every x, or from a fast store."""
        ways = self.ways(n_tokens)
        expected = self.recompute(n_tokens)
        recompute_s = statistics.median(
            _seconds(lambda: self.recompute(n_tokens)) for _ in range(3 if n_tokens < 5000 else 1)
        )
        if FAST in parts:
            print(f"{n_tokens:,} tokens, fast store ...", file=sys.stderr, flush=True)
            self.fast_store(n_tokens, ways, recompute_s)
        xs = [x for x in parts if not isinstance(x, str)]
        if not xs:
            return
        with self.run(krul.Cache(model=self.model), n_tokens) as cache:
            passes = [_prompt_pass(self, cache, n_tokens) for _ in range(3)]
        limits = Limits(recompute_s, *(min(seconds) for seconds in zip(*passes, strict=True)))
        bf16_bytes = next(way for way in ways if way.name.startswith("load")).counted_bytes
        for x in xs:
            print(f"{n_tokens:,} tokens, x = {x:g} ...", file=sys.stderr, flush=True)
            rate = x * bf16_bytes / recompute_s
            base = {"n_tokens": n_tokens, "x": x, "part": x, "n_prompt": N_PROMPT}
            self.rows.append(
                base
                | {
                    "way": "recompute",
                    "first_token_s": recompute_s,
                    "faster_than_recompute": 1.0,
                    "mean_kl": 0.0,
                }
            )
            for way in ways:
                self.rows.append(base | self.one_way(way, n_tokens, rate, expected, limits))

    def one_way(
        self,
        way: Way,
        n_tokens: int,
        rate: float,
        expected: torch.Tensor,
        limits: Limits,
    ) -> dict[str, Any]:
        """Check a way, then time it."""
        limit = rate * way.stored_bytes / way.counted_bytes
        seconds: list[float] = []
        while not seconds or len(seconds) < n_runs_of(seconds[0]):
            touch_memory()
            self.first_token(None, 0)  # as if the model had just answered somebody else
            start = time.perf_counter()
            with way.restore(limit) as cache:
                logits = self.first_token(cache, n_tokens)
                seconds.append(time.perf_counter() - start)
                report = cache.restore_report
            p, q = expected.log_softmax(-1), logits.log_softmax(-1)
            mean_kl = float((p.exp() * (p - q)).sum(-1).mean())
            error = float((logits - expected).abs().max() / expected.abs().max())
            harness.check(
                mean_kl <= way.max_kl or error <= CLOSE,
                f"{way.name} at {n_tokens} tokens: logits are off by {error}, KL {mean_kl}",
            )
        bound_s = limits.bound_s(way.counted_bytes / rate, way.decode_s)
        first_token_s = statistics.median(seconds)
        n_recomputed = report.n_recomputed_by_layer
        return {
            "way": way.name,
            "first_token_s": first_token_s,
            "minimum_s": min(seconds),
            "prompt_s": limits.prompt_s,
            "tail_s": limits.tail_s,
            "decode_s": way.decode_s,
            "n_runs": len(seconds),
            "faster_than_recompute": limits.recompute_s / first_token_s,
            "bound_s": bound_s,
            "times_bound": first_token_s / bound_s,
            "counted_bytes": way.counted_bytes,
            "plan": report.plan if way.name.startswith(("krul", "from")) else None,
            "recomputed": sum(n_recomputed) / max(1, len(n_recomputed) * n_tokens),
            "predicted_s": None if math.isnan(report.predicted_s) else report.predicted_s,
            "mean_kl": mean_kl,
        }


def n_runs_of(seconds: float) -> int:
    """Return how often a way that takes so long is run: the shorter, the more chance is in it."""
    return 1 if seconds > 4 else 3 if seconds > 1 else 9


def touch_memory(n_bytes: int = 1 << 30) -> None:
    """Have the system hand over memory before a clock runs: a virtual machine's may take long."""
    torch.zeros(n_bytes, dtype=torch.uint8)


def _prompt_pass(bench: Bench, cache: krul.Cache, n_tokens: int) -> tuple[float, float]:
    """Return what a prompt over a cache takes, and what is left of it after the last update."""
    updated_s = [0.0]
    update = cache.update

    def note(*args: Any, **options: Any) -> Any:
        result = update(*args, **options)
        updated_s.append(time.perf_counter())
        return result

    touch_memory()
    cache.update = note  # type: ignore[method-assign]
    try:
        start = time.perf_counter()
        bench.first_token(cache, n_tokens)
        end = time.perf_counter()
    finally:
        del cache.update
    cache.crop(-N_PROMPT)
    return end - start, end - updated_s[-1]


def _seconds(run: Callable[[], Any]) -> float:
    touch_memory()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time to first token over x, with the bound of each of krul's ways."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["x"] is not None]
    histories = sorted({row["n_tokens"] for row in rows})
    figure, axes = plt.subplots(1, len(histories), figsize=(5 * len(histories), 4), squeeze=False)
    for axis, n_tokens in zip(axes[0], histories, strict=True):
        mine = [row for row in rows if row["n_tokens"] == n_tokens]
        for name in dict.fromkeys(row["way"] for row in mine):
            of_way = sorted((row for row in mine if row["way"] == name), key=lambda row: row["x"])
            xs = [row["x"] for row in of_way]
            (line,) = axis.plot(xs, [row["first_token_s"] for row in of_way], ".-", label=name)
            if name.startswith("krul"):
                bounds = [row["bound_s"] for row in of_way]
                axis.plot(xs, bounds, "--", color=line.get_color(), linewidth=0.8)
        axis.set(
            xscale="log", yscale="log", xlabel="x: recompute / load", title=f"{n_tokens:,} tokens"
        )
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
    axes[0][0].set_ylabel("time to first token, s")
    axes[0][-1].plot([], [], "k--", linewidth=0.8, label="krul's bounds")
    figure.tight_layout()
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=8, **place)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _number(word: str) -> float:
    """Return 0.5 as a float and 1 as an int, as they stand in the results."""
    return int(word) if word.isdigit() else float(word)


def part_of(text: str) -> tuple[int, tuple[Part, ...]]:
    """Read ``4096:0.5,1,fast``; without a colon all of a history."""
    n_tokens, _, parts = text.partition(":")
    if not parts:
        return int(n_tokens), HISTORIES.get(int(n_tokens), (0.3, 1, 3, 10, 30))
    return int(n_tokens), tuple(x if x == FAST else _number(x) for x in parts.split(","))


def merged(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Return these rows and those of other parts that `path` holds, from this machine."""
    if not path.exists():
        return rows
    known = json.loads(path.read_text())
    if known["machine"]["processor"] != harness.machine()["processor"]:
        other = known["machine"]["processor"]
        sys.exit(f"{path} is of {other}: its rows and these are not to be mixed")
    new = {(row["n_tokens"], row["part"]) for row in rows}
    kept = [row for row in known["rows"] if (row["n_tokens"], row.get("part", row["x"])) not in new]
    order = [(n, part) for n, parts in HISTORIES.items() for part in parts]

    def place(row: dict[str, Any]) -> tuple[int, int]:
        part = (row["n_tokens"], row.get("part", row["x"]))
        return row["n_tokens"], order.index(part) if part in order else len(order)

    return sorted([*kept, *rows], key=place)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        type=part_of,
        nargs="+",
        metavar="TOKENS[:X,...]",
        help="run this part and replace its rows in the results; an X may be 'fast'",
    )
    parser.add_argument("--png", type=Path, help="where the picture goes")
    options: argparse.Namespace = parser.parse_args()
    chosen = QUICK_HISTORIES if options.quick else HISTORIES
    if options.only:
        chosen = dict(options.only)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), has_profile=not options.quick)
        # Ask the model what works with it, once; not part of any wait.
        krul.attach(bench.model)
        probe.probe(bench.model)
        for n_tokens, xs in chosen.items():
            bench.one_history(n_tokens, xs)
    notes = [
        f"SmolLM2-135M-Instruct in float32, {torch.get_num_threads()} threads; a manual (SHA-256 "
        f"{texts.digest(bench.words)}...); the first token after {N_PROMPT} new ones. The limit is "
        "a real one: threads read and then wait.",
        "x: seconds to recompute the history by seconds to read its K/V as 16-bit numbers. "
        "The bound is the best split: recomputing a part, decoding the rest and the prompt's pass "
        "share the processors; a way's own bytes are read beside that, the last of them before "
        "the deepest layer's attention.",
        "Fixed pairs change what the model says (see mean KL); the other uncompressed ways give "
        "its logits to float rounding.",
        f"The fast store has no limit and is in the page cache: medians of {N_FAST_RUNS}, each run "
        "beside one of a cache with the same settings that never left memory, and one of "
        "transformers' own, which copies all it holds in every pass. "
        f"'{WRITTEN}' is for scale: torch fills that much memory, then the prompt's pass runs.",
    ]
    command = None
    if options.only and not options.quick:
        bench.rows = merged(bench.rows, options.json or harness.RESULTS / "restore.json")
        command = "python -m benchmarks.bench_restore"
        notes.append("The parts, histories and x, may be of several runs (--only) on one machine.")
    harness.finish(
        "restore",
        bench.rows,
        COLUMNS,
        notes=notes,
        is_quick=options.quick,
        path=options.json,
        command=command,
    )
    path = options.png or (None if options.quick else harness.RESULTS / "restore.png")
    if path is not None:
        plot(bench.rows, path)


if __name__ == "__main__":
    main()
