"""What restoring costs here: measured forward passes, reads and decoders, kept beside the store.

A `CostBook` belongs to one model on one machine. Forward passes tell what recomputing costs,
restores tell how fast the store and the decoders are; the newest measurements count most. The file
is a convenience: one that is missing, damaged or absurd is started anew, and whether it can be
written decides nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .model import decoder_layers, text_config
from .plan import Costs

__all__ = ["CostBook", "ForwardCost", "attention_share", "cost_book", "cost_books", "know_model"]

_FORMAT = "krul costs 1"
_DIRECTORY = ".costs"
_MAX_FILE_BYTES = 1 << 20

# Passes kept for each power of two of new tokens: few, so that changes are followed.
_N_PASSES_EACH = 4

# What a rate or a time must lie between to be believed: bytes per second, seconds.
_RATE_RANGE = (1.0, 1e14)
_TIME_RANGE = (1e-7, 1e5)

# A store that gives less than this part of what a limit allows is itself what is slow.
_OWN_SHARE = 0.5

# Of a decoder that was never measured: slower than any of them has been.
UNKNOWN_DECODE_BYTES_PER_S = 1e9

# Weights, beside a measured pass, of what is believed of costs that were not told apart.
_NO_OVERHEAD_WEIGHT, _SHARE_WEIGHT = 0.01, 0.1
_SHARE_RANGE = (1e-9, 1.0)

# What the guard may say of a step; beyond it is no measurement.
_DIVERGENCE_RANGE = (1e-9, 1e3)

# Names that configurations give to the number of experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

# A restore of fewer bytes says more about opening files than about the store.
_MIN_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class ForwardCost:
    """What one forward pass of a whole model costs.

    Running ``n`` tokens after ``n_before`` others takes ``overhead_s + linear_s_per_token * n +
    quadratic_s_per_token2 * ((n_before + n)^2 - n_before^2)`` seconds.
    """

    overhead_s: float
    linear_s_per_token: float
    quadratic_s_per_token2: float

    def seconds(self, n_tokens: int, n_before: int = 0) -> float:
        """Return what a pass of `n_tokens` after `n_before` others takes."""
        squares = float((n_before + n_tokens) ** 2 - n_before**2)
        return (
            self.overhead_s
            + self.linear_s_per_token * n_tokens
            + self.quadratic_s_per_token2 * squares
        )


def _is_in(value: Any, limits: tuple[float, float]) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and limits[0] <= value <= limits[1]


def _fit(
    passes: list[tuple[int, int, float]], attention_share: float | None = None
) -> ForwardCost | None:
    """Fit the three costs by relative least squares, none of them below zero.

    With few sizes of passes they cannot be told apart. So the overhead is drawn to nothing, and the
    quadratic cost to `attention_share` times the linear one, as by one more measurement of little
    weight for each.
    """
    if not passes:
        return None
    rows = np.array([[1.0, n, float((before + n) ** 2 - before**2)] for before, n, _ in passes])
    seconds = np.array([row[2] for row in passes])
    largest, smallest = int(np.argmax(rows[:, 1])), int(np.argmin(seconds))
    beliefs = [[_NO_OVERHEAD_WEIGHT / seconds[smallest], 0.0, 0.0]]
    if attention_share is not None:
        n_tokens = rows[largest, 1]
        # So that passes outweigh a share of any size by the same.
        belief = _SHARE_WEIGHT * n_tokens**2 / seconds[largest] / (1 + attention_share * n_tokens)
        beliefs.append([0.0, -belief * attention_share, belief])
    rows /= seconds[:, None]
    scale = np.abs(rows).max(axis=0)
    wanted = np.concatenate([np.ones(len(passes)), np.zeros(len(beliefs))])
    rows = np.concatenate([rows, beliefs])
    best, best_error = None, math.inf
    # Three unknowns: trying every set of those above zero is the whole of the optimisation.
    for n_used in (1, 2, 3):
        for used in itertools.combinations(range(3), n_used):
            columns = rows[:, used] / scale[list(used)]
            found, _, rank, _ = np.linalg.lstsq(columns, wanted, rcond=None)
            error = float(((columns @ found - wanted) ** 2).sum())
            if rank < n_used or (found < 0).any() or error >= best_error * (1 - 1e-9):
                continue
            best, best_error = np.zeros(3), error
            best[list(used)] = found / scale[list(used)]
    return None if best is None else ForwardCost(*(float(value) for value in best))


def attention_share(model: Any) -> float | None:
    """Return what a token's attention to one other costs, by all that it costs otherwise.

    From the operations that a model's shape asks for; None where the shape is not known. Layers
    with a sliding window count as if they attended to nothing.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16,
    ...     num_key_value_heads=4, intermediate_size=128, num_hidden_layers=2, vocab_size=32))
    >>> round(1 / attention_share(model))  # 4 * 64 * 64 + 3 * 64 * 128 + 128 by 2 * 64
    321
    """
    try:
        config = text_config(model)
        _, layers = decoder_layers(model)
        n_heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    except Exception:  # a configuration is the model's own code, and this is but a guess at costs
        return None
    n_experts = next(
        (n for name in _EXPERTS if (n := getattr(config, name, None))), None
    )  # of which each token sees some
    n_active = getattr(config, "num_experts_per_tok", None)
    expert_part = n_active / n_experts if n_experts and n_active else 1.0
    n_weights = sum(
        parameter.numel() * (expert_part if "experts." in name else 1.0)
        for _, layer, _ in layers
        for name, parameter in layer.named_parameters()
    )
    n_full = sum("sliding" not in kind for kind in kinds[: len(layers)])
    # Half of the scores lie behind the diagonal, but kernels skip little of that, and reach fewer
    # operations in a second than matrix products do.
    return 2.0 * n_full * n_heads * head_dim / n_weights if n_weights else None


class CostBook:
    """Measurements of one model on one machine; safe from several threads.

    Parameters
    ----------
    path : str or None
        The file to keep them in; None keeps them in memory.
    model : str
        What the model is, for who reads the file.

    Attributes
    ----------
    attention_share : float or None
        What the model's shape says of its costs, see :func:`attention_share`; decides where the
        passes do not.

    Examples
    --------
    >>> book = CostBook(None, "tiny")
    >>> book.forward() is None
    True
    >>> for n in (100, 200, 400):
    ...     book.add_forward(0, n, 0.001 * n)
    >>> round(book.forward().seconds(1000), 3)
    1.0
    """

    def __init__(self, path: str | None, model: str) -> None:
        self.path, self.model = path, model
        self.read_bytes_per_s: float | None = None
        self.attention_share: float | None = None
        self._decode_bytes_per_s: dict[int, float] = {}
        self._kl_per_step2: dict[str, float] = {}
        self._passes: dict[int, list[tuple[int, int, float]]] = {}
        self._fitted: tuple[Any, ForwardCost | None] | None = None  # to which passes, and what
        self._lock = threading.Lock()
        self._is_changed = False
        if path is not None:
            self._take(_read_json(path))

    # -- what was measured --

    def add_forward(self, n_before: int, n_new: int, seconds: float) -> None:
        """Note a pass of `n_new` tokens after `n_before` others; an absurd one is left out."""
        if n_new < 1 or n_before < 0 or not _is_in(seconds, _TIME_RANGE):
            return
        with self._lock:
            passes = self._passes.setdefault(int(math.log2(n_new)), [])
            passes.append((int(n_before), int(n_new), float(seconds)))
            del passes[:-_N_PASSES_EACH]
            self._is_changed = True

    def add_restore(self, counts: dict[str, Any], max_bytes_per_s: float = 0.0) -> None:
        """Note what ``_core.Restore.counts`` gives of a restore that read at most so fast.

        Reads that a limit has held up say nothing of the store.
        """
        with self._lock:
            rate = counts["read_bytes"] / max(counts["read_wall_s"], 1e-9)
            is_free = max_bytes_per_s == 0 or rate < _OWN_SHARE * max_bytes_per_s
            if counts["read_bytes"] >= _MIN_READ_BYTES and counts["read_wall_s"] > 0 and is_free:
                self.read_bytes_per_s = _blend(self.read_bytes_per_s, rate)
                self._is_changed = True
            for codec, (n_bytes, seconds) in counts["by_codec"].items():
                if n_bytes >= _MIN_READ_BYTES and seconds > 0:
                    self._decode_bytes_per_s[codec] = _blend(
                        self._decode_bytes_per_s.get(codec), n_bytes / seconds
                    )
                    self._is_changed = True

    def add_divergence(self, profile: str, step: float, mean_kl: float) -> None:
        """Note what the guard measured of codec predict, with a profile and at a step.

        Or of integers, under that name: their step is the root of the squared error.
        """
        if step > 0 and _is_in(mean_kl, _DIVERGENCE_RANGE):
            with self._lock:
                known = self._kl_per_step2.get(profile)
                found = mean_kl / step**2
                self._kl_per_step2[profile] = found if known is None else math.sqrt(known * found)
                self._is_changed = True

    # -- what it comes to --

    def step_for(self, profile: str, mean_kl: float) -> float | None:
        """Return the step that would give this divergence, or None if nothing was measured."""
        with self._lock:
            known = self._kl_per_step2.get(profile)
        return None if known is None else math.sqrt(mean_kl / known)

    def forward(self) -> ForwardCost | None:
        """Return what a forward pass costs, or None before any was measured."""
        with self._lock:
            passes = [row for rows in self._passes.values() for row in rows]
        # Passes of a token or two are all overhead: they say nothing of what a prefix costs.
        known = [row for row in passes if row[1] >= 8] or passes, self.attention_share
        fitted = self._fitted
        if fitted is None or fitted[0] != known:
            fitted = self._fitted = known, _fit(*known)
        return fitted[1]

    def decode_bytes_per_s(self, codec: int) -> float | None:
        """Return how many bytes one thread decodes in a second, or None if that is unknown."""
        with self._lock:
            return self._decode_bytes_per_s.get(codec)

    def plan_costs(
        self,
        n_layers: int,
        n_batch: int,
        blocks: Iterable[tuple[tuple[int, ...], int, int, int]],
        *,
        read_bytes_per_s: float,
        n_threads: int,
        block_tokens: int,
        first_block_tokens: int,
        decode_on_compute: bool = True,
    ) -> Costs | None:
        """Return what `krul.plan.plan` needs to bring these blocks back.

        Parameters
        ----------
        n_layers, n_batch : int
        blocks : iterable of (layers, codec, payload_bytes, decoded_bytes)
            Two layers in one block: the lower one first.
        read_bytes_per_s : float
        n_threads : int
            0 means every processor.
        block_tokens, first_block_tokens : int
            As in `krul.plan.Costs`, like
        decode_on_compute : bool
            which is false for a model on another device than the CPU.

        Returns
        -------
        Costs or None
            None before any forward pass was measured.
        """
        forward = self.forward()
        if forward is None:
            return None
        read_s, decode_s, pair_read_s = ([0.0] * n_layers for _ in range(3))
        pairs: dict[tuple[int, ...], float] = {}
        n_threads = n_threads or os.cpu_count() or 1
        with self._lock:
            rates = dict(self._decode_bytes_per_s)
        for layers, codec, payload_bytes, decoded_bytes in blocks:
            rate = rates.get(codec) or UNKNOWN_DECODE_BYTES_PER_S
            seconds = payload_bytes / read_bytes_per_s
            if len(layers) == 1:
                read_s[layers[0]] += seconds
            else:
                pairs[layers] = pairs.get(layers, 0.0) + seconds
            for layer in layers:
                decode_s[layer] += decoded_bytes / rate / n_threads / len(layers)
        # A layer that had other partners in other segments keeps the one with most; what it shared
        # with the rest counts as its own, for it needs that longest.
        partner = [-1] * n_layers
        for (lower, upper), seconds in sorted(pairs.items(), key=lambda pair: pair[1]):
            read_s[upper] += pair_read_s[upper]
            partner[upper], pair_read_s[upper] = lower, seconds
        return Costs(
            n_layers,
            partner=partner,
            pair_read_s=pair_read_s,
            overhead_s=forward.overhead_s / n_layers,
            linear_s_per_token=n_batch * forward.linear_s_per_token / n_layers,
            quadratic_s_per_token2=n_batch * forward.quadratic_s_per_token2 / n_layers,
            read_s=read_s,
            decode_s=decode_s,
            decode_on_compute=decode_on_compute,
            block_tokens=block_tokens,
            first_block_tokens=first_block_tokens,
        )

    # -- the file --

    def _take(self, found: Any) -> None:
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            return
        rate = found.get("read_bytes_per_s")
        self.read_bytes_per_s = float(rate) if _is_in(rate, _RATE_RANGE) else None
        share = found.get("attention_share")
        self.attention_share = float(share) if _is_in(share, _SHARE_RANGE) else None
        decoders = found.get("decode_bytes_per_s")
        for codec, rate in decoders.items() if isinstance(decoders, dict) else ():
            if codec.isascii() and codec.isdecimal() and _is_in(rate, _RATE_RANGE):
                self._decode_bytes_per_s[int(codec)] = float(rate)
        divergences = found.get("kl_per_step2")
        for profile, value in divergences.items() if isinstance(divergences, dict) else ():
            if _is_in(value, _DIVERGENCE_RANGE):
                self._kl_per_step2[profile] = float(value)
        passes = found.get("passes")
        for row in passes if isinstance(passes, list) else ():
            is_row = isinstance(row, list) and len(row) == 3
            if is_row and all(_is_in(n, (0, 2**30)) for n in row[:2]):
                self.add_forward(*row)
        self._is_changed = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        forward = self.forward()
        with self._lock:
            return {
                "format": _FORMAT,
                "model": self.model,
                "machine": _machine(),
                "read_bytes_per_s": self.read_bytes_per_s,
                "attention_share": self.attention_share,
                "decode_bytes_per_s": {
                    str(codec): rate for codec, rate in sorted(self._decode_bytes_per_s.items())
                },
                "kl_per_step2": dict(sorted(self._kl_per_step2.items())),
                "passes": [list(row) for rows in self._passes.values() for row in rows],
                "forward": None if forward is None else vars(forward),
            }

    def save(self) -> None:
        """Write the file if anything is new; a failure is left alone."""
        if self.path is None or not self._is_changed:
            return
        content = json.dumps(self.to_dict(), indent=1).encode()
        self._is_changed = False
        with contextlib.suppress(OSError):
            directory = os.path.dirname(self.path)
            os.makedirs(directory, 0o700, exist_ok=True)
            fd, temporary = tempfile.mkstemp(prefix=".tmp-", dir=directory)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(content)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise


def _blend(old: float | None, new: float) -> float:
    """Go half of the way to a new rate, in the logarithm: a store may be 100 times slower today."""
    new = min(max(new, _RATE_RANGE[0]), _RATE_RANGE[1])
    return new if old is None else math.sqrt(old * new)


def _read_json(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return json.loads(file.read(_MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def _machine() -> str:
    return f"{platform.node()}, {platform.machine()}, {os.cpu_count()} processors"


_books: dict[str, CostBook] = {}
_books_lock = threading.Lock()


def know_model(book: CostBook, model: Any) -> None:
    """Tell a book the shape of its model, once."""
    if book.attention_share is None:
        share = attention_share(model)
        book.attention_share = share if _is_in(share, _SHARE_RANGE) else None


def cost_book(store_path: str, fingerprint: str) -> CostBook:
    """Return the book of a model, by its exact fingerprint, in a store on this machine."""
    digest = hashlib.sha256(f"{_machine()}|{fingerprint}".encode()).hexdigest()[:32]
    path = os.path.join(store_path, _DIRECTORY, f"{digest}.json")
    with _books_lock:
        book = _books.get(path)
        if book is None:
            book = _books[path] = CostBook(path, fingerprint)
        return book


def cost_books(store_path: str) -> list[dict[str, Any]]:
    """Return every book of a store, other machines' too, as plain JSON values."""
    directory = os.path.join(store_path, _DIRECTORY)
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        content = _read_json(os.path.join(directory, name))
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            found.append(content)
    return found
