"""Codec predict in conversations: saved, restored whole and in part, appended to, damaged."""

import dataclasses
import json
import os
import warnings

import models
import numpy as np
import pytest
import torch
from test_calibrate import OPTIONS, made_texts, tokenizer
from test_restore import anything, converse, flip_byte, next_logits, paths

import krul
from krul import blas
from krul.calibrate import fit
from krul.compressor import CODECS
from krul.predictor import choose_products

N_HISTORY = 600
PREDICT = anything("predict")


@pytest.fixture
def llama(device):
    return models.shared("llama")


@pytest.fixture(scope="module")
def profile():
    return fit(models.shared("llama"), tokenizer, made_texts(), **OPTIONS)


@pytest.fixture
def store(tmp_path, profile):
    with krul.Store(tmp_path / "store") as opened:
        opened.add_profile(profile)
        yield opened


def history(n_tokens=N_HISTORY, seed=1, n_batch=1):
    rows = [
        tokenizer(made_texts(1, 2 * n_tokens, seed + i)[0])["input_ids"] for i in range(n_batch)
    ]
    return torch.tensor(rows)[:, :n_tokens].to(models.place)


def saved(store, model, ids, settings=PREDICT, name="chat"):
    """Save a conversation; its K/V, and what the save reported."""
    with store.open(name, model, settings=settings) as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
        report = cache.save()
        return [(x.keys.clone(), x.values.clone()) for x in cache.layers], report


def entries_of(store):
    files = store.files("chat")
    found = []
    for segment in files.read_manifest().segments:
        fd, entries = files.open_segment(segment)
        os.close(fd)
        found += entries
    return found


def closeness(cache, exact):
    cache.restore()
    worst = 0.0
    for layer, both in zip(cache.layers, exact, strict=True):
        for got, wanted in zip((layer.keys, layer.values), both, strict=True):
            difference = (got - wanted).float().norm() / wanted.float().norm()
            worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_conversation_comes_back(tmp_path, device, profile, dtype):
    model = models.tiny("llama").to(dtype)
    own = fit(model, tokenizer, made_texts(), **OPTIONS) if dtype != torch.float32 else profile
    with krul.Store(tmp_path / "store") as store:
        store.add_profile(own)
        exact, report = saved(store, model, history())
        assert set(report.codec_by_layer) == {"predict"}
        assert report.guard_mean_kl >= 0
        assert report.n_guard_tokens == 64
        with store.open("chat", model) as cache:
            assert closeness(cache, exact) < 0.5
            for layer, (keys, values) in zip(cache.layers, exact, strict=True):
                assert torch.equal(layer.keys[:, :, :4], keys[:, :, :4])
                assert torch.equal(layer.values[:, :, :4], values[:, :, :4])
        assert store.verify() == []


def test_how_bfloat16_is_multiplied_is_a_matter_of_each_process(tmp_path, monkeypatch):
    """Written with float32's products of rounded factors, read with others, which is the same."""
    model = models.tiny("llama").to(torch.bfloat16)
    narrow = []
    make = krul.predictor._core.Predict

    def note(*args):
        narrow.append(args[8] is not None)
        return make(*args)

    monkeypatch.setattr(krul.predictor._core, "Predict", note)

    def choose(wanted):
        monkeypatch.setenv("KRUL_BFLOAT16", wanted)
        monkeypatch.setattr(blas, "_found", None)
        return blas.find().has_bf16

    if not choose("1"):
        pytest.skip("no library here multiplies bfloat16")
    choose("0")
    ids = history(N_HISTORY + 300)
    restored = {}
    with krul.Store(tmp_path / "store") as store:
        store.add_profile(fit(model, tokenizer, made_texts(), **OPTIONS))
        saved(store, model, ids[:, :N_HISTORY])
        assert narrow
        assert not any(narrow)
        (segment,) = store.files("chat").read_manifest().segments
        assert segment.strategy["products"] == "bfloat16"
        for wanted in "10":
            choose(wanted)
            narrow.clear()
            with store.open("chat", model) as cache:
                cache.restore()
                restored[wanted] = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
            assert set(narrow) == {wanted == "1"}
        for one, two in zip(restored["0"], restored["1"], strict=True):
            for left, right in zip(one, two, strict=True):
                assert float((left - right).float().norm() / left.float().norm()) < 1e-3
        choose("1")
        exact, report = saved(store, model, ids[:, N_HISTORY:])
        assert set(report.codec_by_layer) == {"predict"}
        for wanted in "10":
            choose(wanted)
            with store.open("chat", model) as cache:
                assert cache.n_tokens == N_HISTORY + 300
                assert closeness(cache, exact) < 0.5
        assert store.verify() == []


