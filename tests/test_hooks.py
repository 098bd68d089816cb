"""The hooks that a model carries while caches are in use: what they see, refuse, leave behind."""

from __future__ import annotations

import copy
import functools
import threading

import models
import pytest
import torch
from transformers import DynamicCache

import krul
from krul import observe
from krul.cache import Cache


@functools.cache
def model_of(name):
    model = models.tiny(name)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def model():
    return model_of("llama")


def hooks_of(model):
    return (
        {key: value for key, value in vars(model).items() if not key.startswith("_")},
        list(model._forward_pre_hooks),
        list(model._forward_hooks),
        list(model._forward_hooks_always_called),
        sorted(vars(model)),
    )


def say(model, ids, cache=None, **options):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        **options,
    )


# ---- putting on and taking off -------------------------------------------------------------------


def test_detach_restores_the_model_exactly(model):
    before = hooks_of(model)
    handle = krul.attach(model)
    assert hooks_of(model) != before
    handle.detach()
    assert hooks_of(model) == before
    handle.detach()
    assert hooks_of(model) == before


def test_handles_are_counted(model):
    before = hooks_of(model)
    first, second = krul.attach(model), krul.attach(model)
    n_hooks = len(model._forward_pre_hooks)
    assert n_hooks == len(before[1]) + 1
    first.detach()
    first.detach()
    assert len(model._forward_pre_hooks) == n_hooks
    cache, ids = Cache(model=model), models.token_ids(1, 9)
    say(model, ids, cache)
    assert cache.token_ids is not None
    second.detach()
    assert hooks_of(model) == before


def test_many_threads_attach_and_detach(model):
    before = hooks_of(model)
    barrier, failures = threading.Barrier(8), []

    def work():
        try:
            barrier.wait()
            for _ in range(30):
                with krul.attach(model), krul.attach(model):
                    assert len(model._forward_pre_hooks) == len(before[1]) + 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert hooks_of(model) == before


def test_a_generate_of_the_users_own_is_kept_and_used(model):
    calls = []
    own = functools.partial(type(model).generate, model)

    def generate(*args, **kwargs):
        calls.append(sorted(kwargs))
        return own(*args, **kwargs)

    model.generate = generate
    try:
        with krul.attach(model):
            cache = Cache(model=model)
            say(model, models.token_ids(1, 9), cache)
        assert model.generate is generate
        assert len(calls) == 1
    finally:
        del model.generate


def test_a_wrapper_put_on_later_survives_detaching(model):
    handle = krul.attach(model)
    below = model.generate
    model.generate = lambda *args, **kwargs: below(*args, **kwargs)
    above = model.generate
    try:
        handle.detach()
        assert model.generate is above
        ids = models.token_ids(1, 9)
        assert torch.equal(say(model, ids, DynamicCache()), say(model, ids))
    finally:
        del model.generate


def test_a_copy_of_an_attached_model_works_alone(model):
    ids = models.token_ids(1, 9)
    with krul.attach(model):
        twin = copy.deepcopy(model)
    assert twin.generate.__self__.model is twin
    cache = Cache(model=twin)
    assert torch.equal(say(twin, ids, cache), say(model, ids))
    assert cache.n_tokens == 14
    with krul.attach(twin):
        cache = Cache(model=twin)
        say(twin, ids, cache)
        assert cache.token_ids.shape == (1, 14)


class Wrapper(torch.nn.Module):
    """What PEFT does: a module around the model, whose generate() ends in the model's."""

    def __init__(self, model):
        super().__init__()
        self.base = model

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)


def test_wrappers_are_looked_through(model):
    ids = models.token_ids(1, 9)
    for wrapper in (Wrapper(model), torch.compile(model, backend="eager")):
        with krul.attach(wrapper) as handle:
            assert handle.model is model
            cache = Cache(model=model)
            wrapper.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
            assert cache.token_ids.shape == (1, 11)


def test_a_module_that_cannot_generate_is_refused():
    with pytest.raises(krul.UnsupportedModelError, match="model is Linear"):
        krul.attach(torch.nn.Linear(2, 2))


def test_other_caches_are_left_alone(model):
    ids = models.token_ids(1, 9)
    without = say(model, ids, DynamicCache(config=model.config))
    with krul.attach(model):
        assert torch.equal(say(model, ids, DynamicCache(config=model.config)), without)
        assert torch.equal(say(model, ids), without)
        assert torch.equal(say(model, ids, use_cache=False), without)


