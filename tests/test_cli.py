"""The command line: what it prints, as text and as JSON, and how it exits."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import krul
from krul import cli


@pytest.fixture
def store_with_one(tmp_path, tiny_model):
    """Return the path of a store that holds the conversation ``chat one``."""
    import torch

    path = tmp_path / "store"
    ids = torch.arange(40)[None] % 50
    with krul.Store(path) as store, store.open("chat one", tiny_model) as cache:
        with torch.no_grad():
            tiny_model(ids, past_key_values=cache, use_cache=True)
        cache.save()
    return path


@pytest.fixture
def tiny_model():
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def json_of(capsys, *arguments, status=0):
    assert cli.main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def segments_of(path):
    return sorted(path.rglob("segment-*"))


def test_ls_lists_what_is_there(store_with_one, capsys):
    (found,) = json_of(capsys, "ls", "--store", str(store_with_one))
    assert found["conversation_id"] == "chat one"
    assert found["n_tokens"] == 40
    assert cli.main(["ls", "--store", str(store_with_one)]) == 0
    out = capsys.readouterr().out
    assert "chat one" in out
    assert "40" in out


def test_ls_of_an_empty_store(tmp_path, capsys):
    assert json_of(capsys, "ls", "--store", str(tmp_path)) == []


def test_tenants_are_apart(store_with_one, capsys):
    assert json_of(capsys, "ls", "--store", str(store_with_one), "--tenant", "other") == []


def test_ls_shows_no_control_characters(tmp_path, tiny_model, capsys):
    import torch

    with krul.Store(tmp_path) as store, store.open("a\x1b[31mb\n", tiny_model) as cache:
        with torch.no_grad():
            tiny_model(torch.arange(8)[None], past_key_values=cache, use_cache=True)
        cache.save()
    assert cli.main(["ls", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_inspect_tells_all_fields(store_with_one, capsys):
    found = json_of(capsys, "inspect", "chat one", "--store", str(store_with_one))
    with krul.Store(store_with_one) as store:
        assert found == store.info("chat one").to_dict()
    assert cli.main(["inspect", "chat one", "--store", str(store_with_one)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in found)


def test_verify_finds_nothing_in_a_good_store(store_with_one, capsys):
    found = json_of(capsys, "verify", "--store", str(store_with_one))
    assert found == {"n_checked": 1, "problems": []}


def test_verify_finds_a_flipped_byte(store_with_one, capsys):
    (path,) = segments_of(store_with_one)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    found = json_of(capsys, "verify", "--store", str(store_with_one), status=1)
    (problem,) = found["problems"]
    assert problem["conversation_id"] == "chat one"
    assert problem["file"] == path.name
    assert cli.main(["verify", "chat one", "--store", str(store_with_one)]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_gc_removes_what_nothing_refers_to(store_with_one, capsys):
    (path,) = segments_of(store_with_one)
    orphan = path.parent / "segment-99"
    orphan.write_bytes(path.read_bytes())
    os.utime(orphan, (0, 0))  # younger ones may belong to a save under way
    found = json_of(capsys, "gc", "--store", str(store_with_one))
    assert found["n_files_removed"] == 1
    assert segments_of(store_with_one) == [path]


def test_rm_removes(store_with_one, capsys):
    assert json_of(capsys, "rm", "chat one", "--store", str(store_with_one)) == {
        "removed": ["chat one"]
    }
    assert json_of(capsys, "ls", "--store", str(store_with_one)) == []


@pytest.mark.parametrize("command", ["inspect", "verify", "rm"])
def test_unknown_conversation_is_wrong_use(command, store_with_one, capsys):
    assert cli.main([command, "nobody", "--store", str(store_with_one)]) == 2
    assert "nobody" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["calibrate"],
        ["frobnicate"],
        ["ls", "--frobnicate"],
        ["inspect"],
        ["rm"],
        ["demo", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_use(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "usage: krul" in capsys.readouterr().err


def test_a_store_on_a_server_is_refused(capsys):
    assert cli.main(["ls", "--store", "valkey://localhost:6379/0"]) == 2
    assert "valkey" in capsys.readouterr().err


def test_an_unreadable_store_is_a_problem(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("not a directory")
    assert cli.main(["ls", "--store", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("demo", "calibrate", "ls", "inspect", "verify", "gc", "rm", "bench"):
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"krul {krul.__version__}\n"


def test_bench_times_every_codec(capsys):
    found = json_of(capsys, "bench", "--quick")
    assert [row["codec"] for row in found["codecs"]] == list(krul.compressor.BLOCK_CODECS)
    numbers = [row[name] for row in found["codecs"] for name in ("encode_gb_s", "decode_gb_s")]
    assert np.all(np.isfinite(numbers))
    assert min(numbers) > 0


def test_module_runs(tmp_path):
    package_parent = os.path.dirname(os.path.dirname(krul.__file__))
    done = subprocess.run(
        [sys.executable, "-m", "krul", "ls", "--json", "--store", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package_parent},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")
