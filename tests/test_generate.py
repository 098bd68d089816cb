"""What generate() says over a krul cache is what it says without one, or is refused."""

from __future__ import annotations

import functools
import warnings

import models
import pytest
import torch
import transformers
from transformers import DynamicCache

import krul
from krul.cache import Cache

MODELS = ("llama", "mistral", "gemma2", "gpt2", "qwen3")


@functools.cache
def model_of(name, implementation=None):
    model = models.tiny(name, attn_implementation=implementation)
    # Only what a test asks for ends a text: this id is never said.
    model.generation_config.eos_token_id = 10 * models.VOCABULARY
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(params=MODELS)
def model(request):
    model = model_of(request.param)
    with krul.attach(model, observe=False):
        yield model


@pytest.fixture
def llama():
    model = model_of("llama")
    with krul.attach(model, observe=False):
        yield model


def generate(model, ids, cache=None, mask=None, n_new=6, **options):
    options.setdefault("do_sample", False)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n_new, **options
    )


def fresh(model, ids, **options):
    """Return what the model says without any history in memory."""
    config = model.config.get_text_config(decoder=True)
    return generate(model, ids, DynamicCache(config=config), **options)


def filled(model, n_tokens=20, n_batch=1, seed=1):
    """Return a cache after a first turn, and all that was said."""
    cache = Cache(model=model)
    said = generate(model, models.token_ids(seed, n_tokens, n_batch), cache)
    return cache, said


def more(ids, seed=2, n_tokens=5):
    return torch.cat([ids, models.token_ids(seed, n_tokens, ids.shape[0])], dim=1)


def assert_knows(cache, sequences):
    """The cache holds a true prefix of the sequences, and K and V for just these tokens."""
    known = cache.token_ids
    assert known is not None, cache.why_unknown
    assert torch.equal(known, sequences[:, : known.shape[1]])
    for layer in cache.layers:
        assert layer.get_seq_length() == known.shape[1]


# ---- every way of decoding, over three turns -----------------------------------------------------

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_three_turns_say_what_a_model_without_history_says(model, way):
    cache = Cache(model=model)
    ids = models.token_ids(1, 20)
    for turn in range(3):
        torch.manual_seed(turn)
        # Looking candidates up in the prompt changes the speed of greedy decoding, not its result.
        wanted = fresh(model, ids, **({} if way == "prompt lookup" else WAYS[way]))
        torch.manual_seed(turn)
        said = generate(model, ids, cache, **WAYS[way])
        assert torch.equal(said, wanted), f"turn {turn}"
        assert cache.token_ids.shape[0] == 1
        if not (way.startswith("beams") and any(cache.is_sliding)):
            # A beam that was dropped behind a moving window stays, as tokens of its own.
            assert_knows(cache, said)
        ids = more(said, seed=10 + turn)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_two_turns_give_the_same_logits_as_a_dynamic_cache(name, implementation):
    model = model_of(name, implementation)
    options = {"return_dict_in_generate": True, "output_logits": True}
    first = models.token_ids(1, 20)
    theirs = DynamicCache(config=model.config)
    with krul.attach(model, observe=False):
        ours = Cache(model=model)
        for _ in range(2):
            wanted = generate(model, first, theirs, **options)
            got = generate(model, first, ours, **options)
            assert torch.equal(wanted.sequences, got.sequences)
            for left, right in zip(wanted.logits, got.logits, strict=True):
                assert torch.equal(left, right)
            first = more(wanted.sequences)


def test_several_answers_continue_one_history(llama):
    cache, said = filled(llama)
    ids = more(said)
    options = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    wanted = fresh(llama, ids, **options)
    torch.manual_seed(5)
    got = generate(llama, ids, cache, **options)
    assert torch.equal(got, wanted)
    assert cache.token_ids.shape[0] == 3
    assert_knows(cache, got)
    # The next turn goes on with the second of the three.
    ids = more(got[1:2], seed=9)
    assert torch.equal(generate(llama, ids, cache), fresh(llama, ids))
    assert cache.token_ids.shape[0] == 1
    assert cache.restore_report.n_cropped_tokens == 0


def test_beams_then_greedy_then_beams(llama):
    cache, said = filled(llama)
    for turn, n_beams in enumerate((3, 1, 4, 2)):
        ids = more(said, seed=turn)
        wanted = fresh(llama, ids, num_beams=n_beams)
        said = generate(llama, ids, cache, num_beams=n_beams)
        assert torch.equal(said, wanted)
        assert_knows(cache, said)


