"""One layer of a cache: K and V in buffers that grow, and what sliding windows allow.

`KrulLayer` stands in for transformers' `DynamicLayer`, which concatenates at every token. Sliding
layers stay transformers' own; the functions here read and set them by their attributes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import ShapeError

__all__ = [
    "KrulLayer",
    "can_crop_sliding",
    "crop_sliding",
    "is_sliding",
    "length_after_crop",
    "outside_autograd",
    "set_sliding_state",
    "sliding_n_held",
    "sliding_state",
]

# A buffer starts with room for this many tokens more than it is given, and grows by half.
_HEADROOM_TOKENS = 64
_GROWTH = 1.5

_KEYS, _VALUES = 0, 1


def outside_autograd() -> contextlib.ExitStack:
    """Enter a state in which new tensors are ordinary ones that autograd does not follow.

    A tensor made under `torch.inference_mode` can never be written outside of it again.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    return stack


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
            with outside_autograd():
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

    def hide(self) -> None:
        """Hold nothing any more, but keep the memory: what was held is about to be written anew."""
        self.pending = None
        self._lengths = [0, 0]

    def _fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write K and V over the tokens that are held, whatever `pending` says."""
        with outside_autograd():
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

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
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
        n_left = length_after_crop(n_held, int(tokens_to_remove))
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
            beam_idx, torch.arange(self._buffers[_KEYS].shape[0], device="cpu")
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


def length_after_crop(n_held: int, tokens_to_remove: int) -> int:
    """Read both meanings of `crop`'s argument: a negative count, or a positive length."""
    if tokens_to_remove > 0:
        return min(n_held, tokens_to_remove)
    return max(0, n_held + tokens_to_remove)


# ---- sliding windows -----------------------------------------------------------------------------
# Written against the layer's attributes, because transformers' own crop and reset mean different
# things from version to version.


def is_sliding(layer: Any) -> bool:
    """Whether this is transformers' layer with a sliding window."""
    return isinstance(layer, DynamicSlidingWindowLayer)


def sliding_state(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Return the held K and V, and how many tokens the layer has seen."""
    return layer.keys, layer.values, layer.cumulative_length


def set_sliding_state(
    layer: Any, keys: torch.Tensor | None, values: torch.Tensor | None, n_tokens: int
) -> None:
    """Make a sliding layer hold this, or nothing where `keys` is None."""
    if keys is None:
        layer.keys = layer.values = None
        layer.is_initialized = False
        layer.cumulative_length = 0
        return
    if layer.keys is None:
        parameters = inspect.signature(layer.lazy_initialization).parameters
        layer.lazy_initialization(*(keys, values)[: len(parameters)])
    layer.keys, layer.values, layer.cumulative_length = keys, values, n_tokens


def sliding_n_held(layer: Any) -> int:
    """Return how many tokens the layer holds, which may be fewer or more than its window."""
    return 0 if layer.keys is None or layer.keys.dim() != 4 else layer.keys.shape[-2]


def can_crop_sliding(layer: Any, n_left: int) -> bool:
    """Whether the window that ends after `n_left` tokens is still there."""
    first_held = layer.cumulative_length - sliding_n_held(layer)
    return n_left == 0 or first_held <= max(0, n_left - (layer.sliding_window - 1))


def crop_sliding(layer: Any, n_left: int) -> None:
    """Keep the window that ends after `n_left` tokens; `can_crop_sliding` must hold."""
    if n_left == 0:
        set_sliding_state(layer, None, None, 0)
        return
    n_held = sliding_n_held(layer)
    if n_held == 0:
        return
    first_held = layer.cumulative_length - n_held
    start = max(0, n_left - (layer.sliding_window - 1)) - first_held
    end = n_left - first_held
    set_sliding_state(layer, layer.keys[:, :, start:end], layer.values[:, :, start:end], n_left)
