"""Learning from saves: the sums are those of the tokens, a profile comes when there are enough."""

import dataclasses
import multiprocessing
import os
import random
import signal
import stat
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from models import tiny

import krul
from krul import learn as learning
from krul.learn import learn
from krul.moments import Moments, model_form
from krul.profile import Profile
from krul.profiles import moments_name
from krul.save import _prepare
from krul.store import Store

N_TOKENS = 300
WIDTH = 2 * 2 * 16
SETTINGS = krul.Settings(learn_profile=True, codec="int8")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


@pytest.fixture(autouse=True)
def save_learns(monkeypatch):
    """Saves learn nothing by themselves here, until `save_learns()` is called."""
    monkeypatch.setattr("krul.save.learn", lambda work, notes: None)
    return lambda: monkeypatch.setattr("krul.save.learn", learn)


@pytest.fixture
def early(monkeypatch):
    """Enough tokens for a first profile after one conversation of these tests."""
    monkeypatch.setattr(learning, "_FIRST", 4)


def words(n_tokens=N_TOKENS, seed=0, n_batch=1):
    """Token ids that follow from those before, so that layers correlate."""
    dice = random.Random(seed)
    texts = [[dice.randrange(3, 120) for _ in range(6)] for _ in range(8)]
    rows = [
        [token for _ in range(n_tokens // 6 + 1) for token in dice.choice(texts)]
        for _ in range(n_batch)
    ]
    return torch.tensor(rows)[:, :n_tokens]


def feed(model, cache, ids, **more):
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, **more)


def work_of(cache):
    return _prepare(cache, cache._take_snapshot())


def learned(cache):
    notes = []
    learn(work_of(cache), notes)
    learning.wait()
    return notes


def moments_of(store, model):
    form = model_form(model)
    return Moments.load(os.path.join(store.profiles.own, moments_name(form.fingerprint.exact)))


def plain_sums(model, ids, positions, first, mask=None):
    """Second moments of K before rotary embedding beside V, by hooks, in float64."""
    seen = {}

    def keep(index, kind):
        return lambda module, args, out: seen.__setitem__((index, kind), out.double().numpy())

    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(keep(index, name))
        for index, layer in enumerate(model.model.layers)
        for name in ("k_proj", "v_proj")
    ]
    with torch.no_grad():
        model(ids, position_ids=positions, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    out = {}
    for index in range(len(model.model.layers)):
        rows = np.concatenate([seen[index, "k_proj"], seen[index, "v_proj"]], axis=2)[:, first:]
        if mask is not None:
            rows = rows[mask[:, first:].numpy() != 0]
        out[index] = rows.reshape(-1, rows.shape[-1])
    return out


def test_sums_are_those_of_the_new_tokens(store, model):
    ids = words()
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, ids[:, :200])
        assert learned(cache) == []
        cache.save()
        feed(model, cache, ids[:, 200:])
        assert learned(cache) == []
    rows = plain_sums(model, ids, torch.arange(N_TOKENS)[None], SETTINGS.keep_first)
    moments = moments_of(store, model)
    assert moments.n_tokens == N_TOKENS - 4
    for index, x in rows.items():
        size = np.abs(x.T @ x).max()
        np.testing.assert_allclose(moments.sum(f"{index} second"), x.T @ x, atol=2e-4 * size)
        if index:
            cross = rows[index - 1].T @ x
            name = f"{index} with {index - 1}"
            np.testing.assert_allclose(
                moments.sum(name), cross, atol=2e-4 * np.abs(cross).max() + 1e-9
            )


def test_a_save_learns(store, model, save_learns):
    save_learns()
    for codec, n_tokens in (("int8", N_TOKENS), ("exact", 2 * N_TOKENS)):
        settings = krul.Settings(learn_profile=True, codec=codec)
        with store.open(codec, model, settings=settings) as cache:
            feed(model, cache, words(seed=n_tokens))
            cache.save()
        assert moments_of(store, model).n_tokens == n_tokens - 4 * n_tokens // N_TOKENS


