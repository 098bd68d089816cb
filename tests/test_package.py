"""Rules of the layout: what a newcomer may rely on without reading the code."""

import ctypes
import pathlib
import re
import subprocess
import sys
from collections import Counter

import pytest

import krul
import krul._core as core

# Where a rule of layout is at stake: the tree itself, without what is built or downloaded.
SKIPPED = {".git", ".venv", "build", "dist", "out", "__pycache__", ".ipynb_checkpoints"}
SKIPPED |= {".hypothesis", ".pytest_cache", ".ruff_cache", ".mypy_cache", "krul.egg-info"}
TEXT = {".py", ".pyi", ".c", ".h", ".inc", ".md", ".sh", ".toml", ".txt", ".yaml"}
TEXT |= {".cu", ".cuh", ".cpp"}
# One of each folder by their nature.
SHARED_NAMES = {"README.md", "__init__.py", "PKG-INFO", "run.sh", "setup.cfg"}


@pytest.fixture(scope="module")
def files(root):
    found = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not SKIPPED & set(inside.parts) and path.suffix != ".so":
            found.append(inside)
    assert len(found) > 50
    return found


def is_data(path):
    return path.parts[:2] == ("tests", "data") or "corpus" in path.parts


def test_file_names_are_unique(files):
    counts = Counter(path.name for path in files if not is_data(path))
    twice = {name for name, n in counts.items() if n > 1} - SHARED_NAMES
    assert not twice


def test_top_level_is_fixed(root, files):
    allowed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"}
    allowed |= {"csrc", "cuda", "krul", "tests", "notebooks", "benchmarks"}
    allowed |= {"PKG-INFO", "setup.cfg"}  # what an sdist adds
    top = {path.parts[0] for path in files}
    assert {name for name in top if not name.startswith(".")} <= allowed


def test_only_bindings_include_python(root, files):
    including = {
        path.parent.as_posix()
        for path in files
        if path.suffix in {".c", ".h", ".inc"}
        and re.search(r"#\s*include\s*[<\"](Python\.h|numpy/)", (root / path).read_text())
    }
    assert including == {"csrc/python"}


def test_library_does_not_print_exit_or_read_the_environment(root, files):
    for path in files:
        if path.parts[0] == "csrc" and path.suffix in {".c", ".h", ".inc"}:
            if path.parts[1] == "python":
                continue
            words = (root / path).read_text()
            found = re.findall(r"\b(?:printf|puts|exit|abort|getenv|system)\s*\(", words)
            assert not found, path


def test_first_line_says_what_a_file_is(root, files):
    for path in files:
        if path.suffix not in TEXT or is_data(path):
            continue
        lines = (root / path).read_text().splitlines()
        if not lines:
            continue
        first = lines[1] if lines[0].startswith("#!") else lines[0]
        if path.name == "krul.h":
            first = lines[3]
        if path.suffix in {".c", ".h", ".inc", ".cu", ".cuh", ".cpp"}:
            assert re.match(rf"(/\*| \*) {re.escape(path.name)} - \S", first), path
        elif path.suffix in {".py", ".pyi"}:
            assert re.match(r'r?"""\S|# \S', first), path
        else:
            assert re.match(r"# \S", first) or path.name == "LICENSE", path


def test_no_paths_of_one_machine(root, files):
    pattern = re.compile(r"(?<![A-Za-z0-9_.$~{}/-])/(?:work|root|opt|home|farm|Users)/")
    for path in files:
        if path.suffix in TEXT | {".ipynb", ".json"} or path.name in {"Makefile", "run"}:
            assert not pattern.search((root / path).read_text()), path


def test_spdx_stands_once(root, files):
    holding = [
        path.as_posix()
        for path in files
        if path.suffix in TEXT and "SPDX-License" + "-Identifier" in (root / path).read_text()
    ]
    assert holding == ["csrc/krul.h"]


def run_python(code):
    """Run code in a process of its own that imports the same krul; return its exit status."""
    package_parent = str(pathlib.Path(krul.__file__).parent.parent)
    return subprocess.run([sys.executable, "-c", code], cwd=package_parent, check=False).returncode


@pytest.mark.parametrize(
    "module",
    [
        "krul",
        "krul.cli",
        "krul.compressor",
        "krul.estimator",
        "krul.plan",
        "krul.profile",
        "krul.selector",
        "krul.store",
    ],
)
def test_import_loads_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert run_python(code) == 0


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Profiles'"):
        krul.Profiles  # noqa: B018


def test_every_public_name_is_there():
    assert [name for name in krul.__all__ if not hasattr(krul, name)] == []
    assert set(krul.__all__) <= set(dir(krul))


def test_attach_is_the_function_whatever_was_imported_first():
    code = "import krul.cache, krul.restore, krul.store, krul, inspect, sys; "
    assert run_python(code + "sys.exit(not inspect.isfunction(krul.attach))") == 0


# ---- the module ----------------------------------------------------------------------------------


def test_module_exports_only_its_entry_point():
    words = pathlib.Path(core.__file__).read_bytes()
    assert b"PyInit__core" in words
    library = ctypes.CDLL(core.__file__)
    assert hasattr(library, "PyInit__core")
    assert not hasattr(library, "krul_view_check")


# ---- statuses ------------------------------------------------------------------------------------


def test_every_status_has_an_exception(root):
    header = (root / "csrc" / "krul.h").read_text()
    statuses = set(re.findall(r"^\s*(KRUL_STATUS_\w+) = -", header, re.MULTILINE))
    assert len(statuses) >= 11
    errors = (root / "csrc" / "python" / "py_errors.c").read_text()
    handled = set(re.findall(r"\b(KRUL_STATUS_\w+)\b", errors))
    assert statuses - handled == set()


def test_backends_say_what_runs():
    found = krul.backends()
    assert found["chosen"] == found["usable"][0]
    assert "scalar" in found["usable"]
    assert not set(found["usable"]) & set(found["unusable"])
    assert all(reason for reason in found["unusable"].values())
