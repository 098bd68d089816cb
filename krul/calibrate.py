"""Learns a profile from texts: runs the model, sums up moments, measures what errors cost, solves.

Three passes. All pieces of text are run once and leave only sums behind. With a first profile, some
pieces are coded at a fixed step, and the model runs over a history in which K or V of one layer
alone comes from that: the divergence of what it then says is the layer's sensitivity. The last
profile is solved with these; its own coefficients give the frequency tables.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from . import arrays as _arrays
from . import observe
from .errors import CorruptionError, FormatError, MismatchError, UnsupportedModelError
from .model import (
    Recorder,
    decoder_layers,
    generation_model,
    input_device,
    run_decoder,
    text_config,
    undisturbed,
    unobserved,
)
from .moments import ModelForm, Moments, an_int, model_form, take
from .profile import (
    MAX_PART,
    N_SYMBOLS,
    TABLE_SCALES,
    Profile,
    choose_rank,
    frequency_table,
    laplace_counts,
    min_tokens,
    solve,
    whole_maps,
)
from .rotary import rotate

__all__ = ["code", "count_tables", "fit", "n_parameters", "restored", "value_metrics"]

_CHECKPOINT_MAGIC = b"krulckpt"
_CHECKPOINT_VERSION = 1

# Every this many queries enter their moments.
_QUERY_STRIDE = 8
# Of a piece that sensitivities are measured with: the history, and the tokens after it.
_HISTORY_TOKENS = 1024
_SCORED_TOKENS = 128
# In units of the average size of a layer's K or V, weighted: the error whose cost is measured.
_SENSITIVITY_STEP = 0.6
# The steps that the tables' coefficients are coded with.
_TABLE_STEPS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.1)
_TABLE_TOKENS = 2048
# A piece with fewer tokens after the first ones says nothing.
_MIN_PIECE_TOKENS = 16

# The last linear map of an attention module, by its names in transformers.
_OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "Wo", "proj_out", "o")


def n_parameters(model: Any) -> int:
    """Return how many numbers the parameters of a model are, those that are shared once."""
    return sum(parameter.numel() for parameter in generation_model(model).parameters())


def value_metrics(model: Any, form: ModelForm) -> dict[int, np.ndarray]:
    """Return what an error in V costs: the output projection's product with itself.

    Parameters
    ----------
    model : torch.nn.Module
    form : krul.moments.ModelForm

    Returns
    -------
    dict of int to numpy.ndarray
        By layer: float64 [n_heads, value_dim, value_dim], summed over the query heads that each
        head of V serves. A layer whose projection is not found is missing.
    """
    out = {}
    for index, _, attention in decoder_layers(model)[1]:
        layer = form.layers[index] if index < len(form.layers) else None
        weight = None if layer is None else _output_weight(attention)
        if layer is None or weight is None:
            continue
        group = layer.n_heads * layer.value_dim
        if weight.shape[1] % group:
            continue
        parts = weight.reshape(weight.shape[0], layer.n_heads, -1, layer.value_dim)
        metric = torch.einsum("ohgd,ohge->hde", parts, parts).cpu().numpy()
        if np.isfinite(metric).all():
            out[index] = metric
    return out


def _output_weight(attention: torch.nn.Module) -> torch.Tensor | None:
    """Return the weight [hidden, query heads * value_dim] in float64."""
    for name in _OUTPUT_NAMES:
        module = getattr(attention, name, None)
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2 or weight.is_meta or not weight.is_floating_point():
            continue
        wide = weight.detach().double()
        return wide.T if type(module).__name__ == "Conv1D" else wide
    return None


# ---- running the model ---------------------------------------------------------------------------


class _QueryTap:
    """Takes an estimator's place and keeps some of the queries of one pass."""

    def __init__(self) -> None:
        self.queries: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def begin(self, n_past: int | None = None) -> None:
        pass

    def pick_rows(self, layer: int, n_queries: int) -> np.ndarray:
        return np.arange(0, n_queries, _QUERY_STRIDE)

    def collect(self, layer: int, queries: torch.Tensor, keys: Any, **_: Any) -> None:
        rows = np.arange(0, queries.shape[2], _QUERY_STRIDE)
        self.queries[layer] = (queries[0, :, rows].detach(), rows)

    def finish(self) -> None:
        pass

    def abandon(self, reason: str | None = None) -> None:
        self.queries.clear()


