"""The new tokens of a conversation as blocks: what is to be saved, and its encoded form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import _core
from .compressor import CODECS, token_runs
from .device import Marks, is_direct, is_elsewhere, on_cpu
from .estimator import Similarity
from .fingerprint import Fingerprint
from .history import Snapshot
from .manifest import BOTH, DTYPE_NUMBERS
from .predictor import choose_products, make_predictor
from .profile import Profile
from .settings import Settings
from .store import ConversationFiles, Entry, LayerLayout, SegmentInfo

__all__ = ["KEY", "VALUE", "Encoded", "Encoder", "Job", "Layer", "Strategy", "Work", "dtype_name"]

KEY, VALUE = 0, 1
_BLOCK = _core.store_constants()["ENTRY_BLOCK"]

# Blocks that are encoded only to be measured, or are on another device, at a time.
_BLOCKS_AT_ONCE = 16

# What a block is: codec, kv, lower layer, upper layer or -1, first token; and the step of codec
# predict, else 0.
_Key = tuple[str, int, int, int, int, float]


# What `_core.encode_blocks` takes: codec, kv, and one array or those of two layers.
Job = tuple[int, int, tuple[torch.Tensor, ...]]


def dtype_name(tensor: torch.Tensor) -> str:
    """Name a tensor's dtype as manifests do: ``"float32"`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


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
    profile: Profile | None = None
    find_profile: Callable[[str], Profile] | None = None
    marks: Marks | None = None  # after which K and V are there

    @property
    def n_tokens(self) -> int:
        """Tokens in the conversation."""
        return self.snapshot.n_tokens

    @property
    def n_stored_tokens(self) -> int:
        """Tokens that the kept segments hold."""
        return sum(segment.n_tokens for segment in self.segments)

    @property
    def n_batch(self) -> int:
        """Conversations side by side."""
        return self.snapshot.token_ids.shape[0]

    def positions(self) -> np.ndarray:
        """Return what the model was given as positions: [n_tokens], or [n_batch, n_tokens]."""
        if self.snapshot.positions is None:
            return np.arange(self.n_tokens)
        return self.snapshot.positions.numpy()

    @property
    def n_new_tokens(self) -> int:
        """Tokens that no kept segment holds."""
        return self.n_tokens - self.n_stored_tokens

    @property
    def is_elsewhere(self) -> bool:
        """Whether K and V are on a device that the C library cannot reach, or some are."""
        return any(is_elsewhere(x) for state in self.layers if state for x in state.tensors)


