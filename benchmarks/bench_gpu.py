"""Time to first token on a GPU at the shapes of models from 7B to 72B, and what bounds it.

First the limits of the machine: copies, products, attention, launches, disk. Then histories are
brought back in every way, from memory and from disk, each way checked before it is timed; then what
decoding, the host, the estimator and saves cost. Last the figures that were wanted, each beside the
one that was measured. Weights are random: time does not depend on them.

    python -m benchmarks.bench_gpu [--json FILE] [--device cuda] [--seconds 300] [--quick]

``--quick`` takes a tiny model and ``--device cpu`` runs the same code where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import krul
from krul import probe

from . import harness, shapes, speed
from .shapes import SHAPES, TINY, Shape
from .ways import History, Way, drop_pages

WAYS = (
    "load, then run",
    "load, layer by layer",
    "fixed pairs, layer by layer",
    "from both ends",
    "hidden states",
    "krul share",
    "krul share+int8",
    "krul int4",
)
PREDICTED_WAYS = ("load, layer by layer", "krul int4", "krul predict")
#: How much smaller codec predict shall make the numbers of a random model.
PREDICT_RATIO = 12.0
#: Copies of at least so many bytes count for the limit of a restore.
COUNTED_COPY_BYTES = 4 << 20
#: What decoding is measured over.
DECODED_CODECS = ("exact", "int8", "int4", "share", "share+int8", "share+int4")
MEMORY, DISK = "memory", "disk"

COLUMNS = [
    ("section", "section", ""),
    ("what", "what", ""),
    ("label", "model", ""),
    ("n_tokens", "history", ",d"),
    ("n_prompt", "prompt", "d"),
    ("place", "store", ""),
    ("way", "way", ""),
    ("codec", "codec", ""),
    ("n_bytes", "bytes", ",d"),
    ("n_rows", "rows", ",d"),
    ("gb_s", "GB/s", ".1f"),
    ("tflops", "TFLOP/s", ".1f"),
    ("microseconds", "microseconds", ".2f"),
    ("first_token_s", "first token, s", ".4f"),
    ("faster_than_recompute", "x faster than recompute", ".2f"),
    ("times_bound", "x the bound", ".2f"),
    ("times_memory", "x never left", ".2f"),
    ("recomputed", "recomputed", ".0%"),
    ("ratio_bf16", "x smaller than bf16", ".2f"),
    ("smollm2_ratio", "SmolLM2", ".2f"),
    ("x", "x", ".2f"),
    ("decoded_gb_s", "GB/s out", ".1f"),
    ("touched_gb_s", "GB/s touched", ".1f"),
    ("decode_share", "of a device copy", ".0%"),
    ("copy_share", "copies, of a pinned copy", ".0%"),
    ("link_share", "end to end, of a pinned copy", ".0%"),
    ("host_ms", "host, ms", ".3f"),
    ("open_ms", "of it opening", ".3f"),
    ("n_allocations", "allocations", "d"),
    ("share", "of the model's time", ".2%"),
    ("memory_mb", "memory, MB", ".1f"),
    ("wanted", "wanted", ""),
    ("measured", "measured", ""),
    ("holds", "holds", ""),
]
#: The tables that are printed: section, and its columns.
VIEWS = {
    "copies": "what,n_bytes,gb_s,microseconds",
    "compute": "what,label,n_rows,n_tokens,tflops,microseconds",
    "restore": "label,n_tokens,n_prompt,place,way,first_token_s,faster_than_recompute,times_bound,"
    "times_memory,recomputed,ratio_bf16,smollm2_ratio,x",
    "alone": "label,n_tokens,place,way,first_token_s,faster_than_recompute,times_bound,recomputed,"
    "ratio_bf16,x",
    "kernels": "label,n_tokens,codec,ratio_bf16,decoded_gb_s,touched_gb_s,decode_share,copy_share,"
    "link_share",
    "host": "label,n_tokens,way,host_ms,open_ms,n_allocations",
    "estimator": "what,label,n_tokens,share,memory_mb",
    "save": "what,label,n_tokens,codec,share",
    "speed": "what,wanted,measured,holds",
}


@dataclass(frozen=True)
class Task:
    """One history that is brought back.

    Attributes
    ----------
    shape : str
        A key of `SHAPES`.
    n_tokens : int
    prompts : tuple of int
        New tokens; the first is used for what is measured once.
    places : tuple of str
        ``"memory"``, ``"disk"``.
    ways : tuple of str
    has_costs : bool
        Measure kernels, host, estimator and save with it, too.
    """

    shape: str
    n_tokens: int
    prompts: tuple[int, ...] = (128,)
    places: tuple[str, ...] = (MEMORY,)
    ways: tuple[str, ...] = WAYS
    has_costs: bool = False


# In this order: what is wanted of speed first, then the rest while there is time. Tasks of one
# shape stand together, since each shape is a model to be made.
TASKS = (
    Task("8b", 4096, (128, 32, 512), (MEMORY, DISK), has_costs=True),
    Task("8b", 16384, (128,)),
    Task("8b-8", 16384, (128,), (MEMORY, DISK), PREDICTED_WAYS),
    Task("7b", 4096, (128, 32, 512)),
    Task("8b", 2048, (128,)),
    Task("8b", 512, (128,)),
    Task("8b", 32768, (128,)),
    Task("72b-8", 4096, (128,), (MEMORY, DISK)),
    Task("72b-8", 16384, (128,)),
    Task("7b", 16384, (128,)),
    Task("7b", 512, (128,)),
    Task("7b", 32768, (128,)),
)
QUICK_TASKS = (
    Task("tiny", 384, (32, 48), (MEMORY, DISK), (*WAYS, "krul predict"), has_costs=True),
)


# ---- arithmetic, tested by itself ----------------------------------------------------------------


def bound_s(history_s: float, load_s: float, prompt_s: float) -> float:
    """Return the time of the best split of recomputing and of loading, with the prompt after it.

    Both sides end at once, and the prompt's pass comes after the recomputed part; nothing is sooner
    than that pass over a history that is there.

    Parameters
    ----------
    history_s, load_s : float
        Recomputing all of the history; reading all of a way's bytes.
    prompt_s : float
        The new prompt's pass; 0 where there is none.
    """
    if load_s <= 0:
        return prompt_s
    return max(prompt_s, load_s * (history_s + prompt_s) / (history_s + load_s))


def smollm2_ratios(path: Path | None = None) -> dict[str, float]:
    """Return how much smaller each codec made K and V of SmolLM2: means over the committed rows."""
    path = harness.RESULTS / "codecs.json" if path is None else path
    found: dict[str, list[float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        name = row["codec"].removesuffix(", paper's pairs")
        found.setdefault(name, []).append(row["ratio_bf16"])
    return {name: statistics.mean(values) for name, values in found.items()}


def attention_flops(shape: Shape, n_rows: int, n_before: int) -> float:
    """Return the operations of one layer's attention, as far as the mask lets queries see."""
    n_seen = n_rows * n_before + n_rows * (n_rows + 1) / 2
    return 4.0 * n_seen * shape.n_heads * shape.head_dim


