"""What the backward pass needs to know of each row beforehand: its delta, sum over columns of dout * out, minus dlse.

Legend: M rows of a tile, V head dimension of values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.chips import chip_of
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher, aligned
from ringflash.kernels.gpu.row_blocks import load_block, padded
from ringflash.kernels.kept import Kept, metadata


@compiled_once
@triton.jit(do_not_specialize=["row_count"])
def delta_kernel(
    dout, out, dlse, delta, row_count, heads, do_row, do_head, o_row, o_head, dl_head, dl_row,
    HAS_DLSE: tl.constexpr, M: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Program = (tile of rows, head), the head fastest: neighbours in memory are read together."""
    head = tl.program_id(0) % heads
    first_row = tl.program_id(0) // heads * M
    do_MV = load_block(dout, head, first_row, row_count, do_row, do_head, M, VALUE_DIM, PADDED_VALUE_DIM, False)
    o_MV = load_block(out, head, first_row, row_count, o_row, o_head, M, VALUE_DIM, PADDED_VALUE_DIM, False)
    delta_M = tl.sum(do_MV.to(tl.float32) * o_MV.to(tl.float32), 1)
    row_M = first_row + tl.arange(0, M)
    if HAS_DLSE:
        pointers = dlse + tl.cast(head, tl.int64) * dl_head + row_M.to(tl.int64) * dl_row
        delta_M -= tl.load(pointers, mask=row_M < row_count, other=0.0)
    tl.store(delta + tl.cast(head, tl.int64) * row_count + row_M, delta_M, mask=row_M < row_count)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """See ringflash.kernels.reference.row_delta."""
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    out = out if out.stride(2) == 1 else out.contiguous()
    direct = aligned(dout, out, dlse)
    call = (metadata(dout), metadata(out), metadata(dlse), direct)
    launch = launchers.get(call)
    if launch is None:
        chip_of(dout.device)  # raises where Triton cannot run
        launch = launchers.add(call, _launcher(dout, out, dlse, direct))
    rows, heads, _ = out.shape
    delta = out.new_empty((heads, rows), dtype=torch.float32)
    if rows:
        launch(delta_kernel, (dout, out, dlse, delta))
    return delta


launchers = Kept()
"""`Launcher` by what `row_delta` was asked for."""


def _launcher(dout: Tensor, out: Tensor, dlse: Tensor | None, direct: bool) -> Launcher:
    rows, heads, value_dim = out.shape
    strides = (*dout.stride()[:2], *out.stride()[:2], *((0, 0) if dlse is None else dlse.stride()))
    constants = dict(HAS_DLSE=dlse is not None, M=32, VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim))
    return Launcher(-(-rows // 32) * heads, (rows, heads, *strides), constants, {"num_warps": 4}, direct)
