"""kill -9 while a conversation is saved and appended to: the old turn or the new one, whole."""

import os
import random
import signal
import time

import models
import torch

import krul

N_KILLS = 40
EXACT = krul.Settings(codec="exact", n_threads=1)


def turn(model, store, seed):
    """One turn: open, feed the whole history with new tokens, answer, save."""
    with store.open("chat", model, settings=EXACT) as cache:
        new = models.token_ids(seed, 12)
        history = cache.token_ids if cache.n_tokens else new[:, :0]
        if history.shape[1] > 200:  # begin again, so that cropping is met as well
            history = history[:, :50]
        ids = torch.cat([history, new], dim=1)
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        cache.save()


def child(model, path, ready_fd):
    """Save turns until killed."""
    with krul.Store(path) as store:
        seed = os.getpid()
        os.write(ready_fd, b"x")
        while True:
            seed += 1
            turn(model, store, seed)


def test_kill_at_any_instant(tmp_path):
    model = models.tiny("llama")
    path = tmp_path / "store"
    rng = random.Random(7)
    n_seen = set()
    with krul.Store(path) as store:
        turn(model, store, 1)
        for _ in range(N_KILLS):
            before = store.info("chat").generation
            ready, ready_in_child = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    child(model, path, ready_in_child)
                finally:
                    os._exit(1)
            os.close(ready_in_child)
            assert os.read(ready, 1) == b"x"
            os.close(ready)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL
            assert store.verify() == []
            info = store.info("chat")
            assert info.generation >= before
            n_seen.add(info.generation - before)
            with store.open("chat", model, settings=EXACT) as cache:
                assert cache.n_tokens == info.n_tokens
                ids = torch.cat([cache.token_ids, models.token_ids(3, 4)], dim=1)
                with torch.no_grad():
                    got = model(ids[:, cache.n_tokens :], past_key_values=cache).logits
                    wanted = model(ids).logits[:, -4:]
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
        assert len(n_seen) > 1  # some were killed before a commit, some after
        store.gc()
        assert store.verify() == []
