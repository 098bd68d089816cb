"""The store: containers against a reference, conversations, and every way to be wrong."""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from reference import store_reference as reference

import krul
from krul import _core, errors
from krul.store import (
    ConversationFiles,
    Entry,
    LayerLayout,
    Manifest,
    SegmentInfo,
    Store,
    _lock,
    _unlock,
)

FULL = LayerLayout("full", 2, 8, 4, None, "float32", "bfloat16")
SLIDING = LayerLayout("sliding", 1, 8, 8, 6, "float16", "float16")
NONE = LayerLayout("none", 0, 0, 0, None, "float32", "float32")
LAYERS = (FULL, SLIDING, NONE, FULL)
DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3}


@pytest.fixture(scope="session")
def make(root):
    """Return the generator of the data files as a module."""
    spec = importlib.util.spec_from_file_location("data_make", root / "tests/data/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


def make_blocks(token_start, token_end, seed=0, layers=LAYERS, n_batch=1):
    """Blocks for every layer; what a sliding layer holds begins before the segment."""
    entries, payloads = [], []
    random = np.random.default_rng(seed)
    for layer, layout in enumerate(layers):
        if layout.kind == "none":
            continue
        held = token_start if layout.kind == "full" else max(0, token_end - layout.window)
        middle = (held + token_end) // 2
        for kv, head_dim, dtype in (
            (0, layout.key_head_dim, layout.key_dtype),
            (1, layout.value_head_dim, layout.value_dtype),
        ):
            for start, end in ((held, middle), (middle, token_end)):
                if start < end:
                    shape = (n_batch, layout.n_kv_heads, head_dim)
                    entries.append(
                        Entry(1, 1, kv, DTYPES[dtype], layer, -1, *shape, start, end - start)
                    )
                    payloads.append(random.bytes(int(random.integers(1, 300))))
    return entries, payloads


def make_manifest(n_tokens, segments=None, **more):
    if segments is None:
        segments = (SegmentInfo("", 0, n_tokens),) if n_tokens else ()
    numbers = {"token_ids": np.arange(n_tokens)[None], "layers": LAYERS, "segments": segments}
    return Manifest(**(numbers | {"fingerprint": {"exact": "f00d"}} | more))


def save_first(files, n_tokens=9, seed=0, **more):
    return files.commit(make_manifest(n_tokens, **more), *make_blocks(0, n_tokens, seed))


def save_more(files, result, n_tokens, seed=1):
    old = result.manifest
    segments = (*old.segments, SegmentInfo("", old.n_tokens, n_tokens - old.n_tokens))
    manifest = make_manifest(n_tokens, segments)
    blocks = make_blocks(old.n_tokens, n_tokens, seed)
    return files.commit(manifest, *blocks, expected_generation=result.generation)


def read_payloads(files, info):
    fd, entries = files.open_segment(info)
    try:
        return [_core.store_read_payload(fd, entry) for entry in entries]
    finally:
        os.close(fd)


def names(files):
    return sorted(os.listdir(files.path))


def write_file(path, data):
    path.write_bytes(data)
    return path


# ---- containers ---------------------------------------------------------------------------------


@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1))
def test_crc32c_is_the_definition(data, crc):
    assert _core.crc32c(data, crc) == reference.crc32c(data, crc)


def test_crc32c_vectors_and_refusals():
    assert _core.crc32c(b"123456789") == 0xE3069283
    assert _core.crc32c(bytearray(32)) == 0x8A9136AA
    assert _core.crc32c(np.full(32, 255, np.uint8)) == 0x62A8AB43
    big = np.arange(1 << 17, dtype=np.uint8).tobytes()
    assert _core.crc32c(big[1000:], _core.crc32c(big[:1000])) == _core.crc32c(big)
    with pytest.raises(ValueError, match="crc is -1 but must be from 0 to 4294967295"):
        _core.crc32c(b"", -1)
    with pytest.raises(ValueError, match="crc is 4294967296"):
        _core.crc32c(b"", 1 << 32)
    with pytest.raises(TypeError):
        _core.crc32c("text")
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        _core.crc32c(np.zeros((4, 4), np.uint8)[:, ::2])


small = st.integers(-2, 70_000) | st.sampled_from([2**31 - 1, -(2**31)])
wide = st.integers(-2, 100) | st.integers(-(2**62), 2**62) | st.sampled_from([2**25, 2**30])
rows = st.builds(
    reference.Row,
    kind=st.integers(0, 8),
    codec=st.integers(0, 8),
    kv=st.integers(0, 2),
    dtype=st.integers(0, 4),
    layer_lower=small,
    layer_upper=small | st.just(-1),
    n_batch=st.integers(0, 70_000),
    n_heads=st.integers(0, 70_000),
    head_dim=st.integers(0, 70_000),
    token_start=wide,
    n_tokens=wide,
)
blocks = st.builds(
    reference.block,
    layer=st.integers(0, 3),
    kv=st.integers(0, 1),
    token_start=st.integers(0, 20),
    n_tokens=st.integers(1, 9),
    codec=st.integers(1, 3),
)


@given(st.lists(blocks | rows, max_size=5), st.integers(1, 2), st.data())
def test_parse_agrees_with_the_reference(found, kind, data):
    """Whatever a table with right checksums says, both accept it or both refuse it."""
    if data.draw(st.booleans()):
        found.sort(key=lambda row: (row.layer_lower, row.kv, row.token_start))
    payloads = [data.draw(st.binary(max_size=70)) for _ in found]
    file = reference.write(kind, found, payloads)
    wanted = reference.parse(file)
    if wanted is None:
        with pytest.raises(errors.FormatError):
            _core.store_parse(file)
    else:
        entries = [row.to_tuple() for row in wanted[1]]
        assert _core.store_parse(file) == (wanted[0], 1, len(file), entries)


@given(st.binary(max_size=400), st.integers(0, 500))
def test_parse_of_noise_is_refused(noise, start):
    good = reference.write(2, [reference.block()], [b"payload"])
    for data in (noise, good[:start] + noise, noise + good):
        if data != good:
            with pytest.raises((errors.FormatError, errors.CorruptionError)):
                _core.store_parse(data)


