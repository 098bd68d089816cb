"""A conversation leaves the process and comes back: codecs, append, crop, damage, two savers."""

import copy
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import warnings

import models
import pytest
import torch

import krul
from krul import _core
from krul import encode as encode_module

N_HISTORY = 150


@pytest.fixture
def store(tmp_path):
    with krul.Store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def llama(device):
    return models.shared("llama")


def anything(codec, **changes):
    """Settings that take a codec as it is, whatever the guard measures."""
    return krul.Settings(codec=codec, max_kl=float("inf"), min_top1=0.0, **changes)


def converse(model, cache, ids, n_new=12):
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=n_new, do_sample=False, eos_token_id=None
    )


def next_logits(model, cache, ids):
    """Logits of the tokens of `ids` that the cache does not hold yet."""
    with torch.no_grad():
        return model(ids[:, cache.n_tokens :], past_key_values=cache).logits


def paths(store, name="segment-"):
    found = []
    for directory, _, files in os.walk(store.path):
        found += [os.path.join(directory, file) for file in files if file.startswith(name)]
    return sorted(found)


def flip_byte(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_history", [1, 2, 3, 5, 67, N_HISTORY])
def test_exact_is_bit_equal(store, device, dtype, n_history):
    model = models.tiny("llama").to(dtype)
    ids = models.token_ids(1, n_history)
    with store.open("chat", model, settings=krul.Settings(codec="exact")) as cache:
        out = converse(model, cache, ids)
        report = cache.save()
        assert report.n_tokens == cache.n_tokens == out.shape[1] - 1
        assert set(report.codec_by_layer) == {"exact"}
        more = torch.cat([out, models.token_ids(2, 9)], dim=1)
        wanted = next_logits(model, copy.deepcopy(cache), more)
    with store.open("chat", model) as cache:
        assert torch.equal(cache.token_ids, out[:, :-1].cpu())
        assert models.same(next_logits(model, cache, more), wanted)
        restored = cache.restore()
        assert restored.plan == "load"
        assert restored.n_loaded_by_layer == (out.shape[1] - 1,) * models.N_LAYERS


@pytest.mark.parametrize("codec", ["int8", "int4", "share", "share+int8", "share+int4"])
def test_lossy_codecs_come_back_close(store, llama, codec):
    ids = models.token_ids(1, N_HISTORY)
    with store.open("chat", llama, settings=anything(codec)) as cache:
        out = converse(llama, cache, ids)
        report = cache.save()
        exact = [layer.keys.clone() for layer in cache.layers]
        assert any(codec in name for name in report.codec_by_layer)
        assert bool(report.pairs) == codec.startswith("share")
        assert report.n_guard_tokens > 0
        assert report.guard_mean_kl >= 0
    bound = {"int8": 0.02, "int4": 0.2}.get(codec, 1.5)
    with store.open("chat", llama) as cache:
        cache.restore()
        for layer, keys in zip(cache.layers, exact, strict=True):
            assert torch.equal(layer.keys[:, :, :4], keys[:, :, :4])
            assert (layer.keys - keys).norm() / keys.norm() < bound
        assert not all(
            torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, exact, strict=True)
        )
        assert torch.equal(cache.token_ids, out[:, :-1].cpu())


def test_the_guard_steps_up_until_it_is_content(store, llama):
    strict = krul.Settings(codec="share+int4", max_kl=0.0, min_top1=1.0)
    with store.open("chat", llama, settings=strict) as cache:
        converse(llama, cache, models.token_ids(1, N_HISTORY))
        report = cache.save()
    assert set(report.codec_by_layer) == {"exact"}
    assert report.guard_mean_kl <= (0.0 if llama.device.type == "cpu" else 1e-6)
    assert report.guard_top1 == 1.0
    assert "refused" in report.reason
    assert "int8" in report.reason


def test_what_the_guard_refused_is_not_kept_in_memory(store, llama, monkeypatch):
    held = []
    encode = encode_module.Encoder.encode

    def watch(encoder, strategy):
        encoded = encode(encoder, strategy)
        blocks = [block for blocks in encoder.blocks.values() for block in blocks]
        assert sorted(map(id, blocks)) == sorted(map(id, encoded))
        held.append({block.entry.codec for block in encoded})
        return encoded

    monkeypatch.setattr(encode_module.Encoder, "encode", watch)
    with store.open("chat", llama, settings=krul.Settings(max_kl=0.0, min_top1=1.0)) as cache:
        converse(llama, cache, models.token_ids(1, N_HISTORY))
        assert set(cache.save().codec_by_layer) == {"exact"}
    assert len(held) >= 4
    assert held[-1] == {1}


