"""Codec predict: blocks against float64 NumPy, chains, damage, every backend and BLAS library."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import predict_reference as reference
from tolerance import UNIT, one_rounding

import krul
from krul import _core, blas

torch = pytest.importorskip("torch")

BACKENDS = [name for name, is_usable, _ in _core.backends() if is_usable]
DTYPES = ("float32", "float16", "bfloat16")
CONVENTIONS = {"none": 0, "half": 1, "interleaved": 2}
UNIT_TABLE, N_TABLES = 15, 34
STEP = 0.5


def tables(n_tables=N_TABLES):
    """Laplace distributions, three to an octave; what is rarer than a slot is left out."""
    distance = np.abs(np.arange(256) - 127)
    out = np.zeros((n_tables, 256), np.uint16)
    for index in range(n_tables):
        share = np.exp(-distance * np.sqrt(2) / 2 ** ((index - UNIT_TABLE) / 3))
        out[index] = np.floor(share / share.sum() * 4000)
        out[index, 255] = 8
        out[index, 127] += 4096 - out[index].sum()
    return out


def rotation(random, convention, head_dim, n_tokens, n_batch=None):
    """Make what a layer says of its rotary embedding."""
    if convention == "none":
        return {}
    is_partial = convention == "partial"
    n_pairs = max(head_dim // 4, 1) if is_partial else head_dim // 2
    start = head_dim - 2 * n_pairs if is_partial else 0
    scaling = 1.3 if is_partial else 1.0
    shape = (n_tokens,) if n_batch is None else (n_batch, n_tokens)
    positions = random.integers(0, 100_000, shape)
    angle = positions[..., None] * 10_000.0 ** (-np.arange(n_pairs) / n_pairs)
    return {
        "convention": "half" if is_partial else convention,
        "start": start,
        "cos": np.float32(scaling * np.cos(angle)),
        "sin": np.float32(scaling * np.sin(angle)),
    }


def made_profile(
    n_heads=2,
    head_dim=8,
    sources=((), (0,), (1, 0)),
    convention="half",
    n_tokens=40,
    n_batch=1,
    seed=0,
    rank=0,
    are_batches_apart=False,
):
    """Make a profile whose bases are orthogonal but for weights, and whose maps are small."""
    random = np.random.default_rng(seed)
    width = 2 * n_heads * head_dim
    rotary = rotation(
        random, convention, head_dim, n_tokens, n_batch if are_batches_apart else None
    )
    layers = []
    for own in sources:
        if own is None:
            layers.append(None)
            continue
        basis, _ = np.linalg.qr(random.standard_normal((width, width)))
        weight = np.exp(0.3 * random.standard_normal(width))
        size = 0.6 / np.sqrt(max(len(own), 1) * width)
        maps = size * random.standard_normal((len(own) * width, width))
        left = size * random.standard_normal((len(own) * width, rank))
        right = random.standard_normal((rank, width)) * 0.6
        has_maps, has_factors = bool(own) and not rank, bool(own) and rank > 0
        layers.append(
            reference.Layer(
                n_heads=n_heads,
                head_dim=head_dim,
                mean=np.float32(random.standard_normal(width) * 2),
                deviation=np.float32(3 * np.exp(-4 * np.arange(width) / width)),
                forward=np.float32(weight[:, None] * basis),
                backward=np.ascontiguousarray(basis.T / weight, np.float32),
                sources=tuple(own),
                maps=np.float32(maps) if has_maps else None,
                left=np.float32(left) if has_factors else None,
                right=np.float32(right) if has_factors else None,
                **rotary,
            )
        )
    return reference.Profile(tables(), UNIT_TABLE, layers)


def made_arrays(profile, dtype="float32", n_batch=1, n_tokens=40, token_start=0, seed=0):
    """Make K and V of every layer that takes part, as its profile expects it, some tokens loud."""
    random = np.random.default_rng(seed)
    rows, out = {}, {}
    loud = np.exp(random.choice([-1, 0, 0, 0, 1.2], n_batch * n_tokens))[:, None]
    for index, layer in enumerate(profile.layers):
        if layer is None:
            continue
        shape = (n_batch * n_tokens, layer.width)
        own = random.laplace(0, np.sqrt(0.5), shape) * layer.deviation * loud
        rows[index] = reference.predicted(layer, rows) + own @ np.float64(layer.backward)
        out[index] = tuple(
            torch.from_numpy(np.ascontiguousarray(part)).to(getattr(torch, dtype))
            for part in reference.from_rows(layer, rows[index], n_batch, token_start)
        )
    return out


def bf16(array):
    """Return the bits of a float32 array rounded to bfloat16."""
    if array is None:
        return None
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view(np.uint16)


def predictor(
    profile,
    n_batch=1,
    n_tokens=40,
    token_start=0,
    library=None,
    is_encoding=True,
    is_narrow=False,
    is_rounded=False,
):
    """Hand the profile to krul."""
    library = library if library is not None else blas.find().handle
    layers = [
        None
        if layer is None
        else (
            layer.n_heads,
            layer.head_dim,
            layer.sources,
            0 if layer.left is None else layer.left.shape[1],
            layer.mean,
            layer.deviation,
            layer.forward if is_encoding else None,
            layer.backward,
            layer.maps,
            layer.left,
            layer.right,
            CONVENTIONS[layer.convention],
            layer.start,
            layer.n_pairs,
            layer.cos,
            layer.sin,
        )
        for layer in profile.layers
    ]
    narrow = [
        None
        if layer is None
        else tuple(map(bf16, (layer.forward, layer.backward, layer.maps, layer.left, layer.right)))
        for layer in profile.layers
    ]
    return _core.Predict(
        library,
        profile.tables,
        profile.unit_table,
        layers,
        n_batch,
        token_start,
        n_tokens,
        narrow=narrow if is_narrow else None,
        is_rounded=is_narrow or is_rounded,
    )


def encode(profile, arrays, step=STEP, start=0, fineness=None, **options):
    """Encode one chain; by layer (payload, error, power), or None where it does not fit."""
    first = next(iter(arrays.values()))[0]
    n_batch, _, n_tokens, _ = first.shape
    more = () if fineness is None else (fineness,)
    chain = [(layer, start, *both, *more) for layer, both in arrays.items()]
    made = predictor(profile, n_batch, start + n_tokens, **options)
    found = made.encode([chain], step, 1)[0]
    return None if found is None else dict(zip(arrays, found, strict=True))


def decode(profile, payloads, like, start=0, backend=None, wanted=None, **options):
    """Decode one chain between rows that must stay as they are."""
    first = next(iter(like.values()))[0]
    n_batch, _, n_tokens, _ = first.shape
    out, chain = {}, []
    for layer, payload in payloads.items():
        wide = [
            torch.full((each.shape[0], each.shape[1], n_tokens + 2, each.shape[3]), 77.0).to(
                each.dtype
            )
            for each in like[layer]
        ]
        views = [each[:, :, 1:-1] for each in wide]
        if wanted is not None and layer not in wanted:
            views = [None, None]
        else:
            out[layer] = tuple(views)
        chain.append((layer, start, n_tokens, payload, *views))
        out[layer, "wide"] = wide
    made = predictor(profile, n_batch, start + n_tokens, is_encoding=False, **options)
    made.decode([chain], 1, backend)
    for layer in payloads:
        for each in out.pop((layer, "wide")):
            assert bool((each[:, :, [0, -1]] == 77).all())
    return out


# ---- error model ---------------------------------------------------------------------------------


def bounds(profile, payloads, n_rows, is_narrow=False):
    """Return float64 rows by layer, and how far rows computed in float32 may lie from them.

    A product of float32 with k terms is off by at most (k + 4) units of the sum of the terms'
    sizes, in whatever order they are added; what a source is off is carried through the map.
    Rounding both factors to bfloat16 adds two of its units for each product on the way.
    """
    rounded = 2.1 * UNIT["bfloat16"] if is_narrow else 0.0
    unit = 2 * UNIT["float32"]
    rows, off = {}, {}
    for index, payload in payloads.items():
        layer = profile.layers[index]
        block = reference.read(profile, layer, payload, n_rows)
        rows[index] = reference.decode(profile, index, payload, rows, n_rows)
        own = np.abs(block.numbers) @ np.abs(np.float64(layer.backward))
        sized, carried = 0.0, 0.0
        if layer.sources:
            together = np.concatenate([np.abs(rows[s]) + off[s] for s in layer.sources], axis=1)
            wrong = np.concatenate([off[s] for s in layer.sources], axis=1)
            parts = [layer.maps] if layer.left is None else [layer.left, layer.right]
            for part in parts:
                together, wrong = (each @ np.abs(np.float64(part)) for each in (together, wrong))
            sized, carried = together, wrong
        n_terms = layer.width * (len(layer.sources) + 1) + 9
        if layer.left is not None:
            n_terms += layer.left.shape[1]
        rounded_maps = rounded * (1 if layer.left is None else 2)
        off[index] = carried + n_terms * unit * (own + sized) + unit * np.abs(rows[index])
        off[index] += rounded * own + rounded_maps * sized
    return rows, off


def assert_decoded(profile, payloads, found, token_start=0, dtype="float32", is_narrow=False):
    """Compare with the reference what a chain decodes to, by float32's rounding and the dtype's."""
    n_batch, _, n_tokens, _ = next(iter(found.values()))[0].shape
    rows, off = bounds(profile, payloads, n_batch * n_tokens, is_narrow)
    unit = UNIT["float32"]
    for index, (keys, values) in found.items():
        layer = profile.layers[index]
        expected = reference.from_rows(layer, rows[index], n_batch, token_start)
        # Sizes turned by sizes bound what turning does to an error; means are no part of that.
        sizes = replace(layer, mean=0 * layer.mean)
        if layer.convention != "none":
            sizes = replace(sizes, cos=np.abs(layer.cos), sin=-np.abs(layer.sin))
        reach = off[index] + 4 * unit * (np.abs(rows[index]) + np.abs(layer.mean))
        first = reference.from_rows(sizes, reach, n_batch, token_start)
        if layer.convention != "none":
            other = reference.from_rows(
                replace(sizes, sin=np.abs(layer.sin)), reach, n_batch, token_start
            )
            one, two = layer.pairs()
            first[0][..., two] = other[0][..., two]
            assert (first[0][..., one] >= 0).all()
        for each, exact, most in zip((keys, values), expected, first, strict=True):
            wrong = np.abs(each.double().numpy() - exact)
            limit = most + one_rounding(np.abs(exact) + most, dtype)
            assert (wrong <= limit).all(), (index, (wrong / limit).max())


def assert_coded_well(profile, arrays, coded, step=STEP, start=0, fineness=0):
    """The numbers are those that the reference rounds to, and classes and shifts are the best.

    Of all classes together that the best are hardly better.

    Where a coefficient lies so near to the middle of two numbers that float32 may go either way,
    either is right. Its error is a sum of roundings, each as likely up as down: 16 standard
    deviations are allowed, since what is certain would be too much to say anything.
    """
    unit = UNIT["float32"]
    n_rows = next(iter(arrays.values()))[0].shape[0] * next(iter(arrays.values()))[0].shape[2]
    rows, _ = bounds(profile, {index: coded[index][0] for index in arrays}, n_rows)
    for index, both in arrays.items():
        layer = profile.layers[index]
        payload = coded[index][0]
        exact = reference.to_rows(layer, *(each.double().numpy() for each in both), start)
        block = reference.read(profile, layer, payload, n_rows)
        assert block.step == np.float32(step)
        assert np.array_equal(block.fineness, np.resize(fineness, n_rows))
        assert reference.write(profile, layer, block) == payload
        steps = block.step * reference.row_steps(block.fineness)
        wanted = reference.coefficients(profile, index, exact, rows, steps)
        before = np.abs(exact) + np.abs(layer.mean) + np.abs(reference.predicted(layer, rows))
        row_size = np.linalg.norm(before, axis=1)
        column_size = np.linalg.norm(layer.forward, axis=0)
        margin = 16 * unit * np.sqrt(layer.width) * np.outer(column_size, row_size) / steps
        assert margin.max() < 0.05  # or the test says nothing
        assert (np.abs(block.values - wanted) <= 0.5 + margin).all()
        is_zero = ~block.values.any(1)
        assert ((block.classes == 255) == is_zero).all()
        taken = fewest = 1.0
        for column, own in zip(block.values, block.classes, strict=True):
            if own != 255:
                bits = reference.class_bits(profile, column, block.fineness)
                taken, fewest = taken + bits[own], fewest + bits.min()
        assert taken <= 1.01 * fewest + 32
        bits = reference.shift_bits(profile, block.classes, block.values, block.fineness)
        own = bits[block.shifts.astype(int) - block.fineness + 4, np.arange(n_rows)]
        assert (own <= bits.min(0) * (1 + 1e-5) + 1e-5).all()
        error, power = coded[index][1:]
        difference = ((exact - rows[index]) ** 2).sum()
        assert error == pytest.approx(difference, rel=1e-3, abs=1e-9)
        assert power == pytest.approx(((exact + layer.mean) ** 2).sum(), rel=1e-4)


def assert_chain(
    profile, dtype="float32", n_batch=1, n_tokens=40, step=STEP, seed=0, start=0, fineness=None
):
    """Encode, compare; decode, compare; let krul read what the reference writes."""
    arrays = made_arrays(profile, dtype, n_batch, n_tokens, start, seed)
    coded = encode(profile, arrays, step, start, fineness)
    of_rows = np.resize(0 if fineness is None else fineness, n_batch * n_tokens)
    assert_coded_well(profile, arrays, coded, step, start, of_rows)
    payloads = {index: payload for index, (payload, _, _) in coded.items()}
    found = decode(profile, payloads, arrays, start)
    assert_decoded(profile, payloads, found, start, dtype)
    theirs, decoded = {}, {}
    for index, both in arrays.items():
        layer = profile.layers[index]
        exact = reference.to_rows(layer, *(each.double().numpy() for each in both), start)
        theirs[index], decoded[index] = reference.encode(
            profile, index, exact, decoded, step, of_rows
        )
    found = decode(profile, theirs, arrays, start)
    assert_decoded(profile, theirs, found, start, dtype)
    return arrays, payloads


# ---- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["none", "half", "interleaved", "partial"])
@pytest.mark.parametrize("n_tokens", [1, 31, 33])
def test_chain_is_the_references(dtype, convention, n_tokens):
    profile = made_profile(convention=convention, n_tokens=n_tokens)
    assert_chain(profile, dtype, n_tokens=n_tokens)


@pytest.mark.parametrize(
    ("head_dim", "n_heads", "n_tokens"), [(64, 1, 512), (80, 1, 33), (96, 1, 31), (128, 2, 20)]
)
def test_sizes_of_real_models(head_dim, n_heads, n_tokens):
    profile = made_profile(n_heads, head_dim, ((), (0,)), n_tokens=n_tokens)
    assert_chain(profile, "bfloat16", n_tokens=n_tokens)


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_low_rank(rank):
    profile = made_profile(sources=((), (0,), (1, 0), (2,)), rank=rank)
    assert_chain(profile)


EVERY_FINENESS = np.arange(-6, 13, dtype=np.int8)


@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize(
    "fineness", [EVERY_FINENESS, np.full(19, 12, np.int8), np.full(19, -6, np.int8)]
)
def test_tokens_that_are_finer_or_coarser_than_the_step(fineness, n_batch):
    profile = made_profile(n_batch=n_batch, n_tokens=19)
    assert_chain(profile, "bfloat16", n_batch, 19, step=2.0, fineness=fineness)


def test_a_finer_token_is_nearer_and_all_others_are_as_they_were():
    profile = made_profile(2, 8, ((),), n_tokens=40)
    arrays = made_arrays(profile)
    fineness = np.zeros(40, np.int8)
    fineness[7] = 9
    plain, finer = (encode(profile, arrays, 1.0, fineness=x)[0][0] for x in (None, fineness))
    assert encode(profile, arrays, 1.0, fineness=0 * fineness)[0][0] == plain
    (found,) = decode(profile, {0: plain}, arrays).values()
    (found_finer,) = decode(profile, {0: finer}, arrays).values()
    others = np.arange(40) != 7
    for own, new, exact in zip(found, found_finer, arrays[0], strict=True):
        assert torch.equal(own[:, :, others], new[:, :, others])
        wrong, less = ((x - exact)[:, :, 7].norm() for x in (own, new))
        assert less < 0.25 * wrong


@pytest.mark.parametrize(
    ("fineness", "words"),
    [
        (np.full(40, 13, np.int8), "fineness of token 0 is 13 but must be from -6 to 12"),
        (np.full(40, -7, np.int8), "fineness of token 0 is -7"),
        (np.zeros(39, np.int8), "fineness of layer 0 is 39 numbers of format 'b' but must be 40"),
        (np.zeros(40, np.uint8), "of format 'B' but must be 40 of int8"),
    ],
)
def test_fineness_that_is_refused(fineness, words):
    profile = made_profile()
    with pytest.raises(ValueError, match=words):
        encode(profile, made_arrays(profile), fineness=fineness)


@pytest.mark.parametrize("are_batches_apart", [False, True])
def test_batches(are_batches_apart):
    profile = made_profile(n_batch=3, n_tokens=33, are_batches_apart=are_batches_apart)
    assert_chain(profile, n_batch=3, n_tokens=33)


def test_chain_in_the_middle_with_a_layer_that_takes_no_part():
    profile = made_profile(sources=(None, (), (1,), None, (1, 2), (4, 1)), n_tokens=60)
    assert_chain(profile, n_tokens=37, start=23)


def test_angles_that_begin_at_a_later_token():
    """A profile made ready for the tokens from the 23rd on, as a restore of a later part is."""
    profile = made_profile(n_tokens=60)
    arrays = made_arrays(profile, n_tokens=37, token_start=23)
    late = [replace(each, cos=each.cos[23:], sin=each.sin[23:]) for each in profile.layers]
    made = predictor(replace(profile, layers=late), n_tokens=37, token_start=23)
    coded = made.encode([[(index, 23, *both) for index, both in arrays.items()]], STEP)[0]
    assert coded == list(encode(profile, arrays, start=23).values())
    with pytest.raises(krul.ShapeError, match="37 tokens from 22 are not within the 37 from 23"):
        made.encode([[(0, 22, *arrays[0])]], STEP)


def test_the_same_source_twice_and_sources_that_end_late():
    profile = made_profile(sources=((), (0, 0), (0,), (1, 0)))
    assert_chain(profile)


@given(
    n_heads=st.integers(1, 3),
    head_dim=st.integers(1, 12),
    n_tokens=st.integers(1, 70),
    n_batch=st.integers(1, 2),
    convention=st.sampled_from(["none", "half", "interleaved", "partial"]),
    dtype=st.sampled_from(DTYPES),
    step=st.sampled_from([0.03, 0.3, 1.0, 1.5874010, 3.0, 40.0]),
    seed=st.integers(0, 2**32 - 1),
    rank=st.sampled_from([0, 0, 1, 3]),
    is_plain=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_chain(
    n_heads, head_dim, n_tokens, n_batch, convention, dtype, step, seed, rank, is_plain, data
):
    if convention != "none" and head_dim < 2:
        head_dim = 2
    sources = [()]
    for index in range(1, data.draw(st.integers(1, 4))):
        earlier = st.integers(0, index - 1)
        sources.append(tuple(data.draw(st.lists(earlier, max_size=2))))
    rank = min(rank, 2 * n_heads * head_dim)
    profile = made_profile(
        n_heads, head_dim, sources, convention, n_tokens, n_batch, seed, rank, n_batch > 1
    )
    fineness = None
    if not is_plain:
        fineness = np.random.default_rng(seed).integers(-6, 13 if step > 0.1 else 1, n_tokens)
        fineness = fineness.astype(np.int8)
    assert_chain(profile, dtype, n_batch, n_tokens, step, seed, fineness=fineness)


@given(st.floats(2.0**-40, 2.0**40, width=32))
def test_level_is_three_times_the_logarithm(value):
    level = reference.level_of(np.float32(value))
    assert 2.0 ** (level / 3) <= value * (1 + 1e-12)
    assert value < 2.0 ** ((level + 1) / 3) * (1 + 1e-12)


def test_levels_at_every_edge():
    """Deviations around all thirds of octaves: the classes expected are the reference's."""
    width = 2 * 200
    edges = np.float32(2.0 ** (np.arange(-66, 67) / 3))
    around = np.concatenate([np.nextafter(edges, np.float32(0)), edges, edges * np.float32(1.0001)])
    profile = made_profile(1, 200, ((),), "none", 3)
    arrays = made_arrays(profile, n_tokens=3)
    profile.layers[0].deviation = np.float32(np.resize(around, width))
    for step in (1.0, np.float32(2.0 ** (1 / 3)), np.float32(0.7)):
        coded = encode(profile, arrays, float(step))
        block = reference.read(profile, profile.layers[0], coded[0][0], 3)
        assert reference.write(profile, profile.layers[0], block) == coded[0][0]


