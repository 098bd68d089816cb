"""The guard's passes: what they compare, and what the tokens before them look at."""

import math

import models
import numpy as np
import pytest
import torch
from transformers import DynamicCache

import krul
from krul import guard, save
from krul.probe import examine

N_TOKENS, N_GUARD, N_QUERIES = 90, 12, 30


@pytest.fixture
def llama(device):
    return models.shared("llama")


def key_values(model, ids, **options):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **options)
    return [(layer.keys, layer.values) for layer in cache.layers]


def held(layers, n_before, change=lambda tensor: tensor):
    """K/V before a position, each layer counted when it is asked for."""

    def of(both):
        return lambda: tuple(change(tensor[:, :, :n_before]) for tensor in both)

    return guard.Held([of(both) for both in layers], [n_before] * len(layers))


def watch(model, ids, layers, n_guard=N_GUARD, mask=None, positions=None):
    return guard.Guard(
        model,
        token_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        exact=lambda n_before: held(layers, n_before),
        n_guard=n_guard,
    )


@pytest.mark.parametrize("n_guard", [0, N_GUARD])
@pytest.mark.parametrize("n_padding", [0, 9])
def test_received_is_the_attention_of_the_tokens_before_the_guards(device, n_guard, n_padding):
    model = models.tiny("llama", attn_implementation="eager").to(models.place)
    n_batch = 2 if n_padding else 1
    ids = models.token_ids(1, N_TOKENS, n_batch)
    mask = torch.ones_like(ids)
    mask[1:, :n_padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "position_ids": positions}
    layers = key_values(model, ids, **options)
    n_before = N_TOKENS - n_guard
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, **options).attentions
    made = watch(model, ids, layers, n_guard, mask, positions)
    received, n_seen = made.received(N_QUERIES)
    assert received.shape == (len(layers), n_before)
    rows = slice(n_before - N_QUERIES, n_before)
    for own, attention in zip(received, attentions, strict=True):
        wanted = attention[:, :, rows, :n_before].double().sum((0, 1, 2)).cpu().numpy()
        np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-4)
    assert n_seen.tolist() == [min(N_QUERIES, n_before - token) for token in range(n_before)]


def test_the_exact_pass_is_run_once_and_the_model_is_left_as_it_was(llama):
    ids = models.token_ids(1, N_TOKENS)
    layers = key_values(llama, ids)
    asked = []
    made = watch(llama, ids, layers)
    made.exact = lambda n_before: asked.append(n_before) or held(layers, n_before)
    llama.train()
    try:
        verdict = made.measure(held(layers, made.n_before))
        coarse = made.measure(held(layers, made.n_before, lambda tensor: 1.05 * tensor))
        assert llama.training
    finally:
        llama.eval()
    assert asked == [N_TOKENS - N_GUARD]
    assert verdict.mean_kl == 0.0
    assert verdict.top1 == 1.0
    assert coarse.mean_kl > 0.0
    assert coarse.n_tokens == N_GUARD
    assert math.isfinite(coarse.max_kl)


def test_attention_that_cannot_be_seen_is_said(llama, monkeypatch):
    def refuse(model):
        raise krul.UnsupportedModelError("its attention is a secret")

    monkeypatch.setattr(guard.observe, "install", refuse)
    ids = models.token_ids(1, N_TOKENS)
    made = watch(llama, ids, key_values(llama, ids))
    with pytest.raises(krul.UnsupportedModelError, match="a secret"):
        made.received(N_QUERIES)


def test_a_conversation_that_an_estimator_watches_is_not_disturbed(llama, tmp_path):
    """What the guard runs is no part of the conversation, and counts for no other estimator."""
    ids = models.token_ids(1, N_TOKENS)
    with krul.Store(tmp_path) as store, store.open("chat", llama) as cache:
        with torch.no_grad():
            llama(ids, past_key_values=cache)
        before = cache.estimator.result()
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        received, _ = watch(llama, ids, layers).received(N_QUERIES)
        after = cache.estimator.result()
    assert received.any()
    assert np.array_equal(before.received, after.received)
    assert before.n_prefill_rows == after.n_prefill_rows


@pytest.mark.parametrize("name", models.workable())
def test_every_family_can_be_asked_or_is_refused(device, name, tmp_path):
    """Through the cache that krul has of it, sliding windows included."""
    model = models.shared(name)
    ids = models.token_ids(1, N_TOKENS)
    settings = krul.Settings(codec="exact", guard_tokens=0)
    with (
        krul.Store(tmp_path) as store,
        store.open("chat", model, settings=settings) as cache,
        torch.no_grad(),
    ):
        model(ids, past_key_values=cache)
        work = save._prepare(cache, cache._take_snapshot())
    made = save._new_guard(work, 0)
    try:
        received, n_seen = made.received(4)
    except krul.UnsupportedModelError:
        return  # it does not look its attention up where it could be seen
    assert received.shape == (len(work.layers), N_TOKENS)
    assert n_seen.shape == (N_TOKENS,)
    is_full = [state is not None and state.kind == "full" for state in work.layers]
    assert np.isfinite(received).all()
    if examine(model)[0].observe is None:
        assert (received[is_full].sum(1) > 0).all()
