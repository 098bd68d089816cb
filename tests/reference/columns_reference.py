"""Column streams in plain Python, written from FORMAT.md: encoder and decoder."""

import numpy as np

WHOLE = 1 << 12
N_LANES = 32
STATE_FLOOR = 1 << 16
ZERO, ESCAPE, NO_SYMBOLS = 127, 255, 255


def table_of(column_class, token_shift, n_tables):
    """Return which table codes a value."""
    return min(max(int(column_class) + int(token_shift), 0), n_tables - 1)


def symbol_of(value, frequencies):
    """Return the symbol of a value: the escape where its table, a list, leaves it out."""
    is_symbol = -127 <= value <= 127 and frequencies[value + ZERO] > 0
    return value + ZERO if is_symbol else ESCAPE


def write_escape(value):
    """Zigzag, then seven bits to a byte."""
    rest = 2 * value if value >= 0 else -2 * value - 1
    out = bytearray()
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes([*out, rest])


def read_escapes(data, n_escapes):
    """Return all escapes; ValueError unless there are so many, each in its one form."""
    found, rest, place = [], 0, 0
    is_open = False
    for byte in data:
        rest += byte % 128 << place
        place += 7
        is_open = byte >= 128
        if not is_open:
            value = rest // 2 if rest % 2 == 0 else -(rest + 1) // 2
            if not -(2**31) <= value < 2**31:
                raise ValueError(f"escape {value}")
            if write_escape(value) != write_escape_bytes(rest, place):
                raise ValueError("escape is longer than it need be")
            found.append(value)
            rest, place = 0, 0
    if is_open or len(found) != n_escapes:
        raise ValueError("escapes do not come out even")
    return found


def write_escape_bytes(rest, place):
    """Return the bytes of an unfolded number that took `place` bits."""
    n_bytes = place // 7
    return bytes((rest >> 7 * i) % 128 + (128 if i + 1 < n_bytes else 0) for i in range(n_bytes))


def places(n_columns, n_tokens, column_class, token_shift, n_tables):
    """Yield (column, token, lane, table) of every symbol, in the order of decoding."""
    for column in range(n_columns):
        if column_class[column] == NO_SYMBOLS:
            continue
        for token in range(n_tokens):
            shift = 0 if token_shift is None else token_shift[token]
            table = table_of(column_class[column], shift, n_tables)
            yield column, token, token % N_LANES, table


def encode(values, tables, column_class, token_shift=None):
    """Encode int n_columns x n_tokens."""
    n_columns, n_tokens = values.shape
    frequencies = np.asarray(tables).tolist()
    starts = [np.cumsum([0, *table]).tolist() for table in frequencies]
    states = [STATE_FLOOR] * N_LANES
    words, escapes = [], []
    order = list(places(n_columns, n_tokens, column_class, token_shift, len(tables)))
    for column, token, lane, table in reversed(order):
        value = int(values[column, token])
        symbol = symbol_of(value, frequencies[table])
        if symbol == ESCAPE:
            escapes.append(value)
        state, frequency = states[lane], frequencies[table][symbol]
        if state >= frequency << 20:
            words.append(state & 0xFFFF)
            state >>= 16
        states[lane] = (state // frequency) * WHOLE + state % frequency + starts[table][symbol]
    return (
        np.array([len(escapes), 2 * len(words), *states], "<u4").tobytes()
        + np.array(words[::-1], "<u2").tobytes()
        + b"".join(write_escape(value) for value in reversed(escapes))
    )


def decode(stream, n_columns, n_tokens, tables, column_class, token_shift=None):
    """Decode to int64; ValueError for a stream that does not come out even."""
    if len(stream) < 8 + 4 * N_LANES:
        raise ValueError("too short")
    n_escapes, words_bytes = np.frombuffer(stream[:8], "<u4").tolist()
    states = np.frombuffer(stream[8:136], "<u4").tolist()
    if words_bytes % 2 or 136 + words_bytes > len(stream) or min(states) < STATE_FLOOR:
        raise ValueError("words or states")
    words = np.frombuffer(stream[136 : 136 + words_bytes], "<u2").tolist()
    frequencies = np.asarray(tables).tolist()
    starts = [np.cumsum([0, *table]).tolist() for table in frequencies]
    symbols = [np.repeat(np.arange(256), table).tolist() for table in frequencies]
    out = np.zeros((n_columns, n_tokens), np.int64)
    marks = []
    at = 0
    for column, token, lane, table in places(
        n_columns, n_tokens, column_class, token_shift, len(tables)
    ):
        slot = states[lane] % WHOLE
        symbol = symbols[table][slot]
        state = frequencies[table][symbol] * (states[lane] // WHOLE) + slot - starts[table][symbol]
        if state < STATE_FLOOR:
            if at == len(words):
                raise ValueError("no word left")
            state = state * 65536 + words[at]
            at += 1
        states[lane] = state
        out[column, token] = symbol - ZERO
        if symbol == ESCAPE:
            marks.append((column, token, table))
    if at != len(words) or any(state != STATE_FLOOR for state in states):
        raise ValueError("does not come out even")
    escapes = read_escapes(stream[136 + words_bytes :], n_escapes)
    if len(escapes) != len(marks):
        raise ValueError("escapes too many or too few")
    for (column, token, table), value in zip(marks, escapes, strict=True):
        if symbol_of(value, frequencies[table]) != ESCAPE:
            raise ValueError(f"escape {value} is a symbol of its table")
        out[column, token] = value
    return out