def busy_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Return how long at least one of the intervals (begin, end) lasted."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class Budget:
    """The seconds that are left, and what was left out for want of them."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.cut: list[str] = []

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Say whether there is time for something that takes about so long; note it where not."""
        if self.left_s > seconds:
            return True
        self.cut.append(what)
        return False


def _read(path: Path, n_bytes: int, n_threads: int) -> None:
    """Read a file by several threads, each its own part, piece by piece."""
    part = -(-n_bytes // n_threads)

    def read(index: int) -> None:
        piece = bytearray(min(part, 1 << 22))
        with path.open("rb", buffering=0) as file:
            file.seek(index * part)
            n_left = min(part, n_bytes - index * part)
            while n_left > 0 and (n_read := file.readinto(memoryview(piece)[:n_left])):
                n_left -= n_read

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(read, range(n_threads)))


def has_memory(n_bytes: float) -> bool:
    """Say whether files of so many bytes go into shared memory, which a container may forbid."""
    return os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free > n_bytes


# ---- what a device did ---------------------------------------------------------------------------


@contextlib.contextmanager
def watching(device: torch.device) -> Iterator[list[tuple[str, float, float]]]:
    """Collect (name, begin, end), in seconds, of what a CUDA device and its calls do inside.

    Empty on another device, and where the profiler is not allowed to look.
    """
    events: list[tuple[str, float, float]] = []
    if device.type != "cuda":
        yield events
        return
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        yield events
        torch.cuda.synchronize(device)
    found = profiler.profiler.kineto_results
    for event in [] if found is None else found.events():
        if hasattr(event, "duration_ns"):
            begin, duration = event.start_ns() * 1e-9, event.duration_ns() * 1e-9
        else:
            begin, duration = event.start_us() * 1e-6, event.duration_us() * 1e-6
        events.append((event.name(), begin, begin + duration))