def test_padding_and_positions_are_minded(store, model):
    ids = words(120, n_batch=2)
    mask = torch.ones(2, 120, dtype=torch.int64)
    mask[1, :30] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, ids, attention_mask=mask, position_ids=positions)
        assert learned(cache) == []
    rows = plain_sums(model, ids, positions, 4, mask)
    moments = moments_of(store, model)
    assert moments.n_tokens == 116 + 90
    for index, x in rows.items():
        size = np.abs(x.T @ x).max()
        np.testing.assert_allclose(moments.sum(f"{index} second"), x.T @ x, atol=2e-4 * size)


def test_conversations_add_up_and_models_are_apart(store, model):
    other = tiny("llama", 1)
    for name, one, seed in (("a", model, 0), ("b", model, 1), ("c", other, 2)):
        with store.open(name, one, settings=SETTINGS) as cache:
            feed(one, cache, words(100, seed))
            learned(cache)
    assert moments_of(store, model).n_tokens == 2 * 96
    assert moments_of(store, other).n_tokens == 96
    assert stat.S_IMODE(os.stat(store.profiles.own).st_mode) == 0o700
    for name in os.listdir(store.profiles.own):
        assert stat.S_IMODE(os.stat(os.path.join(store.profiles.own, name)).st_mode) == 0o600


def test_queries_come_from_the_estimator(store, model):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words())
        work = work_of(cache)
        assert learned(cache) == []
    moments = moments_of(store, model)
    assert work.similarity is not None
    for index, mean in enumerate(work.similarity.query_moments):
        assert work.similarity.is_pre_rotary[index]
        assert moments.sum(f"{index} query count")[0] == N_TOKENS - 4
        np.testing.assert_allclose(moments.sum(f"{index} queries") / (N_TOKENS - 4), mean)


def test_queries_after_rotation_are_left_out(store, model):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words())
        work = work_of(cache)
        seen = dataclasses.replace(work.similarity, is_pre_rotary=(True, False, True, True))
        learn(dataclasses.replace(work, similarity=seen), [])
    moments = moments_of(store, model)
    counts = [moments.sum(f"{index} query count")[0] for index in range(4)]
    assert counts == [N_TOKENS - 4, 0, N_TOKENS - 4, N_TOKENS - 4]
    assert not moments.sum("1 queries").any()


def test_without_an_estimator_there_are_no_queries(store, model):
    settings = dataclasses.replace(SETTINGS, estimator_rows=0)
    with store.open("chat", model, settings=settings) as cache:
        feed(model, cache, words())
        assert learned(cache) == []
    assert moments_of(store, model).sum("0 query count")[0] == 0


def test_off_nothing_is_kept(store, model):
    with store.open("chat", model) as cache:
        assert not cache.settings.learn_profile
        feed(model, cache, words())
        assert learned(cache) == []
    assert not os.path.exists(store.profiles.own)


def test_no_new_tokens_add_nothing(store, model):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(3))
        learned(cache)  # all of them are kept exact
        feed(model, cache, words(100))
        learned(cache)
        cache.save()
        before = moments_of(store, model).n_tokens
        assert learned(cache) == []
    assert moments_of(store, model).n_tokens == before == 99


# ---- the fit -------------------------------------------------------------------------------------


def test_a_profile_comes_when_there_are_enough(store, model, early):
    needed = 4 * WIDTH
    notes = []
    for seed in range(6):
        with store.open(f"chat {seed}", model, settings=SETTINGS) as cache:
            feed(model, cache, words(104, seed))
            notes.append(learned(cache))
    made = [seed for seed, said in enumerate(notes) if said]
    # 100 tokens a conversation, 256 needed; the next at twice the 300 that the first one had.
    assert made == [2, 5]
    assert -(-needed // 100) == 3
    assert notes[2] == ["a profile is being learned from 300 tokens"]
    newest = store.profiles.find(model_form(model).fingerprint)
    assert newest.n_tokens == 600
    newest.check(model)
    # It is this tenant's alone.
    assert os.path.dirname(store.profiles.infos()[0].path) == store.profiles.own


def test_what_is_learned_codes_in_fewer_bits_than_without_prediction(store, model, early):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(400))
        (note,) = learned(cache)
    assert note == "a profile is being learned from 396 tokens"
    profile = store.profiles.find(model_form(model).fingerprint)
    moments = moments_of(store, model)
    for index in (1, 2, 3):
        weight = profile.layers[index].forward.astype(np.float64)
        n = moments.n_tokens
        mean = moments.sum(f"{index} sum") / n
        plain = moments.sum(f"{index} second") / n - np.outer(mean, mean)
        alone = np.diag(weight.T @ plain @ weight)
        predicted = profile.layers[index].deviation.astype(np.float64) ** 2
        assert np.log2(1 + predicted / 0.03).sum() < np.log2(1 + alone / 0.03).sum()


