"""What was learned of a model: means, weights, maps and bases that the codec `predict` works with.

A layer's vector of one token is its keys before rotary embedding beside its values, all heads. Of
each layer a profile knows the mean, how much an error in each direction costs, how the vector is
predicted from two earlier layers, and the directions in which what remains does not correlate.
Everything is fitted in the weighted domain, where a unit of error costs the same everywhere, and
handed out in the plain one, so that who codes needs three products and no weights.

What a file holds is what was fitted: numbers are rounded to their stored form before the next step
of the fit sees them.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import arrays as _arrays
from .errors import CorruptionError, FormatError, MismatchError

if TYPE_CHECKING:
    from .fingerprint import Fingerprint
    from .moments import LearnedLayer, ModelForm, Moments
    from .rotary import Rotary

__all__ = ["N_SYMBOLS", "TABLE_SCALES", "TABLE_TOTAL", "LayerProfile", "Profile"]

PROFILE_MAGIC = b"krulprof"
PROFILE_VERSION = 1

# Frequency tables: symbol 0 to 254 is the integer -127 to 127, symbol 255 anything beyond.
N_SYMBOLS = 256
TABLE_TOTAL = 4096
_ZERO, _ESCAPE = 127, 255
# Symbols that are expected less often than this in 4096 are escapes. Keeping one that is expected e
# times, with a frequency of 1, costs the others 1.44 (1 - e) bits and saves 8 e: an escape is 12
# bits, like any symbol of frequency 1, and a byte.
_LEAST_KEPT = 0.2
# The standard deviation, in steps, that each table is for: three to an octave.
TABLE_SCALES = 2.0 ** ((np.arange(34) - 15) / 3)

# What matrices are stored in. float32 would double the file and saves no bits: on SmolLM2, coded at
# one step, 0.990 per value with either.
_NARROW = "float16"

# Of the mean of the diagonal: what is added before a matrix is solved or its root inverted.
_RIDGE = 1e-2
_FLOOR = 1e-2
# The noise of a usual step, 0.6 squared / 12: smaller variances are not coded.
_NOISE = 0.03
# How much coarser than the average a layer that matters little may become.
_MAX_COARSER = 5.0
# What rank "small" keeps to, and what is told without it: numbers of the maps as a part of the
# model's parameters.
MAX_PART = 0.01
# Distances of query and key over which the cost of an error in a key is averaged.
_DISTANCES = (0, *(2**power for power in range(12)))


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """What the codec needs to know of one layer; all arrays are contiguous float32.

    Attributes
    ----------
    sources : tuple of int
        The earlier layers that this one is predicted from, the nearest last: none, one or two.
    n_heads, key_dim, value_dim : int
        Heads of K and V, and numbers of each per head and token.
    window : int
        Tokens that a sliding layer sees; 0 for the others.
    rotary : krul.rotary.Rotary
        How its keys are rotated; its ``tables(positions)`` are cosine and sine.
    mean : numpy.ndarray
        [width], where width = n_heads * (key_dim + value_dim): K of all heads, then V of all heads.
    backward : numpy.ndarray
        [width, width]; coefficients @ backward is the residual. Like maps, left and right it holds
        only numbers that bfloat16 has, so that no machine's products see others.
    maps : numpy.ndarray
        [n_sources * width, width]; what was decoded of the sources, minus their means, side by
        side, @ maps is the prediction.
    left, right : numpy.ndarray or None
        [n_sources * width, rank] and [rank, width]: where maps are stored in low rank, their
        product is maps.
    deviation : numpy.ndarray
        [width], largest first: standard deviations of the coefficients of the calibration's texts
        when predicted from exact sources.
    forward : numpy.ndarray
        [width, width]; residual @ forward are the coefficients: the inverse of backward as it is.
        Made on first use: only encoding needs it.
    """

    sources: tuple[int, ...]
    n_heads: int
    key_dim: int
    value_dim: int
    window: int
    rotary: Rotary
    mean: np.ndarray
    backward: np.ndarray
    maps: np.ndarray
    left: np.ndarray | None
    right: np.ndarray | None
    deviation: np.ndarray
    _make_forward: Callable[[], np.ndarray] = field(repr=False)

    @functools.cached_property
    def forward(self) -> np.ndarray:
        """See the class."""
        return self._make_forward()

    @functools.cached_property
    def narrow_forward(self) -> np.ndarray:
        """`forward` in bfloat16, its bits as uint16."""
        return _upper_halves(_bf16(self.forward))

    @functools.cached_property
    def narrow(self) -> tuple[np.ndarray | None, ...]:
        """`backward`, `maps`, `left` and `right` in bfloat16, their bits as uint16."""
        maps = None if self.left is not None or not self.sources else self.maps
        wide = (self.backward, maps, self.left, self.right)
        return tuple(None if each is None else _upper_halves(each) for each in wide)

    @property
    def width(self) -> int:
        """Numbers per token."""
        return len(self.mean)


def _upper_halves(array: np.ndarray) -> np.ndarray:
    """Return the bits in bfloat16 of numbers that it has."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


