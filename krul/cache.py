"""A transformers cache that can be saved, is restored layer by layer, and knows its own tokens.

`Cache` is a `DynamicCache`: every layer whose class is exactly `DynamicLayer` is replaced by a
`KrulLayer`, which keeps K and V in buffers that grow instead of concatenating at every token.
Layers of any other class (sliding windows, placeholders) stay what transformers made them, so that
masks and model-specific state keep their contracts.

A restore fills the buffers while the model already runs: whatever needs the numbers of a layer
waits for that layer, and whatever needs only its length (masks, positions) does not.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import inspect
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import CorruptionError, KrulError, MismatchError, ShapeError
from .reports import RestoreReport, SaveReport
from .settings import Settings

__all__ = ["Cache", "KrulLayer", "LayerSnapshot", "Snapshot"]

# A buffer starts with room for this many tokens more than it is given, and grows by half.
_HEADROOM_TOKENS = 64
_GROWTH = 1.5

# Tokens fed at once when a history is recomputed; bounds the memory of activations.
_RECOMPUTE_CHUNK = 1024

_KEYS, _VALUES = 0, 1


def _outside_autograd() -> contextlib.ExitStack:
    """Enter a state in which new tensors are ordinary ones that autograd does not follow.

    A tensor made under `torch.inference_mode` can never be written outside of it again.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


# ---- one layer -----------------------------------------------------------------------------------


