"""What `Cache.save` does: choose a strategy, encode the new tokens, guard, commit.

Everything works on a `Snapshot`, taken while the caller waits, so that a save may go on in the
background while the conversation does: tokens that are appended meanwhile lie behind the snapshot.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import _core, guard, selector
from .cache import Cache, Snapshot
from .compressor import CODECS, token_runs
from .errors import DTypeError
from .estimator import Similarity
from .fingerprint import Fingerprint, check_fingerprint, fingerprint
from .model import layer_classes
from .reports import SaveReport
from .settings import Settings
from .store import CommitResult, ConversationFiles, Entry, LayerLayout, Manifest, SegmentInfo

__all__ = ["save_cache"]

KEY, VALUE = 0, 1
_BLOCK = _core.store_constants()["ENTRY_BLOCK"]
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPE_NUMBERS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# Sharing is tried by itself only where a sample of the tokens shows it to cost no more than int4.
_SHARE_SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Layer:
    """One layer's K/V at the moment of saving: views, never copies.

    Attributes
    ----------
    kind : str
        ``"full"`` or ``"sliding"``.
    tensors : tuple of torch.Tensor
        Keys and values, shape (n_batch, n_kv_heads, n_held, head_dim).
    token_start : int
        Position of the first token held; above 0 for a sliding window that has moved on.
    group : int
        Layers of one number may share: same rotary base, window and shapes.
    """

    kind: str
    tensors: tuple[torch.Tensor, torch.Tensor]
    token_start: int
    group: int


@dataclass(frozen=True)
class Work:
    """What is to be saved, and what the store has of it already."""

    conversation: ConversationFiles
    model: Any
    settings: Settings
    snapshot: Snapshot
    layers: tuple[Layer | None, ...]
    layouts: tuple[LayerLayout, ...]
    segments: tuple[SegmentInfo, ...]
    generation: int
    fingerprint: Fingerprint | None
    created_s: float
    similarity: Similarity | None
    similarity_reason: str

    @property
    def n_tokens(self) -> int:
        """Tokens in the conversation."""
        return self.snapshot.n_tokens

    @property
    def n_stored_tokens(self) -> int:
        """Tokens that the kept segments hold."""
        return sum(segment.n_tokens for segment in self.segments)

    @property
    def n_new_tokens(self) -> int:
        """Tokens that no kept segment holds."""
        return self.n_tokens - self.n_stored_tokens


def _layer_of(state: Any, group: int) -> tuple[Layer | None, LayerLayout]:
    tensors = state.tensors()
    if tensors is None:
        return None, LayerLayout("none", 0, 0, 0, None, "float32", "float32")
    for name, tensor in zip(("keys", "values"), tensors, strict=True):
        if tensor.dtype not in _DTYPE_NAMES:
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
        key_dtype=_DTYPE_NAMES[keys.dtype],
        value_dtype=_DTYPE_NAMES[values.dtype],
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
    )


@dataclass(frozen=True)
class Strategy:
    """A codec for K and for V of each layer, and the pairs that share.

    A layer in a pair has the pair's codec in both places.
    """

    codecs: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[int, int], ...] = ()

    def is_exact(self) -> bool:
        """Whether nothing is lost."""
        return all(codec == "exact" for pair in self.codecs for codec in pair)

    def names(self) -> tuple[str, ...]:
        """Name the codec of each layer, K and V apart where they differ."""
        return tuple(k if k == v else f"{k}/{v}" for k, v in self.codecs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        return {
            "codecs": [list(pair) for pair in self.codecs],
            "pairs": [list(p) for p in self.pairs],
        }


@dataclass
class _Encoded:
    """One block as it will be stored."""

    entry: Entry
    payload: bytes
    error: float
    power: float


@dataclass
class _Encoder:
    """Encodes blocks and remembers them, so that stepping up one layer encodes one layer."""

    work: Work
    blocks: dict[tuple[str, int, int, int, int], list[_Encoded]] = field(default_factory=dict)

    def token_range(self, layer: int) -> tuple[int, int]:
        """Tokens of a layer that this save writes: the new ones, or all that a window holds."""
        state = self.work.layers[layer]
        assert state is not None
        start = state.token_start
        if state.kind == "full":
            start = max(start, self.work.n_stored_tokens)
        return start, self.work.n_tokens

    def tensor(self, layer: int, kv: int, start: int, end: int) -> torch.Tensor:
        """Return a view of a layer's K or V of the tokens [start, end) of the conversation."""
        state = self.work.layers[layer]
        assert state is not None
        first = state.token_start
        return state.tensors[kv][:, :, start - first : end - first]

    def runs(self, layer: int, kv: int) -> list[tuple[int, int]]:
        """Cut a layer's new tokens into blocks; the first tokens are a block of their own."""
        start, end = self.token_range(layer)
        tensor = self.tensor(layer, kv, start, end)
        bytes_per_token = tensor[:, :, :1].numel() * tensor.element_size()
        return token_runs(start, end, bytes_per_token, self.work.settings.keep_first)

    def encode(self, strategy: Strategy, only_first_tokens: int | None = None) -> list[_Encoded]:
        """Encode all blocks of a strategy that are not yet at hand; in the order of the file."""
        partner = dict(strategy.pairs) | {upper: lower for lower, upper in strategy.pairs}
        wanted: list[tuple[str, int, int, int, int]] = []
        for layer, state in enumerate(self.work.layers):
            if state is None or partner.get(layer, layer) < layer:
                continue
            for kv in (KEY, VALUE):
                for start, end in self.runs(layer, kv):
                    keep = end <= self.work.settings.keep_first
                    codec = "exact" if keep else strategy.codecs[layer][kv]
                    upper = partner.get(layer, -1)
                    if codec.startswith("share"):
                        wanted.append((codec, kv, layer, upper, start))
                    else:
                        # A pair's exact tokens are stored layer by layer, where readers look.
                        wanted += [
                            (codec, kv, each, -1, start) for each in (layer, upper) if each >= 0
                        ]
        missing = [key for key in dict.fromkeys(wanted) if key not in self.blocks]
        self._encode_missing(missing)
        encoded = [block for key in wanted for block in self.blocks[key]]
        return sorted(encoded, key=lambda block: _file_order(block.entry))

    def _encode_missing(self, keys: list[tuple[str, int, int, int, int]]) -> None:
        jobs, entries = [], []
        for codec, kv, lower, upper, start in keys:
            end = next(e for s, e in self.runs(lower, kv) if s == start)
            tensors = tuple(
                self.tensor(layer, kv, start, end) for layer in (lower, upper) if layer >= 0
            )
            n_batch, n_heads, n_tokens, head_dim = tensors[0].shape
            jobs.append((CODECS[codec], kv, tensors))
            entries.append(
                Entry(
                    kind=_BLOCK,
                    codec=CODECS[codec],
                    kv=kv,
                    dtype=_DTYPE_NUMBERS[tensors[0].dtype],
                    layer_lower=lower,
                    layer_upper=upper,
                    n_batch=n_batch,
                    n_heads=n_heads,
                    head_dim=head_dim,
                    token_start=start,
                    n_tokens=n_tokens,
                    offset=0,
                    payload_bytes=0,
                    payload_crc32c=0,
                )
            )
        results = _core.encode_blocks(jobs, self.work.settings.n_threads)
        for key, entry, (payload, used, error, power) in zip(keys, entries, results, strict=True):
            entry = entry._replace(codec=used, payload_bytes=len(payload))
            self.blocks[key] = [_Encoded(entry, payload, error, power)]

    def errors(self, codec: str) -> dict[tuple[int, int], tuple[float, int]]:
        """Relative squared error and bytes of each (layer, kv) under a codec of single layers."""
        sums: dict[tuple[int, int], list[float]] = {}
        for block in self.encode(self.uniform(codec)):
            entry = block.entry
            total = sums.setdefault((entry.layer_lower, entry.kv), [0.0, 0.0, 0])
            total[0] += block.error
            total[1] += block.power
            total[2] += entry.payload_bytes
        return {
            key: (error / power if power > 0 else 0.0, int(n_bytes))
            for key, (error, power, n_bytes) in sums.items()
        }

    def uniform(self, codec: str) -> Strategy:
        """Return the strategy that codes every layer alike."""
        return Strategy(((codec, codec),) * len(self.work.layers))


