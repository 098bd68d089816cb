"""Bringing a conversation back: from its manifest to a cache whose layers fill in the background.

`open_cache` is what `Store.open` does. It answers at once with a cache that knows its length and
its token ids; threads of the C library read, check and decode blocks in layer order, and the model
waits for a layer only where it needs it.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from .cache import Cache
from .costs import cost_book, know_model
from .device import layer_devices
from .errors import CorruptionError, FormatError, UnsupportedModelError
from .estimator import Estimator
from .fingerprint import Fingerprint, check_fingerprint
from .hooks import attach
from .layer import KrulLayer
from .model import generation_model, recall, replace_remembered, support, text_config
from .plan import SHAPES, Costs, Plan, Step, plan, predict
from .probe import Capabilities, examine, why_not_partial
from .recompute import recompute_prefix
from .settings import Settings
from .simulate import HARDWARE, LINKS, METHODS, MODELS, Scenario, Simulation, simulate
from .source import KeysAndValues, Source, decode_windows
from .store import ConversationFiles, Manifest

if TYPE_CHECKING:
    from .profile import Profile
    from .store import Store

__all__ = [
    "HARDWARE",
    "LINKS",
    "METHODS",
    "MODELS",
    "SHAPES",
    "Costs",
    "Plan",
    "Scenario",
    "Simulation",
    "Source",
    "Step",
    "open_cache",
    "plan",
    "predict",
    "recompute_prefix",
    "simulate",
]


_CODECS_WITH_PROFILE = ("auto", "predict")

_DEVICES = "devices"  # what `recall` knows them by


def _roll_back(
    conversation: ConversationFiles, cache: Cache, n_tokens: int
) -> tuple[int, dict[int, KeysAndValues]] | None:
    """Find the longest stored boundary up to `n_tokens`, and the sliding windows that end there."""
    manifest = conversation.read_manifest()
    if manifest is None or manifest.generation != cache.generation:
        return None
    for segment in reversed(manifest.segments):
        end = segment.token_start + segment.n_tokens
        if end > min(n_tokens, cache.n_saved_tokens):
            continue
        fd, entries = conversation.open_segment(segment, manifest)
        try:
            windows = decode_windows(manifest, fd, entries, cache.settings.n_threads)
        finally:
            os.close(fd)
        devices = layer_devices(cache.model)
        return end, {
            layer: (keys.to(devices[layer]), values.to(devices[layer]))
            for layer, (keys, values) in windows.items()
        }
    return None


# ---- opening -------------------------------------------------------------------------------------


def open_cache(
    store: Store,
    conversation_id: str,
    model: Any,
    settings: Settings | None = None,
    profile: Profile | None = None,
) -> Cache:
    """Return the cache of a stored conversation; `Store.open` is this.

    Parameters
    ----------
    store : Store
    conversation_id : str
    model : transformers model
        Asked what works with it; the first time costs a few forward passes of 24 tokens.
    settings : Settings, optional
    profile : Profile, optional
        None takes the newest of this model in the store, if there is one and a codec may use it.

    Returns
    -------
    Cache
        Empty where nothing is stored, else filling in the background.

    Raises
    ------
    UnsupportedModelError
        krul cannot keep this model's state; the message says why and what to use instead.
    MismatchError
        The conversation was written by another model, or the profile is of another.
    FormatError
        The conversation is of a later version of the format.

    Notes
    -----
    A damaged manifest or segment does not raise: what is intact before it is used, a warning and
    the restore report say what was found, and `generate` recomputes the rest.
    """
    settings = Settings() if settings is None else settings
    conversation = store.files(conversation_id)
    # Where the layers were when the model was last asked; then it is asked again below.
    known = recall(generation_model(model), _DEVICES)
    devices, made = _ask(model) if known is None else (known, None)
    manifest, problem = _read_manifest(conversation)
    # Threads read and decode while the model is looked at; what they decode of another model's
    # conversation, or for where a layer no longer is, is thrown away.
    arrival = None if manifest is None else _Arrival(conversation, manifest, settings, devices)
    cache = None
    try:
        if known is not None:
            devices, made = _ask(model)
        if manifest is not None and arrival is not None and devices != arrival.devices:
            arrival.source.close()
            arrival = _Arrival(conversation, manifest, settings, devices)
        capabilities, present = examine(model, is_supported=True)
        if capabilities.cache is not None:
            raise UnsupportedModelError(capabilities.cache)
        if manifest is not None:
            check_fingerprint(_stored_fingerprint(manifest), present)
        if profile is not None:
            profile.check_fingerprint(present)
        elif settings.codec in _CODECS_WITH_PROFILE:
            profile = store.profiles.find(present)
        cache = _new_cache(model, settings, capabilities, made)
        cache.conversation, cache.fingerprint = conversation, present
        cache.costs = cost_book(store.path, present.exact)
        know_model(cache.costs, model)
        cache.profile = profile
        cache.handle = attach(model)
        if arrival is not None:
            arrival.fill(cache)
        elif problem:
            cache.note(problem)
    except BaseException:
        if arrival is not None:
            arrival.source.close()
        if cache is not None:
            cache.close()
        raise
    return cache


def _ask(model: Any) -> tuple[list[torch.device], DynamicCache | None]:
    """Return where the layers are of a model that krul supports, and transformers' cache for it.

    The devices are remembered.
    """
    try:
        made = DynamicCache(config=text_config(model))
    except Exception:
        made = None  # `support` says why
    reason = support(model, made)
    if reason is not None:
        raise UnsupportedModelError(reason)
    devices = layer_devices(model)
    replace_remembered(generation_model(model), _DEVICES, devices)
    return devices, made


def _new_cache(
    model: Any, settings: Settings, capabilities: Capabilities, made: DynamicCache | None
) -> Cache:
    cache = Cache(model=generation_model(model), settings=settings, made=made)
    if capabilities.recompute is not None:
        cache.recompute_blocker = capabilities.recompute
    cache.ask_partial = lambda: why_not_partial(model)
    if settings.estimator_rows != 0 and capabilities.observe is None:
        cache.estimator = Estimator(
            text_config(model).num_hidden_layers,
            rows=settings.estimator_rows,
            n_threads=settings.n_threads,
        )
    return cache


def _stored_fingerprint(manifest: Manifest) -> Fingerprint:
    parts = manifest.fingerprint.get("parts", {})
    return Fingerprint(manifest.fingerprint["exact"], manifest.behaviour, parts, ())


def _read_manifest(conversation: ConversationFiles) -> tuple[Manifest | None, str]:
    try:
        return conversation.read_manifest(), ""
    except (CorruptionError, FormatError) as error:
        if conversation.has_later_version():
            raise
        problem = f"the conversation cannot be read and starts empty: {error}"
        warnings.warn(problem, RuntimeWarning, stacklevel=4)
        return None, problem


class _Arrival:
    """A stored conversation on its way, before there is a cache to take it.

    A segment that is found damaged here is dropped with all after it.
    """

    def __init__(
        self,
        conversation: ConversationFiles,
        manifest: Manifest,
        settings: Settings,
        devices: list[torch.device],
    ) -> None:
        self.conversation, self.manifest, self.settings = conversation, manifest, settings
        self.devices = devices
        book = cost_book(conversation.store.path, manifest.fingerprint["exact"])
        find_profile = conversation.store.profiles.get
        self.source = source = Source(conversation, manifest, settings, book, find_profile, devices)
        self.windows: dict[int, KeysAndValues] = {}
        self.buffers: dict[int, KeysAndValues] = {}
        try:
            while source.n_tokens:
                try:
                    self.windows = source.windows()
                    break
                except (CorruptionError, OSError) as error:
                    source.drop_newest(str(error))
            self.n_tokens = source.n_tokens
            if self.n_tokens:
                self.buffers = source.buffers()
                source.start(self.buffers)
        except BaseException:
            source.close()
            raise

    def fill(self, cache: Cache) -> None:
        """Give the cache its tokens, and its layers the memory that is being filled."""
        manifest, source, n_tokens = self.manifest, self.source, self.n_tokens
        conversation = self.conversation
        cache.generation, cache.created_s = manifest.generation, manifest.created_s
        if source.problems:
            problems = "; ".join(source.problems)
            warnings.warn(
                f"{n_tokens} of {manifest.n_tokens} stored tokens can be used: {problems}",
                RuntimeWarning,
                stacklevel=4,
            )
        if n_tokens == 0:
            source.close()
            cache.note("; ".join(source.problems))
            return
        ids, mask, positions = (
            None if array is None else torch.from_numpy(array[..., :n_tokens].copy())
            for array in (manifest.token_ids, manifest.attention_mask, manifest.positions)
        )
        assert ids is not None
        cache.record_history(ids, mask, positions)
        cache.rollback = lambda n: _roll_back(conversation, cache, n)
        while len(cache.layers) < len(manifest.layers):
            cache.layers.append(KrulLayer())
        for layer, (keys, values) in self.buffers.items():
            cache.layers[layer].take(keys, values, n_tokens)
        for layer, (keys, values) in self.windows.items():
            cache.set_window(layer, keys, values, n_tokens)
        cache.mark_saved(manifest.generation, source.segments)
        cache.begin_restore(source, list(self.buffers))
