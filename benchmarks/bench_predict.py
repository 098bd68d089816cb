"""How fast codec predict encodes and decodes a conversation of SmolLM2's shape.

30 layers of 3 heads of 64 numbers, 4,096 tokens in runs of 512, each layer predicted from the two
before it. The profile is a random one and the data are drawn as it expects them, so that a step of
1.2, finer or coarser by token as attention makes it, gives about 1.2 bits per number; every decoded
block is compared with what the encoder promised.

The time of the parts is that of the same products, and of column streams with the same numbers,
measured alone. Conversion is what is left: rotation, rounding to the dtype, side information.

    python -m benchmarks.bench_predict [--json FILE] [--quick]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from krul import _core, blas
from krul.predictor import UNIT_TABLE
from krul.profile import TABLE_SCALES

from . import harness

N_LAYERS, N_HEADS, HEAD_DIM = 30, 3, 64
WIDTH = 2 * N_HEADS * HEAD_DIM
RUN_TOKENS = 512
STEP = 1.2
COLUMNS = [
    ("dtype", "dtype", ""),
    ("products", "products of", ""),
    ("n_threads", "threads", "d"),
    ("what", "", ""),
    ("bits", "bits per number", ".2f"),
    ("wall_s", "s", ".2f"),
    ("cpu_s", "CPU s", ".2f"),
    ("entropy_s", "of it rANS", ".2f"),
    ("products_s", "products", ".2f"),
    ("conversion_s", "conversion", ".2f"),
    ("kv_gb_s", "GB/s of KV", ".2f"),
]


@dataclass
class Layer:
    """What a profile has of one layer."""

    sources: tuple[int, ...]
    mean: np.ndarray
    deviation: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    maps: np.ndarray


def make_profile() -> list[Layer]:
    """Make bases that are orthogonal and maps that are small."""
    random = np.random.default_rng(0)
    layers = []
    for index in range(N_LAYERS):
        sources = tuple(range(max(index - 2, 0), index))
        basis, _ = np.linalg.qr(random.standard_normal((WIDTH, WIDTH)))
        size = 0.5 / np.sqrt(max(len(sources), 1) * WIDTH)
        maps = size * random.standard_normal((len(sources) * WIDTH, WIDTH))
        layers.append(
            Layer(
                sources,
                np.float32(random.standard_normal(WIDTH)),
                np.float32(3.5 * np.exp(-5 * np.arange(WIDTH) / WIDTH)),
                np.float32(basis),
                np.ascontiguousarray(basis.T, np.float32),
                np.float32(maps),
            )
        )
    return layers


def make_tables() -> np.ndarray:
    """Make Laplace tables, three to an octave; a symbol that is rarer than a slot is left out."""
    distance = np.abs(np.arange(256) - 127)
    share = np.exp(-distance * np.sqrt(2) / TABLE_SCALES[:, None])
    tables = np.floor(share / share.sum(1, keepdims=True) * 4080).astype(np.uint16)
    tables[:, 255] = 2
    tables[:, 127] += 4096 - tables.sum(1, dtype=np.uint16)
    return tables


class Conversation:
    """KV as the profile expects it, the profile made ready, and one column stream of it."""

    def __init__(self, dtype: torch.dtype, n_tokens: int, is_narrow: bool) -> None:
        self.layers, self.tables = make_profile(), make_tables()
        self.is_narrow = is_narrow  # products are of bfloat16
        self.n_tokens = n_tokens
        self.library = blas.find()
        random = np.random.default_rng(1)
        angle = np.arange(n_tokens)[:, None] / 10_000.0 ** (np.arange(HEAD_DIM // 2) * 2 / HEAD_DIM)
        self.cos, self.sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        # Most tokens are as loud as all, some are not.
        loud = np.float32(2.0 ** (random.choice([0, 0, 0, -1, 1, 2], n_tokens) / 3))
        fineness = np.rint(2.5 * random.standard_normal(n_tokens))
        self.fineness = fineness.clip(-4, 12).astype(np.int8)
        rows: list[np.ndarray] = []
        self.arrays = []
        for layer in self.layers:
            drawn = random.laplace(0, np.sqrt(0.5), (n_tokens, WIDTH)).astype(np.float32)
            own = drawn * loud[:, None] * layer.deviation
            made = own @ layer.backward
            if layer.sources:
                made += np.concatenate([rows[source] for source in layer.sources], 1) @ layer.maps
            rows.append(made)
            both = (made + layer.mean).reshape(n_tokens, 2, N_HEADS, HEAD_DIM)
            keys, values = both.transpose(1, 2, 0, 3)
            x, y = keys[..., : HEAD_DIM // 2], keys[..., HEAD_DIM // 2 :]
            turned = np.concatenate(
                [x * self.cos - y * self.sin, y * self.cos + x * self.sin], axis=-1
            )
            self.arrays.append(
                [
                    torch.from_numpy(np.ascontiguousarray(each)).to(dtype)[None]
                    for each in (turned, values)
                ]
            )
        steps = STEP * 2.0 ** (-self.fineness[:RUN_TOKENS] / 3)
        self.values = np.rint(own[:RUN_TOKENS].T / steps).astype(np.int32)
        self.values = np.ascontiguousarray(self.values)
        level = np.floor(3 * np.log2(layer.deviation / STEP)).astype(int) + UNIT_TABLE
        self.classes = np.where(self.values.any(1), level.clip(0, 33), 255).astype(np.uint8)
        louder = np.rint(3 * np.log2(loud[:RUN_TOKENS])).astype(np.int8)
        self.shifts = louder + self.fineness[:RUN_TOKENS]
        self.out = [[torch.zeros_like(each) for each in both] for both in self.arrays]
        self.n_values = n_tokens * WIDTH * N_LAYERS
        self.kv_bytes = sum(each.nbytes for both in self.arrays for each in both)

    def predictor(self) -> _core.Predict:
        """Make the profile ready."""
        pairs = (1, 0, HEAD_DIM // 2, self.cos, self.sin)
        layers = [
            (N_HEADS, HEAD_DIM, each.sources, 0, each.mean, each.deviation, each.forward,
             each.backward, each.maps if each.sources else None, None, None, *pairs)
            for each in self.layers
        ]  # fmt: skip
        narrow = [
            (bits(each.forward), bits(each.backward), bits(each.maps), None, None)
            for each in (self.layers if self.is_narrow else ())
        ]
        return _core.Predict(
            self.library.handle,
            self.tables,
            UNIT_TABLE,
            layers,
            1,
            0,
            self.n_tokens,
            narrow=narrow or None,
            is_rounded=self.is_narrow,
        )

    def encode(self, n_threads: int) -> list[Any]:
        """Encode everything; by run and layer (payload, error, power)."""
        runs = [
            [
                (
                    index,
                    low,
                    *(each[:, :, low : low + RUN_TOKENS] for each in both),
                    self.fineness[low : low + RUN_TOKENS],
                )
                for index, both in enumerate(self.arrays)
            ]
            for low in range(0, self.n_tokens, RUN_TOKENS)
        ]
        return self.predictor().encode(runs, STEP, n_threads)

    def decode(self, coded: list[Any], n_threads: int) -> None:
        """Decode everything into `out`."""
        runs = []
        for run, own in enumerate(coded):
            low, high = run * RUN_TOKENS, min((run + 1) * RUN_TOKENS, self.n_tokens)
            blocks = []
            for index, both in enumerate(self.out):
                views = (each[:, :, low:high] for each in both)
                blocks.append((index, low, high - low, own[index][0], *views))
            runs.append(blocks)
        self.predictor().decode(runs, n_threads)

    def check(self, coded: list[Any]) -> float:
        """Refuse what is not as near as the encoder says; return the bits of a number."""
        for index, (found, given) in enumerate(zip(self.out, self.arrays, strict=True)):
            promised = sum(run[index][1] for run in coded)
            wrong = sum(
                float(((one.double() - two.double()) ** 2).sum())
                for one, two in zip(found, given, strict=True)
            )
            size = sum(float((each.double() ** 2).sum()) for each in given)
            # Rounding to bfloat16 adds up to 2^-18 of the power, float32 next to nothing.
            harness.check(
                abs(wrong - promised) < 0.01 * promised + size * 2.0**-17,
                f"layer {index}: the error is {wrong}, not {promised}",
            )
        n_bytes = sum(len(payload) for run in coded for payload, _, _ in run)
        return 8 * n_bytes / self.n_values

    def parts(self, n_runs: int) -> dict[str, float]:
        """Time rANS and products alone, CPU seconds of the whole conversation."""
        n_blocks = N_LAYERS * self.n_tokens / RUN_TOKENS
        about = (self.tables, self.classes, self.shifts)
        stream = _core.entropy_encode_columns(self.values, *about)
        out = np.empty(self.values.shape, np.float32)
        n_repeats = 50
        _core.entropy_decode_columns(stream, out, *about)
        harness.check(bool((out == self.values).all()), "a column stream has other numbers")
        once, more = (
            cpu_time(lambda n=n: _core.entropy_decode_columns(stream, out, *about, None, n), n_runs)
            for n in (1, 1 + n_repeats)
        )
        encode_s = cpu_time(lambda: _core.entropy_encode_columns(self.values, *about), n_runs)
        row = np.random.default_rng(0).standard_normal((RUN_TOKENS, WIDTH)).astype(np.float32)
        square, into = self.layers[0].forward, np.zeros_like(row)
        left, right = (
            torch.from_numpy(each).to(torch.bfloat16) if self.is_narrow else each
            for each in (row, square)
        )
        product_s = (
            cpu_time(
                lambda: [blas.sgemm(left, right, out=into) for _ in range(n_repeats)],
                n_runs,
            )
            / n_repeats
        )
        n_maps = sum(len(layer.sources) for layer in self.layers) / N_LAYERS
        return {
            "decode entropy": n_blocks * (more - once) / n_repeats,
            "encode entropy": n_blocks * encode_s,
            "decode products": n_blocks * product_s * (n_maps + 1),
            "encode products": n_blocks * product_s * (n_maps + 2),
        }


def bits(array: np.ndarray) -> np.ndarray:
    """Return a matrix in bfloat16, its bits as uint16."""
    return torch.from_numpy(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def cpu_time(run: Callable[[], Any], n_runs: int) -> float:
    """Return the least CPU seconds of a process that a run takes."""
    seconds = []
    for _ in range(n_runs):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def measure(
    dtype: torch.dtype, n_tokens: int, n_runs: int, is_narrow: bool = False
) -> list[dict[str, Any]]:
    """Time one dtype with one thread and with two."""
    conversation = Conversation(dtype, n_tokens, is_narrow)
    coded = conversation.encode(1)
    harness.check(all(run is not None for run in coded), "a run does not fit")
    conversation.decode(coded, 1)
    bits = conversation.check(coded)
    parts = conversation.parts(n_runs)
    rows = []
    for n_threads in sorted({1, min(_core.n_processors(), 2)}):
        for what, run in (
            ("decode", lambda n=n_threads: conversation.decode(coded, n)),
            ("encode", lambda n=n_threads: conversation.encode(n)),
        ):
            wall_s = harness.measure(run, n_runs=n_runs, n_warmups=0).minimum_s
            cpu_s = cpu_time(run, n_runs)
            entropy_s, products_s = parts[f"{what} entropy"], parts[f"{what} products"]
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "products": "bfloat16" if is_narrow else "float32",
                    "n_threads": n_threads,
                    "what": what,
                    "bits": bits,
                    "n_tokens": n_tokens,
                    "wall_s": wall_s,
                    "cpu_s": cpu_s,
                    "entropy_s": entropy_s,
                    "products_s": products_s,
                    "conversion_s": cpu_s - entropy_s - products_s,
                    "kv_gb_s": conversation.kv_bytes / wall_s / 1e9,
                }
            )
    conversation.decode(coded, 2)
    conversation.check(coded)
    return rows


def main() -> None:
    """Measure float32 and bfloat16, and products of bfloat16 where the processor has them."""
    options = harness.parser(__doc__).parse_args()
    n_tokens, n_runs = (1024, 2) if options.quick else (4096, 5)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += measure(dtype, n_tokens, n_runs)
    library = blas.find()
    if library.has_bf16:
        for dtype in (torch.float32, torch.bfloat16):
            rows += measure(dtype, n_tokens, n_runs, is_narrow=True)
    harness.finish(
        "predict",
        rows,
        COLUMNS,
        notes=[
            f"{n_tokens:,} tokens of 30 layers, 3 heads of 64, in runs of 512; fastest of the "
            "runs, wall and CPU time each for itself",
            "half of the tokens have a shift, all rounds of 32 thus at least one: the slower path "
            "of the entropy decoder",
            f"products by {library.symbol}; parts are measured alone and in the caches, so that "
            "conversion includes what memory costs",
        ],
        is_quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
