"""Makes tests/data/golden, tests/data/malformed and the fuzzers' seeds; the files are committed.

Usage: python tests/data/make.py [--check]

Golden containers are written by the reference in plain Python, and so are the malformed ones, each
of them wrong in one way. Seeds of payloads are coded by krul, from numbers that are the same
everywhere. ``--check`` writes nothing and exits 1 if a file would change.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from reference import predict_reference  # noqa: E402
from reference import store_reference as reference  # noqa: E402

META = {
    "format": "krul conversation",
    "conversation_id": "chat/42",
    "tenant": "default",
    "generation": 3,
    "fingerprint": {"exact": "0123456789abcdef"},
    "n_batch": 1,
    "n_tokens": 5,
    "layers": [
        {
            "kind": "full",
            "n_kv_heads": 2,
            "key_head_dim": 8,
            "value_head_dim": 8,
            "window": None,
            "key_dtype": "bfloat16",
            "value_dtype": "bfloat16",
        },
        {
            "kind": "sliding",
            "n_kv_heads": 2,
            "key_head_dim": 8,
            "value_head_dim": 8,
            "window": 16,
            "key_dtype": "bfloat16",
            "value_dtype": "bfloat16",
        },
        {
            "kind": "none",
            "n_kv_heads": 0,
            "key_head_dim": 0,
            "value_head_dim": 0,
            "window": None,
            "key_dtype": "float32",
            "value_dtype": "float32",
        },
    ],
    "segments": [
        {
            "file": "segment-3",
            "token_start": 0,
            "n_tokens": 5,
            "file_bytes": 1,
            "strategy": {"codec": "int8"},
            "guard": {"mean_kl": 0.25},
            "crc32c": 0,
        }
    ],
    "settings": {"codec": "auto"},
    "created_s": 1700000000.5,
    "updated_s": 1700000001.0,
}
TOKENS = struct.pack("<5q", 1, 2, 3, 2**40, 5)
MASK = bytes([0, 1, 1, 1, 1])
POSITIONS = struct.pack("<5q", 0, 0, 1, 2, 3)
BEHAVIOUR = struct.pack("<3f", 0.5, -2.0, 1e-3)


def blocks() -> tuple[list[reference.Row], list[bytes]]:
    """Rows and payloads of the golden segment: two layers, and payloads of many sizes."""
    rows = [reference.block(layer, kv) for layer in (0, 1) for kv in (0, 1)]
    return rows, [bytes(range(n)) for n in (3, 64, 65, 200)]


def segment(change=None, **more) -> bytes:
    """The golden segment; ``change(rows)`` may spoil a row before checksums are made."""
    rows, payloads = blocks()
    data = reference.write(reference.SEGMENT, rows, payloads, **more)
    if change is None:
        return data
    change(rows)
    table = b"".join(row.pack() for row in rows)
    return reference.seal(data[:64] + table + data[64 + len(table) :])


def row_is(index: int, **values) -> bytes:
    """The golden segment with some fields of one row replaced."""

    def change(rows):
        for name, value in values.items():
            setattr(rows[index], name, value)

    return segment(change)


def manifest(meta=None, parts=None, text: bytes | None = None) -> bytes:
    """The golden manifest, with fields of META or whole payloads replaced; None leaves one out."""
    if text is None:
        text = json.dumps(META | (meta or {}), separators=(",", ":")).encode()
    payloads = {
        reference.META: text,
        reference.TOKENS: TOKENS,
        reference.MASK: MASK,
        reference.POSITIONS: POSITIONS,
        reference.BEHAVIOUR: BEHAVIOUR,
    } | (parts or {})
    kept = {kind: payload for kind, payload in payloads.items() if payload is not None}
    rows = [reference.Row(kind) for kind in kept]
    return reference.write(reference.MANIFEST, rows, list(kept.values()))


def linked(**values) -> dict:
    """META's change of its one segment."""
    return {"segments": [META["segments"][0] | values]}


def layered(index: int, **values) -> dict:
    """META's change of one layer."""
    layers = list(META["layers"])
    layers[index] = layers[index] | values
    return {"layers": layers}


def flipped(data: bytes, at: int) -> bytes:
    """The data with one bit turned."""
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def patched(data: bytes, at: int, form: str, value) -> bytes:
    """The data with a number replaced and the checksums put right."""
    return reference.seal(data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :])


