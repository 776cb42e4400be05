"""Rotary embedding (Su et al., arXiv 2104.09864) in torch operators."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """X (..., D) with its first R dimensions rotated, computed in fp32 (float64 for float64) and rounded once.

    Args:
        x: (..., D) of any floating-point dtype.
        cos: of the angles, broadcastable to (..., R / 2).
        sin: likewise.
        interleaved: rotates dimensions 2j and 2j + 1 together, instead of j and j + R / 2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    rotating, rest = x[..., : 2 * cos.shape[-1]].to(wide), x[..., 2 * cos.shape[-1] :]
    a, b = (rotating[..., 0::2], rotating[..., 1::2]) if interleaved else rotating.chunk(2, -1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    done = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([done.to(x.dtype), rest], -1)
