"""Observation: what eager attention says is what is seen, and nothing else changes."""

import copy
import gc
import inspect
import threading
import weakref

import models
import numpy as np
import pytest
import torch
from reference import estimator_reference as reference

import krul
from krul import observe
from krul.estimator import Estimator
from krul.model import decoder_layers

FAMILIES = [
    name
    for name in (
        "llama", "gemma2", "gemma3", "qwen2", "mistral", "gpt2", "phi3", "gpt_neox", "gpt_oss",
        "llama4", "deepseek_v3", "smollm3", "diffllama",
    )
    if models.is_available(name)
]  # fmt: skip
# transformers refuses these under sdpa: soft caps and sinks are not among its arguments.
ONLY_EAGER = {"gemma2", "gpt_oss"}


def run(model, ids, mask=None, **options):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False, **options)


def globals_of(model):
    return inspect.unwrap(type(decoder_layers(model)[1][0][2]).forward).__globals__


def picture(model):
    """Everything in the modeling file that observation may replace."""
    names = globals_of(model)
    registry = names["ALL_ATTENTION_FUNCTIONS"]
    return {key: id(value) for key, value in names.items()}, dict(registry._local_mapping)


def expected_sums(attentions, positions, real):
    rows = [
        np.where(real[:, None, positions, None] > 0, weights.double().numpy()[:, :, positions], 0)
        for weights in attentions
    ]
    return reference.sums(rows, positions, key_is_real=real)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_observed_sums_are_those_of_eager_attention(name, implementation):
    if name in ONLY_EAGER and implementation == "sdpa":
        implementation = "eager"
    model = models.tiny(name, attn_implementation=implementation)
    eager = models.tiny(name, attn_implementation="eager")
    if "ALL_ATTENTION_FUNCTIONS" not in globals_of(model):  # diffllama in old transformers
        with pytest.raises(krul.UnsupportedModelError, match="attention"):
            observe.install(model)
        return
    before = picture(model)
    ids = models.token_ids(1, 40, 2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    plain = run(model, ids, mask).logits
    watcher = Estimator(models.N_LAYERS, rows="all")
    with observe.install(model) as handle, observe.observing(watcher, handle):
        observed = run(model, ids, mask).logits
    assert torch.equal(plain, observed)
    assert picture(model) == before
    found = watcher.result()
    assert found.skipped is None
    attentions = run(eager, ids, mask, output_attentions=True).attentions
    real = mask.numpy()
    distances, importance, received, n_rows = expected_sums(attentions, np.arange(40), real)
    # The rows are float32 in both. Under sdpa the hidden states differ too: up to 1e-5 in a row.
    single = 1e-5 if implementation == "eager" else 2e-4
    assert found.n_prefill_rows == n_rows == 73
    np.testing.assert_allclose(found.distances, np.sqrt(distances), rtol=single, atol=single)
    np.testing.assert_allclose(found.importance, importance / n_rows, rtol=single, atol=single)
    np.testing.assert_allclose(found.received, received, rtol=single, atol=10 * single)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_generating_is_observed_and_unchanged(name):
    """Prefill and one decoding step of 16; sliding layers hold a tail of the keys only."""
    model = models.tiny(name)
    eager = models.tiny(name, attn_implementation="eager")
    ids = models.token_ids(2, 20)
    options = {"max_new_tokens": 41, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    watcher = Estimator(models.N_LAYERS, rows="all")
    with observe.install(model) as handle:
        hooks = [
            model.register_forward_pre_hook(
                lambda module, args, kwargs: observe.push(
                    watcher, handle, n_past=kwargs["past_key_values"].get_seq_length()
                ),
                with_kwargs=True,
            ),
            model.register_forward_hook(lambda *_: observe.pop()),
        ]
        observed = model.generate(ids, **options)
        for hook in hooks:
            hook.remove()
    assert torch.equal(plain, observed)
    found = watcher.result()
    assert found.skipped is None
    assert (found.n_prefill_rows, found.n_decode_rows) == (20, 32)
    attentions = run(eager, observed[:, :-1], output_attentions=True).attentions
    real = np.ones((1, 60), np.uint8)
    prompt = expected_sums(attentions, np.arange(20), real)
    steps = expected_sums(attentions, np.array([35, 51]), real)
    distances, importance, received, _ = (a + 16 * b for a, b in zip(prompt, steps, strict=True))
    # as above, and the keys of the cache were made step by step
    np.testing.assert_allclose(found.distances, np.sqrt(distances), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.importance, importance / 52, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.received, received, rtol=1e-3, atol=2e-3)


def test_a_model_may_run_on_in_one_block():
    model = models.tiny("llama")
    watcher = Estimator(models.N_LAYERS, rows="all")
    with observe.install(model), observe.observing(watcher):
        model.generate(
            models.token_ids(2, 20), max_new_tokens=41, eos_token_id=None, pad_token_id=0
        )
    found = watcher.result()
    assert (found.n_prefill_rows, found.n_decode_rows) == (20, 32)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "smollm3", "deepseek_v3"])
