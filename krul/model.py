"""What krul asks of a model: where its layers are, and whether its cache can be kept at all.

Nothing here knows the name of a model: `support` reads what transformers itself derives from a
configuration. `krul.probe` runs a few short forwards and looks at what arrives, `krul.fingerprint`
tells which model it is; what the two need to run a model without leaving a trace is here too.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import DynamicCache, GenerationMixin
from transformers import cache_utils as _cache_utils

from .errors import UnsupportedModelError
from .layer import outside_autograd

__all__ = [
    "PAD_POSITION",
    "SLIDING",
    "Recorder",
    "cache_layers",
    "decoder_layers",
    "generation_model",
    "input_device",
    "is_dummy",
    "is_remembered",
    "layer_classes",
    "own_layers",
    "recall",
    "remember",
    "run_apart",
    "run_decoder",
    "short_prompt",
    "support",
    "text_config",
    "undisturbed",
    "unobserved",
]

_TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# The position that generate() gives to padding.
PAD_POSITION = 0 if _TRANSFORMERS >= (5, 0) else 1

# Layers without storage of their own; transformers up to 5.17 leaves them out of the cache instead.
_DummyLayer: type | None = getattr(_cache_utils, "DummyLayer", None)
_FULL = _cache_utils.DynamicLayer
SLIDING = _cache_utils.DynamicSlidingWindowLayer

_LAYER_TYPES = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "dummy", "moe", "mlp")
)

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


def modules_of(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield what ``module.modules()`` does, in its order, in a third of the time."""
    waiting: list[torch.nn.Module] = [module]
    seen: set[torch.nn.Module] = set()
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            if found._modules:
                waiting += [x for x in reversed(found._modules.values()) if x is not None]


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


def _known_layers(
    inner: torch.nn.Module, known: tuple[str, str, list[str]] | None
) -> tuple[torch.nn.Module, list[tuple[int, torch.nn.Module, torch.nn.Module]]] | None:
    """Look up what was found before; None where the model is no longer built like that."""
    if known is None:
        return None
    decoder_name, list_name, attention_names = known
    try:
        layers: Any = inner.get_submodule(list_name)
        if len(layers) != len(attention_names):
            return None
        rows = [
            (index, layer, layer.get_submodule(name))
            for index, (layer, name) in enumerate(zip(layers, attention_names, strict=True))
        ]
        decoder = inner.get_submodule(decoder_name)
    except (AttributeError, TypeError):
        return None
    is_same = all(_layer_index(attention) == index for index, _, attention in rows)
    return (decoder, rows) if is_same else None


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
    known = _known_layers(inner, recall(inner, "decoder layers"))
    if known is not None:
        return known
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
            # By name: what is remembered must not keep the model alive.
            names = {module: name for name, module in inner.named_modules()}
            paths = [(names[layer], names[attention]) for _, layer, attention in layers]
            list_name = paths[0][0].rpartition(".")[0]
            below = [attention.removeprefix(f"{layer}.") for layer, attention in paths]
            found = (names[decoder], list_name, below)
            remember(inner, "decoder layers", lambda found=found: found)  # type: ignore[misc]
            return decoder, layers
    raise UnsupportedModelError(
        f"{type(inner).__name__}: no list of decoder layers with one attention each was found"
    )


def cache_layers(config: Any) -> list[Any]:
    """Return the layers that transformers makes for `config`."""
    return list(DynamicCache(config=config).layers)


def is_dummy(layer: Any) -> bool:
    """Whether a cache layer stands for a decoder layer without K and V of its own."""
    return _DummyLayer is not None and isinstance(layer, _DummyLayer)


