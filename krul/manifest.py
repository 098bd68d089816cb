"""What a manifest says of a conversation, and whether it and its segments may say so.

The JSON of a manifest (FORMAT.md, "META") is checked field by field when it is read and again
before it is written, by the same code: nothing is stored that could not be read back.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import _core
from .errors import FormatError

__all__ = [
    "FORMAT",
    "MAX_GENERATION",
    "TENANT_PATTERN",
    "Entry",
    "LayerLayout",
    "Manifest",
    "SegmentInfo",
    "check_conversation_id",
    "check_coverage",
    "decode_manifest",
    "encode_manifest",
    "shown",
]

FORMAT = _core.store_constants()
TENANT_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)

_META_FORMAT = "krul conversation"
_MAX_ID_BYTES = 1024
_MAX_FINGERPRINT_CHARACTERS = 1024
_MAX_SEGMENTS = 1 << 16
MAX_GENERATION = 1 << 53

DTYPE_NUMBERS = {"float32": 1, "float16": 2, "bfloat16": 3}
# The `kv` of a block that holds K and V of a layer.
BOTH = 2
_LAYER_KINDS = ("full", "sliding", "none")


class Entry(NamedTuple):
    """One row of a container's table; the tuple that the C library takes and gives.

    ``offset``, ``payload_bytes`` and ``payload_crc32c`` are filled by writing. ``layer_upper`` is
    -1 for a block of one layer. Entries that are no blocks have zeros from ``codec`` to
    ``n_tokens``.
    """

    kind: int
    codec: int = 0
    kv: int = 0
    dtype: int = 0
    layer_lower: int = 0
    layer_upper: int = 0
    n_batch: int = 0
    n_heads: int = 0
    head_dim: int = 0
    token_start: int = 0
    n_tokens: int = 0
    offset: int = 0
    payload_bytes: int = 0
    payload_crc32c: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """The one or two layers that a block holds."""
        return (self.layer_lower,) if self.layer_upper < 0 else (self.layer_lower, self.layer_upper)

    @property
    def layer_of_view(self) -> tuple[int, ...]:
        """The layer of each array that decoding fills: both of a pair, or K and V of one."""
        return self.layers * 2 if self.kv == BOTH else self.layers

    @property
    def kinds(self) -> tuple[int, ...]:
        """What of a layer a block holds: K (0), V (1), or both."""
        return (0, 1) if self.kv == BOTH else (self.kv,)

    def holds(self, layer: int, kv: int) -> bool:
        """Whether this block has a layer's K (0) or V (1), alone, in a pair, or both."""
        return kv in self.kinds and layer in (self.layer_lower, self.layer_upper)

    def arrays_for(self, layer: int, array: Any) -> tuple[Any, ...]:
        """Return what decoding takes to write one layer into `array` and skip its partner."""
        if self.layer_upper < 0:
            return (array,)
        return (array, None) if layer == self.layer_lower else (None, array)


@dataclass(frozen=True)
class LayerLayout:
    """What the cache of one layer looks like.

    Parameters
    ----------
    kind : str
        ``"full"``, ``"sliding"`` or ``"none"`` (no KV is kept for this layer: all numbers are 0).
    n_kv_heads, key_head_dim, value_head_dim : int
        Extents of its K and V.
    window : int or None
        Tokens that a sliding layer holds at most; None for the other kinds.
    key_dtype, value_dtype : str
        ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """

    kind: str
    n_kv_heads: int
    key_head_dim: int
    value_head_dim: int
    window: int | None
    key_dtype: str
    value_dtype: str


@dataclass(frozen=True)
class SegmentInfo:
    """What a manifest says of one segment file.

    Parameters
    ----------
    file : str
        ``"segment-<number>"``; empty for a segment that is about to be committed.
    token_start, n_tokens : int
        Tokens of the conversation that are used from it; the file may hold more after a crop.
    file_bytes : int
        Size of the file; filled by the commit.
    strategy, guard : dict
        JSON values: how it was coded, and what the guard measured. Numbers that are not finite
        are stored as null. ``strategy["dropped"]``: see `n_dropped`.
    crc32c : int
        The checksum of the file's header, which covers all others; filled by the commit.
    """

    file: str
    token_start: int
    n_tokens: int
    file_bytes: int = 0
    strategy: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    crc32c: int = 0

    def n_dropped(self, layer: int) -> int:
        """Tokens, from the conversation's first, that a layer may lack: they are recomputed."""
        dropped = self.strategy.get("dropped", ())
        return dropped[layer] if layer < len(dropped) else 0


