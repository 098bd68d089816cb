"""Profiles in a store: found by model and digest, kept by conversations that name them."""

import io
import json
import multiprocessing
import os
import stat
import time

import numpy as np
import pytest
import torch
from models import tiny
from test_store import make_blocks, make_manifest, save_first

import krul
from krul import arrays, cli, profiles
from krul.calibrate import fit
from krul.fingerprint import Fingerprint, fingerprint
from krul.manifest import SegmentInfo
from krul.moments import LearnedLayer, ModelForm, Moments
from krul.profile import PROFILE_MAGIC, PROFILE_VERSION, Profile, solve
from krul.rotary import Rotary
from krul.store import Store

A, B = "ab" * 32, "cd" * 32
LONG_AGO_S = 1000.0


def made(model=A, seed=0, n_tokens=40):
    """The smallest profile: one layer of width 4."""
    found = Fingerprint(model, np.zeros(256, np.float32), {}, ())
    layer = LearnedLayer((), 0, 1, 2, 2, Rotary("half", 0, np.ones(1, np.float32), 1.0))
    moments = Moments(ModelForm(found, (layer,), (None,)))
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, n_tokens, 2)))
    moments.add({0: x}, {0: x.flip(1)}, np.arange(n_tokens))
    return solve(moments, {}, 1000)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as store:
        yield store


def path_of(store, profile, *, is_own=False):
    folder = store.profiles.own if is_own else store.profiles.shared
    return os.path.join(folder, f"{profile.digest}.profile")


def age(path, added_s=LONG_AGO_S, used_s=LONG_AGO_S):
    os.utime(path, (used_s, added_s))


def commit(store, name, *named):
    """Save a conversation with one segment per digest; None is a segment without a profile."""
    files = store.files(name)
    segments, entries, payloads = (), [], []
    result = None
    for place, digest in enumerate(named):
        strategy = {"codecs": []} if digest is None else {"codecs": [], "profile": digest}
        new = SegmentInfo("", 9 * place, 9, strategy=strategy)
        entries, payloads = make_blocks(9 * place, 9 * place + 9, place)
        manifest = make_manifest(9 * place + 9, (*segments, new), fingerprint={"exact": A})
        generation = 0 if result is None else result.generation
        result = files.commit(manifest, entries, payloads, expected_generation=generation)
        segments = result.manifest.segments
    return files


# ---- adding and finding --------------------------------------------------------------------------


def test_what_is_added_is_found(store):
    profile = made()
    assert store.profiles.find(A) is None
    assert store.add_profile(profile) == profile.digest
    assert store.profiles.find(A).digest == profile.digest
    assert store.profiles.get(profile.digest).digest == profile.digest
    assert store.profiles.find(B) is None
    (info,) = store.profiles.infos()
    assert (info.digest, info.model, info.n_tokens) == (profile.digest, A, 40)
    assert info.n_bytes == os.path.getsize(path_of(store, profile)) == profile.n_bytes


def test_a_path_is_added_too(store, tmp_path):
    made().save(tmp_path / "file")
    assert store.add_profile(tmp_path / "file") == made().digest
    assert store.profiles.find(A).digest == made().digest


@pytest.mark.parametrize("value", [None, 3, b"path"])
def test_something_else_is_not_added(store, value):
    with pytest.raises(TypeError, match=r"must be a krul\.Profile"):
        store.add_profile(value)


def test_a_damaged_file_is_not_added(store, tmp_path):
    (tmp_path / "file").write_bytes(made()._contents[:-1])
    with pytest.raises(krul.CorruptionError, match="file"):
        store.add_profile(tmp_path / "file")
    assert store.profiles.infos() == []


def test_a_closed_store_refuses(store):
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.add_profile(made())


def test_the_newest_is_found(store):
    older, newer = made(seed=1), made(seed=2)
    store.add_profile(older)
    store.add_profile(newer)
    assert store.profiles.find(A).digest == newer.digest
    assert [info.digest for info in store.profiles.infos()] == [newer.digest, older.digest]
    store.add_profile(older)  # again, and so the newest
    assert store.profiles.find(A).digest == older.digest


def test_modes(store):
    old = os.umask(0)
    try:
        store.add_profile(made())
        store.profiles.add(made(seed=1), is_own=True)
    finally:
        os.umask(old)
    for folder in (store.profiles.shared, store.profiles.own):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in os.listdir(folder):
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600


