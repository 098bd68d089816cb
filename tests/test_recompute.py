"""Partial recompute: any shape, whole and in chunks, gives the K and V of one whole prefill."""

import functools
import threading

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from krul import demo_model, observe, probe, recompute
from krul import model as ask
from krul.errors import DeviceError, DTypeError, ShapeError, UnsupportedModelError
from krul.recompute import recompute_prefix

N_TOKENS = 40
N_ROOM = N_TOKENS + 3
CHUNK = 16

SHAPES = {
    "all": [N_TOKENS] * 4,
    "uniform": [23] * 4,
    "pyramid": [40, 29, 17, 6],
    "two levels": [40, 40, 13, 13],
    "first layer": [37, 0, 0, 0],
    "lower half": [N_TOKENS, N_TOKENS, 0, 0],
}
STEPPED = ("pyramid", "two levels")

# Relative to the largest number of a tensor. The same sums in float32, but matrix products of
# other shapes add in another order, and four layers of peaked attention make more of that: 1e-6 for
# most of the families on one machine, but 1.0e-5 for granitemoe. A wrong mask, position or length
# gives about 1.
TOLERANCE = 1e-5
TOLERANCE_OF = {"granitemoe": 4e-5}

FAMILIES = [
    name
    for name in models.workable()
    if models.NOT_RECOMPUTABLE_BEFORE.get(name, (0, 0)) <= models.VERSION
]
PARTIAL = [name for name in FAMILIES if name != "gemma3n"]
REASON_OF_GEMMA3N = "where hidden states of shape .* can be cut"


@functools.lru_cache(maxsize=2)
def model_and_truth(family, n_batch=1, dtype=torch.float32, attention=None):
    """Return a model, ids, and what its layers hand to the cache in one prefill of them."""
    model = models.tiny(family, dtype=dtype, attn_implementation=attention)
    ids = models.token_ids(len(family), N_TOKENS, n_batch)
    cache = ask.Recorder(ask.text_config(model))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return model, ids, {layer: cache.key_value(layer) for layer in cache.seen}


def room_for(truth, layers=None):
    """Return empty buffers, whose tokens are not next to each other across heads."""
    return {
        layer: tuple(
            states.new_full((*states.shape[:2], N_ROOM, states.shape[3]), float("nan"))
            for states in truth[layer]
        )
        for layer in (truth if layers is None else layers)
    }


def assert_equal(found, truth, n_by_layer, tolerance=TOLERANCE, mask=None):
    """Compare the first tokens of each layer; what lies behind must be untouched."""
    for layer, pair in found.items():
        n_tokens = n_by_layer[layer]
        for kind, buffer, states in zip("KV", pair, truth[layer], strict=True):
            assert bool(buffer[:, :, n_tokens:].isnan().all()), f"{kind} of layer {layer}"
            if n_tokens == 0:
                continue
            wanted, got = states[:, :, :n_tokens].float(), buffer[:, :, :n_tokens].float()
            assert bool(got.isfinite().all()), f"{kind} of layer {layer}"
            if mask is not None:  # what padding has for K and V, nobody sees
                is_seen = mask[:, None, :n_tokens, None].bool()
                wanted, got = wanted * is_seen, got * is_seen
            distance = float((wanted - got).abs().max() / wanted.abs().max())
            assert distance <= tolerance, f"{kind} of layer {layer} is {distance:.1e} away"


def n_hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def count_passes(model):
    """Return a list that grows with each pass through the first layer."""
    calls = []
    layer = ask.decoder_layers(model)[1][0][1]
    return calls, layer.register_forward_pre_hook(lambda *_: calls.append(1))


# ---- every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1024, CHUNK])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_shape_equals_the_whole(family, chunk_tokens):
    model, ids, truth = model_and_truth(family)
    for shape, n_by_layer in SHAPES.items():
        # Layers without K and V of their own can only be left out.
        wanted = [n if layer in truth else 0 for layer, n in enumerate(n_by_layer)]
        found, ready = room_for(truth), []

        def run(wanted=wanted, found=found, ready=ready):
            recompute_prefix(
                model, ids, wanted, found, chunk_tokens=chunk_tokens, on_layer=ready.append
            )

        if family == "gemma3n" and shape in STEPPED:
            with pytest.raises(UnsupportedModelError, match=REASON_OF_GEMMA3N):
                run()
            assert_equal(found, truth, [0] * 4)  # nothing was written
        else:
            run()
            assert_equal(found, truth, wanted, TOLERANCE_OF.get(family, TOLERANCE))
            assert sorted(ready) == [layer for layer, n in enumerate(wanted) if n > 0], shape
            if chunk_tokens > N_TOKENS:
                assert ready == sorted(ready)
    assert n_hooks(model) == 0


