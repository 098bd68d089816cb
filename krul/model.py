"""What krul asks of a model: where its layers are, what works with it, and which model it is.

Nothing here knows the name of a model. `support` reads what transformers itself derives from a
configuration, `probe` runs a few short forwards and looks at what arrives, and `fingerprint`
samples the weights and what the model makes of a fixed prompt.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, GenerationMixin
from transformers import cache_utils as _cache_utils

from .errors import MismatchError, UnsupportedModelError

__all__ = [
    "Capabilities",
    "Fingerprint",
    "LayerShape",
    "behaviour_distance",
    "behaviour_tolerance",
    "check_fingerprint",
    "decoder_layers",
    "examine",
    "fingerprint",
    "generation_model",
    "layer_classes",
    "own_layers",
    "probe",
    "support",
    "text_config",
]

_TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Layers without storage of their own; transformers up to 5.17 leaves them out of the cache instead.
_DummyLayer: type | None = getattr(_cache_utils, "DummyLayer", None)
_FULL = _cache_utils.DynamicLayer
_SLIDING = _cache_utils.DynamicSlidingWindowLayer

_LAYER_TYPES = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "dummy", "moe", "mlp")
)

_N_PROBE_TOKENS = 24
_N_HEAD_TOKENS = 12
_N_PROMPT_TOKENS = 16
_N_SAMPLES = 64
_N_BEHAVIOUR = 256
_N_REMEMBERED = 8


# -------------------------------------------------------------------------------- finding the parts
def generation_model(model: Any) -> torch.nn.Module:
    """Return the transformers model inside wrappers of PEFT, ``torch.compile`` or the like.

    Parameters
    ----------
    model : torch.nn.Module
        A model with ``generate``, or a module that contains one.

    Returns
    -------
    torch.nn.Module
        The outermost module that is a ``transformers.GenerationMixin``.

    Raises
    ------
    krul.UnsupportedModelError
        There is none.
    """
    if isinstance(model, torch.nn.Module):
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                return module
    raise UnsupportedModelError(
        f"model is {type(model).__name__} but must be, or contain, a transformers model with "
        "generate(), such as AutoModelForCausalLM gives"
    )


def text_config(model: Any) -> Any:
    """Return the configuration of the text decoder, which for most models is ``model.config``."""
    return generation_model(model).config.get_text_config(decoder=True)


# How attention modules call their index: nearly all, gpt_neo, and dbrx before transformers 5.
_INDEX_NAMES = ("layer_idx", "layer_id", "block_idx")


def _layer_index(module: torch.nn.Module) -> int | None:
    for name in _INDEX_NAMES:
        index = getattr(module, name, None)
        if isinstance(index, int) and not isinstance(index, bool):
            return index
    return None


def _attention_of(layer: torch.nn.Module) -> torch.nn.Module | None:
    """Return the one innermost attention module below `layer` that knows its index."""
    found = []
    for module in layer.modules():
        name = type(module).__name__.lower()
        is_attention = ("attn" in name or "attention" in name) and module is not layer
        if is_attention and _layer_index(module) is not None:
            found.append(module)
    inner = [m for m in found if not any(o is not m and o in set(m.modules()) for o in found)]
    return inner[0] if len(inner) == 1 else None


def _find_layers(
    decoder: torch.nn.Module,
) -> list[tuple[int, torch.nn.Module, torch.nn.Module]]:
    """Return the longest list of modules whose element i holds the attention with index i."""
    best: list[tuple[int, torch.nn.Module, torch.nn.Module]] = []
    for modules in decoder.modules():
        if not isinstance(modules, torch.nn.ModuleList) or len(modules) <= len(best):
            continue
        rows = []
        for index, layer in enumerate(modules):
            attention = _attention_of(layer)
            if attention is None or _layer_index(attention) != index:
                break
            rows.append((index, layer, attention))
        else:
            best = rows
    return best


def decoder_layers(
    model: Any,
) -> tuple[torch.nn.Module, list[tuple[int, torch.nn.Module, torch.nn.Module]]]:
    """Return the decoder, and for each of its layers the index, the layer and its attention.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`.

    Returns
    -------
    decoder : torch.nn.Module
        What turns token ids into hidden states and fills the cache; it has no language-model head.
    layers : list of (int, torch.nn.Module, torch.nn.Module)
        In layer order.

    Raises
    ------
    krul.UnsupportedModelError
        No list of modules was found whose element i holds exactly one attention with index i.
    """
    inner = generation_model(model)
    candidates: list[Any] = []
    if hasattr(inner, "get_decoder"):
        # It has been seen to return the head (modernbert-decoder), hence the other candidates.
        candidates.append(inner.get_decoder())
    candidates += [getattr(inner, inner.base_model_prefix or "model", None), inner]
    for decoder in candidates:
        if not isinstance(decoder, torch.nn.Module) or isinstance(decoder, torch.nn.Linear):
            continue
        layers = _find_layers(decoder)
        if layers:
            return decoder, layers
    raise UnsupportedModelError(
        f"{type(inner).__name__}: no list of decoder layers with one attention each was found"
    )


def _cache_layers(config: Any) -> list[Any]:
    """Return the layers that transformers makes for `config`."""
    return list(DynamicCache(config=config).layers)


def _is_dummy(layer: Any) -> bool:
    return _DummyLayer is not None and isinstance(layer, _DummyLayer)


def own_layers(model: Any) -> list[bool]:
    """Return for each decoder layer whether it keeps K and V of its own.

    Layers that read the K and V of a lower layer, and layers without attention, do not.
    """
    config = text_config(model)
    layers = _cache_layers(config)
    n_layers = config.num_hidden_layers
    return [i < len(layers) and not _is_dummy(layers[i]) for i in range(n_layers)]


def layer_classes(model: Any) -> list[int]:
    """Return a number for each decoder layer; equal numbers mean layers of one kind.

    K carries the rotation of its position, so K and V may be shared only between layers with the
    same rotary base, window, shapes and scale. Two layers are of one kind when their attention
    modules have the same class, the same parameter shapes, the same plain attributes (such as
    ``sliding_window``, ``scaling``, ``use_rope``) but for their own index, equal small buffers, and
    the same entry in every list of the configuration that has one per layer, such as
    ``layer_types``. When in doubt the answer is "different".

    Returns
    -------
    list of int
        One per layer, numbered from 0 in order of first appearance; -1 for a layer without K and V
        of its own.
    """
    config = text_config(model)
    n_layers = config.num_hidden_layers
    lists = [
        (name, value)
        for name, value in sorted(config.to_dict().items())
        if isinstance(value, (list, tuple)) and len(value) == n_layers
    ]
    stored = _cache_layers(config)
    own = own_layers(model)
    numbers: dict[Any, int] = {}
    classes = []
    for index, _, attention in decoder_layers(model)[1]:
        if index >= len(own) or not own[index]:
            classes.append(-1)
            continue
        plain = tuple(
            sorted(
                (name, repr(value))
                for name, value in vars(attention).items()
                if isinstance(value, (bool, int, float, str, type(None)))
                and name not in (*_INDEX_NAMES, "training")
                and not name.startswith("_")
            )
        )
        shapes = tuple(
            (name, tuple(tensor.shape))
            for name, tensor in attention.named_parameters()
            if "lora_" not in name
        )
        buffers = tuple(
            (name, tensor.detach().float().cpu().numpy().tobytes())
            for name, tensor in attention.named_buffers()
            if tensor.numel() <= 4096 and not tensor.is_meta
        )
        key = (
            type(attention),
            plain,
            shapes,
            buffers,
            tuple((name, repr(value[index])) for name, value in lists),
            type(stored[index]),
            getattr(stored[index], "sliding_window", None),
        )
        classes.append(numbers.setdefault(key, len(numbers)))
    return classes


# ---------------------------------------------------------------------------- may it be kept at all
def support(model: Any) -> str | None:
    """Say why krul cannot keep the cache of `model`; None when nothing speaks against it.

    Only what is already known is read: no forward, no list of names. :func:`probe` asks further.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`.

    Returns
    -------
    str or None
        The reason, and what to use instead.
    """
    try:
        inner = generation_model(model)
    except UnsupportedModelError as error:
        return str(error)
    name = type(inner).__name__
    if getattr(inner.config, "is_encoder_decoder", False):
        return (
            f"{name} is an encoder-decoder model, whose cross-attention cache belongs to one "
            "input; use a decoder-only model, or keep transformers' EncoderDecoderCache in memory"
        )
    learned = _prompt_learning(model)
    if learned is not None:
        return (
            f"{name} runs with the PEFT prompt-learning adapter {learned!r}, which puts K and V "
            "before the conversation that no token id stands for; use LoRA or disable the adapter"
        )
    config = text_config(model)
    types = getattr(config, "layer_types", None)
    if getattr(inner, "_is_stateful", False) and (_TRANSFORMERS < (5, 4) or types is None):
        return (
            f"{name} keeps a recurrent state besides attention, which cannot be cut at a token; "
            "use transformers' own cache in memory"
        )
    takes_dynamic_cache = getattr(inner, "_supports_default_dynamic_cache", None)
    if takes_dynamic_cache is not None and not takes_dynamic_cache():
        return f"{name} does not take a DynamicCache; use the cache that it makes itself"
    foreign = sorted({str(kind) for kind in types or ()} - _LAYER_TYPES)
    if foreign:
        return (
            f"{name} has layers of type {', '.join(foreign)}, whose state is not K and V per "
            "token; use transformers' own cache in memory"
        )
    try:
        layers = _cache_layers(config)
    except Exception as error:
        return f"DynamicCache(config=...) fails for {name}: {type(error).__name__}: {error}"
    attention = [layer for layer in layers if type(layer) in (_FULL, _SLIDING)]
    foreign = sorted(
        {type(x).__name__ for x in layers if type(x) not in (_FULL, _SLIDING) and not _is_dummy(x)}
    )
    if foreign:
        return (
            f"{name} needs cache layers of class {', '.join(foreign)}, which krul does not store; "
            "use transformers' own cache in memory"
        )
    if not attention:
        return f"{name} has no attention layer whose K and V a cache would hold"
    try:
        _, modules = decoder_layers(model)
    except UnsupportedModelError as error:
        return str(error)
    if len(modules) != config.num_hidden_layers:
        return (
            f"{name}: {len(modules)} decoder layers were found but the configuration names "
            f"{config.num_hidden_layers}"
        )
    return None


def _prompt_learning(model: Any) -> str | None:
    """Return the name of an active PEFT adapter that adds virtual tokens."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict) or not hasattr(module, "base_model_torch_dtype"):
            continue
        active = getattr(module, "active_adapter", None)
        config = configs.get(active) if isinstance(active, str) else None
        if getattr(config, "is_prompt_learning", False):
            return active
    return None


