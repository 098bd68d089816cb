"""What `Cache.save` does: choose a strategy, encode the new tokens, guard, commit.

Everything works on a `Snapshot`, taken while the caller waits, so that a save may go on in the
background while the conversation does: tokens that are appended meanwhile lie behind the snapshot.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import _core, guard, selector
from .cache import Cache
from .compressor import CODECS, MAX_BLOCK_TOKENS
from .costs import CostBook
from .device import CPU, Marks, devices_of, on_cpu
from .encode import KEY, VALUE, Encoded, Encoder, Layer, Strategy, Work, dtype_name
from .errors import DTypeError, UnsupportedModelError
from .fingerprint import check_fingerprint, fingerprint
from .history import Snapshot
from .learn import learn
from .manifest import DTYPE_NUMBERS
from .model import layer_classes
from .plan import plan
from .predictor import check_products, make_predictor
from .reports import SaveReport
from .source import starts_by_layer, whole_blocks
from .store import CommitResult, Entry, LayerLayout, Manifest, SegmentInfo
from .strategy import error_of, find_predicted, strategies, summary

__all__ = ["N_QUERIES", "save_cache"]

_PREDICT = CODECS["predict"]

# Under which the book of costs has what integers do, where there is no profile to name.
_INTEGERS = "integers"
# And a profile, where tokens have steps of their own.
_BY_ATTENTION = " by attention"

#: Tokens that tell what is looked at.
N_QUERIES, _FEWEST_QUERIES = 128, 16
# New tokens, at least, among which some are kept better than others: of a short turn, most are near
# those that are asked.
_FEWEST_RANKED = 512


def _layer_of(state: Any, group: int) -> tuple[Layer | None, LayerLayout]:
    tensors = state.tensors()
    if tensors is None:
        return None, LayerLayout("none", 0, 0, 0, None, "float32", "float32")
    for name, tensor in zip(("keys", "values"), tensors, strict=True):
        if dtype_name(tensor) not in DTYPE_NUMBERS:
            raise DTypeError(
                f"{name} are {tensor.dtype} but must be float32, float16 or bfloat16 to be saved"
            )
    keys, values = tensors
    layout = LayerLayout(
        kind=state.kind,
        n_kv_heads=keys.shape[1],
        key_head_dim=keys.shape[3],
        value_head_dim=values.shape[3],
        window=state.sliding_window if state.kind == "sliding" else None,
        key_dtype=dtype_name(keys),
        value_dtype=dtype_name(values),
    )
    return Layer(state.kind, tensors, state.token_start, group), layout


def _kept_segments(
    segments: list[SegmentInfo], n_valid: int, is_whole_only: bool
) -> tuple[SegmentInfo, ...]:
    """Cut the stored segments down to the tokens that are still part of the conversation.

    What a sliding window held is stored for the end of each segment, so with such layers a segment
    is kept whole or not at all.
    """
    kept = []
    for segment in segments:
        n_tokens = min(segment.n_tokens, n_valid - segment.token_start)
        if n_tokens <= 0 or (is_whole_only and n_tokens < segment.n_tokens):
            break
        kept.append(replace(segment, n_tokens=n_tokens))
        if n_tokens < segment.n_tokens:
            break
    return tuple(kept)


def _prepare(cache: Cache, snapshot: Snapshot) -> Work:
    groups = layer_classes(cache.model)
    pairs = [
        _layer_of(state, groups[index] if index < len(groups) else -1)
        for index, state in enumerate(snapshot.layers)
    ]
    layers = tuple(layer for layer, _ in pairs)
    layouts = tuple(layout for _, layout in pairs)
    has_sliding = any(layer is not None and layer.kind == "sliding" for layer in layers)
    n_valid = cache.n_saved_in(snapshot)
    similarity, reason = None, "the estimator is off"
    if snapshot.similarity is not None:
        similarity = snapshot.similarity
        reason = similarity.skipped or ""
        if similarity.n_prefill_rows + similarity.n_decode_rows == 0:
            similarity, reason = None, reason or "no attention rows were observed"
    return Work(
        conversation=cache.conversation,
        model=cache.model,
        settings=cache.settings,
        snapshot=snapshot,
        layers=layers,
        layouts=layouts,
        segments=_kept_segments(list(cache.segments), n_valid, has_sliding),
        generation=cache.generation,
        fingerprint=cache.fingerprint,
        created_s=cache.created_s,
        similarity=similarity,
        similarity_reason=reason,
        profile=cache.profile,
        find_profile=cache.conversation.store.profiles.get,
        # This thread's streams follow the snapshot's, and layers that a restore was still bringing.
        marks=Marks(devices_of([x for layer in layers if layer for x in layer.tensors])),
    )


# ---- the guard's two caches ----------------------------------------------------------------------


class _Decoder:
    """K/V of a layer as it would come back: kept segments from disk, new blocks from memory."""

    def __init__(self, work: Work, strategy: Strategy, encoded: list[Encoded]) -> None:
        self.work = work
        self.new = [(block.entry, block.payload) for block in encoded]
        self.memory: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self.stored: list[tuple[int, list[Entry]]] = []
        self.predictors: list[_core.Predict | None] = []  # of the stored segments, then of the new
        # One for each profile and kind of products: no two chains begin alike.
        self.made: dict[tuple[str, str], _core.Predict] = {}
        try:
            for segment in work.segments:
                self.stored.append(work.conversation.open_segment(segment))
                self.predictors.append(self._predictor(segment.strategy))
            is_predicted = any(entry.codec == _PREDICT for entry, _ in self.new)
            self.predictors.append(self._predictor(strategy.to_dict() if is_predicted else {}))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the segments' files."""
        for fd, _ in self.stored:
            os.close(fd)
        self.stored = []

    def _predictor(self, strategy: dict[str, Any]) -> _core.Predict | None:
        work = self.work
        digest = strategy.get("profile")
        if digest is None:
            return None
        products = check_products(strategy.get("products"))
        if (digest, products) not in self.made:
            if work.profile is not None and work.profile.digest == digest:
                profile = work.profile
            else:
                assert work.find_profile is not None
                profile = work.find_profile(digest)
            self.made[digest, products] = make_predictor(
                profile, work.positions(), products, n_batch=work.n_batch
            )
        return self.made[digest, products]

    def layer(self, layer: int, n_before: int) -> guard.KeysAndValues:
        """Keys and values of the tokens before position `n_before` that the layer would hold."""
        state = self.work.layers[layer]
        assert state is not None
        sources: list[list[tuple[Entry, Any]]] = []
        n_dropped = 0
        if state.kind == "full":
            for (fd, entries), segment in zip(self.stored, self.work.segments, strict=True):
                end = segment.token_start + segment.n_tokens
                sources.append([(entry, fd) for entry in entries if entry.token_start < end])
                n_dropped = max(n_dropped, segment.n_dropped(layer))
        sources.append(self.new)
        predictors = self.predictors if state.kind == "full" else self.predictors[-1:]
        mine = [
            [(entry, where) for entry, where in source if layer in entry.layers]
            for source in sources
        ]
        n_room = max(e.token_start + e.n_tokens for source in mine for e, _ in source)
        outs = [self._room(kv, state, n_room) for kv in (KEY, VALUE)]
        for source, predictor in zip(mine, predictors, strict=True):
            # In this order: a cropped segment's tail is overwritten by the next.
            self._decode(layer, source, predictor, outs, state.token_start)
        for out, like in zip(outs, state.tensors, strict=True):
            # What is not stored comes back exact: it is computed again.
            out[:, :, :n_dropped] = like[:, :, :n_dropped]
        keys, values = (
            out[:, :, : n_before - state.token_start].to(like.device)
            for out, like in zip(outs, state.tensors, strict=True)
        )
        return keys, values

    def _room(self, kv: int, state: Layer, n_room: int) -> torch.Tensor:
        """Return memory for a layer's K or V; two layers of one shape take turns in it."""
        like = state.tensors[kv]
        shape = (like.shape[0], like.shape[1], n_room - state.token_start, like.shape[3])
        out = self.memory.get((kv, shape, like.dtype))
        if out is None:
            out = self.memory[kv, shape, like.dtype] = torch.empty(
                shape, dtype=like.dtype, device=CPU
            )
        return out

    def _decode(
        self,
        layer: int,
        source: list[tuple[Entry, Any]],
        predictor: _core.Predict | None,
        outs: list[torch.Tensor],
        token_start: int,
    ) -> None:
        jobs: list[Any] = []
        runs: list[Any] = []
        for entry, where in source:
            payload = where if isinstance(where, bytes) else _core.store_read_payload(where, entry)
            first = entry.token_start - token_start
            views = [out[:, :, first : first + entry.n_tokens] for out in outs]
            if entry.codec == _PREDICT:
                place = (layer, entry.token_start, entry.n_tokens)
                runs.append([(*place, payload, views[KEY], views[VALUE])])
            else:
                arrays = entry.arrays_for(layer, views[entry.kv])
                jobs.append((entry.codec, entry.kv, payload, arrays))
        _core.decode_blocks(jobs, self.work.settings.n_threads)
        if runs:
            assert predictor is not None
            predictor.decode(runs, self.work.settings.n_threads)


