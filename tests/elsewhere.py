"""A torch device that is none: tensors that say they are elsewhere, and that C cannot reach.

`installed` makes the device type ``elsewhere``, of two devices, by way of torch's own door for
backends that are written in Python. Its tensors have no storage of their own: each wraps one on the
CPU that only the code here touches. Every operation of torch works on them by way of the wrapped
ones, but one that mixes devices is an error, as it is on a GPU. ``numpy()`` and ``__dlpack__``
fail, and there is no address. So a path that works here hands nothing to C that is not on the CPU,
makes every tensor on the right device, and copies where it must. What it does not prove: anything
about time, streams, memory that is pinned, or how a GPU rounds.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["N_DEVICES", "Elsewhere", "copies", "device", "installed", "largest", "why_not"]

N_DEVICES = 2

#: What went between devices, as ``"elsewhere:0 to cpu"``: copies, and bytes of the largest.
copies: Counter[str] = Counter()
largest: Counter[str] = Counter()

_NAME = "elsewhere"
_lock = threading.Lock()
_library: Any = None


def why_not() -> str:
    """Return why this torch cannot have such a device, or nothing."""
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} takes no backend that is written in Python"
    return ""


def device(index: int = 0) -> torch.device:
    """Return one of the two devices; `installed` must have been entered."""
    return torch.device(_NAME, index)


class Elsewhere(torch.Tensor):
    """A tensor on one of the devices; `inside` is the one on the CPU that holds its numbers."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor, place: torch.device) -> Elsewhere:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=place,
        )
        out.inside = inside
        return out

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inside!r}, device={str(self.device)!r})"

    def __dlpack__(self, **_: Any) -> Any:  # type: ignore[override]
        raise BufferError(f"a tensor on {self.device} was handed to C")

    def __dlpack_device__(self) -> tuple[int, int]:  # type: ignore[override]
        return 12, self.device.index  # kDLExtDev

    def data_ptr(self) -> int:
        return 0  # which torch's deepcopy takes for "no storage", and C for nothing at all

    def tolist(self) -> Any:
        return self.inside.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert a tensor on {self.device} to numpy; use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(operation, args, kwargs or {})


def _leaves(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in _leaves(value)]
    if isinstance(values, dict):
        return [leaf for value in values.values() for leaf in _leaves(value)]
    return []


def _map(change: Any, values: Any) -> Any:
    if isinstance(values, (list, tuple)):
        return type(values)(_map(change, value) for value in values)
    if isinstance(values, dict):
        return {key: _map(change, value) for key, value in values.items()}
    return change(values)


def _note(source: torch.device, target: torch.device, tensor: torch.Tensor) -> None:
    key = f"{source} to {target}"
    with _lock:
        copies[key] += 1
        largest[key] = max(largest[key], tensor.numel() * tensor.element_size())


_TO_COPY = torch.ops.aten._to_copy.default
_COPY = torch.ops.aten.copy_.default
_CHOICE = torch.ops.aten._fused_sdp_choice.default
_ITEM = torch.ops.aten._local_scalar_dense.default


def _run(operation: Any, args: Any, kwargs: Any) -> Any:
    """Carry an operation out on the wrapped tensors."""
    if operation is _CHOICE:
        return 0  # the plain one: the others belong to real devices
    place = kwargs.get("device")
    target = torch.device(place) if place is not None else None
    tensors = _leaves((args, kwargs))
    if operation is _COPY:
        if args[0].device != args[1].device:
            _note(args[1].device, args[0].device, args[1])
    else:
        # Numbers without dimensions may be on the CPU, as everywhere in torch.
        places = {t.device for t in tensors if t.dim() or t.device.type == _NAME}
        if operation is not _TO_COPY and torch.device("cpu") in places:
            indices = _is_indexing(operation)
            if not indices or tensors[0].device.type == "cpu":
                raise RuntimeError(
                    f"expected all tensors to be on one device but {operation} got "
                    f"{', '.join(sorted(map(str, places)))}"
                )
            places.discard(torch.device("cpu"))
        if len(places) > 1:
            raise RuntimeError(
                f"expected all tensors to be on one device but {operation} got "
                f"{', '.join(sorted(map(str, places)))}"
            )
        if target is None:
            target = next(iter(places)) if places else device(0)
        elif operation is _TO_COPY and target != tensors[0].device:
            _note(tensors[0].device, _indexed(target), tensors[0])
    inner = [t.inside if isinstance(t, Elsewhere) else t for t in tensors]
    plain = _map(lambda x: x.inside if isinstance(x, Elsewhere) else x, (args, kwargs))
    plain_args, plain_kwargs = plain
    if place is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
        plain_kwargs.pop("pin_memory", None)
    result = operation(*plain_args, **plain_kwargs)
    if (target is not None and target.type != _NAME) or operation is _ITEM:
        return result
    owner = {id(t): wrapped for t, wrapped in zip(inner, tensors, strict=True)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in owner:  # written in place
            return owner[id(value)]
        return Elsewhere(value, _indexed(target if target is not None else args[0].device))

    return _map(wrap, result)


def _is_indexing(operation: Any) -> bool:
    return operation.name().split("::")[1].split(".")[0] in ("index", "index_put", "index_put_")


def _indexed(place: torch.device) -> torch.device:
    return place if place.index is not None or place.type == "cpu" else torch.device(place.type, 0)


class _Module:
    """What torch asks of a device type by the name ``torch.elsewhere``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return N_DEVICES

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, _: Any = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Have the device type in the block; torch knows its name for good."""
    global _library
    from torch.utils import backend_registration

    if _library is None:
        backend_registration._setup_privateuseone_for_python_backend(_NAME, _Module())
        _library = torch.library.Library("_", "IMPL")
        _library.fallback(
            lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1"
        )
    # torch makes these past the door for Python.
    before = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
    for name, make in before.items():
        setattr(torch, name, _by_way_of_the_cpu(make))
    try:
        yield
    finally:
        for name, make in before.items():
            setattr(torch, name, make)


def _by_way_of_the_cpu(make: Any) -> Any:
    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        place = None if device is None else torch.device(device)
        if place is None or place.type != _NAME:
            return make(data, *args, device=device, **kwargs)
        return make(data, *args, device="cpu", **kwargs).to(place)

    return made