def test_one_in_memory_serves_all(store, tmp_path):
    store.add_profile(made())
    first = store.profiles.get(made().digest)
    assert store.profiles.find(A) is first
    with Store(tmp_path / "store") as other:
        assert other.profiles.get(made().digest) is first


def test_memory_does_not_hide_damage(store):
    profile = made()
    store.add_profile(profile)
    path = path_of(store, profile)
    contents = bytearray(profile._contents)
    contents[-40] ^= 1
    with open(path, "wb") as file:
        file.write(contents)
    with pytest.raises(krul.CorruptionError, match="digest"):
        store.profiles.get(profile.digest)
    os.unlink(path)
    with pytest.raises(krul.CorruptionError, match="missing"):
        store.profiles.get(profile.digest)


def test_only_a_few_stay_in_memory(store):
    for seed in range(5):
        store.add_profile(made(seed=seed))
    assert len(profiles._memory._last) == profiles._N_KEPT


@pytest.mark.parametrize("digest", ["", "../" * 10, "x" * 64, A[:-1], A + "\n"])
def test_only_digests_name_profiles(store, digest):
    with pytest.raises(krul.CorruptionError, match="is no digest"):
        store.profiles.get(digest)


def test_a_file_under_another_name_is_refused(store):
    store.add_profile(made())
    wrong = path_of(store, made()).replace(made().digest, B)
    os.rename(path_of(store, made()), wrong)
    with pytest.raises(krul.CorruptionError, match=f"the digest is {made().digest} but"):
        store.profiles.get(B)
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert store.profiles.find(A) is None


def test_links_and_pipes_are_refused(store, tmp_path):
    made().save(tmp_path / "file")
    store.add_profile(made(seed=1))
    os.symlink(tmp_path / "file", path_of(store, made()))
    with pytest.raises(krul.CorruptionError, match="symbolic link"):
        store.profiles.get(made().digest)
    os.unlink(path_of(store, made()))
    os.mkfifo(path_of(store, made()))
    with pytest.raises(krul.CorruptionError, match="not a regular file"):
        store.profiles.get(made().digest)
    assert store.profiles.find(A).digest == made(seed=1).digest