@dataclass(frozen=True, eq=False)
class Manifest:
    """A whole conversation but for the KV itself.

    Parameters
    ----------
    token_ids : ndarray
        int64, n_batch x n_tokens: the tokens whose KV is stored.
    layers : tuple of LayerLayout
        One per decoder layer.
    segments : tuple of SegmentInfo
        In token order, without gaps, together n_tokens.
    fingerprint : dict
        JSON values: the model's fingerprint. ``"exact"`` must be there, 1 to 1024 printable ASCII
        characters that name the model; the rest is the model's business.
    attention_mask : ndarray or None
        uint8 of 0 and 1, n_batch x n_tokens; None means all ones.
    positions : ndarray or None
        int64, n_batch x n_tokens; None means 0, 1, ... n_tokens - 1.
    behaviour : ndarray
        float32, one dimension: sampled KV of the probe prompt, the fingerprint's other part.
    settings : dict
        The `Settings` of the last save, as JSON values.
    created_s, updated_s : float
        Seconds since 1970, set by the commit; the first save of a conversation is its creation.
    generation : int
        Counts commits from 1; set by the commit.
    conversation_id, tenant : str
        Set by the commit.
    """

    token_ids: np.ndarray
    layers: tuple[LayerLayout, ...]
    segments: tuple[SegmentInfo, ...]
    fingerprint: dict[str, Any]
    attention_mask: np.ndarray | None = None
    positions: np.ndarray | None = None
    behaviour: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    settings: dict[str, Any] = field(default_factory=dict)
    created_s: float = 0.0
    updated_s: float = 0.0
    generation: int = 0
    conversation_id: str = ""
    tenant: str = ""

    @property
    def n_batch(self) -> int:
        """Rows of the batch."""
        return int(self.token_ids.shape[0])

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation."""
        return int(self.token_ids.shape[1])


# ---- META: the JSON of a manifest --------------------------------------------------------------

Check = Callable[[Any, str], Any]


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(name: str, value: Any, wanted: str) -> FormatError:
    return FormatError(f"META: {name} is {shown(value)} but must be {wanted}")


def _an_int(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _refuse(name, value, f"an integer from {low} to {high}")
        return value

    return check


def _a_number(low: float, high: float) -> Check:
    def check(value: Any, name: str) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high:
            raise _refuse(name, value, f"a number from {low} to {high}")
        return float(value)

    return check


def _a_text(pattern: str) -> Check:
    compiled = re.compile(pattern, re.ASCII | re.DOTALL)

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or compiled.fullmatch(value) is None:
            raise _refuse(name, value, f"text that matches {pattern}")
        return value

    return check


def _an_id(value: Any, name: str) -> str:
    try:
        check_conversation_id(value)
    except (TypeError, ValueError) as exception:
        raise FormatError(f"META: {exception}") from None
    return str(value)


def _one_of(*choices: str) -> Check:
    def check(value: Any, name: str) -> str:
        if value not in choices:
            raise _refuse(name, value, "one of " + ", ".join(choices))
        return value

    return check


def _or_null(inner: Check) -> Check:
    def check(value: Any, name: str) -> Any:
        return None if value is None else inner(value, name)

    return check


def _an_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(name, value, "an object")
    return value


def _a_strategy(value: Any, name: str) -> dict[str, Any]:
    dropped = _an_object(value, name).get("dropped", [])
    if not isinstance(dropped, list) or len(dropped) > FORMAT["MAX_LAYERS"]:
        raise _refuse(f"{name}.dropped", dropped, f"a list of 0 to {FORMAT['MAX_LAYERS']} integers")
    for layer, n_tokens in enumerate(dropped):
        _an_int(0, _TOKENS)(n_tokens, f"{name}.dropped[{layer}]")
    return value


_exact_text = _a_text(f"[ -~]{{1,{_MAX_FINGERPRINT_CHARACTERS}}}")


def _a_fingerprint(value: Any, name: str) -> dict[str, Any]:
    _exact_text(_an_object(value, name).get("exact"), f"{name}.exact")
    return value


def _a_list(low: int, high: int) -> Check:
    def check(value: Any, name: str) -> list[Any]:
        if not isinstance(value, list) or not low <= len(value) <= high:
            shown = f"a list of {len(value)} items" if isinstance(value, list) else value
            raise _refuse(name, shown, f"a list of {low} to {high} items")
        return value

    return check


_EXTENT = FORMAT["MAX_EXTENT"]
_TOKENS = FORMAT["MAX_TOKENS"]
_LAYER_FIELDS: dict[str, Check] = {
    "kind": _one_of(*_LAYER_KINDS),
    "n_kv_heads": _an_int(0, _EXTENT),
    "key_head_dim": _an_int(0, _EXTENT),
    "value_head_dim": _an_int(0, _EXTENT),
    "window": _or_null(_an_int(1, _TOKENS)),
    "key_dtype": _one_of(*DTYPE_NUMBERS),
    "value_dtype": _one_of(*DTYPE_NUMBERS),
}
_SEGMENT_FIELDS: dict[str, Check] = {
    "file": _a_text("segment-[0-9]{1,18}"),
    "token_start": _an_int(0, _TOKENS),
    "n_tokens": _an_int(1, _TOKENS),
    "file_bytes": _an_int(1, (1 << 63) - 1),
    "strategy": _a_strategy,
    "guard": _an_object,
    "crc32c": _an_int(0, (1 << 32) - 1),
}
_META_FIELDS: dict[str, Check] = {
    "format": _one_of(_META_FORMAT),
    "conversation_id": _an_id,
    "tenant": _a_text(TENANT_PATTERN.pattern),
    "generation": _an_int(1, MAX_GENERATION),
    "fingerprint": _a_fingerprint,
    "n_batch": _an_int(1, _EXTENT),
    "n_tokens": _an_int(0, _TOKENS),
    "layers": _a_list(1, FORMAT["MAX_LAYERS"]),
    "segments": _a_list(0, _MAX_SEGMENTS),
    "settings": _an_object,
    "created_s": _a_number(0, 1e12),
    "updated_s": _a_number(0, 1e12),
}


def _checked(value: Any, name: str, fields: dict[str, Check]) -> dict[str, Any]:
    """Return the object with every field checked; missing and unknown fields are refused."""
    prefix = f"{name}." if name else ""
    found = _an_object(value, name or "the whole")
    if found.keys() != fields.keys():
        missing = sorted(fields.keys() - found.keys())
        unknown = sorted(found.keys() - fields.keys())
        raise FormatError(
            f"META: {name or 'the whole'} lacks {shown(missing)} and has unknown {shown(unknown)}"
        )
    return {key: check(found[key], prefix + key) for key, check in fields.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("META: a field occurs twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise FormatError(f"META: {text} is no JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FormatError(f"META: {shown(text)} is beyond what a number can hold")
    return value


def _decode_meta(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(
            payload.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite_float,
        )
    except FormatError:
        raise
    except RecursionError:
        raise FormatError("META: objects and lists are nested too deep") from None
    except ValueError as exception:
        raise FormatError(f"META: not UTF-8 JSON: {exception}") from None
    meta = _checked(value, "", _META_FIELDS)
    meta["layers"] = tuple(
        _check_layer(LayerLayout(**_checked(item, f"layers[{i}]", _LAYER_FIELDS)), i)
        for i, item in enumerate(meta["layers"])
    )
    meta["segments"] = tuple(
        SegmentInfo(**_checked(item, f"segments[{i}]", _SEGMENT_FIELDS))
        for i, item in enumerate(meta["segments"])
    )
    _check_segments(meta["segments"], meta["n_tokens"])
    return meta


def _check_layer(layer: LayerLayout, index: int) -> LayerLayout:
    """Refuse a layer whose numbers do not fit its kind."""
    extents = (layer.n_kv_heads, layer.key_head_dim, layer.value_head_dim)
    if layer.kind == "none":
        if any(extents):
            raise _refuse(f"layers[{index}]", extents, "0, 0, 0 for kind none")
    elif not all(extents):
        raise _refuse(f"layers[{index}]", extents, f"all above 0 for kind {layer.kind}")
    if (layer.kind == "sliding") != (layer.window is not None):
        wanted = "a number" if layer.kind == "sliding" else "null"
        raise _refuse(f"layers[{index}].window", layer.window, f"{wanted} for kind {layer.kind}")
    return layer


def _check_segments(segments: tuple[SegmentInfo, ...], n_tokens: int) -> None:
    """Refuse segments that do not follow one another, or whose tokens are not all of them."""
    token_end = 0
    names = set()
    for i, segment in enumerate(segments):
        if segment.token_start != token_end:
            raise _refuse(f"segments[{i}].token_start", segment.token_start, str(token_end))
        if segment.file in names:
            raise _refuse(f"segments[{i}].file", segment.file, "named once")
        names.add(segment.file)
        token_end += segment.n_tokens
    if token_end != n_tokens:
        raise FormatError(f"META: segments hold {token_end} tokens but n_tokens is {n_tokens}")


def _plain(value: Any) -> Any:
    """Return JSON values: tuples as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {shown(key)} but JSON allows text only")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _encode_meta(manifest: Manifest) -> bytes:
    meta = {
        "format": _META_FORMAT,
        "conversation_id": manifest.conversation_id,
        "tenant": manifest.tenant,
        "generation": manifest.generation,
        "fingerprint": _plain(manifest.fingerprint),
        "n_batch": manifest.n_batch,
        "n_tokens": manifest.n_tokens,
        "layers": [asdict(layer) for layer in manifest.layers],
        "segments": [_plain(vars(segment)) for segment in manifest.segments],
        "settings": _plain(manifest.settings),
        "created_s": float(manifest.created_s),
        "updated_s": float(manifest.updated_s),
    }
    return json.dumps(meta, allow_nan=False, separators=(",", ":")).encode()


