"""Stand-ins for a store: a restore whose steps the test decides, and a save that only notes."""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch

from krul.cache import Cache
from krul.errors import KrulError
from krul.history import Snapshot
from krul.layer import KrulLayer
from krul.reports import RestoreReport, SaveReport

# A test that would hang fails instead.
PATIENCE_S = 20.0


class FakeSource:
    """Fills the layers of a cache from another cache, when and as the test says.

    Parameters
    ----------
    origin : Cache
        Whose numbers are restored.
    target : Cache
        An empty cache of the same model.
    failures : dict of int to Exception
        Layers that cannot be read.
    is_held : bool
        Nothing comes in until `let`.
    """

    def __init__(
        self,
        origin: Cache,
        target: Cache,
        failures: dict[int, Exception] | None = None,
        is_held: bool = False,
        is_known: bool = True,
    ) -> None:
        self.origin, self.target = origin, target
        self.failures = failures or {}
        self.n_tokens = origin.n_tokens
        self.is_cancelled = False
        self.n_closed = 0
        self.waited: list[int] = []
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.events: dict[int, threading.Event] = {}
        if is_known:
            target.record_history(origin.token_ids, origin.attention_mask, origin.positions)
        for index, (old, new) in enumerate(zip(origin.layers, target.layers, strict=True)):
            if isinstance(new, KrulLayer):
                keys, values = old.keys, old.values
                room = new.allocate(keys.shape, values.shape, keys.dtype, values.dtype)
                for tensor in room:
                    tensor.fill_(float("nan"))
                self.layers[index] = room
                self.events[index] = threading.Event()
            else:
                new.lazy_initialization(*_initial_arguments(old))
                new.keys, new.values = old.keys.clone(), old.values.clone()
                new.cumulative_length = old.cumulative_length
        target.begin_restore(self, self.layers)
        if not is_held:
            self.let(self.layers)

    def let(self, layers: Iterable[int]) -> None:
        """Bring these layers in."""
        for index in layers:
            if not self.is_cancelled:
                if index not in self.failures:
                    old = self.origin.layers[index]
                    self.layers[index][0].copy_(old.keys[:, :, : self.n_tokens])
                    self.layers[index][1].copy_(old.values[:, :, : self.n_tokens])
                self.events[index].set()

    def wait(self, layer: int, can_recompute: bool = False) -> None:
        self.waited.append(layer)
        if not self.events[layer].wait(PATIENCE_S):
            raise AssertionError(f"nobody brought in layer {layer}")
        if layer in self.failures:
            raise self.failures[layer]

    def cancel(self) -> None:
        self.is_cancelled = True
        for index, event in self.events.items():
            if not event.is_set():
                self.failures.setdefault(index, KrulError(f"layer {index} was cancelled"))
                event.set()

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        self.cancel()
        self.n_closed += 1

    def report(self) -> RestoreReport:
        n_loaded = [0] * len(self.target.layers)
        for index, event in self.events.items():
            if event.is_set() and index not in self.failures:
                n_loaded[index] = self.n_tokens
        return RestoreReport(
            n_tokens=self.n_tokens,
            n_loaded_by_layer=tuple(n_loaded),
            n_recomputed_by_layer=(0,) * len(n_loaded),
            loaded_bytes=0,
            predicted_s=0.0,
            actual_s=0.0,
            seconds_by_stage={"open": 0.0},
            plan="load",
            reason="everything was read",
        )


def _initial_arguments(layer: Any) -> tuple[torch.Tensor, ...]:
    import inspect

    n_parameters = len(inspect.signature(layer.lazy_initialization).parameters)
    return (layer.keys, layer.values)[:n_parameters]


class FakeSave(types.ModuleType):
    """Takes the place of `krul.save`: keeps what it was given; can be made to dawdle or fail."""

    def __init__(self) -> None:
        super().__init__("krul.save")
        self.saved: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.error: Exception | None = None

    def save_cache(self, cache: Cache, snapshot: Snapshot) -> SaveReport:
        self.started.set()
        if not self.gate.wait(PATIENCE_S):
            raise AssertionError("nobody opened the gate")
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        n_saved = cache.n_saved_in(snapshot)
        self.saved.append(
            {
                "start": n_saved,
                "ids": snapshot.token_ids.clone(),
                "mask": snapshot.attention_mask,
                "positions": snapshot.positions,
                "layers": [
                    None if (pair := layer.tensors()) is None else tuple(t.clone() for t in pair)
                    for layer in snapshot.layers
                ],
                "kinds": [layer.kind for layer in snapshot.layers],
                "token_start": [layer.token_start for layer in snapshot.layers],
                "thread": threading.current_thread(),
                "niceness": os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
            }
        )
        cache.mark_saved(cache.generation + 1, [*cache.segments, n_saved], snapshot)
        return SaveReport(
            n_tokens=snapshot.n_tokens,
            n_new_tokens=snapshot.n_tokens - n_saved,
            stored_bytes=0,
            new_bytes=0,
            bf16_bytes=0,
            model_dtype_bytes=0,
            ratio_bf16=1.0,
            codec_by_layer=(),
            pairs=(),
            guard_mean_kl=0.0,
            guard_max_kl=0.0,
            guard_top1=1.0,
            n_guard_tokens=0,
            seconds_by_stage={},
            reason="",
        )
