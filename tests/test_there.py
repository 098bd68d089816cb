"""Saves that a device encodes, and estimates that it sums up: `fake_cuda` plays the device."""

import threading

import elsewhere
import fake_cuda
import models
import numpy as np
import pytest
import torch
from fake_cuda import fake
from test_device import assert_same, eager, move, on_cpu, save_beside, spread
from test_restore import anything, converse, paths

import krul
from krul import _core

pytestmark = pytest.mark.double

N_HISTORY = 150
LEFT = "were left to the CPU"


@pytest.fixture(scope="module", autouse=True)
def there(needs):
    needs(elsewhere.why_not())
    with elsewhere.installed():
        yield


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    assert fake_cuda.install(monkeypatch) == ""


@pytest.fixture(scope="module")
def llama():
    return eager("llama")


def stored(path, model, ids, settings, change=None, before_save=None):
    """Save a conversation; return report, the segment's bytes, and K and V as they come back."""
    with krul.Store(path) as store:
        with store.open("chat", model, settings=settings) as cache:
            with torch.no_grad():
                model(ids, past_key_values=cache)
            if change is not None:
                change(cache)
            if before_save is not None:
                before_save()
            report = cache.save()
            fake.is_broken, fake.calls_until_failure = False, -1
        (segment,) = paths(store)
        with open(segment, "rb") as file:
            content = file.read()
        with store.open("chat", model) as cache:
            cache.restore()
            return report, content, on_cpu(cache)


@pytest.mark.parametrize("n_devices", [1, 2])
@pytest.mark.parametrize("codec", ["exact", "int8", "int4", "share", "share+int8", "auto"])
def test_the_device_encodes_what_the_cpu_would(tmp_path, llama, codec, n_devices):
    ids = models.token_ids(1, N_HISTORY)
    wanted_report, wanted, wanted_back = stored(tmp_path / "cpu", llama, ids, anything(codec))
    assert fake.n_encoded == 0
    model = move(llama, *spread(n_devices))
    report, found, back = stored(
        tmp_path / "there", model, ids.to(elsewhere.device()), anything(codec)
    )
    assert found == wanted
    assert_same(back, wanted_back)
    assert report.codec_by_layer == wanted_report.codec_by_layer
    assert fake.n_encoded > 0
    events = {event for _, event in fake.waited}
    assert events >= {200 + index for index in range(n_devices)}
    if n_devices == 1:
        assert LEFT not in report.reason
    elif any(lower // 2 != upper // 2 for lower, upper in report.pairs):
        assert f"{LEFT}: views are on devices 0 and 1" in report.reason


def test_what_no_codec_but_exact_can_hold(tmp_path, llama):
    ids = models.token_ids(1, N_HISTORY)

    def spoil(cache):
        cache.layers[1].keys[0, 0, 20, 3] = float("inf")
        cache.layers[2].values[0, 1, 70, 1] = float("nan")

    for codec in ("int8", "share"):
        settings = anything(codec, guard_tokens=0)
        _, wanted, wanted_back = stored(tmp_path / f"cpu {codec}", llama, ids, settings, spoil)
        model = move(llama, elsewhere.device())
        there = ids.to(elsewhere.device())
        report, found, back = stored(tmp_path / f"there {codec}", model, there, settings, spoil)
        assert found == wanted
        assert torch.isinf(back[1][0][0, 0, 20, 3])
        assert torch.equal(torch.isnan(back[2][1]), torch.isnan(wanted_back[2][1]))
        assert "that only exact can keep" in report.reason
        assert LEFT not in report.reason


@pytest.mark.parametrize("codec", ["exact", "share+int4"])
def test_little_room_makes_small_groups_and_none_leaves_it_to_the_cpu(tmp_path, llama, codec):
    ids = models.token_ids(1, N_HISTORY)
    settings = anything(codec, estimator_rows=0)
    _, wanted, _ = stored(tmp_path / "cpu", llama, ids, settings)
    model = move(llama, elsewhere.device(1))
    for name, most_bytes in (("much", 1 << 40), ("little", 120_000), ("none", 0)):
        fake.calm()
        fake.most_bytes = most_bytes
        report, found, _ = stored(
            tmp_path / name, model, ids.to("elsewhere:1"), settings, before_save=forget_stations
        )
        assert found == wanted
        assert (fake.n_encoded == 0) == (name == "none")
        assert (LEFT in report.reason) == (name == "none")
        assert name != "none" or "there is none left" in report.reason


def forget_stations():
    """Have what waits for its next use thrown away: nothing is kept of a device that failed."""
    ids = torch.zeros(1, 1, 4, 8, device=elsewhere.device())
    fake.is_broken = True
    for index in range(2):
        job = (2, 0, (ids.to(f"elsewhere:{index}"),))
        for _ in range(4):
            assert isinstance(_core.encode_blocks([job], events=[])[0], str)
    fake.is_broken = False


def test_a_device_that_fails_at_any_call(tmp_path, llama):
    ids = models.token_ids(1, 40)
    settings = anything("int8", guard_tokens=0)
    _, wanted, wanted_back = stored(tmp_path / "cpu", llama, ids, settings)
    model = move(llama, elsewhere.device())

    def count():
        fake.n_calls = 0

    stored(tmp_path / "well", model, ids.to(elsewhere.device()), settings, before_save=count)
    n_calls = fake.n_calls
    assert n_calls > 20
    n_left = 0
    for turn in range(0, n_calls, 3):
        fake.calm()

        def fail(turn=turn):
            fake.calls_until_failure = turn

        report, found, back = stored(
            tmp_path / str(turn), model, ids.to(elsewhere.device()), settings, before_save=fail
        )
        assert found == wanted
        assert_same(back, wanted_back)
        n_left += LEFT in report.reason
        assert LEFT not in report.reason or "fell off" in report.reason
    assert n_left > 2


def test_a_save_beside_the_model(tmp_path, llama):
    with krul.Store(tmp_path / "store") as store:
        save_beside(store, move(llama, elsewhere.device()))
    assert fake.n_encoded > 0


# ---- estimates -----------------------------------------------------------------------------------


def assert_alike(found, wanted):
    """Sums that were added up in one go or in several are the same but for rounding."""
    assert found.skipped == wanted.skipped
    assert found.n_prefill_rows == wanted.n_prefill_rows
    assert found.n_decode_rows == wanted.n_decode_rows
    assert np.allclose(found.distances, wanted.distances, rtol=1e-9, equal_nan=True)
    assert np.allclose(found.importance, wanted.importance, rtol=1e-9, equal_nan=True)
    assert np.allclose(found.received, wanted.received, rtol=1e-5, atol=1e-7)
    assert found.is_pre_rotary == wanted.is_pre_rotary
    for one, two in zip(found.query_moments, wanted.query_moments, strict=True):
        assert (one is None) == (two is None)
        assert one is None or np.allclose(one, two, rtol=1e-4, atol=1e-6)


def seen(path, model, ids, n_new=40, **options):
    with krul.Store(path) as store, store.open("chat", model) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=n_new, do_sample=False, **options)
        return cache.estimator.result()


