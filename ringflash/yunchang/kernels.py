"""Names of yunchang's kernels; they choose nothing here, where ringflash's attend."""

from __future__ import annotations

from enum import Enum


class AttnType(Enum):
    """Those that attend exactly. Kernels that round scores or leave some out have no name here."""

    AITER = "aiter"
    FA = "fa"
    FA3 = "fa3"
    FLASHINFER = "flashinfer"
    TORCH_MATH = "torch_math"
    TORCH_FLASH = "torch_flash"
    TORCH_EFFICIENT = "torch_efficient"
    TORCH_CUDNN = "torch_cudnn"

    @classmethod
    def from_string(cls, s: str) -> AttnType:
        """By value; ValueError for another one."""
        return cls(s)
