"""How a conversation is estimated, compressed, guarded and restored: one frozen object."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CODECS", "RESTORE_PLANS", "Settings"]

CODECS = (
    "auto",
    "exact",
    "int8",
    "int4",
    "share",
    "share+int8",
    "share+int4",
    "predict",
)
RESTORE_PLANS = ("auto", "load", "recompute", "mixed", "uniform", "pyramid", "step")


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} is {value!r} but must be one of {', '.join(choices)}")


def _check_int(field: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{field} is {value!r} but must be an integer from {low} to {high}")


def _check_float(field: str, value: Any, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{field} is {value!r} but must be a number from {low} to {high}")


@dataclass(frozen=True)
class Settings:
    """Choices for one conversation; every default suits a chat that must come back unharmed.

    Parameters
    ----------
    codec : str
        ``"auto"`` takes the smallest codec that the guard accepts; any other name of
        :data:`CODECS` is used as it is, and stepped up only where the guard refuses it.
    max_kl : float
        Largest mean Kullback-Leibler divergence, in nats per token, of the next-token distribution
        over the guard's tokens.
    min_top1 : float
        Smallest share of the guard's tokens whose most likely next token stays the same.
    share_ratio : float
        For the ``share`` codecs: bytes left after sharing, as a part of the bytes before.
    n_sensitive_layers : int or None
        Layers that are never shared, the most input-sensitive first; None takes a fifth of them.
    estimator_rows : int or "all"
        Queries sampled per prefill for the attention similarity; 0 turns the estimator off.
    keep_first : int
        Tokens at the start of the conversation (attention sinks) that stay exact.
    guard_tokens : int
        Tokens run against the compressed cache before a save is committed; 0 turns the guard off.
    restore : str
        ``"load"`` reads all from the store, ``"recompute"`` runs the model over the history. Both
        at once: ``"uniform"`` recomputes as many first tokens in every layer, ``"pyramid"`` fewer
        the deeper the layer, ``"step"`` one number in the first layers and a smaller one in the
        rest, ``"mixed"`` what is fastest of these. ``"auto"`` takes the fastest of all by what was
        measured here.
    drop_recomputed : bool
        Do not store what a restore would recompute anyway, as the paper does. Decided by the first
        save of a conversation, from what was measured until then; later turns are stored whole.
    learn_profile : bool
        Let saves add up what a profile is fitted from, and fit one when 16 tokens for each number
        of the model's widest layer were saved, and again whenever there are twice as many. For this
        tenant alone; see `krul.learn`.
    n_threads : int
        Threads for encoding and restoring; 0 means every processor.
    max_read_bytes_per_s : float
        A restore reads no faster from the store; 0 is no limit.

    Raises
    ------
    ValueError
        A field is out of range; the message names field, value and range.

    Examples
    --------
    >>> Settings(codec="int4").max_kl
    0.01
    >>> Settings(max_kl=-1)
    Traceback (most recent call last):
        ...
    ValueError: max_kl is -1 but must be a number from 0 to inf
    """

    codec: str = "auto"
    max_kl: float = 0.01
    min_top1: float = 0.95
    share_ratio: float = 0.75
    n_sensitive_layers: int | None = None
    estimator_rows: int | str = 64
    keep_first: int = 4
    guard_tokens: int = 64
    restore: str = "auto"
    drop_recomputed: bool = False
    learn_profile: bool = False
    n_threads: int = 0
    max_read_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        _check_choice("codec", self.codec, CODECS)
        _check_float("max_kl", self.max_kl, 0, math.inf)
        _check_float("min_top1", self.min_top1, 0, 1)
        _check_float("share_ratio", self.share_ratio, 0.5, 1)
        if self.n_sensitive_layers is not None:
            _check_int("n_sensitive_layers", self.n_sensitive_layers, 0, 100_000)
        if self.estimator_rows != "all":
            _check_int("estimator_rows", self.estimator_rows, 0, 1 << 20)
        _check_int("keep_first", self.keep_first, 0, 4096)
        _check_int("guard_tokens", self.guard_tokens, 0, 65_536)
        _check_choice("restore", self.restore, RESTORE_PLANS)
        for field in ("drop_recomputed", "learn_profile"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise ValueError(f"{field} is {value!r} but must be True or False")
        _check_int("n_threads", self.n_threads, 0, 256)
        _check_float("max_read_bytes_per_s", self.max_read_bytes_per_s, 0, 1e15)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)
