"""A table of devices in Python, for tensors of `elsewhere`: what is asked of it is done at once.

So the whole way of a restore onto a device runs, from torch's tensors by DLPack to the decoded
blocks in them: chunks, batches, layers, damage and lack of memory. So do saves, which a device
encodes, and what estimators see. Nothing here is late or out of order; that is the affair of the
fake device in ``tests/c``.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

import numpy as np
from elsewhere import Elsewhere

from krul import _core

__all__ = ["capsule", "fake", "install"]

_OK, _NO_MEMORY, _DEVICE, _UNSUPPORTED = 0, -1, -9, -10
_TABLE_NAME = b"krul._cuda.table"
_CUDA = 2


class _Error(Structure):
    _fields_ = (("status", c_int), ("code", c_int), ("message", c_char * 512))


class _View(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int),
        ("device_type", c_int),
        ("device_id", c_int32),
        ("is_read_only", c_bool),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
    )

    def array(self) -> np.ndarray:
        """Return the memory as it is seen through the view."""
        size = np.dtype(_DTYPES[self.dtype]).itemsize
        strides = [step * size for step in self.stride]
        return _array(self.data, list(self.shape), strides, _DTYPES[self.dtype])


_INTEGERS = ["kind", "codec", "kv", "dtype", "layer_lower", "layer_upper"]
_INTEGERS += ["n_batch", "n_heads", "head_dim"]


class _Entry(Structure):
    _fields_ = (
        *((name, c_int32) for name in _INTEGERS),
        ("token_start", c_int64),
        ("n_tokens", c_int64),
        ("offset", c_uint64),
        ("payload_bytes", c_uint64),
        ("payload_crc32c", c_uint32),
    )


class _Block(Structure):
    _fields_ = (
        ("entry", POINTER(_Entry)),
        ("payload_offset", c_uint64),
        ("is_decoded", c_bool),
        ("views", _View * 2),
    )


class _Batch(Structure):
    _fields_ = (
        ("codec", c_int),
        ("dtype", c_int),
        ("is_wide", c_bool),
        ("n_units", c_int32),
        ("descriptors_offset", c_uint64),
        ("units_offset", c_uint64),
    )


class _PredictBatch(Structure):
    _fields_ = (
        ("layer", c_int32),
        ("n_blocks", c_int32),
        ("n_used", c_int32),
        ("n_pairs", c_int32),
        ("convention", c_int),
        ("rotary_start", c_int32),
        ("step", c_float),
        ("first_row", c_int64),
        ("n_rows", c_int64),
        ("max_rows", c_int64),
        ("angles_per_batch", c_int64),
        ("cos_at", c_uint64),
        ("sin_at", c_uint64),
        ("units_at", c_uint64),
        ("dtype", c_int * 2),
        ("vector", c_int32 * 2),
    )


class _Output(Structure):
    _fields_ = (
        ("address", c_uint64),
        ("strides", c_int64 * 3),
        ("store_bytes", c_uint32),
        ("reserved", c_uint32),
    )


_INTEGERS = ["kv", "n_planes", "n_heads", "n_tokens", "n_wanted", "head_dim", "n_tiles"]
_INTEGERS += ["first_unit", "n_units", "batch", "n_kept", "n_merged", "n_chunks", "index"]


class _Descriptor(Structure):
    _fields_ = (
        ("outputs", _Output * 2),
        *((name, c_int32) for name in _INTEGERS),
        ("data_offset", c_uint64),
        ("plane_bytes", c_uint64 * 3),
        ("kept_offset", c_uint64 * 4),
        ("tiles_offset", c_uint64),
        ("stream_mode", c_int32 * 2),
        ("table_offset", c_uint64),
        ("directory_offset", c_uint64),
        ("stream_offset", c_uint64),
        ("offsets_offset", c_uint64),
    )

    def array(self, index: int, dtype: Any) -> np.ndarray:
        """Return one of the tensors that are to be encoded."""
        output = self.outputs[index]
        shape = (self.n_planes // self.n_heads, self.n_heads, self.n_tokens, self.head_dim)
        return _array(output.address, shape, (*output.strides, np.dtype(dtype).itemsize), dtype)


class _Coding(Structure):
    _fields_ = (
        ("codec", c_int),
        ("dtype", c_int),
        ("n_blocks", c_int32),
        ("n_units", c_int32),
        ("head_dim", c_int32),
        ("n_chunks", c_int32),
        ("descriptors_offset", c_uint64),
        ("units_offset", c_uint64),
        ("workspace_offset", c_uint64),
    )


class _Result(Structure):
    _fields_ = (
        ("does_not_fit", c_uint32),
        ("reserved", c_uint32),
        ("error", c_double * 2),
        ("payload_bytes", c_uint64),
    )


class _Observed(Structure):
    _fields_ = (
        ("queries", c_uint64),
        ("keys", c_uint64),
        ("query_stride", c_int64 * 3),
        ("key_stride", c_int64 * 3),
        ("starts_at", c_uint64),
        ("sinks_at", c_uint64),
        *(
            (name, c_int32)
            for name in ["query_dtype", "key_dtype", "head_dim", "heads_per_kv", "key_start"]
        ),
        *((name, c_int32) for name in ["n_keys", "layer", "is_wide"]),
        ("scaling", c_float),
        ("softcap", c_float),
    )


class _Group(Structure):
    _fields_ = (
        ("n_members", c_int32),
        ("n_heads", c_int32),
        ("work", c_int32 * 8),
        ("shared_bytes", c_size_t),
        ("members_at", c_uint64),
        ("places", c_uint64 * 4),
    )


class _Observation(Structure):
    _fields_ = (
        *((name, c_int32) for name in ["n_layers", "n_batch", "n_rows", "n_keys_total"]),
        ("n_seen", c_int32),
        ("n_groups", c_int32),
        ("received_stride", c_int64),
        ("weight", c_double),
        ("n_real_rows", c_double),
        ("positions_at", c_uint64),
        ("real_at", c_uint64),
        ("first_real_at", c_uint64),
        ("classes_at", c_uint64),
        ("image_bytes", c_size_t),
        ("workspace_bytes", c_size_t),
        ("groups", _Group * 8),
    )


class _Sums(Structure):
    _fields_ = (
        ("distances", c_uint64),
        ("importance", c_uint64),
        ("received", c_uint64),
        ("received_stride", c_int64),
        ("n_rows", c_uint64),
    )


_DTYPES = {1: np.float32, 2: np.float16}


def _array(address: int, shape: Any, strides: Any, dtype: Any) -> np.ndarray:
    """Return an array over memory; strides are in bytes, None for row-major."""
    size = np.dtype(dtype).itemsize
    if strides is None:
        strides = [size * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + size
    flat = np.frombuffer((ctypes.c_uint8 * span).from_address(address), np.uint8)
    return np.lib.stride_tricks.as_strided(flat[:size].view(dtype), shape, strides)


class _Tensor(Structure):
    _fields_ = (("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32))


class _Versioned(Structure):
    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    )


class _Fake:
    """What the device is to do, and what it has done; tests change it while nothing runs."""

    def __init__(self) -> None:
        self.calm()
        self.memory: dict[int, Any] = {}
        self.jobs: dict[int, list[tuple[Any, ...]]] = {}

    def calm(self) -> None:
        """Behave, and have done nothing."""
        self.has_memory = True
        self.is_broken = self.is_damaging = False
        self.calls_until_failure = -1
        self.most_bytes = 1 << 40  # of one piece of memory
        self.n_encoded = self.n_observed = self.n_calls = 0
        self.n_decoded = self.n_copied = self.n_host_decoded = 0
        self.waited: list[tuple[int | None, int | None]] = []
        self.n_predicted = self.copied_bytes = 0
        self.has_products = True
        self.predictors: list[Any] = []  # that were made, the last at the end
        self.unsupported: set[int] = {7}

    def make(self, n_bytes: int, out: Any, err: Any) -> int:
        """Give memory out, or none."""
        if not self.has_memory or n_bytes > self.most_bytes:
            return _fail(err, _NO_MEMORY, b"there is none left")
        made = ctypes.create_string_buffer(n_bytes + 64)
        address = (ctypes.addressof(made) + 63) // 64 * 64
        self.memory[address] = made
        out[0] = address
        return _OK

    def decode(self, batch: _Batch, chunk: int, flag: Any) -> None:
        """Decode what `prepare` has noted, from what has been copied."""
        if self.is_damaging:
            flag[0] = 1
            return
        for entry, offset, is_decoded, views in self.jobs.pop(batch.n_units):
            shape = (entry.n_batch, entry.n_heads, entry.n_tokens, entry.head_dim)
            n_views = 2 if entry.layer_upper >= 0 else 1
            if is_decoded:
                self.n_host_decoded += 1
                for view in views:
                    if view.data:
                        found = view.array()
                        n_bytes = int(np.prod(shape)) * found.itemsize
                        raw = ctypes.string_at(chunk + offset, n_bytes)
                        whole = np.frombuffer(raw, found.dtype).reshape(shape)
                        found[...] = whole[:, :, : found.shape[2]]
                        offset += -(-n_bytes // 16) * 16
                continue
            self.n_decoded += 1
            whole = [np.empty(shape, _DTYPES[entry.dtype]) for _ in range(n_views)]
            payload = ctypes.string_at(chunk + offset, entry.payload_bytes)
            _core.decode_blocks([(entry.codec, entry.kv, payload, tuple(whole))], 1)
            for view, one in zip(views, whole, strict=False):
                if view.data:
                    found = view.array()
                    found[...] = one[:, :, : found.shape[2]]

    def decode_links(self, batch: _PredictBatch, chunk: int) -> None:
        """Decode what `predict_prepare` has noted, with the predictor that was made last."""
        for entry, offset, _, views in self.jobs.pop(batch.units_at):
            shape = (entry.n_batch, entry.n_heads, entry.n_tokens, entry.head_dim)
            dtype = {1: np.float32, 2: np.float16}[entry.dtype]
            whole = [np.empty(shape, dtype) if view.data else None for view in views]
            payload = ctypes.string_at(chunk + offset, entry.payload_bytes)
            block = (entry.layer_lower, entry.token_start, entry.n_tokens, payload, *whole)
            self.predictors[-1].decode([[block]], 1)
            self.n_predicted += 1
            for view, one in zip(views, whole, strict=True):
                if one is not None:
                    found = view.array()
                    found[...] = one[:, :, : found.shape[2]]

    def encode(self, batch: _Coding, plan: int, payloads: int, results: int) -> None:
        """Encode the blocks of a batch, from what the library has written of them."""
        n_views = 2 if batch.codec > 3 else 1
        size = ctypes.sizeof(_Descriptor)
        for number in range(batch.n_blocks):
            about = _Descriptor.from_address(plan + batch.descriptors_offset + number * size)
            result = _Result.from_address(results + about.index * ctypes.sizeof(_Result))
            assert (result.does_not_fit, result.payload_bytes) == (0, 0)
            arrays = tuple(about.array(i, _DTYPES[batch.dtype]) for i in range(n_views))
            ((payload, used, error, power),) = _core.encode_blocks(
                [(batch.codec, about.kv, arrays)], 1
            )
            result.does_not_fit = used != batch.codec
            result.error[0], result.error[1] = error, power
            result.payload_bytes = len(payload)
            if used == batch.codec:
                offset = about.directory_offset if n_views == 2 else about.data_offset
                ctypes.memmove(payloads + offset, payload, len(payload))
            self.n_encoded += 1

    def observe(self, plan: _Observation, image: int, sums: _Sums) -> None:
        """Add the sums of a pass, from what the library has written of it."""
        n, n_batch, n_rows = plan.n_layers, plan.n_batch, plan.n_rows
        real = None
        if plan.real_at:
            real = _array(image + plan.real_at, (n_batch, plan.n_keys_total), None, np.uint8)
        by_batch = _array(image + plan.positions_at, (n_batch, n_rows), None, np.int32)
        positions = by_batch.max(0).astype(np.int64)
        for row in np.flatnonzero(positions < 0):  # padding everywhere, as some key is
            positions[row] = np.flatnonzero(real.max(0) == 0)[0]
        layers: list[Any] = [None] * n
        for group in plan.groups[: plan.n_groups]:
            for member in range(group.n_members):
                about = _Observed.from_address(
                    image + group.members_at + member * ctypes.sizeof(_Observed)
                )
                layers[about.layer] = self.observed(plan, group, about, image)
        _core.estimator_observe(
            layers,
            positions,
            plan.n_keys_total if real is None else real.copy(),
            plan.weight,
            _array(sums.distances, (n, n), None, np.float64),
            _array(sums.importance, (n, 2), None, np.float64),
            _array(sums.received, (n, plan.received_stride), None, np.float32),
            _array(sums.n_rows, (1,), None, np.float64),
            1 << 26,
            1,
        )
        self.n_observed += 1

    def observed(
        self, plan: _Observation, group: _Group, about: _Observed, image: int
    ) -> tuple[Any, ...]:
        """Return a layer as `_core.estimator_observe` takes it."""

        def tensor(address: int, stride: Any, dtype: int, n_heads: int, n_tokens: int) -> Any:
            size = np.dtype(_DTYPES[dtype]).itemsize
            shape = (plan.n_batch, n_heads, n_tokens, about.head_dim)
            strides = (*(step * size for step in stride), size)
            return _array(address, shape, strides, _DTYPES[dtype])

        starts = sinks = None
        if about.starts_at:
            shape = (plan.n_batch, plan.n_rows)
            starts = _array(image + about.starts_at, shape, None, np.int32).astype(np.int64)
        if about.sinks_at:
            sinks = _array(image + about.sinks_at, (group.n_heads,), None, np.float32)
        return (
            tensor(
                about.queries, about.query_stride, about.query_dtype, group.n_heads, plan.n_rows
            ),
            tensor(
                about.keys,
                about.key_stride,
                about.key_dtype,
                group.n_heads // about.heads_per_kv,
                about.n_keys,
            ),
            about.scaling,
            about.softcap,
            sinks,
            starts,
            about.key_start,
        )


fake = _Fake()
_numbers = itertools.count(1)
_installed: list[bool] = []


def _fail(err: Any, status: int, message: bytes) -> int:
    if err:
        err[0].status, err[0].message = status, message
    return status


def _always(*args: Any) -> int:
    fake.n_calls += 1
    if fake.calls_until_failure >= 0:
        fake.is_broken = fake.is_broken or fake.calls_until_failure == 0
        fake.calls_until_failure -= 1
    return _fail(args[-1], _DEVICE, b"the device fell off") if fake.is_broken else _OK


def _make_handle(device: Any, out: Any, err: Any) -> int:
    out[0] = 1
    return _always(err)


def _make_memory(device: Any, n_bytes: int, out: Any, err: Any) -> int:
    return _always(err) or fake.make(n_bytes, out, err)


def _copy(device: Any, stream: Any, to: Any, source: Any, n_bytes: int, err: Any) -> int:
    if _always(err) != _OK:
        return _DEVICE
    ctypes.memmove(to, source, n_bytes)
    fake.n_copied += 1
    fake.copied_bytes += n_bytes
    return _OK


def _wait(device: Any, stream: Any, event: Any, err: Any) -> int:
    fake.waited.append((stream, event))
    return _always(err)


def _note(blocks: Any, n_blocks: int) -> int:
    """Note what is to be decoded, and return the number under which it is found again."""
    number = next(_numbers)
    noted = []
    for index in range(n_blocks):
        block = blocks[index]
        views = (_View * 2).from_buffer_copy(block.views)
        entry = _Entry.from_buffer_copy(block.entry[0])
        noted.append((entry, block.payload_offset, block.is_decoded, list(views)))
    fake.jobs[number] = noted
    return number


def _prepare(
    chunk: Any,
    chunk_bytes: int,
    used_bytes: int,
    blocks: Any,
    n_blocks: int,
    batches: Any,
    n_batches: Any,
    used: Any,
    bad_block: Any,
    err: Any,
) -> int:
    batches[0].n_units = _note(blocks, n_blocks)
    n_batches[0] = 1
    used[0] = used_bytes
    return _OK


def _decode(device: Any, stream: Any, batch: Any, chunk: int, flag: Any, err: Any) -> int:
    if _always(err) != _OK:
        return _DEVICE
    fake.decode(batch[0], chunk, flag)
    return _OK


def _encode(
    device: Any,
    stream: Any,
    batch: Any,
    plan: int,
    payloads: int,
    workspace: int,
    results: int,
    err: Any,
) -> int:
    if _always(err) != _OK:
        return _DEVICE
    fake.encode(batch[0], plan, payloads, results)
    return _OK


def _observe(
    device: Any, stream: Any, plan: Any, image: int, workspace: int, sums: Any, err: Any
) -> int:
    if _always(err) != _OK:
        return _DEVICE
    fake.observe(plan[0], image, sums[0])
    return _OK


def _products_new(device: Any, stream: Any, out: Any, err: Any) -> int:
    if not fake.has_products:
        return _fail(err, _UNSUPPORTED, b"there is no library for products")
    return _make_handle(device, out, err)


def _predict_prepare(
    chains: Any,
    chunk: Any,
    chunk_bytes: int,
    used_bytes: int,
    blocks: Any,
    n_blocks: int,
    batches: Any,
    n_batches: Any,
    used: Any,
    bad_block: Any,
    err: Any,
) -> int:
    batches[0] = _PredictBatch(units_at=_note(blocks, n_blocks))
    n_batches[0] = 1
    used[0] = used_bytes
    return _OK


def _predict_numbers(
    device: Any, stream: Any, chains: Any, batch: Any, chunk: int, scratch: Any, flag: Any, err: Any
) -> int:
    if fake.is_damaging:
        flag[0] = 1
    return _always(err)


def _predict_rows(
    device: Any,
    products: Any,
    chains: Any,
    batch: Any,
    chunk: int,
    memory: Any,
    scratch: Any,
    err: Any,
) -> int:
    if fake.is_broken:
        return _always(err)
    fake.decode_links(batch[0], chunk)
    return _OK


_error, _out = POINTER(_Error), POINTER(c_void_p)
_make = CFUNCTYPE(c_int, c_void_p, c_size_t, _out, _error)
_free = CFUNCTYPE(None, c_void_p, c_void_p)
_new = CFUNCTYPE(c_int, c_void_p, _out, _error)
_one = CFUNCTYPE(c_int, c_void_p, c_void_p, _error)
_two = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, _error)
_move = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, _error)

_FUNCTIONS = [
    CFUNCTYPE(c_int, c_int32, _out, _error)(_make_handle),  # open
    CFUNCTYPE(None, c_void_p)(lambda device: None),
    _make(_make_memory),  # pinned
    _free(lambda device, memory: fake.memory.pop(memory) and None),
    _make(_make_memory),  # memory
    _free(lambda device, memory: fake.memory.pop(memory) and None),
    _new(_make_handle),  # streams
    _free(lambda device, stream: None),
    _one(_always),
    _new(_make_handle),  # events
    _free(lambda device, event: None),
    _two(_always),  # record
    _one(_always),
    _two(_wait),
    _move(_copy),
    _move(_copy),
    CFUNCTYPE(c_bool, POINTER(_Entry))(lambda entry: entry[0].codec not in fake.unsupported),
    CFUNCTYPE(c_size_t, POINTER(_Block), c_int32)(lambda blocks, n_blocks: 0),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_size_t,
        c_size_t,
        POINTER(_Block),
        c_int32,
        POINTER(_Batch),
        POINTER(c_int32),
        POINTER(c_size_t),
        POINTER(c_int32),
        _error,
    )(_prepare),
    CFUNCTYPE(c_int, c_void_p, c_void_p, POINTER(_Batch), c_void_p, POINTER(c_uint32), _error)(
        _decode
    ),
    CFUNCTYPE(c_int, c_void_p, c_void_p, _out, _error)(_products_new),
    CFUNCTYPE(None, c_void_p, c_void_p)(lambda device, products: None),
    CFUNCTYPE(c_size_t, POINTER(_Block), c_int32)(lambda blocks, n_blocks: 0),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_void_p,
        c_size_t,
        c_size_t,
        POINTER(_Block),
        c_int32,
        POINTER(_PredictBatch),
        POINTER(c_int32),
        POINTER(c_size_t),
        POINTER(c_int32),
        _error,
    )(_predict_prepare),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
        POINTER(_PredictBatch),
        c_void_p,
        c_void_p,
        POINTER(c_uint32),
        _error,
    )(_predict_numbers),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_void_p,
        c_void_p,
        POINTER(_PredictBatch),
        c_void_p,
        c_void_p,
        c_void_p,
        _error,
    )(_predict_rows),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_void_p,
        POINTER(_Coding),
        c_void_p,
        c_void_p,
        c_void_p,
        c_void_p,
        _error,
    )(_encode),
    CFUNCTYPE(
        c_int,
        c_void_p,
        c_void_p,
        POINTER(_Observation),
        c_void_p,
        c_void_p,
        POINTER(_Sums),
        _error,
    )(_observe),
]


class _Table(Structure):
    _fields_ = (
        ("abi", c_uint32),
        ("device_type", c_int),
        ("name", c_char_p),
        ("functions", c_void_p * len(_FUNCTIONS)),
    )


_table = _Table(2, _CUDA, b"fake")
for _index, _function in enumerate(_FUNCTIONS):
    _table.functions[_index] = ctypes.cast(_function, c_void_p).value


def _export(tensor: Elsewhere, *, stream: int | None = None, max_version: Any = None) -> Any:
    """Say by DLPack that the numbers inside are on a CUDA device."""
    assert stream == -1, "krul orders streams itself"
    capsule = tensor.inside.detach().__dlpack__(max_version=max_version)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    managed = _Versioned.from_address(pointer(capsule, b"dltensor_versioned"))
    managed.tensor.device_type, managed.tensor.device_id = _CUDA, tensor.device.index
    return capsule


def capsule() -> Any:
    """Return the table as `krul._cuda` hands its own over."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
    return new(ctypes.addressof(_table), _TABLE_NAME, None)


