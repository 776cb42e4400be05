"""Low-rank adapters (Hu et al., arXiv 2106.09685) by peft, inside of a Transformers model on the meta device.

Added to a linear module are alpha / rank * B A; A is drawn, B begins with zeros. By hand are only A's initial values,
by the names of the parameters, so that all engines and any number of ranks begin with the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.configs.schema import LoraConfig
from ringflash.errors import ArgumentError

if TYPE_CHECKING:
    from peft import PeftConfig

BASE = ".base_layer"
"""Within the names of weights to which an adapter was added."""


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Add adapters; all other weights are then not trained.

    Raises:
        ArgumentError: no module has such a name, or one that is no linear module.
    """
    import peft  # an optional library

    try:
        peft.inject_adapter_in_model(_peft_config(lora, model), model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ArgumentError(f"lora.target_modules={lora.target_modules}: {error}") from error


def _peft_config(lora: LoraConfig, model: nn.Module) -> PeftConfig:
    """The same in peft's words."""
    import peft

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    routers = [name for name, module in linear if type(module).forward is not nn.Linear.forward]
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,  # pyrefly: ignore[bad-argument-type]  # it divides by the rank
        target_modules=lora.target_modules or "all-linear",
        exclude_modules=routers or None,  # which give more than their product, as Llama 4's
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def initialise_adapter(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Fill a parameter of an adapter as peft does."""
    if ".lora_B." in name:
        weight.zero_()
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add what adapters add to the weights for good, and take them out."""
    from peft.tuners.lora import LoraLayer

    for name, module in reversed(list(model.named_modules())):  # experts have one adapter around another
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)  # pyrefly: ignore[not-callable]  # each of its layers has it
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
