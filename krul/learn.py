"""Learning a profile from saved conversations: sums kept per model, solved now and then.

What is kept of a conversation's new tokens are moments, in the tenant's own folder; nobody else is
given what was learned from them. `learn` is called by a save, after all else, and cannot fail it.
The fit, seconds to minutes of one processor, goes on in the background.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import arrays
from .cache import _yield_processors
from .calibrate import count_tables, n_parameters, value_metrics
from .errors import CorruptionError, FormatError
from .fingerprint import Fingerprint, fingerprint
from .layer import outside_autograd
from .moments import (
    MOMENTS_MAGIC,
    MOMENTS_VERSION,
    ModelForm,
    Moments,
    an_int,
    model_form,
    n_bytes_of,
)
from .profile import solve
from .profiles import Profiles, locked, moments_name

if TYPE_CHECKING:
    from .encode import Work

__all__ = ["learn", "wait"]

_LOCK_NAME = "moments.lock"

# Tokens for each number of the widest layer: so many are enough for a first profile, after which
# each one has twice as many; and with so many no further ones change anything.
_FIRST = 16
_LAST = 1024
# Every save that learns reads and writes the file of moments.
_MAX_MOMENTS_BYTES = 1 << 29
# Of the save that is the last before a fit: what the frequency tables are counted of.
_TABLE_TOKENS = 512

_background: ThreadPoolExecutor | None = None
_fits: set[Future[None]] = set()
_fits_lock = threading.Lock()


def learn(work: Work, notes: list[str]) -> None:
    """Add what a save writes to what is known of the model, and fit a profile when it is time.

    Parameters
    ----------
    work : krul.encode.Work
        What is to be saved; with ``settings.learn_profile`` off, nothing happens.
    notes : list of str
        What was done, or what went wrong, is added: an error here never fails a save.

    Notes
    -----
    Reads and writes the model's file of moments, 106 MB for SmolLM2-135M with its 30 layers of
    width 384, and holds it in memory meanwhile: about a second. The fit is a thread of its own, one
    for the process, which gives way to all others; the end of the process waits for it, and `wait`
    does. Where it fails there is a warning, and the next one comes with twice as many tokens.
    """
    if not work.settings.learn_profile or work.n_new_tokens < 1:
        return
    try:
        with outside_autograd():
            note = _learn(work)
    except Exception as error:  # whatever it is, the conversation is worth more
        note = f"nothing was learned: {type(error).__name__}: {error}"
    if note:
        notes.append(note)


def _learn(work: Work) -> str:
    profiles = work.conversation.store.profiles
    present = work.fingerprint or fingerprint(work.model)
    path = os.path.join(profiles.own, moments_name(present.exact))
    with locked(profiles.own, _LOCK_NAME):
        moments, n_fitted, note = _load(path, present, work.model)
        if moments is None:
            return note
        widest = max(layer.width for layer in moments.form.layers if layer is not None)
        if moments.n_tokens >= _LAST * widest:
            return note
        rows = _add(work, moments)
        if not rows:
            return note
        newest = profiles.find(present)
        n_other = 0 if newest is None else newest.n_tokens
        is_time = moments.n_tokens >= max(_FIRST * widest, 2 * n_fitted, n_other)
        # Noted before the fit: one that fails is not tried again at every save.
        _save(path, moments, moments.n_tokens if is_time else n_fitted)
    if not is_time:
        return note
    sensitivities = None if newest is None else newest.sensitivities
    # The model is asked now: what its owner does with it later is not the fit's business.
    metrics, size = value_metrics(work.model, moments.form), n_parameters(work.model)
    _start(lambda: _fit(profiles, moments, metrics, size, sensitivities, rows))
    made = f"a profile is being learned from {moments.n_tokens:,} tokens"
    return f"{note}; {made}" if note else made


def _fit(
    profiles: Profiles,
    moments: Moments,
    metrics: Mapping[int, np.ndarray],
    n_weights: int,
    sensitivities: np.ndarray | None,
    rows: Mapping[int, torch.Tensor],
) -> None:
    try:
        with outside_autograd():
            profile = solve(moments, metrics, n_weights, sensitivities=sensitivities)
            profile = profile.with_tables(count_tables(profile, rows))
        profiles.add(profile, is_own=True)
    except Exception as error:
        warnings.warn(
            f"no profile was learned from {moments.n_tokens:,} tokens: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


def _start(fit: Callable[[], None]) -> None:
    global _background
    with _fits_lock:
        if _background is None:
            _background = ThreadPoolExecutor(
                1, thread_name_prefix="krul-learn", initializer=_yield_processors
            )
        future = _background.submit(fit)
        _fits.add(future)
    future.add_done_callback(_fits.discard)


def _forget_fits() -> None:
    """In a forked child, which has the parent's books but not its threads."""
    global _background, _fits_lock
    _background, _fits_lock = None, threading.Lock()
    _fits.clear()


