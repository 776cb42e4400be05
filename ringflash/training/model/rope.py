"""Rotary embedding of the recipe's own model (Su et al., arXiv 2104.09864), and how it is stretched to longer contexts.

`scaling.factor` says how much longer a context becomes than the one that a model was trained with:

    linear  all frequencies are divided by the factor (Chen et al., arXiv 2306.15595)
    ntk     the base grows, so that the slowest frequency is divided by the factor and the fastest stays (NTK-aware;
            arXiv 2309.00071, section 3.1)
    yarn    slow frequencies are divided, fast ones stay, those between are blended by their index, and attention is
            sharpened (arXiv 2309.00071)
    llama3  likewise, blended by their turns within the original context (Llama 3, arXiv 2407.21783)

By hand, although Transformers has them: there they are fp32, which half a million positions further on is off by a
thirtieth of a radian. A model of a folder has Transformers' own (`model.rope_parameters`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ringflash.configs.schema import ROPE_SCALINGS, RopeScalingConfig
from ringflash.errors import ArgumentError


def rotary(position_ids: Tensor, width: int, theta: float, scaling: RopeScalingConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, T, 1, D/2) fp32 of each position's rotation, times what sharpens attention.

    Args:
        position_ids: (B, T) positions in their documents.
        width: D, width of a head.
        theta: base of the frequencies.
        scaling: how they are stretched.
    """
    frequency = frequencies(width, theta, scaling).to(position_ids.device)
    angle = position_ids[..., None, None] * frequency
    sharpened = attention_factor(scaling)
    return (sharpened * angle.cos()).float(), (sharpened * angle.sin()).float()


def frequencies(width: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Radians by which each pair of a head turns from one position to the next, (D/2,) fp64."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    if scaling.rope_type == "ntk":
        return ntk_theta(width, theta, scaling) ** -exponent
    frequency = theta**-exponent
    if scaling.rope_type == "yarn":
        kept = _kept_by_yarn(width, theta, scaling)
    elif scaling.rope_type == "llama3":
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        kept = torch.zeros_like(frequency)
    kept = kept.clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def attention_factor(scaling: RopeScalingConfig) -> float:
    """What queries and keys are multiplied by; 1 but for yarn."""
    if scaling.rope_type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(1.0, scaling.factor)) + 1


def ntk_theta(width: int, theta: float, scaling: RopeScalingConfig) -> float:
    """The base that stands for this one."""
    return theta * scaling.factor ** (width / (width - 2))


def check_scaling(scaling: RopeScalingConfig, width: int) -> None:
    """Raise ArgumentError for numbers that do not go together, or mean nothing to this type."""
    taken, default = ROPE_SCALINGS[scaling.rope_type], RopeScalingConfig()
    for key, value in vars(scaling).items():
        if key not in ("rope_type", "factor", *taken) and value != getattr(default, key):
            takes = ", ".join(("factor", *taken))
            raise ArgumentError(
                f"model.rope_scaling.{key}={value} means nothing to rope_type={scaling.rope_type}, which takes {takes}"
            )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ArgumentError(
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} is not below "
            f"high_freq_factor={scaling.high_freq_factor}"
        )
    if scaling.beta_slow >= scaling.beta_fast:
        raise ArgumentError(
            f"model.rope_scaling.beta_slow={scaling.beta_slow} is not below beta_fast={scaling.beta_fast}"
        )
    if scaling.rope_type == "ntk" and width <= 2:
        raise ArgumentError(f"model.rope_scaling.rope_type=ntk needs more than one frequency; head_dim is {width}")


def as_transformers(width: int, theta: float, scaling: RopeScalingConfig) -> dict[str, Any]:
    """The same as Transformers' `rope_parameters`."""
    if scaling.factor == attention_factor(scaling) == 1:
        return {"rope_type": "default", "rope_theta": theta}
    if scaling.rope_type == "ntk":
        return {"rope_type": "default", "rope_theta": ntk_theta(width, theta, scaling)}
    taken = {key: getattr(scaling, key) for key in ("rope_type", "factor", *ROPE_SCALINGS[scaling.rope_type])}
    return {"rope_theta": theta} | {key: value for key, value in taken.items() if value is not None}


def _kept_by_yarn(width: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """Which share of each frequency stays; falls from one index to another, which turn so often in the old context."""

    def index(turns: float) -> float:
        rounds = scaling.original_max_position_embeddings / (2 * math.pi * turns)
        return width * math.log(rounds) / (2 * math.log(theta))

    first = max(math.floor(index(scaling.beta_fast)), 0)
    last = min(math.ceil(index(scaling.beta_slow)), width - 1)
    return 1 - (torch.arange(width // 2, dtype=torch.float64) - first) / max(last - first, 0.001)
