"""What krul asks of a model: support, probe, layers, classes of layers, fingerprint."""

import copy
import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from array import array

import models
import numpy as np
import pytest
import torch
import transformers

from krul import _core
from krul import fingerprint as prints
from krul import model as ask
from krul import probe as probing
from krul.errors import MismatchError, UnsupportedModelError

HAS_PEFT = importlib.util.find_spec("peft") is not None
needs_peft = pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed (pip install peft)")

# What transformers' registry of attention functions does not reach, by the first release that does;
# None means none so far.
NOT_OBSERVED_BEFORE = {
    "falcon": None,
    "falcon_alibi": None,
    "bloom": None,
    "gptj": None,
    "gpt_neo": None,
    "codegen": None,
    "mpt": None,
    "xglm": None,
    "doge": None,  # its mask carries a learned bias
    "nemotron": (5, 5),
    "diffllama": (5, 5),
    "stablelm": (5, 0),
    "qwen2_moe": (5, 0),
    "olmoe": (5, 0),
    "phimoe": (5, 0),
    "dbrx": (5, 0),
}


def expect_observed(name):
    first = NOT_OBSERVED_BEFORE.get(name, (0, 0))
    return first is not None and first <= models.VERSION


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama")


# ---- support, probe, layers ----------------------------------------------------------------------


def test_families_that_this_release_lacks(record_property):
    record_property("absent", " ".join(models.ABSENT))
    print(f"transformers {transformers.__version__} lacks {len(models.ABSENT)}: {models.ABSENT}")
    # 4.57 lacks four families of the zoo; the newest release lacks none.
    assert len(models.workable()) >= 58
    if models.VERSION >= (5, 17):
        assert models.ABSENT == []


@pytest.mark.parametrize("name", models.workable())
def test_workable_family(name):
    model = models.tiny(name)
    assert ask.support(model) is None
    capabilities = probing.probe(model)
    assert capabilities.cache is None
    if models.NOT_RECOMPUTABLE_BEFORE.get(name, (0, 0)) > models.VERSION:
        assert "depends on later tokens" in capabilities.recompute
    else:
        assert capabilities.recompute is None
    assert (capabilities.observe is None) == expect_observed(name), capabilities.observe

    decoder, layers = ask.decoder_layers(model)
    assert [index for index, _, _ in layers] == list(range(models.N_LAYERS))
    assert all(layer in list(decoder.modules()) for _, layer, _ in layers)
    own = ask.own_layers(model)
    assert own == [name != "gemma3n" or index < 3 for index in range(models.N_LAYERS)]
    classes = ask.layer_classes(model)
    assert [number >= 0 for number in classes] == own

    found = prints.fingerprint(model)
    assert found.behaviour.shape == (256,)
    assert found.behaviour.dtype == np.float32
    assert np.isfinite(found.behaviour).all()
    assert [shape.kind != "none" for shape in found.layout] == own


@pytest.mark.parametrize(
    "name", [n for n in {**models.WORKABLE, **models.REFUSED} if models.is_refused(n)]
)
def test_refused_family(name):
    if not models.is_available(name):
        assert name in models.ABSENT
        return
    model = models.tiny(name)
    reason = ask.support(model)
    assert type(model).__name__ in reason
    assert probing.probe(model) == probing.Capabilities(*[reason] * 4)
    with pytest.raises(UnsupportedModelError, match=type(model).__name__):
        prints.fingerprint(model)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("llama", [0, 0, 0, 0]),
        ("mistral", [0, 0, 0, 0]),
        ("qwen2_sliding", [0, 0, 1, 1]),
        ("gemma2", [0, 1, 0, 1]),
        ("gemma3", [0, 1, 0, 1]),
        ("smollm3", [0, 1, 0, 1]),
        ("gpt_oss", [0, 1, 0, 1]),
        ("llama4", [0, 1, 0, 1]),
        ("gpt_neo", [0, 1, 0, 1]),
    ],
)
def test_layer_classes(name, classes):
    assert ask.layer_classes(models.tiny(name)) == classes