os.register_at_fork(after_in_child=_forget_fits)


def wait() -> None:
    """Wait until no fit is under way."""
    with _fits_lock:
        under_way = list(_fits)
    wait_for(under_way)


def _load(path: str, present: Fingerprint, model: Any) -> tuple[Moments | None, int, str]:
    """Return the moments, the tokens that the last fit had, and what there is to say."""
    note = ""
    try:
        meta, parts, _ = arrays.decode(
            arrays.read_file(path), MOMENTS_MAGIC, MOMENTS_VERSION, "a file of moments"
        )
        moments = Moments.from_parts(meta, parts)
        n_fitted = an_int(meta.get("n_fitted"), "n_fitted", 0, 1 << 60)
        if moments.form.fingerprint.exact == present.exact:
            return moments, n_fitted, ""
        note = f"{path} was of another model: begun again"
    except FileNotFoundError:
        pass
    except (FormatError, CorruptionError) as error:
        note = f"{path} was begun again: {error}"
    form = model_form(model)
    n_bytes = n_bytes_of(form)
    if n_bytes > _MAX_MOMENTS_BYTES:
        return (
            None,
            0,
            f"nothing is learned: moments of this model take {n_bytes:,} bytes but at most "
            f"{_MAX_MOMENTS_BYTES:,} are kept; krul calibrate fits a profile from texts",
        )
    return Moments(form), 0, note


def _save(path: str, moments: Moments, n_fitted: int) -> None:
    meta, parts = moments.to_parts()
    meta["n_fitted"] = n_fitted
    arrays.write_file(path, arrays.encode(MOMENTS_MAGIC, MOMENTS_VERSION, meta, parts))


def _add(work: Work, moments: Moments) -> dict[int, torch.Tensor]:
    """Add the new tokens; returns some of them as the codec sees them, by layer."""
    form, snapshot = moments.form, work.snapshot
    states = {i: work.layers[i] for i, layer in enumerate(form.layers) if layer is not None}
    missing = [index for index, state in states.items() if state is None]
    if missing:
        raise ValueError(f"layer {missing[0]} holds nothing")
    # Tokens that a sliding window has left behind were seen by an earlier save, or are gone.
    start = max(
        work.n_stored_tokens,
        work.settings.keep_first,
        *(state.token_start for state in states.values()),
    )
    n_tokens = work.n_tokens
    if start >= n_tokens:
        return {}
    positions = snapshot.positions
    if positions is None:
        positions = torch.arange(n_tokens, device="cpu")
    if positions.dim() > 2:
        raise ValueError(f"positions have {positions.dim()} axes but must have at most 2")
    n_batch = snapshot.token_ids.shape[0]
    positions = positions.expand(n_batch, n_tokens)
    first_rows: dict[int, torch.Tensor] = {}
    n_added = 0
    for row in range(n_batch):
        is_real = torch.ones(n_tokens - start, dtype=torch.bool, device="cpu")
        if snapshot.attention_mask is not None:
            is_real = snapshot.attention_mask[row, start:] != 0
        if not bool(is_real.any()):
            continue
        keys, values = (
            {
                index: _pick(state.tensors[kind][row, :, start - state.token_start :], is_real)
                for index, state in states.items()
            }
            for kind in (0, 1)
        )
        places = positions[row, start:][is_real].numpy()
        moments.add(keys, values, places)
        n_added += len(places)
        if not first_rows:
            some = slice(0, _TABLE_TOKENS)
            found = Moments.rows_of(
                form,
                {index: x[:, some] for index, x in keys.items()},
                {index: x[:, some] for index, x in values.items()},
                places[some],
            )
            first_rows = {index: x.cpu() for index, x in found.items()}
    if n_added and work.similarity is not None:
        moments.add_query_means(_query_means(work, form), n_added)
    return first_rows


def _pick(states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Return the real tokens of [heads, tokens, dim]; where all are, the tensor itself."""
    return states if bool(is_real.all()) else states[:, is_real.to(states.device)]


def _query_means(work: Work, form: ModelForm) -> dict[int, np.ndarray]:
    """Return what the estimator has seen of queries before rotary embedding, by layer."""
    similarity = work.similarity
    assert similarity is not None
    pairs = zip(similarity.query_moments, similarity.is_pre_rotary, strict=True)
    return {
        index: mean
        for index, (mean, is_plain) in enumerate(pairs)
        if mean is not None and is_plain and index < len(form.layers) and form.layers[index]
    }