def test_a_damaged_newest_is_passed_over(store):
    store.add_profile(made(seed=1))
    store.add_profile(made(seed=2))
    path = path_of(store, made(seed=2))
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([made(seed=2)._contents[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert store.profiles.find(A).digest == made(seed=1).digest


def test_other_files_are_left_alone(store):
    store.add_profile(made())
    for name in ("notes", f"{A}.profile.bak", f"{A[:-1]}.profile", "x.moments"):
        with open(os.path.join(store.profiles.shared, name), "w") as file:
            file.write("words")
    assert len(store.profiles.infos()) == 1
    before = sorted(os.listdir(store.profiles.shared))
    for name in before:
        age(os.path.join(store.profiles.shared, name))
    store.gc()
    assert sorted(os.listdir(store.profiles.shared)) == before
    assert store.list() == []
    assert store.verify() == []


def test_tenants_share_what_texts_taught_and_nothing_else(tmp_path):
    with Store(tmp_path, tenant="a") as one, Store(tmp_path, tenant="b") as other:
        one.add_profile(made(seed=1))
        one.profiles.add(made(seed=2), is_own=True)
        assert one.profiles.find(A).digest == made(seed=2).digest
        assert other.profiles.find(A).digest == made(seed=1).digest
        with pytest.raises(krul.CorruptionError, match="missing"):
            other.profiles.get(made(seed=2).digest)


def add_many(path, seeds):
    with Store(path) as store:
        for seed in seeds:
            store.add_profile(made(seed=seed))
            assert store.profiles.get(made(seed=seed).digest).digest == made(seed=seed).digest


def test_processes_add_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=add_many, args=(tmp_path, range(start, start + 6)))
        for start in (0, 2, 4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    with Store(tmp_path) as store:
        wanted = {made(seed=seed).digest for seed in range(10)}
        assert {info.digest for info in store.profiles.infos()} == wanted
        assert all(store.profiles.problem(digest) is None for digest in wanted)


def test_peek_reads_no_further_than_the_header():
    contents = made()._contents
    version, meta = arrays.peek(io.BytesIO(contents[:2000]), PROFILE_MAGIC)
    assert (version, meta["n_tokens"]) == (PROFILE_VERSION, 40)
    for n_bytes in (0, 7, 31, 40, 200):
        with pytest.raises((krul.FormatError, krul.CorruptionError)):
            arrays.peek(io.BytesIO(contents[:n_bytes]), PROFILE_MAGIC)
    huge = contents[:16] + (1 << 40).to_bytes(8, "little") + contents[24:]
    with pytest.raises(krul.CorruptionError, match="header has 1099511627776 bytes"):
        arrays.peek(io.BytesIO(huge), PROFILE_MAGIC)


# ---- conversations that name one -----------------------------------------------------------------


def test_info_and_ls_tell_the_profiles(store, capsys):
    one, other = made(seed=1).digest, made(seed=2).digest
    commit(store, "chat", None, one, other, one)
    commit(store, "plain", None)
    assert store.info("chat").profiles == (one, other)
    assert store.info("plain").profiles == ()
    assert cli.main(["ls", "--store", store.path]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["chat"].endswith(f"  {one[:12]}, {other[:12]}")
    assert lines["plain"].endswith("  -")
    assert lines["conversation"].endswith("  profile")
    assert cli.main(["inspect", "chat", "--store", store.path]) == 0
    assert f"{one}, {other}" in capsys.readouterr().out
    assert cli.main(["inspect", "chat", "--store", store.path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profiles"] == [one, other]


def test_gc_keeps_what_is_named_and_the_newest(store):
    named, idle, newest, of_b = made(seed=1), made(seed=2), made(seed=3), made(B)
    for place, profile in enumerate((named, idle, newest, of_b)):
        store.add_profile(profile)
        age(path_of(store, profile), LONG_AGO_S + place)
    commit(store, "chat", None, named.digest)
    n_bytes = os.path.getsize(path_of(store, idle))
    report = store.gc()
    assert (report.n_profiles_removed, report.n_files_removed) == (1, 1)
    assert report.removed_bytes == n_bytes
    assert {info.digest for info in store.profiles.infos()} == {
        profile.digest for profile in (named, newest, of_b)
    }
    assert store.gc().n_profiles_removed == 0
    assert store.verify() == []
    store.delete("chat")
    age(path_of(store, named))  # reading it was a use, too
    assert store.gc().n_profiles_removed == 1
    assert {info.digest for info in store.profiles.infos()} == {newest.digest, of_b.digest}


def test_deleting_one_conversation_leaves_anothers_profile(store):
    shared = made(seed=1)
    store.add_profile(shared)
    age(path_of(store, shared))
    store.add_profile(made(seed=2))
    commit(store, "one", shared.digest)
    commit(store, "other", shared.digest)
    store.delete("one")
    store.gc()
    assert store.verify() == []
    assert store.profiles.get(shared.digest).digest == shared.digest


def test_gc_minds_the_other_tenants(tmp_path):
    with Store(tmp_path, tenant="a") as one, Store(tmp_path, tenant="b") as other:
        for place in range(3):
            one.add_profile(made(seed=place))
            age(path_of(one, made(seed=place)), LONG_AGO_S + place)
        commit(other, "chat", made(seed=0).digest)
        assert one.gc().n_profiles_removed == 1
        assert other.verify() == []
        assert other.profiles.get(made(seed=0).digest)


@pytest.mark.parametrize("how", ["flipped", "aside"])
def test_gc_keeps_all_while_a_conversation_cannot_be_read(store, how):
    for place in range(2):
        store.add_profile(made(seed=place))
        age(path_of(store, made(seed=place)), LONG_AGO_S + place)
    files = commit(store, "chat", made(seed=0).digest)
    manifest = os.path.join(files.path, "manifest")
    if how == "flipped":
        with open(manifest, "r+b") as file:
            file.seek(100)
            file.write(b"\xff\xfe\xfd")
    else:
        os.link(manifest, f"{manifest}.damaged")
        files.commit(make_manifest(0), expected_generation=files.read_manifest().generation)
    assert store.gc().n_profiles_removed == 0
    assert len(store.profiles.infos()) == 2
    store.delete("chat")
    age(path_of(store, made(seed=0)))
    assert store.gc().n_profiles_removed == 1


@pytest.mark.parametrize("kind", ["added", "used"])
def test_gc_leaves_what_was_touched_lately(store, kind):
    for place in range(2):
        store.add_profile(made(seed=place))
        age(path_of(store, made(seed=place)), LONG_AGO_S + place)
    now_s = time.time()
    path = path_of(store, made(seed=0))
    if kind == "added":
        age(path, now_s - 300)
        age(path_of(store, made(seed=1)), now_s - 200)
    else:
        age(path, LONG_AGO_S, now_s - 300)
    assert store.gc().n_profiles_removed == 0
    age(path, LONG_AGO_S, now_s - 700)
    assert store.gc().n_profiles_removed == 1


def test_gc_leaves_a_later_version(store):
    later = arrays.encode(PROFILE_MAGIC, PROFILE_VERSION + 1, {"model": "?"}, {})
    store.add_profile(made())
    path = os.path.join(store.profiles.shared, f"{later[-32:].hex()}.profile")
    arrays.write_file(path, later)
    age(path)
    age(path_of(store, made()))
    assert store.gc().n_profiles_removed == 0
    assert os.path.exists(path)
    with pytest.raises(krul.FormatError, match="version 2"):
        store.profiles.get(later[-32:].hex())


def test_gc_removes_what_writers_left_behind(store):
    store.add_profile(made())
    folder = store.profiles.shared
    names = (f".{A}.profile-abcd_123", f"{A[:16]}.checkpoint")
    for name in names:
        with open(os.path.join(folder, name), "w") as file:
            file.write("half")
    assert store.gc().n_files_removed == 0
    for name in names:
        age(os.path.join(folder, name))
    report = store.gc()
    assert (report.n_files_removed, report.n_profiles_removed) == (2, 0)
    assert not set(names) & set(os.listdir(folder))


def test_gc_removes_moments_of_models_that_are_gone(store):
    commit(store, "chat", None)
    os.mkdir(store.profiles.own, 0o700)
    paths = [os.path.join(store.profiles.own, profiles.moments_name(model)) for model in (A, B)]
    for path in paths:
        with open(path, "w") as file:
            file.write("sums")
        age(path)
    assert store.gc().n_files_removed == 1
    assert [os.path.exists(path) for path in paths] == [True, False]


def test_gc_of_a_store_without_profiles_makes_none(store):
    assert store.gc().n_profiles_removed == 0
    assert not os.path.exists(store.profiles.shared)
    assert not os.path.exists(store.profiles.own)


# ---- a save names one ----------------------------------------------------------------------------


def test_keep_holds_off_gc_without_making_it_the_newest(store):
    for place in range(2):
        store.add_profile(made(seed=place))
        age(path_of(store, made(seed=place)), LONG_AGO_S + place)
    store.profiles.keep(made(seed=0))
    assert store.gc().n_profiles_removed == 0
    assert store.profiles.find(A).digest == made(seed=1).digest


def test_keep_writes_what_is_gone(store):
    store.add_profile(made(seed=1))
    age(path_of(store, made(seed=1)))
    store.profiles.keep(made(seed=0))  # given to open as an object, or removed since
    commit(store, "chat", made(seed=0).digest)
    assert store.verify() == []
    assert store.profiles.find(A).digest == made(seed=1).digest
    assert os.path.exists(path_of(store, made(seed=0), is_own=True))


def test_keep_replaces_what_is_damaged(store):
    store.add_profile(made())
    with open(path_of(store, made()), "r+b") as file:
        file.write(b"?")
    store.profiles.keep(made())
    assert store.profiles.problem(made().digest) is None
    assert store.profiles.get(made().digest).digest == made().digest


# ---- verify --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"), [("missing", "missing"), ("flipped", "digest"), ("cut", "bytes but says")]
)
def test_verify_finds_a_profile_that_is_not_whole(store, how, words):
    profile = made()
    store.add_profile(profile)
    store.add_profile(made(seed=1))
    commit(store, "chat", None, profile.digest)
    commit(store, "plain", None)
    assert store.verify() == []
    path = path_of(store, profile)
    if how == "missing":
        os.unlink(path)
    else:
        contents = bytearray(profile._contents)
        contents[500] ^= 4
        with open(path, "wb") as file:
            file.write(contents[: 3000 if how == "cut" else None])
    for problems in (store.verify(), store.verify("chat")):
        (problem,) = problems
        assert problem.conversation_id == "chat"
        assert problem.file == f".profiles/{profile.digest}.profile"
        assert words in problem.message
        assert problem.n_good_tokens == 9  # the first segment needs no profile
    assert store.verify("plain") == []


def test_verify_reads_the_file_not_the_memory(store):
    profile = made()
    store.add_profile(profile)
    commit(store, "chat", profile.digest)
    path = path_of(store, profile)
    about = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(700)
        file.write(b"\x55\xaa")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # as a bad disk would leave it
    (problem,) = store.verify()
    assert problem.n_good_tokens == 0


def test_conversations_of_saves_without_profiles_are_as_before(store):
    save_first(store.files("chat"))
    assert store.verify() == []
    assert store.info("chat").profiles == ()


# ---- open ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def fitted(model):
    from test_calibrate import OPTIONS, made_texts, tokenizer

    return fit(model, tokenizer, made_texts(), **OPTIONS)


def test_open_takes_the_newest_of_the_model(store, model, fitted):
    with store.open("chat", model) as cache:
        assert cache.profile is None
    store.add_profile(made())
    with store.open("chat", model) as cache:
        assert cache.profile is None
    store.add_profile(fitted)
    with store.open("chat", model) as cache, store.open("other", model) as other:
        assert cache.profile.digest == fitted.digest
        assert cache.profile is other.profile
    with store.open("chat", model, settings=krul.Settings(codec="int8")) as cache:
        assert cache.profile is None


def test_open_with_a_profile_or_a_path(store, model, fitted, tmp_path):
    with store.open("chat", model, profile=fitted) as cache:
        assert cache.profile is fitted
        assert store.profiles.infos() == []  # nothing is stored before a save
    fitted.save(tmp_path / "file")
    with store.open("chat", model, profile=tmp_path / "file") as cache:
        assert cache.profile.digest == fitted.digest


def test_open_refuses_another_models_profile(store, fitted):
    other = tiny("llama", 1)
    with pytest.raises(krul.MismatchError, match="another model") as error:
        store.open("chat", other, profile=fitted)
    assert fitted.fingerprint.exact[:12] in str(error.value)
    assert fingerprint(other).exact[:12] in str(error.value)
    store.add_profile(fitted)
    with store.open("chat", other) as cache:
        assert cache.profile is None


def test_open_refuses_what_is_no_profile(store, model, tmp_path):
    with pytest.raises(TypeError, match="profile is 3 but must be"):
        store.open("chat", model, profile=3)
    with pytest.raises(FileNotFoundError):
        store.open("chat", model, profile=tmp_path / "nothing")
    (tmp_path / "file").write_text("words")
    with pytest.raises(krul.FormatError, match="file: "):
        store.open("chat", model, profile=str(tmp_path / "file"))


def test_a_damaged_profile_does_not_keep_open_from_working(store, model, fitted):
    store.add_profile(fitted)
    with open(path_of(store, fitted), "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    with (
        pytest.warns(RuntimeWarning, match="passed over"),
        store.open("chat", model) as cache,
    ):
        assert cache.profile is None


def test_a_changed_model_of_the_same_weights_gets_no_profile(store, fitted):
    other = tiny("llama")
    other.model.rotary_emb.inv_freq *= 0.5
    assert fingerprint(other).exact == fitted.fingerprint.exact
    store.add_profile(fitted)
    assert store.profiles.find(fingerprint(other)) is None
    assert store.profiles.find(fitted.fingerprint).digest == fitted.digest


def test_a_fork_has_no_profile(store, model, fitted):
    import copy

    with store.open("chat", model, profile=fitted) as cache:
        assert copy.deepcopy(cache).profile is None


def test_profile_is_loaded_as_it_was(store, model, fitted):
    store.add_profile(fitted)
    profiles._memory = profiles._Memory()
    with store.open("chat", model) as cache:
        assert cache.profile is not fitted
        assert isinstance(cache.profile, Profile)
        np.testing.assert_array_equal(cache.profile.layers[3].maps, fitted.layers[3].maps)