# ---- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e25])
@pytest.mark.parametrize("kv", [0, 1])
def test_ugly_values_do_not_fit(value, kv):
    profile = made_profile()
    arrays = made_arrays(profile)
    arrays[1][kv][0, 1, 17, 3] = value
    assert encode(profile, arrays) is None
    alone = {0: arrays[0]}
    assert encode(profile, alone) is not None


def test_a_coefficient_of_two_to_the_23_does_not_fit():
    profile = made_profile(1, 1, ((),), "none", 2)
    layer = profile.layers[0]
    layer.mean[:], layer.forward[:], layer.backward[:] = 0, np.eye(2), np.eye(2)
    for value, fits in ((2.0**23 - 1, True), (2.0**23, False)):
        arrays = {0: (torch.full((1, 1, 2, 1), value), torch.zeros(1, 1, 2, 1))}
        coded = encode(profile, arrays, 1.0)
        assert (coded is not None) == fits
        if fits:
            found = decode(profile, {0: coded[0][0]}, arrays)
            assert bool((found[0][0] == value).all())


@pytest.mark.parametrize("convention", ["none", "half", "partial"])
@pytest.mark.parametrize("kv", [0, 1])
def test_float16_never_overflows(convention, kv):
    """Whatever fits is finite when it comes back, however it is turned."""
    n_fit, largest = 0, 0.0
    for seed, value in enumerate(np.linspace(40_000, 65_504, 200)):
        profile = made_profile(1, 8, ((),), convention, 6, seed=seed)
        profile.layers[0].mean[:] = 0
        arrays = made_arrays(profile, "float16", n_tokens=6)
        arrays[0][kv][0, 0, 3, 4] = value  # one of a pair: before it was turned both were smaller
        coded = encode(profile, arrays, 10_000.0)
        if coded is not None:
            n_fit += 1
            found = decode(profile, {0: coded[0][0]}, arrays)
            assert all(bool(each.isfinite().all()) for each in found[0])
            largest = max(largest, float(found[0][kv].abs().max()))
    assert 30 < n_fit < 200
    assert largest > 40_000


