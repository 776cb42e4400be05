"""Which kernels run: the one place that chooses, from device, dtype and head dimensions.

    kernels = select(query.device, query.dtype, query.shape[-1])
    out, lse = kernels.attend(query, key, value, intervals, scale=scale)

`select_decoding` is the same for attention to a cache.

Nothing is imported or probed before a choice asks for it, so a machine without Triton or CUDA never sees either.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from ringflash.errors import ArgumentError

MODULES = {
    "reference": "ringflash.kernels.reference",
    "blockwise": "ringflash.kernels.cpu.blockwise",
    "triton": "ringflash.kernels.triton.attend",
    "hopper": "ringflash.kernels.hopper",
}
"""Where the implementations lie, by the names that users know them by."""

NAMES = ("auto", *MODULES)
"""What `kernel` may be. "auto" is the first of `AUTO_ON_GPUS` that can run, and else, as on CPUs, "blockwise"."""

AUTO_ON_GPUS = ("hopper", "triton")
"""The fastest first."""

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
        'ringflash.kernels.cpu.blockwise'
    """
    return _select(torch.device(device), dtype, head_dim, value_head_dim or head_dim, kernel)


@functools.lru_cache(maxsize=256)
def _select(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int,
    kernel: str,
) -> ModuleType:
    if kernel not in NAMES:
        raise ArgumentError(f"kernel={kernel!r}; allowed are {', '.join(NAMES)}")
    if dtype not in DTYPES:
        raise ArgumentError(f"query is {dtype}; allowed are {', '.join(str(x) for x in DTYPES)}")
    problem = (device, dtype, head_dim, value_head_dim)
    if kernel == "auto":
        on_gpu = AUTO_ON_GPUS if device.type == "cuda" else ()
        kernel = next((name for name in on_gpu if _missing(name, *problem) is None), "blockwise")
        if on_gpu and kernel == "blockwise":
            _warn_of_slowness(
                f"attention on this GPU runs as torch operators (kernel='blockwise'), many times slower than as Triton "
                f"kernels, because kernel='triton' cannot run: {_missing('triton', *problem)}. {_cure(*problem)}; "
                "kernel='blockwise' asks for it without this warning"
            )
    elif missing := _missing(kernel, *problem):
        raise ArgumentError(f"kernel={kernel!r} cannot run: {missing}")
    return importlib.import_module(MODULES[kernel])


def name_of(kernels: ModuleType) -> str:
    """The name in `NAMES` of what `select` gave."""
    return next(name for name, module in MODULES.items() if module == kernels.__name__)


@functools.lru_cache(maxsize=256)
def select_decoding(device: torch.device, dtype: torch.dtype, head_dim: int, value_head_dim: int) -> ModuleType:
    """The module whose `append` and `attend` to call for a cache of keys and values; see `ringflash.kernels.decode`."""
    portable = importlib.import_module("ringflash.kernels.cpu.decode")
    if device.type != "cuda":
        return portable
    missing = "the package triton is not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("ringflash.kernels.triton.decode")
        missing = triton.missing(device, dtype, head_dim, value_head_dim)
        if missing is None:
            return triton
    _warn_of_slowness(
        "attention to a cache on this GPU runs as torch operators, many times slower than as Triton kernels, because "
        f"those cannot run: {missing}"
    )
    return portable


@functools.lru_cache(maxsize=256)
def _warn_of_slowness(message: str) -> None:
    """Once per process for each reason: nothing else would show that the fast kernels are not at work."""
    warnings.warn(message, stacklevel=2)


def _cure(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int,
) -> str:
    """What to change for kernel="triton" to run."""
    if importlib.util.find_spec("triton") is None:
        return "Install triton"
    padded = -(-head_dim // 8) * 8, -(-value_head_dim // 8) * 8
    for (dim, value_dim), how in (
        ((head_dim, value_head_dim), ""),
        (padded, f", and zeros up to head dimensions {padded}"),
    ):
        fits = [x for x in reversed(DTYPES) if _missing("triton", device, x, dim, value_dim) is None]
        if dtype in fits:
            return f"Pad with zeros up to head dimensions {padded}, and pass the scale that belongs to {head_dim}"
        if fits:
            return f"Give query, key and value as {' or '.join(map(str, fits))}{how}"
    if _missing("triton", device, torch.bfloat16, 64, 64) is None:
        return "Nothing faster takes head dimensions beyond that"
    return "`make doctor` shows what this machine lacks"


def _missing(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_head_dim: int,
) -> str | None:
    """Why a kernel cannot run, in words; None if it can."""
    if kernel in ("reference", "blockwise"):
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if kernel == "hopper":
        return importlib.import_module(MODULES["hopper"]).supports(device, dtype, head_dim, value_head_dim)
    return importlib.import_module(MODULES["triton"]).missing(device, dtype, head_dim, value_head_dim)