def test_what_is_stored(store, llama, profile):
    saved(store, llama, history())
    found = entries_of(store)
    predicted = [entry for entry in found if entry.codec == CODECS["predict"]]
    assert {entry.kv for entry in predicted} == {2}
    assert {(e.layer_lower, e.token_start, e.n_tokens) for e in predicted} == {
        (layer, start, n)
        for layer in range(models.N_LAYERS)
        for start, n in ((4, 512), (516, N_HISTORY - 516))
    }
    manifest = store.files("chat").read_manifest()
    assert manifest.segments[0].strategy["profile"] == profile.digest
    assert manifest.segments[0].strategy["step"] > 0


def fineness_bits(store):
    """Of each predicted block, what its header says; 0: all tokens are alike."""
    files = store.files("chat")
    found = []
    for segment in files.read_manifest().segments:
        fd, entries = files.open_segment(segment)
        found += [
            krul._core.store_read_payload(fd, entry)[10]
            for entry in entries
            if entry.codec == CODECS["predict"]
        ]
        os.close(fd)
    return found


def test_tokens_that_are_looked_at_are_finer(store, llama, monkeypatch):
    with monkeypatch.context() as patch:
        # One token gets all attention, the rest the same little.
        def received(watch, n_queries):
            mass = np.ones((models.N_LAYERS, watch.n_before), np.float32)
            mass[:, 20] = 100.0
            return mass, np.full(watch.n_before, n_queries)

        patch.setattr(krul.guard.Guard, "received", received)
        exact, _ = saved(store, llama, history())
    assert all(fineness_bits(store)[:1])
    with store.open("chat", llama) as cache:
        cache.restore()
        for layer, both in zip(cache.layers, exact, strict=True):
            for got, wanted in zip((layer.keys, layer.values), both, strict=True):
                off = (got - wanted)[0].norm(dim=(0, 2))
                assert off[20] < 0.3 * off[21:200].median()


def test_where_attention_cannot_be_seen_all_tokens_are_alike(store, llama, monkeypatch):
    def refuse(watch, n_queries):
        raise krul.UnsupportedModelError("its attention is a secret")

    monkeypatch.setattr(krul.guard.Guard, "received", refuse)
    _, report = saved(store, llama, history())
    assert "all tokens are kept alike: its attention is a secret" in report.reason
    assert not any(fineness_bits(store))
    with store.open("chat", llama) as cache:
        assert cache.n_tokens == N_HISTORY


def test_few_new_tokens_are_alike(store, llama):
    saved(store, llama, history(100))
    assert not any(fineness_bits(store))


def test_auto_finds_the_coarsest_step_that_the_guard_allows(store, llama):
    steps = {}
    for max_kl in (1e-2, 1e-4):
        settings = krul.Settings(max_kl=max_kl, min_top1=0.5)
        _, report = saved(store, llama, history(), settings, name=f"{max_kl}")
        assert set(report.codec_by_layer) == {"predict"}
        assert report.guard_mean_kl <= max_kl
        steps[max_kl] = store.files(f"{max_kl}").read_manifest().segments[0].strategy["step"]
    assert steps[1e-2] > 3 * steps[1e-4]


def test_the_first_step_follows_what_was_measured(store, llama, monkeypatch):
    # Of one kind for all steps: between two kinds the divergence is no parabola.
    monkeypatch.setattr(krul.encode, "choose_products", lambda profile, step: "float32")
    settings = krul.Settings(max_kl=1e-4, min_top1=0.5)
    saved(store, llama, history(), settings)
    tried = []
    encode = krul.encode.Encoder.encode

    def watch(encoder, strategy):
        tried.append(strategy.step)
        return encode(encoder, strategy)

    monkeypatch.setattr(krul.encode.Encoder, "encode", watch)
    saved(store, llama, history(seed=5), settings, name="next")
    assert len(tried) <= 2
    assert max(tried) < 0.5


