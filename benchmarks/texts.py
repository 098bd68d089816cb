"""Real text for the benchmarks: three kinds, from what is installed anyway.

``python`` (default): pages of Python's manual, source code of its library, and the running prose of
installed packages' own introductions. ``debian``: the packages ``perl-doc`` and ``bible-kjv-text``,
a manual and old prose, with Python's source code again.

``held_out_texts`` is what a codec is measured on; ``calibration_texts`` is what one may be fitted
to: other pages, other modules, other packages.
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

_OTHER_TOPICS = ("specialnames", "compound", "types", "typesseq")
_OTHER_MODULES = (
    "asyncio.base_events",
    "email._header_value_parser",
    "inspect",
    "pickle",
    "statistics",
    "subprocess",
    "zipfile",
)
_OTHER_PACKAGES = (
    "filelock",
    "fsspec",
    "huggingface_hub",
    "hypothesis",
    "jinja2",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "peft",
    "psutil",
    "pytest",
    "regex",
    "rich",
    "safetensors",
    "sympy",
    "tokenizers",
    "typer",
)
_LICENCES = ("numpy", "matplotlib")
_OTHER_PERL_PAGES = ("perlopentut", "perlunitut", "perlperf")
_OTHER_BIBLE_RANGES = ("job1:1-14:22", "acts1:1-9:43", "prov1:1-12:28")
_OTHER_TEXT_CHARACTERS = 16_000


def _python(kind: str) -> list[str]:
    if kind == "manual":
        from pydoc_data.topics import topics

        return [topics[name] for name in _TOPICS]
    if kind == "code":
        return [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    return [_introduction(name) for name in _PACKAGES]


def _introduction(package: str) -> str:
    """Return the running prose of a package's own introduction."""
    text = importlib.metadata.metadata(package).get_payload() or ""
    assert isinstance(text, str)
    text = re.sub(r"<[^>]*>|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return "\n".join(line for line in text.splitlines() if len(line.split()) > 6)


def _licence(package: str) -> str:
    """Return the texts of a package's licence files, one after the other."""
    files = importlib.metadata.files(package) or []
    wanted = sorted(path for path in files if "LICENSE" in path.name.upper())
    return "\n\n".join(path.read_text() for path in wanted if path.suffix != ".py")


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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


def held_out_texts(source: str = "python") -> dict[str, str]:
    """Return the texts that codecs are measured on, by kind; no codec is fitted to them."""
    return {kind: text(kind, source) for kind in KINDS}


def calibration_texts(source: str = "python") -> list[str]:
    """Return texts of 16,000 characters (3,000 tokens and more) that a codec may be fitted to.

    None of their files is among those of `held_out_texts`. Packages that are not installed are
    left out, so that the list is the same on one installation but not on every one.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r} but must be one of {', '.join(SOURCES)}")
    code = [inspect.getsource(importlib.import_module(name)) for name in _OTHER_MODULES]
    if source == "debian":
        manual = [_printed("perldoc", "-T", "-o", "text", page) for page in _OTHER_PERL_PAGES]
        prose = [_printed("bible", "-f", part) for part in _OTHER_BIBLE_RANGES]
    else:
        from pydoc_data.topics import topics

        manual = [topics[name] for name in _OTHER_TOPICS]
        introductions = "\n\n".join(_introduction(p) for p in _OTHER_PACKAGES if _is_installed(p))
        prose = [_licence(name) for name in _LICENCES if _is_installed(name)]
        n = _OTHER_TEXT_CHARACTERS
        prose += [introductions[i : i + n] for i in range(0, len(introductions), n)]
    # The beginnings of modules are licences and imports: begin a little later.
    parts = [*manual, *(part[2_000:] for part in code), *prose]
    cut = [part[:_OTHER_TEXT_CHARACTERS] for part in parts]
    return [part for part in cut if len(part) == _OTHER_TEXT_CHARACTERS]


def digest(words: str) -> str:
    """Return what tells one text from another: the first digits of its SHA-256."""
    return hashlib.sha256(words.encode()).hexdigest()[:12]
