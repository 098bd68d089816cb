"""Would the model still say the same? Its last tokens are run against the cache as stored.

Before a save is committed, the last P tokens of the conversation are fed twice: over the exact K/V
and over the K/V decoded from the blocks about to be stored. Mean Kullback-Leibler divergence and
top-1 agreement of the next-token distributions decide whether the codec is accepted. P tokens are
evidence, not proof: damage that only a later question would reveal is not seen.

Nothing of the decoded cache is kept: a layer is decoded when the model asks for it, into memory
that the next layer uses again.

The tokens before those tell something else: which tokens the model looks at.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from . import observe
from .estimator import Estimator
from .model import generation_model, input_device, text_config

__all__ = ["Guard", "Held", "Verdict"]

# Rows of the vocabulary compared at a time, to bound the float32 copies of large vocabularies.
_ROWS = 2

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the guard measured over `n_tokens` tokens; divergences in nats."""

    mean_kl: float
    max_kl: float
    top1: float
    n_tokens: int

    def accepts(self, max_kl: float, min_top1: float) -> bool:
        """Whether both targets are met; a verdict that measured nothing, or not a number, is no."""
        return self.n_tokens > 0 and self.mean_kl <= max_kl and self.top1 >= min_top1


class _PrefixLayer(DynamicLayer):
    """One layer that holds the tokens before the guard's, and is asked for them once."""

    def __init__(self, prefix: Callable[[], KeysAndValues], n_before: int, n_held: int) -> None:
        super().__init__()
        self.prefix, self.n_before, self.n_held = prefix, n_before, n_held
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to make: the prefix brings its own memory."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> KeysAndValues:
        """Return the held tokens followed by the new ones."""
        keys, values = self.prefix()
        return (
            torch.cat([keys, key_states.to(keys.dtype)], dim=-2),
            torch.cat([values, value_states.to(values.dtype)], dim=-2),
        )

    def get_seq_length(self) -> int:
        return self.n_before

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        if torch.is_tensor(query_length):  # up to transformers 5.3: the cache positions
            query_length = query_length.shape[0]
        return self.n_held + int(query_length), self.n_before - self.n_held

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12


def _cache_over(
    config: Any,
    prefixes: list[Callable[[], KeysAndValues] | None],
    n_before: int,
    n_held: list[int],
) -> DynamicCache:
    cache = DynamicCache(config=config)
    is_sliding = list(cache.is_sliding) if cache.layers else []
    while len(cache.layers) < len(prefixes):
        cache.layers.append(DynamicLayer())
        is_sliding.append(False)
    for index, prefix in enumerate(prefixes):
        if prefix is not None:
            layer = _PrefixLayer(prefix, n_before, n_held[index])
            layer.is_sliding = is_sliding[index]
            cache.layers[index] = layer
    return cache


@dataclass(frozen=True)
class Held:
    """K/V of the tokens before some position, layer by layer.

    Attributes
    ----------
    layers : list of callables, or None for a layer without K/V of its own
        Each returns keys and values, shape (n_batch, n_kv_heads, n_held, head_dim). The result is
        used before the next layer's function is called.
    n_held : list of int
        How many tokens each returns; fewer than the position for a sliding window.
    """

    layers: list[Callable[[], KeysAndValues] | None]
    n_held: list[int]