@pytest.mark.parametrize("family", PARTIAL)
def test_next_turn_says_the_same(family):
    model, ids, truth = model_and_truth(family)
    more = models.token_ids(7, 9)
    cache = DynamicCache(config=ask.text_config(model))
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        # As a restore leaves it: windows and tails from the store, beginnings recomputed.
        restored = DynamicCache(config=ask.text_config(model))
        model(input_ids=ids, past_key_values=restored, use_cache=True)
        buffers = {}
        for layer in truth:
            held = restored.layers[layer]
            if held.keys.shape[2] == N_TOKENS:
                buffers[layer] = held.keys, held.values
                for tensor in buffers[layer]:
                    tensor[:, :, : SHAPES["pyramid"][layer]] = float("nan")
        recompute_prefix(model, ids, SHAPES["pyramid"], buffers, chunk_tokens=CHUNK)
        expected = model(input_ids=more, past_key_values=cache, use_cache=True).logits
        found = model(input_ids=more, past_key_values=restored, use_cache=True).logits
    # K and V differ by rounding alone, and so do the logits, relative to the largest of them.
    distance = float((expected - found).abs().max() / expected.abs().max())
    assert distance <= TOLERANCE_OF.get(family, TOLERANCE)


@pytest.mark.parametrize("family", PARTIAL)
def test_left_padded_batch(family):
    model = models.tiny(family)
    ids = models.token_ids(len(family), N_TOKENS, 2)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    cache = ask.Recorder(ask.text_config(model))
    # As generate() runs it, with the positions that it makes.
    model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False
    )
    truth = {layer: cache.key_value(layer) for layer in cache.seen}
    for chunk_tokens in (1024, CHUNK):
        found = room_for(truth)
        recompute_prefix(
            model,
            ids,
            SHAPES["pyramid"],
            found,
            attention_mask=mask,
            chunk_tokens=chunk_tokens,
        )
        assert_equal(found, truth, SHAPES["pyramid"], TOLERANCE_OF.get(family, TOLERANCE), mask)


# ---- other forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt_neox"])
def test_eager_attention_and_batch(family):
    model, ids, truth = model_and_truth(family, n_batch=2, attention="eager")
    for chunk_tokens in (1024, CHUNK):
        found = room_for(truth)
        recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=chunk_tokens)
        assert_equal(found, truth, SHAPES["pyramid"])


@settings(max_examples=40)
@given(st.lists(st.integers(0, N_TOKENS), min_size=4, max_size=4), st.integers(1, N_TOKENS + 1))
def test_any_numbers_and_chunks(numbers, chunk_tokens):
    model, ids, truth = model_and_truth("gemma3")
    n_by_layer = sorted(numbers, reverse=True)
    found = room_for(truth)
    recompute_prefix(model, ids, n_by_layer, found, chunk_tokens=chunk_tokens)
    assert_equal(found, truth, n_by_layer)


def test_bfloat16():
    model, ids, truth = model_and_truth("llama", dtype=torch.bfloat16)
    found = room_for(truth)
    recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=CHUNK)
    # A sum in another order may round to the next of 256 numbers in each layer.
    assert_equal(found, truth, SHAPES["pyramid"], tolerance=4 * 2**-8)


def test_layers_without_room_are_run_and_forgotten():
    model, ids, truth = model_and_truth("gemma3")
    found, ready = room_for(truth, [1, 3]), []
    recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=7, on_layer=ready.append)
    assert_equal(found, truth, SHAPES["pyramid"])
    assert sorted(found) == sorted(ready) == [1, 3]


def test_given_positions_are_used():
    model = models.tiny("llama")
    ids, positions = models.token_ids(3, N_TOKENS), torch.arange(5, 5 + N_TOKENS)[None]
    cache = ask.Recorder(ask.text_config(model))
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    truth = {layer: cache.key_value(layer) for layer in cache.seen}
    found = room_for(truth)
    recompute_prefix(model, ids, SHAPES["pyramid"], found, positions=positions, chunk_tokens=CHUNK)
    assert_equal(found, truth, SHAPES["pyramid"])


