"""Which shapes of a decoder fit together."""

from __future__ import annotations

from ringflash.configs.schema import ModelConfig
from ringflash.errors import ArgumentError
from ringflash.training.model.rope import check_scaling


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
    width = head_dim(model)
    if width % 2 or not 2 <= width <= 256:
        raise ArgumentError(f"model.head_dim={width}; rotary embedding needs an even one, and kernels take up to 256")
    check_scaling(model.rope_scaling, width)


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def query_width(model: ModelConfig) -> int:
    """Elements of a token's queries, and of what attention gives."""
    return model.num_attention_heads * head_dim(model)


def elements_again(model: ModelConfig) -> int:
    """Elements of a token that a block is computed again for: of norms, query, key, value, the stream, gate and up."""
    key = model.num_key_value_heads * head_dim(model)
    return 3 * model.hidden_size + query_width(model) + 2 * key + 2 * model.intermediate_size
