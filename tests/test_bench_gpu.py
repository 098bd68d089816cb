"""The benchmark of GPUs: its arithmetic, its judgement, and all of its code on a tiny model."""

import json
import math
import os
import shutil
import stat
import subprocess

import pytest
import torch

import krul
from benchmarks import bench_gpu, harness, shapes, speed, ways


def test_bound_is_the_best_split():
    # Seconds of both sides by the part that is recomputed; the prompt comes after that side.
    history_s, load_s, prompt_s = 3.0, 2.0, 0.25
    parts = [i / 10_000 for i in range(10_001)]
    best = min(max(history_s * p + prompt_s, load_s * (1 - p)) for p in parts)
    assert bench_gpu.bound_s(history_s, load_s, prompt_s) == pytest.approx(best, rel=1e-3)
    assert bench_gpu.bound_s(1.0, 1.0, 0.0) == pytest.approx(0.5)
    assert bench_gpu.bound_s(1.0, 1e-9, 0.1) == pytest.approx(0.1)
    assert bench_gpu.bound_s(1.0, 0.0, 0.1) == 0.1


def test_intervals_are_counted_once():
    assert bench_gpu.busy_s([]) == 0
    assert bench_gpu.busy_s([(0, 2), (1, 3), (5, 6), (5.2, 5.4)]) == pytest.approx(4)
    events = [("void int_kernel", 0.0, 1.0), ("Memcpy HtoD", 0.5, 2.0)]
    assert bench_gpu.seconds_of(events, *bench_gpu.COPY_WORDS) == 1.5
    assert bench_gpu.seconds_of(events, *bench_gpu.KERNEL_WORDS) == 1.0


def test_attention_counts_what_the_mask_lets_through():
    shape = shapes.TINY
    pairs = sum(1 for q in range(3) for k in range(5 + 3) if k <= q + 5)
    expected = 4 * pairs * shape.n_heads * shape.head_dim
    assert bench_gpu.attention_flops(shape, 3, 5) == expected


def test_bytes_per_token():
    # Llama-3.1-8B: 32 layers, K and V, 8 heads of 128 numbers of 2 bytes; inputs of 4,096.
    assert shapes.SHAPES["8b"].bf16_bytes_per_token == 131_072
    assert shapes.SHAPES["7b"].bf16_bytes_per_token == 524_288
    assert shapes.SHAPES["8b"].hidden_bytes_per_token == 262_144
    assert shapes.SHAPES["8b-8"].bf16_bytes_per_token == 32_768
    assert shapes.SHAPES["72b-8"].label == "qwen2.5-72b (8 of 80 layers)"
    assert shapes.SHAPES["8b"].weights_bytes == pytest.approx(14.5e9, rel=0.05)


def test_ratios_are_those_of_the_committed_results():
    found = bench_gpu.smollm2_ratios()
    assert found["int4"] == pytest.approx(3.53, abs=0.1)
    assert {"exact", "int8", "int4", "share+int8"} <= set(found)


def test_budget_notes_what_was_left_out():
    budget = bench_gpu.Budget(100)
    assert budget.allows("a", 50)
    assert not budget.allows("b", 150)
    assert budget.cut == ["b"]


def row(way, seconds, **more):
    base = {"section": "restore", "shape": "7b", "n_tokens": 4096, "place": "memory"}
    return base | {"n_prompt": 128, "way": way, "first_token_s": seconds} | more


def test_every_line_of_speed_is_judged():
    assert [each["holds"] for each in speed.judge([])] == ["-"] * len(speed.LINES)
    rows = [row("krul share+int8", 1.0), row("recompute", 7.0), row("hidden states", 1.2)]
    found = {each["what"]: each for each in speed.judge(rows)}
    name = "7b, 4,096 tokens, memory, krul share+int8: sooner than "
    assert found[name + "recompute"]["holds"] == "yes"
    assert found[name + "recompute"]["measured"] == "7x"
    assert found[name + "hidden states"]["holds"] == "no"
    assert found[name + "load, then run"]["measured"] == "not measured"


def test_rows_of_another_history_do_not_count():
    rows = [row("krul share+int8", 1.0), row("recompute", 99.0, n_prompt=32)]
    rows += [row("recompute", 99.0, place="disk"), row("recompute", 99.0, n_tokens=512)]
    assert not any(each["holds"] == "yes" for each in speed.judge(rows))


