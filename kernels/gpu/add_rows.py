"""Rows that are added to sums, of keys and of values in one launch; see ringflash.kernels.sums.

Legend: N numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels import sums as by_torch
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import ALIGNMENT, Launcher
from ringflash.kernels.kept import Kept
from ringflash.kernels.sums import Part

BLOCK = 4096
"""Numbers of a program."""


@compiled_once
@triton.jit(do_not_specialize=["count", "other_count", "blocks"])
def add_rows_kernel(total, part, other_total, other_part, count, other_count, blocks, N: tl.constexpr):
    """Program = N numbers of the first sum, or behind its blocks of the other one."""
    program = tl.program_id(0)
    if program < blocks:
        add_block(total, part, program, count, N)
    elif other_total is not None:
        add_block(other_total, other_part, program - blocks, other_count, N)


@triton.jit
def add_block(total, part, block, count, N: tl.constexpr):
    """Add N numbers to as many."""
    number_N = tl.cast(block, tl.int64) * N + tl.arange(0, N)
    inside_N = number_N < count
    total_N = tl.load(total + number_N, mask=inside_N, other=0.0) + tl.load(part + number_N, mask=inside_N, other=0.0)
    tl.store(total + number_N, total_N, mask=inside_N)


def add_rows(sums: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """See ringflash.kernels.sums.add_rows."""
    pending: list[Part] = []
    for part in parts:
        total = sums[part.which]
        if isinstance(part.rows, Tensor) or total.dtype != torch.float32 or not total.is_contiguous():
            _launch(sums, pending)
            pending = []
            by_torch.add_rows(sums, [part])
            continue
        if pending and (len(pending) == 2 or pending[0].which == part.which):
            _launch(sums, pending)
            pending = []
        pending.append(part)
    _launch(sums, pending)


def _launch(sums: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Add one part, or two to different sums."""
    addresses, counts = [], []
    for which, rows, address, _ in parts:
        assert isinstance(rows, slice)
        total = sums[which]
        row = prod(total.shape[1:])
        count = row * (rows.stop - rows.start)
        if count:
            addresses += [total.data_ptr() + row * rows.start * total.itemsize, address]
            counts.append(count)
    if not counts:
        return
    form = (sums[0].device, *counts, not any(x % ALIGNMENT for x in addresses))
    launch = launchers.get(form)
    if launch is None:
        blocks = [-(-count // BLOCK) for count in counts]
        numbers = (*counts, *(0,) * (2 - len(counts)), blocks[0])
        launch = launchers.add(form, Launcher(sum(blocks), numbers, {"N": BLOCK}, {"num_warps": 8}, form[-1]))
    if not launch.at(add_rows_kernel, addresses):
        of_all = [x for part in parts for x in (sums[part.which][part.rows], part.tensor()) if x.numel()]
        launch(add_rows_kernel, (*of_all, *(None,) * (4 - len(of_all))))


launchers = Kept()
"""`Launcher` by what is added."""
