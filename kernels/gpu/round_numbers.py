"""Numbers of one tensor, or of two, are written as those of another dtype, by one launch.

Legend: N numbers of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher
from ringflash.kernels.kept import Kept

BLOCK = 4096
"""Numbers of a program."""


@compiled_once
@triton.jit(do_not_specialize=["count", "other_count", "blocks"])
def round_kernel(source, target, other_source, other_target, count, other_count, blocks, N: tl.constexpr):
    """Program = N numbers of a tensor as one of another dtype, or behind its blocks of another one."""
    program = tl.program_id(0)
    if program < blocks:
        round_block(source, target, program, count, N)
    elif other_source is not None:
        round_block(other_source, other_target, program - blocks, other_count, N)


@triton.jit
def round_block(source, target, block, count, N: tl.constexpr):
    """Round N numbers."""
    number_N = tl.cast(block, tl.int64) * N + tl.arange(0, N)
    inside_N = number_N < count
    source_N = tl.load(source + number_N, mask=inside_N)
    tl.store(target + number_N, source_N.to(target.dtype.element_ty), mask=inside_N)


def round_numbers(rounded: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write one contiguous tensor, or two, as others of another dtype, as `Tensor.to` does.

    Args:
        rounded: what is read and what is written, at addresses of whole 16 bytes.
    """
    counts = [x.numel() for x, _ in rounded]
    form = (*counts, rounded[0][0].dtype, rounded[0][1].dtype, rounded[0][0].device)
    launch = launchers.get(form)
    if launch is None:
        blocks = [-(-count // BLOCK) for count in counts]
        numbers = (*counts, *(0,) * (2 - len(counts)), blocks[0])
        launch = launchers.add(form, Launcher(sum(blocks), numbers, {"N": BLOCK}, {"num_warps": 8}, True))
    launch(round_kernel, (*[x for pair in rounded for x in pair], *(None,) * (4 - 2 * len(rounded))))


launchers = Kept()
"""`Launcher` by what is rounded."""
