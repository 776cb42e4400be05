"""Which rows of the tables of a rotary embedding belong to which tokens, and checks of both."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.flash_attn.arguments import Longest, check_boundaries
from ringflash.functional import check_types

SHAPES = "allowed is (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with cu_seqlens"


def check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check shapes, dtypes and devices of cos and sin for x (..., headdim)."""
    check_types({"x": x, "cos": cos, "sin": sin})
    if x.dim() < 3:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; {SHAPES}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape != cos.shape or not 0 < 2 * table.shape[1] <= x.shape[-1]:
            raise ArgumentError(
                f"{name} has shape {tuple(table.shape)}; allowed is (seqlen_ro, rotary_dim / 2) for cos and sin, "
                f"rotary_dim at most {x.shape[-1]}"
            )
        if table.dtype not in (x.dtype, torch.float32) or table.device != x.device:
            raise ArgumentError(
                f"{name} is {table.dtype} on {table.device}; allowed is {x.dtype} or float32 on {x.device}"
            )


def batch_angles(x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin (batch or 1, seqlen, 1, rotary_dim / 2) for x (batch, seqlen, nheads, headdim)."""
    if x.dim() != 4:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; {SHAPES}")
    batch, seqlen = x.shape[:2]
    _check_offsets(seqlen_offsets, batch, seqlen, x, cos)
    if isinstance(seqlen_offsets, int):
        rows = slice(seqlen_offsets, seqlen_offsets + seqlen)
        return cos[rows].unsqueeze(1), sin[rows].unsqueeze(1)
    position = seqlen_offsets.long()[:, None] + torch.arange(seqlen, device=x.device)
    return _rows_of(cos, sin, position, position.new_ones((), dtype=torch.bool))


def packed_angles(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor, max_seqlen: Longest
) -> tuple[Tensor, Tensor]:
    """Cos and sin (total, 1, rotary_dim / 2) for x (total, nheads, headdim)."""
    if x.dim() != 3:
        raise ArgumentError(f"x has shape {tuple(x.shape)}; allowed with cu_seqlens is (total, nheads, headdim)")
    if max_seqlen is None:
        raise ArgumentError("max_seqlen is None with cu_seqlens given; pass the longest sequence")
    longest = check_boundaries("cu_seqlens", cu_seqlens, max_seqlen, x, x.shape[0])
    batch = cu_seqlens.shape[0] - 1
    _check_offsets(seqlen_offsets, batch, longest or 0, x, cos)
    cu_seqlens = cu_seqlens.to(x.device).long()
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=batch - 1)
    offset = seqlen_offsets if isinstance(seqlen_offsets, int) else seqlen_offsets.long()[sequence]
    return _rows_of(cos, sin, token - cu_seqlens[sequence] + offset, token < cu_seqlens[-1])


def _rows_of(cos: Tensor, sin: Tensor, position: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the tables at positions of tokens that exist, with a dimension for the heads; elsewhere an angle of 0."""
    inside = exists & (position >= 0) & (position < cos.shape[0])
    if position.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = position[exists & ~inside]
        if outside.numel():
            raise ArgumentError(
                f"seqlen_offsets turn a token at row {int(outside[0])}; allowed are the {cos.shape[0]} rows of cos"
            )
    row, inside = position.where(inside, 0), inside[..., None, None]
    return cos[row].unsqueeze(-2).where(inside, 1.0), sin[row].unsqueeze(-2).where(inside, 0.0)


def _check_offsets(seqlen_offsets: int | Tensor, batch: int, seqlen: int, x: Tensor, cos: Tensor) -> None:
    if isinstance(seqlen_offsets, int):
        if seqlen_offsets < 0 or seqlen_offsets + seqlen > cos.shape[0]:
            raise ArgumentError(
                f"seqlen_offsets={seqlen_offsets} for {seqlen} tokens; allowed are the {cos.shape[0]} rows of cos"
            )
    elif (
        not isinstance(seqlen_offsets, Tensor)
        or seqlen_offsets.shape != (batch,)
        or seqlen_offsets.dtype not in (torch.int32, torch.int64)
        or seqlen_offsets.device != x.device
    ):
        raise ArgumentError(f"seqlen_offsets={seqlen_offsets}; allowed is a number, or int ({batch},) on {x.device}")