def test_moments_are_of_queries_before_rotation(name):
    model = models.tiny(name)
    layers = decoder_layers(model)[1]
    ids = models.token_ids(3, 12)
    taken = {}

    # At position 0 rotation is the identity, and the first layer's input knows of no positions:
    # there the queries after rotation are what they are elsewhere before it.
    watcher = Estimator(models.N_LAYERS, rows="all")
    with observe.install(model) as handle, observe.observing(watcher, handle):
        run(model, ids)
    still = Estimator(models.N_LAYERS, rows="all")
    with (
        observe.install(model) as handle,
        observe.observing(still, handle),
        torch.no_grad(),
    ):
        model(ids, position_ids=torch.zeros_like(ids), use_cache=False)
    found, unmoved = watcher.result(), still.result()
    assert found.is_pre_rotary[0]
    assert unmoved.is_pre_rotary[0]
    np.testing.assert_allclose(
        found.query_moments[0], unmoved.query_moments[0], rtol=1e-4, atol=1e-4
    )
    if name == "llama":
        attention = layers[0][2]
        handle = attention.q_proj.register_forward_hook(
            lambda module, args, output: taken.setdefault("q", output)
        )
        run(model, ids)
        handle.remove()
        queries = taken["q"].view(1, 12, 4, 16).transpose(1, 2).numpy()
        expected = reference.query_moments(queries, 2) / (12 * 2)
        np.testing.assert_allclose(found.query_moments[0], expected, rtol=1e-4, atol=1e-4)


def test_without_a_rotary_function_moments_say_so():
    model = models.tiny("gpt2")
    watcher = Estimator(models.N_LAYERS)
    with observe.install(model) as handle, observe.observing(watcher, handle):
        run(model, models.token_ids(3, 12))
    found = watcher.result()
    assert found.is_pre_rotary == (False,) * models.N_LAYERS
    assert found.query_moments[0].shape == (4, 16, 16)


def test_another_model_in_the_process_is_not_observed():
    first, second = models.tiny("llama"), models.tiny("llama", seed=1)
    ids = models.token_ids(1, 30)
    alone = Estimator(models.N_LAYERS)
    with observe.install(first) as handle, observe.observing(alone, handle):
        run(first, ids)
    mixed = Estimator(models.N_LAYERS)
    with (
        observe.install(first) as handle,
        observe.install(second) as other,
        observe.observing(mixed, handle),
    ):
        run(second, ids)
        run(first, ids)
        run(second, ids)
    assert other is not handle
    left, right = alone.result(), mixed.result()
    assert np.array_equal(left.distances, right.distances)
    assert right.n_prefill_rows == 30


