"""The stored segments of a conversation on their way into a cache's layers.

Threads of the C library read, check and decode blocks; the model waits for a layer only where it
needs it. What takes longer to load than to compute is recomputed meanwhile: `Source.prepare` plans
that when the next prompt is known, from what was measured here before and from how fast the store
has been in this very restore.
"""

from __future__ import annotations

import bisect
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import _core, blas
from .compressor import CODECS, MAX_BLOCK_TOKENS
from .costs import UNKNOWN_DECODE_BYTES_PER_S, CostBook, ForwardCost
from .device import (
    CPU,
    Landing,
    Stopwatch,
    is_direct,
    is_elsewhere,
    record_use,
    stream_of,
    synchronize,
)
from .errors import (
    CorruptionError,
    DeviceError,
    FormatError,
    KrulError,
    UnsupportedModelError,
)
from .manifest import BOTH, Entry, LayerLayout, Manifest, SegmentInfo
from .meet import Block, columns_between, meet
from .plan import Costs, Plan, plan
from .predictor import check_products, make_predictor
from .profile import Profile
from .reports import RestoreReport
from .settings import Settings
from .store import ConversationFiles

__all__ = ["KeysAndValues", "Source", "decode_windows", "starts_by_layer", "whole_blocks"]

_PREDICT = CODECS["predict"]

KeysAndValues = tuple[torch.Tensor, torch.Tensor]

# Tokens of room behind a restored history, so that the first turns do not copy it.
_ROOM_TOKENS = 256

# Each tensor starts at a multiple of this within the one allocation that holds all layers.
_ALIGNMENT_BYTES = 64

# The new prompt that a restore is planned for until the real one is known.
_EXPECTED_PROMPT_TOKENS = 64

# A store that gives every block in less is read from before there is a plan: making one takes so
# long, and which blocks come first hardly matters there.
_PLANNING_S = 1e-3

# Before a restore has read so much, what was measured earlier says more about the store; unless it
# is late by more than this many times and seconds.
_TRUSTED_READ_BYTES = 1 << 20
_LATE, _TRUSTED_READ_S = 4.0, 0.05

# Restores that are planned anew while they run: those for which no shape was asked.
_ADAPTED = ("auto",)

# Loading is as good as a plan that saves no more of its time: predictions are not that exact.
_WORTH = 0.97

# What is recomputed at once when loading may still take the rest; fewer tokens take longer each.
_COLUMN_TOKENS = 256

# A history is run along with the new prompt up to so many tokens of both: the work of one pass less
# matters little for more, and what a pass needs of memory grows with them.
_MOST_IN_ONE_PASS = 2048

# How often a wait looks whether the store still gives what it promised, and how much longer than
# recomputing it may take: giving up throws away what was read.
_PATIENCE_POLL_S = 0.25
_PATIENCE = 2.0


class _Step(NamedTuple):
    """One block of full layers: which, which tokens, and what it takes to have it."""

    layers: tuple[int, ...]
    token_start: int
    token_end: int
    codec: int
    payload_bytes: int
    decoded_bytes: int
    fd: int
    entry: Entry
    buffers: tuple[torch.Tensor | None, ...]  # whole layers; None: on another step's device

    @property
    def n_tokens(self) -> int:
        """Tokens that it fills; fewer than the block's where a later save has cut the history."""
        return self.token_end - self.token_start


def turn_of(step: _Step, n_by_layer: list[int], n_near: float = math.inf) -> tuple[int, int, int]:
    """Return a block's place among all, when so many tokens of each layer are recomputed.

    What is needed comes from the end on, so that what lies where both sides may meet stays
    undecided the longest; the last `n_near` tokens of it, which the new prompt's pass need not wait
    for, in the order of the layers that need it first. The rest comes from the end on, the deepest
    layer first, in which order it may spare recomputing something; see `krul.meet`.
    """
    needed = [x for x in step.layers if step.token_end > n_by_layer[x]]
    if not needed:
        return 2, -step.token_start, -step.layers[-1]
    if step.token_start < n_by_layer[needed[0]] + n_near:
        return 1, needed[0], step.token_start
    return 0, -step.token_start, needed[0]


def _dims_and_dtype(layout: LayerLayout, kv: int) -> tuple[int, torch.dtype]:
    """Head size and dtype of a layer's K (0) or V (1)."""
    if kv == 0:
        return layout.key_head_dim, getattr(torch, layout.key_dtype)
    return layout.value_head_dim, getattr(torch, layout.value_dtype)


def _blocks(entries: Iterable[Entry], layer: int, kv: int) -> list[Entry]:
    """Return the blocks that hold a layer's K or V, in token order."""
    mine = (entry for entry in entries if entry.holds(layer, kv))
    return sorted(mine, key=lambda entry: entry.token_start)


