"""Models that are not on the CPU: the bridge between their K/V and the C library, device by device.

The device is `elsewhere`, a double made of CPU tensors that C cannot reach; its module says what it
does not prove.
"""

import copy
import warnings

import elsewhere
import models
import numpy as np
import pytest
import torch
from test_calibrate import OPTIONS, made_texts, tokenizer
from test_restore import anything, converse, flip_byte, next_logits, paths

import krul
from krul import _core
from krul.calibrate import fit
from krul.device import Stopwatch, layer_devices

N_HISTORY = 150
CODECS = ["exact", "int8", "int4", "share", "share+int8", "share+int4", "auto"]


@pytest.fixture(scope="module", autouse=True)
def there(needs):
    needs(elsewhere.why_not())
    with elsewhere.installed():
        yield


@pytest.fixture
def store(tmp_path):
    with krul.Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_copies_yet():
    elsewhere.copies.clear()
    elsewhere.largest.clear()


def eager(family):
    """Return a model whose attention is the same operations on every device."""
    model = models.tiny(family)
    model.set_attn_implementation("eager")
    return model


class _MoveTo:
    """What accelerate hangs on a layer that it has placed, as far as it matters here."""

    def __init__(self, place):
        self.execution_device = place


def move(model, *places):
    """Put a model on one device, or spread its layers over several, as `device_map` does."""
    model = copy.deepcopy(model).to(places[0])
    if len(places) == 1:
        return model
    layers = model.model.layers
    for index, layer in enumerate(layers):
        place = places[index * len(places) // len(layers)]
        layer.to(place)
        layer._hf_hook = _MoveTo(place)
        layer.register_forward_pre_hook(_bring_to(place), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(_bring_to(places[0]), with_kwargs=True)
    return model


def _bring_to(place):
    def bring(value):
        if isinstance(value, torch.Tensor):
            return value.to(place)
        if isinstance(value, (tuple, list)):
            return type(value)(bring(part) for part in value)
        return value

    return lambda module, args, kwargs: (bring(args), {k: bring(v) for k, v in kwargs.items()})


def spread(n_devices):
    return [elsewhere.device(index) for index in range(n_devices)]


def on_cpu(cache):
    return [(x.keys.cpu().clone(), x.values.cpu().clone()) for x in cache.layers]


def saved(store, model, ids, settings):
    with store.open("chat", model, settings=settings) as cache:
        out = converse(model, cache, ids)
        report = cache.save()
        return out, report, on_cpu(cache)


def save_beside(store, model):
    """Save while the model goes on; what was saved is what was there when the save began."""
    ids = models.token_ids(1, 300).to(elsewhere.device())
    with store.open("chat", model, settings=krul.Settings(codec="exact")) as cache:
        out = converse(model, cache, ids)
        future = cache.save(wait=False)
        n_saved = cache.n_tokens
        held = [(k[:, :, :n_saved], v[:, :, :n_saved]) for k, v in on_cpu(cache)]
        converse(model, cache, torch.cat([out, ids[:, :30]], dim=1))
        assert future.result().n_tokens == n_saved
    with store.open("chat", model) as cache:
        cache.restore()
        assert_same(on_cpu(cache), held)


def assert_same(left, right):
    for pair, other in zip(left, right, strict=True):
        assert torch.equal(pair[0], other[0])
        assert torch.equal(pair[1], other[1])


@pytest.fixture(scope="module")
def llama():
    return eager("llama")


def test_the_double_refuses_what_a_gpu_refuses(there):
    tensor = torch.ones(2, 3, device=elsewhere.device())
    for attempt in (
        tensor.numpy,
        tensor.__dlpack__,
        lambda: tensor + torch.ones(2, 3),
        lambda: tensor + torch.ones(2, 3, device=elsewhere.device(1)),
        lambda: np.asarray(tensor),
        lambda: _core.encode_blocks([(1, 0, (tensor[None, None],))]),
    ):
        with pytest.raises((RuntimeError, TypeError, BufferError)):
            attempt()
    assert (tensor + torch.tensor(1.0)).cpu().tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize("n_devices", [1, 2])
def test_each_layer_has_its_device(llama, n_devices):
    found = layer_devices(move(llama, *spread(n_devices)))
    assert [place.index for place in found] == [n_devices * i // 4 for i in range(4)]
    assert {place.type for place in found} == {"elsewhere"}
    assert layer_devices(llama) == [torch.device("cpu")] * 4


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("codec", CODECS)
def test_a_conversation_comes_back_as_on_the_cpu(store, tmp_path, llama, codec, n_devices):
    settings = anything(codec)
    ids = models.token_ids(1, N_HISTORY)
    model = move(llama, *spread(n_devices))
    out, report, held = saved(store, model, ids.to(elsewhere.device()), settings)
    with krul.Store(tmp_path / "other") as other:
        plain_out, plain_report, plain_held = saved(other, llama, ids, settings)
        assert torch.equal(out.cpu(), plain_out)
        assert report.codec_by_layer == plain_report.codec_by_layer
        assert report.pairs == plain_report.pairs
        assert report.guard_mean_kl == plain_report.guard_mean_kl
        assert_same(held, plain_held)
        more = torch.cat([plain_out, models.token_ids(2, 9)], dim=1)
        with other.open("chat", llama) as cache:
            wanted = next_logits(llama, cache, more)
            decoded = on_cpu(cache)
    with store.open("chat", model) as cache:
        found = next_logits(model, cache, more.to(elsewhere.device()))
        assert [x.keys.device for x in cache.layers] == layer_devices(model)
        assert torch.equal(found.cpu(), wanted)
        assert_same(on_cpu(cache), decoded)
        assert cache.restore_report.plan == "load"


def test_what_one_device_saved_another_restores(store, llama):
    ids = models.token_ids(1, N_HISTORY)
    there = move(llama, elsewhere.device(1))
    out, _, held = saved(store, llama, ids, krul.Settings(codec="exact"))
    with store.open("chat", there, settings=krul.Settings(codec="exact")) as cache:
        cache.restore()
        assert_same(on_cpu(cache), held)
        converse(there, cache, torch.cat([out, models.token_ids(5, 20)], 1).to("elsewhere:1"))
        cache.save()
        held = on_cpu(cache)
    with store.open("chat", llama) as cache:
        cache.restore()
        assert {x.keys.device.type for x in cache.layers} == {"cpu"}
        assert_same(on_cpu(cache), held)


def test_a_model_that_has_moved_since_it_was_asked(store, llama):
    model = move(llama, elsewhere.device(1))
    ids = models.token_ids(1, N_HISTORY).to("elsewhere:1")
    _, _, held = saved(store, model, ids, krul.Settings(codec="exact"))
    for place in (torch.device("cpu"), elsewhere.device(0)):
        model.to(place)
        with store.open("chat", model) as cache:
            cache.restore()
            assert {x.keys.device for x in cache.layers} == {place}
            assert_same(on_cpu(cache), held)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3", "cohere2", "phi3"])
def test_families(store, family):
    if not models.is_available(family):
        pytest.skip(f"{family} is not in this transformers")
    plain = eager(family)
    model = move(plain, elsewhere.device())
    ids = models.token_ids(1, 60)
    out, _, held = saved(store, model, ids.to(elsewhere.device()), krul.Settings(codec="exact"))
    more = torch.cat([out.cpu(), models.token_ids(2, 9)], dim=1)
    with store.open("chat", model) as cache:
        assert_same(on_cpu(cache), held)
        found = next_logits(model, cache, more.to(elsewhere.device()))
    with store.open("chat", plain) as cache:
        assert torch.equal(next_logits(plain, cache, more), found.cpu())


def test_a_window_is_rolled_back_on_its_device(store):
    model = move(eager("gemma2"), elsewhere.device())
    ids = models.token_ids(1, 40).to(elsewhere.device())
    out, _, _ = saved(store, model, ids, krul.Settings(codec="exact"))
    with store.open("chat", model) as cache:
        longer = torch.cat([out, models.token_ids(2, 30).to(elsewhere.device())], dim=1)
        converse(model, cache, longer)
        changed = torch.cat([out, models.token_ids(3, 30).to(elsewhere.device())], dim=1)
        assert cache.align(changed) == out.shape[1] - 1
        assert all(x.keys.device == elsewhere.device() for x in cache.layers)
        found = next_logits(model, cache, changed)
    with store.open("chat", model) as cache:
        assert torch.equal(next_logits(model, cache, changed).cpu(), found.cpu())


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("shape", ["recompute", "uniform", "pyramid", "step", "mixed"])
def test_recomputed_tokens_go_straight_to_the_device(store, llama, shape, n_devices):
    model = move(llama, *spread(n_devices))
    ids = models.token_ids(1, 1100).to(elsewhere.device())
    out, _, held = saved(store, model, ids, krul.Settings(codec="exact"))
    more = torch.cat([out, models.token_ids(2, 9).to(elsewhere.device())], dim=1)
    with store.open("chat", model) as cache:
        wanted = next_logits(model, cache, more)
    with store.open("chat", model, settings=krul.Settings(restore=shape)) as cache:
        found = next_logits(model, cache, more)
        report = cache.restore_report
    assert any(report.n_recomputed_by_layer), report
    assert torch.allclose(found.cpu(), wanted.cpu(), atol=2e-4)
    with store.open("chat", model, settings=krul.Settings(restore=shape)) as cache:
        cache.restore()
        for pair, other in zip(on_cpu(cache), held, strict=True):
            for one, two in zip(pair, other, strict=True):
                assert torch.allclose(one, two, atol=2e-4)


def test_a_history_that_was_cropped_before_it_came(store, llama):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, 700).to(elsewhere.device())
    out, _, _ = saved(store, model, ids, krul.Settings(codec="exact"))
    changed = torch.cat([out[:, :600], models.token_ids(2, 40).to(elsewhere.device())], dim=1)
    for shape in ("load", "recompute", "uniform"):
        with store.open("chat", model, settings=krul.Settings(restore=shape)) as cache:
            assert cache.align(changed) == 600
            found = next_logits(model, cache, changed)
        plain = model(changed).logits[:, 600:]
        assert torch.allclose(found.cpu(), plain.cpu(), atol=2e-4), shape


def test_damage_is_recomputed_on_the_device(store, llama):
    model = move(llama, *spread(2))
    ids = models.token_ids(1, N_HISTORY).to(elsewhere.device())
    _, _, held = saved(store, model, ids, krul.Settings(codec="exact"))
    (path,) = paths(store)
    flip_byte(path, 40_000)
    with store.open("chat", model) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.restore()
        report = cache.restore_report
        for pair, other in zip(on_cpu(cache), held, strict=True):
            assert torch.allclose(pair[0], other[0], atol=1e-4)
            assert torch.allclose(pair[1], other[1], atol=1e-4)
    assert any(report.n_recomputed_by_layer)


def test_nothing_goes_over_in_one_piece(store, llama):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, 1500).to(elsewhere.device())
    settings = anything("share+int8", estimator_rows=0)
    with store.open("chat", model, settings=settings) as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
        elsewhere.largest.clear()
        cache.save()
        layer_bytes = 2 * cache.layers[0].keys.numel() * 4
    whole = elsewhere.largest["elsewhere:0 to cpu"]
    # A block is 512 tokens of K or of V; the guard's logits are of 64 tokens.
    assert 0 < whole <= layer_bytes // 4


def test_a_save_goes_on_beside_the_model(store, llama):
    save_beside(store, move(llama, elsewhere.device()))


def test_the_estimator_sees_the_same(store, tmp_path, llama):
    model = move(llama, *spread(2))
    ids = models.token_ids(1, N_HISTORY)
    with store.open("chat", model) as cache, krul.Store(tmp_path / "other") as other:
        converse(model, cache, ids.to(elsewhere.device()))
        found = cache.estimator.result()
        with other.open("chat", llama) as plain:
            converse(llama, plain, ids)
            wanted = plain.estimator.result()
    assert found.skipped is None
    assert np.array_equal(found.distances, wanted.distances)
    assert np.array_equal(found.received, wanted.received)
    for one, two in zip(found.query_moments, wanted.query_moments, strict=True):
        assert np.array_equal(one, two)


def test_codec_predict_and_learning(store, llama, monkeypatch):
    profile = fit(llama, tokenizer, made_texts(), **OPTIONS)
    store.add_profile(profile)
    model = move(llama, *spread(2))
    ids = torch.tensor([tokenizer(made_texts(1, 1200, 1)[0])["input_ids"]])[:, :600]
    settings = anything("predict", learn_profile=True)
    with store.open("chat", model, settings=settings) as cache:
        with torch.no_grad():
            model(ids.to(elsewhere.device()), past_key_values=cache)
        report = cache.save()
    assert "nothing was learned" not in report.reason
    assert "predict" in report.codec_by_layer
    with store.open("chat", model) as cache:
        cache.restore()
        found = on_cpu(cache)
    with store.open("chat", llama) as cache:
        cache.restore()
        assert_same(on_cpu(cache), found)


def test_a_profile_is_fitted_from_a_model_there(llama):
    here = fit(llama, tokenizer, made_texts(), **OPTIONS)
    there = fit(move(llama, elsewhere.device()), tokenizer, made_texts(), **OPTIONS)
    assert there.digest == here.digest


def test_beams_and_padding(store, llama):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, 40, n_batch=2).to(elsewhere.device())
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with store.open("chat", model, settings=krul.Settings(codec="exact")) as cache:
        out = model.generate(ids, past_key_values=cache, num_beams=2, **options)
        cache.save()
        held = on_cpu(cache)
    with store.open("chat", model) as cache:
        cache.restore()
        assert_same(on_cpu(cache), held)
        assert torch.equal(cache.token_ids, out.cpu()[:, : cache.n_tokens])


def test_time_is_not_told_where_it_cannot_be_known():
    watch = Stopwatch(elsewhere.device())
    watch.stop()
    assert np.isnan(watch.seconds())
    here = Stopwatch(torch.device("cpu"))
    assert here.seconds() is None
    here.stop()
    assert here.seconds() >= 0


def test_the_default_device_is_not_taken_for_the_cpu(store, llama):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, N_HISTORY).to(elsewhere.device())
    with torch.device(elsewhere.device()):
        out, _, _ = saved(store, model, ids, anything("int8"))
        with store.open("chat", model) as cache:
            more = torch.cat([out, ids[:, :9]], dim=1)
            converse(model, cache, more)
            cache.save()
        with store.open("chat", model, settings=krul.Settings(restore="recompute")) as cache:
            converse(model, cache, more)
