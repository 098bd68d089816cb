"""Estimator: C against the float64 reference, and what the Python class makes of it."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import estimator_reference as reference

import krul
from krul import _core, estimator
from krul.estimator import Estimator, similarity

BACKENDS = [name for name, is_usable, _ in _core.backends() if is_usable]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 3, 31, 32, 33, 257]


def empty_sums(n_layers, n_keys):
    return (
        np.zeros((n_layers, n_layers)),
        np.zeros((n_layers, 2)),
        np.zeros((n_layers, n_keys), np.float32),
        np.zeros(1),
    )


def observe(layers, positions, real, *, weight=1.0, tile_bytes=1 << 22, n_threads=1, backend=None):
    layers = [layer and with_starts(layer) for layer in layers]
    n_keys = real if isinstance(real, int) else real.shape[1]
    sums = empty_sums(len(layers), n_keys)
    _core.estimator_observe(
        layers, positions, real, weight, *sums, tile_bytes, n_threads, backend=backend
    )
    return sums


def with_starts(layer):
    *others, starts, key_start = layer
    if starts is not None:
        starts = np.repeat(
            np.atleast_2d(starts), layer[0].shape[0] // np.atleast_2d(starts).shape[0], 0
        )
    return (*others, starts, key_start)


def draw(seed, n_layers, n_batch, n_heads, n_kv_heads, n_rows, n_keys, head_dim, dtype):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return [
        (
            2 * normal(n_batch, n_heads, n_rows, head_dim),
            normal(n_batch, n_kv_heads, n_keys, head_dim),
        )
        for _ in range(n_layers)
    ]


def rows_of(layers, positions, real=None, n_keys=None, dtype=np.float64):
    return [
        None
        if layer is None
        else reference.attention_rows(
            layer[0].float().numpy(),
            layer[1].float().numpy(),
            positions,
            scaling=np.float32(layer[2]),
            softcap=layer[3],
            sinks=layer[4],
            row_starts=layer[5],
            key_start=layer[6],
            key_is_real=real,
            n_keys_total=n_keys,
            dtype=dtype,
        )
        for layer in layers
    ]


def check(got, layers, positions, real=None, n_keys=None, weight=1.0):
    """The 2x rule: at most twice as far from float64 as plain float32 NumPy is, and a floor.

    The floor is 4e-6 of the largest value: where float32 NumPy is right to the last bit by luck,
    the exponential's stated error (4e-7) and the order of some hundred additions remain.
    """
    exact = reference.sums(
        rows_of(layers, positions, real, n_keys), positions, key_is_real=real, weight=weight
    )
    plain = reference.sums(
        rows_of(layers, positions, real, n_keys, np.float32),
        positions,
        key_is_real=real,
        weight=weight,
    )
    names = ("distances", "importance", "received", "n_rows")
    for name, mine, right, naive in zip(names, got, map(np.array, exact), plain, strict=True):
        right = right.reshape(mine.shape)
        assert np.array_equal(np.isnan(mine), np.isnan(right)), name
        error = np.nanmax(np.abs(mine - right), initial=0)
        allowed = 2 * np.nanmax(np.abs(naive - right), initial=0)
        allowed += 4e-6 * np.nanmax(np.abs(right), initial=0)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_keys", SIZES)
def test_sums_equal_the_reference(n_keys, dtype, backend):
    n_rows = min(n_keys, 5)
    positions = np.unique(np.linspace(0, n_keys - 1, n_rows).astype(np.int64))
    pairs = draw(n_keys, 3, 2, 4, 2, len(positions), n_keys, 16, dtype)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    for tile_bytes in (0, 1 << 24):
        got = observe(layers, positions, n_keys, tile_bytes=tile_bytes, backend=backend)
        check(got, layers, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", SIZES)
def test_every_head_dim(head_dim, backend):
    positions = np.array([0, 20, 39])
    pairs = draw(head_dim, 2, 1, 2, 1, 3, 40, head_dim, torch.float32)
    layers = [(q, k, head_dim**-0.5, 0.0, None, None, 0) for q, k in pairs]
    check(observe(layers, positions, 40, backend=backend), layers, positions)


@pytest.mark.parametrize("n_layers", SIZES[:-1])
def test_every_number_of_layers(n_layers):
    positions = np.array([3, 18])
    pairs = draw(n_layers, n_layers, 1, 2, 2, 2, 19, 8, torch.float32)
    layers = [(q, k, 0.4, 0.0, None, None, 0) for q, k in pairs]
    got = observe(layers, positions, 19)
    check(got, layers, positions)
    assert np.array_equal(got[0], got[0].T)
    assert (np.diag(got[0]) == 0).all()


@pytest.mark.parametrize("n_rows", SIZES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(1, 1), (6, 2), (4, 4), (20, 1)])
def test_every_number_of_rows_and_grouping_of_heads(n_heads, n_kv_heads, n_rows):
    n_keys = 2 * n_rows + 1
    positions = np.arange(n_rows, dtype=np.int64) * 2
    pairs = draw(n_rows, 2, 1, n_heads, n_kv_heads, n_rows, n_keys, 8, torch.float32)
    layers = [(q, k, 0.4, 0.0, None, None, 0) for q, k in pairs]
    check(observe(layers, positions, n_keys), layers, positions)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_softcap_sinks_and_padding(backend):
    n_keys = 150
    positions = np.array([0, 9, 64, 149])
    real = np.ones((2, n_keys), np.uint8)
    real[1, :20] = 0
    real[1, 100:104] = 0
    sinks = np.linspace(-1, 3, 4, dtype=np.float32)
    windowed = np.maximum(positions - 31, 0)
    pairs = draw(1, 4, 2, 4, 2, 4, n_keys, 16, torch.bfloat16)
    layers = [
        (*pairs[0], 0.5, 2.0, None, None, 0),
        (*pairs[1], 0.5, 0.0, sinks, None, 0),
        (*pairs[2], 0.5, 0.0, None, windowed, 0),
        (*pairs[3], 0.5, 3.0, sinks, windowed, 0),
    ]
    for tile_bytes in (0, 1 << 24):
        got = observe(layers, positions, real, weight=2.5, tile_bytes=tile_bytes, backend=backend)
        check(got, layers, positions, real, weight=2.5)


def test_a_sliding_layer_that_holds_only_its_tail():
    n_keys, window = 90, 20
    positions = np.array([88, 89])
    starts = positions - window + 1
    queries, keys = draw(3, 1, 1, 4, 2, 2, n_keys, 16, torch.float32)[0]
    full = (queries, keys, 0.25, 0.0, None, None, 0)
    whole = (queries, keys, 0.25, 0.0, None, starts, 0)
    tail = (queries, keys[:, :, 65:], 0.25, 0.0, None, starts, 65)
    layers = [full, whole, tail]
    got = observe(layers, positions, n_keys)
    check(got, layers, positions, n_keys=n_keys)
    assert got[0][1, 2] == 0
    assert (got[2][2, :69] == 0).all()


def test_strided_views_are_read_in_place():
    positions = np.array([5, 30])
    queries, keys = draw(5, 1, 2, 4, 2, 2, 31, 16, torch.float32)[0]
    turned = keys.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 4, 4, 24), torch.nan)
    wide[:, :, ::2, :16] = queries
    layers = [
        (queries, keys, 0.3, 0.0, None, None, 0),
        (wide[:, :, ::2, :16], turned, 0.3, 0.0, None, None, 0),
    ]
    got = observe(layers, positions, 31)
    assert got[0][0, 1] == 0
    assert np.array_equal(got[2][0], got[2][1])


def test_numpy_arrays_are_taken_as_well():
    positions = np.array([6])
    queries, keys = draw(5, 1, 1, 2, 1, 1, 7, 4, torch.float32)[0]
    torch_layer = (queries, keys, 0.3, 0.0, None, None, 0)
    numpy_layer = (queries.numpy(), keys.numpy(), 0.3, 0.0, None, None, 0)
    for left, right in zip(
        observe([torch_layer], positions, 7), observe([numpy_layer], positions, 7), strict=True
    ):
        assert np.array_equal(left, right)


def test_layers_that_have_no_common_rows_are_nan():
    positions = np.array([4, 9])
    two = draw(0, 2, 1, 2, 2, 2, 10, 8, torch.float32)
    four = draw(1, 2, 1, 4, 2, 2, 10, 16, torch.float32)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in (two[0], four[0], two[1], four[1])]
    layers.insert(1, None)
    got = observe(layers, positions, 10)
    check(got, layers, positions)
    assert np.isnan(got[0][1]).all()
    assert not np.isnan(got[0][0, 3])
    assert np.isnan(got[0][0, 2])


def test_one_kv_grouping_may_differ_from_another():
    positions = np.array([4, 9, 11])
    few = draw(0, 1, 1, 12, 2, 3, 12, 8, torch.float32)[0]
    many = draw(1, 1, 1, 12, 4, 3, 12, 8, torch.float32)[0]
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in (few, many)]
    check(observe(layers, positions, 12), layers, positions)


def test_what_is_not_finite_becomes_nan_and_spoils_no_other_layer():
    positions = np.array([4, 9])
    pairs = draw(0, 3, 1, 2, 2, 2, 10, 8, torch.float32)
    pairs[1][1][0, 0, 2, 3] = torch.nan
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    distances, importance, _, _ = observe(layers, positions, 10)
    assert np.isnan(distances[0, 1])
    assert np.isnan(distances[1, 2])
    assert np.isfinite(distances[0, 2])
    assert np.isfinite(importance[[0, 2]]).all()


def test_huge_scores_do_not_overflow():
    positions = np.array([9])
    queries, keys = draw(0, 1, 1, 2, 2, 1, 10, 8, torch.float32)[0]
    layers = [(queries * 1e4, keys, 1.0, 0.0, None, None, 0)]
    got = observe(layers, positions, 10)
    check(got, layers, positions)
    assert got[2].sum() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("tile_bytes", [0, 1 << 24])
def test_threads_and_calls_do_not_change_a_bit(tile_bytes):
    positions = np.arange(0, 300, 7)
    pairs = draw(0, 5, 2, 6, 2, len(positions), 300, 16, torch.bfloat16)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    one = observe(layers, positions, 300, tile_bytes=tile_bytes)
    for n_threads in (2, 3, 8):
        other = observe(
            layers, positions, 300, tile_bytes=tile_bytes * n_threads, n_threads=n_threads
        )
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_two_threads_may_observe_at_once():
    positions = np.arange(0, 100, 3)
    pairs = draw(0, 3, 1, 4, 2, len(positions), 100, 16, torch.float32)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    expected = observe(layers, positions, 100)
    barrier, found = threading.Barrier(2), []

    def work():
        barrier.wait()
        found.append(observe(layers, positions, 100, n_threads=2))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got in found:
        assert all(np.array_equal(*pair) for pair in zip(expected, got, strict=True))
    assert len(found) == 2


def test_sums_are_added_to():
    positions = np.array([1, 8])
    pairs = draw(0, 2, 1, 2, 1, 2, 9, 8, torch.float32)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    once = observe(layers, positions, 9, weight=3.0)
    sums = empty_sums(2, 9)
    for _ in range(3):
        _core.estimator_observe(layers, positions, 9, 1.0, *sums, 1 << 20, 1)
    for left, right in zip(sums, once, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)  # 3 additions of float32


def good_call():
    positions = np.array([1, 8])
    pairs = draw(0, 2, 1, 2, 1, 2, 9, 8, torch.float32)
    layers = [[q, k, 0.3, 0.0, None, None, 0] for q, k in pairs]
    return [layers, positions, 9, 1.0, *empty_sums(2, 9), 1 << 20, 1]


def change(index, value, field=None):
    def apply(call):
        if field is None:
            call[index] = value
        else:
            call[index][1][field] = value

    return apply


def read_only():
    array = np.zeros((2, 2))
    array.flags.writeable = False
    return array


REFUSALS = [
    (change(0, torch.ones(1, 3, 9, 8), 1), krul.ShapeError, r"layer 1.*\(1, 2, 2, 8\).*\(1, 3, 9"),
    (change(0, torch.ones(1, 2, 3, 8), 0), krul.ShapeError, "layer 1.*1 batch.*3 rows.*1 and 2"),
    (change(0, torch.ones(2, 2, 2, 8), 0), krul.ShapeError, "2 batch entries.*1 and 2"),
    (change(0, torch.ones(1, 2, 2, 6), 0), krul.ShapeError, r"\(1, 2, 2, 6\).*\(1, 1, 9, 8\)"),
    (change(0, torch.ones(1, 1, 10, 8), 1), krul.ShapeError, r"\[0, 10\) but there are 9"),
    (change(0, torch.ones(1, 0, 9, 8), 1), krul.ShapeError, r"\(1, 0, 9, 8\)"),
    (
        change(0, torch.ones(1, 2, 2, 8, dtype=torch.float64), 0),
        krul.DTypeError,
        "queries of layer 1",
    ),
    (change(0, "keys", 1), TypeError, "keys of layer 1"),
    (change(0, float("nan"), 2), ValueError, "layer 1 has scaling nan"),
    (change(0, -1.0, 3), ValueError, "softcap -1"),
    (change(0, np.zeros(3, np.float32), 4), krul.ShapeError, "sinks of layer 1"),
    (change(0, np.zeros(2), 4), krul.DTypeError, "sinks of layer 1 is float64 but must be float32"),
    (change(0, np.zeros((1, 3), np.int64), 5), krul.ShapeError, "row_starts of layer 1"),
    (
        change(0, np.array([[2, 0]]), 5),
        ValueError,
        r"row_starts\[0, 0\] of layer 1 is 2.*position 1",
    ),
    (change(0, 1, 6), krul.ShapeError, r"\[1, 10\) but there are 9"),
    (change(0, -1, 6), krul.ShapeError, r"\[-1, 8\)"),
    (change(0, [(1, 2)]), ValueError, r"layers\[0\] has 2 items but must have 7"),
    (change(0, []), krul.ShapeError, "n_layers is 0|distances"),
    (change(1, np.array([1, 9])), ValueError, r"row_positions\[1\] is 9 but there are 9"),
    (change(1, np.array([-1, 8])), ValueError, r"row_positions\[0\] is -1"),
    (change(1, np.array([1.0, 8.0])), krul.DTypeError, "row_positions is float64"),
    (change(1, [1, 8]), TypeError, "row_positions is a list"),
    (change(2, np.ones((2, 9), np.uint8)), krul.ShapeError, "key_is_real"),
    (change(2, np.ones((1, 9))), krul.DTypeError, "key_is_real is float64"),
    (change(2, np.ones((1, 8), np.uint8)), ValueError, r"row_positions\[1\] is 8 but there are 8"),
    (change(2, -1), krul.ShapeError, "n_keys_total -1"),
    (change(3, float("inf")), ValueError, "weight is inf"),
    (change(3, -1.0), ValueError, "weight is -1"),
    (change(4, np.zeros((3, 3))), krul.ShapeError, "distances"),
    (change(4, read_only()), ValueError, "distances must be contiguous, aligned and writable"),
    (change(4, np.zeros((2, 4))[:, ::2]), ValueError, "distances must be contiguous"),
    (change(5, np.zeros((2, 3))), krul.ShapeError, "importance"),
    (
        change(6, np.zeros((2, 8), np.float32)),
        krul.ShapeError,
        "received holds 8 tokens but there are 9",
    ),
    (change(6, np.zeros((2, 9))), krul.DTypeError, "received is float64 but must be float32"),
    (change(7, np.zeros(2)), krul.ShapeError, "n_rows"),
    (change(8, -1), ValueError, "tile_bytes is -1"),
    (change(9, -1), ValueError, "n_threads is -1"),
]


@pytest.mark.parametrize(("spoil", "exception", "words"), REFUSALS)
def test_refusals_leave_the_sums_alone(spoil, exception, words):
    call = good_call()
    spoil(call)
    with pytest.raises(exception, match=words or None):
        _core.estimator_observe(*call)
    for array in call[4:8]:
        assert not array.any()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend 'abacus'"):
        _core.estimator_observe(*good_call(), backend="abacus")


# ---- the class ---------------------------------------------------------------------------------


def feed(watcher, pairs, **options):
    """One forward pass over layers that are pairs of queries and keys."""
    for layer, (queries, keys) in enumerate(pairs):
        if watcher.pick_rows(layer, queries.shape[2]) is not None:
            watcher.collect(layer, queries, keys, scaling=0.3, **options)


def test_all_rows_equal_the_full_sum():
    pairs = draw(0, 3, 2, 4, 2, 50, 50, 16, torch.float32)
    watcher = Estimator(3, rows="all")
    feed(watcher, pairs)
    found = watcher.result()
    positions = np.arange(50)
    layers = [(q, k, 0.3, 0.0, None, None, 0) for q, k in pairs]
    distances, importance, received, n_rows = reference.sums(rows_of(layers, positions), positions)
    np.testing.assert_allclose(found.distances, np.sqrt(distances), rtol=1e-5)  # float32 rows
    np.testing.assert_allclose(found.importance, importance / n_rows, rtol=1e-5)
    np.testing.assert_allclose(found.received, received, rtol=1e-5, atol=1e-5)
    assert (found.n_prefill_rows, found.n_decode_rows) == (100, 0)
    for moments, (queries, _) in zip(found.query_moments, pairs, strict=True):
        expected = reference.query_moments(queries.numpy(), 2) / (2 * 2 * 50)
        np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    assert found.is_pre_rotary == (False,) * 3
    assert found.skipped is None


def kendall_tau(left, right):
    pairs = list(itertools.combinations(range(len(left)), 2))
    agree = sum(np.sign(left[i] - left[j]) * np.sign(right[i] - right[j]) for i, j in pairs)
    return agree / len(pairs)


def test_a_sample_converges_to_all_rows():
    pairs = []
    for layer, (queries, keys) in enumerate(draw(0, 8, 1, 4, 2, 512, 512, 16, torch.float32)):
        pairs.append((queries * (0.3 + 0.25 * layer), keys))
    upper = np.triu_indices(8, 1)
    results = {}
    for rows in (8, 64, 256, "all"):
        watcher = Estimator(8, rows=rows)
        feed(watcher, pairs)
        results[rows] = watcher.result()
    exact = results["all"].distances[upper]
    errors = [np.abs(results[n].distances[upper] / exact - 1).mean() for n in (8, 64, 256)]
    assert errors[2] < errors[0]
    assert errors[1] < 0.15
    assert errors[2] < 0.05
    assert kendall_tau(results[64].distances[upper], exact) > 0.85
    assert results[64].n_prefill_rows == pytest.approx(512)
    assert results[64].received.sum() == pytest.approx(results["all"].received.sum(), rel=1e-3)


@given(st.integers(1, 4000), st.integers(1, 100))
def test_rows_are_stratified(n_queries, n_rows):
    watcher = Estimator(1, rows=n_rows)
    rows = watcher.pick_rows(0, n_queries)
    assert np.array_equal(rows, Estimator(1, rows=n_rows).pick_rows(0, n_queries))
    assert len(rows) == min(n_rows, n_queries)
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < n_queries
    if n_rows < n_queries:
        edges = np.arange(n_rows + 1) * n_queries // n_rows
        assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()


def test_every_sixteenth_step_of_decoding_is_observed():
    generator = torch.Generator().manual_seed(0)
    keys = [torch.randn(1, 2, 100, 8, generator=generator) for _ in range(2)]
    queries = [torch.randn(1, 4, 100, 8, generator=generator) for _ in range(2)]
    watcher = Estimator(2, rows=4)
    feed(watcher, [(q[:, :, :40], k[:, :, :40]) for q, k in zip(queries, keys, strict=True)])
    after_prefill = watcher.result()
    observed = []
    for n in range(40, 100):
        for layer in range(2):
            rows = watcher.pick_rows(layer, 1)
            if rows is not None:
                observed.append((layer, n))
                watcher.collect(
                    layer, queries[layer][:, :, n : n + 1], keys[layer][:, :, : n + 1], scaling=0.3
                )
        watcher.finish()
    steps = [55, 71, 87]
    assert observed == [(layer, n) for n in steps for layer in (0, 1)]
    found = watcher.result()
    assert (found.n_prefill_rows, found.n_decode_rows) == (40, 48)
    layers = [
        (q[:, :, steps], k, 0.3, 0.0, None, None, 0) for q, k in zip(queries, keys, strict=True)
    ]
    distances, importance, received, _n_rows = reference.sums(
        rows_of(layers, np.array(steps)), np.array(steps), weight=16.0
    )
    added = found.distances**2 - after_prefill.distances**2
    np.testing.assert_allclose(added, distances, rtol=1e-5, atol=1e-5)
    total = found.importance * 88 - after_prefill.importance * 40
    np.testing.assert_allclose(total, importance, rtol=1e-4)
    held = found.received.copy()
    held[:, :40] -= after_prefill.received
    np.testing.assert_allclose(held, received[:, : found.received.shape[1]], rtol=1e-4, atol=1e-4)


def test_a_few_tokens_at_once_count_as_decoding():
    pairs = draw(0, 2, 1, 2, 1, 30, 30, 8, torch.float32)
    watcher = Estimator(2)
    feed(watcher, pairs)
    watcher.finish()
    picked = []
    for _ in range(8):  # assisted decoding checks 5 tokens at a time
        picked.append(watcher.pick_rows(0, 5))
        watcher.pick_rows(1, 5)
    assert [None if rows is None else rows.tolist() for rows in picked] == [
        None, None, None, [4], None, None, [4], None,
    ]  # fmt: skip


def test_a_short_prompt_over_a_history_is_sampled_in_proportion():
    watcher = Estimator(1)
    watcher.begin(n_past=1000)
    assert len(watcher.pick_rows(0, 64)) == 4
    watcher.begin(n_past=1000)
    assert len(watcher.pick_rows(0, 4096)) == 64
    watcher.begin(n_past=0)
    assert len(watcher.pick_rows(0, 64)) == 64


def test_a_pass_that_cannot_be_computed_is_reported():
    queries = torch.zeros(1, 2, 30, 8)
    watcher = Estimator(2)
    feed(watcher, [(queries, torch.zeros(1, 2, 30, 8)), (queries, torch.zeros(1, 2, 30, 4))])
    assert "could not be computed" in watcher.result().skipped


def test_a_pass_that_dies_leaves_no_trace():
    pairs = draw(0, 3, 1, 2, 1, 30, 30, 8, torch.float32)
    whole = Estimator(3, rows="all")
    feed(whole, pairs)
    broken = Estimator(3, rows="all")
    broken.pick_rows(0, 30)
    broken.collect(0, *pairs[0], scaling=0.3)
    broken.abandon()
    feed(broken, pairs)
    feed_half = pairs[:1]
    feed(broken, feed_half)  # begins anew: the whole pass before it is counted, this one is not
    feed(broken, pairs)
    left, right = whole.result(), broken.result()
    np.testing.assert_allclose(right.distances, left.distances * np.sqrt(2), rtol=1e-6)
    assert right.n_prefill_rows == 60


def test_a_layer_never_seen_is_nan_and_no_other_is():
    pairs = draw(0, 4, 1, 2, 1, 30, 30, 8, torch.float32)
    watcher = Estimator(4)
    for layer in (0, 2, 3):
        watcher.pick_rows(layer, 30)
        watcher.collect(layer, *pairs[layer], scaling=0.3)
    found = watcher.result()
    assert np.isnan(found.distances[1]).all()
    assert np.isnan(found.distances[:, 1]).all()
    assert np.isfinite(found.distances[np.ix_([0, 2, 3], [0, 2, 3])]).all()
    assert found.query_moments[1] is None
    assert not found.received[1].any()


def test_several_sequences_of_a_batch_add_up():
    pairs = draw(0, 2, 3, 4, 2, 20, 20, 8, torch.float32)
    together = Estimator(2, rows="all")
    feed(together, pairs)
    apart = [Estimator(2, rows="all") for _ in range(3)]
    for b, watcher in enumerate(apart):
        feed(watcher, [(q[b : b + 1], k[b : b + 1]) for q, k in pairs])
    squared = sum(watcher.result().distances ** 2 for watcher in apart)
    np.testing.assert_allclose(together.result().distances ** 2, squared, rtol=1e-5, atol=1e-9)
    assert together.result().n_prefill_rows == 60


def test_masks_give_padding_and_windows():
    n_keys, rows = 30, np.arange(30)
    pairs = draw(0, 3, 2, 2, 1, n_keys, n_keys, 8, torch.float32)
    real = np.ones((2, n_keys), np.uint8)
    real[1, :6] = 0
    causal = (rows[None] <= rows[:, None])[None] & (real[:, None] == 1) & (real[:, :, None] == 1)
    windowed = causal & (rows[None] > rows[:, None] - 8)[None]
    watcher = Estimator(3, rows="all")
    for layer, (queries, keys) in enumerate(pairs):
        watcher.pick_rows(layer, n_keys)
        is_sliding = layer == 1
        watcher.collect(
            layer,
            queries,
            keys,
            scaling=0.3,
            window=8 if is_sliding else None,
            visible=windowed if is_sliding else causal,
        )
    starts = np.maximum(rows - 7, 0)
    layers = [
        (q, k, 0.3, 0.0, None, starts if layer == 1 else None, 0)
        for layer, (q, k) in enumerate(pairs)
    ]
    distances, importance, received, n_rows = reference.sums(
        rows_of(layers, rows, real), rows, key_is_real=real
    )
    found = watcher.result()
    assert found.skipped is None
    assert n_rows == found.n_prefill_rows == 54
    np.testing.assert_allclose(found.distances, np.sqrt(distances), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.importance, importance / n_rows, rtol=1e-5)
    np.testing.assert_allclose(found.received, received, rtol=1e-5, atol=1e-5)


def test_a_mask_of_another_kind_leaves_the_layer_out():
    pairs = draw(0, 2, 1, 2, 1, 12, 12, 8, torch.float32)
    everything = np.ones((1, 12, 12), bool)
    watcher = Estimator(2)
    for layer, (queries, keys) in enumerate(pairs):
        watcher.pick_rows(layer, 12)
        watcher.collect(
            layer, queries, keys, scaling=0.3, visible=everything if layer == 0 else None
        )
    found = watcher.result()
    assert np.isnan(found.distances[0]).all()
    assert found.distances[1, 1] == 0
    assert "not causal" in found.skipped


def test_cropping_forgets_what_dropped_tokens_received():
    pairs = draw(0, 2, 1, 2, 1, 30, 30, 8, torch.float32)
    watcher = Estimator(2)
    feed(watcher, pairs)
    before = watcher.result()
    watcher.truncate(12)
    after = watcher.result()
    assert np.array_equal(after.received, before.received[:, :12])
    watcher.begin(12)
    grown = draw(1, 2, 1, 2, 1, 20, 32, 8, torch.float32)
    feed(watcher, grown)
    final = watcher.result()
    assert final.received.shape == (2, 32)
    assert final.received.sum() == pytest.approx(after.received.sum() + 2 * 2 * 20, rel=1e-5)


def test_a_pass_over_the_budget_is_skipped_with_a_reason():
    pairs = draw(0, 2, 1, 2, 1, 100, 100, 8, torch.float32)
    watcher = Estimator(2, rows="all", max_bytes=10_000)
    feed(watcher, pairs)
    found = watcher.result()
    assert found.n_prefill_rows == 0
    assert np.isnan(found.distances).all()
    assert "max_bytes" in found.skipped
    assert "10000" in found.skipped
    with pytest.raises(krul.ShapeError, match="no rows were picked"):
        watcher.collect(0, *pairs[0], scaling=0.3)


def test_no_rows_means_nothing():
    watcher = Estimator(2, rows=0)
    assert watcher.pick_rows(0, 100) is None
    found = watcher.result()
    assert found.n_prefill_rows == 0
    assert np.isnan(found.distances).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": 2, "rows": "some"}, "rows is 'some'"),
        ({"n_layers": 2, "rows": -1}, "rows is -1"),
        ({"n_layers": 2, "decode_every": 0}, "decode_every is 0"),
        ({"n_layers": 2, "max_bytes": -1}, "max_bytes is -1"),
    ],
)
def test_the_class_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        Estimator(**arguments)


def test_collect_refuses_a_layer_beyond_the_last():
    watcher = Estimator(1)
    watcher.pick_rows(0, 3)
    with pytest.raises(krul.ShapeError, match="layer is 1 but there are 1"):
        watcher.collect(1, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), scaling=1.0)


# ---- for notebooks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"softcap": 1.5}, {"sinks": [0.5, -1, 2, 0]}]
)
def test_attention_rows_equal_the_reference(options):
    queries, keys = draw(0, 1, 2, 4, 2, 9, 30, 8, torch.bfloat16)[0]
    rows = [0, 4, 8]
    found = estimator.attention_rows(queries, keys, rows, scaling=0.3, **options)
    positions = np.array(rows) + 21
    window = options.pop("window", None)
    expected = reference.attention_rows(
        queries[:, :, rows].float().numpy(),
        keys.float().numpy(),
        positions,
        scaling=0.3,
        row_starts=None if window is None else positions - window + 1,
        **options,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_attention_rows_refuse_what_does_not_fit():
    with pytest.raises(krul.ShapeError, match=r"\(1, 3, 4, 8\).*\(1, 2, 4, 8\)"):
        estimator.attention_rows(np.ones((1, 3, 4, 8)), np.ones((1, 2, 4, 8)))
    with pytest.raises(krul.ShapeError, match=r"\(1, 2, 5, 8\).*\(1, 2, 4, 8\)"):
        estimator.attention_rows(np.ones((1, 2, 5, 8)), np.ones((1, 2, 4, 8)))
    with pytest.raises(krul.ShapeError, match="2 layers but keys_by_layer has 1"):
        similarity([1, 2], [1])


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(2, 12))
def test_similarity_is_a_distance(seed, n_layers, n_tokens):
    pairs = draw(seed, n_layers, 1, 2, 1, n_tokens, n_tokens, 4, torch.float32)
    found = similarity([q for q, _ in pairs], [k for _, k in pairs]).distances
    assert np.array_equal(found, found.T)
    assert (np.diag(found) == 0).all()
    for a, b, c in itertools.permutations(range(n_layers), 3):
        assert found[a, c] <= found[a, b] + found[b, c] + 1e-5
    order = np.random.default_rng(seed).permutation(n_layers)
    turned = similarity([pairs[i][0] for i in order], [pairs[i][1] for i in order]).distances
    np.testing.assert_allclose(turned, found[np.ix_(order, order)], rtol=1e-5, atol=1e-6)