@contextlib.contextmanager
def _tapped(model: Any) -> Iterator[_QueryTap]:
    """Keep queries of the passes in the block; none where the model does not show them."""
    tap = _QueryTap()
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(observe.install(model))
            stack.enter_context(observe.observing(tap, handle, n_past=0))  # type: ignore[arg-type]
        except UnsupportedModelError:
            stack.enter_context(unobserved())
        yield tap


States = dict[int, tuple[torch.Tensor, torch.Tensor]]


def _prefill(inner: torch.nn.Module, ids: torch.Tensor) -> tuple[States, _QueryTap]:
    """Return K and V of each layer, [1, heads, tokens, dim], and some queries."""
    decoder, _ = decoder_layers(inner)
    cache = Recorder(text_config(inner))
    with _tapped(inner) as tap:
        run_decoder(decoder, ids, cache)
    return {layer: cache.key_value(layer) for layer in cache.seen}, tap


def _logits(inner: torch.nn.Module, ids: torch.Tensor, states: States) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] of what follows a history."""
    cache = Recorder(text_config(inner))
    for layer, (keys, values) in sorted(states.items()):
        cache.update(keys, values, layer)
    cache.seen.clear()
    with unobserved():
        logits = inner(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


# ---- the codec in floating point -----------------------------------------------------------------


def code(
    profile: Profile,
    rows: Mapping[int, torch.Tensor],
    step: float,
    keep_first: int = 4,
    see: Callable[[int, torch.Tensor], None] | None = None,
) -> dict[int, torch.Tensor]:
    """Code and decode as the codec `predict` does, in float32 and without bits.

    Parameters
    ----------
    profile : krul.Profile
    rows : mapping of int to torch.Tensor
        By layer: float32 [n_tokens, width], see :meth:`krul.moments.Moments.rows_of`.
    step : float
        Of the quantiser.
    keep_first : int
        Tokens that stay exact.
    see : callable, optional
        Called with each layer and its coefficients in steps, before rounding,
        [n_tokens - keep_first, width].

    Returns
    -------
    dict of int to torch.Tensor
        As `rows`, what would be decoded.
    """
    decoded: dict[int, torch.Tensor] = {}
    out = {}
    for index, x in rows.items():
        layer = profile.layers[index]
        assert layer is not None
        forward, backward, maps, mean = (
            torch.from_numpy(array.copy()).to(x.device)
            for array in (layer.forward, layer.backward, layer.maps, layer.mean)
        )
        z = x - mean
        prediction = torch.zeros_like(z)
        if layer.sources:
            prediction = torch.cat([decoded[source] for source in layer.sources], dim=1) @ maps
        steps = (z - prediction) @ forward / step
        if see is not None:
            see(index, steps[keep_first:])
        back = (steps.round() * step) @ backward + prediction
        back[:keep_first] = z[:keep_first]
        decoded[index], out[index] = back, back + mean
    return out


def restored(
    form: ModelForm, rows: Mapping[int, torch.Tensor], positions: Any
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Return rotated K and V, float32 [heads, tokens, dim], of what `code` gives."""
    out = {}
    for index, x in rows.items():
        layer = form.layers[index]
        assert layer is not None
        n_keys = layer.n_heads * layer.key_dim
        cos, sin = (
            torch.from_numpy(table).to(x.device) for table in layer.rotary.tables(positions)
        )
        keys = x[:, :n_keys].reshape(len(x), layer.n_heads, -1).transpose(0, 1)
        values = x[:, n_keys:].reshape(len(x), layer.n_heads, -1).transpose(0, 1)
        turned = rotate(
            keys, cos, sin, convention=layer.rotary.convention, start=layer.rotary.start
        )
        out[index] = (turned, values)
    return out


# ---- pieces of text ------------------------------------------------------------------------------


def _token_ids(tokenizer: Any, text: Any, index: int) -> list[int]:
    if not isinstance(text, str):
        raise TypeError(f"text {index} is {type(text).__name__} but must be str")
    encoded = tokenizer(text)
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded.input_ids
    return [int(token) for token in ids]


