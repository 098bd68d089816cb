"""krul.rotary: every family's keys are taken back to what they were, or refused with a reason."""

import numpy as np
import pytest
import torch
from models import config_of, draw, is_available, rope, tiny, token_ids, workable
from reference import profile_reference as reference
from transformers import AutoModelForCausalLM, DynamicCache

from krul.rotary import Rotary, find_rotary, rotate, unrotate

# Keys of these follow their position by more than a rotation: learned positions, a norm after the
# rotation, latent K beside rotated parts that stand where values do.
WITHOUT = {
    "gpt2",
    "opt",
    "biogpt",
    "gpt_bigcode",
    "gpt_neo",
    "xglm",
    "hunyuan_v1_dense",
}
LATENT = {"deepseek_v2", "deepseek_v3", "minicpm3"}
UNROTATED = {"bloom", "mpt", "falcon_alibi", "granitemoehybrid_attention"}


def keys_at(model, ids, shift):
    cache = DynamicCache(config=model.config.get_text_config())
    positions = torch.arange(shift, shift + ids.shape[1])[None]
    with torch.no_grad():
        model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


@pytest.mark.parametrize("name", workable())
def test_every_family_is_undone_or_refused(name):
    rotary, reasons = find_rotary(tiny(name))
    for one, reason in zip(rotary, reasons, strict=True):
        assert (one is None) != (reason is None)
    if name in WITHOUT:
        assert rotary == [None] * 4
        assert all("relative difference" in reason for reason in reasons)
    elif name not in LATENT:
        known = [one for one in rotary if one is not None]
        assert len(known) >= 3
        assert all((one.convention == "none") for one in known) == (name in UNROTATED)


# One of each: half, interleaved, partial at the head's beginning, two bases, layers without, yarn.
@pytest.mark.parametrize("name", ["llama", "cohere", "gptj", "gemma3", "smollm3", "nanochat"])
def test_shifted_positions_give_the_same_keys(name):
    model = tiny(name)
    # Within a window, so that the cache of a sliding layer still holds all.
    ids = token_ids(3, 7)
    rotary, _ = find_rotary(model)
    plain = []
    for shift in (0, 5, 200):
        keys = keys_at(model, ids, shift)
        plain.append([])
        for one, rotated in zip(rotary, keys, strict=True):
            cos, sin = map(torch.from_numpy, one.tables(np.arange(shift, shift + 7)))
            plain[-1].append(
                unrotate(rotated, cos, sin, convention=one.convention, start=one.start)
            )
            if one.convention != "none" and shift:
                assert (rotated - plain[-1][-1]).norm() > 0.1 * rotated.norm()
    for shifted in plain[1:]:
        for one, other in zip(plain[0], shifted, strict=True):
            assert (one - other).norm() <= 1e-3 * one.norm()


def of_kind(**parameters):
    if not is_available("llama"):
        pytest.skip("no llama")
    config = config_of("llama", max_position_embeddings=256)
    config.rope_parameters = {"rope_theta": 10_000.0, **parameters}
    model = AutoModelForCausalLM.from_config(config)
    draw(model)
    return model.eval()


needs_parameters = pytest.mark.skipif(
    "rope_parameters" not in rope(1.0), reason="transformers 4 spells it otherwise"
)


@needs_parameters
def test_scaling_of_yarn_is_undone():
    model = of_kind(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.25
    )
    rotary, reasons = find_rotary(model)
    assert reasons == [None] * 4
    assert rotary[0].scaling == 1.25
    seen = []
    module = model.model.layers[0].self_attn.k_proj
    module.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    rotated = keys_at(model, token_ids(1, 9), 40)[0]
    cos, sin = map(torch.from_numpy, rotary[0].tables(np.arange(40, 49)))
    plain = unrotate(rotated, cos, sin).transpose(0, 1).reshape(9, -1)
    assert (plain - seen[0]).norm() <= 1e-5 * plain.norm()  # rounding, and that of the angles


@needs_parameters
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_refused(kind):
    extra = {"factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        extra |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rotary, reasons = find_rotary(of_kind(rope_type=kind, **extra))
    assert rotary == [None] * 4
    assert all(kind in reason for reason in reasons)


@needs_parameters
def test_a_disguised_length_is_found_by_running():
    model = of_kind(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=64,
        short_factor=[1.0] * 8,
        long_factor=[2.0] * 8,
    )
    module = model.model.rotary_emb
    forward = module.forward

    def disguised(*args, **kwargs):
        module.rope_type = "longrope"
        try:
            return forward(*args, **kwargs)
        finally:
            module.rope_type = "default"

    module.rope_type, module.forward = "default", disguised
    rotary, reasons = find_rotary(model)
    assert rotary == [None] * 4
    assert "relative difference" in reasons[0]


def test_what_is_found_in_16_bits_is_what_is_found_in_32():
    wide, _ = find_rotary(tiny("cohere"))
    narrow, _ = find_rotary(tiny("cohere", dtype=torch.bfloat16))
    assert [one.convention for one in narrow] == [one.convention for one in wide]
    assert [one.start for one in narrow] == [one.start for one in wide]


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_rotate_is_the_reference_and_unrotate_undoes_it(convention, start, scaling):
    random = np.random.default_rng(0)
    keys = random.normal(size=(3, 5, 16))
    rotary = Rotary(convention, start, np.float32([1.0, 0.3, 0.01]), scaling)
    positions = np.array([0, 1, 7, 300, 4000])
    cos, sin = (torch.from_numpy(table).double() for table in rotary.tables(positions))
    options = {"convention": convention, "start": start}
    turned = rotate(torch.from_numpy(keys), cos, sin, **options)
    for token, position in enumerate(positions):
        matrix = reference.turn_matrix(convention, start, rotary.frequencies, 16, position)
        rotated = slice(start, start + 6)
        wanted = keys[:, token] @ matrix.T
        wanted[:, rotated] *= scaling
        # The angle is rounded to float32: 4000 radians by 2e-4, cosine and sine as much.
        np.testing.assert_allclose(turned[:, token], wanted, atol=1e-6 + 1e-7 * position)
    back = unrotate(turned, cos, sin, **options)
    np.testing.assert_allclose(back, keys, atol=1e-12)


@pytest.mark.parametrize(
    ("keys", "cos", "options", "words"),
    [
        ((2, 4), (2, 1), {"convention": "full"}, "'full'"),
        ((3, 4), (2, 1), {}, r"\(2, 1\)"),
        ((2, 4), (2, 3), {}, "6 numbers are rotated but a head has 4"),
        ((2, 4), (2, 1), {"start": 3}, "start is 3"),
        ((2, 4), (2, 1), {"start": -1}, "start is -1"),
    ],
)
def test_refusals(keys, cos, options, words):
    table = torch.ones(cos)
    with pytest.raises(ValueError, match=words):
        unrotate(torch.ones(keys), table, table, **options)


def test_positions_of_two_axes_are_refused():
    rotary = Rotary("half", 0, np.ones(1, np.float32), 1.0)
    with pytest.raises(ValueError, match="positions has 2 dimensions"):
        rotary.tables(np.zeros((1, 2)))
