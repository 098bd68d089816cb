"""Ways to bring a history back onto a device, all through krul's own store, reader and threads.

The ways of others are done as well as krul's: what they load is stored as it is, is read by the
same threads into the same memory, and goes to the device by the same copies. Each is checked before
it may be timed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import krul
from krul import _core, encode
from krul.compressor import CODECS
from krul.restore import Source

from . import harness
from .hidden_states import layer_inputs, make_layer
from .shapes import Shape

__all__ = ["CODED", "History", "Way", "drop_pages", "raw_blocks"]

#: Codecs that krul is measured with.
CODED = ("share", "share+int8", "int8", "int4", "predict")
#: Relative errors of logits that two correct runs may show: products of other shapes add in another
#: order, 30 layers deep; a wrong mask or position gives about 1.
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Of what a device decodes against what the CPU does, relative to the largest number of a layer: the
# last bit of a 16-bit number, and of codec predict sums in another order, too.
_SAME = {"exact": 0.0, "predict": 3e-2}
_LAST_BIT = 2.0**-7
_RAW_MODE, _RAW_HEADER_BYTES = 0, 8
_N_SCORED = 32


class _RawEncoder:
    """The C module, but its codec `exact` stores elements as they are: see FORMAT.md, mode 0."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_core, name)

    @staticmethod
    def encode_blocks(jobs: Any, *args: Any, **options: Any) -> list[Any]:
        """Encode blocks of codec `exact` raw, and others as ever."""
        coded = [job for job in jobs if job[0] != CODECS["exact"]]
        found = iter(_core.encode_blocks(coded, *args, **options))
        return [next(found) if job[0] != CODECS["exact"] else _raw(job[2]) for job in jobs]


def _raw(tensors: tuple[torch.Tensor, ...]) -> tuple[bytes, int, float, float]:
    parts = []
    for tensor in tensors:
        plain = tensor.contiguous().cpu()
        header = _RAW_MODE.to_bytes(_RAW_HEADER_BYTES, "little")
        parts.append(header + plain.view(torch.uint8).numpy().tobytes())
    return b"".join(parts), CODECS["exact"], 0.0, 1.0


@contextlib.contextmanager
def raw_blocks() -> Iterator[None]:
    """Have saves keep exact blocks uncompressed, as a loader without krul's codecs would."""
    with mock.patch.object(encode, "_core", _RawEncoder()):
        yield


def drop_pages(folder: str | os.PathLike[str]) -> None:
    """Have the system forget what it keeps of the files below a folder."""
    for place, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@dataclass(frozen=True)
class Way:
    """One way to bring the history back.

    Attributes
    ----------
    name : str
    open : callable
        Returns a cache that fills, or that is filled where `is_serial`.
    n_bytes : int
        What it reads.
    kept : str or None
        The conversation it reads, for its reference; None where that holds no K and V.
    is_lossless : bool
    """

    name: str
    open: Callable[[], krul.Cache]
    n_bytes: int
    kept: str | None
    is_lossless: bool


