"""krul.calibrate: texts in, a profile out; what was interrupted goes on, wrong input is refused."""

import json
import os
import random
import warnings

import numpy as np
import pytest
import torch
from models import tiny, workable
from test_rotary import LATENT, WITHOUT

import krul
from krul import calibrate, cli, observe
from krul.calibrate import code, fit, restored
from krul.model import Recorder, run_decoder, text_config
from krul.moments import Moments, model_form


def tokenizer(text):
    return {"input_ids": [3 + ord(letter) % 120 for letter in text]}


def made_texts(n_texts=3, n_letters=500, seed=1):
    """Texts of made-up words, so that tokens follow from those before."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghij", k=4)) for _ in range(12)]
    return [" ".join(dice.choices(words, k=n_letters // 5)) for _ in range(n_texts)]


OPTIONS = {"context_tokens": 250, "sensitivity_texts": 1, "progress": False, "rank": "full"}


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def fitted(model):
    return fit(model, tokenizer, made_texts(), **OPTIONS)


def states_of(model, text):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    cache = Recorder(text_config(model))
    with torch.no_grad():
        run_decoder(model.model, ids, cache)
    pairs = {layer: cache.key_value(layer) for layer in cache.seen}
    keys = {layer: pair[0][0] for layer, pair in pairs.items()}
    values = {layer: pair[1][0] for layer, pair in pairs.items()}
    return ids, keys, values


def test_moments_are_those_of_the_texts(model, monkeypatch):
    kept = []
    solve = calibrate.solve
    monkeypatch.setattr(
        calibrate, "solve", lambda moments, *a, **k: kept.append(moments) or solve(moments, *a, **k)
    )
    texts = made_texts(2, 250)
    fit(model, tokenizer, texts, **OPTIONS)
    wanted = Moments(model_form(model))
    for text in texts:
        _, keys, values = states_of(model, text)
        wanted.add(
            {i: x[:, 4:] for i, x in keys.items()},
            {i: x[:, 4:] for i, x in values.items()},
            np.arange(4, keys[0].shape[1]),
        )
    assert kept[0].n_tokens == wanted.n_tokens
    for i in range(4):
        np.testing.assert_allclose(kept[0].sum(f"{i} second"), wanted.sum(f"{i} second"), rtol=1e-9)
        # Every eighth query of each head but those of the first tokens: 8, 16, ... 248.
        n_rows = sum(len(range(8, len(text), 8)) for text in texts)
        assert kept[0].sum(f"{i} query count")[0] == 2 * n_rows


def test_queries_are_those_before_rotation(model):
    form = model_form(model)
    ids = torch.tensor([tokenizer(made_texts()[0])["input_ids"][:64]])
    seen = []
    hook = model.model.layers[2].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: seen.append(out[0])
    )
    with torch.no_grad():
        states, tap = calibrate._prefill(model, ids)
    hook.remove()
    moments = Moments(form)
    calibrate._add(moments, states, tap, 4)
    plain = seen[0][8::8].double().reshape(-1, 4, 16).transpose(0, 1)  # 4 heads for 2 of K
    grouped = plain.reshape(2, -1, 16)
    wanted = (grouped.transpose(1, 2) @ grouped).numpy()
    size = np.abs(wanted).max()
    np.testing.assert_allclose(moments.sum("2 queries"), wanted, atol=1e-5 * size)


def test_sensitivities_are_measured(fitted):
    assert fitted.sensitivities.shape == (2, 4)
    assert (fitted.sensitivities > 0).all()


def test_an_error_costs_what_it_says(model, fitted):
    # K of a layer whose numbers come from the codec alone changes what the model says, and no
    # more than that: with the exact states it says the same.
    ids, keys, values = states_of(model, made_texts()[0][:200])
    states = {i: (keys[i][None, :, :150], values[i][None, :, :150]) for i in keys}
    with torch.no_grad():
        exact = calibrate._logits(model, ids[:, 150:], states)
        whole = torch.log_softmax(model(ids).logits[0, 150:], -1)
    torch.testing.assert_close(exact, whole, atol=1e-4, rtol=0)


def test_a_finer_step_is_nearer(model, fitted):
    _, keys, values = states_of(model, made_texts(seed=2)[0])
    positions = np.arange(keys[0].shape[1])
    rows = Moments.rows_of(fitted.form, keys, values, positions)
    distances = []
    for step in (1.0, 0.1, 0.01):
        back = restored(fitted.form, code(fitted, rows, step), positions)
        distances.append(sum((back[i][0] - keys[i]).norm().item() for i in keys))
    assert distances[0] > 5 * distances[1] > 25 * distances[2]


def test_tables_are_counted(fitted):
    from krul.profile import TABLE_SCALES, _default_tables

    symbols = np.arange(255) - 127
    for scale, table in zip(TABLE_SCALES[9:25], fitted.tables[9:25], strict=True):
        spread = np.sqrt((table[:255] * symbols**2.0).sum() / table[:255].sum())
        assert spread < 3 * scale + 1
        assert (table > 0).sum() < 256  # what hardly occurs is left out
        assert table[:127].tolist() == pytest.approx(table[254:127:-1].tolist(), abs=1)
    assert (fitted.tables != _default_tables()).any()


def test_the_same_texts_give_the_same_profile(model, fitted):
    assert fit(model, tokenizer, made_texts(), **OPTIONS).digest == fitted.digest


def test_the_model_is_left_as_it_was(model):
    before = {name: id(module) for name, module in model.named_modules()}
    model.train()
    try:
        fit(model, tokenizer, made_texts(), **OPTIONS)
        assert model.training
    finally:
        model.eval()
    assert before == {name: id(module) for name, module in model.named_modules()}
    assert not observe._seats.get(model.model.layers[0].self_attn)


@pytest.mark.parametrize("name", workable())
def test_every_family_is_learned_or_refused(name):
    model = tiny(name)
    options = {"context_tokens": 600, "sensitivity_texts": 1, "progress": False, "rank": "full"}
    texts = made_texts(2, 600)
    if name in WITHOUT | LATENT and model_layers(model) == 0:
        with pytest.raises(krul.UnsupportedModelError, match="no layer can be learned"):
            fit(model, tokenizer, texts, **options)
        return
    profile = fit(model, tokenizer, texts, **options)
    profile.check(model)
    for layer, reason in zip(profile.layers, profile.reasons, strict=True):
        assert (layer is None) == (reason is not None)
        for name in ("mean", "forward", "backward", "maps", "deviation"):
            assert layer is None or np.isfinite(getattr(layer, name)).all()


def model_layers(model):
    from krul.rotary import find_rotary

    return sum(one is not None for one in find_rotary(model)[0])


def test_bfloat16_models_are_learned():
    model = tiny("llama", dtype=torch.bfloat16)
    profile = fit(model, tokenizer, made_texts(), **OPTIONS)
    profile.check(model)


def test_krul_has_it(model, fitted, tmp_path):
    profile = krul.Profile.fit(model, tokenizer, made_texts(), **OPTIONS)
    assert profile.digest == fitted.digest


# ---- pieces --------------------------------------------------------------------------------------


def test_pieces_take_turns():
    texts = ["a" * 250, "b" * 120, "c" * 10]
    pieces = calibrate._pieces(tokenizer, texts, 10_000, 100, 4)
    letters = [(chr(piece[0] - 3), len(piece)) for piece in pieces]
    assert letters == [("a", 100), ("b", 100), ("a", 100), ("b", 20), ("a", 50)]
    cut = calibrate._pieces(tokenizer, texts, 230, 100, 4)
    assert [len(piece) for piece in cut] == [100, 100, 30]


def test_pieces_are_no_longer_than_the_model_allows():
    model = tiny("gptj", max_position_embeddings=128)
    fit(model, tokenizer, made_texts(4, 400), **{**OPTIONS, "context_tokens": 1000})


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "leave 0 tokens but .* at least 256"),
        ([""], {}, "leave 0 tokens"),
        (["too short"], {}, "leave 0 tokens"),
        (["a" * 200], {}, "leave 196 tokens"),
        (["a" * 900], {"max_tokens": 99}, "leave 95 tokens"),
        (["a" * 900], {"max_tokens": 0}, "max_tokens is 0"),
        (["a" * 900], {"context_tokens": 0}, "context_tokens is 0"),
        (["a" * 900], {"keep_first": -1}, "keep_first is -1"),
        (["a" * 900], {"sensitivity_texts": 0.5}, "sensitivity_texts is 0.5"),
        (["a" * 900], {"rank": 99}, "rank is 99"),
    ],
)
def test_bad_input(model, texts, options, words):
    with pytest.raises(ValueError, match=words):
        fit(model, tokenizer, texts, **{**OPTIONS, **options})


def test_texts_are_strings(model):
    with pytest.raises(TypeError, match="texts is a str"):
        fit(model, tokenizer, "words" * 1000)
    with pytest.raises(TypeError, match="text 1 is bytes"):
        fit(model, tokenizer, ["words", b"words"])


@pytest.mark.parametrize("where", ["k_proj", "v_proj"])
def test_a_broken_model_is_refused(where):
    model = tiny("llama")
    with torch.no_grad():
        getattr(model.model.layers[1].self_attn, where).weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="K and V of the model are not finite"):
        fit(model, tokenizer, made_texts(), **OPTIONS)


def test_not_finite_in_a_text_is_named(model, monkeypatch):
    prefill = calibrate._prefill

    def spoiled(inner, ids):
        states, tap = prefill(inner, ids)
        states[2][1][0, 1, 9, 3] = float("nan")
        return states, tap

    monkeypatch.setattr(calibrate, "_prefill", spoiled)
    with pytest.raises(ValueError, match="piece 0 of 6: values of layer 2 hold numbers"):
        fit(model, tokenizer, made_texts(), **OPTIONS)


# ---- interrupted ---------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("n_pieces", [1, 4])
def test_an_interrupted_calibration_goes_on(model, fitted, tmp_path, monkeypatch, n_pieces):
    path = tmp_path / "half"
    add, calls = calibrate._add, []

    def counting(*arguments):
        if len(calls) == n_pieces:
            raise Interrupted
        calls.append(1)
        add(*arguments)

    monkeypatch.setattr(calibrate, "_add", counting)
    with pytest.raises(Interrupted):
        fit(model, tokenizer, made_texts(), checkpoint=path, **OPTIONS)
    assert path.exists()
    calls.clear()
    monkeypatch.setattr(calibrate, "_add", lambda *a: (calls.append(1), add(*a)))
    profile = fit(model, tokenizer, made_texts(), checkpoint=path, **OPTIONS)
    assert len(calls) == 6 - n_pieces
    assert profile.digest == fitted.digest
    assert not path.exists()


def test_measured_costs_are_kept(model, tmp_path, monkeypatch):
    path = tmp_path / "half"
    options = {**OPTIONS, "sensitivity_texts": 3}
    wanted = fit(model, tokenizer, made_texts(), **options)
    costs, calls = calibrate._costs, []

    def counting(*arguments):
        if len(calls) == 2:
            raise Interrupted
        calls.append(1)
        return costs(*arguments)

    monkeypatch.setattr(calibrate, "_costs", counting)
    with pytest.raises(Interrupted):
        fit(model, tokenizer, made_texts(), checkpoint=path, **options)
    calls[:] = [1]
    assert fit(model, tokenizer, made_texts(), checkpoint=path, **options).digest == wanted.digest


@pytest.fixture
def half(model, tmp_path, monkeypatch):
    """Return the checkpoint of a calibration that was interrupted after its texts."""
    path = tmp_path / "half"

    def stop(*arguments):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_costs", stop)
        with pytest.raises(Interrupted):
            fit(model, tokenizer, made_texts(), checkpoint=path, **OPTIONS)
    return path


@pytest.mark.parametrize(
    ("seed", "texts", "options", "words"),
    [
        (1, 1, {}, "model is"),
        (0, 2, {}, "texts is"),
        (0, 1, {"keep_first": 5}, "keep_first is 4 there and 5 here"),
        (0, 1, {"rank": 3}, "rank is full there and 3 here"),
    ],
)
def test_a_checkpoint_of_another_calibration_is_refused(half, seed, texts, options, words):
    before = half.read_bytes()
    with pytest.raises(krul.MismatchError, match=f"half: .*{words}.*remove the file"):
        fit(
            tiny("llama", seed),
            tokenizer,
            made_texts(seed=texts),
            checkpoint=half,
            **{**OPTIONS, **options},
        )
    assert half.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(model, half):
    contents = half.read_bytes()
    for damaged, error in (
        (contents[:-1], krul.CorruptionError),
        (contents[:5000] + b"?" + contents[5001:], krul.CorruptionError),
        (b"something else" * 10, krul.FormatError),
    ):
        half.write_bytes(damaged)
        with pytest.raises(error, match="remove the file to begin again"):
            fit(model, tokenizer, made_texts(), checkpoint=half, **OPTIONS)


def test_a_checkpoint_needs_a_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory for a checkpoint"):
        fit(model, tokenizer, made_texts(), checkpoint=tmp_path / "no" / "where", **OPTIONS)


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def on_disk(model, tmp_path, monkeypatch):
    """Return a folder with a model and a file of text; tokens are letters."""
    import transformers

    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: tokenizer)
    (tmp_path / "text").write_text("\n".join(made_texts()))
    return tmp_path


def arguments(folder, *more):
    return ["calibrate", str(folder / "model"), "--texts", str(folder / "text"), *more]


def test_calibrate_writes_a_profile(on_disk, model, capsys):
    out = on_disk / "profile"
    assert cli.main(arguments(on_disk, "--out", str(out), "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    profile = krul.Profile.load(out)
    profile.check(model)
    assert told["digest"] == profile.digest
    assert told["rank"] is None
    assert told["maps_part"] == pytest.approx(5 * 64 * 64 / calibrate.n_parameters(model), abs=2e-4)
    assert told["n_bytes"] == out.stat().st_size == sum(told["bytes_by_part"].values())
    assert sorted(path.name for path in on_disk.iterdir()) == ["model", "profile", "text"]
    assert cli.main(arguments(on_disk, "--out", str(out), "--rank", "small")) == 0
    assert "maps are stored of rank 2, " in capsys.readouterr().out
    assert cli.main(arguments(on_disk, "--out", str(out), "--rank", "full")) == 0
    said = capsys.readouterr().out
    assert "4 of 4 layers" in said
    assert "stored whole, 14.6% as many numbers as the model has" in said


def test_calibrate_installs_into_a_store(on_disk, model, capsys):
    place = str(on_disk / "store")
    assert cli.main(arguments(on_disk, "--store", place, "--rank", "full", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["store"]) == (None, place)
    with krul.Store(place) as store:
        assert store.profiles.find(model_form(model).fingerprint).digest == told["digest"]
        assert sorted(name[-8:] for name in os.listdir(store.profiles.shared)) == [
            ".profile",
            "lock",
        ]
        with store.open("chat", model) as cache:
            assert cache.profile.digest == told["digest"]
    both = arguments(on_disk, "--store", place, "--out", str(on_disk / "profile"), "--rank", "3")
    assert cli.main(both) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{on_disk / 'profile'}, store {place}: ")
    with krul.Store(place) as store:
        newest = store.profiles.find(model_form(model).fingerprint)
        assert newest.rank == 3
        assert newest.digest == krul.Profile.load(on_disk / "profile").digest
        assert len(store.profiles.infos()) == 2


def test_an_interrupted_calibration_for_a_store_goes_on(on_disk, model, monkeypatch, capsys):
    place = str(on_disk / "store")
    costs, calls = calibrate._costs, []

    def stop(*options):
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_costs", stop)
        assert cli.main(arguments(on_disk, "--store", place, "--rank", "full")) == 1
    kept = [path.name for path in (on_disk / "store" / ".profiles").iterdir()]
    assert [name for name in kept if name.endswith(".checkpoint")] == kept
    monkeypatch.setattr(calibrate, "_costs", costs)
    add = calibrate._add
    monkeypatch.setattr(calibrate, "_add", lambda *a: (calls.append(2), add(*a)))
    assert cli.main(arguments(on_disk, "--store", place, "--rank", "full")) == 0
    assert calls == [1]  # no text was read again
    with krul.Store(place) as store:
        assert store.profiles.find(model_form(model).fingerprint) is not None


@pytest.mark.parametrize(
    ("rank", "n_warnings"), [(None, 1), ("full", 0), ("small", 0)], ids=["default", "full", "small"]
)
def test_large_maps_are_told_unless_they_are_meant(model, rank, n_warnings):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        krul.Profile.fit(model, tokenizer, made_texts(), **{**OPTIONS, "rank": rank})
    found = [one for one in found if "maps" in str(one.message)]
    assert len(found) == n_warnings
    for one in found:  # two layers' maps of 2 * 64 * 64 and one of 64 * 64, two bytes each
        assert "maps will take 40,960 bytes" in str(one.message)
        assert f"{5 * 64 * 64 / calibrate.n_parameters(model):.1%}" in str(one.message)
        assert one.filename == __file__


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--out", "{}/no/profile"], 2, "no directory"),
        (["--out", "{}/profile", "--texts", "{}/nothing"], 2, "nothing is not there"),
        (["--out", "{}/profile", "--texts", "{}/binary"], 2, "no UTF-8 text"),
        (["--out", "{}/profile", "--texts", "{}/short"], 1, "leave 0 tokens"),
        (["--out", "{}/profile", "--rank", "none"], 2, "usage"),
        (["--store", "valkey://localhost"], 2, "supports a directory"),
        (["--store", "{}/text"], 1, "a file stands where"),
        ([], 2, "one of --out and --store is needed"),
    ],
)
def test_calibrate_refuses(on_disk, capsys, more, status, words):
    (on_disk / "binary").write_bytes(b"\xff\xfe\x00")
    (on_disk / "short").write_text("words")
    assert cli.main(arguments(on_disk, *(word.format(on_disk) for word in more))) == status
    assert words in capsys.readouterr().err
    assert not (on_disk / "profile").exists()