def _pieces(
    tokenizer: Any,
    texts: Iterable[str],
    max_tokens: int,
    context_tokens: int,
    keep_first: int,
) -> list[list[int]]:
    """Cut texts into pieces, a first one of each text, then the second ones, up to a number."""
    by_text = []
    for index, text in enumerate(texts):
        ids = _token_ids(tokenizer, text, index)
        by_text.append(
            [ids[start : start + context_tokens] for start in range(0, len(ids), context_tokens)]
        )
    shortest = keep_first + _MIN_PIECE_TOKENS
    out: list[list[int]] = []
    n_left = max_tokens
    for turn in range(max(map(len, by_text), default=0)):
        for parts in by_text:
            if turn < len(parts) and min(len(parts[turn]), n_left) >= shortest:
                out.append(parts[turn][:n_left])
                n_left -= len(out[-1])
    return out


def _check_size(form: ModelForm, pieces: list[list[int]], keep_first: int) -> None:
    n_tokens = sum(len(piece) - keep_first for piece in pieces)
    needed = min_tokens(form)
    if n_tokens < needed:
        raise ValueError(
            f"texts and max_tokens leave {n_tokens} tokens but a profile of this model needs at "
            f"least {needed}, 4 for each of the numbers that its widest layer keeps of a token"
        )


# ---- how far it came -----------------------------------------------------------------------------


@dataclass
class _State:
    """All that a calibration has found out; a checkpoint holds it."""

    moments: Moments
    n_pieces: int
    costs: np.ndarray  # [2, n_layers], summed over pieces
    n_costs: int


class _Checkpoint:
    """A file beside the output, tied to the model, the texts and the options."""

    def __init__(self, path: str | os.PathLike[str] | None, key: dict[str, Any]) -> None:
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        self.key = key
        if self.path is not None and not os.path.isdir(os.path.dirname(self.path)):
            raise FileNotFoundError(
                f"{os.path.dirname(self.path)} is no directory for a checkpoint"
            )

    def load(self) -> _State | None:
        if self.path is None or not os.path.exists(self.path):
            return None
        try:
            meta, arrays, _ = _arrays.decode(
                _arrays.read_file(self.path),
                _CHECKPOINT_MAGIC,
                _CHECKPOINT_VERSION,
                "a checkpoint of a calibration",
            )
            key = meta.get("key")
            if not isinstance(key, dict):
                raise FormatError("the header lacks the key")
            for name, value in self.key.items():
                if key.get(name) != value:
                    raise MismatchError(
                        f"the checkpoint is of another calibration: {name} is "
                        f"{str(key.get(name))[:200]} there and {str(value)[:200]} here"
                    )
            moments = Moments.from_parts(meta, arrays)
            costs = take(arrays, "costs", "float64", (2, len(moments.form.layers)))
            return _State(
                moments,
                an_int(meta.get("n_pieces"), "n_pieces", 0, 1 << 40),
                costs.copy(),
                an_int(meta.get("n_costs"), "n_costs", 0, 1 << 40),
            )
        except (FormatError, CorruptionError, MismatchError) as error:
            raise type(error)(f"{self.path}: {error}; remove the file to begin again") from None

    def save(self, state: _State) -> None:
        if self.path is None:
            return
        meta, arrays = state.moments.to_parts()
        meta |= {"key": self.key, "n_pieces": state.n_pieces, "n_costs": state.n_costs}
        arrays["costs"] = state.costs
        _arrays.write_file(
            self.path, _arrays.encode(_CHECKPOINT_MAGIC, _CHECKPOINT_VERSION, meta, arrays)
        )

    def remove(self) -> None:
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


# ---- the fit -------------------------------------------------------------------------------------


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r} but must be an integer from {low} to {high}")


def _tell_size(form: ModelForm, n_weights: int) -> None:
    n_maps = whole_maps(form)
    if n_maps > MAX_PART * n_weights:
        warnings.warn(
            f"the profile's maps will take {2 * n_maps:,} bytes, which is "
            f"{n_maps / n_weights:.1%} as many numbers as the model has; rank='small' keeps them "
            f"to {MAX_PART:.0%} but costs compression, rank='full' says that this size is meant",
            UserWarning,
            stacklevel=4,
        )