# ---- what a forward pass tells -------------------------------------------------------------------


def test_ids_mask_and_positions_are_noted_as_they_were_fed(model):
    ids = models.token_ids(1, 8, 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = Cache(model=model)
    with krul.attach(model), torch.no_grad():
        model(ids[:, :5], mask[:, :5], positions[:, :5], past_key_values=cache)
        fed = ids[:, 5:].clone()
        model(fed, mask, positions[:, 5:], past_key_values=cache)
        # The caller may use its buffers again.
        fed.zero_()
        positions[:, 5:] += 1
    assert torch.equal(cache.token_ids, ids)
    assert torch.equal(cache.attention_mask.long(), mask)
    assert torch.equal(cache.positions, (mask.cumsum(1) - 1).clamp_min(0))


def test_a_cache_used_without_hooks_does_not_pretend_to_know(model):
    cache, ids = Cache(model=model), models.token_ids(1, 8)
    with torch.no_grad():
        with krul.attach(model):
            model(ids, past_key_values=cache)
        model(ids, past_key_values=cache)
        assert cache.token_ids is None
        with krul.attach(model):
            model(ids, past_key_values=cache)
        assert cache.token_ids is None
        assert "without krul.attach" in cache.why_unknown
        with pytest.raises(ValueError, match=r"does not know its tokens: .*without krul\.attach"):
            cache.align(ids)
        cache.reset()
        with krul.attach(model):
            model(ids, past_key_values=cache)
        assert torch.equal(cache.token_ids, ids)


def test_a_crop_behind_its_back_and_other_tokens_are_noticed(model):
    cache, ids = Cache(model=model), models.token_ids(1, 8)
    with torch.no_grad():
        with krul.attach(model):
            model(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-3)
        assert cache.token_ids is None
        model(ids[:, :3], past_key_values=cache)
    assert cache.n_tokens == 8
    assert cache.token_ids is None


@pytest.mark.parametrize("shift", [-8, -1, 1])
def test_positions_that_do_not_continue_are_refused(model, shift):
    cache, ids = Cache(model=model), models.token_ids(1, 8)
    with krul.attach(model), torch.no_grad():
        model(ids, past_key_values=cache)
        positions = torch.arange(8, 12)[None] + shift
        with pytest.raises(ValueError, match=rf"position_ids begins at \[{8 + shift}\] but the"):
            model(ids[:, :4], position_ids=positions, past_key_values=cache)
        assert torch.equal(cache.token_ids, ids)
        model(ids[:, :4], position_ids=positions - shift, past_key_values=cache)
    assert cache.n_tokens == 12


@pytest.mark.parametrize("n_mask", [4, 8, 11, 13])
def test_a_mask_that_does_not_cover_the_conversation_is_refused(model, n_mask):
    cache, ids = Cache(model=model), models.token_ids(1, 8)
    with krul.attach(model), torch.no_grad():
        model(ids, past_key_values=cache)
        mask = torch.ones(1, n_mask, dtype=torch.int64)
        with pytest.raises(krul.ShapeError, match=f"attention_mask covers {n_mask} tokens but 8"):
            model(ids[:, :4], attention_mask=mask, past_key_values=cache)
    assert torch.equal(cache.token_ids, ids)


def test_embeddings_make_the_tokens_unknown(model):
    cache, ids = Cache(model=model), models.token_ids(1, 8)
    with krul.attach(model), torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert cache.n_tokens == 8
    assert cache.token_ids is None
    assert "embeddings" in cache.why_unknown


@pytest.mark.parametrize("name", ["pixel_values", "image_embeds", "input_features", "audio_values"])
def test_other_inputs_than_text_are_refused(model, name):
    cache = Cache(model=model)
    with (
        krul.attach(model),
        pytest.raises(krul.UnsupportedModelError, match=f"{name} was given together with"),
    ):
        model(models.token_ids(1, 4), past_key_values=cache, **{name: torch.zeros(1)})
    assert cache.n_tokens == 0


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_failing_forward_pass_leaves_the_cache_as_it_was(name, error, at):
    model = model_of(name)
    ids, cache = models.token_ids(1, 30), Cache(model=model)

    def fail(*_):
        raise error

    with krul.attach(model), torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        hook = model.model.layers[at].mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(error):
                model(ids[:, 20:26], past_key_values=cache)
        finally:
            hook.remove()
        logits = model(ids[:, 20:], past_key_values=cache).logits
        wanted = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(cache.token_ids, ids)
    torch.testing.assert_close(logits, wanted[:, 20:], rtol=1e-4, atol=1e-4)


def test_two_threads_speak_over_one_model(model):
    texts = [models.token_ids(seed, 12) for seed in range(4)]
    wanted = [say(model, text) for text in texts]
    results, failures = [None] * 4, []

    def work(index):
        try:
            cache = Cache(model=model)
            results[index] = say(model, texts[index], cache)
            assert torch.equal(cache.token_ids, results[index][:, :-1])
        except BaseException as error:
            failures.append(error)

    with krul.attach(model):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    for left, right in zip(results, wanted, strict=True):
        assert torch.equal(left, right)


def test_one_cache_in_two_threads_at_once_is_refused(model):
    ids, cache = models.token_ids(1, 8), Cache(model=model)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        go_on.wait(20)

    with krul.attach(model), torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(hold)
        thread = threading.Thread(target=lambda: model(ids, past_key_values=cache))
        thread.start()
        try:
            assert inside.wait(20)
            with pytest.raises(RuntimeError, match="in use by a forward pass in another thread"):
                model(ids, past_key_values=cache)
        finally:
            hook.remove()
            go_on.set()
            thread.join()
    assert torch.equal(cache.token_ids, ids)


# ---- the estimator -------------------------------------------------------------------------------


class FakeEstimator:
    """Notes what it is shown."""

    def __init__(self):
        self.begun, self.layers, self.finished, self.abandoned = [], [], 0, 0

    def begin(self, n_past=None):
        self.begun.append(n_past)

    def pick_rows(self, layer, n_queries):
        import numpy

        return numpy.arange(n_queries)

    def collect(self, layer, queries, keys, **_):
        self.layers.append(layer)

    def finish(self):
        self.finished += 1

    def abandon(self, reason=None):
        self.abandoned += 1


def test_a_caches_estimator_sees_its_own_forward_passes_only(model):
    ids = models.token_ids(1, 12)
    cache, other = Cache(model=model), Cache(model=model)
    cache.estimator = FakeEstimator()
    with krul.attach(model) as handle, torch.no_grad():
        assert handle.observe_reason == ""
        model(ids, past_key_values=cache)
        assert cache.estimator.layers == list(range(4))
        model(ids, past_key_values=other)
        model(ids)
        assert cache.estimator.layers == list(range(4))
        model(ids[:, :2], past_key_values=cache)
    assert cache.estimator.begun == [0, 12]
    assert cache.estimator.finished == 2
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert len(cache.estimator.layers) == 8


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_a_failing_forward_pass_ends_observation(model, error):
    ids, cache = models.token_ids(1, 12), Cache(model=model)
    cache.estimator = FakeEstimator()

    def fail(*_):
        raise error

    with krul.attach(model), torch.no_grad():
        hook = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(ids, past_key_values=cache)
        hook.remove()
        model(ids, past_key_values=cache)
        assert cache.estimator.finished == 1
        assert cache.estimator.abandoned == 1
        assert not observe._thread.stack


def test_a_model_that_cannot_be_observed_is_attached_without():
    model = model_of("gptj")
    ids, cache = models.token_ids(1, 12), Cache(model=model)
    cache.estimator = FakeEstimator()
    with krul.attach(model) as handle:
        assert "ALL_ATTENTION_FUNCTIONS" in handle.observe_reason
        say(model, ids, cache)
    assert cache.estimator.layers == []
    assert cache.token_ids is not None


def test_observation_is_counted_with_the_handles(model):
    ids = models.token_ids(1, 12)
    cache = Cache(model=model)
    cache.estimator = FakeEstimator()
    with krul.attach(model, observe=False) as plain, torch.no_grad():
        assert plain.observe_reason == "not asked for"
        model(ids, past_key_values=cache)
        assert cache.estimator.layers == []
        with krul.attach(model):
            model(ids, past_key_values=cache)
        assert cache.estimator.layers == list(range(4))
        model(ids, past_key_values=cache)
        assert cache.estimator.layers == list(range(4))


def test_hooks_that_torch_calls_without_keywords():
    """In another thread's pass, while they are being registered or removed."""
    llama = models.tiny("llama")
    with krul.attach(llama, observe=False):
        (before,) = llama._forward_pre_hooks.values()
        (after,) = llama._forward_hooks.values()
        assert before(llama, ()) is None
        assert after(llama, (), object()) is None
