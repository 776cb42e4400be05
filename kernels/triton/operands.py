"""Checks of the tensors given to the kernels, and the forms in which kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton.modifiers import check_modifiers
from ringflash.kernels.triton.tiles import chip_of, widest
from triton.tools.tensor_descriptor import TensorDescriptor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    if not 0.0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive finite numbers")
    if modifiers is not None:
        check_modifiers(modifiers, query, key)


def padded(dim: int) -> int:
    """Columns of a block that holds `dim`: the matrix units need a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())  # triton.next_power_of_2 takes 6 us


def describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory engine can address these (rows, heads, columns) tensors."""
    return all(
        x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:2])
        for x in tensors
    )


def described(x: Tensor, block: int) -> dict[str, object]:
    """All that a describable (rows, heads, columns) tensor's descriptor holds, for blocks of `block` rows."""
    rows, heads, dim = x.shape
    row_stride, head_stride, _ = x.stride()
    checked = TensorDescriptor(x, [heads, rows, dim], [head_stride, row_stride, 1], [1, block, padded(dim)])
    return {**vars(checked), "base": None}


def operand(x: Tensor, description: dict[str, object] | None) -> Tensor | TensorDescriptor:
    """A (rows, heads, columns) tensor as the kernels' load_block takes it.

    Args:
        x: aligned, if there is a description.
        description: what `described` gave for a tensor of the same form, to be read by descriptor; None for pointers.
    """
    if description is None:
        return x
    # A descriptor holds an address, so each call makes its own; what was checked of its form need not be checked again.
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(description, base=x)
    return descriptor