# ---------------------------------------------------------------------------- running it for a look
@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` without gradients, dropout or autocast, and leave no trace in it.

    The training flag of each module and the state of the random generators are put back.
    """
    device = _device(model)
    accelerators = [device] if device.type not in ("cpu", "meta") else []
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with (
            torch.random.fork_rng(devices=accelerators, device_type=device.type)
            if accelerators
            else torch.random.fork_rng(devices=[]),
            torch.autocast(device.type, enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def _device(model: torch.nn.Module) -> torch.device:
    """Return the device that token ids have to be on."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    planned = getattr(hook, "execution_device", None)
    if planned is not None:  # offloaded: the weights themselves are on "meta"
        return torch.device(planned)
    for parameter in embeddings.parameters():
        return parameter.device
    return torch.device("cpu")


def _prompt(model: torch.nn.Module, n_tokens: int) -> torch.Tensor:
    """Return ids [1, n_tokens] that depend on the size of the vocabulary alone."""
    n_ids = text_config(model).vocab_size
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is not None and weight.dim() == 2 and weight.shape[0] > 0:
        n_ids = min(n_ids, weight.shape[0]) if not weight.is_meta else n_ids
    # Steps of the golden ratio spread over the vocabulary and never repeat early.
    ids = [int(math.modf((i + 1) * 0.6180339887498949)[0] * n_ids) for i in range(n_tokens)]
    return torch.tensor([ids], dtype=torch.long, device=_device(model))


class _Recorder(DynamicCache):
    """A plain dynamic cache that also notes what each layer handed in."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __bool__(self) -> bool:
        return True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Note K and V, then store them."""
        self.seen.setdefault(layer_idx, []).append((key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def key_value(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all that `layer` handed in, [n_batch, n_heads, n_tokens, head_dim] each."""
        keys, values = zip(*self.seen[layer], strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


def _run(decoder: torch.nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Feed `ids` and return the last hidden states [1, n_tokens, hidden]."""
    return decoder(input_ids=ids, past_key_values=cache, use_cache=True)[0]


# ---------------------------------------------------------------------------------------- the probe
@dataclass(frozen=True)
class Capabilities:
    """What works with a model; each field is None, or the reason why it does not.

    Attributes
    ----------
    cache : str or None
        The K and V of every layer arrive through ``Cache.update`` with the lengths that were fed,
        and a copy of the cache is all that is needed to go on.
    observe : str or None
        The queries of every layer can be seen while the model runs.
    recompute : str or None
        Running the model over a prefix gives the K and V that the cache holds for it.
    """

    cache: str | None = None
    observe: str | None = None
    recompute: str | None = None


def _tolerance(tensor: torch.Tensor) -> float:
    """Return how far two correct runs may be apart, relative to the norm of a token's numbers.

    Tiny float32 models agree to 1e-5 and 30 layers of bfloat16 to a few per cent; a wrong mask or
    position gives about 1.
    """
    return 2e-2 if tensor.dtype in (torch.float32, torch.float64) else 2e-1


def _is_alike(left: torch.Tensor, right: torch.Tensor) -> tuple[bool, float]:
    """Compare [..., n_tokens, dim] token by token; a quarter of the tokens may differ.

    That allowance is for mixtures of experts in 16 bits, where a tie can send one token elsewhere.
    """
    if left.shape != right.shape:
        return False, math.inf
    n_tokens = left.shape[-2]
    first = left.transpose(-2, 0).reshape(n_tokens, -1).float()
    second = right.transpose(-2, 0).reshape(n_tokens, -1).float()
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return False, math.inf
    scale = first.norm(dim=1).clamp_min(1e-9)
    distance = float(((first - second).norm(dim=1) / scale).quantile(0.75))
    return distance <= _tolerance(left), distance


_remembered: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)
_remembered_lock = threading.Lock()


def _is_remembered(model: torch.nn.Module, key: Any) -> bool:
    with _remembered_lock:
        return key in _remembered.get(model, {})


def _remember(model: torch.nn.Module, key: Any, make: Callable[[], Any]) -> Any:
    """Return what was made for this model object in this state before, or make it."""
    with _remembered_lock:
        known = _remembered.setdefault(model, {})
        if key in known:
            return known[key]
    value = make()
    with _remembered_lock:
        while len(known) >= _N_REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = value
    return value


def probe(model: Any) -> Capabilities:
    """Find out by trying what works with `model`.

    Three forwards of 12 to 24 tokens: whole, its head, and its tail on a copy of the head's cache.
    The second call for an unchanged model object costs no forward.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`. Its training flags, and the state of the random generators,
        are as before when this returns.

    Returns
    -------
    Capabilities
        All fields carry the reason of :func:`support` when that gives one.
    """
    reason = support(model)
    if reason is not None:
        return Capabilities(reason, reason, reason)
    inner = generation_model(model)
    return _probe_once(inner, _exact_parts(inner)[1])


def examine(model: Any) -> tuple[Capabilities, Fingerprint]:
    """Return what :func:`probe` and :func:`fingerprint` do, looking at the weights once.

    Raises
    ------
    krul.UnsupportedModelError
        `support` gives a reason, or a parameter can be read nowhere.
    """
    reason = support(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    inner = generation_model(model)
    parts, key = _exact_parts(inner)
    return _probe_once(inner, key), _fingerprint_of(inner, parts, key)


def _probe_once(model: torch.nn.Module, key: str) -> Capabilities:
    implementation = getattr(text_config(model), "_attn_implementation", None)
    return _remember(model, ("probe", key, implementation), lambda: _probe(model))


def _probe(model: torch.nn.Module) -> Capabilities:
    config = text_config(model)
    decoder, _ = decoder_layers(model)
    own = own_layers(model)
    wanted = {index for index, is_own in enumerate(own) if is_own}
    n_tokens, n_head = _N_PROBE_TOKENS, _N_HEAD_TOKENS
    with _undisturbed(model):
        ids = _prompt(model, n_tokens)
        try:
            head = _Recorder(config)
            _run(decoder, ids[:, :n_head], head)
            tail = copy.deepcopy(head)
            tail.seen = {}
            # In between, so that any state kept outside the cache is another one by then.
            whole = _Recorder(config)
            hidden = _run(decoder, ids, whole)
            reason = _arrival(whole, wanted, n_tokens) or _arrival(head, wanted, n_head)
            if reason is None:
                tail_hidden = _run(decoder, ids[:, n_head:], tail)
                reason = _arrival(tail, wanted, n_tokens - n_head, n_before=n_head)
        except Exception as error:  # whatever the model raises is its answer
            reason = f"the model fails on a short prompt: {type(error).__name__}: {error}"
        if reason is not None:
            return Capabilities(reason, reason, reason)

        recompute = _prefix(whole, head, wanted)
        cache = None
        if recompute is None:
            recompute = _continuation(whole, tail, hidden, tail_hidden, wanted, n_head)
            if recompute is not None:
                # Either the family disagrees with itself, or the copy lacked something.
                again = _Recorder(config)
                _run(decoder, ids[:, :n_head], again)
                straight = _run(decoder, ids[:, n_head:], again)
                if not _is_alike(straight, tail_hidden)[0]:
                    cache = (
                        "the model keeps a state outside its cache: going on from a copy of the "
                        f"cache differs ({recompute})"
                    )
        observe = cache if cache is not None else _observe(model, decoder, ids, wanted)
    return Capabilities(cache, observe, cache if cache is not None else recompute)


def _arrival(cache: _Recorder, wanted: set[int], n_tokens: int, n_before: int = 0) -> str | None:
    """Say which layers did not hand in the K and V of `n_tokens` tokens."""
    if set(cache.seen) != wanted:
        missing = sorted(wanted - set(cache.seen))
        extra = sorted(set(cache.seen) - wanted)
        return (
            f"layers {missing} hand no K and V to Cache.update"
            if missing
            else f"layers {extra} hand K and V to Cache.update but should have none"
        )
    for layer, calls in cache.seen.items():
        fed = [
            (k.shape[-2] if k.dim() == 4 else -1, v.shape[-2] if v.dim() == 4 else -1)
            for k, v in calls
        ]
        if fed != [(n_tokens, n_tokens)]:
            return f"layer {layer} handed in K and V of {fed} tokens when {n_tokens} were fed"
    n_cached = int(cache.get_seq_length())
    if n_cached != n_before + n_tokens:
        return f"the cache holds {n_cached} tokens after {n_before + n_tokens} were fed"
    return None


def _prefix(whole: _Recorder, head: _Recorder, wanted: set[int]) -> str | None:
    """Say whether the first tokens come out otherwise when later ones are there too."""
    n_head = _N_HEAD_TOKENS
    for layer in sorted(wanted):
        for name, left, right in zip(
            "KV", whole.key_value(layer), head.key_value(layer), strict=True
        ):
            alike, distance = _is_alike(left[..., :n_head, :], right)
            if not alike:
                return (
                    f"{name} of layer {layer} depends on later tokens: a prefix of {n_head} tokens "
                    f"alone is {distance:.1e} away from the same in {_N_PROBE_TOKENS} tokens"
                )
    return None


def _continuation(
    whole: _Recorder,
    tail: _Recorder,
    hidden: torch.Tensor,
    tail_hidden: torch.Tensor,
    wanted: set[int],
    n_head: int,
) -> str | None:
    """Say whether going on from a cache differs from one forward without any."""
    for layer in sorted(wanted):
        for name, left, right in zip(
            "KV", whole.key_value(layer), tail.key_value(layer), strict=True
        ):
            alike, distance = _is_alike(left[..., n_head:, :], right)
            if not alike:
                return (
                    f"{name} of layer {layer} is {distance:.1e} away from a forward without a cache"
                )
    alike, distance = _is_alike(hidden[:, n_head:], tail_hidden)
    if not alike:
        return f"the hidden states are {distance:.1e} away from a forward without a cache"
    return None


def _observe(
    model: torch.nn.Module, decoder: torch.nn.Module, ids: torch.Tensor, wanted: set[int]
) -> str | None:
    """Say which layers' queries cannot be seen."""
    from . import observe

    try:
        with observe.watch(model) as seen:
            _run(decoder, ids, _Recorder(text_config(model)))
    except UnsupportedModelError as error:
        return str(error)
    missing = sorted(wanted - set(seen))
    return f"the attention of layers {missing} was not seen" if missing else None