def _to_bytes(array: Any, name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return an array as little-endian bytes; another kind or shape is refused."""
    values = np.asarray(array)
    wanted = np.dtype(dtype)
    fits = values.dtype.kind in ("f" if wanted.kind == "f" else "biu")
    if not fits or values.shape != shape:
        raise ValueError(
            f"{name} is {values.dtype} {values.shape} but must be {wanted.name} {shape}"
        )
    if values.size and wanted.kind != "f":
        limits = np.iinfo(wanted)
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"{name} has values beyond {wanted.name}")
    return np.ascontiguousarray(values, wanted).tobytes()


def encode_manifest(manifest: Manifest) -> tuple[list[Entry], list[bytes]]:
    """Return entries and payloads; what could not be read back is a ValueError."""
    if np.ndim(manifest.token_ids) != 2:
        raise ValueError(
            f"token_ids is {np.shape(manifest.token_ids)} but must be n_batch x n_tokens"
        )
    shape = (manifest.n_batch, manifest.n_tokens)
    parts = [
        (FORMAT["ENTRY_META"], _encode_meta(manifest)),
        (FORMAT["ENTRY_TOKENS"], _to_bytes(manifest.token_ids, "token_ids", "<i8", shape)),
    ]
    if manifest.attention_mask is not None:
        mask = _to_bytes(manifest.attention_mask, "attention_mask", "u1", shape)
        parts.append((FORMAT["ENTRY_MASK"], mask))
    if manifest.positions is not None:
        positions = _to_bytes(manifest.positions, "positions", "<i8", shape)
        parts.append((FORMAT["ENTRY_POSITIONS"], positions))
    n_behaviour = np.size(manifest.behaviour)
    behaviour = _to_bytes(manifest.behaviour, "behaviour", "<f4", (n_behaviour,))
    parts.append((FORMAT["ENTRY_BEHAVIOUR"], behaviour))
    try:
        decode_manifest(dict(parts))
    except FormatError as exception:
        raise ValueError(f"manifest cannot be stored: {exception}") from None
    return [Entry(kind=kind) for kind, _ in parts], [payload for _, payload in parts]


def _from_bytes(payload: bytes | None, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
    if payload is None:
        return None
    wanted_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if len(payload) != wanted_bytes:
        raise FormatError(
            f"{name} has {len(payload)} bytes but META's {shape} needs {wanted_bytes}"
        )
    native = np.dtype(dtype).newbyteorder("=")
    return np.frombuffer(payload, dtype).astype(native).reshape(shape)


def decode_manifest(parts: dict[int, bytes]) -> Manifest:
    """Return the manifest that a container's payloads, by kind of entry, make; else FormatError."""
    meta = _decode_meta(parts[FORMAT["ENTRY_META"]])
    shape = (meta.pop("n_batch"), meta.pop("n_tokens"))
    del meta["format"]
    mask = _from_bytes(parts.get(FORMAT["ENTRY_MASK"]), "MASK", "u1", shape)
    if mask is not None and mask.size and mask.max() > 1:
        raise FormatError(f"MASK holds a {mask.max()} but only 0 and 1 are allowed")
    behaviour = parts.get(FORMAT["ENTRY_BEHAVIOUR"], b"")
    if len(behaviour) % 4 != 0:
        raise FormatError(f"BEHAVIOUR has {len(behaviour)} bytes: no whole number of float32")
    return Manifest(
        token_ids=_from_bytes(parts[FORMAT["ENTRY_TOKENS"]], "TOKENS", "<i8", shape),
        attention_mask=mask,
        positions=_from_bytes(parts.get(FORMAT["ENTRY_POSITIONS"]), "POSITIONS", "<i8", shape),
        behaviour=_from_bytes(behaviour, "BEHAVIOUR", "<f4", (len(behaviour) // 4,)),
        **meta,
    )


# ---- segments against their manifest -----------------------------------------------------------


def check_coverage(entries: Sequence[Entry], info: SegmentInfo, manifest: Manifest) -> None:
    """Refuse a segment that does not hold every layer's tokens once, in the layer's own shape."""
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    shapes: dict[tuple[int, int], tuple[int, ...]] = {}
    # By places, as there may be thousands of entries before the first token.
    for i, (_, _, kind, dtype, lower, upper, *extents, start, n, _, _, _) in enumerate(entries):
        shape = (*extents, dtype)
        for layer in (lower,) if upper < 0 else (lower, upper):
            for kv in (0, 1) if kind == BOTH else (kind,):
                spans = ranges.get((layer, kv))
                if spans is None:
                    spans = ranges[layer, kv] = []
                    shapes[layer, kv] = _shape_of(i, layer, kv, manifest)
                if shape != shapes[layer, kv]:
                    raise FormatError(
                        f"entry {i}: n_batch, n_heads, head_dim, dtype are {shape} "
                        f"but layer {layer} has {shapes[layer, kv]}"
                    )
                spans.append((start, n))
    token_ends = {max(start + n for start, n in spans) for spans in ranges.values()}
    token_end = max(token_ends, default=0)
    if token_end < info.token_start + info.n_tokens:
        raise FormatError(
            f"{info.file or 'new segment'}: blocks end at token {token_end} "
            f"but the manifest uses {info.token_start + info.n_tokens}"
        )
    name = info.file or "new segment"
    for layer, layout in enumerate(manifest.layers):
        starts = set()
        for kv in (0, 1) if layout.kind != "none" else ():
            at = start = min(ranges.get((layer, kv), [(token_end, 0)]))[0]
            for span_start, n_tokens in sorted(ranges.get((layer, kv), [])):
                if span_start != at:
                    raise FormatError(
                        f"{name}: layer {layer}, {'KV'[kv]}: a block begins at token {span_start} "
                        f"but the one before ends at {at}"
                    )
                at += n_tokens
            starts.add(start)
            if layout.kind == "full":
                low, high = info.token_start, max(info.token_start, info.n_dropped(layer))
            else:
                low, high = token_end - (layout.window or 0), token_end - 1
            if at != token_end or not low <= start <= high:
                raise FormatError(
                    f"{name}: layer {layer} ({layout.kind}), {'KV'[kv]}: blocks hold tokens "
                    f"{start} to {at} but must begin at {low} to {high} and end at {token_end}"
                )
        if len(starts) > 1:
            raise FormatError(
                f"{name}: layer {layer}: K and V begin at tokens {sorted(starts)} "
                "but must begin at one"
            )


def _shape_of(index: int, layer: int, kv: int, manifest: Manifest) -> tuple[int, ...]:
    """Return n_batch, n_heads, head_dim and dtype of a layer's blocks; refuse one without any."""
    if layer >= len(manifest.layers):
        raise FormatError(
            f"entry {index}: layer is {layer} but the model has {len(manifest.layers)}"
        )
    layout = manifest.layers[layer]
    if layout.kind == "none":
        raise FormatError(f"entry {index}: layer {layer} is of kind none but has a block")
    head_dim = layout.value_head_dim if kv else layout.key_head_dim
    dtype = DTYPE_NUMBERS[layout.value_dtype if kv else layout.key_dtype]
    return (manifest.n_batch, layout.n_kv_heads, head_dim, dtype)


def check_conversation_id(conversation_id: str) -> None:
    """Refuse what cannot name a conversation: TypeError, ValueError."""
    if not isinstance(conversation_id, str):
        raise TypeError(f"conversation_id is {shown(conversation_id)} but must be a str")
    try:
        n_bytes = len(conversation_id.encode())
    except UnicodeEncodeError:
        raise ValueError(
            f"conversation_id is {shown(conversation_id)}: not text that UTF-8 can hold"
        ) from None
    if not 1 <= n_bytes <= _MAX_ID_BYTES:
        raise ValueError(
            f"conversation_id has {n_bytes} bytes of UTF-8 but must have 1 to {_MAX_ID_BYTES}"
        )