@pytest.mark.parametrize("codec", ["int4", "int8", "auto", "share+int8"])
def test_the_guard_measures_what_a_restore_gives(store, llama, codec):
    """The verdict equals one computed by hand from the cache as it really comes back."""
    n_guard = 16
    settings = anything(codec, guard_tokens=n_guard)
    with store.open("chat", llama, settings=settings) as cache:
        out = converse(llama, cache, models.token_ids(1, N_HISTORY))
        report = cache.save()
        exact = copy.deepcopy(cache)
    with store.open("chat", llama) as cache:
        cache.restore()
        logits = []
        for each in (exact, copy.deepcopy(cache)):
            each.crop(-n_guard)
            logits.append(next_logits(llama, each, out[:, :-1])[0].double())
    p, q = (x.log_softmax(-1) for x in logits)
    divergence = (p.exp() * (p - q)).sum(-1)
    assert report.n_guard_tokens == n_guard
    assert report.guard_mean_kl == pytest.approx(float(divergence.mean()), rel=1e-3, abs=1e-7)
    assert report.guard_max_kl == pytest.approx(float(divergence.max()), rel=1e-3, abs=1e-7)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert report.guard_top1 == pytest.approx(float(agreement))


@pytest.mark.parametrize("codec", ["exact", "int4", "share+int4"])
def test_a_later_turn_writes_only_what_is_new(store, llama, codec):
    ids = models.token_ids(1, N_HISTORY)
    with store.open("chat", llama, settings=anything(codec)) as cache:
        out = converse(llama, cache, ids)
        first = cache.save()
        assert cache.save() == first
    before = {path: pathlib.Path(path).read_bytes() for path in paths(store)}
    with store.open("chat", llama, settings=anything(codec)) as cache:
        more = torch.cat([out, models.token_ids(2, 40)], dim=1)
        out = converse(llama, cache, more)
        second = cache.save()
        wanted = [layer.keys.clone() for layer in cache.layers]
        assert second.n_new_tokens == out.shape[1] - 1 - first.n_tokens
        assert second.n_tokens == out.shape[1] - 1
        assert second.new_bytes < first.stored_bytes
    for path, content in before.items():
        assert pathlib.Path(path).read_bytes() == content
    assert len(paths(store)) == 2
    with store.open("chat", llama) as cache:
        cache.restore()
        assert torch.equal(cache.token_ids, out[:, :-1].cpu())
        for layer, keys in zip(cache.layers, wanted, strict=True):
            kept = first.n_tokens
            assert torch.equal(layer.keys[:, :, :kept], keys[:, :, :kept])
            if codec == "exact":
                assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize("n_kept", [1, 3, 64, 100, 149])
def test_an_edited_history_keeps_the_common_prefix(store, llama, n_kept):
    ids = models.token_ids(1, N_HISTORY)
    with store.open("chat", llama, settings=anything("exact")) as cache:
        converse(llama, cache, ids)
        cache.save()
    edited = torch.cat([ids[:, :n_kept], models.token_ids(7, 30)], dim=1)
    edited[:, n_kept] = (ids[:, n_kept] + 1) % models.VOCABULARY
    plain = llama.generate(edited, max_new_tokens=12, do_sample=False, eos_token_id=None)
    with store.open("chat", llama, settings=anything("exact")) as cache:
        out = converse(llama, cache, edited)
        assert torch.equal(out, plain)
        assert cache.restore_report.n_cropped_tokens == N_HISTORY + 11 - n_kept
        report = cache.save()
        assert report.n_new_tokens == out.shape[1] - 1 - n_kept
        wanted = next_logits(llama, copy.deepcopy(cache), torch.cat([out, ids[:, :5]], dim=1))
    with store.open("chat", llama) as cache:
        assert torch.equal(cache.token_ids, out[:, :-1].cpu())
        got = next_logits(llama, cache, torch.cat([out, ids[:, :5]], dim=1))
        assert models.same(got, wanted)
    assert store.verify() == []


