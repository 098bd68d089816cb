"""The cache by itself: its buffers, its copies, a restore and a save beside a running model."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import sys
import threading
import time

import fakes
import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import krul
from krul.cache import Cache
from krul.layer import KrulLayer

N_LAYERS = 4


@functools.cache
def model_of(name):
    model = models.tiny(name)
    model.generation_config.eos_token_id = 10 * models.VOCABULARY
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def llama():
    model = model_of("llama")
    with krul.attach(model, observe=False):
        yield model


def states(n_tokens, seed=0, *, n_batch=2, n_heads=3, head_dim=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_batch, n_heads, n_tokens, head_dim, generator=generator).to(dtype)


def run(model, ids, cache, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **options).logits


def filled(model, n_tokens=20, n_batch=1, seed=1):
    cache, ids = Cache(model=model), models.token_ids(seed, n_tokens, n_batch)
    run(model, ids, cache)
    return cache, ids


def continued(model, ids, n_new=4):
    """Return the logits of the last tokens, from a forward pass without any cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -n_new:]


def assert_close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


# ---- one layer -----------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 90)),
        st.tuples(st.just("crop"), st.integers(-40, 0)),
        st.tuples(st.just("keep"), st.integers(1, 80)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("fork"), st.just(0)),
        st.tuples(st.just("adopt"), st.just(0)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=12,
)


@given(STEPS, st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]))
def test_a_layer_holds_what_concatenation_would(steps, mode):
    layer = KrulLayer()
    empty = states(0)
    keys, values = empty, states(0, head_dim=6)
    for number, (step, value) in enumerate(steps):
        with mode():
            if step == "update":
                new_keys, new_values = states(value, number), states(value, number, head_dim=6)
                keys, values = torch.cat([keys, new_keys], 2), torch.cat([values, new_values], 2)
                given_back = layer.update(new_keys, new_values)
                assert torch.equal(given_back[0], keys)
                assert torch.equal(given_back[1], values)
            elif step in ("crop", "keep"):
                n_left = keys.shape[2] + value if step == "crop" else value
                keys, values = keys[:, :, : max(0, n_left)], values[:, :, : max(0, n_left)]
                layer.crop(torch.tensor(value) if number % 2 else value)
            elif step == "reorder":
                rows = torch.tensor(value)
                keys, values = keys[rows], values[rows]
                layer.reorder_cache(rows)
            elif step == "fork":
                layer = copy.deepcopy(layer)
            elif step == "adopt" and layer.keys is not None:
                layer.keys, layer.values = keys.clone(), values.clone()
            elif step == "reset":
                layer.reset()
                keys, values = keys[:, :, :0], values[:, :, :0]
        assert layer.get_seq_length() == keys.shape[2]
        if keys.shape[2]:
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


def test_decoding_a_token_copies_no_history():
    layer = KrulLayer()
    with torch.no_grad():
        layer.update(states(1000), states(1000))
        places = set()
        for number in range(4000):
            layer.update(states(1, number), states(1, number))
            places.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 5000
    assert len(places) <= 6


def test_a_buffer_made_in_inference_mode_can_be_written_outside():
    layer = KrulLayer()
    with torch.inference_mode():
        layer.update(states(5), states(5))
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.crop(-2)
    with torch.no_grad():
        keys, _ = layer.update(states(3, 1), states(3, 1))
    assert torch.equal(keys, torch.cat([states(5)[[1, 0]][:, :, :3], states(3, 1)], 2))
    # A tensor that was adopted in inference mode is one of inference.
    with torch.inference_mode():
        layer.keys, layer.values = layer.keys * 2, layer.values * 2
        layer.crop(-1)
    with torch.no_grad():
        layer.update(states(1), states(1))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_equal_those_of_a_dynamic_cache(name):
    model, ids = model_of(name), models.token_ids(1, 16)

    def gradients(cache):
        model.zero_grad()
        model(ids[:, :9], past_key_values=cache)
        model(ids[:, 9:], past_key_values=cache).logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(DynamicCache(config=model.config))
    got = gradients(Cache(model=model))
    model.zero_grad()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_gradients_where_keys_need_none():
    """The view that was handed out is saved for the query's gradient."""
    layer = KrulLayer()
    with torch.no_grad():
        layer.update(states(3), states(3))
    query = states(2).requires_grad_()
    keys, _ = layer.update(states(2, 1), states(2, 1))
    loss = (query @ keys.transpose(2, 3)).sum()
    with torch.no_grad():
        layer.update(states(2, 2), states(2, 2))
    loss.backward()
    assert torch.equal(query.grad, keys.sum(2, keepdim=True).expand_as(query))


