"""What the backward kernels read of query rows beside queries: lse and delta, laid out for the tensor memory engine.

Both are flat, each head's rows followed by rows of no weight, lse with factor log2 e and delta negative. Where out is
at hand, one pass over it and dout finds delta as well, and sets to zero what the kernels do not.

Legend: M rows of a tile, V head dimension of values, D of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher
from ringflash.kernels.gpu.row_blocks import block_offsets, load_block, padded

TILE = 32
"""Rows of a program that finds delta."""


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows", "row_blocks"])
def prepare_rows_kernel(lse_ptr, delta_ptr, scaled_lse_ptr, minus_delta_ptr, rows, padded_rows, row_blocks, kept):
    """Of delta that is given. Program = (head, 1,024 rows).

    With dropout delta is multiplied by what is kept, as all that becomes of it is divided by that at the end.
    Rows without keys (lse -inf) get +inf, so that no weight is left.
    """
    row = tl.program_id(0) % row_blocks * 1024 + tl.arange(0, 1024)
    head = tl.program_id(0) // row_blocks
    lse = tl.load(lse_ptr + head * rows + row, mask=row < rows, other=float("-inf"))
    delta = tl.load(delta_ptr + head * rows + row, mask=row < rows, other=0.0)
    scaled = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(scaled_lse_ptr + head * padded_rows + row, scaled, mask=row < padded_rows)
    tl.store(minus_delta_ptr + head * padded_rows + row, -delta * kept, mask=row < padded_rows)


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows"])
def find_rows_kernel(
    dout, out, dlse, lse, delta, scaled_lse, minus_delta, zeroed, start, stop, turn_now, turn_bounds,
    rows, padded_rows, heads, do_row, do_head, o_row, o_head, dl_head, dl_row,
    M: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, and delta itself. Program = (tile of rows, head), the head fastest, as of `row_delta.delta_kernel`.

    Of `zeroed`, shaped like query, rows become zero that see no keys, or all where no start is given. Turns of blocks
    of BLOCK rows begin as turn_bounds says.
    """
    head = tl.program_id(0) % heads
    first_row = tl.program_id(0) // heads * M
    row_M = first_row + tl.arange(0, M)
    inside_M = row_M < rows
    do_MV = load_block(dout, head, first_row, rows, do_row, do_head, M, VALUE_DIM, PADDED_VALUE_DIM, False)
    o_MV = load_block(out, head, first_row, rows, o_row, o_head, M, VALUE_DIM, PADDED_VALUE_DIM, False)
    delta_M = tl.sum(do_MV.to(tl.float32) * o_MV.to(tl.float32), 1)
    if dlse is not None:
        pointers = dlse + tl.cast(head, tl.int64) * dl_head + row_M.to(tl.int64) * dl_row
        delta_M -= tl.load(pointers, mask=inside_M, other=0.0)
    lse_M = tl.load(lse + tl.cast(head, tl.int64) * rows + row_M, mask=inside_M, other=float("-inf"))
    tl.store(delta + tl.cast(head, tl.int64) * rows + row_M, delta_M, mask=inside_M)
    place_M = tl.cast(head, tl.int64) * padded_rows + row_M
    scaled_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M * 1.4426950408889634)
    tl.store(scaled_lse + place_M, scaled_M, mask=row_M < padded_rows)
    tl.store(minus_delta + place_M, -delta_M, mask=row_M < padded_rows)
    zero_M = inside_M
    if start is not None:
        zero_M &= tl.load(start + row_M, mask=inside_M, other=0) >= tl.load(stop + row_M, mask=inside_M, other=1)
    offsets_MD = block_offsets(head, first_row, heads, M, DIM, PADDED_DIM)
    within_MD = zero_M[:, None] & (tl.arange(0, PADDED_DIM)[None, :] < DIM)
    tl.store(zeroed + offsets_MD, tl.zeros([M, PADDED_DIM], zeroed.dtype.element_ty), mask=within_MD)
    if turn_now is not None:
        block = first_row // BLOCK
        begins = (first_row % BLOCK == 0) & (first_row < rows)
        first = tl.load(turn_bounds + block * 2, mask=begins, other=0)
        at = (tl.cast(head, tl.int64) * ((rows + BLOCK - 1) // BLOCK) + block) * 2 + tl.arange(0, 2)
        tl.store(turn_now + at, tl.zeros([2], tl.int32) + first, mask=begins)


def find_rows_launcher(
    dout: Tensor, out: Tensor, dlse: Tensor | None, head_dim: int, padded_rows: int, block: int, direct: bool
) -> Launcher:
    """For tensors with the metadata of these, whose head's columns lie together.

    Args:
        dout: (T, H, Dv).
        out: (T, H, Dv).
        dlse: (H, T) or None.
        head_dim: of queries.
        padded_rows: of a head in what the kernel writes.
        block: query rows of a block that turns are of.
        direct: see `Launcher`.
    """
    rows, heads, value_dim = out.shape
    strides = (*dout.stride()[:2], *out.stride()[:2], *((0, 0) if dlse is None else dlse.stride()))
    constants = dict(
        M=TILE, VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim), DIM=head_dim, PADDED_DIM=padded(head_dim),
        BLOCK=block,
    )  # fmt: skip
    programs = -(-padded_rows // TILE) * heads
    return Launcher(programs, (rows, padded_rows, heads, *strides), constants, {"num_warps": 4}, direct)
