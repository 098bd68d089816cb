"""A saving process is killed at random instants: never a conversation lost or torn."""

import mmap
import os
import random
import signal
import struct
import time

import numpy as np

from krul import _core
from krul.store import Entry, LayerLayout, Manifest, SegmentInfo, Store

N_KILLS = 200  # half of them upon a disk, half in memory, where a save takes no time to wait
N_SEGMENTS = 5
N_TOKENS = 3
LAYERS = (LayerLayout("full", 1, 4, 4, None, "float32", "float32"),) * 3


def payloads_of(generation):
    """The payloads of the segment that a generation writes, some of them past a page."""
    noise = np.random.default_rng(generation)
    return [noise.bytes(int(noise.integers(1, 20_000))) for _ in range(2 * len(LAYERS))]


def history_of(generation):
    """The generations whose segments make up a conversation: a new start every N_SEGMENTS."""
    first = (generation - 1) // N_SEGMENTS * N_SEGMENTS + 1
    return list(range(first, generation + 1))


def save(files, generation, current):
    """Commit a generation upon the one before it: begin anew, or append a segment."""
    kept = current.manifest.segments if len(history_of(generation)) > 1 else ()
    start = len(kept) * N_TOKENS
    manifest = Manifest(
        token_ids=np.repeat(history_of(generation), N_TOKENS)[None],
        layers=LAYERS,
        segments=(*kept, SegmentInfo("", start, N_TOKENS)),
        fingerprint={"exact": "model"},
    )
    entries = [
        Entry(1, 1, kv, 1, layer, -1, 1, 1, 4, start, N_TOKENS)
        for layer in range(len(LAYERS))
        for kv in (0, 1)
    ]
    return files.commit(manifest, entries, payloads_of(generation), generation - 1)


class Current:
    """Stands for the result of the last save of a process that was killed."""

    def __init__(self, manifest):
        self.manifest = manifest
        self.generation = 0 if manifest is None else manifest.generation


def save_for_ever(path, progress):
    """Run in the child: tell which generation is begun, save it, tell that it is durable."""
    with Store(path) as store:
        files = store.files("chat")
        current = Current(files.read_manifest())
        while True:
            generation = current.generation + 1
            struct.pack_into("<q", progress, 0, generation)
            current = save(files, generation, current)
            struct.pack_into("<q", progress, 8, generation)


def generation_found(files):
    """The generation in the store, of which every byte has been compared."""
    manifest = files.read_manifest()
    if manifest is None:
        return 0
    history = history_of(manifest.generation)
    assert manifest.token_ids.tolist() == [np.repeat(history, N_TOKENS).tolist()]
    assert len(manifest.segments) == len(history)
    for info, generation in zip(manifest.segments, history, strict=True):
        fd, entries = files.open_segment(info, manifest)
        try:
            found = [_core.store_read_payload(fd, entry) for entry in entries]
        finally:
            os.close(fd)
        assert found == payloads_of(generation)
    return manifest.generation


def kill_often(path, n_kills):
    """Kill a saving child again and again; returns what was hit."""
    chance = random.Random(7)
    progress = mmap.mmap(-1, 16)
    n_interrupted = n_new = n_leftovers = 0
    with Store(path) as store:
        files = store.files("chat")
        # How long a save takes here, so that the instants spread over some of them.
        start_s = time.perf_counter()
        current = save(files, 1, Current(None))
        for generation in (2, 3):
            current = save(files, generation, current)
        span_s = min(2.5 * (time.perf_counter() - start_s) / 3, 0.1) + 0.01
        struct.pack_into("<2q", progress, 0, 3, 3)
        for _ in range(n_kills):
            child = os.fork()
            if child == 0:
                try:
                    save_for_ever(store.path, progress)
                finally:
                    os._exit(3)
            time.sleep(chance.uniform(0.001, span_s))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status), "the child ended by itself"

            begun, durable = struct.unpack("<2q", progress[:16])
            found = generation_found(files)
            assert found in (durable, begun)
            assert begun in (durable, durable + 1)
            assert store.verify() == []
            n_interrupted += begun != durable
            n_new += found != durable
            n_leftovers += bool(set(os.listdir(files.path)) - names_of(files))
            struct.pack_into("<2q", progress, 0, found, found)

        # What was left over goes with the next save, and no lock is left held.
        save(files, found + 1, Current(files.read_manifest()))
        assert set(os.listdir(files.path)) == names_of(files)
    return n_interrupted, n_new, n_leftovers, found


def names_of(files):
    """The files that a conversation should have."""
    return {"lock", "manifest"} | {segment.file for segment in files.read_manifest().segments}


def test_two_hundred_kills(tmp_path):
    """After each, the conversation is whole, and is the old or the new one."""
    on_disk = kill_often(tmp_path / "store", N_KILLS // 2)
    with Store("memory:") as private:
        in_memory = kill_often(os.path.join(private.path, "inner"), N_KILLS // 2)
    print(f"in a save, after its commit, with leftovers, saves: {on_disk}, {in_memory}")
    n_interrupted, n_new, n_leftovers, n_saves = map(sum, zip(on_disk, in_memory, strict=True))
    # Instants of every kind were hit, or the test has shown nothing.
    assert n_interrupted > N_KILLS / 4
    assert n_leftovers > N_KILLS / 20
    assert n_new > 0
    assert n_saves > N_KILLS / 4