def test_turns_are_appended(store, llama):
    ids = history(300)
    with store.open("chat", llama, settings=PREDICT) as cache:
        out = converse(llama, cache, ids)
        cache.save()
    with store.open("chat", llama, settings=PREDICT) as cache:
        more = torch.cat([out, history(150, seed=7)], dim=1)
        out = converse(llama, cache, more)
        report = cache.save()
        assert report.n_new_tokens == 162
        assert set(report.codec_by_layer) == {"predict"}
        exact = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    with store.open("chat", llama) as cache:
        assert cache.n_tokens == out.shape[1] - 1
        cache.restore()
        for layer, both in zip(cache.layers, exact, strict=True):
            # What the first save lost was lost before the second.
            for got, wanted in zip((layer.keys, layer.values), both, strict=True):
                torch.testing.assert_close(
                    got[:, :, :311], wanted[:, :, :311], atol=1e-5, rtol=1e-5
                )
        assert 1e-3 < closeness(cache, exact) < 0.5
        cache.crop(200)
        assert cache.n_tokens == 200


def test_cropped_within_a_run_and_continued(store, llama):
    """Two segments of one profile whose runs overlap in the file, not in the conversation."""
    saved(store, llama, history())
    with store.open("chat", llama, settings=PREDICT) as cache:
        cache.restore()
        cache.crop(540)
        with torch.no_grad():
            llama(history(200, seed=7), past_key_values=cache)
        cache.save()
        exact = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    with store.open("chat", llama) as cache:
        assert cache.n_tokens == 740
        assert closeness(cache, exact) < 0.5
        for layer, both in zip(cache.layers, exact, strict=True):
            for got, wanted in zip((layer.keys, layer.values), both, strict=True):
                torch.testing.assert_close(
                    got[:, :, :540], wanted[:, :, :540], atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("restore", ["load", "uniform", "pyramid", "step", "mixed", "recompute"])
def test_in_part_recomputed(store, llama, restore):
    exact, _ = saved(store, llama, history())
    more = torch.cat([history(), history(9, seed=3)], dim=1)
    settings = anything("predict", restore=restore)
    with store.open("chat", llama, settings=settings) as cache:
        next_logits(llama, cache, more)
        report = cache.restore_report
        got = [(x.keys[:, :, :N_HISTORY], x.values[:, :, :N_HISTORY]) for x in cache.layers]
    with store.open("chat", llama) as cache:
        cache.restore()
        loaded = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    for layer, n in enumerate(report.n_recomputed_by_layer):
        for kv in (0, 1):
            torch.testing.assert_close(
                got[layer][kv][:, :, :n], exact[layer][kv][:, :, :n], atol=1e-4, rtol=1e-4
            )
            assert n == N_HISTORY or models.same(
                got[layer][kv][:, :, max(n, 4) :], loaded[layer][kv][:, :, max(n, 4) :]
            )


def test_batches_with_padding(store, llama):
    ids = history(200, n_batch=2)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with store.open("chat", llama, settings=PREDICT) as cache:
        with torch.no_grad():
            llama(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        assert set(cache.save().codec_by_layer) == {"predict"}
        exact = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    with store.open("chat", llama) as cache:
        assert closeness(cache, exact) < 0.5


@pytest.mark.parametrize("layer", [0, 2])
def test_a_damaged_block_and_what_is_predicted_from_it_are_recomputed(store, llama, layer):
    ids = history()
    exact, _ = saved(store, llama, ids)
    entry = next(
        e for e in entries_of(store) if e.codec == CODECS["predict"] and e.layer_lower == layer
    )
    flip_byte(paths(store)[0], entry.offset + entry.payload_bytes // 2)
    more = torch.cat([ids, history(9, seed=3)], dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with store.open("chat", llama) as cache:
            models.once_more(lambda: converse(llama, cache, more, n_new=1))
            report = cache.restore_report
            got = [(x.keys[:, :, :N_HISTORY], x.values[:, :, :N_HISTORY]) for x in cache.layers]
    names = ", ".join(str(each) for each in range(layer, models.N_LAYERS))
    assert f"recomputed layers {names} from {N_HISTORY} tokens" in report.reason
    assert report.n_loaded_by_layer == (N_HISTORY,) * layer + (0,) * (models.N_LAYERS - layer)
    for index in range(layer, models.N_LAYERS):
        for one, wanted in zip(got[index], exact[index], strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-4, rtol=1e-4)
    assert store.verify()


def test_without_its_profile_a_conversation_is_read_again(store, llama, profile):
    saved(store, llama, history())
    for folder in (store.profiles.own, store.profiles.shared):
        path = os.path.join(folder, f"{profile.digest}.profile")
        if os.path.exists(path):
            os.remove(path)
    with (
        pytest.warns(RuntimeWarning, match="needs a profile: .* is missing"),
        store.open("chat", llama) as cache,
    ):
        assert cache.n_tokens == 0
    assert any("profile" in problem.message for problem in store.verify())


def test_products_are_rounded_where_that_is_fast_and_steps_are_not_fine(profile, monkeypatch):
    library = blas.find()
    for is_fast in (False, True):
        found = dataclasses.replace(library, has_bf16=is_fast)
        monkeypatch.setattr(blas, "find", lambda found=found: found)
        assert choose_products(profile, 0.01) == "float32"
        assert choose_products(profile, 0.5) == ("bfloat16" if is_fast else "float32")


@pytest.mark.parametrize("products", [None, "float8"])
def test_products_that_are_not_known_are_not_guessed(store, llama, monkeypatch, products):
    to_dict = krul.encode.Strategy.to_dict

    def with_others(strategy):
        values = {name: x for name, x in to_dict(strategy).items() if name != "products"}
        return values if products is None else values | {"products": products}

    monkeypatch.setattr(krul.encode.Strategy, "to_dict", with_others)
    saved(store, llama, history(), krul.Settings(codec="predict", guard_tokens=0))
    with (
        pytest.warns(RuntimeWarning, match=f"products are of {products!r} but must be of bfloat16"),
        store.open("chat", llama) as cache,
    ):
        assert cache.n_tokens == 0


def test_without_a_profile_other_codecs_serve(tmp_path, llama):
    with krul.Store(tmp_path / "store") as store:
        _, report = saved(store, llama, history(), krul.Settings(codec="predict"))
    assert "no profile of this model is known" in report.reason
    assert "predict" not in report.codec_by_layer


def test_without_a_library_for_products(store, llama, monkeypatch):
    def missing():
        raise NotImplementedError("none was found")

    saved(store, llama, history())
    monkeypatch.setattr(blas, "find", missing)
    _, report = saved(store, llama, history(), krul.Settings(), name="other")
    assert "predict cannot be used: none was found" in report.reason
    with (
        pytest.warns(RuntimeWarning, match="none was found"),
        store.open("chat", llama) as cache,
    ):
        assert cache.n_tokens == 0


def test_what_it_cannot_hold_is_exact(store, llama):
    with store.open("chat", llama, settings=PREDICT) as cache:
        with torch.no_grad():
            llama(history(), past_key_values=cache)
        cache.layers[1].keys[0, 0, 100, 3] = 1e30
        report = cache.save()
        exact = [(x.keys.clone(), x.values.clone()) for x in cache.layers]
    assert "blocks hold values that only exact can keep" in report.reason
    with store.open("chat", llama) as cache:
        cache.restore()
        for layer, (keys, values) in zip(cache.layers, exact, strict=True):
            assert torch.equal(layer.keys[:, :, :516], keys[:, :, :516])
            assert torch.equal(layer.values[:, :, :516], values[:, :, :516])


def test_the_guard_off_takes_the_first_step(store, llama):
    _, report = saved(store, llama, history(), anything("predict", guard_tokens=0))
    assert set(report.codec_by_layer) == {"predict"}
    assert "the guard is off" in report.reason
    with open(next(iter(paths(store, "manifest"))), "rb") as file:
        assert b'"predict"' in file.read()
    assert json.dumps(report.to_dict())