@pytest.mark.parametrize("step", [0.0, -1.0, 9e-7, 1.1e6, np.nan, np.inf])
def test_step_out_of_range(step):
    profile = made_profile()
    with pytest.raises(ValueError, match=r"step is .* but must be from 1e-06 to 1e\+06"):
        encode(profile, made_arrays(profile), step)


@pytest.mark.parametrize("step", [1e-6, 1e6])
def test_step_at_its_ends(step):
    profile = made_profile(1, 2, ((), (0,)), "half", 5)
    arrays = {i: tuple(1e-3 * each for each in both) for i, both in
              made_arrays(profile, n_tokens=5).items()}  # fmt: skip
    for layer in profile.layers:
        layer.mean[:] = 0
    coded = encode(profile, arrays, step)
    payloads = {index: payload for index, (payload, _, _) in coded.items()}
    assert_decoded(profile, payloads, decode(profile, payloads, arrays))


# ---- damage --------------------------------------------------------------------------------------


def outcome(profile, payload, arrays, backend=None):
    """Return what a payload decodes to, or that it is refused."""
    try:
        return decode(profile, {0: payload}, arrays, backend=backend)[0]
    except krul.CorruptionError:
        return "refused"


def expected_outcome(profile, payload, n_rows):
    """Say the same of the reference."""
    try:
        return reference.decode(profile, 0, payload, {}, n_rows)
    except ValueError:
        return "refused"


