"""Learned sinks: one more logit of each head in the softmax, without a value (gpt-oss, arXiv 2508.10925).

They join in the launch that has a row's last keys, whatever came before. Kernels that do not know them call
`with_sinks`
behind it, in whose place `ringflash.kernels.hopper` joins them in its own last step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows shrink by their share of the sum, exp(lse - lse with sink); in place.

    Args:
        out: (T, H, Dv), fp32 or fp64.
        lse: (H, T) fp32.
        sinks: (H,).
    """
    sink = sinks.float()[:, None]
    nothing = torch.isneginf(lse) & torch.isneginf(sink)
    sink = sink.clamp(min=torch.finfo(torch.float32).min)  # finite: the difference of two infinities is nan
    share = torch.sigmoid(lse - sink).T[..., None]
    return out.mul_(share), torch.logaddexp(lse, sink).masked_fill_(nothing, -torch.inf)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the logits, (H,): a sink's value is 0, so only the sum that it joins depends on it.

    Args:
        sinks: (H,).
        lse: (H, T) fp32, sinks among the sum.
        delta: (H, T) fp32, from `row_delta`.
    """
    weights = torch.exp(sinks.float()[:, None] - lse).nan_to_num(nan=0.0)
    return -(weights * delta).sum(1).to(sinks.dtype)