def without(name: str) -> bytes:
    """The golden manifest with a field of META left out."""
    kept = {key: value for key, value in META.items() if key != name}
    return manifest(text=json.dumps(kept).encode())


def cases() -> dict[str, tuple[bytes, str, str]]:
    """Every way to be wrong: name, bytes, exception, words of the message."""
    good = segment()
    text = json.dumps(META).encode()
    nested = b'{"a":' * 100_000 + b"0" + b"}" * 100_000
    corrupt, bad = "CorruptionError", "FormatError"
    return {
        "empty": (b"", corrupt, "has 0 bytes"),
        "foreign": (b"PK\x03\x04 this is another program's file", bad, "not a krul file"),
        "magic-line-ending": (good.replace(b"\r\n", b"\n", 1), bad, "not a krul file"),
        "header-truncated": (good[:63], corrupt, "truncated"),
        "header-flipped": (flipped(good, 17), corrupt, "header: CRC-32C"),
        "header-reserved": (segment(reserved=bytes(27) + b"\1"), bad, "reserved"),
        "version-later": (segment(version=2), bad, "version 2 but this krul reads version 1"),
        "version-zero": (segment(version=0), bad, "version 0"),
        "kind-unknown": (patched(good, 12, "<I", 9), bad, "kind of file is 9"),
        "file-bytes-too-few": (good[:-1], corrupt, "truncated"),
        "file-bytes-too-many": (good + b"\0", corrupt, "too long"),
        "entries-none": (reference.write(2, [], []), bad, "n_entries is 0"),
        "entries-too-many": (patched(good, 24, "<I", (1 << 20) + 1), bad, "at most 1048576"),
        "entries-beyond-file": (patched(good, 24, "<I", 1 << 20), corrupt, "truncated"),
        "table-flipped": (flipped(good, 64 + 20), corrupt, "table of entries: CRC-32C"),
        "entry-kind-unknown": (row_is(0, kind=7), bad, "kind is 7"),
        "entry-reserved": (patched(good, 64 + 6, "<B", 1), bad, "reserved"),
        "codec-unknown": (row_is(1, codec=8), bad, "codec is 8"),
        "codec-pair-of-one": (row_is(1, codec=4), bad, "takes 2 layer(s)"),
        "codec-one-of-pair": (row_is(1, layer_upper=5), bad, "takes 1 layer(s)"),
        "kv-unknown": (row_is(1, kv=3), bad, "kv is 3"),
        "kv-both-of-exact": (row_is(1, kv=2), bad, "codec int8 has the kv 2"),
        "kv-one-of-predict": (row_is(1, codec=7), bad, "codec predict has the kv 1"),
        "dtype-unknown": (row_is(1, dtype=4), bad, "dtype is 4"),
        "layer-negative": (row_is(0, layer_lower=-1), bad, "layer_lower is -1"),
        "layer-upper-not-above": (row_is(0, layer_upper=0, codec=4), bad, "layer_upper is 0"),
        "extent-zero": (row_is(0, n_heads=0), bad, "n_heads is 0"),
        "extent-too-large": (row_is(0, head_dim=65537), bad, "head_dim is 65537"),
        "tokens-none": (row_is(0, n_tokens=0), bad, "n_tokens is 0"),
        "token-start-negative": (row_is(0, token_start=-1), bad, "token_start is -1"),
        "block-too-large": (row_is(0, n_tokens=1 << 26), bad, "more than 1073741824 bytes"),
        "blocks-out-of-order": (row_is(0, layer_lower=1), bad, "comes after"),
        "blocks-overlap": (row_is(1, kv=0, token_start=4), bad, "comes after"),
        "offset-unaligned": (row_is(1, offset=385), bad, "offset is 385"),
        "offset-overlaps": (row_is(2, offset=384), bad, "offset is 384"),
        "offset-beyond-file": (row_is(3, offset=1 << 62), bad, "offset is"),
        "payload-empty": (row_is(1, payload_bytes=0), bad, "payload_bytes is 0"),
        "payload-beyond-file": (row_is(3, payload_bytes=201), bad, "does not fit"),
        "payload-huge": (row_is(3, payload_bytes=2**64 - 1), bad, "does not fit"),
        "payload-hidden-tail": (row_is(3, payload_bytes=199), bad, "the last payload ends"),
        "payload-flipped": (flipped(good, len(good) - 1), corrupt, "CRC-32C is"),
        "block-in-manifest": (patched(good, 12, "<I", 1), bad, "kind in a manifest is 1"),
        "meta-in-segment": (patched(manifest(), 12, "<I", 2), bad, "kind in a segment is 2"),
        "manifest-without-tokens": (manifest(parts={3: None}), bad, "kind in a manifest is 4"),
        "manifest-without-meta": (manifest(parts={2: None}), bad, "kind in a manifest is 3"),
        "meta-flipped": (flipped(manifest(), 400), corrupt, "CRC-32C is"),
        "meta-not-utf8": (manifest(text=text.replace(b"chat", b"ch\xff\xfe")), bad, "not UTF-8"),
        "meta-not-json": (manifest(text=b"{"), bad, "not UTF-8 JSON"),
        "meta-a-list": (manifest(text=b"[]"), bad, "must be an object"),
        "meta-nested": (manifest(text=nested), bad, "nested too deep"),
        "meta-repeated-field": (
            manifest(text=text[:-1] + b',"tenant":"default"}'),
            bad,
            "occurs twice",
        ),
        "meta-nan": (manifest(text=text.replace(b"0.25", b"NaN")), bad, "NaN is no JSON number"),
        "meta-infinite": (manifest(text=text.replace(b"0.25", b"1e999")), bad, "beyond"),
        "meta-without-field": (without("tenant"), bad, "lacks ['tenant']"),
        "meta-unknown-field": (manifest({"extra": 1}), bad, "unknown ['extra']"),
        "meta-format": (manifest({"format": "other"}), bad, "format is 'other'"),
        "meta-id-empty": (manifest({"conversation_id": ""}), bad, "0 bytes"),
        "meta-id-long": (manifest({"conversation_id": "é" * 513}), bad, "1026 bytes"),
        "meta-id-surrogate": (
            manifest(text=text.replace(b"chat/42", b"\\ud800")),
            bad,
            "conversation_id",
        ),
        "meta-tenant-path": (manifest({"tenant": "../up"}), bad, "tenant is '../up'"),
        "meta-generation-zero": (manifest({"generation": 0}), bad, "generation is 0"),
        "meta-generation-true": (manifest({"generation": True}), bad, "generation is True"),
        "meta-fingerprint-text": (manifest({"fingerprint": "x"}), bad, "must be an object"),
        "meta-fingerprint-empty": (manifest({"fingerprint": {}}), bad, "fingerprint.exact is None"),
        "meta-batch-zero": (manifest({"n_batch": 0}), bad, "n_batch is 0"),
        "meta-tokens-float": (manifest({"n_tokens": 5.0}), bad, "n_tokens is 5.0"),
        "meta-tokens-differ": (manifest({"n_tokens": 6}), bad, "hold 5 tokens but n_tokens is 6"),
        "meta-layers-none": (manifest({"layers": []}), bad, "1 to 65536 items"),
        "meta-layer-kind": (manifest(layered(0, kind="half")), bad, "layers[0].kind is 'half'"),
        "meta-layer-extent": (manifest(layered(0, n_kv_heads=0)), bad, "all above 0"),
        "meta-layer-window": (manifest(layered(0, window=4)), bad, "null for kind full"),
        "meta-layer-no-window": (manifest(layered(1, window=None)), bad, "a number for kind"),
        "meta-layer-of-none": (manifest(layered(2, n_kv_heads=1)), bad, "0, 0, 0 for kind none"),
        "meta-layer-dtype": (manifest(layered(0, key_dtype="int8")), bad, "key_dtype is 'int8'"),
        "meta-segment-path": (manifest(linked(file="../segment-1")), bad, "file is '../segment-1'"),
        "meta-segment-newline": (manifest(linked(file="segment-1\n")), bad, "file is"),
        "meta-segment-gap": (manifest(linked(token_start=1)), bad, "token_start is 1"),
        "meta-segment-empty": (manifest(linked(n_tokens=0)), bad, "n_tokens is 0"),
        "meta-segment-crc": (manifest(linked(crc32c=1 << 32)), bad, "crc32c is 4294967296"),
        "meta-segment-twice": (
            manifest({"n_tokens": 10} | {"segments": META["segments"] * 2}),
            bad,
            "token_start is 0",
        ),
        "meta-settings-null": (manifest({"settings": None}), bad, "settings is None"),
        "meta-time-negative": (manifest({"created_s": -1}), bad, "created_s is -1"),
        "tokens-short": (manifest(parts={3: TOKENS[:-1]}), bad, "TOKENS has 39 bytes"),
        "mask-short": (manifest(parts={4: MASK[:-1]}), bad, "MASK has 4 bytes"),
        "mask-value": (manifest(parts={4: bytes([0, 1, 2, 1, 1])}), bad, "MASK holds a 2"),
        "positions-long": (manifest(parts={5: POSITIONS * 2}), bad, "POSITIONS has 80 bytes"),
        "behaviour-torn": (manifest(parts={6: BEHAVIOUR[:-1]}), bad, "BEHAVIOUR has 11 bytes"),
    }