def both(tmp_path, family, ids, **options):
    plain = eager(family)
    wanted = seen(tmp_path / "cpu", plain, ids, **options)
    assert fake.n_observed == 0
    model = move(plain, elsewhere.device())
    place = elsewhere.device()
    options = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return seen(tmp_path / "there", model, ids.to(place), **options), wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "phi3", "glm"])
def test_the_device_sees_the_same(tmp_path, family):
    if not models.is_available(family):
        pytest.skip(f"{family} is not in this transformers")
    found, wanted = both(tmp_path, family, models.token_ids(1, N_HISTORY))
    assert_alike(found, wanted)
    assert found.n_decode_rows > 0
    assert fake.n_observed > 2
    assert 200 in {event for _, event in fake.waited}


def test_padding(tmp_path):
    ids = models.token_ids(1, 40, n_batch=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found, wanted = both(tmp_path, "llama", ids, attention_mask=mask)
    assert_alike(found, wanted)
    assert found.n_prefill_rows < 80
    assert fake.n_observed > 2


def test_sinks_and_arrays_of_numpy():
    results = []
    for place in ("cpu", elsewhere.device()):
        estimator = krul.estimator.Estimator(2, rows="all")
        generator = torch.Generator().manual_seed(3)
        for layer in range(2):
            queries = torch.randn(1, 4, 20, 8, generator=generator)
            keys = torch.randn(1, 2, 20, 8, generator=generator)
            sinks = torch.randn(4, generator=generator)
            estimator.pick_rows(layer, 20)
            estimator.collect(
                layer,
                queries.to(place),
                keys.to(place),
                scaling=0.3,
                sinks=sinks.to(place) if layer else sinks.numpy(),
                pre_rotary=queries.to(place),
            )
        results.append(estimator.result())
    assert_alike(results[1], results[0])
    assert fake.n_observed == 1


def test_the_model_does_not_wait(tmp_path, llama, monkeypatch):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, N_HISTORY).to(elsewhere.device())
    waited = []
    note = elsewhere._note

    def told(source, target, tensor):
        if source.type == "elsewhere" and threading.current_thread() is threading.main_thread():
            waited.append(target)
        note(source, target, tensor)

    monkeypatch.setattr(elsewhere, "_note", told)
    n_waits = []
    for rows in (0, 64):
        with krul.Store(tmp_path / str(rows)) as store:
            settings = krul.Settings(estimator_rows=rows)
            with store.open("chat", model, settings=settings) as cache:
                waited.clear()
                with torch.no_grad():
                    model(ids, past_key_values=cache)
                    model(ids[:, :40], past_key_values=cache)
                n_waits.append(len(waited))
                if rows:
                    cache.estimator.wait()
                    assert cache.estimator._prefill.n_rows[0] == 0  # still on the device
                    assert cache.estimator.result().n_prefill_rows == N_HISTORY + 40
    assert n_waits[0] == n_waits[1]
    assert fake.n_observed == 2


