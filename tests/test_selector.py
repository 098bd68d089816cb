"""Selector: every rule, against the rules written out and against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import selector_reference as reference

import krul
from krul import selector


def layers(max_layers):
    """Distances with ties and NaN, importance likewise, classes, and counts."""

    @st.composite
    def build(draw):
        n_layers = draw(st.integers(0, max_layers))
        number = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, math.inf, math.nan])
        upper = draw(st.lists(number, min_size=n_layers * n_layers, max_size=n_layers * n_layers))
        distances = np.array(upper).reshape(n_layers, n_layers)
        distances = np.triu(distances, 1) + np.triu(distances, 1).T
        importance = np.array(
            draw(st.lists(st.tuples(number, number), min_size=n_layers, max_size=n_layers))
        ).reshape(n_layers, 2)
        classes = draw(st.lists(st.integers(0, 1), min_size=n_layers, max_size=n_layers))
        n_sensitive = draw(st.integers(0, n_layers + 1))
        n_pairs = draw(st.integers(0, n_layers))
        return distances, importance, classes, n_sensitive, n_pairs

    return build()


@given(layers(10))
def test_choice_follows_the_rules(case):
    distances, importance, classes, n_sensitive, n_pairs = case
    pairs = selector.choose_pairs(distances, importance, classes, n_sensitive, n_pairs)
    assert pairs.dtype == np.int32
    assert pairs.shape[1] == 2
    assert len(pairs) <= n_pairs
    flat = pairs.ravel().tolist()
    assert len(set(flat)) == len(flat), "a layer is in two pairs"
    sensitive = reference.sensitive_layers(importance.tolist(), n_sensitive)
    assert not sensitive & set(flat)
    for lower, upper in pairs.tolist():
        assert lower < upper
        assert classes[lower] == classes[upper]
        assert not math.isnan(distances[lower, upper])
    expected = reference.choose_pairs(
        distances.tolist(), importance.tolist(), classes, n_sensitive, n_pairs
    )
    assert pairs.tolist() == [list(pair) for pair in expected]


@given(layers(6))
def test_choice_equals_brute_force_over_all_matchings(case):
    distances, importance, classes, n_sensitive, n_pairs = case
    pairs = selector.choose_pairs(distances, importance, classes, n_sensitive, n_pairs)
    expected = reference.best_matching(
        distances.tolist(), importance.tolist(), classes, n_sensitive, n_pairs
    )
    assert pairs.tolist() == [list(pair) for pair in expected]


@pytest.mark.parametrize("seed", range(4))
def test_choice_equals_brute_force_at_eight_layers(seed):
    generator = np.random.default_rng(seed)
    distances = generator.integers(1, 6, (8, 8)).astype(float)
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    importance = generator.integers(0, 3, (8, 2)).astype(float)
    for n_sensitive in (0, 2):
        for n_pairs in range(5):
            pairs = selector.choose_pairs(distances, importance, [0] * 8, n_sensitive, n_pairs)
            expected = reference.best_matching(
                distances.tolist(), importance.tolist(), [0] * 8, n_sensitive, n_pairs
            )
            assert pairs.tolist() == [list(pair) for pair in expected]


def test_ties_go_to_the_nearer_pair_then_to_the_lower_layer():
    equal = np.ones((6, 6))
    assert selector.choose_pairs(equal, np.zeros(6), [0] * 6, 0, 3).tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    assert selector.choose_pairs(equal, np.zeros(6), [0, 1, 0, 1, 0, 1], 0, 3).tolist() == [
        [0, 2],
        [1, 3],
    ]


def test_equally_sensitive_layers_are_taken_from_below():
    pairs = selector.choose_pairs(np.ones((4, 4)), np.ones((4, 2)), [0] * 4, 2, 2)
    assert pairs.tolist() == [[2, 3]]


def test_both_ends_count_and_the_sum_may_be_given():
    importance = np.array([[0.0, 0.5], [0.3, 0.1], [0.2, 0.2], [0.1, 0.1]])
    both = selector.choose_pairs(np.ones((4, 4)), importance, [0] * 4, 1, 2)
    total = selector.choose_pairs(np.ones((4, 4)), importance.sum(1), [0] * 4, 1, 2)
    assert both.tolist() == total.tolist() == [[1, 2]]


def test_the_unknown_is_left_alone():
    distances = np.full((4, 4), np.nan)
    assert len(selector.choose_pairs(distances, np.zeros(4), [0] * 4, 0, 2)) == 0
    importance = np.array([0.1, np.nan, 0.9, 0.2])
    assert selector.choose_pairs(np.ones((4, 4)), importance, [0] * 4, 1, 1).tolist() == [[2, 3]]


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.integers(0, 8),
)
def test_fixed_pairs_equal_the_reference(classes, n_pairs):
    pairs = selector.fixed_pairs(classes, n_pairs)
    assert pairs.dtype == np.int32
    assert pairs.tolist() == [list(pair) for pair in reference.fixed_pairs(classes, n_pairs)]


def test_fixed_pairs_go_up_from_the_middle():
    assert selector.fixed_pairs([0] * 30, 7).tolist() == [
        [15 + 2 * i, 16 + 2 * i] for i in range(7)
    ]


@given(st.integers(0, 90), st.floats(0, 1.2))
def test_pair_count_is_the_fewest_that_reach_the_ratio(n_layers, ratio):
    assert selector.pair_count(n_layers, ratio) == reference.pair_count(n_layers, ratio)


@pytest.mark.parametrize(
    ("n_layers", "ratio", "expected"),
    [(30, 0.75, 8), (32, 0.75, 8), (20, 0.75, 5), (10, 0.9, 1), (3, 0.5, 1), (1, 0.5, 0)],
)
def test_pair_count_of_known_ratios(n_layers, ratio, expected):
    assert selector.pair_count(n_layers, ratio) == expected


@pytest.mark.parametrize(
    ("arguments", "exception", "words"),
    [
        ((np.ones((3, 2)), np.ones(3), [0] * 3, 0, 1), krul.ShapeError, r"\(3, 2\).*3 layers"),
        ((np.ones((3, 3)), np.ones((2, 2)), [0] * 3, 0, 1), krul.ShapeError, r"\(2, 2\)"),
        ((np.ones(3), np.ones(3), [0] * 3, 0, 1), krul.ShapeError, "dimensions"),
        ((np.ones((3, 3)), np.ones(3), [0] * 3, -1, 1), ValueError, "n_sensitive is -1"),
        ((np.ones((3, 3)), np.ones(3), [0] * 3, 0, -2), ValueError, "n_pairs is -2"),
        ((np.ones((3, 3)), np.ones(3), [0] * 3, 0, "two"), TypeError, "str"),
    ],
)
def test_refusals(arguments, exception, words):
    with pytest.raises(exception, match=words):
        selector.choose_pairs(*arguments)


def test_fixed_pairs_refuse():
    with pytest.raises(krul.ShapeError, match="1 dimension"):
        selector.fixed_pairs([[0, 0]], 1)
    with pytest.raises(ValueError, match="n_pairs is -1"):
        selector.fixed_pairs([0, 0], -1)


# ---- fineness ------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(0, 60),
    st.integers(0, 200),
)
def test_fineness_follows_attention(seed, n_layers, n_tokens, n_unseen, first):
    random = np.random.default_rng(seed)
    received = np.exp(3 * random.standard_normal((n_layers, n_tokens))).astype(np.float32)
    n_seen = np.minimum(64, np.maximum(n_tokens - n_unseen - np.arange(n_tokens), 0))
    found = selector.token_fineness(received, n_seen, first)
    assert found.dtype == np.int8
    assert found.shape == received.shape
    assert found.min() >= -4
    assert found.max() <= 12
    is_known = n_seen >= 8
    is_usual = is_known & (np.arange(n_tokens) >= first)
    if not is_usual.any():
        assert not found.any()
        return
    share = np.log2(received / np.maximum(n_seen, 1))
    for own, levels in zip(found, share, strict=True):
        wanted = 1.5 * (levels - np.median(levels[is_usual]))
        assert (np.abs(own - np.clip(wanted, -4, 12))[is_known] <= 0.5 + 1e-6).all()
        newest = np.clip(np.rint(np.median(np.rint(wanted[is_usual][-64:]))), -4, 12)
        assert (own[~is_known] == newest).all()


def test_layers_of_which_nothing_is_known_are_alike():
    received = np.ones((3, 20))
    received[0], received[1, 3] = 0, np.nan
    received[2, 5] = 1e9
    found = selector.token_fineness(received, np.full(20, 30))
    assert not found[:2].any()
    assert found[2].tolist() == [0] * 5 + [12] + [0] * 14


def test_fineness_refuses():
    with pytest.raises(krul.ShapeError, match=r"received is \(2, 5\) and n_seen \(4,\)"):
        selector.token_fineness(np.zeros((2, 5)), np.zeros(4))
    with pytest.raises(krul.ShapeError, match=r"received is \(5,\)"):
        selector.token_fineness(np.zeros(5), np.zeros(5))
