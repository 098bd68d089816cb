"""How fast blocks are encoded and decoded: GB/s of every codec and backend, beside memcpy.

Decoding is counted by the bytes it touches (payload read, values written), as memcpy is (bytes
read and bytes written); encoding by the bytes of its input. Blocks are of the size that a save
makes, the whole set is far larger than the caches; the rows "in cache" decode one small block again
and again, and leave out what the calls cost without a block to decode.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from krul import _core
from krul.compressor import BLOCK_CODECS as CODECS

COLUMNS = [
    ("where", "where", ""),
    ("codec", "codec", ""),
    ("kv", "", ""),
    ("backend", "backend", ""),
    ("n_threads", "threads", "d"),
    ("ratio_bf16", "ratio", ".2f"),
    ("encode_gb_s", "encode GB/s in", ".2f"),
    ("decode_gb_s", "decode GB/s touched", ".1f"),
    ("decode_share_of_memcpy", "of memcpy", ".0%"),
    ("decode_over_scalar", "x scalar", ".1f"),
]
HEAD_DIM = 128
N_HEADS = 8
#: Relative squared error that a codec may show on the noise used here.
WORST_ERROR = {"exact": 0.0, "int8": 1e-3, "int4": 0.1}
KV = ("K", "V")


def n_layers(codec: str) -> int:
    """Return how many layers one block of a codec holds."""
    return 2 if codec.startswith("share") else 1


def layers(n_tokens: int) -> list[torch.Tensor]:
    """Make two layers that are alike, with channels of different size, as keys have."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, N_HEADS, n_tokens, HEAD_DIM)
    spread = torch.exp(torch.randn(HEAD_DIM, generator=generator))
    lower = torch.randn(shape, generator=generator) * spread
    upper = 1.5 * lower + 0.5 * torch.randn(shape, generator=generator) * spread
    return [lower.bfloat16(), upper.bfloat16()]