def seconds_of(events: list[tuple[str, float, float]], *words: str) -> float:
    """Return how long events were under way whose name has one of the words."""
    return busy_s([(a, b) for name, a, b in events if any(word in name for word in words)])


#: In the names of krul's kernels, and of copies to the device.
KERNEL_WORDS = (
    "int_kernel", "share_kernel", "exact_kernel", "raw_kernel", "narrow_kernel", "krul", "predict",
)  # fmt: skip
COPY_WORDS = ("HtoD", "Host -> Device")
ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc", "cudaHostRegister", "cudaFree", "cuMemAlloc",
               "cuMemHostAlloc")  # fmt: skip


# ---- the benchmark -------------------------------------------------------------------------------


class Bench:
    """The device, its limits, and the rows."""

    def __init__(self, device: torch.device, folder: Path, budget: Budget, is_quick: bool) -> None:
        self.device, self.folder, self.budget, self.is_quick = device, folder, budget, is_quick
        self.clock = harness.Clock(device)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.is_cuda = device.type == "cuda"
        self.dtype = torch.bfloat16
        self.smollm2 = smollm2_ratios()
        self.link_bytes_per_s = self.disk_bytes_per_s = self.copy_bytes_per_s = math.nan
        self.model: Any = None
        self.shape = TINY

    def add(self, section: str, **values: Any) -> dict[str, Any]:
        """Add a row."""
        row = {"section": section, **values}
        self.rows.append(row)
        return row

    def say(self, words: str) -> None:
        """Tell on the terminal what is under way."""
        print(f"{words} ({self.budget.left_s:.0f} s left) ...", file=sys.stderr, flush=True)

    # ---- limits ----

    def limits(self) -> None:
        """Measure what nothing on this machine is faster than."""
        self.say("limits")
        largest = 1 << (20 if self.is_quick else 30)
        host = torch.empty(largest, dtype=torch.uint8, pin_memory=self.is_cuda)
        there = torch.empty(largest, dtype=torch.uint8, device=self.device)
        host.random_(0, 255)
        sizes = [n for n in (1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28) if n < largest]
        for what, target, source in (
            ("host to device", there, host),
            ("device to host", host, there),
        ):
            for n_bytes in [*sizes, largest]:
                rate = self._copy_rate(target, source, n_bytes)
                self.add("copies", what=what, n_bytes=n_bytes, gb_s=rate / 1e9,
                         microseconds=n_bytes / rate * 1e6)  # fmt: skip
                if what == "host to device":
                    self.link_bytes_per_s = rate
        harness.check(torch.equal(there[:4096].cpu(), host[:4096]), "a copy brought other bytes")
        half = largest // 2
        rate = 2 * self._copy_rate(there[half:], there[:half], half)
        self.copy_bytes_per_s = rate
        self.add("copies", what="within the device, read and written", n_bytes=half,
                 gb_s=rate / 1e9, microseconds=2 * half / rate * 1e6)  # fmt: skip
        del host, there
        self._disk(largest)
        self._launches()

    def _copy_rate(self, target: torch.Tensor, source: torch.Tensor, n_bytes: int) -> float:
        """Return bytes per second of copies that follow one another."""
        n_copies = max(1, min(64, (1 << 26) // n_bytes))

        def run() -> None:
            for _ in range(n_copies):
                target[:n_bytes].copy_(source[:n_bytes], non_blocking=True)

        return n_copies * n_bytes / self.clock.measure(run, budget_s=1.0).median_s

    def _disk(self, n_bytes: int) -> None:
        """Measure reads of a file whose pages the system was told to forget, and from its cache."""
        path = self.folder / "read"
        path.write_bytes(os.urandom(1 << 20) * (n_bytes >> 20))
        rates: dict[str, float] = {}
        for what in ("disk", "page cache"):
            for n_threads in (1, 8):
                seconds = []
                for _ in range(3):
                    if what == "disk":
                        drop_pages(self.folder)
                    start = time.perf_counter()
                    _read(path, n_bytes, n_threads)
                    seconds.append(time.perf_counter() - start)
                rate = n_bytes / statistics.median(seconds)
                rates[what] = max(rate, rates.get(what, 0.0))
                self.add(
                    "copies", what=f"{what}, {n_threads} at once", n_bytes=n_bytes, gb_s=rate / 1e9
                )
        path.unlink()
        self.disk_bytes_per_s = rates["disk"]
        if rates["disk"] > 0.8 * rates["page cache"]:
            self.notes.append(
                "The system did not forget the pages of a file when it was told to, or the disk is "
                "as fast as its cache: rows of the store on disk are no slower than the cache."
            )

    def _launches(self) -> None:
        small = torch.zeros(32, device=self.device)
        n_launches = 20 if self.is_quick else 2000

        def run() -> None:
            for _ in range(n_launches):
                small.add_(1)

        asked: list[float] = []
        done: list[float] = []
        for _ in range(3):
            self.clock.synchronize()
            start = time.perf_counter()
            run()
            asked.append(time.perf_counter() - start)
            self.clock.synchronize()
            done.append(time.perf_counter() - start)
        for what, seconds in (("launch, asked", asked), ("launch, done", done)):
            self.add("compute", what=what,
                     microseconds=statistics.median(seconds) / n_launches * 1e6)  # fmt: skip

    def compute_limits(self) -> None:
        """Measure products and attention of the model at hand, by rows."""
        shape = self.shape
        weight = torch.randn(shape.hidden_size, shape.intermediate_size, dtype=self.dtype,
                             device=self.device)  # fmt: skip
        for n_rows in (32, 64) if self.is_quick else (32, 128, 512, 2048, 8192):
            rows = torch.randn(n_rows, shape.hidden_size, dtype=self.dtype, device=self.device)
            seconds = self.clock.measure(lambda rows=rows: rows @ weight, budget_s=0.5).median_s
            self.add("compute", what="product", label=shape.label, n_rows=n_rows,
                     tflops=2 * n_rows * weight.numel() / seconds / 1e12,
                     microseconds=seconds * 1e6)  # fmt: skip
        sizes = ((512, 0), (4096, 0), (128, 4096), (128, 16384))
        for n_rows, n_before in ((64, 0), (32, 64)) if self.is_quick else sizes:
            head = (1, shape.n_heads, n_rows, shape.head_dim)
            queries = torch.randn(head, dtype=self.dtype, device=self.device)
            wide = (1, shape.n_heads, n_rows + n_before, shape.head_dim)
            keys = torch.randn(wide, dtype=self.dtype, device=self.device)
            mask = None
            if n_before:
                mask = torch.ones(n_rows, n_rows + n_before, dtype=torch.bool, device=self.device)
                mask = mask.tril(n_before)
            seconds = self.clock.measure(
                lambda q=queries, k=keys, m=mask: torch.nn.functional.scaled_dot_product_attention(
                    q, k, k, attn_mask=m, is_causal=m is None
                ),
                budget_s=0.5,
            ).median_s
            self.add("compute", what="attention", label=shape.label, n_rows=n_rows,
                     n_tokens=n_before, microseconds=seconds * 1e6,
                     tflops=attention_flops(shape, n_rows, n_before) / seconds / 1e12)  # fmt: skip

    # ---- restores ----

    def use(self, shape: Shape) -> None:
        """Have the model of a shape, and no other."""
        if self.model is not None and self.shape == shape:
            return
        self.model = None
        if self.is_cuda:
            torch.cuda.empty_cache()
        self.shape = shape
        self.model = shapes.random_model(shape, self.device, self.dtype)
        # Ask the model what works with it, once; not part of any wait.
        with krul.attach(self.model):
            probe.probe(self.model)
        self.compute_limits()

    def task(self, task: Task) -> None:
        """Bring one history back in every way, and measure what else the task says."""
        shape = TINY if task.shape == "tiny" else SHAPES[task.shape]
        self.say(f"{shape.label}, {task.n_tokens:,} tokens")
        self.use(shape)
        ids = shapes.random_ids(shape, task.n_tokens + max(task.prompts), self.device)
        for place in task.places:
            with contextlib.ExitStack() as stack:
                # The largest two forms at once: uncompressed, and hidden states.
                wide = shape.bf16_bytes_per_token + 2 * shape.hidden_bytes_per_token
                location = "memory:"
                if place == DISK or not has_memory(1.2 * wide * task.n_tokens):
                    location = stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder))
                if place == MEMORY and location != "memory:":
                    self.notes.append(
                        f"{shape.label}, {task.n_tokens:,} tokens: shared memory is too small; the "
                        "store in memory is a directory in the page cache."
                    )
                store = stack.enter_context(krul.Store(location))
                history = History(
                    shape, self.model, ids, task.n_tokens, store,
                    lambda layers: shapes.random_profile(self.model, layers, PREDICT_RATIO),
                )  # fmt: skip
                self.one_place(task, history, place)
                if task.has_costs and place == MEMORY:
                    for measure in (self.kernels, self.host, self.estimator, self.save):
                        if self.budget.allows(f"{measure.__name__}, {shape.label}", 10):
                            self._guarded(f"{measure.__name__}, {shape.label}", measure, task,
                                          history)  # fmt: skip

    def _guarded(self, what: str, run: Callable[..., Any], *args: Any) -> None:
        """Run a part; what fails is noted, and the others go on."""
        try:
            run(*args)
        except (harness.CheckError, krul.KrulError, OSError, RuntimeError, MemoryError) as error:
            self.notes.append(f"FAILED: {what}: {type(error).__name__}: {error}")
            print(self.notes[-1], file=sys.stderr, flush=True)
            if self.is_cuda and isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()

    def one_place(self, task: Task, history: History, place: str) -> None:
        """Time every way from one store."""
        expected = history.recompute(task.prompts[0])
        recompute_s: dict[int, float] = {}
        memory_s: dict[int, float] = {}
        with history.run(krul.Cache(model=self.model)) as cache:
            for n_prompt in task.prompts:
                recompute_s[n_prompt] = self._median(lambda n=n_prompt: history.recompute(n), 3)
                memory_s[n_prompt] = self._median_prompt(history, cache, n_prompt)
        base = {"shape": task.shape, "label": history.shape.label, "n_tokens": task.n_tokens,
                "place": place}  # fmt: skip
        link = self.link_bytes_per_s if place == MEMORY else self.disk_bytes_per_s
        n_first = task.prompts[0]
        history_s = max(recompute_s[n_first] - memory_s[n_first], 1e-9)
        base["x"] = history_s / (history.shape.bf16_bytes_per_token * task.n_tokens / link)
        for n_prompt in task.prompts:
            for way, seconds in (
                ("recompute", recompute_s[n_prompt]),
                ("never left memory", memory_s[n_prompt]),
            ):
                self.add("restore", **base, n_prompt=n_prompt, way=way, first_token_s=seconds,
                         faster_than_recompute=recompute_s[n_prompt] / seconds,
                         times_memory=seconds / memory_s[n_prompt])  # fmt: skip
        for index, name in enumerate(task.ways):
            what = f"{name}, {history.shape.label}, {task.n_tokens:,} tokens, {place}"
            if self.budget.allows(what, 8 if not self.is_quick else 0):
                self._guarded(
                    what,
                    self.one_way,
                    task,
                    history,
                    place,
                    name,
                    expected,
                    base,
                    recompute_s,
                    memory_s,
                    history_s,
                    link,
                )
            history.forget(task.ways[index + 1 :])
        history.references = {}

    def one_way(
        self,
        task: Task,
        history: History,
        place: str,
        name: str,
        expected: torch.Tensor,
        base: dict[str, Any],
        recompute_s: dict[int, float],
        memory_s: dict[int, float],
        history_s: float,
        link: float,
    ) -> None:
        """Check a way, then time it: with each prompt, and for krul's alone."""
        way = history.way(name)
        found = history.check(way, task.prompts[0], expected)
        n_bf16 = history.shape.bf16_bytes_per_token * task.n_tokens
        load_s = way.n_bytes / link
        common = base | found | {
            "way": name,
            "n_bytes": way.n_bytes,
            "ratio_bf16": n_bf16 / way.n_bytes,
            "smollm2_ratio": self.smollm2.get(name.removeprefix("krul ")),
        }  # fmt: skip
        for n_prompt in task.prompts:
            seconds, report = self._timed(history, way, place, n_prompt)
            bound = bound_s(history_s, load_s, memory_s[n_prompt])
            self.add("restore", **common, n_prompt=n_prompt, **seconds,
                     faster_than_recompute=recompute_s[n_prompt] / seconds["first_token_s"],
                     times_memory=seconds["first_token_s"] / memory_s[n_prompt],
                     bound_s=bound, times_bound=seconds["first_token_s"] / bound,
                     recomputed=_recomputed(report, task.n_tokens),
                     plan=report.plan, reason=report.reason)  # fmt: skip
        if name.startswith("krul"):
            seconds, report = self._timed(history, way, place, 0)
            bound = bound_s(history_s, load_s, 0.0)
            self.add("alone", **common, **seconds,
                     faster_than_recompute=history_s / seconds["first_token_s"], bound_s=bound,
                     times_bound=seconds["first_token_s"] / bound,
                     recomputed=_recomputed(report, task.n_tokens), plan=report.plan)  # fmt: skip

    def _timed(
        self, history: History, way: Way, place: str, n_prompt: int
    ) -> tuple[dict[str, Any], Any]:
        """Return how long a way takes to the first token, or to all layers without a prompt."""
        seconds: list[float] = []
        report: Any = None

        def run() -> None:
            nonlocal report
            with way.open() as cache:
                if n_prompt:
                    history.first_token(cache, n_prompt)
                else:
                    cache.restore()
                # Before the cache is closed, which is not part of the wait.
                self.clock.synchronize()
                seconds.append(time.perf_counter() - start)
                report = cache.restore_report

        n_runs = 2 if self.is_quick else 5
        begin = time.perf_counter()
        for index in range(n_runs + 1):
            if place == DISK:
                drop_pages(history.store.path)
            self.clock.synchronize()
            start = time.perf_counter()
            run()
            if index and time.perf_counter() - begin > 6.0:
                break
        timing = harness.summarise(seconds[1:])
        return {"first_token_s": timing.median_s, "minimum_s": timing.minimum_s,
                "iqr_s": timing.iqr_s, "n_runs": timing.n_runs}, report  # fmt: skip

    def _median(self, run: Callable[[], Any], n_runs: int) -> float:
        self.clock.wall(run)
        return statistics.median(self.clock.wall(run) for _ in range(n_runs))

    def _median_prompt(self, history: History, cache: krul.Cache, n_prompt: int) -> float:
        seconds = []
        for _ in range(4):
            seconds.append(self.clock.wall(lambda: history.first_token(cache, n_prompt)))
            cache.crop(-n_prompt)
        return statistics.median(seconds[1:])

    # ---- what it costs ----

    def kernels(self, task: Task, history: History) -> None:
        """Measure decoding and copies of one restore that loads everything, codec by codec."""
        n_bf16 = history.shape.bf16_bytes_per_token * task.n_tokens
        for codec in DECODED_CODECS:
            name = f"krul {codec}"
            way = history.way(name)
            open_it = history._opened(name, "load", is_serial=True)
            for _ in range(2):
                open_it().close()
            seconds = []
            for _ in range(3):
                self.clock.synchronize()
                start = time.perf_counter()
                cache = open_it()
                seconds.append(time.perf_counter() - start)
                cache.close()
            with watching(self.device) as events, open_it() as cache:
                report = cache.restore_report
                counts = cache.restore_report.seconds_by_stage
            rate = {"end_to_end_s": statistics.median(seconds)}
            decode_s = seconds_of(events, *KERNEL_WORDS)
            copy_s = seconds_of(events, *COPY_WORDS)
            if not self.is_cuda:
                decode_s = counts["decode"]
            if self.is_cuda and not events:
                self.notes.append("The profiler gave no events: kernels were not timed.")
            row: dict[str, Any] = {"decoded_gb_s": None, "touched_gb_s": None,
                                   "decode_share": None, "copy_share": None}  # fmt: skip
            if decode_s > 0:
                touched = (n_bf16 + report.loaded_bytes) / decode_s
                row["decoded_gb_s"] = n_bf16 / decode_s / 1e9
                row["touched_gb_s"] = touched / 1e9
                row["decode_share"] = touched / self.copy_bytes_per_s
            if copy_s > 0:
                row["copy_share"] = report.loaded_bytes / copy_s / self.link_bytes_per_s
            end_to_end = report.loaded_bytes / rate["end_to_end_s"]
            self.add("kernels", shape=task.shape, label=history.shape.label,
                     n_tokens=task.n_tokens, codec=codec, n_bytes=way.n_bytes,
                     ratio_bf16=n_bf16 / way.n_bytes, kernels_s=decode_s, copies_s=copy_s,
                     link_share=end_to_end / self.link_bytes_per_s,
                     # The others decode what is small or take their time: they are shown only.
                     is_counted=codec == "int8", **rate, **row)  # fmt: skip

    def host(self, task: Task, history: History) -> None:
        """Measure how long this thread is busy on the way to the first token, beyond the model."""
        n_prompt = task.prompts[0]
        with history.run(krul.Cache(model=self.model)) as cache:
            asked = []
            for _ in range(6):
                self.clock.synchronize()
                start = time.perf_counter()
                history.first_token(cache, n_prompt)
                asked.append(time.perf_counter() - start)
                self.clock.synchronize()
                cache.crop(-n_prompt)
        plain_s = statistics.median(asked[1:])
        for name in ("krul int8", "krul share+int8"):
            way = history.way(name)
            opened, whole = [], []
            for _ in range(6):
                self.clock.synchronize()
                start = time.perf_counter()
                with way.open() as cache:
                    opened.append(time.perf_counter() - start)
                    history.first_token(cache, n_prompt)
                    whole.append(time.perf_counter() - start)
                    self.clock.synchronize()
            with way.open() as cache:
                before = self._device_allocations()
                with watching(self.device) as events:
                    history.first_token(cache, n_prompt)
                n_allocations = self._device_allocations() - before
            n_seen = sum(name.startswith(ALLOCATIONS) for name, _, _ in events)
            self.add("host", shape=task.shape, label=history.shape.label, n_tokens=task.n_tokens,
                     way=name, host_ms=(statistics.median(whole[1:]) - plain_s) * 1e3,
                     open_ms=statistics.median(opened[1:]) * 1e3, plain_ms=plain_s * 1e3,
                     n_allocations=max(n_allocations, n_seen))  # fmt: skip

    def _device_allocations(self) -> int:
        if not self.is_cuda:
            return 0
        return int(torch.cuda.memory_stats(self.device).get("num_device_alloc", 0))

    def estimator(self, task: Task, history: History) -> None:
        """Measure a prefill and decoding steps, watched and not, in turns."""
        n_steps = 4 if self.is_quick else 48
        prefill: dict[int, list[float]] = {0: [], 64: []}
        steps: dict[int, list[float]] = {0: [], 64: []}
        memory: dict[int, int] = {}
        for index in range(4):
            for rows in (0, 64):
                settings = krul.Settings(guard_tokens=0, codec="int8", estimator_rows=rows)
                with history.store.open(f"watched{index}", self.model, settings=settings) as cache:
                    if self.is_cuda:
                        torch.cuda.reset_peak_memory_stats(self.device)
                    prefill[rows].append(self.clock.wall(lambda c=cache: history.run(c)))
                    if self.is_cuda:
                        memory[rows] = torch.cuda.max_memory_allocated(self.device)
                    seconds = self._steps(history, cache, n_steps)
                    steps[rows].append(sum(seconds) / len(seconds))
        for what, seconds in (("prefill", prefill), ("decode", steps)):
            pairs = list(zip(seconds[0][1:], seconds[64][1:], strict=True))
            self.add("estimator", what=what, shape=task.shape, label=history.shape.label,
                     n_tokens=task.n_tokens, plain_s=statistics.median(a for a, _ in pairs),
                     share=statistics.median(b / a - 1 for a, b in pairs),
                     memory_mb=(memory[64] - memory[0]) / 1e6
                     if memory and what == "prefill" else None)  # fmt: skip

    @torch.no_grad()
    def _steps(
        self, history: History, cache: Any, n_steps: int, while_running: Any = None
    ) -> list[float]:
        """Return the seconds of decoding steps, at most so many, while a future is not done."""
        seconds: list[float] = []
        token = history.ids[:, :1]
        while len(seconds) < n_steps and (while_running is None or not while_running.done()):
            seconds.append(
                self.clock.wall(lambda: self.model(token, past_key_values=cache, use_cache=True))
            )
        return seconds

    def save(self, task: Task, history: History) -> None:
        """Measure decoding steps beside a save, and without one."""
        n_steps = 8 if self.is_quick else 64
        for codec in ("int8", "share+int8"):
            ratios: list[float] = []
            for index in range(3):
                settings = krul.Settings(guard_tokens=0, codec=codec, estimator_rows=0)
                name = f"saved {codec} {index}"
                with history.store.open(name, self.model, settings=settings) as cache:
                    history.run(cache)
                    plain = self._steps(history, cache, n_steps)
                    future = cache.save(wait=False)
                    beside = self._steps(history, cache, 100 * n_steps, future)
                    future.result()
                    plain += self._steps(history, cache, n_steps)
                history.store.delete(name)
                if beside:
                    ratios.append(statistics.mean(beside) / statistics.mean(plain) - 1)
            self.add("save", what="decoding beside a save", shape=task.shape, codec=codec,
                     label=history.shape.label, n_tokens=task.n_tokens,
                     share=statistics.median(ratios) if ratios else None)  # fmt: skip

    # ---- all of it ----

    def run(self, tasks: Sequence[Task], after_each: Callable[[], None]) -> None:
        """Measure limits, then one task after the other while there is time."""
        self._guarded("limits", self.limits)
        after_each()
        for task in tasks:
            shape = TINY if task.shape == "tiny" else SHAPES[task.shape]
            what = f"{shape.label}, {task.n_tokens:,} tokens"
            # Made once in each form, and read several times.
            n_bytes = shape.bf16_bytes_per_token * task.n_tokens * len(task.ways)
            seconds = 0.0 if self.is_quick else 10 + n_bytes / 2e9
            if self.budget.allows(what, seconds):
                self._guarded(what, self.task, task)
                after_each()


