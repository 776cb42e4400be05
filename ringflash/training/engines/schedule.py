"""The learning rate as a plain function of the step, so that a run that goes on needs no state of it.

Transformers' schedules are taken from its own functions. By hand is the default, which needs no Transformers, and whose
first step already learns and whose last one has the lowest rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ringflash.configs.schema import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Learning rate of each step, counted from 0.

    Args:
        config: which.
        steps: length of the run.
    """
    if config.schedule == "warmup_cosine":
        return lambda step: learning_rate(config, step, steps)
    from transformers import get_scheduler  # an optional library

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    # pyrefly: ignore[bad-argument-type]  # a name does for it
    made: Any = get_scheduler(config.schedule, optimizer, config.warmup_steps, steps, _specific(config, steps))
    (factor,) = made.lr_lambdas
    return lambda step: config.lr * factor(step)


def _specific(config: OptimizerConfig, steps: int) -> dict[str, Any]:
    """What one schedule takes and others do not."""
    floor = config.min_lr_ratio
    return {
        "cosine_with_min_lr": {"min_lr_rate": floor},
        "cosine_warmup_with_min_lr": {"min_lr_rate": floor},
        "polynomial": {"lr_end": max(floor, 1e-7)},  # of a rate of 1
        "warmup_stable_decay": {"num_decay_steps": config.decay_steps or max(1, steps // 10), "min_lr_ratio": floor},
    }.get(config.schedule, {})


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