@dataclass(frozen=True)
class Strategy:
    """A codec for K and for V of each layer, and the pairs that share.

    A layer in a pair has the pair's codec in both places, as has one whose K and V are predicted;
    then `step` is that of the quantiser, `profile` the digest of the profile, and `products` what
    products are of, see `predictor.choose_products`.
    """

    codecs: tuple[tuple[str, str], ...]
    pairs: tuple[tuple[int, int], ...] = ()
    step: float = 0.0
    profile: str = ""
    products: str = ""

    def is_exact(self) -> bool:
        """Whether nothing is lost."""
        return all(codec == "exact" for pair in self.codecs for codec in pair)

    def names(self) -> tuple[str, ...]:
        """Name the codec of each layer, K and V apart where they differ."""
        return tuple(k if k == v else f"{k}/{v}" for k, v in self.codecs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for the manifest."""
        values: dict[str, Any] = {
            "codecs": [list(pair) for pair in self.codecs],
            "pairs": [list(p) for p in self.pairs],
        }
        if self.profile:
            values |= {"profile": self.profile, "products": self.products, "step": self.step}
        return values


@dataclass
class Encoded:
    """One block as it will be stored."""

    entry: Entry
    payload: bytes
    error: float
    power: float


@dataclass
class Encoder:
    """Encodes blocks; of one strategy and the next, those that both have are encoded once.

    Only the payloads of the newest strategy are kept: whatever else was tried takes no memory.
    """

    work: Work
    blocks: dict[_Key, tuple[Encoded, ...]] = field(default_factory=dict)
    n_left: dict[str, int] = field(default_factory=dict)  # by their devices to the CPU, and why
    #: int8, n_layers x n_tokens: of codec predict, see `selector.token_fineness`; None: all alike.
    fineness: np.ndarray | None = None
    _errors: dict[str, dict[tuple[int, int], tuple[float, int]]] = field(default_factory=dict)

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

    def encode(self, strategy: Strategy) -> list[Encoded]:
        """Encode all blocks of a strategy that are not yet at hand; in the order of the file."""
        keys = self._keys(strategy)
        self.blocks = {key: self.blocks[key] for key in keys if key in self.blocks}
        self.blocks |= self._encode([key for key in keys if key not in self.blocks])
        return sorted(
            (block for key in keys for block in self.blocks[key]),
            key=lambda block: _file_order(block.entry),
        )

    def _keys(self, strategy: Strategy) -> list[_Key]:
        """Name the blocks of a strategy, layer by layer."""
        partner = dict(strategy.pairs) | {upper: lower for lower, upper in strategy.pairs}
        keys: list[_Key] = []
        for layer, state in enumerate(self.work.layers):
            if state is None or partner.get(layer, layer) < layer:
                continue
            for kv in (KEY, VALUE):
                for start, end in self.runs(layer, kv):
                    keep = end <= self.work.settings.keep_first
                    codec = "exact" if keep else strategy.codecs[layer][kv]
                    upper = partner.get(layer, -1)
                    if codec.startswith("share"):
                        keys.append((codec, kv, layer, upper, start, 0.0))
                    elif codec == "predict":
                        if kv == KEY:
                            keys.append((codec, BOTH, layer, -1, start, strategy.step))
                    else:
                        # A pair's exact tokens are stored layer by layer, where readers look.
                        keys += [
                            (codec, kv, each, -1, start, 0.0)
                            for each in (layer, upper)
                            if each >= 0
                        ]
        return keys

    def predicted_layers(self) -> tuple[int, ...]:
        """Layers that codec predict can hold: full ones whose sources it can hold, too."""
        profile = self.work.profile
        found: list[int] = []
        if profile is None or len(profile.layers) != len(self.work.layers):
            return ()
        for index, state in enumerate(self.work.layers):
            layer = profile.form.layers[index]
            if layer is None or state is None or state.kind != "full":
                continue
            shapes = [(t.shape[1], t.shape[3], t.dtype) for t in state.tensors]
            if (
                shapes[0] == shapes[1]
                and shapes[0][:2] == (layer.n_heads, layer.key_dim)
                and all(source in found for source in layer.sources)
            ):
                found.append(index)
        return tuple(found)

    def predicted(self, step: float) -> Strategy:
        """Return the strategy that predicts every layer that can be, and keeps the rest as int8."""
        profile = self.work.profile
        assert profile is not None
        layers = self.predicted_layers()
        codecs = tuple(
            ("predict", "predict") if index in layers else ("int8", "int8")
            for index in range(len(self.work.layers))
        )
        return Strategy(codecs, (), step, profile.digest, choose_products(profile, step))

    def _entry(self, key: _Key, tensor: torch.Tensor) -> Entry:
        codec, kv, lower, upper, start, _ = key
        n_batch, n_heads, n_tokens, head_dim = tensor.shape
        return Entry(
            kind=_BLOCK,
            codec=CODECS[codec],
            kv=kv,
            dtype=DTYPE_NUMBERS[dtype_name(tensor)],
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

    def _encode_chains(self, keys: Sequence[_Key]) -> dict[_Key, tuple[Encoded, ...]]:
        """Encode blocks of codec predict, run by run; what cannot be held so becomes exact."""
        work = self.work
        assert work.profile is not None
        (step,) = {key[5] for key in keys}  # of one strategy
        chains: dict[int, list[_Key]] = {}
        for key in keys:
            chains.setdefault(key[4], []).append(key)
        predictor = make_predictor(
            work.profile,
            work.positions(),
            choose_products(work.profile, step),
            n_batch=work.n_batch,
            is_encoding=True,
        )
        made: dict[_Key, tuple[Encoded, ...]] = {}
        # A chain is all layers of a run: those that are copied from elsewhere come one by one.
        n_threads = work.settings.n_threads or _core.n_processors()
        n_at_once = n_threads if work.is_elsewhere else max(1, len(chains))
        for some in _batches(list(chains.items()), n_at_once):
            runs = [self._run_of(start, chain) for start, chain in some]
            results = predictor.encode(runs, step, work.settings.n_threads)
            for (_, chain), run, result in zip(some, runs, results, strict=True):
                if result is None:
                    made |= self._encode_exactly(chain)
                    continue
                for key, (_, _, keys_here, _, _), (payload, error, power) in zip(
                    chain, run, result, strict=True
                ):
                    entry = self._entry(key, keys_here)._replace(payload_bytes=len(payload))
                    made[key] = (Encoded(entry, payload, error, power),)
        return made

    def _run_of(self, start: int, chain: Sequence[_Key]) -> list[tuple[int, int, Any, Any, Any]]:
        """Return what a chain encodes: of each of its layers the K and V of a run of tokens."""
        end = next(e for s, e in self.runs(chain[0][2], KEY) if s == start)
        return [
            (
                key[2],
                start,
                on_cpu(self.tensor(key[2], KEY, start, end)),
                on_cpu(self.tensor(key[2], VALUE, start, end)),
                None if self.fineness is None else self.fineness[key[2], start:end],
            )
            for key in chain
        ]

    def _encode_exactly(self, chain: Sequence[_Key]) -> dict[_Key, tuple[Encoded, ...]]:
        """Encode K and V of a chain's blocks as `exact`, two blocks in place of each."""
        made = {}
        for key in chain:
            parts = self._encode([("exact", kv, key[2], -1, key[4], 0.0) for kv in (KEY, VALUE)])
            made[key] = tuple(block for blocks in parts.values() for block in blocks)
        return made

    def _encode(self, keys: Sequence[_Key]) -> dict[_Key, tuple[Encoded, ...]]:
        chained = [key for key in keys if key[0] == "predict"]
        if chained:
            plain = [key for key in keys if key[0] != "predict"]
            return self._encode_chains(chained) | self._encode(plain)
        if len(keys) > _BLOCKS_AT_ONCE and self.work.is_elsewhere:
            made: dict[_Key, tuple[Encoded, ...]] = {}
            for some in _batches(keys, _BLOCKS_AT_ONCE):
                made |= self._encode(some)
            return made
        jobs, entries = [], []
        for key in keys:
            codec, kv, lower, upper, start, _ = key
            end = next(e for s, e in self.runs(lower, kv) if s == start)
            tensors = tuple(
                self.tensor(layer, kv, start, end) for layer in (lower, upper) if layer >= 0
            )
            jobs.append((CODECS[codec], kv, tensors))
            entries.append(self._entry(key, tensors[0]))
        return {
            key: (
                Encoded(
                    entry._replace(codec=used, payload_bytes=len(payload)), payload, error, power
                ),
            )
            for key, entry, (payload, used, error, power) in zip(
                keys, entries, self.run_jobs(jobs), strict=True
            )
        }

    def _is_direct(self, tensors: Sequence[torch.Tensor]) -> bool:
        return self.work.marks is not None and all(is_direct(t.device) for t in tensors)

    def run_jobs(self, jobs: Sequence[Job]) -> list[tuple[bytes, int, float, float]]:
        """Encode blocks where they are; what a device leaves is copied to the CPU.

        Parameters
        ----------
        jobs : sequence of (int, int, tuple of torch.Tensor)
            See `_core.encode_blocks`.

        Returns
        -------
        list of (bytes, int, float, float)
            Payload, codec used, sum of squared errors and of squares of each.
        """
        n_threads = self.work.settings.n_threads
        events = None if self.work.marks is None else self.work.marks.events()
        tried = [
            (codec, kv, tensors if self._is_direct(tensors) else _brought(tensors))
            for codec, kv, tensors in jobs
        ]
        results = _core.encode_blocks(tried, n_threads, events=events)
        left = [index for index, result in enumerate(results) if isinstance(result, str)]
        again = [(jobs[i][0], jobs[i][1], _brought(jobs[i][2])) for i in left]
        for index, result in zip(left, _core.encode_blocks(again, n_threads), strict=True):
            reason = results[index]
            self.n_left[reason] = self.n_left.get(reason, 0) + 1
            results[index] = result
        return results

    def errors(self, codec: str) -> dict[tuple[int, int], tuple[float, int]]:
        """Relative squared error and bytes of each (layer, kv) under a codec of single layers.

        What has to be encoded for it is not kept, but what it comes to is.
        """
        if codec in self._errors:
            return self._errors[codec]
        sums: dict[tuple[int, int], list[float]] = {}
        keys = self._keys(self.uniform(codec))
        for start in range(0, len(keys), _BLOCKS_AT_ONCE):
            some = keys[start : start + _BLOCKS_AT_ONCE]
            made = self._encode([key for key in some if key not in self.blocks])
            for key in some:
                (block,) = made.get(key) or self.blocks[key]
                total = sums.setdefault((block.entry.layer_lower, block.entry.kv), [0.0, 0.0, 0])
                total[0] += block.error
                total[1] += block.power
                total[2] += block.entry.payload_bytes
        self._errors[codec] = {
            key: (error / power if power > 0 else 0.0, int(n_bytes))
            for key, (error, power, n_bytes) in sums.items()
        }
        return self._errors[codec]

    def uniform(self, codec: str) -> Strategy:
        """Return the strategy that codes every layer alike."""
        return Strategy(((codec, codec),) * len(self.work.layers))


def _brought(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(on_cpu(tensor) for tensor in tensors)


def _batches(items: Sequence[Any], n_at_once: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), n_at_once):
        yield items[start : start + n_at_once]


def _file_order(entry: Entry) -> tuple[int, int, int]:
    return entry.layer_lower, entry.kv, entry.token_start