def _file_order(entry: Entry) -> tuple[int, int, int]:
    return entry.layer_lower, entry.kv, entry.token_start


# ---- strategies, coarse to fine ------------------------------------------------------------------


def _choose_pairs(work: Work, notes: list[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of layers that share, by the paper's rule; fixed ones where nothing was observed."""
    layers, settings = work.layers, work.settings
    n_layers = len(layers)
    groups = [-1 - i if state is None else state.group for i, state in enumerate(layers)]
    n_pairs = selector.pair_count(n_layers, settings.share_ratio)
    if work.similarity is None:
        notes.append(f"fixed pairs: {work.similarity_reason}")
        pairs = selector.fixed_pairs(groups, n_pairs)
    else:
        n_sensitive = settings.n_sensitive_layers
        pairs = selector.choose_pairs(
            work.similarity.distances,
            work.similarity.importance.sum(axis=1),
            groups,
            math.ceil(0.2 * n_layers) if n_sensitive is None else min(n_sensitive, n_layers),
            n_pairs,
        )
    return tuple((int(lower), int(upper)) for lower, upper in pairs)


def _with_sharing(base: Strategy, pairs: tuple[tuple[int, int], ...], codec: str) -> Strategy:
    codecs = list(base.codecs)
    for pair in pairs:
        for layer in pair:
            codecs[layer] = (codec, codec)
    return Strategy(tuple(codecs), pairs)


def _pairs_worth_sharing(
    encoder: _Encoder, pairs: tuple[tuple[int, int], ...], int4_errors: dict[tuple[int, int], Any]
) -> tuple[tuple[int, int], ...]:
    """Pairs whose sharing, on a sample of tokens, costs no more error than int4 alone."""
    jobs, keys = [], []
    for pair in pairs:
        start, end = encoder.token_range(pair[0])
        start = min(max(start, encoder.work.settings.keep_first), end)
        for kv in (KEY, VALUE):
            tensors = tuple(
                encoder.tensor(layer, kv, start, min(end, start + _SHARE_SAMPLE_TOKENS))
                for layer in pair
            )
            jobs.append((CODECS["share+int4"], kv, tensors))
            keys.append((pair, kv))
    good = dict.fromkeys(pairs, True)
    results = _core.encode_blocks(jobs, encoder.work.settings.n_threads)
    for (pair, kv), (_, used, error, power) in zip(keys, results, strict=True):
        limit = max(int4_errors[layer, kv][0] for layer in pair)
        relative = error / power if power > 0 else 0.0
        good[pair] &= used == CODECS["share+int4"] and relative <= limit
    return tuple(pair for pair in pairs if good[pair])


def _strategies(encoder: _Encoder, notes: list[str]) -> Iterator[Strategy]:
    """Yield what may be tried, each finer than the one before; the last is exact."""
    work = encoder.work
    wanted = work.settings.codec
    exact, int8, int4 = (encoder.uniform(codec) for codec in ("exact", "int8", "int4"))
    if wanted == "auto":
        int4_errors = encoder.errors("int4")
        pairs = _pairs_worth_sharing(encoder, _choose_pairs(work, []), int4_errors)
        if pairs:
            yield _with_sharing(int4, pairs, "share+int4")
        yield int4
        # The half of the tensors that gains most per byte goes to int8 first.
        int8_errors = encoder.errors("int8")
        gain = {
            key: (error - int8_errors[key][0]) / max(1, int8_errors[key][1] - n_bytes)
            for key, (error, n_bytes) in int4_errors.items()
        }
        finer = set(sorted(gain, key=lambda key: (-gain[key], key))[: (len(gain) + 1) // 2])
        codecs = [list(pair) for pair in int4.codecs]
        for layer, kv in finer:
            codecs[layer][kv] = "int8"
        yield Strategy(tuple((k, v) for k, v in codecs))
        yield int8
    elif wanted.startswith("share"):
        pairs = _choose_pairs(work, notes)
        base = {"share": exact, "share+int8": int8, "share+int4": int4}[wanted]
        yield _with_sharing(base, pairs, wanted)
        if base is int4:
            yield int4
        if base is not exact:
            yield int8
    elif wanted == "int4":
        yield int4
        yield int8
    elif wanted == "int8":
        yield int8
    yield exact


# ---- the guard's two caches ----------------------------------------------------------------------


class _Decoder:
    """K/V of a layer as it would come back: kept segments from disk, new blocks from memory."""

    def __init__(self, work: Work, encoded: list[_Encoded]) -> None:
        self.work = work
        self.new = [(block.entry, block.payload) for block in encoded]
        self.stored: list[tuple[int, list[Entry]]] = [
            work.conversation.open_segment(segment) for segment in work.segments
        ]
        self.memory: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def close(self) -> None:
        """Close the segments' files."""
        for fd, _ in self.stored:
            os.close(fd)
        self.stored = []

    def layer(self, layer: int, n_before: int) -> guard.KeysAndValues:
        """Keys and values of the tokens before position `n_before` that the layer would hold."""
        state = self.work.layers[layer]
        assert state is not None
        sources: list[list[tuple[Entry, Any]]] = []
        if state.kind == "full":
            for (fd, entries), segment in zip(self.stored, self.work.segments, strict=True):
                end = segment.token_start + segment.n_tokens
                sources.append([(entry, fd) for entry in entries if entry.token_start < end])
        sources.append(self.new)
        tensors = tuple(
            self._tensor(layer, kv, state, sources)[:, :, : n_before - state.token_start]
            for kv in (KEY, VALUE)
        )
        return tensors[KEY], tensors[VALUE]

    def _tensor(
        self, layer: int, kv: int, state: Layer, sources: list[list[tuple[Entry, Any]]]
    ) -> torch.Tensor:
        like = state.tensors[kv]
        mine = [
            [
                item
                for item in source
                if item[0].kv == kv and layer in (item[0].layer_lower, item[0].layer_upper)
            ]
            for source in sources
        ]
        n_room = max(e.token_start + e.n_tokens for source in mine for e, _ in source)
        shape = (like.shape[0], like.shape[1], n_room - state.token_start, like.shape[3])
        # Two layers of one shape take turns in one memory.
        out = self.memory.get((kv, shape, like.dtype))
        if out is None:
            out = self.memory[kv, shape, like.dtype] = torch.empty(shape, dtype=like.dtype)
        for source in mine:  # in this order: a cropped segment's tail is overwritten by the next
            jobs = []
            for entry, where in source:
                is_new = isinstance(where, bytes)
                payload = where if is_new else _core.store_read_payload(where, entry)
                first = entry.token_start - state.token_start
                view = out[:, :, first : first + entry.n_tokens]
                pair = (view, None) if layer == entry.layer_lower else (None, view)
                arrays = pair if entry.layer_upper >= 0 else (view,)
                jobs.append((entry.codec, kv, payload, arrays))
            _core.decode_blocks(jobs, self.work.settings.n_threads)
        return out


def _n_guard(work: Work) -> int:
    """How many tokens the guard can run so that half of the new ones lie before them."""
    n_guard = min(work.settings.guard_tokens, work.n_new_tokens // 2, work.n_tokens - 1)
    for state in work.layers:
        if state is not None and state.kind == "sliding":
            n_guard = min(n_guard, state.tensors[KEY].shape[2] // 2)
    return n_guard


def _measure(work: Work, encoded: list[_Encoded], n_guard: int) -> guard.Verdict:
    n_before = work.n_tokens - n_guard
    decoder = _Decoder(work, encoded)
    exact: list[Any] = []
    decoded: list[Any] = []
    n_held = []
    for index, state in enumerate(work.layers):
        if state is None:
            exact.append(None)
            decoded.append(None)
            n_held.append(0)
            continue
        n = n_before - state.token_start
        n_held.append(n)
        exact.append(lambda s=state, n=n: tuple(t[:, :, :n] for t in s.tensors))
        decoded.append(lambda i=index: decoder.layer(i, n_before))
    try:
        return guard.measure(
            work.model,
            token_ids=work.snapshot.token_ids,
            attention_mask=work.snapshot.attention_mask,
            position_ids=work.snapshot.positions,
            n_guard=n_guard,
            n_held=n_held,
            exact=exact,
            decoded=decoded,
        )
    finally:
        decoder.close()


def _check_bits(work: Work, encoder: _Encoder, encoded: list[_Encoded]) -> None:
    """Decode what claims to be exact and compare it bit for bit with what was encoded."""
    for block in encoded:
        entry = block.entry
        layers = [layer for layer in (entry.layer_lower, entry.layer_upper) if layer >= 0]
        wanted = [
            encoder.tensor(layer, entry.kv, entry.token_start, entry.token_start + entry.n_tokens)
            for layer in layers
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
    work: Work, seconds: dict[str, float], notes: list[str]
) -> tuple[Strategy, list[_Encoded], guard.Verdict]:
    """Encode with the coarsest strategy that the guard accepts."""
    settings = work.settings
    encoder = _Encoder(work)
    n_guard = _n_guard(work) if settings.guard_tokens else 0
    nothing = guard.Verdict(math.nan, math.nan, math.nan, 0)
    strategies = _strategies(encoder, notes)
    while True:
        started = time.perf_counter()
        strategy = next(strategies)
        if settings.guard_tokens and n_guard < 1 and not strategy.is_exact():
            continue
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
        verdict = _measure(work, encoded, n_guard)
        seconds["guard"] += time.perf_counter() - started
        if verdict.accepts(settings.max_kl, settings.min_top1):
            return strategy, encoded, verdict
        notes.append(
            f"{_summary(strategy)} refused: mean KL {verdict.mean_kl:.4f} (at most "
            f"{settings.max_kl:g}), top-1 {verdict.top1:.3f} (at least {settings.min_top1:g})"
        )


def _summary(strategy: Strategy) -> str:
    names = [name for pair in strategy.codecs for name in pair]
    return ", ".join(f"{name} x {names.count(name)}" for name in dict.fromkeys(names))


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
    Peak memory beyond the cache itself: the coded bytes of the codecs tried, and two layers.
    """
    seconds = {"estimate": 0.0, "encode": 0.0, "guard": 0.0, "commit": 0.0}
    notes: list[str] = []
    started = time.perf_counter()
    work = _prepare(cache, snapshot)
    seconds["estimate"] = time.perf_counter() - started
    if work.n_new_tokens > 0:
        strategy, encoded, verdict = _select(work, seconds, notes)
    else:
        strategy = _Encoder(work).uniform("exact")
        encoded, verdict = [], guard.Verdict(math.nan, math.nan, math.nan, 0)
        notes.append("no new tokens: only the record of the history changed")
    fallen = sum(
        1
        for block in encoded
        if block.entry.codec == CODECS["exact"]
        and block.entry.token_start >= work.settings.keep_first
        and "exact" not in strategy.codecs[block.entry.layer_lower]
    )
    if fallen:
        notes.append(f"{fallen} blocks hold values that only exact can keep")
    started = time.perf_counter()
    result = _commit(work, strategy, encoded, verdict)
    seconds["commit"] = time.perf_counter() - started
    cache.created_s = result.manifest.created_s
    cache.mark_saved(result.generation, result.manifest.segments, snapshot)
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
    work: Work, strategy: Strategy, encoded: list[_Encoded], verdict: guard.Verdict
) -> CommitResult:
    segments = list(work.segments)
    if encoded:
        segments.append(
            SegmentInfo(
                file="",
                token_start=work.n_stored_tokens,
                n_tokens=work.n_new_tokens,
                strategy=strategy.to_dict(),
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