def test_layers_on_two_devices_are_the_cpus(tmp_path, llama):
    ids = models.token_ids(1, N_HISTORY)
    wanted = seen(tmp_path / "cpu", llama, ids)
    model = move(llama, *spread(2))
    assert_alike(seen(tmp_path / "there", model, ids.to(elsewhere.device())), wanted)
    assert fake.n_observed == 0


def test_tokens_that_left(tmp_path, llama):
    ids = models.token_ids(1, N_HISTORY)
    other = torch.cat([ids[:, :90], models.token_ids(2, 60)], dim=1)
    results = []
    for name, model in (("cpu", llama), ("there", move(llama, elsewhere.device()))):
        with krul.Store(tmp_path / name) as store, store.open("chat", model) as cache:
            place = next(model.parameters()).device
            converse(model, cache, ids.to(place))
            cache.align(other.to(place))
            converse(model, cache, other.to(place))
            results.append(cache.estimator.result())
    assert_alike(results[1], results[0])
    assert fake.n_observed > 1


def test_no_room_on_the_device_leaves_it_to_the_cpu(tmp_path, llama):
    ids = models.token_ids(1, N_HISTORY)
    wanted = seen(tmp_path / "cpu", llama, ids)
    model = move(llama, elsewhere.device())
    fake.most_bytes = 0
    forget_stations()
    assert_alike(seen(tmp_path / "there", model, ids.to(elsewhere.device())), wanted)
    assert fake.n_observed == 0


def test_no_room_to_read_what_was_summed(llama, tmp_path):
    model = move(llama, elsewhere.device())
    ids = models.token_ids(1, N_HISTORY).to(elsewhere.device())
    forget_stations()
    with krul.Store(tmp_path / "store") as store, store.open("chat", model) as cache:
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.estimator.wait()
            fake.most_bytes = 0
            found = cache.estimator.result()
            assert "is lost: there is none left" in found.skipped
            assert found.n_prefill_rows == 0
            model(ids, past_key_values=cache)  # from now on the CPU does it
        assert cache.estimator.result().n_prefill_rows == N_HISTORY
    assert fake.n_observed == 1


def test_a_device_that_fails_while_it_observes(tmp_path, llama):
    ids = models.token_ids(1, N_HISTORY)
    wanted = seen(tmp_path / "cpu", llama, ids)
    model = move(llama, elsewhere.device())
    n_whole = n_part = 0
    for turn in range(0, 40, 2):
        fake.calm()
        fake.calls_until_failure = turn
        found = seen(tmp_path / str(turn), model, ids.to(elsewhere.device()))
        is_broken, fake.is_broken, fake.calls_until_failure = fake.is_broken, False, -1
        assert is_broken == ("a device failed" in (found.skipped or ""))
        if found.n_prefill_rows == wanted.n_prefill_rows:
            n_whole += 1
            if found.n_decode_rows == wanted.n_decode_rows:
                assert np.allclose(found.distances, wanted.distances, rtol=1e-9)
        else:
            assert "is lost" in found.skipped
            n_part += 1
    assert n_whole > 0
    assert n_part > 0


def test_what_c_refuses():
    there = torch.zeros(1, 1, 4, 8, device=elsewhere.device())
    with pytest.raises(krul.DeviceError, match=r"\(2, 0\) but must be on \(1, 0\)"):
        _core.encode_blocks([(1, 0, (there,))])
    with pytest.raises(krul.DTypeError, match="jobs"):
        _core.encode_blocks([(1, 0, (there.double(),))], events=[])
    with pytest.raises(ValueError, match=r"jobs\[0\]: codec is 99"):
        _core.encode_blocks([(99, 0, (there,))], events=[])
    (left,) = _core.encode_blocks([(4, 0, (there, torch.zeros(1, 1, 4, 8)))], events=[])
    assert "views[1] is on device type 1" in left
    with pytest.raises(TypeError):
        _core.encode_blocks([(1, 0, (there,))], events=[3])
    with pytest.raises(ValueError, match="n_layers is 0"):
        _core.Observer(0, 0)
    observer = _core.Observer(0, 2)
    with pytest.raises(krul.ShapeError, match="there are 1 layers but must be 2"):
        observer.observe([None], np.zeros(1, np.int64), 4, 1.0)
    layer = (there, there, 1.0, 0.0, None, None, 0)
    with pytest.raises(ValueError, match=r"row_positions\[0\] is 9"):
        observer.observe([layer, None], np.array([9, 1, 2, 3]), 4, 1.0)
    cpu = (torch.zeros(1, 1, 4, 8), there, 1.0, 0.0, None, None, 0)
    with pytest.raises(NotImplementedError, match="layer 1"):
        observer.observe([layer, cpu], np.arange(4), 4, 1.0)
    sums = [np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 3), np.float32), np.zeros(1)]
    observer.observe([layer, layer], np.arange(4), 4, 1.0)
    with pytest.raises(krul.ShapeError, match="received holds 3 tokens but there are 4"):
        observer.read(*sums)
    sums[2] = np.zeros((2, 4), np.float32)
    observer.read(*sums)
    assert sums[3][0] == 4
    assert sums[2].sum() == pytest.approx(8)
    observer.read(*sums)
    assert sums[3][0] == 4
