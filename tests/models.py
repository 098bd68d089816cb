"""A zoo of tiny random models: every family that krul takes, and those that it must refuse.

Each is made on the spot from a configuration, with four layers and weights drawn so that attention
is peaked: with the usual small weights every token attends to all others alike, and a wrong mask or
position would change nothing that a test could see. The numbers of a parameter depend on its name
and the seed alone, so any process, and any release of transformers with the same names, makes the
same model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from krul.errors import CorruptionError

__all__ = [
    "ABSENT",
    "NOT_RECOMPUTABLE_BEFORE",
    "REFUSED",
    "VERSION",
    "WORKABLE",
    "config_of",
    "draw",
    "failing",
    "is_available",
    "is_refused",
    "once_more",
    "rope",
    "same",
    "shared",
    "tiny",
    "token_ids",
    "tolerance",
    "workable",
]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

VOCABULARY = 128
N_LAYERS = 4
WINDOW = 8

#: Where `tiny` and `token_ids` make what they return; the fixture `device` sets it.
place = torch.device("cpu")


def rope(base: float, layer_types: Iterable[str] = ()) -> dict[str, Any]:
    """Return how the installed transformers wants to be told a rotary base, for some by type."""
    if VERSION < (5, 0):
        return {"rope_theta": base}
    parameters = {"rope_type": "default", "rope_theta": base}
    return {"rope_parameters": dict.fromkeys(layer_types, parameters) or parameters}


_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,  # tied, the next token would be the last one again
}
_MIXED = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_MULTI = {"num_key_value_heads": 4}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}

# Family: the configuration's class, and what differs from _PLAIN; ... takes a name away.
WORKABLE: dict[str, tuple[str, dict[str, Any]]] = {
    # One kind of attention layer
    "llama": ("LlamaConfig", {}),
    "mistral_full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": False}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "cohere": ("CohereConfig", rope(10_000.0)),
    "granite": ("GraniteConfig", {}),
    "gemma": ("GemmaConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "stablelm": ("StableLmConfig", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "seed_oss": ("SeedOssConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "apertus": ("ApertusConfig", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {}),
    "ministral3": ("Ministral3Config", {"sliding_window": None}),
    "diffllama": ("DiffLlamaConfig", {}),
    "doge": ("DogeConfig", {}),
    "bitnet": ("BitNetConfig", {}),
    "helium": ("HeliumConfig", {}),
    "nanochat": ("NanoChatConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", _MULTI),
    "gpt2": ("GPT2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("PersimmonConfig", {**_MULTI, **rope(10_000.0)}),
    "biogpt": ("BioGptConfig", {}),
    "gpt_bigcode": ("GPTBigCodeConfig", {}),
    "falcon": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": ...},
    ),
    "falcon_alibi": ("FalconConfig", {"alibi": True, "multi_query": False, "head_dim": ...}),
    "bloom": ("BloomConfig", {}),
    "gptj": ("GPTJConfig", {"rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": WINDOW,
        },
    ),
    "codegen": ("CodeGenConfig", {"rotary_dim": 8}),
    "mpt": (
        "MptConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": N_LAYERS, "max_seq_len": 512, "use_cache": True},
    ),
    "xglm": (
        "XGLMConfig",
        {"d_model": 64, "ffn_dim": 96, "num_layers": N_LAYERS, "attention_heads": 4},
    ),
    # Mixtures of experts
    "mixtral": ("MixtralConfig", {**_LOCAL, "sliding_window": None}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 48, "use_sliding_window": False},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "use_sliding_window": False}),
    "olmoe": ("OlmoeConfig", _EXPERTS),
    "phimoe": ("PhimoeConfig", {**_LOCAL, "sliding_window": None}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", _LOCAL),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": N_LAYERS,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 48,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                **({"hidden_size": 64} if VERSION >= (5, 0) else {}),
            },
        },
    ),
    # Sliding windows on every layer, and on some
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3_sliding": ("Phi3Config", {"sliding_window": WINDOW}),
    "starcoder2_sliding": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "qwen2_sliding": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 16},
    ),
    "olmo3": (
        "Olmo3Config",
        {"sliding_window": WINDOW, "layer_types": _MIXED, **rope(10_000.0, _MIXED)},
    ),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW, "layer_types": _MIXED}),
    "exaone4": ("Exaone4Config", {"sliding_window": WINDOW, "layer_types": _MIXED}),
    "gpt_oss": ("GptOssConfig", {**_LOCAL, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "modernbert_decoder": (
        "ModernBertDecoderConfig",
        {"local_attention": 2 * WINDOW, "sliding_window": WINDOW, "layer_types": _MIXED},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_LOCAL,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0, 1, 0],
            "moe_layers": [1, 3],
        },
    ),
    # Latent K and V, layers that share, heads of several sizes
    "deepseek_v2": ("DeepseekV2Config", _LATENT),
    "deepseek_v3": ("DeepseekV3Config", _LATENT),
    "minicpm3": ("MiniCPM3Config", {**_LATENT, "scale_emb": 1, "dim_model_base": 64}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * N_LAYERS,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 32,
        },
    ),
    "granitemoehybrid_attention": (
        "GraniteMoeHybridConfig",
        {**_LOCAL, "layer_types": ["attention"] * N_LAYERS, "shared_intermediate_size": 48},
    ),
}

# What krul must refuse, by the class of its configuration; never built with peaked weights.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "falcon_h1": ("FalconH1Config", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}),
    "mamba": ("MambaConfig", {}),
    "mamba2": ("Mamba2Config", {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "jamba": (
        "JambaConfig",
        {
            **_LOCAL,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 8,
        },
    ),
    "bamba": (
        "BambaConfig",
        {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16},
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", {"lru_width": 64, "attention_window_size": 8}),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 64}),
    "minimax": ("MiniMaxConfig", _LOCAL),
    "bart": (
        "BartConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
    "t5": ("T5Config", {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}),
}

# Families that this transformers lacks: a fact about the version, printed with every test run.
ABSENT = sorted(
    name
    for name, (config_class, _) in {**WORKABLE, **REFUSED}.items()
    if not hasattr(transformers, config_class)
)


# Families that transformers itself gets wrong or calls stateful up to a release.
REFUSED_BEFORE = {"granitemoehybrid_attention": (5, 4)}
NOT_RECOMPUTABLE_BEFORE = {"doge": (5, 18)}


def is_refused(name: str) -> bool:
    """Whether krul must refuse the family `name` under the installed transformers."""
    return name in REFUSED or REFUSED_BEFORE.get(name, (0, 0)) > VERSION


def workable() -> list[str]:
    """Return the families that krul must take under the installed transformers."""
    return [name for name in WORKABLE if is_available(name) and not is_refused(name)]


def is_available(name: str) -> bool:
    """Whether the installed transformers knows the family `name`."""
    return name not in ABSENT


def config_of(name: str, **changes: Any) -> Any:
    """Return the configuration of `name`, with `changes`."""
    class_name, differences = {**WORKABLE, **REFUSED}[name]
    values = {**_PLAIN, **differences, **changes}
    return getattr(transformers, class_name)(
        **{key: value for key, value in values.items() if value is not ...}
    )


def tiny(
    name: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    **changes: Any,
) -> Any:
    """Return a tiny model of the family `name` in evaluation mode, the same in every process."""
    config = config_of(name, **changes)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if config.is_encoder_decoder:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM.from_config(config).eval()
    # Buffers such as slopes and frequencies are made in float32 whatever the parameters are.
    model = AutoModelForCausalLM.from_config(config, **options)
    if name in WORKABLE:
        draw(model, seed)
    return model.to(place, dtype).eval()


@functools.cache
def _shared(name: str, device: torch.device) -> Any:
    assert device == place
    return tiny(name)


def shared(name: str) -> Any:
    """Return `tiny(name)`, made once for each place; whoever takes it leaves it as it was."""
    return _shared(name, place)


def once_more(work: Callable[[], Any]) -> Any:
    """Return what `work` does over a damaged history.

    A GPU may learn of damage behind the pass that used it, which is then undone, and repaired.
    """
    try:
        return work()
    except CorruptionError as error:
        if place.type == "cpu" or "undone" not in str(error):
            raise
        return work()


@contextlib.contextmanager
def failing(model: Any, error: type[BaseException], layer: int = 1) -> Iterator[None]:
    """Let a model that is built like Llama fail once in a layer."""
    left = [1]

    def fail(*_: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error("in the middle")

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def tolerance() -> float:
    """Return how far numbers of tiny float32 models may be apart, relative to the largest.

    Products of other shapes add in another order; a GPU also chooses a kernel by the shape, and by
    how tensors lie in memory.
    """
    return 1e-4 if place.type == "cuda" else 1e-5


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits are equal: bit for bit, but on a GPU as far as its kernels allow."""
    if place.type != "cuda":
        return torch.equal(found, wanted)
    bound = {torch.float32: tolerance(), torch.float16: 1e-2, torch.bfloat16: 1e-1}[wanted.dtype]
    return bool((found - wanted).abs().max() <= bound * wanted.abs().max())


def draw(model: torch.nn.Module, seed: int = 0) -> None:
    """Give each parameter numbers that depend on its name and `seed`, with peaked attention."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or "ln_" in name or "layernorm" in name
            if parameter.dim() == 1 and is_norm and name.endswith("weight"):
                # Around what the model starts from: 1, or 0 where it adds the 1 itself.
                extra = 1.0 if "q_norm" in name or "k_norm" in name else 0.0
                parameter.add_(0.1 * noise + extra)
            elif parameter.dim() < 2:
                parameter.copy_(0.2 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                # Small beside what the layers add: what was read before must decide the next token.
                parameter.copy_(0.3 * noise)
            else:
                is_query = any(word in name for word in _QUERY_AND_KEY)
                parameter.copy_(noise * (2.5 if is_query else 1.0) / math.sqrt(64))


_QUERY_AND_KEY = ("q_proj", "k_proj", "qkv", "query", "c_attn", "Wqkv", "q_b_proj", "kv_a_proj")


def token_ids(seed: int, n_tokens: int, n_batch: int = 1) -> torch.Tensor:
    """Return random ids [n_batch, n_tokens], int64, without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_batch, n_tokens), generator=generator).to(place)
