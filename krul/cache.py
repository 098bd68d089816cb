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
import copy
import dataclasses
import inspect
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, overload

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .device import CPU, Stopwatch, is_elsewhere
from .errors import CorruptionError, KrulError, MismatchError, ShapeError
from .history import History, LayerSnapshot, Snapshot
from .layer import (
    KrulLayer,
    can_crop_sliding,
    crop_sliding,
    is_sliding,
    length_after_crop,
    set_sliding_state,
    sliding_n_held,
    sliding_state,
)
from .model import input_device, run_apart
from .recompute import recompute_prefix
from .reports import RestoreReport, SaveReport
from .settings import Settings

__all__ = ["Cache"]

# Tokens fed at once when a history is recomputed; bounds the memory of activations.
_RECOMPUTE_CHUNK = 1024

# Of a save in the background: it takes the processor time that the model leaves, and is not
# starved as it would be by SCHED_IDLE.
_SAVE_NICENESS = 19


class _PendingLayer:
    """What a layer waits for while its cache is being restored."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def wait(self) -> None:
        self.cache._wait_for_layer(self.index)


@dataclasses.dataclass
class _Feed:
    """A forward pass that is under way: what to go back to should it fail."""

    n_before: int
    n_new: int
    sliding: list[tuple[int, tuple[torch.Tensor | None, torch.Tensor | None, int]]]
    thread_id: int
    n_batch: int  # 0 where it is not known
    watch: Stopwatch
    is_first: bool  # over a history that is being restored
    # The layers whose history it runs along with its own tokens.
    rerun: list[int] = dataclasses.field(default_factory=list)


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
    made : DynamicCache, optional
        What transformers made of the configuration just now, to be taken over; making one takes a
        while.

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

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(
        self,
        config: Any = None,
        *,
        model: Any = None,
        settings: Settings | None = None,
        made: DynamicCache | None = None,
        **kwargs: Any,
    ) -> None:
        if made is not None:
            self.__dict__.update(made.__dict__)
        else:
            self._make(config, model, kwargs)
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
        #: Says why its layers cannot be recomputed for different numbers of tokens; may take a few
        #: forward passes, so it is called when the answer matters.
        self.ask_partial: Callable[[], str] = str
        #: What forward passes and restores of this model cost here; what is measured is added.
        self.costs: Any = None
        #: What the codec `predict` codes new tokens with; None where there is no profile.
        self.profile: Any = None
        self._history: History | None = History()
        self._lost_reason = ""
        self._saved_ids: torch.Tensor | None = None
        self._saved_limit = 0
        self._base_report = _empty_report()
        self._init_state()

    def _make(self, config: Any, model: Any, arguments: dict[str, Any]) -> None:
        if config is None and model is not None:
            config = model.config
        if config is not None:
            arguments["config"] = config.get_text_config(decoder=True)
        super().__init__(**arguments)

    def _init_state(self) -> None:
        """Set what a copy does not inherit."""
        self._feed: _Feed | None = None
        self._timed: list[_Feed] = []  # passes of which it is not known yet how long they took
        self._notes: list[str] = []
        self._n_cropped = 0
        self._n_recomputed: dict[int, int] = {}
        self._wait_s = 0.0
        self._first_token_s: float | None = None
        self._is_closed = False
        self._close_callbacks: list[Callable[[], None]] = []
        self._executor: ThreadPoolExecutor | None = None
        self._snapshots: list[Snapshot] = []
        self._restore_failure: Exception | None = None
        self._restored: Any = None  # a source whose layers were waited for, and is not closed yet
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
        self._history = History()
        self._lost_reason = ""
        self._history.append(token_ids.to(torch.int64), attention_mask, positions)

    def set_window(
        self, layer_index: int, keys: torch.Tensor, values: torch.Tensor, n_tokens: int
    ) -> None:
        """Give a sliding layer what it held when the conversation was `n_tokens` long."""
        set_sliding_state(self.layers[layer_index], keys, values, n_tokens)

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
        in_one_pass: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Note the tokens that the model is about to run; `end_feed` must follow.

        Parameters
        ----------
        token_ids : torch.Tensor or None
            Shape (n_batch, n_new); None when the model is fed with embeddings.
        attention_mask, positions : torch.Tensor or None
            For the new tokens only, last axis n_new.
        in_one_pass : callable, optional
            Says whether the pass can run the tokens that are held along with the new ones.

        Returns
        -------
        bool
            Whether it is to do so: until `end_feed` the cache then holds nothing.
        """
        self._check_open()
        self._settle()
        self._note_times()
        is_first = self.source is not None
        watch = Stopwatch(self._device())
        is_rerun = self._prepare_restore(n_new, in_one_pass)
        if not is_rerun:
            self._end_if_in()
        n_before = self.n_tokens
        if self._known() is None:
            self._lose_tokens(self.why_unknown)
        if token_ids is None:
            self._lose_tokens("the model was fed embeddings instead of token ids")
        elif self._history is not None:
            self._history.append(token_ids.to(torch.int64), attention_mask, positions)
        sliding = [
            (index, sliding_state(layer))
            for index, layer in enumerate(self.layers)
            if is_sliding(layer)
        ]
        n_batch = 0 if token_ids is None else token_ids.shape[0]
        self._feed = _Feed(
            n_before, n_new, sliding, threading.get_ident(), n_batch, watch, is_first
        )
        if is_rerun:
            self._feed.rerun = self._pending()
            for index in self._feed.rerun:
                self.layers[index].hide()
        return is_rerun

    def end_feed(self, *, is_failed: bool) -> None:
        """Close what `begin_feed` opened; after a failure every layer is put back."""
        feed = self._feed
        if feed is None or feed.thread_id != threading.get_ident():
            return
        damaged = {} if is_failed else self._find_damage()
        if is_failed or damaged:
            self._undo_feed(feed)
            self._feed = None
            if damaged:
                self._repair(damaged)
                raise CorruptionError(
                    f"{next(iter(damaged.values()))}; the layers were recomputed, and the pass "
                    "that used them is undone"
                )
        elif self.n_tokens != feed.n_before + feed.n_new:
            self._lose_tokens(
                f"the model was fed {feed.n_new} tokens but the cache grew from "
                f"{feed.n_before} to {self.n_tokens}"
            )
        else:
            feed.watch.stop()
            self._timed.append(feed)
            self._note_times()
        if feed.rerun and not is_failed and not damaged and self.source is not None:
            self.source.end_pass(is_failed=False)
            self._end_restore()
        self._feed = None

    def _device(self) -> torch.device:
        """Return the device that passes begin on."""
        return CPU if self.model is None else input_device(self.model)

    def _note_times(self) -> None:
        """Keep what passes took that are over: for later plans, or against what was predicted.

        A pass is known to be over only later on a device that works behind its caller's back.
        """
        while self._timed and (seconds := self._timed[0].watch.seconds()) is not None:
            feed = self._timed.pop(0)
            if math.isnan(seconds):
                continue
            if feed.is_first:
                self._first_token_s = seconds
            elif self.costs is not None and feed.n_batch == 1:
                self.costs.add_forward(feed.n_before, feed.n_new, seconds)

    def _undo_feed(self, feed: _Feed) -> None:
        if feed.rerun and self.source is not None:  # else it was closed meanwhile
            for index in feed.rerun:
                # It may have moved; what is loaded after all goes where it was to go before.
                self.layers[index].take(*self.source.buffers_of(index), feed.n_before)
                self.layers[index].pending = _PendingLayer(self, index)
            self.source.end_pass(is_failed=True)
        for layer in self.layers:
            if isinstance(layer, KrulLayer) and layer.get_seq_length() > feed.n_before:
                layer.crop(feed.n_before - layer.get_seq_length())
        for index, state in feed.sliding:
            set_sliding_state(self.layers[index], *state)
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
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        finally:
            # Closed by another thread meanwhile, a layer fails or lacks a part of the history.
            self._check_open()

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
        n_left = length_after_crop(n_held, int(count))
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
        return all(can_crop_sliding(layer, n_left) for layer in self.layers if is_sliding(layer))

    def _crop_now(self, n_left: int) -> None:
        n_held = self.n_tokens
        for layer in self.layers:
            if is_sliding(layer):
                crop_sliding(layer, n_left)
            elif not isinstance(layer, KrulLayer) and n_left < n_held:
                layer.crop(n_left - n_held)
        self._crop_full_layers(n_left)

    def _crop_full_layers(self, n_left: int) -> None:
        if n_left == 0:
            self._drop_restore()
        if self.estimator is not None:
            self.estimator.truncate(n_left)  # it may be reading what is about to be overwritten
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
        self._history, self._lost_reason, self.recompute_blocker = History(), "", ""

    def reset(self) -> None:
        """Forget all tokens; what the store has stays there."""
        self._check_open()
        self._feed = None
        self._drop_restore()
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.reset()
            elif is_sliding(layer):
                set_sliding_state(layer, None, None, 0)
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
                if is_sliding(layer) and sliding_n_held(layer) > 0:
                    crop_sliding(layer, layer.cumulative_length)

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
        self.batch_select_indices(shared.argmax(1) + torch.arange(n_given, device="cpu") * n_each)

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
                    set_sliding_state(self.layers[index], keys, values, n_found)
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
            ``wait(layer, can_recompute)`` returns when the layer is in or raises; ``cancel()``;
            ``abandon()`` returns when nothing is written any more; ``close()``, which may be called
            twice, returns when it is also not read; optionally ``prepare(...)`` as
            `krul.restore.Source` has it, called before anybody waits, and ``report()``, a
            `RestoreReport` of the state so far, also after ``close``. Failures are a `KrulError` or
            an OSError.
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
        self._repair(self._find_damage())
        return self.restore_report

    @property
    def restore_report(self) -> RestoreReport:
        """How the restore went or goes, and what was cropped and recomputed since."""
        self._note_times()
        source = self.source if self._restored is None else self._restored
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
            actual_s=report.actual_s if self._first_token_s is None else self._first_token_s,
            n_loaded_by_layer=tuple(n_loaded),
            n_recomputed_by_layer=tuple(n_recomputed),
            seconds_by_stage={**report.seconds_by_stage, "wait": self._wait_s},
            reason="; ".join(part for part in (report.reason, *self._notes) if part),
            n_cropped_tokens=report.n_cropped_tokens + self._n_cropped,
        )

    def _prepare_restore(
        self, n_prompt_tokens: int, in_one_pass: Callable[[], bool] = lambda: False
    ) -> bool:
        """Let the source recompute what it would rather not load, before anybody waits.

        Returns whether the pass that is about to begin is to do that.
        """
        prepare = getattr(self.source, "prepare", None)
        if prepare is None:
            return False
        start = time.perf_counter()
        with self._restore_lock:
            n_tokens = self.n_tokens

            def why_not() -> str:
                return self._why_not_recompute(n_tokens) or self.partial_blocker

            def is_possible() -> bool:
                held = {
                    index for index, layer in enumerate(self.layers) if layer.get_seq_length() > 0
                }
                return held == set(self._pending()) and in_one_pass()

            is_rerun: bool = prepare(
                n_prompt_tokens, n_tokens, why_not, self._recompute_prefix, is_possible
            )
        self._wait_s += time.perf_counter() - start
        return is_rerun

    def _pending(self) -> list[int]:
        """Return the layers that a restore has not filled yet, as far as anybody has asked."""
        return [
            index
            for index, layer in enumerate(self.layers)
            if getattr(layer, "pending", None) is not None
        ]

    @property
    def partial_blocker(self) -> str:
        """Why layers cannot be recomputed for different numbers of tokens; empty when they can."""
        return self.ask_partial()

    def _recompute_prefix(self, n_by_layer: list[int], **chunks: Any) -> None:
        """Write K and V of so many tokens of each layer into the buffers that are being filled."""
        ids, mask, positions = self._history.merge()  # type: ignore[union-attr]
        if positions is None:
            positions = torch.arange(ids.shape[1], device="cpu")[None]
        recompute_prefix(
            self.model,
            ids,
            n_by_layer,
            {
                index: (self.layers[index]._buffers[0], self.layers[index]._buffers[1])
                for index in self._pending()
            },
            attention_mask=mask,
            positions=positions,
            chunk_tokens=_RECOMPUTE_CHUNK,
            **chunks,
        )

    def _wait_for_layer(self, index: int) -> None:
        layer = self.layers[index]
        source = self.source
        if layer.pending is None or source is None:
            return
        self._prepare_restore(0)
        start = time.perf_counter()
        failure = self._restore_failure
        if failure is None:
            try:
                source.wait(index, not self._why_not_recompute(layer.get_seq_length()))
            except (KrulError, OSError) as error:
                failure = error
        with self._restore_lock:
            # While this thread waited for the lock another one may have recomputed the layer.
            if failure is not None and layer.pending is not None:
                self._recompute_missing(failure)
            layer.pending = None
            self._wait_s += time.perf_counter() - start
            if not self._pending():
                if getattr(self.source, "is_direct", False):
                    # Closing it waits for the device, which is none of a forward pass's business.
                    self._restored, self.source = self.source, None
                else:
                    self._end_restore()

    def _end_if_in(self) -> None:
        """End a restore that left nothing to wait for, before a pass asks layer by layer."""
        is_in = getattr(self.source, "is_in", None)
        if is_in is None or not is_in():
            return
        with self._restore_lock:
            for layer in self.layers:
                if isinstance(layer, KrulLayer):
                    layer.pending = None
            self._end_restore()

    def _end_restore(self) -> None:
        source, self.source = self.source, None
        if source is not None:
            source.close()
            self._base_report = _report_of(source, self._base_report)

    def _find_damage(self) -> dict[int, Exception]:
        """Close a restore whose layers were waited for; return what only a device could see."""
        with self._restore_lock:
            source, self._restored = self._restored, None
            if source is None:
                return {}
            source.close()
            self._base_report = _report_of(source, self._base_report)
            return dict(source.damaged())

    def _repair(self, damaged: dict[int, Exception]) -> None:
        """Compute damaged layers anew; whatever was computed from them is wrong.

        Raises
        ------
        CorruptionError, OSError
            The history cannot be recomputed.
        """
        if not damaged:
            return
        error = next(iter(damaged.values()))
        n_tokens = max(self.layers[index].get_seq_length() for index in damaged)
        blocker = self._why_not_recompute(n_tokens)
        if blocker:
            self._lose_tokens("what was restored of it is damaged")
            raise _with_reason(error, f"the history cannot be recomputed: {blocker}") from error
        self._fill_from(self._run_history(n_tokens), list(damaged), n_tokens, error)

    def _fill_from(
        self, plain: DynamicCache, missing: list[int], n_tokens: int, error: Exception
    ) -> None:
        """Give layers the K and V that were computed anew, and note why."""
        for index in missing:
            layer = self.layers[index]
            layer._fill(plain.layers[index].keys, plain.layers[index].values)
            layer.pending = None
            self._n_recomputed[index] = layer.get_seq_length()
        self._notes.append(
            f"recomputed layers {', '.join(map(str, missing))} from {n_tokens} tokens because "
            f"they could not be read: {error}"
        )

    def _drop_restore(self, *, is_last: bool = False) -> None:
        """Stop a restore whose result is not wanted any more.

        Reads that hang are waited for only where this is the last that the cache does.
        """
        restored, self._restored = self._restored, None
        if restored is not None:
            restored.close()
        if self.source is None:
            return
        if self._snapshots:
            # A save that is under way needs what is still coming.
            self._wait_for_saves()
        with self._restore_lock:
            if self.source is not None:
                if is_last:
                    self.source.cancel()
                else:
                    self.source.abandon()
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
        source.abandon()
        n_tokens = max(self.layers[index].get_seq_length() for index in missing)
        blocker = self._why_not_recompute(n_tokens)
        if blocker:
            self._restore_failure = _with_reason(
                error, f"the history cannot be recomputed: {blocker}"
            )
            raise self._restore_failure from error
        self._fill_from(self._run_history(n_tokens), missing, n_tokens, error)

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
        device = input_device(model)
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
                    # A copy: xglm of transformers 4 adds to what it is given, in place.
                    inputs["position_ids"] = positions[..., start:end].clone().to(device)
                if "logits_to_keep" in accepted:
                    inputs["logits_to_keep"] = 1
                if "cache_position" in accepted:
                    inputs["cache_position"] = torch.arange(start, end, device=device)
                model(**inputs)

        run_apart(run, device)
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
            elif is_sliding(layer):
                set_sliding_state(layer, *sliding_state(other))

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

    @overload
    def save(self, *, wait: Literal[True] = True) -> SaveReport: ...

    @overload
    def save(self, *, wait: Literal[False]) -> Future[SaveReport]: ...

    def save(self, *, wait: bool = True) -> SaveReport | Future[SaveReport]:
        """Compress, guard and commit what is new since the last save.

        Parameters
        ----------
        wait : bool
            False returns a future at once; the model may go on meanwhile, and the save takes the
            processor time that it leaves.

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
        if wait:
            self._wait_for_saves()
        with self._lock:
            if self.save_report is not None and not self._snapshots and self._is_all_saved():
                future: Future[SaveReport] = Future()
                future.set_result(self.save_report)
                return self.save_report if wait else future
            snapshot = self._take_snapshot()
            self._snapshots.append(snapshot)
            if not wait:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(
                        1, thread_name_prefix="krul-save", initializer=_yield_processors
                    )
                self._future = self._executor.submit(self._run_save, snapshot)
                return self._future
        return self._run_save(snapshot)

    def _is_all_saved(self) -> bool:
        known = self._known()
        return (
            known is not None
            and self._saved_ids is not None
            and self._saved_ids.shape == known[0].shape
            and self._n_saved_of(known[0]) == known[0].shape[1]
        )

    def _take_snapshot(self) -> Snapshot:
        self._order_streams()
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
        similarity = None if self.estimator is None else self.estimator.result()
        return Snapshot(*known, layers, similarity)

    def _order_streams(self) -> None:
        """Have what comes to other devices ordered before what this thread does there.

        The thread of a save cannot tell which stream a layer was waited for on.
        """
        for layer in self.layers:
            if (
                isinstance(layer, KrulLayer)
                and layer.pending is not None
                and any(x is not None and is_elsewhere(x) for x in layer._buffers)
            ):
                layer.wait()
        self._repair(self._find_damage())

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
        if is_sliding(layer):
            if layer.cumulative_length != n_tokens:
                raise ValueError(
                    f"layer {index} has seen {layer.cumulative_length} tokens "
                    f"but the cache {n_tokens}"
                )
            n_held = min(sliding_n_held(layer), layer.sliding_window - 1)
            first = sliding_n_held(layer) - n_held
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
            if self.costs is not None:
                self.costs.save()
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
        # First, so that a pass in another thread fails instead of using layers that are not filled.
        self._is_closed = True
        self._wait_for_saves()
        self._drop_restore(is_last=True)
        if self.estimator is not None:
            self.estimator.wait()
        self._feed = None
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        for layer in self.layers:
            if isinstance(layer, KrulLayer):
                layer.reset()
            elif is_sliding(layer):
                set_sliding_state(layer, None, None, 0)
        self._history, self._lost_reason = None, "the cache is closed"
        self._note_times()
        self._timed.clear()
        if self.costs is not None:
            self.costs.save()
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
        for name in ("_lock", "_restore_lock", "_executor", "_future", "_snapshots"):
            del state[name]
        del state["_feed"], state["_timed"]
        state["_history"] = copy.deepcopy(self._history)
        state["_close_callbacks"] = []
        state["_base_report"] = self.restore_report
        state.update(
            model=None,
            conversation=None,
            ask_partial=str,
            estimator=None,
            costs=None,
            profile=None,
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


def _yield_processors() -> None:
    """Let every other thread go first; the threads that this one starts inherit that."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SAVE_NICENESS)
