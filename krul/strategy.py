"""Which codec for which layer: what a save may try, each strategy finer than the one before."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

from . import blas, selector
from .allocate import least_bytes
from .compressor import CODECS
from .encode import KEY, VALUE, Encoded, Encoder, Strategy, Work
from .guard import Verdict

__all__ = ["Tried", "error_of", "find_predicted", "strategies", "summary"]

#: A strategy, its blocks, and what the guard measured of it.
Tried = tuple[Strategy, list[Encoded], Verdict]

# Sharing is tried by itself only where a sample of the tokens shows it to cost no more than int4.
_SHARE_SAMPLE_TOKENS = 512

# The step of codec predict is sought so that the guard's divergence is near this part of what is
# allowed, and is taken up to the second: the next tokens are others than the guard's.
_AIM, _MOST = 0.5, 0.7
# A step that reaches this part is coarse enough: another try costs an encoding and a forward pass.
_ENOUGH = 0.35
_MAX_TRIES = 5
# What is mixed tensor by tensor where no profile is known, coarse to fine, and how often anew.
_MIXED = ("int4", "int8")
_MAX_MIXTURES = 3
# Before anything was measured of a model: with one step for all tokens, and steps by attention.
_FIRST_STEP, _FIRST_STEP_BY_ATTENTION = 0.5, 1.0
_STEP_RANGE = (0.002, 8.0)
# Where steps go by attention the guard's tokens, which look at what is near, say little of what is
# far: no coarser than this, at which facts in a long text are still found; at 1.5 they are not all
# (bench_quality).
_MOST_STEP_BY_ATTENTION = 1.1


def _choose_pairs(work: Work, notes: list[str]) -> tuple[tuple[int, int], ...]:
    """Pairs of layers that share, by the paper's rule; fixed ones where nothing was observed."""
    layers, settings = work.layers, work.settings
    n_layers = len(layers)
    groups = [-1 - i if state is None else state.group for i, state in enumerate(layers)]
    n_pairs = selector.pair_count(n_layers, settings.share_ratio)
    if work.similarity is None:
        notes.append(f"fixed pairs: {work.similarity_reason}")
        pairs = selector.fixed_pairs(groups, n_pairs)
    else:
        n_sensitive = settings.n_sensitive_layers
        pairs = selector.choose_pairs(
            work.similarity.distances,
            work.similarity.importance.sum(axis=1),
            groups,
            math.ceil(0.2 * n_layers) if n_sensitive is None else min(n_sensitive, n_layers),
            n_pairs,
        )
    return tuple((int(lower), int(upper)) for lower, upper in pairs)


def _with_sharing(base: Strategy, pairs: tuple[tuple[int, int], ...], codec: str) -> Strategy:
    codecs = list(base.codecs)
    for pair in pairs:
        for layer in pair:
            codecs[layer] = (codec, codec)
    return Strategy(tuple(codecs), pairs)


def _pairs_worth_sharing(
    encoder: Encoder, pairs: tuple[tuple[int, int], ...], int4_errors: dict[tuple[int, int], Any]
) -> tuple[tuple[int, int], ...]:
    """Pairs whose sharing, on a sample of tokens, costs no more error than int4 alone."""
    jobs, keys = [], []
    for pair in pairs:
        start, end = encoder.token_range(pair[0])
        start = min(max(start, encoder.work.settings.keep_first), end)
        for kv in (KEY, VALUE):
            tensors = tuple(
                encoder.tensor(layer, kv, start, min(end, start + _SHARE_SAMPLE_TOKENS))
                for layer in pair
            )
            jobs.append((CODECS["share+int4"], kv, tensors))
            keys.append((pair, kv))
    good = dict.fromkeys(pairs, True)
    results = encoder.run_jobs(jobs)
    for (pair, kv), (_, used, error, power) in zip(keys, results, strict=True):
        limit = max(int4_errors[layer, kv][0] for layer in pair)
        relative = error / power if power > 0 else 0.0
        good[pair] &= used == CODECS["share+int4"] and relative <= limit
    return tuple(pair for pair in pairs if good[pair])


