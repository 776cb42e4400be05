"""AdamW, also with moments of 8 bits, and Muon over fp32 weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ringflash.configs.schema import OptimizerConfig
from ringflash.deepspeed_private import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each weight beside its step; names are torch's."""

MUON_MOMENTS = ("momentum_buffer",)
"""What Muon keeps for each weight; the name is torch's."""


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, with their names."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """What a configuration asks for; every parameter that is trained is in one of them."""
    if config.name == "adamw":
        return [adamw(module, config)]
    between = matrices_between(module)
    made = [_of_matrices(list(between.values()), config)] if between else []
    others = any(name not in between for name, _ in trained(module))  # adapters are nothing but matrices
    return [*made, adamw(module, config, set(between))] if others else made


def _of_matrices(matrices: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    if config.name == "adamw_8bit":
        return _adamw_8bit(matrices, config)
    return torch.optim.Muon(
        matrices,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",  # so that both take the same learning rate
    )


def _adamw_8bit(matrices: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """With its state, which bitsandbytes keeps in fp32 for matrices of fewer than 4,096 weights."""
    import bitsandbytes  # pyrefly: ignore[missing-import]  # an optional library

    made: Any = bitsandbytes.optim.AdamW8bit(
        matrices,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    for index, weight in enumerate(matrices):
        made.init_state(made.param_groups[0], weight, 0, index)
    return made


def matrices_between(module: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices that are neither embedding nor head.

    Muon is for these (Jordan et al., 2024), and those two learn less steadily from moments of 8 bits.
    """
    rows = {part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)}
    return {name: weight for name, weight in trained(module) if weight.dim() == 2 and weight.shape[0] not in rows}


def adamw(module: nn.Module, config: OptimizerConfig, but: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); matrices decay, norms do not.

    Args:
        module: whose parameters.
        config: its settings.
        but: names of parameters that are left to another optimizer.
    """
    mine = [weight for name, weight in trained(module) if name not in but]
    matrices = [weight for weight in mine if len(whole_shape(weight)) > 1]
    vectors = [weight for weight in mine if len(whole_shape(weight)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # of adapters there are no vectors
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def adam_state(weight: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """What torch's fused AdamW keeps for a weight after `step` steps, with zero moments."""
    state = {name: torch.zeros_like(weight, requires_grad=False) for name in MOMENTS}
    return {"step": torch.tensor(float(step), device=weight.device), **state}