def test_only_cropped_is_saved_too(store, llama):
    with store.open("chat", llama, settings=anything("exact")) as cache:
        converse(llama, cache, models.token_ids(1, 40))
        cache.save()
        cache.crop(-30)
        report = cache.save()
        assert report.n_new_tokens == 0
        wanted = cache.layers[0].keys.clone()
        ids = cache.token_ids
    with store.open("chat", llama) as cache:
        cache.restore()
        assert torch.equal(cache.token_ids, ids)
        assert torch.equal(cache.layers[0].keys, wanted)


def test_a_background_save_lets_the_model_go_on(store, llama):
    with store.open("chat", llama, settings=anything("int4")) as cache:
        out = converse(llama, cache, models.token_ids(1, N_HISTORY))
        future = cache.save(wait=False)
        converse(llama, cache, torch.cat([out, models.token_ids(3, 5)], dim=1))
        report = future.result()
        assert report.n_tokens == out.shape[1] - 1
        second = cache.save()
        assert second.n_new_tokens == cache.n_tokens - report.n_tokens
    with store.open("chat", llama) as cache:
        assert cache.n_tokens == second.n_tokens


def test_non_finite_values_survive_in_any_codec(store, llama):
    with store.open("chat", llama, settings=anything("int4", guard_tokens=0)) as cache:
        converse(llama, cache, models.token_ids(1, 80))
        cache.layers[1].keys[0, 0, 70, 3] = float("nan")
        cache.layers[2].values[0, 1, 60, 0] = float("inf")
        keys, values = cache.layers[1].keys.clone(), cache.layers[2].values.clone()
        report = cache.save()
        assert "only exact can keep" in report.reason
    with store.open("chat", llama) as cache:
        cache.restore()
        assert torch.equal(cache.layers[1].keys.view(torch.int32), keys.view(torch.int32))
        assert torch.equal(cache.layers[2].values.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("n_batch", [2, 3])
@pytest.mark.parametrize("codec", ["exact", "int8"])
def test_a_left_padded_batch(store, llama, n_batch, codec):
    ids = models.token_ids(1, 60, n_batch)
    mask = torch.ones_like(ids)
    for row in range(n_batch):
        ids[row, : 7 * row] = 0
        mask[row, : 7 * row] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with store.open("batch", llama, settings=anything(codec)) as cache:
        out = llama.generate(ids, attention_mask=mask, past_key_values=cache, **arguments)
        cache.save()
    more = torch.cat([out, models.token_ids(5, 6, n_batch)], dim=1)
    mask = torch.cat([mask, mask.new_ones(n_batch, more.shape[1] - 60)], dim=1)
    plain = llama.generate(more, attention_mask=mask, **arguments)
    with store.open("batch", llama) as cache:
        assert cache.attention_mask is not None
        again = llama.generate(more, attention_mask=mask, past_key_values=cache, **arguments)
    if codec == "exact":
        assert torch.equal(again, plain)


def test_another_model_is_refused(store, llama):
    with store.open("chat", llama, settings=anything("exact")) as cache:
        converse(llama, cache, models.token_ids(1, 30))
        cache.save()
    with pytest.raises(krul.MismatchError, match="another model: weights differ"):
        store.open("chat", models.tiny("llama", seed=1))
    with pytest.raises(krul.MismatchError, match=r"dtype differs.*float32.*bfloat16"):
        store.open("chat", models.tiny("llama").to(torch.bfloat16))
    with pytest.raises(krul.MismatchError, match="layer layout differs"):
        store.open("chat", models.tiny("llama", num_key_value_heads=4))
    with store.open("chat", llama) as cache:
        assert cache.n_tokens == 41


def test_a_model_changed_since_open_is_not_saved(store):
    model = models.tiny("llama")
    with store.open("chat", model, settings=anything("exact")) as cache:
        converse(model, cache, models.token_ids(1, 30))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        with pytest.raises(krul.MismatchError, match="weights differ"):
            cache.save()


def test_two_caches_of_one_conversation(store, llama):
    one = store.open("chat", llama, settings=anything("exact"))
    two = store.open("chat", llama, settings=anything("exact"))
    with one, two:
        converse(llama, one, models.token_ids(1, 20))
        converse(llama, two, models.token_ids(2, 25))
        one.save()
        with pytest.raises(krul.MismatchError, match="generation"):
            two.save()
        kept = one.token_ids
    with store.open("chat", llama) as cache:
        assert torch.equal(cache.token_ids, kept)


# ---- damage --------------------------------------------------------------------------------------


def saved_twice(store, model):
    """A conversation of two segments; returns its ids and the tokens in the first segment."""
    with store.open("chat", model, settings=anything("exact")) as cache:
        out = converse(model, cache, models.token_ids(1, 90))
        n_first = cache.save().n_tokens
        out = converse(model, cache, torch.cat([out, models.token_ids(2, 30)], dim=1))
        cache.save()
    return torch.cat([out, models.token_ids(4, 6)], dim=1), n_first


def test_a_flipped_payload_byte_is_recomputed(store, llama):
    ids, _ = saved_twice(store, llama)
    plain = llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    path = paths(store)[0]
    flip_byte(path, os.path.getsize(path) * 3 // 4)
    assert len(store.verify("chat")) == 1
    with store.open("chat", llama, settings=anything("exact")) as cache:
        out = models.once_more(lambda: converse(llama, cache, ids, n_new=6))
        report = cache.restore_report
        assert torch.equal(out, plain)
        assert any(report.n_recomputed_by_layer)
        assert "recomputed" in report.reason
        assert os.path.dirname(path) in report.reason
        assert "CRC-32C" in report.reason


def test_a_truncated_segment_gives_the_good_prefix(store, llama):
    ids, n_first = saved_twice(store, llama)
    plain = llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    newest = paths(store)[-1]
    os.truncate(newest, os.path.getsize(newest) // 2)
    with pytest.warns(RuntimeWarning, match=f"{n_first} of"):
        cache = store.open("chat", llama, settings=anything("exact"))
    with cache:
        assert cache.n_tokens == n_first
        assert torch.equal(converse(llama, cache, ids, n_new=6), plain)
        cache.save()
    assert store.verify() == []


@pytest.mark.parametrize("name", ["manifest", "segment-"])
def test_a_missing_or_garbled_file_starts_over(store, llama, name):
    ids, _ = saved_twice(store, llama)
    plain = llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for path in paths(store, name):
        with open(path, "r+b") as file:
            file.write(os.urandom(200))
    with pytest.warns(RuntimeWarning):
        cache = store.open("chat", llama, settings=anything("exact"))
    with cache:
        assert cache.n_tokens == 0
        assert cache.restore_report.reason
        assert torch.equal(converse(llama, cache, ids, n_new=6), plain)
        cache.save()
    with store.open("chat", llama) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.n_tokens == plain.shape[1] - 1


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_sliding_windows(store, device, family):
    model = models.tiny(family)
    with store.open("chat", model, settings=anything("exact")) as cache:
        out = converse(model, cache, models.token_ids(1, 30))
        n_first = cache.save().n_tokens
        out = converse(model, cache, torch.cat([out, models.token_ids(2, 20)], dim=1))
        cache.save()
        more = torch.cat([out, models.token_ids(3, 5)], dim=1)
        wanted = next_logits(model, copy.deepcopy(cache), more)
    with store.open("chat", model) as cache:
        assert models.same(next_logits(model, cache, more), wanted)
    # The history changes in the second turn: the first turn's boundary is as far as windows reach.
    edited = more.clone()
    edited[:, n_first + 10 :] = (edited[:, n_first + 10 :] + 1) % models.VOCABULARY
    plain = model.generate(edited, max_new_tokens=6, do_sample=False, eos_token_id=None)
    with store.open("chat", model, settings=anything("exact")) as cache:
        assert torch.equal(converse(model, cache, edited, n_new=6), plain)
        assert "rolled back" in cache.restore_report.reason
        cache.save()
    assert store.verify() == []
    with store.open("chat", model) as cache:
        assert torch.equal(cache.token_ids, plain[:, :-1].cpu())


def test_recompute_instead_of_loading(store, llama):
    ids = models.token_ids(1, 60)
    with store.open("chat", llama, settings=anything("exact")) as cache:
        out = converse(llama, cache, ids)
        cache.save()
        keys = cache.layers[2].keys.clone()
    with store.open("chat", llama, settings=anything("exact", restore="recompute")) as cache:
        cache.restore()
        assert cache.restore_report.n_recomputed_by_layer == (out.shape[1] - 1,) * models.N_LAYERS
        assert cache.restore_report.loaded_bytes == 0
        assert cache.restore_report.plan == "recompute"
        torch.testing.assert_close(cache.layers[2].keys, keys, rtol=1e-4, atol=1e-5)


def test_close_in_the_middle_of_a_restore(store, llama):
    with store.open("chat", llama, settings=anything("exact")) as cache:
        converse(llama, cache, models.token_ids(1, N_HISTORY))
        cache.save()
    for _ in range(20):
        store.open("chat", llama).close()


def test_threads_restore_at_once(store, llama):
    with store.open("chat", llama, settings=anything("exact")) as cache:
        out = converse(llama, cache, models.token_ids(1, 60))
        cache.save()
        more = torch.cat([out, models.token_ids(2, 5)], dim=1)
        wanted = next_logits(llama, copy.deepcopy(cache), more)
    barrier, right = threading.Barrier(4), []

    def restore():
        barrier.wait()
        with store.open("chat", llama) as cache:
            right.append(models.same(next_logits(llama, cache, more), wanted))

    threads = [threading.Thread(target=restore) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 4


# ---- the restore of the C library ----------------------------------------------------------------


def entry_of(tensor, payload, layer, codec=1):
    from krul.store import Entry

    n_batch, n_heads, n_tokens, head_dim = tensor.shape
    return Entry(1, codec, 0, 1, layer, -1, n_batch, n_heads, head_dim, 0, n_tokens)._replace(
        payload_bytes=len(payload)
    )


def test_core_restore_reports_and_refuses():
    tensor = torch.randn(1, 2, 10, 8)
    payload = _core.encode_blocks([(1, 0, (tensor,))])[0][0]
    out = torch.zeros_like(tensor)
    restore = _core.Restore([(-1, payload, entry_of(tensor, payload, 0), (out,))], 2, 1)
    restore.wait(0)
    restore.wait(1)
    assert restore.wait_for(0, 0.0)
    assert restore.counts()["n_steps_done"] == 1
    assert torch.equal(out, tensor)
    restore.close()
    restore.close()
    with pytest.raises(ValueError, match="layer is 5 but must be from 0 to 1"):
        restore.wait(5)
    good = entry_of(tensor, payload, 0)
    for step, error, words in [
        ((-1, payload[:-1], good, (out,)), ValueError, "bytes but its entry"),
        ((-1, payload, good, ()), ValueError, "0 arrays but its entry needs 1"),
        ((-1, payload, entry_of(tensor, payload, 7), (out,)), ValueError, "layer 7"),
        ((-1, payload, good, (out.half(),)), krul.DTypeError, "float16"),
        ((-1, payload, good, (out[..., :4],)), krul.ShapeError, "output is"),
        ((-1, payload, (1, 2), (out,)), TypeError, "14 integers"),
        ((-1, payload, good, (3,)), TypeError, "must be an array"),
        ((-1, payload), TypeError, "a step is"),
        (("a", payload, good, (out,)), TypeError, "integer"),
    ]:
        with pytest.raises(error, match=words):
            _core.Restore([step], 2, 1)


def test_a_new_process_continues(store, tmp_path):
    """Save here, restore in another process, compare bits there."""
    model = models.tiny("llama")
    with store.open("chat", model, settings=anything("exact")) as cache:
        out = converse(model, cache, models.token_ids(1, 70))
        cache.save()
        more = torch.cat([out, models.token_ids(2, 5)], dim=1)
        wanted = next_logits(model, copy.deepcopy(cache), more)
    torch.save({"more": more, "wanted": wanted}, tmp_path / "wanted.pt")
    program = textwrap.dedent(
        f"""
        import torch, krul
        import sys; sys.path.insert(0, {os.path.dirname(models.__file__)!r})
        import models
        kept = torch.load({str(tmp_path / "wanted.pt")!r})
        model = models.tiny("llama")
        with krul.Store({store.path!r}) as store, store.open("chat", model) as cache:
            ids = kept["more"][:, cache.n_tokens:]
            with torch.no_grad():
                logits = model(ids, past_key_values=cache).logits
        assert torch.equal(logits, kept["wanted"])
        print("equal")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize("model", [None, "llama", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_named(store, model):
    with pytest.raises(krul.UnsupportedModelError, match=f"model is {type(model).__name__} but"):
        store.open("chat", model)


def test_a_model_is_asked_once_where_its_layers_are(store, monkeypatch):
    model, asked = models.tiny("llama"), []
    layer_devices = krul.restore.layer_devices
    monkeypatch.setattr(
        krul.restore, "layer_devices", lambda model: asked.append(1) or layer_devices(model)
    )
    for n_opened in (1, 2):
        store.open("chat", model).close()
        assert len(asked) == n_opened
