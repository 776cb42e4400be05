"""Which kernels run: the one place that chooses, from device, dtype and head dimensions.

    kernels = select(query.device, query.dtype, query.shape[-1])
    out, lse = kernels.attend(query, key, value, intervals, scale=scale)

Nothing is imported or probed before a choice asks for it, so a machine without Triton or CUDA never sees either.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from ringflash.errors import ArgumentError

NAMES = ("auto", "reference", "blockwise", "triton")
"""What `kernel` may be. "auto" is the fastest that can run: "triton" on a GPU that it supports, else "blockwise"."""


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What some kernel computes; float64 is for checks and never runs on Triton."""


def select(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int | None = None,
    kernel: str = "auto",
) -> ModuleType:
    """The module whose `attend`, `attend_backward` and `row_delta` to call.

    Args:
        device: where query, key and value are.
        dtype: of query, key and value.
        head_dim: head dimension of query and key.
        value_head_dim: head dimension of value; that of query and key if None.
        kernel: one of `NAMES`.

    Raises:
        ArgumentError: the kernel is unknown or cannot run on this; says what is missing.

    Example:
        >>> select("cpu", torch.float32, 64).__name__
        'ringflash.kernels.blockwise'
    """
    return _select(torch.device(device), dtype, head_dim, value_head_dim or head_dim, kernel)


@functools.cache
def _select(device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int, kernel: str) -> ModuleType:
    if kernel not in NAMES:
        raise ArgumentError(f"kernel={kernel!r}; allowed are {', '.join(NAMES)}")
    if dtype not in DTYPES:
        raise ArgumentError(f"query is {dtype}; allowed are {', '.join(str(x) for x in DTYPES)}")
    if kernel == "auto":
        on_gpu = device.type == "cuda"
        kernel = (
            "triton" if on_gpu and _missing_for_triton(device, dtype, head_dim, value_head_dim) is None else "blockwise"
        )
    elif kernel == "triton" and (missing := _missing_for_triton(device, dtype, head_dim, value_head_dim)):
        raise ArgumentError(f"kernel='triton' cannot run: {missing}")
    return importlib.import_module(f"ringflash.kernels.{kernel}")


def _missing_for_triton(device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from ringflash.kernels.triton.tiles import chip_of

    try:
        chip_of(device)
    except ArgumentError as error:
        return str(error)
    if dtype == torch.float64:
        return f"query is {dtype}; it takes float16, bfloat16 and float32"
    for name, dim in (("head_dim", head_dim), ("value_head_dim", value_head_dim)):
        if dim % 8 or not 8 <= dim <= 256:
            return f"{name}={dim}; it takes multiples of 8 up to 256"
    return None
