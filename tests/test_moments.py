"""krul.moments: sums over tokens, in any order and any portions, and files of them."""

import numpy as np
import pytest
import torch

import krul
from krul.fingerprint import Fingerprint
from krul.moments import LearnedLayer, ModelForm, Moments
from krul.rotary import Rotary, rotate

ROTARY = Rotary("interleaved", 2, np.float32([1.0]), 1.25)


def form(exact="ab" * 32):
    fingerprint = Fingerprint(exact, np.zeros(256, np.float32), {"dtype": "float32"}, ())
    layers = (LearnedLayer((), 0, 2, 4, 3, ROTARY), None, LearnedLayer((0,), 0, 2, 4, 3, ROTARY))
    return ModelForm(fingerprint, layers, (None, "no rule", None))


def states(n_tokens, seed=0):
    random = np.random.default_rng(seed)
    plain = {i: random.normal(size=(2, n_tokens, 4)) + 5 for i in (0, 2)}
    values = {i: torch.from_numpy(random.normal(size=(2, n_tokens, 3))) for i in (0, 2)}
    return plain, values


def turned(plain, positions):
    tables = [torch.from_numpy(table).double() for table in ROTARY.tables(positions)]
    return {
        i: rotate(torch.from_numpy(x), *tables, convention="interleaved", start=2)
        for i, x in plain.items()
    }


def parts(moments):
    return moments.to_parts()[1]


def same(one, other, rtol=0.0):
    for name, array in parts(one).items():
        np.testing.assert_allclose(array, parts(other)[name], rtol=rtol, atol=rtol, err_msg=name)


def test_sums_are_those_of_the_unrotated_rows():
    n_tokens, positions = 2500, np.arange(7, 2507)
    plain, values = states(n_tokens)
    queries = np.random.default_rng(3).normal(size=(6, 10, 4))
    places = np.arange(0, 100, 10)
    moments = Moments(form())
    moments.add(
        turned(plain, positions),
        values,
        positions,
        {2: (turned({0: queries}, places)[0], places)},
    )
    rows = {
        i: np.concatenate(
            [
                plain[i].transpose(1, 0, 2).reshape(n_tokens, -1),
                values[i].numpy().transpose(1, 0, 2).reshape(n_tokens, -1),
            ],
            axis=1,
        )
        for i in (0, 2)
    }
    # K is rounded to float32, and again after it is turned back.
    close = {"rtol": 1e-6, "atol": 1e-5 * n_tokens}
    for i in (0, 2):
        np.testing.assert_allclose(moments.sum(f"{i} sum"), rows[i].sum(0), **close)
        np.testing.assert_allclose(moments.sum(f"{i} second"), rows[i].T @ rows[i], **close)
    np.testing.assert_allclose(moments.sum("2 with 0"), rows[0].T @ rows[2], **close)
    grouped = queries.reshape(2, 30, 4)
    np.testing.assert_allclose(
        moments.sum("2 queries"), grouped.transpose(0, 2, 1) @ grouped, rtol=1e-6, atol=1e-5
    )
    assert moments.sum("2 query count")[0] == 30
    assert moments.sum("0 query count")[0] == 0
    assert moments.n_tokens == n_tokens


def test_portions_add_up_and_merge():
    plain, values = states(90)
    positions = np.arange(90)
    keys = turned(plain, positions)
    whole, first, second = Moments(form()), Moments(form()), Moments(form())
    whole.add(keys, values, positions)
    for target, at in ((first, slice(0, 40)), (second, slice(40, 90))):
        target.add(
            {i: x[:, at] for i, x in keys.items()},
            {i: x[:, at] for i, x in values.items()},
            positions[at],
        )
    first.merge(second)
    assert first.n_tokens == 90
    same(first, whole, 1e-12)
    assert second.n_tokens == 50


def test_saved_is_loaded(tmp_path):
    plain, values = states(20)
    moments = Moments(form())
    moments.add(turned(plain, np.arange(20)), values, np.arange(20))
    moments.save(tmp_path / "sums")
    loaded = Moments.load(tmp_path / "sums")
    same(loaded, moments)
    loaded.merge(moments)  # what was loaded goes on
    assert loaded.n_tokens == 40
    assert loaded.form.reasons == (None, "no rule", None)
    contents = bytearray((tmp_path / "sums").read_bytes())
    contents[len(contents) // 2] ^= 1
    (tmp_path / "sums").write_bytes(contents)
    with pytest.raises(krul.CorruptionError, match="digest"):
        Moments.load(tmp_path / "sums")


@pytest.mark.parametrize("kind", ["keys", "values", "queries"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_adds_nothing(kind, value):
    plain, values = states(20)
    keys, positions = turned(plain, np.arange(20)), np.arange(20)
    queries = {2: (torch.ones(2, 3, 4), np.arange(3))}
    {"keys": keys[2], "values": values[2], "queries": queries[2][0]}[kind][1, 2, 0] = value
    moments = Moments(form())
    with pytest.raises(ValueError, match=f"{kind} of layer 2 hold numbers that are not finite"):
        moments.add(keys, values, positions, queries)
    same(moments, Moments(form()))
    assert moments.n_tokens == 0


def test_shapes_are_checked():
    plain, values = states(20)
    keys, positions = turned(plain, np.arange(20)), np.arange(20)
    moments = Moments(form())
    with pytest.raises(krul.ShapeError, match="lack layer 2"):
        moments.add({0: keys[0]}, values, positions)
    with pytest.raises(krul.ShapeError, match=r"keys of layer 0 are \(2, 20, 4\) but must be"):
        moments.add(keys, values, positions[:-1])
    with pytest.raises(krul.ShapeError, match=r"values of layer 0 are \(2, 20, 4\) but must be"):
        moments.add(keys, keys, positions)
    for bad in (torch.ones(3, 3, 4), torch.ones(2, 2, 4), torch.ones(2, 3, 5), torch.ones(3, 4)):
        with pytest.raises(krul.ShapeError, match="queries of layer 0"):
            moments.add(keys, values, positions, {0: (bad, np.arange(3))})
    same(moments, Moments(form()))


def test_moments_of_another_model_do_not_merge():
    with pytest.raises(krul.MismatchError, match="of model cd"):
        Moments(form()).merge(Moments(form("cd" * 32)))
