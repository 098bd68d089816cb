"""Restores that a device decodes itself, from torch's tensors on: `fake_cuda` plays the device."""

import os

import elsewhere
import fake_cuda
import models
import pytest
import torch
from fake_cuda import fake
from test_calibrate import OPTIONS, made_texts, tokenizer
from test_device import assert_same, eager, move, on_cpu, saved, spread
from test_predicted import history
from test_restore import anything, converse, flip_byte, next_logits, paths

import krul
from krul import _core
from krul.calibrate import fit
from krul.errors import CorruptionError

pytestmark = pytest.mark.double

N_HISTORY = 150


@pytest.fixture(scope="module", autouse=True)
def there(needs):
    needs(elsewhere.why_not())
    with elsewhere.installed():
        yield


@pytest.fixture
def direct(monkeypatch):
    assert fake_cuda.install(monkeypatch) == ""


@pytest.fixture
def store(tmp_path):
    with krul.Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(scope="module")
def llama():
    return eager("llama")


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("codec", ["exact", "int8", "share", "share+int4"])
def test_the_device_decodes_what_the_cpu_would(store, llama, direct, codec, n_devices):
    ids = models.token_ids(1, N_HISTORY)
    out, _, _ = saved(store, llama, ids, anything(codec))
    more = torch.cat([out, models.token_ids(2, 9)], dim=1)
    with store.open("chat", llama) as cache:
        wanted = next_logits(llama, cache, more)
        decoded = on_cpu(cache)
    model = move(llama, *spread(n_devices))
    with store.open("chat", model) as cache:
        assert cache.source.is_direct
        assert not cache.source._landings
        found = next_logits(model, cache, more.to(elsewhere.device()))
        assert torch.equal(found.cpu(), wanted)
        assert_same(on_cpu(cache), decoded)
        assert "decoded by the CPU" not in cache.restore_report.reason
    assert fake.n_decoded > 0
    assert fake.n_copied > 0
    assert fake.n_host_decoded == 0
    assert {stream for stream, _ in fake.waited} >= {100 + i for i in range(n_devices)}


@pytest.fixture(scope="module")
def profile(llama):
    return fit(llama, tokenizer, made_texts(), **OPTIONS)


@pytest.mark.parametrize("way", ["device", "no products", "two devices"])
def test_predict_is_decoded_by_the_device_where_it_can_be(store, llama, profile, direct, way):
    store.add_profile(profile)
    saved(store, llama, history(600), anything("predict"))
    with store.open("chat", llama) as cache:
        cache.restore()
        wanted = on_cpu(cache)
    fake.has_products = way != "no products"
    # What products take stays with the memory of a device: no other test has any on the second.
    places = {"device": spread(1), "no products": spread(2)[1:], "two devices": spread(2)}
    model = move(llama, *places[way])
    with store.open("chat", model) as cache:
        assert cache.source.is_direct
        cache.restore()
        assert_same(on_cpu(cache), wanted)
        reason = cache.restore_report.reason
    if way == "device":
        assert fake.n_predicted > 0
        assert fake.n_host_decoded == 0
        assert "predict is decoded by the CPU" not in reason
    else:
        assert fake.n_predicted == 0
        assert fake.n_host_decoded > 0
        why = "no library" if way == "no products" else "several devices"
        assert "codec predict is decoded by the CPU: " in reason
        assert why in reason


def test_a_profile_goes_to_the_device_once(store, llama, direct):
    store.add_profile(fit(llama, tokenizer, made_texts(seed=11), **OPTIONS))
    saved(store, llama, history(600), anything("predict"))
    model = move(llama, elsewhere.device())
    copied = []
    for _ in range(3):
        fake.calm()
        with store.open("chat", model) as cache:
            cache.restore()
        copied.append(fake.copied_bytes)
    n_tables_bytes = 34 * 4096 * 4
    assert copied[0] > n_tables_bytes > max(copied[1:])


def test_chains_whose_first_tokens_are_recomputed(store, llama, profile, direct):
    store.add_profile(profile)
    out, _, _ = saved(store, llama, history(1200), anything("predict"))
    more = torch.cat([out, models.token_ids(2, 9)], dim=1)
    settings = krul.Settings(restore="uniform")
    found = []
    for model in (llama, move(llama, elsewhere.device())):
        with store.open("chat", model, settings=settings) as cache:
            place = next(model.parameters()).device
            found.append(next_logits(model, cache, more.to(place)).cpu())
            assert 0 < max(cache.restore_report.n_recomputed_by_layer) < out.shape[1]
    assert fake.n_predicted > 0
    assert torch.allclose(*found, atol=2e-4)


def test_damage_in_a_chain_is_recomputed(store, llama, profile, direct):
    store.add_profile(profile)
    _, _, held = saved(store, llama, history(600), anything("predict"))
    (path,) = paths(store)
    flip_byte(path, os.path.getsize(path) - 3_000)
    model = move(llama, elsewhere.device())
    with store.open("chat", model) as cache:
        cache.restore()
        assert any(cache.restore_report.n_recomputed_by_layer)
        keys, values = on_cpu(cache)[-1]
    assert torch.allclose(keys, held[-1][0], atol=1e-3)
    assert torch.allclose(values, held[-1][1], atol=1e-3)


