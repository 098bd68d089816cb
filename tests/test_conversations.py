"""Conversations that go on at random: fed, cut, saved, left and come back to, struck by faults.

Whatever happened before, a pass over the cache says what the model says of the same tokens without
any cache, or an error is raised and the next pass does. Codec exact, so that only rounding differs.
"""

import os
import shutil
import tempfile
import warnings

import models
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import krul
from krul import costs, source

#: KRUL_CONVERSATIONS=2000 for a long look.
N_CONVERSATIONS = int(os.environ.get("KRUL_CONVERSATIONS", "60"))

RESTORES = ("auto", "load", "mixed", "uniform", "pyramid", "step", "recompute")
# Of the second row, where there are two.
N_PADDING = 3
# Transformers alone, fed in other parts, is up to 1.5e-5 away.
N_TOLERANCES = 3

numbers = st.integers(0, 2**20)


class ModelError(Exception):
    pass


class Interruption(KeyboardInterrupt):
    pass


class Conversation(RuleBasedStateMachine):
    """One cache over one stored conversation, and the tokens that it must hold."""

    @initialize(
        family=st.sampled_from(["llama", "gemma2", "smollm3"]),
        seed=numbers,
        n_rows=st.sampled_from([1, 1, 2]),
    )
    def begin(self, family, seed, n_rows):
        self.model = models.shared(family)
        self.folder = tempfile.mkdtemp()
        self.store = krul.Store(os.path.join(self.folder, "store"))
        self.seed, self.is_damaged = seed, False
        self.n_rows = n_rows
        self.ids = self.saved = torch.zeros(n_rows, 0, dtype=torch.int64)
        self.cache = self.store.open("chat", self.model, settings=self.settings_of("auto", 0))

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.close()
            self.store.close()
            shutil.rmtree(self.folder)

    def settings_of(self, restore, rate, is_dropped=False):
        return krul.Settings(
            codec="exact",
            guard_tokens=0,
            estimator_rows=0,
            restore=restore,
            max_read_bytes_per_s=rate,
            drop_recomputed=is_dropped,
        )

    def new_tokens(self, n):
        self.seed += 1
        if self.n_rows > 1 and self.ids.shape[1] == 0:
            n += N_PADDING  # so that every row has a token
        return models.token_ids(self.seed % 2**31, n, self.n_rows)

    def mask(self, n):
        mask = torch.ones(self.n_rows, n, dtype=torch.int64)
        mask[1:, :N_PADDING] = 0
        return mask

    def padding(self, n_before, n):
        """Return mask and positions where there is padding; of tokens from `n_before` up to `n`."""
        if self.n_rows == 1:
            return {}
        mask = self.mask(n)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return {"attention_mask": mask, "position_ids": positions[:, n_before:]}

    @torch.no_grad()
    def plain(self, ids, n_kept):
        given = self.padding(0, ids.shape[1])
        return self.model(ids, use_cache=False, **given).logits[:, -n_kept:]

    def expect(self, logits, ids):
        expected = self.plain(ids, logits.shape[1])
        is_text = self.mask(ids.shape[1])[:, -logits.shape[1] :] != 0
        allowed = N_TOLERANCES * models.tolerance() * expected[is_text].abs().max()
        assert (logits - expected)[is_text].abs().max() <= allowed

    def feed(self, new):
        n_held = self.ids.shape[1]
        given = self.padding(n_held, n_held + new.shape[1])
        with torch.no_grad():
            return self.model(new, past_key_values=self.cache, use_cache=True, **given).logits

    # ---- what may happen -------------------------------------------------------------------------

    @rule(n=st.one_of(st.integers(1, 30), st.sampled_from([1, 300, 520])))
    def goes_on(self, n):
        whole = torch.cat([self.ids, self.new_tokens(n)], 1)
        self.expect(self.feed(whole[:, self.ids.shape[1] :]), whole)
        self.ids = whole

    @rule(
        n=st.integers(1, 30),
        layer=st.integers(0, models.N_LAYERS - 1),
        error=st.sampled_from([ModelError, Interruption]),
    )
    def is_struck(self, n, layer, error):
        whole = torch.cat([self.ids, self.new_tokens(n)], 1)
        new = whole[:, self.ids.shape[1] :]
        with models.failing(self.model, error, layer):
            try:
                logits = self.feed(new)
            except (ModelError, Interruption):
                self.cache._settle()
                return
        # It met what was recomputed for the pass, which was loaded after all.
        self.expect(logits, whole)
        self.ids = whole

    @rule(n_prompt=st.integers(1, 12), n_new=st.integers(1, 6), n_kept=numbers)
    def generates(self, n_prompt, n_new, n_kept):
        """With the history as it is, or as somebody has edited it."""
        n_held = self.ids.shape[1]
        n_kept = n_held if n_kept % 2 else n_kept // 2 % (n_held + 1)
        if self.n_rows > 1 and n_kept <= N_PADDING:
            n_kept = 0
            n_prompt += N_PADDING
        new = self.new_tokens(n_prompt)
        prompt = torch.cat([self.ids[:, :n_kept], new], 1)
        options = {
            "attention_mask": self.mask(prompt.shape[1]),
            "max_new_tokens": n_new,
            "do_sample": False,
            "eos_token_id": None,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        out = self.model.generate(prompt, past_key_values=self.cache, **options)
        self.ids = out.sequences[:, :-1].cpu()
        logits = torch.stack(out.logits, 1)
        self.expect(logits, self.ids)

    @precondition(lambda self: self.ids.shape[1] > 0)
    @rule(n=numbers)
    def is_cut(self, n):
        n %= self.ids.shape[1] + 1
        if self.n_rows > 1 and self.ids.shape[1] - n <= N_PADDING:
            n = self.ids.shape[1]
        self.cache.crop(-n)
        self.ids = self.ids[:, : self.ids.shape[1] - n]

    @rule(in_background=st.booleans())
    def is_saved(self, in_background):
        if self.ids.shape[1] == 0:
            return
        if in_background:
            self.cache.save(wait=False).result()
        else:
            self.cache.save()
        self.saved = self.ids

    @rule()
    def is_waited_for(self):
        self.cache.restore()

    @rule(
        restore=st.sampled_from(RESTORES),
        rate=st.sampled_from([0, 3e5, 1e6, 1e7]),
        forward_s=st.sampled_from([1e-6, 1e-5, 1e-4]),
        is_dropped=st.booleans(),
        most=st.sampled_from([0, 2048]),
        damage=st.one_of(st.none(), numbers),
    )
    def comes_back(self, restore, rate, forward_s, is_dropped, most, damage):
        self.cache.close()
        source._MOST_IN_ONE_PASS = most
        book = costs.cost_book(self.store.path, krul.restore.examine(self.model)[1].exact)
        book._passes.clear()
        for n_tokens in (100, 1000):
            book.add_forward(0, n_tokens, 0.001 + forward_s * n_tokens)
        book.read_bytes_per_s = 1e7
        if damage is not None:
            self.damage(damage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.cache = self.store.open(
                "chat", self.model, settings=self.settings_of(restore, rate, is_dropped)
            )
        n_held = self.cache.n_tokens if self.is_damaged else self.saved.shape[1]
        self.ids = self.saved[:, :n_held]

    def damage(self, number):
        """Flip a byte of a segment."""
        manifest = self.store.files("chat").read_manifest()
        if manifest is None or not manifest.segments:
            return
        self.is_damaged = True  # for good: a save adds to what is there
        segment = manifest.segments[number % len(manifest.segments)]
        path = os.path.join(self.store.files("chat").path, segment.file)
        at = number % os.path.getsize(path)
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x40]))

    # ---- what must be so -------------------------------------------------------------------------

    @invariant()
    def the_tokens_are_known(self):
        if hasattr(self, "cache"):
            assert self.cache.n_tokens == self.ids.shape[1]
            assert self.ids.shape[1] == 0 or torch.equal(self.cache.token_ids, self.ids)


@pytest.fixture(autouse=True)
def most_in_one_pass():
    before = source._MOST_IN_ONE_PASS
    yield
    source._MOST_IN_ONE_PASS = before


@pytest.mark.filterwarnings("ignore")
class TestConversation(Conversation.TestCase):
    settings = settings(
        max_examples=N_CONVERSATIONS,
        stateful_step_count=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