# ---- payloads, coded by krul ------------------------------------------------------------------


def values(n_tokens: int, head_dim: int, dtype: int) -> np.ndarray:
    """Numbers like KV, exact in every dtype: 1 x 2 x n_tokens x head_dim."""
    shape = (1, 2, n_tokens, head_dim)
    counter = np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)
    noise = (counter * np.uint64(2654435761) % np.uint64(2**32)) >> np.uint64(25)
    numbers = (noise.astype(np.float32) - 64) / 32
    return numbers.astype({1: np.float32, 2: np.float16}[dtype])


def coded() -> list[tuple[str, reference.Row, bytes, str]]:
    """Blocks of every codec: name, row, payload, SHA-256 of what it decodes to."""
    from krul import _core

    found = []
    layer = 0
    for name, codec in _core.codecs().items():
        if name == "predict":  # needs a profile
            continue
        for dtype, n_tokens, head_dim in ((1, 70, 8), (2, 5, 3)):
            for kv in (0, 1):
                n_layers = 2 if codec >= 4 else 1
                arrays = [values(n_tokens, head_dim, dtype) * (1 + i) for i in range(n_layers)]
                payload, used, _, _ = _core.encode_blocks([(codec, kv, arrays)])[0]
                out = [np.zeros_like(array) for array in arrays]
                _core.decode_blocks([(used, kv, payload, out)])
                digest = hashlib.sha256(b"".join(array.tobytes() for array in out)).hexdigest()
                row = reference.block(
                    layer,
                    kv,
                    codec=int(used),
                    upper=layer + 1 if n_layers == 2 else -1,
                    n_tokens=n_tokens,
                    head_dim=head_dim,
                    dtype=dtype,
                )
                found.append((f"{name}-{'kv'[kv]}-{dtype}", row, bytes(payload), digest))
            layer += 2
    return found


