"""What checkpoints hold of bitsandbytes' AdamW, whose moments take 8 bits (Dettmers et al., arXiv 2110.02861).

Its moment is a code for each weight, and the largest magnitude of each block of 256. A checkpoint has the moment itself
in fp32, of the weight's shape, and the magnitudes; from both the codes come back as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringflash.training.engines.optimizer import MOMENTS

BLOCK = 256
"""Weights of a block, which bitsandbytes does not say."""

LARGEST = "{}_largest"
"""What the magnitudes of a moment are called."""


def shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that `exported` gives, in its order."""
    found = {}
    for number, moment in enumerate(MOMENTS, 1):
        found[moment] = tuple(state[f"state{number}"].shape)
        if (largest := state.get(f"absmax{number}")) is not None:
            found[LARGEST.format(moment)] = tuple(largest.shape)
    return found


def exported(state: dict[str, Any]) -> dict[str, Tensor]:
    """What a checkpoint holds of a weight's state, in fp32."""
    found = {}
    for number, moment in enumerate(MOMENTS, 1):
        codes, largest = state[f"state{number}"], state.get(f"absmax{number}")
        found[moment] = codes if largest is None else state[f"qmap{number}"][codes.int()] * _spread(largest, codes)
        if largest is not None:
            found[LARGEST.format(moment)] = largest
    return found


def restore(state: dict[str, Any], kept: dict[str, Tensor], step: int) -> None:
    """Put back what `exported` gave after so many steps."""
    state["step"] = step
    for number, moment in enumerate(MOMENTS, 1):
        codes, largest = state[f"state{number}"], state.get(f"absmax{number}")
        if largest is None:
            codes.copy_(kept[moment])
            continue
        largest.copy_(kept[LARGEST.format(moment)])
        values = state[f"qmap{number}"]
        between = (values[1:] + values[:-1]) / 2  # they rise
        scaled = kept[moment].to(codes.device) / _spread(largest, codes).clamp(min=torch.finfo(torch.float32).tiny)
        codes.copy_(torch.bucketize(scaled, between, out_int32=True))


def _spread(largest: Tensor, codes: Tensor) -> Tensor:
    """The magnitude of each weight's block."""
    return largest.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