@pytest.mark.parametrize("family", ["llama", "xglm"])
def test_arguments_stay_as_they_are(family):
    model, ids, truth = model_and_truth(family)
    mask, positions = torch.ones_like(ids), torch.arange(N_TOKENS)[None]
    mask[0, 0] = 0
    given = ids, mask, positions
    copies = [tensor.clone() for tensor in given]
    buffers = room_for(truth, [3])
    recompute_prefix(
        model,
        ids,
        SHAPES["pyramid"],
        buffers,
        attention_mask=mask,
        positions=positions,
        chunk_tokens=CHUNK,
    )
    assert all(torch.equal(*pair) for pair in zip(given, copies, strict=True))
    assert list(buffers) == [3]


def test_nothing_runs_for_nothing():
    model, ids, truth = model_and_truth("llama")
    calls, handle = count_passes(model)
    found = room_for(truth)
    recompute_prefix(model, ids, [0] * 4, found, on_layer=pytest.fail)
    handle.remove()
    assert calls == []
    assert_equal(found, truth, [0] * 4)


def test_nothing_runs_above_the_deepest_layer():
    model, ids, truth = model_and_truth("llama")
    seen = []
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.append(name))
        for name, module in model.named_modules()
        if name.endswith((".mlp", "o_proj")) or name == "lm_head"
    ]
    recompute_prefix(model, ids, [40, 20, 0, 0], room_for(truth))
    for handle in handles:
        handle.remove()
    assert seen == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp"]


# ---- what is around the call ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        torch.enable_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
def test_modes_around_the_call_have_no_part_in_it(around):
    model, ids, truth = model_and_truth("llama")
    found = room_for(truth, [0, 2])
    with around():
        recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=CHUNK)
    assert_equal(found, truth, SHAPES["pyramid"])
    assert not any(tensor.requires_grad for pair in found.values() for tensor in pair)


def test_estimators_do_not_see_it():
    model, ids, truth = model_and_truth("llama")
    with observe.watch(model) as seen:
        recompute_prefix(model, ids, SHAPES["pyramid"], room_for(truth))
    assert seen == {}


def test_inside_another_pass_of_the_same_model():
    model, ids, truth = model_and_truth("llama")
    expected = model(ids).logits
    found = room_for(truth)
    attention = model.model.layers[2].self_attn
    handle = attention.register_forward_pre_hook(
        lambda *_: handle.remove() or recompute_prefix(model, ids, SHAPES["pyramid"], found)
    )
    assert torch.equal(model(ids).logits, expected)
    assert_equal(found, truth, SHAPES["pyramid"])
    assert n_hooks(model) == 0


def test_beside_a_thread_that_generates():
    model, ids, truth = model_and_truth("gemma3")
    prompt = models.token_ids(11, 30)

    def generate():
        return model.generate(prompt, max_new_tokens=25, do_sample=False, eos_token_id=None)

    expected = generate()
    outputs, is_over = [], threading.Event()

    def work():
        try:
            outputs.extend(generate() for _ in range(3))
        finally:
            is_over.set()

    thread = threading.Thread(target=work)
    thread.start()
    n_done = 0
    while not is_over.is_set() or n_done == 0:
        found = room_for(truth)
        recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=CHUNK)
        assert_equal(found, truth, SHAPES["pyramid"])
        n_done += 1
    thread.join()
    assert len(outputs) == 3
    assert all(torch.equal(output, expected) for output in outputs)
    assert n_hooks(model) == 0


def test_hook_bears_being_called_while_it_is_added_or_removed():
    """Between its two steps torch calls a hook in another thread without the keywords."""
    model, ids, truth = model_and_truth("llama")
    answers = []

    def look(layer):
        for module in model.model.layers:
            for hook in module._forward_pre_hooks.values():
                answers.append(hook(module, (ids,)))
                answers.append(hook(module, (ids,), {"past_key_values": DynamicCache()}))

    recompute_prefix(model, ids, SHAPES["all"], room_for(truth, [3]), on_layer=look)
    assert answers == [None] * 8