def seed(row: reference.Row, payload: bytes) -> bytes:
    """A payload behind the eight bytes by which fuzz_codecs.c chooses what to decode."""
    choice = (row.codec, row.kv, row.dtype - 1, row.n_batch - 1, row.n_heads - 1,
              row.n_tokens - 1, row.head_dim - 1, 0)  # fmt: skip
    return bytes(choice) + payload


def entropy_seed(symbols: bytes) -> bytes:
    """An entropy stream behind the same eight bytes."""
    from krul import _core

    stream = bytes(_core.entropy_encode(symbols))
    return bytes((0, 0, 0, 0, 0, len(symbols) >> 8, len(symbols) & 255, 0)) + stream


def column_tables() -> np.ndarray:
    """The four tables of fuzz_codecs.c."""
    tables = np.repeat([[16], [8], [4], [2]], 256, axis=1).astype(np.uint16)
    tables[3, 1:255:2] = 0
    tables[:, 127] += 4096 - tables.sum(axis=1, dtype=np.uint16)
    return tables


def columns_seed(n_columns: int, n_tokens: int, has_shift: bool, has_escapes: bool) -> bytes:
    """A column stream behind the same eight bytes; fuzz_codecs.c has the same tables."""
    from krul import _core

    tables = column_tables()
    first_class = 2
    classes = [255 if i % 4 == 3 else (first_class + i) % 8 for i in range(n_columns)]
    shifts = np.array([i % 7 - 3 if i % 5 == 4 else 0 for i in range(n_tokens)], np.int8)
    numbers = np.arange(n_columns * n_tokens).reshape(n_columns, n_tokens)
    values = (numbers * numbers % 7 - 3).astype(np.int32)
    if has_escapes:
        values[numbers % 31 == 5] = 40000
        values[numbers % 31 == 7] = -(2**31)
    values[np.array(classes) == 255] = 0
    about = (tables, np.array(classes, np.uint8), shifts if has_shift else None)
    stream = bytes(_core.entropy_encode_columns(values, *about))
    return bytes((7, has_shift, 0, 0, 0, n_tokens, n_columns, first_class)) + stream