def test_tables_are_those_of_its_coefficients(store, model, early):
    from krul.profile import _default_tables

    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(400))
        learned(cache)
    profile = store.profiles.find(model_form(model).fingerprint)
    assert (profile.tables != _default_tables()).any()


def test_sensitivities_of_the_one_before_are_taken_over(store, model, early):
    from test_calibrate import OPTIONS, made_texts, tokenizer

    fitted = Profile.fit(model, tokenizer, made_texts(), **OPTIONS)
    assert (fitted.sensitivities > 0).all()
    store.add_profile(fitted)
    n_seen = 0
    while n_seen < fitted.n_tokens:
        # No profile from fewer tokens takes the place of one from more.
        assert store.profiles.find(fitted.fingerprint).digest == fitted.digest
        with store.open(f"chat {n_seen}", model, settings=SETTINGS) as cache:
            feed(model, cache, words(404, n_seen))
            notes = learned(cache)
        n_seen += 400
    assert len(notes) == 1
    newest = store.profiles.find(fitted.fingerprint)
    assert newest.n_tokens == n_seen
    np.testing.assert_array_equal(newest.sensitivities, fitted.sensitivities)


def test_it_stops_when_more_would_change_nothing(store, model, early, monkeypatch):
    monkeypatch.setattr(learning, "_LAST", 6)
    for seed in range(3):
        with store.open(f"chat {seed}", model, settings=SETTINGS) as cache:
            feed(model, cache, words(404, seed))
            learned(cache)
    assert moments_of(store, model).n_tokens == 400


# ---- nothing of this fails a save ----------------------------------------------------------------


def test_a_model_that_is_too_wide_is_said(store, model, monkeypatch):
    monkeypatch.setattr(learning, "_MAX_MOMENTS_BYTES", 1000)
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words())
        (note,) = learned(cache)
    assert "at most 1,000 are kept" in note
    assert "krul calibrate" in note
    assert not any(name.endswith(".moments") for name in os.listdir(store.profiles.own))


@pytest.mark.parametrize("how", ["flipped", "cut", "profile", "empty"])
def test_damaged_moments_are_begun_again(store, model, how):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(200))
        learned(cache)
        path = os.path.join(store.profiles.own, moments_name(cache.fingerprint.exact))
        with open(path, "rb") as file:
            contents = bytearray(file.read())
        if how == "flipped":
            contents[5000] ^= 1
        contents = {"cut": contents[:-5], "profile": b"krulprof" * 9, "empty": b""}.get(
            how, contents
        )
        with open(path, "wb") as file:
            file.write(contents)
        (note,) = learned(cache)
    assert "begun again" in note
    assert moments_of(store, model).n_tokens == 196


@pytest.mark.parametrize("error", [ValueError("no"), OSError(28, "full"), MemoryError("little")])
def test_errors_become_notes(store, model, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(learning, "_save", fail)
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words())
        (note,) = learned(cache)
        cache.save()
    assert note.startswith(f"nothing was learned: {type(error).__name__}")
    assert store.verify() == []


def test_numbers_that_are_not_finite_spoil_nothing(store, model):
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(100))
        learned(cache)
    before = moments_of(store, model)
    with store.open("other", model, settings=SETTINGS) as cache:
        feed(model, cache, words(100, 1))
        cache.layers[2].keys[0, 0, 50, 3] = float("nan")
        (note,) = learned(cache)
    assert "layer 2 hold numbers that are not finite" in note
    after = moments_of(store, model)
    assert after.n_tokens == before.n_tokens
    np.testing.assert_array_equal(after.sum("1 second"), before.sum("1 second"))