def test_several_beams_are_returned(llama):
    cache, said = filled(llama)
    ids = more(said)
    options = {"num_beams": 4, "num_return_sequences": 2}
    got = generate(llama, ids, cache, **options)
    assert torch.equal(got, fresh(llama, ids, **options))
    assert cache.token_ids.shape[0] == 2
    assert_knows(cache, got)


@pytest.mark.parametrize("n_history", [0, 20])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_an_assistant_model(name, n_history):
    model, assistant = model_of(name), models.tiny(name, seed=3)
    assistant.generation_config.eos_token_id = 10 * models.VOCABULARY
    with krul.attach(model, observe=False):
        cache = Cache(model=model)
        ids = models.token_ids(4, 20)
        if n_history:
            cache, said = filled(model, n_history)
            ids = more(said)
        n_before = cache.n_tokens
        got = generate(model, ids, cache, assistant_model=assistant, n_new=10)
        assert torch.equal(got, fresh(model, ids, n_new=10))
        assert_knows(cache, got)
        assert cache.restore_report.n_cropped_tokens == 0
        assert n_before <= cache.n_tokens
        ids = more(got, seed=6)
        assert torch.equal(generate(model, ids, cache), fresh(model, ids))


def test_prompt_lookup_over_a_history_runs_only_new_tokens(llama):
    cache, said = filled(llama, n_tokens=60)
    lengths = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        generate(llama, more(said), cache, prompt_lookup_num_tokens=3)
    finally:
        hook.remove()
    assert max(lengths) < 20


def test_a_left_padded_batch(model):
    texts = [models.token_ids(seed, n) for seed, n in ((1, 20), (2, 13), (3, 7))]
    ids = torch.cat([torch.nn.functional.pad(t, (20 - t.shape[1], 0)) for t in texts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(t), (20 - t.shape[1], 0)) for t in texts]
    )
    cache = Cache(model=model)
    for turn in range(2):
        wanted = fresh(model, ids, mask=mask)
        said = generate(model, ids, cache, mask=mask)
        assert torch.equal(said, wanted)
        assert torch.equal(cache.token_ids, said[:, :-1])
        assert cache.restore_report.n_cropped_tokens == 0
        known = (
            torch.ones_like(said[:, :-1]) if cache.attention_mask is None else cache.attention_mask
        )
        assert torch.equal(known[:, : mask.shape[1]].long(), mask)
        ids = more(said, seed=turn)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def test_a_batch_of_equal_lengths(model):
    cache, said = filled(model, n_batch=3)
    ids = more(said)
    assert torch.equal(generate(model, ids, cache), fresh(model, ids))
    assert cache.attention_mask is None
    assert cache.positions is None


def test_beams_over_a_left_padded_history(llama):
    ids = models.token_ids(1, 12, 2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = Cache(model=llama)
    said = generate(llama, ids, cache, mask=mask)
    ids = more(said)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    got = generate(llama, ids, cache, mask=mask, num_beams=3)
    assert torch.equal(got, fresh(llama, ids, mask=mask, num_beams=3))


def test_a_text_that_ends_early_in_a_batch(llama):
    ids = models.token_ids(1, 12, 3)
    end = int(fresh(llama, ids)[0, 13])
    cache = Cache(model=llama)
    said = generate(llama, ids, cache, eos_token_id=end)
    assert torch.equal(said, fresh(llama, ids, eos_token_id=end))
    ids = more(said)
    assert torch.equal(generate(llama, ids, cache), fresh(llama, ids))


# ---- each row of what generate() makes of a cache that is not empty ------------------------------


def test_the_whole_conversation_with_its_mask(model):
    cache, said = filled(model)
    n_cached, ids = cache.n_tokens, more(said)
    assert torch.equal(generate(model, ids, cache), fresh(model, ids))
    report = cache.restore_report
    assert n_cached == said.shape[1] - 1
    assert report.n_cropped_tokens == 0
    assert report.reason == ""


def test_only_the_new_ids_with_the_whole_mask_are_refused(model):
    cache, said = filled(model)
    ids = models.token_ids(2, 5)
    mask = torch.ones(1, said.shape[1] + 5, dtype=torch.int64)
    n_cached = cache.n_tokens
    with pytest.raises(krul.ShapeError, match="pass the ids of the whole conversation"):
        generate(model, ids, cache, mask=mask)
    assert cache.n_tokens == n_cached


def test_only_the_new_ids_without_a_mask_are_another_conversation(model):
    cache, _ = filled(model)
    ids = models.token_ids(77, 5)
    with pytest.warns(UserWarning, match=r"none of the 25 cached tokens begin the 5 given ones"):
        got = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, fresh(model, ids))
    assert cache.restore_report.n_cropped_tokens == 25


