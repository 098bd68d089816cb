"""The demo: a conversation is saved, its process ends, and another process goes on with it.

The process that the user starts only counts steps and prints; each act of the play is a process of
its own, so that nothing can survive in memory:

``first``
    SmolLM2 reads a page of Python's manual, answers a question, and the conversation is saved.
``second``
    A new process opens the store and answers the next question. The same is done from a plain
    safetensors file and by reading everything again, and the three waits are measured. The reply is
    saved on top of what was there, then a third question is asked and saved the same way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["DemoResult", "act", "run", "to_text", "write_png"]

CONVERSATION = "demo"
TOPIC = "debugger"
N_CHARACTERS = 14_000
QUESTIONS = (
    "What is this text about?",
    "What does the command next do?",
    "What is a breakpoint?",
)
N_NEW_TOKENS = 40
N_RUNS = 3
STEPS = {"first": 4, "second": 7}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and what was said; times in seconds, of the second question.

    Attributes
    ----------
    n_history_tokens : int
        Tokens that had been read and said before the second question.
    recompute_s, plain_load_s, krul_s : float
        Time to first token: reading the history again; loading bfloat16 safetensors; from krul's
        store. Model and tokeniser are in memory in all three, the files in the page cache.
    attach_s : float
        What krul does once per process and model: it asks the model what it can do.
    bf16_bytes, plain_bytes, stored_bytes : int
        The history's KV as bfloat16, the safetensors file, krul's directory.
    guard_mean_kl, guard_top1 : float
        What the guard measured before the first save was committed.
    codecs : list of str
        The codecs in use.
    n_turns_saved, n_tokens_saved, n_segments : int
        The conversation at the end.
    answers : list of str
        To the three questions.
    answers_agree : bool
        Did reading everything again lead to the same second answer, word for word?
    """

    n_history_tokens: int
    recompute_s: float
    plain_load_s: float
    krul_s: float
    attach_s: float
    bf16_bytes: int
    plain_bytes: int
    stored_bytes: int
    guard_mean_kl: float
    guard_top1: float
    codecs: list[str]
    n_turns_saved: int
    n_tokens_saved: int
    n_segments: int
    questions: list[str]
    answers: list[str]
    answers_agree: bool


def document() -> str:
    """Return what is read: the first half of Python's manual on its debugger, as in ``help()``."""
    from pydoc_data.topics import topics

    return topics[TOPIC][:N_CHARACTERS].rpartition("\n\n")[0]


# ---- the acts, each in its own process -----------------------------------------------------------


class _FirstToken:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.at_s = float("nan")

    def put(self, value: Any) -> None:
        """Be told first the prompt, then each token."""
        self.n_calls += 1
        if self.n_calls == 2:
            self.at_s = time.perf_counter()

    def end(self) -> None:
        """Be told that nothing more comes."""


