"""AdamW over fp32 weights, and its learning rate as a plain function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from ringflash.configs.schema import OptimizerConfig
from ringflash.deepspeed_private import whole_shape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each weight beside its step; names are torch's."""


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, with their names."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101); matrices decay, norms do not."""
    matrices = [weight for _, weight in trained(module) if len(whole_shape(weight)) > 1]
    vectors = [weight for _, weight in trained(module) if len(whole_shape(weight)) <= 1]
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


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then half a cosine down to min_lr_ratio of the highest.

    Args:
        config: highest rate, lowest share, length of the warm-up.
        step: counted from 0.
        steps: length of the run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