def test_a_prompt_as_long_as_what_is_cached(model):
    cache, said = filled(model)
    ids = said[:, : cache.n_tokens]
    assert torch.equal(generate(model, ids, cache), fresh(model, ids))
    assert "were given over" in cache.restore_report.reason


def test_a_prompt_shorter_than_what_is_cached(model):
    cache, said = filled(model)
    ids = said[:, :11]
    assert torch.equal(generate(model, ids, cache), fresh(model, ids))
    assert cache.restore_report.n_cropped_tokens >= 15


@pytest.mark.parametrize("at", [0, 1, 7, 19, 24])
def test_an_edited_history_of_the_same_length(model, at):
    cache, said = filled(model)
    ids = more(said)
    ids[0, at] = (ids[0, at] + 1) % 90 + 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if at == 0 else "error")
        got = generate(model, ids, cache)
    assert torch.equal(got, fresh(model, ids))
    report = cache.restore_report
    assert report.n_cropped_tokens >= 25 - at
    assert f"the history changed at token {at}" in report.reason
    assert_knows(cache, got)


@pytest.mark.parametrize("where", ["argument", "model", "config"])
def test_use_cache_false_is_refused(llama, where, monkeypatch):
    cache, said = filled(llama)
    options = {}
    if where == "argument":
        options["use_cache"] = False
    elif where == "model":
        monkeypatch.setattr(llama.generation_config, "use_cache", False)
    else:
        options["generation_config"] = transformers.GenerationConfig(
            use_cache=False, max_new_tokens=6
        )
    with pytest.raises(ValueError, match="use_cache is False but past_key_values is"):
        generate(llama, more(said), cache, **options)
    assert cache.n_tokens == 25


def test_a_chunked_prefill_of_an_empty_cache(model):
    cache, ids = Cache(model=model), models.token_ids(1, 21)
    got = generate(model, ids, cache, prefill_chunk_size=4)
    assert torch.equal(got, fresh(model, ids))
    assert_knows(cache, got)


def test_a_chunked_prefill_over_a_history(llama):
    cache, said = filled(llama)
    for n_beams in (1, 3):
        ids = more(said, n_tokens=11)
        said = generate(llama, ids, cache, prefill_chunk_size=4, num_beams=n_beams)
        assert torch.equal(said, fresh(llama, ids, num_beams=n_beams))
        assert cache.restore_report.n_cropped_tokens == 0


def test_hidden_states_of_cached_tokens_are_refused_with_assisted_decoding(llama):
    cache, said = filled(llama)
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.raises(ValueError, match="output_hidden_states is True with assisted decoding"):
        generate(llama, more(said), cache, prompt_lookup_num_tokens=2, **options)


@pytest.mark.parametrize("where", ["argument", "model"])
def test_a_cache_implementation_is_refused(llama, where, monkeypatch):
    cache, said = filled(llama)
    options = {}
    if where == "argument":
        options["cache_implementation"] = "static"
    else:
        monkeypatch.setattr(llama.generation_config, "cache_implementation", "static")
    with pytest.raises(ValueError, match="cache_implementation is 'static' but past_key_values"):
        generate(llama, more(said), cache, **options)


def test_a_pad_id_inside_the_text_is_a_token(llama):
    ids = models.token_ids(1, 20)
    ids[0, [4, 9, 10]] = llama.generation_config.pad_token_id
    cache = Cache(model=llama)
    for turn in range(2):
        got = llama.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, fresh(llama, ids))
        assert cache.attention_mask is None
        ids = more(got, seed=turn)


def test_embeddings_are_refused(llama):
    cache, said = filled(llama)
    embeddings = llama.get_input_embeddings()(more(said))
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        llama.generate(inputs_embeds=embeddings, past_key_values=cache, max_new_tokens=2)


def test_pixels_are_refused(llama):
    cache, said = filled(llama)
    with pytest.raises(krul.UnsupportedModelError, match="pixel_values was given together with"):
        generate(llama, more(said), cache, pixel_values=torch.zeros(1, 3, 4, 4))


