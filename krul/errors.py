"""The exceptions that krul raises, each also the built-in class that it resembles."""

__all__ = [
    "CorruptionError",
    "DTypeError",
    "DeviceError",
    "FormatError",
    "KrulError",
    "MismatchError",
    "ShapeError",
    "StoreFullError",
    "UnsupportedModelError",
]


class KrulError(Exception):
    """The class above all of krul's own exceptions."""


class ShapeError(KrulError, ValueError):
    """An array has the wrong number of dimensions, extents or strides."""


class DTypeError(KrulError, TypeError):
    """An array has an element type that does not fit."""


class FormatError(KrulError, ValueError):
    """Bytes are not krul's, or of a version that this krul does not know."""


class CorruptionError(KrulError, ValueError):
    """Bytes were krul's and are damaged."""


class MismatchError(KrulError, ValueError):
    """A conversation and what it meets do not belong together.

    Another model, other weights, other adapters, another rope setting; or the conversation was
    saved by somebody else since it was opened.
    """


class UnsupportedModelError(KrulError, NotImplementedError):
    """krul cannot keep the state of this model, or not in the way that was asked for."""


class DeviceError(KrulError, RuntimeError):
    """An accelerator failed or is not there."""


class StoreFullError(KrulError, OSError):
    """The disk, the quota or the store's own limit is used up."""
