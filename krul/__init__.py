"""krul keeps the KV cache of a chat: compressed, stored, and back before the model has to wait.

``import krul`` loads NumPy and krul's own C module; torch and transformers are imported when a name
that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _core
from .errors import (
    CorruptionError,
    DeviceError,
    DTypeError,
    FormatError,
    KrulError,
    MismatchError,
    ShapeError,
    StoreFullError,
    UnsupportedModelError,
)
from .reports import ConversationInfo, GcReport, Problem, RestoreReport, SaveReport
from .settings import Settings

if TYPE_CHECKING:
    from . import compressor, estimator, restore, selector
    from .cache import Cache
    from .hooks import attach
    from .profile import Profile
    from .store import Store

__version__ = "0.1.0"

#: Why there is no CUDA here, in the words of the import that failed; None where there is.
CUDA_UNAVAILABLE: str | None = None
try:
    _core.device_register(importlib.import_module("._cuda", __name__).table)
except ImportError as error:
    CUDA_UNAVAILABLE = str(error)

__all__ = [
    "CUDA_UNAVAILABLE",
    "Cache",
    "ConversationInfo",
    "CorruptionError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "GcReport",
    "KrulError",
    "MismatchError",
    "Problem",
    "Profile",
    "RestoreReport",
    "SaveReport",
    "Settings",
    "ShapeError",
    "Store",
    "StoreFullError",
    "UnsupportedModelError",
    "attach",
    "backends",
    "compressor",
    "estimator",
    "restore",
    "selector",
]

# Name: the module that has it, and the name there; None is the module itself.
_LAZY = {
    "Cache": ("cache", "Cache"),
    "Profile": ("profile", "Profile"),
    "Store": ("store", "Store"),
    "attach": ("hooks", "attach"),
    "compressor": ("compressor", None),
    "estimator": ("estimator", None),
    "restore": ("restore", None),
    "selector": ("selector", None),
}


def backends() -> dict[str, Any]:
    """Tell what can run here, what was chosen, and why not the rest.

    Returns
    -------
    dict
        ``chosen``: the name of the table of kernels in use. ``usable``: all that can run here, best
        first. ``unusable``: the others, each with the reason. ``devices``: the kinds of device that
        encode, decode and observe by themselves. ``blas``: the library for matrix products, found
        by the first call that asks; ``chosen`` None if there is none.

    Examples
    --------
    >>> import krul
    >>> found = krul.backends()
    >>> found["chosen"] in found["usable"]
    True
    """
    from . import blas

    tables = _core.backends()
    no_cuda = {} if CUDA_UNAVAILABLE is None else {"cuda": CUDA_UNAVAILABLE}
    return {
        "chosen": next(name for name, _, is_chosen in tables if is_chosen),
        "usable": [name for name, is_usable, _ in tables if is_usable],
        "unusable": {
            **{name: "not for this processor" for name, is_usable, _ in tables if not is_usable},
            **no_cuda,
        },
        "devices": [] if no_cuda else ["cuda"],
        "blas": blas.about(),
    }


def __getattr__(name: str) -> Any:
    """Import what was asked for, once."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(f".{module_name}", __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