class KrulLayer(DynamicLayer):
    """One layer's K and V in buffers that grow.

    Attributes
    ----------
    keys, values : torch.Tensor or None
        Shape (n_batch, n_kv_heads, n_tokens, head_dim): views of the buffers. Assigning adopts the
        tensor, so that code which replaces them (beam search, offloading, pruning) keeps working.
        A view taken before `crop` shows the tokens that are written after it.
    pending : object or None
        While a restore fills the buffers: its ``wait()`` returns when they are full, or raises.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, **kwargs: Any) -> None:
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._lengths = [0, 0]
        # Whether the buffer is this layer's own, so that it may be written in place.
        self._is_owned = [False, False]
        # Tokens below this index are being read by a save and are not overwritten.
        self._n_protected = [0, 0]
        self.pending: Any = None
        super().__init__()
        self.is_initialized = False  # transformers 4.56 does not set it

    # -- storage --

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """Return K of all tokens; waits for a restore."""
        return self._view(_KEYS)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._adopt(_KEYS, tensor)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Return V of all tokens; waits for a restore."""
        return self._view(_VALUES)

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._adopt(_VALUES, tensor)

    def _view(self, which: int) -> torch.Tensor | None:
        self.wait()
        buffer = self._buffers[which]
        return None if buffer is None else buffer[:, :, : self._lengths[which]]

    def _adopt(self, which: int, tensor: torch.Tensor | None) -> None:
        self.wait()
        if tensor is not None and tensor.dim() != 4:
            tensor = None  # transformers writes "nothing yet" as an empty tensor of one dimension
        self._put(which, tensor, 0 if tensor is None else tensor.shape[-2], is_owned=False)

    def _put(self, which: int, buffer: torch.Tensor | None, n_tokens: int, is_owned: bool) -> None:
        self._buffers[which] = buffer
        self._lengths[which] = n_tokens
        self._is_owned[which] = is_owned
        self._n_protected[which] = 0

    def wait(self) -> None:
        """Return when a restore has filled this layer.

        Raises
        ------
        CorruptionError, OSError
            The layer could neither be read nor be recomputed.
        """
        pending = self.pending
        if pending is not None:
            pending.wait()
            self.pending = None

    def allocate(
        self,
        key_shape: Sequence[int],
        value_shape: Sequence[int],
        key_dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for tokens that somebody else will write, and count them as held.

        Parameters
        ----------
        key_shape, value_shape : sequence of int
            (n_batch, n_kv_heads, n_tokens, head_dim); only head_dim may differ between the two.

        Returns
        -------
        tuple of torch.Tensor
            Views of the two buffers with these shapes, not contiguous across heads, unwritten.
        """
        views = []
        for which, (shape, dtype) in enumerate(
            ((key_shape, key_dtype), (value_shape, value_dtype))
        ):
            n_batch, n_heads, n_tokens, head_dim = shape
            with _outside_autograd():
                buffer = torch.empty(
                    (n_batch, n_heads, n_tokens + _HEADROOM_TOKENS, head_dim),
                    dtype=dtype,
                    device=device,
                )
            self._put(which, buffer, n_tokens, is_owned=True)
            views.append(buffer[:, :, :n_tokens])
        self.dtype, self.device = key_dtype, views[0].device
        self.is_initialized = True
        return views[0], views[1]

    def take(self, keys: torch.Tensor, values: torch.Tensor, n_tokens: int) -> None:
        """Own these buffers, whose first `n_tokens` tokens are written or about to be.

        Parameters
        ----------
        keys, values : torch.Tensor
            Shape (n_batch, n_kv_heads, n_room, head_dim), n_room at least `n_tokens`.
        """
        for which, buffer in enumerate((keys, values)):
            self._put(which, buffer, n_tokens, is_owned=True)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def _fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write K and V over the tokens that are held, whatever `pending` says."""
        with _outside_autograd():
            for which, tensor in enumerate((keys, values)):
                n_tokens = self._lengths[which]
                target = self._buffers[which][:, :, :n_tokens]
                source = tensor[:, :, :n_tokens]
                if target.shape != source.shape:
                    raise ShapeError(
                        f"a recomputed layer has shape {tuple(source.shape)} "
                        f"but the stored one {tuple(target.shape)}"
                    )
                target.copy_(source)

    # -- what models and generate() call --

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Note dtype and device; transformers 4 passes keys alone."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens and return K and V of all.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            Shape (n_batch, n_kv_heads, n_new, head_dim), any float dtype.

        Returns
        -------
        tuple of torch.Tensor
            Views with all tokens; a dtype that differs from the held one is promoted as
            `torch.cat` would.

        Raises
        ------
        ShapeError
            n_batch, n_kv_heads or head_dim differ from what is held.

        Notes
        -----
        Copies the new tokens only, except where the buffer must grow. With gradients enabled it
        concatenates as `DynamicLayer` does, because a buffer written in place has no history.
        """
        self.wait()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(_KEYS, key_states, "key_states")
        self._check(_VALUES, value_states, "value_states")
        return self._append(_KEYS, key_states), self._append(_VALUES, value_states)

    def _check(self, which: int, states: torch.Tensor, name: str) -> None:
        buffer = self._buffers[which]
        if buffer is None or self._lengths[which] == 0:
            return
        held, given = buffer.shape, states.shape
        if held[0] != given[0] or held[1] != given[1] or held[3] != given[3]:
            # Writing in place would broadcast silently where torch.cat refuses.
            raise ShapeError(
                f"{name} is {tuple(given)} but the cache holds {self._lengths[which]} tokens of "
                f"{tuple(held[:2])} x {held[3]} (batch, heads, head_dim)"
            )
        if buffer.device != states.device:
            raise ShapeError(f"{name} is on {states.device} but the cache is on {buffer.device}")

    def _append(self, which: int, states: torch.Tensor) -> torch.Tensor:
        buffer, n_held, n_new = self._buffers[which], self._lengths[which], states.shape[-2]
        n_tokens = n_held + n_new
        if n_held == 0 and buffer is not None and not _is_alike(buffer, states):
            buffer = None
        dtype = states.dtype
        if buffer is not None and buffer.dtype != dtype:
            dtype = torch.promote_types(buffer.dtype, dtype)
        if torch.is_grad_enabled():
            held = [] if n_held == 0 else [buffer[:, :, :n_held].to(dtype)]
            joined = torch.cat([*held, states.to(dtype)], dim=-2)
            self._put(which, joined, n_tokens, is_owned=False)
            return joined
        if (
            buffer is None
            or buffer.dtype != dtype
            or n_tokens > buffer.shape[-2]
            or not self._is_owned[which]
            or n_held < self._n_protected[which]
        ):
            n_room = n_tokens + _HEADROOM_TOKENS
            if n_held > 0:
                n_room = max(n_room, int(n_tokens * _GROWTH))
            buffer = self._move(which, states, dtype, n_room)
        with torch.no_grad():
            buffer[:, :, n_held:n_tokens].copy_(states)
        self._lengths[which] = n_tokens
        return buffer[:, :, :n_tokens]

    def _move(
        self, which: int, states: torch.Tensor, dtype: torch.dtype, n_room: int
    ) -> torch.Tensor:
        """Take a new buffer with room for `n_room` tokens, and keep what is held."""
        old, n_held = self._buffers[which], self._lengths[which]
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty(
                (states.shape[0], states.shape[1], n_room, states.shape[3]),
                dtype=dtype,
                device=states.device,
            )
            if n_held > 0:
                buffer[:, :, :n_held].copy_(old[:, :, :n_held])
        self._put(which, buffer, n_held, is_owned=True)
        return buffer

    def get_seq_length(self) -> int:
        """Return the number of tokens held; known before their numbers are."""
        return self._lengths[_KEYS]

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Return the length that a mask for `query_length` new tokens must have, and its offset."""
        if torch.is_tensor(query_length):  # up to transformers 5.3: the positions of the new tokens
            query_length = query_length.shape[0]
        return self._lengths[_KEYS] + int(query_length), 0

    def get_max_length(self) -> int:
        """Return -1: there is no longest length."""
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.12

    def crop(self, tokens_to_remove: int = 0) -> None:
        """Drop tokens from the end: a negative number of them, or down to a positive length.

        Nothing is copied or waited for: a layer that is still being filled only shows less of it.
        """
        n_held = self._lengths[_KEYS]
        n_left = _length_after_crop(n_held, int(tokens_to_remove))
        if n_left == n_held or not self.is_initialized:
            return
        for which in (_KEYS, _VALUES):
            self._lengths[which] = min(self._lengths[which], n_left)

    def reset(self) -> None:
        """Forget all tokens and free the buffers."""
        if self.pending is not None:
            # What arrives is not wanted any more, but nobody may write into freed memory.
            with contextlib.suppress(Exception):
                self.pending.wait()
            self.pending = None
        for which in (_KEYS, _VALUES):
            self._put(which, None, 0, is_owned=False)
        self.is_initialized = False

    # -- rows --

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace the batch by the rows `beam_idx` of it; one copy, none if the order stays."""
        if self.get_seq_length() == 0:
            return
        self.wait()
        if beam_idx.device.type == "cpu" and torch.equal(
            beam_idx, torch.arange(self._buffers[_KEYS].shape[0])
        ):
            return
        if torch.is_grad_enabled():
            super().reorder_cache(beam_idx)
            return
        for which in (_KEYS, _VALUES):
            old, n_held = self._buffers[which], self._lengths[which]
            with torch.inference_mode(False), torch.no_grad():
                rows = beam_idx.clone().to(old.device)
                buffer = torch.empty(
                    (rows.shape[0], old.shape[1], n_held + _HEADROOM_TOKENS, old.shape[3]),
                    dtype=old.dtype,
                    device=old.device,
                )
                torch.index_select(old[:, :, :n_held], 0, rows, out=buffer[:, :, :n_held])
            self._put(which, buffer, n_held, is_owned=True)

    # -- copies --

    def __deepcopy__(self, memo: dict[int, Any]) -> KrulLayer:
        # The state has copies of the tensors already.
        fork = type(self).__new__(type(self))
        memo[id(self)] = fork
        fork.__setstate__(self.__getstate__())
        return fork

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a whole, separate copy: no buffer's spare room, nothing pending."""
        self.wait()
        state = self.__dict__.copy()
        state["_buffers"] = [
            None if buffer is None else buffer[:, :, :n_tokens].clone()
            for buffer, n_tokens in zip(self._buffers, self._lengths, strict=True)
        ]
        state["_lengths"] = list(self._lengths)
        state["_is_owned"] = [False, False]
        state["_n_protected"] = [0, 0]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _is_alike(buffer: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether `states` could be written into an empty `buffer`."""
    return (
        buffer.shape[:2] == states.shape[:2]
        and buffer.shape[3] == states.shape[3]
        and buffer.dtype == states.dtype
        and buffer.device == states.device
    )


class _PendingLayer:
    """What a layer waits for while its cache is being restored."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def wait(self) -> None:
        self.cache._wait_for_layer(self.index)


def _length_after_crop(n_held: int, tokens_to_remove: int) -> int:
    """Read both meanings of `crop`'s argument: a negative count, or a positive length."""
    if tokens_to_remove > 0:
        return min(n_held, tokens_to_remove)
    return max(0, n_held + tokens_to_remove)


# ---- sliding windows -----------------------------------------------------------------------------
# Written against the layer's attributes, because transformers' own crop and reset mean different
# things from version to version.


def _is_sliding(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer)


def _sliding_state(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    return layer.keys, layer.values, layer.cumulative_length


def _set_sliding_state(
    layer: Any, keys: torch.Tensor | None, values: torch.Tensor | None, n_tokens: int
) -> None:
    if keys is None:
        layer.keys = layer.values = None
        layer.is_initialized = False
        layer.cumulative_length = 0
        return
    if not layer.is_initialized:
        parameters = inspect.signature(layer.lazy_initialization).parameters
        layer.lazy_initialization(*(keys, values)[: len(parameters)])
    layer.keys, layer.values, layer.cumulative_length = keys, values, n_tokens


def _sliding_n_held(layer: Any) -> int:
    return 0 if layer.keys is None or layer.keys.dim() != 4 else layer.keys.shape[-2]


def _can_crop_sliding(layer: Any, n_left: int) -> bool:
    """Whether the window that ends after `n_left` tokens is still there."""
    first_held = layer.cumulative_length - _sliding_n_held(layer)
    return n_left == 0 or first_held <= max(0, n_left - (layer.sliding_window - 1))


def _crop_sliding(layer: Any, n_left: int) -> None:
    """Keep the window that ends after `n_left` tokens; `_can_crop_sliding` must hold."""
    if n_left == 0:
        _set_sliding_state(layer, None, None, 0)
        return
    n_held = _sliding_n_held(layer)
    if n_held == 0:
        return
    first_held = layer.cumulative_length - n_held
    start = max(0, n_left - (layer.sliding_window - 1)) - first_held
    end = n_left - first_held
    _set_sliding_state(layer, layer.keys[:, :, start:end], layer.values[:, :, start:end], n_left)


# ---- which tokens --------------------------------------------------------------------------------


class _History:
    """The tokens that were fed, with their mask and positions, in pieces as they came."""

    def __init__(self) -> None:
        self.pieces: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        self.n_tokens = 0

    def append(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        """Add tokens; all three are copied, because callers reuse their buffers."""
        with _outside_autograd():
            self.pieces.append(
                tuple(  # type: ignore[arg-type]
                    None if tensor is None else tensor.detach().clone()
                    for tensor in (token_ids, attention_mask, positions)
                )
            )
        self.n_tokens += token_ids.shape[1]

    def merge(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return ids, mask (None: all ones) and positions (None: 0, 1, 2, ...) on the CPU."""
        if not self.pieces:
            return torch.zeros((1, 0), dtype=torch.int64), None, None
        if len(self.pieces) > 1 or self.pieces[0][0].device.type != "cpu":
            with _outside_autograd():
                ids = torch.cat([piece[0].cpu() for piece in self.pieces], dim=1)
                merged = (ids, self._merge_masks(), self._merge_positions())
            self.pieces = [merged]
        return self.pieces[0]

    def _merge_masks(self) -> torch.Tensor | None:
        if all(mask is None for _, mask, _ in self.pieces):
            return None
        whole = torch.cat(
            [
                torch.ones(ids.shape, dtype=torch.uint8)
                if mask is None
                else (mask != 0).to(device="cpu", dtype=torch.uint8)
                for ids, mask, _ in self.pieces
            ],
            dim=1,
        )
        return None if bool(whole.all()) else whole

    def _merge_positions(self) -> torch.Tensor | None:
        if all(positions is None for _, _, positions in self.pieces):
            return None
        parts, start = [], 0
        leading = next(p.shape[:-2] for _, _, p in self.pieces if p is not None)
        for ids, _, positions in self.pieces:
            if positions is None:
                positions = torch.arange(start, start + ids.shape[1])
            parts.append(positions.cpu().expand(*leading, *ids.shape))
            start += ids.shape[1]
        whole = torch.cat(parts, dim=-1).to(torch.int64)
        is_plain = torch.equal(whole, torch.arange(start).expand(whole.shape))
        return None if is_plain else whole

    def last_positions(self) -> list[int] | None:
        """Return the position of each row's last token, or None where there is no one number."""
        if not self.pieces:
            return None
        ids, _, positions = self.pieces[-1]
        if positions is None:
            return [self.n_tokens - 1] * ids.shape[0]
        if positions.dim() != 2 or positions.shape[-1] == 0:
            return None
        return positions[:, -1].expand(ids.shape[0]).tolist()

    def crop(self, n_tokens: int) -> None:
        if n_tokens >= self.n_tokens:
            return
        kept: list[Any] = []
        n_kept = 0
        for ids, mask, positions in self.pieces:
            n_here = min(ids.shape[1], n_tokens - n_kept)
            if n_here <= 0:
                break
            kept.append(
                (
                    ids[:, :n_here],
                    None if mask is None else mask[:, :n_here],
                    None if positions is None else positions[..., :n_here],
                )
            )
            n_kept += n_here
        self.pieces, self.n_tokens = kept, n_kept

    def map_rows(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        """Apply the same choice of rows to ids, mask and positions."""
        if not self.pieces:
            return
        ids, mask, positions = self.merge()
        if positions is not None:
            positions = positions.expand(*positions.shape[:-2], *ids.shape)
        with _outside_autograd():
            self.pieces = [
                (
                    change(ids, 0),
                    None if mask is None else change(mask, 0),
                    None if positions is None else change(positions, positions.dim() - 2),
                )
            ]


@dataclasses.dataclass
class _Feed:
    """A forward pass that is under way: what to go back to should it fail."""

    n_before: int
    n_new: int
    sliding: list[tuple[int, tuple[torch.Tensor | None, torch.Tensor | None, int]]]
    thread_id: int


# ---- what a save sees ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerSnapshot:
    """One layer as it was when a save was asked for.

    Attributes
    ----------
    kind : str
        ``"full"``, ``"sliding"``, or ``"none"`` for a layer without K/V of its own.
    token_start : int
        Index of the first token held: 0 unless the window has moved on.
    sliding_window : int
        The window in tokens; 0 where there is none.
    """

    kind: str
    token_start: int
    n_tokens: int
    sliding_window: int
    _layer: Any
    _tensors: tuple[torch.Tensor, torch.Tensor] | None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return K and V, shape (n_batch, n_kv_heads, n_tokens, head_dim); waits for a restore.

        None for a layer of kind ``"none"``.
        """
        if isinstance(self._layer, KrulLayer):
            self._layer.wait()
        return self._tensors


class Snapshot:
    """The whole cache at one instant; the model may go on while it is read.

    Attributes
    ----------
    n_tokens : int
        Tokens in the snapshot.
    token_ids : torch.Tensor
        int64, shape (n_batch, n_tokens), on the CPU.
    attention_mask : torch.Tensor or None
        uint8, shape (n_batch, n_tokens), 0 for padding; None when there is no padding.
    positions : torch.Tensor or None
        int64, shape (n_batch, n_tokens), or (k, n_batch, n_tokens) for models with several position
        axes; None for 0, 1, 2, ...
    layers : tuple of LayerSnapshot
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        layers: tuple[LayerSnapshot, ...],
    ) -> None:
        self.n_tokens = token_ids.shape[1]
        self.token_ids = token_ids
        self.attention_mask = attention_mask
        self.positions = positions
        self.layers = layers
        # Lowered by every crop that happens while the snapshot is being saved.
        self.n_still_valid = self.n_tokens


# ---- the cache -----------------------------------------------------------------------------------


class Cache(DynamicCache):
    """A `DynamicCache` that belongs to a stored conversation, or to none.

    Made by `Store.open`; made by hand it is a faster `DynamicCache` that cannot be saved.

    Parameters
    ----------
    config : transformers config, optional
        Tells which layers have a sliding window; taken from `model` when omitted.
    model : transformers model, optional
        The model that the cache is used with; needed to recompute a damaged history.
    settings : Settings, optional

    Attributes
    ----------
    token_ids : torch.Tensor or None
        int64, shape (n_batch, n_tokens), on the CPU: exactly the tokens whose K/V are held. None
        when they are unknown, because the cache was used without `krul.attach` or with embeddings.
    attention_mask : torch.Tensor or None
        uint8, shape (n_batch, n_tokens), 0 for padding; None when there is no padding.
    positions : torch.Tensor or None
        int64, shape (n_batch, n_tokens); None for 0, 1, 2, ...
    n_tokens : int
        Tokens held. ``len(cache)`` is the number of layers, as in transformers.
    n_saved_tokens : int
        How many of them, from the start, the store has.
    save_report, restore_report : SaveReport or None, RestoreReport
        The last ones. The restore report also tells what was cropped and recomputed since.

    Notes
    -----
    Not for several threads at once, except that a save runs beside the model.

    ``copy.deepcopy`` (and pickle) make a fork: the same tokens and numbers, but no conversation.
    A fork can be used, cropped and forked again; `save` refuses it, because two caches writing one
    conversation would overwrite each other's turns.

    Examples
    --------
    >>> cache = Cache()
    >>> states = torch.zeros(1, 2, 3, 8)
    >>> keys, values = cache.update(states, states, 0)
    >>> keys.shape[-2], cache.n_tokens, cache.token_ids is None
    (3, 3, True)
    >>> cache.crop(-1)
    >>> cache.n_tokens
    2
    """

    def __init__(
        self,
        config: Any = None,
        *,
        model: Any = None,
        settings: Settings | None = None,
        **kwargs: Any,
    ) -> None:
        if config is None and model is not None:
            config = model.config
        if config is not None:
            config = config.get_text_config(decoder=True)
            kwargs["config"] = config
        super().__init__(**kwargs)
        if self.layers:
            self.layers = [_replace(layer) for layer in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = KrulLayer
        self.model = model
        self.settings = Settings() if settings is None else settings
        #: Where the conversation is stored; None for a cache that cannot be saved.
        self.conversation: Any = None
        self.estimator: Any = None
        #: The handle of `krul.attach` that this cache holds, let go by `close`.
        self.handle: Any = None
        #: The restore under way; see `begin_restore`.
        self.source: Any = None
        #: Called with a number of tokens, returns ``(n, {layer index: (keys, values)})``: the
        #: largest n up to it for which the sliding layers' windows are known, and those windows;
        #: or None.
        self.rollback: Callable[[int], Any] | None = None
        self.generation = 0
        self.created_s = 0.0
        #: Of the model when the conversation was opened; what the K/V belong to.
        self.fingerprint: Any = None
        self.segments: list[Any] = []
        self.save_report: SaveReport | None = None
        #: Why the history cannot be recomputed from its tokens; empty when it can.
        self.recompute_blocker = ""
        self._history: _History | None = _History()
        self._lost_reason = ""
        self._saved_ids: torch.Tensor | None = None
        self._saved_limit = 0
        self._base_report = _empty_report()
        self._init_state()

    def _init_state(self) -> None:
        """Set what a copy does not inherit."""
        self._feed: _Feed | None = None
        self._notes: list[str] = []
        self._n_cropped = 0
        self._n_recomputed: dict[int, int] = {}
        self._wait_s = 0.0
        self._is_closed = False
        self._close_callbacks: list[Callable[[], None]] = []
        self._executor: ThreadPoolExecutor | None = None
        self._snapshots: list[Snapshot] = []
        self._restore_failure: Exception | None = None
        self._future: Future[SaveReport] | None = None
        self._lock = threading.RLock()
        self._restore_lock = threading.RLock()

    def __bool__(self) -> bool:
        """Return True: ``cache or DynamicCache()`` must not replace a cache that is empty."""
        return True

    # -- what it holds --

    @property
    def n_tokens(self) -> int:
        """Tokens held."""
        return int(self.get_seq_length())

    def _known(
        self,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
        if self._history is None:
            return None
        merged = self._history.merge()
        return merged if merged[0].shape[1] == self.n_tokens else None

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The ids of the tokens held, or None when they are unknown."""
        known = self._known()
        return None if known is None else known[0]

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The mask of the tokens held; None when nothing is padding."""
        known = self._known()
        return None if known is None else known[1]

    @property
    def positions(self) -> torch.Tensor | None:
        """The positions of the tokens held; None for 0, 1, 2, ..."""
        known = self._known()
        return None if known is None else known[2]

    @property
    def why_unknown(self) -> str:
        """Why `token_ids` is None; empty when it is not."""
        if self._known() is not None:
            return ""
        return self._lost_reason or "its K/V were changed from outside"

    def record_history(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> None:
        """Say which tokens the cache holds; what `open` knows from the manifest."""
        if token_ids.dim() != 2:
            raise ShapeError(f"token_ids is {tuple(token_ids.shape)} but must be (batch, tokens)")
        self._history = _History()
        self._lost_reason = ""
        self._history.append(token_ids.to(torch.int64), attention_mask, positions)

    def set_window(
        self, layer_index: int, keys: torch.Tensor, values: torch.Tensor, n_tokens: int
    ) -> None:
        """Give a sliding layer what it held when the conversation was `n_tokens` long."""
        _set_sliding_state(self.layers[layer_index], keys, values, n_tokens)

    def note(self, text: str) -> None:
        """Add to the reason that the restore report gives."""
        self._notes.append(text)

    def _lose_tokens(self, reason: str) -> None:
        self._history = None
        self._lost_reason = reason

    # -- what krul.attach tells --

    def begin_feed(
        self,
        token_ids: torch.Tensor | None,
        n_new: int,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        """Note the tokens that the model is about to run; `end_feed` must follow.

        Parameters
        ----------
        token_ids : torch.Tensor or None
            Shape (n_batch, n_new); None when the model is fed with embeddings.
        attention_mask, positions : torch.Tensor or None
            For the new tokens only, last axis n_new.
        """
        self._check_open()
        self._settle()
        n_before = self.n_tokens
        if self._known() is None:
            self._lose_tokens(self.why_unknown)
        if token_ids is None:
            self._lose_tokens("the model was fed embeddings instead of token ids")
        elif self._history is not None:
            self._history.append(token_ids.to(torch.int64), attention_mask, positions)
        sliding = [
            (index, _sliding_state(layer))
            for index, layer in enumerate(self.layers)
            if _is_sliding(layer)
        ]
        self._feed = _Feed(n_before, n_new, sliding, threading.get_ident())

    def end_feed(self, *, is_failed: bool) -> None:
        """Close what `begin_feed` opened; after a failure every layer is put back."""
        feed = self._feed
        if feed is None or feed.thread_id != threading.get_ident():
            return
        if is_failed:
            self._undo_feed(feed)
        elif self.n_tokens != feed.n_before + feed.n_new:
            self._lose_tokens(
                f"the model was fed {feed.n_new} tokens but the cache grew from "
                f"{feed.n_before} to {self.n_tokens}"
            )
        self._feed = None

    def _undo_feed(self, feed: _Feed) -> None:
        for layer in self.layers:
            if isinstance(layer, KrulLayer) and layer.get_seq_length() > feed.n_before:
                layer.crop(feed.n_before - layer.get_seq_length())
        for index, state in feed.sliding:
            _set_sliding_state(self.layers[index], *state)
        if self._history is not None:
            self._history.crop(feed.n_before)

    def _settle(self) -> None:
        """Undo a forward pass that was torn off in this thread, by an interrupt for one."""
        feed = self._feed
        if feed is None:
            return
        if feed.thread_id != threading.get_ident():
            raise RuntimeError("the cache is in use by a forward pass in another thread")
        self.end_feed(is_failed=True)

    # -- what models and generate() call --

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append K/V of new tokens to one layer; waits for that layer alone."""
        if self._feed is None:
            self._check_open()
            self._lose_tokens("tokens were fed to it by a model without krul.attach")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int = 0, max_length: int | None = None) -> None:
        """Drop tokens from the end.

        Parameters
        ----------
        tokens_to_remove : int
            Negative: that many tokens. Positive: down to that length. 0: nothing.

        Raises
        ------
        ValueError
            A sliding window has moved past the wanted end, and the history cannot be recomputed.

        Notes
        -----
        Free, unless a sliding window has moved on: then the model runs once over what is left.
        """
        count = tokens_to_remove if max_length is None else max_length
        self._settle_for_crop()
        n_held = self.n_tokens
        n_left = _length_after_crop(n_held, int(count))
        if self._can_crop(n_left):
            self._crop_now(n_left)
            return
        blocker = self._why_not_recompute(n_left)
        if blocker:
            raise ValueError(
                f"the cache holds {n_held} tokens and cannot be cropped to {n_left}: a sliding "
                f"window has moved on, and the history cannot be recomputed: {blocker}"
            )
        plain = self._run_history(n_left)
        self._drop_restore()
        self._crop_full_layers(n_left)
        self._take_all(plain)
        self._notes.append(f"recomputed to crop to {n_left} tokens behind a sliding window")

    def _settle_for_crop(self) -> None:
        # Candidate generators crop between forward passes, so a feed that is open is a torn one.
        self._check_open()
        self._settle()

    def _can_crop(self, n_left: int) -> bool:
        return all(_can_crop_sliding(layer, n_left) for layer in self.layers if _is_sliding(layer))

    def _crop_now(self, n_left: int) -> None:
        n_held = self.n_tokens
        for layer in self.layers:
            if _is_sliding(layer):
                _crop_sliding(layer, n_left)
            elif not isinstance(layer, KrulLayer) and n_left < n_held:
                layer.crop(n_left - n_held)
        self._crop_full_layers(n_left)

    def _crop_full_layers(self, n_left: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.crop(min(0, n_left - layer.get_seq_length()))
        if self._history is not None:
            self._history.crop(n_left)
        if n_left == 0:
            self._restart_history()
        with self._lock:
            self._saved_limit = min(self._saved_limit, n_left)
            for snapshot in self._snapshots:
                snapshot.n_still_valid = min(snapshot.n_still_valid, n_left)

    def _restart_history(self) -> None:
        """Know the tokens again: an empty cache does, whatever it held before."""
        self._history, self._lost_reason, self.recompute_blocker = _History(), "", ""

    def reset(self) -> None:
        """Forget all tokens; what the store has stays there."""
        self._check_open()
        self._feed = None
        self._drop_restore()
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.reset()
            elif _is_sliding(layer):
                _set_sliding_state(layer, None, None, 0)
            else:
                layer.reset()
        self._crop_full_layers(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace the batch by the rows `beam_idx` of it."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda t, dim: t.index_select(dim, beam_idx.clone().to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda t, dim: t.repeat_interleave(repeats, dim))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        super().batch_select_indices(indices)
        rows = torch.as_tensor(indices)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        self._map_rows(lambda t, dim: t.index_select(dim, rows.clone().to(t.device)))

    def _map_rows(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        if self._history is not None:
            self._history.map_rows(change)

    def activate_past_recording(self) -> None:
        """Let sliding layers keep more than their window until the next `crop`."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def stop_past_recording(self) -> None:
        """Undo `activate_past_recording`, which would let sliding layers grow for ever."""
        for layer in self.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False
                if _is_sliding(layer) and _sliding_n_held(layer) > 0:
                    _crop_sliding(layer, layer.cumulative_length)

    # -- a changed history --

    def align(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Crop to the longest common prefix with `input_ids`, leaving at least one token to run.

        Parameters
        ----------
        input_ids : torch.Tensor
            Shape (n_batch, n_given): the whole conversation, as it is about to be fed.
        attention_mask : torch.Tensor, optional
            Same shape, 0 for padding. Padding differs from a token with the same id.

        Returns
        -------
        int
            Tokens kept. Where a sliding window has moved past the common prefix, a shorter prefix
            that the store knows is taken, or nothing.

        Raises
        ------
        ValueError
            The cache does not know its tokens.
        ShapeError
            The cache's rows cannot be assigned to those of `input_ids`.

        Notes
        -----
        After beam search the cache holds several rows for each one given; the row that shares most
        is kept.
        """
        self._check_open()
        self._settle()
        if input_ids.dim() != 2:
            raise ShapeError(f"input_ids is {tuple(input_ids.shape)} but must be (batch, tokens)")
        n_held = self.n_tokens
        if n_held == 0:
            return 0
        if self._known() is None:
            raise ValueError(f"the cache does not know its tokens: {self.why_unknown}")
        given, given_mask = _as_record(input_ids, attention_mask)
        self._select_rows(given, given_mask)
        n_common = int(self._common_prefix(given, given_mask).min())
        n_kept = min(n_common, given.shape[1] - 1)
        if n_kept == n_held:
            return n_held
        if n_common == 0:
            warnings.warn(
                f"none of the {n_held} cached tokens begin the {given.shape[1]} given ones: either "
                "this is another conversation, or only its new tokens were passed where the whole "
                "conversation is needed",
                stacklevel=2,
            )
        n_kept = self._crop_or_roll_back(n_kept)
        self._n_cropped += n_held - n_kept
        if n_common < min(n_held, given.shape[1]):
            self._notes.append(
                f"the history changed at token {n_common}: {n_kept} of {n_held} cached tokens kept"
            )
        else:
            self._notes.append(
                f"{given.shape[1]} tokens were given over {n_held} cached ones: {n_kept} kept"
            )
        return n_kept

    def _common_prefix(self, given: torch.Tensor, given_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the number of equal leading tokens for each cached row, given rows cycled over."""
        ids, mask, _ = self._known()  # type: ignore[misc]
        n = min(ids.shape[1], given.shape[1])
        n_repeats = ids.shape[0] // given.shape[0]
        given = given.repeat_interleave(n_repeats, 0)[:, :n]
        is_same = ids[:, :n] == given
        if mask is not None or given_mask is not None:
            ours = torch.ones_like(is_same) if mask is None else mask[:, :n].bool()
            theirs = (
                torch.ones_like(is_same)
                if given_mask is None
                else given_mask.repeat_interleave(n_repeats, 0)[:, :n]
            )
            is_same = (ours == theirs) & (is_same | ~ours)
        return is_same.long().cumprod(1).sum(1)

    def _select_rows(self, given: torch.Tensor, given_mask: torch.Tensor | None) -> None:
        """Keep, for each given row, the cached row that shares most with it."""
        n_rows, n_given = self.token_ids.shape[0], given.shape[0]  # type: ignore[union-attr]
        if n_rows == n_given:
            return
        if n_rows % n_given != 0:
            raise ShapeError(
                f"input_ids has {n_given} rows but the cache holds {n_rows}; use "
                "batch_repeat_interleave or batch_select_indices on the cache first"
            )
        n_each = n_rows // n_given
        shared = self._common_prefix(given, given_mask).view(n_given, n_each)
        self.batch_select_indices(shared.argmax(1) + torch.arange(n_given) * n_each)

    def _crop_or_roll_back(self, n_left: int) -> int:
        """Crop to `n_left` or to the longest prefix below it that can be had without computing."""
        if self._can_crop(n_left):
            self._crop_now(n_left)
            return n_left
        found = None if self.rollback is None else self.rollback(n_left)
        if found is not None:
            n_found, windows = found
            if 0 < n_found <= n_left:
                self._crop_full_layers(n_found)
                for index, (keys, values) in windows.items():
                    _set_sliding_state(self.layers[index], keys, values, n_found)
                self._notes.append(f"rolled back to the stored boundary at token {n_found}")
                return n_found
        self._notes.append("a sliding window has moved past the common prefix: starting over")
        self.reset()
        return 0

    # -- restoring --

    def begin_restore(
        self, source: Any, layer_indices: Iterable[int], report: RestoreReport | None = None
    ) -> None:
        """Let layers that were `allocate`d wait for `source`.

        Parameters
        ----------
        source : object
            ``wait(layer)`` returns when the layer is in or raises; ``is_done(layer)``;
            ``cancel()``; ``close()``, which may be called twice, returns when nothing is written
            any more; optionally ``report()``, a `RestoreReport` of the state so far, also after
            ``close``. Failures are a `KrulError` or an OSError.
        layer_indices : iterable of int
            The layers that it fills.
        report : RestoreReport, optional
            Used where the source has no ``report``.
        """
        self.source = source
        if report is not None:
            self._base_report = report
        for index in layer_indices:
            self.layers[index].pending = _PendingLayer(self, index)

    def restore(self) -> RestoreReport:
        """Wait until every layer is in.

        Returns
        -------
        RestoreReport

        Raises
        ------
        CorruptionError, OSError
            A layer could not be read and the history could not be recomputed either.
        """
        self._check_open()
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.wait()
        return self.restore_report

    @property
    def restore_report(self) -> RestoreReport:
        """How the restore went or goes, and what was cropped and recomputed since."""
        source = self.source
        report = self._base_report if source is None else _report_of(source, self._base_report)
        n_loaded = list(report.n_loaded_by_layer)
        n_recomputed = list(report.n_recomputed_by_layer)
        n_layers = max(
            [len(n_loaded), len(n_recomputed), *(index + 1 for index in self._n_recomputed)]
        )
        n_loaded += [0] * (n_layers - len(n_loaded))
        n_recomputed += [0] * (n_layers - len(n_recomputed))
        for index, n_tokens in self._n_recomputed.items():
            n_loaded[index], n_recomputed[index] = 0, n_tokens
        return dataclasses.replace(
            report,
            n_loaded_by_layer=tuple(n_loaded),
            n_recomputed_by_layer=tuple(n_recomputed),
            seconds_by_stage={**report.seconds_by_stage, "wait": self._wait_s},
            reason="; ".join(part for part in (report.reason, *self._notes) if part),
            n_cropped_tokens=report.n_cropped_tokens + self._n_cropped,
        )

    def _wait_for_layer(self, index: int) -> None:
        layer = self.layers[index]
        source = self.source
        if layer.pending is None or source is None:
            return
        start = time.perf_counter()
        failure = self._restore_failure
        if failure is None:
            try:
                source.wait(index)
            except (KrulError, OSError) as error:
                failure = error
        with self._restore_lock:
            # While this thread waited for the lock another one may have recomputed the layer.
            if failure is not None and layer.pending is not None:
                self._recompute_missing(failure)
            layer.pending = None
            self._wait_s += time.perf_counter() - start
            if not any(getattr(other, "pending", None) for other in self.layers):
                self._end_restore()

    def _end_restore(self) -> None:
        source, self.source = self.source, None
        if source is not None:
            source.close()
            self._base_report = _report_of(source, self._base_report)

    def _drop_restore(self) -> None:
        """Stop a restore whose result is not wanted any more."""
        if self.source is None:
            return
        if self._snapshots:
            # A save that is under way needs what is still coming.
            self._wait_for_saves()
        with self._restore_lock:
            if self.source is not None:
                self.source.cancel()
                self._end_restore()
            self._restore_failure = None
            for layer in self.layers:
                if isinstance(layer, KrulLayer):
                    layer.pending = None

    def _recompute_missing(self, error: Exception) -> None:
        """Fill every layer that the store cannot give by running the model over the tokens.

        Raises
        ------
        CorruptionError, OSError
            `error` again, with the reason why the history cannot be recomputed.
        """
        if self._restore_failure is not None:
            raise self._restore_failure
        source = self.source
        source.cancel()
        missing = []
        for index, layer in enumerate(self.layers):
            if getattr(layer, "pending", None) is None:
                continue
            try:
                source.wait(index)
                layer.pending = None
            except (KrulError, OSError):
                missing.append(index)
        source.close()
        n_tokens = max(self.layers[index].get_seq_length() for index in missing)
        blocker = self._why_not_recompute(n_tokens)
        if blocker:
            self._restore_failure = _with_reason(
                error, f"the history cannot be recomputed: {blocker}"
            )
            raise self._restore_failure from error
        plain = self._run_history(n_tokens)
        for index in missing:
            layer = self.layers[index]
            layer._fill(plain.layers[index].keys, plain.layers[index].values)
            layer.pending = None
            self._n_recomputed[index] = layer.get_seq_length()
        self._notes.append(
            f"recomputed layers {', '.join(map(str, missing))} from {n_tokens} tokens because "
            f"they could not be read: {error}"
        )

    def recompute(self, reason: str) -> None:
        """Fill every layer by running the model over the tokens that `record_history` named.

        Parameters
        ----------
        reason : str
            Why, for the report.

        Raises
        ------
        ValueError
            The tokens are unknown, or there is no model that could do it.
        """
        if self._history is None:
            raise ValueError(f"the history cannot be recomputed: {self._lost_reason}")
        n_tokens = self._history.n_tokens
        blocker = self._why_not_recompute(n_tokens)
        if blocker:
            raise ValueError(f"the history cannot be recomputed: {blocker}")
        start = time.perf_counter()
        plain = self._run_history(n_tokens)
        self._take_all(plain)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, KrulLayer) or _is_sliding(layer):
                self._n_recomputed[index] = n_tokens
        self._notes.append(f"recomputed {n_tokens} tokens: {reason}")
        self._wait_s += time.perf_counter() - start

    def _why_not_recompute(self, n_tokens: int) -> str:
        if self._history is None:
            return f"its tokens are unknown: {self._lost_reason}"
        if self._history.n_tokens < n_tokens:
            return f"only {self._history.n_tokens} of {n_tokens} tokens are known"
        if self.recompute_blocker:
            return self.recompute_blocker
        if self.model is None:
            return "the cache was made without a model"
        if self.model.training:
            return "the model is in training mode"
        return ""

    def _run_history(self, n_tokens: int) -> DynamicCache:
        """Run the model over the first `n_tokens` known tokens; return the plain cache."""
        ids, mask, positions = self._history.merge()  # type: ignore[union-attr]
        model = self.model
        device = model.get_input_embeddings().weight.device
        plain = DynamicCache(config=model.config.get_text_config(decoder=True))
        accepted = inspect.signature(inspect.unwrap(type(model).forward)).parameters

        def run() -> None:
            for start in range(0, n_tokens, _RECOMPUTE_CHUNK):
                end = min(n_tokens, start + _RECOMPUTE_CHUNK)
                inputs: dict[str, Any] = {
                    "input_ids": ids[:, start:end].to(device),
                    "past_key_values": plain,
                    "use_cache": True,
                }
                if mask is not None:
                    inputs["attention_mask"] = mask[:, :end].to(device, torch.int64)
                if positions is not None and "position_ids" in accepted:
                    inputs["position_ids"] = positions[..., start:end].to(device)
                if "logits_to_keep" in accepted:
                    inputs["logits_to_keep"] = 1
                if "cache_position" in accepted:
                    inputs["cache_position"] = torch.arange(start, end, device=device)
                model(**inputs)

        with (
            _outside_autograd(),
            torch.autocast(device_type=device.type, enabled=False),
            _unobserved(),
        ):
            # In a context of its own: this may run inside another forward pass of the same model,
            # whose recording of hidden states and attentions must not see it.
            contextvars.Context().run(run)
        return plain

    def _take_all(self, plain: DynamicCache) -> None:
        """Make every layer hold what the same layer of `plain` holds."""
        while len(self.layers) < len(plain.layers) and self.layer_class_to_replicate is not None:
            self.layers.append(self.layer_class_to_replicate())
        for layer, other in zip(self.layers, plain.layers, strict=True):
            if isinstance(layer, KrulLayer):
                keys, values = other.keys, other.values
                layer.reset()
                layer.allocate(keys.shape, values.shape, keys.dtype, values.dtype, keys.device)
                layer._fill(keys, values)
            elif _is_sliding(layer):
                _set_sliding_state(layer, *_sliding_state(other))

    # -- saving --

    @property
    def n_saved_tokens(self) -> int:
        """How many of the tokens held, from the start, the store has."""
        known = self._known()
        return 0 if known is None else self._n_saved_of(known[0])

    def n_saved_in(self, snapshot: Snapshot) -> int:
        """Return how many of a snapshot's tokens, from the start, the store has."""
        return self._n_saved_of(snapshot.token_ids)

    def _n_saved_of(self, ids: torch.Tensor) -> int:
        saved = self._saved_ids
        if saved is None or saved.shape[0] != ids.shape[0]:
            return 0
        n = min(saved.shape[1], ids.shape[1], self._saved_limit)
        return int((saved[:, :n] == ids[:, :n]).all(0).long().cumprod(0).sum())

    def mark_saved(
        self, generation: int, segments: Iterable[Any], snapshot: Snapshot | None = None
    ) -> None:
        """Note that the store now has a snapshot, or, without one, all that the cache holds."""
        with self._lock:
            if snapshot is None:
                ids, n_valid = self.token_ids, self.n_tokens
                if ids is None:
                    raise ValueError(f"the cache does not know its tokens: {self.why_unknown}")
            else:
                ids, n_valid = snapshot.token_ids, snapshot.n_still_valid
            self._saved_ids, self._saved_limit = ids, n_valid
            self.generation, self.segments = generation, list(segments)

    def save(self, *, wait: bool = True) -> SaveReport | Future[SaveReport]:
        """Compress, guard and commit what is new since the last save.

        Parameters
        ----------
        wait : bool
            False returns a future at once; the model may go on meanwhile.

        Returns
        -------
        SaveReport or concurrent.futures.Future
            The last report again when nothing is new.

        Raises
        ------
        MismatchError
            The cache belongs to no conversation (a fork, or made without a store), or the
            conversation was saved by somebody else since it was opened.
        ValueError
            The cache is closed, is empty, or does not know its tokens.
        StoreFullError, OSError
            The old version is whole.
        """
        self._check_open()
        self._settle()
        if self.conversation is None:
            raise MismatchError(
                "this cache belongs to no conversation and cannot be saved: it is a copy of "
                "another cache, or was made without a store; open the conversation by Store.open"
            )
        with self._lock:
            if self.save_report is not None and not self._snapshots and self._is_all_saved():
                future: Future[SaveReport] = Future()
                future.set_result(self.save_report)
            else:
                snapshot = self._take_snapshot()
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(1, thread_name_prefix="krul-save")
                self._snapshots.append(snapshot)
                future = self._executor.submit(self._run_save, snapshot)
                self._future = future
        return future.result() if wait else future

    def _is_all_saved(self) -> bool:
        known = self._known()
        return (
            known is not None
            and self._saved_ids is not None
            and self._saved_ids.shape == known[0].shape
            and self._n_saved_of(known[0]) == known[0].shape[1]
        )

    def _take_snapshot(self) -> Snapshot:
        n_tokens = self.n_tokens
        if n_tokens == 0:
            raise ValueError("the cache holds 0 tokens but a conversation to save needs at least 1")
        known = self._known()
        if known is None:
            raise ValueError(
                f"the cache holds {n_tokens} tokens but does not know which: {self.why_unknown}"
            )
        layers = tuple(
            self._snapshot_layer(index, layer, n_tokens) for index, layer in enumerate(self.layers)
        )
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer._n_protected = [n_tokens, n_tokens]
        return Snapshot(*known, layers)

    def _snapshot_layer(self, index: int, layer: Any, n_tokens: int) -> LayerSnapshot:
        if isinstance(layer, KrulLayer):
            if layer._lengths != [n_tokens, n_tokens]:
                if layer._lengths == [0, 0] and not layer.is_initialized:
                    return LayerSnapshot("none", 0, 0, 0, layer, None)
                raise ValueError(
                    f"layer {index} holds {layer._lengths[0]} keys and {layer._lengths[1]} values "
                    f"but the cache {n_tokens} tokens: pruned caches cannot be saved"
                )
            keys, values = (buffer[:, :, :n_tokens].detach() for buffer in layer._buffers)
            return LayerSnapshot("full", 0, n_tokens, 0, layer, (keys, values))
        if _is_sliding(layer):
            if layer.cumulative_length != n_tokens:
                raise ValueError(
                    f"layer {index} has seen {layer.cumulative_length} tokens "
                    f"but the cache {n_tokens}"
                )
            n_held = min(_sliding_n_held(layer), layer.sliding_window - 1)
            first = _sliding_n_held(layer) - n_held
            tensors = (layer.keys[:, :, first:].detach(), layer.values[:, :, first:].detach())
            return LayerSnapshot(
                "sliding", n_tokens - n_held, n_held, layer.sliding_window, layer, tensors
            )
        return LayerSnapshot("none", 0, 0, 0, layer, None)

    def _run_save(self, snapshot: Snapshot) -> SaveReport:
        from . import save  # loads the C module

        try:
            report = save.save_cache(self, snapshot)
            self.save_report = report
            return report
        finally:
            with self._lock:
                self._snapshots.remove(snapshot)
                if not self._snapshots:
                    for layer in self.layers:
                        if isinstance(layer, KrulLayer):
                            layer._n_protected = [0, 0]

    def _wait_for_saves(self) -> None:
        future = self._future
        if future is not None:
            with contextlib.suppress(Exception):  # whoever asked for the save has its error
                future.result()

    # -- the end --

    def on_close(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once by `close`; the last one added is called first."""
        self._close_callbacks.append(callback)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def close(self) -> None:
        """Stop a restore, wait for a save that was begun, free the memory and detach the hooks.

        Turns that were not saved are lost. Closing twice is allowed.
        """
        if self._is_closed:
            return
        self._wait_for_saves()
        self._drop_restore()
        self._is_closed = True
        self._feed = None
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.reset()
            elif _is_sliding(layer):
                _set_sliding_state(layer, None, None, 0)
        self._history, self._lost_reason = None, "the cache is closed"
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.detach()
        while self._close_callbacks:
            self._close_callbacks.pop()()
        self.estimator = None
        self.rollback = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the cache is closed; open the conversation again")

    def __enter__(self) -> Cache:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- copies --

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a fork: tokens and numbers, no conversation, nothing under way."""
        self._check_open()
        self._settle()
        self.restore()
        state = self.__dict__.copy()
        for name in ("_lock", "_restore_lock", "_executor", "_future", "_feed", "_snapshots"):
            del state[name]
        state["_history"] = copy.deepcopy(self._history)
        state["_close_callbacks"] = []
        state["_base_report"] = self.restore_report
        state.update(
            model=None,
            conversation=None,
            estimator=None,
            handle=None,
            source=None,
            rollback=None,
            segments=[],
            save_report=None,
            _saved_ids=None,
            _saved_limit=0,
        )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_state()

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        fork = type(self).__new__(type(self))
        memo[id(self)] = fork
        fork.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        fork.model = self.model  # the same model, never a second one
        return fork


# ---- helpers -------------------------------------------------------------------------------------


def _replace(layer: Any) -> Any:
    """Return a `KrulLayer` for a layer whose class is exactly `DynamicLayer`, else the layer."""
    if type(layer) is not DynamicLayer:
        return layer
    new = KrulLayer()
    if layer.keys is not None and layer.keys.dim() == 4:
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = layer.keys, layer.values
    return new


def _as_record(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = input_ids.detach().to(device="cpu", dtype=torch.int64)
    if attention_mask is None:
        return ids, None
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"attention_mask is {tuple(attention_mask.shape)} but input_ids "
            f"is {tuple(input_ids.shape)}"
        )
    mask = attention_mask.detach().to("cpu") != 0
    return ids, None if bool(mask.all()) else mask


def _empty_report() -> RestoreReport:
    return RestoreReport(
        n_tokens=0,
        n_loaded_by_layer=(),
        n_recomputed_by_layer=(),
        loaded_bytes=0,
        predicted_s=math.nan,
        actual_s=0.0,
        seconds_by_stage={},
        plan="empty",
        reason="",
    )


def _report_of(source: Any, otherwise: RestoreReport) -> RestoreReport:
    report = getattr(source, "report", None)
    return otherwise if report is None else report()


def _with_reason(error: Exception, reason: str) -> Exception:
    message = f"{error}; {reason}"
    if isinstance(error, OSError):
        return OSError(error.errno, message) if error.errno else OSError(message)
    if isinstance(error, CorruptionError):
        return CorruptionError(message)
    return type(error)(message)


@contextlib.contextmanager
def _unobserved() -> Any:
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
