"""What the backward kernels read of query rows beside queries: lse and delta, laid out for the tensor memory engine.

Both are flat, each head's rows followed by rows of no weight, lse with factor log2 e and delta negative. Where out is
at hand, one pass over it and dout finds delta as well, and sets to zero what gradients of query are added up in. With
ALiBi positions and slopes of query rows are laid out like them.

Legend: M rows of a tile, V head dimension of values, D of queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher, aligned
from ringflash.kernels.gpu.row_blocks import LOG2_E, block_inside, block_offsets, load_block, padded

TILE = 32
"""Rows of a program that finds delta."""

Results = tuple[Tensor, Tensor | None]
"""Out, and the gradient of lse or None: what delta is found from."""


class Rows(NamedTuple):
    """What a launch needs of query rows beside the operands.

    Attributes:
        scaled_lse: (H * padded rows,) fp32; so is minus_delta.
        minus_delta: see scaled_lse.
        delta: (H, T) fp32.
        dquery: (T, H, D) fp32, to add gradients of query to.
    """

    scaled_lse: Tensor
    minus_delta: Tensor
    delta: Tensor
    dquery: Tensor


class PreparedRows:
    """What is worked out once for calls alike, and their launch.

    Args:
        dout: (T, H, Dv), of the first call; so are the others.
        query: (T, H, D).
        lse: (H, T).
        delta: (H, T), or None to find it.
        results: of the call where delta is None; whose columns lie together, as dout's do.
        padded_rows: of a head in what is laid out, a multiple of `TILE`.
        kept: of what dropout is given, by which delta is multiplied, as all that becomes of it is divided by that.
    """

    def __init__(
        self,
        dout: Tensor,
        query: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        results: Results | None,
        padded_rows: int,
        kept: float,
    ) -> None:
        rows, heads, dim = query.shape
        self.number_count = heads * padded_rows
        row_blocks = -(-padded_rows // 1024)
        if delta is not None:
            numbers = rows, padded_rows, row_blocks, kept
            self.launch = Launcher(row_blocks * heads, numbers, {}, {}, aligned(lse, delta))
            return
        assert results is not None
        out, dlse = results
        value_dim = out.shape[2]
        strides = (*dout.stride()[:2], *out.stride()[:2], *((0, 0) if dlse is None else dlse.stride()))
        constants = dict(
            M=TILE, VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim), DIM=dim, PADDED_DIM=padded(dim)
        )
        self.launch = Launcher(
            padded_rows // TILE * heads, (rows, padded_rows, heads, *strides), constants, {"num_warps": 4},
            aligned(dout, *results, lse),
        )  # fmt: skip

    def __call__(
        self,
        dout: Tensor,
        query: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        results: Results | None,
        carry: Tensor | None,
    ) -> Rows:
        """Of a call alike; the contiguous carry to add gradients of query to, or None for zeros."""
        scaled_lse, minus_delta = lse.new_empty(self.number_count), lse.new_empty(self.number_count)
        if delta is not None:
            dquery = query.new_zeros(query.shape, dtype=torch.float32) if carry is None else carry
            self.launch(prepare_rows_kernel, (lse.contiguous(), delta.contiguous(), scaled_lse, minus_delta))
        else:
            assert results is not None
            assert carry is None
            delta, dquery = torch.empty_like(lse), query.new_empty(query.shape, dtype=torch.float32)
            self.launch(find_rows_kernel, (dout, *results, lse, delta, scaled_lse, minus_delta, dquery))
        return Rows(scaled_lse, minus_delta, delta, dquery)


class PreparedSlopes:
    """What is worked out once for calls alike with ALiBi, and their launch.

    Args:
        slopes: (T, H), of the first call; so are the others.
        padded_rows: as in `PreparedRows`.
        direct: whether all that is launched with is `aligned`.
    """

    def __init__(self, slopes: Tensor, padded_rows: int, direct: bool) -> None:
        rows, heads = slopes.shape
        self.number_count = heads * padded_rows
        row_blocks = -(-padded_rows // 1024)
        numbers = rows, padded_rows, row_blocks, *slopes.stride()
        self.launch = Launcher(row_blocks * heads, numbers, {}, {}, direct)

    def __call__(self, query_positions: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Of a call alike: positions and slopes of query rows, each (H * padded rows,) fp32."""
        positions, scaled_slopes = slopes.new_empty(self.number_count), slopes.new_empty(self.number_count)
        self.launch(prepare_slopes_kernel, (query_positions.contiguous(), slopes, positions, scaled_slopes))
        return positions, scaled_slopes


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows", "row_blocks"])
def prepare_rows_kernel(lse_ptr, delta_ptr, scaled_lse_ptr, minus_delta_ptr, rows, padded_rows, row_blocks, kept):
    """Of delta that is given. Program = (head, 1,024 rows).

    Rows without keys (lse -inf) get +inf, so that no weight is left.
    """
    row = tl.program_id(0) % row_blocks * 1024 + tl.arange(0, 1024)
    head = tl.program_id(0) // row_blocks
    lse = tl.load(lse_ptr + head * rows + row, mask=row < rows, other=float("-inf"))
    delta = tl.load(delta_ptr + head * rows + row, mask=row < rows, other=0.0)
    scaled = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    tl.store(scaled_lse_ptr + head * padded_rows + row, scaled, mask=row < padded_rows)
    tl.store(minus_delta_ptr + head * padded_rows + row, -delta * kept, mask=row < padded_rows)


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows"])
def find_rows_kernel(
    dout, out, dlse, lse, delta, scaled_lse, minus_delta, zeros,
    rows, padded_rows, heads, do_row, do_head, o_row, o_head, dl_head, dl_row,
    M: tl.constexpr, VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """The same, delta itself, and zeros. Program = (tile of rows, head), as of `row_delta.delta_kernel`."""
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
    scaled_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M * LOG2_E)
    tl.store(scaled_lse + place_M, scaled_M, mask=row_M < padded_rows)
    tl.store(minus_delta + place_M, -delta_M, mask=row_M < padded_rows)
    offsets_MD = block_offsets(head, first_row, heads, M, DIM, PADDED_DIM)
    inside_MD = block_inside(first_row, rows, M, DIM, PADDED_DIM)
    tl.store(zeros + offsets_MD, tl.zeros([M, PADDED_DIM], tl.float32), mask=inside_MD)


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows", "row_blocks", "slopes_row", "slopes_head"])
def prepare_slopes_kernel(
    position_ptr, slope_ptr, prepared_position_ptr, prepared_slope_ptr, rows, padded_rows, row_blocks,
    slopes_row, slopes_head,
):  # fmt: skip
    """Positions, and slopes times log2 e, laid out as lse. Program = (head, 1,024 rows)."""
    row = tl.program_id(0) % row_blocks * 1024 + tl.arange(0, 1024)
    head = tl.program_id(0) // row_blocks
    position = tl.load(position_ptr + row, mask=row < rows, other=0).to(tl.float32)
    offset = row.to(tl.int64) * slopes_row + head.to(tl.int64) * slopes_head
    slope = tl.load(slope_ptr + offset, mask=row < rows, other=0.0) * 1.4426950408889634
    tl.store(prepared_position_ptr + head * padded_rows + row, position, mask=row < padded_rows)
    tl.store(prepared_slope_ptr + head * padded_rows + row, slope, mask=row < padded_rows)