def test_rows_that_do_not_fit_are_refused(llama):
    cache, _ = filled(llama, n_batch=3)
    with pytest.raises(krul.ShapeError, match="input_ids has 2 rows but the cache holds 3"):
        generate(llama, models.token_ids(1, 20, 2), cache)


def test_a_failing_generate_leaves_a_cache_that_can_go_on(llama):
    cache, said = filled(llama)

    class StopError(Exception):
        pass

    def fail(*_):
        raise StopError

    with pytest.raises(StopError):
        generate(llama, more(said), cache, num_beams=3, prefix_allowed_tokens_fn=fail)
    ids = more(said)
    assert torch.equal(generate(llama, ids, cache), fresh(llama, ids))


def test_return_dict_streamer_and_pipelines_arguments(llama):
    class Streamer:
        def __init__(self):
            self.ids = []

        def put(self, ids):
            self.ids += ids.flatten().tolist()

        def end(self):
            self.ids.append(-1)

    cache, said = filled(llama)
    streamer = Streamer()
    out = llama.generate(
        input_ids=more(said),
        attention_mask=torch.ones_like(more(said)),
        past_key_values=cache,
        return_dict_in_generate=True,
        streamer=streamer,
        max_new_tokens=6,
        do_sample=False,
    )
    assert out.past_key_values is cache
    assert streamer.ids == [*out.sequences[0].tolist(), -1]


def test_a_forward_pass_of_the_users_own(llama):
    """A loop over the model itself, in chunks, then token by token."""
    ids = models.token_ids(1, 20)
    cache = Cache(model=llama)
    with torch.no_grad():
        for start in (0, 7, 14):
            piece = ids[:, start : min(20, start + 7)]
            logits = llama(piece, past_key_values=cache, use_cache=True).logits
        said = ids
        for _ in range(6):
            token = logits[:, -1:].argmax(-1)
            said = torch.cat([said, token], dim=1)
            logits = llama(token, past_key_values=cache, use_cache=True).logits
    assert torch.equal(said, fresh(llama, ids))
    assert torch.equal(cache.token_ids, said)
    # The loop's cache serves generate() as well.
    ids = more(said)
    assert torch.equal(generate(llama, ids, cache), fresh(llama, ids))


def test_a_fork_goes_its_own_way(model):
    import copy

    cache, said = filled(model)
    fork = copy.deepcopy(cache)
    left, right = more(said, seed=3), more(said, seed=4)
    assert torch.equal(generate(model, left, cache), fresh(model, left))
    assert torch.equal(generate(model, right, fork), fresh(model, right))
    assert fork.restore_report.n_cropped_tokens == 0


def test_inference_mode_and_no_grad_in_turns(model):
    cache, ids = Cache(model=model), models.token_ids(1, 20)
    for turn, mode in enumerate((torch.inference_mode, torch.no_grad, torch.inference_mode)):
        with mode():
            said = generate(model, ids, cache)
        assert torch.equal(said, fresh(model, ids))
        ids = more(said.clone(), seed=turn)


@pytest.mark.parametrize("first", [True, False])
def test_autocast_in_one_turn_only(llama, first):
    def turns(cache):
        ids = models.token_ids(1, 20)
        for turn in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=(turn == 0) == first):
                out = generate(llama, ids, cache, return_dict_in_generate=True, output_logits=True)
            ids = more(out.sequences)
        return out

    wanted, got = turns(DynamicCache(config=llama.config)), turns(Cache(model=llama))
    assert torch.equal(wanted.sequences, got.sequences)
    for left, right in zip(wanted.logits, got.logits, strict=True):
        assert torch.equal(left, right)


def test_a_compiled_model_says_the_same(llama):
    torch._dynamo.reset()
    compiled = torch.compile(llama, dynamic=True, backend="eager")
    cache, ids = Cache(model=llama), models.token_ids(1, 20)
    with torch.no_grad():
        logits = compiled(ids, past_key_values=cache, use_cache=True).logits
        said = ids
        for _ in range(6):
            token = logits[:, -1:].argmax(-1)
            said = torch.cat([said, token], dim=1)
            logits = compiled(token, past_key_values=cache, use_cache=True).logits
    torch._dynamo.reset()
    assert torch.equal(said, fresh(llama, ids))
    assert torch.equal(cache.token_ids, said)
