"""Reference of restore plans: time by playing the schedule through, choice by trying everything.

Costs are any object with the fields of `krul.plan.Costs`; token counts are lists, one per layer.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np


def block_of(costs, n_tokens, token):
    """Return which block a token is in; `n_tokens` is in none, after them all."""
    if token >= n_tokens:
        return n_tokens
    if token < costs.first_block_tokens:
        return 0
    behind = token - costs.first_block_tokens
    return (costs.first_block_tokens > 0) + behind // max(costs.block_tokens, 1)


def loaded_fraction(costs, n_tokens, n_recomputed):
    """Return which part of a layer is read, counting the tokens of all blocks that are."""
    first = block_of(costs, n_tokens, n_recomputed)
    wanted = [token for token in range(n_tokens) if block_of(costs, n_tokens, token) >= first]
    return len(wanted) / n_tokens if n_tokens else 0.0


def pass_s(costs, layer, start, end):
    """Return what a layer takes for the tokens from start to end, all before them attended to."""
    if end == start:
        return 0.0
    linear = costs.linear_s_per_token[layer] * (end - start)
    quadratic = costs.quadratic_s_per_token2[layer] * (float(end) ** 2 - float(start) ** 2)
    return linear + quadratic + costs.overhead_s[layer]


def pairs_s(costs, n_tokens, n_recomputed, layer, shared):
    """Return what reading a layer's shared tokens takes, but those that are in `shared` already.

    `shared` has (upper layer, token) and gets what is read now.
    """
    seconds = 0.0
    first = block_of(costs, n_tokens, n_recomputed[layer])
    for upper in range(costs.n_layers):
        if costs.partner[upper] < 0 or layer not in (upper, costs.partner[upper]):
            continue
        for token in range(n_tokens):
            if block_of(costs, n_tokens, token) >= first and (upper, token) not in shared:
                shared.add((upper, token))
                seconds += costs.pair_read_s[upper] / n_tokens
    return seconds


def play(costs, n_tokens, n_prompt_tokens, n_recomputed, load_ends=None):
    """Play the schedule through; returns when the first token is there, and when each load ends.

    `load_ends` puts the end of some layers' loads elsewhere; the other loads stay where they are.
    """
    layers = range(costs.n_layers)
    now = sum(pass_s(costs, layer, 0, n_recomputed[layer]) for layer in layers)
    channel, ends = costs.latency_s, {}
    shared = set()
    for layer in layers:
        fraction = loaded_fraction(costs, n_tokens, n_recomputed[layer])
        decode_s = fraction * costs.decode_s[layer]
        if costs.decode_on_compute:
            now += decode_s
        if n_recomputed[layer] < n_tokens:
            read_s = fraction * costs.read_s[layer]
            read_s += pairs_s(costs, n_tokens, n_recomputed, layer, shared)
            channel += read_s if costs.decode_on_compute else max(read_s, decode_s)
            ends[layer] = channel
    for layer in layers:
        now = max(now, {**ends, **(load_ends or {})}.get(layer, 0.0))
        now += pass_s(costs, layer, n_tokens, n_tokens + n_prompt_tokens)
    return now, ends


def multiples(n_tokens, granularity, n_recomputable):
    """Return every token count that may be recomputed."""
    whole = {n_tokens} if n_recomputable == n_tokens else set()
    return sorted(whole | set(range(0, n_recomputable + 1, granularity)))


def levels(costs, n_tokens, granularity, n_recomputable):
    """Return the least of the multiples that end in one block, for each block."""
    least = {}
    for count in multiples(n_tokens, granularity, n_recomputable):
        block = block_of(costs, n_tokens, count)
        alone = costs.block_tokens <= granularity
        least.setdefault(count if alone else block, count)
    return sorted(least.values())


def candidates(shape, costs, n_tokens, granularity, n_required, n_recomputable):
    """Return every plan of a shape."""
    n_layers = costs.n_layers
    counts = multiples(n_tokens, granularity, n_recomputable)
    pairs = [(high, low) for high in counts for low in counts if low <= high]
    if shape == "load":
        found = [[0] * n_layers]
    elif shape == "recompute":
        found = [[levels(costs, n_tokens, granularity, n_recomputable)[-1]] * n_layers]
    elif shape == "uniform":
        found = [[count] * n_layers for count in counts]
    elif shape == "step":
        found = [
            [high] * n + [low] * (n_layers - n)
            for high, low in pairs
            for n in range(1, n_layers + 1)
        ]
    elif shape == "pyramid":
        steps = levels(costs, n_tokens, granularity, n_recomputable)
        gaps = max(n_layers - 1, 1)
        found = [
            [steps[(high * gaps - (high - low) * layer) // gaps] for layer in range(n_layers)]
            for high in range(len(steps))
            for low in range(high + 1)
        ]
    elif shape == "free":
        found = [list(plan) for plan in combinations_with_replacement(counts[::-1], n_layers)]
    else:
        shapes = ("load", "recompute", "uniform", "pyramid", "step")
        found = [
            plan
            for one in shapes
            for plan in candidates(one, costs, n_tokens, granularity, n_required, n_recomputable)
        ]
    return [np.maximum(plan, n_required).tolist() for plan in found]


def best_s(shape, costs, n_tokens, n_prompt_tokens, granularity, n_required, n_recomputable):
    """Return the least time of a shape: all plans without constraint are the shape "free"."""
    found = candidates(shape, costs, n_tokens, granularity, n_required, n_recomputable)
    unique = {tuple(plan) for plan in found}
    return min(play(costs, n_tokens, n_prompt_tokens, plan)[0] for plan in unique)


def bound_s(costs, n_tokens, n_prompt_tokens, n_points=400):
    """Return the largest of the weighted least times, weights and token counts on a grid."""
    counts = np.linspace(0, n_tokens, n_points + 1)
    fraction = 1 - counts / n_tokens
    layers = range(costs.n_layers)
    prompt = [pass_s(costs, layer, n_tokens, n_tokens + n_prompt_tokens) for layer in layers]
    on_compute = costs.decode_s if costs.decode_on_compute else 0 * costs.decode_s
    load_s = np.maximum(costs.read_s, costs.decode_s - on_compute)
    work = np.array([[pass_s(costs, layer, 0, n) for n in counts] for layer in layers])
    work += on_compute[:, None] * fraction
    weight = np.linspace(0, 1, n_points + 1)[:, None, None]
    least = (weight * work + (1 - weight) * load_s[:, None] * fraction).min(2).sum(1)
    weight = weight.ravel()
    split = least + weight * sum(prompt) + (1 - weight) * (costs.latency_s + prompt[-1])
    return min(split.max(), play(costs, n_tokens, n_prompt_tokens, [n_tokens] * costs.n_layers)[0])
