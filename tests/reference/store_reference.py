"""The container of csrc/FORMAT.md written and read in plain Python; nothing here imports krul."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields

MAGIC = bytes.fromhex("894b52554c0d0a1a")
HEADER = struct.Struct("<8sIIQII28sI")
ENTRY = struct.Struct("<HBBB3siiIIIIqqQQ")
MANIFEST, SEGMENT = 1, 2
BLOCK, META, TOKENS, MASK, POSITIONS, BEHAVIOUR = range(1, 7)
PAIR_CODECS = {4, 5, 6}
DTYPE_BYTES = {1: 4, 2: 2, 3: 2}


def crc32c(data: bytes, crc: int = 0) -> int:
    """The definition, one bit at a time."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@dataclass
class Row:
    """One entry, in the order of the tuples that krul._core takes and gives."""

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

    def to_tuple(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def pack(self) -> bytes:
        return ENTRY.pack(
            self.kind,
            self.codec,
            self.kv,
            self.dtype,
            bytes(3),
            self.layer_lower,
            self.layer_upper,
            self.n_batch,
            self.n_heads,
            self.head_dim,
            self.payload_crc32c,
            self.token_start,
            self.n_tokens,
            self.offset,
            self.payload_bytes,
        )


def block(layer=0, kv=0, token_start=0, n_tokens=5, codec=2, upper=-1, **more) -> Row:
    """A BLOCK with ordinary numbers."""
    numbers = {"dtype": 3, "n_batch": 1, "n_heads": 2, "head_dim": 8} | more
    return Row(BLOCK, codec, kv, layer_lower=layer, layer_upper=upper, token_start=token_start,
               n_tokens=n_tokens, **numbers)  # fmt: skip


def header(kind: int, file_bytes: int, table: bytes, version: int = 1, **more) -> bytes:
    """A header with right checksums; n_entries, table_crc32c and reserved can be overridden."""
    start = HEADER.pack(
        MAGIC,
        version,
        kind,
        file_bytes,
        more.get("n_entries", len(table) // ENTRY.size),
        more.get("table_crc32c", crc32c(table)),
        more.get("reserved", bytes(28)),
        0,
    )[:-4]
    return start + struct.pack("<I", crc32c(start))


def write(kind: int, rows: list[Row], payloads: list[bytes], **more) -> bytes:
    """A whole container; fills offset, payload_bytes and payload_crc32c of the rows."""
    body = bytearray()
    start = HEADER.size + ENTRY.size * len(rows)
    for row, payload in zip(rows, payloads, strict=True):
        body += bytes(-len(body) % 64)
        row.offset = start + len(body)
        row.payload_bytes = len(payload)
        row.payload_crc32c = crc32c(payload)
        body += payload
    table = b"".join(row.pack() for row in rows)
    return header(kind, start + len(body), table, **more) + table + bytes(body)


def seal(data: bytes) -> bytes:
    """The same file with table_crc32c and header_crc32c made right for what it now says."""
    n_entries = struct.unpack_from("<I", data, 24)[0]
    table = data[64 : 64 + 64 * n_entries]
    start = data[:28] + struct.pack("<I", crc32c(table)) + data[32:60]
    return start + struct.pack("<I", crc32c(start)) + data[64:]


def parse(data: bytes) -> tuple[int, list[Row]] | None:
    """Return kind and rows, or None for anything that FORMAT.md does not allow."""
    if len(data) < 64:
        return None
    magic, version, kind, file_bytes, n_entries, table_crc, reserved, crc = HEADER.unpack(data[:64])
    if magic != MAGIC or crc32c(data[:60]) != crc or version != 1 or any(reserved):
        return None
    if file_bytes != len(data) or len(data) < 64 + 64 * n_entries or n_entries > 1 << 20:
        return None
    table = data[64 : 64 + 64 * n_entries]
    if crc32c(table) != table_crc:
        return None
    rows = []
    for at in range(0, len(table), 64):
        values = ENTRY.unpack_from(table, at)
        if any(values[4]):
            return None
        numbers = (*values[:4], *values[5:10], values[11], values[12], values[13], values[14])
        rows.append(Row(*numbers, values[10]))
    if not _is_table_good(kind, rows):
        return None
    end = 64 + 64 * n_entries
    for row in rows:
        if row.offset != end + -end % 64 or row.offset + row.payload_bytes > len(data):
            return None
        end = row.offset + row.payload_bytes
    return (kind, rows) if end == len(data) else None


def _is_table_good(kind: int, rows: list[Row]) -> bool:
    if kind == SEGMENT:
        key = [(2 * row.layer_lower + row.kv, row.token_start) for row in rows]
        apart = all(
            key[i][0] != key[i + 1][0] or key[i][1] + rows[i].n_tokens <= key[i + 1][1]
            for i in range(len(rows) - 1)
        )
        return bool(rows) and key == sorted(key) and apart and all(map(_is_block_good, rows))
    kinds = [row.kind for row in rows]
    return (
        kind == MANIFEST
        and kinds[:2] == [META, TOKENS]
        and kinds == sorted(set(kinds))
        and kinds[-1] <= BEHAVIOUR
        and not any(any(row.to_tuple()[1:11]) for row in rows)
        and rows[0].payload_bytes <= 1 << 26
    )


def _is_block_good(row: Row) -> bool:
    is_pair = row.layer_upper != -1
    extents = (row.n_batch, row.n_heads, row.head_dim)
    if row.kind != BLOCK or row.kv > 1 or row.dtype not in DTYPE_BYTES:
        return False
    if not 1 <= row.codec <= 6 or (row.codec != 1 and is_pair != (row.codec in PAIR_CODECS)):
        return False
    if not 0 <= row.layer_lower < 1 << 16:
        return False
    if is_pair and not row.layer_lower < row.layer_upper < 1 << 16:
        return False
    if not all(1 <= extent <= 1 << 16 for extent in extents) or row.payload_bytes == 0:
        return False
    if row.n_tokens < 1 or row.token_start < 0 or row.token_start + row.n_tokens > 1 << 30:
        return False
    n_values = row.n_batch * row.n_heads * row.head_dim * row.n_tokens * (1 + is_pair)
    return n_values * DTYPE_BYTES[row.dtype] <= 1 << 30