def predict_seed(n_tokens: int, dtype: int, step: float) -> bytes:
    """A chain of two layers behind the same eight bytes; fuzz_codecs.c has the same profile."""
    width, dim = 8, 4
    number = np.arange(width)
    quarters = np.array([1.0, 0, -1, 0])
    place = np.arange(n_tokens * 2).reshape(n_tokens, 2) % 3
    half = np.zeros((width, width))
    half[number, (number + 1) % width] = 0.5
    layers = [
        predict_reference.Layer(
            n_heads=1,
            head_dim=dim,
            mean=0.25 * number,
            deviation=4.0 / (1 << number // 2),
            forward=np.eye(width),
            backward=np.eye(width),
            sources=(0,) * index,
            maps=half if index else None,
            convention="half",
            cos=quarters[place],
            sin=quarters[place + 1],
        )
        for index in (0, 1)
    ]
    profile = predict_reference.Profile(column_tables(), 1, layers)
    decoded: dict[int, np.ndarray] = {}
    payloads = []
    for index, layer in enumerate(layers):
        both = values(n_tokens, dim, 1) * (1 + 2 * index)
        rows = predict_reference.to_rows(layer, both[:, :1], both[:, 1:])
        payload, decoded[index] = predict_reference.encode(profile, index, rows, decoded, step)
        payloads.append(payload)
    n_first = len(payloads[0])
    choice = (8, 0, dtype - 1, 0, n_first >> 8, n_tokens - 1, n_first & 255, 0)
    return bytes(choice) + b"".join(payloads)


def files() -> dict[Path, bytes]:
    """Every file and its content."""
    found = {
        DATA / "golden" / "v1-segment": segment(),
        DATA / "golden" / "v1-manifest": manifest(),
    }
    blocks_ = coded()
    rows = [row for _, row, _, _ in blocks_]
    payloads = [payload for _, _, payload, _ in blocks_]
    found[DATA / "golden" / "v1-codecs"] = reference.write(reference.SEGMENT, rows, payloads)
    digests = {name: digest for name, _, _, digest in blocks_}
    found[DATA / "golden" / "v1-codecs.json"] = (json.dumps(digests, indent=1) + "\n").encode()
    malformed = cases()
    for name, (data, _, _) in malformed.items():
        # Two hundred kilobytes of brackets are made anew by the test instead.
        if len(data) < 1 << 16:
            found[DATA / "malformed" / name] = data
    corpus = DATA.parent / "fuzz" / "corpus"
    found[corpus / "store" / "segment"] = segment()
    found[corpus / "store" / "manifest"] = manifest()
    for name, row, payload, _ in blocks_:
        found[corpus / "codecs" / name.replace("+", "-")] = seed(row, payload)
    skewed = bytes((i * i * 7 % 251) ** 3 >> 18 for i in range(700))
    found[corpus / "codecs" / "entropy-skewed"] = entropy_seed(skewed)
    found[corpus / "codecs" / "entropy-one-symbol"] = entropy_seed(b"a" * 300)
    found[corpus / "codecs" / "entropy-empty"] = entropy_seed(b"")
    for name, about in {
        "columns-plain": (5, 64, False, False),
        "columns-shifted": (5, 70, True, False),
        "columns-escapes": (3, 45, True, True),
    }.items():
        found[corpus / "codecs" / name] = columns_seed(*about)
    for name, how in {
        "predict-fine": (40, 1, 0.03125),
        "predict-coarse": (33, 2, 0.5),
        "predict-short": (3, 3, 0.25),
    }.items():
        found[corpus / "codecs" / name] = predict_seed(*how)
    return found


def main(arguments: list[str]) -> int:
    """Write what changed, or tell that something would."""
    is_check = arguments == ["--check"]
    stale = []
    for path, data in files().items():
        if not path.exists() or path.read_bytes() != data:
            stale.append(str(path.relative_to(DATA.parent)))
            if not is_check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    for name in stale:
        print(f"{'stale' if is_check else 'written'}: {name}")
    return int(is_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