def test_every_byte_changed_and_every_length():
    """Refused where the reference refuses, decoded to its numbers where it decodes."""
    profile = made_profile(1, 2, ((),), "half", 5)
    arrays = made_arrays(profile, n_tokens=5)
    payload = encode(profile, arrays)[0][0]
    n_decoded = 0
    for at in range(len(payload)):
        for change in (1 << at % 8, 0xFF, 0x80):
            damaged = bytearray(payload)
            damaged[at] ^= change
            wanted = expected_outcome(profile, damaged, 5)
            found = outcome(profile, bytes(damaged), arrays)
            assert (found == "refused") == (isinstance(wanted, str)), at
            if found != "refused":
                n_decoded += 1
                assert_decoded(profile, {0: bytes(damaged)}, {0: found})
    assert 0 < n_decoded < len(payload)
    for n_bytes in range(len(payload)):
        assert outcome(profile, payload[:n_bytes], arrays) == "refused"
    assert outcome(profile, payload + b"\0", arrays) == "refused"


@given(
    st.binary(max_size=60),
    st.integers(0, 7),
    st.integers(0, 7),
    st.sampled_from([0, 0, 1, 2, 3, 8]),
    st.booleans(),
)
def test_any_side_information(side, class_bits, shift_bits, fineness_bits, is_headed):
    profile = made_profile(1, 2, ((),), "none", 4)
    arrays = made_arrays(profile, n_tokens=4)
    payload = encode(profile, arrays)[0][0]
    stream = payload[12 + int.from_bytes(payload[4:8], "little") :]
    damaged = side
    if is_headed:
        about = bytes([class_bits, shift_bits, fineness_bits, 0])
        damaged = payload[:4] + len(side).to_bytes(4, "little") + about + side + stream
    wanted = expected_outcome(profile, damaged, 4)
    found = outcome(profile, damaged, arrays)
    assert (found == "refused") == isinstance(wanted, str)