@pytest.mark.parametrize(
    "shape", [{"n_batch": 1}, {"n_batch": 3}, {"n_heads": 1}, {"n_heads": 6}, {"head_dim": 1}]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("which", [0, 1])
def test_what_would_be_broadcast_is_refused(shape, mode, which):
    layer = KrulLayer()
    with mode():
        layer.update(states(5), states(5))
        given_states = [states(2), states(2)]
        given_states[which] = states(2, **shape)
        name = ("key_states", "value_states")[which]
        words = rf"{name} is \(.*\) but the cache holds 5 tokens of \(2, 3\) x 4"
        with pytest.raises(krul.ShapeError, match=words):
            layer.update(*given_states)
    assert torch.equal(layer.keys, states(5))
    assert torch.equal(layer.values, states(5))


def test_another_batch_after_everything_was_cropped():
    layer = KrulLayer()
    with torch.no_grad():
        layer.update(states(5), states(5))
        layer.crop(-5)
        keys, _ = layer.update(states(2, n_batch=1), states(2, n_batch=1))
    assert torch.equal(keys, states(2, n_batch=1))


def test_keys_and_values_have_dtypes_of_their_own():
    layer = KrulLayer()
    half = torch.bfloat16
    with torch.no_grad():
        keys, values = layer.update(states(3), states(3, dtype=half))
        assert (keys.dtype, values.dtype) == (torch.float32, half)
        keys, values = layer.update(states(2, dtype=half), states(2, 1))
    assert (keys.dtype, values.dtype) == (torch.float32, torch.float32)
    assert torch.equal(keys, torch.cat([states(3), states(2, dtype=half)], 2))
    assert torch.equal(values, torch.cat([states(3, dtype=half), states(2, 1)], 2))


def test_a_tensor_that_was_assigned_is_never_written():
    layer, mine = KrulLayer(), states(6)
    with torch.no_grad():
        layer.update(states(4), states(4))
        layer.keys, layer.values = mine, mine.clone()
        layer.crop(-3)
        layer.update(states(2, 1), states(2, 1))
    assert torch.equal(mine, states(6))
    assert torch.equal(layer.keys, torch.cat([states(6)[:, :, :3], states(2, 1)], 2))


def test_a_pickled_layer_has_its_tokens_and_no_more():
    layer = KrulLayer()
    with torch.no_grad():
        layer.update(states(300), states(300))
        layer.crop(-290)
    stream = io.BytesIO()
    torch.save(layer, stream)
    n_bytes = 2 * states(10).numel() * 4
    assert len(stream.getvalue()) < n_bytes + 8000
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin.keys, layer.keys)
    assert torch.equal(twin.update(states(1), states(1))[0][:, :, :10], layer.keys)


def test_both_spellings_of_every_version():
    layer = KrulLayer()
    layer.lazy_initialization(states(0))
    layer.lazy_initialization(states(0), states(0))
    with torch.no_grad():
        layer.update(states(5), states(5), {"cache_position": torch.arange(5)})
    assert layer.get_mask_sizes(3) == layer.get_mask_sizes(torch.arange(3)) == (8, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    assert layer.is_initialized
    assert layer.is_croppable
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, states(5))
    cache = Cache()
    cache.activate_past_recording()
    # generate() notes things on caches and layers.
    cache._is_user_defined = layer.record_past = True


# ---- the container -------------------------------------------------------------------------------


def test_only_plain_layers_are_replaced():
    model = model_of("gemma2")
    plain, cache = DynamicCache(config=model.config), Cache(model.config)
    for old, new in zip(plain.layers, cache.layers, strict=True):
        assert type(new) is (KrulLayer if type(old) is DynamicLayer else type(old))
    assert cache.is_sliding == plain.is_sliding
    assert not cache.is_compileable


def test_an_empty_cache_is_true_and_its_length_is_its_layers(llama):
    assert Cache()
    assert len(Cache()) == 0
    assert len(Cache(model=llama)) == N_LAYERS
    assert isinstance(Cache(), DynamicCache)
    assert Cache(model=llama).token_ids.shape == (1, 0)