def test_a_failed_fit_is_not_tried_again_at_once(store, model, early, monkeypatch):
    def fail(*_, **__):
        raise ValueError("singular")

    monkeypatch.setattr(learning, "solve", fail)
    n_warnings = []
    for seed in range(3):
        with store.open(f"chat {seed}", model, settings=SETTINGS) as cache:
            feed(model, cache, words(304, seed))
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                learned(cache)
            n_warnings.append(sum("ValueError: singular" in str(one.message) for one in found))
    assert n_warnings == [1, 1, 0]
    assert moments_of(store, model).n_tokens == 900
    assert store.profiles.infos() == []


def test_a_save_does_not_wait_for_the_fit(store, model, early, monkeypatch):
    gate, fitted = threading.Event(), learning.solve

    def slow(*options, **more):
        assert gate.wait(60)
        return fitted(*options, **more)

    monkeypatch.setattr(learning, "solve", slow)
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(400))
        notes = []
        learn(work_of(cache), notes)
        assert notes == ["a profile is being learned from 396 tokens"]
        assert store.profiles.infos() == []
        # Others learn meanwhile: no lock is held.
        with store.open("other", model, settings=SETTINGS) as other:
            feed(model, other, words(100, 1))
            learn(work_of(other), notes)
        assert moments_of(store, model).n_tokens == 396 + 96
        gate.set()
        learning.wait()
    (info,) = store.profiles.infos()
    assert info.n_tokens == 396


def test_a_model_without_such_layers_is_said(store):
    model = tiny("gpt2")
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(100))
        (note,) = learned(cache)
    assert "UnsupportedModelError: no layer can be learned" in note


def test_sliding_layers_give_what_they_hold(store):
    model = tiny("gemma2")
    with store.open("chat", model, settings=SETTINGS) as cache:
        feed(model, cache, words(100))
        work = work_of(cache)
        held = [state.tensors[0].shape[2] for state in work.layers]
        assert min(held) < 100
        assert learned(cache) == []
    assert 0 < moments_of(store, model).n_tokens <= min(held)


def learn_in_process(path, seeds):
    torch.set_num_threads(1)
    model = tiny("llama")
    with Store(path) as store:
        for seed in seeds:
            with store.open(f"chat {seed}", model, settings=SETTINGS) as cache:
                feed(model, cache, words(54, seed))
                assert learned(cache) == []


def test_processes_learn_at_once(tmp_path, model):
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=learn_in_process, args=(tmp_path, range(3 * i, 3 * i + 3)))
        for i in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with Store(tmp_path) as store:
        assert moments_of(store, model).n_tokens == 6 * 50


def test_a_forked_child_has_a_thread_of_its_own():
    done = []
    learning._start(lambda: done.append("here"))
    learning.wait()
    child = os.fork()
    if child == 0:
        learning._start(lambda: done.append("there"))
        learning.wait()
        os._exit(len(done))
    for _ in range(600):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child's fit never ran")
    assert os.waitstatus_to_exitcode(status) == 2


def test_settings_refuse_what_is_no_bool():
    with pytest.raises(ValueError, match="learn_profile is 1 but must be True or False"):
        krul.Settings(learn_profile=1)


def test_query_means_are_checked(model):
    moments = Moments(model_form(model))
    good = np.ones((2, 16, 16), np.float32)
    with pytest.raises(krul.ShapeError, match=r"layer 1 is \(1, 16, 16\) but must be"):
        moments.add_query_means({0: good, 1: good[:1]}, 5)
    with pytest.raises(ValueError, match="layer 1 is not finite"):
        moments.add_query_means({0: good, 1: good * np.nan}, 5)
    assert moments.sum("0 query count")[0] == 0
    moments.add_query_means({0: good}, 5)
    moments.add_query_means({0: 3 * good}, 15)
    np.testing.assert_allclose(moments.sum("0 queries"), 50 * good)
    assert moments.sum("0 query count")[0] == 20
