"""Lets an estimator see the queries and keys of a model as it runs, without changing a number.

transformers looks its attention function up at each call: in the registry
``ALL_ATTENTION_FUNCTIONS`` of the modeling file, or, for eager attention, as that file's own
``eager_attention_forward``. Both are wrapped under their existing names, so that masks and every
decision by name stay as they are. The wrapper does nothing unless an estimator was pushed in this
thread, and then only for the decoder attention of models that were installed. The file's function
for rotary embedding is wrapped likewise: its argument is the query before rotation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .device import is_direct, take_rows
from .errors import UnsupportedModelError
from .estimator import Estimator

__all__ = ["Handle", "begin", "end", "install", "observing", "pop", "push", "watch"]


class _PerThread(threading.local):
    """What this thread observes, innermost last; None is a pause."""

    def __init__(self) -> None:
        self.stack: list[_Watch | None] = []


_thread = _PerThread()


def _current() -> _Watch | None:
    """Return what watches this thread now; what watched a model that is let go does no longer."""
    stack = _thread.stack
    while stack and stack[-1] is not None and stack[-1].is_over:
        stack.pop()  # let go by another thread in the middle of a pass: nobody pops it
    return stack[-1] if stack else None


_lock = threading.RLock()
_files: dict[int, _File] = {}
# Attention module: its layer index, and the token of the model that it belongs to.
_seats: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, _Model]] = weakref.WeakKeyDictionary()


class _Model:
    """An installed model: what its handles share."""

    def __init__(self) -> None:
        self.n_handles = 0


class _File:
    """The wrapped functions of one modeling file, with how often they are wanted."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.n_handles = 0
        self.undo: list[Callable[[], None]] = []
        self.implementations: set[str] = set()
        self.has_rotary = False
        # Of heads that are rotated in part: whether that part comes first; None: neither end is it.
        self.is_first_rotated: dict[tuple[int, int], bool | None] = {}

    def unrotated_rows(
        self, unrotated: torch.Tensor, queries: torch.Tensor, rows: np.ndarray
    ) -> torch.Tensor | None:
        """Pick rows of what went into the rotary function; None where the layout is not known."""
        if unrotated.dim() != 4:
            return None
        same_but_last = unrotated.shape[:3] == queries.shape[:3]
        if not same_but_last and unrotated.transpose(1, 2).shape[:3] == queries.shape[:3]:
            unrotated = unrotated.transpose(1, 2)
            same_but_last = True
        if not same_but_last:
            return None
        before = take_rows(unrotated, rows)
        n_rotated, head_dim = before.shape[3], queries.shape[3]
        if n_rotated == head_dim:
            return before
        after = take_rows(queries, rows)
        key = (n_rotated, head_dim)
        if key not in self.is_first_rotated:  # asked once, for the answer waits for the device
            self.is_first_rotated[key] = _is_first_rotated(before, after)
        is_first = self.is_first_rotated[key]
        if is_first is None:
            return None
        if is_first:
            return torch.cat([before, after[..., n_rotated:]], dim=-1)
        return torch.cat([after[..., : head_dim - n_rotated], before], dim=-1)

    def wrap_all(self, implementation: str) -> None:
        """Wrap the eager function, the rotary function, and the implementation in use."""
        if not self.undo:
            for name, function in list(self.names.items()):
                if name == "eager_attention_forward":
                    self._wrap_entry(self.names, name, _wrap_attention(function, self))
                elif _is_rotary(name) and callable(function):
                    self.has_rotary = True
                    self._wrap_entry(self.names, name, _wrap_rotary(function))
        if implementation != "eager" and implementation not in self.implementations:
            registry = self.names["ALL_ATTENTION_FUNCTIONS"]
            self.implementations.add(implementation)
            self._wrap_registered(registry, implementation)

    def _wrap_entry(self, entries: dict[str, Any], name: str, wrapper: Any) -> None:
        original = entries[name]
        entries[name] = wrapper

        def restore() -> None:
            # Whoever wrapped it since keeps ours below, which then passes everything on.
            if entries.get(name) is wrapper:
                entries[name] = original

        self.undo.append(restore)

    def _wrap_registered(self, registry: Any, name: str) -> None:
        original = registry[name]
        wrapper = _wrap_attention(original, self)
        local = getattr(registry, "_local_mapping", registry)
        was_local = name in local
        registry[name] = wrapper

        def restore() -> None:
            if local.get(name) is not wrapper:
                return
            if was_local:
                registry[name] = original
            else:
                del registry[name]

        self.undo.append(restore)

    def unwrap_all(self) -> None:
        for restore in reversed(self.undo):
            restore()
        self.undo.clear()
        self.implementations.clear()


