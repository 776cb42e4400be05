"""What surrounds products in a decoder's block, each in one pass over memory: SwiGLU's product, rotary embedding.

Everything is computed in fp32 and rounded once. Tensors are contiguous.

Legend: N elements, T rows, H heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once

BLOCK = 2048
"""Elements of a program."""

BLOCKS: dict[str, Any] = {"BLOCK": BLOCK}


def supports(x: Tensor) -> bool:
    """Whether the kernels take such tensors, where they are."""
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return x.device.type == "cuda" and known and torch.cuda.get_device_capability(x.device) >= (8, 0)


@compiled_once
@triton.jit
def silu_product_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """Program = block of elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gated = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    raised = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (gated * tl.sigmoid(gated) * raised).to(out.dtype.element_ty), mask=inside)


@compiled_once
@triton.jit
def silu_product_backward_kernel(gate, up, dout, out, dgate, dup, count, BLOCK: tl.constexpr):
    """Program = block of elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gated = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    raised = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gated)
    silu = gated * share
    tl.store(out + place, (silu * raised).to(out.dtype.element_ty), mask=inside)
    of_silu = share * (1.0 + gated * (1.0 - share))
    tl.store(dgate + place, (slope * raised * of_silu).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (slope * silu).to(dup.dtype.element_ty), mask=inside)


@compiled_once
@triton.jit
def rotate_kernel(
    x, cos, sin, out, count, heads, sign, M: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr
):  # fmt: skip
    """Program = M of the `count` = T H vectors of 2 HALF numbers."""
    vector = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.arange(0, PADDED_HALF)
    inside = (vector < count)[:, None] & (column < HALF)[None, :]
    angle = (vector // heads)[:, None] * HALF + column[None, :]
    place = vector[:, None] * (2 * HALF) + column[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0) * sign
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, (first * cosine - second * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + HALF, (second * cosine + first * sine).to(out.dtype.element_ty), mask=inside)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of any equal shapes."""
    out = torch.empty_like(gate)
    if gate.numel():
        silu_product_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), **BLOCKS)
    return out


def silu_product_backward(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `silu_product` gives, and the gradients by gate and by up."""
    out, dgate, dup = (torch.empty_like(gate) for _ in range(3))
    if gate.numel():
        silu_product_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
            gate, up, dout, out, dgate, dup, gate.numel(), **BLOCKS
        )
    return out, dgate, dup


def rotate(x_THD: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """Turn each pair (d, d + D/2) by an angle, or with sign=-1 back by it.

    Args:
        x_THD: any of the dtypes.
        cos: (T, D/2) fp32 of the angles.
        sin: likewise.
        sign: of the angles.
    """
    out = torch.empty_like(x_THD)
    rows, heads, width = x_THD.shape
    half, count = width // 2, rows * heads
    padded = triton.next_power_of_2(half)
    each = max(1, BLOCK // padded)
    constants: dict[str, Any] = {"M": each, "HALF": half, "PADDED_HALF": padded}
    if count:
        rotate_kernel[(triton.cdiv(count, each),)](x_THD, cos, sin, out, count, heads, sign, **constants)
    return out