def _recomputed(report: Any, n_tokens: int) -> float:
    n_by_layer = report.n_recomputed_by_layer
    return sum(n_by_layer) / max(1, len(n_by_layer) * n_tokens)


def notes_of(bench: Bench) -> list[str]:
    """Return what the figures are, and what they do not show."""
    return [
        "Random weights, so what the models say is noise; time depends on shapes. 7b is the shape "
        "of LLaMA-7B and of Qwen1.5-7B; 8b of Llama-3.1-8B; 8b-8 its first 8 of 32 layers; 72b-8 "
        "the first 8 of 80 layers of Qwen2.5-72B: its times are of those. Vocabulary 32,000 for "
        "all; K, V and weights in bfloat16.",
        "Bytes: int8, int4 and share take the same for any numbers (nominal rates); exact blocks "
        "beside shared ones are coded as such noise allows; predict has a profile made so that it "
        f"is about {PREDICT_RATIO:g} times smaller. The column SmolLM2 has what that model gives "
        "(benchmarks/results/codecs.json).",
        "x: seconds to recompute the history by seconds to bring its K and V as 16-bit numbers "
        "over the link (store in memory) or from the disk. The bound is the best "
        "split of recomputing and of bringing a way's own bytes at that rate, the prompt's pass "
        "after it.",
        "All ways use krul's store, threads and copies; what others load is stored as it is. Each "
        "time begins before the conversation is opened and ends when the device is done. Times to "
        "first token are medians; a way's K, V and logits were checked first.",
        "Store in memory: files in shared memory, which threads copy into pinned chunks. Decode "
        "rates are of kernel time summed over the chunks of one restore, bytes read and written.",
        *bench.notes,
        *([f"Cut for want of time: {'; '.join(bench.budget.cut)}."] if bench.budget.cut else []),
    ]


