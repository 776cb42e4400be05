"""Rows that are added to sums, of keys and of values and of several ranks in one launch; see ringflash.kernels.sums.

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


MOST = 4
"""Parts that are added to the same rows of a sum by a launch."""


@compiled_once
@triton.jit(do_not_specialize=["count", "other_count", "blocks"])
def add_rows_kernel(
    total, first, second, third, fourth, other_total, other_first, other_second, other_third, other_fourth,
    count, other_count, blocks, N: tl.constexpr,
):  # fmt: skip
    """Program = N numbers of the first sum, or behind its blocks of the other one."""
    program = tl.program_id(0)
    if program < blocks:
        add_block(total, first, second, third, fourth, program, count, N)
    elif other_total is not None:
        add_block(other_total, other_first, other_second, other_third, other_fourth, program - blocks, other_count, N)


@triton.jit
def add_block(total, first, second, third, fourth, block, count, N: tl.constexpr):
    """Add N numbers of each part, one part after another."""
    number_N = tl.cast(block, tl.int64) * N + tl.arange(0, N)
    inside_N = number_N < count
    total_N = tl.load(total + number_N, mask=inside_N, other=0.0) + tl.load(first + number_N, mask=inside_N, other=0.0)
    if second is not None:
        total_N += tl.load(second + number_N, mask=inside_N, other=0.0)
    if third is not None:
        total_N += tl.load(third + number_N, mask=inside_N, other=0.0)
    if fourth is not None:
        total_N += tl.load(fourth + number_N, mask=inside_N, other=0.0)
    tl.store(total + number_N, total_N, mask=inside_N)


def add_rows(sums: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """See ringflash.kernels.sums.add_rows."""
    pending: dict[int, list[Part]] = {}
    for part in parts:
        total = sums[part.which]
        if isinstance(part.rows, Tensor) or total.dtype != torch.float32 or not total.is_contiguous():
            _launch(sums, pending)
            pending = {}
            by_torch.add_rows(sums, [part])
            continue
        of_sum = pending.get(part.which, [])
        if (of_sum and (of_sum[0].rows != part.rows or len(of_sum) == MOST)) or (not of_sum and len(pending) == 2):
            _launch(sums, pending)
            pending = {}
        pending.setdefault(part.which, []).append(part)
    _launch(sums, pending)


def _launch(sums: Sequence[Tensor], parts: dict[int, list[Part]]) -> None:
    """Add parts to some rows of one sum, or of two."""
    addresses, sizes, added = [], [], []
    for which, of_sum in parts.items():
        total, rows = sums[which], of_sum[0].rows
        assert isinstance(rows, slice)
        row = prod(total.shape[1:])
        count = row * (rows.stop - rows.start)
        if count:
            addresses += [total.data_ptr() + row * rows.start * total.itemsize, *[x.address for x in of_sum]]
            sizes.append((count, len(of_sum)))
            added.append((which, of_sum))
    if not sizes:
        return
    form = (sums[0].device, *sizes, not any(x % ALIGNMENT for x in addresses))
    launch = launchers.get(form)
    if launch is None:
        counts = [count for count, _ in sizes]
        blocks = [-(-count // BLOCK) for count in counts]
        numbers = (*counts, *(0,) * (2 - len(counts)), blocks[0])
        launch = launchers.add(form, Launcher(sum(blocks), numbers, {"N": BLOCK}, {"num_warps": 8}, form[-1]))
    if not launch.at(add_rows_kernel, addresses):
        of_all = [
            (sums[which][of_sum[0].rows], *[x.tensor() for x in of_sum], *(None,) * (MOST - len(of_sum)))
            for which, of_sum in added
        ]
        nothing = (None,) * ((1 + MOST) * (2 - len(of_all)))
        launch(add_rows_kernel, (*[x for of_sum in of_all for x in of_sum], *nothing))


launchers = Kept()
"""`Launcher` by what is added."""