class _Layers(Sequence["LayerProfile | None"]):
    """The layers of a profile, each made when it is first asked for."""

    def __init__(self, n_layers: int, make: Callable[[int], LayerProfile | None]) -> None:
        self._made: dict[int, LayerProfile | None] = {}
        self._n_layers, self._make = n_layers, make
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._n_layers

    @overload
    def __getitem__(self, index: int) -> LayerProfile | None: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerProfile | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n_layers))]
        place = range(self._n_layers)[index]
        with self._lock:
            if place not in self._made:
                self._made[place] = self._make(place)
            return self._made[place]


class Profile:
    """What was learned of a model; made by :meth:`fit` or :meth:`load`.

    Attributes
    ----------
    layers : sequence of LayerProfile or None
        One per decoder layer; None for one that takes no part, see `reasons`.
    reasons : tuple of str or None
        Why a layer takes no part.
    fingerprint : krul.fingerprint.Fingerprint
        Of the model; without its layout.
    digest : str
        SHA-256 of the contents, 64 hexadecimal digits: a conversation names the profile by it.
    n_bytes : int
        Size of the file.
    n_tokens : int
        Tokens of calibration.
    rank : int or None
        Of the maps; None where they are stored whole.
    sensitivities : numpy.ndarray
        float64 [2, n_layers]: what the error of K, and of V, of a layer alone costs; 0 for layers
        that take no part.
    tables : numpy.ndarray
        uint16 [len(TABLE_SCALES), 256], each row with the sum 4096: how often each integer occurs
        among coefficients with a standard deviation near ``TABLE_SCALES`` steps. Those with a 0 are
        written as symbol 255 is, whose frequency is at least 1.
    """

    def __init__(self, contents: bytes) -> None:
        from .moments import ModelForm, an_int, take

        meta, arrays, digest = _arrays.decode(
            contents, PROFILE_MAGIC, PROFILE_VERSION, "a krul profile"
        )
        self._contents, self._arrays = contents, arrays
        self._form = form = ModelForm.from_parts(meta, arrays)
        self.digest = digest
        self.n_bytes = len(contents)
        self.n_tokens = an_int(meta.get("n_tokens"), "n_tokens", 0, 1 << 60)
        rank = meta.get("rank")
        self.rank: int | None = None if rank is None else an_int(rank, "rank", 1, 1 << 20)
        self.sensitivities = take(arrays, "sensitivities", "float64", (2, len(form.layers)))
        self.tables = take(arrays, "tables", "uint16", (len(TABLE_SCALES), N_SYMBOLS))
        _check_tables(self.tables)
        for index, layer in enumerate(form.layers):
            if layer is not None:
                for name, (dtype, shape) in _stored(index, layer, self.rank).items():
                    take(arrays, name, dtype, shape)
                for name in (f"{index} key scale", f"{index} value scale"):
                    if arrays[name].min() <= 0:
                        raise FormatError(f"array {name!r} holds numbers that are not positive")
        self.layers: Sequence[LayerProfile | None] = _Layers(len(form.layers), self._derive)

    @property
    def fingerprint(self) -> Fingerprint:
        """See the class."""
        return self._form.fingerprint

    @property
    def form(self) -> ModelForm:
        """Which layers take part, and their shapes."""
        return self._form

    @property
    def reasons(self) -> tuple[str | None, ...]:
        """See the class."""
        return self._form.reasons

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the file by what they are for; they add up to `n_bytes`."""
        kinds = {
            "map": "maps",
            "left": "maps",
            "right": "maps",
            "basis": "bases",
            "key": "weights",
            "value": "weights",
            "mean": "means",
            "deviation": "deviations",
            "tables": "tables",
        }
        out = dict.fromkeys((*dict.fromkeys(kinds.values()), "rest"), 0)
        for name, array in self._arrays.items():
            words = name.split(" ")
            word = words[1] if words[0].isdigit() else words[0]
            out[kinds.get(word, "rest")] += array.nbytes
        out["rest"] += self.n_bytes - sum(out.values())
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return what it is, without the numbers, as plain JSON values."""
        return {
            "digest": self.digest,
            "model": self.fingerprint.exact,
            "n_tokens": self.n_tokens,
            "n_layers": len(self.layers),
            "n_layers_learned": sum(layer is not None for layer in self._form.layers),
            "reasons": sorted({reason for reason in self.reasons if reason is not None}),
            "rank": self.rank,
            "n_bytes": self.n_bytes,
            "bytes_by_part": self.sizes,
        }

    def __repr__(self) -> str:
        learned = sum(layer is not None for layer in self._form.layers)
        return (
            f"<krul.Profile {self.digest[:12]}: {learned} of {len(self.layers)} layers, "
            f"{self.n_tokens:,} tokens, {self.n_bytes:,} bytes>"
        )

    # ---- making, keeping ---------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        max_tokens: int = 40_960,
        context_tokens: int = 3072,
        keep_first: int = 4,
        rank: int | str | None = None,
        sensitivity_texts: int = 3,
    ) -> Profile:
        """Learn a model from texts.

        Parameters
        ----------
        model : torch.nn.Module
            A transformers model that krul supports, or a wrapper of one; left as it was.
        tokenizer : callable
            The model's own: ``tokenizer(text).input_ids`` or ``tokenizer(text)["input_ids"]``.
        texts : iterable of str
            Of the kinds that conversations will be of; a hundred thousand characters and more.
        progress : bool
            Show a bar on a terminal.
        checkpoint : path or None
            A file that keeps how far it came. Where one is there, the calibration goes on from it;
            it is removed at the end.
        max_tokens : int
            Tokens that are used; long texts give more than one piece, in turn.
        context_tokens : int
            Tokens of the longest piece, but no more than the positions that the model is made for.
        keep_first : int
            Tokens at the start of each piece that are left out: they are kept exact anyway.
        rank : int, "full", "small" or None
            Of the maps in their stored form. None and ``"full"`` store them whole; None warns where
            they hold more than 1 % as many numbers as the model has parameters. ``"small"`` takes
            the largest rank that keeps to the 1 %, which costs conversations: on SmolLM2-135M whole
            maps make a profile of 26.5 MB, and with ``"small"`` what is coded is 22 % less
            compressed.
        sensitivity_texts : int
            Pieces that the cost of an error in each layer is measured with; 0 takes all as equal.

        Returns
        -------
        Profile

        Raises
        ------
        ValueError
            The texts are too short, or K and V are not finite.
        krul.UnsupportedModelError
            krul cannot keep the cache of this model, or no layer has keys that can be un-rotated.
        krul.MismatchError
            The checkpoint is of another model, of other texts or other options.

        Notes
        -----
        Costs the prefill of all tokens, ``2 n_layers`` short passes per sensitivity text and one
        eigenvalue decomposition per layer: a few minutes for 40,000 tokens of a model with 135
        million parameters on two cores. Memory: K and V of one piece, and of each layer three
        float64 matrices as wide as its K and V.
        """
        from .calibrate import fit

        return fit(
            model,
            tokenizer,
            texts,
            progress=progress,
            checkpoint=checkpoint,
            max_tokens=max_tokens,
            context_tokens=context_tokens,
            keep_first=keep_first,
            rank=rank,
            sensitivity_texts=sensitivity_texts,
        )

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        model: Any,
        *,
        sensitivities: np.ndarray | None = None,
        tables: np.ndarray | None = None,
        rank: int | str | None = None,
    ) -> Profile:
        """Solve for a profile from sums alone.

        Parameters
        ----------
        moments : krul.moments.Moments
            Of at least 4 tokens per number of the widest layer.
        model : torch.nn.Module
            The model that they are of: the cost of an error in V is read from its weights.
        sensitivities : numpy.ndarray, optional
            float64 [2, n_layers]; None takes all layers as equal.
        tables : numpy.ndarray, optional
            uint16 [len(TABLE_SCALES), 256]; None makes tables of a Laplace distribution.
        rank
            See :meth:`fit`.

        Raises
        ------
        ValueError
            There are too few tokens, or a matrix is not finite.
        """
        from .calibrate import n_parameters, value_metrics

        return solve(
            moments,
            value_metrics(model, moments.form),
            n_parameters(model),
            sensitivities=sensitivities,
            tables=tables,
            rank=rank,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file, replaced whole or not at all."""
        _arrays.write_file(path, self._contents)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a profile.

        Raises
        ------
        krul.FormatError
            The file is none, or of another version.
        krul.CorruptionError
            It is cut short or was altered.
        OSError
            It cannot be read.
        """
        try:
            return cls(_arrays.read_file(path))
        except (FormatError, CorruptionError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    def check(self, model: Any) -> None:
        """Refuse a model that this profile is not of.

        Raises
        ------
        krul.MismatchError
            Other weights, dtype, adapters, layers or rotary embedding; the message says which.
        """
        from .fingerprint import fingerprint

        self.check_fingerprint(fingerprint(model))

    def check_fingerprint(self, present: Fingerprint) -> None:
        """Do what :meth:`check` does, with the model's fingerprint."""
        from .fingerprint import check_fingerprint

        try:
            check_fingerprint(self.fingerprint, present)
        except MismatchError as error:
            words = str(error).partition(": ")[2]
            raise MismatchError(
                f"the profile is of another model: {words}; profile {self.digest[:12]} is of model "
                f"{self.fingerprint.exact[:12]}, this one is {present.exact[:12]}"
            ) from None

    def with_tables(self, tables: np.ndarray) -> Profile:
        """Return the same profile with other frequency tables."""
        meta, arrays, _ = _arrays.decode(
            self._contents, PROFILE_MAGIC, PROFILE_VERSION, "a krul profile"
        )
        return Profile(
            _arrays.encode(PROFILE_MAGIC, PROFILE_VERSION, meta, {**arrays, "tables": tables})
        )

    # ---- what the codec is given -------------------------------------------------------------

    def _weights(self, index: int) -> list[np.ndarray]:
        """Return the weights of a layer, float64, one matrix for K of each head, then for V."""
        layer = self._form.layers[index]
        assert layer is not None
        return [
            matrix
            for kind, dim in (("key", layer.key_dim), ("value", layer.value_dim))
            for matrix in _from_triangle(
                self._arrays[f"{index} {kind} weight"], self._arrays[f"{index} {kind} scale"], dim
            )
        ]

    def _derive(self, index: int) -> LayerProfile | None:
        layer = self._form.layers[index]
        if layer is None:
            return None
        arrays = self._arrays
        weights = self._weights(index)
        inverses = [np.linalg.inv(weight) for weight in weights]
        basis = _orthogonal(arrays[f"{index} basis"])
        left = right = None
        maps = np.zeros((0, layer.width), np.float32)
        if layer.sources:
            wide = [w for source in layer.sources for w in self._weights(source)]
            if self.rank is None:
                plain = arrays[f"{index} map"].astype(np.float64) * arrays[f"{index} map scale"]
                maps = _bf16(_times_blocks(_blocks_times(wide, plain), inverses))
            else:
                factor, other = _factors(arrays, index)
                left = _bf16(_blocks_times(wide, factor))
                right = _bf16(_times_blocks(other, inverses))
                maps = _plain32(left.astype(np.float64) @ right.astype(np.float64))
        backward = _bf16(_times_blocks(basis.T, inverses))
        return LayerProfile(
            layer.sources,
            layer.n_heads,
            layer.key_dim,
            layer.value_dim,
            layer.window,
            layer.rotary,
            arrays[f"{index} mean"],
            backward,
            maps,
            left,
            right,
            arrays[f"{index} deviation"],
            lambda: _inverse(
                _blocks_times(weights, _orthogonal(arrays[f"{index} basis"])), backward
            ),
        )


# ---- the stored form -----------------------------------------------------------------------------


def _stored(
    index: int, layer: LearnedLayer, rank: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every array of a layer by its name."""
    width, n_sources = layer.width, len(layer.sources)
    out: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{index} mean": ("float32", (width,)),
        f"{index} deviation": ("float32", (width,)),
        f"{index} basis": (_NARROW, (width, width)),
    }
    for kind, dim in (("key", layer.key_dim), ("value", layer.value_dim)):
        out[f"{index} {kind} weight"] = (_NARROW, (layer.n_heads, dim * (dim + 1) // 2))
        out[f"{index} {kind} scale"] = ("float32", (layer.n_heads,))
    if n_sources and rank is None:
        out[f"{index} map"] = (_NARROW, (n_sources * width, width))
        out[f"{index} map scale"] = ("float32", (1,))
    elif n_sources:
        kept = min(rank or 0, width)
        out[f"{index} left"] = (_NARROW, (n_sources * width, kept))
        out[f"{index} left scale"] = ("float32", (kept,))
        out[f"{index} right"] = (_NARROW, (kept, width))
    return out


def _bf16(array: np.ndarray) -> np.ndarray:
    """Return finite numbers as float32, rounded to bfloat16, halves to even."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return _plain32(bits.view(np.float32))


def _inverse(nearly: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the inverse of a matrix from what is 2^-8 from it: one step of Newton and Schulz."""
    return _plain32(2 * nearly - nearly @ (matrix.astype(np.float64) @ nearly))


def _plain32(array: np.ndarray) -> np.ndarray:
    out = np.ascontiguousarray(array, np.float32)
    out.flags.writeable = False
    return out


def _to_triangle(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return symmetric matrices [n, dim, dim] as float16 triangles with a float32 scale each."""
    rows, columns = np.triu_indices(matrices.shape[1])
    flat = matrices[:, rows, columns]
    scale = np.abs(flat).max(1).astype(np.float32)
    return (flat / scale[:, None]).astype(_NARROW), scale


def _from_triangle(triangles: np.ndarray, scale: np.ndarray, dim: int) -> np.ndarray:
    rows, columns = np.triu_indices(dim)
    out = np.empty((len(triangles), dim, dim))
    flat = triangles.astype(np.float64) * scale.astype(np.float64)[:, None]
    out[:, rows, columns] = flat
    out[:, columns, rows] = flat
    return out


def _orthogonal(basis: np.ndarray) -> np.ndarray:
    """Return the stored basis in float64 with the rounding's part in its products taken out.

    One step of Newton and Schulz squares the error: from float16's 5e-4 to 2e-7.
    """
    wide = basis.astype(np.float64)
    return 1.5 * wide - 0.5 * wide @ (wide.T @ wide)


def _factors(arrays: Mapping[str, np.ndarray], index: int) -> tuple[np.ndarray, np.ndarray]:
    left = arrays[f"{index} left"].astype(np.float64) * arrays[f"{index} left scale"]
    return left, arrays[f"{index} right"].astype(np.float64)


def _blocks_times(blocks: Sequence[np.ndarray], matrix: np.ndarray) -> np.ndarray:
    """Return the block-diagonal matrix of `blocks` times `matrix`."""
    out = np.empty((sum(len(block) for block in blocks), matrix.shape[1]))
    for block, start in _placed(blocks):
        out[start : start + len(block)] = block @ matrix[start : start + len(block)]
    return out


def _times_blocks(matrix: np.ndarray, blocks: Sequence[np.ndarray]) -> np.ndarray:
    out = np.empty((matrix.shape[0], sum(len(block) for block in blocks)))
    for block, start in _placed(blocks):
        out[:, start : start + len(block)] = matrix[:, start : start + len(block)] @ block
    return out


def _placed(blocks: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    start = 0
    for block in blocks:
        yield block, start
        start += len(block)


# ---- frequency tables ----------------------------------------------------------------------------


def _check_tables(tables: np.ndarray) -> None:
    sums = tables.sum(1, dtype=np.int64)
    if (sums != TABLE_TOTAL).any():
        place = int(np.argmax(sums != TABLE_TOTAL))
        raise FormatError(f"table {place} has the sum {sums[place]} but must have {TABLE_TOTAL}")
    for place, frequency in enumerate(tables[:, _ESCAPE]):
        if not 1 <= frequency < TABLE_TOTAL:
            raise FormatError(
                f"table {place} gives symbol {_ESCAPE} the frequency {frequency} but it must be 1 "
                f"to {TABLE_TOTAL - 1}: any number may occur, and no symbol fills a table alone"
            )


def frequency_table(counts: np.ndarray) -> np.ndarray:
    """Return counts of symbols as frequencies, uint16 with the sum 4096.

    Symbols that are too rare get 0, and what they count goes to the last one; that one and the
    integer 0 have at least 1.

    Parameters
    ----------
    counts : numpy.ndarray
        float64 [256], not negative, not all 0.
    """
    counts = np.asarray(counts, np.float64)
    if counts.shape != (N_SYMBOLS,) or not counts.sum() > 0 or counts.min() < 0:
        raise ValueError(
            f"counts is {counts.shape} with the sum {counts.sum()} but must be ({N_SYMBOLS},) and "
            "positive"
        )
    wanted = counts / counts.sum() * TABLE_TOTAL
    is_kept = wanted >= _LEAST_KEPT
    is_kept[[_ZERO, _ESCAPE]] = True
    wanted[_ESCAPE] += wanted[~is_kept].sum()
    wanted[~is_kept] = 0
    # What is raised to 1 is taken from the others in proportion, which may bring more below 1.
    is_raised = np.zeros(N_SYMBOLS, bool)
    while True:
        room = TABLE_TOTAL - is_raised.sum()
        scaled = np.where(is_raised, 1.0, wanted * (room / wanted[~is_raised].sum()))
        more = is_kept & ~is_raised & (scaled < 1)
        if not more.any():
            break
        is_raised |= more
    out = np.floor(scaled).astype(np.int64)
    n_left = TABLE_TOTAL - int(out.sum())
    order = np.argsort(-(scaled - out), kind="stable")
    out[order[:n_left]] += 1
    return out.astype(np.uint16)


def laplace_counts(scale: float) -> np.ndarray:
    """Return the part of each symbol under a Laplace distribution, float64 [256]."""
    width = scale / math.sqrt(2)
    edges = np.arange(-127, 129) - 0.5
    below = np.where(
        edges < 0, 0.5 * np.exp(-np.abs(edges) / width), 1 - 0.5 * np.exp(-np.abs(edges) / width)
    )
    out = np.empty(N_SYMBOLS)
    out[:-1] = np.diff(below)
    out[-1] = max(0.0, 1 - out[:-1].sum())
    return out


def _default_tables() -> np.ndarray:
    return np.stack([frequency_table(laplace_counts(scale)) for scale in TABLE_SCALES])


# ---- the fit -------------------------------------------------------------------------------------


def min_tokens(form: ModelForm) -> int:
    """Return how many tokens a fit needs at least: 4 for each number of the widest layer."""
    return 4 * max(layer.width for layer in form.layers if layer is not None)


def _root(metric: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of each matrix [n, dim, dim], kept off singular."""
    dim = metric.shape[1]
    size = np.trace(metric, axis1=1, axis2=2)[:, None, None] / dim
    metric = np.where(size > 0, metric + _FLOOR * size * np.eye(dim), np.eye(dim))
    values, vectors = np.linalg.eigh(metric)
    return vectors * np.sqrt(values)[:, None, :] @ vectors.transpose(0, 2, 1)


def _turned(rotary: Rotary, second: np.ndarray) -> np.ndarray:
    """Average second moments of queries [n, dim, dim] over relative rotations."""
    dim = second.shape[1]
    if rotary.convention == "none":
        return second
    cos, sin = rotary.tables(np.asarray(_DISTANCES))
    size = np.hypot(cos.astype(np.float64), sin)
    cos, sin = cos / size, sin / size
    n_pairs = len(rotary.frequencies)
    pairs = np.arange(n_pairs)
    if rotary.convention == "half":
        first, other = rotary.start + pairs, rotary.start + n_pairs + pairs
    else:
        first, other = rotary.start + 2 * pairs, rotary.start + 2 * pairs + 1
    out = np.zeros_like(second)
    for c, s in zip(cos, sin, strict=True):
        turn = np.eye(dim)
        turn[first, first] = turn[other, other] = c
        turn[first, other], turn[other, first] = -s, s
        out += turn @ second @ turn.T
    return out / len(_DISTANCES)


class _Covariances:
    """Means and covariances in the plain domain, from sums."""

    def __init__(self, moments: Moments) -> None:
        self.moments, self.n = moments, moments.n_tokens

    def mean(self, index: int) -> np.ndarray:
        return self.moments.sum(f"{index} sum") / self.n

    def own(self, index: int) -> np.ndarray:
        mean = self.mean(index)
        second = self.moments.sum(f"{index} second") / self.n
        return (second + second.T) / 2 - np.outer(mean, mean)

    def cross(self, source: int, index: int) -> np.ndarray:
        both = self.moments.sum(f"{index} with {source}") / self.n
        return both - np.outer(self.mean(source), self.mean(index))


def _scaled_sensitivities(form: ModelForm, sensitivities: np.ndarray | None) -> np.ndarray:
    """Return what the weights of K and V of each layer are divided by, float64 [2, n_layers]."""
    n_layers = len(form.layers)
    if sensitivities is None:
        return np.ones((2, n_layers))
    given = np.asarray(sensitivities, np.float64)
    if given.shape != (2, n_layers) or not np.isfinite(given).all() or given.min() < 0:
        raise ValueError(
            f"sensitivities is {given.shape} but must be (2, {n_layers}), finite and not negative"
        )
    learned = np.array([layer is not None for layer in form.layers])
    if not given[:, learned].max() > 0:
        return np.ones((2, n_layers))
    # One that measures as nothing must not move the average of all.
    floored = np.maximum(given, 1e-6 * given[:, learned].max())
    average = np.exp(np.log(floored[:, learned]).mean())
    return np.minimum((floored / average) ** -0.5, _MAX_COARSER)


def whole_maps(form: ModelForm) -> int:
    """Return how many numbers the maps of a profile hold when they are stored whole."""
    layers = [layer for layer in form.layers if layer is not None]
    return sum(len(layer.sources) * layer.width**2 for layer in layers)


def choose_rank(form: ModelForm, rank: int | str | None, n_parameters: int) -> int | None:
    """Return the rank that maps are stored with, None for whole; see :meth:`Profile.fit`."""
    layers = [layer for layer in form.layers if layer is not None]
    if rank is None or (isinstance(rank, str) and rank == "full"):
        return None
    if not isinstance(rank, str) or rank != "small":
        widest = max(layer.width for layer in layers)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= widest:
            raise ValueError(f"rank is {rank!r} but must be 'full', 'small', None or 1 to {widest}")
        return rank
    n_full = whole_maps(form)
    if n_full <= MAX_PART * n_parameters or n_full == 0:
        return None
    per_rank = sum((len(layer.sources) + 1) * layer.width for layer in layers if layer.sources)
    # From here on two factors hold more numbers than their product.
    most = min(
        layer.width * len(layer.sources) // (len(layer.sources) + 1)
        for layer in layers
        if layer.sources
    )
    return max(1, min(most, int(MAX_PART * n_parameters / per_rank)))


def solve(
    moments: Moments,
    value_metrics: Mapping[int, np.ndarray],
    n_parameters: int,
    *,
    sensitivities: np.ndarray | None = None,
    tables: np.ndarray | None = None,
    rank: int | str | None = None,
) -> Profile:
    """Solve for a profile; see :meth:`Profile.from_moments`.

    Parameters
    ----------
    moments, sensitivities, tables, rank
        As there.
    value_metrics : mapping of int to numpy.ndarray
        By layer: float64 [n_heads, value_dim, value_dim], what an error in V costs; a layer that is
        missing has the unit matrix.
    n_parameters : int
        Of the model.
    """
    form = moments.form
    needed = min_tokens(form)
    if moments.n_tokens < needed:
        raise ValueError(
            f"the texts have {moments.n_tokens} tokens but a profile of this model needs at least "
            f"{needed}, 4 for each of the numbers that its widest layer keeps of a token"
        )
    divisors = _scaled_sensitivities(form, sensitivities)
    kept = choose_rank(form, rank, n_parameters)
    cov = _Covariances(moments)
    arrays: dict[str, np.ndarray] = {}
    weights: dict[int, list[np.ndarray]] = {}
    own: dict[int, np.ndarray] = {}  # weighted covariances of layers that may still be sources
    for index, layer in enumerate(form.layers):
        if layer is None:
            continue
        arrays[f"{index} mean"] = cov.mean(index).astype(np.float32)
        plain = cov.own(index)
        if not np.isfinite(plain).all():
            raise ValueError(f"the moments of layer {index} are not finite")
        weights[index] = _weigh(index, layer, moments, value_metrics, plain, divisors, arrays)
        own[index] = _between(weights[index], plain, weights[index])
        residual = own[index]
        if layer.sources:
            residual = _predict(index, layer, cov, weights, own, kept, arrays)
            if len(layer.sources) == 2:  # the next one like it has this layer and the other
                own.pop(layer.sources[0])
        values, vectors = np.linalg.eigh((residual + residual.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
        # The sign is the library's; fixed, so that the same sums give the same file.
        strongest = vectors[np.abs(vectors).argmax(0), np.arange(len(vectors))]
        arrays[f"{index} basis"] = (vectors * np.sign(strongest)).astype(_NARROW)
        lowest = 1e-6 * max(float(values[0]), 1e-12)
        arrays[f"{index} deviation"] = np.sqrt(np.maximum(values, lowest)).astype(np.float32)
    meta, form_arrays = form.to_parts()
    meta |= {"n_tokens": moments.n_tokens, "rank": kept}
    given = np.zeros((2, len(form.layers))) if sensitivities is None else sensitivities
    arrays |= form_arrays
    arrays["sensitivities"] = np.asarray(given, np.float64)
    arrays["tables"] = _default_tables() if tables is None else np.asarray(tables, np.uint16)
    return Profile(_arrays.encode(PROFILE_MAGIC, PROFILE_VERSION, meta, arrays))


def _weigh(
    index: int,
    layer: LearnedLayer,
    moments: Moments,
    value_metrics: Mapping[int, np.ndarray],
    plain: np.ndarray,
    divisors: np.ndarray,
    arrays: dict[str, np.ndarray],
) -> list[np.ndarray]:
    """Store the weights of one layer, and return them as they will be read."""
    n_heads = layer.n_heads
    n_queries = moments.sum(f"{index} query count")[0]
    if n_queries > 0:
        metric = _turned(layer.rotary, moments.sum(f"{index} queries") / n_queries)
    else:
        metric = np.tile(np.eye(layer.key_dim), (n_heads, 1, 1))
    unit = np.tile(np.eye(layer.value_dim), (n_heads, 1, 1))
    roots = (_root(metric), _root(value_metrics.get(index, unit)))
    out: list[np.ndarray] = []
    start = 0
    for kind, root, divisor in zip(("key", "value"), roots, divisors[:, index], strict=True):
        dim = root.shape[1]
        spread = 0.0
        for head in range(n_heads):
            place = slice(start + head * dim, start + (head + 1) * dim)
            spread += np.trace(root[head] @ plain[place, place] @ root[head])
        size = math.sqrt(max(spread / (n_heads * dim), 1e-30))
        triangle, scale = _to_triangle(root / (divisor * size))
        arrays[f"{index} {kind} weight"], arrays[f"{index} {kind} scale"] = triangle, scale
        out += list(_from_triangle(triangle, scale, dim))
        start += n_heads * dim
    return out


def _between(
    lower: Sequence[np.ndarray], plain: np.ndarray, upper: Sequence[np.ndarray]
) -> np.ndarray:
    """Return a plain covariance in the weighted domain; weights are symmetric."""
    return _times_blocks(_blocks_times(lower, plain), upper)


def _predict(
    index: int,
    layer: LearnedLayer,
    cov: _Covariances,
    weights: Mapping[int, list[np.ndarray]],
    own: dict[int, np.ndarray],
    rank: int | None,
    arrays: dict[str, np.ndarray],
) -> np.ndarray:
    """Store the map of one layer, and return the covariance of what it leaves."""
    width = layer.width
    together = np.zeros((len(layer.sources) * width,) * 2)
    for place, source in enumerate(layer.sources):
        at = slice(place * width, (place + 1) * width)
        together[at, at] = own[source]
    if len(layer.sources) == 2:
        lower, upper = layer.sources
        both = _between(weights[lower], cov.cross(lower, upper), weights[upper])
        together[:width, width:], together[width:, :width] = both, both.T
    target = np.concatenate(
        [
            _between(weights[source], cov.cross(source, index), weights[index])
            for source in layer.sources
        ]
    )
    ridge = _RIDGE * np.trace(together) / len(together)
    plain = np.linalg.solve(together + ridge * np.eye(len(together)), target)
    if rank is None:
        scale = np.abs(plain).max(keepdims=True).reshape(1).astype(np.float32)
        scale = np.maximum(scale, np.float32(1e-20))
        arrays[f"{index} map"] = (plain / scale).astype(_NARROW)
        arrays[f"{index} map scale"] = scale
        plain = arrays[f"{index} map"].astype(np.float64) * scale
    else:
        # Of all maps of a rank, the one that saves most bits: what is predicted, cut to the
        # directions in which it is largest beside what is left and the quantiser's noise.
        fitted = plain.T @ together @ plain
        rest = own[index] - target.T @ plain - plain.T @ target + fitted
        values, vectors = np.linalg.eigh((rest + rest.T) / 2 + _NOISE * np.eye(width))
        shrink = vectors / np.sqrt(values) @ vectors.T
        grow = vectors * np.sqrt(values) @ vectors.T
        _, directions = np.linalg.eigh(shrink @ fitted @ shrink)
        strongest = directions[:, ::-1][:, : min(rank, width)]
        left = plain @ (shrink @ strongest)
        right = strongest.T @ grow
        scale = np.maximum(np.abs(left).max(0), 1e-20).astype(np.float32)
        arrays[f"{index} left"] = (left / scale).astype(_NARROW)
        arrays[f"{index} left scale"] = scale
        arrays[f"{index} right"] = right.astype(_NARROW)
        left, right = _factors(arrays, index)
        plain = left @ right
    explained = plain.T @ target
    return own[index] - explained - explained.T + plain.T @ together @ plain