class _Chat:
    """The model, and what both acts do with it."""

    def __init__(self) -> None:
        import torch
        from transformers.utils import logging

        from .demo_model import load

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.torch = torch
        self.tokenizer, self.model = load(torch.bfloat16)
        self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id or 0

    def ids(self, messages: list[dict[str, str]]) -> Any:
        """Return the whole conversation's token ids, int64 of shape (1, n_tokens)."""
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids

    def generate(self, ids: Any, cache: Any, n_tokens: int = N_NEW_TOKENS) -> tuple[str, float]:
        """Return the reply, and when its first token came (on the clock of `perf_counter`)."""
        first = _FirstToken()
        out = self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=n_tokens,
            do_sample=False,
            streamer=first,
        )
        reply = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return reply.strip(), first.at_s

    def warm_up(self) -> None:
        """Let torch do once what it does only once."""
        self.generate(self.ids([{"role": "user", "content": "Hello"}]), self.empty_cache(), 2)

    def empty_cache(self) -> Any:
        """Return a cache of transformers' own."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


def _first_act(work: Path, step: Callable[[str], None]) -> dict[str, Any]:
    from safetensors.torch import save_file

    from . import Store

    step("loading the model")
    chat = _Chat()
    chat.warm_up()
    messages = [{"role": "user", "content": f"{document()}\n\n{QUESTIONS[0]}"}]
    ids = chat.ids(messages)
    store = Store(work / "store")
    with store.open(CONVERSATION, chat.model) as cache:
        step(f"reading {ids.shape[1]:,} tokens, answering")
        reply, _ = chat.generate(ids, cache)
        step("saving with krul")
        report = cache.save()
        step("saving plainly, for comparison")
        tensors = {}
        for index, layer in enumerate(cache.layers):
            tensors[f"{index}.keys"] = layer.keys.contiguous()
            tensors[f"{index}.values"] = layer.values.contiguous()
        save_file(tensors, work / "plain.safetensors")
        n_tokens = cache.get_seq_length()
    messages.append({"role": "assistant", "content": reply})
    return {
        "messages": messages,
        "n_history_tokens": n_tokens,
        "save_report": report.to_dict(),
        "plain_bytes": (work / "plain.safetensors").stat().st_size,
    }


def _second_act(work: Path, step: Callable[[str], None], first: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    import krul

    step("a new process: loading the model")
    chat = _Chat()
    chat.warm_up()
    start = time.perf_counter()
    handle = krul.attach(chat.model)
    attach_s = time.perf_counter() - start

    messages = [*first["messages"], {"role": "user", "content": QUESTIONS[1]}]
    ids = chat.ids(messages)
    store = krul.Store(work / "store")

    def from_krul() -> Any:
        return store.open(CONVERSATION, chat.model)

    def from_plain_file() -> Any:
        tensors = load_file(work / "plain.safetensors")
        cache = chat.empty_cache()
        for index in range(len(tensors) // 2):
            cache.update(tensors[f"{index}.keys"], tensors[f"{index}.values"], index)
        return cache

    def wait_s(make_cache: Callable[[], Any]) -> float:
        start = time.perf_counter()
        cache = make_cache()
        _, at_s = chat.generate(ids, cache, 1)
        if hasattr(cache, "close"):
            cache.close()
        return at_s - start

    step("waiting for the first token: krul")
    krul_s = sorted(wait_s(from_krul) for _ in range(N_RUNS))[N_RUNS // 2]
    step("waiting for the first token: a plain load")
    plain_load_s = sorted(wait_s(from_plain_file) for _ in range(N_RUNS))[N_RUNS // 2]
    step("waiting for the first token: reading it all again")
    start = time.perf_counter()
    expected, at_s = chat.generate(ids, chat.empty_cache())
    recompute_s = at_s - start

    step("the second question, answered from the store and saved on top")
    with from_krul() as cache:
        second, _ = chat.generate(ids, cache)
        cache.save()
        step("the third question")
        messages += [
            {"role": "assistant", "content": second},
            {"role": "user", "content": QUESTIONS[2]},
        ]
        third, _ = chat.generate(chat.ids(messages), cache)
        step("saving on top of it")
        cache.save()
    handle.detach()
    info = store.info(CONVERSATION)
    return {
        "recompute_s": recompute_s,
        "plain_load_s": plain_load_s,
        "krul_s": krul_s,
        "attach_s": attach_s,
        "answers": [second, third],
        "answers_agree": second == expected,
        "n_tokens_saved": info.n_tokens,
        "n_segments": info.n_segments,
    }


def act(name: str, work: str | os.PathLike[str]) -> None:
    """Play one act in this process, telling each step and at last the result as lines of JSON."""
    folder = Path(work)

    def tell(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    def step(words: str) -> None:
        tell(step=words)

    if name == "first":
        result = _first_act(folder, step)
    elif name == "second":
        result = _second_act(folder, step, json.loads((folder / "first.json").read_text()))
    else:
        raise ValueError(f"act is {name!r} but must be one of {', '.join(STEPS)}")
    (folder / f"{name}.json").write_text(json.dumps(result))
    tell(done=name)


# ---- the process that the user started -----------------------------------------------------------


def _steps_of(name: str, work: Path) -> Iterator[str]:
    """Run an act in a new process and yield its steps as they begin."""
    # Not "python -m krul demo": the parent may have been started from anywhere.
    command = [sys.executable, "-m", "krul", "demo", "--act", name, "--work", str(work)]
    package_parent = str(Path(__file__).resolve().parent.parent)
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    log = work / f"{name}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            words = json.loads(line).get("step")
            if words is not None:
                yield words
    if process.returncode != 0:
        raise RuntimeError(
            f"the demo's {name} act ended with {process.returncode}:\n{log.read_text()}"
        )


def run(work: str | os.PathLike[str] | None = None) -> DemoResult:
    """Play both acts and return what they measured.

    Parameters
    ----------
    work : path or None
        A folder for the store and the plain file; None takes a temporary one.

    Returns
    -------
    DemoResult
        Times, sizes, the guard's figures and the answers.

    Raises
    ------
    RuntimeError
        An act failed; the message holds what its process wrote.

    Notes
    -----
    One to two minutes on two cores, 1 GB of memory, 150 MB of disk while it runs.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="krul-demo-") as folder:
            return run(folder)
    from tqdm import tqdm

    folder_path = Path(work)
    folder_path.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=sum(STEPS.values()),
        disable=None,  # nothing where standard error is no terminal
        bar_format="{desc:<58} {bar} {n_fmt}/{total_fmt} {elapsed}",
    ) as bar:
        for name in STEPS:
            for words in _steps_of(name, folder_path):
                bar.set_description_str(words)
                bar.update()
    first = json.loads((folder_path / "first.json").read_text())
    second = json.loads((folder_path / "second.json").read_text())
    saved = first["save_report"]
    return DemoResult(
        n_history_tokens=first["n_history_tokens"],
        recompute_s=second["recompute_s"],
        plain_load_s=second["plain_load_s"],
        krul_s=second["krul_s"],
        attach_s=second["attach_s"],
        bf16_bytes=saved["bf16_bytes"],
        plain_bytes=first["plain_bytes"],
        stored_bytes=saved["stored_bytes"],
        guard_mean_kl=saved["guard_mean_kl"],
        guard_top1=saved["guard_top1"],
        codecs=sorted(set(saved["codec_by_layer"])),
        n_turns_saved=len(QUESTIONS),
        n_tokens_saved=second["n_tokens_saved"],
        n_segments=second["n_segments"],
        questions=list(QUESTIONS),
        answers=[first["messages"][1]["content"], *second["answers"]],
        answers_agree=second["answers_agree"],
    )