def find_predicted(
    encoder: Encoder,
    notes: list[str],
    first_step: float | None,
    measure: Callable[[Strategy], tuple[list[Encoded], Verdict]],
) -> Tried | None:
    """Find the coarsest step of codec predict that the guard accepts.

    A unit of error costs the same in every layer, in K and in V, once they are weighted by the
    profile, so that one step for all is the least bytes for a given divergence: the multiplier of a
    rate-distortion choice. The divergence grows with its square, which is how the next one is
    guessed.

    Parameters
    ----------
    encoder : Encoder
    notes : list of str
        What is found out is added.
    first_step : float or None
        What is known to give the whole divergence that is allowed.
    measure : callable
        Encodes with a strategy, and runs the guard.

    Returns
    -------
    (Strategy, list of Encoded, Verdict) or None
        None where the codec cannot be used, or no step was accepted.
    """
    settings = encoder.work.settings
    if encoder.work.profile is None:
        if settings.codec == "predict":
            notes.append("no profile of this model is known: see krul calibrate")
        return None
    if not encoder.predicted_layers():
        notes.append("the profile has no layer that is cached whole")
        return None
    try:
        blas.find()
    except (NotImplementedError, ValueError) as error:
        notes.append(f"predict cannot be used: {error}")
        return None
    step, (finest, coarsest) = _FIRST_STEP, _STEP_RANGE
    if encoder.fineness is not None:
        step, coarsest = _FIRST_STEP_BY_ATTENTION, _MOST_STEP_BY_ATTENTION
    is_limited = settings.guard_tokens > 0 and math.isfinite(settings.max_kl)
    if first_step is not None and is_limited:
        # `first_step` would reach what is allowed; its square is proportional to the divergence.
        step = min(max(first_step * math.sqrt(_AIM), finest), coarsest)
    best: Tried | None = None
    refused = math.inf
    for _ in range(_MAX_TRIES):
        strategy = encoder.predicted(step)
        encoded, verdict = measure(strategy)
        if not settings.guard_tokens:
            return strategy, encoded, verdict
        divergence = max(verdict.mean_kl, 1e-12)
        guessed = step * math.sqrt(_AIM * settings.max_kl / divergence)
        accepts = verdict.accepts(settings.max_kl, settings.min_top1)
        if accepts and verdict.mean_kl <= _MOST * settings.max_kl:
            best = strategy, encoded, verdict
            is_enough = not is_limited or verdict.mean_kl >= _ENOUGH * settings.max_kl
            if is_enough or step >= coarsest:
                break
            following = min(guessed, 2 * step, coarsest)
            if following >= refused:
                following = math.sqrt(step * refused)
            if following < 1.1 * step:
                break
        else:
            refused = step
            following = max(min(guessed, 0.8 * step), finest)
            if best is not None and following < 1.1 * best[0].step:
                break
            if following >= step:
                break
        step = following
    if best is None:
        notes.append(f"predict refused down to a step of {refused:.3g}")
    return best


def strategies(
    encoder: Encoder, notes: list[str], kl_per_error: float | None = None
) -> Generator[Strategy, Verdict | None, None]:
    """Yield what may be tried, and take what the guard says of it; the last is exact.

    Parameters
    ----------
    encoder : Encoder
    notes : list of str
        What is found out is added.
    kl_per_error : float, optional
        The divergence that a unit of `error_of` gave when this model was saved before.
    """
    work = encoder.work
    wanted = work.settings.codec
    exact, int8, int4 = (encoder.uniform(codec) for codec in ("exact", "int8", "int4"))
    if wanted in ("auto", "predict"):
        yield from _mixtures(encoder, int4, kl_per_error)
        yield int8
    elif wanted.startswith("share"):
        pairs = _choose_pairs(work, notes)
        base = {"share": exact, "share+int8": int8, "share+int4": int4}[wanted]
        yield _with_sharing(base, pairs, wanted)
        if base is int4:
            yield int4
        if base is not exact:
            yield int8
    elif wanted == "int4":
        yield int4
        yield int8
    elif wanted == "int8":
        yield int8
    yield exact


def error_of(encoder: Encoder, strategy: Strategy) -> float:
    """Return what a strategy does to all K and V, as relative squared errors added up.

    0 where a codec is not one of `_MIXED`: what others do is no noise.
    """
    used = {name for pair in strategy.codecs for name in pair}
    if not used <= set(_MIXED):
        return 0.0
    return sum(
        error
        for codec in sorted(used)
        for (layer, kv), (error, _) in encoder.errors(codec).items()
        if strategy.codecs[layer][kv] == codec
    )


def _mixtures(
    encoder: Encoder, int4: Strategy, kl_per_error: float | None
) -> Generator[Strategy, Verdict | None, None]:
    """Yield int4 with what may be shared, int4, and the least bytes for less and less error.

    What a relative squared error costs is not known of each tensor without a profile, so it counts
    alike in all; how much of it comes to how much divergence is what the guard says, of this
    conversation or of those before it.
    """
    work = encoder.work
    encoder.encode(int4)  # of what is tried first, at least a part is this
    whole = error_of(encoder, int4)
    aim = _AIM * work.settings.max_kl
    if kl_per_error is None or whole * kl_per_error <= _MOST * work.settings.max_kl:
        pairs = _pairs_worth_sharing(encoder, _choose_pairs(work, []), encoder.errors("int4"))
        if pairs:
            yield _with_sharing(int4, pairs, "share+int4")
        verdict = yield int4
        if verdict is not None and whole > 0:
            kl_per_error = verdict.mean_kl / whole
    if kl_per_error is None or not math.isfinite(kl_per_error) or kl_per_error <= 0:
        return
    errors = [encoder.errors(codec) for codec in _MIXED]
    options = {key: [(each[key][1], each[key][0]) for each in errors] for key in errors[0]}
    for _ in range(_MAX_MIXTURES):
        chosen = least_bytes(options, aim / kl_per_error)
        if not any(chosen.values()) or all(chosen.values()):
            return
        codecs = [list(pair) for pair in int4.codecs]
        for (layer, kv), index in chosen.items():
            codecs[layer][kv] = _MIXED[index]
        mixture = Strategy(tuple((k, v) for k, v in codecs))
        verdict = yield mixture
        total = error_of(encoder, mixture)
        if verdict is not None and total > 0:
            # Refused though it was thought to be good enough: by divergence, or by top-1.
            kl_per_error = max(2 * kl_per_error, verdict.mean_kl / total)


def summary(strategy: Strategy) -> str:
    """Return a strategy in a few words: each codec and how many tensors have it."""
    names = [name for pair in strategy.codecs for name in pair]
    return ", ".join(f"{name} x {names.count(name)}" for name in dict.fromkeys(names))