def test_layout_tells_windows_and_heads():
    layout = prints.fingerprint(models.tiny("gemma3")).layout
    assert layout[0] == prints.LayerShape("sliding", models.WINDOW, 2, 16, 16)
    assert layout[1] == prints.LayerShape("full", 0, 2, 16, 16)


@pytest.mark.parametrize("thing", [None, 3, "llama", torch.nn.Linear(2, 2)])
def test_what_is_no_model(thing):
    assert "must be, or contain, a transformers model" in ask.support(thing)
    with pytest.raises(UnsupportedModelError, match="must be, or contain"):
        ask.generation_model(thing)


def test_generation_model_looks_inside_wrappers(llama):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama

    assert ask.generation_model(Wrapper()) is llama
    assert ask.generation_model(torch.compile(llama)) is llama


def test_probe_leaves_no_trace():
    model = models.tiny("llama", attention_dropout=0.3)
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    registry = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert probing.probe(model) == probing.Capabilities()
    prints.fingerprint(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS) == registry
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_second_look_runs_nothing():
    model = models.tiny("llama")
    first = probing.probe(model), prints.fingerprint(model)
    calls = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    assert (probing.probe(model), prints.fingerprint(model)) == first
    assert calls == []
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.view(-1)[0] += 1
    probing.probe(model)
    assert len(calls) >= 3


def test_probe_forgets_models():
    model = models.tiny("llama")
    probing.probe(model)
    prints.fingerprint(model)
    n_known = len(ask._remembered)
    del model
    gc.collect()
    assert len(ask._remembered) < n_known


def test_probe_from_threads_at_once():
    model = models.tiny("gemma3")
    expected = models.tiny("gemma3")
    results, barrier = [], threading.Barrier(4)

    def run():
        barrier.wait()
        results.append((probing.probe(model), prints.fingerprint(model).exact))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(probing.probe(expected), prints.fingerprint(expected).exact)] * 4


