"""The C library of krul, as Python sees it; written by hand, compared with the module by a test.

``_Array`` is any object with ``__dlpack__`` or the buffer protocol: torch tensors, NumPy arrays.
``_Buffer`` is contiguous bytes. Every call that works releases the GIL.
"""

from array import array
from collections.abc import Sequence
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt

_Array: TypeAlias = Any
_Buffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[Any]
# kind, codec, kv, dtype, layer_lower, layer_upper, n_batch, n_heads, head_dim, token_start,
# n_tokens, offset, payload_bytes, payload_crc32c
_Entry: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int]
# 5 x n_layers seconds (linear, quadratic, overhead, read, decode), latency_s, decode_on_compute,
# block_tokens, first_block_tokens
_PlanCosts: TypeAlias = tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], float, bool, int, int]

def backends() -> list[tuple[str, bool, bool]]: ...
def device_register(table: Any, /) -> None: ...
def n_processors() -> int: ...
def samples(places: _Buffer | array[int], /) -> bytes: ...
def blas_open(path: str, /) -> Any: ...
def blas_about(blas: Any, /) -> tuple[str, bool, bool, bool]: ...
def blas_sgemm(
    blas: Any,
    a: _Array,
    b: _Array,
    out: _Array,
    trans_a: bool = False,
    trans_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None: ...
def estimator_observe(
    layers: Sequence[tuple[Any, ...] | None],
    row_positions: npt.NDArray[np.int64],
    key_is_real: npt.NDArray[np.uint8] | int,
    weight: float,
    distances: npt.NDArray[np.float64],
    importance: npt.NDArray[np.float64],
    received: npt.NDArray[np.float32],
    n_rows: npt.NDArray[np.float64],
    tile_bytes: int,
    n_threads: int,
    backend: str | None = None,
) -> None: ...
def choose_pairs(
    distances: npt.NDArray[np.float64],
    importance: npt.NDArray[np.float64],
    layer_class: npt.NDArray[np.int32],
    n_sensitive: int,
    n_pairs: int,
) -> npt.NDArray[np.int32]: ...
def fixed_pairs(layer_class: npt.NDArray[np.int32], n_pairs: int) -> npt.NDArray[np.int32]: ...
def pair_count(n_layers: int, ratio: float) -> int: ...
def entropy_encode(symbols: _Buffer, /, backend: str | None = None) -> bytes: ...
def entropy_decode(stream: _Buffer, n_symbols: int, /, backend: str | None = None) -> bytes: ...
def entropy_encode_columns(
    values: npt.NDArray[np.int32],
    tables: npt.NDArray[np.uint16],
    column_class: npt.NDArray[np.uint8],
    token_shift: npt.NDArray[np.int8] | None = None,
    /,
) -> bytes: ...
def entropy_decode_columns(
    stream: _Buffer,
    out: npt.NDArray[np.float32],
    tables: npt.NDArray[np.uint16],
    column_class: npt.NDArray[np.uint8],
    token_shift: npt.NDArray[np.int8] | None = None,
    backend: str | None = None,
    n_repeats: int = 1,
    /,
) -> None: ...
def encode_blocks(
    jobs: Sequence[tuple[int, int, Sequence[_Array]]],
    n_threads: int = 0,
    backend: str | None = None,
    events: Sequence[tuple[int, int]] | None = None,
) -> list[Any]: ...  # (payload, codec, error, power); on a device also a str
def decode_blocks(
    jobs: Sequence[tuple[int, int, _Buffer, Sequence[_Array | None]]],
    n_threads: int = 0,
    backend: str | None = None,
) -> None: ...
def codecs() -> dict[str, int]: ...
def crc32c(buffer: _Buffer, crc: int = 0, /) -> int: ...
def store_write(
    directory_fd: int,
    name: str,
    kind: int,
    entries: Sequence[_Entry],
    payloads: Sequence[_Buffer],
    /,
) -> int: ...
def store_read_head(fd: int, /) -> tuple[int, int, int, list[_Entry]]: ...
def store_parse(
    buffer: _Buffer, file_bytes: int | None = None, /
) -> tuple[int, int, int, list[_Entry]]: ...
def store_read_payload(fd: int, entry: _Entry, /) -> bytes: ...
def store_constants() -> dict[str, int]: ...
def restore_plan_choose(
    costs: _PlanCosts,
    n_tokens: int,
    n_prompt_tokens: int,
    granularity: int,
    n_required: npt.NDArray[np.int64] | None,
    n_recomputable: int,
    shape: int,
) -> tuple[int, npt.NDArray[np.int64], float, float, float, float]: ...
def restore_plan_predict(
    costs: _PlanCosts,
    n_tokens: int,
    n_prompt_tokens: int,
    n_recomputed: npt.NDArray[np.int64],
) -> float: ...
def restore_plan_steps(
    costs: _PlanCosts,
    n_tokens: int,
    n_prompt_tokens: int,
    n_recomputed: npt.NDArray[np.int64],
) -> list[tuple[int, int, int, int, float, float, float]]: ...

@final
class Predict:
    def __new__(
        cls,
        blas: Any,
        tables: npt.NDArray[np.uint16],
        unit_table: int,
        layers: Sequence[tuple[Any, ...] | None],
        n_batch: int,
        token_start: int,
        n_tokens: int,
        digest: bytes = ...,
        narrow: Sequence[Sequence[npt.NDArray[np.uint16] | None] | None] | None = None,
        is_rounded: bool = False,
    ) -> Predict: ...
    def encode(
        self,
        runs: Sequence[
            Sequence[
                tuple[int, int, _Array, _Array]
                | tuple[int, int, _Array, _Array, npt.NDArray[np.int8] | None]
            ]
        ],
        step: float,
        n_threads: int = 0,
        backend: str | None = None,
    ) -> list[list[tuple[bytes, float, float]] | None]: ...
    def decode(
        self,
        runs: Sequence[Sequence[tuple[int, int, int, _Buffer, _Array | None, _Array | None]]],
        n_threads: int = 0,
        backend: str | None = None,
    ) -> None: ...

@final
class Memory:
    def __new__(cls, n_bytes: int) -> Memory: ...

@final
class Observer:
    def __new__(cls, device: int, n_layers: int) -> Observer: ...
    def observe(
        self,
        layers: Sequence[tuple[Any, ...] | None],
        row_positions: npt.NDArray[np.int64],
        key_is_real: npt.NDArray[np.uint8] | int,
        weight: float,
        events: Sequence[tuple[int, int]] = (),
    ) -> None: ...
    def read(
        self,
        distances: npt.NDArray[np.float64],
        importance: npt.NDArray[np.float64],
        received: npt.NDArray[np.float32],
        n_rows: npt.NDArray[np.float64],
    ) -> None: ...

@final
class Restore:
    def __new__(
        cls,
        steps: Sequence[
            tuple[int, _Buffer | None, _Entry, Sequence[_Array | None]]
            | tuple[int, _Buffer | None, _Entry, Sequence[_Array | None], Predict | None]
            | tuple[int, _Buffer | None, _Entry, Sequence[_Array | None], Predict | None, int]
        ],
        n_layers: int,
        n_threads: int = 0,
        backend: str | None = None,
        max_bytes_per_s: float = 0.0,
        machine: tuple[float, float, float] | None = None,
        streams: Sequence[tuple[int, int]] | None = None,
        takes_turns: bool = False,
    ) -> Restore: ...
    def wait(self, layer: int, /) -> None: ...
    def wait_stream(self, layer: int, stream: int, /) -> None: ...
    def lead(self, device: int, stream: int, /) -> None: ...
    def wait_for(self, layer: int, timeout_s: float, /) -> bool: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...
    def counts(self) -> dict[str, Any]: ...
    def trace(self) -> npt.NDArray[np.float64]: ...
    def predict_problem(self) -> str: ...
    def drop(self, layer: int, n_tokens: int, /) -> None: ...
    def reorder(self, order: npt.NDArray[np.int64], /) -> None: ...
    def limit(self, max_bytes_per_s: float, /) -> None: ...
    def abandon(self) -> None: ...
    def advance(self, seconds: float, /) -> float: ...
