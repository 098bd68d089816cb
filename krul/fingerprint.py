"""Which model a conversation belongs to: its weights, adapters and layout, and how it behaves."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import weakref
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import _core
from .errors import MismatchError, UnsupportedModelError
from .model import (
    SLIDING,
    Recorder,
    cache_layers,
    decoder_layers,
    generation_model,
    is_remembered,
    modules_of,
    own_layers,
    recall,
    remember,
    replace_remembered,
    run_decoder,
    short_prompt,
    support,
    text_config,
    undisturbed,
)

__all__ = [
    "Fingerprint",
    "LayerShape",
    "behaviour_distance",
    "behaviour_tolerance",
    "check_fingerprint",
    "exact_parts",
    "fingerprint",
    "fingerprint_of",
]

_N_PROMPT_TOKENS = 16
_N_SAMPLES = 64
_N_BEHAVIOUR = 256


@dataclass(frozen=True)
class LayerShape:
    """What one layer hands to the cache.

    Attributes
    ----------
    kind : str
        ``"full"``, ``"sliding"`` (chunked attention too), or ``"none"`` for a layer without K and V
        of its own.
    window : int
        Tokens that a sliding layer sees; 0 for the others.
    n_heads : int
        Heads of K and V.
    key_dim, value_dim : int
        Numbers per head and token.
    """

    kind: str
    window: int = 0
    n_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0


@dataclass(frozen=True)
class Fingerprint:
    """Which model a conversation belongs to.

    Attributes
    ----------
    exact : str
        SHA-256 over `parts`, 64 hexadecimal digits.
    behaviour : numpy.ndarray
        float32 [256]: sampled numbers of the lowest layer's K and of the highest layer's K and V
        for a fixed prompt of 16 tokens. Compared with a tolerance, see :func:`behaviour_distance`.
    parts : dict of str to str
        What `exact` is made of, so that a mismatch can be named: ``dtype``, ``quantisation``,
        ``adapters``, ``layout``, and ``weights <group>`` for each layer and each other group of
        parameters. A manifest keeps it as it is; it may be empty.
    layout : tuple of LayerShape
        One per decoder layer, as seen in that prompt; not kept in a manifest.
    """

    exact: str
    behaviour: np.ndarray = field(compare=False, repr=False)
    parts: dict[str, str] = field(compare=False, repr=False)
    layout: tuple[LayerShape, ...] = field(compare=False, repr=False)


_WEIGHTS = "weights "

# Parts other than weights, and how a message calls a difference in them.
_WORDS = {
    "dtype": "dtype differs",
    "quantisation": "quantisation differs",
    "adapters": "adapter state differs",
    "layout": "layer layout differs",
}


def fingerprint(model: Any) -> Fingerprint:
    """Return which model this is: its weights, adapters and layout, and how it behaves.

    A hash of the configuration would change with every release of transformers; a hash of the
    weights would miss a wrong rotary base. So the exact part samples 64 numbers of every parameter
    and persistent buffer, with shapes, dtypes, quantisation and active adapters, and the
    behavioural part runs a fixed prompt of 16 tokens.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`; not in need of evaluation mode, and left as it was.

    Returns
    -------
    Fingerprint

    Raises
    ------
    krul.UnsupportedModelError
        `support` gives a reason, or a parameter can be read nowhere.

    Notes
    -----
    The samples are taken at every call: a few milliseconds for 300 parameters. The prompt runs once
    per model object and state.
    """
    reason = support(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    inner = generation_model(model)
    return fingerprint_of(inner, *exact_parts(inner))


def fingerprint_of(inner: torch.nn.Module, parts: dict[str, str], key: str) -> Fingerprint:
    """Return what `fingerprint` does, from what `exact_parts` gave."""
    if not is_remembered(inner, ("behaviour", key)):
        behaviour = _behave(inner)
        # PEFT unmerges a merged adapter at the first forward that runs with it disabled.
        parts, key = exact_parts(inner)
        remember(inner, ("behaviour", key), lambda: behaviour)
    numbers, layout = remember(inner, ("behaviour", key), lambda: _behave(inner))
    parts["layout"] = _describe(layout)
    exact = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Fingerprint(exact, numbers, parts, layout)


# ----------------------------------------------------------------------------------- the exact part
@functools.lru_cache(maxsize=4096)
def _places(n_elements: int, row_length: int) -> tuple[int, int]:
    """Return a stride for samples that visits every column of a matrix alike, and their number.

    A multiple of the row length would look at one column alone.
    """
    step = max(1, n_elements // _N_SAMPLES)
    while n_elements and math.gcd(step, row_length) != 1:
        step -= 1
    return step, min(_N_SAMPLES, n_elements)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return at most 64 numbers of `tensor`, [n_samples]."""
    step, n_samples = _places(tensor.numel(), tensor.shape[-1] if tensor.dim() else 1)
    if tensor.is_contiguous():
        return tensor.as_strided((n_samples,), (step,), tensor.storage_offset())
    where = torch.arange(n_samples, device=tensor.device) * step
    return torch.take(tensor, where)


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
# What the libraries that quantise hang on a tensor.
_SCALES = ("absmax", "SCB", "quant_state")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it has no scales, told without asking it for what it does not have, which is slow."""
    attributes = tensor.__dict__  # transformers marks those that it has initialised
    return type(tensor) in _PLAIN_TYPES and not (
        attributes and any(name in attributes for name in _SCALES)
    )


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that `tensor` is made of: quantised weights carry their scales along."""
    if type(tensor) not in _PLAIN_TYPES and hasattr(tensor, "__tensor_flatten__"):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
        return
    yield name, tensor.detach()
    if _is_plain(tensor):
        return
    for holder in (tensor, getattr(tensor, "quant_state", None)):
        for inner in ("absmax", "SCB"):
            scales = getattr(holder, inner, None)
            if isinstance(scales, torch.Tensor):
                yield f"{name}.{inner}", scales.detach()


def _resident(module: torch.nn.Module, name: str, full_name: str) -> torch.Tensor:
    """Return the tensor `name` of `module` from where accelerate keeps it meanwhile."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            try:
                return weights[name]
            except KeyError:
                continue
    raise UnsupportedModelError(
        f"{full_name} is on the device 'meta' and its numbers are nowhere to be found; load the "
        "model's weights first"
    )


# What the output embeddings are called here, whatever their name in the model.
_HEAD = "head"


def _group(name: str) -> str:
    """Return the part of the model that a parameter belongs to: ``model.layers.3``, ``lm_head``."""
    words = name.split(".")
    for index, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[: index + 1])
    return ".".join(words[:-1]) or name


@dataclass
class _Adapters:
    """What PEFT has put into a model, as far as it acts now."""

    skipped: tuple[str, ...] = ()
    active: dict[str, list[tuple[str, torch.Tensor]]] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)


def _adapters(modules: list[tuple[str, torch.nn.Module]]) -> _Adapters:
    """Find the adapters in `modules`; disabled and merged ones do not act."""
    found = _Adapters()
    skipped = []
    for path, module in modules:
        names = getattr(module, "adapter_layer_names", None)
        if not isinstance(names, tuple):
            continue
        holders = (*names, *getattr(module, "other_param_names", ()))
        skipped += [f"{path}.{holder}." for holder in names]
        if getattr(module, "disable_adapters", False) or getattr(module, "merged_adapters", None):
            continue
        active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", ())
        for adapter in [active] if isinstance(active, str) else list(active):
            tensors: list[tuple[str, torch.Tensor]] = []
            for holder in holders:
                values = getattr(module, holder, None)
                try:
                    value = values[adapter] if values is not None and adapter in values else None
                except TypeError:
                    value = None
                where = f"{path}.{holder}.{adapter}"
                if isinstance(value, torch.nn.Module):
                    tensors += [(f"{where}.{n}", p) for n, p in value.named_parameters()]
                elif isinstance(value, torch.Tensor):
                    tensors.append((where, value))
                elif isinstance(value, (bool, int, float, str)):
                    found.settings.append(f"{where}={value!r}")
            if tensors:
                found.active.setdefault(adapter, []).extend(tensors)
                scaling = getattr(module, "scaling", None)
                if isinstance(scaling, dict) and adapter in scaling:
                    found.settings.append(f"{path} scaling={scaling[adapter]!r}")
    found.skipped = tuple(skipped)
    return found


@dataclass
class _Found:
    """The tensors of a model, and what is said of them beside their numbers."""

    rows: list[tuple[str, bytes, torch.Tensor]]  # group, heading, tensor
    dtypes: str
    is_packed: bool
    adapters: tuple[str, ...] | None  # their settings; None where there are none
    places: _Places | None = None  # where their samples are, if all are in this memory


class _Known:
    """What was found of a model, as long as it consists of the same tensors.

    Only where every tensor is a plain one in memory and nothing comes from adapters: then all that
    is said of them follows from which they are, and from their dtypes and shapes.
    """

    def __init__(self, tensors: list[torch.Tensor], found: _Found) -> None:
        self._tensors = [(weakref.ref(x), x.dtype, x.shape, x.data_ptr()) for x in tensors]
        # Without the tensors, which are not to be kept alive.
        self._rows = [(group, heading) for group, heading, _ in found.rows]
        self._about = found.dtypes, found.is_packed
        self._places = _Places(tensors) if all(map(_is_here, tensors)) else None

    def found(self, tensors: list[torch.Tensor]) -> _Found | None:
        """Return it again, or None where the model has changed."""
        if len(tensors) != len(self._tensors):
            return None
        has_moved = False
        for tensor, (known, dtype, shape, address) in zip(tensors, self._tensors, strict=True):
            if known() is not tensor or tensor.dtype is not dtype or tensor.shape != shape:
                return None
            has_moved |= tensor.data_ptr() != address or not tensor.is_contiguous()
        rows = [
            (group, heading, tensor)
            for (group, heading), tensor in zip(self._rows, tensors, strict=True)
        ]
        return _Found(rows, *self._about, None, None if has_moved else self._places)


def _tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return parameters and buffers in the order of the modules, each once."""
    found = {
        id(tensor): tensor
        for module in modules_of(model)
        for tensors in (module._parameters, module._buffers)
        for tensor in tensors.values()
        if tensor is not None
    }
    return list(found.values())


def _heading(name: str, tensor: torch.Tensor) -> bytes:
    return f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode()


def _find(model: torch.nn.Module) -> _Found:
    tensors = _tensors_of(model)
    known = recall(model, "tensors")
    found: _Found | None = None if known is None else known.found(tensors)
    if found is not None:
        return found
    found = _look(model)
    is_plain = found.adapters is None and all(_is_plain(x) and not x.is_meta for x in tensors)
    if is_plain and len(found.rows) == len(tensors):
        replace_remembered(model, "tensors", _Known(tensors, found))
    return found


def _look(model: torch.nn.Module) -> _Found:
    modules = list(model.named_modules())
    adapters = _adapters(modules)
    # Releases of transformers have renamed it: embed_out became lm_head.
    head = model.get_output_embeddings()
    rows: list[tuple[str, bytes, torch.Tensor]] = []
    seen: set[int] = set()
    dtypes: set[str] = set()
    is_packed = False
    for path, module in modules:
        if module is head:
            path = _HEAD
        transient = module._non_persistent_buffers_set
        for tensors in (module._parameters, module._buffers):
            for local_name, tensor in tensors.items():
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                name = f"{path}.{local_name}" if path else local_name
                if adapters.skipped and name.startswith(adapters.skipped):
                    continue
                if tensor.is_meta:
                    tensor = _resident(module, local_name, name)
                name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
                if tensors is module._buffers and local_name in transient:
                    rows.append(("", _heading(name, tensor), tensor.detach()))
                    continue
                group = _group(name)
                for inner_name, inner in _plain_tensors(name, tensor):
                    is_packed |= inner is not tensor and inner_name != name
                    if tensors is module._parameters:
                        dtypes.add(str(inner.dtype).removeprefix("torch."))
                        is_packed |= not inner.is_floating_point()
                    rows.append((group, _heading(inner_name, inner), inner))
    for adapter, tensors_of_adapter in adapters.active.items():
        rows += [
            (f"adapter {adapter}", _heading(name, tensor), tensor.detach())
            for name, tensor in tensors_of_adapter
        ]
    has_adapters = bool(adapters.skipped or adapters.active or adapters.settings)
    return _Found(
        rows,
        "+".join(sorted(dtypes)),
        is_packed,
        tuple(adapters.settings) if has_adapters else None,
    )


def exact_parts(model: torch.nn.Module) -> tuple[dict[str, str], str]:
    """Return the exact part by group without the layout, and a key that also covers rope tables.

    The key tells whether this model object is still as it was. It is never stored: buffers that are
    not saved with a model (rotary frequencies, masks) differ between releases of transformers.
    """
    found = _find(model)
    digests: dict[str, Any] = {}
    places = found.places
    samples = _gather([x for _, _, x in found.rows]) if places is None else places.read()
    for (group, heading, _), numbers in zip(found.rows, samples, strict=True):
        digest = digests.get(group)
        if digest is None:
            digest = digests[group] = hashlib.sha256()
        digest.update(heading)
        digest.update(numbers)
    parts = {
        "dtype": found.dtypes,
        "quantisation": _quantisation(model) if found.is_packed else "none",
    }
    acting = []
    settings = hashlib.sha256("|".join(sorted(found.adapters or ())).encode()).hexdigest()[:16]
    for group, digest in digests.items():
        value = digest.hexdigest()[:16]
        if group.startswith("adapter "):
            acting.append(f"{group.removeprefix('adapter ')} {value}")
        elif group:
            parts[f"{_WEIGHTS}{group}"] = value
    parts["adapters"] = " + ".join([*acting, settings]) if acting else "none"
    transient_digest = digests[""].hexdigest() if "" in digests else ""
    key = hashlib.sha256(f"{json.dumps(parts, sort_keys=True)}{transient_digest}".encode())
    return parts, key.hexdigest()


def _is_here(tensor: torch.Tensor) -> bool:
    """Whether its numbers are in this memory one after the other; most are.

    Those can be read without torch, which takes ten times as long. A storage may have been emptied.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() > 0
    )


class _Places:
    """Where the samples are of tensors that are all in this memory, see `_is_here`."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._places = array("q")
        self._ends: list[int] = []
        end = 0
        for tensor in tensors:
            shape, n_bytes = tensor.shape, tensor.itemsize
            step, n_samples = _places(tensor.numel(), shape[-1] if shape else 1)
            self._places.extend((tensor.data_ptr(), step * n_bytes, n_samples, n_bytes))
            end += n_samples * n_bytes
            self._ends.append(end)

    def read(self) -> list[bytes]:
        """Return the samples of each tensor."""
        found = _core.samples(self._places)
        return [found[i:k] for i, k in itertools.pairwise([0, *self._ends])]


def _gather(tensors: list[torch.Tensor]) -> list[bytes]:
    """Return the samples of each tensor, moved to the CPU once per device and dtype."""
    out: list[bytes] = [b""] * len(tensors)
    batches: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[torch.Tensor]]] = {}
    here = []
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            if _is_here(tensor):
                here.append(index)
                continue
            batch = batches.setdefault((tensor.device, tensor.dtype), ([], []))
            batch[0].append(index)
            batch[1].append(_sample(tensor))
        for (_, dtype), (indices, samples) in batches.items():
            numbers = torch.cat(samples).view(torch.uint8).cpu().numpy().tobytes()
            start = 0
            for index, one in zip(indices, samples, strict=True):
                end = start + one.shape[0] * dtype.itemsize
                out[index] = numbers[start:end]
                start = end
    for index, sampled in zip(here, _Places([tensors[i] for i in here]).read(), strict=True):
        out[index] = sampled
    return out


def _quantisation(model: torch.nn.Module) -> str:
    """Return the name of the method that packed the weights."""
    settings = getattr(model.config, "quantization_config", None)
    method = (
        settings.get("quant_method")
        if isinstance(settings, dict)
        else getattr(settings, "quant_method", None)
    )
    return str(getattr(method, "value", method)) if method is not None else "packed"


# ----------------------------------------------------------------------------- the behavioural part
def _spread(tensor: torch.Tensor, n_samples: int) -> np.ndarray:
    """Return `n_samples` numbers from all over `tensor` as float32."""
    flat = tensor.detach().reshape(-1)
    golden = (np.arange(1, n_samples + 1) * 0.6180339887498949) % 1.0
    where = torch.from_numpy((golden * flat.numel()).astype(np.int64)).to(flat.device)
    return flat[where].float().cpu().numpy()


# Numbers of K of the lowest layer, of K of the highest, and of V of the highest.
_BEHAVIOUR_PARTS = (86, 85, 85)


def _behave(model: torch.nn.Module) -> tuple[np.ndarray, tuple[LayerShape, ...]]:
    """Run the fixed prompt; return the sampled K and V, and what each layer handed in."""
    config = text_config(model)
    own = own_layers(model)
    decoder, _ = decoder_layers(model)
    stored = cache_layers(config)
    cache = Recorder(config)
    with undisturbed(model):
        run_decoder(decoder, short_prompt(model, _N_PROMPT_TOKENS), cache)
    layout = []
    for index, is_own in enumerate(own):
        if not is_own or index not in cache.seen:
            layout.append(LayerShape("none"))
            continue
        keys, values = cache.key_value(index)
        is_sliding = isinstance(stored[index], SLIDING)
        window = int(stored[index].sliding_window) if is_sliding else 0
        layout.append(
            LayerShape(
                "sliding" if is_sliding else "full",
                window,
                keys.shape[1],
                keys.shape[-1],
                values.shape[-1],
            )
        )
    lowest, highest = min(cache.seen), max(cache.seen)
    tensors = (
        cache.key_value(lowest)[0],
        cache.key_value(highest)[0],
        cache.key_value(highest)[1],
    )
    numbers = [_spread(t, n) for t, n in zip(tensors, _BEHAVIOUR_PARTS, strict=True)]
    behaviour = np.concatenate(numbers).astype(np.float32)
    behaviour.flags.writeable = False
    return behaviour, tuple(layout)


def _describe(layout: tuple[LayerShape, ...]) -> str:
    """Return `layout` in words, equal neighbours together."""
    words: list[str] = []
    start = 0
    for index, layer in enumerate(layout):
        if index + 1 < len(layout) and layout[index + 1] == layer:
            continue
        span = f"{start}-{index}" if index > start else f"{index}"
        window = f" {layer.window}" if layer.kind == "sliding" else ""
        dims = f" {layer.n_heads}x{layer.key_dim}/{layer.value_dim}" if layer.n_heads else ""
        words.append(f"{span}: {layer.kind}{window}{dims}")
        start = index + 1
    return "; ".join(words)


def behaviour_distance(stored: np.ndarray, present: np.ndarray) -> float:
    """Return how far two behavioural parts are apart, relative to their size.

    Parameters
    ----------
    stored, present : numpy.ndarray
        float32 [256] each, as :class:`Fingerprint` has them.

    Returns
    -------
    float
        The largest of the three relative distances (lowest K, highest K, highest V), each the norm
        of the difference over the larger norm: 0 for the same model, about 1.4 for strangers,
        infinite when a number is not finite.

    Raises
    ------
    ValueError
        A shape is not (256,).

    Examples
    --------
    >>> import numpy as np
    >>> behaviour_distance(np.ones(256), np.full(256, 1.01)) < 0.011
    True
    """
    left = np.asarray(stored, dtype=np.float64)
    right = np.asarray(present, dtype=np.float64)
    for name, numbers in (("stored", left), ("present", right)):
        if numbers.shape != (_N_BEHAVIOUR,):
            raise ValueError(f"{name} is {numbers.shape} but must be ({_N_BEHAVIOUR},)")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return math.inf
    if np.array_equal(left, right):
        return 0.0
    worst = 0.0
    cuts = np.cumsum(_BEHAVIOUR_PARTS)[:-1]
    for one, other in zip(np.split(left, cuts), np.split(right, cuts), strict=True):
        size = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
        if size > 0:
            worst = max(worst, float(np.linalg.norm(one - other)) / size)
    return worst


def behaviour_tolerance(dtype: str) -> float:
    """Return the largest :func:`behaviour_distance` that still means the same model.

    Parameters
    ----------
    dtype : str
        The part ``dtype`` of a fingerprint.

    Notes
    -----
    The same float32 model gives 0 on another release of transformers and 2e-6 between attention
    implementations; a wrong rotary base gives 0.17 and a LoRA adapter at a hundredth of its scale
    0.009. So 0.005 lets the rounding of any device pass, TF32 included, and stops the rest. In 16
    bits 30 layers of rounding reach 0.03 between attention implementations: there the limit is 0.1,
    which still stops a wrong rotary base; weights and adapters are the exact part's concern.
    """
    return 5e-3 if dtype == "float32" else 1e-1


def check_fingerprint(stored: Fingerprint, present: Fingerprint) -> None:
    """Refuse a conversation that another model has written.

    Parameters
    ----------
    stored, present : Fingerprint
        Of the model that wrote the conversation, and of the one that is to go on with it.

    Raises
    ------
    krul.MismatchError
        They differ; the message says in what, with both values.
    """
    differences = []
    if stored.exact != present.exact:
        differences = _differences(stored.parts, present.parts)
        if not differences:
            differences = [f"the exact part is {stored.exact} stored and {present.exact} present"]
    else:
        distance = behaviour_distance(stored.behaviour, present.behaviour)
        tolerance = behaviour_tolerance(present.parts.get("dtype", ""))
        if not distance <= tolerance:
            differences = [
                f"behaviour differs: distance {distance:.2g} > {tolerance:g} on a fixed prompt, "
                "though the weights are the same (rotary base or scaling, a changed configuration)"
            ]
    if differences:
        raise MismatchError(
            "the conversation was stored by another model: " + "; ".join(differences)
        )


def _differences(stored: dict[str, Any], present: dict[str, str]) -> list[str]:
    """Return what differs in words; at most three groups of weights."""
    out = []
    for name, words in _WORDS.items():
        if name in stored and stored[name] != present[name]:
            out.append(f"{words}: {str(stored[name])[:200]} stored, {present[name]} present")
    # Another dtype changes every sample: naming the layers would say nothing more.
    if stored.get("dtype") != present["dtype"]:
        return out
    groups = [name for name in {**present, **stored} if name.startswith(_WEIGHTS)]
    changed = [name for name in groups if stored.get(name) != present.get(name)]
    if changed:
        shown = ", ".join(
            f"{name.removeprefix(_WEIGHTS)} ({stored.get(name, 'nothing')} stored, "
            f"{present.get(name, 'nothing')} present)"
            for name in changed[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        out.append(f"weights differ: {shown}{more}")
    return out