class Bench:
    """One set of blocks: how many, how large, on how many threads."""

    def __init__(self, where: str, n_tokens: int, n_blocks: int, n_runs: int) -> None:
        self.where = where
        self.inputs = layers(n_tokens)
        self.n_blocks = n_blocks
        self.n_runs = n_runs
        self.raw_bytes = self.inputs[0].nbytes
        # zeros, not empty: pages must exist before the clock runs.
        self.whole = torch.zeros(n_blocks, *self.inputs[0].shape, dtype=torch.bfloat16)
        self.outputs = list(self.whole)
        self.memcpy_gb_s: dict[int, float] = {}
        self.scalar_gb_s: dict[tuple[str, int, int], float] = {}

    def measure_memcpy(self, n_threads: int) -> dict[str, Any]:
        """Copy as many bytes, each thread its own part in one piece."""
        source = np.ones((self.n_blocks, self.raw_bytes), np.uint8)
        target = self.whole.view(torch.uint8).numpy().reshape(source.shape)
        n_repeats = 200 if self.n_blocks == 1 else 1
        cuts = np.linspace(0, self.n_blocks, n_threads + 1).astype(int)

        def copy(index: int) -> None:
            part = slice(cuts[index], cuts[index + 1])
            for _ in range(n_repeats):
                np.copyto(target[part], source[part])

        def copy_all() -> None:
            threads = [threading.Thread(target=copy, args=(i,)) for i in range(1, n_threads)]
            for thread in threads:
                thread.start()
            copy(0)
            for thread in threads:
                thread.join()

        copy_all()
        harness.check(bool((target == 1).all()), "memcpy copied something else")
        timing = harness.measure(copy_all, n_runs=self.n_runs)
        n_bytes = 2 * self.n_blocks * self.raw_bytes * n_repeats
        self.memcpy_gb_s[n_threads] = n_bytes / timing.minimum_s / 1e9
        return {
            "where": self.where,
            "codec": "memcpy",
            "kv": "",
            "backend": "libc",
            "n_threads": n_threads,
            "decode_gb_s": self.memcpy_gb_s[n_threads],
        }

    def measure_codec(self, codec: str, kv: int, backend: str, n_threads: int) -> dict[str, Any]:
        """Time one codec; the result is checked first."""
        arrays = tuple(self.inputs[: n_layers(codec)])
        n_jobs = max(self.n_blocks // len(arrays), 1)
        encoding = [(CODECS[codec], kv, arrays)] * max(min(n_jobs, 2 * n_threads), 1)
        coded = _core.encode_blocks(encoding, n_threads, backend)
        payload, used, error, power = coded[0]
        harness.check(used == CODECS[codec], f"{codec} fell back to codec {used}")
        harness.check(error <= WORST_ERROR.get(codec, 1.0) * power, f"{codec} lost too much")
        # Each block has a payload of its own, so that reading it costs what it costs.
        copies = [bytes(bytearray(payload)) for _ in range(n_jobs)]
        decoding = []
        for index, each in enumerate(copies):
            outs = self.outputs[index * len(arrays) : (index + 1) * len(arrays)]
            decoding.append((used, kv, each, outs))
        if len(self.outputs) < len(arrays):
            outs = [*self.outputs, torch.zeros_like(self.outputs[0])]
            decoding = [(used, kv, copies[0], outs)]
        n_repeats = 1 if self.n_blocks > 1 else 200
        _core.decode_blocks(decoding, n_threads, backend)
        self._check(decoding[-1][3], arrays, error)
        decode = harness.measure(
            lambda: _core.decode_blocks(decoding * n_repeats, n_threads, backend),
            n_runs=self.n_runs,
        )
        encode = harness.measure(
            lambda: _core.encode_blocks(encoding, n_threads, backend), n_runs=min(self.n_runs, 3)
        )
        overhead_s = 0.0
        if n_repeats > 1:
            nothing = tuple(a[:, :, :0] for a in arrays)
            coded = _core.encode_blocks([(CODECS[codec], kv, nothing)], 1, backend)[0]
            empty = [(coded[1], kv, coded[0], nothing)] * n_repeats
            call = harness.measure(
                lambda: _core.decode_blocks(empty, n_threads, backend), n_runs=self.n_runs
            )
            overhead_s = call.minimum_s
        raw = self.raw_bytes * len(arrays)
        touched = (len(payload) + raw) * len(decoding) * n_repeats
        decode_gb_s = touched / (decode.minimum_s - overhead_s) / 1e9
        if backend == "scalar":
            self.scalar_gb_s[codec, kv, n_threads] = decode_gb_s
        scalar = self.scalar_gb_s.get((codec, kv, n_threads))
        return {
            "where": self.where,
            "codec": codec,
            "kv": KV[kv],
            "backend": backend,
            "n_threads": n_threads,
            "ratio_bf16": raw / len(payload),
            "encode_gb_s": raw * len(encoding) / encode.minimum_s / 1e9,
            "decode_gb_s": decode_gb_s,
            "decode_median_gb_s": touched / (decode.median_s - overhead_s) / 1e9,
            "decode_share_of_memcpy": decode_gb_s / self.memcpy_gb_s[n_threads],
            "decode_over_scalar": decode_gb_s / scalar if scalar else None,
        }

    def _check(self, outs: Any, arrays: tuple[torch.Tensor, ...], error: float) -> None:
        """Refuse to time a decoder whose values are not those the encoder promised."""
        found = sum(
            float(((out.double() - array.double()) ** 2).sum())
            for out, array in zip(outs, arrays, strict=True)
        )
        harness.check(abs(found - error) <= 1e-6 * error, f"error is {found}, not {error}")


def main() -> None:
    """Measure every codec on every backend."""
    options = harness.parser(__doc__).parse_args()
    n_runs = 3 if options.quick else 9
    usable = [name for name, is_usable, _ in _core.backends() if is_usable]
    backends = ["scalar", *(name for name in usable if name != "scalar")]
    codecs = ("int8", "int4", "share") if options.quick else tuple(CODECS)
    most_threads = min(_core.n_processors(), 2)
    benches = [
        # 2,048 tokens of 8 heads of 128: 4 MiB of bf16, the largest block that a save makes.
        (Bench("memory", 2048, 16 if options.quick else 48, n_runs), (1, most_threads)),
        (Bench("in cache", 64, 1, n_runs), (1,)),
    ]
    rows = []
    for bench, thread_counts in benches:
        for n_threads in sorted(set(thread_counts)):
            rows.append(bench.measure_memcpy(n_threads))
            for codec in codecs:
                for kv in (0, 1) if codec.startswith("int") else (0,):
                    rows += [bench.measure_codec(codec, kv, b, n_threads) for b in backends]
    harness.finish(
        "compressor",
        rows,
        COLUMNS,
        notes=[
            "bfloat16, 8 heads of head_dim 128; noise, not a real cache: `exact` depends on it",
            "decode: payload read and values written, as memcpy counts what it reads and writes; "
            "fastest of the runs",
            "encode: bytes of input, from the caches, with the allocation of the payload",
            "in cache: one block of 128 KiB (256 KiB for pairs) 200 times in one call, less the "
            "time of 200 empty blocks",
        ],
        is_quick=options.quick,
        path=options.json,
    )


if __name__ == "__main__":
    main()
