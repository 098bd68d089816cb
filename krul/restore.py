"""Bringing a conversation back: from its manifest to a cache whose layers fill in the background.

`open_cache` is what `Store.open` does. It answers at once with a cache that knows its length and
its token ids; threads of the C library read, check and decode blocks in layer order, and the model
waits for a layer only where it needs it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from . import _core
from .cache import Cache
from .errors import CorruptionError, DeviceError, FormatError, UnsupportedModelError
from .estimator import Estimator
from .fingerprint import Fingerprint, check_fingerprint
from .hooks import attach
from .layer import KrulLayer
from .model import generation_model, own_layers
from .probe import Capabilities, examine
from .reports import RestoreReport
from .settings import Settings
from .store import ConversationFiles, Entry, LayerLayout, Manifest, SegmentInfo

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Source", "open_cache"]

# Tokens of room behind a restored history, so that the first turns do not copy it.
_ROOM_TOKENS = 256

# Each tensor starts at a multiple of this within the one allocation that holds all layers.
_ALIGNMENT_BYTES = 64

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


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
    n_threads : int
        Threads of the C library; 0 means every processor.

    Attributes
    ----------
    problems : list of str
        What was found damaged so far.
    """

    def __init__(self, conversation: ConversationFiles, manifest: Manifest, n_threads: int) -> None:
        self.manifest, self.n_threads = manifest, n_threads
        self._path = conversation.path
        self.problems: list[str] = []
        self._restore: _core.Restore | None = None
        self._files: list[tuple[SegmentInfo, int, list[Entry]]] = []
        self._opened = time.perf_counter()
        self._open_s = 0.0
        self._n_loaded: tuple[int, ...] = ()
        for segment in manifest.segments:
            try:
                fd, entries = conversation.open_segment(segment, manifest)
            except (CorruptionError, FormatError, OSError) as error:
                self.problems.append(str(error))
                break
            self._files.append((segment, fd, entries))

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
            os.close(fd)
        del self._files[n_kept:]

    def drop_newest(self, problem: str) -> None:
        """Give up the newest segment, because of what was found in it."""
        self.problems.append(problem)
        self._drop_files(len(self._files) - 1)

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
        return _decode_windows(self.manifest, fd, entries, self.n_threads)

    # ---- full layers -----------------------------------------------------------------------------

    def buffers(self) -> dict[int, KeysAndValues]:
        """Make memory for every full layer: K and V, (n_batch, n_kv_heads, n_room, head_dim).

        All of it is one allocation, on huge pages where the system has them: a page fault for every
        4 KB would take longer than decoding what goes there.
        """
        n_batch = self.manifest.n_batch
        n_room = self.n_tokens + _ROOM_TOKENS
        places: list[tuple[int, tuple[int, ...], torch.dtype, int]] = []
        total = 0
        for layer, layout in enumerate(self.manifest.layers):
            for kv in (0, 1) if layout.kind == "full" else ():
                head_dim, dtype = _dims_and_dtype(layout, kv)
                shape = (n_batch, layout.n_kv_heads, n_room, head_dim)
                places.append((layer, shape, dtype, total))
                total += math.prod(shape) * dtype.itemsize
                total += -total % _ALIGNMENT_BYTES
        with torch.inference_mode(False), torch.no_grad():
            memory = torch.empty(total, dtype=torch.uint8)
            _core.advise_huge_pages(memory.data_ptr(), total)
            made = [
                (
                    layer,
                    memory[start : start + math.prod(shape) * dtype.itemsize]
                    .view(dtype)
                    .view(shape),
                )
                for layer, shape, dtype, start in places
            ]
        return {
            layer: (keys, values)
            for (layer, keys), (_, values) in zip(made[::2], made[1::2], strict=True)
        }

    def start(self, buffers: dict[int, KeysAndValues]) -> None:
        """Start filling the buffers of the full layers, shallow layers first."""
        steps: list[tuple[int, None, Entry, tuple[torch.Tensor, ...]]] = []
        for segment, fd, entries in self._files:
            end = segment.token_start + segment.n_tokens
            for entry in entries:
                layers = [x for x in (entry.layer_lower, entry.layer_upper) if x >= 0]
                if entry.token_start >= end or any(x not in buffers for x in layers):
                    continue
                stop = min(end, entry.token_start + entry.n_tokens)
                views = tuple(buffers[x][entry.kv][:, :, entry.token_start : stop] for x in layers)
                steps.append((fd, None, entry, views))
        steps.sort(key=lambda step: step[2].layer_lower)
        self._restore = _core.Restore(steps, len(self.manifest.layers), self.n_threads)
        n_tokens = self.n_tokens
        self._n_loaded = tuple(0 if x.kind == "none" else n_tokens for x in self.manifest.layers)
        self._open_s = time.perf_counter() - self._opened

    # ---- what a cache asks -----------------------------------------------------------------------

    def wait(self, layer: int) -> None:
        """Wait until a layer is in.

        Raises
        ------
        CorruptionError, OSError
            A block of the layer is damaged or could not be read; or the source was closed before.
        """
        assert self._restore is not None
        try:
            self._restore.wait(layer)
        except CorruptionError as error:
            raise CorruptionError(f"{self._path}: layer {layer}: {error}") from None

    def settle(self) -> None:
        """Wait for the layers as long as decoding, not reading, is what takes the time.

        Model and decoder share the processors of a CPU: one after the other they are faster than
        both at once. Where the store is slow the threads mostly sleep, and the model may begin.
        Failures are left to `wait`.
        """
        for layer in range(len(self.manifest.layers)):
            counts = self.counts()
            if counts["read_s"] > counts["decode_s"]:
                return
            with contextlib.suppress(CorruptionError, OSError):
                self.wait(layer)

    def counts(self) -> dict[str, float]:
        """Return steps, bytes and seconds so far; the seconds are summed over threads."""
        if self._restore is None:
            return {"read_bytes": 0, "read_s": 0.0, "decode_s": 0.0, "elapsed_s": 0.0}
        return self._restore.counts()

    def is_done(self, layer: int) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._restore is None or self._restore.is_done(layer)

    def cancel(self) -> None:
        """Drop what has not begun."""
        if self._restore is not None:
            self._restore.cancel()

    def close(self) -> None:
        """Cancel what is under way, wait for the threads, close the files."""
        if self._restore is not None:
            self._restore.close()
        self._drop_files(0)

    def report(self) -> RestoreReport:
        """Return how the restore went, or goes."""
        counts = self.counts()
        n_layers = len(self.manifest.layers)
        return RestoreReport(
            n_tokens=max(self._n_loaded, default=0),
            n_loaded_by_layer=self._n_loaded,
            n_recomputed_by_layer=(0,) * n_layers,
            loaded_bytes=int(counts["read_bytes"]),
            predicted_s=math.nan,
            actual_s=counts["elapsed_s"],
            seconds_by_stage={
                "open": self._open_s,
                "read": counts["read_s"],
                "decode": counts["decode_s"],
            },
            plan="load",
            reason="; ".join(self.problems),
        )


