"""Named arrays in one file: a header in JSON, the numbers, and a SHA-256 over all of it.

What calibration learns is kept like this. Nothing is pickled, no byte is believed before the digest
over the whole file is right, and a file is replaced whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from .errors import CorruptionError, FormatError

__all__ = ["decode", "encode", "peek", "read_file", "write_file"]

_HEAD = struct.Struct("<8sII QQ")  # magic, version, reserved, bytes of the header, of the file
_ALIGNMENT = 64
_N_DIGEST = 32
_DTYPES = ("float16", "float32", "float64", "uint16", "int64")
_MAX_DIMENSIONS = 4
_MAX_PEEKED_BYTES = 1 << 26


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def encode(
    magic: bytes, version: int, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> bytes:
    """Return the bytes of a file.

    Parameters
    ----------
    magic : bytes
        8 bytes that say what the file is.
    version : int
        Of what `meta` and `arrays` mean.
    meta : mapping
        Plain JSON values without infinities; "arrays" is taken.
    arrays : mapping of str to numpy.ndarray
        Of a dtype in float16, float32, float64, uint16, int64 and at most 4 axes.

    Returns
    -------
    bytes
        The same for the same contents.
    """
    table: list[Any] = []
    payloads: list[Any] = []
    place = 0
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES or array.ndim > _MAX_DIMENSIONS:
            raise TypeError(
                f"{name} is {array.dtype} with {array.ndim} axes but must be one of "
                f"{', '.join(_DTYPES)} with at most {_MAX_DIMENSIONS}"
            )
        payload = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        table.append([name, array.dtype.name, list(array.shape), place])
        payloads += [payload.reshape(-1).view(np.uint8), bytes(-payload.nbytes % _ALIGNMENT)]
        place += _aligned(payload.nbytes)
    words = {**meta, "arrays": table}
    header = json.dumps(words, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    header = header.ljust(_aligned(_HEAD.size + len(header)) - _HEAD.size, b" ")
    n_bytes = _HEAD.size + len(header) + place + _N_DIGEST
    head = _HEAD.pack(magic, version, 0, len(header), n_bytes)
    parts = [head, header, *payloads]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return b"".join([*parts, digest.digest()])  # the only copy: files reach hundreds of megabytes


def decode(
    contents: bytes, magic: bytes, version: int, what: str
) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    """Return what :func:`encode` was given, and the digest as hexadecimal digits.

    Parameters
    ----------
    contents : bytes
        A whole file; the arrays are read-only views of it.
    magic, version
        As for :func:`encode`.
    what : str
        What the file should be, for messages.

    Raises
    ------
    krul.FormatError
        The file is something else, of another version, or its header makes no sense.
    krul.CorruptionError
        It is cut short or was altered.
    """
    if contents[:8] != magic[: len(contents)] or len(contents) == 0:
        raise FormatError(f"the file begins with {contents[:8]!r} but {what} with {magic!r}")
    if len(contents) < _HEAD.size + _N_DIGEST:
        raise CorruptionError(
            f"the file has {len(contents)} bytes but at least {_HEAD.size + _N_DIGEST} are needed"
        )
    _, found, reserved, n_header, n_bytes = _HEAD.unpack_from(contents)
    if found != version:
        raise FormatError(f"the file is of version {found} but this krul reads {version}")
    if n_bytes != len(contents):
        raise CorruptionError(f"the file has {len(contents)} bytes but says {n_bytes}")
    digest = hashlib.sha256(memoryview(contents)[:-_N_DIGEST])
    if digest.digest() != contents[-_N_DIGEST:]:
        raise CorruptionError(
            f"the digest is {contents[-_N_DIGEST:].hex()} in the file but {digest.hexdigest()} of "
            "its contents"
        )
    first = _HEAD.size + n_header
    if reserved != 0 or first > n_bytes - _N_DIGEST or first % _ALIGNMENT:
        raise FormatError(f"the header has {n_header} bytes in a file of {n_bytes}")
    try:
        meta = json.loads(contents[_HEAD.size : first], parse_constant=_no_constant)
        table = meta.pop("arrays")
        arrays = {}
        for name, dtype, shape, place in table:
            arrays[name] = _view(contents, first, name, dtype, shape, place)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the header is not that of {what}: {error}") from None
    if len(arrays) != len(table):
        raise FormatError("the header names an array twice")
    return meta, arrays, digest.hexdigest()


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} stands where a number should")


def _view(contents: bytes, first: int, name: Any, dtype: Any, shape: Any, place: Any) -> np.ndarray:
    good = (
        isinstance(name, str)
        and dtype in _DTYPES
        and isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(n) is int and n >= 0 for n in shape)
        and type(place) is int
        and place >= 0
        and place % _ALIGNMENT == 0
    )
    if not good:
        raise FormatError(f"array {str(name)[:100]!r} is {str([dtype, shape, place])[:100]}")
    little = np.dtype(dtype).newbyteorder("<")
    n_room = len(contents) - _N_DIGEST - first
    count = math.prod(shape)  # of Python's integers: it cannot overflow
    if place + count * little.itemsize > n_room:
        raise FormatError(
            f"array {name!r} ends at byte {place + count * little.itemsize} of {n_room}"
        )
    return np.frombuffer(contents, little, count, first + place).reshape(shape)


def peek(file: BinaryIO, magic: bytes) -> tuple[int, dict[str, Any]]:
    """Return version and header of a file without a look at the rest.

    Nothing that it says is checked: good for choosing which file to read, and for nothing else.

    Raises
    ------
    krul.FormatError, krul.CorruptionError
        It is something else, or its header cannot be read.
    """
    head = file.read(_HEAD.size)
    if not head.startswith(magic):
        raise FormatError(f"the file begins with {head[:8]!r} but must with {magic!r}")
    if len(head) < _HEAD.size:
        raise CorruptionError(
            f"the file has {len(head)} bytes but at least {_HEAD.size} are needed"
        )
    _, version, _, n_header, _ = _HEAD.unpack(head)
    if n_header > _MAX_PEEKED_BYTES:
        raise CorruptionError(
            f"the header has {n_header} bytes but at most {_MAX_PEEKED_BYTES} are read"
        )
    try:
        meta = json.loads(file.read(n_header), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"the header cannot be read: {error}") from None
    if not isinstance(meta, dict):
        raise FormatError("the header is no object")
    return version, meta


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return all of a file."""
    with open(path, "rb") as file:
        return file.read()


def write_file(path: str | os.PathLike[str], contents: bytes) -> None:
    """Replace a file by `contents`, durably, or leave it as it was."""
    path = os.path.abspath(os.fspath(path))
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}-", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder_handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder_handle)
    finally:
        os.close(folder_handle)