class _Watch:
    """One estimator, pushed in one thread."""

    def __init__(self, estimator: Estimator, model: _Model | None) -> None:
        self.estimator = estimator
        self.model = model
        self.unrotated: torch.Tensor | None = None
        self.last_layer = -1
        self.masks: dict[int, tuple[Any, Any]] = {}

    @property
    def is_over(self) -> bool:
        """Whether its model is installed no more; a model installed again is another one."""
        return self.model is not None and self.model.n_handles == 0

    def see(
        self,
        file: _File,
        module: torch.nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        mask: Any,
        arguments: dict[str, Any],
    ) -> None:
        unrotated, self.unrotated = self.unrotated, None
        seat = _seats.get(module)
        if seat is None:
            return
        layer, model = seat
        if self.model is None:
            self.model = model  # the first model to run is the one that is meant
        elif self.model is not model:
            return
        try:
            with torch.no_grad():
                self._collect(layer, file, module, queries, keys, mask, arguments, unrotated)
        except Exception as error:  # the model must run on, whatever it hands to its attention
            self.estimator.abandon(str(error))
            self.masks.clear()

    def _collect(
        self,
        layer: int,
        file: _File,
        module: torch.nn.Module,
        queries: torch.Tensor,
        keys: torch.Tensor,
        mask: Any,
        arguments: dict[str, Any],
        unrotated: torch.Tensor | None,
    ) -> None:
        if layer < self.last_layer:
            self.masks.clear()  # they were another pass's
        self.last_layer = layer
        rows = self.estimator.pick_rows(layer, queries.shape[2])
        if rows is None:
            return
        if arguments.get("position_bias") is not None:
            raise UnsupportedModelError("the attention adds a bias of positions to its scores")
        scaling = arguments.get("scaling")
        if scaling is None:
            scaling = getattr(module, "scaling", None)
        if scaling is None:
            scaling = queries.shape[-1] ** -0.5
        sinks = arguments.get("s_aux")
        if sinks is None:
            sinks = getattr(module, "sinks", None)
        if not file.has_rotary:
            before = None
        elif unrotated is None:
            before = take_rows(queries, rows)  # no rotary embedding, in a file that has it
        else:
            before = file.unrotated_rows(unrotated, queries, rows)
        self.estimator.collect(
            layer,
            queries,
            keys,
            scaling=float(scaling),
            softcap=float(arguments.get("softcap") or 0.0),
            sinks=sinks,
            window=arguments.get("sliding_window"),
            visible=self._visible(mask, rows, queries.shape[2], keys.shape[2]),
            pre_rotary=before,
        )

    def _visible(self, mask: Any, rows: np.ndarray, n_queries: int, n_keys: int) -> Any:
        """Return what the picked rows see, by the mask; layers may share mask and answer."""
        if mask is None:
            return None
        known = self.masks.get(id(mask))
        if known is None or known[0] is not mask:
            self.masks[id(mask)] = known = (mask, _look_at_mask(mask, rows, n_queries, n_keys))
        return known[1]

    def end(self, is_failed: bool) -> None:
        """Finish the forward pass, or give it up."""
        self.masks.clear()
        self.unrotated = None
        if is_failed:
            self.estimator.abandon()
            return
        try:
            self.estimator.finish()
        except Exception as error:  # as in see
            self.estimator.abandon(str(error))


def _look_at_mask(mask: Any, rows: np.ndarray, n_queries: int, n_keys: int) -> Any:
    """Read a mask, or return a function that does: reading it here would wait for its device."""
    if not isinstance(mask, torch.Tensor) or not is_direct(mask.device):
        return _read_mask(mask, rows, n_queries, n_keys)
    if mask.dim() == 4 and mask.shape[2] == n_queries:
        mask, rows, n_queries = take_rows(mask, rows), np.arange(len(rows)), len(rows)
    return functools.partial(_read_mask, mask.clone(), rows, n_queries, n_keys)