def test_offloaded_model():
    accelerate = pytest.importorskip("accelerate")
    _, ids, truth = model_and_truth("llama")
    model = models.tiny("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.embed_tokens.weight.is_meta
    found = room_for(truth)
    recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=CHUNK)
    assert_equal(found, truth, SHAPES["pyramid"])
    assert model.model.embed_tokens.weight.is_meta


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_a_user_records_is_not_recorded_of_it(family):
    _, ids, truth = model_and_truth(family)
    model = models.tiny(family, attn_implementation="eager")
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if family == "mixtral" or "router" not in name:
            setattr(model.config, name, True)
    found = room_for(truth)
    recompute_prefix(model, ids, SHAPES["pyramid"], found, chunk_tokens=CHUNK)
    assert_equal(found, truth, SHAPES["pyramid"])
    # transformers 4 records by methods of its own.
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(model(ids).hidden_states) == 5


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failing_model_keeps_no_hook(error):
    model = models.tiny("llama")
    ids, found = models.token_ids(3, N_TOKENS), room_for(model_and_truth("llama")[2])
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:  # in the second chunk
            raise error

    model.model.layers[1].mlp.forward = fail
    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    n_before = n_hooks(model)
    with pytest.raises(type(error)):
        recompute_prefix(model, ids, SHAPES["all"], found, chunk_tokens=CHUNK)
    assert n_hooks(model) == n_before
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_failing_callback_ends_it():
    model, ids, truth = model_and_truth("llama")

    def refuse(layer):
        raise OSError("nobody waits for it any more")

    with pytest.raises(OSError, match="nobody waits"):
        recompute_prefix(model, ids, SHAPES["all"], room_for(truth), on_layer=refuse)
    assert n_hooks(model) == 0


# ---- refusals ------------------------------------------------------------------------------------


def too_small(truth):
    return {0: tuple(tensor[:, :, :10] for tensor in room_for(truth)[0])}


def changed(change):
    return lambda truth: {2: tuple(change(tensor) for tensor in room_for(truth)[2])}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"n_by_layer": [10] * 3}, ShapeError, "has 3 numbers but the model 4 layers"),
        ({"n_by_layer": [10, 10, 11, 0]}, ValueError, "is 11 for layer 2 but 10 for layer 1"),
        ({"n_by_layer": [10, 0, 0, -1]}, ValueError, "no number may be negative"),
        ({"n_by_layer": [41, 0, 0, 0]}, ShapeError, "has 40 tokens but n_by_layer asks for 41"),
        ({"n_by_layer": []}, ShapeError, "has 0 numbers but the model 4 layers"),
        ({"n_by_layer": [1.5, 0, 0, 0]}, TypeError, "integer"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
        ({"token_ids": torch.zeros(40).long()}, ShapeError, r"token_ids is \(40,\)"),
        ({"attention_mask": torch.ones(1, 39)}, ShapeError, r"attention_mask is \(1, 39\)"),
        ({"positions": torch.arange(39)[None]}, ShapeError, r"positions is \(1, 39\)"),
        ({"buffers": too_small}, ShapeError, r"room \(1, 2, 10, 16\) .* at least 40 tokens"),
        (
            {"buffers": lambda truth: {4: room_for(truth)[3]}},
            ShapeError,
            "has layer 4 but the model layers 0 to 3",
        ),
        (
            {"buffers": changed(lambda x: x.expand(2, -1, -1, -1))},
            ShapeError,
            r"keys of layer 2 .* \(2, 2, 43, 16\) .* \(1, heads",
        ),
        (
            {"buffers": changed(lambda x: x[:, :1])},
            ShapeError,
            r"keys of layer 2 have room \(1, 1, 43, 16\) but the model makes \(1, 2, 17, 16\)",
        ),
        (
            {"buffers": changed(lambda x: x.bfloat16())},
            DTypeError,
            "keys of layer 2 have room of torch.bfloat16 but the model makes torch.float32",
        ),
        (
            {"buffers": changed(lambda x: x.to("meta"))},
            DeviceError,
            "keys of layer 2 have room on meta but are made on cpu",
        ),
    ],
)
def test_wrong_arguments(changes, error, words):
    model, ids, truth = model_and_truth("llama")
    arguments = {"token_ids": ids, "n_by_layer": SHAPES["pyramid"], "buffers": room_for, **changes}
    arguments["buffers"] = arguments["buffers"](truth)
    with pytest.raises(error, match=words):
        recompute_prefix(model, **arguments)
    assert n_hooks(model) == 0


def nothing_may_run(model):
    calls, _ = count_passes(model)
    return calls


def test_training_mode_is_refused():
    model = models.tiny("llama").train()
    calls = nothing_may_run(model)
    with pytest.raises(UnsupportedModelError, match=r"training mode.*call model\.eval\(\)"):
        recompute_prefix(model, models.token_ids(3, 20), [20, 10, 5, 1], {})
    assert calls == []


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mamba", "MambaForCausalLM"),
        ("lfm2", "Lfm2ForCausalLM"),
        ("bart", "is an encoder-decoder model"),
        ("t5", "is an encoder-decoder model"),
    ],
)
def test_families_that_krul_refuses(family, words):
    model = models.tiny(family)
    with pytest.raises(UnsupportedModelError, match=words):
        recompute_prefix(model, models.token_ids(3, 20), [20, 10, 5, 1], {})


