"""What only the model sees: token ids, positions, and the arguments of `generate`.

A cache is handed K and V. Which tokens they belong to, and whether they continue what is cached, is
known one level up. `attach` puts hooks there: before each forward pass the fed tokens are noted and
checked, around `generate` the cache is aligned with the whole conversation's ids, and what
transformers would silently turn into garbage is refused with what to do instead.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
import transformers

from .cache import Cache
from .errors import ShapeError, UnsupportedModelError
from .model import PAD_POSITION, generation_model
from .rerun import with_history

__all__ = ["Handle", "attach"]

_TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# Before this version a chunked prefill feeds the cached tokens again.
_CHUNKED_PREFILL_CONTINUES = (5, 23)

_ATTRIBUTE = "_krul_attachment"

# Inputs besides text; ids alone do not determine what they make of K and V.
_NOT_TEXT = (
    "pixel_values",
    "image_",
    "video_",
    "audio_",
    "input_features",
    "input_values",
    "speech_",
    "mm_encoder_outputs",
)

_attach_lock = threading.Lock()


def attach(model: Any, *, observe: bool = True) -> Handle:
    """Let caches know which tokens a model feeds them, and keep `generate` from feeding wrong ones.

    Parameters
    ----------
    model : transformers model, or a wrapper of one (PEFT, ``torch.compile``)
        A decoder-only model that can `generate`.
    observe : bool
        Also let the estimators of caches see the attention, where the model allows it; see
        `Handle.observe_reason`.

    Returns
    -------
    Handle
        Attaching a model again gives another handle to the same hooks; they go with the last one.

    Raises
    ------
    UnsupportedModelError
        There is no transformers model that can generate in `model`.

    Notes
    -----
    Only forward passes and calls of `generate` that are given a `krul.Cache` are touched, so one
    model may serve many caches, other users and several threads at once.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
    ...                 intermediate_size=16))
    >>> with attach(model, observe=False):
    ...     cache = Cache(model=model)
    ...     ids = torch.tensor([[3, 1, 4, 1, 5]])
    ...     out = model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    >>> cache.token_ids[:, :5].tolist(), cache.n_tokens
    ([[3, 1, 4, 1, 5]], 6)
    """
    inner = generation_model(model)
    with _attach_lock:
        attachment = inner.__dict__.get(_ATTRIBUTE)
        if attachment is None:
            attachment = _Attachment(inner)
            attachment.install()
        attachment.n_handles += 1
        try:
            if observe:
                attachment.start_observing()
        except BaseException:
            attachment.release(is_observing=False)
            raise
        return Handle(attachment, is_observing=observe)


class Handle:
    """Keeps a model's hooks in place until `detach`, also as a context manager.

    Attributes
    ----------
    model : torch.nn.Module
        The transformers model that has the hooks.
    observe_reason : str
        Why estimators cannot see the attention of this model; empty when they can.
    """

    def __init__(self, attachment: _Attachment, is_observing: bool) -> None:
        self._attachment: _Attachment | None = attachment
        self._is_observing = is_observing
        self.model = attachment.model
        self.observe_reason = attachment.observe_reason if is_observing else "not asked for"

    def detach(self) -> None:
        """Let go; the last handle of a model restores it exactly. Detaching twice is allowed."""
        with _attach_lock:
            attachment, self._attachment = self._attachment, None
            if attachment is not None:
                attachment.release(self._is_observing)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


class _PerThread(threading.local):
    """What a thread has under way on one model."""

    def __init__(self) -> None:
        # What `observe.begin` returned for the forward pass under way.
        self.watches: list[Any] = []
        # Whether generate() runs a method that feeds cached tokens again at first.
        self.is_refeeding = False


class _Attachment:
    """The hooks on one model, shared by its handles.

    It is an attribute of the model, so that a deep copy of the model has a copy of it that works.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.n_handles = 0
        self.n_observing = 0
        self.observer: Any = None
        self.observe_reason = ""
        self.hooks: list[Any] = []
        self.is_installed = False
        self.had_generate = False
        self.inner_generate: Callable[..., Any] | None = None
        self.parameters = list(inspect.signature(inspect.unwrap(type(model).forward)).parameters)[
            1:
        ]
        self.per_thread = _PerThread()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["per_thread"]
        # Observation is bound to the modules of one model; a copy starts without.
        state.update(observer=None, n_observing=0)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.per_thread = _PerThread()

    # -- putting on and taking off --

    def install(self) -> None:
        model = self.model
        self.had_generate = "generate" in model.__dict__
        self.inner_generate = model.__dict__.get("generate")
        self.hooks = [
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]
        model.__dict__["generate"] = self.generate
        model.__dict__[_ATTRIBUTE] = self
        self.is_installed = True

    def release(self, is_observing: bool) -> None:
        if is_observing:
            self.stop_observing()
        self.n_handles -= 1
        if self.n_handles > 0:
            return
        self.is_installed = False
        for hook in self.hooks:
            hook.remove()
        state = self.model.__dict__
        state.pop(_ATTRIBUTE, None)
        # Somebody may have wrapped `generate` again since; then ours stays below, and passes on.
        if getattr(state.get("generate"), "__self__", None) is self:
            if self.had_generate:
                state["generate"] = self.inner_generate
            else:
                del state["generate"]

    def start_observing(self) -> None:
        self.n_observing += 1
        if self.n_observing > 1:
            return
        from . import observe

        try:
            self.observer = observe.install(self.model)
            self.observe_reason = ""
        except UnsupportedModelError as error:
            self.observe_reason = str(error)

    def stop_observing(self) -> None:
        self.n_observing -= 1
        if self.n_observing == 0 and self.observer is not None:
            observer, self.observer = self.observer, None
            observer.remove()

    # -- around each forward pass --

    def _cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
        cache = kwargs.get("past_key_values")
        if cache is None and "past_key_values" in self.parameters:
            at = self.parameters.index("past_key_values")
            cache = args[at] if at < len(args) else None
        return cache if isinstance(cache, Cache) else None

    @torch.compiler.disable
    def before_forward(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # While it is being registered or removed, torch may call a hook without the keywords: then
        # the pass belongs to a thread that has no cache of ours.
        cache = None if kwargs is None else self._cache_of(args, kwargs)
        if cache is None or kwargs is None:
            return None
        # A forward pass that an interrupt tore off has left these behind.
        self._stop_observed(is_failed=True)
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        _refuse_other_inputs(named)
        cache._settle()
        if cache.source is not None and self._is_recorded(named):
            # A layer that cannot be read is recomputed inside this pass, by another one over the
            # same modules; older versions of transformers would record that as well.
            cache.restore()
        is_changed = self.per_thread.is_refeeding and _drop_cached_tokens(cache, named)
        whole: list[dict[str, Any]] = []

        def in_one_pass() -> bool:
            known = cache._known()
            has_more = getattr(self.model.config, "output_router_logits", False)
            changed = None
            if known is not None and not has_more:
                changed = with_history(named, known, self.parameters)
            if changed is not None:
                whole.append(changed)
            return changed is not None

        if _note_tokens(cache, named, in_one_pass):
            # Not observed: that would take as long again as what this pass saves.
            return (), whole[0]
        if cache.estimator is not None and self.observer is not None:
            from . import observe

            watch = observe.begin(cache.estimator, self.observer, n_past=cache.get_seq_length())
            self.per_thread.watches.append(watch)
        return ((), named) if is_changed else None

    @torch.compiler.disable
    def after_forward(self, module: torch.nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        if len(rest) != 2:  # without the keywords, as above
            return
        kwargs, output = rest
        cache = self._cache_of(args, kwargs)
        if cache is None:
            return
        self._stop_observed(is_failed=output is None)
        cache.end_feed(is_failed=output is None)

    def _is_recorded(self, named: dict[str, Any]) -> bool:
        config = self.model.config
        return any(
            getattr(config, name, False) if named.get(name) is None else named[name]
            for name in ("output_hidden_states", "output_attentions")
        )

    def _stop_observed(self, is_failed: bool) -> None:
        while self.per_thread.watches:
            from . import observe

            observe.end(self.per_thread.watches.pop(), is_failed=is_failed)

    # -- around generate() --

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Align the cache with the conversation, refuse what is unsafe, then generate as ever."""
        inner = self.inner_generate
        if inner is None:
            inner = type(self.model).generate.__get__(self.model)
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, Cache) or not self.is_installed:
            return inner(*args, **kwargs)
        signature = inspect.signature(type(self.model).generate)
        bound = signature.bind_partial(self.model, *args, **kwargs).arguments
        bound.pop(next(iter(signature.parameters)))
        extra = bound.pop("kwargs", {})
        call = _GenerateCall(self.model, cache, {**bound, **extra})
        call.check()
        call.align()
        call.prefill()
        call.expand()
        self.per_thread.is_refeeding = call.is_assisted and cache.n_tokens > 0
        try:
            output = inner(**call.arguments)
        finally:
            self.per_thread.is_refeeding = False
            cache._settle()
            cache.stop_past_recording()
        call.trim(output)
        return output


def _refuse_other_inputs(named: dict[str, Any]) -> None:
    for name, value in named.items():
        if value is not None and name.startswith(_NOT_TEXT) and not isinstance(value, (int, bool)):
            raise UnsupportedModelError(
                f"{name} was given together with a krul.Cache, which keeps text alone: token ids "
                "do not determine the K/V of images, video or sound; use a DynamicCache here"
            )


def _fed(named: dict[str, Any]) -> tuple[torch.Tensor | None, int]:
    ids = named.get("input_ids")
    if ids is not None:
        return ids, ids.shape[1]
    embeddings = named.get("inputs_embeds")
    if embeddings is None:
        raise ValueError("input_ids is None but the model needs token ids")
    return None, embeddings.shape[1]


def _note_tokens(cache: Cache, named: dict[str, Any], in_one_pass: Callable[[], bool]) -> bool:
    """Check that the fed tokens continue the cache, and note them; see `Cache.begin_feed`."""
    ids, n_new = _fed(named)
    n_cached = cache.n_tokens
    n_total = n_cached + n_new
    mask = named.get("attention_mask")
    if mask is not None and not (torch.is_tensor(mask) and mask.dim() == 2):
        cache.recompute_blocker = "it was fed with an attention mask that is not two-dimensional"
        mask = None
    if mask is not None and mask.shape[1] != n_total:
        raise ShapeError(
            f"attention_mask covers {mask.shape[1]} tokens but {n_cached} cached and {n_new} new "
            "ones are attended to: pass the mask of the whole conversation"
        )
    positions = named.get("position_ids")
    if positions is not None and (positions.dim() < 2 or positions.shape[-1] != n_new):
        positions = None
    if n_cached > 0 and n_new > 1 and positions is not None and positions.dim() == 2:
        _check_continuation(cache, n_cached, mask, positions)
    new_mask = None if mask is None else mask[:, n_cached:]
    return cache.begin_feed(ids, n_new, new_mask, positions, in_one_pass)


def _check_continuation(
    cache: Cache, n_cached: int, mask: torch.Tensor | None, positions: torch.Tensor
) -> None:
    """Refuse tokens whose positions do not follow the cached ones: they were fed before."""
    last = None if cache._history is None else cache._history.last_positions()
    if last is None:
        return
    first = positions[:, 0].tolist()
    first = first * (len(last) // len(first))
    is_padding = [False] * len(last)
    if mask is not None:
        is_padding = (mask[:, n_cached] == 0).tolist()
    expected = [position + 1 for position in last]
    for got, wanted, skip in zip(first, expected, is_padding, strict=False):
        if got != wanted and not skip:
            raise ValueError(
                f"position_ids begins at {first} but the cache continues at {expected}: cached "
                "tokens were fed again, or some are missing; pass the whole conversation to "
                "generate(), or only what follows the cached tokens to the model"
            )


def _drop_cached_tokens(cache: Cache, named: dict[str, Any]) -> bool:
    """Cut off tokens that are fed again although the cache has them; True if there were any.

    Assisted decoding runs the whole prompt through the model at its first step, whatever is cached.
    """
    ids, known, n_cached = named.get("input_ids"), cache.token_ids, cache.n_tokens
    if ids is None or known is None or ids.shape[1] <= n_cached or n_cached == 0:
        return False
    positions = named.get("position_ids")
    if positions is not None and positions.shape[-1] != ids.shape[1]:
        return False
    if not torch.equal(ids[:, :n_cached].cpu(), known):
        return False
    n_given = ids.shape[1]
    named["input_ids"] = ids[:, n_cached:]
    for name in ("position_ids", "cache_position", "token_type_ids"):
        tensor = named.get(name)
        if torch.is_tensor(tensor) and tensor.shape[-1] == n_given:
            named[name] = tensor[..., n_cached:]
    return True


class _GenerateCall:
    """One call of `generate` with a krul cache."""

    def __init__(self, model: Any, cache: Cache, arguments: dict[str, Any]) -> None:
        self.model, self.cache, self.arguments = model, cache, arguments
        self.n_rows = 0

    def option(self, name: str, default: Any = None) -> Any:
        """Return an option from where transformers would take it."""
        sources = (self.arguments.get("generation_config"), self.model.generation_config)
        value = self.arguments.get(name)
        for source in sources:
            if value is None and source is not None:
                value = getattr(source, name, None)
        return default if value is None else value

    @property
    def ids(self) -> torch.Tensor | None:
        ids = self.arguments.get("inputs")
        return self.arguments.get("input_ids") if ids is None else ids

    @property
    def n_expanded(self) -> int:
        return max(self.option("num_beams", 1), self.option("num_return_sequences", 1))

    @property
    def is_assisted(self) -> bool:
        return any(
            self.option(name) not in (None, False)
            for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        )

    def check(self) -> None:
        """Refuse what transformers would turn into wrong tokens."""
        _refuse_other_inputs(self.arguments)
        if self.option("use_cache", True) is False:
            raise ValueError(
                "use_cache is False but past_key_values is a krul.Cache: every token would be fed "
                "again at every step; leave use_cache out, and set generation_config.use_cache to "
                "True where training has turned it off"
            )
        implementation = self.option("cache_implementation")
        if implementation is not None:
            raise ValueError(
                f"cache_implementation is {implementation!r} but past_key_values is a krul.Cache: "
                "set generation_config.cache_implementation to None"
            )
        ids = self.ids
        if ids is None:
            raise ValueError(
                "input_ids is None but a krul.Cache is aligned by token ids: pass input_ids, not "
                "inputs_embeds"
            )
        mask = self.arguments.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape != ids.shape:
            raise ShapeError(
                f"attention_mask is {tuple(mask.shape)} but input_ids is {tuple(ids.shape)}: pass "
                "the ids of the whole conversation, cached and new, to generate()"
            )

    def align(self) -> None:
        """Make the cache a true prefix of the given ids, with one row for each sequence."""
        cache, ids = self.cache, self.ids
        cache._settle()
        mask = self.arguments.get("attention_mask")
        if mask is None and ids.shape[0] == 1:
            # generate() would take pad ids inside the text for padding.
            mask = self.arguments["attention_mask"] = torch.ones_like(ids)
        is_plain = mask is not None and mask.dim() == 2
        n_cached = cache.align(ids, mask if is_plain else None)
        if n_cached == 0:
            return
        if self.is_assisted and self.option("return_dict_in_generate", False):
            for name in ("output_attentions", "output_hidden_states"):
                if self.option(name, False):
                    raise ValueError(
                        f"{name} is True with assisted decoding but the cache holds {n_cached} "
                        "tokens, for which there are none: leave it out, or call cache.reset() "
                        "first"
                    )

    def prefill(self) -> None:
        """Run the prompt in chunks where transformers would feed cached tokens again.

        Older versions also go round the hooks that note the tokens.
        """
        n_chunk = self.option("prefill_chunk_size")
        if not n_chunk or _TRANSFORMERS >= _CHUNKED_PREFILL_CONTINUES:
            return
        if getattr(self.model.generation_config, "prefill_chunk_size", None):
            raise ValueError(
                f"model.generation_config.prefill_chunk_size is {n_chunk} but must be None with "
                f"a krul.Cache on transformers {transformers.__version__}: pass it to generate()"
            )
        self.arguments.pop("prefill_chunk_size", None)
        config = self.arguments.get("generation_config")
        if config is not None:
            config = self.arguments["generation_config"] = copy.deepcopy(config)
            config.prefill_chunk_size = None
        ids, mask = self.ids, self.arguments.get("attention_mask")
        accepted = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        # generate() must have a token left to run.
        for start in range(self.cache.n_tokens, ids.shape[1] - 1, n_chunk):
            end = min(start + n_chunk, ids.shape[1] - 1)
            inputs = {"input_ids": ids[:, start:end], "use_cache": True}
            if mask is not None:
                inputs["attention_mask"] = mask[:, :end]
                if "position_ids" in accepted:
                    positions = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, PAD_POSITION)
                    inputs["position_ids"] = positions[:, start:end]
            if "cache_position" in accepted:
                inputs["cache_position"] = torch.arange(start, end, device=ids.device)
            if "logits_to_keep" in accepted:
                inputs["logits_to_keep"] = 1
            with torch.no_grad():
                self.model(past_key_values=self.cache, **inputs)

    def expand(self) -> None:
        """Repeat rows for beams and several answers; generate() does so for its tensors only."""
        if self.n_expanded > 1 and self.cache.n_tokens > 0:
            self.cache.batch_repeat_interleave(self.n_expanded)

    def trim(self, output: Any) -> None:
        """Keep the row and the tokens of what was returned: beams and candidates leave others."""
        cache = self.cache
        sequences = output if torch.is_tensor(output) else getattr(output, "sequences", None)
        known = cache.token_ids
        if sequences is None or known is None or sequences.dim() != 2 or cache.n_tokens == 0:
            return
        sequences = sequences.cpu()
        n_rows, n_items = known.shape[0], self.ids.shape[0]
        if n_rows % n_items != 0 or sequences.shape[0] % n_items != 0:
            return
        n = min(known.shape[1], sequences.shape[1])
        # [item, sequence of the item, row of the item]
        same = sequences[:, :n].view(n_items, -1, 1, n) == known[:, :n].view(n_items, 1, -1, n)
        n_shared, row = same.long().cumprod(-1).sum(-1).max(-1)
        n_left = int(n_shared.min())
        if n_left == known.shape[1] and n_rows == sequences.shape[0]:
            return
        if n_left == 0:
            return
        first_row = torch.arange(n_items, device="cpu")[:, None] * (n_rows // n_items)
        chosen = (row + first_row).flatten()
        if not torch.equal(chosen, torch.arange(n_rows, device="cpu")):
            cache.batch_select_indices(chosen)
        if n_left < known.shape[1] and cache._can_crop(n_left):
            cache.crop(n_left - known.shape[1])
