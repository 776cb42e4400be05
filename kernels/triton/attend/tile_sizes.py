"""Block shapes, warps and pipeline stages by chip, dtype and head dimension: one table, nothing is tuned at run time.

So two runs of one script on one kind of chip launch the same kernels and round alike. Hopper's 16-bit rows are the
fastest of docs/benchmarks/tiles.json. No other chip was at hand: those rows are the largest blocks that fit registers
and shared memory, which tests/kernels/test_triton_ahead_of_time.py checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles and blocks, and how it is compiled.

    Attributes:
        queries: query rows in a block.
        keys: key rows in a block.
        warps: warps in a program.
        stages: blocks in flight between memory and the matrix units.
        descriptors: whether blocks are read by the tensor memory engine instead of by pointers.
        registers: most registers a thread may take, so that more programs share a multiprocessor; None: no bound.
        split: whether masked edges and unmasked interior are loops of their own, or one loop that asks each block.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None
    split: bool = True

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def forward_tiles(chip: str, dtype: torch.dtype, dim: int, dropout: bool = False) -> Tiles:
    """Tiles of the forward kernel; `dim` is the larger head dimension."""
    row = _row(dtype, dim)
    return (dropout and _FORWARD_DROPOUT.get((chip, row))) or _FORWARD[chip][row]


def key_gradient_tiles(chip: str, dtype: torch.dtype, dim: int, dropout: bool = False) -> Tiles:
    """Tiles of the kernel for the gradients of key and value; `dim` is the larger head dimension."""
    row = _row(dtype, dim)
    return (dropout and _KEY_GRADIENT_DROPOUT.get((chip, row))) or _KEY_GRADIENT[chip][row]


def value_gradient_tiles(chip: str, dtype: torch.dtype, dim: int) -> Tiles | None:
    """Tiles of a kernel for the gradient of value alone; None where that of keys sums both.

    `dim` is the larger head dimension.
    """
    return _VALUE_GRADIENT.get((chip, _row(dtype, dim)))


def query_gradient_tiles(chip: str, dtype: torch.dtype, dim: int, dropout: bool = False) -> Tiles:
    """Tiles of the kernel for the gradient of query; `dim` is the larger head dimension."""
    row = _row(dtype, dim)
    return (dropout and _QUERY_GRADIENT_DROPOUT.get((chip, row))) or _QUERY_GRADIENT[chip][row]


def widest(chip: str, dtype: torch.dtype) -> int:
    """The largest head dimension whose blocks fit a chip."""
    return 512 if _row(dtype, 512) in _FORWARD[chip] else 256


def _row(dtype: torch.dtype, dim: int) -> int | str:
    if dtype == torch.float32:
        return "fp32" if dim <= 128 else "fp32 wide" if dim <= 256 else "fp32 widest"
    return 64 if dim <= 64 else 128 if dim <= 128 else 256 if dim <= 256 else 512


# 16-bit rows by head dimension up to 64, 128, 256 and 512; float32 up to 128, 256 and 512. float32 runs on the plain
# multiply-add units to be exact, from registers, hence small blocks.
_FORWARD = {
    "hopper": {
        64: Tiles(128, 64, 4, 4, True),
        128: Tiles(128, 128, 8, 3, True, split=False),
        256: Tiles(128, 64, 8, 2, True),
        512: Tiles(64, 128, 8, 1, True, split=False),
        "fp32": Tiles(32, 32, 8, 1),
        "fp32 wide": Tiles(16, 32, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "ampere": {
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 64, 8, 2),
        512: Tiles(64, 32, 8, 2),
        "fp32": Tiles(32, 32, 8, 1),
        "fp32 wide": Tiles(16, 32, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "consumer": {
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 32, 4, 2),
        256: Tiles(64, 32, 4, 2),
        512: Tiles(32, 16, 8, 1),
        "fp32": Tiles(32, 32, 8, 1),
        "fp32 wide": Tiles(16, 32, 8, 1),
    },
    "cdna": {
        64: Tiles(128, 64, 4, 2),
        128: Tiles(128, 64, 4, 1),
        256: Tiles(64, 32, 4, 1),
        512: Tiles(32, 16, 4, 1),
        "fp32": Tiles(32, 32, 4, 1),
        "fp32 wide": Tiles(32, 16, 4, 1),
    },
    "interpreter": dict.fromkeys((64, 128, 256, 512, "fp32", "fp32 wide", "fp32 widest"), Tiles(32, 16, 4, 1)),
}
_KEY_GRADIENT = {
    "hopper": {
        64: Tiles(64, 64, 4, 3, True, split=False),
        128: Tiles(64, 64, 4, 2, True, split=False),
        256: Tiles(64, 64, 8, 2, True),
        512: Tiles(32, 64, 8, 1, split=False),
        "fp32": Tiles(16, 32, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "ampere": {
        64: Tiles(64, 128, 8, 2),
        128: Tiles(32, 128, 8, 2),
        256: Tiles(32, 64, 8, 1),
        512: Tiles(32, 32, 8, 1),
        "fp32": Tiles(16, 32, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "consumer": {
        64: Tiles(32, 128, 8, 2),
        128: Tiles(32, 64, 4, 2),
        256: Tiles(16, 32, 4, 1),
        512: Tiles(16, 16, 8, 1),
        "fp32": Tiles(16, 32, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
    },
    "cdna": {
        64: Tiles(32, 128, 4, 1),
        128: Tiles(32, 64, 4, 1),
        256: Tiles(16, 64, 4, 1),
        512: Tiles(16, 16, 4, 1),
        "fp32": Tiles(16, 32, 4, 1),
        "fp32 wide": Tiles(16, 32, 4, 1),
    },
    "interpreter": dict.fromkeys((64, 128, 256, 512, "fp32", "fp32 wide", "fp32 widest"), Tiles(16, 32, 4, 1)),
}
_QUERY_GRADIENT = {
    "hopper": {
        64: Tiles(128, 64, 8, 3, True),
        128: Tiles(128, 64, 8, 3, True),
        256: Tiles(128, 32, 8, 3, True),
        512: Tiles(64, 32, 8, 1, True, split=False),
        "fp32": Tiles(16, 16, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "ampere": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(64, 32, 8, 1),
        512: Tiles(32, 32, 8, 1),
        "fp32": Tiles(16, 16, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
        "fp32 widest": Tiles(16, 16, 8, 1),
    },
    "consumer": {
        64: Tiles(128, 32, 8, 2),
        128: Tiles(64, 32, 4, 2),
        256: Tiles(32, 16, 4, 1),
        512: Tiles(16, 16, 8, 1),
        "fp32": Tiles(16, 16, 8, 1),
        "fp32 wide": Tiles(16, 16, 8, 1),
    },
    "cdna": {
        64: Tiles(128, 32, 4, 1),
        128: Tiles(64, 32, 4, 1),
        256: Tiles(64, 16, 4, 1),
        512: Tiles(16, 16, 4, 1),
        "fp32": Tiles(32, 16, 4, 1),
        "fp32 wide": Tiles(32, 16, 4, 1),
    },
    "interpreter": dict.fromkeys((64, 128, 256, 512, "fp32", "fp32 wide", "fp32 widest"), Tiles(32, 16, 4, 1)),
}

# Where the sums of key and value together would leave blocks of too few rows for the fast products.
_VALUE_GRADIENT = {("hopper", 512): Tiles(32, 64, 8, 2, True, split=False)}

# Blackwell takes Hopper's rows where they fit: its products pass operands through shared memory that Hopper's keep in
# registers. Not measured on a chip.
_FORWARD["blackwell"] = {**_FORWARD["hopper"], 512: Tiles(64, 32, 8, 2, True)}
_KEY_GRADIENT["blackwell"] = {**_KEY_GRADIENT["hopper"], 256: Tiles(64, 64, 8, 1, True), 512: Tiles(32, 32, 8, 1)}
_QUERY_GRADIENT["blackwell"] = {**_QUERY_GRADIENT["hopper"], 256: Tiles(64, 64, 8, 1, True), 512: Tiles(32, 32, 8, 1)}

# Random words of ten rounds want registers, so dropout takes smaller blocks or more warps where it would spill.
_FORWARD_DROPOUT = {
    ("hopper", 64): Tiles(128, 64, 8, 3, True),
    ("hopper", 128): Tiles(128, 64, 8, 3, True),
    ("hopper", 512): Tiles(64, 64, 8, 1, True, split=False),
    ("blackwell", 64): Tiles(128, 64, 8, 3, True),
    ("blackwell", 128): Tiles(128, 64, 8, 3, True),
    ("ampere", 64): Tiles(128, 64, 8, 3),
    ("consumer", 64): Tiles(128, 64, 8, 3),
    ("consumer", 128): Tiles(128, 32, 8, 2),
}
_KEY_GRADIENT_DROPOUT = {
    ("hopper", 128): Tiles(64, 64, 8, 2, True, split=False),
    ("hopper", 256): Tiles(32, 64, 8, 2, True, split=False),
    ("ampere", 64): Tiles(32, 128, 8, 2, split=False),
    ("ampere", 128): Tiles(32, 64, 8, 2, split=False),
    ("blackwell", 256): Tiles(32, 64, 8, 1, True, split=False),
    ("blackwell", 512): Tiles(32, 32, 8, 1, split=False),
    ("ampere", 256): Tiles(32, 64, 8, 1, split=False),
    ("ampere", 512): Tiles(32, 32, 8, 1, split=False),
    ("consumer", 128): Tiles(32, 64, 8, 2, split=False),
}
_QUERY_GRADIENT_DROPOUT = {
    ("hopper", 256): Tiles(128, 32, 8, 2, True, split=False),
}
