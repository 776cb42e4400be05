"""Launch of the forward kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels import triton as portable
from ringflash.kernels.hopper.forward_kernel import LOG2_E, ROWS, attend_kernel
from ringflash.kernels.hopper.operands import (
    addressable,
    check_operands,
    descriptor,
    head_section,
    multiprocessors,
    supports_intervals,
)
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry


@dataclass(frozen=True)
class ForwardTiles:
    """Shape of a forward launch.

    Attributes:
        consumers: warpgroups that compute, 2 or 3, with 64 query rows of a tile each.
        keys: key rows of a block.
        stages: blocks of keys, and of values, in shared memory; a power of two.
        own_staging: whether the result has shared memory of its own on its way out.
        registers: of a thread of the consumers and of the producer.
        persistent: whether a program takes several tiles, loading the next one under the last steps of this one.
    """

    consumers: int
    keys: int
    stages: int
    own_staging: bool
    registers: tuple[int, int] = (240, 24)
    persistent: bool = True


FORWARD_TILES = {
    64: ForwardTiles(consumers=3, keys=128, stages=4, own_staging=True, registers=(160, 24)),
    128: ForwardTiles(consumers=2, keys=128, stages=2, own_staging=True),
    256: ForwardTiles(consumers=2, keys=64, stages=2, own_staging=False),
}
"""By head dimension; docs/benchmarks/kernels.md has the measurements behind them."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
) -> Carry:
    """See ringflash.kernels.reference.attend. A carry is overwritten where its tensors can hold the result.

    Masks that `supports_intervals` gives a reason against go to the portable kernels.
    """
    check_operands(query, key, value, intervals, scale, modifiers)
    if supports_intervals(intervals):
        return portable.attend(query, key, value, intervals, scale=scale, carry=carry, out_dtype=out_dtype)
    tiles = FORWARD_TILES[query.shape[2]]
    return launch_forward(query, key, value, intervals, scale, carry, out_dtype or query.dtype, tiles)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    scale: float,
    carry: Carry | None,
    out_dtype: torch.dtype,
    tiles: ForwardTiles,
) -> Carry:
    """`attend` with given tiles, for checked arguments."""
    (query_rows, heads, dim), (key_rows, key_heads, _) = query.shape, key.shape
    float_out = out_dtype != query.dtype
    carry = carry and (carry[0].contiguous(), carry[1].contiguous())
    if carry and float_out:
        out = carry[0]
    else:
        out = query.new_empty((query_rows, heads, dim), dtype=torch.float32 if float_out else out_dtype)
    lse = carry[1] if carry else query.new_empty((heads, query_rows), dtype=torch.float32)
    if key_rows == 0 or query_rows == 0:
        return (carry[0].to(out_dtype), lse) if carry else (out.zero_().to(out_dtype), lse.fill_(-torch.inf))

    query, key, value = addressable(query), addressable(key), addressable(value)
    rows = ROWS.value
    tile_count = -(-query_rows // (tiles.consumers * rows))
    programs = tile_count * heads
    if tiles.persistent:
        programs = min(programs, multiprocessors(query.device))
    carry_out, carry_lse = carry or (None, None)
    attend_kernel[(programs,)](
        descriptor(query, rows, dim),
        descriptor(key, tiles.keys, dim),
        descriptor(value, tiles.keys, dim),
        None if float_out else descriptor(out, rows, dim),
        out if float_out else None,
        lse, carry_out, carry_lse, intervals.start, intervals.stop,
        torch.zeros(1, dtype=torch.int32, device=query.device),
        query_rows, tile_count, heads, head_section(key_rows, key_heads, heads // key_heads, dim),
        query.stride(1), key.stride(1), value.stride(1), scale * LOG2_E.value,
        GROUP=heads // key_heads, CONSUMERS=tiles.consumers, STAGES=tiles.stages,
        HAS_CARRY=carry is not None, FLOAT_OUT=float_out, OWN_STAGING=tiles.own_staging,
        CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
        num_warps=4,
    )  # fmt: skip
    return out.to(out_dtype), lse
