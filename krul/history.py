"""Which tokens a cache holds, in pieces as they were fed, and what a save sees of a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .device import Marks, devices_of
from .layer import KrulLayer, outside_autograd

__all__ = ["History", "LayerSnapshot", "Snapshot"]


class History:
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
        with outside_autograd():
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
            return torch.zeros((1, 0), dtype=torch.int64, device="cpu"), None, None
        if len(self.pieces) > 1 or self.pieces[0][0].device.type != "cpu":
            with outside_autograd():
                ids = torch.cat([piece[0].cpu() for piece in self.pieces], dim=1)
                merged = (ids, self._merge_masks(), self._merge_positions())
            self.pieces = [merged]
        return self.pieces[0]

    def _merge_masks(self) -> torch.Tensor | None:
        if all(mask is None for _, mask, _ in self.pieces):
            return None
        whole = torch.cat(
            [
                torch.ones(ids.shape, dtype=torch.uint8, device="cpu")
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
                positions = torch.arange(start, start + ids.shape[1], device="cpu")
            parts.append(positions.cpu().expand(*leading, *ids.shape))
            start += ids.shape[1]
        whole = torch.cat(parts, dim=-1).to(torch.int64)
        plain = torch.arange(start, device="cpu").expand(whole.shape)
        is_plain = torch.equal(whole, plain)
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
        """Keep the first `n_tokens` tokens."""
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
        with outside_autograd():
            self.pieces = [
                (
                    change(ids, 0),
                    None if mask is None else change(mask, 0),
                    None if positions is None else change(positions, positions.dim() - 2),
                )
            ]


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
    similarity : Similarity or None
        What the estimator had found; None where there was none.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        layers: tuple[LayerSnapshot, ...],
        similarity: Any = None,
    ) -> None:
        self.n_tokens = token_ids.shape[1]
        self.token_ids = token_ids
        self.attention_mask = attention_mask
        self.positions = positions
        self.layers = layers
        self.similarity = similarity
        # Lowered by every crop that happens while the snapshot is being saved.
        self.n_still_valid = self.n_tokens
        self._marks = Marks(
            devices_of([x for layer in layers if layer._tensors for x in layer._tensors])
        )

    def follow(self) -> None:
        """Let what this thread asks of a device come after what the snapshot is made of."""
        self._marks.follow()