def test_a_cache_without_a_config_grows_its_layers(llama):
    cache, ids = Cache(), models.token_ids(1, 12)
    logits = run(llama, ids, cache)
    assert [type(layer) for layer in cache.layers] == [KrulLayer] * N_LAYERS
    assert torch.equal(logits, run(llama, ids, DynamicCache()))


def test_data_given_to_the_constructor_is_kept():
    cache = Cache(ddp_cache_data=[(states(3), states(3, 1))])
    assert torch.equal(cache.layers[0].keys, states(3))
    assert torch.equal(cache.layers[0].values, states(3, 1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("count", [-1, -17, 19, 3, -20, 0, 25, torch.tensor(-2)])
def test_crop_means_the_same_on_every_version(name, count):
    """Also where a sliding window (8 tokens) has moved on."""
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, ids = filled(model)
        cache.crop(count)
        n_left = min(20, int(count)) if count > 0 else 20 + int(count)
        assert cache.n_tokens == n_left
        assert torch.equal(cache.token_ids, ids[:, :n_left]) or n_left == 0
        new = models.token_ids(5, 4)
        assert_close(run(model, new, cache), continued(model, torch.cat([ids[:, :n_left], new], 1)))


def test_a_crop_that_cannot_be_done_is_refused_and_changes_nothing():
    model = model_of("mistral")
    with krul.attach(model, observe=False):
        cache, ids = filled(model)
        cache.model = None
        with pytest.raises(
            ValueError, match=r"holds 20 tokens and cannot be cropped to 18: a slid"
        ):
            cache.crop(-2)
        assert torch.equal(cache.token_ids, ids)
        new = models.token_ids(5, 4)
        assert_close(run(model, new, cache), continued(model, torch.cat([ids, new], 1)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_reset_begins_anew(name):
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, _ = filled(model)
        cache.reset()
        assert cache.n_tokens == 0
        ids = models.token_ids(7, 11, 2)
        run(model, ids[:, :7], cache)
        assert_close(run(model, ids[:, 7:], cache), continued(model, ids))
        assert torch.equal(cache.token_ids, ids)


def test_rows_and_their_tokens_move_together(llama):
    cache, ids = filled(llama, n_batch=3)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.token_ids, ids[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.token_ids, ids[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([1, 2]))
    assert torch.equal(cache.token_ids, ids[[2, 0]])
    cache.batch_select_indices(torch.tensor([False, True]))
    new = models.token_ids(5, 4)
    assert_close(run(llama, new, cache), continued(llama, torch.cat([ids[:1], new], 1)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_fork_has_all_tokens_and_no_conversation(name, copied):
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, ids = filled(model)
        cache.conversation = object()
        fork = copied(cache)
        fork.model = model
        left, right = models.token_ids(5, 4), models.token_ids(6, 4)
        assert_close(run(model, left, cache), continued(model, torch.cat([ids, left], 1)))
        assert_close(run(model, right, fork), continued(model, torch.cat([ids, right], 1)))
        assert torch.equal(fork.token_ids, torch.cat([ids, right], 1))
        with pytest.raises(
            krul.MismatchError, match="belongs to no conversation and cannot be sav"
        ):
            fork.save()


def test_a_fork_of_a_fork_shares_the_model_and_nothing_else(llama):
    cache, _ = filled(llama)
    fork = copy.deepcopy(copy.deepcopy(cache))
    assert fork.model is llama
    for old, new in zip(cache.layers, fork.layers, strict=True):
        assert torch.equal(old.keys, new.keys)
        assert old.keys.data_ptr() != new.keys.data_ptr()


# ---- aligning ------------------------------------------------------------------------------------


def test_align_keeps_the_common_prefix_and_leaves_a_token(llama):
    cache, ids = filled(llama)
    assert cache.align(torch.cat([ids, ids[:, :3]], 1)) == 20
    assert cache.align(ids) == 19
    changed = ids.clone()
    changed[0, 11] += 1
    assert cache.align(changed) == 11
    assert torch.equal(cache.token_ids, ids[:, :11])
    assert cache.align(ids[:, :5]) == 4
    assert cache.restore_report.n_cropped_tokens == 16
    assert cache.align(ids[:, :1]) == 0
    assert cache.align(ids) == 0


def test_align_tells_padding_from_a_token_with_the_same_id(llama):
    ids = models.token_ids(1, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = Cache(model=llama)
    run(llama, ids, cache, attention_mask=mask)
    other = ids.clone()
    other[0, :3] = 9
    assert cache.align(torch.cat([other, other], 1), torch.cat([mask, mask], 1)) == 12
    with pytest.warns(UserWarning, match="none of the 12 cached tokens"):
        assert cache.align(ids) == 0


def test_align_refuses_what_it_cannot_compare(llama):
    cache, ids = filled(llama)
    with pytest.raises(krul.ShapeError, match=r"input_ids is \(20,\) but must be"):
        cache.align(ids[0])
    with pytest.raises(krul.ShapeError, match="input_ids has 2 rows but the cache holds 1"):
        cache.align(ids.repeat(2, 1))
    with pytest.raises(krul.ShapeError, match=r"attention_mask is \(1, 3\) but input_ids"):
        cache.align(ids, torch.ones(1, 3))


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_align_behind_a_window_takes_a_stored_boundary_or_nothing(name):
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, ids = filled(model, 12)
        windows = {
            index: (layer.keys.clone(), layer.values.clone())
            for index, layer in enumerate(cache.layers)
            if cache.is_sliding[index]
        }
        asked = []
        cache.rollback = lambda n: asked.append(n) or (12, windows)
        ids = torch.cat([ids, models.token_ids(2, 9)], 1)
        run(model, ids[:, 12:], cache)
        ids[0, 17] += 1
        assert cache.align(ids) == 12
        assert asked == [17]
        assert "stored boundary at token 12" in cache.restore_report.reason
        assert_close(run(model, ids[:, 12:], cache), continued(model, ids, 9))
        cache.rollback = None
        ids[0, 17] += 1
        assert cache.align(ids) == 0
        assert "starting over" in cache.restore_report.reason
        assert_close(run(model, ids, cache), continued(model, ids, 21))


# ---- restoring -----------------------------------------------------------------------------------


def restored(model, n_tokens=20, n_batch=1, **options):
    origin, ids = filled(model, n_tokens, n_batch)
    target = Cache(model=model)
    source = fakes.FakeSource(origin, target, **options)
    return target, source, ids


def in_background(work):
    result, failures = [], []

    def guarded():
        try:
            result.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()

    def join():
        thread.join(fakes.PATIENCE_S)
        assert not thread.is_alive()
        if failures:
            raise failures[0]
        return result[0]

    return thread, join


def test_what_is_known_at_once_does_not_wait(llama):
    cache, source, ids = restored(llama, is_held=True)
    assert cache.n_tokens == cache.get_seq_length() == 20
    assert torch.equal(cache.token_ids, ids)
    for layer in cache.layers:
        assert layer.get_mask_sizes(3) == (23, 0)
    # Cropping and aligning are known at once too.
    changed = ids.clone()
    changed[0, 15] += 1
    assert cache.align(changed) == 15
    cache.crop(-1)
    assert cache.n_tokens == 14
    assert source.waited == []
    source.let(range(N_LAYERS))
    assert_close(run(llama, changed[:, 14:], cache), continued(llama, changed, 6))


@pytest.mark.parametrize("order", [list(range(N_LAYERS)), list(range(N_LAYERS))[::-1]])
def test_each_layer_waits_for_itself(llama, order):
    cache, source, _ = restored(llama, is_held=True)
    new = models.token_ids(5, 4)
    thread, join = in_background(lambda: run(llama, new, cache))
    is_in = set()
    for index in order:
        # The model gets as far as the first layer that is not in yet, and no farther.
        reached = min(set(range(N_LAYERS)) - is_in)
        deadline = time.monotonic() + fakes.PATIENCE_S
        while reached not in source.waited and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.02)
        assert max(source.waited) == reached
        assert thread.is_alive()
        source.let([index])
        is_in.add(index)
    assert torch.equal(join(), run(llama, new, filled(llama)[0]))
    assert source.n_closed >= 1
    assert cache.source is None
    report = cache.restore_report
    assert report.n_loaded_by_layer == (20,) * N_LAYERS
    assert report.n_recomputed_by_layer == (0,) * N_LAYERS
    assert report.reason == "everything was read"
    assert report.seconds_by_stage["wait"] > 0.07


def _reorder(cache):
    cache.reorder_cache(torch.tensor([0]))


@pytest.mark.parametrize(
    "operation",
    [
        lambda cache: cache.layers[3].keys,
        lambda cache: cache.layers[3].values,
        lambda cache: setattr(cache.layers[3], "keys", states(2)),
        lambda cache: copy.deepcopy(cache),
        lambda cache: pickle.dumps(cache.layers[3]),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.restore(),
        lambda cache: cache.layers[3].reset(),
        _reorder,
    ],
)
def test_whatever_needs_the_numbers_waits(llama, operation):
    cache, source, _ = restored(llama, is_held=True)
    thread, join = in_background(lambda: operation(cache))
    time.sleep(0.05)
    assert thread.is_alive()
    source.let(range(N_LAYERS))
    join()


ERRORS = [krul.CorruptionError("block 7 of segment-1 is damaged"), OSError(5, "read failed")]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_damage_found_half_way_is_recomputed(name, error, at):
    model = model_of(name)
    with krul.attach(model, observe=False):
        full = [i for i, layer in enumerate(Cache(model=model).layers) if type(layer) is KrulLayer]
        at = full[min(at, len(full) - 1)]
        cache, source, ids = restored(model, failures={at: error}, is_held=True)
        source.let([index for index in full if index <= at])
        new = models.token_ids(5, 4)
        logits = run(model, new, cache)
        assert_close(logits, continued(model, torch.cat([ids, new], 1)))
        assert torch.equal(cache.token_ids, torch.cat([ids, new], 1))
        missing = [index for index in full if index >= at]
        report = cache.restore_report
        for index in full:
            n_recomputed = 20 if index in missing else 0
            assert report.n_recomputed_by_layer[index] == n_recomputed
            assert report.n_loaded_by_layer[index] == 20 - n_recomputed
        assert f"recomputed layers {', '.join(map(str, missing))} from 20 tokens" in report.reason
        assert str(error) in report.reason
        assert cache.source is None
        assert source.n_closed >= 1
        more = models.token_ids(6, 4)
        wanted = continued(model, torch.cat([ids, new, more], 1))
        assert_close(run(model, more, cache), wanted)


def test_damage_in_a_left_padded_batch_is_recomputed(llama):
    ids = models.token_ids(1, 20, 3)
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :11] = 0
    origin, plain = Cache(model=llama), DynamicCache(config=llama.config)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    said = llama.generate(ids, past_key_values=origin, **options)
    llama.generate(ids, past_key_values=plain, **options)
    cache = Cache(model=llama)
    fakes.FakeSource(origin, cache, {1: krul.CorruptionError("damaged")})
    cache.restore()
    for old, new in zip(plain.layers, cache.layers, strict=True):
        for row, n_padding in enumerate((0, 5, 11)):
            assert_close(old.keys[row, :, n_padding:], new.keys[row, :, n_padding:])
            assert_close(old.values[row, :, n_padding:], new.values[row, :, n_padding:])
    assert torch.equal(cache.token_ids, said[:, :-1])


def test_a_recomputed_history_is_seen_by_nobody(llama):
    from krul import observe

    class Estimator:
        def __init__(self):
            self.layers = []

        def begin(self, n_past=None):
            self.n_past = n_past

        def pick_rows(self, layer, n_queries):
            import numpy

            return numpy.arange(n_queries)

        def collect(self, layer, queries, keys, **_):
            self.layers.append(layer)

        def finish(self):
            pass

        def abandon(self, reason=None):
            pass

    cache, _, ids = restored(llama, failures={2: krul.CorruptionError("damaged")})
    cache.estimator = Estimator()
    new = models.token_ids(5, 4)
    with krul.attach(llama), torch.no_grad():
        outputs = llama(new, past_key_values=cache, output_hidden_states=True)
        assert not observe._thread.stack
    assert cache.estimator.layers == list(range(N_LAYERS))
    assert [tuple(hidden.shape[:2]) for hidden in outputs.hidden_states] == [(1, 4)] * 5
    assert torch.equal(cache.token_ids, torch.cat([ids, new], 1))


@pytest.mark.parametrize("error", ERRORS)
def test_damage_that_cannot_be_recomputed_is_raised_again_and_again(llama, error):
    cache, _, ids = restored(llama, failures={1: error}, is_known=False)
    cache._lose_tokens("nobody said")
    words = (
        f"{error.args[-1]}; the history cannot be recomputed: its tokens are unknown: nobody said"
    )
    for _ in range(2):
        with pytest.raises(type(error), match=words):
            run(llama, models.token_ids(5, 4), cache)
        assert cache.n_tokens == 20
    with pytest.raises(type(error), match=words):
        cache.restore()
    cache.reset()
    run(llama, ids, cache)
    assert torch.equal(cache.token_ids, ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cache: setattr(cache, "model", None), "the cache was made without a model"),
        (lambda cache: cache.model.train(), "the model is in training mode"),
        (lambda cache: setattr(cache, "recompute_blocker", "a strange mask"), "a strange mask"),
    ],
)
def test_why_a_history_cannot_be_recomputed(llama, change, words):
    cache, _, _ = restored(llama, failures={1: krul.CorruptionError("damaged")})
    change(cache)
    try:
        with pytest.raises(krul.CorruptionError, match=f"damaged; .* recomputed: {words}"):
            cache.restore()
    finally:
        llama.eval()


def test_a_restore_is_dropped_by_reset_and_by_close(llama):
    for end in (Cache.reset, Cache.close):
        cache, source, _ = restored(llama, is_held=True)
        end(cache)
        assert source.is_cancelled
        assert source.n_closed >= 1
        assert cache.source is None


# ---- saving --------------------------------------------------------------------------------------


@pytest.fixture
def saver(monkeypatch):
    fake = fakes.FakeSave()
    monkeypatch.setitem(sys.modules, "krul.save", fake)
    monkeypatch.setattr(krul, "save", fake, raising=False)
    return fake


def conversing(model, n_tokens=20, n_batch=1):
    cache, ids = filled(model, n_tokens, n_batch)
    cache.conversation = object()
    return cache, ids


def test_a_save_takes_what_is_new(llama, saver):
    cache, ids = conversing(llama)
    report = cache.save()
    assert (report.n_tokens, report.n_new_tokens) == (20, 20)
    assert cache.save() is report
    assert cache.save_report is report
    assert cache.n_saved_tokens == 20
    new = models.token_ids(2, 5)
    run(llama, new, cache)
    assert cache.n_saved_tokens == 20
    assert cache.save().n_new_tokens == 5
    assert [saved["start"] for saved in saver.saved] == [0, 20]
    assert torch.equal(saver.saved[1]["ids"], torch.cat([ids, new], 1))
    assert cache.generation == 2


def test_a_future_at_once_and_the_model_goes_on(llama, saver):
    cache, ids = conversing(llama)
    wanted = [layer.keys.clone() for layer in cache.layers]
    saver.gate.clear()
    future = cache.save(wait=False)
    new = models.token_ids(2, 200)
    run(llama, new, cache)
    assert not future.done()
    saver.gate.set()
    assert future.result().n_tokens == 20
    for left, right in zip(wanted, saver.saved[0]["layers"], strict=True):
        assert torch.equal(left, right[0])
    assert cache.n_saved_tokens == 20
    assert torch.equal(cache.token_ids, torch.cat([ids, new], 1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_other_tokens_written_during_a_save_do_not_reach_it(name, saver):
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, ids = conversing(model)
        wanted = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        saver.gate.clear()
        future = cache.save(wait=False)
        cache.crop(-8)
        other = models.token_ids(9, 12)
        run(model, other, cache)
        saver.gate.set()
        future.result()
        for left, right in zip(wanted, saver.saved[0]["layers"], strict=True):
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
        assert torch.equal(saver.saved[0]["ids"], ids)
        # What was cropped meanwhile does not count as saved, even where the ids are the same.
        assert cache.n_saved_tokens == 12
        assert cache.save().n_new_tokens == 12


def test_reset_during_a_save_of_a_restored_conversation(llama, saver):
    cache, source, _ = restored(llama, is_held=True)
    cache.conversation = object()
    future = cache.save(wait=False)
    _, join = in_background(cache.reset)
    source.let(range(N_LAYERS))
    join()
    assert future.result().n_tokens == 20
    wanted = filled(llama)[0]
    for layer, pair in zip(wanted.layers, saver.saved[0]["layers"], strict=True):
        assert torch.equal(layer.keys, pair[0])
    assert cache.n_saved_tokens == 0


def test_a_save_in_the_background_leaves_the_processors_to_the_model(llama, saver):
    cache, _ = conversing(llama)
    usual = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    cache.save(wait=False).result()
    run(llama, models.token_ids(2, 5), cache)
    cache.save()
    assert [saved["niceness"] for saved in saver.saved] == [19, usual]
    assert saver.saved[1]["thread"] is threading.current_thread()


def test_a_save_that_waits_comes_after_one_that_does_not(llama, saver):
    cache, _ = conversing(llama)
    saver.gate.clear()
    future = cache.save(wait=False)
    run(llama, models.token_ids(2, 5), cache)
    threading.Timer(0.05, saver.gate.set).start()
    assert cache.save().n_new_tokens == 5
    assert future.result().n_new_tokens == 20
    assert [saved["start"] for saved in saver.saved] == [0, 20]


def test_a_save_that_fails_can_be_tried_again(llama, saver):
    cache, _ = conversing(llama)
    saver.error = krul.StoreFullError(28, "no space left")
    with pytest.raises(krul.StoreFullError, match="no space left"):
        cache.save()
    assert cache.save_report is None
    assert cache.n_saved_tokens == 0
    assert cache.save().n_new_tokens == 20
    assert cache.layers[0]._n_protected == [0, 0]


def test_tokens_cropped_and_said_again_are_saved_again(llama, saver):
    cache, ids = conversing(llama)
    cache.save()
    cache.crop(-6)
    assert cache.n_saved_tokens == 14
    run(llama, ids[:, 14:], cache)
    assert cache.n_saved_tokens == 14
    assert cache.save().n_new_tokens == 6


def test_beams_do_not_make_the_history_unsaved(llama, saver):
    cache, ids = conversing(llama)
    cache.save()
    ids = torch.cat([ids, models.token_ids(3, 4)], 1)
    llama.generate(
        ids, past_key_values=cache, num_beams=3, max_new_tokens=5, do_sample=False,
        attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    assert cache.n_saved_tokens == 20
    cache.save()
    assert saver.saved[1]["start"] == 20


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_a_window_is_saved_as_what_it_holds(name, saver):
    model = model_of(name)
    with krul.attach(model, observe=False):
        cache, _ = conversing(model)
        cache.activate_past_recording()
        run(model, models.token_ids(2, 5), cache)
        cache.save()
        saved = saver.saved[0]
        for index, layer in enumerate(cache.layers):
            is_sliding = cache.is_sliding[index]
            n_held = layer.sliding_window - 1 if is_sliding else 25
            assert saved["kinds"][index] == ("sliding" if is_sliding else "full")
            assert saved["token_start"][index] == 25 - n_held
            assert saved["layers"][index][0].shape[2] == n_held
            assert torch.equal(saved["layers"][index][0], layer.keys[:, :, -n_held:])


def test_what_cannot_be_saved_says_why(llama, saver):
    with pytest.raises(krul.MismatchError, match="belongs to no conversation"):
        filled(llama)[0].save()
    cache = Cache(model=llama)
    cache.conversation = object()
    with pytest.raises(ValueError, match="holds 0 tokens but a conversation to save needs at leas"):
        cache.save()
    cache, _ = conversing(llama)
    cache.layers[1].keys = cache.layers[1].keys[:, :, :7]
    with pytest.raises(ValueError, match="layer 1 holds 7 keys and 20 values but the cache 20"):
        cache.save()
    cache, _ = conversing(llama)
    cache._lose_tokens("nobody said")
    with pytest.raises(ValueError, match="does not know which: nobody said"):
        cache.save()
    assert saver.saved == []


# ---- the end -------------------------------------------------------------------------------------


def test_close_waits_for_a_save_and_refuses_everything_after(llama, saver):
    calls = []
    with conversing(llama)[0] as cache:
        saver.gate.clear()
        future = cache.save(wait=False)
        cache.handle = krul.attach(llama, observe=False)
        cache.on_close(lambda: calls.append("first"))
        cache.on_close(lambda: calls.append("second"))
        threading.Timer(0.1, saver.gate.set).start()
    assert future.done()
    assert future.result().n_tokens == 20
    assert calls == ["second", "first"]
    assert cache.is_closed
    assert cache.handle is None
    assert all(layer.keys is None for layer in cache.layers)
    cache.close()
    for use in (
        cache.save,
        cache.restore,
        cache.reset,
        lambda: cache.crop(-1),
        lambda: cache.align(models.token_ids(1, 3)),
        lambda: run(llama, models.token_ids(1, 3), cache),
        lambda: copy.deepcopy(cache),
        cache.__enter__,
    ):
        with pytest.raises(ValueError, match="the cache is closed; open the conversation again"):
            use()
    assert cache.token_ids is None
