"""Interleaved rANS in plain Python: the same bytes as the C encoder, and the symbols back."""

import numpy as np

PROBABILITY_BITS = 12
WHOLE = 1 << PROBABILITY_BITS
N_LANES = 32
STATE_FLOOR = 1 << 16
CHUNK_BITS = 15
RAW, CONSTANT, CODED = 0, 1, 2


def build_table(counts):
    """Frequencies of at least 1 for each symbol that occurs, below WHOLE, summing to WHOLE."""
    counts = [int(count) for count in counts]
    shift = max(0, max(counts).bit_length() - 40)
    scaled = [max(count >> shift, 1) if count else 0 for count in counts]
    present = [symbol for symbol in range(256) if counts[symbol]]
    table = [0] * 256
    if len(present) == 1:
        table[present[0]] = WHOLE - 1
        table[present[0] ^ 1] = 1
        return table
    total = sum(scaled)
    for symbol in present:
        table[symbol] = min(max((scaled[symbol] * WHOLE + total // 2) // total, 1), WHOLE - 1)
    while sum(table) < WHOLE:
        able = [symbol for symbol in present if table[symbol] < WHOLE - 1]
        best = able[0]
        for symbol in able[1:]:
            if scaled[best] * (2 * table[symbol] + 1) < scaled[symbol] * (2 * table[best] + 1):
                best = symbol
        table[best] += 1
    while sum(table) > WHOLE:
        able = [symbol for symbol in present if table[symbol] > 1]
        best = able[0]
        for symbol in able[1:]:
            if scaled[symbol] * (2 * table[best] - 1) < scaled[best] * (2 * table[symbol] - 1):
                best = symbol
        table[best] -= 1
    return table


def write_table(table):
    """First and last symbol, then frequencies in one or two bytes, padded to an even number."""
    first = next(symbol for symbol in range(256) if table[symbol])
    last = next(symbol for symbol in range(255, -1, -1) if table[symbol])
    out = bytearray([first, last])
    for frequency in table[first : last + 1]:
        if frequency >= 128:
            out.append(0x80 | frequency >> 8)
        out.append(frequency & 0xFF)
    return bytes(out) + bytes(len(out) % 2)


def read_table(data):
    """Undo `write_table`."""
    table = [0] * 256
    at = 2
    for symbol in range(data[0], data[1] + 1):
        if data[at] & 0x80:
            table[symbol] = (data[at] & 0x7F) << 8 | data[at + 1]
            at += 2
        else:
            table[symbol] = data[at]
            at += 1
    return table


def log2_fixed(value):
    """Return log2 in 1/256, rounded down, by squaring."""
    whole = value.bit_length() - 1
    result = whole
    mantissa = value << (31 - whole)
    for _ in range(8):
        mantissa = mantissa * mantissa >> 31
        bit = mantissa >> 32
        mantissa >>= bit
        result = result << 1 | bit
    return result


def estimate_bytes(counts, table):
    """Return what the encoder expects a coded stream to take."""
    cost = sum(
        int(count) * ((PROBABILITY_BITS << 8) - log2_fixed(table[symbol]))
        for symbol, count in enumerate(counts)
        if count
    )
    n_chunks = (int(sum(counts)) >> CHUNK_BITS) + 1
    return (cost >> 11) + n_chunks * (4 * N_LANES + 4) + 12


def encode_chunk(table, symbols):
    """Run backwards: the words come out last first."""
    starts = np.concatenate([[0], np.cumsum(table)]).tolist()
    states = [STATE_FLOOR] * N_LANES
    words = []
    for index in range(len(symbols) - 1, -1, -1):
        lane, symbol = index % N_LANES, symbols[index]
        state, frequency = states[lane], table[symbol]
        if state >= frequency << 20:
            words.append(state & 0xFFFF)
            state >>= 16
        states[lane] = (state // frequency << PROBABILITY_BITS) + state % frequency + starts[symbol]
    return np.array(states, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def decode_chunk(table, chunk, n_symbols):
    """Decode one chunk; ValueError if it does not come out even."""
    starts = np.concatenate([[0], np.cumsum(table)]).tolist()
    symbol_of = np.repeat(np.arange(256), table).tolist()
    states = np.frombuffer(chunk[: 4 * N_LANES], "<u4").tolist()
    words = iter(np.frombuffer(chunk[4 * N_LANES :], "<u2").tolist())
    out = bytearray()
    for index in range(n_symbols):
        state = states[index % N_LANES]
        slot = state % WHOLE
        symbol = symbol_of[slot]
        out.append(symbol)
        state = table[symbol] * (state >> PROBABILITY_BITS) + slot - starts[symbol]
        if state < STATE_FLOOR:
            state = state << 16 | next(words)
        states[index % N_LANES] = state
    if next(words, None) is not None or any(state != STATE_FLOOR for state in states):
        raise ValueError("chunk does not come out even")
    return bytes(out)


def header(mode, n_table_bytes, n_symbols):
    """Twelve bytes."""
    return (
        bytes([mode, CHUNK_BITS])
        + n_table_bytes.to_bytes(2, "little")
        + n_symbols.to_bytes(8, "little")
    )


def encode(symbols):
    """Encode bytes; chooses the mode as the C encoder does."""
    symbols = bytes(symbols)
    raw = header(RAW, 0, len(symbols)) + symbols
    if not symbols:
        return raw
    counts = np.bincount(np.frombuffer(symbols, np.uint8), minlength=256).tolist()
    if counts[symbols[0]] == len(symbols) and len(raw) > 13:
        return header(CONSTANT, 0, len(symbols)) + symbols[:1]
    table = build_table(counts)
    if estimate_bytes(counts, table) >= len(raw):
        return raw
    table_bytes = write_table(table)
    step = 1 << CHUNK_BITS
    chunks = [encode_chunk(table, symbols[at : at + step]) for at in range(0, len(symbols), step)]
    ends = np.cumsum([len(chunk) for chunk in chunks]).astype("<u4")
    coded = header(CODED, len(table_bytes), len(symbols)) + table_bytes + ends.tobytes()
    coded += b"".join(chunks)
    return coded if len(coded) < len(raw) else raw


def decode(stream):
    """Decode a sound stream."""
    mode, chunk_bits = stream[0], stream[1]
    n_table_bytes = int.from_bytes(stream[2:4], "little")
    n_symbols = int.from_bytes(stream[4:12], "little")
    if mode == RAW:
        return stream[12:]
    if mode == CONSTANT:
        return stream[12:13] * n_symbols
    table = read_table(stream[12 : 12 + n_table_bytes])
    step = 1 << chunk_bits
    n_chunks = -(-n_symbols // step)
    ends_start = 12 + n_table_bytes
    chunks = stream[ends_start + 4 * n_chunks :]
    ends = np.frombuffer(stream[ends_start : ends_start + 4 * n_chunks], "<u4").tolist()
    out = b""
    for index, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        out += decode_chunk(table, chunks[begin:end], min(step, n_symbols - index * step))
    return out
