"""Would the model still say the same? Its last tokens are run against the cache as stored.

Before a save is committed, the last P tokens of the conversation are fed twice: over the exact K/V
and over the K/V decoded from the blocks about to be stored. Mean Kullback-Leibler divergence and
top-1 agreement of the next-token distributions decide whether the codec is accepted. P tokens are
evidence, not proof: damage that only a later question would reveal is not seen.

Nothing of the decoded cache is kept: a layer is decoded when the model asks for it, into memory
that the next layer uses again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .model import input_device, text_config

__all__ = ["Verdict", "measure"]

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


def _logits(model: Any, cache: DynamicCache, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(past_key_values=cache, use_cache=True, **inputs).logits


def measure(
    model: Any,
    *,
    token_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    n_guard: int,
    n_held: list[int],
    exact: list[Callable[[], KeysAndValues] | None],
    decoded: list[Callable[[], KeysAndValues] | None],
) -> Verdict:
    """Run the last `n_guard` tokens over the exact and over the decoded K/V and compare.

    Parameters
    ----------
    model : transformers model
        In training mode it is switched to evaluation for the two passes and back.
    token_ids : torch.Tensor
        int64, shape (n_batch, n_tokens): the whole conversation.
    attention_mask : torch.Tensor or None
        Shape (n_batch, n_tokens), 0 for padding; None when there is none.
    position_ids : torch.Tensor or None
        int64, shape (n_batch, n_tokens); None for 0, 1, 2, ...
    n_guard : int
        Tokens to run, at least 1 and fewer than n_tokens.
    n_held : list of int
        For each layer, how many of the tokens before the guard's its functions return; fewer than
        ``n_tokens - n_guard`` for a sliding window.
    exact, decoded : list of callables, or None for a layer without K/V of its own
        Each returns keys and values, shape (n_batch, n_kv_heads, n_held, head_dim). The result is
        used before the next layer's function is called.

    Returns
    -------
    Verdict
        Over all real tokens of all batches.

    Notes
    -----
    Costs two forward passes of `n_guard` tokens, and one decoding of the cache.
    """
    n_tokens = token_ids.shape[1]
    n_before = n_tokens - n_guard
    device = input_device(model)
    mask = torch.ones_like(token_ids) if attention_mask is None else attention_mask
    positions = torch.arange(n_tokens, device="cpu")[None] if position_ids is None else position_ids
    inputs = {
        "input_ids": token_ids[:, n_before:].to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions[..., n_before:].to(device),
    }
    config = text_config(model)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            before = _logits(model, _cache_over(config, exact, n_before, n_held), inputs)
            after = _logits(model, _cache_over(config, decoded, n_before, n_held), inputs)
    finally:
        if was_training:
            model.train()
    is_real = mask[:, n_before:].reshape(-1).bool()
    return _compare(before.flatten(0, 1), after.flatten(0, 1), is_real)


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
