"""The entropy coder against a plain Python one: the same bytes out, the same symbols back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import entropy_reference as reference

import krul
from krul import _core

SIZES = [0, 1, 2, 3, 31, 32, 33, 257, 1000, 40000]
BACKENDS = [name for name, is_usable, _ in _core.backends() if is_usable]


def geometric(n_symbols, seed=0):
    random = np.random.default_rng(seed)
    return (120 - np.minimum(random.geometric(0.4, n_symbols), 100)).astype(np.uint8).tobytes()


def uniform(n_symbols):
    return np.random.default_rng(1).integers(0, 256, n_symbols, np.uint8).tobytes()


DATA = {
    "geometric": geometric,
    "uniform": uniform,
    "one value": lambda n_symbols: b"\xff" * n_symbols,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_symbols", SIZES)
@pytest.mark.parametrize("kind", DATA)
def test_same_bytes_as_reference(backend, kind, n_symbols):
    symbols = DATA[kind](n_symbols)
    stream = _core.entropy_encode(symbols, backend=backend)
    assert stream == reference.encode(symbols)
    assert reference.decode(stream) == symbols
    assert _core.entropy_decode(stream, n_symbols, backend=backend) == symbols


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 300)), max_size=40),
    st.integers(0, 2**32 - 1),
)
def test_any_distribution(runs, seed):
    symbols = np.repeat(
        np.array([value for value, _ in runs], np.uint8), [n_times for _, n_times in runs]
    )
    np.random.default_rng(seed).shuffle(symbols)
    symbols = symbols.tobytes()
    stream = _core.entropy_encode(symbols)
    assert len(stream) <= len(symbols) + 12
    assert stream == reference.encode(symbols)
    for backend in BACKENDS:
        assert _core.entropy_decode(stream, len(symbols), backend=backend) == symbols


@given(st.binary(max_size=2000), st.integers(0, 2000))
def test_any_bytes_are_refused_or_decode(stream, n_symbols):
    try:
        n_decoded = len(_core.entropy_decode(stream, n_symbols))
    except krul.CorruptionError:
        n_decoded = n_symbols
    assert n_decoded == n_symbols


@given(st.integers(0, 10**9), st.integers(1, 255))
def test_changed_byte_is_refused_or_decodes(position, change):
    symbols = geometric(1500)
    stream = bytearray(_core.entropy_encode(symbols))
    stream[position % len(stream)] ^= change
    results = []
    for backend in BACKENDS:
        try:
            results.append(_core.entropy_decode(stream, len(symbols), backend=backend))
        except krul.CorruptionError as error:
            results.append(str(error))
    assert results == results[:1] * len(BACKENDS)


def test_close_to_the_entropy():
    symbols = geometric(200_000)
    counts = np.bincount(np.frombuffer(symbols, np.uint8))
    share = counts[counts > 0] / len(symbols)
    ideal_bytes = -len(symbols) * (share * np.log2(share)).sum() / 8
    assert len(_core.entropy_encode(symbols)) < 1.02 * ideal_bytes + 300


REFUSED = [
    (lambda stream: stream[:5], "5 bytes, its header 12"),
    (lambda stream: stream[:4] + b"\x09" + stream[5:], "not the 5000 expected"),
    (lambda stream: stream[:1] + b"\x40" + stream[2:], "chunks of 2\\^64 symbols"),
    (lambda stream: b"\x07" + stream[1:], "mode 7"),
    (lambda stream: stream[:2] + b"\xff\x03" + stream[4:], "not an even number from 4 to 514"),
    (lambda stream: stream[:12] + b"\xff" + stream[13:], "entropy table"),
    (lambda stream: stream[:-2], "entropy chunk 0 of 1 spans"),
    (lambda stream: stream + b"\0\0", "entropy chunk 0 of 1 spans"),
    (lambda stream: stream[:-1] + bytes([stream[-1] ^ 1]), "entropy chunks 0 to 0 of 1 do not"),
]


@pytest.mark.parametrize(("damage", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refusals(damage, words):
    stream = _core.entropy_encode(geometric(5000))
    with pytest.raises(krul.CorruptionError, match=words):
        _core.entropy_decode(damage(stream), 5000)


def test_arguments():
    with pytest.raises(ValueError, match="n_symbols is -1"):
        _core.entropy_decode(b"", -1)
    with pytest.raises(ValueError, match="'abacus' does not exist"):
        _core.entropy_encode(b"", backend="abacus")
    with pytest.raises(TypeError):
        _core.entropy_encode("text")
    numbers = np.arange(6, dtype=np.uint8)
    assert _core.entropy_decode(_core.entropy_encode(numbers), 6) == numbers.tobytes()
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        _core.entropy_encode(numbers[::2])