def test_what_the_device_cannot_decode_the_cpu_does(store, llama, direct):
    _, _, held = saved(store, llama, models.token_ids(1, N_HISTORY), anything("exact"))
    fake.unsupported = {1}
    model = move(llama, elsewhere.device())
    with store.open("chat", model) as cache:
        cache.restore()
        assert_same(on_cpu(cache), held)
    assert fake.n_host_decoded > 0
    assert fake.n_decoded == 0


@pytest.mark.parametrize("shape", ["recompute", "uniform", "pyramid"])
def test_what_is_recomputed_comes_after_what_was_under_way(store, llama, direct, shape):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, 1100)
    out, _, _ = saved(store, model, ids.to(elsewhere.device()), krul.Settings(codec="exact"))
    more = torch.cat([out, models.token_ids(2, 9).to(elsewhere.device())], dim=1)
    with store.open("chat", model) as cache:
        wanted = next_logits(model, cache, more)
    with store.open("chat", model, settings=krul.Settings(restore=shape)) as cache:
        found = next_logits(model, cache, more)
        assert any(cache.restore_report.n_recomputed_by_layer)
    assert torch.allclose(found.cpu(), wanted.cpu(), atol=2e-4)


def test_a_device_without_room_leaves_it_to_the_cpu(store, llama, direct):
    _, _, held = saved(store, llama, models.token_ids(1, N_HISTORY), anything("exact"))
    model = move(llama, elsewhere.device())
    fake.is_broken = True
    with store.open("chat", model) as cache:
        fake.is_broken = False
        cache.restore()
        assert_same(on_cpu(cache), held)
        assert "decoded by the CPU" in cache.restore_report.reason
    assert fake.n_decoded == 0


def test_a_device_that_fails_on_the_way_is_recomputed(store, llama, direct, monkeypatch):
    _, _, held = saved(store, llama, models.token_ids(1, N_HISTORY), anything("exact"))
    model = move(llama, elsewhere.device())
    begin = krul.source.Source._begin

    def break_off(source, steps):
        slow = source.settings.max_read_bytes_per_s
        assert slow
        begin(source, steps)
        fake.is_broken = True

    monkeypatch.setattr(krul.source.Source, "_begin", break_off)
    # Not the plan's choice: a quick processor would rather recompute all of it.
    settings = krul.Settings(max_read_bytes_per_s=100_000, restore="load")
    with store.open("chat", model, settings=settings) as cache:
        cache.restore()
        assert "fell off" in cache.restore_report.reason
        for pair, other in zip(on_cpu(cache), held, strict=True):
            assert torch.allclose(pair[0], other[0], atol=1e-4)
            assert torch.allclose(pair[1], other[1], atol=1e-4)


def test_damage_that_only_the_device_sees_is_told_and_repaired(store, llama, direct):
    out, _, held = saved(store, llama, models.token_ids(1, N_HISTORY), anything("exact"))
    model = move(llama, elsewhere.device())
    more = torch.cat([out, models.token_ids(2, 9)], dim=1).to(elsewhere.device())
    fake.is_damaging = True
    with store.open("chat", model) as cache:
        n_tokens = cache.n_tokens
        with pytest.raises(CorruptionError, match="undone"):
            next_logits(model, cache, more)
        assert cache.n_tokens == n_tokens
        for pair, other in zip(on_cpu(cache), held, strict=True):
            assert torch.allclose(pair[0], other[0], atol=1e-4)
        found = next_logits(model, cache, more)
        assert torch.allclose(found.cpu(), llama(more.cpu()).logits[:, -10:], atol=2e-4)
    with store.open("chat", model) as cache:
        cache.restore()
        assert "recomputed layers" in cache.restore_report.reason
        assert_same([(k * 0, v * 0) for k, v in on_cpu(cache)], [(k * 0, v * 0) for k, v in held])


def test_damage_in_a_file_is_recomputed(store, llama, direct):
    saved(store, llama, models.token_ids(1, N_HISTORY), anything("exact"))
    (path,) = paths(store)
    flip_byte(path, 40_000)
    model = move(llama, *spread(2))
    with store.open("chat", model) as cache:
        cache.restore()
        assert any(cache.restore_report.n_recomputed_by_layer)
        out = converse(model, cache, cache.token_ids.to(elsewhere.device()))
    assert out.device == elsewhere.device()


def test_a_cache_that_is_closed_at_once(store, llama, direct):
    saved(store, llama, models.token_ids(1, N_HISTORY), anything("int8"))
    model = move(llama, elsewhere.device())
    for _ in range(20):
        store.open("chat", model).close()


def test_what_c_refuses(direct, profile):
    with pytest.raises(ValueError, match="digest has 3 bytes but must have 32"):
        _core.Predict(None, profile.tables, 0, [], 1, 0, 1, digest=b"abc")
    there = torch.zeros(1, 1, 4, 8, device=elsewhere.device())
    with pytest.raises(krul.DeviceError, match=r"\(2, 0\) but must be on \(1, 0\)"):
        _core.encode_blocks([(1, 0, (there,))])
    with pytest.raises(ImportError, match="already"):
        _core.device_register(fake_cuda.capsule())
    with pytest.raises(ValueError, match="PyCapsule"):
        _core.device_register(object())
