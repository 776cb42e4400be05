"""What the kernels take; what they do not is refused in words."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.chips import DTYPES, chip_of
from ringflash.kernels.gpu.operands_given import check_scoring, check_shapes
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton.attend.tile_sizes import widest


def missing(device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int) -> str | None:
    """None where these kernels run, otherwise the reason in words why they do not."""
    try:
        chip = chip_of(device)
    except ArgumentError as error:
        return str(error)
    if dtype not in DTYPES:
        return f"query is {dtype}; it takes float16, bfloat16 and float32"
    most = widest(chip, dtype)
    for name, dim in (("head_dim", head_dim), ("value_head_dim", value_head_dim)):
        if dim % 8 or not 8 <= dim <= most:
            return f"{name}={dim}; it takes multiples of 8 up to {most} here"
    return None


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, scale: float, modifiers: Modifiers | None
) -> None:
    """Raise ArgumentError for what the kernels cannot compute."""
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        raise ArgumentError(
            f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; allowed is one of "
            "float16, bfloat16 and float32 for all three"
        )
    check_shapes(query, key, value)
    most = widest(chip_of(query.device), query.dtype)
    for name, dim in (("query", query.shape[2]), ("value", value.shape[2])):
        if dim % 8 or not 8 <= dim <= most:
            raise ArgumentError(f"{name} head dimension {dim}; allowed are multiples of 8 up to {most} here")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(2) != 1:
            raise ArgumentError(f"{name} strides {x.stride()}; the last dimension must be contiguous")
    check_scoring(query, key, intervals, scale, modifiers)