# -------------------------------------------------------------------------------- which model it is
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
    return _fingerprint_of(inner, *_exact_parts(inner))


def _fingerprint_of(inner: torch.nn.Module, parts: dict[str, str], key: str) -> Fingerprint:
    if not _is_remembered(inner, ("behaviour", key)):
        behaviour = _behave(inner)
        # PEFT unmerges a merged adapter at the first forward that runs with it disabled.
        parts, key = _exact_parts(inner)
        _remember(inner, ("behaviour", key), lambda: behaviour)
    numbers, layout = _remember(inner, ("behaviour", key), lambda: _behave(inner))
    parts["layout"] = _describe(layout)
    exact = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Fingerprint(exact, numbers, parts, layout)


# ----------------------------------------------------------------------------------- the exact part
@functools.lru_cache(maxsize=4096)
def _step(n_elements: int, row_length: int) -> int:
    """Return a stride for 64 samples that visits every column of a matrix alike.

    A multiple of the row length would look at one column alone.
    """
    step = max(1, n_elements // _N_SAMPLES)
    while math.gcd(step, row_length) != 1:
        step -= 1
    return step


_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return at most 64 numbers of `tensor` as integers of the same bits, [n_samples]."""
    n_elements = tensor.numel()
    step = _step(n_elements, tensor.shape[-1] if tensor.dim() else 1) if n_elements else 1
    n_samples = min(_N_SAMPLES, n_elements)
    if tensor.is_contiguous():
        samples = tensor.as_strided((n_samples,), (step,), tensor.storage_offset())
    else:
        where = torch.arange(n_samples, device=tensor.device) * step
        samples = torch.take(tensor, where)
    if samples.is_complex():
        samples = torch.view_as_real(samples).flatten()
    return samples.view(_AS_INTEGER[samples.element_size()])


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that `tensor` is made of: quantised weights carry their scales along."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(
        tensor, "__tensor_flatten__"
    ):
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
        return
    yield name, tensor.detach()
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


def _exact_parts(model: torch.nn.Module) -> tuple[dict[str, str], str]:
    """Return the exact part by group without the layout, and a key that also covers rope tables.

    The key tells whether this model object is still as it was. It is never stored: buffers that are
    not saved with a model (rotary frequencies, masks) differ between releases of transformers.
    """
    modules = list(model.named_modules())
    adapters = _adapters(modules)
    # Releases of transformers have renamed it: embed_out became lm_head.
    head = model.get_output_embeddings()
    rows: list[tuple[str, str, torch.Tensor]] = []  # group, name, tensor
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
                    rows.append(("", name, tensor.detach()))
                    continue
                group = _group(name)
                for inner_name, inner in _plain_tensors(name, tensor):
                    is_packed |= inner is not tensor and inner_name != name
                    if tensors is module._parameters:
                        dtypes.add(str(inner.dtype).removeprefix("torch."))
                        is_packed |= not inner.is_floating_point()
                    rows.append((group, inner_name, inner))
    for adapter, tensors_of_adapter in adapters.active.items():
        rows += [(f"adapter {adapter}", name, t.detach()) for name, t in tensors_of_adapter]

    digests: dict[str, Any] = {}
    for (group, name, tensor), numbers in zip(rows, _gather([row[2] for row in rows]), strict=True):
        digest = digests.get(group)
        if digest is None:
            digest = digests[group] = hashlib.sha256()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(numbers)
    parts = {
        "dtype": "+".join(sorted(dtypes)),
        "quantisation": _quantisation(model) if is_packed else "none",
    }
    acting = []
    settings = hashlib.sha256("|".join(sorted(adapters.settings)).encode()).hexdigest()[:16]
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


def _gather(tensors: list[torch.Tensor]) -> list[bytes]:
    """Return the samples of each tensor, moved to the CPU once per device and element size."""
    out: list[bytes] = [b""] * len(tensors)
    batches: dict[tuple[torch.device, int], tuple[list[int], list[torch.Tensor]]] = {}
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            samples = _sample(tensor)
            batch = batches.setdefault((tensor.device, samples.element_size()), ([], []))
            batch[0].append(index)
            batch[1].append(samples)
        for (_, n_bytes), (indices, samples) in batches.items():
            numbers = torch.cat(samples).cpu().numpy().tobytes()
            start = 0
            for index, one in zip(indices, samples, strict=True):
                end = start + one.numel() * n_bytes
                out[index] = numbers[start:end]
                start = end
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
    stored = _cache_layers(config)
    cache = _Recorder(config)
    with _undisturbed(model):
        _run(decoder, _prompt(model, _N_PROMPT_TOKENS), cache)
    layout = []
    for index, is_own in enumerate(own):
        if not is_own or index not in cache.seen:
            layout.append(LayerShape("none"))
            continue
        keys, values = cache.key_value(index)
        is_sliding = isinstance(stored[index], _SLIDING)
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
