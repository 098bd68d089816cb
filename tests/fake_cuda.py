"""A table of devices in Python, for tensors of `elsewhere`: what is asked of it is done at once.

So the whole way of a restore onto a device runs, from torch's tensors by DLPack to the decoded
blocks in them: chunks, batches, layers, damage and lack of memory. Nothing here is late or out of
order; that is the affair of the fake device in ``tests/c``.
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
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
        dtype = {1: np.float32, 2: np.float16}[self.dtype]
        shape, stride = list(self.shape), list(self.stride)
        last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        flat = (ctypes.c_uint8 * ((last + 1) * np.dtype(dtype).itemsize)).from_address(self.data)
        size = np.dtype(dtype).itemsize
        return np.lib.stride_tricks.as_strided(
            np.frombuffer(flat, dtype), shape, [step * size for step in stride]
        )


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
        self.n_decoded = self.n_copied = self.n_host_decoded = 0
        self.waited: list[tuple[int | None, int | None]] = []
        self.n_predicted = self.copied_bytes = 0
        self.has_products = True
        self.predictors: list[Any] = []  # that were made, the last at the end
        self.unsupported: set[int] = {7}

    def make(self, n_bytes: int, out: Any, err: Any) -> int:
        """Give memory out, or none."""
        if not self.has_memory:
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
            dtype = {1: np.float32, 2: np.float16}[entry.dtype]
            whole = [np.empty(shape, dtype) for _ in range(n_views)]
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


fake = _Fake()
_numbers = itertools.count(1)
_installed: list[bool] = []


def _fail(err: Any, status: int, message: bytes) -> int:
    if err:
        err[0].status, err[0].message = status, message
    return status


def _always(*args: Any) -> int:
    return _fail(args[-1], _DEVICE, b"the device fell off") if fake.is_broken else _OK


def _make_handle(device: Any, out: Any, err: Any) -> int:
    out[0] = 1
    return _always(err)


def _copy(device: Any, stream: Any, to: Any, source: Any, n_bytes: int, err: Any) -> int:
    if fake.is_broken:
        return _always(err)
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
    if fake.is_broken:
        return _always(err)
    fake.decode(batch[0], chunk, flag)
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
    _make(lambda device, n_bytes, out, err: fake.make(n_bytes, out, err)),  # pinned
    _free(lambda device, memory: fake.memory.pop(memory) and None),
    _make(lambda device, n_bytes, out, err: fake.make(n_bytes, out, err)),  # memory
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


def install(monkeypatch: Any) -> str:
    """Have restores use the table for tensors of `elsewhere`; return why that cannot be, if so."""
    import krul.source

    if not _installed and krul.CUDA_UNAVAILABLE is None:
        return "there is a real device"
    if not _installed:
        _core.device_register(capsule())
        _installed.append(True)
    fake.calm()
    monkeypatch.setattr(Elsewhere, "__dlpack__", _export)
    monkeypatch.setattr(Elsewhere, "__dlpack_device__", lambda self: (_CUDA, self.device.index))
    monkeypatch.setattr(krul.source, "is_direct", lambda device: device.type == "elsewhere")
    monkeypatch.setattr(krul.source, "stream_of", lambda device: (device.index, 100 + device.index))
    make = krul.source.make_predictor

    def make_and_note(*args: Any, **kwargs: Any) -> Any:
        # One for the restore, and one with which the device decodes the same chains.
        fake.predictors.append(make(*args, **kwargs))
        return make(*args, **kwargs)

    monkeypatch.setattr(krul.source, "make_predictor", make_and_note)
    return ""