class _Leaky(torch.nn.Module):
    """Adds a sum over all tokens that it has ever been fed, which no cache holds."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.total = inner, 0.0

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        self.total = self.total + 3.0 * out.sum(dim=1, keepdim=True)
        return out + self.total


def test_probe_finds_a_state_outside_the_cache():
    model = models.tiny("llama")
    model.model.layers[0].mlp = _Leaky(model.model.layers[0].mlp)
    capabilities = probing.probe(model)
    assert capabilities.cache is not None or capabilities.recompute is not None


def test_probe_finds_attention_to_later_tokens():
    model = models.tiny("llama")
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + x.mean(dim=1, keepdim=True)
    capabilities = probing.probe(model)
    assert capabilities.cache is None
    assert "depends on later tokens" in capabilities.recompute


def test_probe_finds_layers_that_bypass_the_cache():
    model = models.tiny("llama")
    attention = model.model.layers[2].self_attn
    forward = attention.forward

    def bypassing(*args, **kwargs):
        kwargs["past_key_values"] = None
        return forward(*args, **kwargs)

    attention.forward = bypassing
    reason = probing.probe(model).cache
    assert "layers [2] hand no K and V" in reason


def test_probe_reports_what_the_model_raises():
    model = models.tiny("llama")

    def failing(*args, **kwargs):
        raise ZeroDivisionError("no luck")

    model.model.layers[0].mlp.forward = failing
    assert "ZeroDivisionError: no luck" in probing.probe(model).cache


@pytest.mark.parametrize("n_passes", range(8))
def test_probe_asks_again_after_the_model_has_raised(n_passes):
    """As where memory was short for a moment; whichever of the passes met it."""
    model = models.tiny("llama")
    left = [n_passes]

    def fail(*_):
        left[0] -= 1
        if left[0] == -1:
            raise MemoryError("none left")

    hook = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    found = probing.probe(model)
    assert "MemoryError" in str(found) or left[0] >= 0
    hook.remove()
    assert probing.probe(model) == probing.Capabilities()


# ---- fingerprint ---------------------------------------------------------------------------------


def roundtrip(found):
    """Return `found` as a manifest gives it back."""
    kept = json.loads(json.dumps({"exact": found.exact, "parts": found.parts}))
    behaviour = np.frombuffer(found.behaviour.tobytes(), np.float32)
    return prints.Fingerprint(kept["exact"], behaviour, kept["parts"], ())


def refusal(stored, present):
    with pytest.raises(MismatchError) as info:
        prints.check_fingerprint(roundtrip(stored), present)
    with pytest.raises(MismatchError) as direct:
        prints.check_fingerprint(stored, present)
    assert str(info.value) == str(direct.value)
    return str(info.value)


def test_same_weights_same_fingerprint():
    first, second = (prints.fingerprint(models.tiny("llama")) for _ in range(2))
    assert first == second
    assert np.array_equal(first.behaviour, second.behaviour)
    prints.check_fingerprint(roundtrip(first), second)


def test_attention_implementation_is_no_difference():
    sdpa = prints.fingerprint(models.tiny("llama", attn_implementation="sdpa"))
    eager = prints.fingerprint(models.tiny("llama", attn_implementation="eager"))
    assert sdpa.exact == eager.exact
    assert 0 < prints.behaviour_distance(sdpa.behaviour, eager.behaviour) < 1e-5
    prints.check_fingerprint(roundtrip(sdpa), eager)


def test_training_mode_is_no_difference(llama):
    model = copy.deepcopy(llama).train()
    assert prints.fingerprint(model) == prints.fingerprint(llama)


def test_other_seed(llama):
    words = refusal(prints.fingerprint(llama), prints.fingerprint(models.tiny("llama", seed=1)))
    assert "weights differ" in words
    assert "stored" in words
    assert "present" in words


def test_other_dtype(llama):
    model = models.tiny("llama", dtype=torch.bfloat16)
    words = refusal(prints.fingerprint(llama), prints.fingerprint(model))
    assert "dtype differs: float32 stored, bfloat16 present" in words
    assert "weights differ" not in words


def test_one_changed_layer_is_named(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.5)
    words = refusal(prints.fingerprint(llama), prints.fingerprint(model))
    assert "weights differ: model.layers.2 (" in words
    assert "layers.1" not in words


def _read_by_torch(tensor):
    return prints._sample(tensor).contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.complex128])
def test_samples_are_those_of_torch(dtype):
    numbers = torch.arange(7 * 130 * 3).reshape(7, 130, 3)
    tensors = [
        numbers.to(dtype),
        numbers.to(dtype)[1],
        numbers.to(dtype).transpose(0, 1),  # not contiguous
        numbers.to(dtype)[:, ::2],
        torch.nn.Parameter(numbers[0, 0].to(dtype), requires_grad=False),
        torch.tensor(3).to(dtype),
        torch.zeros(0, 3, dtype=dtype),
        numbers.to(dtype)[3:],  # not the first of its storage
    ]
    found = prints._gather(tensors)
    assert found == [_read_by_torch(tensor) for tensor in tensors]
    assert [len(each) for each in found[4:7]] == [3 * dtype.itemsize, dtype.itemsize, 0]


def test_no_tensors_have_no_samples():
    assert prints._gather([]) == []
    assert _core.samples(array("q")) == b""


def test_a_tensor_whose_storage_was_emptied_is_an_error_and_no_crash():
    tensor = torch.ones(64, 64)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        prints._gather([torch.ones(3), tensor])


@pytest.mark.parametrize(
    "places",
    [
        [1, 2, 3],  # no whole place
        [0, 4, 1, 4],  # nowhere
        [64, -4, 1, 4],
        [64, 4, -1, 4],
        [64, 4, 1, 0],
        [64, 4, 1, 17],
        [64, 2**62, 4, 4],
        [64, 0, 2**61, 8, 64, 0, 2**61, 8],
    ],
)
def test_samples_from_places_that_cannot_be(places):
    with pytest.raises(ValueError, match=f"places has {8 * len(places)} bytes, but must be"):
        _core.samples(array("q", places))


def test_samples_visit_every_column():
    rows, columns = 256, 64
    step, n_samples = prints._places(rows * columns, columns)
    assert n_samples == 64
    assert {index * step % columns for index in range(64)} == set(range(columns))


def test_non_contiguous_parameter(llama):
    model = copy.deepcopy(llama)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        weight.detach().t().contiguous().t()
    )
    assert not model.model.layers[0].mlp.up_proj.weight.is_contiguous()
    assert prints.fingerprint(model).exact == prints.fingerprint(llama).exact


def test_other_rotary_base_shows_in_behaviour_alone():
    stored = prints.fingerprint(models.tiny("llama", **models.rope(10_000.0)))
    present = prints.fingerprint(models.tiny("llama", **models.rope(100_000.0)))
    assert stored.exact == present.exact
    words = refusal(stored, present)
    assert "behaviour differs: distance" in words
    assert "> 0.005" in words
    assert "rotary base" in words


def test_rotary_table_changed_in_place(llama):
    model = copy.deepcopy(llama)
    stored = prints.fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert "behaviour differs" in refusal(stored, prints.fingerprint(model))


def test_other_window():
    stored = prints.fingerprint(models.tiny("mistral"))
    present = prints.fingerprint(models.tiny("mistral", sliding_window=12))
    words = refusal(stored, present)
    assert "layer layout differs: 0-3: sliding 8 2x16/16 stored, 0-3: sliding 12 2x16/16" in words


def test_other_family(llama):
    words = refusal(prints.fingerprint(llama), prints.fingerprint(models.tiny("gpt2")))
    assert "layer layout differs" in words


@pytest.mark.parametrize(
    "parts",
    [{}, {"dtype": 3}, {"dtype": "float32", "weights lm": None}, {"layout": "x" * 9999}, {"a": []}],
    ids=["empty", "number", "null", "long", "unknown"],
)
def test_odd_stored_parts(llama, parts):
    present = prints.fingerprint(llama)
    odd = prints.Fingerprint("0" * 64, present.behaviour, parts, ())
    with pytest.raises(MismatchError, match="stored by another model: ") as info:
        prints.check_fingerprint(odd, present)
    assert 60 < len(str(info.value)) < 1000


def test_exact_alone_is_enough_to_refuse(llama):
    present = prints.fingerprint(llama)
    bare = prints.Fingerprint("0" * 64, present.behaviour, present.parts, ())
    with pytest.raises(MismatchError, match=f"{'0' * 64} stored and {present.exact} present"):
        prints.check_fingerprint(bare, present)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_behaviour_is_refused(llama, bad):
    present = prints.fingerprint(llama)
    numbers = present.behaviour.copy()
    numbers[7] = bad
    stored = prints.Fingerprint(present.exact, numbers, present.parts, ())
    with pytest.raises(MismatchError, match="distance inf"):
        prints.check_fingerprint(stored, present)


def test_behaviour_distance():
    numbers = np.linspace(-1, 1, 256)
    assert prints.behaviour_distance(numbers, numbers) == 0
    assert prints.behaviour_distance(numbers, 1.01 * numbers) == pytest.approx(0.01 / 1.01)
    assert prints.behaviour_distance(np.zeros(256), np.zeros(256)) == 0
    with pytest.raises(ValueError, match=r"present is \(255,\)"):
        prints.behaviour_distance(numbers, numbers[1:])


def test_weights_that_are_nowhere(llama):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(models.config_of("llama"))
    with pytest.raises(UnsupportedModelError, match="on the device 'meta'"):
        prints.fingerprint(model)


def test_exact_part_is_fast(llama):
    """A loose bound, to catch a copy of the weights; the figure is in the benchmarks."""
    prints.fingerprint(llama)
    best = min(_timed(lambda: prints.fingerprint(llama)) for _ in range(20))
    assert best < 0.03


def _timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_same_in_another_process(llama):
    code = (
        "import sys, models; from krul import fingerprint as prints\n"
        "f = prints.fingerprint(models.tiny('llama'))\n"
        "print(f.exact); print(f.behaviour.tobytes().hex())"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([here, os.path.dirname(here), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    exact, behaviour = done.stdout.split("\n")[:2]
    found = prints.fingerprint(llama)
    assert exact == found.exact
    assert bytes.fromhex(behaviour) == found.behaviour.tobytes()


# ---- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    import peft

    model = models.tiny("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(model, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return wrapped


@needs_peft
def test_lora_is_a_part_of_the_fingerprint(adapted, llama):
    assert ask.support(adapted) is None
    assert probing.probe(adapted).cache is None
    base, active = prints.fingerprint(llama), prints.fingerprint(adapted)
    words = refusal(base, active)
    assert "adapter state differs: none stored, default " in words
    assert "weights differ" not in words
    with adapted.disable_adapter():
        assert prints.fingerprint(adapted) == base
    assert prints.fingerprint(adapted) == active


@needs_peft
def test_lora_scaling_is_a_part(adapted):
    stored = prints.fingerprint(adapted)
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.01
    assert "adapter state differs" in refusal(stored, prints.fingerprint(adapted))


@needs_peft
def test_second_adapter(adapted):
    import peft

    stored = prints.fingerprint(adapted)
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert prints.fingerprint(adapted) == stored
    adapted.set_adapter("other")
    words = refusal(stored, prints.fingerprint(adapted))
    assert "default " in words
    assert "other " in words


@needs_peft
def test_merged_lora_is_other_weights(adapted, llama):
    active = prints.fingerprint(adapted)
    adapted.merge_adapter()
    merged = prints.fingerprint(adapted)
    words = refusal(active, merged)
    assert "adapter state differs" in words
    assert "weights differ" in words
    adapted.unmerge_adapter()
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert prints.fingerprint(plain).parts["adapters"] == "none"
    assert "weights differ" in refusal(prints.fingerprint(llama), prints.fingerprint(plain))


@needs_peft
def test_prompt_learning_is_refused():
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(models.tiny("llama"), config)
    assert "prompt-learning adapter 'default'" in ask.support(wrapped)


# ---- accelerate ----------------------------------------------------------------------------------


def test_offloaded_weights_are_read_where_they_are(llama):
    import accelerate

    model = accelerate.cpu_offload(copy.deepcopy(llama), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert probing.probe(model).cache is None
    assert prints.fingerprint(model) == prints.fingerprint(llama)


def test_layers_that_were_found_before_are_looked_at_again():
    model = models.tiny("llama")
    decoder, rows = ask.decoder_layers(model)
    assert ask.decoder_layers(model) == (decoder, rows)
    del model.model.layers[-1]
    assert ask.decoder_layers(model)[1] == rows[:-1]
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    with pytest.raises(UnsupportedModelError, match="no list of decoder layers"):
        ask.decoder_layers(model)


# ---- what is remembered of its tensors -----------------------------------------------------------


def _changes():
    def replaced(model):
        old = model.model.layers[1].mlp.up_proj.weight
        model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(old.detach() + 1)

    def untied(model):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    return {
        "written behind torch's back": lambda model: model.model.norm.weight.data.mul_(2),
        "another parameter": replaced,
        "another dtype of the same parameter": lambda model: model.to(torch.float16),
        "another shape of the same parameter": lambda model: model.resize_token_embeddings(131),
        "one tensor more": lambda model: model.model.register_buffer("more", torch.ones(3)),
        "one tensor less": lambda model: setattr(model.model.layers[0].mlp, "up_proj", None),
        "a tensor for itself": untied,
    }


@pytest.mark.parametrize("change", _changes())
def test_tensors_are_looked_at_anew_when_one_has_changed(change):
    model = models.tiny("llama", tie_word_embeddings=True)
    before = prints.exact_parts(model)
    assert prints.exact_parts(model) == before
    _changes()[change](model)
    found = prints.exact_parts(model)
    assert found == prints.exact_parts(copy.deepcopy(model))  # of which nothing is known
    assert found != before


def test_what_is_remembered_keeps_no_tensor_alive():
    model = models.tiny("llama")
    prints.exact_parts(model)
    weight = weakref.ref(model.model.layers[1].mlp.up_proj.weight)
    model.model.layers[1].mlp.up_proj = None
    gc.collect()
    assert weight() is None
