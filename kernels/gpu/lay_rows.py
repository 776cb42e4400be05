"""Rows of two tensors are copied to where they lie beside each other, by one launch.

The driver's own copies of rows that lie apart take the host as long each; those of a GPU's own memory are kernels, too.

Legend: N words of 8 bytes that a program copies.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import ALIGNMENT, Launcher
from ringflash.kernels.kept import Kept

BLOCK = 2048
"""Words of a program."""

WORD = 8
"""Bytes."""


@compiled_once
@triton.jit(do_not_specialize=["rows"])
def lay_rows_kernel(first, second, target, rows, FIRST: tl.constexpr, SECOND: tl.constexpr, N: tl.constexpr):
    """Program = N words of the target; a row has FIRST words of the first tensor and SECOND of the second."""
    word_N = tl.program_id(0) * N + tl.arange(0, N)
    row_N, column_N = word_N // (FIRST + SECOND), word_N % (FIRST + SECOND)
    inside_N, is_first_N = row_N < rows, column_N < FIRST
    first_N = tl.load(first + row_N * FIRST + column_N, mask=inside_N & is_first_N, other=0)
    second_N = tl.load(second + row_N * SECOND + column_N - FIRST, mask=inside_N & (column_N >= FIRST), other=0)
    tl.store(target + word_N, tl.where(is_first_N, first_N, second_N), mask=inside_N)


def lay_rows(first: Tensor, second: Tensor, target: Tensor) -> None:
    """Copy the rows of two tensors to where they lie beside each other.

    Args:
        first: contiguous (rows, ...), of rows of whole 16 bytes, at an address of whole 16 bytes.
        second: the same.
        target: contiguous bytes, at such an address: each row of the first tensor with that of the second behind it.
            Less than 16 GiB, as numbers of words are 32 bits wide.
    """
    rows, *words = len(first), *[prod(x.shape[1:]) * x.element_size() // WORD for x in (first, second)]
    if not rows * sum(words):
        return
    form = (rows, *words, first.device)
    launch = launchers.get(form)
    if launch is None:
        constants = {"FIRST": words[0], "SECOND": words[1], "N": BLOCK}
        programs = -(-rows * sum(words) // BLOCK)
        launch = launchers.add(form, Launcher(programs, (rows,), constants, {"num_warps": 8}, True))
    addresses = [x.data_ptr() for x in (first, second, target)]
    assert not any(x % ALIGNMENT for x in addresses)
    if not launch.at(lay_rows_kernel, addresses):
        launch(lay_rows_kernel, tuple([x.view(-1).view(torch.int64) for x in (first, second, target)]))


launchers = Kept()
"""`Launcher` by what is laid."""