class Guard:
    """The last tokens of a conversation, to be run over its K/V.

    Parameters
    ----------
    model : transformers model
        In training mode it is switched to evaluation for each pass and back.
    token_ids : torch.Tensor
        int64, shape (n_batch, n_tokens): the whole conversation.
    attention_mask : torch.Tensor or None
        Shape (n_batch, n_tokens), 0 for padding; None when there is none.
    position_ids : torch.Tensor or None
        int64, shape (n_batch, n_tokens); None for 0, 1, 2, ...
    exact : callable
        Takes a position and returns the exact K/V before it, a `Held`.
    n_guard : int
        Tokens that `measure` runs; fewer than n_tokens.
    """

    def __init__(
        self,
        model: Any,
        *,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        exact: Callable[[int], Held],
        n_guard: int,
    ) -> None:
        self.model, self.exact, self.n_guard = model, exact, n_guard
        self.n_tokens = token_ids.shape[1]
        self.n_before = self.n_tokens - n_guard
        self._token_ids = token_ids
        self._mask = torch.ones_like(token_ids) if attention_mask is None else attention_mask
        self._positions = (
            torch.arange(self.n_tokens, device="cpu")[None]
            if position_ids is None
            else position_ids
        )
        self._expected: torch.Tensor | None = None

    def _inputs(self, start: int, end: int, held: Held) -> dict[str, Any]:
        device = input_device(self.model)
        return {
            "input_ids": self._token_ids[:, start:end].to(device),
            "attention_mask": self._mask[:, :end].to(device),
            "position_ids": self._positions[..., start:end].to(device),
            "past_key_values": _cache_over(
                text_config(self.model), held.layers, start, held.n_held
            ),
            "use_cache": True,
        }

    def _logits(self, held: Held) -> torch.Tensor:
        with _evaluating(self.model):
            return self.model(**self._inputs(self.n_before, self.n_tokens, held)).logits

    def measure(self, decoded: Held) -> Verdict:
        """Run the last tokens over the exact and over decoded K/V, and compare.

        Parameters
        ----------
        decoded : Held
            Before position ``n_tokens - n_guard``, as it would be restored.

        Returns
        -------
        Verdict
            Over all real tokens of all batches.

        Notes
        -----
        Costs a forward pass of `n_guard` tokens, another one the first time, whose logits are kept,
        and one decoding of the cache.
        """
        if self._expected is None:
            self._expected = self._logits(self.exact(self.n_before)).flatten(0, 1)
        after = self._logits(decoded).flatten(0, 1)
        is_real = self._mask[:, self.n_before :].reshape(-1).bool()
        return _compare(self._expected, after, is_real)

    def received(self, n_queries: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what attention each token gets from the tokens before those that `measure` runs.

        These have no say themselves: what they look at would be kept better than it deserves, and
        then be asked for by them alone.

        Parameters
        ----------
        n_queries : int
            Tokens to run, at least 1; `n_queries` and `n_guard` are fewer than n_tokens together.

        Returns
        -------
        received : numpy.ndarray
            float32, n_layers x (n_tokens - n_guard): attention mass, summed over heads, queries and
            batches; 0 in layers that could not be observed.
        n_seen : numpy.ndarray
            int64, n_tokens - n_guard: queries that each token is seen by.

        Raises
        ------
        krul.UnsupportedModelError
            The attention of this model cannot be observed.

        Notes
        -----
        Costs a forward pass of `n_queries` tokens and their attention once more.
        """
        start = self.n_before - n_queries
        seen = _Received(start)
        held = self.exact(start)
        inputs = self._inputs(start, self.n_before, held)
        if "logits_to_keep" in inspect.signature(generation_model(self.model).forward).parameters:
            inputs["logits_to_keep"] = 1  # nobody looks at them
        with (
            observe.install(self.model) as handle,
            observe.observing(seen, handle, n_past=start),  # type: ignore[arg-type]
            _evaluating(self.model),
        ):
            self.model(**inputs)
        received = np.zeros((len(held.layers), self.n_before), np.float32)
        for layer, found in seen.results().items():
            if layer < len(received):  # the cache may end before layers that read a lower one's
                received[layer] = found[: self.n_before]
        n_seen = np.minimum(n_queries, self.n_before - np.arange(self.n_before))
        return received, n_seen


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if was_training:
            model.train()


class _Received:
    """Takes an estimator's place: one for each layer, as layers are not to be compared."""

    def __init__(self, n_past: int) -> None:
        self.n_past = n_past
        self.by_layer: dict[int, Estimator] = {}

    def begin(self, n_past: int | None = None) -> None:
        pass

    def pick_rows(self, layer: int, n_queries: int) -> np.ndarray | None:
        if layer in self.by_layer:
            return None
        made = self.by_layer[layer] = Estimator(1, rows="all", decode_every=1)
        made.begin(self.n_past)
        return made.pick_rows(0, n_queries)

    def collect(self, layer: int, queries: Any, keys: Any, **options: Any) -> None:
        own = self.by_layer[layer]
        own.collect(0, queries, keys, **options)
        for other in self.by_layer.values():
            other.wait()  # so that keys of few layers are borrowed at a time
        own.finish()

    def finish(self) -> None:
        pass

    def abandon(self, reason: str | None = None) -> None:
        pass

    def results(self) -> dict[int, np.ndarray]:
        """Return what the tokens of each layer received."""
        found = {layer: each.result() for layer, each in self.by_layer.items()}
        return {layer: each.received[0] for layer, each in found.items() if each.n_prefill_rows > 0}


def _compare(before: torch.Tensor, after: torch.Tensor, is_real: torch.Tensor) -> Verdict:
    divergences, agreements = [], []
    for start in range(0, len(before), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = torch.log_softmax(before[rows].float(), dim=-1)
        log_q = torch.log_softmax(after[rows].float(), dim=-1)
        # Where p is 0 its term is 0, also when log p is -inf.
        terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
        divergences.append(terms.sum(-1))
        agreements.append(before[rows].argmax(-1) == after[rows].argmax(-1))
    divergence = torch.cat(divergences).cpu()[is_real.cpu()].clamp_min(0)
    agreement = torch.cat(agreements).cpu()[is_real.cpu()]
    n_tokens = int(divergence.numel())
    if n_tokens == 0:
        return Verdict(math.nan, math.nan, math.nan, 0)
    return Verdict(
        mean_kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top1=float(agreement.float().mean()),
        n_tokens=n_tokens,
    )
