"""What the kernels take; what they do not is refused in words."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.chips import DTYPES, chip_of
from ringflash.kernels.gpu.modifiers_given import check_modifiers
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import check_blocks
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
    if query.shape[1] % key.shape[1] or value.shape[:2] != key.shape[:2] or key.shape[2] != query.shape[2]:
        raise ArgumentError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; allowed are "
            "(T, H, D), (S, Hk, D), (S, Hk, Dv) with H a multiple of Hk"
        )
    most = widest(chip_of(query.device), query.dtype)
    for name, dim in (("query", query.shape[2]), ("value", value.shape[2])):
        if dim % 8 or not 8 <= dim <= most:
            raise ArgumentError(f"{name} head dimension {dim}; allowed are multiples of 8 up to {most} here")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(2) != 1:
            raise ArgumentError(f"{name} strides {x.stride()}; the last dimension must be contiguous")
    if intervals.query_count != query.shape[0] or intervals.key_count != key.shape[0]:
        raise ArgumentError(
            f"intervals are for {intervals.query_count} query and {intervals.key_count} key rows; "
            f"query has {query.shape[0]}, key has {key.shape[0]}"
        )
    blocks = intervals.blocks
    if blocks is not None:
        check_blocks(blocks, query, key)
    if not 0.0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive finite numbers")
    if modifiers is not None:
        check_modifiers(modifiers, query, key)