@given(st.lists(blocks, min_size=1, max_size=6), st.data())
def test_writes_the_bytes_of_the_reference(tmp_path_factory, found, data):
    found.sort(key=lambda row: (row.layer_lower, row.kv, row.token_start))
    payloads = [data.draw(st.binary(min_size=1, max_size=200)) for _ in found]
    tuples = [row.to_tuple() for row in found]
    wanted = reference.write(2, found, payloads)
    directory = tmp_path_factory.mktemp("written")
    fd = os.open(directory, os.O_RDONLY)
    try:
        if reference.parse(wanted) is None:
            with pytest.raises(ValueError, match="comes after"):
                _core.store_write(fd, "file", 2, tuples, payloads)
            assert os.listdir(directory) == []
        else:
            assert _core.store_write(fd, "file", 2, tuples, payloads) == len(wanted)
            assert (directory / "file").read_bytes() == wanted
    finally:
        os.close(fd)


def test_golden_containers(root, make, tmp_path):
    """Files of version 1 are written the same and read the same for ever."""
    golden = root / "tests/data/golden"
    rows, payloads = make.blocks()
    fd = os.open(tmp_path, os.O_RDONLY)
    _core.store_write(fd, "written", 2, [row.to_tuple() for row in rows], payloads)
    os.close(fd)
    assert (tmp_path / "written").read_bytes() == (golden / "v1-segment").read_bytes()

    fd = os.open(golden / "v1-segment", os.O_RDONLY)
    kind, version, file_bytes, entries = _core.store_read_head(fd)
    assert (kind, version, file_bytes) == (2, 1, os.path.getsize(golden / "v1-segment"))
    assert [_core.store_read_payload(fd, entry) for entry in entries] == payloads
    os.close(fd)


def test_golden_manifest(root, make, store):
    files = store.files("chat/42")
    os.mkdir(files.path)
    data = (root / "tests/data/golden/v1-manifest").read_bytes()
    write_file(tmp_path_of(files) / "manifest", data)
    manifest = files.read_manifest()
    assert manifest.conversation_id == "chat/42"
    assert manifest.tenant == "default"
    assert manifest.generation == 3
    assert manifest.fingerprint == {"exact": "0123456789abcdef"}
    assert manifest.token_ids.tolist() == [[1, 2, 3, 2**40, 5]]
    assert manifest.token_ids.dtype == np.int64
    assert manifest.attention_mask.tolist() == [[0, 1, 1, 1, 1]]
    assert manifest.positions.tolist() == [[0, 0, 1, 2, 3]]
    assert manifest.behaviour.tolist() == [0.5, -2.0, np.float32(1e-3)]
    assert [layer.kind for layer in manifest.layers] == ["full", "sliding", "none"]
    assert manifest.layers[1].window == 16
    assert manifest.segments[0].strategy == {"codec": "int8"}
    assert manifest.segments[0].guard == {"mean_kl": 0.25}
    assert manifest.settings == {"codec": "auto"}
    assert (manifest.created_s, manifest.updated_s) == (1700000000.5, 1700000001.0)


def tmp_path_of(files):
    import pathlib

    return pathlib.Path(files.path)


def test_golden_payloads_decode_the_same(root):
    golden = root / "tests/data/golden"
    digests = json.loads((golden / "v1-codecs.json").read_text())
    fd = os.open(golden / "v1-codecs", os.O_RDONLY)
    entries = [Entry._make(entry) for entry in _core.store_read_head(fd)[3]]
    assert len(entries) == len(digests)
    for entry, digest in zip(entries, digests.values(), strict=True):
        payload = _core.store_read_payload(fd, entry)
        shape = (entry.n_batch, entry.n_heads, entry.n_tokens, entry.head_dim)
        dtype = {1: np.float32, 2: np.float16}[entry.dtype]
        out = [np.zeros(shape, dtype) for _ in range(1 if entry.layer_upper < 0 else 2)]
        _core.decode_blocks([(entry.codec, entry.kv, payload, out)])
        assert hashlib.sha256(b"".join(a.tobytes() for a in out)).hexdigest() == digest
    os.close(fd)


