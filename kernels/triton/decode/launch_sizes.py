"""Block sizes of attention to a cache by chip, dtype and head dimension, and in how many parts to share out keys.

Hopper's at head dimension 128 are measured (docs/benchmarks/decode.md), the others chosen by arithmetic:
tests/kernels/test_decode_ahead_of_time.py shows that nothing spills and that the programs share a multiprocessor as
counted here. `docs/benchmarks/decode.py --sweep` measures other shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaunchSizes:
    """Sizes of blocks and tiles, and how the kernel is compiled.

    Attributes:
        keys: key rows in a block.
        warps: warps in a program.
        stages: blocks in flight between memory and the matrix units, and the one in use.
        resident: programs that share a multiprocessor.
        queries: most query rows in a tile.
    """

    keys: int
    warps: int
    stages: int
    resident: int
    queries: int = 64

    @property
    def registers(self) -> int:
        """Most of a thread where keys are shared out: `choose_splits` puts at most two programs on a multiprocessor.

        One of NVIDIA's has 65,536.
        """
        return min(255, 65536 // (32 * self.warps * min(self.resident, 2)))


def launch_sizes(chip: str, dtype: torch.dtype, dim: int, many: bool) -> LaunchSizes:
    """Sizes by chip, dtype and the larger head dimension; and whether there are programs for several rounds."""
    if dtype == torch.float32:
        return _SIZES[chip]["fp32" if dim <= 128 else "fp32 wide"]
    row = next(row for row in (64, 128, 256, 512) if dim <= row)
    return (_SIZES_OF_MANY.get((chip, row)) if many else None) or _SIZES[chip][row]


# Blocks of keys and values in flight fill the shared memory of `resident` programs: 227 KiB on Hopper, 163 KiB on
# Ampere, 99 KiB on consumer chips, 64 KiB on CDNA. float32 runs on the plain multiply-add units, from registers.
_SIZES = {
    "hopper": {
        64: LaunchSizes(128, 4, 3, 3),
        128: LaunchSizes(64, 4, 3, 2),
        256: LaunchSizes(32, 4, 4, 2, queries=32),
        512: LaunchSizes(32, 8, 3, 1, queries=16),
        "fp32": LaunchSizes(16, 8, 3, 2, queries=16),
        "fp32 wide": LaunchSizes(16, 8, 3, 1, queries=16),
    },
    "ampere": {
        64: LaunchSizes(64, 4, 3, 3),
        128: LaunchSizes(64, 4, 2, 3),
        256: LaunchSizes(32, 4, 2, 3, queries=32),
        512: LaunchSizes(16, 4, 2, 2, queries=16),
        "fp32": LaunchSizes(16, 8, 3, 2, queries=16),
        "fp32 wide": LaunchSizes(16, 8, 2, 1, queries=16),
    },
    "consumer": {
        64: LaunchSizes(64, 4, 2, 2),
        128: LaunchSizes(32, 4, 2, 2),
        256: LaunchSizes(16, 4, 2, 2, queries=32),
        512: LaunchSizes(16, 4, 2, 1, queries=16),
        "fp32": LaunchSizes(16, 8, 2, 2, queries=16),
        "fp32 wide": LaunchSizes(16, 8, 1, 1, queries=16),
    },
    "cdna": {
        64: LaunchSizes(64, 4, 1, 2),
        128: LaunchSizes(32, 4, 1, 2),
        256: LaunchSizes(16, 4, 1, 2),
        512: LaunchSizes(16, 4, 1, 1, queries=16),
        "fp32": LaunchSizes(16, 4, 1, 2, queries=16),
        "fp32 wide": LaunchSizes(16, 4, 1, 1, queries=16),
    },
    "interpreter": dict.fromkeys((64, 128, 256, 512, "fp32", "fp32 wide"), LaunchSizes(16, 4, 1, 2, queries=32)),
}
_SIZES["blackwell"] = _SIZES["hopper"]
_SIZES_OF_MANY = {(chip, 128): LaunchSizes(128, 8, 3, 1) for chip in ("hopper", "blackwell")}
MOST_SPLITS = 128
"""Parts that are worth merging."""


def choose_splits(programs: int, blocks: int, multiprocessors: int) -> int:
    """In how many parts to share out the keys of each sequence.

    One program has enough bytes on their way to keep its multiprocessor's share of the memory busy, and parts cost a
    start and a merge each. So there are as many as fit on the chip side by side if that is nine tenths of it, or else
    one more.

    Args:
        programs: programs without splitting.
        blocks: blocks of keys that a sequence may have.
        multiprocessors: of the chip.
    """
    fitting = multiprocessors // programs
    if 10 * programs * fitting < 9 * multiprocessors:
        fitting += 1
    return max(1, min(fitting, blocks, MOST_SPLITS))
