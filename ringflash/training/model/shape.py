"""Which shapes of a decoder fit together."""

from __future__ import annotations

from ringflash.configs.schema import ModelConfig
from ringflash.errors import ArgumentError


def check_shape(model: ModelConfig) -> None:
    """Raise ArgumentError for head counts and widths that do not fit together."""
    heads, key_value_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % key_value_heads:
        raise ArgumentError(
            f"model.num_attention_heads={heads} is not divisible by model.num_key_value_heads={key_value_heads}"
        )
    if model.head_dim is None and model.hidden_size % heads:
        raise ArgumentError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads={heads}; "
            "change one of them or give model.head_dim"
        )
    if model.rope_scaling.factor <= 0 or model.rope_scaling.low_freq_factor >= model.rope_scaling.high_freq_factor:
        raise ArgumentError(
            f"model.rope_scaling={model.rope_scaling}; factor must be positive, low_freq_factor below high_freq_factor"
        )
    width = head_dim(model)
    if width % 2 or not 2 <= width <= 256:
        raise ArgumentError(f"model.head_dim={width}; rotary embedding needs an even one, and kernels take up to 256")


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads
