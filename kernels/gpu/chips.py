"""GPUs as kernels tell them apart: by the shared memory, matrix units and copy engines that sizes are chosen for."""

from __future__ import annotations

import functools

import torch
import triton
import triton.knobs

from ringflash.errors import ArgumentError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What Triton multiplies on all of them, float32 without rounding it to fewer bits."""


@functools.cache
def chip_of(device: torch.device) -> str:
    """What sizes are chosen for: "hopper", "blackwell", "ampere", "consumer", "cdna" or "interpreter"."""
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return "interpreter"
    if device.type != "cuda":
        raise ArgumentError(f"device={device}; the Triton kernels run on CUDA and ROCm devices")
    if torch.version.hip:
        return "cdna"
    return chip_of_capability(torch.cuda.get_device_capability(device))


def chip_of_capability(capability: tuple[int, int]) -> str:
    """See `chip_of`, for an NVIDIA compute capability."""
    if capability < (8, 0):
        raise ArgumentError(f"compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0 or newer")
    if capability[0] in (9, 10):  # 227 KiB of shared memory a program, tensor memory engine
        return "hopper" if capability[0] == 9 else "blackwell"
    return "ampere" if capability in ((8, 0), (8, 7)) else "consumer"  # 163 KiB and 99 KiB


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; a few for the interpreter to run with."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
