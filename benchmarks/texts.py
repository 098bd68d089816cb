"""Real text for the benchmarks: three kinds, from what is installed anyway.

``python`` (default): pages of Python's manual, source code of its library, and the running prose of
installed packages' own introductions. ``debian``: the packages ``perl-doc`` and ``bible-kjv-text``,
a manual and old prose, with Python's source code again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import re
import subprocess

KINDS = ("manual", "code", "prose")
SOURCES = ("python", "debian")

_TOPICS = ("formatstrings", "debugger", "typesmapping", "execmodel", "import", "string-methods")
_MODULES = ("argparse", "tarfile", "logging", "typing")
_PACKAGES = ("torch", "transformers", "accelerate", "tqdm")
_PERL_PAGES = ("perlfaq4", "perlretut", "perlipc")
_BIBLE_RANGES = ("gen1:1-12:20", "ex1:1-10:29", "ruth1:1-4:22", "mark1:1-9:50")


def _python(kind: str) -> list[str]:
    if kind == "manual":
        from pydoc_data.topics import topics

        return [topics[name] for name in _TOPICS]
    if kind == "code":
        return [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    introductions = []
    for name in _PACKAGES:
        text = importlib.metadata.metadata(name).get_payload() or ""
        assert isinstance(text, str)
        text = re.sub(r"<[^>]*>|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        lines = [line for line in text.splitlines() if len(line.split()) > 6]
        introductions.append("\n".join(lines))
    return introductions


def _printed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    return done.stdout


def _debian(kind: str) -> list[str]:
    if kind == "manual":
        return [_printed("perldoc", "-T", "-o", "text", page)[4000:] for page in _PERL_PAGES]
    if kind == "code":
        return [inspect.getsource(importlib.import_module(name))[3000:] for name in _MODULES]
    return [_printed("bible", "-f", part) for part in _BIBLE_RANGES]


def text(kind: str, source: str = "python") -> str:
    """Return a long text of one kind, the same every time on one installation."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r} but must be one of {', '.join(KINDS)}")
    if source not in SOURCES:
        raise ValueError(f"source is {source!r} but must be one of {', '.join(SOURCES)}")
    parts = _python(kind) if source == "python" else _debian(kind)
    return "\n\n".join(parts)


def digest(words: str) -> str:
    """Return what tells one text from another: the first digits of its SHA-256."""
    return hashlib.sha256(words.encode()).hexdigest()[:12]
