"""Gradient of learned sinks in one pass over lse and delta, see ringflash.kernels.sinks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.row_blocks import LOG2_E

BLOCK = 4096
"""Rows that a program has in registers."""


@compiled_once
@triton.jit(do_not_specialize=["rows"])
def sink_gradient_kernel(sinks, lse, delta, gradient, rows, BLOCK: tl.constexpr):
    """Program = head, so that its sum has one order."""
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        place = tl.cast(head, tl.int64) * rows + row
        row_lse = tl.load(lse + place, mask=row < rows, other=float("inf"))
        row_delta = tl.load(delta + place, mask=row < rows, other=0.0)
        weight = tl.exp2((sink - row_lse) * LOG2_E)
        # A row that sees no key beside a sink of -inf has lse -inf, and no share to give.
        total += tl.where(row_lse == float("-inf"), 0.0, weight * row_delta)
    tl.store(gradient + head, -tl.sum(total, 0))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """See ringflash.kernels.sinks.sink_gradient; all on one GPU."""
    gradient = torch.empty_like(sinks, memory_format=torch.contiguous_format)
    arguments = sinks.contiguous(), lse.contiguous(), delta.contiguous(), gradient, lse.shape[1]
    sink_gradient_kernel[(len(sinks),)](*arguments, BLOCK=BLOCK, num_warps=8)
    return gradient
