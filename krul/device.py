"""Which device each layer of a model is on, and the way between it and the memory of the CPU.

Where `krul._cuda` is, a CUDA device encodes, decodes and observes by itself: blocks go to it and
come from it as they are stored. For other devices, and where there is no room, the C library works
in the memory of the CPU: what a layer holds is copied there piece by piece, and what was decoded
for it lands there and goes on when all of it is in.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .layer import outside_autograd
from .model import decoder_layers, generation_model, input_device, modules_of

__all__ = [
    "CPU",
    "Landing",
    "Marks",
    "Stopwatch",
    "devices_of",
    "is_direct",
    "is_elsewhere",
    "layer_devices",
    "on_cpu",
    "record_use",
    "stream_of",
    "synchronize",
    "take_rows",
]

CPU = torch.device("cpu")

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


def is_elsewhere(place: torch.Tensor | torch.device) -> bool:
    """Whether a tensor is where the C library cannot reach it, or a device is such a place."""
    device = place.device if isinstance(place, torch.Tensor) else place
    return device.type != "cpu"


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that the C library can borrow: itself, or a copy."""
    return tensor.cpu() if is_elsewhere(tensor) else tensor


def is_direct(device: torch.device) -> bool:
    """Whether the C library has a device encode, decode and observe by itself."""
    from . import CUDA_UNAVAILABLE

    return device.type == "cuda" and CUDA_UNAVAILABLE is None


def stream_of(device: torch.device) -> tuple[int, int]:
    """Return a device's number, and the address of the stream that torch uses in this thread."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def layer_devices(model: Any) -> list[torch.device]:
    """Return the device on which each decoder layer makes its K and V.

    Where accelerate has placed a layer, that is the device of its hook: weights that are offloaded
    are on "meta" between passes.
    """
    inner = generation_model(model)
    otherwise = input_device(inner)
    return [_indexed(_device_of(layer, otherwise)) for _, layer, _ in decoder_layers(inner)[1]]


def _device_of(layer: torch.nn.Module, otherwise: torch.device) -> torch.device:
    """Return where accelerate runs a layer, else where its first weights are that are anywhere."""
    found = None
    for module in modules_of(layer):
        hook = module.__dict__.get("_hf_hook")
        for one in () if hook is None else getattr(hook, "hooks", (hook,)):
            planned = getattr(one, "execution_device", None)
            if planned is not None:
                return torch.device(planned)
        if found is None:
            weights = (x for x in module._parameters.values() if x is not None and not x.is_meta)
            found = next((x.device for x in weights), None)
    return otherwise if found is None else found


def _indexed(device: torch.device) -> torch.device:
    """Return "cuda:0" for "cuda", as tensors call it; "meta" holds no K and V."""
    if device.type == "meta":
        return CPU
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.empty(0, device=device).device


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until devices have done what they were told."""
    for device in set(devices):
        module = getattr(torch, device.type, None)
        if is_elsewhere(device) and hasattr(module, "synchronize"):
            # torch.mps has one device and takes no argument.
            module.synchronize(*(() if device.type == "mps" else (device,)))


class Marks:
    """Where the streams of some devices are now, for whoever reads elsewhere what they wrote.

    A save runs in a thread of its own, whose stream of a device need not be the model's. Devices
    other than CUDA's have one stream, as torch sees them.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._events = [
            (device, torch.cuda.current_stream(device).record_event())
            for device in set(devices)
            if device.type == "cuda"
        ]

    def follow(self) -> None:
        """Let what this thread asks of the devices come after the marks."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)

    def events(self) -> list[tuple[int, int]]:
        """Return the marks for the C library: a device's number and an event's address of each."""
        return [(device.index, event.cuda_event) for device, event in self._events]


class Stopwatch:
    """Seconds between its making and `stop`, as a device spent them; never waits for it.

    Calls return before a device has done what they ask for, so that a clock of the CPU would tell
    how long the asking took. Devices that are neither CPU nor CUDA are not measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[Any] = []
        self._seconds: float | None = None
        self._begin = time.perf_counter()
        self._note()

    def _note(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)

    def stop(self) -> None:
        """End what is measured."""
        if self._device.type == "cpu":
            self._seconds = time.perf_counter() - self._begin
        elif self._device.type == "cuda":
            self._note()
        else:
            self._seconds = math.nan

    def seconds(self) -> float | None:
        """Return the seconds; None while they are not over; NaN where they cannot be known."""
        if self._seconds is None and len(self._events) == 2 and self._events[1].query():
            self._seconds = self._events[0].elapsed_time(self._events[1]) * 1e-3
        return self._seconds


class Landing:
    """Memory of the CPU in which K and V of one layer are decoded, on the way to their device.

    Parameters
    ----------
    target : tuple of torch.Tensor
        K and V on the layer's device, shape (n_batch, n_kv_heads, n_room, head_dim).
    n_tokens : int
        How many tokens come, at most n_room.

    Attributes
    ----------
    host : tuple of torch.Tensor
        Shape (n_batch, n_kv_heads, n_tokens, head_dim), pinned where torch can pin for the device.
    """

    def __init__(self, target: KeysAndValues, n_tokens: int) -> None:
        self.target = target
        with outside_autograd():
            keys, values = (_landing_memory(buffer, n_tokens) for buffer in target)
        self.host: KeysAndValues | None = (keys, values)
        self._lock = threading.Lock()
        self._marks: Marks | None = None

    def bring(self, token_start: int) -> None:
        """Copy the tokens from `token_start` on to the device, once; the memory is then let go.

        The copy is ordered before whatever this thread asks of the device from now on.
        """
        with self._lock:
            if self.host is not None:
                with outside_autograd():
                    for landed, buffer in zip(self.host, self.target, strict=True):
                        record_use(buffer)
                        buffer[:, :, token_start : landed.shape[2]].copy_(
                            landed[:, :, token_start:], non_blocking=landed.is_pinned()
                        )
                self.host = None
                self._marks = Marks([self.target[0].device])
            elif self._marks is not None:
                self._marks.follow()


def _landing_memory(buffer: torch.Tensor, n_tokens: int) -> torch.Tensor:
    shape = (*buffer.shape[:2], n_tokens, buffer.shape[3])
    if buffer.device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # the system refuses to pin so much
            return torch.empty(shape, dtype=buffer.dtype, device=CPU, pin_memory=True)
    return torch.empty(shape, dtype=buffer.dtype, device=CPU)


def record_use(buffer: torch.Tensor) -> None:
    """Tell torch's allocator that this thread's stream uses memory that was made on another."""
    if buffer.device.type == "cuda":
        buffer.record_stream(torch.cuda.current_stream(buffer.device))


def take_rows(tensor: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Return a copy of some of a tensor's third axis; a CUDA device is not waited for."""
    if len(rows) == 1:
        return tensor[:, :, rows[0] : rows[0] + 1].clone()
    if tensor.device.type != "cuda":
        return tensor[:, :, rows]
    # An index of the CPU's would be copied by a call that waits for the device.
    index = torch.from_numpy(rows).pin_memory().to(tensor.device, non_blocking=True)
    return tensor.index_select(2, index)


def devices_of(tensors: Sequence[torch.Tensor]) -> set[torch.device]:
    """Return the devices of some tensors that are not the CPU."""
    return {tensor.device for tensor in tensors if is_elsewhere(tensor)}