def _n_guard(work: Work) -> int:
    """How many tokens the guard can run so that half of the new ones lie before them."""
    n_guard = min(work.settings.guard_tokens, work.n_new_tokens // 2, work.n_tokens - 1)
    for state in work.layers:
        if state is not None and state.kind == "sliding":
            n_guard = min(n_guard, state.tensors[KEY].shape[2] // 2)
    return n_guard


def _n_queries(work: Work, n_guard: int) -> int:
    """How many tokens before the guard's tell what is looked at; 0 where there are too few."""
    if work.n_new_tokens - n_guard < _FEWEST_RANKED:
        return 0  # nothing to choose from
    n_queries = min(N_QUERIES, (work.n_tokens - n_guard) // 2)
    for state in work.layers:
        if state is not None and state.kind == "sliding":
            n_queries = min(n_queries, state.tensors[KEY].shape[2] // 2 - n_guard)
    return n_queries if n_queries >= _FEWEST_QUERIES else 0


def _held(work: Work, n_before: int, of_layer: Callable[[int], Callable[[], Any]]) -> guard.Held:
    return guard.Held(
        [None if state is None else of_layer(index) for index, state in enumerate(work.layers)],
        [0 if state is None else n_before - state.token_start for state in work.layers],
    )


def _new_guard(work: Work, n_guard: int) -> guard.Guard:
    def exact(n_before: int) -> guard.Held:
        def of_layer(index: int) -> Callable[[], Any]:
            state = work.layers[index]
            assert state is not None
            n_held = n_before - state.token_start
            return lambda: tuple(tensor[:, :, :n_held] for tensor in state.tensors)

        return _held(work, n_before, of_layer)

    return guard.Guard(
        work.model,
        token_ids=work.snapshot.token_ids,
        attention_mask=work.snapshot.attention_mask,
        position_ids=work.snapshot.positions,
        exact=exact,
        n_guard=n_guard,
    )


def _measure(
    work: Work, strategy: Strategy, encoded: list[Encoded], watch: guard.Guard
) -> guard.Verdict:
    decoder = _Decoder(work, strategy, encoded)
    n_before = watch.n_before
    try:
        return watch.measure(
            _held(work, n_before, lambda index: lambda: decoder.layer(index, n_before))
        )
    finally:
        decoder.close()


def _fineness(work: Work, watch: guard.Guard, notes: list[str]) -> np.ndarray | None:
    """Ask which tokens the model looks at, to keep them better; None where it cannot be."""
    n_queries = _n_queries(work, watch.n_guard)
    if n_queries == 0:
        return None
    try:
        received, n_seen = watch.received(n_queries)
    except UnsupportedModelError as error:
        notes.append(f"all tokens are kept alike: {error}")
        return None
    first = max(work.settings.keep_first, work.n_stored_tokens)
    n_after = work.n_tokens - received.shape[1]
    return selector.token_fineness(
        np.pad(received, ((0, 0), (0, n_after))), np.pad(n_seen, (0, n_after)), first
    )


def _check_bits(work: Work, encoder: Encoder, encoded: list[Encoded]) -> None:
    """Decode what claims to be exact and compare it bit for bit with what was encoded."""
    for block in encoded:
        entry = block.entry
        wanted = [
            on_cpu(
                encoder.tensor(
                    layer, entry.kv, entry.token_start, entry.token_start + entry.n_tokens
                )
            )
            for layer in entry.layers
        ]
        outs = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted)
        _core.decode_blocks([(entry.codec, entry.kv, block.payload, outs)], 1)
        bits = torch.int32 if outs[0].element_size() == 4 else torch.int16
        for out, tensor in zip(outs, wanted, strict=True):
            if not torch.equal(out.view(bits), tensor.contiguous().view(bits)):
                raise SystemError(
                    f"krul: layer {entry.layer_lower}, tokens from {entry.token_start}: the exact "
                    "codec does not give back what it was given; nothing was saved"
                )


# ---- the save ------------------------------------------------------------------------------------


def _select(
    encoder: Encoder, book: CostBook, seconds: dict[str, float], notes: list[str]
) -> tuple[Strategy, list[Encoded], guard.Verdict]:
    """Encode with the coarsest strategy that the guard accepts."""
    work = encoder.work
    settings = work.settings
    n_guard = _n_guard(work) if settings.guard_tokens else 0
    watch = _new_guard(work, n_guard)
    nothing = guard.Verdict(math.nan, math.nan, math.nan, 0)
    encoded: list[Encoded] = []
    if settings.codec in ("auto", "predict"):

        def measure(strategy: Strategy) -> tuple[list[Encoded], guard.Verdict]:
            started = time.perf_counter()
            made = encoder.encode(strategy)
            seconds["encode"] += time.perf_counter() - started
            if not settings.guard_tokens:
                return made, nothing
            started = time.perf_counter()
            verdict = _measure(work, strategy, made, watch)
            seconds["guard"] += time.perf_counter() - started
            book.add_divergence(known_as, strategy.step, verdict.mean_kl)
            return made, verdict

        if n_guard > 0 or (settings.codec == "predict" and not settings.guard_tokens):
            first, known_as = None, ""
            if encoder.predicted_layers():
                assert work.profile is not None
                started = time.perf_counter()
                encoder.fineness = _fineness(work, watch, notes)
                seconds["guard"] += time.perf_counter() - started
                is_plain = encoder.fineness is None
                known_as = work.profile.digest + ("" if is_plain else _BY_ATTENTION)
                first = book.step_for(known_as, settings.max_kl)
            found = find_predicted(encoder, notes, first, measure)
            if found is not None:
                if not settings.guard_tokens:
                    notes.append("the guard is off: nothing was measured")
                return found
    first = book.step_for(_INTEGERS, 1.0) if n_guard > 0 else None
    candidates = strategies(encoder, notes, None if first is None else first**-2)
    verdict: guard.Verdict | None = None
    while True:
        started = time.perf_counter()
        strategy = candidates.send(verdict)
        verdict = None
        if settings.guard_tokens and n_guard < 1 and not strategy.is_exact():
            continue
        encoded.clear()  # what was refused must not take memory beside what comes next
        encoded = encoder.encode(strategy)
        seconds["encode"] += time.perf_counter() - started
        started = time.perf_counter()
        if strategy.is_exact():
            _check_bits(work, encoder, encoded)
            seconds["guard"] += time.perf_counter() - started
            if settings.guard_tokens and n_guard < 1 and settings.codec != "exact":
                notes.append(f"{work.n_new_tokens} new tokens are too few to measure: exact")
            return strategy, encoded, guard.Verdict(0.0, 0.0, 1.0, 0)
        if not settings.guard_tokens:
            notes.append("the guard is off: nothing was measured")
            return strategy, encoded, nothing
        verdict = _measure(work, strategy, encoded, watch)
        seconds["guard"] += time.perf_counter() - started
        if settings.codec in ("auto", "predict"):
            step = math.sqrt(error_of(encoder, strategy))
            book.add_divergence(_INTEGERS, step, verdict.mean_kl)
        if verdict.accepts(settings.max_kl, settings.min_top1):
            return strategy, encoded, verdict
        notes.append(
            f"{summary(strategy)} refused: mean KL {verdict.mean_kl:.4f} (at most "
            f"{settings.max_kl:g}), top-1 {verdict.top1:.3f} (at least {settings.min_top1:g})"
        )


def _dropped(cache: Cache, work: Work, encoded: list[Encoded], notes: list[str]) -> tuple[int, ...]:
    """Return how many first tokens of each layer a restore would recompute anyway.

    The paper's storage mode: decided once, when a conversation is saved for the first time.
    """
    settings = work.settings
    if work.segments:
        return ()
    blocker = cache._why_not_recompute(work.n_tokens) or cache.partial_blocker
    if blocker:
        notes.append(f"all tokens are stored: {blocker}")
        return ()
    entries = [block.entry for block in encoded]
    book = cache.costs
    rate = settings.max_read_bytes_per_s or book.read_bytes_per_s
    costs = None
    if rate:
        if any(entry.codec == _PREDICT for entry in entries):
            notes.append("all tokens are stored: those of deeper layers are predicted from them")
            return ()
        blocks = []
        for entry in entries:
            n_values = entry.n_batch * entry.n_heads * entry.n_tokens * entry.head_dim
            element = work.layers[entry.layer_lower].tensors[entry.kinds[0]].element_size()
            n_bytes = len(entry.layer_of_view) * n_values * element
            blocks.append((entry.layers, entry.codec, entry.payload_bytes, n_bytes))
        costs = book.plan_costs(
            len(work.layers),
            work.snapshot.token_ids.shape[0],
            blocks,
            read_bytes_per_s=rate,
            n_threads=settings.n_threads,
            block_tokens=MAX_BLOCK_TOKENS,
            first_block_tokens=settings.keep_first,
        )
    if costs is None:
        missing = "forward pass of this model" if rate else "read from this store"
        notes.append(f"all tokens are stored: no {missing} was measured here yet")
        return ()
    shape = {"mixed": "auto", "load": "load"}.get(settings.restore, settings.restore)
    planned = plan(costs, work.n_tokens, 0, shape=shape)
    kinds = [layout.kind for layout in work.layouts]
    starts = starts_by_layer(
        (x, kv, e.token_start) for e in entries for x in e.layers for kv in e.kinds
    )
    # The last block always stays: a segment says by its blocks where it ends.
    most = [min(n, work.n_tokens - 1) for n in planned.n_recomputed_by_layer]
    return tuple(whole_blocks(most, kinds, starts, work.n_tokens))


def _without(encoded: list[Encoded], dropped: tuple[int, ...], work: Work) -> list[Encoded]:
    """Leave out the blocks of full layers that hold nothing but dropped tokens."""
    if not any(dropped):
        return encoded
    return [
        block
        for block in encoded
        if any(
            work.layouts[layer].kind != "full"
            or block.entry.token_start + block.entry.n_tokens > dropped[layer]
            for layer in block.entry.layers
        )
    ]


def _kv_elements(work: Work) -> tuple[int, int]:
    """Elements of K and V that the conversation holds, and their bytes in their own dtypes."""
    tensors = [t for state in work.layers if state is not None for t in state.tensors]
    return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)


def save_cache(cache: Cache, snapshot: Snapshot) -> SaveReport:
    """Bring a snapshot into the store, and tell the cache.

    Parameters
    ----------
    cache : Cache
        With a conversation and a model.
    snapshot : Snapshot
        What the cache held when the save was asked for.

    Returns
    -------
    SaveReport

    Raises
    ------
    MismatchError
        Somebody else saved this conversation since it was opened.
    StoreFullError
        No room; what was stored before stands.
    OSError
        Reading a kept segment or writing failed; what was stored before stands.

    Notes
    -----
    Peak memory beyond the cache itself: the coded bytes, two layers, and what two forward passes of
    the guard's tokens take, of which their logits, 4 bytes per token and entry of the vocabulary in
    a 16-bit model, are most.
    """
    seconds = {"estimate": 0.0, "encode": 0.0, "guard": 0.0, "commit": 0.0}
    notes: list[str] = []
    started = time.perf_counter()
    snapshot.follow()
    work = _prepare(cache, snapshot)
    seconds["estimate"] = time.perf_counter() - started
    encoder = Encoder(work)
    if work.n_new_tokens > 0:
        strategy, encoded, verdict = _select(encoder, cache.costs, seconds, notes)
    else:
        strategy = encoder.uniform("exact")
        encoded, verdict = [], guard.Verdict(math.nan, math.nan, math.nan, 0)
        notes.append("no new tokens: only the record of the history changed")
    notes += [f"{n} blocks were left to the CPU: {why}" for why, n in encoder.n_left.items()]
    fallen = sum(
        1
        for block in encoded
        if block.entry.codec == CODECS["exact"]
        and block.entry.token_start >= work.settings.keep_first
        and "exact" not in strategy.codecs[block.entry.layer_lower]
    )
    if fallen:
        notes.append(f"{fallen} blocks hold values that only exact can keep")
    dropped: tuple[int, ...] = ()
    if work.settings.drop_recomputed:
        dropped = _dropped(cache, work, encoded, notes)
        encoded = _without(encoded, dropped, work)
        if any(dropped):
            notes.append(f"the first {dropped[0]} to {min(dropped)} tokens are not stored")
    started = time.perf_counter()
    if strategy.profile and work.profile is not None:
        cache.conversation.store.profiles.keep(work.profile)
    result = _commit(work, strategy, encoded, verdict, dropped)
    seconds["commit"] = time.perf_counter() - started
    cache.created_s = result.manifest.created_s
    cache.mark_saved(result.generation, result.manifest.segments, snapshot)
    learn(work, notes)
    n_elements, model_dtype_bytes = _kv_elements(work)
    return SaveReport(
        n_tokens=work.n_tokens,
        n_new_tokens=work.n_new_tokens,
        stored_bytes=result.stored_bytes,
        new_bytes=result.new_bytes,
        bf16_bytes=2 * n_elements,
        model_dtype_bytes=model_dtype_bytes,
        ratio_bf16=2 * n_elements / result.stored_bytes,
        codec_by_layer=strategy.names(),
        pairs=strategy.pairs,
        guard_mean_kl=verdict.mean_kl,
        guard_max_kl=verdict.max_kl,
        guard_top1=verdict.top1,
        n_guard_tokens=verdict.n_tokens,
        seconds_by_stage=seconds,
        reason="; ".join(notes),
    )


def _commit(
    work: Work,
    strategy: Strategy,
    encoded: list[Encoded],
    verdict: guard.Verdict,
    dropped: tuple[int, ...],
) -> CommitResult:
    segments = list(work.segments)
    if encoded:
        segments.append(
            SegmentInfo(
                file="",
                token_start=work.n_stored_tokens,
                n_tokens=work.n_new_tokens,
                strategy=strategy.to_dict() | ({"dropped": list(dropped)} if any(dropped) else {}),
                guard={
                    "mean_kl": verdict.mean_kl,
                    "max_kl": verdict.max_kl,
                    "top1": verdict.top1,
                    "n_tokens": verdict.n_tokens,
                },
            )
        )
    present = fingerprint(work.model)
    if work.fingerprint is not None:
        # The K/V were made by the model as it was then; its adapters may have been changed since.
        check_fingerprint(work.fingerprint, present)
    snapshot = work.snapshot
    manifest = Manifest(
        token_ids=snapshot.token_ids.numpy(),
        layers=work.layouts,
        segments=tuple(segments),
        fingerprint={"exact": present.exact, "parts": present.parts},
        attention_mask=None if snapshot.attention_mask is None else snapshot.attention_mask.numpy(),
        positions=None if snapshot.positions is None else snapshot.positions.numpy(),
        behaviour=present.behaviour,
        settings=work.settings.to_dict(),
        created_s=work.created_s,
    )
    return work.conversation.commit(
        manifest,
        [block.entry for block in encoded],
        [block.payload for block in encoded],
        expected_generation=work.generation,
    )
