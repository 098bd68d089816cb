"""What a profile is, in float64 NumPy and from the rows themselves instead of their sums."""

import numpy as np

RIDGE = 1e-2
FLOOR = 1e-2
MAX_COARSER = 5.0
DISTANCES = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def turn_matrix(convention, start, frequencies, head_dim, position):
    """Return the matrix M with rotated = M @ key, without scaling."""
    out = np.eye(head_dim)
    n_pairs = len(frequencies)
    for pair, frequency in enumerate(frequencies):
        if convention == "half":
            first, second = start + pair, start + n_pairs + pair
        else:
            first, second = start + 2 * pair, start + 2 * pair + 1
        angle = float(position) * float(frequency)
        out[first, first] = out[second, second] = np.cos(angle)
        out[first, second], out[second, first] = -np.sin(angle), np.sin(angle)
    return out


def root(metric):
    dim = len(metric)
    size = np.trace(metric) / dim
    values, vectors = np.linalg.eigh(metric + FLOOR * size * np.eye(dim))
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def block_diagonal(blocks):
    n = sum(len(block) for block in blocks)
    out, start = np.zeros((n, n)), 0
    for block in blocks:
        out[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return out


def weight(centred, key_metrics, value_metrics, divisors):
    """Return the weight A of one layer, rows @ A being the weighted ones."""
    start, blocks = 0, []
    for metrics, divisor in zip((key_metrics, value_metrics), divisors, strict=True):
        roots = [root(metric) for metric in metrics]
        one = block_diagonal(roots)
        part = centred[:, start : start + len(one)] @ one
        size = np.sqrt((part**2).mean())
        blocks += [matrix / (divisor * size) for matrix in roots]
        start += len(one)
    return block_diagonal(blocks)


def divisors_of(sensitivities):
    average = np.exp(np.log(sensitivities).mean())
    return np.minimum((sensitivities / average) ** -0.5, MAX_COARSER)


def solve(rows, sources, key_metrics, value_metrics, sensitivities):
    """Return by layer: mean, weight, map in the plain domain, covariance of what is left."""
    divisors = divisors_of(sensitivities)
    centred = [x - x.mean(0) for x in rows]
    weights = [
        weight(centred[i], key_metrics[i], value_metrics[i], divisors[:, i])
        for i in range(len(rows))
    ]
    weighted = [x @ a for x, a in zip(centred, weights, strict=True)]
    out = []
    for i, x in enumerate(rows):
        left = weighted[i]
        plain_map = np.zeros((0, x.shape[1]))
        if sources[i]:
            z = np.concatenate([weighted[s] for s in sources[i]], axis=1)
            gram = z.T @ z
            ridge = RIDGE * np.trace(gram) / len(gram)
            weighted_map = np.linalg.solve(gram + ridge * np.eye(len(gram)), z.T @ left)
            left = left - z @ weighted_map
            wide = block_diagonal([weights[s] for s in sources[i]])
            plain_map = wide @ weighted_map @ np.linalg.inv(weights[i])
        out.append((x.mean(0), weights[i], plain_map, left.T @ left / len(left)))
    return out


def code(rows, layers, step, keep_first):
    """Return what `predict` decodes, by layer; `layers` are (sources, mean, F, B, maps)."""
    decoded, out = {}, {}
    for i, (sources, mean, forward, backward, maps) in layers.items():
        z = rows[i] - mean
        prediction = (
            np.concatenate([decoded[s] for s in sources], axis=1) @ maps
            if sources
            else np.zeros_like(z)
        )
        decoded[i] = np.rint((z - prediction) @ forward / step) * step @ backward + prediction
        decoded[i][:keep_first] = z[:keep_first]
        out[i] = decoded[i] + mean
    return out
