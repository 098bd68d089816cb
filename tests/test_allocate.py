"""Least bytes for an allowed error: against every choice, and as a save finds it."""

import itertools
import math

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import krul
from krul import guard, save
from krul.allocate import least_bytes

NUMBERS = st.sampled_from([0.0, 0.125, 0.5, 1.0, 3.0, 8.0, 64.0])
OPTIONS = st.lists(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3), min_size=1, max_size=5
)


def totals(options, chosen):
    rows = [options[key][index] for key, index in chosen.items()]
    return sum(n_bytes for n_bytes, _ in rows), sum(error for _, error in rows)


@given(OPTIONS, NUMBERS)
def test_no_choice_is_better_in_both(rows, error):
    options = dict(enumerate(rows))
    chosen = least_bytes(options, error)
    n_bytes, got = totals(options, chosen)
    least = sum(min(e for _, e in each) for each in rows)
    assert got <= max(error, least)
    for indices in itertools.product(*[range(len(each)) for each in rows]):
        other_bytes, other_error = totals(options, dict(enumerate(indices)))
        assert not (other_bytes < n_bytes and other_error <= got)


@given(OPTIONS, NUMBERS, NUMBERS)
def test_more_error_never_costs_more_bytes(rows, left, right):
    options = dict(enumerate(rows))
    few, many = sorted((left, right))
    least = sum(min(e for _, e in each) for each in rows)
    if few >= least:
        assert (
            totals(options, least_bytes(options, many))[0]
            <= (totals(options, least_bytes(options, few))[0])
        )


def save_under(store, model, monkeypatch, kl_per_error, seen):
    """Save a chat while the guard says that divergence is in proportion to the error."""

    def measure(work, strategy, encoded, watch):
        by_tensor = {}
        for block in encoded:
            entry = block.entry
            total = by_tensor.setdefault((entry.layer_lower, entry.layer_upper, entry.kv), [0, 0])
            total[0] += block.error
            total[1] += block.power
        error = sum(e / p for e, p in by_tensor.values())
        seen.append((sum(block.entry.payload_bytes for block in encoded), error))
        return guard.Verdict(kl_per_error * error, math.nan, 1.0, watch.n_guard)

    monkeypatch.setattr(save, "_measure", measure)
    ids = models.token_ids(1, 200)
    settings = krul.Settings(codec="auto", max_kl=0.01, estimator_rows=0)
    with store.open(f"chat {len(seen)}", model, settings=settings) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        return cache.save()


def test_a_save_takes_what_the_guard_allows_and_learns_from_it(tmp_path, monkeypatch):
    model = models.tiny("llama", num_hidden_layers=4)
    seen = []
    with krul.Store(tmp_path / "store") as store:
        save_under(store, model, monkeypatch, 1e-9, seen)
        int4_error = seen[-1][1]
        whole = len(seen)

    seen.clear()
    with krul.Store(tmp_path / "other") as store:
        # int4 alone would reach twice what is allowed.
        factor = 0.02 / int4_error
        report = save_under(store, model, monkeypatch, factor, seen)
        assert {name for names in report.codec_by_layer for name in names.split("/")} == {
            "int4",
            "int8",
        }
        assert factor * seen[-1][1] <= 0.01
        assert len(seen) == whole + 1
        first = seen[-1][0]
        # The next knows at once; and it takes no more bytes.
        seen.clear()
        report = save_under(store, model, monkeypatch, factor, seen)
        assert len(seen) == 1
        assert seen[-1][0] <= first * 1.01
        assert report.guard_mean_kl == pytest.approx(factor * seen[-1][1])
