"""Float64 reference of the estimator: whole attention rows, in plain NumPy, nothing in tiles."""

from __future__ import annotations

import numpy as np


def attention_rows(
    queries,
    keys,
    row_positions,
    *,
    scaling,
    softcap=0.0,
    sinks=None,
    row_starts=None,
    key_start=0,
    key_is_real=None,
    n_keys_total=None,
    dtype=np.float64,
):
    """Softmax rows, n_batch x n_heads x n_rows x n_keys_total, zero where nothing is seen.

    ``dtype=np.float32`` is the plain low-precision implementation that tolerances are made from.
    """
    queries = np.asarray(queries, dtype)
    keys = np.asarray(keys, dtype)
    n_batch, n_heads, n_rows, _ = queries.shape
    n_kv_heads, n_keys = keys.shape[1:3]
    n_keys_total = key_start + n_keys if n_keys_total is None else n_keys_total
    keys = np.repeat(keys, n_heads // n_kv_heads, axis=1)
    scores = np.matmul(queries, keys.swapaxes(-1, -2)) * dtype(scaling)
    if softcap:
        scores = np.tanh(scores / dtype(softcap)) * dtype(softcap)
    seen = visible(row_positions, row_starts, key_start, n_keys, key_is_real, n_batch)
    scores = np.where(seen[:, None], scores, -np.inf)
    highest = scores.max(-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sinks = np.asarray(sinks, dtype)[None, :, None, None]
        highest = np.maximum(highest, sinks)
    highest = np.where(np.isneginf(highest), 0, highest)
    powers = np.exp(scores - highest)
    total = powers.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - highest)
    total = np.where(seen.any(-1)[:, None, :, None], total, 1)
    rows = np.zeros((n_batch, n_heads, n_rows, n_keys_total), dtype)
    rows[..., key_start : key_start + n_keys] = powers / total
    return rows


def visible(row_positions, row_starts, key_start, n_keys, key_is_real, n_batch):
    """Return which keys each row sees, n_batch x n_rows x n_keys."""
    row_positions = np.asarray(row_positions)
    positions = key_start + np.arange(n_keys)
    seen = positions[None] <= row_positions[:, None]
    if row_starts is not None:
        row_starts = np.atleast_2d(row_starts)  # one for all batch entries, or one for each
        seen = seen[None] & (positions >= row_starts[:, :, None])
    seen = np.broadcast_to(seen, (n_batch, *seen.shape[-2:])).copy()
    if key_is_real is not None:
        key_is_real = np.asarray(key_is_real, bool)
        seen &= key_is_real[:, None, key_start : key_start + n_keys]
        seen &= key_is_real[:, row_positions][:, :, None]
    return seen


def sums(rows_by_layer, row_positions, *, key_is_real=None, weight=1.0):
    """Distances, importance, received mass and row count of rows as `attention_rows` gives them.

    An entry None is a layer that was not observed.
    """
    n_layers = len(rows_by_layer)
    known = [rows for rows in rows_by_layer if rows is not None]
    n_batch, _, n_rows, n_keys = known[0].shape
    if key_is_real is None:
        key_is_real = np.ones((n_batch, n_keys), bool)
    key_is_real = np.asarray(key_is_real, bool)
    distances = np.full((n_layers, n_layers), np.nan)
    importance = np.zeros((n_layers, 2))
    received = np.zeros((n_layers, n_keys))
    for lower, left in enumerate(rows_by_layer):
        for upper, right in enumerate(rows_by_layer):
            if left is not None and right is not None and left.shape[1] == right.shape[1]:
                distances[lower, upper] = weight * np.square(left - right).sum(dtype=np.float64)
        if left is None:
            continue
        received[lower] = weight * left.sum((0, 1, 2), dtype=np.float64)
        for b in range(n_batch):
            first = int(np.argmax(key_is_real[b]))
            for r in range(n_rows):
                position = int(row_positions[r])
                if not key_is_real[b, position]:
                    continue
                n_tenth = max(1, (position - first + 1) // 10)
                row = left[b, :, r].mean(0, dtype=np.float64)
                importance[lower, 0] += weight * row[first : first + n_tenth].sum()
                importance[lower, 1] += weight * row[position - n_tenth + 1 : position + 1].sum()
    n_real_rows = weight * float(key_is_real[:, np.asarray(row_positions, int)].sum())
    return distances, importance, received, n_real_rows


def query_moments(queries, n_kv_heads):
    """Sum of q q^T per KV head, n_kv_heads x head_dim x head_dim."""
    queries = np.asarray(queries, np.float64)
    n_batch, n_heads, n_rows, head_dim = queries.shape
    grouped = queries.reshape(n_batch, n_kv_heads, n_heads // n_kv_heads * n_rows, head_dim)
    return np.einsum("bgrd,bgre->gde", grouped, grouped)