def test_nothing_is_seen_without_an_estimator_or_in_a_pause():
    model = models.tiny("llama")
    ids = models.token_ids(1, 30)
    watcher = Estimator(models.N_LAYERS)
    with observe.install(model) as handle:
        run(model, ids)
        with observe.observing(watcher, handle):
            observe.push(None)
            run(model, ids)
            observe.pop()
    assert watcher.result().n_prefill_rows == 0


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_model_let_go_in_the_middle_of_a_pass_is_watched_no_more(is_paused):
    """Nothing runs at the end of such a pass; the thread must not keep its estimator for that."""
    model, other = models.tiny("llama"), models.tiny("qwen2")
    ids = models.token_ids(1, 30)
    watcher = Estimator(models.N_LAYERS)
    kept = weakref.ref(watcher)
    n_before = len(observe._thread.stack)
    with observe.install(other) as other_handle:
        handle = observe.install(model)
        watch = observe.begin(watcher, handle)
        run(model, ids[:, :9])
        thread = threading.Thread(target=handle.remove)
        thread.start()
        thread.join()
        if is_paused:
            observe.push(None)
            observe.pop()
        second = Estimator(models.N_LAYERS)
        with observe.observing(second, other_handle):
            run(other, ids)
        assert len(observe._thread.stack) == n_before
        assert second.result().n_prefill_rows == 30
        observe.end(watch, is_failed=True)  # late, and for whatever follows without consequence
        assert len(observe._thread.stack) == n_before
        del watcher, watch
        gc.collect()
        assert kept() is None


def test_a_model_installed_again_is_another_one():
    model = models.tiny("llama")
    ids = models.token_ids(1, 30)
    watcher = Estimator(models.N_LAYERS)
    handle = observe.install(model)
    observe.push(watcher, handle)
    handle.remove()
    with observe.install(model):
        run(model, ids)
    assert watcher.result().n_prefill_rows == 0
    assert observe._thread.stack == []


def test_observers_nest():
    model = models.tiny("llama")
    ids = models.token_ids(1, 30)
    outer, inner = Estimator(models.N_LAYERS), Estimator(models.N_LAYERS)
    with observe.install(model) as handle, observe.observing(outer, handle):
        run(model, ids)
        with observe.observing(inner, handle):
            run(model, ids[:, :10])
        run(model, ids)
    assert inner.result().n_prefill_rows == 10
    assert outer.result().n_prefill_rows == 60