def changed_header(payload, at, value):
    """Replace some bytes."""
    return payload[:at] + value + payload[at + len(value) :]


HEADERS = {
    "step is 0": (0, np.float32(0).tobytes()),
    "step is not a number": (0, np.float32(np.nan).tobytes()),
    "step is infinite": (0, np.float32(np.inf).tobytes()),
    "step is negative": (0, np.float32(-1).tobytes()),
    "step is too fine": (0, np.float32(9e-7).tobytes()),
    "side information beyond the payload": (4, b"\xff\xff\xff\xff"),
    "side information is missing": (4, b"\0\0\0\0"),
    "class bits": (8, b"\x08"),
    "shift bits": (9, b"\xff"),
    "fineness bits": (10, b"\x09"),
    "zero": (11, b"\1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(case):
    profile = made_profile()
    arrays = made_arrays(profile)
    payload = encode(profile, arrays)[0][0]
    with pytest.raises(krul.CorruptionError, match="predict block"):
        decode(profile, {0: changed_header(payload, *HEADERS[case])}, arrays)


def test_padding_that_is_not_zero_is_refused():
    profile = made_profile(1, 2, ((),), "none", 5)
    arrays = made_arrays(profile, n_tokens=5)
    layer = profile.layers[0]
    block = reference.read(profile, layer, encode(profile, arrays)[0][0], 5)
    payload = reference.write(profile, layer, block)
    end = 12 + int.from_bytes(payload[4:8], "little")
    longer = (end - 12 + 1).to_bytes(4, "little")
    more = payload[:4] + longer + payload[8:end] + b"\0" + payload[end:]
    with pytest.raises(krul.CorruptionError, match="are not used up"):
        decode(profile, {0: more}, arrays)
    ones = changed_header(payload, end - 1, bytes([payload[end - 1] | 0x80]))
    n_bits = len(reference.rice([0] * 9, 0))
    assert n_bits == 9
    assert expected_outcome(profile, ones, 5) == outcome(profile, ones, arrays) == "refused"


# ---- chains --------------------------------------------------------------------------------------


def test_a_source_that_was_not_decoded():
    profile = made_profile()
    arrays = made_arrays(profile)
    coded = encode(profile, arrays)
    with pytest.raises(ValueError, match="layer 2, tokens from 0: its source, layer 1, was not"):
        decode(profile, {i: coded[i][0] for i in (0, 2)}, arrays)
    with pytest.raises(ValueError, match="its source, layer 0, was not decoded"):
        encode(profile, {1: arrays[1]})


def test_a_chain_goes_on_in_the_next_call_and_may_begin_anew():
    profile = made_profile()
    arrays = made_arrays(profile)
    coded = encode(profile, arrays)
    out = [torch.zeros_like(each) for both in arrays.values() for each in both]
    again = [torch.zeros_like(each) for each in out]
    made = predictor(profile, is_encoding=False)
    for into in (out, again):
        for index in arrays:
            block = (index, 0, 40, coded[index][0], *into[2 * index : 2 * index + 2])
            made.decode([[block]], 1)
    payloads = {index: payload for index, (payload, _, _) in coded.items()}
    both = {index: tuple(out[2 * index : 2 * index + 2]) for index in arrays}
    assert_decoded(profile, payloads, both)
    assert all(torch.equal(one, two) for one, two in zip(out, again, strict=True))


def test_only_what_is_wanted_is_written():
    profile = made_profile()
    arrays = made_arrays(profile)
    payloads = {index: payload for index, (payload, _, _) in encode(profile, arrays).items()}
    everything = decode(profile, payloads, arrays)
    found = decode(profile, payloads, arrays, wanted=(2,))
    assert list(found) == [2]
    for kv in (0, 1):
        assert torch.equal(found[2][kv], everything[2][kv])
    made = predictor(profile, is_encoding=False)
    keys, values = (torch.zeros_like(each) for each in arrays[0])
    made.decode([[(0, 0, 40, payloads[0], keys, None)]], 1)
    made.decode([[(0, 0, 40, payloads[0], None, values)]], 1)
    assert torch.equal(keys, everything[0][0])
    assert torch.equal(values, everything[0][1])


def test_a_chain_is_the_same_whatever_is_coded_beside_it():
    """Four chains on one and on two threads, and each alone."""
    profile = made_profile(n_tokens=100)
    cuts = [0, 31, 32, 64, 100]
    runs = list(pairwise(cuts))
    whole = made_arrays(profile, n_tokens=100)
    chains = [
        [(i, low, *(each[:, :, low:high] for each in both)) for i, both in whole.items()]
        for low, high in runs
    ]
    coded = predictor(profile, n_tokens=100).encode(chains, STEP, 1)
    assert coded == predictor(profile, n_tokens=100).encode(chains, STEP, 2)
    for chain, own in zip(chains, coded, strict=True):
        assert predictor(profile, n_tokens=100).encode([chain], STEP, 1) == [own]
    for n_threads in (1, 2):
        out = {i: tuple(torch.zeros_like(each) for each in both) for i, both in whole.items()}
        blocks = [
            [
                (i, low, high - low, own[i][0], *(each[:, :, low:high] for each in out[i]))
                for i in whole
            ]
            for own, (low, high) in zip(coded, runs, strict=True)
        ]
        predictor(profile, n_tokens=100, is_encoding=False).decode(blocks, n_threads)
        for own, (low, high) in zip(coded, runs, strict=True):
            found = {i: tuple(each[:, :, low:high] for each in out[i]) for i in whole}
            payloads = {i: own[i][0] for i in whole}
            assert_decoded(profile, payloads, found, low)


def test_one_chain_from_several_threads_breaks_nothing():
    """The same chain four times at once: good results, or a source that is gone."""
    profile = made_profile()
    arrays = made_arrays(profile)
    chain = [(index, 0, *both) for index, both in arrays.items()]
    alone = predictor(profile).encode([chain], STEP, 1)[0]
    payloads = [each[0] for each in alone]
    failures = []
    for _ in range(30):
        try:
            for own in predictor(profile).encode([chain] * 4, STEP, 4):
                assert own == alone
        except ValueError as error:
            failures.append(str(error))
        outs = [[torch.zeros_like(each) for each in both] for both in arrays.values()]
        blocks = [(i, 0, 40, payloads[i], *outs[i]) for i in range(3)]
        try:
            predictor(profile).decode([blocks] * 4, 4)
        except ValueError as error:
            failures.append(str(error))
    assert all("was not decoded" in failure for failure in failures)


def test_one_run_that_does_not_fit_leaves_the_others():
    profile = made_profile(n_tokens=64)
    whole = made_arrays(profile, n_tokens=64)
    whole[1][0][0, 0, 40, 0] = np.nan
    chains = [
        [(i, low, *(each[:, :, low : low + 32] for each in both)) for i, both in whole.items()]
        for low in (0, 32)
    ]
    first, second = predictor(profile, n_tokens=64).encode(chains, STEP, 2)
    assert second is None
    assert len(first) == 3


# ---- machines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend(dtype):
    """Bit for bit: backends share the products, and convert alike."""
    profile = made_profile(sources=((), (0,), (1, 0), (2, 1)), convention="partial", n_tokens=65)
    arrays = made_arrays(profile, dtype, n_tokens=65)
    payloads = {index: payload for index, (payload, _, _) in encode(profile, arrays).items()}
    found = {name: decode(profile, payloads, arrays, backend=name) for name in BACKENDS}
    for name in BACKENDS:
        assert_decoded(profile, payloads, found[name], dtype=dtype)
        for index in arrays:
            for kv in (0, 1):
                assert torch.equal(found[name][index][kv], found["scalar"][index][kv])
    about = [
        predictor(profile, n_tokens=65).encode(
            [[(i, 0, *both) for i, both in arrays.items()]], STEP, 1, name
        )
        for name in BACKENDS
    ]
    assert all(each == about[0] for each in about)


def libraries():
    """Name every library of products that serves on this machine."""
    found = {}
    for path in blas.candidates():
        try:
            _core.blas_open(path)
        except NotImplementedError:
            continue
        found[os.path.basename(path)] = path
    return found


LIBRARIES = libraries()

#: Encodes and decodes a chain with whatever library a process finds, and saves both.
CHILD = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
import test_predict as own
profile = own.made_profile(sources=((), (0,), (1, 0), (2, 1)), n_tokens=65)
arrays = own.made_arrays(profile, n_tokens=65)
with open({given!r}, "rb") as file:
    data = np.load(file)
    given = {{i: data[str(i)].tobytes() for i in arrays}}
found = own.decode(profile, given, arrays)
coded = own.encode(profile, arrays)
np.savez(
    {out!r},
    path=own.blas.find().path,
    **{{f"payload{{i}}": np.frombuffer(coded[i][0], np.uint8) for i in arrays}},
    **{{f"found{{i}}{{kv}}": found[i][kv].numpy() for i in arrays for kv in (0, 1)}},
)
"""


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library(name, tmp_path):
    """A payload decodes to the reference's numbers with any, whichever it was coded with."""
    profile = made_profile(sources=((), (0,), (1, 0), (2, 1)), n_tokens=65)
    arrays = made_arrays(profile, n_tokens=65)
    payloads = {index: payload for index, (payload, _, _) in encode(profile, arrays).items()}
    given, out = str(tmp_path / "given.npz"), str(tmp_path / "out.npz")
    np.savez(given, **{str(i): np.frombuffer(each, np.uint8) for i, each in payloads.items()})
    tests = os.path.dirname(os.path.abspath(__file__))
    code = CHILD.format(tests=tests, given=given, out=out)
    about = os.environ | {"KRUL_BLAS": LIBRARIES[name]}
    subprocess.run([sys.executable, "-c", code], env=about, check=True)
    data = np.load(out)
    assert os.path.basename(str(data["path"])) == name
    found = {i: tuple(torch.from_numpy(data[f"found{i}{kv}"]) for kv in (0, 1)) for i in arrays}
    assert_decoded(profile, payloads, found)
    theirs = {i: data[f"payload{i}"].tobytes() for i in arrays}
    assert_coded_well(profile, arrays, {i: (each, *encode_errors(profile, arrays, theirs, i))
                                        for i, each in theirs.items()})  # fmt: skip
    assert_decoded(profile, theirs, decode(profile, theirs, arrays))


def encode_errors(profile, arrays, payloads, index):
    """Return the squared error and power of one layer of a coded chain."""
    layer = profile.layers[index]
    keys, values = arrays[index]
    exact = reference.to_rows(layer, keys.double().numpy(), values.double().numpy())
    rows, _ = bounds(profile, payloads, len(exact))
    return ((exact - rows[index]) ** 2).sum(), ((exact + layer.mean) ** 2).sum()


# ---- products of bfloat16 ------------------------------------------------------------------------


def narrow_library():
    """Open the first library that multiplies bfloat16, fast here or not."""
    opened = [_core.blas_open(path) for path in LIBRARIES.values()]
    return next((each for each in opened if _core.blas_about(each)[2]), None)


NARROW = narrow_library()
needs_bf16 = pytest.mark.skipif(NARROW is None, reason="no library here multiplies bfloat16")


@needs_bf16
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_chain_of_bfloat16_products(dtype, rank, n_batch):
    """What was coded with them decodes with them as promised, and without them to the same."""
    sources = ((), (0,), (1, 0), (2, 1))
    profile = made_profile(sources=sources, n_tokens=65, n_batch=n_batch, rank=rank)
    arrays = made_arrays(profile, dtype, n_batch, 65)
    options = {"library": NARROW, "is_narrow": True}
    coded = encode(profile, arrays, **options)
    payloads = {index: payload for index, (payload, _, _) in coded.items()}
    found = decode(profile, payloads, arrays, **options)
    assert_decoded(profile, payloads, found, dtype=dtype, is_narrow=True)
    assert_decoded(profile, payloads, decode(profile, payloads, arrays), dtype=dtype)
    # And what float32 has coded.
    wide = {index: payload for index, (payload, _, _) in encode(profile, arrays).items()}
    assert wide != payloads
    found_wide = decode(profile, wide, arrays, **options)
    assert_decoded(profile, wide, found_wide, dtype=dtype, is_narrow=True)
    decoded = {}
    for index, both in arrays.items():
        layer = profile.layers[index]
        exact = reference.to_rows(layer, *(each.double().numpy() for each in both))
        decoded[index] = reference.to_rows(layer, *(x.double().numpy() for x in found[index]))
        if dtype == "float32":
            assert coded[index][1] == pytest.approx(((exact - decoded[index]) ** 2).sum(), rel=1e-3)
        # The numbers are those of the residual that such a decoder sees.
        block = reference.read(profile, layer, payloads[index], len(exact))
        assert reference.write(profile, layer, block) == payloads[index]
        wanted = reference.coefficients(profile, index, exact, decoded, block.step)
        size = np.abs(exact) + np.abs(reference.predicted(layer, decoded))
        if layer.sources:
            near = reference.predicted(
                replace_sizes(layer), {k: abs(v) for k, v in decoded.items()}
            )
            size = size + near
        margin = 6 * UNIT["bfloat16"] * (size @ np.abs(layer.forward)).T / block.step
        margin += 1e-2 if dtype == "float32" else 0.3  # what `found` was rounded to
        assert (np.abs(block.values - wanted) <= 0.5 + margin).all()


def with_matrices(profile, change):
    """Return a profile with other matrices."""
    names = ("forward", "backward", "maps", "left", "right")
    return replace(
        profile,
        layers=[
            replace(
                layer,
                **{
                    name: np.float32(change(getattr(layer, name)))
                    for name in names
                    if getattr(layer, name) is not None
                },
            )
            for layer in profile.layers
        ],
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_rounded_factors_are_the_same_however_they_are_multiplied(backend, rank, n_batch):
    """Products of float32 and of bfloat16 differ where a sum is near a bound, and no more."""
    sources = ((), (0,), (1, 0), (2, 1))
    profile = made_profile(sources=sources, n_tokens=65, n_batch=n_batch, rank=rank)
    profile = with_matrices(profile, reference.rounded)
    arrays = made_arrays(profile, "float32", n_batch, 65)
    fineness = np.int8(np.arange(65) % 19 - 6)
    coded = encode(profile, arrays, is_rounded=True, fineness=fineness)
    payloads = {index: payload for index, (payload, _, _) in coded.items()}
    ways = [{"is_rounded": True}]
    if NARROW is not None:
        ways.append({"library": NARROW, "is_narrow": True})
    n_rows = n_batch * 65
    wanted, plain = {}, {}
    for index, payload in payloads.items():
        wanted[index] = reference.decode(profile, index, payload, wanted, n_rows, True)
        plain[index] = reference.decode(profile, index, payload, plain, n_rows)
    for way in ways:
        found = decode(profile, payloads, arrays, backend=backend, **way)
        assert_decoded(profile, payloads, found, is_narrow=True)
        for index, both in found.items():
            layer = profile.layers[index]
            rows = reference.to_rows(layer, *(x.double().numpy() for x in both))
            off = np.linalg.norm(rows - wanted[index])
            assert off < 0.1 * np.linalg.norm(plain[index] - wanted[index])
            exact = reference.to_rows(layer, *(x.double().numpy() for x in arrays[index]))
            assert coded[index][1] == pytest.approx(((exact - rows) ** 2).sum(), rel=1e-3)


def replace_sizes(layer):
    """Return a layer with the sizes of its maps' numbers."""
    return replace(
        layer,
        **{
            name: None if getattr(layer, name) is None else np.abs(getattr(layer, name))
            for name in ("maps", "left", "right")
        },
    )


@needs_bf16
def test_one_bfloat16_product_is_float64s():
    random = np.random.default_rng(0)
    a, b = (torch.from_numpy(random.standard_normal((70, 70))).bfloat16() for _ in range(2))
    out = torch.full((33, 70), 7.0)
    _core.blas_sgemm(NARROW, a[:33], b, out, trans_b=True, alpha=0.5, beta=2.0)
    left, right = a[:33].double(), b.double().T
    size = 0.5 * (left.abs() @ right.abs()) + 14
    assert bool(((out - (0.5 * (left @ right) + 14)).abs() <= 75 * 2.0**-23 * size).all())
    with pytest.raises(krul.DTypeError, match="b is float32 but must be bfloat16"):
        _core.blas_sgemm(NARROW, a[:33], b.float(), out, trans_b=True)


@needs_bf16
def test_bfloat16_products_need_all_matrices_and_a_library(monkeypatch):
    profile = made_profile()
    opened = [_core.blas_open(path) for path in LIBRARIES.values()]
    for without in (each for each in opened if not _core.blas_about(each)[2]):
        with pytest.raises(NotImplementedError, match="bfloat16"):
            predictor(profile, library=without, is_narrow=True)
        a = torch.zeros(2, 2, dtype=torch.bfloat16)
        with pytest.raises(NotImplementedError, match="bfloat16"):
            _core.blas_sgemm(without, a, a, torch.zeros(2, 2))
    whole = predictor(profile, library=NARROW, is_narrow=True)
    assert whole is not None

    def narrow(change):
        monkeypatch.setattr(_core, "Predict", change(_core.Predict))
        try:
            predictor(profile, library=NARROW, is_narrow=True)
        finally:
            monkeypatch.undo()

    def giving(edit):
        return lambda make: lambda *args, narrow, **more: make(*args, narrow=edit(narrow), **more)

    wrong = {
        "layer 1 lacks a matrix in bfloat16": lambda n: [n[0], (*n[1][:2], None, None, None), n[2]],
        "narrow has 2 layers but must have 3": lambda n: n[:2],
        "narrow has 4 matrices for layer 0": lambda n: [n[0][:4], *n[1:]],
        "narrow maps of layer 1 has": lambda n: [n[0], (*n[1][:2], n[1][2][1:], None, None), n[2]],
    }
    for message, edit in wrong.items():
        with pytest.raises(ValueError, match=message):
            narrow(giving(edit))
    with pytest.raises(TypeError, match="narrow backward of layer 0 is of format 'f'"):
        narrow(giving(lambda n: [(n[0][0], profile.layers[0].backward, *n[0][2:]), *n[1:]]))


# ---- arguments -----------------------------------------------------------------------------------


def changed_layer(profile, index, **values):
    """Hand over a profile with something wrong in one layer."""
    layers = list(profile.layers)
    layers[index] = replace(layers[index], **values)
    return predictor(replace(profile, layers=layers))


WRONG = {
    "source later": (1, {"sources": (1,)}, ValueError, "layer 1 has the source 1"),
    "source that is none": (0, {"sources": (5,), "maps": np.zeros((32, 32), np.float32)},
                            ValueError, "layer 0 has the source 5"),
    "three sources": (2, {"sources": (0, 0, 1)}, ValueError, "3 sources"),
    "no maps": (1, {"maps": None}, ValueError, "layer 1 lacks an array"),
    "no mean": (1, {"mean": None}, ValueError, "layer 1 lacks an array"),
    "mean too short": (1, {"mean": np.zeros(31, np.float32)}, ValueError, "mean of layer 1 has 31"),
    "maps of float64": (1, {"maps": np.zeros((32, 32))}, TypeError, "maps of layer 1 is of format"),
    "no heads": (1, {"n_heads": 0}, ValueError, "layer 1 has 0 heads"),
    "rotated beyond the head": (1, {"start": 1}, ValueError, "8 numbers of 8 are rotated from"),
    "too few angles": (1, {"cos": np.zeros((39, 4), np.float32)}, ValueError, "cos of layer 1 has"),
    "no sine": (1, {"sin": None}, ValueError, "layer 1: 8 numbers of 8 are rotated"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_profiles_that_are_refused(case):
    index, values, exception, words = WRONG[case]
    with pytest.raises(exception, match=words):
        changed_layer(made_profile(), index, **values)


def test_arguments():
    profile = made_profile()
    arrays = made_arrays(profile)
    made = predictor(profile)
    chain = [(i, 0, *both) for i, both in arrays.items()]
    for block, exception, words in (
        ((3, 0, *arrays[0]), ValueError, "layer 3 takes no part"),
        ((-1, 0, *arrays[0]), ValueError, "layer -1 takes no part"),
        ((0, 1, *arrays[0]), krul.ShapeError, "40 tokens from 1 are not within the 40 from 0"),
        ((0, -1, *arrays[0]), krul.ShapeError, "40 tokens from -1 are not within"),
        ((0, 0, arrays[0][0][:, :1], arrays[0][1]), krul.ShapeError, "keys is .* layer 0 needs"),
        ((0, 0, arrays[0][0], arrays[0][1][:, :, :39]), krul.ShapeError, "values is"),
        ((0, 0, arrays[0][0]), TypeError, "a block is"),
    ):
        with pytest.raises(exception, match=words):
            made.encode([[block]], STEP)
    with pytest.raises(ValueError, match="n_threads is -1"):
        made.encode([chain], STEP, -1)
    with pytest.raises(ValueError, match="layer 0 has no forward basis"):
        predictor(profile, is_encoding=False).encode([chain], STEP)
    with pytest.raises(ValueError, match="n_batch is 0"):
        predictor(profile, n_batch=0)
    with pytest.raises(ValueError, match="unit_table is 34 but there are 34 tables"):
        predictor(replace(profile, unit_table=34))
    payload = made.encode([chain], STEP)[0][0][0]
    frozen = np.zeros(arrays[0][0].shape, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        made.decode([[(0, 0, 40, payload, frozen, None)]])
    with pytest.raises(krul.ShapeError, match="40 tokens from 1 are not within"):
        made.decode([[(0, 1, 40, payload, None, None)]])
    with pytest.raises(krul.ShapeError, match="0 tokens from 0"):
        made.decode([[(0, 0, 0, payload, None, None)]])
