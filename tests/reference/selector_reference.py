"""Reference of the selector: brute force where small, and the rules written out step by step."""

from __future__ import annotations

import math
from itertools import combinations


def sensitive_layers(importance, n_sensitive):
    """Layers left alone: largest sum first, unknown before all, then the lower layer."""

    def rank(layer):
        total = importance[layer][0] + importance[layer][1]
        return (0, 0.0, layer) if math.isnan(total) else (1, -total, layer)

    return set(sorted(range(len(importance)), key=rank)[:n_sensitive])


def choose_pairs(distances, importance, layer_class, n_sensitive, n_pairs):
    """Take the best remaining pair, over and over, looking at every pair each time."""
    n_layers = len(layer_class)
    free = set(range(n_layers)) - sensitive_layers(importance, n_sensitive)
    chosen = []
    while len(chosen) < n_pairs:
        possible = [
            (distances[lower][upper], upper - lower, lower, upper)
            for lower, upper in combinations(sorted(free), 2)
            if layer_class[lower] == layer_class[upper] and not math.isnan(distances[lower][upper])
        ]
        if not possible:
            break
        _, _, lower, upper = min(possible)
        chosen.append((lower, upper))
        free -= {lower, upper}
    return chosen


def all_matchings(free, layer_class, distances):
    """Every ordered-by-rank set of disjoint pairs that the rules allow, the empty one included."""
    pairs = [
        pair
        for pair in combinations(sorted(free), 2)
        if layer_class[pair[0]] == layer_class[pair[1]]
        and not math.isnan(distances[pair[0]][pair[1]])
    ]
    found = [()]
    for pair in pairs:
        found += [(*rest, pair) for rest in found if not {*pair} & {*sum(rest, ())}]
    return found


def best_matching(distances, importance, layer_class, n_sensitive, n_pairs):
    """Among all matchings, the one whose sorted ranks come first: what greedy choice must equal.

    Ranks are unique, so a matching is a sorted list of them. A longer matching comes before its own
    beginning, because the greedy choice stops only when nothing is left.
    """

    def rank(pair):
        return (distances[pair[0]][pair[1]], pair[1] - pair[0], pair[0])

    free = set(range(len(layer_class))) - sensitive_layers(importance, n_sensitive)
    matchings = all_matchings(free, layer_class, distances)
    allowed = [sorted(matching, key=rank) for matching in matchings if len(matching) <= n_pairs]
    end = (math.inf, math.inf, math.inf, 1)  # sorts after every real rank
    return min(
        allowed,
        key=lambda matching: [(*rank(pair), 0) for pair in matching] + [end] * (len(free) + 1),
    )


def fixed_pairs(layer_class, n_pairs):
    """Adjacent layers of one class from the middle upwards."""
    chosen, lower = [], len(layer_class) // 2
    while lower + 1 < len(layer_class) and len(chosen) < n_pairs:
        if layer_class[lower] == layer_class[lower + 1]:
            chosen.append((lower, lower + 1))
            lower += 1
        lower += 1
    return chosen


def pair_count(n_layers, ratio):
    """Fewest pairs after which at most that part of the layers is kept."""
    n_pairs = 0
    while n_layers - n_pairs > ratio * n_layers + 1e-9 and n_pairs < n_layers // 2:
        n_pairs += 1
    return n_pairs