class History:
    """One history of one model, kept in every form that a way reads.

    Parameters
    ----------
    shape : Shape
    model : transformers model
    ids : torch.Tensor
        Shape (1, n), of the history and of the longest prompt behind it.
    n_tokens : int
        Of the history.
    store : krul.Store
    profile : callable, optional
        Makes a profile from what the layers hold; None leaves codec `predict` out.
    """

    def __init__(
        self,
        shape: Shape,
        model: Any,
        ids: torch.Tensor,
        n_tokens: int,
        store: krul.Store,
        profile: Callable[[Any], krul.Profile] | None = None,
    ) -> None:
        self.shape, self.model, self.ids, self.n_tokens = shape, model, ids, n_tokens
        self.store, self.make_profile = store, profile
        self.device, self.dtype = ids.device, model.dtype
        self.references: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    # ---- passes ----

    @torch.no_grad()
    def run(self, cache: Any) -> Any:
        """Run the history over an empty cache."""
        ids = self.ids[:, : self.n_tokens]
        self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def first_token(self, cache: Any, n_prompt: int) -> torch.Tensor:
        """Run the new prompt; return its last logits."""
        new = self.ids[:, self.n_tokens : self.n_tokens + n_prompt]
        keep = min(_N_SCORED, n_prompt)
        return self.model(new, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    @torch.no_grad()
    def recompute(self, n_prompt: int) -> torch.Tensor:
        """Run history and prompt in one pass, without any store."""
        whole = self.ids[:, : self.n_tokens + n_prompt]
        keep = min(_N_SCORED, n_prompt)
        return self.model(whole, use_cache=True, logits_to_keep=keep).logits[0]

    # ---- saving ----

    def _settings(self, **more: Any) -> krul.Settings:
        return krul.Settings(guard_tokens=0, **more)

    def save(self, name: str, **settings: Any) -> int:
        """Keep the history under a name; return the bytes."""
        with self.store.open(name, self.model, settings=self._settings(**settings)) as cache:
            self.run(cache)
            if settings["codec"] == "predict":
                assert self.make_profile is not None
                profile = self.make_profile([(x.keys, x.values) for x in cache.layers])
                self.store.add_profile(profile)
                cache.profile = profile
            # A few prompts more, so that the store's book of costs knows what passes take.
            for n_prompt in (32, 128, 32):
                n_here = min(n_prompt, self.ids.shape[1] - self.n_tokens)
                self.first_token(cache, n_here)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                cache.crop(-n_here)
            report = cache.save()
            wanted = settings["codec"]
            harness.check(
                wanted in {word for each in report.codec_by_layer for word in each.split("/")},
                f"{name}: saved as {sorted(set(report.codec_by_layer))}",
            )
            return report.stored_bytes

    def _opened(self, name: str, restore: str, *, is_serial: bool = False) -> Any:
        settings = self._settings(restore=restore, estimator_rows=0)

        def open_it() -> krul.Cache:
            cache = self.store.open(name, self.model, settings=settings)
            if is_serial:
                cache.restore()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
            return cache

        return open_it

    def way(self, name: str) -> Way:
        """Keep what a way needs, unless it is there, and return the way."""
        if name == "hidden states":
            hidden = HiddenStates(self)
            return Way(name, hidden.open, hidden.n_bytes, None, True)
        if name.startswith("krul "):
            codec = name.removeprefix("krul ")
            is_shared = codec.startswith("share")
            n_bytes = self._once(name, codec=codec, estimator_rows=64 if is_shared else 0)
            return Way(name, self._opened(name, "auto"), n_bytes, name, False)
        if name == "fixed pairs, layer by layer":
            with raw_blocks():
                n_bytes = self._once("pairs", codec="share", estimator_rows=0)
            return Way(name, self._opened("pairs", "load"), n_bytes, "pairs", False)
        with raw_blocks():
            n_bytes = self._once("raw", codec="exact", estimator_rows=0)
        opened = {
            "load, then run": self._opened("raw", "load", is_serial=True),
            "load, layer by layer": self._opened("raw", "load"),
            "from both ends": self._opened("raw", "uniform"),
        }[name]
        return Way(name, opened, n_bytes, "raw", True)

    def forget(self, needed: Sequence[str]) -> None:
        """Remove what none of the ways needs that are still to come."""
        kept = {_kept_for(name) for name in needed}
        for each in self.store.list():
            if each.conversation_id not in kept:
                self.store.delete(each.conversation_id)

    def _once(self, name: str, **settings: Any) -> int:
        manifest = self.store.files(name).read_manifest()
        if manifest is None:
            return self.save(name, **settings)
        return self.store.info(name).stored_bytes

    # ---- checking ----

    def on_cpu(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what a conversation holds, as the CPU decodes it."""
        if name not in self.references:
            files = self.store.files(name)
            manifest = files.read_manifest()
            source = Source(
                files, manifest, self._settings(restore="load"),
                find_profile=self.store.profiles.get,
            )  # fmt: skip
            try:
                buffers = source.buffers()
                source.start(buffers)
                for layer in buffers:
                    source.wait(layer)
            finally:
                source.close()
            self.references = {name: [buffers[layer] for layer in sorted(buffers)]}
        return self.references[name]

    def check(self, way: Way, n_prompt: int, expected: torch.Tensor) -> dict[str, float]:
        """Refuse a way whose K and V, or whose logits, are not what they should be.

        K and V are compared with those that the CPU decodes; logits of what is lossless with those
        of one pass over everything, others with those over what the CPU decoded: recomputing a part
        of it can only bring them closer.
        """
        close = CLOSE[self.dtype]
        base = expected
        if way.kept is not None:
            reference = self.on_cpu(way.kept)
            codec = "exact" if way.is_lossless else way.name.removeprefix("krul ")
            with self._opened(way.kept, "load", is_serial=True)() as cache:
                self._check_layers(way, cache, reference, _SAME.get(codec, _LAST_BIT))
                if not way.is_lossless:
                    base = self.first_token(cache, n_prompt)
        with way.open() as cache:
            logits = self.first_token(cache, n_prompt)
            is_loaded = not any(cache.restore_report.n_recomputed_by_layer)
        harness.check(bool(torch.isfinite(logits).all()), f"{way.name}: logits are not finite")
        error, lost = distance(logits, expected), distance(base, expected)
        harness.check(
            not is_loaded or distance(logits, base) <= close,
            f"{way.name}, {self.n_tokens} tokens: layer by layer the logits are others than after "
            "a restore",
        )
        harness.check(
            error <= close + 1.5 * lost,
            f"{way.name}, {self.n_tokens} tokens: logits are off by {error:.3g}, and by {lost:.3g} "
            "where all is loaded",
        )
        p, q = expected.float().log_softmax(-1), logits.float().log_softmax(-1)
        return {"logits_error": error, "mean_kl": float((p.exp() * (p - q)).sum(-1).mean())}

    def _check_layers(self, way: Way, cache: krul.Cache, reference: Any, limit: float) -> None:
        for index, (layer, pair) in enumerate(zip(cache.layers, reference, strict=True)):
            for kind, found, wanted in zip("KV", (layer.keys, layer.values), pair, strict=True):
                wanted = wanted[:, :, : self.n_tokens].to(found.device).float()
                found = found[:, :, : self.n_tokens].float()
                error = float((found - wanted).abs().max())
                harness.check(
                    error <= limit * float(wanted.abs().max()),
                    f"{way.name}: {kind} of layer {index} is off by {error:.3g}",
                )


def _kept_for(name: str) -> str:
    """Return the conversation that a way reads."""
    if name.startswith("krul "):
        return name
    return {"fixed pairs, layer by layer": "pairs", "hidden states": "hidden"}.get(name, "raw")


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference by that of what was expected."""
    return float((logits.float() - expected.float()).norm() / expected.float().norm())


class HiddenStates:
    """HCache's way: the input of each layer is loaded, and its K and V are made from it.

    The inputs are kept by krul's own store, half of each as if it were K and half as if it were V,
    so that they take the road that K and V take.
    """

    def __init__(self, history: History) -> None:
        self.history, model = history, history.model
        ids = history.ids[:, : history.n_tokens]
        hidden, self.rotation = layer_inputs(model, ids)
        settings = history._settings(codec="exact", estimator_rows=0)
        with raw_blocks(), history.store.open("hidden", model, settings=settings) as cache:
            if cache.n_tokens == 0:
                for index, states in enumerate(hidden):
                    cache.update(*self._halves(states), index)
                cache.record_history(ids.cpu())
                cache.save()
        self.n_bytes = history.store.info("hidden").stored_bytes

    def _halves(self, states: torch.Tensor) -> list[torch.Tensor]:
        head_dim = self.history.shape.head_dim
        return [
            half.unflatten(-1, (-1, head_dim)).transpose(1, 2) for half in states.chunk(2, dim=-1)
        ]

    def open(self) -> krul.Cache:
        """Return a cache whose layers are made from what is being loaded."""
        history = self.history
        loaded = history._opened("hidden", "load")()
        cache = krul.Cache(model=history.model)
        shape = history.shape
        size = (1, shape.n_kv_heads, history.n_tokens, shape.head_dim)
        for layer in cache.layers:
            layer.allocate(size, size, history.dtype, history.dtype, history.device)
        cache.record_history(torch.zeros(1, history.n_tokens, dtype=torch.int64))
        cache.begin_restore(_HiddenSource(self, loaded, cache), range(len(cache.layers)))
        return cache


class _HiddenSource:
    def __init__(self, ways: HiddenStates, loaded: krul.Cache, cache: krul.Cache) -> None:
        self.ways, self.loaded, self.cache = ways, loaded, cache

    @torch.no_grad()
    def wait(self, layer: int, can_recompute: bool = False) -> None:
        history = self.ways.history
        self.loaded.layers[layer].wait()
        halves = (self.loaded.layers[layer].keys, self.loaded.layers[layer].values)
        states = torch.cat([half.transpose(1, 2).flatten(2) for half in halves], dim=-1)
        make_layer(history.model, layer, states, self.ways.rotation, self.cache)

    def cancel(self) -> None:
        self.close()

    def abandon(self) -> None:
        self.close()

    def close(self) -> None:
        self.loaded.close()
