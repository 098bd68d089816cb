"""Column streams against plain Python: the same bytes out, the same numbers back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import columns_reference as reference

import krul
from krul import _core

BACKENDS = [name for name, is_usable, _ in _core.backends() if is_usable]


def laplace_tables(n_tables):
    """Make tables of growing width, every symbol at least 1."""
    distance = np.abs(np.arange(256) - 127)
    tables = np.ones((n_tables, 256), np.uint16)
    for index in range(n_tables):
        share = np.exp(-distance / (0.2 * 1.4**index))
        tables[index] += np.floor(share / share.sum() * (4096 - 256)).astype(np.uint16)
        tables[index, 127] += 4096 - tables[index].sum()
    return tables


def sparse_tables(n_tables, seed):
    """Make tables that leave symbols out, the nearer ones too; some have only the escape left."""
    random = np.random.default_rng(seed)
    tables = laplace_tables(n_tables)
    tables[tables <= random.integers(0, 40)] = 0
    tables[random.random(tables.shape) < random.choice([0, 0.1, 0.9, 1])] = 0
    tables[:, 255] = random.integers(1, 300, n_tables)
    tables[tables.sum(1) == tables[:, 255], 127] = 1
    heaviest = tables.argmax(1)
    rows = np.arange(n_tables)
    left = 4096 - tables.sum(1, dtype=np.int64)
    tables[rows, heaviest] = (tables[rows, heaviest] + left).astype(np.uint16)
    assert (tables.sum(1, dtype=np.int64) == 4096).all()
    return tables


def draw(n_columns, n_tokens, n_tables, seed, escape_share=0.0, has_shift=False):
    """Make numbers as wide as their classes say."""
    random = np.random.default_rng(seed)
    column_class = random.integers(0, n_tables + 2, n_columns).astype(np.uint8)
    column_class[random.random(n_columns) < 0.15] = 255
    values = np.rint(
        random.laplace(0, 1, (n_columns, n_tokens)) * (0.3 * 1.4 ** column_class[:, None] % 50)
    ).astype(np.int32)
    far = random.random(values.shape) < escape_share
    values[far] = random.integers(-(2**31), 2**31, far.sum())
    values[column_class == 255] = 0
    token_shift = None
    if has_shift:
        token_shift = random.integers(-128, 128, n_tokens).astype(np.int8)
        token_shift[random.random(n_tokens) < 0.5] = 0
        token_shift[: n_tokens // 2] = 0
    return values, column_class, token_shift


def decode(stream, shape, tables, column_class, token_shift=None, backend=None):
    """Decode between rows that must stay as they are."""
    wide = np.full((shape[0] + 2, shape[1]), np.nan, np.float32)
    out = wide[1:-1]
    _core.entropy_decode_columns(stream, out, tables, column_class, token_shift, backend)
    assert np.isnan(wide[[0, -1]]).all()
    return out


N_TOKENS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 100, 257]


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize("escape_share", [0.0, 0.02])
def test_same_bytes_as_reference(n_tokens, has_shift, escape_share):
    tables = laplace_tables(12)
    values, *about = draw(9, n_tokens, 12, n_tokens, escape_share, has_shift)
    stream = _core.entropy_encode_columns(values, tables, *about)
    assert stream == reference.encode(values, tables, *about)
    assert (reference.decode(stream, *values.shape, tables, *about) == values).all()
    for backend in BACKENDS:
        out = decode(stream, values.shape, tables, *about, backend=backend)
        assert (out == values.astype(np.float32)).all()


@given(
    shape=st.tuples(st.integers(0, 6), st.integers(0, 80)),
    n_tables=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
    escape_share=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    has_shift=st.booleans(),
    kind=st.sampled_from(["laplace", "flat", "sparse"]),
)
def test_round_trip(shape, n_tables, seed, escape_share, has_shift, kind):
    tables = sparse_tables(n_tables, seed) if kind == "sparse" else laplace_tables(n_tables)
    if kind == "flat":
        tables[:] = 16
    values, *about = draw(*shape, n_tables, seed, escape_share, has_shift)
    stream = _core.entropy_encode_columns(values, tables, *about)
    assert stream == reference.encode(values, tables, *about)
    for backend in BACKENDS:
        out = decode(stream, values.shape, tables, *about, backend=backend)
        assert (out == values.astype(np.float32)).all()


EDGES = [-(2**31), -(2**24), -16384, -8192, -128, -127, -1, 0, 127, 128, 8191, 8192, 2**31 - 1]


def test_edges_of_symbols_and_escapes():
    tables = laplace_tables(1)
    values = np.array([EDGES], np.int32)
    stream = _core.entropy_encode_columns(values, tables, np.zeros(1, np.uint8))
    assert np.frombuffer(stream[:4], "<u4")[0] == sum(not -127 <= v <= 127 for v in EDGES)
    assert (decode(stream, values.shape, tables, np.zeros(1, np.uint8)) == np.float32(EDGES)).all()


def outcome(call, refusal, *args, **kwargs):
    """Return what a decoder gives, or that it refuses."""
    try:
        return np.asarray(call(*args, **kwargs), np.float32).tobytes()
    except refusal:
        return "refused"


@given(
    st.integers(0, 10**9),
    st.integers(0, 255),
    st.sampled_from(["change", "cut", "add", "insert"]),
    st.integers(33, 70),
    st.booleans(),
)
def test_damage_is_refused_as_the_reference_does(position, byte, how, n_tokens, is_sparse):
    tables = sparse_tables(8, n_tokens) if is_sparse else laplace_tables(8)
    values, *about = draw(5, n_tokens, 8, 5, 0.05, True)
    stream = bytearray(_core.entropy_encode_columns(values, tables, *about))
    position %= len(stream)
    if how == "change":
        stream[position] ^= byte
    elif how == "cut":
        del stream[position:]
    elif how == "add":
        stream += bytes([byte] * (1 + position % 4))
    else:
        stream[position:position] = bytes([byte])
    expected = outcome(reference.decode, ValueError, bytes(stream), *values.shape, tables, *about)
    for backend in BACKENDS:
        found = outcome(
            decode, krul.CorruptionError, stream, values.shape, tables, *about, backend=backend
        )
        assert found == expected


@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 70))
def test_any_bytes_are_refused_as_the_reference_does(stream, n_columns, n_tokens):
    tables = laplace_tables(3)
    column_class = np.arange(n_columns, dtype=np.uint8)
    states = np.full(32, 1 << 16, "<u4").tobytes()
    for data in (stream, stream[:8].ljust(8, b"\0") + states + stream[8:]):
        expected = outcome(
            reference.decode, ValueError, data, n_columns, n_tokens, tables, column_class
        )
        for backend in BACKENDS:
            shape = (n_columns, n_tokens)
            found = outcome(
                decode, krul.CorruptionError, data, shape, tables, column_class, backend=backend
            )
            assert found == expected


def test_what_a_table_leaves_out_is_an_escape():
    """Every value of a byte in tables of two symbols, and in one that has them all."""
    tables = np.zeros((3, 256), np.uint16)
    tables[0, [127, 255]] = 4095, 1
    tables[1, [0, 255]] = 1, 4095
    tables[2] = 16
    values = np.tile(np.arange(-130, 131, dtype=np.int32), (3, 1))
    classes = np.arange(3, dtype=np.uint8)
    stream = _core.entropy_encode_columns(values, tables, classes)
    assert stream == reference.encode(values, tables, classes)
    n_outside = 6
    assert int.from_bytes(stream[:4], "little") == 260 + 260 + n_outside
    for backend in BACKENDS:
        out = decode(stream, values.shape, tables, classes, backend=backend)
        assert (out == values).all()


@pytest.mark.parametrize("value", [-127, -1, 0, 1, 126, 127])
def test_an_escape_is_refused_where_its_table_has_the_value(value):
    tables = np.zeros((1, 256), np.uint16)
    tables[0, [10, 255]] = 1, 4095
    classes = np.zeros(1, np.uint8)
    away = np.full((1, 5), 300, np.int32)
    stream = _core.entropy_encode_columns(away, tables, classes)
    words_bytes = int.from_bytes(stream[4:8], "little")
    escapes = b"".join([reference.write_escape(value)] * 5)
    stream = stream[: 136 + words_bytes] + escapes
    assert (decode(stream, away.shape, tables, classes) == value).all()
    tables[0, value + 127], tables[0, 255] = 1, tables[0, 255] - 1
    away = _core.entropy_encode_columns(away, tables, classes)
    words_bytes = int.from_bytes(away[4:8], "little")
    with pytest.raises(krul.CorruptionError, match="number 0 is missing or malformed"):
        decode(away[: 136 + words_bytes] + escapes, (1, 5), tables, classes)


def escaped(n_escapes, escapes):
    """Rebuild a stream of the values 128, 0, -200 with other escapes."""
    values = np.array([[128, 0, -200]], np.int32)
    stream = _core.entropy_encode_columns(values, laplace_tables(1), np.zeros(1, np.uint8))
    words_bytes = int(np.frombuffer(stream[4:8], "<u4")[0])
    return n_escapes.to_bytes(4, "little") + stream[4 : 136 + words_bytes] + escapes


GOOD = reference.write_escape(128) + reference.write_escape(-200)
REFUSED = {
    "one too few": (1, reference.write_escape(128)),
    "one too many": (3, GOOD + reference.write_escape(300)),
    "a byte more": (2, GOOD + b"\1"),
    "cut": (2, GOOD[:-1]),
    "none": (0, b""),
    "uncounted": (0, GOOD),
    "small": (2, reference.write_escape(128) + b"\x02\x00"),
    "has a symbol": (2, reference.write_escape(128) + b"\xfe\x01"),
    "longer than it need be": (2, reference.write_escape(128) + b"\x8f\x83\x00"),
    "33 bits": (2, reference.write_escape(128) + b"\xff\xff\xff\xff\x1f"),
    "six bytes": (2, reference.write_escape(128) + b"\x80\x80\x80\x80\x80\x01"),
}


def test_escapes_are_where_the_refusals_think():
    stream = escaped(2, GOOD)
    out = decode(stream, (1, 3), laplace_tables(1), np.zeros(1, np.uint8))
    assert out.tolist() == [[128, 0, -200]]


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_escapes(case):
    with pytest.raises(krul.CorruptionError, match="column stream"):
        decode(escaped(*REFUSED[case]), (1, 3), laplace_tables(1), np.zeros(1, np.uint8))


def test_close_to_the_entropy():
    tables = laplace_tables(6)
    share = tables[3] / 4096
    random = np.random.default_rng(0)
    values = random.choice(np.arange(-127, 128), (64, 512), p=share[:255] / share[:255].sum())
    stream = _core.entropy_encode_columns(values.astype(np.int32), tables, np.full(64, 3, np.uint8))
    ideal_bytes = -np.log2(share[values + 127]).sum() / 8
    assert len(stream) < 1.002 * ideal_bytes + 136


def test_arguments():
    tables = laplace_tables(2)
    values, classes = np.zeros((3, 4), np.int32), np.zeros(3, np.uint8)
    encode = _core.entropy_encode_columns
    with pytest.raises(krul.ShapeError, match=r"column_class \(2,\)"):
        encode(values, tables, classes[:2])
    with pytest.raises(krul.ShapeError, match=r"token_shift \(3,\)"):
        encode(values, tables, classes, np.zeros(3, np.int8))
    with pytest.raises(krul.ShapeError, match=r"tables is \(65, 256\)"):
        encode(values, laplace_tables(65), classes)
    with pytest.raises(ValueError, match="n_tables is 0"):
        encode(values, tables[:0], classes)
    with pytest.raises(TypeError, match="values must be a contiguous array of int32"):
        encode(values.astype(np.int64), tables, classes)
    with pytest.raises(TypeError, match="contiguous"):
        encode(values[:, ::2], tables, classes)
    zero = tables.copy()
    zero[1, 127] += zero[1, 255]
    zero[1, 255] = 0
    with pytest.raises(ValueError, match="table 1 gives escapes the frequency 0 but"):
        encode(values, zero, classes)
    zero[1, 255] = 1
    with pytest.raises(ValueError, match="table 1 sums to 4097"):
        encode(values, zero, classes)
    zero[1] = 0
    zero[1, 255] = 4096
    with pytest.raises(ValueError, match="table 1 gives escapes the frequency 4096 but"):
        encode(values, zero, classes)
    values[1, 2] = 5
    classes[1] = 255
    with pytest.raises(ValueError, match="column 1 is of class 255, all zeros, but holds 5"):
        encode(values, tables, classes)
    out = np.zeros((3, 4), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        _core.entropy_decode_columns(b"", out, tables, classes)