def _read_mask(mask: Any, rows: np.ndarray, n_queries: int, n_keys: int) -> np.ndarray:
    if not isinstance(mask, torch.Tensor):
        raise UnsupportedModelError(f"the attention mask is a {type(mask).__name__}")
    if mask.dim() == 2:  # padding only, as flash attention takes it
        real = (mask[:, -n_keys:] != 0).cpu().numpy()
        before = np.arange(n_keys)[None] <= (rows + n_keys - n_queries)[:, None]
        return real[:, None] & before[None]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, n_queries):
        raise UnsupportedModelError(f"the attention mask is {tuple(mask.shape)}")
    picked = mask[:, 0, :, :n_keys]
    if picked.shape[1] == n_queries:
        picked = picked[:, rows]
    if picked.dtype == torch.bool:
        return picked.expand(-1, len(rows), -1).cpu().numpy()
    visible = picked > torch.finfo(picked.dtype).min / 2
    if bool((picked * visible != 0).any()):
        raise UnsupportedModelError("the attention mask adds a bias to the scores")
    return visible.expand(-1, len(rows), -1).cpu().numpy()


def _is_first_rotated(before: torch.Tensor, after: torch.Tensor) -> bool | None:
    """Tell where a part of a head stands that is rotated, which keeps its length."""
    n_rotated, head_dim = before.shape[3], after.shape[3]
    length = before.float().norm(dim=-1)
    if _is_close(length, after[..., :n_rotated].float().norm(dim=-1)):
        return True
    if _is_close(length, after[..., head_dim - n_rotated :].float().norm(dim=-1)):
        return False
    return None


