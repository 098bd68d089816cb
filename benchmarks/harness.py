"""What every benchmark shares: timing, the machine's description, results as JSON, tables.

A benchmark builds its rows, each a flat dict of plain values, checks each result before it times
it, and ends with::

    harness.finish("resume", rows, columns, notes=[...], path=options.json)

``python -m benchmarks.harness`` writes every marked table in README.md and benchmarks/README.md
again from the JSON files in ``benchmarks/results``; ``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


class CheckError(AssertionError):
    """A result was wrong, so nothing was timed."""


def check(condition: bool, message: str) -> None:
    """Stop the benchmark unless the result that is about to be timed is right."""
    if not condition:
        raise CheckError(message)


@dataclass(frozen=True)
class Timing:
    """Wall time of repeated runs: median, minimum and interquartile range, in seconds."""

    median_s: float
    minimum_s: float
    iqr_s: float
    n_runs: int


def measure(
    run: Callable[..., Any],
    *,
    prepare: Callable[[], Any] | None = None,
    n_runs: int = 7,
    n_warmups: int = 1,
    budget_s: float = 60.0,
) -> Timing:
    """Time `run` after warming up.

    `prepare` is called before each run, outside the clock; what it returns is `run`'s argument.
    Runs end early, but not before the first, once `budget_s` is used up.
    """
    seconds: list[float] = []
    begin = time.perf_counter()
    for index in range(n_warmups + n_runs):
        arguments = (prepare(),) if prepare is not None else ()
        start = time.perf_counter()
        run(*arguments)
        stop = time.perf_counter()
        if index >= n_warmups:
            seconds.append(stop - start)
            if stop - begin > budget_s:
                break
    return summarise(seconds)


def summarise(seconds: Sequence[float]) -> Timing:
    """Turn single measurements into a `Timing`."""
    ordered = sorted(seconds)
    if len(ordered) > 1:
        lower, _, upper = statistics.quantiles(ordered, n=4, method="inclusive")
    else:
        lower = upper = ordered[0]
    return Timing(statistics.median(ordered), ordered[0], upper - lower, len(ordered))


class Clock:
    """Times what one device does; what `run` asks for is over before the clock stops.

    Parameters
    ----------
    device : torch.device
        On CUDA the events of the current stream are the clock, and the second-level cache holds
        nothing of the last run: memory of twice its size is written between the runs, which also
        hides the time that a launch takes. Elsewhere it is `measure`.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self.device = device
        self._flush = None
        if device.type == "cuda":
            about = torch.cuda.get_device_properties(device)
            n_bytes = 2 * getattr(about, "L2_cache_size", 64 << 20)
            self._flush = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was told."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(
        self,
        run: Callable[[], Any],
        *,
        n_runs: int = 7,
        n_warmups: int = 2,
        budget_s: float = 5.0,
    ) -> Timing:
        """Time what `run` asks of the device; see `measure` of this module."""
        import torch

        if self._flush is None:
            return measure(run, n_runs=n_runs, n_warmups=n_warmups, budget_s=budget_s)
        seconds: list[float] = []
        begin = time.perf_counter()
        for index in range(n_warmups + n_runs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            first.record()
            run()
            last.record()
            last.synchronize()
            if index >= n_warmups:
                seconds.append(first.elapsed_time(last) * 1e-3)
                if time.perf_counter() - begin > budget_s:
                    break
        return summarise(seconds)

    def wall(self, run: Callable[[], Any]) -> float:
        """Return the seconds from asking until the device is done, as who waits sees them."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start


def _first_line(*command: str) -> str:
    """Return the first line that a command prints, or "" where it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def _version(module: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        words = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", words, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def machine() -> dict[str, Any]:
    """Describe where and from what the numbers come."""
    import krul
    import krul._core

    return {
        "processor": _processor(),
        "n_processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "compiler": _first_line(os.environ.get("CC", "cc"), "--version"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "krul": krul.__version__,
        "backends": krul.backends(),
        "commit": _first_line("git", "rev-parse", "--short", "HEAD"),
        "has_local_changes": bool(_first_line("git", "status", "--porcelain")),
        "clock": time.get_clock_info("perf_counter").implementation,
    }


def gpu() -> dict[str, Any] | None:
    """Describe the GPU that torch uses, or return None."""
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--id=0", "--format=csv,noheader")
    return {
        "name": about.name,
        "memory_bytes": about.total_memory,
        "n_multiprocessors": about.multi_processor_count,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "architecture": f"{about.major}{about.minor}",
        "driver": _first_line(*query, "--query-gpu=driver_version"),
        "link": _first_line(*query, "--query-gpu=pcie.link.gen.current,pcie.link.width.current"),
        "torch_cuda": torch.version.cuda,
    }


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    result.add_argument("--quick", action="store_true", help="few sizes, few runs; for a look")
    return result


def _arguments() -> list[str]:
    """Return what the command was given, quoted, but for where the results went."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in ("--json", "--png"):
            words.append(shlex.quote(word))
        skip = word in ("--json", "--png")
    return words


def finish(
    name: str,
    rows: list[dict[str, Any]],
    columns: list[tuple[str, str, str]],
    *,
    notes: Iterable[str] = (),
    is_quick: bool = False,
    path: Path | None = None,
    details: list[dict[str, Any]] | None = None,
    about: dict[str, Any] | None = None,
    views: Iterable[dict[str, str]] | None = None,
    command: str | None = None,
) -> Path | None:
    """Print the table, and write the results.

    Parameters
    ----------
    name : str
        The concept, as in ``bench_<name>.py``.
    rows : list of dict
        Plain values; a missing or None value is shown as a dash.
    columns : list of (key, title, format)
        What the table shows, e.g. ``("decode_gb_s", "decode GB/s", ".1f")``.
    notes : iterable of str
        What the numbers do not show, and what was left out with the reason.
    is_quick : bool
        A quick look is only written where `path` says so.
    path : Path or None
        The JSON file; None is ``benchmarks/results/<name>.json``.
    details : list of dict or None
        Rows behind the table's, for the JSON file alone.
    about : dict or None
        What more the machine is described by.
    views : iterable of dict or None
        Print these parts of the table, each a `where` of `table`; None prints all of it.
    command : str or None
        What made the rows, where that is more than the command that runs.
    """
    if command is None:
        command = " ".join([f"python -m benchmarks.bench_{name}", *_arguments()])
    result = {
        "benchmark": name,
        "command": command,
        "is_quick": is_quick,
        "machine": machine() | (about or {}),
        "notes": list(notes),
        "columns": [list(column) for column in columns],
        "rows": rows,
    }
    if details is not None:
        result["details"] = details
    for where in [None] if views is None else views:
        print(table(result, where), end="\n\n")
    for note in result["notes"]:
        print(f"- {note}")
    if path is None:
        if is_quick:
            return None
        path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str) or not form:
        return str(value)
    return format(value, form)


def table(result: dict[str, Any], where: dict[str, str] | None = None) -> str:
    """Return the rows of a result as a Markdown table.

    `where` keeps the rows that match it; its word ``columns`` names those to show.
    """
    wanted = dict(where or {})
    shown = wanted.pop("columns", "").split(",")
    columns = [c for c in result["columns"] if shown == [""] or c[0] in shown]
    lines = [
        "| " + " | ".join(title for _, title, _ in columns) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in result["rows"]:
        if all(str(row.get(key)) == value for key, value in wanted.items()):
            cells = (_cell(row.get(key), form) for key, _, form in columns)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(result: dict[str, Any]) -> str:
    """Return one sentence with the machine and the command, for below a table."""
    about = result["machine"]
    threads = about["n_processors"]
    gpu_words = ""
    if about.get("gpu"):
        gpu_words = f"{about['gpu']['name']}, driver {about['gpu']['driver']}; "
    return (
        f"{gpu_words}{about['processor']}, {threads} {'core' if threads == 1 else 'cores'}; "
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}; "
        f"`{result['command']}`."
    )


_BLOCK = re.compile(
    r"(?P<begin><!-- table: (?P<name>\w+)(?P<where>( \w+=[^\s>]+)*) -->\n)"
    r".*?"
    r"(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def render(document: str) -> str:
    """Return a document with every marked table written again from the committed results.

    A mark is a comment such as ``<!-- table: resume n_tokens=4096 columns=way,bytes -->``, closed
    by ``<!-- end of table -->``.
    """

    def block(match: re.Match[str]) -> str:
        path = RESULTS / f"{match['name']}.json"
        result = json.loads(path.read_text())
        where = dict(item.split("=", 1) for item in match["where"].split())
        notes = "".join(f"\n- {note}" for note in result["notes"]) if not where else ""
        text = f"\n{table(result, where)}\n\n{describe(result)}\n{notes}"
        return f"{match['begin']}{text.rstrip()}\n\n{match['end']}"

    return _BLOCK.sub(block, document)


def main() -> int:
    """Rewrite the tables; with ``--check`` only say which documents are out of date."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--check", action="store_true")
    only_check = options.parse_args().check
    stale = []
    for path in DOCUMENTS:
        before = path.read_text()
        after = render(before)
        if before != after:
            stale.append(path)
            if not only_check:
                path.write_text(after)
            print(f"{path.relative_to(ROOT)}: {'out of date' if only_check else 'written'}")
    return 1 if stale and only_check else 0


if __name__ == "__main__":
    sys.exit(main())