def test_threads_observe_apart():
    model = models.tiny("llama")
    barrier = threading.Barrier(2)
    watchers = [Estimator(models.N_LAYERS), Estimator(models.N_LAYERS)]

    def work(watcher, n_tokens):
        with observe.observing(watcher, handle):
            barrier.wait()
            run(model, models.token_ids(n_tokens, n_tokens))

    with observe.install(model) as handle:
        threads = [
            threading.Thread(target=work, args=arguments)
            for arguments in zip(watchers, (20, 33), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [watcher.result().n_prefill_rows for watcher in watchers] == [20, 33]


def test_an_exception_in_the_forward_pass_leaves_no_trace():
    model = models.tiny("llama")
    before = picture(model)
    ids = models.token_ids(1, 30)
    watcher = Estimator(models.N_LAYERS)
    with observe.install(model) as handle:
        _, layers = decoder_layers(model)

        def die(*_):
            raise RuntimeError("no more power")

        hook = layers[2][1].register_forward_pre_hook(die)
        with (
            pytest.raises(RuntimeError, match="no more power"),
            observe.observing(watcher, handle),
        ):
            run(model, ids)
        hook.remove()
        with observe.observing(watcher, handle):
            run(model, ids)
    found = watcher.result()
    assert found.n_prefill_rows == 30
    assert np.isfinite(found.distances).all()
    assert picture(model) == before


def test_whatever_observation_stumbles_over_the_model_runs_on():
    model = models.tiny("llama")
    ids = models.token_ids(1, 30)
    plain = run(model, ids).logits

    class Broken(Estimator):
        def collect(self, *_, **__):
            raise ValueError("something unforeseen")

    watcher = Broken(models.N_LAYERS)
    with observe.install(model) as handle, observe.observing(watcher, handle):
        observed = run(model, ids).logits
    assert torch.equal(plain, observed)
    assert watcher.result().skipped == "something unforeseen"


def test_a_bias_on_the_scores_is_not_passed_over():
    model = models.tiny("llama", attn_implementation="eager")
    ids = models.token_ids(1, 12)
    bias = torch.triu(torch.full((12, 12), torch.finfo(torch.float32).min), 1)[None, None]
    bias = bias - 0.5 * torch.tril(torch.ones(12, 12))
    watcher = Estimator(models.N_LAYERS)
    with observe.install(model) as handle, observe.observing(watcher, handle):
        run(model, ids, bias)
    found = watcher.result()
    assert found.n_prefill_rows == 0
    assert "adds a bias" in found.skipped


def test_handles_are_counted_and_removal_restores_all():
    model = models.tiny("llama")
    before = picture(model)
    first = observe.install(model)
    second = observe.install(model)
    twin = copy.deepcopy(model)
    assert picture(model) != before
    first.remove()
    first.remove()
    watcher = Estimator(models.N_LAYERS)
    with observe.observing(watcher):
        run(twin, models.token_ids(1, 30))  # its modules are not the installed ones
        run(model, models.token_ids(1, 30))
    assert watcher.result().n_prefill_rows == 30
    second.remove()
    assert picture(model) == before
    after = Estimator(models.N_LAYERS)
    with observe.observing(after):
        run(model, models.token_ids(1, 30))
    assert after.result().n_prefill_rows == 0


def test_a_local_entry_of_the_registry_comes_back():
    model = models.tiny("llama")
    registry = globals_of(model)["ALL_ATTENTION_FUNCTIONS"]
    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return registry._global_mapping["sdpa"](*args, **kwargs)

    registry["sdpa"] = mine
    try:
        watcher = Estimator(models.N_LAYERS)
        with observe.install(model) as handle, observe.observing(watcher, handle):
            run(model, models.token_ids(1, 30))
        assert registry._local_mapping["sdpa"] is mine
    finally:
        del registry["sdpa"]
    assert len(calls) == models.N_LAYERS
    assert watcher.result().n_prefill_rows == 30


def test_compiled_code_is_passed_by():
    model = models.tiny("llama")
    ids = models.token_ids(1, 30)
    plain = run(model, ids).logits
    watcher = Estimator(models.N_LAYERS)
    torch._dynamo.reset()
    with observe.install(model) as handle, observe.observing(watcher, handle):
        observed = run(torch.compile(model, backend="eager"), ids).logits
    torch._dynamo.reset()
    assert torch.equal(plain, observed)
    assert watcher.result().n_prefill_rows == 0


@pytest.mark.parametrize("name", ["falcon", "bloom", "gptj"])
def test_attention_outside_the_registry_is_refused(name):
    model = models.tiny(name)
    with pytest.raises(krul.UnsupportedModelError, match="ALL_ATTENTION_FUNCTIONS"):
        observe.install(model)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_watch_names_the_layers_that_came_by(name):
    model = models.tiny(name)
    before = picture(model)
    with observe.watch(model) as seen:
        run(model, models.token_ids(1, 9))
    assert sorted(seen) == list(range(models.N_LAYERS))
    assert all(shape[2] == 9 for shape in seen.values())
    assert picture(model) == before


def test_half_precision_is_observed_in_half_precision():
    model = models.tiny("llama", dtype=torch.bfloat16)
    ids = models.token_ids(1, 40)
    watcher = Estimator(models.N_LAYERS, rows="all")
    with observe.install(model) as handle, observe.observing(watcher, handle):
        run(model, ids)
    exact = Estimator(models.N_LAYERS, rows="all")
    single = models.tiny("llama")
    with observe.install(single) as handle, observe.observing(exact, handle):
        run(single, ids)
    left, right = watcher.result(), exact.result()
    # the layers' inputs are bfloat16 here: 2^-8 in each of a few roundings, on peaked attention
    np.testing.assert_allclose(left.distances, right.distances, rtol=0.15, atol=0.3)
    np.testing.assert_allclose(left.received.sum(), right.received.sum(), rtol=1e-5)
