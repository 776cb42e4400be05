"""Tiny models of Hugging Face's families, with weights that let no feature of their attention pass unnoticed.

Two to four layers, so that layer types alternate; windows, chunks and the lengths at which RoPE changes lie within the
few tokens that tests have; sinks are drawn with a standard deviation of 3, softcaps are of the size of the scores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
WINDOW = 6
"""Tokens that a query of a windowed layer sees, itself among them."""

LONGEST_SHORT_ROPE = 27
"""Tokens up to which RoPE that adapts to the length keeps its first frequencies."""

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FOUR_LAYERS = {"num_hidden_layers": 4}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def _config(model_type: str, *groups: dict, **others: object) -> Callable[[], PreTrainedConfig]:
    settings = dict(SMALL)
    for group in (*groups, others):
        settings |= group
    return lambda: AutoConfig.for_model(model_type, **settings)


DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 4.0,
    "original_max_position_embeddings": LONGEST_SHORT_ROPE,
}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}

FAMILIES = {
    "llama": _config("llama"),
    "llama_dynamic_rope": _config("llama", max_position_embeddings=LONGEST_SHORT_ROPE, rope_parameters=DYNAMIC_ROPE),
    "qwen2": _config("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen2_moe": _config("qwen2_moe", EXPERTS, num_experts=4, shared_expert_intermediate_size=24),  # its window is 0
    "qwen3": _config("qwen3", head_dim=16),
    "qwen3_moe": _config("qwen3_moe", EXPERTS, head_dim=8, num_experts=4),
    "mistral": _config("mistral", sliding_window=WINDOW),
    "mixtral": _config("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=2 * WINDOW),
    "gemma2": _config(
        "gemma2",
        ALTERNATING,
        head_dim=8,
        query_pre_attn_scalar=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": _config("gemma3_text", ALTERNATING, head_dim=8, query_pre_attn_scalar=12),
    "gpt_oss": _config("gpt_oss", ALTERNATING, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _config(
        "deepseek_v3",
        MLA,
        EXPERTS,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_mtp_layers=0,
    ),
    "llama4": _config(
        "llama4_text",
        FOUR_LAYERS,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        floor_scale=4,
        attn_scale=0.5,
    ),
    "phi3": _config("phi3", sliding_window=WINDOW),
    "phi3_long_rope": _config(
        "phi3",
        rope_parameters=LONG_ROPE,
        original_max_position_embeddings=LONGEST_SHORT_ROPE,
        max_position_embeddings=108,
    ),
    "smollm3": _config("smollm3", FOUR_LAYERS),
    "cohere2": _config("cohere2", ALTERNATING, logit_scale=0.5),
    "olmo2": _config("olmo2"),
    "olmo3": _config("olmo3", ALTERNATING),
    "granite": _config(
        "granite", attention_multiplier=1.5, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
    "glm4": _config("glm4", head_dim=8),
    "starcoder2": _config("starcoder2", sliding_window=WINDOW),
    "exaone4": _config("exaone4", ALTERNATING),
    "gpt_neox": _config("gpt_neox"),
    "stablelm": _config("stablelm"),  # its layers hand no keyword arguments on
}


def build(name: str, attn_implementation: str, **changes: object) -> PreTrainedModel:
    """A family's model; the same weights for every implementation, in every process."""
    config = FAMILIES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # what a model draws itself
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    draw(model)
    return model


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Weights with which attention looks at single tokens and no gradient is small."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("sinks"):
            weight.copy_(3 * noise)
        elif weight.dim() == 1:  # of a norm, or a bias
            weight.add_(0.3 * noise)
        else:
            weight.copy_(1.2 * noise * weight.shape[-1] ** -0.5)
