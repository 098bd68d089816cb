"""krul.Profile: the fit against float64 NumPy, what a file may say, and which model it is for."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest
import torch
from models import tiny
from reference import profile_reference as reference

import krul
from krul import arrays
from krul import profile as profile_module
from krul.calibrate import code, restored, table_class, value_metrics
from krul.fingerprint import Fingerprint
from krul.moments import LearnedLayer, ModelForm, Moments, model_form
from krul.profile import (
    N_SYMBOLS,
    PROFILE_MAGIC,
    PROFILE_VERSION,
    TABLE_SCALES,
    TABLE_TOTAL,
    Profile,
    frequency_table,
    solve,
)
from krul.rotary import Rotary, rotate

N_HEADS, DIM, N_TOKENS, N_LAYERS = 2, 4, 600, 4
WIDTH = 2 * N_HEADS * DIM
ROTARY = Rotary("half", 0, np.float32([1.0, 0.25]), 1.0)


def made_form():
    """Four layers of one kind, the third of which takes no part."""
    fingerprint = Fingerprint("ab" * 32, np.arange(256, dtype=np.float32), {"dtype": "float32"}, ())
    sources = {0: (), 1: (0,), 3: (0, 1)}
    layers = tuple(
        LearnedLayer(sources[i], 0, N_HEADS, DIM, DIM, ROTARY) if i in sources else None
        for i in range(N_LAYERS)
    )
    return ModelForm(fingerprint, layers, (None, None, "layer 2 is left out", None))


def made_data(seed=0):
    """Correlated rows of three layers, their keys and values as a cache has them, and queries."""
    random = np.random.default_rng(seed)
    mix = {i: random.normal(size=(6, WIDTH)) for i in (0, 1, 3)}
    hidden = random.normal(size=(N_TOKENS, 6))
    rows = {
        i: np.float32(hidden @ m + random.normal(size=(N_TOKENS, WIDTH)) * 0.3 + 3 * m[0])
        for i, m in mix.items()
    }
    positions = np.arange(N_TOKENS)
    cos, sin = map(torch.from_numpy, ROTARY.tables(positions))
    keys, values, queries = {}, {}, {}
    for i, x in rows.items():
        parts = torch.from_numpy(x).reshape(N_TOKENS, 2, N_HEADS, DIM).permute(1, 2, 0, 3)
        keys[i], values[i] = rotate(parts[0], cos, sin), parts[1]
        plain = random.normal(size=(2 * N_HEADS, 50, DIM)) @ np.diag([3.0, 1.0, 1.0, 0.2])
        places = np.arange(50) * 3
        tables = [torch.from_numpy(t).double() for t in ROTARY.tables(places)]
        queries[i] = (rotate(torch.from_numpy(plain), *tables), places)
        queries[i] += (plain,)
    return rows, keys, values, positions, queries


def made_moments():
    rows, keys, values, positions, queries = made_data()
    moments = Moments(made_form())
    moments.add(keys, values, positions, {i: pair[:2] for i, pair in queries.items()})
    return moments, rows, queries


def made_profile(**options):
    moments, rows, queries = made_moments()
    random = np.random.default_rng(5)
    metrics = {}
    for i in (0, 1, 3):
        half = random.normal(size=(N_HEADS, DIM, DIM))
        metrics[i] = half @ half.transpose(0, 2, 1)
    sensitivities = random.uniform(0.1, 1, size=(2, N_LAYERS))
    sensitivities[1, 1] = 1e-4  # clamped
    sensitivities[:, 2] = 0
    options = {"rank": "full", "sensitivities": sensitivities, **options}
    return solve(moments, metrics, 1000, **options), rows, queries, metrics, sensitivities


@pytest.fixture(scope="module")
def fitted():
    return made_profile()


# ---- the fit -------------------------------------------------------------------------------------


def test_fit_is_the_reference(fitted):
    profile, rows, queries, metrics, sensitivities = fitted
    places = {0: 0, 1: 1, 3: 2}
    key_metrics = []
    for i in places:
        plain = queries[i][2].reshape(N_HEADS, -1, DIM)
        heads = []
        for head in plain:
            second = head.T @ head / len(head)
            turns = [
                reference.turn_matrix("half", 0, ROTARY.frequencies, DIM, d)
                for d in reference.DISTANCES
            ]
            heads.append(np.mean([t @ second @ t.T for t in turns], axis=0))
        key_metrics.append(heads)
    wanted = reference.solve(
        [rows[i].astype(np.float64) for i in places],
        [tuple(places[s] for s in made_form().layers[i].sources) for i in places],
        key_metrics,
        [metrics[i] for i in places],
        sensitivities[:, list(places)],
    )
    for i, (mean, weight, plain_map, left) in zip(places, wanted, strict=True):
        layer = profile.layers[i]
        np.testing.assert_allclose(layer.mean, mean, rtol=1e-6, atol=1e-6)
        # Stored in float16, which is right to 2 ** -11 of a number; three matrices enter a product.
        bound = 4 * 2.0**-11
        if layer.sources:
            difference = np.linalg.norm(layer.maps - plain_map)
            # The weights' inverses magnify their rounding by their condition.
            assert difference <= bound * np.linalg.cond(weight) * np.linalg.norm(plain_map)
        # What the basis does not fix by itself: coefficients do not correlate, and have deviations.
        inside = np.linalg.inv(weight)
        basis = inside @ layer.forward
        np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH), atol=2e-2)
        coefficients = layer.forward.T @ inside.T @ left @ inside @ layer.forward
        size = np.diag(coefficients).max()
        np.testing.assert_allclose(coefficients, np.diag(np.diag(coefficients)), atol=0.01 * size)
        np.testing.assert_allclose(
            np.sqrt(np.diag(coefficients)), layer.deviation, rtol=0.02, atol=0.01 * size**0.5
        )
        assert (np.diff(layer.deviation) <= 0).all()


def test_forward_and_backward_undo_each_other(fitted):
    for layer in fitted[0].layers:
        if layer is not None:
            both = layer.forward.astype(np.float64) @ layer.backward
            np.testing.assert_allclose(both, np.eye(WIDTH), atol=1e-5)


def test_prediction_leaves_less(fitted):
    profile, rows, *_ = fitted
    layer = profile.layers[3]
    z = {i: rows[i] - profile.layers[i].mean for i in (0, 1, 3)}
    left = z[3] - np.concatenate([z[0], z[1]], axis=1) @ layer.maps
    assert ((left @ layer.forward) ** 2).sum() < 0.3 * ((z[3] @ layer.forward) ** 2).sum()


def test_code_is_the_reference_and_errors_stay_small(fitted):
    profile, rows, *_ = fitted
    layers = {
        i: (layer.sources, layer.mean, layer.forward, layer.backward, layer.maps)
        for i, layer in enumerate(profile.layers)
        if layer is not None
    }
    step = 0.5
    mine = code(profile, {i: torch.from_numpy(x) for i, x in rows.items()}, step)
    wanted = reference.code(rows, layers, step, 4)
    for i, x in wanted.items():
        layer = profile.layers[i]
        error = (rows[i] - mine[i].numpy()) @ layer.forward
        assert np.abs(error).max() <= step / 2 * (1 + 1e-3)  # closed loop: half a step each
        np.testing.assert_array_less(np.abs(error[:4]), 1e-4)
        # A coefficient on the border of two integers may fall to either side.
        differs = np.abs(mine[i].numpy() - x).max(1) > 1e-3
        assert differs.mean() < 0.01


def test_the_same_sums_give_the_same_file(fitted):
    again = made_profile()[0]
    assert again.digest == fitted[0].digest
    assert Profile.__name__ in repr(again)


def test_fitted_is_saved_is_loaded(fitted, tmp_path):
    profile = fitted[0]
    path = tmp_path / "one"
    profile.save(path)
    loaded = Profile.load(path)
    assert path.stat().st_size == profile.n_bytes == loaded.n_bytes
    assert loaded.digest == profile.digest == hashlib.sha256(path.read_bytes()[:-32]).hexdigest()
    assert os.listdir(tmp_path) == ["one"]
    assert sum(loaded.sizes.values()) == loaded.n_bytes
    np.testing.assert_array_equal(loaded.tables, profile.tables)
    for one, other in zip(loaded.layers, profile.layers, strict=True):
        assert (one is None) == (other is None)
        for name in ("mean", "forward", "backward", "maps", "deviation"):
            if one is not None:
                array = getattr(one, name)
                np.testing.assert_array_equal(array, getattr(other, name))
                assert array.dtype == np.float32
                assert array.flags.c_contiguous
    assert loaded.layers[3] is loaded.layers[3]
    assert loaded.layers[2] is None
    assert loaded.reasons[2] == "layer 2 is left out"
    assert loaded.layers[-1].sources == (0, 1)
    with pytest.raises(IndexError):
        loaded.layers[4]


# ---- low rank ------------------------------------------------------------------------------------


def test_full_rank_is_the_whole_map(fitted):
    low = made_profile(rank=WIDTH)[0]
    for i in (1, 3):
        one, other = low.layers[i].maps, fitted[0].layers[i].maps
        assert np.linalg.norm(one - other) <= 0.02 * np.linalg.norm(other)


def test_rank_is_what_it_says_and_less_costs_more(fitted):
    n_bytes = fitted[0].n_bytes
    energy = []
    for rank in (1, 3, 8):
        low = made_profile(rank=rank)[0]
        layer = low.layers[3]
        assert layer.left.shape == (2 * WIDTH, rank)
        assert layer.right.shape == (rank, WIDTH)
        np.testing.assert_allclose(layer.maps, layer.left @ layer.right, atol=1e-5)
        assert np.linalg.matrix_rank(layer.maps.astype(np.float64), tol=1e-4) == rank
        energy.append(float((layer.deviation.astype(np.float64) ** 2).sum()))
        if rank == 1:
            assert low.n_bytes < n_bytes
    assert energy[0] > energy[1] > energy[2]


def test_rank_is_spent_where_it_saves_bits(monkeypatch):
    noise = profile_module._NOISE

    def n_bits(rank):
        deviation = made_profile(rank=rank)[0].layers[3].deviation.astype(np.float64)
        return np.log2(1 + deviation**2 / noise).sum() / 2

    by_bits = {rank: n_bits(rank) for rank in (1, 3, "full")}
    # With this noise variances alone count, as in the ordinary regression of reduced rank.
    monkeypatch.setattr(profile_module, "_NOISE", 1e6)
    assert n_bits(1) > by_bits[1] > by_bits[3] > by_bits["full"]


@pytest.mark.parametrize(("n_parameters", "rank"), [(10**6, None), (20_000, 2), (1, 1)])
def test_small_rank_holds_one_per_cent(n_parameters, rank):
    # Whole maps: 3 * 16 * 16 = 768 numbers. Per rank: (1 + 1 + 2 + 1) * 16 = 80.
    moments, *_ = made_moments()
    assert solve(moments, {}, n_parameters, rank="small").rank == rank
    assert solve(moments, {}, n_parameters).rank is None


@pytest.mark.parametrize("rank", [0, -1, WIDTH + 1, 1.5, True, "half"])
def test_rank_out_of_range(rank):
    moments, *_ = made_moments()
    with pytest.raises(ValueError, match="rank is"):
        solve(moments, {}, 1000, rank=rank)


# ---- tables --------------------------------------------------------------------------------------


def test_tables_are_frequencies(fitted):
    for tables in (fitted[0].tables, profile_module._default_tables()):
        assert tables.shape == (len(TABLE_SCALES), N_SYMBOLS)
        assert tables.dtype == np.uint16
        assert (tables.sum(1, dtype=np.int64) == TABLE_TOTAL).all()
        assert tables[:, [127, 255]].min() >= 1


def test_scales_cover_what_occurs():
    assert len(TABLE_SCALES) <= 64
    assert TABLE_SCALES[0] <= 0.032
    assert TABLE_SCALES[-1] >= 60
    np.testing.assert_array_equal(table_class(TABLE_SCALES), np.arange(len(TABLE_SCALES)))


@pytest.mark.parametrize("seed", range(5))
def test_frequency_table_follows_the_counts(seed):
    random = np.random.default_rng(seed)
    counts = random.exponential(size=N_SYMBOLS) ** (3 * seed)
    table = frequency_table(counts)
    assert table.sum(dtype=np.int64) == TABLE_TOTAL
    part = counts / counts.sum() * TABLE_TOTAL
    always = [127, 255]
    is_rare = part < 0.2
    is_rare[always] = False
    assert (table[is_rare] == 0).all()
    assert (table[~is_rare] >= 1).all()
    assert is_rare.any() == (seed > 0)
    part[255] += part[is_rare].sum()
    # None of those above 1 loses more than what the small ones are raised by.
    assert (table <= np.ceil(np.maximum(part, 1))).all()


def test_frequency_table_of_one_symbol():
    for symbol in (0, 126, 254):
        table = frequency_table(np.eye(N_SYMBOLS)[symbol])
        assert table[[symbol, 127, 255]].tolist() == [TABLE_TOTAL - 2, 1, 1]
    table = frequency_table(np.eye(N_SYMBOLS)[127])
    assert table[[127, 255]].tolist() == [TABLE_TOTAL - 1, 1]
    table = frequency_table(np.eye(N_SYMBOLS)[255])
    assert table[[127, 255]].tolist() == [1, TABLE_TOTAL - 1]


def test_rare_symbols_count_for_the_escape():
    counts = np.zeros(N_SYMBOLS)
    counts[127], counts[:100] = TABLE_TOTAL - 10, 0.1
    table = frequency_table(counts)
    assert table[[127, 255]].tolist() == [TABLE_TOTAL - 10, 10]


def bits_of(counts, table):
    """What symbols take, 8 bits more where they are written as escapes."""
    is_escape = table == 0
    frequency = np.where(is_escape, table[255], table).astype(float)
    is_escape[255] = True
    return (counts * (np.log2(TABLE_TOTAL / frequency) + 8 * is_escape)).sum() / counts.sum()


@pytest.mark.parametrize("scale", TABLE_SCALES[3:27:4])
def test_leaving_rare_symbols_out_saves_bits(scale):
    counts = profile_module.laplace_counts(scale)
    table = frequency_table(counts)
    entropy = -(counts * np.log2(np.maximum(counts, 1e-300))).sum()
    # Every symbol at least 1, as a coder without escapes for them would need it.
    room = TABLE_TOTAL - N_SYMBOLS
    full = 1 + counts * room
    assert bits_of(counts, table) < bits_of(counts, full) - 0.02 * (scale < 10)
    # The kept ones are the best that a threshold gives, within what rounding to 4096 parts costs.
    assert bits_of(counts, table) < entropy + 0.02


@pytest.mark.parametrize("counts", [np.zeros(256), np.ones(255), -np.ones(256)])
def test_frequency_table_refuses(counts):
    with pytest.raises(ValueError, match="counts is"):
        frequency_table(counts)


# ---- files that are not as they should be --------------------------------------------------------


def small_contents():
    """The smallest profile: one layer of width 4, and tables."""
    fingerprint = Fingerprint("cd" * 32, np.zeros(256, np.float32), {}, ())
    layer = LearnedLayer((), 0, 1, 2, 2, Rotary("half", 0, np.ones(1, np.float32), 1.0))
    moments = Moments(ModelForm(fingerprint, (layer,), (None,)))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(1, 40, 2)))
    moments.add({0: x}, {0: x.flip(1)}, np.arange(40))
    return solve(moments, {}, 1000)._contents


def refused_or_equal(contents, original):
    try:
        profile = Profile(contents)
    except (krul.CorruptionError, krul.FormatError):
        return
    assert profile.digest == original.digest


def test_every_flipped_byte_is_found():
    contents = small_contents()
    original = Profile(contents)
    for place in range(len(contents)):
        changed = bytearray(contents)
        changed[place] ^= 1 << (place % 8)
        with pytest.raises((krul.CorruptionError, krul.FormatError)):
            Profile(bytes(changed))
    refused_or_equal(contents, original)


def test_every_truncation_is_found():
    contents = small_contents()
    for n_bytes in [*range(300), *range(300, len(contents), 97), len(contents) - 1]:
        with pytest.raises((krul.CorruptionError, krul.FormatError)):
            Profile(contents[:n_bytes])
    with pytest.raises(krul.CorruptionError, match="bytes but says"):
        Profile(contents + b"\0")


def rewritten(change):
    """Return contents with a right digest and a header or arrays that somebody has changed."""
    meta, parts, _ = arrays.decode(small_contents(), PROFILE_MAGIC, PROFILE_VERSION, "a profile")
    parts = {name: part.copy() for name, part in parts.items()}
    change(meta, parts)
    return arrays.encode(PROFILE_MAGIC, PROFILE_VERSION, meta, parts)


def put(name, value):
    def change(meta, parts):
        parts[name] = value

    return change


def only(symbol):
    """Tables that give all to one symbol."""
    return np.tile(np.uint16(TABLE_TOTAL * np.eye(N_SYMBOLS)[symbol]), (len(TABLE_SCALES), 1))


def set_layer(**values):
    return lambda meta, parts: meta["layers"][0].update(values)


def set_rotary(**values):
    return lambda meta, parts: meta["layers"][0]["rotary"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda meta, parts: meta.pop("layers"), "layers"),
        (lambda meta, parts: meta.update(layers=5), "garbles"),
        (lambda meta, parts: meta.update(layers=[]), "layers 0"),
        (lambda meta, parts: meta.update(model=[]), "garbles"),
        (lambda meta, parts: meta.update(n_tokens=-1), "n_tokens"),
        (lambda meta, parts: meta.update(n_tokens=True), "n_tokens"),
        (lambda meta, parts: meta.update(rank=0), "rank"),
        (lambda meta, parts: meta.update(reasons=[]), "reasons"),
        (set_layer(n_heads=0), "n_heads"),
        (set_layer(n_heads=1 << 40), "n_heads"),
        (set_layer(n_heads=1 << 20), "but must be"),
        (set_layer(key_dim=3), "but must be"),
        (set_layer(sources=[0]), "no earlier layer"),
        (set_layer(sources=[0, 1, 2]), "sources"),
        (set_layer(sources=[-1]), "source"),
        (set_rotary(start=1), "rotary"),
        (set_rotary(convention="other"), "rotary"),
        (set_rotary(scaling=0.0), "rotary"),
        (set_rotary(scaling=1), "rotary"),
        (lambda meta, parts: parts.pop("0 mean"), "missing"),
        (put("0 mean", np.zeros(5, np.float32)), "but must be"),
        (put("0 mean", np.zeros(4, np.float64)), "but must be"),
        (put("0 mean", np.full(4, np.nan, np.float32)), "not finite"),
        (put("0 basis", np.full((4, 4), np.inf, np.float16)), "not finite"),
        (put("0 key scale", np.zeros(1, np.float32)), "not positive"),
        (put("behaviour", np.zeros(255, np.float32)), "behaviour"),
        (put("tables", np.zeros((34, 256), np.uint16)), "table"),
        (put("tables", np.full((34, 256), 17, np.uint16)), "has the sum 4352"),
        (put("tables", only(127)), "symbol 255 the frequency 0"),
        (put("tables", only(255)), "symbol 255 the frequency 4096"),
    ],
)
def test_nonsense_with_a_right_digest_is_refused(change, words):
    with pytest.raises(krul.FormatError, match=words):
        Profile(rewritten(change))


def with_header(header, n_extra=0):
    header = header.ljust(-(-(32 + len(header)) // 64) * 64 - 32, b" ")
    n_bytes = 32 + len(header) + n_extra + 32
    head = struct.pack("<8sIIQQ", PROFILE_MAGIC, PROFILE_VERSION, 0, len(header), n_bytes)
    body = head + header + b"\0" * n_extra
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{}",
        b"{" * 10_000,
        b'{"arrays":[["a","float32",[1],0],["a","float32",[1],0]]}',
        b'{"arrays":[["a","float32",[1073741824,1073741824,1073741824],0]]}',
        b'{"arrays":[["a","float32",[-1],0]]}',
        b'{"arrays":[["a","object",[1],0]]}',
        b'{"arrays":[["a","float32",[1],-64]]}',
        b'{"arrays":[["a","float32",[1],1]]}',
        b'{"arrays":[["a","float32",[true],0]]}',
        b'{"arrays":[[["a"],"float32",[1],0]]}',
        b'{"arrays":[],"n":NaN}',
        b"\xff\xfe",
    ],
)
def test_headers_of_no_sense_are_refused(header):
    with pytest.raises(krul.FormatError):
        Profile(with_header(header, 64))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other"
    for contents in (b"", b"krul", b"PK\x03\x04" * 100, json.dumps({"a": 1}).encode()):
        path.write_bytes(contents)
        with pytest.raises((krul.FormatError, krul.CorruptionError), match="other"):
            Profile.load(path)
    path.write_bytes(small_contents()[:8] + struct.pack("<I", 2) + small_contents()[12:])
    with pytest.raises(krul.FormatError, match="version 2 but this krul reads 1"):
        Profile.load(path)
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    path = tmp_path / "one"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        fitted[0].save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["one"]


# ---- whose it is ---------------------------------------------------------------------------------


def filled(model, seed=0):
    """Moments of random rows in the shapes of a model."""
    form = model_form(model)
    moments = Moments(form)
    random = torch.Generator().manual_seed(seed)
    keys, values = {}, {}
    for i, layer in enumerate(form.layers):
        if layer is not None:
            keys[i] = torch.randn(layer.n_heads, 400, layer.key_dim, generator=random)
            values[i] = torch.randn(layer.n_heads, 400, layer.value_dim, generator=random)
    moments.add(keys, values, np.arange(400))
    return moments


def test_check_knows_its_model():
    model = tiny("llama")
    profile = Profile.from_moments(filled(model), model)
    profile.check(model)
    with pytest.raises(krul.MismatchError, match="the profile is of another model: weights differ"):
        profile.check(tiny("llama", 1))
    with pytest.raises(krul.MismatchError, match="dtype differs"):
        profile.check(tiny("llama", dtype=torch.bfloat16))


def test_restored_is_what_went_in():
    model = tiny("gemma3")
    form = model_form(model)
    random = torch.Generator().manual_seed(1)
    keys = {i: torch.randn(2, 30, 16, generator=random) for i in range(4)}
    values = {i: torch.randn(2, 30, 16, generator=random) for i in range(4)}
    positions = np.arange(100, 130)
    rows = Moments.rows_of(form, keys, values, positions)
    for i, (key, value) in restored(form, rows, positions).items():
        torch.testing.assert_close(key, keys[i], atol=1e-5, rtol=0)
        torch.testing.assert_close(value, values[i], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon"])
def test_value_metric_is_the_output_projection(name):
    model = tiny(name)
    metrics = value_metrics(model, model_form(model))
    assert sorted(metrics) == [0, 1, 2, 3]
    weights = [p for n, p in model.named_parameters() if ".0." in n and "attention" in n.lower()]
    weights += [p for n, p in model.named_parameters() if ".0." in n and "attn.o_proj" in n]
    weight = next(p for p in weights if p.shape == (64, 64))
    n_heads = len(metrics[0])
    per_head = weight.detach().double().numpy().reshape(64, n_heads, -1, 16)
    wanted = np.einsum("ohgd,ohge->hde", per_head, per_head)
    np.testing.assert_allclose(metrics[0], wanted, rtol=1e-10)


def test_sources_stay_within_a_kind():
    form = model_form(tiny("gemma3"))
    windows = [layer.window for layer in form.layers]
    assert [layer.sources for layer in form.layers] == [(), (), (0,), (1,)]
    for layer in form.layers:
        assert all(windows[source] == layer.window for source in layer.sources)
    assert [layer.sources for layer in model_form(tiny("llama")).layers] == [
        (),
        (0,),
        (0, 1),
        (1, 2),
    ]


def test_a_model_without_a_rule_is_refused():
    with pytest.raises(krul.UnsupportedModelError, match="no layer can be learned: layer 0"):
        model_form(tiny("gpt2"))