class _Marks:
    """What `krul.device.Marks` is, with events that are numbers."""

    def __init__(self, devices: Any) -> None:
        self._numbers = sorted({device.index for device in devices})

    def follow(self) -> None:
        pass

    def events(self) -> list[tuple[int, int]]:
        return [(number, 200 + number) for number in self._numbers]


def install(monkeypatch: Any) -> str:
    """Have krul use the table for tensors of `elsewhere`; return why that cannot be, if so."""
    import krul.device
    import krul.encode
    import krul.observe
    import krul.save
    import krul.source

    if not _installed and krul.CUDA_UNAVAILABLE is None:
        return "there is a real device"
    if not _installed:
        _core.device_register(capsule())
        _installed.append(True)
    fake.calm()
    monkeypatch.setattr(Elsewhere, "__dlpack__", _export)
    monkeypatch.setattr(Elsewhere, "__dlpack_device__", lambda self: (_CUDA, self.device.index))
    for module in (krul.device, krul.encode, krul.observe, krul.source):
        monkeypatch.setattr(module, "is_direct", lambda device: device.type == "elsewhere")
    for module in (krul.device, krul.save):
        monkeypatch.setattr(module, "Marks", _Marks)
    monkeypatch.setattr(krul.source, "stream_of", lambda device: (device.index, 100 + device.index))
    make = krul.source.make_predictor

    def make_and_note(*args: Any, **kwargs: Any) -> Any:
        # One for the restore, and one with which the device decodes the same chains.
        fake.predictors.append(make(*args, **kwargs))
        return make(*args, **kwargs)

    monkeypatch.setattr(krul.source, "make_predictor", make_and_note)
    return ""