def _is_close(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(((left - right).norm() <= 0.02 * left.norm()).item())


def _is_rotary(name: str) -> bool:
    return name.startswith("apply_") and "rotary" in name


def _wrap_attention(original: Callable[..., Any], file: _File) -> Callable[..., Any]:
    @functools.wraps(original)
    def observed_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not torch.compiler.is_compiling():
            watch = _current()
            if watch is not None:
                watch.see(file, module, query, key, attention_mask, kwargs)
        return original(module, query, key, value, attention_mask, *args, **kwargs)

    return observed_attention


def _wrap_rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def observed_rotary(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            watch = _current()
            # Queries come first, whether the function takes keys too or is called once for each.
            if watch is not None and watch.unrotated is None and args:
                watch.unrotated = args[0] if isinstance(args[0], torch.Tensor) else None
        return original(*args, **kwargs)

    return observed_rotary


class Handle:
    """What :func:`install` returns; `remove` undoes it."""

    def __init__(self, model: _Model, seats: list[torch.nn.Module], files: list[_File]) -> None:
        self._model = model
        self._seats = seats
        self._used_files = files
        self._is_installed = True

    def remove(self) -> None:
        """Restore everything as it was before, unless another handle still needs it."""
        with _lock:
            if not self._is_installed:
                return
            self._is_installed = False
            self._model.n_handles -= 1
            if self._model.n_handles == 0:
                for module in self._seats:
                    _seats.pop(module, None)
            for file in self._used_files:
                file.n_handles -= 1
                if file.n_handles == 0:
                    file.unwrap_all()
                    _files.pop(id(file.names), None)
            self._seats, self._used_files = [], []

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def install(model: Any) -> Handle:
    """Make the attention of a model visible to estimators.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or a wrapper around one.

    Returns
    -------
    Handle
        Keep it; its ``remove()`` restores everything. Handles are counted.

    Raises
    ------
    krul.UnsupportedModelError
        The attention does not go through transformers' registry; the message says which.

    Notes
    -----
    Costs nothing worth measuring while no estimator is pushed: one look at an empty list per layer.
    Under ``torch.compile`` nothing is observed.
    """
    from .model import decoder_layers, text_config

    _, layers = decoder_layers(model)
    implementation = str(getattr(text_config(model), "_attn_implementation", None) or "eager")
    globals_by_id: dict[int, dict[str, Any]] = {}
    for _, _, attention in layers:
        names = inspect.unwrap(type(attention).forward).__globals__
        if "ALL_ATTENTION_FUNCTIONS" not in names:
            raise UnsupportedModelError(
                f"{type(attention).__name__} does not look its attention function up in "
                "ALL_ATTENTION_FUNCTIONS, so its queries cannot be observed"
            )
        if implementation == "eager" and "eager_attention_forward" not in names:
            raise UnsupportedModelError(
                f"{type(attention).__name__} runs eagerly but its file has no "
                "eager_attention_forward, so its queries cannot be observed"
            )
        if implementation != "eager" and implementation not in names["ALL_ATTENTION_FUNCTIONS"]:
            raise UnsupportedModelError(
                f"{type(attention).__name__} uses the attention function '{implementation}', "
                "which is not in ALL_ATTENTION_FUNCTIONS"
            )
        globals_by_id[id(names)] = names
    with _lock:
        seat = _seats.get(layers[0][2])
        shared = seat[1] if seat is not None else _Model()
        shared.n_handles += 1
        for index, _, attention in layers:
            _seats[attention] = (index, shared)
        files = []
        for key, names in globals_by_id.items():
            file = _files.setdefault(key, _File(names))
            file.n_handles += 1
            file.wrap_all(implementation)
            files.append(file)
    return Handle(shared, [attention for _, _, attention in layers], files)


def push(
    estimator: Estimator | None, handle: Handle | None = None, *, n_past: int | None = None
) -> None:
    """Feed an estimator with the forward passes of this thread, until :func:`pop`.

    Parameters
    ----------
    estimator : Estimator or None
        None pauses observation.
    handle : Handle or None
        The model that is meant; None: the first installed model that runs.
    n_past : int or None
        Tokens in the cache before the next forward pass; see `Estimator.begin`.
    """
    if estimator is not None:
        begin(estimator, handle, n_past=n_past)
    else:
        _thread.stack.append(None)


def pop(*, is_failed: bool = False) -> None:
    """End what the last :func:`push` in this thread began.

    Parameters
    ----------
    is_failed : bool
        The forward pass did not end well: what was collected of it is given up.
    """
    watch = _thread.stack.pop()
    if watch is not None:
        watch.end(is_failed)


def begin(estimator: Estimator, handle: Handle | None = None, *, n_past: int | None = None) -> Any:
    """Do what :func:`push` does for a pass in which the model may be let go by another thread.

    Returns
    -------
    object
        For :func:`end`.
    """
    estimator.begin(n_past)
    watch = _Watch(estimator, None if handle is None else handle._model)
    _current()
    _thread.stack.append(watch)
    return watch


def end(watch: Any, *, is_failed: bool = False) -> None:
    """End what :func:`begin` began, whether or not it watches still."""
    if watch in _thread.stack:
        _thread.stack.remove(watch)
    watch.end(is_failed)


@contextlib.contextmanager
def observing(
    estimator: Estimator, handle: Handle | None = None, *, n_past: int | None = None
) -> Iterator[Estimator]:
    """Feed an estimator with the forward passes in a block; see :func:`push`.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)).eval()
    >>> with install(model) as handle, observing(Estimator(n_layers=2), handle) as estimator:
    ...     logits = model(torch.arange(20)[None]).logits
    >>> estimator.result().n_prefill_rows
    20.0
    """
    watch = begin(estimator, handle, n_past=n_past)
    is_failed = True
    try:
        yield estimator
        is_failed = False
    finally:
        end(watch, is_failed=is_failed)


class _Recorder:
    """Takes an estimator's place, and only notes which layers came by."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, ...]] = {}

    def begin(self, n_past: int | None = None) -> None:
        pass

    def pick_rows(self, layer: int, n_queries: int) -> np.ndarray:
        return np.arange(n_queries)

    def collect(self, layer: int, queries: Any, keys: Any, **_: Any) -> None:
        self.seen[layer] = tuple(keys.shape)

    def finish(self) -> None:
        pass

    def abandon(self, reason: str | None = None) -> None:
        pass


@contextlib.contextmanager
def watch(model: Any) -> Iterator[dict[int, tuple[int, ...]]]:
    """Note which layers of a model can be observed, while it runs in the block.

    Parameters
    ----------
    model : torch.nn.Module
        See :func:`install`, which is called and undone.

    Yields
    ------
    dict of int to tuple of int
        Layer index: shape of its keys; filled as the model runs.

    Raises
    ------
    krul.UnsupportedModelError
        See :func:`install`.
    """
    recorder = _Recorder()
    with install(model) as handle, observing(recorder, handle):  # type: ignore[arg-type]
        yield recorder.seen