def test_the_worst_figure_counts():
    rows = [
        {"section": "kernels", "codec": "int8", "decode_share": 0.9},
        {"section": "kernels", "codec": "int8", "decode_share": 0.8},
        {"section": "save", "share": 0.01},
        {"section": "save", "share": 0.03},
        {"section": "host", "n_allocations": 0, "host_ms": 0.4},
        {"section": "alone", "way": "krul int4", "n_tokens": 512, "times_bound": 9.0},
        {"section": "alone", "way": "krul int4", "n_tokens": 4096, "times_bound": 1.05},
    ]
    found = {each["what"]: each for each in speed.judge(rows)}
    assert found["decode of int8, of a device copy"]["measured"] == "80 %"
    assert found["decode of int8, of a device copy"]["holds"] == "no"
    assert found["save, decode slowed"]["holds"] == "no"
    assert found["allocations, pinnings inside the model's forward"]["holds"] == "yes"
    assert found["host work on the way to the first token"]["holds"] == "yes"
    assert found["restore alone, of T*, from 2k tokens"]["value"] == 1.05


def test_raw_blocks_are_read_back_bit_for_bit(device):
    model = shapes.random_model(shapes.TINY, device, torch.bfloat16)
    ids = shapes.random_ids(shapes.TINY, 80, device)
    with krul.attach(model), krul.Store("memory:") as store:
        history = ways.History(shapes.TINY, model, ids, 64, store)
        way = history.way("load, layer by layer")
        assert way.n_bytes >= 64 * shapes.TINY.bf16_bytes_per_token
        assert history.check(way, 16, history.recompute(16))["logits_error"] < 0.1


def test_a_wrong_way_is_not_timed():
    device = torch.device("cpu")
    model = shapes.random_model(shapes.TINY, device, torch.float32)
    ids = shapes.random_ids(shapes.TINY, 80, device)
    with krul.attach(model), krul.Store("memory:") as store:
        history = ways.History(shapes.TINY, model, ids, 64, store)
        way = history.way("load, layer by layer")
        expected = history.recompute(16)
        with pytest.raises(harness.CheckError, match="logits"):
            history.check(way, 16, expected.flip(0))
        history.on_cpu("raw")[1][0][:, :, 3] += 1
        with pytest.raises(harness.CheckError, match="K of layer 1"):
            history.check(way, 16, expected)


def test_all_of_it_runs(tmp_path, device):
    path = tmp_path / "gpu.json"
    words = ["--quick", "--device", device.type, "--json", str(path), "--folder", str(tmp_path)]
    assert bench_gpu.main(words) == 0, json.loads(path.read_text())["notes"]
    result = json.loads(path.read_text())
    sections = {each["section"] for each in result["rows"]}
    assert sections == set(bench_gpu.VIEWS)
    named = {each.get("way") for each in result["rows"] if each["section"] == "restore"}
    assert named == {"recompute", "never left memory", "krul predict", *bench_gpu.WAYS}
    restores = [each for each in result["rows"] if each["section"] == "restore"]
    assert all(each["x"] > 0 and math.isfinite(each["first_token_s"]) for each in restores)
    if device.type == "cpu":
        assert result["machine"]["gpu"] is None
        holds = [each["holds"] for each in result["rows"] if each["section"] == "speed"]
        assert holds == ["-"] * len(speed.LINES)


def test_wrong_devices_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_gpu.arguments(["--device", "cpu"])
    assert "--quick" in capsys.readouterr().err


def test_script_says_why_it_stops_without_a_gpu(root, tmp_path):
    # A PATH without nvidia-smi, whatever this machine has.
    for name in ("bash", "dirname", "tr", "sort", "paste", "ls"):
        os.symlink(shutil.which(name), tmp_path / name)
    script = root / ".ci" / "gpu"
    assert script.stat().st_mode & stat.S_IXUSR
    environment = {"PATH": str(tmp_path), "PY": "python3", "OUT": str(tmp_path / "out")}
    done = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "stopped: there is no nvidia-smi" in done.stderr
    assert all(part in done.stdout for part in ("build", "--require-cuda", "bench_gpu"))
    assert not (tmp_path / "out").exists()
    wrong = subprocess.run(
        ["bash", script, "nonsense"], env=environment, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "nonsense" in wrong.stderr
