"""Recomputing the beginning of a history: shallow layers for many tokens, deep ones for few.

K and V of a layer depend on the layers below and on the tokens before, on nothing else. So when the
first n tokens of layer l are to be recomputed, and no more of any layer above, the hidden states
can be cut to n at layer l: what is left out would have been needed only by what is left out as
well. The model's own decoder layers do the work. They are handed a cache that writes into the
caller's tensors, and a hook before each layer cuts its arguments.

The masks, rotary tables and positions that a model hands to its layers keep the length of what was
fed, at every layer; only the hidden states arrive as the layer below has left them. Arguments are
therefore cut against the length that was fed.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .errors import DeviceError, DTypeError, ShapeError, UnsupportedModelError
from .model import (
    PAD_POSITION,
    decoder_layers,
    generation_model,
    input_device,
    own_layers,
    run_apart,
    support,
    text_config,
)

__all__ = ["recompute_prefix"]

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def recompute_prefix(
    model: Any,
    token_ids: torch.Tensor,
    n_by_layer: Sequence[int],
    buffers: Mapping[int, KeysAndValues],
    *,
    attention_mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    chunk_tokens: int = 1024,
    chunk_ends: Sequence[int] = (),
    before_chunk: Callable[[int, int], Sequence[int]] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> None:
    """Run the model over the first tokens of a history and write their K and V.

    Parameters
    ----------
    model : torch.nn.Module
        A decoder-only transformers model in evaluation mode, or a wrapper of one.
    token_ids : torch.Tensor
        int64, shape (n_batch, n_tokens), on any device; n_tokens at least ``n_by_layer[0]``.
    n_by_layer : sequence of int
        How many tokens, from the first, each decoder layer is recomputed for. No layer may have
        more than the one below it.
    buffers : mapping of int to (torch.Tensor, torch.Tensor)
        K and V by layer index, each (n_batch, n_kv_heads, n_room, head_dim) with the dtype and the
        device that the model gives them, n_room at least the layer's number. Tokens from that
        number on are left as they are. A layer that is not here gets memory for the time of the
        call; it is computed all the same, because the layers above need it.
    attention_mask : torch.Tensor, optional
        Shape (n_batch, n_tokens), any integer or bool dtype, 0 for padding.
    positions : torch.Tensor, optional
        int64, last axis n_tokens. By default they count the tokens that are not padding, which is
        what `generate` does. They must be those that the history was run with: one that was fed
        with a mask but without positions has had 0, 1, 2, ...
    chunk_tokens : int
        Tokens fed at once; bounds the memory of activations.
    chunk_ends : sequence of int
        Tokens after which a chunk ends in any case, ascending.
    before_chunk : callable, optional
        Called with where a chunk starts and ends; returns `n_by_layer` anew, with other numbers up
        to those that were given, though what was written stays written and a layer that has let a
        chunk pass gets no more. What it raises ends the call.
    on_layer : callable, optional
        Called with a layer's index as soon as all its tokens are written, in the thread of this
        call, once for each layer of `buffers` with tokens to recompute. Shallow layers come first
        where all is one chunk. What it raises ends the call.

    Raises
    ------
    UnsupportedModelError
        The model keeps more than K and V, is in training mode, or its layers cannot be run on parts
        of what was fed; the message says why. Nothing was written, but for models whose layers are
        found to be called in an unknown way only while they run.
    ShapeError
        The tokens, the mask, the positions, the number of layers or a buffer do not fit.
    ValueError
        `n_by_layer` increases or is negative, `chunk_tokens` is not positive.
    DTypeError, DeviceError
        A buffer is not of the dtype, or not on the device, of the model's K or V.

    Notes
    -----
    Costs about ``sum(n_by_layer)`` divided by tokens times layers of a whole prefill: nothing runs
    above the K and V of the deepest layer that has any. Besides the buffers it takes the memory of
    one chunk's activations, and of the layers that have none. Numbers equal those of a whole
    prefill up to the rounding of matrix products of other shapes. After an exception from the
    running model the first tokens of every buffer are undefined.

    The model may serve other threads meanwhile: the hooks act on this call's own pass alone, and
    are gone when it returns. The call may also be made inside a forward pass of the same model.

    Examples
    --------
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
    ...                 intermediate_size=16)).eval()
    >>> ids, known = torch.tensor([[3, 1, 4, 1, 5]]), DynamicCache(config=model.config)
    >>> with torch.no_grad():
    ...     _ = model(ids, past_key_values=known)
    >>> buffers = {layer: (torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 5, 8)) for layer in range(2)}
    >>> recompute_prefix(model, ids, [4, 2], buffers, on_layer=print)
    0
    1
    >>> torch.allclose(buffers[1][0][:, :, :2], known.layers[1].keys[:, :, :2], atol=1e-6)
    True
    >>> bool(buffers[1][0][:, :, 2:].any())
    False
    """
    reason = support(model)
    if reason is not None:
        raise UnsupportedModelError(reason)
    inner = generation_model(model)
    decoder, layers = decoder_layers(inner)
    wanted = [operator.index(n_tokens) for n_tokens in n_by_layer]
    _check_numbers(wanted, len(layers), chunk_tokens)
    _check_inputs(token_ids, attention_mask, positions, wanted[0])
    _check_room(buffers, wanted, token_ids.shape[0])
    if wanted[0] == 0:
        return
    progress = _Progress(wanted, buffers, chunk_tokens, sorted(chunk_ends), on_layer)
    _refuse(inner, progress)
    sink = _Sink(text_config(inner), progress)
    device = input_device(inner)

    def run() -> None:
        inputs = _Inputs(decoder, token_ids, attention_mask, positions, device)
        start = 0
        while start < progress.most[0]:
            end = progress.end_of_chunk(start)
            if before_chunk is not None:
                progress.change(before_chunk(start, end), start)
                end = min(end, progress.wanted[0])
                if start >= end:
                    break
            progress.begin(start, end - start)
            with contextlib.suppress(_Done):
                decoder(past_key_values=sink, use_cache=True, **inputs.between(start, end))
            progress.check()
            start = end

    hooks: list[Any] = []
    try:
        for index, layer, _ in layers:
            hook = _before_layer(sink, progress, index, layer)
            hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        run_apart(run, device)
    finally:
        for handle in hooks:
            handle.remove()


# ---- what may be asked ---------------------------------------------------------------------------


def _check_numbers(wanted: list[int], n_layers: int, chunk_tokens: int) -> None:
    if len(wanted) != n_layers:
        raise ShapeError(f"n_by_layer has {len(wanted)} numbers but the model {n_layers} layers")
    if min(wanted) < 0:
        raise ValueError(f"n_by_layer is {wanted} but no number may be negative")
    for index, (lower, upper) in enumerate(itertools.pairwise(wanted)):
        if upper > lower:
            raise ValueError(
                f"n_by_layer is {upper} for layer {index + 1} but {lower} for layer {index}: a "
                "layer cannot be recomputed for more tokens than the one below it"
            )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens} but must be at least 1")


def _check_inputs(
    token_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    n_wanted: int,
) -> None:
    if token_ids.dim() != 2:
        raise ShapeError(f"token_ids is {tuple(token_ids.shape)} but must be (batch, tokens)")
    if token_ids.shape[1] < n_wanted:
        raise ShapeError(
            f"token_ids has {token_ids.shape[1]} tokens but n_by_layer asks for {n_wanted}"
        )
    if attention_mask is not None and attention_mask.shape != token_ids.shape:
        raise ShapeError(
            f"attention_mask is {tuple(attention_mask.shape)} but token_ids "
            f"is {tuple(token_ids.shape)}"
        )
    if positions is not None and positions.shape[-1] != token_ids.shape[1]:
        raise ShapeError(
            f"positions is {tuple(positions.shape)} but token_ids is {tuple(token_ids.shape)}"
        )


def _check_room(buffers: Mapping[int, KeysAndValues], wanted: list[int], n_batch: int) -> None:
    for layer, pair in buffers.items():
        if not 0 <= layer < len(wanted):
            raise ShapeError(
                f"buffers has layer {layer} but the model layers 0 to {len(wanted) - 1}"
            )
        for name, buffer in zip(("keys", "values"), pair, strict=True):
            if buffer.dim() != 4 or buffer.shape[0] != n_batch or buffer.shape[2] < wanted[layer]:
                raise ShapeError(
                    f"{name} of layer {layer} has room {tuple(buffer.shape)} but must be "
                    f"({n_batch}, heads, at least {wanted[layer]} tokens, head_dim)"
                )


def _refuse(inner: torch.nn.Module, progress: _Progress) -> None:
    """Raise what can be known without running the model."""
    name = type(inner).__name__
    if inner.training:
        raise UnsupportedModelError(
            f"{name} is in training mode, which drops numbers at random; call model.eval() first"
        )
    own = own_layers(inner)
    deepest = progress.deepest_above(0)
    without = [layer for layer in range(deepest) if not own[layer]]
    if without or not own[deepest]:
        raise UnsupportedModelError(
            f"{name}: layers {without or [deepest]} keep no K and V of their own, so layer "
            f"{deepest} cannot be recomputed in part"
        )
    if progress.is_stepped and text_config(inner)._attn_implementation == "flex_attention":
        raise UnsupportedModelError(_BLOCK_MASK.format(name))


_BLOCK_MASK = (
    "{}: the block masks of flex_attention cannot be cut, so layers cannot be recomputed for "
    "different numbers of tokens; use attn_implementation='sdpa'"
)


_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


class _Inputs:
    """What the decoder is fed, in chunks."""

    def __init__(
        self,
        decoder: torch.nn.Module,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        accepted = inspect.signature(inspect.unwrap(type(decoder).forward)).parameters
        self.takes_cache_positions = "cache_position" in accepted  # up to transformers 5.3
        self.device, self.ids = device, token_ids
        mask = None if attention_mask is None else (attention_mask != 0).long()
        if mask is not None and bool(mask.all()):
            mask = None  # a model need not make a mask where there is nothing to mask
        self.mask, self.positions = mask, positions
        if positions is None and mask is None:
            self.positions = torch.arange(token_ids.shape[1], device="cpu")[None]
        elif positions is None and mask is not None:
            self.positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, PAD_POSITION)
        if "position_ids" not in accepted:  # then the model makes its own from the mask
            self.positions = None
        # What the user records of passes is not to be recorded of this one. Left to itself,
        # transformers 4 replaces methods for that and does not put them back after an exception.
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        config = getattr(decoder, "config", None)
        self.options = {
            name: False
            for name in _RECORDED
            if getattr(config, name, False) and (takes_any or name in accepted)
        }

    def between(self, start: int, end: int) -> dict[str, Any]:
        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # There are models that add to the positions they are given, in place.
            return tensor.clone(memory_format=torch.contiguous_format).to(self.device)

        inputs: dict[str, Any] = {**self.options, "input_ids": copy(self.ids[:, start:end])}
        if self.mask is not None:
            inputs["attention_mask"] = copy(self.mask[:, :end])
        if self.positions is not None:
            inputs["position_ids"] = copy(self.positions[..., start:end])
        if self.takes_cache_positions:
            inputs["cache_position"] = torch.arange(start, end, device=self.device)
        return inputs


# ---- the pass ------------------------------------------------------------------------------------


class _Done(Exception):  # noqa: N818
    """Ends a forward pass: K and V of the deepest layer that is wanted are in hand.

    The only way out of every decoder: some reshape at their end to what they were fed, and no
    attention takes zero tokens. Not a BaseException, so that hooks which are always to be called
    are called.
    """


class _Progress:
    """How far each layer is, and where its K and V go."""

    def __init__(
        self,
        wanted: list[int],
        buffers: Mapping[int, KeysAndValues],
        chunk_tokens: int,
        chunk_ends: Sequence[int],
        on_layer: Callable[[int], None] | None,
    ) -> None:
        self.wanted, self.most, self.on_layer = list(wanted), tuple(wanted), on_layer
        self.chunk_tokens, self.chunk_ends = chunk_tokens, chunk_ends
        self.buffers: dict[int, KeysAndValues] = dict(buffers)
        self.announced = frozenset(buffers)
        self.n_written = [0] * len(wanted)
        # Of the chunk that is being run.
        self.start = self.n_fed = self.deepest = 0
        self.failure: Exception | None = None
        # Whether some layer sees only a part of a chunk.
        ends = set(self._ends())
        self.is_stepped = any(n_tokens and n_tokens not in ends for n_tokens in wanted)

    def _ends(self) -> Iterator[int]:
        end = 0
        while end < self.most[0]:
            end = self.end_of_chunk(end)
            yield end

    def end_of_chunk(self, start: int) -> int:
        """Return where the chunk that begins at `start` ends."""
        end = min(self.most[0], start + self.chunk_tokens)
        return min((x for x in self.chunk_ends if start < x < end), default=end)

    def change(self, wanted: Sequence[int], start: int) -> None:
        """Recompute so much from now on, before the chunk that begins at `start`."""
        for layer, n_tokens in enumerate(wanted):
            n_written = self.n_written[layer]
            most = self.most[layer] if n_written == start else n_written
            self.wanted[layer] = min(most, max(n_tokens, n_written))

    def deepest_above(self, n_tokens: int) -> int:
        """Return the deepest layer that is wanted for more than `n_tokens` tokens."""
        return max(layer for layer, n in enumerate(self.wanted) if n > n_tokens)

    def begin(self, start: int, n_fed: int) -> None:
        """Turn to the chunk of `n_fed` tokens from `start` on."""
        self.start, self.n_fed, self.deepest = start, n_fed, self.deepest_above(start)

    def n_here(self, layer: int) -> int:
        """Return how many tokens of the chunk `layer` is to see."""
        return max(0, min(self.wanted[layer] - self.start, self.n_fed))

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeysAndValues:
        """Store K and V of a chunk; return all that the layer has by now."""
        n_new = self.n_here(layer)
        shapes = [tuple(keys.shape), tuple(values.shape)]
        if any(len(shape) != 4 or shape[2] != n_new for shape in shapes):
            raise UnsupportedModelError(
                f"layer {layer} hands in K and V of shapes {shapes[0]} and {shapes[1]} where "
                f"{n_new} tokens were fed to it"
            )
        if self.n_written[layer] != self.start:
            raise UnsupportedModelError(f"layer {layer} hands in K and V twice in one pass")
        if layer not in self.buffers:
            n_room = self.most[layer]
            self.buffers[layer] = (
                keys.new_empty((*keys.shape[:2], n_room, keys.shape[3])),
                values.new_empty((*values.shape[:2], n_room, values.shape[3])),
            )
        pair = self.buffers[layer]
        for name, buffer, states in zip(("keys", "values"), pair, (keys, values), strict=True):
            _check_alike(f"{name} of layer {layer}", buffer, states)
        end = self.start + n_new
        for buffer, states in zip(pair, (keys, values), strict=True):
            buffer[:, :, self.start : end].copy_(states)
        self.n_written[layer] = end
        if end == self.wanted[layer] and layer in self.announced and self.on_layer is not None:
            self.on_layer(layer)
        return pair[0][:, :, :end], pair[1][:, :, :end]

    def check(self) -> None:
        """Raise where a layer has let the chunk pass without handing in K and V."""
        missing = [
            layer
            for layer in range(len(self.wanted))
            if self.n_here(layer) > 0 and self.n_written[layer] != self.start + self.n_here(layer)
        ]
        if missing:
            raise UnsupportedModelError(f"layers {missing} hand no K and V to Cache.update")


def _check_alike(name: str, buffer: torch.Tensor, states: torch.Tensor) -> None:
    # A copy would broadcast, convert and move, silently.
    held, made = tuple(buffer.shape), tuple(states.shape)
    if (held[0], held[1], held[3]) != (made[0], made[1], made[3]):
        raise ShapeError(
            f"{name} have room {held} but the model makes {made} (batch, heads, tokens, head_dim)"
        )
    if buffer.dtype != states.dtype:
        raise DTypeError(f"{name} have room of {buffer.dtype} but the model makes {states.dtype}")
    if buffer.device != states.device:
        raise DeviceError(f"{name} have room on {buffer.device} but are made on {states.device}")


class _SinkLayer(DynamicLayer):
    """Answers for one layer of a `_Sink` what masks and positions are made from.

    A sliding window is a matter of the mask alone here: what has left the window is still held.
    """

    def __init__(self, progress: _Progress, is_sliding: bool) -> None:
        super().__init__()
        self.progress, self.is_sliding = progress, is_sliding
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.progress.start

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        if torch.is_tensor(query_length):  # up to transformers 5.3: the positions of the new tokens
            query_length = query_length.shape[0]
        return self.progress.start + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12


class _Sink(DynamicCache):
    """The cache of a recomputing pass: it keeps nothing but writes on."""

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(self, config: Any, progress: _Progress) -> None:
        super().__init__(config=config)
        n_layers = len(progress.wanted)
        is_sliding = [bool(getattr(layer, "is_sliding", False)) for layer in self.layers]
        is_sliding += [False] * (n_layers - len(is_sliding))
        self.layer_class_to_replicate = None
        self.layers = [_SinkLayer(progress, flag) for flag in is_sliding]
        self.progress = progress

    def __bool__(self) -> bool:
        return True

    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> KeysAndValues:
        """Write K and V of new tokens; return those of all, or end the pass."""
        progress = self.progress
        try:
            held = progress.write(layer_idx, key_states, value_states)
        except Exception as error:
            # transformers 4 takes a TypeError for its own and runs the decoder again.
            if progress.failure is None:
                progress.failure = error
            raise progress.failure from None
        if layer_idx == progress.deepest:
            raise _Done
        return held


def _before_layer(
    sink: _Sink, progress: _Progress, index: int, layer: torch.nn.Module
) -> Callable[..., Any]:
    """Return the hook that cuts the arguments of one decoder layer."""
    parameters = inspect.signature(inspect.unwrap(type(layer).forward)).parameters
    names = [name for name in parameters if name != "self"]

    @torch.compiler.disable
    def before(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        # torch adds and removes a hook in two steps. Another thread that runs the same layer in
        # between calls it like one without keywords.
        if kwargs is None:
            return None
        if not any(value is sink for value in (*args, *kwargs.values())):
            return None
        n_kept = progress.n_here(index)
        if n_kept == 0:
            raise _Done  # only where the layer below was not seen, which `check` reports
        hidden = args[0] if args else kwargs.get("hidden_states")
        if progress.is_stepped and (not torch.is_tensor(hidden) or hidden.dim() != 3):
            found = tuple(hidden.shape) if torch.is_tensor(hidden) else type(hidden).__name__
            raise UnsupportedModelError(
                f"{type(module).__name__} is fed with {found} where hidden states of shape "
                "(batch, tokens, hidden) can be cut: it cannot be recomputed for fewer tokens than "
                "the layer below it"
            )
        if n_kept == progress.n_fed:
            return None
        cut = _Cut(n_kept, progress)
        # Named by their place; further positional arguments, of which there are none, by nothing.
        places = [*names, *[""] * len(args)]
        new_args = tuple(cut(value, name) for value, name in zip(args, places, strict=False))
        new_kwargs = {name: cut(value, name) for name, value in kwargs.items()}
        # These alone may be shorter than what was fed.
        if args:
            return (hidden[:, :n_kept], *new_args[1:]), new_kwargs
        return (), {**new_kwargs, "hidden_states": hidden[:, :n_kept]}

    return before


class _Cut:
    """Cuts what has the length of the chunk to the tokens that a layer is to see."""

    def __init__(self, n_kept: int, progress: _Progress) -> None:
        self.n_kept, self.n_fed = n_kept, progress.n_fed
        self.n_keys = progress.start + n_kept

    def __call__(self, value: Any, name: str) -> Any:
        if type(value) is dict:  # masks or rotary tables by kind of layer
            return {key: self(part, name) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(part, name) for part in value)
        if type(value).__name__ == "BlockMask":
            raise UnsupportedModelError(_BLOCK_MASK.format("the model"))
        return self._cut_tensor(value, name) if torch.is_tensor(value) else value

    def _cut_tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if "mask" in name:
            if tensor.dim() == 4:
                return tensor[:, :, : self.n_kept, : self.n_keys]
            return tensor[:, : self.n_keys] if tensor.dim() == 2 else tensor
        if name == "alibi":  # one bias for each key
            return tensor[..., : self.n_keys]
        if "position_ids" in name or name == "cache_position":
            axis = -1
        elif "position_embeddings" in name or name in ("cos", "sin"):
            axis = -2
        else:
            axis = 1
        is_long = tensor.dim() > 1 or axis == -1
        if is_long and tensor.shape[axis] == self.n_fed:
            return tensor.narrow(axis, 0, self.n_kept)
        return tensor
