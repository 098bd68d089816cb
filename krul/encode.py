"""The new tokens of a conversation as blocks: what is to be saved, and its encoded form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _core
from .compressor import CODECS, token_runs
from .estimator import Similarity
from .fingerprint import Fingerprint
from .history import Snapshot
from .manifest import DTYPE_NUMBERS
from .settings import Settings
from .store import ConversationFiles, Entry, LayerLayout, SegmentInfo

__all__ = ["KEY", "VALUE", "Encoded", "Encoder", "Layer", "Strategy", "Work", "dtype_name"]

KEY, VALUE = 0, 1
_BLOCK = _core.store_constants()["ENTRY_BLOCK"]

# Blocks that are encoded only to be measured, at a time.
_BLOCKS_AT_ONCE = 16

# What a block is: codec, kv, lower layer, upper layer or -1, first token.
_Key = tuple[str, int, int, int, int]


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
    blocks: dict[_Key, Encoded] = field(default_factory=dict)

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
            (self.blocks[key] for key in keys), key=lambda block: _file_order(block.entry)
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
                        keys.append((codec, kv, layer, upper, start))
                    else:
                        # A pair's exact tokens are stored layer by layer, where readers look.
                        keys += [
                            (codec, kv, each, -1, start) for each in (layer, upper) if each >= 0
                        ]
        return keys

    def _encode(self, keys: Sequence[_Key]) -> dict[_Key, Encoded]:
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
                    dtype=DTYPE_NUMBERS[dtype_name(tensors[0])],
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
        return {
            key: Encoded(
                entry._replace(codec=used, payload_bytes=len(payload)), payload, error, power
            )
            for key, entry, (payload, used, error, power) in zip(
                keys, entries, results, strict=True
            )
        }

    def errors(self, codec: str) -> dict[tuple[int, int], tuple[float, int]]:
        """Relative squared error and bytes of each (layer, kv) under a codec of single layers.

        What has to be encoded for it is not kept.
        """
        sums: dict[tuple[int, int], list[float]] = {}
        keys = self._keys(self.uniform(codec))
        for start in range(0, len(keys), _BLOCKS_AT_ONCE):
            some = keys[start : start + _BLOCKS_AT_ONCE]
            made = self._encode([key for key in some if key not in self.blocks])
            for key in some:
                block = made.get(key) or self.blocks[key]
                total = sums.setdefault((block.entry.layer_lower, block.entry.kv), [0.0, 0.0, 0])
                total[0] += block.error
                total[1] += block.power
                total[2] += block.entry.payload_bytes
        return {
            key: (error / power if power > 0 else 0.0, int(n_bytes))
            for key, (error, power, n_bytes) in sums.items()
        }

    def uniform(self, codec: str) -> Strategy:
        """Return the strategy that codes every layer alike."""
        return Strategy(((codec, codec),) * len(self.work.layers))


def _file_order(entry: Entry) -> tuple[int, int, int]:
    return entry.layer_lower, entry.kv, entry.token_start