def to_text(result: DemoResult) -> str:
    """Return the table and the answers."""
    rows = [
        ("", "recompute", "plain load", "krul"),
        (
            "time to first token",
            *(f"{s:.3f} s" for s in (result.recompute_s, result.plain_load_s, result.krul_s)),
        ),
        (
            "faster than recompute",
            "1x",
            *(f"{result.recompute_s / s:.0f}x" for s in (result.plain_load_s, result.krul_s)),
        ),
        (
            "bytes kept",
            "0",
            f"{result.plain_bytes:,}",
            f"{result.stored_bytes:,}",
        ),
        (
            "smaller than bf16",
            "",
            f"{result.bf16_bytes / result.plain_bytes:.2f}x",
            f"{result.bf16_bytes / result.stored_bytes:.2f}x",
        ),
    ]
    lines = [
        f"history: {result.n_history_tokens:,} tokens, {result.bf16_bytes:,} bytes as bf16",
        "",
    ]
    lines += [f"{row[0]:<24}{row[1]:>14}{row[2]:>14}{row[3]:>14}" for row in rows]
    lines += [
        "",
        f"codecs: {', '.join(result.codecs)}",
        f"guard: mean KL {result.guard_mean_kl:.4f} nats, top-1 agreement {result.guard_top1:.3f}",
        f"once per process and model: {result.attach_s:.2f} s",
        "",
    ]
    origins = ("before the save", "from the store, in a new process", "one turn later")
    for question, answer, origin in zip(result.questions, result.answers, origins, strict=True):
        lines += [f"Q: {question}", f"A ({origin}): {answer}", ""]
    agree = "the same" if result.answers_agree else "another"
    lines.append(f"Reading everything again gives {agree} second answer.")
    lines.append(
        f"In the store at the end: {result.n_turns_saved} turns, {result.n_tokens_saved:,} tokens, "
        f"in {result.n_segments} segments."
    )
    return "\n".join(lines)


def write_png(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Draw the two comparisons of the table as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ["recompute", "plain load", "krul"]
    colours = ["#9aa5b1", "#5b7fa6", "#c8553d"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    seconds = [result.recompute_s, result.plain_load_s, result.krul_s]
    bars = left.bar(names, seconds, color=colours)
    left.bar_label(bars, [f"{s:.2f} s" for s in seconds], padding=2)
    left.set_yscale("log")
    left.margins(y=0.2)
    left.set_ylabel("seconds, logarithmic")
    left.set_title("time to first token after the pause")
    megabytes = [b / 1e6 for b in (result.bf16_bytes, result.plain_bytes, result.stored_bytes)]
    bars = right.bar(["KV as bf16", "plain file", "krul"], megabytes, color=colours)
    right.bar_label(bars, [f"{m:.1f} MB" for m in megabytes], padding=2)
    right.margins(y=0.12)
    right.set_ylabel("megabytes")
    right.set_title("what is kept meanwhile")
    figure.suptitle(
        f"SmolLM2-135M, {result.n_history_tokens:,} tokens of history; guard: mean KL "
        f"{result.guard_mean_kl:.4f}, top-1 {result.guard_top1:.3f}"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)


def to_json(result: DemoResult) -> dict[str, Any]:
    """Return the result as plain JSON values."""
    return asdict(result)
