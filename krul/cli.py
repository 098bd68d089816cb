"""The command line: ``krul`` and ``python -m krul``.

Exit status: 0 good, 1 problems were found or something failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .errors import KrulError

__all__ = ["main"]

DEFAULT_STORE = "~/.cache/krul"
GOOD, PROBLEMS, WRONG_USE = 0, 1, 2


class _WrongUseError(Exception):
    """Something that only the caller can put right."""


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _bytes(n_bytes: int) -> str:
    """Return a size that people read.

    >>> _bytes(999), _bytes(26_300_000)
    ('999 B', '26.3 MB')
    """
    if n_bytes < 1000:
        return f"{n_bytes} B"
    power = min(4, (len(str(n_bytes)) - 1) // 3)
    return f"{n_bytes / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _shown(text: str, width: int = 40) -> str:
    """Return a conversation id on one line, without what a terminal would obey."""
    words = text.encode("unicode_escape").decode("ascii")
    return words if len(words) <= width else words[: width - 3] + "..."


def _open_store(options: argparse.Namespace) -> Any:
    from .store import Store

    try:
        return Store(options.store, tenant=options.tenant)
    except ValueError as error:
        raise _WrongUseError(str(error)) from error


# ---- the commands --------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    with _open_store(options) as store:
        infos = store.list()
    if options.json:
        _print_json([info.to_dict() for info in infos])
        return GOOD
    heads = f"{'conversation':<40} {'tokens':>9} {'segments':>8} {'stored':>10}"
    print(f"{heads}  {'updated':<16}  profile")
    for info in infos:
        profiles = ", ".join(_shown(digest[:12]) for digest in info.profiles) or "-"
        print(
            f"{_shown(info.conversation_id):<40} {info.n_tokens:>9,} {info.n_segments:>8} "
            f"{_bytes(info.stored_bytes):>10}  {_when(info.updated_s):<16}  {profiles}"
        )
    return GOOD


def _inspect(options: argparse.Namespace) -> int:
    with _open_store(options) as store:
        info = store.info(options.conversation)
    if options.json:
        _print_json(info.to_dict())
        return GOOD
    for name, value in info.to_dict().items():
        if name.endswith("_s") and isinstance(value, float):
            shown = _when(value)
        elif name.endswith("_bytes"):
            shown = f"{value:,} ({_bytes(value)})"
        elif name == "profiles":
            shown = ", ".join(_shown(digest, 64) for digest in value) or "none"
        elif isinstance(value, str):
            shown = _shown(value, 200)
        else:
            shown = str(value)
        print(f"{name:<18} {shown}")
    return GOOD


def _verify(options: argparse.Namespace) -> int:
    with _open_store(options) as store:
        problems = store.verify(options.conversation)
        n_checked = 1 if options.conversation is not None else len(store.list())
    if options.json:
        _print_json({"n_checked": n_checked, "problems": [p.to_dict() for p in problems]})
    else:
        for problem in problems:
            print(
                f"{_shown(problem.conversation_id)}: {problem.file}: {problem.message} "
                f"({problem.n_good_tokens:,} tokens can still be restored)"
            )
        print(f"{n_checked} checked, {len(problems)} problems")
    return PROBLEMS if problems else GOOD


def _gc(options: argparse.Namespace) -> int:
    with _open_store(options) as store:
        report = store.gc()
    if options.json:
        _print_json(report.to_dict())
    else:
        print(
            f"removed {report.n_conversations_removed} conversations and {report.n_files_removed} "
            f"files, {report.n_profiles_removed} of them profiles, {_bytes(report.removed_bytes)}; "
            f"kept {_bytes(report.kept_bytes)}"
        )
    return GOOD


def _rm(options: argparse.Namespace) -> int:
    with _open_store(options) as store:
        removed = [name for name in options.conversation if store.delete(name)]
    if options.json:
        _print_json({"removed": removed})
    missing = sorted(set(options.conversation) - set(removed))
    if missing:
        raise _WrongUseError(f"there is no conversation {', '.join(map(repr, missing))}")
    return GOOD


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    if options.act is not None:
        demo.act(options.act, options.work)
        return GOOD
    result = demo.run(options.work)
    demo.write_png(result, options.png)
    if options.json:
        _print_json(demo.to_json(result))
    else:
        print(demo.to_text(result))
        print(f"The picture is in {options.png}.")
    return GOOD


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    if options.costs:
        # Not through the store: looking at it must not make one.
        books = bench.costs(os.path.expanduser(options.store))
        if options.json:
            _print_json(books)
        else:
            print(bench.costs_to_text(books))
        return GOOD
    result = bench.run(is_quick=options.quick)
    if options.json:
        _print_json(result)
    else:
        print(bench.to_text(result))
    return GOOD


def _texts(paths: Sequence[str]) -> list[str]:
    out = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                out.append(file.read())
        except UnicodeDecodeError as error:
            raise _WrongUseError(f"{path} is no UTF-8 text: {error}") from error
        except FileNotFoundError as error:
            raise _WrongUseError(f"{path} is not there") from error
    return out


def _calibrate(options: argparse.Namespace) -> int:
    if options.out is None and options.store is None:
        raise _WrongUseError("one of --out and --store is needed: where the profile goes")
    if options.out is not None:
        folder = os.path.dirname(os.path.abspath(options.out))
        if not os.path.isdir(folder):  # found out now, not after minutes of work
            raise _WrongUseError(f"--out is {options.out} but {folder} is no directory")
    texts = _texts(options.texts)
    with contextlib.ExitStack() as stack:
        store, checkpoint = None, f"{options.out}.checkpoint"
        if options.store is not None:
            store = stack.enter_context(_open_store(options))
            if options.out is None:
                from .profiles import checkpoint_path

                checkpoint = checkpoint_path(store.path, (options.model, options.dtype))
        return _fit_and_tell(options, texts, checkpoint, store)


def _fit_and_tell(
    options: argparse.Namespace, texts: list[str], checkpoint: str, store: Any
) -> int:
    import transformers

    from .calibrate import n_parameters
    from .profile import Profile

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    start = time.perf_counter()
    profile = Profile.fit(
        model.eval(),
        tokenizer,
        texts,
        checkpoint=checkpoint,
        max_tokens=options.max_tokens,
        rank="full" if options.rank is None else options.rank,  # its size is told below
    )
    if options.out is not None:
        profile.save(options.out)
    if store is not None:
        store.add_profile(profile)
    result = {
        "path": options.out,
        "store": None if store is None else store.path,
        **profile.to_dict(),
        "maps_part": round(profile.sizes["maps"] / 2 / n_parameters(model), 4),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if options.json:
        _print_json(result)
        return GOOD
    places = [options.out] if options.out is not None else []
    places += [f"store {store.path}"] if store is not None else []
    print(
        f"{', '.join(places)}: {_bytes(profile.n_bytes)}, {result['n_layers_learned']} of "
        f"{result['n_layers']} layers from {profile.n_tokens:,} tokens in {result['seconds']:.0f} s"
    )
    maps = "whole" if profile.rank is None else f"of rank {profile.rank}"
    print(", ".join(f"{part} {_bytes(size)}" for part, size in profile.sizes.items()))
    print(
        f"maps are stored {maps}, {result['maps_part']:.1%} as many numbers as the model has "
        "(--rank small keeps to 1%, and compresses less)"
    )
    print(f"the profile's digest is {profile.digest}")
    for reason in result["reasons"]:
        print(f"left out: {reason}")
    return GOOD


def _rank(words: str) -> int | str:
    return words if words in ("full", "small") else int(words)


# ---- the parser ----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON")
    in_store = argparse.ArgumentParser(add_help=False)
    in_store.add_argument(
        "--store", default=DEFAULT_STORE, metavar="PATH", help="the store (default: %(default)s)"
    )
    in_store.add_argument("--tenant", default="default", help="whose conversations")

    parser = argparse.ArgumentParser(
        prog="krul", description="Keep the KV cache of chats: look after what is stored."
    )
    parser.add_argument("--version", action="version", version=f"krul {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], words: str, *, is_in_store: bool = True
    ) -> argparse.ArgumentParser:
        parents = [shared, in_store] if is_in_store else [shared]
        command = commands.add_parser(name, help=words, description=words, parents=parents)
        command.set_defaults(run=run)
        return command

    command = add(
        "demo", _demo, "save a real conversation and go on in a new process", is_in_store=False
    )
    command.add_argument(
        "--png", default="krul-demo.png", metavar="FILE", help="(default: %(default)s)"
    )
    command.add_argument("--work", metavar="DIRECTORY", help="keep the store and all figures there")
    command.add_argument("--act", help=argparse.SUPPRESS)

    command = add(
        "calibrate", _calibrate, "fit the profile that codec predict needs", is_in_store=False
    )
    command.add_argument("model", help="a folder or a name that from_pretrained takes")
    command.add_argument(
        "--texts", nargs="+", required=True, metavar="FILE", help="UTF-8, of many kinds"
    )
    command.add_argument(
        "--out",
        metavar="PATH",
        help="the profile; PATH.checkpoint holds what is done until it is there",
    )
    command.add_argument(
        "--store",
        metavar="PATH",
        help="install it in this store, for conversations of this model (with or without --out)",
    )
    command.set_defaults(tenant="default")
    command.add_argument(
        "--dtype", default="auto", help="that the model will be used in (default: %(default)s)"
    )
    command.add_argument(
        "--max-tokens", type=int, default=40_960, metavar="N", help="(default: %(default)s)"
    )
    command.add_argument(
        "--rank",
        type=_rank,
        metavar="N",
        help="of the prediction maps, or 'full' (the default: 26.5 MB for SmolLM2-135M), or "
        "'small': 1 %% of the model's size, which compresses 22 %% less",
    )
    add("ls", _ls, "list conversations")
    command = add("inspect", _inspect, "what is known of one conversation")
    command.add_argument("conversation")
    command = add("verify", _verify, "read every byte and check it")
    command.add_argument("conversation", nargs="?", help="(default: all)")
    add("gc", _gc, "remove what nothing refers to and what has expired")
    command = add("rm", _rm, "remove conversations")
    command.add_argument("conversation", nargs="+")
    command = add("bench", _bench, "how fast the codecs run on this machine")
    command.add_argument("--quick", action="store_true", help="a second instead of ten")
    command.add_argument(
        "--costs",
        action="store_true",
        help="instead, what restores plan with: measured passes, reads and decoders of each model",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str or None
        What follows ``krul`` on the command line; None takes it from there.

    Returns
    -------
    int
        0 good, 1 problems were found or something failed, 2 wrong use.
    """
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else WRONG_USE
    try:
        return options.run(options)
    except (_WrongUseError, ModuleNotFoundError) as error:
        print(f"krul {options.command}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyError as error:  # what the store says of a conversation that it does not have
        print(f"krul {options.command}: {error.args[0]}", file=sys.stderr)
        return WRONG_USE
    except (KrulError, OSError, RuntimeError, ValueError) as error:
        print(f"krul {options.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return PROBLEMS
    except KeyboardInterrupt:
        print(f"krul {options.command}: interrupted", file=sys.stderr)
        return PROBLEMS