def fit(
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
    """Learn a model from texts; see :meth:`krul.Profile.fit`."""
    _check_int("max_tokens", max_tokens, 1, 1 << 40)
    _check_int("context_tokens", context_tokens, 1, 1 << 24)
    _check_int("keep_first", keep_first, 0, 4096)
    _check_int("sensitivity_texts", sensitivity_texts, 0, 1 << 16)
    if isinstance(texts, str):
        raise TypeError("texts is a str but must be a list of them")
    inner = generation_model(model)
    form = model_form(inner)
    # Beyond what the model was made for, some fail and the others say nothing of conversations.
    limit = getattr(text_config(inner), "max_position_embeddings", None)
    longest = min(context_tokens, limit) if isinstance(limit, int) and limit > 0 else context_tokens
    pieces = _pieces(tokenizer, texts, max_tokens, longest, keep_first)
    _check_size(form, pieces, keep_first)
    choose_rank(form, rank, n_parameters(inner))  # refused now, not after minutes
    if rank is None:
        _tell_size(form, n_parameters(inner))
    key = {
        "model": form.fingerprint.exact,
        "texts": hashlib.sha256(json.dumps(pieces).encode()).hexdigest(),
        "keep_first": keep_first,
        "sensitivity_texts": sensitivity_texts,
        "rank": rank,
    }
    book = _Checkpoint(checkpoint, key)
    state = book.load()
    if state is None:
        state = _State(Moments(form), 0, np.zeros((2, len(form.layers))), 0)
    measured = _measured_pieces(pieces, keep_first, sensitivity_texts)
    learned = [index for index, layer in enumerate(form.layers) if layer is not None]
    n_costs = 2 * len(learned)
    from tqdm import tqdm

    with (
        undisturbed(inner),
        tqdm(
            total=len(pieces) + n_costs * len(measured) + 1,
            initial=state.n_pieces + n_costs * state.n_costs,
            disable=None if progress else True,  # nothing where standard error is no terminal
            bar_format="{desc:<40} {bar} {n_fmt}/{total_fmt} {elapsed}<{remaining}",
        ) as bar,
    ):
        device = input_device(inner)
        bar.set_description_str("reading texts")
        while state.n_pieces < len(pieces):
            place = state.n_pieces
            ids = torch.tensor([pieces[place]], device=device)
            try:
                _add(state.moments, *_prefill(inner, ids), keep_first)
            except ValueError as error:
                raise type(error)(f"piece {place} of {len(pieces)}: {error}") from None
            state.n_pieces += 1
            book.save(state)
            bar.update()
        metrics = value_metrics(inner, form)
        size = n_parameters(inner)
        bar.set_description_str("measuring what errors cost")
        if state.n_costs < len(measured):
            first = solve(state.moments, metrics, size, rank=rank)
            while state.n_costs < len(measured):
                ids = torch.tensor([measured[state.n_costs]], device=device)
                state.costs += _costs(inner, first, ids, learned, keep_first, bar.update)
                state.n_costs += 1
                book.save(state)
        costs = state.costs / state.n_costs if state.n_costs else None
        bar.set_description_str("solving")
        profile = solve(state.moments, metrics, size, sensitivities=costs, rank=rank)
        bar.set_description_str("counting integers")
        profile = _count(inner, profile, max(pieces, key=len), keep_first, device)
        bar.update()
    book.remove()
    return profile


def _add(moments: Moments, states: States, tap: _QueryTap, keep_first: int) -> None:
    """Add one piece, but for its first tokens."""
    n_tokens = next(iter(states.values()))[0].shape[2]
    queries = {
        layer: (part[:, rows >= keep_first], rows[rows >= keep_first])
        for layer, (part, rows) in tap.queries.items()
    }
    moments.add(
        {layer: keys[0, :, keep_first:] for layer, (keys, _) in states.items()},
        {layer: values[0, :, keep_first:] for layer, (_, values) in states.items()},
        np.arange(keep_first, n_tokens),
        queries,
    )


def _rows_of(form: ModelForm, states: States, positions: np.ndarray) -> dict[int, torch.Tensor]:
    return Moments.rows_of(
        form,
        {layer: keys[0] for layer, (keys, _) in states.items()},
        {layer: values[0] for layer, (_, values) in states.items()},
        positions,
    )


def _measured_pieces(pieces: list[list[int]], keep_first: int, n_wanted: int) -> list[list[int]]:
    """Choose pieces of different texts, long ones first, cut to what is run."""
    n_most = _HISTORY_TOKENS + _SCORED_TOKENS
    usable = [piece for piece in pieces if len(piece) >= 2 * keep_first + _MIN_PIECE_TOKENS]
    long = [piece for piece in usable if len(piece) >= n_most]
    chosen = long if len(long) >= n_wanted else sorted(usable, key=len, reverse=True)
    # Spread over all, because texts of a kind stand together.
    places = np.linspace(0, len(chosen) - 1, min(n_wanted, len(chosen))).astype(int)
    return [chosen[place][:n_most] for place in places]


def _costs(
    inner: torch.nn.Module,
    profile: Profile,
    ids: torch.Tensor,
    learned: list[int],
    keep_first: int,
    tick: Callable[[], Any],
) -> np.ndarray:
    """Return the divergence that the coded K, and V, of each layer alone causes."""
    n_scored = min(_SCORED_TOKENS, ids.shape[1] // 4)
    history, scored = ids[:, :-n_scored], ids[:, -n_scored:]
    states, _ = _prefill(inner, history)
    positions = np.arange(history.shape[1])
    rows = _rows_of(profile.form, states, positions)
    coded = restored(profile.form, code(profile, rows, _SENSITIVITY_STEP, keep_first), positions)
    exact = _logits(inner, scored, states)
    out = np.zeros((2, len(profile.layers)))
    for index in learned:
        for kind in (0, 1):
            pair = list(states[index])
            pair[kind] = coded[index][kind][None].to(pair[kind].dtype)
            pair[kind][:, :, :keep_first] = states[index][kind][:, :, :keep_first]
            changed = _logits(inner, scored, {**states, index: (pair[0], pair[1])})
            divergence = (exact.exp() * (exact - changed)).sum(-1).mean().item()
            if not np.isfinite(divergence):
                raise ValueError(f"what an error in layer {index} costs is {divergence}")
            out[kind, index] = max(0.0, divergence)
            tick()
    return out


def _count(
    inner: torch.nn.Module,
    profile: Profile,
    piece: list[int],
    keep_first: int,
    device: torch.device,
) -> Profile:
    """Return the profile with tables counted from its own coefficients of one piece."""
    ids = torch.tensor([piece[:_TABLE_TOKENS]], device=device)
    states, _ = _prefill(inner, ids)
    rows = _rows_of(profile.form, states, np.arange(ids.shape[1]))
    return profile.with_tables(count_tables(profile, rows, keep_first))


def count_tables(
    profile: Profile, rows: Mapping[int, torch.Tensor], keep_first: int = 0
) -> np.ndarray:
    """Return frequency tables, uint16 [len(TABLE_SCALES), 256], counted from coefficients.

    Parameters
    ----------
    profile : krul.Profile
    rows, keep_first
        As for :func:`code`.
    """
    counts = np.zeros((len(TABLE_SCALES), N_SYMBOLS))
    for step in _TABLE_STEPS:

        def see(index: int, steps: torch.Tensor, step: float = step) -> None:
            layer = profile.layers[index]
            assert layer is not None
            kinds = table_class(layer.deviation / step)
            symbols = steps.round().clamp(-128, 128).to(torch.int64).cpu().numpy() + 127
            symbols[(symbols < 0) | (symbols > 254)] = 255
            flat = symbols + N_SYMBOLS * kinds[None, :]
            counts.reshape(-1)[:] += np.bincount(flat.reshape(-1), minlength=counts.size)

        code(profile, rows, step, keep_first, see)
    return _tables(counts)


def table_class(deviation: np.ndarray) -> np.ndarray:
    """Return which table suits coefficients of some standard deviations, in steps.

    >>> table_class(np.array([1e-9, 1.0, 1e9]))
    array([ 0, 15, 33])
    """
    places = np.log2(np.maximum(deviation, 1e-9) / TABLE_SCALES[0]) * 3
    return np.clip(np.rint(places), 0, len(TABLE_SCALES) - 1).astype(np.int64)


def _tables(counts: np.ndarray) -> np.ndarray:
    """Return frequency tables of counts, symmetric, smoothed where little was counted."""
    out = []
    for scale, row in zip(TABLE_SCALES, counts, strict=True):
        # A coefficient's sign says nothing: the base's vectors have an arbitrary one.
        even = np.concatenate([(row[:-1] + row[-2::-1]) / 2, row[-1:]])
        prior = laplace_counts(float(scale))
        out.append(frequency_table(even + max(100.0, 0.001 * even.sum()) * prior))
    return np.stack(out)
