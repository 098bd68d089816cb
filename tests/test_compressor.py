"""krul.compressor and its C code against the float64 reference, on every backend."""

from __future__ import annotations

import contextlib
import pickle
import sys
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
import strategies
import tolerance
import torch
from hypothesis import given
from reference import compressor_reference as reference

import krul
from krul import _core
from krul.compressor import BLOCK_CODECS as CODECS
from krul.compressor import Block, compress, decompress, token_runs

KEY, VALUE = 0, 1
KV = ("key", "value")
INT_CODECS = {"int8": 8, "int4": 4}
SHARE_CODECS = {"share": 0, "share+int8": 8, "share+int4": 4}
BACKENDS = [name for name, is_usable, _ in _core.backends() if is_usable]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def tensor(values: np.ndarray, dtype: str) -> torch.Tensor:
    """Make a contiguous tensor of a dtype."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(getattr(torch, dtype))


def doubles(values: torch.Tensor) -> np.ndarray:
    return values.double().numpy()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(
        left.contiguous().view(BITS[left.dtype]), right.contiguous().view(BITS[right.dtype])
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.standard_normal(shape) * np.exp(generator.standard_normal(shape[-1]))


def encode(codec: str, kv: int, *arrays, backend: str | None = None, n_threads: int = 1):
    return _core.encode_blocks([(CODECS[codec], kv, arrays)], n_threads, backend)[0]


def decode(used: int, kv: int, payload: bytes, like: torch.Tensor, n_arrays: int = 1, backend=None):
    """Decode into new tensors that stand between guard values; return them."""
    outs, guards = [], []
    for _ in range(n_arrays):
        whole = torch.full((like.numel() + 128,), 77.0, dtype=like.dtype)
        guards.append((whole[:64], whole[64 + like.numel() :]))
        outs.append(whole[64 : 64 + like.numel()].view(like.shape))
    _core.decode_blocks([(used, kv, payload, tuple(outs))], 1, backend)
    for before, after in guards:
        assert bool((before == 77.0).all())
        assert bool((after == 77.0).all())
    return outs


def planes(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *values.shape[-2:])


# ---- int8 and int4 ------------------------------------------------------------------------------


def check_int(codec: str, kv: int, values: torch.Tensor) -> None:
    """Check payload, decoded values and error sums against the reference."""
    bits = INT_CODECS[codec]
    payload, used, error, power = encode(codec, kv, values)
    assert used == CODECS[codec]
    dtype = str(values.dtype).removeprefix("torch.")
    exact = doubles(values)
    (back,) = decode(used, kv, payload, values)
    got = planes(doubles(back))
    stored = reference.read_int(payload, KV[kv], bits, tuple(values.shape))
    for plane, decoded, read in zip(planes(exact), got, stored, strict=True):
        wanted = reference.quantise(plane, KV[kv], bits)
        # Exact: the same bits are in the payload, and decoding them is fixed to the last bit.
        assert np.array_equal(reference.round_to(read.decode(), dtype), decoded)
        # The float32 quotient of range and top may fall on the other side of a bfloat16 tie.
        assert np.all(abs(read.scale - wanted.scale) <= 2.0**-7 * wanted.scale)
        assert np.array_equal(read.minimum, wanted.minimum)
        bound = tolerance.quantised(plane, read.scale, read.minimum, 2**bits - 1, dtype)
        assert np.all(abs(decoded - plane) <= bound)
        best = (plane - read.minimum) / np.where(read.scale > 0, read.scale, 1)
        near = abs(read.codes - best.clip(0, 2**bits - 1))
        assert near.max() <= 0.5 + 2.0**-10
    whole = doubles(back)
    assert error == pytest.approx(((whole - exact) ** 2).sum(), rel=1e-9, abs=1e-300)
    assert power == pytest.approx((exact**2).sum(), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("n_tokens", strategies.N_TOKENS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("kv", [KEY, VALUE], ids=KV)
@pytest.mark.parametrize("codec", INT_CODECS)
def test_int_token_counts(codec, kv, dtype, n_tokens):
    check_int(codec, kv, tensor(noise(2, 3, n_tokens, 64), dtype))


@pytest.mark.parametrize("head_dim", strategies.HEAD_DIMS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("kv", [KEY, VALUE], ids=KV)
@pytest.mark.parametrize("codec", INT_CODECS)
def test_int_head_dims(codec, kv, dtype, head_dim):
    check_int(codec, kv, tensor(noise(1, 2, 65, head_dim), dtype))


@given(data=st.data(), codec=st.sampled_from(sorted(INT_CODECS)), kv=st.sampled_from((KEY, VALUE)))
def test_int_properties(data, codec, kv):
    shape = data.draw(strategies.shapes)
    values = data.draw(strategies.arrays(shape))
    check_int(codec, kv, tensor(values, data.draw(st.sampled_from(strategies.FLOAT_DTYPES))))


@pytest.mark.parametrize("codec", INT_CODECS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_prototype_formula(codec, dtype):
    """The prototype in torch: bfloat16 scale and minimum, codes from the rounded ones."""
    values = tensor(noise(1, 2, 128, 128), dtype)
    for kv, axis in ((KEY, 3), (VALUE, 4)):
        x = values.float()
        groups = x.view(1, 2, 2, 64, 128) if kv == KEY else x.view(1, 2, 128, 2, 64)
        least, greatest = groups.amin(axis, True), groups.amax(axis, True)
        scale = ((greatest - least) / (2 ** INT_CODECS[codec] - 1)).bfloat16().float()
        least = least.bfloat16().float()
        codes = ((groups - least) / scale).round().clamp(0, 2 ** INT_CODECS[codec] - 1)
        wanted = (codes * scale + least).view(values.shape).to(values.dtype)
        payload, used, _, _ = encode(codec, kv, values)
        assert same_bits(decode(used, kv, payload, values)[0], wanted)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-38, 1e-45, 65504.0])
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", INT_CODECS)
def test_constant_block(codec, dtype, value):
    """Scale 0: what comes back is the constant, as precise as bfloat16 holds it."""
    values = tensor(np.full((1, 1, 70, 66), value), dtype)
    for kv in (KEY, VALUE):
        payload, used, _, _ = encode(codec, kv, values)
        if used == CODECS["exact"]:  # 65504 rounds to 65536 in bfloat16, which float16 lacks
            assert dtype == "float16"
            assert value == 65504.0
            continue
        (back,) = decode(used, kv, payload, values)
        exact = doubles(values)
        assert np.all(
            abs(doubles(back) - exact) <= 1.01 * tolerance.one_rounding(exact, "bfloat16")
        )
        if dtype == "bfloat16":
            assert torch.equal(back, values)  # but -0.0 comes back as 0.0


def test_ratios():
    """bfloat16 at head_dim 128, whole groups: the sizes that ALGORITHM.md gives."""
    values = tensor(noise(1, 2, 640, 128), "bfloat16")
    raw = values.numel() * 2
    sizes = {c: len(encode(c, KEY, values)[0]) for c in INT_CODECS}
    assert sizes == {"int8": raw * 8.5 / 16, "int4": raw * 4.5 / 16}
    pair = {c: 2 * raw / len(encode(c, KEY, values, values)[0]) for c in SHARE_CODECS}
    assert pair["share"] > 1.87
    assert pair["share+int8"] > 3.2
    assert pair["share+int4"] > 5.2


# ---- share --------------------------------------------------------------------------------------


def make_pair(shape, dtype: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two layers that are alike, as layers that are chosen to share are."""
    first = noise(*shape, seed=seed)
    second = 1.7 * first + 0.8 * noise(*shape, seed=seed + 1)
    return tensor(first, dtype), tensor(second, dtype)