def _decode_windows(
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
                out = torch.empty(shape, dtype=dtype)
            for entry in blocks:
                start = entry.token_start - first
                view = out[:, :, start : start + entry.n_tokens]
                payload = _core.store_read_payload(fd, entry)
                jobs.append((entry.codec, kv, payload, entry.arrays_for(layer, view)))
            windows.setdefault(layer, []).append(out)
    _core.decode_blocks(jobs, n_threads)
    return {layer: (keys, values) for layer, (keys, values) in windows.items()}


def _roll_back(
    conversation: ConversationFiles, cache: Cache, n_tokens: int
) -> tuple[int, dict[int, KeysAndValues]] | None:
    """Find the longest stored boundary up to `n_tokens`, and the sliding windows that end there."""
    manifest = conversation.read_manifest()
    if manifest is None or manifest.generation != cache.generation:
        return None
    for segment in reversed(manifest.segments):
        end = segment.token_start + segment.n_tokens
        if end > min(n_tokens, cache.n_saved_tokens):
            continue
        fd, entries = conversation.open_segment(segment, manifest)
        try:
            windows = _decode_windows(manifest, fd, entries, cache.settings.n_threads)
        finally:
            os.close(fd)
        device = next(x.device for x in cache.layers if getattr(x, "is_initialized", False))
        return end, {layer: (k.to(device), v.to(device)) for layer, (k, v) in windows.items()}
    return None


# ---- opening -------------------------------------------------------------------------------------


def open_cache(
    store: Store, conversation_id: str, model: Any, settings: Settings | None = None
) -> Cache:
    """Return the cache of a stored conversation; `Store.open` is this.

    Parameters
    ----------
    store : Store
    conversation_id : str
    model : transformers model
        Asked what works with it; the first time costs a few forward passes of 24 tokens.
    settings : Settings, optional

    Returns
    -------
    Cache
        Empty where nothing is stored, else filling in the background.

    Raises
    ------
    UnsupportedModelError
        krul cannot keep this model's state; the message says why and what to use instead.
    MismatchError
        The conversation was written by another model.
    FormatError
        The conversation is of a later version of the format.

    Notes
    -----
    A damaged manifest or segment does not raise: what is intact before it is used, a warning and
    the restore report say what was found, and `generate` recomputes the rest.
    """
    settings = Settings() if settings is None else settings
    device = generation_model(model).get_input_embeddings().weight.device
    if device.type not in ("cpu", "meta"):
        raise DeviceError(
            f"model is on {device} but this version keeps and restores caches on cpu only; "
            "move the model with model.to('cpu')"
        )
    conversation = store.files(conversation_id)
    manifest, problem = _read_manifest(conversation)
    # Threads read and decode while the model is looked at; what they decode of another model's
    # conversation is thrown away.
    arrival = None if manifest is None else _Arrival(conversation, manifest, settings)
    cache = None
    try:
        capabilities, present = examine(model)
        if capabilities.cache is not None:
            raise UnsupportedModelError(capabilities.cache)
        if manifest is not None:
            check_fingerprint(_stored_fingerprint(manifest), present)
        cache = _new_cache(model, settings, capabilities)
        cache.conversation, cache.fingerprint = conversation, present
        cache.handle = attach(model)
        if arrival is not None:
            arrival.fill(cache)
        elif problem:
            cache.note(problem)
    except BaseException:
        if arrival is not None:
            arrival.source.close()
        if cache is not None:
            cache.close()
        raise
    return cache


def _new_cache(model: Any, settings: Settings, capabilities: Capabilities) -> Cache:
    cache = Cache(model=generation_model(model), settings=settings)
    if capabilities.recompute is not None:
        cache.recompute_blocker = capabilities.recompute
    if settings.estimator_rows != 0 and capabilities.observe is None:
        cache.estimator = Estimator(
            len(own_layers(model)),
            rows=settings.estimator_rows,
            n_threads=settings.n_threads,
        )
    return cache


def _stored_fingerprint(manifest: Manifest) -> Fingerprint:
    parts = manifest.fingerprint.get("parts", {})
    return Fingerprint(manifest.fingerprint["exact"], manifest.behaviour, parts, ())


def _read_manifest(conversation: ConversationFiles) -> tuple[Manifest | None, str]:
    try:
        return conversation.read_manifest(), ""
    except (CorruptionError, FormatError) as error:
        if conversation.has_later_version():
            raise
        problem = f"the conversation cannot be read and starts empty: {error}"
        warnings.warn(problem, RuntimeWarning, stacklevel=4)
        return None, problem


class _Arrival:
    """A stored conversation on its way, before there is a cache to take it.

    A segment that is found damaged here is dropped with all after it.
    """

    def __init__(
        self, conversation: ConversationFiles, manifest: Manifest, settings: Settings
    ) -> None:
        self.conversation, self.manifest, self.settings = conversation, manifest, settings
        self.source = source = Source(conversation, manifest, settings.n_threads)
        self.windows: dict[int, KeysAndValues] = {}
        self.buffers: dict[int, KeysAndValues] = {}
        try:
            while source.n_tokens:
                try:
                    self.windows = source.windows()
                    break
                except (CorruptionError, OSError) as error:
                    source.drop_newest(str(error))
            self.n_tokens = source.n_tokens
            if self.n_tokens:
                self.buffers = source.buffers()
            if self.n_tokens and settings.restore != "recompute":
                source.start(self.buffers)
        except BaseException:
            source.close()
            raise

    def fill(self, cache: Cache) -> None:
        """Give the cache its tokens, and its layers the memory that is being filled."""
        manifest, source, n_tokens = self.manifest, self.source, self.n_tokens
        conversation = self.conversation
        cache.generation, cache.created_s = manifest.generation, manifest.created_s
        if source.problems:
            problems = "; ".join(source.problems)
            warnings.warn(
                f"{n_tokens} of {manifest.n_tokens} stored tokens can be used: {problems}",
                RuntimeWarning,
                stacklevel=4,
            )
        if n_tokens == 0:
            source.close()
            cache.note("; ".join(source.problems))
            return
        ids, mask, positions = (
            None if array is None else torch.from_numpy(array[..., :n_tokens].copy())
            for array in (manifest.token_ids, manifest.attention_mask, manifest.positions)
        )
        assert ids is not None
        cache.record_history(ids, mask, positions)
        cache.rollback = lambda n: _roll_back(conversation, cache, n)
        while len(cache.layers) < len(manifest.layers):
            cache.layers.append(KrulLayer())
        for layer, (keys, values) in self.buffers.items():
            cache.layers[layer].take(keys, values, n_tokens)
        for layer, (keys, values) in self.windows.items():
            cache.set_window(layer, keys, values, n_tokens)
        cache.mark_saved(manifest.generation, source.segments)
        if self.settings.restore == "recompute":
            source.close()
            cache.recompute("settings ask for it")
            return
        cache.begin_restore(source, list(self.buffers))
