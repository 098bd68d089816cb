"""What HCache keeps in place of K and V: each layer's input, and how both are made from it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import krul

__all__ = ["Rotation", "layer_inputs", "make_layer"]

#: Cosine and sine of every token, as the model makes them.
Rotation = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def layer_inputs(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], Rotation]:
    """Run a Llama-like model; return what each layer was given, and the rotation of its tokens."""
    hidden: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return hidden, model.model.rotary_emb(hidden[0], positions)


@torch.no_grad()
def make_layer(
    model: Any, layer: int, states: torch.Tensor, rotation: Rotation, cache: krul.Cache
) -> None:
    """Make K and V of a layer from its input, (1, n_tokens, hidden), into a cache's room for it."""
    block = model.model.layers[layer]
    normed = block.input_layernorm(states)
    shape = (1, states.shape[1], -1, block.self_attn.head_dim)
    keys = block.self_attn.k_proj(normed).view(shape).transpose(1, 2)
    values = block.self_attn.v_proj(normed).view(shape).transpose(1, 2)
    keys, _ = apply_rotary_pos_emb(keys, keys, *rotation)
    for buffer, made in zip(cache.layers[layer]._buffers, (keys, values), strict=True):
        buffer[:, :, : states.shape[1]].copy_(made)
