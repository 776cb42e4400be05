"""The first step on a GPU, by which it is decided where the blocks of the next ones are kept.

Every block is recomputed in it. What blocks keep stays on the device up to a part of what is free, and moves to the
host beyond; if the host has no room for all of it, blocks keep less, in pairs. What the step then took says how much of
that was needless; optimizers make their state in its end, so what stays of it counts as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringflash.training.memory.plan import OFFLOAD, RECOMPUTE, SPARE, Measured

ON_DEVICE = 0.1
"""Part of the free memory that blocks may fill in the first step, of which nobody knows yet what else it takes."""


class FirstStep:
    """What the first step takes on one GPU.

    Args:
        device: the GPU.
        blocks: how many there are.
        host: bytes of host memory that may be used.

    Attributes:
        pairs: see `BlockMemory`; known once the first block has run.
    """

    def __init__(self, device: torch.device, blocks: int, host: int) -> None:
        self._device, self._blocks, self._host = device, blocks, host
        self.pairs = self._agreed = False
        self._before = self._room = self._largest = self._kept = self._again = self._moved = self._ran = 0

    def begin(self) -> None:
        """The step begins."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)
        self._room = int(ON_DEVICE * (self._capacity() - self._before))

    def placement(self, number: int) -> str:
        """Of the block of that number."""
        if number == 0:
            self._ran = self._kept = self._moved = 0  # of another micro-batch
        return self._placed(self._kept)

    def placements(self, sizes: Sequence[int]) -> list[str]:
        """Of the blocks that come next in this pass, if they keep so many bytes."""
        return [self._placed(kept) for kept in itertools.accumulate(sizes[:-1], initial=self._kept)] if sizes else []

    def ran(self, kept: int, moved: bool) -> None:
        """A block keeps so many bytes, on the device or moved; of all ranks' first ones a collective."""
        if not self._agreed:
            self._agreed = True  # before anything else: a rank may have no tokens
            lacking = torch.tensor(self._blocks * kept - self._host - self._room, device=self._device)
            dist.all_reduce(lacking, dist.ReduceOp.MAX)
            self.pairs = bool(lacking > 0)
        self._largest = max(self._largest, kept)
        self._kept += kept
        self._moved += moved
        self._ran += 1

    def ran_again(self, size: int) -> None:
        """A block has so many bytes when it is computed again."""
        self._again = max(self._again, size)

    def end(self) -> Measured:
        """What it took, on the rank on which that was most; a collective."""
        stays = max(0, torch.cuda.memory_allocated(self._device) - self._before)
        free = int((1 - SPARE) * self._capacity()) - torch.cuda.max_memory_allocated(self._device) - stays
        least = torch.tensor([free, -self._moved, -self._kept // max(1, self._ran), -self._again], device=self._device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        free, *most = least.tolist()
        torch.cuda.reset_peak_memory_stats(self._device)  # the next steps take something else
        return Measured(free, *(-value for value in most))

    def _placed(self, kept: int) -> str:
        """Where a block goes behind others that keep so many bytes."""
        return RECOMPUTE if kept + self._largest <= self._room else OFFLOAD

    def _capacity(self) -> int:
        """Bytes of the device that torch has or could have."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)
