"""Finding out by trying what works with a model: caching, observing, recomputing."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import UnsupportedModelError
from .fingerprint import Fingerprint, exact_parts, fingerprint_of
from .model import (
    Recorder,
    decoder_layers,
    generation_model,
    input_device,
    own_layers,
    remember,
    run_apart,
    run_decoder,
    short_prompt,
    support,
    text_config,
    undisturbed,
)
from .recompute import recompute_prefix

__all__ = ["Capabilities", "examine", "probe", "why_not_partial"]

_N_PROBE_TOKENS = 24
_N_HEAD_TOKENS = 12
# Of the deepest layer where each is recomputed for fewer tokens than the one below.
_N_FEWEST_TOKENS = 5


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
    partial : str or None
        So does running each layer over a shorter prefix than the layer below it, whole or in
        chunks: `krul.recompute.recompute_prefix`. Never None where `recompute` is not.
    """

    cache: str | None = None
    observe: str | None = None
    recompute: str | None = None
    partial: str | None = None


class _ModelError(Exception):
    """The model has raised, which says why something does not work now; that is not remembered.

    It may have been short of memory.
    """


def _failure(error: Exception) -> _ModelError:
    return _ModelError(f"the model fails on a short prompt: {type(error).__name__}: {error}")


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


def probe(model: Any) -> Capabilities:
    """Find out by trying what works with `model`.

    Three forwards of 12 to 24 tokens: whole, its head, and its tail on a copy of the head's cache;
    then one to see the queries, and three for parts of layers. The second call for an
    unchanged model object costs no forward.

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
        return Capabilities(reason, reason, reason, reason)
    inner = generation_model(model)
    key = exact_parts(inner)[1]
    found = _probe_once(inner, key)
    return found if found.recompute is not None else replace(found, partial=_partial(inner, key))


def examine(model: Any, *, is_supported: bool = False) -> tuple[Capabilities, Fingerprint]:
    """Return what :func:`probe` and :func:`fingerprint` do, looking at the weights once.

    But `partial` is not found out, and as `recompute`: most conversations are never recomputed in
    part, and :func:`why_not_partial` tells later.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`generation_model`.
    is_supported : bool
        `support` was asked a moment ago and gave no reason.

    Raises
    ------
    krul.UnsupportedModelError
        `support` gives a reason, or a parameter can be read nowhere.
    """
    reason = None if is_supported else support(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    inner = generation_model(model)
    parts, key = exact_parts(inner)
    return _probe_once(inner, key), fingerprint_of(inner, parts, key)


def why_not_partial(model: Any) -> str:
    """Return `Capabilities.partial` of a model that krul supports, or nothing where it is None.

    Three forwards of at most 24 tokens, the first time. May be called inside a forward pass of the
    same model.
    """
    inner = generation_model(model)
    key = exact_parts(inner)[1]
    found: list[str | None] = []

    def ask() -> None:
        found.append(_probe_once(inner, key).recompute or _partial(inner, key))

    run_apart(ask, input_device(inner))
    return found[0] or ""


def _partial(model: torch.nn.Module, key: str) -> str | None:
    def ask() -> str | None:
        decoder, _ = decoder_layers(model)
        wanted = {index for index, is_own in enumerate(own_layers(model)) if is_own}
        with undisturbed(model):
            ids = short_prompt(model, _N_PROBE_TOKENS)
            whole = Recorder(text_config(model))
            try:
                run_decoder(decoder, ids, whole)
            except Exception as error:  # whatever the model raises is its answer
                raise _failure(error) from error
            return _steps(model, ids, whole, wanted)

    implementation = getattr(text_config(model), "_attn_implementation", None)
    try:
        reason: str | None = remember(model, ("partial", key, implementation), ask)
    except _ModelError as error:
        return str(error)
    return reason


def _probe_once(model: torch.nn.Module, key: str) -> Capabilities:
    implementation = getattr(text_config(model), "_attn_implementation", None)
    try:
        return remember(model, ("probe", key, implementation), lambda: _probe(model))
    except _ModelError as error:
        reason = str(error)
        return Capabilities(reason, reason, reason, reason)


def _probe(model: torch.nn.Module) -> Capabilities:
    config = text_config(model)
    decoder, _ = decoder_layers(model)
    own = own_layers(model)
    wanted = {index for index, is_own in enumerate(own) if is_own}
    n_tokens, n_head = _N_PROBE_TOKENS, _N_HEAD_TOKENS
    with undisturbed(model):
        ids = short_prompt(model, n_tokens)
        try:
            head = Recorder(config)
            run_decoder(decoder, ids[:, :n_head], head)
            tail = copy.deepcopy(head)
            tail.seen = {}
            # In between, so that any state kept outside the cache is another one by then.
            whole = Recorder(config)
            hidden = run_decoder(decoder, ids, whole)
            reason = _arrival(whole, wanted, n_tokens) or _arrival(head, wanted, n_head)
            if reason is None:
                tail_hidden = run_decoder(decoder, ids[:, n_head:], tail)
                reason = _arrival(tail, wanted, n_tokens - n_head, n_before=n_head)
        except Exception as error:  # whatever the model raises is its answer
            raise _failure(error) from error
        if reason is not None:
            return Capabilities(reason, reason, reason, reason)

        recompute = _prefix(whole, head, wanted)
        cache = None
        if recompute is None:
            recompute = _continuation(whole, tail, hidden, tail_hidden, wanted, n_head)
            if recompute is not None:
                # Either the family disagrees with itself, or the copy lacked something.
                again = Recorder(config)
                run_decoder(decoder, ids[:, :n_head], again)
                straight = run_decoder(decoder, ids[:, n_head:], again)
                if not _is_alike(straight, tail_hidden)[0]:
                    cache = (
                        "the model keeps a state outside its cache: going on from a copy of the "
                        f"cache differs ({recompute})"
                    )
        observe = cache if cache is not None else _observe(model, decoder, ids, wanted)
        recompute = cache if cache is not None else recompute
    return Capabilities(cache, observe, recompute, recompute)


def _arrival(cache: Recorder, wanted: set[int], n_tokens: int, n_before: int = 0) -> str | None:
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


def _prefix(whole: Recorder, head: Recorder, wanted: set[int]) -> str | None:
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
    whole: Recorder,
    tail: Recorder,
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
            run_decoder(decoder, ids, Recorder(text_config(model)))
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # whatever the model raises is its answer
        raise _failure(error) from error
    missing = sorted(wanted - set(seen))
    return f"the attention of layers {missing} was not seen" if missing else None


def _steps(
    model: torch.nn.Module, ids: torch.Tensor, whole: Recorder, wanted: set[int]
) -> str | None:
    """Say whether K and V come out otherwise when each layer sees fewer tokens than the one below.

    From all tokens but one at the first layer down to a few at the deepest, whole and in two
    chunks, so that layers end within either chunk.
    """
    deepest = max(wanted)
    n_drop = _N_PROBE_TOKENS - 1 - _N_FEWEST_TOKENS
    n_by_layer = [0] * len(decoder_layers(model)[1])
    for layer in range(deepest + 1):
        n_by_layer[layer] = _N_PROBE_TOKENS - 1 - n_drop * layer // max(1, deepest)
    for chunk_tokens in (_N_PROBE_TOKENS, _N_HEAD_TOKENS):
        expected = {layer: whole.key_value(layer) for layer in wanted}
        found = {
            layer: (torch.full_like(keys, math.nan), torch.full_like(values, math.nan))
            for layer, (keys, values) in expected.items()
        }
        try:
            recompute_prefix(model, ids, n_by_layer, found, chunk_tokens=chunk_tokens)
        except UnsupportedModelError as error:
            return f"layers cannot be recomputed for different numbers of tokens: {error}"
        except Exception as error:  # whatever the model raises is its answer
            raise _ModelError(
                f"layers cannot be recomputed for different numbers of tokens: {error!r}"
            ) from error
        for layer in sorted(wanted):
            n_tokens = n_by_layer[layer]
            for name, left, right in zip("KV", expected[layer], found[layer], strict=True):
                alike, distance = _is_alike(left[..., :n_tokens, :], right[..., :n_tokens, :])
                if not alike:
                    return (
                        f"{name} of layer {layer} is {distance:.1e} away when layers are "
                        f"recomputed for different numbers of tokens, {chunk_tokens} at once"
                    )
    return None
