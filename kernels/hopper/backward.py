"""Launch of the backward kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ringflash.kernels import triton as portable
from ringflash.kernels.hopper.backward_kernel import HALF, attend_backward_kernel
from ringflash.kernels.hopper.backward_wide_kernel import attend_backward_wide_kernel
from ringflash.kernels.hopper.operands import (
    addressable,
    check_operands,
    descriptor,
    head_section,
    supports_intervals,
)
from ringflash.kernels.hopper.turns import PARTS, heads_in_turn, turns_of_tiles
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers

row_delta = portable.row_delta


@dataclass(frozen=True)
class BackwardTiles:
    """Shape of a backward launch.

    Attributes:
        keys: key rows of a tile.
        queries: query rows of a block.
        stages: blocks of queries and of out's gradient in shared memory; powers of two or 3.
        direct: whether dQ is added from registers, not through shared memory; head dimensions 64 and 128.
        registers: of a thread of the consumers and of the producer.
    """

    keys: int
    queries: int
    stages: tuple[int, int]
    direct: bool = False
    registers: tuple[int, int] = (240, 24)


BACKWARD_TILES = {
    64: BackwardTiles(keys=128, queries=128, stages=(2, 2)),
    128: BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    256: BackwardTiles(keys=64, queries=64, stages=(2, 1)),
}
"""By head dimension; docs/benchmarks/kernels.md has the measurements behind them."""


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ringflash.kernels.reference.attend_backward. A carry is overwritten; dout is rounded to the dtype of query.

    Masks that `supports_intervals` gives a reason against go to the portable kernels.
    """
    check_operands(query, key, value, intervals, scale, modifiers)
    arguments = (dout, query, key, value, lse, delta, intervals)
    if supports_intervals(intervals):
        return portable.attend_backward(
            *arguments, scale=scale, carry=carry, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype,
            deterministic=deterministic,
        )  # fmt: skip
    dtypes = (dquery_dtype or query.dtype, dkey_dtype or key.dtype)
    return launch_backward(*arguments, scale, carry, *dtypes, BACKWARD_TILES[query.shape[2]], deterministic)


def launch_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    scale: float,
    carry: Tensor | None,
    dquery_dtype: torch.dtype,
    dkey_dtype: torch.dtype,
    tiles: BackwardTiles,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` with given tiles, for checked arguments."""
    (query_rows, heads, dim), (key_rows, key_heads, _) = query.shape, key.shape
    group = heads // key_heads
    float_out = dkey_dtype != key.dtype
    stored_dtype = torch.float32 if float_out else dkey_dtype
    dquery = query.new_zeros(query.shape, dtype=torch.float32) if carry is None else carry.contiguous()
    dkey, dvalue = (torch.empty(x.shape, dtype=stored_dtype, device=x.device) for x in (key, value))
    if query_rows == 0 or key_rows == 0:
        return dquery.to(dquery_dtype), dkey.zero_().to(dkey_dtype), dvalue.zero_().to(dkey_dtype)

    dout, query, key, value = (addressable(x) for x in (dout.to(query.dtype), query, key, value))
    numbers, padded_rows = prepare_rows(lse, delta, tiles.queries)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    lse_desc, delta_desc = (TensorDescriptor(x, [x.numel()], [1], [tiles.queries], layout) for x in numbers)
    dkey_desc, dvalue_desc = (None if float_out else descriptor(x, HALF.value, min(dim, 128)) for x in (dkey, dvalue))
    turns, turn_now, section = None, None, head_section(query_rows * 2 * group, key_heads, 1, dim)
    if deterministic:
        turns, turn_now, section = adding_turns(intervals, (heads, key_heads), dim, tiles)
    kernel = attend_backward_wide_kernel if dim == 256 else attend_backward_kernel
    kernel[(-(-key_rows // tiles.keys) * key_heads,)](
        descriptor(query, tiles.queries, dim),
        descriptor(dout, tiles.queries, dim),
        descriptor(key, tiles.keys, dim),
        descriptor(value, tiles.keys, dim),
        lse_desc, delta_desc,
        descriptor(dquery, HALF.value, HALF.value), dquery,
        dkey_desc, dvalue_desc, dkey if float_out else None, dvalue if float_out else None,
        intervals.key_tile_rows(1), intervals.key_tile_rows(tiles.keys), turns, turn_now,
        query_rows, padded_rows, key_rows, key_heads, section,
        query.stride(1), dout.stride(1), key.stride(1), value.stride(1), scale,
        GROUP=group, QUERY_STAGES=tiles.stages[0], DOUT_STAGES=tiles.stages[1],
        DIRECT=tiles.direct and not deterministic, FLOAT_OUT=float_out, ORDERED=deterministic,
        CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
        num_warps=4,
    )  # fmt: skip
    return dquery.to(dquery_dtype), dkey.to(dkey_dtype), dvalue.to(dkey_dtype)


def adding_turns(
    intervals: KeyIntervals, heads: tuple[int, int], dim: int, tiles: BackwardTiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn of each key tile; whose turn it is, (heads, blocks, parts) to write in; heads to work on at a time."""
    table = intervals.key_tile_rows(tiles.keys)

    def build() -> tuple[Tensor, Tensor, Tensor]:
        row_bytes = heads[0] // heads[1] * dim * 8
        return *turns_of_tiles(table, intervals.query_count, tiles.queries), heads_in_turn(table, heads[1], row_bytes)

    turns, first_turns, section = intervals._cached(("turns", heads, dim, tiles.keys, tiles.queries), build)
    return turns, first_turns[None, :, None].expand(heads[0], -1, PARTS.value).contiguous(), section


def prepare_rows(lse: Tensor, delta: Tensor, block: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Lse times log2 e and minus delta, flat, each head's rows followed by rows of no weight, and rows a head then has.

    A block may reach `block` rows behind the last. Rows without keys (lse -inf) get +inf, so that no weight is left.
    """
    heads, rows = lse.shape
    padded_rows = -(-(rows + block) // 128) * 128
    scaled_lse, minus_delta = (lse.new_empty(heads * padded_rows) for _ in range(2))
    prepare_rows_kernel[(triton.cdiv(padded_rows, 1024), heads)](
        lse.contiguous(), delta.contiguous(), scaled_lse, minus_delta, rows, padded_rows
    )
    return (scaled_lse, minus_delta), padded_rows


@triton.jit(do_not_specialize=["rows", "padded_rows"])
def prepare_rows_kernel(lse_ptr, delta_ptr, scaled_lse_ptr, minus_delta_ptr, rows, padded_rows):
    """See `prepare_rows`."""
    row = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    head = tl.program_id(1)
    lse = tl.load(lse_ptr + head * rows + row, mask=row < rows, other=float("-inf"))
    delta = tl.load(delta_ptr + head * rows + row, mask=row < rows, other=0.0)
    scaled = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(scaled_lse_ptr + head * padded_rows + row, scaled, mask=row < padded_rows)
    tl.store(minus_delta_ptr + head * padded_rows + row, -delta, mask=row < padded_rows)
