"""What the Hopper kernels take; what they do not is refused in words."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.operands_given import check_scoring, check_shapes
from ringflash.kernels.hopper.widths import WIDEST, width_of
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers

LEAST_DIM = 40
"""Of the head dimensions that these kernels are chosen for: blocks have 64 columns or more."""


def supports(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, value_head_dim: int | None = None
) -> str | None:
    """None where the kernels of this package run, otherwise the reason in words why they do not.

    Example:
        >>> supports("cpu", torch.bfloat16, 128)
        'device is cpu; it takes NVIDIA GPUs of compute capability 9.0'
    """
    missing = runs_on(torch.device(device), dtype)
    if missing is not None:
        return missing
    dims = head_dim, value_head_dim or head_dim
    if min(dims) < LEAST_DIM or not taken(*dims):
        return (
            f"head_dim={dims[0]}, value_head_dim={dims[1]}; it takes multiples of 8 from {LEAST_DIM} to 128, keys' up "
            f"to 192 with values' of 128, and 192, 256 and {WIDEST} for both"
        )
    return None


def taken(head_dim: int, value_head_dim: int) -> bool:
    """Whether some kernel of this package takes these head dimensions."""
    return width_of(head_dim, value_head_dim) is not None or head_dim == value_head_dim == WIDEST


def runs_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where kernels of this package run on tensors of this dtype there, otherwise the reason why they do not."""
    if device.type != "cuda" or torch.version.hip:
        return f"device is {device}; it takes NVIDIA GPUs of compute capability 9.0"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"device has compute capability {capability[0]}.{capability[1]}; it takes 9.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"query is {dtype}; it takes float16 and bfloat16"
    return None


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, scale: float, modifiers: Modifiers | None
) -> None:
    """Raise ArgumentError for what the kernels cannot compute."""
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ArgumentError(f"query, key, value are {query.dtype}, {key.dtype}, {value.dtype}; all three must agree")
    check_shapes(query, key, value)
    if missing := runs_on(query.device, query.dtype):
        raise ArgumentError(f"kernel='hopper' cannot run: {missing}")
    if not taken(query.shape[2], value.shape[2]):
        raise ArgumentError(f"head dimensions {query.shape[2]} and {value.shape[2]}; allowed are those of `widths`")
    check_scoring(query, key, intervals, scale, modifiers)
