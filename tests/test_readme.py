"""README's code blocks run as they stand, and its figures are those of the committed results."""

import os
import re
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from benchmarks import harness


def blocks(root, language):
    words = (root / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", words, re.DOTALL | re.MULTILINE)


@pytest.mark.model
def test_python_blocks_run(root, tmp_path):
    """One process, the blocks one after the other, in an empty folder with an empty home."""
    found = blocks(root, "python")
    assert found
    script = tmp_path / "readme_blocks.py"
    script.write_text("\n\n".join(found))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for block in found for line in re.findall(r"^# prints (.+)$", block, re.MULTILINE)]
    for words in said:
        assert re.search(words, done.stdout), (words, done.stdout)


def test_shell_blocks_name_targets_and_commands_that_exist(root):
    makefile = (root / "Makefile").read_text()
    lines = [line for block in blocks(root, "sh") for line in block.splitlines()]
    assert lines
    for line in lines:
        if match := re.match(r"make (\w+)", line):
            assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), line
        elif match := re.match(r"(?:python -m )?krul (\w+)", line):
            from krul import cli

            assert cli.main([match[1], "--help"]) == 0, line
        elif match := re.match(r"python -m (benchmarks\.\w+)", line):
            assert (root / (match[1].replace(".", "/") + ".py")).is_file(), line
        else:
            assert re.match(r"(pip install|#|$)", line), line


@pytest.mark.parametrize("document", harness.DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_results(document):
    words = document.read_text()
    assert harness.render(words) == words


def test_every_table_has_its_results():
    marked = {
        match["name"]
        for document in harness.DOCUMENTS
        for match in harness._BLOCK.finditer(document.read_text())
    }
    assert marked == {path.stem for path in harness.RESULTS.glob("*.json")}


def test_links_lead_somewhere(root):
    words = (root / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", words):
        assert (root / target).exists(), target
