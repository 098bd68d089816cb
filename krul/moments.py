"""Second moments of K, V and queries, summed up text by text: all that a profile is solved from.

Of a conversation nothing stays but sums: for each layer the mean, the second moment, and the
products with the layers it is to be predicted from. Sums of different conversations add up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import arrays as _arrays
from .errors import FormatError, MismatchError, ShapeError, UnsupportedModelError
from .fingerprint import Fingerprint, fingerprint
from .model import layer_classes
from .rotary import CONVENTIONS, Rotary, find_rotary, unrotate

__all__ = ["LearnedLayer", "ModelForm", "Moments", "model_form", "n_bytes_of"]

MOMENTS_MAGIC = b"krulmoms"
MOMENTS_VERSION = 1

N_SOURCES = 2
_CHUNK_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class LearnedLayer:
    """What a layer that takes part hands to the cache, and what it is predicted from.

    Attributes
    ----------
    sources : tuple of int
        None, one or two earlier layers of the same kind, the nearest last.
    window : int
        Tokens that a sliding layer sees; 0 for the others.
    n_heads, key_dim, value_dim : int
        Heads of K and V, and numbers of each per head and token.
    rotary : Rotary
        How its keys are rotated.
    """

    sources: tuple[int, ...]
    window: int
    n_heads: int
    key_dim: int
    value_dim: int
    rotary: Rotary

    @property
    def width(self) -> int:
        """Numbers per token: K of all heads, then V of all heads."""
        return self.n_heads * (self.key_dim + self.value_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the frequencies as plain JSON values."""
        return {
            "sources": list(self.sources),
            "window": self.window,
            "n_heads": self.n_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "rotary": self.rotary.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class ModelForm:
    """Which model is learned from, and which of its layers take part.

    Attributes
    ----------
    fingerprint : Fingerprint
    layers : tuple of LearnedLayer or None
        One per decoder layer; None for one that takes no part.
    reasons : tuple of str or None
        Why not, for each layer that takes no part.
    """

    fingerprint: Fingerprint
    layers: tuple[LearnedLayer | None, ...]
    reasons: tuple[str | None, ...]

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return it as JSON values and arrays."""
        meta = {
            "model": {"exact": self.fingerprint.exact, "parts": self.fingerprint.parts},
            "layers": [None if layer is None else layer.to_dict() for layer in self.layers],
            "reasons": list(self.reasons),
        }
        arrays = {"behaviour": np.asarray(self.fingerprint.behaviour, np.float32)}
        for index, layer in enumerate(self.layers):
            if layer is not None:
                arrays[f"{index} frequencies"] = np.asarray(layer.rotary.frequencies, np.float32)
        return meta, arrays

    @staticmethod
    def from_parts(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ModelForm:
        """Undo :meth:`to_parts`; a FormatError where that cannot be."""
        try:
            model, rows, reasons = meta["model"], meta["layers"], meta["reasons"]
            behaviour = take(arrays, "behaviour", "float32", (256,))
            parts = {str(name): str(value) for name, value in model["parts"].items()}
            layers = [_layer_from(row, index, arrays) for index, row in enumerate(rows)]
            if len(reasons) != len(layers) or not layers:
                raise FormatError(f"reasons has {len(reasons)} entries but layers {len(layers)}")
            for index, layer in enumerate(layers):
                for source in () if layer is None else layer.sources:
                    _check_source(layers, index, source)
            found = Fingerprint(str(model["exact"]), behaviour, parts, ())
            words = tuple(None if reason is None else str(reason) for reason in reasons)
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"the header lacks or garbles {error}") from None
        return ModelForm(found, tuple(layers), words)


def _check_source(layers: Sequence[LearnedLayer | None], index: int, source: int) -> None:
    upper, lower = layers[index], layers[source] if 0 <= source < index else None
    if upper is None or lower is None or (lower.width, lower.window) != (upper.width, upper.window):
        raise FormatError(f"layer {index} has source {source}, which is no earlier layer like it")


def take(
    arrays: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return one array, refused where it is not as it must be."""
    array = arrays.get(name)
    if array is None:
        raise FormatError(f"array {name!r} is missing")
    if array.dtype.name != dtype or array.shape != shape:
        raise FormatError(
            f"array {name!r} is {array.dtype.name} {array.shape} but must be {dtype} {shape}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FormatError(f"array {name!r} holds numbers that are not finite")
    return array


def an_int(value: Any, name: str, low: int, high: int) -> int:
    """Return an integer of a header, refused where it is out of range."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{name} is {str(value)[:50]} but must be an integer, {low} to {high}")
    return value


def _layer_from(row: Any, index: int, arrays: Mapping[str, np.ndarray]) -> LearnedLayer | None:
    if row is None:
        return None
    where = f"layer {index}"
    sizes = {
        name: an_int(row[name], f"{name} of {where}", low, 1 << 20)
        for name, low in (("window", 0), ("n_heads", 1), ("key_dim", 1), ("value_dim", 1))
    }
    sources = tuple(an_int(value, f"a source of {where}", 0, 1 << 20) for value in row["sources"])
    if len(sources) > N_SOURCES or list(sources) != sorted(set(sources)):
        raise FormatError(f"{where} has the sources {sources}")
    told = row["rotary"]
    frequencies = arrays.get(f"{index} frequencies")
    n_pairs = -1 if frequencies is None else frequencies.size
    frequencies = take(arrays, f"{index} frequencies", "float32", (n_pairs,))
    start = an_int(told["start"], f"start of {where}", 0, sizes["key_dim"])
    scaling = told["scaling"]
    if (
        told["convention"] not in CONVENTIONS
        or start + 2 * n_pairs > sizes["key_dim"]
        or not isinstance(scaling, float)
        or not 1e-3 <= scaling <= 1e3
    ):
        raise FormatError(f"the rotary embedding of {where} is {str(told)[:100]}")
    return LearnedLayer(
        sources, rotary=Rotary(told["convention"], start, frequencies, scaling), **sizes
    )


def model_form(model: Any) -> ModelForm:
    """Find out which layers of a model can be learned, and from which others.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`krul.model.generation_model`; left as it was.

    Raises
    ------
    krul.UnsupportedModelError
        krul cannot keep its cache, or no layer has keys that can be un-rotated.
    ValueError
        Its K and V are not finite.
    """
    found = fingerprint(model)
    if not np.isfinite(found.behaviour).all():
        raise ValueError("K and V of the model are not finite on a prompt of 16 tokens")
    rotary, reasons = find_rotary(model)
    classes = layer_classes(model)
    layers: list[LearnedLayer | None] = []
    before: dict[Any, list[int]] = {}
    for index, (one, shape) in enumerate(zip(rotary, found.layout, strict=True)):
        if one is None or shape.kind == "none":
            layers.append(None)
            continue
        # Equal classes have equal windows; the rest is what a product of their moments needs.
        key = (classes[index], shape)
        earlier = before.setdefault(key, [])
        layers.append(
            LearnedLayer(
                tuple(earlier[-N_SOURCES:]),
                shape.window,
                shape.n_heads,
                shape.key_dim,
                shape.value_dim,
                one,
            )
        )
        earlier.append(index)
    if not any(layers):
        raise UnsupportedModelError(
            f"no layer can be learned: {next((r for r in reasons if r), 'there is none')}"
        )
    return ModelForm(found, tuple(layers), tuple(reasons))


def _rows(states: torch.Tensor) -> torch.Tensor:
    """[heads, tokens, dim] to [tokens, heads * dim]."""
    return states.transpose(0, 1).reshape(states.shape[1], -1)


def _double(states: torch.Tensor) -> torch.Tensor:
    """Return float64, on the CPU where the device has none."""
    return (states.cpu() if states.device.type == "mps" else states).double()


class Moments:
    """Sums over tokens, from which :meth:`krul.Profile.from_moments` makes a profile.

    Parameters
    ----------
    form : ModelForm
        See :func:`model_form`.

    Attributes
    ----------
    n_tokens : int
        Tokens that were added.
    """

    def __init__(self, form: ModelForm) -> None:
        self.form = form
        self.n_tokens = 0
        self._sums: dict[str, torch.Tensor] = {}
        for name, shape in _shapes(form).items():
            self._sums[name] = torch.zeros(shape, dtype=torch.float64)

    def sum(self, name: str) -> np.ndarray:
        """Return one of the sums as float64: see `_shapes`."""
        return self._sums[name].numpy()

    def add(
        self,
        keys: Mapping[int, Any],
        values: Mapping[int, Any],
        positions: Any,
        queries: Mapping[int, tuple[Any, Any]] | None = None,
    ) -> None:
        """Add the tokens of one text or conversation.

        Parameters
        ----------
        keys, values : mapping of int to torch.Tensor
            By layer index, [n_heads, n_tokens, dim] each, keys rotated as the cache has them; every
            layer that takes part must be there.
        positions : array of int
            [n_tokens], the positions that the keys were rotated with.
        queries : mapping of int to (torch.Tensor, array of int), optional
            By layer index: some queries [n_query_heads, n_rows, key_dim] after rotary embedding,
            and their positions [n_rows].

        Raises
        ------
        krul.ShapeError
            A layer is missing or has another shape.
        ValueError
            A number is not finite; nothing of the text was added.
        """
        rows = self.rows_of(self.form, keys, values, positions)
        learned = self._query_sums(queries or {})
        n_new = len(np.asarray(positions))
        for index, x in rows.items():
            layer = self.form.layers[index]
            assert layer is not None
            # In pieces, so that float64 copies of a long text never stand in memory together.
            for start in range(0, n_new, _CHUNK_TOKENS):
                one = _double(x[start : start + _CHUNK_TOKENS])
                self._sums[f"{index} sum"] += one.sum(0).cpu()
                self._sums[f"{index} second"] += (one.T @ one).cpu()
                for source in layer.sources:
                    # Layers may be on several devices.
                    other = _double(rows[source][start : start + _CHUNK_TOKENS]).to(one.device)
                    self._sums[f"{index} with {source}"] += (other.T @ one).cpu()
        for name, more in learned.items():
            self._sums[name] += more
        self.n_tokens += n_new

    def add_query_means(self, means: Mapping[int, np.ndarray], n_queries: int) -> None:
        """Add queries of which only the mean of their products is known.

        Parameters
        ----------
        means : mapping of int to numpy.ndarray
            By layer index: ``q q^T`` averaged over queries before rotary embedding,
            [n_heads, key_dim, key_dim], see :class:`krul.estimator.Similarity`.
        n_queries : int
            How many they count for.

        Raises
        ------
        krul.ShapeError
            One has another shape.
        ValueError
            A number is not finite; nothing was added.
        """
        wide = {}
        for index, mean in means.items():
            layer = self.form.layers[index]
            if layer is None:
                continue
            wanted = (layer.n_heads, layer.key_dim, layer.key_dim)
            if mean.shape != wanted:
                raise ShapeError(
                    f"the mean of queries of layer {index} is {mean.shape} but must be {wanted}"
                )
            if not np.isfinite(mean).all():
                raise ValueError(f"the mean of queries of layer {index} is not finite")
            wide[index] = torch.from_numpy(mean.astype(np.float64))
        for index, mean in wide.items():
            self._sums[f"{index} queries"] += mean * n_queries
            self._sums[f"{index} query count"] += n_queries

    @staticmethod
    def rows_of(
        form: ModelForm, keys: Mapping[int, Any], values: Mapping[int, Any], positions: Any
    ) -> dict[int, torch.Tensor]:
        """Return by layer the un-rotated K of all heads beside V, float32 [n_tokens, width]."""
        places = np.asarray(positions)
        n_tokens = len(places)
        known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        out = {}
        for index, layer in enumerate(form.layers):
            if layer is None:
                continue
            if index not in keys or index not in values:
                raise ShapeError(f"keys and values lack layer {index}")
            pair = (keys[index].float(), values[index].float())
            for name, states, dim in zip(
                ("keys", "values"), pair, (layer.key_dim, layer.value_dim), strict=True
            ):
                wanted = (layer.n_heads, n_tokens, dim)
                if tuple(states.shape) != wanted:
                    raise ShapeError(
                        f"{name} of layer {index} are {tuple(states.shape)} but must be {wanted}"
                    )
                if not bool(torch.isfinite(states).all()):
                    raise ValueError(f"{name} of layer {index} hold numbers that are not finite")
            if id(layer.rotary) not in known:
                tables = layer.rotary.tables(places)
                known[id(layer.rotary)] = tuple(torch.from_numpy(t) for t in tables)  # type: ignore
            cos, sin = (table.to(pair[0].device) for table in known[id(layer.rotary)])
            plain = unrotate(
                pair[0], cos, sin, convention=layer.rotary.convention, start=layer.rotary.start
            )
            out[index] = torch.cat([_rows(plain), _rows(pair[1])], dim=1)
        return out

    def _query_sums(self, queries: Mapping[int, tuple[Any, Any]]) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {}
        for index, (states, places) in queries.items():
            layer = self.form.layers[index]
            if layer is None:
                continue
            n_rows = len(np.asarray(places))
            if (
                states.dim() != 3
                or states.shape[0] % layer.n_heads
                or tuple(states.shape[1:]) != (n_rows, layer.key_dim)
            ):
                raise ShapeError(
                    f"queries of layer {index} are {tuple(states.shape)} but must be (a multiple "
                    f"of {layer.n_heads}, {n_rows}, {layer.key_dim})"
                )
            if not bool(torch.isfinite(states).all()):
                raise ValueError(f"queries of layer {index} hold numbers that are not finite")
            tables = layer.rotary.tables(places)
            wide = _double(states)
            cos, sin = (torch.from_numpy(table).double().to(wide.device) for table in tables)
            plain = unrotate(
                wide,
                cos,
                sin,
                convention=layer.rotary.convention,
                start=layer.rotary.start,
            )
            grouped = plain.reshape(layer.n_heads, -1, layer.key_dim)
            out[f"{index} queries"] = (grouped.transpose(1, 2) @ grouped).cpu()
            out[f"{index} query count"] = torch.tensor([float(grouped.shape[1])]).double()
        return out

    def merge(self, other: Moments) -> None:
        """Add all that `other` has summed up.

        Raises
        ------
        krul.MismatchError
            It was of another model.
        """
        mine, theirs = self.form.fingerprint.exact, other.form.fingerprint.exact
        if mine != theirs or self._sums.keys() != other._sums.keys():
            raise MismatchError(f"the other moments are of model {theirs}, these of {mine}")
        for name, numbers in other._sums.items():
            self._sums[name] += numbers
        self.n_tokens += other.n_tokens

    def to_parts(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return all as JSON values and arrays."""
        meta, arrays = self.form.to_parts()
        meta["n_tokens"] = self.n_tokens
        return meta, {**arrays, **{name: part.numpy() for name, part in self._sums.items()}}

    @classmethod
    def from_parts(cls, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Moments:
        """Undo :meth:`to_parts`; a FormatError where that cannot be."""
        form = ModelForm.from_parts(meta, arrays)
        shapes = _shapes(form)
        parts = {name: take(arrays, name, "float64", shape) for name, shape in shapes.items()}
        out = cls.__new__(cls)
        out.form = form
        out.n_tokens = an_int(meta.get("n_tokens"), "n_tokens", 0, 1 << 60)
        out._sums = {name: torch.from_numpy(part.copy()) for name, part in parts.items()}
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all to a file, replaced whole."""
        _arrays.write_file(path, _arrays.encode(MOMENTS_MAGIC, MOMENTS_VERSION, *self.to_parts()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read what :meth:`save` wrote.

        Raises
        ------
        krul.FormatError, krul.CorruptionError
            The file is something else, or was damaged.
        """
        meta, arrays, _ = _arrays.decode(
            _arrays.read_file(path), MOMENTS_MAGIC, MOMENTS_VERSION, "a file of moments"
        )
        return cls.from_parts(meta, arrays)


def n_bytes_of(form: ModelForm) -> int:
    """Return how many bytes the sums of a model take."""
    return 8 * sum(math.prod(shape) for shape in _shapes(form).values())


def _shapes(form: ModelForm) -> dict[str, tuple[int, ...]]:
    """Return the shape of every sum by its name."""
    out: dict[str, tuple[int, ...]] = {}
    for index, layer in enumerate(form.layers):
        if layer is None:
            continue
        out[f"{index} sum"] = (layer.width,)
        out[f"{index} second"] = (layer.width, layer.width)
        for source in layer.sources:
            out[f"{index} with {source}"] = (layer.width, layer.width)
        out[f"{index} queries"] = (layer.n_heads, layer.key_dim, layer.key_dim)
        out[f"{index} query count"] = (1,)
    return out
