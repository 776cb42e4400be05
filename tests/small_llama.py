"""A small Hugging Face Llama, and the same with SageMaker's layers in the place of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ringflash.sagemaker.nn.huggingface.llama_flashattn import LlamaFlashAttention

VOCABULARY = 65


def llama(implementation: str = "eager", **settings: Any) -> nn.Module:
    """Random weights, the same in every call; grouped-query heads, biases, three layers."""
    transformers = __import__("transformers")  # in a worker only if it is asked for one
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        pad_token_id=0,
        initializer_range=0.2,
        **settings,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def replaced(model: nn.Module, **arguments: Any) -> nn.Module:
    """A copy with every self_attn replaced, as SageMaker's documentation does it."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        previous = layer.self_attn
        layer.self_attn = LlamaFlashAttention(model.config, **arguments)
        layer.self_attn.load_state_dict(previous.state_dict(), strict=True)
    return model.eval()


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of labels that are shifted already, -100 for none."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By parameter, and none left behind."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within 2e-5 of the largest of its own."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, f"{name}: {error:.2g}"
