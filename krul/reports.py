"""What a save, a restore and a look into the store tell: frozen, with units in the names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ConversationInfo", "GcReport", "Problem", "RestoreReport", "SaveReport"]


class _Report:
    """Adds `to_dict` to the frozen dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values, tuples as lists."""
        return _plain(asdict(self))  # type: ignore[call-overload]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class SaveReport(_Report):
    """What one `Cache.save` did.

    Attributes
    ----------
    n_tokens, n_new_tokens : int
        Tokens in the conversation, and those that this save added.
    stored_bytes : int
        Bytes of the whole conversation in the store, with all headers and tables.
    new_bytes : int
        Bytes that this save wrote.
    bf16_bytes, model_dtype_bytes : int
        Bytes of the same KV kept as bfloat16, and in the model's own dtype.
    ratio_bf16 : float
        ``bf16_bytes / stored_bytes``.
    codec_by_layer : tuple of str
        The codec of each layer in this save's segment; K and V apart by a slash where they differ.
    pairs : tuple of (int, int)
        Layers that share, lower and upper.
    guard_mean_kl, guard_max_kl : float
        Divergence in nats over the guard's tokens; NaN when nothing was measured.
    guard_top1 : float
        Share of the guard's tokens whose most likely successor stayed the same; NaN likewise.
    n_guard_tokens : int
        Tokens that the guard ran.
    seconds_by_stage : dict of str to float
        Wall time: ``estimate``, ``encode``, ``guard``, ``commit``.
    reason : str
        Why these codecs: what the guard refused, what fell back, what could not be observed.
    """

    n_tokens: int
    n_new_tokens: int
    stored_bytes: int
    new_bytes: int
    bf16_bytes: int
    model_dtype_bytes: int
    ratio_bf16: float
    codec_by_layer: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    guard_mean_kl: float
    guard_max_kl: float
    guard_top1: float
    n_guard_tokens: int
    seconds_by_stage: dict[str, float]
    reason: str


@dataclass(frozen=True)
class RestoreReport(_Report):
    """What bringing a conversation back took.

    Attributes
    ----------
    n_tokens : int
        Tokens that the cache held once restored.
    n_loaded_by_layer, n_recomputed_by_layer : tuple of int
        Tokens of each layer that came from the store, and from running the model.
    loaded_bytes : int
        Bytes read from the store.
    predicted_s, actual_s : float
        Time from the plan until the end of the first forward pass; where there was no pass yet,
        until the last layer was in. ``predicted_s`` is NaN when nothing was known.
    seconds_by_stage : dict of str to float
        ``open`` (head of the files), ``read`` and ``decode`` (summed over threads), ``recompute``,
        ``wait`` (time that the model stood still: for a layer, or for what was recomputed).
    plan : str
        ``"empty"``, ``"load"``, ``"recompute"``, ``"uniform"``, ``"pyramid"`` or ``"step"``.
    reason : str
        Why, and what was found damaged, cropped or refused.
    n_cropped_tokens : int
        Tokens dropped since because the history had changed.
    """

    n_tokens: int
    n_loaded_by_layer: tuple[int, ...]
    n_recomputed_by_layer: tuple[int, ...]
    loaded_bytes: int
    predicted_s: float
    actual_s: float
    seconds_by_stage: dict[str, float]
    plan: str
    reason: str
    n_cropped_tokens: int = 0


@dataclass(frozen=True)
class ConversationInfo(_Report):
    """One conversation in a store, as its manifest tells; nothing of the KV is read.

    ``profiles`` are the digests of those that its segments were coded with.
    """

    conversation_id: str
    tenant: str
    n_tokens: int
    n_batch: int
    n_layers: int
    n_segments: int
    stored_bytes: int
    generation: int
    created_s: float
    updated_s: float
    dtype: str
    fingerprint: str
    guard: dict[str, Any] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem(_Report):
    """Something that `Store.verify` found wrong; `n_good_tokens` can still be restored."""

    conversation_id: str
    file: str
    message: str
    n_good_tokens: int


@dataclass(frozen=True)
class GcReport(_Report):
    """What `Store.gc` removed; ``kept_bytes`` are those of the tenant's conversations."""

    n_conversations_removed: int
    n_files_removed: int
    removed_bytes: int
    kept_bytes: int
    n_profiles_removed: int = 0