def check_share(codec: str, kv: int, lower: torch.Tensor, upper: torch.Tensor) -> None:
    bits = SHARE_CODECS[codec]
    dtype = str(lower.dtype).removeprefix("torch.")
    exact = (doubles(lower), doubles(upper))
    payload, used, error, power = encode(codec, kv, lower, upper)
    assert used == CODECS[codec]
    back = decode(used, kv, payload, lower, 2)
    read = reference.read_share(payload, bits, dtype, tuple(lower.shape))
    wanted = reference.share(*exact)
    assert read.kept.size == reference.n_kept_tokens(lower.shape[2])
    for layer, got, decoded in zip(exact, back, read.decode(dtype), strict=True):
        assert np.array_equal(doubles(got), decoded)
        assert np.array_equal(doubles(got)[:, :, read.kept], layer[:, :, read.kept])
    if np.array_equal(read.kept, reference.kept_tokens(*exact)) and bits == 0:
        for layer, got in zip(wanted, back, strict=True):
            assert np.all(abs(doubles(got) - layer) <= tolerance.shared(layer, dtype))
    total = sum(((doubles(g) - e) ** 2).sum() for g, e in zip(back, exact, strict=True))
    assert error == pytest.approx(total, rel=1e-9, abs=1e-300)
    assert power == pytest.approx(sum((e**2).sum() for e in exact), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("n_tokens", strategies.N_TOKENS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", SHARE_CODECS)
def test_share_token_counts(codec, dtype, n_tokens):
    lower, upper = make_pair((2, 3, n_tokens, 64), dtype)
    check_share(codec, KEY, lower, upper)
    kept = reference.kept_tokens(doubles(lower), doubles(upper))
    payload = encode(codec, KEY, lower, upper)[0]
    shape = tuple(lower.shape)
    assert np.array_equal(
        reference.read_share(payload, SHARE_CODECS[codec], dtype, shape).kept, kept
    )


@pytest.mark.parametrize("head_dim", strategies.HEAD_DIMS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", SHARE_CODECS)
def test_share_head_dims(codec, dtype, head_dim):
    check_share(codec, VALUE, *make_pair((1, 2, 65, head_dim), dtype))


@given(data=st.data(), codec=st.sampled_from(sorted(SHARE_CODECS)))
def test_share_properties(data, codec):
    shape = data.draw(strategies.shapes)
    dtype = data.draw(st.sampled_from(strategies.FLOAT_DTYPES))
    lower = data.draw(strategies.arrays(shape))
    upper = lower * 1.5 + 0.5 * data.draw(strategies.arrays(shape))
    check_share(codec, KEY, tensor(lower, dtype), tensor(upper, dtype))


@pytest.mark.parametrize("codec", SHARE_CODECS)
def test_divergent_tokens_are_kept(codec):
    """It is the tokens that differ most, not those that are alike, that stay in full."""
    lower, upper = make_pair((1, 4, 200, 64), "bfloat16")
    divergent = [3, 57, 58, 101, 140, 141, 142, 177, 198, 199]
    upper[:, :, divergent] = -lower[:, :, divergent]
    payload, used, _, _ = encode(codec, KEY, lower, upper)
    read = reference.read_share(payload, SHARE_CODECS[codec], "bfloat16", (1, 4, 200, 64))
    assert read.kept.tolist() == divergent
    back = decode(used, KEY, payload, lower, 2)
    for layer, got in zip((lower, upper), back, strict=True):
        assert same_bits(got[:, :, divergent], layer[:, :, divergent])


def test_ties_keep_the_first_tokens():
    lower, _ = make_pair((1, 2, 100, 64), "float32")
    payload, _, _, _ = encode("share", KEY, lower, lower)
    read = reference.read_share(payload, 0, "float32", (1, 2, 100, 64))
    assert read.kept.tolist() == [0, 1, 2, 3, 4]


@given(data=st.data(), dtype=st.sampled_from(strategies.FLOAT_DTYPES))
def test_identical_layers_come_back(data, dtype):
    """Direction and magnitude are rounded, nothing else happens."""
    shape = data.draw(strategies.shapes)
    values = tensor(data.draw(strategies.arrays(shape)), dtype)
    payload, used, _, _ = encode("share", KEY, values, values)
    assert used == CODECS["share"]
    exact = doubles(values)
    for back in decode(used, KEY, payload, values, 2):
        assert np.all(abs(doubles(back) - exact) <= tolerance.shared(exact, dtype))


def test_sharing_weighs_the_upper_layer_more():
    """SLERP: 0.6 of the way from the lower to the upper layer's direction."""
    lower = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    upper = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
    payload, used, _, _ = encode("share", KEY, lower, upper)
    below, above = decode(used, KEY, payload, lower, 2)
    omega = 0.6 * np.pi / 2
    assert below.flatten().tolist() == pytest.approx([np.cos(omega), np.sin(omega)], rel=1e-6)
    assert above.flatten().tolist() == pytest.approx(
        [2 * np.cos(omega), 2 * np.sin(omega)], rel=1e-6
    )


@pytest.mark.parametrize("codec", SHARE_CODECS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_zero_and_opposite_vectors(codec, dtype):
    lower = tensor(noise(1, 1, 10, 64), dtype)
    upper = lower.clone()
    upper[:, :, 0] = 0
    lower[:, :, 1] = 0
    lower[:, :, 2] = 0
    upper[:, :, 2] = 0
    upper[:, :, 3] = -lower[:, :, 3]
    upper[:, :, 4] = -lower[:, :, 4] * 1.01
    upper[:, :, 5] = lower[:, :, 5] * 1.001
    payload, used, _, _ = encode(codec, KEY, lower, upper)
    assert used == CODECS[codec]
    below, above = decode(used, KEY, payload, lower, 2)
    assert bool(below.isfinite().all())
    assert bool(above.isfinite().all())
    for got, at in ((above, 0), (below, 1), (below, 2), (above, 2)):
        assert bool((got[:, :, at] == 0).all())
    for layer, got in ((lower, below), (upper, above)):
        norms = got.double().norm(dim=-1), layer.double().norm(dim=-1)
        relative = {0: 0.01, 8: 0.02, 4: 0.2}[SHARE_CODECS[codec]]  # lengths survive, about
        assert torch.allclose(*norms, rtol=relative, atol=0)


@pytest.mark.parametrize("codec", SHARE_CODECS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
def test_either_half_alone(codec, dtype):
    lower, upper = make_pair((2, 2, 131, 96), dtype)
    payload, used, _, _ = encode(codec, VALUE, lower, upper)
    both = decode(used, VALUE, payload, lower, 2)
    for wanted in (0, 1):
        out = torch.full_like(lower, 5)
        arrays = [None, None]
        arrays[wanted] = out
        _core.decode_blocks([(used, VALUE, payload, arrays)], 1)
        assert same_bits(out, both[wanted])


# ---- all codecs ---------------------------------------------------------------------------------


def layers_of(codec: str) -> int:
    return 2 if codec.startswith("share") else 1


@given(data=st.data(), codec=st.sampled_from(sorted(CODECS)), kv=st.sampled_from((KEY, VALUE)))
def test_backends_agree_to_the_bit(data, codec, kv):
    shape = data.draw(strategies.shapes)
    dtype = data.draw(st.sampled_from(strategies.FLOAT_DTYPES))
    scale = data.draw(st.sampled_from((1.0, 1e-30, 1e-41, 1e4, 1e30)))
    arrays = [
        tensor(data.draw(strategies.arrays(shape, scale)), dtype) for _ in range(layers_of(codec))
    ]
    results = [encode(codec, kv, *arrays, backend=name) for name in BACKENDS]
    assert all(result == results[0] for result in results)
    payload, used, _, _ = results[0]
    decoded = [decode(used, kv, payload, arrays[0], len(arrays), name) for name in BACKENDS]
    for outs in decoded[1:]:
        assert all(map(same_bits, outs, decoded[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_large_block_is_written_past_the_caches(codec, dtype, backend):
    """Above half a MiB other store instructions are used, where rows are aligned; same values."""
    lower, upper = make_pair((1, 2, 2050, 128), dtype)
    arrays = (lower, upper)[: layers_of(codec)]
    payload, used, _, _ = encode(codec, VALUE, *arrays)
    small = [torch.empty_like(lower) for _ in arrays]
    for head in range(2):  # one head at a time stays below, and is coded the same
        part = [array[:, head : head + 1, :700] for array in arrays]
        piece = encode(codec, VALUE, *part)
        outs = [array[:, head : head + 1, :700] for array in small]
        _core.decode_blocks([(piece[1], VALUE, piece[0], outs)], 1, backend)
    for offset in (0, 1):
        whole = [torch.zeros(lower.numel() + 64, dtype=lower.dtype) for _ in arrays]
        outs = [array[offset : offset + lower.numel()].view(lower.shape) for array in whole]
        _core.decode_blocks([(used, VALUE, payload, outs)], 1, backend)
        wanted = decode(used, VALUE, payload, lower, len(arrays), "scalar")
        assert all(map(same_bits, outs, wanted))
        if layers_of(codec) == 1:  # what is kept in full depends on the block
            assert all(
                same_bits(o[:, :, :700], s[:, :, :700]) for o, s in zip(outs, small, strict=True)
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_strided_views(codec, dtype, backend):
    """Tokens of a larger cache, heads behind tokens, padded rows: same payload, same values."""
    arrays = make_pair((2, 3, 70, 80), dtype)[: layers_of(codec)]
    payload, used, error, power = encode(codec, KEY, *arrays, backend=backend)
    inside, swapped = [], []
    for array in arrays:
        big = torch.full((2, 3, 100, 96), 9.0, dtype=array.dtype)
        big[:, :, 20:90, 8:88] = array
        inside.append(big[:, :, 20:90, 8:88])
        swapped.append(array.transpose(1, 2).contiguous().transpose(1, 2))
    for views in (inside, swapped):
        again = encode(codec, KEY, *views, backend=backend)
        assert again[:2] == (payload, used)
        assert again[2:] == pytest.approx((error, power), rel=1e-12)  # summed row by row
    wanted = decode(used, KEY, payload, arrays[0], len(arrays), backend)
    for view in inside:
        view.fill_(3.0)
    _core.decode_blocks([(used, KEY, payload, inside)], 1, backend)
    assert all(map(same_bits, inside, wanted))
    for view in inside:
        view.fill_(9.0)
        assert bool((view._base == 9.0).all())  # nothing around the view was written


def bad_blocks():
    huge = {"float32": 3e38, "float16": 65504.0, "bfloat16": 3e38}
    for dtype in strategies.FLOAT_DTYPES:
        for name, value in (
            ("nan", np.nan),
            ("inf", np.inf),
            ("-inf", -np.inf),
            ("huge", huge[dtype]),
        ):
            for at in ((0, 0, 0, 0), (1, 1, 66, 65), (0, 1, 33, 31)):
                yield pytest.param(dtype, value, at, id=f"{dtype}-{name}-{at[2]}")


@pytest.mark.parametrize(("dtype", "value", "at"), list(bad_blocks()))
@pytest.mark.parametrize("codec", [c for c in CODECS if c != "exact"])
def test_what_does_not_fit_falls_back(codec, dtype, value, at):
    """Not finite: exact, bit for bit. Huge: exact as well, or finite and near."""
    arrays = [a.clone() for a in make_pair((2, 2, 67, 66), dtype)[: layers_of(codec)]]
    arrays[-1][at] = value
    if np.isfinite(value):
        arrays[-1][at[0], at[1], (at[2] + 1) % 67, at[3]] = -value
    for kv in (KEY, VALUE):
        for backend in BACKENDS:
            payload, used, _, _ = encode(codec, kv, *arrays, backend=backend)
            back = decode(used, kv, payload, arrays[0], len(arrays), backend)
            if used == CODECS["exact"]:
                assert all(map(same_bits, back, arrays))
            else:
                assert np.isfinite(value)
                assert all(bool(b.isfinite().all()) for b in back)
            if not np.isfinite(value):
                assert used == CODECS["exact"]


def test_range_that_no_scale_holds_falls_back():
    """max - min overflows float32: garbage if it were coded."""
    values = torch.zeros(1, 1, 64, 64)
    values[0, 0, 0] = 3e38
    values[0, 0, 1] = -3e38
    assert encode("int8", KEY, values)[1] == CODECS["exact"]
    assert encode("int4", KEY, values)[1] == CODECS["exact"]


@given(data=st.data(), codec=st.sampled_from(sorted(CODECS)), kv=st.sampled_from((KEY, VALUE)))
def test_any_floats_come_back_finite_or_exact(data, codec, kv):
    dtype = data.draw(st.sampled_from(strategies.FLOAT_DTYPES))
    size = data.draw(st.integers(1, 24))
    drawn = st.lists(strategies.any_float, min_size=2 * size, max_size=2 * size)
    values = np.array(data.draw(drawn), np.float32).reshape(2, 1, 1, -1, 1 + size % 2 * 0)
    arrays = [tensor(v, dtype) for v in values][: layers_of(codec)]
    payload, used, _, _ = encode(codec, kv, *arrays)
    back = decode(used, kv, payload, arrays[0], len(arrays))
    for array, got in zip(arrays, back, strict=True):
        if used == CODECS["exact"]:
            assert same_bits(array, got)
        else:
            assert bool(array.isfinite().all())
            assert bool(got.isfinite().all())


@given(data=st.data(), codec=st.sampled_from(sorted(set(CODECS) - {"exact"})))
def test_damaged_payload_is_refused_or_harmless(data, codec):
    """Any length but the right one is refused; any byte may be anything and nothing else is hit."""
    arrays = make_pair((1, 2, 66, 67), "bfloat16")[: layers_of(codec)]
    payload, used, _, _ = encode(codec, VALUE, *arrays)
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(0, len(payload) - 1), st.integers(0, 40)))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(payload) + 9))
    with contextlib.suppress(krul.CorruptionError):
        decode(used, VALUE, bytes(damaged), arrays[0], len(arrays))
    if cut != len(payload):
        wrong = (bytes(damaged) + bytes(9))[:cut]
        with pytest.raises(krul.CorruptionError, match=f"has {cut} bytes .* needs {len(payload)}"):
            decode(used, VALUE, wrong, arrays[0], len(arrays))


@pytest.mark.parametrize("codec", CODECS)
def test_empty_blocks(codec):
    arrays = [torch.empty(1, 2, 0, 64) for _ in range(layers_of(codec))]
    payload, used, error, power = encode(codec, KEY, *arrays)
    assert (error, power) == (0.0, 0.0)
    decode(used, KEY, payload, arrays[0], len(arrays))


def test_many_jobs_and_threads_give_the_same():
    lower, upper = make_pair((1, 2, 300, 64), "bfloat16")
    jobs = []
    for codec in CODECS:
        arrays = (lower, upper)[: layers_of(codec)]
        jobs += [(CODECS[codec], kv, arrays) for kv in (KEY, VALUE)] * 3
    alone = _core.encode_blocks(jobs, n_threads=1)
    assert _core.encode_blocks(iter(jobs), n_threads=2) == alone
    for n_threads in (1, 2):
        decoding, outs = [], []
        for (payload, used, _, _), (_, kv, arrays) in zip(alone, jobs, strict=True):
            outs.append([torch.empty_like(a) for a in arrays])
            decoding.append((used, kv, memoryview(payload), outs[-1]))
        _core.decode_blocks(decoding, n_threads)
        for result, (payload, used, _, _), (_, kv, arrays) in zip(outs, alone, jobs, strict=True):
            wanted = decode(used, kv, payload, arrays[0], len(arrays))
            assert all(map(same_bits, result, wanted))


def test_calls_from_several_threads():
    lower, upper = make_pair((1, 2, 200, 64), "bfloat16")
    wanted = encode("share+int4", KEY, lower, upper)
    results = [None] * 4
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        barrier.wait()
        results[index] = [encode("share+int4", KEY, lower, upper, n_threads=2) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == [wanted] * 5 for result in results)


def good_job(**changes):
    values = {"codec": CODECS["int8"], "kv": KEY, "arrays": (np.zeros((4, 8), np.float32),)}
    values |= changes
    return values["codec"], values["kv"], values["arrays"]


def read_only() -> np.ndarray:
    array = np.zeros((4, 8), np.float32)
    array.flags.writeable = False
    return array


class Emptying:
    """A producer that empties the list it stands in while it is asked."""

    def __init__(self, jobs):
        self.jobs = jobs

    def __dlpack__(self, **_):
        self.jobs.clear()
        return torch.zeros(4, 8).__dlpack__()


F32 = np.zeros((4, 8), np.float32)
PAIR = (np.zeros((4, 8), np.float32), np.zeros((4, 8), np.float32))
REFUSED_ENCODING = [
    (good_job(codec=99), ValueError, "codec is 99, which is no codec"),
    (good_job(kv=2), ValueError, r"kv is 2 but must be 0 \(key\) or 1 \(value\)"),
    (good_job(arrays=()), ValueError, r"jobs\[0\] has 0 arrays but must have 1 to 2"),
    (good_job(arrays=(F32,) * 3), ValueError, r"jobs\[0\] has 3 arrays but must have 1 to 2"),
    (good_job(arrays=PAIR), krul.ShapeError, "codec 'int8' takes 1 view but got 2"),
    (good_job(codec=4), krul.ShapeError, "codec 'share' takes 2 views but got 1"),
    (
        good_job(codec=4, arrays=(F32, np.zeros((4, 9), np.float32))),
        krul.ShapeError,
        r"views\[0\] is \(1, 1, 4, 8\) but views\[1\] is \(1, 1, 4, 9\)",
    ),
    (
        good_job(codec=4, arrays=(F32, np.zeros((4, 8), np.float16))),
        krul.DTypeError,
        r"views\[0\] is float32 but views\[1\] is float16",
    ),
    (good_job(arrays=(np.zeros((4, 8)),)), krul.DTypeError, r"jobs\[0\] array 0 has buffer format"),
    (good_job(arrays=(np.zeros((4, 8), np.float32).T,)), krul.ShapeError, r"jobs\[0\] array 0"),
    (good_job(arrays=(np.zeros((1,) * 5, np.float32),)), krul.ShapeError, "has 5 dimensions"),
    (good_job(arrays=("text",)), TypeError, r"jobs\[0\] array 0 is str but must be an array"),
    (good_job(arrays=(None,)), TypeError, r"jobs\[0\] array 0 is NoneType but must be an array"),
    (good_job(arrays=7), TypeError, "not iterable"),
    ((2, 0), TypeError, r"a job is \(codec, kv, arrays\)"),
    (5, TypeError, "not iterable"),
]


@pytest.mark.parametrize(("job", "exception", "words"), REFUSED_ENCODING)
def test_encoding_refuses(job, exception, words):
    with pytest.raises(exception, match=words):
        _core.encode_blocks([job], 1)


SHARED_MEMORY = np.zeros(4 * 8 + 8, np.float32)
REFUSED_DECODING = [
    ((2, 0, b"", (F32,)), krul.CorruptionError, "has 0 bytes but the block's shape needs 64"),
    ((2, 0, bytes(64), (read_only(),)), ValueError, "read-only"),
    ((2, 0, bytes(64), (None,)), ValueError, r"jobs\[0\] has no array but None"),
    ((4, 0, bytes(64), (None, None)), ValueError, r"jobs\[0\] has no array but None"),
    ((2, 0, "text", (F32,)), TypeError, "bytes-like"),
    ((2, 0, bytes(64)), TypeError, r"a job is \(codec, kv, payload, arrays\)"),
    ((0, 0, bytes(64), (F32,)), ValueError, "codec is 0, which is no codec"),
    ((2, 9, bytes(64), (F32,)), ValueError, "kv is 9 but must be"),
    ((2, 0, bytes(64), PAIR), krul.ShapeError, "takes 1 view but got 2"),
    ((2, 0, F32.view(np.uint8).reshape(-1)[:64], (F32,)), ValueError, "shares memory with views"),
    (
        (4, 0, bytes(64), (SHARED_MEMORY[:32].reshape(4, 8), SHARED_MEMORY[8:].reshape(4, 8))),
        ValueError,
        r"views\[1\] may share memory with views\[0\]",
    ),
    (
        (2, 0, bytes(64), (np.lib.stride_tricks.as_strided(SHARED_MEMORY, (4, 8), (4, 4)),)),
        (ValueError, krul.ShapeError),
        r"jobs\[0\] array 0",
    ),
    (
        (2, 0, b"\xff\xff" * 8 + bytes(48), (F32,)),
        krul.CorruptionError,
        "scale or minimum that no encoder writes",
    ),
]


@pytest.mark.parametrize(("job", "exception", "words"), REFUSED_DECODING)
def test_decoding_refuses(job, exception, words):
    with pytest.raises(exception, match=words):
        _core.decode_blocks([job], 1)


def test_kept_positions_are_checked():
    lower, upper = make_pair((1, 1, 60, 8), "float32")
    payload, used, _, _ = encode("share", KEY, lower, upper)
    for positions, words in (
        ((5, 5, 6), "keeps token 5 after token 5 of 60"),
        ((1, 2, 60), "keeps token 60 after token 2 of 60"),
        ((9, 3, 10), "keeps token 3 after token 9 of 60"),
    ):
        damaged = np.array(positions, "<u4").tobytes() + payload[12:]
        with pytest.raises(krul.CorruptionError, match=words):
            decode(used, KEY, damaged, lower, 2)


def test_calls_refuse():
    with pytest.raises(ValueError, match="n_threads is -1 but must be 0"):
        _core.encode_blocks([], -1)
    with pytest.raises(ValueError, match="n_threads is 257 but must be 0"):
        _core.decode_blocks([], 257)
    with pytest.raises(ValueError, match="'abacus'"):
        _core.encode_blocks([], 1, "abacus")
    with pytest.raises(TypeError, match="not iterable"):
        _core.encode_blocks(3)


def test_first_failure_is_named():
    jobs = [good_job(), good_job(kv=5), good_job(codec=77)]
    with pytest.raises(ValueError, match=r"^jobs\[1\]: kv is 5"):
        _core.encode_blocks(jobs, 2)


def test_producer_that_empties_the_list():
    jobs = []
    jobs += [good_job(arrays=(Emptying(jobs),)), good_job(), good_job()]
    assert len(_core.encode_blocks(jobs, 1)) == 3
    assert jobs == []


def test_references_are_given_back():
    good = np.zeros((4, 8), np.float32)
    payload = encode("int8", KEY, good)[0]
    before = sys.getrefcount(good), sys.getrefcount(payload)
    for _ in range(3):
        encode("int8", KEY, good)
        _core.decode_blocks([(2, KEY, payload, (good,))], 1)
        for job in ((2, KEY, b"", (good,)), (2, 7, payload, (good,)), (4, 0, payload, (good, 3))):
            with pytest.raises((ValueError, TypeError)):
                _core.decode_blocks([job], 1)
        del job
    assert (sys.getrefcount(good), sys.getrefcount(payload)) == before


# ---- krul.compressor ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", strategies.FLOAT_DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_compress_and_decompress(codec, dtype):
    arrays = make_pair((2, 70, 64), dtype)[: layers_of(codec)]
    block = compress(codec, "key", *arrays)
    assert (block.codec, block.kv, block.dtype) == (codec, "key", dtype)
    assert (block.shape, block.n_arrays) == ((2, 70, 64), len(arrays))
    assert block.raw_bytes == sum(array.nbytes for array in arrays)
    assert block.ratio == pytest.approx(block.raw_bytes / len(block.payload))
    outs = tuple(torch.empty_like(array) for array in arrays)
    assert decompress(block, outs) is outs
    error = sum(((o.double() - a.double()) ** 2).sum() for o, a in zip(outs, arrays, strict=True))
    power = sum((a.double() ** 2).sum() for a in arrays)
    assert block.relative_error == pytest.approx(float((error / power) ** 0.5), rel=1e-6, abs=1e-12)
    assert pickle.loads(pickle.dumps(block)) == block
    assert Block(**block.to_dict()) == block


def test_decompress_makes_numpy_arrays():
    values = noise(3, 64).astype(np.float16)
    block = compress("exact", "value", values)
    back = decompress(block)
    assert back.dtype == np.float16
    assert np.array_equal(back, values)
    pair = decompress(compress("share", "value", values, values))
    assert [array.shape for array in pair] == [(3, 64)] * 2
    only = np.empty_like(values)
    assert decompress(block, only) is only
    assert np.array_equal(only, values)


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (
            lambda b: compress("zip", "key", F32),
            ValueError,
            "codec is 'zip' but must be one of exact",
        ),
        (
            lambda b: compress("int8", "query", F32),
            ValueError,
            "kv is 'query' but must be one of key",
        ),
        (lambda b: compress("int8", "key"), ValueError, "has 0 arrays"),
        (
            lambda b: decompress(b, np.zeros((4, 9), np.float32)),
            krul.ShapeError,
            r"\(4, 9\).*\(4, 8\)",
        ),
        (
            lambda b: decompress(b, np.zeros((4, 8), np.float16)),
            krul.DTypeError,
            "float16.*float32",
        ),
        (lambda b: decompress(b, [F32, F32]), krul.ShapeError, "out has 2 arrays but block has 1"),
        (
            lambda b: decompress(compress("exact", "key", torch.zeros(2, 2).bfloat16())),
            krul.DTypeError,
            "block is bfloat16, which NumPy has not",
        ),
    ],
)
def test_functions_refuse(call, exception, words):
    with pytest.raises(exception, match=words):
        call(compress("int8", "key", F32))


@given(
    start=st.integers(0, 10_000),
    n_tokens=st.integers(0, 10_000),
    bytes_per_token=st.integers(1, 8_000_000),
    first_exact=st.integers(0, 8),
)
def test_token_runs(start, n_tokens, bytes_per_token, first_exact):
    n_tokens = min(n_tokens, 64 * 4 * 1024 * 1024 // bytes_per_token + 1)
    end = start + n_tokens
    runs = token_runs(start, end, bytes_per_token, first_exact)
    assert [token for run in runs for token in range(*run)] == list(range(start, end))
    assert all(b > a and ((b - a) * bytes_per_token <= 2**22 or b - a == 1) for a, b in runs)
    assert all(b - a <= 512 for a, b in runs)
    rest = [run for run in runs if run[1] > first_exact]
    assert all(a >= first_exact for a, _ in rest)
    if bytes_per_token <= 2**16:
        assert all((a - rest[0][0]) % 64 == 0 for a, _ in rest)
    assert len(rest) <= 1 or rest[0][1] - rest[0][0] == rest[-2][1] - rest[-2][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 4, 1, 4), "token_start is 5 but token_end is 4"),
        ((-1, 4, 1, 4), "token_start is -1 but token_end is 4"),
        ((0, 4, 0, 4), "bytes_per_token is 0 but must be at least 1"),
        ((0, 4, 1, -2), "first_exact is -2 but must be at least 0"),
    ],
)
def test_token_runs_refuse(arguments, words):
    with pytest.raises(ValueError, match=words):
        token_runs(*arguments)