class Source:
    """The stored segments of one conversation on their way into a cache's layers.

    Parameters
    ----------
    conversation : ConversationFiles
        Where the segments are.
    manifest : Manifest
        What it says of them.
    settings : Settings
    costs : CostBook, optional
        What was measured of this model and store; what this restore measures is added.
    find_profile : callable, optional
        Returns the profile of a digest; what it raises makes the segment count as damaged.
    devices : sequence of torch.device, optional
        Of each layer; the CPU where it is not given.

    Attributes
    ----------
    problems : list of str
        What was found damaged so far.
    """

    def __init__(
        self,
        conversation: ConversationFiles,
        manifest: Manifest,
        settings: Settings,
        costs: CostBook | None = None,
        find_profile: Callable[[str], Profile] | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:
        self.manifest, self.settings = manifest, settings
        n_layers = len(manifest.layers)
        self.devices = (*devices[:n_layers], *[CPU] * (n_layers - len(devices)))
        self._buffers: dict[int, KeysAndValues] = {}
        self._landings: dict[int, Landing] = {}  # of layers on another device
        self._direct: set[int] = set()  # layers whose device decodes what is stored
        self.costs = CostBook(None, "unknown") if costs is None else costs
        self._path = conversation.path
        self.problems: list[str] = []
        self._restores: list[_core.Restore] = []
        self._steps: list[_Step] = []
        self._starts: dict[int, set[int]] = {}  # where their blocks begin, by layer
        self._begun: list[_Step] = []  # those of the first restore, in its order
        self._files: list[tuple[SegmentInfo, int, list[Entry]]] = []
        # Of the segments that need one, by file; with what their products are of.
        self._profiles: dict[int, tuple[Profile, str]] = {}
        self._opened = self._begun_at = time.perf_counter()
        self._open_s = self._recompute_begin_s = 0.0
        self._recompute_watch: Stopwatch | None = None
        self._plan: Plan | None = None
        self._device_problem = ""
        self._notes: list[str] = []  # what became of the plan
        self._is_prepared = self._is_closed = False
        self._failure: UnsupportedModelError | DeviceError | None = None
        self._n_recomputed = [0] * len(manifest.layers)
        # The recomputed tokens of each layer that the order of what is read was first made for.
        self._ordered_for = [0] * len(manifest.layers)
        self._dropped = [0] * len(manifest.layers)  # tokens that the first restore has let go
        # Whether something is neither on its way nor written yet: let go, or never begun.
        self._is_owed = False
        for segment in manifest.segments:
            try:
                fd, entries = conversation.open_segment(segment, manifest)
            except (CorruptionError, FormatError, OSError) as error:
                self.problems.append(str(error))
                break
            try:
                if any(entry.codec == _PREDICT for entry in entries):
                    self._profiles[fd] = _profile_of(segment, find_profile)
            except (KrulError, OSError, LookupError, ValueError, NotImplementedError) as error:
                os.close(fd)
                self.problems.append(f"{segment.file} needs a profile: {error}")
                break
            self._files.append((segment, fd, entries))
        self._n_tokens = self.n_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens in intact segments; fewer than the manifest's where one is damaged."""
        return sum(segment.n_tokens for segment, _, _ in self._files)

    @property
    def segments(self) -> tuple[SegmentInfo, ...]:
        """The intact segments, oldest first."""
        return tuple(segment for segment, _, _ in self._files)

    def _drop_files(self, n_kept: int) -> None:
        for _, fd, _ in self._files[n_kept:]:
            self._profiles.pop(fd, None)
            os.close(fd)
        del self._files[n_kept:]

    def drop_newest(self, problem: str) -> None:
        """Give up the newest segment, because of what was found in it."""
        self.problems.append(problem)
        self._drop_files(len(self._files) - 1)
        self._n_tokens = self.n_tokens

    # ---- sliding windows -------------------------------------------------------------------------

    def windows(self) -> dict[int, KeysAndValues]:
        """Decode what the sliding layers held at the end of the newest intact segment.

        Raises
        ------
        CorruptionError, OSError
            A block is damaged or could not be read.
        """
        if not self._files:
            return {}
        _, fd, entries = self._files[-1]
        windows = decode_windows(self.manifest, fd, entries, self.settings.n_threads)
        return {
            layer: (keys.to(self.devices[layer]), values.to(self.devices[layer]))
            for layer, (keys, values) in windows.items()
        }

    # ---- full layers -----------------------------------------------------------------------------

    def buffers(self) -> dict[int, KeysAndValues]:
        """Make memory for every full layer: K and V, (n_batch, n_kv_heads, n_room, head_dim).

        It is on the layer's device. On the CPU all of it is one allocation, on huge pages where
        there are any, and used again by the next: a page fault for every 4 KB would take longer
        than decoding what goes there.
        """
        n_room = self.n_tokens + _ROOM_TOKENS
        wanted: list[_Wanted] = []
        for layer, layout in enumerate(self.manifest.layers):
            for kv in (0, 1) if layout.kind == "full" else ():
                head_dim, dtype = _dims_and_dtype(layout, kv)
                shape = (self.manifest.n_batch, layout.n_kv_heads, n_room, head_dim)
                wanted.append((self.devices[layer], dtype, shape))
        with torch.inference_mode(False), torch.no_grad():
            made = iter(_tensors(wanted))
            return {
                layer: (next(made), next(made))
                for layer, layout in enumerate(self.manifest.layers)
                if layout.kind == "full"
            }

    def buffers_of(self, layer: int) -> KeysAndValues:
        """Return the memory that a layer's K and V go to."""
        return self._buffers[layer]

    def start(self, buffers: dict[int, KeysAndValues]) -> None:
        """Start filling the buffers of the full layers.

        Shallow layers come first, each block with the first that needs it; where a part will
        probably be recomputed, blocks come from the end of the history on, and those of that part
        after everything else; see `krul.meet`. Nothing is read where that part is everything.
        """
        self._buffers = buffers
        self._direct = {layer for layer in buffers if is_direct(self.devices[layer])}
        try:
            self._start()
        except (DeviceError, MemoryError) as error:
            if not self._direct:
                raise
            # Slower, and with memory of the CPU only.
            self._direct = set()
            self._device_problem = f"blocks are decoded by the CPU: {error}"
            self._start()
        self._is_owed = not self._begun or any(self._required())
        self._open_s = time.perf_counter() - self._opened

    def _start(self) -> None:
        self._landings = {
            layer: Landing(pair, self.n_tokens)
            for layer, pair in self._buffers.items()
            if is_elsewhere(self.devices[layer]) and layer not in self._direct
        }
        room = {
            layer: pair if landing is None or landing.host is None else landing.host
            for layer, pair in self._buffers.items()
            for landing in [self._landings.get(layer)]
        }
        steps = [
            step
            for segment, fd, entries in self._files
            for step in _steps_of(entries, fd, segment, room)
        ]
        # As they are needed where nothing is recomputed.
        steps.sort(key=lambda step: (step.layers[0], step.token_start))
        self._n_tokens = self.n_tokens
        self._steps = steps
        if self.settings.restore != "recompute":
            self._begun = steps
        if self._is_quick():
            # The plan with the real prompt, in `prepare`, orders them if it must.
            self._begin([(step, step.buffers) for step in steps])
            self._starts = _starts_by_layer(steps)
            return
        self._starts = _starts_by_layer(steps)
        expected = self._whole_blocks(
            self._make_plan(_EXPECTED_PROMPT_TOKENS, self.n_tokens, "").n_recomputed_by_layer
        )
        if any(expected):
            order = self._order(expected, self._prompt_s(_EXPECTED_PROMPT_TOKENS))
            steps[:] = [steps[index] for index in order]
        self._ordered_for = expected
        self._begin([(step, step.buffers) for step in self._begun])

    def _is_quick(self) -> bool:
        """Whether planning the order would hold up more than blocks read in another one."""
        rate = self._read_rate()
        most = max((step.payload_bytes for step in self._begun), default=0)
        return rate is not None and 0 < most < _PLANNING_S * rate

    def _prompt_s(self, n_prompt_tokens: int) -> float:
        """Return what the new prompt's pass takes; 0 while that is not known."""
        forward = self.costs.forward()
        return 0.0 if forward is None else forward.seconds(n_prompt_tokens, self._n_tokens)

    def _order(self, n_by_layer: list[int], prompt_s: float) -> np.ndarray:
        """Return in which order steps are read when so many tokens are recomputed."""
        n_near = self._n_near(n_by_layer, prompt_s)
        turns = [turn_of(step, n_by_layer, n_near) for step in self._steps]
        return np.array(sorted(range(len(turns)), key=turns.__getitem__), np.int64)

    def _n_near(self, n_by_layer: Iterable[int], prompt_s: float) -> float:
        """Return the tokens that take at least as long to read as the new prompt's pass."""
        rate = self._read_rate()
        if rate is None or not any(n_by_layer):
            return math.inf
        n_bytes = sum(step.payload_bytes for step in self._steps)
        return max(_COLUMN_TOKENS, prompt_s * rate / max(1, n_bytes) * self._n_tokens)

    def _begin(self, steps: list[tuple[_Step, tuple[torch.Tensor | None, ...]]]) -> None:
        if not self._restores:
            self._begun_at = time.perf_counter()
        # What was decoded of a chain belongs to one restore.
        made: dict[tuple[str, str], _core.Predict] = {}
        predictors = {}
        for fd, (profile, products) in self._profiles.items():
            key = profile.digest, products
            if key not in made:
                made[key] = make_predictor(
                    profile, self._positions(), products, n_batch=self.manifest.n_batch
                )
            predictors[fd] = made[key]
        self._restores.append(
            _core.Restore(
                [
                    (step.fd, None, step.entry, buffers, predictors.get(step.fd), step.n_tokens)
                    for step, buffers in steps
                ],
                len(self.manifest.layers),
                self.settings.n_threads,
                max_bytes_per_s=self.settings.max_read_bytes_per_s,
                # The memory was this stream's a moment ago, or is another's use of it.
                streams=[stream_of(device) for device in self._direct_devices()],
                # A model that computes elsewhere, or leaves processors free, is not held up.
                takes_turns=not all(map(is_elsewhere, self.devices))
                and torch.get_num_threads() >= _n_cores(),
            )
        )
        problem = self._restores[-1].predict_problem()
        if problem:
            self._device_problem = f"codec predict is decoded by the CPU: {problem}"

    def _direct_devices(self) -> set[torch.device]:
        return {self.devices[layer] for layer in self._direct}

    @property
    def is_direct(self) -> bool:
        """Whether devices decode, so that what was waited for need not be over yet."""
        return bool(self._direct)

    def _positions(self) -> np.ndarray:
        if self.manifest.positions is None:
            return np.arange(self.manifest.n_tokens)
        return self.manifest.positions

    # ---- what is recomputed ----------------------------------------------------------------------

    def prepare(
        self,
        n_prompt_tokens: int,
        n_tokens: int,
        why_not: Callable[[], str],
        recompute: Callable[..., None],
        in_one_pass: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Decide, once, what is recomputed instead of being waited for, and do that.

        Parameters
        ----------
        n_prompt_tokens : int
            Of the forward pass that is about to begin; 0 where there is none.
        n_tokens : int
            Tokens that the cache still holds; fewer than were stored where the history changed.
        why_not : callable
            Says why nothing can be recomputed, or nothing when it can; asked where it matters.
        recompute : callable
            Writes K and V of so many tokens of each layer, from the first; with ``chunk_ends`` and
            ``before_chunk`` as `krul.recompute.recompute_prefix` has them. What it raises is noted,
            and the same tokens are loaded after all.
        in_one_pass : callable, optional
            Says whether the pass that is about to begin can run the history along with its tokens.

        Returns
        -------
        bool
            Whether it is to do so: then nothing is written by others any more, and `end_pass` must
            follow.
        """
        if self._is_prepared or not self._restores:
            return False
        self._is_prepared = True
        self._n_tokens = n_tokens
        self._plan = self._make_plan(n_prompt_tokens, n_tokens, "")
        whole = self._one_pass_plan(self._plan)
        is_wanted = any(self._plan.n_recomputed_by_layer)
        blocker = why_not() if is_wanted or whole is not None else ""
        if blocker and is_wanted:
            self._plan = self._make_plan(n_prompt_tokens, n_tokens, blocker)
        elif whole is not None and not blocker and in_one_pass():
            self._plan = whole
            self._begin_recompute()
            self._drop(list(whole.n_recomputed_by_layer))
            return True
        n_by_layer = self._whole_blocks(self._plan.n_recomputed_by_layer)
        if blocker and any(n_by_layer):
            self._failure = UnsupportedModelError(
                f"the first {max(n_by_layer)} tokens are not stored, to be recomputed: {blocker}"
            )
        elif any(n_by_layer):
            self._recompute(n_by_layer, n_prompt_tokens, recompute)
        else:
            if not self._begun:
                self._load_after_all()
            elif n_by_layer != self._ordered_for:
                self._reorder(n_by_layer, n_prompt_tokens)
            # Before the model's own threads are awake: they would look for work all the while.
            self._restores[-1].wait_for(0, _PATIENCE_POLL_S)
        return False

    def end_pass(self, *, is_failed: bool) -> None:
        """Take note that the pass has ended that was to run the history, see `prepare`.

        Where it failed, the history is loaded after all, or planned for anew by whoever asks next
        where not all of it is stored.
        """
        if not is_failed:
            self._end_recompute()
        elif any(self._required()):
            self._is_prepared = False
        else:
            self._load_after_all()
            self._notes.append("the pass over history and prompt failed")

    def _reorder(self, n_by_layer: list[int], n_prompt_tokens: int) -> None:
        self._restores[0].reorder(self._order(n_by_layer, self._prompt_s(n_prompt_tokens)))

    def _recompute(
        self, n_by_layer: list[int], n_prompt_tokens: int, recompute: Callable[..., None]
    ) -> None:
        """Recompute so many tokens of each layer, or fewer when loading has caught up."""
        if self._begun and n_by_layer != self._ordered_for:
            self._reorder(n_by_layer, n_prompt_tokens)
        chunks = self._chunks(n_by_layer, n_prompt_tokens)
        self._begin_recompute()
        try:
            if not chunks:
                n_by_layer = list(map(max, n_by_layer, self._dropped))
                self._drop(n_by_layer)
            recompute(n_by_layer if not chunks else self._most(n_by_layer), **chunks)
        except BaseException as error:
            if any(self._required()):
                self._is_prepared = False  # there is no other way: whoever asks next tries again
                raise
            self._load_after_all()
            if not isinstance(error, Exception):
                raise
            self._notes.append(f"recomputing failed: {type(error).__name__}: {error}")
            return
        self._end_recompute()
        if self._n_recomputed != n_by_layer:
            share = sum(self._dropped) / max(1, self._n_tokens * len(n_by_layer))
            self._notes.append(f"{100 * share:.3g} % when loading had caught up")

    def _begin_recompute(self) -> None:
        self._is_owed = True
        self._recompute_begin_s = time.perf_counter() - self._begun_at
        self._recompute_watch = Stopwatch(self.devices[0])

    def _end_recompute(self) -> None:
        assert self._recompute_watch is not None
        self._recompute_watch.stop()
        self._n_recomputed = list(self._dropped)
        self._is_owed = False

    @property
    def _recompute_s(self) -> float:
        """Seconds that recomputing took; 0 while that is not known."""
        watch = self._recompute_watch
        seconds = None if watch is None else watch.seconds()
        return 0.0 if seconds is None or math.isnan(seconds) else seconds

    def _most(self, n_by_layer: list[int]) -> list[int]:
        """Return all tokens for every layer that is recomputed at all."""
        return [self._n_tokens if n else 0 for n in n_by_layer]

    def _dropped_end(self, n_tokens: int) -> int:
        """Return where the blocks end that are not wanted when so many tokens are recomputed.

        Where that is all that is left, nothing stored behind it is wanted either.
        """
        return self.manifest.n_tokens if n_tokens == self._n_tokens else n_tokens

    def _drop(self, n_by_layer: list[int]) -> None:
        """Let go of the blocks that hold only what is recomputed."""
        for layer, n in enumerate(n_by_layer):
            if n > self._dropped[layer]:
                self._restores[0].drop(layer, self._dropped_end(n))
                self._dropped[layer] = n
        try:
            for device in self._direct_devices():
                # What was on its way there comes before what is about to be computed.
                self._restores[0].lead(*stream_of(device))
        except DeviceError:
            # Then that is waited for; layers that are not in will be computed, too.
            self._restores[0].abandon()

    def _chunks(self, n_by_layer: list[int], n_prompt_tokens: int) -> dict[str, Any]:
        """Return how recomputing is to ask, before each chunk, what has come meanwhile.

        Nothing where a plan is carried out as it is: a shape was asked for, a restore that failed
        is tried again, or the history was cut.
        """
        forward = self.costs.forward()
        can_adapt = (
            self.settings.restore in _ADAPTED
            and forward is not None
            and self._begun
            and not any(self._dropped)
            and self._n_tokens == self.n_tokens
            and not self._profiles
        )
        common = set.intersection(*self._starts.values()) if self._starts else set()
        if not can_adapt or forward is None or not common:
            return {}
        ends = columns_between(sorted(common), self._n_tokens, _COLUMN_TOKENS)
        meeting = _Meeting(self, self._most(n_by_layer), ends, forward, n_prompt_tokens)
        return {"chunk_ends": ends, "before_chunk": meeting.before_chunk}

    def _load_after_all(self) -> None:
        """Load what was dropped, or everything where nothing was begun."""
        again = []
        ends = [self._dropped_end(n) if self._begun else math.inf for n in self._dropped]
        for step in self._steps:
            buffers = tuple(
                buffer if step.token_end <= ends[layer] else None
                for layer, buffer in zip(step.entry.layer_of_view, step.buffers, strict=True)
            )
            # What is in already may be needed to predict what is not.
            if step.entry.codec == _PREDICT or any(buffer is not None for buffer in buffers):
                again.append((step, buffers))
        try:
            self._begin(again)
        except (DeviceError, MemoryError) as error:
            self._failure = DeviceError(f"{self._path}: {error}")
        self._is_owed = False

    def _whole_blocks(self, wanted: Iterable[int]) -> list[int]:
        kinds = [layout.kind for layout in self.manifest.layers]
        return whole_blocks(wanted, kinds, self._starts, self._n_tokens)

    def _read_rate(self) -> float | None:
        """Return bytes per second that the store gives: in this restore, or as it was before."""
        counts, known = self.counts(), self.costs.read_bytes_per_s
        limit = self.settings.max_read_bytes_per_s or math.inf
        if counts["read_bytes"] >= _TRUSTED_READ_BYTES:
            return min(limit, counts["read_bytes"] / max(counts["read_wall_s"], 1e-9))
        if known is None:
            return None if limit == math.inf else limit
        known = min(limit, known)
        # So much has been asked for and would have come long ago, had nothing changed.
        n_threads = self.settings.n_threads or os.cpu_count() or 1
        n_asked = counts["read_bytes"] + sum(x.payload_bytes for x in self._begun[:n_threads])
        if counts["read_wall_s"] > _LATE * n_asked / known + _TRUSTED_READ_S:
            return n_asked / counts["read_wall_s"]
        return known

    def _left(self) -> list[_Step]:
        """Return the blocks that are wanted and not in yet."""
        done: set[int] = set()
        if self._begun and self._restores:
            done = set(np.flatnonzero(self._restores[0].trace()[:, 0] >= 0).tolist())
        return [
            step
            for index, step in enumerate(self._steps)
            if index not in done and step.token_start < self._n_tokens
        ]

    def _blocks_left(self) -> list[tuple[tuple[int, ...], int, int, int]]:
        """Return what `CostBook.plan_costs` takes, those of the same layers and codec as one."""
        sums: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for step in self._left():
            sum_of = sums.setdefault((step.layers, step.codec), [0, 0])
            sum_of[0] += step.payload_bytes
            sum_of[1] += step.decoded_bytes
        return [
            (layers, codec, n_bytes, 0 if self._direct.issuperset(layers) else decoded_bytes)
            for (layers, codec), (n_bytes, decoded_bytes) in sums.items()
        ]

    def _cpu_bytes(self, step: _Step) -> int:
        """Return the bytes that the CPU has to decode; a device takes next to no time."""
        return 0 if self._direct.issuperset(step.layers) else step.decoded_bytes

    def _required(self) -> list[int]:
        """Return the tokens of each layer that are not stored, and so must be recomputed."""
        required = [0] * len(self.manifest.layers)
        for layer, starts in self._starts.items():
            required[layer] = min(self._n_tokens, min(starts))
        for layer in reversed(range(len(required) - 1)):  # what is above needs what is below
            required[layer] = max(required[layer], required[layer + 1])
        return required

    def _make_plan(self, n_prompt_tokens: int, n_tokens: int, blocker: str) -> Plan:
        """Plan what is recomputed, from the settings and from what was measured."""
        n_layers, settings = len(self.manifest.layers), self.settings
        wanted, required = settings.restore, self._required()
        read_rate = self._read_rate()
        costs = None
        if read_rate is not None:
            costs = self.costs.plan_costs(
                n_layers,
                self.manifest.n_batch,
                self._blocks_left(),
                read_bytes_per_s=read_rate,
                n_threads=settings.n_threads,
                block_tokens=MAX_BLOCK_TOKENS,
                first_block_tokens=settings.keep_first,
                decode_on_compute=not all(map(is_elsewhere, self.devices)),
            )
        if wanted == "load":
            blocker = "the settings ask for it"
        elif wanted == "auto" and not blocker and costs is None:
            missing = "read from this store" if read_rate is None else "forward pass of this model"
            blocker = f"no {missing} was measured here yet"
        is_known = costs is not None
        if costs is None:
            # Where a shape is asked for: as if loading were as fast as recomputing.
            costs = Costs(
                n_layers, linear_s_per_token=1e-3 / n_layers, read_s=1e-3 * n_tokens / n_layers
            )
        shapes = {"mixed": ("uniform", "pyramid", "step"), "load": ("auto",)}.get(wanted, (wanted,))
        if self._profiles and wanted in ("auto", "mixed"):
            shapes = ("uniform",)  # deeper layers are predicted from all of the shallower ones
        plans = [
            plan(
                costs,
                n_tokens,
                n_prompt_tokens,
                shape="load" if blocker else shape,
                n_required=required,
            )
            for shape in shapes
        ]
        best = min(plans, key=lambda each: each.predicted_s)
        if wanted == "auto" and best.load_s * _WORTH < best.predicted_s < best.load_s:
            best = plan(costs, n_tokens, n_prompt_tokens, shape="load", n_required=required)
        return replace(
            best,
            predicted_s=best.predicted_s if is_known else math.nan,
            reason=blocker or best.reason,
        )

    def _one_pass_plan(self, at_hand: Plan) -> Plan | None:
        """Return a plan to run the history along with the new prompt, if that is better.

        It saves what a pass costs whatever its tokens, and a long pass does more in a second.
        """
        forward, wanted = self.costs.forward(), self.settings.restore
        n_tokens = at_hand.n_tokens + at_hand.n_prompt_tokens
        if (
            forward is None
            or wanted not in ("auto", "recompute")
            or not 0 < at_hand.n_prompt_tokens < n_tokens <= _MOST_IN_ONE_PASS
            or any(layout.kind == "sliding" for layout in self.manifest.layers)
        ):
            return None
        n_layers = len(self.manifest.layers)
        # More rows cost more of everything but the overhead.
        per_row_s = forward.seconds(n_tokens) - forward.overhead_s
        seconds = forward.overhead_s + self.manifest.n_batch * per_row_s
        if wanted == "auto" and not seconds < at_hand.predicted_s:
            return None
        return replace(
            at_hand,
            shape="recompute",
            n_recomputed_by_layer=tuple(self._whole_blocks([at_hand.n_tokens] * n_layers)),
            predicted_s=seconds,
            reason=f"recompute: history and prompt in one pass take {seconds:.3g} s; otherwise "
            + at_hand.reason,
        )

    # ---- what a cache asks -----------------------------------------------------------------------

    def wait(self, layer: int, can_recompute: bool = False) -> None:
        """Wait until a layer is in, or, on another device, on its way there before what comes next.

        Parameters
        ----------
        layer : int
        can_recompute : bool
            Give up on a store that has become slower than recomputing everything.

        Raises
        ------
        CorruptionError, OSError
            A block of the layer is damaged or could not be read; or the source was closed before.
        TimeoutError
            The store is too slow.
        """
        assert self._restores
        if self._is_owed and self._failure is None:
            # An interrupt has torn off `prepare`, anywhere.
            if any(self._required()):
                raise CorruptionError(f"{self._path}: recomputing what is not stored was torn off")
            self._load_after_all()
        if self._failure is not None:
            raise self._failure
        try:
            for restore in self._restores:
                if can_recompute:
                    self._wait_patiently(restore, layer)
                if layer in self._direct:
                    restore.wait_stream(layer, stream_of(self.devices[layer])[1])
                else:
                    restore.wait(layer)
        except CorruptionError as error:
            raise CorruptionError(f"{self._path}: layer {layer}: {error}") from None
        for buffer in self._buffers[layer] if layer in self._direct else ():
            record_use(buffer)
        landing = self._landings.get(layer)
        if landing is not None:
            # What was recomputed is there already.
            n_there = self._n_recomputed[layer]
            landing.bring(self.manifest.n_tokens if n_there == self._n_tokens else n_there)

    def is_in(self) -> bool:
        """Whether every layer is where it belongs, on the CPU: then no `wait` takes any time."""
        if self._is_owed or self._failure is not None or any(map(is_elsewhere, self.devices)):
            return False
        try:
            for restore in self._restores:
                counts = restore.counts()
                if counts["n_steps_done"] < counts["n_steps"]:
                    return False
                for layer in self._buffers:
                    restore.wait(layer)
        except (CorruptionError, OSError):
            return False  # whoever waits for that layer is told
        return True

    def damaged(self) -> dict[int, CorruptionError | DeviceError]:
        """Return the layers that were waited for and are not right after all, and why.

        Only a device's own decoding can find that later; all of it is known after `close`.
        """
        found: dict[int, CorruptionError | DeviceError] = {}
        for layer in sorted(self._direct):
            for restore in self._restores:
                try:
                    restore.wait(layer)
                except (CorruptionError, DeviceError) as error:
                    found[layer] = error
                except InterruptedError:
                    pass  # it was not waited for
        return found

    def _wait_patiently(self, restore: _core.Restore, layer: int) -> None:
        started, before = time.perf_counter(), restore.counts()
        if restore.wait_for(layer, _PATIENCE_POLL_S):
            return
        forward = self.costs.forward()
        if forward is None:
            return
        recompute_s = forward.seconds(self._n_tokens) * self.manifest.n_batch
        allowed_s = _PATIENCE * recompute_s + _PATIENCE_POLL_S
        n_bytes = sum(step.payload_bytes for step in self._steps)
        is_in = False
        while not is_in:
            counts, waited_s = restore.counts(), time.perf_counter() - started
            n_new = counts["read_bytes"] - before["read_bytes"]
            n_left = n_bytes - counts["read_bytes"]
            if waited_s + n_left * waited_s / max(n_new, 1) > allowed_s and waited_s > recompute_s:
                raise TimeoutError(
                    f"{self._path}: the store gave {n_new:,} bytes in {waited_s:.2f} s and "
                    f"{n_left:,} are left; recomputing takes about {recompute_s:.2f} s"
                )
            is_in = restore.wait_for(layer, _PATIENCE_POLL_S)

    def counts(self) -> dict[str, Any]:
        """Return steps, bytes and seconds so far; see ``_core.Restore.counts``."""
        total: dict[str, Any] = {
            "read_bytes": 0,
            "read_s": 0.0,
            "read_wall_s": 0.0,
            "decode_s": 0.0,
            "elapsed_s": 0.0,
            "by_codec": {},
        }
        for restore in self._restores:
            counts = restore.counts()
            for name in ("read_bytes", "read_s", "read_wall_s", "decode_s", "elapsed_s"):
                total[name] += counts[name]
            for codec, (n_bytes, seconds) in counts["by_codec"].items():
                known = total["by_codec"].get(codec, (0, 0.0))
                total["by_codec"][codec] = (known[0] + n_bytes, known[1] + seconds)
        return total

    def timeline(self) -> list[dict[str, Any]]:
        """Return what was done when, in seconds since the restore began; for a picture of it.

        Returns
        -------
        list of dict
            ``action``, ``layer``, ``worker``, ``start_s``, ``end_s``: a ``"load"`` and a
            ``"decode"`` for each block that was read, and one ``"recompute"``, of worker -1 and
            layer 0, where anything was recomputed.
        """
        events = []
        if self._recompute_s:
            end_s = self._recompute_begin_s + self._recompute_s
            events.append(("recompute", 0, -1, self._recompute_begin_s, end_s))
        traces = self._restores[0].trace().tolist() if self._begun else []
        for step, (worker, begin_s, read_s, turn_s, end_s) in zip(self._begun, traces, strict=True):
            if worker >= 0:
                events.append(("load", step.layers[0], int(worker), begin_s, read_s))
                events.append(("decode", step.layers[0], int(worker), turn_s, end_s))
        names = ("action", "layer", "worker", "start_s", "end_s")
        return [
            dict(zip(names, event, strict=True)) for event in sorted(events, key=lambda e: e[3])
        ]

    def cancel(self) -> None:
        """Drop what has not begun."""
        for restore in self._restores:
            restore.cancel()

    def abandon(self) -> None:
        """Cancel, and return when nothing is written any more; reads that hang are left behind.

        Files are closed when the last read has ended, which on a dead network may be never.
        """
        for restore in self._restores:
            restore.abandon()
        if not self._is_closed:
            self._is_closed = True
            threading.Thread(target=self._end_late, name="krul-abandoned", daemon=True).start()

    def close(self) -> None:
        """Cancel what is under way, wait for the threads, close the files.

        Once only; what was abandoned is not waited for.
        """
        if not self._is_closed:
            self._is_closed = True
            self._end()

    def _end(self) -> None:
        for restore in self._restores:
            restore.close()
        # Kept by the cache's `save` or `close`: the first token does not wait for a file.
        self.costs.add_restore(self.counts(), self.settings.max_read_bytes_per_s)
        self._drop_files(0)

    def _end_late(self) -> None:
        self._end()
        self.costs.save()

    def report(self) -> RestoreReport:
        """Return how the restore went, or goes."""
        counts = self.counts()
        planned = self._plan
        reason = "" if planned is None else planned.reason
        reasons = [reason, *self._notes, self._device_problem, *self.problems]
        n_loaded = [
            0 if layout.kind == "none" or not self._restores else self._n_tokens - n
            for layout, n in zip(self.manifest.layers, self._n_recomputed, strict=True)
        ]
        return RestoreReport(
            n_tokens=self._n_tokens if self._restores else 0,
            n_loaded_by_layer=tuple(n_loaded),
            n_recomputed_by_layer=tuple(self._n_recomputed),
            loaded_bytes=int(counts["read_bytes"]),
            predicted_s=math.nan if planned is None else planned.predicted_s,
            actual_s=max(counts["elapsed_s"], self._recompute_s),
            seconds_by_stage={
                "open": self._open_s,
                "read": counts["read_s"],
                "decode": counts["decode_s"],
                "recompute": self._recompute_s,
            },
            plan="load" if not any(self._n_recomputed) or planned is None else planned.shape,
            reason="; ".join(filter(None, reasons)),
        )


class _Meeting:
    """Asks, column by column, how much of what is left is still to be recomputed."""

    def __init__(
        self,
        source: Source,
        n_by_layer: list[int],
        ends: list[int],
        forward: ForwardCost,
        n_prompt_tokens: int,
    ) -> None:
        self.source, self.ends, self.forward = source, ends, forward
        self.most, self.n_by_layer = n_by_layer, list(n_by_layer)
        self.n_layers = len(self.n_by_layer)
        n_tokens = source._n_tokens
        prompt_s = forward.seconds(n_prompt_tokens, n_tokens) if n_prompt_tokens else 0.0
        self.prompt_by_layer_s = [prompt_s / self.n_layers] * self.n_layers
        self.required = source._required()
        self.started = time.perf_counter()
        self.expected_s = 0.0  # of what has been recomputed
        self.holding = [
            x for x, layout in enumerate(source.manifest.layers) if layout.kind == "full"
        ]

    def _work_s(self, start: int, end: int) -> float:
        """Return what a layer takes for the tokens of a column."""
        seconds = self.forward.seconds(end - start, start) / self.n_layers
        return seconds * self.source.manifest.n_batch

    def before_chunk(self, start: int, end: int) -> list[int]:
        """Decide, and let go of what is recomputed in the column that is next."""
        source = self.source
        synchronize(source.devices)  # so that the clock tells what the chunks before this took
        rate = source._read_rate()
        if rate is not None:
            self._decide(start, rate)
        n_here = [min(n, end) if n > start else 0 for n in self.n_by_layer]
        source._drop([max(n, known) for n, known in zip(n_here, source._dropped, strict=True)])
        self.expected_s += sum(self._work_s(start, n) for n in n_here if n > start)
        return self.n_by_layer

    def _decide(self, start: int, rate: float) -> None:
        source = self.source
        slowness = 1.0
        if self.expected_s > 0:
            slowness = (time.perf_counter() - self.started) / self.expected_s
        columns = [pair for pair in itertools.pairwise([0, *self.ends]) if pair[0] >= start]
        # A layer that has let a column pass is loaded from there on.
        n_going_on = sum(
            n >= start and most > 0 for n, most in zip(self.n_by_layer, self.most, strict=True)
        )
        work_s = [[slowness * self._work_s(*column)] * n_going_on for column in columns]
        blocks, there = self._on_the_way(columns, rate)
        # Where no block of a layer has come or can come, or not all is stored, it is recomputed.
        stuck = [
            (index, layer)
            for index, (begin, _) in enumerate(columns)
            for layer in self.holding
            if (index, layer) not in there or self.required[layer] > begin
        ]
        n_recomputed = meet(work_s, blocks, stuck, self.prompt_by_layer_s)
        for layer in range(self.n_layers):
            ends = [
                min(column[1], self.most[layer])
                for column, n_layers in zip(columns, n_recomputed, strict=True)
                if layer < n_layers
            ]
            self.n_by_layer[layer] = max([min(start, self.n_by_layer[layer]), *ends])
        prompt_s = sum(self.prompt_by_layer_s)
        source._restores[0].reorder(source._order(self.n_by_layer, prompt_s))

    def _on_the_way(
        self, columns: list[tuple[int, int]], rate: float
    ) -> tuple[list[Block], set[tuple[int, int]]]:
        """Return blocks that may come, from the end on, and columns and layers that have any."""
        source = self.source
        is_done = source._restores[0].trace()[:, 0] >= 0
        blocks: list[Block] = []
        there: set[tuple[int, int]] = set()
        n_threads = source.settings.n_threads or os.cpu_count() or 1
        begins = [begin for begin, _ in columns]
        everything = [source._n_tokens] * self.n_layers
        for index in sorted(
            range(len(source._begun)), key=lambda x: turn_of(source._begun[x], everything)
        ):
            step = source._begun[index]
            column = bisect.bisect_right(begins, step.token_start) - 1
            if column < 0:
                continue
            there.update((column, layer) for layer in step.layers)
            if not is_done[index]:
                speed = source.costs.decode_bytes_per_s(step.codec) or UNKNOWN_DECODE_BYTES_PER_S
                decode_s = source._cpu_bytes(step) / speed / n_threads
                blocks.append(Block(column, step.layers, step.payload_bytes / rate, decode_s))
        return blocks, there


_Wanted = tuple[torch.device, torch.dtype, tuple[int, ...]]


def _tensors(wanted: list[_Wanted]) -> list[torch.Tensor]:
    """Return new memory of each device, dtype and shape; see `Source.buffers`."""
    found: list[torch.Tensor] = []
    runs = [(one, len(list(run))) for one, run in itertools.groupby(wanted)]

    def stride_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        n_bytes = math.prod(shape) * dtype.itemsize
        return n_bytes + -n_bytes % _ALIGNMENT_BYTES

    n_bytes = sum(
        n * stride_bytes(dtype, shape)
        for (device, dtype, shape), n in runs
        if not is_elsewhere(device)
    )
    memory = torch.frombuffer(_core.Memory(max(1, n_bytes)), dtype=torch.uint8)
    start = 0
    for (device, dtype, shape), n in runs:
        if is_elsewhere(device):
            found += [torch.empty(shape, dtype=dtype, device=device) for _ in range(n)]
            continue
        # Few views at once: making one takes torch as long as decoding a block.
        step = stride_bytes(dtype, shape)
        run = memory[start : start + n * step].view(n, step)
        run = run[:, : math.prod(shape) * dtype.itemsize].view(dtype)
        run = run.unflatten(1, shape)
        found += [run[i] for i in range(n)]
        start += n * step
    return found


def _n_cores() -> int:
    """Return how many processors share nothing: torch starts no thread for the others."""
    try:
        is_shared = Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        is_shared = False
    return _core.n_processors() // 2 if is_shared else _core.n_processors()


def _profile_of(segment: SegmentInfo, find: Callable[[str], Profile] | None) -> tuple[Profile, str]:
    digest = segment.strategy.get("profile")
    if find is None or not isinstance(digest, str):
        raise LookupError(f"{digest!r} cannot be looked up")
    products = check_products(segment.strategy.get("products"))
    blas.find()
    return find(digest), products


def _starts_by_layer(steps: Iterable[_Step]) -> dict[int, set[int]]:
    return starts_by_layer(
        (x, kv, step.token_start) for step in steps for x in step.layers for kv in step.entry.kinds
    )


def starts_by_layer(blocks: Iterable[tuple[int, int, int]]) -> dict[int, set[int]]:
    """Return where both K and V of each layer have a block that begins, from (layer, kv, start)."""
    found: dict[tuple[int, int], set[int]] = {}
    for layer, kv, start in blocks:
        found.setdefault((layer, kv), set()).add(start)
    return {
        layer: starts & found.get((layer, 1), set())
        for (layer, kv), starts in found.items()
        if kv == 0
    }


def whole_blocks(
    wanted: Iterable[int], kinds: Iterable[str], starts: dict[int, set[int]], n_tokens: int
) -> list[int]:
    """Round down to where the blocks of every full layer begin: a block is read whole.

    Parameters
    ----------
    wanted : iterable of int
        Tokens of each layer that shall be recomputed.
    kinds : iterable of str
        Of each layer: ``"full"``, ``"sliding"`` or ``"none"``.
    starts : dict of int to set of int
        Where the blocks of full layers begin.
    n_tokens : int
        Of the history; all of it needs no rounding.

    Returns
    -------
    list of int
        Not growing with depth; 0 above the last layer that keeps anything.
    """
    result, most, kinds = [], n_tokens, list(kinds)
    for layer, (n, kind) in enumerate(zip(wanted, kinds, strict=True)):
        most = min(most, n)
        if kind == "full" and most < n_tokens:
            most = max((start for start in starts.get(layer, ()) if start <= most), default=0)
        result.append(most)
    for layer in reversed(range(len(result))):
        if kinds[layer] != "none":
            break
        result[layer] = 0
    return result


class _Place(NamedTuple):
    """Where the blocks of a layer, or of two, go on one device."""

    layers: tuple[int, ...]
    buffers: tuple[torch.Tensor | None, ...]  # as in `_Step`
    token_bytes: int  # decoded


def _places_of(entry: Entry, buffers: dict[int, KeysAndValues]) -> list[_Place]:
    """Return where a block goes, one place for each device that wants some of it."""
    layers = entry.layers
    if any(layer not in buffers for layer in layers):
        return []
    whole = (
        buffers[layers[0]] if entry.kv == BOTH else tuple([buffers[x][entry.kv] for x in layers])
    )
    # All that a block fills has one shape and dtype.
    token_bytes = entry.n_batch * entry.n_heads * entry.head_dim * whole[0].element_size()
    places = []
    for device in dict.fromkeys(buffer.device for buffer in whole):
        here = [buffer.device == device for buffer in whole]
        places.append(
            _Place(
                tuple(dict.fromkeys(itertools.compress(entry.layer_of_view, here))),
                tuple(
                    buffer if is_here else None for buffer, is_here in zip(whole, here, strict=True)
                ),
                token_bytes * sum(here),
            )
        )
    return places


def _steps_of(
    entries: Iterable[Entry], fd: int, segment: SegmentInfo, buffers: dict[int, KeysAndValues]
) -> Iterator[_Step]:
    """Yield what is to be done with the blocks of a segment, in their order."""
    end = segment.token_start + segment.n_tokens
    known: dict[tuple[int, int, int], list[_Place]] = {}
    for entry in entries:
        _, codec, kv, _, lower, upper, _, _, _, start, n_tokens, _, payload_bytes, _ = entry
        if start >= end:
            continue
        places = known.get((lower, upper, kv))
        if places is None:
            places = known[lower, upper, kv] = _places_of(entry, buffers)
        stop = min(end, start + n_tokens)
        for layers, into, token_bytes in places:
            n_bytes = (stop - start) * token_bytes
            yield _Step(layers, start, stop, codec, payload_bytes, n_bytes, fd, entry, into)


def decode_windows(
    manifest: Manifest, fd: int, entries: list[Entry], n_threads: int
) -> dict[int, KeysAndValues]:
    """Decode what each sliding layer held at the end of a segment."""
    jobs: list[Any] = []
    windows: dict[int, list[torch.Tensor]] = {}
    for layer, layout in enumerate(manifest.layers):
        for kv in (0, 1) if layout.kind == "sliding" else ():
            blocks = _blocks(entries, layer, kv)
            first = blocks[0].token_start
            n_held = sum(entry.n_tokens for entry in blocks)
            head_dim, dtype = _dims_and_dtype(layout, kv)
            with torch.inference_mode(False), torch.no_grad():
                shape = (manifest.n_batch, layout.n_kv_heads, n_held, head_dim)
                out = torch.empty(shape, dtype=dtype, device=CPU)
            for entry in blocks:
                start = entry.token_start - first
                view = out[:, :, start : start + entry.n_tokens]
                payload = _core.store_read_payload(fd, entry)
                jobs.append((entry.codec, kv, payload, entry.arrays_for(layer, view)))
            windows.setdefault(layer, []).append(out)
    _core.decode_blocks(jobs, n_threads)
    return {layer: (keys, values) for layer, (keys, values) in windows.items()}
