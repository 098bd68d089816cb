"""How alike two layers attend, and to what: sums over sampled attention rows.

The method is section 4.1 of *Krul* (arXiv 2507.08045): the distance of two layers is the Euclidean
distance of their attention weights, flattened over heads and tokens; a layer's importance is the
attention mass on the first and on the last tenth of the text. Prompt tokens and generated tokens
are weighted apart and added at the end. Here the rows are those of a sample of queries, computed
from queries and keys in C, tile by tile, so that nothing of tokens x tokens ever exists. Where all
layers are on one CUDA device it does that, and keeps the sums until somebody asks for them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import _core
from .errors import DeviceError, ShapeError

__all__ = ["Estimator", "Similarity", "attention_rows", "similarity"]

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Similarity:
    """What an estimator has seen.

    Attributes
    ----------
    distances : numpy.ndarray
        float64, n_layers x n_layers: Euclidean distance of the attention weights. NaN where a layer
        was not observed or two layers have different numbers of heads.
    importance : numpy.ndarray
        float64, n_layers x 2: mean attention mass on the first and on the last 10 % (at least one)
        of the tokens that a query may see. NaN when nothing was observed.
    received : numpy.ndarray
        float32, n_layers x n_tokens: attention mass that each token received, summed over heads and
        queries.
    query_moments : tuple of numpy.ndarray or None
        For each layer float32, n_kv_heads x head_dim x head_dim: mean of ``q q^T`` over the queries
        that a KV head serves. None for a layer that was not observed.
    is_pre_rotary : tuple of bool
        For each layer, whether `query_moments` is of queries before rotary embedding.
    n_prefill_rows, n_decode_rows : float
        Queries that the sums stand for, of prompts and of generated tokens, over all batch entries.
    skipped : str or None
        Why some forward passes or layers are missing from the sums.
    """

    distances: np.ndarray
    importance: np.ndarray
    received: np.ndarray
    query_moments: tuple[np.ndarray | None, ...]
    is_pre_rotary: tuple[bool, ...]
    n_prefill_rows: float
    n_decode_rows: float
    skipped: str | None = None


@dataclass
class _Sums:
    """The arrays that C adds to; with an observer, what is still on its device belongs to them."""

    distances: np.ndarray
    importance: np.ndarray
    received: np.ndarray
    n_rows: np.ndarray
    observer: Any = None
    device: Any = None  # the observer's

    @classmethod
    def zeros(cls, n_layers: int) -> _Sums:
        return cls(
            np.zeros((n_layers, n_layers)),
            np.zeros((n_layers, 2)),
            np.zeros((n_layers, 0), np.float32),
            np.zeros(1),
        )

    def grow(self, n_tokens: int) -> None:
        """Make room for the mass of more tokens."""
        n_layers, capacity = self.received.shape
        if n_tokens > capacity:
            received = np.zeros((n_layers, max(n_tokens, capacity * 3 // 2, 256)), np.float32)
            received[:, :capacity] = self.received
            self.received = received

    def observer_on(self, device: Any) -> Any:
        """Return the observer of a device; what another one has is read first."""
        if self.device != device:
            self.read()
            self.observer = _core.Observer(device.index, len(self.importance))
            self.device = device
        return self.observer

    def read(self) -> None:
        """Add what is on a device."""
        if self.observer is not None:
            self.observer.read(self.distances, self.importance, self.received, self.n_rows)


@dataclass
class _Seen:
    """One layer in the forward pass under way."""

    queries: Any
    keys: Any
    scaling: float
    softcap: float
    sinks: Any
    window: int | None
    visible: Any
    pre_rotary: Any


@dataclass
class _Forward:
    """The forward pass under way."""

    n_queries: int
    rows: np.ndarray | None
    is_decode: bool
    weight: float
    last_layer: int
    layers: dict[int, _Seen] = field(default_factory=dict)
    gathered_bytes: int = 0
    device: Any = None  # that observes by itself, and has queries and keys of all layers
    marks: Any = None  # of that device, when the pass was over

    def to_cpu(self) -> None:
        """Bring what was collected to where C computes."""
        if self.device is not None:
            for seen in self.layers.values():
                seen.queries, seen.keys = _on_cpu(seen.queries), _on_cpu(seen.keys)
            self.device = None

    def read_masks(self) -> None:
        """Have masks read that could not be before; layers may share one."""
        read: dict[int, tuple[Any, np.ndarray]] = {}
        for seen in self.layers.values():
            if callable(seen.visible):
                key = id(seen.visible)
                if key not in read:
                    read[key] = (seen.visible, seen.visible())
                seen.visible = read[key][1]


# Most memory of one estimator unless told otherwise.
_MAX_BYTES = 100_000_000
_NO_LIMIT = 1 << 62

# Of a prompt that continues a history, at most one query in this many is sampled.
_QUERIES_PER_LATER_ROW = 16


class Estimator:
    """Adds up how alike the layers of one conversation attend, forward pass by forward pass.

    A forward pass of more than `decode_every` tokens, or the first of all, is a prompt: `rows` of
    its queries, one from each of as many equal parts, stand for all. Other passes are decoding: one
    query of every `decode_every` tokens stands for them.

    Parameters
    ----------
    n_layers : int
        Decoder layers of the model.
    rows : int or "all"
        Queries sampled per prompt; ``"all"`` is the paper's full sum; 0 observes nothing.
    decode_every : int
        Tokens that one observed step of decoding stands for.
    max_bytes : int or None
        Most memory to use for queries, rows and sums. A pass that needs more is left out, and
        `Similarity.skipped` says so. Keys are borrowed from the cache and not counted.
        None is 100 MB, and for ``rows="all"``, which was asked for in full, no limit.
    n_threads : int
        Threads of the computation; 0 means every processor. Results do not depend on it.

    Raises
    ------
    ValueError
        An argument is out of range.

    Notes
    -----
    Cost: per pass ``rows x n_heads x n_tokens x head_dim`` multiplications per layer; below 2 % of
    a 2k-token prefill of SmolLM2-135M with 64 rows. The GIL is released while C computes. An
    estimator belongs to one conversation and is used by one thread at a time.

    Examples
    --------
    >>> import numpy as np
    >>> estimator = Estimator(n_layers=2, rows="all")
    >>> generator = np.random.default_rng(0)
    >>> for layer in range(2):
    ...     queries, keys = generator.normal(size=(2, 1, 4, 8, 16)).astype(np.float32)
    ...     rows = estimator.pick_rows(layer, n_queries=8)
    ...     estimator.collect(layer, queries, keys, scaling=0.25)
    >>> found = estimator.result()
    >>> found.distances.shape, found.n_prefill_rows
    ((2, 2), 8.0)
    >>> bool(found.distances[0, 0] == 0), bool(found.distances[0, 1] > 0)
    (True, True)
    """

    def __init__(
        self,
        n_layers: int,
        *,
        rows: int | str = 64,
        decode_every: int = 16,
        max_bytes: int | None = None,
        n_threads: int = 0,
    ) -> None:
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers} but must be at least 1")
        if rows != "all" and (isinstance(rows, (bool, str)) or int(rows) != rows or rows < 0):
            raise ValueError(f"rows is {rows!r} but must be 'all' or an integer from 0")
        if decode_every < 1:
            raise ValueError(f"decode_every is {decode_every} but must be at least 1")
        if max_bytes is None:
            max_bytes = _NO_LIMIT if rows == "all" else _MAX_BYTES
        if max_bytes < 0 or n_threads < 0:
            raise ValueError(
                f"max_bytes is {max_bytes} and n_threads is {n_threads} but neither may be below 0"
            )
        self.n_layers = n_layers
        self.rows = rows
        self.decode_every = decode_every
        self.max_bytes = max_bytes
        self.n_threads = n_threads
        self.n_tokens = 0
        self._worker: threading.Thread | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything that was observed."""
        self.wait()
        self._prefill = _Sums.zeros(self.n_layers)
        self._decode = _Sums.zeros(self.n_layers)
        self._moments: list[np.ndarray | None] = [None] * self.n_layers
        self._moment_weights = [0.0] * self.n_layers
        # The same of passes that devices observe: they are there until somebody asks.
        self._device_moments: dict[int, tuple[Any, float]] = {}
        self._has_device_failed = False
        self._is_pre_rotary = [True] * self.n_layers
        self._forward: _Forward | None = None
        self._n_decoded = 0
        self._n_complete = 0
        self._n_past: int | None = None
        self._reasons: list[str] = []
        self.n_tokens = 0

    # -- what the observer calls, layer by layer ---------------------------------------------

    def begin(self, n_past: int | None = None) -> None:
        """Say that a forward pass begins; what was left of another is given up.

        Parameters
        ----------
        n_past : int or None
            Tokens that the cache holds before it. None: the longest keys of any layer tell, which
            is right unless all layers have sliding windows.
        """
        self._forward = None
        self._n_past = n_past

    def pick_rows(self, layer: int, n_queries: int) -> np.ndarray | None:
        """Say which queries of this layer to collect.

        Parameters
        ----------
        layer : int
            Index of the layer; layers come in ascending order within a forward pass.
        n_queries : int
            Tokens that are fed in this forward pass.

        Returns
        -------
        numpy.ndarray or None
            int64 indices among the queries, ascending, the same for all layers of the pass. None:
            this pass is not observed.
        """
        forward = self._forward
        if forward is not None:
            # A module may call its attention twice; a layer that comes back otherwise begins anew.
            is_again = layer == forward.last_layer and layer in forward.layers
            is_next = layer > forward.last_layer and n_queries == forward.n_queries
            if not is_again and not is_next:
                if len(forward.layers) >= self._n_complete:
                    self.finish()
                forward = None
        if forward is None:
            forward = self._forward = self._plan(n_queries)
        forward.last_layer = layer
        return forward.rows

    def _plan(self, n_queries: int) -> _Forward:
        n_before = self._n_past if self._n_past is not None else self.n_tokens
        if self.rows == 0 or n_queries < 1:
            return _Forward(n_queries, None, False, 0.0, -1)
        if n_before > 0 and n_queries <= self.decode_every:
            period = self._n_decoded // self.decode_every
            self._n_decoded += n_queries
            self.n_tokens = n_before + n_queries
            if self._n_decoded // self.decode_every == period:
                return _Forward(n_queries, None, True, 0.0, -1)
            rows = np.array([n_queries - 1])
            return _Forward(n_queries, rows, True, float(self.decode_every), -1)
        n_rows = n_queries if self.rows == "all" else int(self.rows)
        if n_before > 0 and self.rows != "all":
            # A short prompt over a long history: its rows may cost no more than a part of it.
            n_rows = min(n_rows, -(-n_queries // _QUERIES_PER_LATER_ROW))
        rows = _stratified_rows(n_queries, n_rows)
        return _Forward(n_queries, rows, False, n_queries / len(rows), -1)

    def collect(
        self,
        layer: int,
        queries: Any,
        keys: Any,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks: Any = None,
        window: int | None = None,
        visible: Any = None,
        pre_rotary: Any = None,
    ) -> None:
        """Take the picked queries of one layer; keys are borrowed until the pass is finished.

        Parameters
        ----------
        layer : int
            Index of the layer.
        queries : array
            n_batch x n_heads x n_queries x head_dim, after rotary embedding; torch or NumPy,
            float32, float16 or bfloat16.
        keys : array
            n_batch x n_kv_heads x n_keys x head_dim, after rotary embedding; the last
            n_queries of them belong to the queries.
        scaling : float
            Of the dot products.
        softcap : float
            Cap of the scores by tanh, 0 for none.
        sinks : array or None
            n_heads logits that take part in the softmax only.
        window : int or None
            A query sees its last `window` keys only.
        visible : numpy.ndarray, callable or None
            bool, n_batch x n_rows x n_keys: what each picked query sees, where it is not simply all
            before it. Must be one run of real tokens up to the query itself. A function that
            returns it is called later, in another thread.
        pre_rotary : array or None
            n_batch x n_heads x n_rows x head_dim: the *picked* queries before rotary embedding.

        Raises
        ------
        krul.ShapeError
            No rows were picked for this pass, or there are more layers than were announced.
        """
        forward = self._forward
        if forward is None or forward.rows is None:
            raise ShapeError(f"layer {layer} was collected but no rows were picked")
        if not 0 <= layer < self.n_layers:
            raise ShapeError(f"layer is {layer} but there are {self.n_layers} layers")
        if layer in forward.layers:  # a module that calls its attention twice with the same queries
            return
        n_batch, n_heads, _, head_dim = queries.shape
        is_whole = len(forward.rows) == forward.n_queries
        device = None if self._has_device_failed else _observing_device(queries, keys)
        if not forward.layers:
            forward.device = device
        elif device != forward.device:  # on several devices
            forward.to_cpu()
        picked = queries if is_whole else _take_rows(queries, forward.rows)
        n_copies = 1 if pre_rotary is None else 2
        forward.gathered_bytes += (
            n_copies * n_batch * n_heads * len(forward.rows) * head_dim * _item_bytes(queries)
        )
        if forward.gathered_bytes > self.max_bytes // 2:
            self.abandon(
                f"the queries of {len(forward.rows)} rows take more than half of max_bytes, "
                f"which is {self.max_bytes}"
            )
            self._forward = _Forward(forward.n_queries, None, False, 0.0, layer)
            return
        borrowed = _on_cpu if forward.device is None else _borrowable
        forward.layers[layer] = _Seen(
            borrowed(picked),
            borrowed(keys),
            float(scaling),
            float(softcap or 0.0),
            sinks,
            window,
            visible,
            pre_rotary,
        )

    def finish(self) -> None:
        """End the forward pass: have the rows of all collected layers computed and summed.

        A thread does it, so that the model goes on meanwhile; whatever needs the sums waits for it.
        The first layer of the next pass ends a pass too. Without collected layers nothing happens.
        Where a device observes, it is not waited for here.
        """
        forward, self._forward = self._forward, None
        n_past, self._n_past = self._n_past, None
        if forward is None or not forward.layers:
            return
        self._n_complete = max(self._n_complete, len(forward.layers))
        longest = max(seen.keys.shape[2] for seen in forward.layers.values())
        n_tokens = longest if n_past is None else max(longest, n_past + forward.n_queries)
        self.n_tokens = n_tokens
        if forward.device is None:
            forward.read_masks()
            self.wait()
        else:
            from .device import Marks

            self._add_device_moments(forward)
            forward.marks = Marks([forward.device])
        self._worker = threading.Thread(
            target=self._add,
            args=(forward, n_tokens, self._worker),
            name="krul-estimator",
            daemon=True,
        )
        self._worker.start()

    def wait(self) -> None:
        """Return when no keys are read any more and all finished passes are in the sums."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.join()

    def _add(self, forward: _Forward, n_tokens: int, before: threading.Thread | None) -> None:
        """Compute what a finished pass adds; a failure costs the pass, never the conversation."""
        try:
            if before is not None:
                before.join()
            self._compute(forward, n_tokens)
        except Exception as error:
            self._note(f"a pass could not be computed: {type(error).__name__}: {error}")

    def _compute(self, forward: _Forward, n_tokens: int) -> None:
        sums = self._decode if forward.is_decode else self._prefill
        if forward.marks is None:
            self._add_moments(forward)
        else:
            forward.marks.follow()
            forward.read_masks()
        positions = np.ascontiguousarray(forward.rows + (n_tokens - forward.n_queries), np.int64)
        layers, is_real = self._describe(forward, positions, n_tokens)
        sums.grow(n_tokens)
        if forward.device is not None:
            if self._observe_there(forward, layers, positions, n_tokens, is_real, sums):
                return
            layers = [x and (_on_cpu(x[0]), _on_cpu(x[1]), *x[2:]) for x in layers]
        n_fixed = (self._prefill.received.nbytes + self._decode.received.nbytes) * 2
        tile_bytes = max(self.max_bytes // 2 - n_fixed, 1 << 20)
        _core.estimator_observe(
            layers,
            positions,
            n_tokens if is_real is None else is_real,
            forward.weight,
            sums.distances,
            sums.importance,
            sums.received,
            sums.n_rows,
            min(tile_bytes, 1 << 26),
            # Half of the processors: the model is running on them.
            self.n_threads or max(1, _core.n_processors() // 2),
        )

    def _observe_there(
        self,
        forward: _Forward,
        layers: list[tuple[Any, ...] | None],
        positions: np.ndarray,
        n_tokens: int,
        is_real: np.ndarray | None,
        sums: _Sums,
    ) -> bool:
        """Have the device compute the rows of a pass; say whether it could."""
        try:
            sums.observer_on(forward.device).observe(
                layers,
                positions,
                n_tokens if is_real is None else is_real,
                forward.weight,
                forward.marks.events(),
            )
        except (NotImplementedError, MemoryError):
            return False
        except DeviceError as error:
            self._give_devices_up(error)
            return False
        return True

    def _give_devices_up(self, error: Exception) -> None:
        """Leave it to the CPU from now on; what a device has summed may be lost."""
        self._has_device_failed = True
        self._note(f"a device failed: {error}")
        for sums in (self._prefill, self._decode):
            try:
                sums.read()
            except (DeviceError, MemoryError) as lost:
                self._note(f"what a device had summed is lost: {lost}")
            sums.observer = sums.device = None

    def _read_devices(self) -> None:
        """Bring what devices have summed here."""
        try:
            for sums in (self._prefill, self._decode):
                sums.read()
        except (DeviceError, MemoryError) as error:
            self._give_devices_up(error)

    def abandon(self, reason: str | None = None) -> None:
        """Give the forward pass under way up, with a reason for `Similarity.skipped` if any."""
        self._forward = None
        self._n_past = None
        if reason is not None:
            self._note(reason)

    def truncate(self, n_tokens: int) -> None:
        """Forget the mass that tokens from `n_tokens` on received: they left the cache.

        Sums over rows of these tokens stay: they were part of the conversation when they ran.
        """
        self._forward = None
        self.wait()
        self.n_tokens = min(self.n_tokens, n_tokens)
        self._read_devices()
        for sums in (self._prefill, self._decode):
            sums.received[:, n_tokens:] = 0

    def result(self) -> Similarity:
        """Add the sums of prompts and of generated tokens, and return what they tell.

        A forward pass under way is finished first.

        Returns
        -------
        Similarity
            Arrays of its own; the estimator can go on.
        """
        self.finish()
        self.wait()
        self._read_devices()
        prefill, decode = self._prefill, self._decode
        n_rows = float(prefill.n_rows[0] + decode.n_rows[0])
        received = np.zeros((self.n_layers, self.n_tokens), np.float32)
        for sums in (prefill, decode):
            n_held = min(self.n_tokens, sums.received.shape[1])
            received[:, :n_held] += sums.received[:, :n_held]
        with np.errstate(invalid="ignore", divide="ignore"):
            importance = (prefill.importance + decode.importance) / n_rows
        if n_rows > 0:
            distances = np.sqrt(prefill.distances + decode.distances)
        else:
            distances = np.full((self.n_layers, self.n_layers), np.nan)
        moments = tuple(self._mean_moments(layer) for layer in range(self.n_layers))
        return Similarity(
            distances=distances,
            importance=importance,
            received=received,
            query_moments=moments,
            is_pre_rotary=tuple(
                is_pre and mean is not None
                for is_pre, mean in zip(self._is_pre_rotary, moments, strict=True)
            ),
            n_prefill_rows=float(prefill.n_rows[0]),
            n_decode_rows=float(decode.n_rows[0]),
            skipped="; ".join(self._reasons) or None,
        )

    def _mean_moments(self, layer: int) -> np.ndarray | None:
        sums, weight = self._moments[layer], self._moment_weights[layer]
        if layer in self._device_moments:
            there, more = self._device_moments[layer]
            brought = _to_numpy(there)
            is_alike = sums is not None and sums.shape == brought.shape
            sums, weight = (sums + brought, weight + more) if is_alike else (brought, more)
        return None if sums is None else (sums / weight).astype(np.float32)

    def _note(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.append(reason)

    # -- parts of finish ---------------------------------------------------------------------

    def _describe(
        self, forward: _Forward, positions: np.ndarray, n_tokens: int
    ) -> tuple[list[tuple[Any, ...] | None], np.ndarray | None]:
        """Turn windows and masks into first positions of rows and one padding mask."""
        layers: list[tuple[Any, ...] | None] = [None] * self.n_layers
        n_batch = next(iter(forward.layers.values())).queries.shape[0]
        masks = {
            id(seen.visible): seen for seen in forward.layers.values() if seen.visible is not None
        }
        is_real = np.ones((n_batch, n_tokens), np.uint8)
        for seen in masks.values():
            _mark_padding(is_real, seen, positions)
        starts: dict[tuple[int, int | None], np.ndarray | None] = {}
        refused: set[tuple[int, int | None]] = set()
        for layer, seen in forward.layers.items():
            key_start = n_tokens - seen.keys.shape[2]
            key = (id(seen.visible), seen.window)
            if key not in starts:
                starts[key] = _row_starts(seen, positions, key_start)
                if not _explains(seen, starts[key], positions, key_start, is_real):
                    refused.add(key)
                    self._note("an attention mask is not causal with a window and padding")
            if key in refused:
                continue
            layers[layer] = (
                seen.queries,
                seen.keys,
                seen.scaling,
                seen.softcap,
                None if seen.sinks is None else np.ascontiguousarray(_to_numpy(seen.sinks)),
                starts[key],
                key_start,
            )
        return layers, None if is_real.all() else is_real

    def _add_device_moments(self, forward: _Forward) -> None:
        """Do what `_add_moments` does on the device, in the model's stream; nothing waits."""
        for layer, seen in forward.layers.items():
            self._is_pre_rotary[layer] &= seen.pre_rotary is not None
            queries = seen.pre_rotary if self._is_pre_rotary[layer] else seen.queries
            queries = queries.detach()
            n_batch, n_heads, n_rows, head_dim = queries.shape
            n_kv_heads = seen.keys.shape[1]
            flat = queries.float().reshape(n_batch, n_kv_heads, -1, head_dim)
            flat = flat.transpose(0, 1).reshape(n_kv_heads, -1, head_dim)
            sums, weight = self._device_moments.get(layer, (None, 0.0))
            if sums is None or sums.shape != (n_kv_heads, head_dim, head_dim):
                sums, weight = flat.new_zeros(n_kv_heads, head_dim, head_dim), 0.0
            sums = sums.baddbmm(flat.transpose(1, 2), flat, alpha=forward.weight)
            weight += forward.weight * n_batch * (n_heads // n_kv_heads) * n_rows
            self._device_moments[layer] = (sums, weight)

    def _add_moments(self, forward: _Forward) -> None:
        for layer, seen in forward.layers.items():
            if seen.pre_rotary is None:
                self._is_pre_rotary[layer] = False
        for layer, seen in forward.layers.items():
            is_pre = self._is_pre_rotary[layer]
            queries = _to_numpy(seen.pre_rotary if is_pre else seen.queries)
            n_batch, n_heads, n_rows, head_dim = queries.shape
            n_kv_heads = seen.keys.shape[1]
            flat = queries.reshape(n_batch, n_kv_heads, -1, head_dim)
            moments = np.matmul(flat.swapaxes(-1, -2), flat).sum(0) * np.float32(forward.weight)
            known = self._moments[layer]
            if known is None or known.shape != moments.shape:
                self._moments[layer] = moments
                self._moment_weights[layer] = 0.0
            else:
                known += moments
            self._moment_weights[layer] += (
                forward.weight * n_batch * (n_heads // n_kv_heads) * n_rows
            )


def _stratified_rows(n_queries: int, n_rows: int) -> np.ndarray:
    """One query out of each of n_rows equal parts, at places that no period of a text can meet."""
    if n_rows >= n_queries:
        return np.arange(n_queries)
    edges = np.arange(n_rows + 1) * n_queries // n_rows
    inside = np.arange(1, n_rows + 1) * _GOLDEN % 1.0
    return edges[:-1] + (inside * np.diff(edges)).astype(np.int64)


def _item_bytes(array: Any) -> int:
    size = getattr(array, "element_size", None)
    return int(size() if size is not None else array.itemsize)


def _to_numpy(array: Any) -> np.ndarray:
    """Return float32, copied or not, of a torch tensor or anything that NumPy takes."""
    if hasattr(array, "detach"):
        array = array.detach().float().cpu().numpy()
    return np.asarray(array, np.float32)


def _on_cpu(array: Any) -> Any:
    """Return what C can borrow: on the CPU, without a gradient, in a dtype that it knows."""
    if not hasattr(array, "detach"):
        known = array.dtype in (np.float32, np.float16)
        return array if known else np.asarray(array, np.float32)
    return _borrowable(array.detach() if array.device.type == "cpu" else array.detach().cpu())


def _borrowable(tensor: Any) -> Any:
    """Return a torch tensor that C can borrow where it is."""
    tensor = tensor.detach()
    if tensor.dtype.itemsize > 4 or not tensor.dtype.is_floating_point:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _take_rows(array: Any, rows: np.ndarray) -> Any:
    """Pick queries, of torch's without waiting for their device."""
    if not hasattr(array, "detach"):
        return array[:, :, rows]
    from .device import take_rows

    return take_rows(array, rows)


def _observing_device(queries: Any, keys: Any) -> Any:
    """Return the CUDA device on which both are, if it observes by itself, or None."""
    place = getattr(queries, "device", None)
    if getattr(place, "type", "cpu") == "cpu" or getattr(keys, "device", None) != place:
        return None
    from . import device

    return place if device.is_direct(place) else None


def _mark_padding(is_real: np.ndarray, seen: _Seen, positions: np.ndarray) -> None:
    """Clear what a mask says is padding: rows that do not see themselves, and hidden runs."""
    visible = seen.visible
    n_keys = visible.shape[2]
    key_start = is_real.shape[1] - n_keys
    seen_by_any = np.asarray(visible.any(1))
    for b in range(is_real.shape[0]):
        own = visible[min(b, len(visible) - 1)]
        sees_itself = own[np.arange(len(positions)), positions - key_start]
        is_real[b, positions[~sees_itself]] = 0
        if not sees_itself.any():
            continue
        any_row = seen_by_any[min(b, len(visible) - 1)]
        first = int(np.argmax(any_row))
        last = n_keys - int(np.argmax(any_row[::-1]))
        if seen.window is None and key_start == 0:
            is_real[b, :first] = 0
        if seen.window is None:
            is_real[b, key_start + first : key_start + last] &= any_row[first:last]


def _row_starts(seen: _Seen, positions: np.ndarray, key_start: int) -> np.ndarray | None:
    """First position that each row sees, by the mask or else by the window."""
    if seen.visible is not None:
        first = key_start + seen.visible.argmax(2)
        first = np.where(seen.visible.any(2), np.minimum(first, positions), positions)
    elif seen.window is not None:
        first = np.maximum(positions - seen.window + 1, 0)
    else:
        return None
    shape = (seen.queries.shape[0], len(positions))
    return np.ascontiguousarray(np.broadcast_to(first, shape), np.int64)


def _explains(
    seen: _Seen,
    row_starts: np.ndarray | None,
    positions: np.ndarray,
    key_start: int,
    is_real: np.ndarray,
) -> bool:
    """Tell whether first position, causality and padding give just the mask, for real rows."""
    if seen.visible is None:
        return True
    n_keys = seen.visible.shape[2]
    keys = key_start + np.arange(n_keys)
    causal = (keys <= positions[:, None]) & (keys >= row_starts[:, :, None])
    real_rows = is_real[:, positions].astype(bool)
    expected = causal & is_real[:, None, key_start:].astype(bool) & real_rows[:, :, None]
    return bool((expected == (seen.visible & real_rows[:, :, None])).all())


# -- for notebooks -----------------------------------------------------------------------------
def attention_rows(
    queries: Any,
    keys: Any,
    rows: Sequence[int] | None = None,
    *,
    scaling: float | None = None,
    softcap: float = 0.0,
    sinks: Any = None,
    window: int | None = None,
) -> np.ndarray:
    """Compute some rows of causal attention, in plain NumPy, to look at or to plot.

    Parameters
    ----------
    queries : array
        n_batch x n_heads x n_queries x head_dim; torch or NumPy.
    keys : array
        n_batch x n_kv_heads x n_keys x head_dim; the last n_queries belong to the queries.
    rows : sequence of int or None
        Indices among the queries; None for all.
    scaling : float or None
        Of the dot products; None is ``head_dim ** -0.5``.
    softcap : float
        Cap of the scores by tanh, 0 for none.
    sinks : array or None
        n_heads logits that take part in the softmax only.
    window : int or None
        A query sees its last `window` keys only.

    Returns
    -------
    numpy.ndarray
        float32, n_batch x n_heads x n_rows x n_keys; each row sums to 1 (below 1 with sinks).

    Raises
    ------
    krul.ShapeError
        Queries and keys do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 2, 5, 8))
    >>> attention_rows(x, x, [0, 4]).sum(-1).round(5).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    queries, keys = _to_numpy(queries), _to_numpy(keys)
    if queries.ndim != 4 or keys.ndim != 4 or queries.shape[1] % max(1, keys.shape[1]):
        raise ShapeError(f"queries are {queries.shape} but keys are {keys.shape}")
    n_batch, n_heads, n_queries, head_dim = queries.shape
    n_kv_heads, n_keys = keys.shape[1:3]
    if keys.shape[0] != n_batch or keys.shape[3] != head_dim or n_keys < n_queries:
        raise ShapeError(f"queries are {queries.shape} but keys are {keys.shape}")
    chosen = np.arange(n_queries) if rows is None else np.asarray(rows, np.int64)
    picked = queries[:, :, chosen].reshape(n_batch, n_kv_heads, -1, head_dim)
    scores = np.matmul(picked, keys.swapaxes(-1, -2)).reshape(n_batch, n_heads, -1, n_keys)
    scores *= np.float32(head_dim**-0.5 if scaling is None else scaling)
    if softcap:
        scores = np.float32(softcap) * np.tanh(scores / np.float32(softcap))
    positions = (chosen + n_keys - n_queries)[:, None]
    hidden = np.arange(n_keys) > positions
    if window is not None:
        hidden |= np.arange(n_keys) <= positions - window
    scores = np.where(hidden, np.float32(-np.inf), scores)
    highest = scores.max(-1, keepdims=True)
    extra = np.float32(0)
    if sinks is not None:
        logits = _to_numpy(sinks)[:, None, None]
        highest = np.maximum(highest, logits)
        extra = np.exp(logits - highest)
    powers = np.exp(scores - highest)
    return powers / (powers.sum(-1, keepdims=True) + extra)


def similarity(
    queries_by_layer: Sequence[Any],
    keys_by_layer: Sequence[Any],
    rows: int | str = "all",
    *,
    scaling: float | None = None,
    n_threads: int = 0,
) -> Similarity:
    """Compare the causal attention of layers whose queries and keys are at hand.

    Parameters
    ----------
    queries_by_layer, keys_by_layer : sequences of arrays
        For each layer as in :func:`attention_rows`, the same tokens in all.
    rows : int or "all"
        Queries sampled.
    scaling : float or None
        Of the dot products; None is ``head_dim ** -0.5``.
    n_threads : int
        0 means every processor.

    Returns
    -------
    Similarity

    Raises
    ------
    krul.ShapeError
        The sequences or arrays do not fit together.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(3, 1, 2, 40, 8)).astype(np.float32)
    >>> found = similarity([x[0], x[0], x[1]], [x[2]] * 3)
    >>> bool(found.distances[0, 1] == 0 and found.distances[0, 2] > 1)
    True
    """
    if len(queries_by_layer) != len(keys_by_layer):
        raise ShapeError(
            f"queries_by_layer has {len(queries_by_layer)} layers but keys_by_layer has "
            f"{len(keys_by_layer)}"
        )
    estimator = Estimator(len(queries_by_layer), rows=rows, max_bytes=1 << 40, n_threads=n_threads)
    for layer, (queries, keys) in enumerate(zip(queries_by_layer, keys_by_layer, strict=True)):
        if estimator.pick_rows(layer, queries.shape[2]) is not None:
            factor = queries.shape[3] ** -0.5 if scaling is None else scaling
            estimator.collect(layer, queries, keys, scaling=factor)
    return estimator.result()
