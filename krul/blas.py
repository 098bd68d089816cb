"""Matrix products by whatever good library is there: MKL inside torch, OpenBLAS beside NumPy.

The C library loads one at run time and calls it from threads of its own; this module says where to
look. What is in the process already comes first, so that nothing is loaded for krul alone:
torch's if torch was imported, else NumPy's. ``KRUL_BLAS`` in the environment names one library, and
then no other is tried.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import _core

__all__ = ["Library", "about", "candidates", "find", "search", "sgemm"]

#: What the system's loader is asked for, best first.
_SONAMES = (
    *(f"libmkl_rt.so.{number}" for number in (3, 2, 1)),
    "libopenblas.so.0",
    *(f"libblis.so.{number}" for number in (4, 3, 2)),
    "libcblas.so.3",
    "libblas.so.3",
)
#: Beside a package's folder, where wheels keep the libraries that they bring.
_WHEEL_PATTERNS = ("*openblas*.so*", "*mkl_rt*.so*", "*blis*.so*")


@dataclass(frozen=True)
class Library:
    """An open library.

    Attributes
    ----------
    path : str
        Its file, or the name under which the system's loader found it.
    symbol : str
        The name of its product.
    is_single_threaded : bool
        Whether a product stays in the thread that asks for it; else the library uses as many
        threads as it does for everybody.
    has_bf16 : bool
        Whether it multiplies bfloat16, and the processor has tiles for that (AMX), so that it takes
        a third of the time. ``KRUL_BFLOAT16``, 0 or 1, answers for the processor.
    handle : object
        What the functions of the C module take.
    """

    path: str
    symbol: str
    is_single_threaded: bool
    has_bf16: bool
    handle: Any


_lock = threading.Lock()
_found: tuple[Library | None, dict[str, str]] | None = None


def _package_folder(name: str) -> Path | None:
    """Return where a package is, without importing it."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _in_package(name: str) -> list[str]:
    """Return the libraries that a package brings, in its folder or beside it."""
    folder = _package_folder(name)
    if folder is None:
        return []
    beside = folder.parent / f"{name}.libs"
    found = [folder / "lib" / "libtorch_cpu.so"] if name == "torch" else []
    for place in (folder / "lib", beside):
        for pattern in _WHEEL_PATTERNS:
            found += sorted(place.glob(pattern))
    return [str(path) for path in found if path.is_file()]


def candidates() -> list[str]:
    """Return the libraries to try, best first.

    Returns
    -------
    list of str
        Paths, then names for the system's loader; only ``KRUL_BLAS`` where that is set.

    Examples
    --------
    >>> "libopenblas.so.0" in candidates() or "KRUL_BLAS" in os.environ
    True
    """
    if wanted := os.environ.get("KRUL_BLAS"):
        return [wanted]
    packages = ["torch", "numpy", "scipy"]
    # A library as large as torch's is not loaded for its products alone.
    packages.sort(key=lambda name: name not in sys.modules)
    found = [path for name in packages for path in _in_package(name)]
    for pattern in ("libmkl_rt.so*", "libopenblas.so.0", "libcblas.so.3"):  # conda's
        found += [str(path) for path in sorted((Path(sys.prefix) / "lib").glob(pattern))]
    return list(dict.fromkeys([*found, *_SONAMES]))


def _short(path: str) -> str:
    """Return a path as it is called within its environment."""
    return "/".join(Path(path).parts[-3:]) if os.sep in path else path


def search() -> tuple[Library | None, dict[str, str]]:
    """Return the library in use, if there is one, and why the better ones are not.

    Returns
    -------
    (Library or None, dict)
        The reasons are by path or name. The search is made once in a process, and again only while
        nothing has been found.
    """
    global _found
    with _lock:
        if _found is None or _found[0] is None:
            library, refused = None, {}
            for path in candidates():
                try:
                    handle = _core.blas_open(path)
                except NotImplementedError as error:
                    refused[path] = str(error)
                    continue
                symbol, is_single_threaded, has_bf16, is_fast = _core.blas_about(handle)
                wanted = os.environ.get("KRUL_BFLOAT16")
                has_bf16 &= wanted != "0" if wanted else is_fast
                library = Library(path, symbol, is_single_threaded, has_bf16, handle)
                break
            _found = library, refused
        return _found


def find() -> Library:
    """Return the library in use.

    Returns
    -------
    Library
        The first candidate whose products are right.

    Raises
    ------
    ValueError
        ``KRUL_BLAS`` names a library that does not serve.
    NotImplementedError
        None serves; the message has the reasons.

    Examples
    --------
    >>> find().symbol
    '...gemm...'
    """
    library, refused = search()
    if library is None:
        if wanted := os.environ.get("KRUL_BLAS"):
            raise ValueError(f"KRUL_BLAS is {wanted!r}: {refused.get(wanted, 'it does not serve')}")
        raise NotImplementedError(
            "no library for matrix products was found; install torch or numpy from wheels, or set "
            "KRUL_BLAS to one: " + "; ".join(refused.values())
        )
    return library


def about() -> dict[str, Any]:
    """Tell which library is in use and why the others are not, for `krul.backends`."""
    library, refused = search()
    return {
        "chosen": None if library is None else _short(library.path),
        "symbol": None if library is None else library.symbol,
        "is_single_threaded": None if library is None else library.is_single_threaded,
        "has_bf16": None if library is None else library.has_bf16,
        "unusable": {
            _short(path): reason.replace(path, _short(path)) for path, reason in refused.items()
        },
    }


def sgemm(
    a: Any,
    b: Any,
    *,
    out: Any = None,
    trans_a: bool = False,
    trans_b: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Any:
    """Return ``alpha op(a) op(b) + beta out``, in one thread where the library can.

    Parameters
    ----------
    a : array
        float32, m x k, or k x m with `trans_a`: NumPy or torch, rows contiguous. Or bfloat16.
    b : array
        Of the same dtype, k x n, or n x k with `trans_b`.
    out : array, optional
        float32, m x n, written to; a new NumPy array by default. Must not overlap `a` or `b`.
    trans_a, trans_b : bool
        Take the transpose.
    alpha, beta : float
        Factors; with `beta` 0, what `out` held before is not looked at.

    Returns
    -------
    array
        `out`.

    Raises
    ------
    krul.ShapeError
        Shapes or strides do not fit.
    krul.DTypeError
        An array is not float32, `a` and `b` also not bfloat16 both.
    ValueError
        ``KRUL_BLAS`` names a library that does not serve, or `beta` is not 0 without `out`.
    NotImplementedError
        There is no library, or it does not multiply bfloat16; see `Library.has_bf16`.

    Examples
    --------
    >>> sgemm(np.float32([[1, 2]]), np.float32([[3], [4]])).tolist()
    [[11.0]]
    """
    library = find()
    if out is None:
        if beta != 0:
            raise ValueError(f"beta is {beta} but there is no out to multiply")
        out = np.empty((a.shape[1 if trans_a else 0], b.shape[0 if trans_b else 1]), np.float32)
    _core.blas_sgemm(library.handle, a, b, out, trans_a, trans_b, alpha, beta)
    return out