def report(bench: Bench, path: Path | None, *, is_quiet: bool = False) -> None:
    """Write all rows so far, with the judgement of each line; print them, too, at the end."""
    # A line is about a GPU; what another device takes says nothing of it.
    rows = [*bench.rows, *speed.judge(bench.rows if bench.is_cuda else ())]
    views = [{"section": section, "columns": columns} for section, columns in VIEWS.items()]
    about = {"gpu": harness.gpu(), "device": str(bench.device)}
    with contextlib.ExitStack() as stack:
        if is_quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        harness.finish(
            "gpu", rows, COLUMNS, notes=notes_of(bench), is_quick=bench.is_quick, path=path,
            about=about, views=views,
        )  # fmt: skip


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop beginning things then")
    parser.add_argument("--limits-only", action="store_true", help="measure the machine alone")
    parser.add_argument("--folder", type=Path, help="where the store on disk is")
    options = parser.parse_args(words)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device is {options.device} but torch finds no CUDA device here")
    if options.device == "cpu" and not (options.quick or options.limits_only):
        parser.error("--device is cpu but models of 7B are not run there: add --quick")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where a part failed."""
    options = arguments(words)
    budget = Budget(options.seconds)
    device = torch.device(options.device)
    if device.type == "cuda":
        # A layer's device has a number, as tensors have it.
        device = torch.empty(0, device=device).device
        torch.cuda.set_device(device)
    tasks = QUICK_TASKS if options.quick else TASKS
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(device, Path(folder), budget, options.quick)

        def keep() -> None:
            if options.json:
                report(bench, options.json, is_quiet=True)

        bench.run(() if options.limits_only else tasks, keep)
    report(bench, options.json)
    return 1 if any(note.startswith("FAILED") for note in bench.notes) else 0


if __name__ == "__main__":
    sys.exit(main())