def own_layers(model: Any) -> list[bool]:
    """Return for each decoder layer whether it keeps K and V of its own.

    Layers that read the K and V of a lower layer, and layers without attention, do not.
    """
    config = text_config(model)
    layers = cache_layers(config)
    n_layers = config.num_hidden_layers
    return [i < len(layers) and not is_dummy(layers[i]) for i in range(n_layers)]


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
    stored = cache_layers(config)
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
def support(model: Any, made: DynamicCache | None = None) -> str | None:
    """Say why krul cannot keep the cache of `model`; None when nothing speaks against it.

    Only what is already known is read: no forward, no list of names. :func:`probe` asks further.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`.
    made : DynamicCache, optional
        What transformers made of the model's configuration just now; making one takes a while.

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
        layers = cache_layers(config) if made is None else made.layers
    except Exception as error:
        return f"DynamicCache(config=...) fails for {name}: {type(error).__name__}: {error}"
    attention = [layer for layer in layers if type(layer) in (_FULL, SLIDING)]
    foreign = sorted(
        {type(x).__name__ for x in layers if type(x) not in (_FULL, SLIDING) and not is_dummy(x)}
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
        if isinstance(module, GenerationMixin):
            break  # what wraps the model comes before it
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
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Run `model` without gradients, dropout or autocast, and leave no trace in it.

    The training flag of each module and the state of the random generators are put back.
    """
    device = input_device(model)
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


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Keep forward passes in this block from an estimator that watches this thread."""
    observe = sys.modules.get("krul.observe")
    if observe is None:
        yield
        return
    observe.push(None)
    try:
        yield
    finally:
        observe.pop()


def run_apart(function: Callable[[], None], device: torch.device) -> None:
    """Run `function`, which runs a model, so that nothing around the call has a part in it.

    No gradients, no inference mode, no autocast on `device`, no estimator. It has a context of its
    own, because this may happen inside another forward pass of the same model, whose recording of
    hidden states and attentions must not see it.
    """
    with (
        outside_autograd(),
        torch.autocast(device_type=device.type, enabled=False),
        unobserved(),
    ):
        contextvars.Context().run(function)


def input_device(model: torch.nn.Module) -> torch.device:
    """Return the device that token ids have to be on."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    planned = getattr(hook, "execution_device", None)
    if planned is not None:  # offloaded: the weights themselves are on "meta"
        return torch.device(planned)
    for parameter in embeddings.parameters():
        return parameter.device
    return torch.device("cpu")


def short_prompt(model: torch.nn.Module, n_tokens: int) -> torch.Tensor:
    """Return ids [1, n_tokens] that depend on the size of the vocabulary alone."""
    n_ids = text_config(model).vocab_size
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is not None and weight.dim() == 2 and weight.shape[0] > 0:
        n_ids = min(n_ids, weight.shape[0]) if not weight.is_meta else n_ids
    # Steps of the golden ratio spread over the vocabulary and never repeat early.
    ids = [int(math.modf((i + 1) * 0.6180339887498949)[0] * n_ids) for i in range(n_tokens)]
    return torch.tensor([ids], dtype=torch.long, device=input_device(model))


class Recorder(DynamicCache):
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


def run_decoder(decoder: torch.nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Feed `ids` and return the last hidden states [1, n_tokens, hidden]."""
    return decoder(input_ids=ids, past_key_values=cache, use_cache=True)[0]


# ----------------------------------------------------------------------- what was found out before
_remembered: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Any]] = (
    weakref.WeakKeyDictionary()
)
_remembered_lock = threading.Lock()


def is_remembered(model: torch.nn.Module, key: Any) -> bool:
    """Whether `remember` would give what it gave before."""
    with _remembered_lock:
        return key in _remembered.get(model, {})


def recall(model: torch.nn.Module, key: Any) -> Any:
    """Return what `remember` would give without making it, or None."""
    with _remembered_lock:
        return _remembered.get(model, {}).get(key)


def remember(model: torch.nn.Module, key: Any, make: Callable[[], Any]) -> Any:
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


def replace_remembered(model: torch.nn.Module, key: Any, value: Any) -> None:
    """Remember something else under a key; `recall` gives it."""
    with _remembered_lock:
        known = _remembered.setdefault(model, {})
        known.pop(key, None)
    remember(model, key, lambda: value)