def test_data_files_are_what_their_generator_makes(root):
    made = subprocess.run(
        [sys.executable, str(root / "tests/data/make.py"), "--check"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")


def test_malformed_files_are_refused(root, make, tmp_path):
    """One file per way to be wrong, each with its exception and the words that name the fault."""
    cases = make.cases()
    on_disk = {path.name for path in (root / "tests/data/malformed").iterdir()}
    assert on_disk == {name for name, case in cases.items() if len(case[0]) < 1 << 16}
    for name, (data, exception, words) in cases.items():
        with Store(tmp_path / name) as store:
            files = store.files("chat/42")
            os.mkdir(files.path)
            write_file(tmp_path_of(files) / "manifest", data)
            # What is wrong with a segment shows when it is read as one.
            is_segment = data[12:13] == b"\2" and name != "meta-in-segment"
            path = tmp_path_of(files) / "manifest"
            read = functools.partial(read_whole, path) if is_segment else files.read_manifest
            with pytest.raises(getattr(errors, exception)) as caught:
                read()
            assert words in str(caught.value), name
            assert type(caught.value).__name__ == exception, name
            if not is_segment:
                assert files.path in str(caught.value)
                assert [p.file for p in store.verify("chat/42")] == ["manifest"]


def read_whole(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        return [_core.store_read_payload(fd, entry) for entry in _core.store_read_head(fd)[3]]
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("entry", "exception", "words"),
    [
        ((1,) * 13, TypeError, "tuple of 14 integers"),
        ([1] * 14, TypeError, "tuple of 14 integers"),
        (("x",) + (0,) * 13, TypeError, "integer"),
        ((2**40,) + (0,) * 13, ValueError, "kind is 1099511627776 but must be from"),
        ((2,) + (0,) * 8 + (-1,) + (0,) * 4, ValueError, "token_start is -1"),
        ((2,) + (0,) * 12 + (2**32,), ValueError, "payload_crc32c is 4294967296"),
        ((2,) + (0,) * 10 + (2**63, 0, 0), ValueError, "offset is 9223372036854775808"),
        ((9,) + (0,) * 13, ValueError, "kind is 9"),
        ((1,) + (0,) * 13, ValueError, "codec is 0"),
    ],
)
def test_entries_from_python_are_checked(tmp_path, entry, exception, words):
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(exception, match=words):
        _core.store_read_payload(fd, entry)
    os.close(fd)


def test_calls_are_checked(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    rows = [(2,) + (0,) * 13, (3,) + (0,) * 13]
    with pytest.raises(ValueError, match="entries has 2 items and payloads 1"):
        _core.store_write(fd, "name", 1, rows, [b"{}"])
    with pytest.raises(TypeError, match="bytes-like"):
        _core.store_write(fd, "name", 1, rows, [b"{}", "text"])
    with pytest.raises(ValueError, match="must have 1 to 128 bytes, no slash"):
        _core.store_write(fd, "../name", 1, rows, [b"{}", b""])
    with pytest.raises(ValueError, match="null"):
        _core.store_write(fd, "na\0me", 1, rows, [b"{}", b""])
    with pytest.raises(ValueError, match="kind of file is 3"):
        _core.store_write(fd, "name", 3, rows, [b"{}", b""])
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        _core.store_write(fd, "name", 1, rows, [b"{}", np.zeros((2, 4))[:, ::2]])
    with pytest.raises(OSError, match="temporary") as caught:
        _core.store_write(-1, "name", 1, rows, [b"{}", b""])
    assert caught.value.errno is not None
    with pytest.raises(errors.FormatError, match="not a regular file"):
        _core.store_read_head(fd)
    with pytest.raises(OSError, match="descriptor -1"):
        _core.store_read_head(-1)
    with pytest.raises(OverflowError):
        _core.store_parse(b"", -1)
    assert os.listdir(tmp_path) == []
    os.close(fd)


def test_references_are_returned(tmp_path):
    """Buffers are let go whether a call works or not."""
    fd = os.open(tmp_path, os.O_RDONLY)
    payload = bytearray(b"{}")
    rows = [(2,) + (0,) * 13, (3,) + (0,) * 13]
    before = sys.getrefcount(payload), sys.getrefcount(rows[0])
    _core.store_write(fd, "name", 1, rows, [payload, payload])
    with pytest.raises(TypeError):
        _core.store_write(fd, "name", 1, rows, [payload, None])
    with pytest.raises(ValueError, match="kind"):
        _core.store_write(fd, "name", 2, rows, [payload, payload])
    _core.crc32c(payload)
    payload += b"grows, since nothing holds it"
    assert (sys.getrefcount(payload), sys.getrefcount(rows[0])) == before
    os.close(fd)


# ---- conversations ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 31, 64, 257])
def test_round_trip(store, n_tokens):
    files = store.files("chat")
    assert files.read_manifest() is None
    entries, payloads = make_blocks(0, n_tokens)
    mask = np.arange(n_tokens)[None] % 2
    result = files.commit(
        make_manifest(
            n_tokens,
            (SegmentInfo("", 0, n_tokens, strategy={"a": (1, None)}, guard={"kl": float("nan")}),),
            attention_mask=mask,
            positions=mask * 7,
            behaviour=np.linspace(0, 1, 5),
            settings={"codec": "int4"},
        ),
        entries,
        payloads,
    )
    manifest = Store(store.path).files("chat").read_manifest()
    assert manifest.generation == result.generation == 1
    assert manifest.token_ids.tolist() == [list(range(n_tokens))]
    assert (manifest.attention_mask == mask).all()
    assert (manifest.positions == mask * 7).all()
    assert manifest.behaviour.tolist() == np.linspace(0, 1, 5, dtype=np.float32).tolist()
    assert manifest.layers == LAYERS
    assert manifest.fingerprint == {"exact": "f00d"}
    assert manifest.segments == (
        SegmentInfo("segment-1", 0, n_tokens, manifest.segments[0].file_bytes,
                    {"a": [1, None]}, {"kl": None}, manifest.segments[0].crc32c),
    )  # fmt: skip
    assert read_payloads(files, manifest.segments[0]) == payloads
    sizes = sum(os.path.getsize(os.path.join(files.path, name)) for name in names(files))
    assert result.stored_bytes == result.new_bytes == sizes == store.usage_bytes()
    assert store.verify() == []


def test_appending_writes_only_what_is_new(store):
    files = store.files("chat")
    first = save_first(files)
    before = (tmp_path_of(files) / "segment-1").read_bytes()
    second = save_more(files, first, 12)
    assert names(files) == ["lock", "manifest", "segment-1", "segment-2"]
    assert (tmp_path_of(files) / "segment-1").read_bytes() == before
    assert second.manifest.created_s == first.manifest.created_s
    assert second.manifest.updated_s >= first.manifest.updated_s
    assert second.new_bytes < second.stored_bytes
    assert read_payloads(files, second.manifest.segments[1]) == make_blocks(9, 12, 1)[1]
    info = store.info("chat")
    assert (info.n_tokens, info.n_segments, info.n_layers, info.n_batch) == (12, 2, 4, 1)
    assert info.stored_bytes == second.stored_bytes
    assert (info.generation, info.dtype, info.fingerprint) == (2, "float32", "f00d")
    assert store.list() == [info]


def test_crop_keeps_the_segments_that_are_used(store):
    files = store.files("chat")
    second = save_more(files, save_first(files), 12)
    shorter = dataclasses.replace(second.manifest.segments[0], n_tokens=7)
    third = files.commit(make_manifest(7, (shorter,)), expected_generation=2)
    assert names(files) == ["lock", "manifest", "segment-1"]
    assert third.generation == 3
    fourth = save_more(files, third, 8)
    assert [segment.file for segment in fourth.manifest.segments] == ["segment-1", "segment-4"]
    assert store.verify("chat") == []


def test_an_empty_conversation(store):
    files = store.files("chat")
    result = files.commit(make_manifest(0))
    assert files.read_manifest().token_ids.shape == (1, 0)
    assert save_more(files, result, 3).manifest.segments[0].token_start == 0
    assert store.info("chat").n_tokens == 3


@pytest.mark.parametrize(
    "conversation_id",
    ["a", "chat/42", "../../etc/passwd", "/", ".", "..", "\0", "é" * 512, "a" * 1024, "line\nline",
     "C:\\x", " ", "%s%n", "manifest"],
)  # fmt: skip
def test_any_text_is_an_id(store, conversation_id):
    save_first(store.files(conversation_id))
    assert [info.conversation_id for info in store.list()] == [conversation_id]
    [directory] = os.listdir(store.tenant_path)
    assert directory == hashlib.sha256(conversation_id.encode()).hexdigest()[:32]
    assert store.verify(conversation_id) == []
    assert store.delete(conversation_id)
    assert store.list() == []
    assert not store.delete(conversation_id)


@pytest.mark.parametrize(
    ("conversation_id", "exception", "words"),
    [
        ("", ValueError, "0 bytes of UTF-8 but must have 1 to 1024"),
        ("a" * 1025, ValueError, "1025 bytes"),
        ("é" * 5000, ValueError, "10000 bytes"),
        ("\ud800", ValueError, "UTF-8"),
        (None, TypeError, "conversation_id is None but must be a str"),
        (b"a", TypeError, "conversation_id is b'a'"),
        (42, TypeError, "conversation_id is 42"),
    ],
)
def test_bad_ids(store, conversation_id, exception, words):
    for call in (store.files, store.info, store.delete, lambda x: store.open(x, None)):
        with pytest.raises(exception, match=words):
            call(conversation_id)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"location": "valkey://host:6379/0"}, "location is 'valkey://host:6379/0'"),
        ({"location": "valkeys://host"}, "supports a directory or 'memory:' only"),
        ({"location": "redis://host"}, "directory"),
        ({"location": "memory:x"}, "directory"),
        ({"location": ""}, "location is ''"),
        ({"location": "a\0b"}, "location"),
        ({"max_bytes": 0}, "max_bytes is 0 but must be an integer above 0"),
        ({"max_bytes": 1.5}, "max_bytes is 1.5"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"ttl_s": 0}, "ttl_s is 0 but must be a finite number above 0"),
        ({"ttl_s": float("nan")}, "ttl_s is nan"),
        ({"ttl_s": float("inf")}, "ttl_s is inf"),
        ({"ttl_s": "day"}, "ttl_s is 'day'"),
        ({"tenant": ""}, "tenant is ''"),
        ({"tenant": ".."}, "tenant is '..'"),
        ({"tenant": "a/b"}, "tenant is 'a/b'"),
        ({"tenant": "a\n"}, "tenant"),
        ({"tenant": "x" * 65}, "tenant"),
        ({"tenant": None}, "tenant is None"),
    ],
)
def test_bad_stores(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Store(**({"location": tmp_path / "new"} | arguments))
    assert not (tmp_path / "new").exists()


def test_location_of_another_type():
    with pytest.raises(TypeError, match="location is b'x' but must be a str or a path"):
        Store(b"x")
    with pytest.raises(TypeError):
        Store(None)


def test_what_is_no_profile_is_refused(store):
    with pytest.raises(TypeError, match=r"profile is b'p' but must be a krul\.Profile, a path or"):
        store.open("chat", None, profile=b"p")


def test_modes_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    old = os.umask(0)
    try:
        with Store("~/deep/store") as store:
            files = store.files("chat")
            save_first(files)
    finally:
        os.umask(old)
    assert store.path == str(tmp_path / "deep" / "store")
    for path in (store.path, store.tenant_path, files.path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    for name in names(files):
        assert stat.S_IMODE(os.stat(os.path.join(files.path, name)).st_mode) == 0o600


def test_closed_stores_refuse(tmp_path):
    with Store(tmp_path) as store:
        pass
    store.close()
    for call in (store.list, store.verify, store.gc, lambda: store.files("a"), store.__enter__):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_memory_leaves_nothing():
    with Store("memory:") as store:
        save_first(store.files("chat"))
        assert store.list()[0].n_tokens == 9
        path = store.path
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
        child = os.fork()
        if child == 0:
            # A child that ends must not take its parent's store with it.
            store.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert os.path.isdir(path)
    assert not os.path.exists(path)


def test_tenants_do_not_meet(tmp_path):
    ours, theirs = Store(tmp_path, tenant="a"), Store(tmp_path, tenant="b", max_bytes=10_000)
    save_first(ours.files("chat"))
    assert theirs.list() == []
    assert theirs.files("chat").read_manifest() is None
    assert theirs.usage_bytes() == 0
    with pytest.raises(KeyError, match="no conversation 'chat'"):
        theirs.info("chat")
    with pytest.raises(KeyError, match="no conversation 'chat'"):
        theirs.verify("chat")
    # A whole conversation moved to another tenant is not theirs.
    os.rename(ours.files("chat").path, theirs.files("chat").path)
    with pytest.raises(errors.CorruptionError, match=r"\('a', 'chat'\) stands where"):
        theirs.files("chat").read_manifest()


def test_another_conversations_directory(store):
    save_first(store.files("one"))
    os.rename(store.files("one").path, store.files("two").path)
    with pytest.raises(errors.CorruptionError, match=r"'one'.*stands where that of.*'two'"):
        store.files("two").read_manifest()
    [problem] = store.verify()
    assert "belongs into" in problem.message


# ---- commits ------------------------------------------------------------------------------------


def test_second_save_of_one_generation_is_refused(store):
    files, others = store.files("chat"), Store(store.path).files("chat")
    first = save_first(files)
    save_more(others, first, 12)
    before = {name: (tmp_path_of(files) / name).read_bytes() for name in names(files)}
    with pytest.raises(errors.MismatchError, match="opened at generation 1 but is at generation 2"):
        save_more(files, first, 11, seed=9)
    with pytest.raises(errors.MismatchError, match="opened at generation 0"):
        save_first(files)
    assert {name: (tmp_path_of(files) / name).read_bytes() for name in names(files)} == before
    store.delete("chat")
    with pytest.raises(errors.MismatchError, match="generation 0 now: it has been deleted"):
        save_more(files, first, 12)


def test_a_segment_that_was_replaced_is_not_continued(store):
    """Deleted and begun anew, the numbers agree again but the bytes do not."""
    files = store.files("chat")
    first = save_first(files, seed=1)
    store.delete("chat")
    save_first(files, seed=2)
    with pytest.raises(errors.MismatchError, match="segment-1: size and CRC-32C are"):
        save_more(files, first, 12)
    os.unlink(os.path.join(files.path, "segment-1"))
    with pytest.raises(errors.MismatchError, match="segment-1: missing"):
        save_more(files, first, 12)
    assert names(files) == ["lock", "manifest"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": np.zeros(9, int)}, r"token_ids is \(9,\) but must be n_batch x n_tokens"),
        ({"token_ids": np.zeros((1, 9))}, r"token_ids is float64 \(1, 9\)"),
        ({"token_ids": np.full((1, 9), 2**63, np.uint64)}, "beyond int64"),
        ({"token_ids": np.zeros((1, 8), int)}, "segments hold 9 tokens but n_tokens is 8"),
        ({"attention_mask": np.ones((1, 8))}, "attention_mask is float64"),
        ({"attention_mask": np.full((1, 9), 2)}, "MASK holds a 2"),
        ({"attention_mask": np.full((1, 9), 300)}, "beyond uint8"),
        ({"positions": np.zeros((2, 9), int)}, "positions is int64"),
        ({"behaviour": np.zeros(3, int)}, "behaviour is int64"),
        ({"fingerprint": {}}, "fingerprint.exact is None"),
        ({"fingerprint": {"exact": ""}}, "fingerprint.exact is ''"),
        ({"layers": ()}, "a list of 0 items"),
        ({"layers": LAYERS[:3]}, "layer is 3 but the model has 3"),
        (
            {"layers": (FULL, SLIDING, FULL, FULL)},
            r"layer 2 \(full\), K: blocks hold tokens 9 to 9",
        ),
        ({"layers": (FULL, SLIDING, NONE, SLIDING)}, "entry .*: n_batch, n_heads"),
        ({"segments": ()}, "0 segments have an empty file but must be 1"),
        ({"segments": (SegmentInfo("", 0, 9),) * 2}, "2 segments have an empty file"),
        ({"segments": (SegmentInfo("", 1, 8),)}, "token_start is 1 but must be 0"),
        ({"segments": (SegmentInfo("", 0, 9, guard={"kl": object()}),)}, "JSON"),
        ({"segments": (SegmentInfo("", 0, 9, guard={1: 2}),)}, "a key is 1"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(store, change, words):
    files = store.files("chat")
    with pytest.raises((ValueError, TypeError), match=words):
        save_first(files, **change)
    assert not os.path.exists(files.path)


def test_entries_must_cover_every_layer(store):
    files = store.files("chat")
    entries, payloads = make_blocks(0, 9)

    def commit(changed, changed_payloads=None):
        with pytest.raises(ValueError, match="entries do not fit the manifest"):
            files.commit(make_manifest(9), changed, changed_payloads or payloads)

    for i in range(len(entries)):
        # A sliding layer may hold less than its window, but K and V the same.
        commit(entries[:i] + entries[i + 1 :], payloads[1:])
    for change in (
        {"token_start": 1}, {"n_tokens": 3}, {"n_heads": 3}, {"head_dim": 9}, {"dtype": 2},
        {"n_batch": 2}, {"layer_lower": 2}, {"layer_lower": 4}, {"layer_upper": 1},
    ):  # fmt: skip
        commit([entries[0]._replace(**change), *entries[1:]])
    with pytest.raises(ValueError, match="there are 12 entries but 11 payloads"):
        files.commit(make_manifest(9), entries, payloads[1:])
    with pytest.raises(ValueError, match="blocks end at token 9 but the manifest uses 10"):
        files.commit(make_manifest(10), entries, payloads)
    for generation in (-1, 1.0, True, None, 2**60):
        with pytest.raises(ValueError, match=f"expected_generation is {generation}"):
            files.commit(make_manifest(9), entries, payloads, expected_generation=generation)
    assert not os.path.exists(files.path)


def test_pairs_count_for_both_layers(store):
    """One block of two layers covers both; one that is covered twice is refused."""
    layers = (FULL, FULL)
    entries = [
        Entry(
            1, 4, kv, DTYPES[(FULL.key_dtype, FULL.value_dtype)[kv]], 0, 1, 1, 2, (8, 4)[kv], 0, 5
        )
        for kv in (0, 1)
    ]
    files = store.files("chat")
    again = entries[0]._replace(codec=1, layer_lower=1, layer_upper=-1)
    with pytest.raises(ValueError, match="layer 1"):
        files.commit(make_manifest(5, layers=layers), [*entries, again], [b"x"] * 3)
    files.commit(make_manifest(5, layers=layers), entries, [b"x"] * 2)
    assert store.verify() == []


def test_a_locked_conversation_is_waited_for(store, monkeypatch):
    files = store.files("chat")
    first = save_first(files)
    fds = _lock(files.path, "chat", is_made=False)
    monkeypatch.setattr("krul.store._LOCK_TIMEOUT_S", 0.05)
    with pytest.raises(errors.KrulError, match=r"'chat' has been locked by another save for 0.05"):
        save_more(files, first, 12)
    assert files.read_manifest().generation == 1
    monkeypatch.setattr("krul.store._LOCK_TIMEOUT_S", 10)
    timer = threading.Timer(0.05, _unlock, fds)
    timer.start()
    assert save_more(files, first, 12).generation == 2
    timer.join()


def test_a_lock_outlives_neither_its_process_nor_a_deletion(store):
    files = store.files("chat")
    first = save_first(files)
    child = os.fork()
    if child == 0:
        _lock(files.path, "chat", is_made=False)
        os._exit(0)
    os.waitpid(child, 0)
    second = save_more(files, first, 12)
    # Deleted while another waits for the lock: it must not save into a directory that is gone.
    fds = _lock(files.path, "chat", is_made=False)
    found = []

    def wait():
        try:
            save_more(files, second, 14)
        except errors.MismatchError as exception:
            found.append(exception)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    for name in names(files):
        os.unlink(os.path.join(files.path, name))
    os.rmdir(files.path)
    _unlock(*fds)
    thread.join()
    assert "generation 0 now" in str(found[0])


# ---- damage -------------------------------------------------------------------------------------


def states_of(files):
    """What reading everything gives: the tokens and payloads, or the problems."""
    problems = files.store.verify(files.conversation_id)
    if problems:
        return None
    manifest = files.read_manifest()
    return manifest.token_ids.tolist(), [read_payloads(files, s) for s in manifest.segments]


@pytest.fixture
def tiny():
    """Return the files of a conversation of two segments in memory, as small as they get."""
    layers = (FULL, SLIDING)
    with Store("memory:") as store:
        files = store.files("chat")
        first = files.commit(make_manifest(1, layers=layers), *make_blocks(0, 1, 0, layers))
        segments = (first.manifest.segments[0], SegmentInfo("", 1, 1))
        manifest = make_manifest(2, segments, layers=layers, behaviour=np.ones(3))
        files.commit(manifest, *make_blocks(1, 2, 1, layers), expected_generation=1)
        yield files


def test_every_flipped_byte_is_caught_or_harmless(tiny):
    whole = states_of(tiny)
    n_caught = n_harmless = 0
    for name in ("manifest", "segment-1", "segment-2"):
        path = tmp_path_of(tiny) / name
        data = path.read_bytes()
        for at in range(len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            found = states_of(tiny)
            assert found in (None, whole)
            n_caught += found is None
            n_harmless += found is not None
        path.write_bytes(data)
    assert states_of(tiny) == whole
    # Only the padding between payloads may change unnoticed: 10 gaps at most.
    assert n_caught > 2500
    assert n_harmless < 64 * 10


def test_every_truncation_is_caught(tiny):
    for name in ("manifest", "segment-1", "segment-2"):
        path = tmp_path_of(tiny) / name
        data = path.read_bytes()
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert [problem.file for problem in tiny.store.verify("chat")] == [name]
        path.write_bytes(data)
    assert tiny.store.verify() == []


def test_the_good_prefix_is_told(store):
    files = store.files("chat")
    save_more(files, save_more(files, save_first(files), 12), 15)
    path = tmp_path_of(files) / "segment-2"
    path.write_bytes(path.read_bytes()[:-1])
    [problem] = store.verify()
    assert (problem.conversation_id, problem.file, problem.n_good_tokens) == (
        "chat",
        "segment-2",
        9,
    )
    assert str(path) in problem.message
    assert "truncated" in problem.message
    path.unlink()
    assert "missing" in store.verify("chat")[0].message
    with pytest.raises(errors.CorruptionError, match=r"segment-2: the manifest names this file"):
        files.open_segment(files.read_manifest().segments[1])


def test_a_segment_of_another_save_is_refused(store):
    """Its own checksums are right, but it is not what the manifest was written with."""
    files, others = store.files("chat"), store.files("other")
    save_first(files, seed=1)
    save_first(others, seed=2)
    os.replace(os.path.join(others.path, "segment-1"), os.path.join(files.path, "segment-1"))
    [problem] = store.verify("chat")
    assert "manifest was written with" in problem.message
    os.replace(os.path.join(files.path, "manifest"), os.path.join(files.path, "segment-1"))
    with pytest.raises(errors.FormatError, match="kind of file is 1 but must be 2"):
        files.open_segment(SegmentInfo("segment-1", 0, 9), make_manifest(9))


def test_a_damaged_manifest_is_kept_aside(store):
    files = store.files("chat")
    first = save_first(files, seed=1)
    path = tmp_path_of(files) / "manifest"
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    with pytest.raises(errors.CorruptionError, match="truncated"):
        files.read_manifest()
    assert store.list() == []
    again = save_first(files, seed=2)
    assert (tmp_path_of(files) / "manifest.damaged").read_bytes() == damaged
    assert names(files) == ["lock", "manifest", "manifest.damaged", "segment-1", "segment-2"]
    assert again.manifest.segments[0].file == "segment-2"
    [problem] = store.verify("chat")
    assert problem.file == "manifest.damaged"
    assert problem.n_good_tokens == 9
    # What it named stays, through saves and collections, until the conversation is deleted.
    second = save_more(files, again, 12)
    store.gc()
    assert read_payloads(files, first.manifest.segments[0]) == make_blocks(0, 9, 1)[1]
    path.write_bytes(b"\x89KRUL")
    save_more(files, second, 13)
    assert "manifest.damaged-2" in names(files)
    assert store.delete("chat")
    assert os.listdir(store.tenant_path) == []


def test_a_manifest_of_a_later_version_is_never_replaced(store, make):
    files = store.files("chat")
    first = save_first(files)
    path = tmp_path_of(files) / "manifest"
    later = make.patched(path.read_bytes(), 8, "<I", 2)
    path.write_bytes(later)
    words = "version 2 but this krul reads version 1"
    with pytest.raises(errors.FormatError, match=words):
        files.read_manifest()
    for save in (lambda: save_first(files), lambda: save_more(files, first, 12)):
        with pytest.raises(errors.FormatError, match=words):
            save()
    assert words in store.verify("chat")[0].message
    with Store(store.path, ttl_s=0.001) as impatient:
        impatient.gc()
    assert path.read_bytes() == later
    assert names(files) == ["lock", "manifest", "segment-1"]


def test_a_segment_of_a_later_version(store, make):
    files = store.files("chat")
    first = save_first(files)
    path = tmp_path_of(files) / "segment-1"
    path.write_bytes(make.patched(path.read_bytes(), 8, "<I", 7))
    with pytest.raises(errors.FormatError, match="version 7 but this krul reads version 1"):
        files.open_segment(first.manifest.segments[0])


@pytest.mark.parametrize("name", ["manifest", "segment-1"])
def test_links_and_pipes_are_not_files(store, tmp_path, name):
    files = store.files("chat")
    save_first(files)
    path = tmp_path_of(files) / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    [problem] = store.verify("chat")
    assert "symbolic link" in problem.message
    path.unlink()
    os.mkfifo(path)
    [problem] = store.verify("chat")
    assert "not a regular file" in problem.message
    path.unlink()
    path.mkdir()
    [problem] = store.verify("chat")
    assert "not a regular file" in problem.message


def test_a_linked_directory_is_refused(store, tmp_path):
    files = store.files("chat")
    save_first(files)
    os.rename(files.path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", files.path)
    with pytest.raises(OSError, match="Not a directory"):
        files.read_manifest()
    assert store.list() == []
    assert store.gc().n_files_removed == 0
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["lock", "manifest", "segment-1"]


def test_a_file_where_a_directory_should_be(store, tmp_path):
    files = store.files("chat")
    write_file(tmp_path_of(files), b"")
    with pytest.raises(NotADirectoryError):
        files.read_manifest()
    with pytest.raises(NotADirectoryError, match="a file stands where a directory should"):
        save_first(files)
    write_file(tmp_path / "file", b"")
    with pytest.raises(NotADirectoryError, match="a file stands where the store's directory"):
        Store(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file" / "below")


def test_unreadable_directories(store):
    """As somebody whom permissions bind: root drops its rights in a child."""
    files = store.files("chat")
    first = save_first(files)
    os.chmod(files.path, 0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.getuid() == 0:
                drop_capabilities()
            for call in (files.read_manifest, lambda: save_more(files, first, 12)):
                with pytest.raises(PermissionError) as caught:
                    call()
                assert caught.value.filename == files.path
            assert store.list() == []
            [problem] = store.verify("chat")
            assert "Permission denied" in problem.message
            assert store.gc().n_conversations_removed == 0
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    os.chmod(files.path, 0o700)
    assert status == 0
    assert store.verify() == []


def drop_capabilities():
    """Give up root's right to pass permissions: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~0b110
    assert libc.capset(header, data) == 0


FULL_DISK = """
import resource, sys
sys.path[:0] = {path!r}
import test_store as t
from krul import errors
store = t.Store({store!r})
files = store.files("chat")
first = files.read_manifest()
n_refused = 0
for limit in range(0, 6000, 250):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    result = type("R", (), {{"manifest": first, "generation": first.generation}})
    try:
        t.save_more(files, result, 40)
        break
    except errors.StoreFullError as exception:
        n_refused += 1
        assert exception.errno and files.path in str(exception), exception
    assert t.names(files) == ["lock", "manifest", "segment-1"], t.names(files)
    assert store.verify() == []
assert n_refused > 3, n_refused
assert store.info("chat").generation == 2
"""


def test_a_full_disk_keeps_the_old_version(store):
    """A limit on file sizes fails in the middle of a write, as a full disk does."""
    save_first(store.files("chat"))
    code = FULL_DISK.format(path=[p for p in sys.path if p], store=store.path)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_really_full_disk(tmp_path, request):
    """On a file system of 64 KiB, where one can be mounted; elsewhere the size limit stands in."""
    libc = ctypes.CDLL(None, use_errno=True)
    target = str(tmp_path).encode()
    is_mounted = libc.mount(b"none", target, b"tmpfs", 0, b"size=65536") == 0
    if is_mounted:
        request.addfinalizer(lambda: libc.umount2(target, 2))
    with Store(tmp_path, max_bytes=None if is_mounted else 60_000) as store:
        files = store.files("chat")
        result = save_first(files)
        refusal = None
        while refusal is None and result.generation < 400:
            try:
                result = save_more(files, result, 9 + result.generation)
            except errors.StoreFullError as exception:
                refusal = exception
        assert result.generation > 3
        assert files.path in str(refusal)
        assert store.verify() == []
        assert store.info("chat").generation == result.generation
        assert not [name for name in names(files) if name.startswith(".tmp")]
        assert read_payloads(files, result.manifest.segments[0]) == make_blocks(0, 9)[1]
        assert store.delete("chat")


def test_max_bytes_is_checked_before_anything_is_written(tmp_path):
    with Store(tmp_path) as unbounded:
        first = save_first(unbounded.files("chat"))
        used = unbounded.usage_bytes()
    before = names(unbounded.files("chat")) if not unbounded._is_closed else None
    with Store(tmp_path, max_bytes=used + 100) as store:
        files = store.files("chat")
        with pytest.raises(errors.StoreFullError) as caught:
            save_more(files, first, 12)
        assert f"max_bytes is {used + 100}" in str(caught.value)
        assert "would hold" in str(caught.value)
        assert isinstance(caught.value, OSError)
        assert names(files) == ["lock", "manifest", "segment-1"]
        assert before is None
    with Store(tmp_path, max_bytes=used * 3) as store:
        result = save_more(store.files("chat"), first, 12)
        assert store.usage_bytes() <= used * 3
        assert result.generation == 2
        # Cropping never needs room that it does not free.
        info = dataclasses.replace(result.manifest.segments[0], n_tokens=3)
        with Store(tmp_path, max_bytes=store.usage_bytes()) as tight:
            tight.files("chat").commit(make_manifest(3, (info,)), expected_generation=2)


def test_failures_between_segment_and_manifest(store, monkeypatch):
    """Whatever fails, the old conversation stands and nothing is left over."""
    files = store.files("chat")
    first = save_first(files)
    whole = states_of(files)
    write = _core.store_write

    class Core:
        """The C module, with a manifest that cannot be written."""

        def __getattr__(self, name):
            return getattr(_core, name)

        def store_write(self, directory_fd, name, *rest):
            if name == "manifest":
                raise self.failure
            return write(directory_fd, name, *rest)

    core = Core()
    monkeypatch.setattr("krul.store._core", core)
    for failure in (errors.StoreFullError(28, "no room"), OSError(5, "bad disk"), MemoryError()):
        core.failure = failure
        with pytest.raises(type(failure)):
            save_more(files, first, 12)
        assert names(files) == ["lock", "manifest", "segment-1"]
        assert states_of(files) == whole
    monkeypatch.undo()
    assert save_more(files, first, 12).manifest.segments[1].file == "segment-2"


def test_what_a_kill_leaves_behind_is_removed(store):
    """Each state in which a save can be cut short is the old conversation, and is tidied up."""
    files = store.files("chat")
    first = save_first(files)
    whole = states_of(files)
    save_more(files, first, 12)
    leftover = (tmp_path_of(files) / "segment-2").read_bytes()
    store.delete("chat")
    first = save_first(files)
    for name, data in (
        (".tmp-segment-2-0123456789abcdef", leftover[:77]),
        (".tmp-manifest-0123456789abcdef", b""),
        ("segment-2", leftover),
    ):
        write_file(tmp_path_of(files) / name, data)
        assert states_of(files) == whole
    write_file(tmp_path_of(files) / "notes.txt", b"not krul's")
    # Too young to be told from a save that is under way.
    assert store.gc().n_files_removed == 0
    old = time.time() - 3600
    for name in names(files):
        os.utime(os.path.join(files.path, name), (old, old))
    report = store.gc()
    assert (report.n_files_removed, report.removed_bytes) == (3, 77 + len(leftover))
    assert report.kept_bytes == store.usage_bytes()
    assert names(files) == ["lock", "manifest", "notes.txt", "segment-1"]
    write_file(tmp_path_of(files) / "segment-2", leftover)
    second = save_more(files, first, 12)
    assert second.manifest.segments[1].file == "segment-3"
    assert names(files) == ["lock", "manifest", "notes.txt", "segment-1", "segment-3"]
    assert store.verify() == []


def test_gc_by_age(tmp_path):
    with Store(tmp_path, ttl_s=1000) as store:
        for name in ("old", "new", "busy"):
            save_first(store.files(name))
        for name in ("old", "busy"):
            manifest = store.files(name).read_manifest()
            stale = dataclasses.replace(manifest, updated_s=time.time() - 2000)
            rewrite(store.files(name), stale)
        never = store.files("never")
        os.mkdir(never.path)
        write_file(tmp_path_of(never) / "segment-1", b"x")
        foreign = tmp_path_of(store.files("foreign"))
        foreign.mkdir()
        write_file(foreign / "notes.txt", b"x")
        old = time.time() - 3600
        os.utime(never.path, (old, old))
        os.utime(foreign, (old, old))
        fds = _lock(store.files("busy").path, "busy", is_made=False)
        # Taking a lock makes a file, which makes a directory young: that is for the next time.
        report = store.gc()
        _unlock(*fds)
        assert report.n_conversations_removed == 1
        assert report.removed_bytes > 0
        assert sorted(info.conversation_id for info in store.list()) == ["busy", "new"]
        os.utime(never.path, (old, old))
        os.utime(foreign, (old, old))
        assert store.gc().n_conversations_removed == 1
        assert not os.path.exists(never.path)
        assert (foreign / "notes.txt").exists()
    with Store(tmp_path) as store:
        assert store.gc().n_conversations_removed == 0


def rewrite(files, manifest):
    """Write a manifest as it is, past the commit."""
    from krul.manifest import encode_manifest

    fd = os.open(files.path, os.O_RDONLY)
    _core.store_write(fd, "manifest", 1, *encode_manifest(manifest))
    os.close(fd)


def test_foreign_files_in_a_store(store, tmp_path):
    save_first(store.files("chat"))
    write_file(tmp_path / "store" / "default" / "notes.txt", b"")
    os.mkdir(os.path.join(store.tenant_path, "ABCDEF" + "0" * 26))
    os.mkdir(os.path.join(store.tenant_path, "f" * 31))
    write_file(tmp_path / "store" / "default" / ("e" * 32), b"")
    assert len(store.list()) == 1
    assert store.verify() == []
    store.gc()
    assert (tmp_path / "store" / "default" / "notes.txt").exists()
    assert len(os.listdir(store.tenant_path)) == 5


@pytest.mark.parametrize(
    "bad", ["segment-999999999999999999", "segment-0", "segment-9007199254740992"]
)
def test_odd_numbers_do_not_stop_a_save(store, bad):
    files = store.files("chat")
    first = save_first(files)
    write_file(tmp_path_of(files) / bad, b"")
    assert save_more(files, first, 12).manifest.n_tokens == 12
    assert store.verify() == []


# ---- together -----------------------------------------------------------------------------------


def race(path, seed, barrier, results):
    """Save generation 1 on top of generation 0 and tell who won."""
    files = Store(path).files("chat")
    manifest = make_manifest(9, settings={"seed": seed})
    blocks = make_blocks(0, 9, seed)
    barrier.wait()
    try:
        results.put((seed, files.commit(manifest, *blocks).generation))
    except errors.MismatchError as exception:
        results.put((seed, str(exception)))


def test_two_processes_one_wins_whole(store):
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        barrier, results = context.Barrier(3), context.Queue()
        processes = [
            context.Process(target=race, args=(store.path, seed, barrier, results))
            for seed in range(3)
        ]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=30) for _ in processes)
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
        [winner] = [seed for seed, result in found.items() if result == 1]
        refusals = [text for text in found.values() if text != 1]
        assert len(refusals) == 2
        assert all("opened at generation 0 but is at generation 1" in text for text in refusals)
        files = store.files("chat")
        manifest = files.read_manifest()
        assert manifest.settings == {"seed": winner}
        assert read_payloads(files, manifest.segments[0]) == make_blocks(0, 9, winner)[1]
        assert names(files) == ["lock", "manifest", "segment-1"]
        store.delete("chat")


def test_threads_share_a_store(store):
    """Writers of one conversation take turns, readers always see a whole one."""
    n_rounds, n_writers = 12, 3
    barrier = threading.Barrier(n_writers + 2)
    failures, n_wins = [], [0] * n_writers

    def write(index):
        files = store.files("shared")
        barrier.wait()
        own = store.files(f"own-{index}")
        result = save_first(own)
        for i in range(n_rounds):
            result = save_more(own, result, 10 + i, seed=i)
            current = files.read_manifest()
            generation = 0 if current is None else current.generation
            try:
                # A new segment each time, so that old ones vanish under the readers.
                blocks = make_blocks(0, 9, index)
                manifest = make_manifest(9, settings={"seed": index})
                files.commit(manifest, *blocks, expected_generation=generation)
                n_wins[index] += 1
            except errors.MismatchError:
                pass

    def read():
        files = ConversationFiles(store, "shared")
        barrier.wait()
        for _ in range(n_rounds * 4):
            manifest = files.read_manifest()
            if manifest is None:
                continue
            try:
                fd, entries = files.open_segment(manifest.segments[0], manifest)
            except errors.CorruptionError as exception:
                assert "missing" in str(exception)  # noqa: PT017
                continue
            found = [_core.store_read_payload(fd, entry) for entry in entries]
            os.close(fd)
            assert found == make_blocks(0, 9, manifest.settings["seed"])[1]
            store.list()
            store.gc()

    def guard(work, *arguments):
        try:
            work(*arguments)
        except BaseException as exception:
            failures.append(exception)
            barrier.abort()

    threads = [threading.Thread(target=guard, args=(write, i)) for i in range(n_writers)]
    threads += [threading.Thread(target=guard, args=(read,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.files("shared").read_manifest().generation == sum(n_wins)
    assert [info.generation for info in store.list() if info.conversation_id != "shared"] == [
        n_rounds + 1
    ] * n_writers
    assert store.verify() == []


def test_reports_are_plain(store):
    save_first(store.files("chat"))
    assert json.dumps([info.to_dict() for info in store.list()])
    assert json.dumps(store.gc().to_dict())
    assert krul.Store is Store
    assert "chat" not in repr(store)
