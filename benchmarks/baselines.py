"""What others do to a KV cache, for the quality benchmark: each written with care, bytes counted.

A codec is a small class with a `family` (its line in the plot), a `parameter` (its place on it) and
`roundtrip`, which takes a `History` and returns what comes back and how many bytes that needs. All
headers, scales, tables and exact tokens are counted; what a model needs once (a basis) is not.

Sources: MiniCache, arXiv 2405.14366; H2O, arXiv 2306.14048; KVTC, arXiv 2511.01815; transformers'
`QuantizedCache` with optimum-quanto.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEP_FIRST = 4
ITEM_BYTES = 2  # of bfloat16, in which all K/V are kept

KeysAndValues = list[tuple[torch.Tensor, torch.Tensor]]
Pairs = tuple[tuple[int, int], ...]


def cache_folder() -> Path:
    """Return where slow intermediate results are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "krul" / "benchmarks" / "quality"


@dataclass
class History:
    """What a codec may look at: the K/V of some tokens, and how the model came by them.

    Attributes
    ----------
    ids : torch.Tensor
        int64, 1 x n_tokens.
    layers : list of (keys, values)
        bfloat16, 1 x n_kv_heads x n_tokens x head_dim; keys are rotated.
    cos, sin : torch.Tensor
        float32, n_tokens x head_dim: the rotary embedding of each token.
    pairs : tuple of (lower, upper)
        The paper's pairs, closest first.
    queries : list of torch.Tensor
        Un-rotated, n_tokens x (n_heads head_dim) per layer; empty where nobody asks for them.
    fineness : numpy.ndarray or None
        What krul makes of the attention of the last tokens; None where nobody asks for it.
    """

    ids: torch.Tensor
    layers: KeysAndValues
    cos: torch.Tensor
    sin: torch.Tensor
    pairs: Pairs = ()
    queries: list[torch.Tensor] = field(default_factory=list)
    fineness: np.ndarray | None = None
    memo: dict[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """How long the history is."""
        return self.layers[0][0].shape[2]

    @property
    def bf16_bytes(self) -> int:
        """How many bytes it takes uncompressed."""
        return sum(ITEM_BYTES * tensor.numel() for layer in self.layers for tensor in layer)

    @functools.cached_property
    def attention(self) -> list[torch.Tensor]:
        """Attention that each token received from all later ones, n_kv_heads x n_tokens a layer."""
        if len(self.queries) != len(self.layers):
            raise ValueError(
                f"queries has {len(self.queries)} layers but layers has {len(self.layers)}"
            )
        return [
            received_attention(rotate(heads(q, k.shape[-1]), self.cos, self.sin), k[0].float())
            for q, (k, _) in zip(self.queries, self.layers, strict=True)
        ]


@dataclass
class Restored:
    """K/V as they come back, possibly of fewer tokens, and the bytes that were kept."""

    layers: KeysAndValues
    stored_bytes: int
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Codec:
    """One way to keep a history. `needs` may name ``pairs`` and ``queries``."""

    family: str
    parameter: str
    run: Callable[[History], Restored]
    needs: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What the table calls it."""
        return f"{self.family}: {self.parameter}" if self.parameter else self.family

    def roundtrip(self, history: History) -> Restored:
        """Keep a history and give it back."""
        return self.run(history)


# Shapes and rotations.


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + rotate_half(x) * sin


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos - rotate_half(x) * sin


def heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Turn n_tokens x (n_heads head_dim) into n_heads x n_tokens x head_dim."""
    return x.view(x.shape[0], -1, head_dim).transpose(0, 1)


def rows(x: torch.Tensor) -> torch.Tensor:
    """Turn 1 x n_heads x n_tokens x head_dim into n_tokens x (n_heads head_dim)."""
    return x[0].transpose(0, 1).reshape(x.shape[2], -1)


def received_attention(
    queries: torch.Tensor, keys: torch.Tensor, n_rows: int = 256
) -> torch.Tensor:
    """Sum causal attention weights over all queries, and over the query heads of each KV head.

    Parameters
    ----------
    queries : torch.Tensor
        float32, n_heads x n_tokens x head_dim, rotated.
    keys : torch.Tensor
        float32, n_kv_heads x n_tokens x head_dim, rotated.
    n_rows : int
        Queries taken at once: bounds the memory.

    Returns
    -------
    torch.Tensor
        float32, n_kv_heads x n_tokens.
    """
    n_kv_heads, n_tokens, head_dim = keys.shape
    grouped = queries.reshape(n_kv_heads, -1, n_tokens, head_dim) / math.sqrt(head_dim)
    total = torch.zeros(n_kv_heads, n_tokens)
    for start in range(0, n_tokens, n_rows):
        end = min(start + n_rows, n_tokens)
        scores = grouped[:, :, start:end] @ keys[:, None, :end].transpose(-1, -2)
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        scores[..., start:].masked_fill_(later, -math.inf)
        total[:, :end] += scores.softmax(-1).sum((1, 2))
    return total


# Integers in groups.


@dataclass
class Quantised:
    """A tensor after quantisation, and its bytes."""

    values: torch.Tensor
    n_bytes: int


def quantise(x: torch.Tensor, axis: int, bits: int, group: int) -> Quantised:
    """Round to `bits` in groups along one axis, each with a bfloat16 scale and minimum.

    The last group may be shorter; its scale and minimum are counted like those of any other.
    """
    length = x.shape[axis]
    n_groups = -(-length // group)
    missing = n_groups * group - length
    y = x.float()
    if missing:  # repeats of the last value change no minimum and no maximum
        last = y.narrow(axis, length - 1, 1)
        y = torch.cat((y, last.repeat_interleave(missing, axis)), axis)
    y = y.unflatten(axis, (n_groups, group))
    inner = axis + 1 if axis >= 0 else axis
    low, high = y.amin(inner, keepdim=True), y.amax(inner, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-8).bfloat16().float()
    low = low.bfloat16().float()
    y = ((y - low) / scale).round().clamp(0, 2**bits - 1) * scale + low
    y = y.flatten(inner - 1, inner) if axis >= 0 else y.flatten(axis - 1, axis)
    n_bytes = -(-x.numel() * bits // 8) + scale.numel() * 2 * ITEM_BYTES
    return Quantised(y.narrow(axis, 0, length).to(x.dtype), n_bytes)


def grouped_integers(bits: int, group: int, keep_first: int = KEEP_FIRST) -> Codec:
    """Keys per channel over `group` tokens, values per token over `group` channels (as in KIVI)."""

    def run(history: History) -> Restored:
        layers, n_bytes = [], 0
        for keys, values in history.layers:
            k = quantise(keys[:, :, keep_first:], 2, bits, group)
            v = quantise(values[:, :, keep_first:], 3, bits, min(group, values.shape[3]))
            first = keys[:, :, :keep_first], values[:, :, :keep_first]
            layers.append((torch.cat((first[0], k.values), 2), torch.cat((first[1], v.values), 2)))
            n_bytes += k.n_bytes + v.n_bytes + sum(ITEM_BYTES * x.numel() for x in first)
        return Restored(layers, n_bytes)

    return Codec(f"integers in groups of {group}", f"{bits} bits", run)


def quanto_like(bits: int, group: int = 64) -> Codec:
    """Do what transformers' quantised cache does to a prompt: both per token, none exact."""

    def run(history: History) -> Restored:
        layers, n_bytes = [], 0
        for layer in history.layers:
            k, v = (quantise(x, 3, bits, min(group, x.shape[3])) for x in layer)
            layers.append((k.values, v.values))
            n_bytes += k.n_bytes + v.n_bytes
        return Restored(layers, n_bytes)

    return Codec("transformers' quantised cache (re-made)", f"{bits} bits", run)


# Eviction.


def heavy_hitters(ratio: float, keep_first: int = KEEP_FIRST) -> Codec:
    """Keep 1/ratio of the tokens of each head: half the latest, half the most attended."""

    def run(history: History) -> Restored:
        n_tokens = history.n_tokens
        n_kept = max(keep_first + 1, int(n_tokens / ratio))
        n_recent = n_kept // 2
        layers, n_bytes = [], 0
        for (keys, values), mass in zip(history.layers, history.attention, strict=True):
            score = mass.clone()
            score[:, :keep_first] = math.inf
            score[:, n_tokens - n_recent :] = math.inf
            kept = score.topk(n_kept, dim=1).indices.sort(dim=1).values
            where = kept[None, :, :, None].expand(-1, -1, -1, keys.shape[3])
            layers.append((keys.gather(2, where), values.gather(2, where)))
            n_bytes += sum(ITEM_BYTES * x.numel() for x in layers[-1])
        return Restored(layers, n_bytes)  # a key carries its position: no index is needed

    return Codec("H2O", f"1/{ratio:g} kept", run, frozenset({"queries"}))


# Transform coding.

N_COMPONENTS = 4096
GROUP = 16
MAX_BITS = 8
KEEP_LAST = 128
_SAMPLE_EVERY = 24
_FACTORS = np.geomspace(0.015, 3.0, 28)


class Moments:
    """Mean and covariance of wide vectors, added up text by text, with a thin sample of them."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)
        self.sample: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Add n x width vectors."""
        self.n += len(x)
        self.sum += x.sum(0, dtype=torch.float64)
        self.products += x.T @ x
        self.sample.append(x[::_SAMPLE_EVERY].bfloat16())

    def mean(self) -> torch.Tensor:
        """Return the mean of all vectors."""
        return (self.sum / self.n).float()

    def covariance(self) -> torch.Tensor:
        """Return the covariance of all vectors."""
        mean = self.sum / self.n
        return (self.products / self.n - torch.outer(mean, mean)).float()


def leading_eigenvectors(matrix: torch.Tensor, n: int) -> torch.Tensor:
    """Return the first `n` eigenvectors of a covariance as columns, the largest first.

    By subspace iteration where that is cheaper; KVTC's own basis is a randomised one too.
    """
    width = len(matrix)
    if n * 2 >= width:
        return torch.linalg.eigh(matrix)[1].flip(1)[:, :n].contiguous()
    q = torch.randn(width, min(width, n + 32), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        q = torch.linalg.qr(matrix @ q)[0]
    small = q.T @ matrix @ q
    return (q @ torch.linalg.eigh((small + small.T) / 2)[1].flip(1))[:, :n].contiguous()


@dataclass
class Basis:
    """The joint transform of all layers: [0] of the un-rotated keys, [1] of the values.

    `errors[kv][group, bits]` is the squared error left of a calibration sample, relative to its
    whole variance; `factors[kv][group, bits]` the step that leaves it, relative to the group's rms.
    """

    mean: list[torch.Tensor]
    vectors: list[torch.Tensor]
    deviation: list[float]
    errors: list[np.ndarray]
    factors: list[np.ndarray]


def wide_rows(history: History, kv: int, start: int = 0, end: int | None = None) -> torch.Tensor:
    """Put all layers' keys (un-rotated) or values of each token side by side, float32."""
    parts = []
    for layer in history.layers:
        x = layer[kv][:, :, start:end].float()
        if kv == 0:
            x = unrotate(x, history.cos[start:end], history.sin[start:end])
        parts.append(rows(x))
    return torch.cat(parts, 1)


def fit_basis(histories: Iterable[History], n_components: int = N_COMPONENTS) -> Basis:
    """Fit the transform to calibration histories, one at a time in memory."""
    moments: list[Moments] = []
    for history in histories:
        for kv in (0, 1):
            x = wide_rows(history, kv, KEEP_FIRST)
            if len(moments) <= kv:
                moments.append(Moments(x.shape[1]))
            moments[kv].add(x)
    basis = Basis([], [], [], [], [])
    for one in moments:
        mean, covariance = one.mean(), one.covariance()
        n = min(n_components, len(mean)) // GROUP * GROUP
        vectors = leading_eigenvectors(covariance, n)
        variance = float(covariance.diagonal().mean())
        sample = ((torch.cat(one.sample).float() - mean) @ vectors).numpy()
        errors, factors = quantisation_errors(sample)
        basis.mean.append(mean)
        basis.vectors.append(vectors)
        basis.deviation.append(math.sqrt(variance))
        basis.errors.append(errors / (variance * len(mean)))
        basis.factors.append(factors)
    return basis


def levels(x: np.ndarray, step: float, bits: int) -> np.ndarray:
    """Return cell numbers of a uniform quantiser with 2^bits cells, symmetric around 0."""
    return np.clip(np.floor(x / step) + 2 ** (bits - 1), 0, 2**bits - 1).astype(np.uint8)


def values_of(numbers: np.ndarray, step: float, bits: int) -> np.ndarray:
    """Return the middles of numbered cells."""
    return (numbers.astype(np.float32) - 2 ** (bits - 1) + 0.5) * np.float32(step)


def quantisation_errors(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for each group of components and each number of bits the best step and its error.

    Returns
    -------
    errors, factors : numpy.ndarray
        n_groups x (MAX_BITS + 1): mean squared error per token, summed over the group; step by rms.
    """
    n_groups = sample.shape[1] // GROUP
    errors = np.zeros((n_groups, MAX_BITS + 1))
    factors = np.ones((n_groups, MAX_BITS + 1))
    for g in range(n_groups):
        x = sample[:, g * GROUP : (g + 1) * GROUP]
        rms = max(float(np.sqrt((x**2).mean())), 1e-12)
        errors[g, 0] = (x**2).sum(1).mean()
        for bits in range(1, MAX_BITS + 1):
            found = [
                ((values_of(levels(x, f * rms, bits), f * rms, bits) - x) ** 2).sum(1).mean()
                for f in _FACTORS
            ]
            best = int(np.argmin(found))
            errors[g, bits], factors[g, bits] = found[best], _FACTORS[best]
    return errors, factors


def allocate(errors: np.ndarray, budget: int) -> np.ndarray:
    """Give each group a number of bits so that the errors' sum is least: dynamic programming.

    Parameters
    ----------
    errors : numpy.ndarray
        n_groups x n_choices: what remains of a group with 0, 1, 2 ... bits.
    budget : int
        Bits of all groups together; may stay unused.

    Returns
    -------
    numpy.ndarray
        int64, n_groups.
    """
    n_groups, n_choices = errors.shape
    best = np.zeros(budget + 1)
    choice = np.zeros((n_groups, budget + 1), np.int64)
    for g in range(n_groups):
        table = np.full((n_choices, budget + 1), np.inf)
        for bits in range(min(n_choices, budget + 1)):
            table[bits, bits:] = best[: budget + 1 - bits] + errors[g, bits]
        choice[g] = table.argmin(0)
        best = table.min(0)
    left = budget
    chosen = np.zeros(n_groups, np.int64)
    for g in reversed(range(n_groups)):
        chosen[g] = choice[g, left]
        left -= chosen[g]
    return chosen


def deflated_bytes(numbers: np.ndarray, bits: int) -> int:
    """Return the bytes of one group's integers, packed or one a byte, deflated where that helps."""
    by_component = np.ascontiguousarray(numbers.T)
    planes = (by_component[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(planes.astype(np.uint8).reshape(-1)).tobytes()
    huffman = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    coded = huffman.compress(by_component.tobytes()) + huffman.flush()
    return min(len(packed), len(zlib.compress(packed, 6)), len(coded))


def entropy_bytes(numbers: np.ndarray) -> float:
    """Return the ideal code length of integers, n x n_components, and 1.5 bytes a table's entry.

    Each group of components has one table for all or one for each, whichever is shorter.
    """

    def coded(x: np.ndarray) -> float:
        counts = np.bincount(x - x.min())
        counts = counts[counts > 0]
        return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8 + 1.5 * len(counts)

    n_bytes = 0.0
    for start in range(0, numbers.shape[1], GROUP):
        group = numbers[:, start : start + GROUP].astype(np.int64)
        n_bytes += min(coded(group.reshape(-1)), sum(coded(column) for column in group.T))
    return n_bytes


def _coefficients(history: History, basis: Basis) -> list[torch.Tensor]:
    """Return all tokens' coefficients, [keys, values]; kept, for every parameter needs them."""
    if "coefficients" not in history.memo:
        history.memo["coefficients"] = [
            (wide_rows(history, kv) - basis.mean[kv]) @ basis.vectors[kv] for kv in (0, 1)
        ]
    return history.memo["coefficients"]


def _layers_of(
    history: History, basis: Basis, decoded: list[torch.Tensor], used: list[np.ndarray]
) -> KeysAndValues:
    """Turn decoded coefficients of the `used` components back into K/V of all layers."""
    wide = [
        (decoded[kv] @ basis.vectors[kv][:, torch.from_numpy(used[kv])].T + basis.mean[kv]).split(
            basis.mean[kv].numel() // len(history.layers), 1
        )
        for kv in (0, 1)
    ]
    layers = []
    for index, (keys, _) in enumerate(history.layers):
        k, v = (heads(wide[kv][index], keys.shape[-1])[None] for kv in (0, 1))
        layers.append((rotate(k, history.cos, history.sin).to(keys.dtype), v.to(keys.dtype)))
    return layers


def _put_back(history: History, layers: KeysAndValues, first: int, last: int) -> int:
    """Make the first and last tokens exact again and return their bytes."""
    n_tokens = history.n_tokens
    for exact, coded in zip(history.layers, layers, strict=True):
        for before, after in zip(exact, coded, strict=True):
            after[:, :, :first] = before[:, :, :first]
            after[:, :, n_tokens - last :] = before[:, :, n_tokens - last :]
    return history.bf16_bytes // n_tokens * min(n_tokens, first + last)


def transform_coding(basis: Callable[[], Basis], bits_per_value: float) -> Codec:
    """KVTC: bits given to groups of components, uniform quantisation, DEFLATE.

    Each group's step is relative to its rms in this very history and counted (bfloat16). The first
    4 and the last 128 tokens are exact, as in the paper. `basis` is called when it is first needed.
    """

    def run(history: History) -> Restored:
        known = basis()
        n_tokens = history.n_tokens
        last = min(KEEP_LAST, n_tokens - KEEP_FIRST)
        middle = slice(KEEP_FIRST, n_tokens - last)
        width = sum(x.numel() for x in known.mean)
        n_groups = [len(x) for x in known.errors]
        bits = allocate(np.concatenate(known.errors), round(bits_per_value * width / GROUP))
        split = np.split(bits, [n_groups[0]])
        n_bytes, ideal = math.ceil(len(bits) / 2), 0.0  # four bits say how many bits a group has
        decoded, used = [], []
        for kv in (0, 1):
            y = _coefficients(history, known)[kv].numpy()
            groups = np.flatnonzero(split[kv])
            out = np.zeros((n_tokens, len(groups) * GROUP), np.float32)
            for at, g in enumerate(groups):
                b = int(split[kv][g])
                x = y[middle, g * GROUP : (g + 1) * GROUP]
                rms = float(np.sqrt((x**2).mean())) if x.size else 0.0
                wanted = max(known.factors[kv][g, b] * rms, 1e-12)
                step = float(torch.tensor(wanted).bfloat16())
                numbers = levels(x, step, b)
                out[middle, at * GROUP : (at + 1) * GROUP] = values_of(numbers, step, b)
                n_bytes += ITEM_BYTES + (deflated_bytes(numbers, b) if x.size else 0)
                ideal += ITEM_BYTES + (entropy_bytes(numbers) if x.size else 0)
            decoded.append(torch.from_numpy(out))
            used.append((groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1))
        layers = _layers_of(history, known, decoded, used)
        exact = _put_back(history, layers, KEEP_FIRST, last)
        about = {"ideal_bytes": math.ceil(ideal) + math.ceil(len(bits) / 2) + exact}
        return Restored(layers, n_bytes + exact, about)

    return Codec("KVTC (DEFLATE)", f"{bits_per_value:g} bits", run)


def one_step_transform(basis: Callable[[], Basis], step: float) -> Codec:
    """KVTC's transform at its best: one step for all components, ideal entropy, 4 tokens exact.

    `step` is relative to the rms of all keys, or of all values. No entropy coder reaches the ideal
    code length; the tables are counted.
    """

    def run(history: History) -> Restored:
        known = basis()
        n_bytes = 0.0
        decoded, used = [], []
        for kv in (0, 1):
            width = step * known.deviation[kv]
            y = _coefficients(history, known)[kv].numpy()
            numbers = np.rint(y / width).astype(np.int64)
            numbers[:KEEP_FIRST] = 0
            n_bytes += entropy_bytes(numbers[KEEP_FIRST:]) + ITEM_BYTES
            some = np.flatnonzero(numbers.any(0))
            decoded.append(torch.from_numpy((numbers[:, some] * width).astype(np.float32)))
            used.append(some)
        layers = _layers_of(history, known, decoded, used)
        exact = _put_back(history, layers, KEEP_FIRST, 0)
        return Restored(layers, math.ceil(n_bytes) + exact)

    return Codec("KVTC transform (one step and ideal entropy)", f"{step:g}", run)


def load_basis(
    what: str,
    histories: Callable[[], Iterable[History]],
    n_components: int = N_COMPONENTS,
    folder: Path | None = None,
) -> Basis:
    """Read a fitted basis from disk, or fit it and keep it there.

    `what` says what it was fitted to; another text gives another file.
    """
    name = hashlib.sha256(f"{what} {n_components} {GROUP} {MAX_BITS}".encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"basis-{name}.pt"
    tables = ("errors", "factors")
    if path.is_file():
        found = torch.load(path, weights_only=True)
        return Basis(**found | {name: [x.numpy() for x in found[name]] for name in tables})
    basis = fit_basis(histories(), n_components)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    plain = vars(basis) | {
        name: [torch.from_numpy(x) for x in vars(basis)[name]] for name in tables
    }
    torch.save(plain, scratch)
    scratch.replace(path)
    return basis