def test_layers_that_share_are_refused():
    model = models.tiny("gemma3n")
    calls = nothing_may_run(model)
    with pytest.raises(UnsupportedModelError, match=r"layers \[3\] keep no K and V of their own"):
        recompute_prefix(model, models.token_ids(3, 20), [20] * 4, {})
    assert calls == []


def test_block_masks_are_refused():
    model = models.tiny("llama", attn_implementation="flex_attention")
    calls = nothing_may_run(model)
    with pytest.raises(UnsupportedModelError, match="flex_attention cannot be cut"):
        recompute_prefix(model, models.token_ids(3, 20), [20, 10, 5, 1], {})
    assert calls == []


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("attention_mask", (2, 1, 8, 12), (2, 1, 5, 9)),
        ("attention_mask", (2, 4, 1, 12), (2, 4, 1, 9)),
        ("attention_mask", (2, 12), (2, 9)),
        ("alibi", (8, 1, 12), (8, 1, 9)),
        ("position_ids", (2, 8), (2, 5)),
        ("position_ids", (3, 2, 8), (3, 2, 5)),
        ("cache_position", (8,), (5,)),
        ("position_embeddings", (2, 8, 8), (2, 5, 8)),
        ("position_embeddings", (2, 1, 8, 8), (2, 1, 5, 8)),
        ("cos", (8, 8), (5, 8)),
        ("per_layer_input", (2, 8, 3), (2, 5, 3)),
        ("weights", (4, 3), (4, 3)),
        ("scale", (8,), (8,)),
    ],
)
def test_what_is_cut_and_where(name, shape, expected):
    """Of a chunk of 8 tokens after 4 others, 5 are left."""
    progress = recompute._Progress([12, 9], {}, 8, (), None)
    progress.begin(4, 8)
    cut = recompute._Cut(progress.n_here(1), progress)
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    window = tuple(slice(n) for n in expected)
    assert torch.equal(cut(tensor, name), tensor[window])
    by_kind, other = cut(({"full_attention": tensor}, None), name)
    assert torch.equal(by_kind["full_attention"], tensor[window])
    assert other is None


def test_attention_that_bypasses_the_cache_is_noticed():
    model, ids, truth = model_and_truth("llama")
    layer = model.model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden_states, **kwargs: forward(
        hidden_states, **{**kwargs, "past_key_values": None}
    )
    try:
        with pytest.raises(UnsupportedModelError, match=r"layers \[1\] hand no K and V"):
            recompute_prefix(model, ids, [10, 10, 0, 0], room_for(truth))
    finally:
        del layer.forward


# ---- what probe says -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.workable())
def test_probe_tells_which_families_can(family):
    found = probe.probe(models.tiny(family)).partial
    if family in PARTIAL:
        assert found is None
    elif family == "gemma3n":
        assert "Gemma3nTextDecoderLayer is fed with (4, 1, 23, 64)" in found
    else:
        assert "depends on later tokens" in found


def test_probe_notices_a_layer_that_looks_at_other_tokens():
    model = models.tiny("llama")
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    # Of the last token alone: a whole prefill and a shorter one differ.
    mlp.forward = lambda hidden: forward(hidden) + hidden.shape[1] % 6
    found = probe.probe(model)
    assert found.recompute is None
    assert "when layers are recomputed for different numbers of tokens" in found.partial


# ---- the demo's model ----------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_with_a_thousand_tokens():
    model = AutoModelForCausalLM.from_pretrained(demo_model.model_path(), dtype=torch.float32)
    model.eval()
    n_tokens, n_layers = 1024, model.config.num_hidden_layers
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens))
    cache = ask.Recorder(model.config)
    with torch.no_grad():
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    n_by_layer = [n_tokens - n_tokens * layer // n_layers for layer in range(n_layers)]
    truth = {layer: cache.key_value(layer) for layer in range(n_layers)}
    found = {
        layer: tuple(torch.full_like(states, float("nan")) for states in pair)
        for layer, pair in truth.items()
    }
    recompute_prefix(model, ids, n_by_layer, found, chunk_tokens=384)
    # As TOLERANCE, with 30 layers, and sums of 576 and 1,536 numbers.
    assert_equal(found, truth, n_by_layer, tolerance=1e-4)
