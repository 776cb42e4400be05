"""Forward kernel for head dimension 512; see widest_work for how its warps share the work."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.blocks import block_columns, block_rows, flat_layout
from ringflash.kernels.hopper.rings import allocate_barriers, allocate_ring
from ringflash.kernels.hopper.softmax import LN_2, LOG2_E, LOWEST, OUTGROWN, ROWS, own_sums, softmax_step
from ringflash.kernels.hopper.widest_work import (
    allocate_factors,
    hand_over,
    hide,
    load_carry,
    load_scored,
    load_summed,
    multiply_factors,
    multiply_pieces,
    store_sums,
    walk_of_queries,
)

CARRIED_SUM = gl.constexpr(2.0**OUTGROWN.value)
"""What a carry's row sums to, as its maximum is taken to be smaller by OUTGROWN.

Thus a carry's gives way to the first keys that have more weight, of which the largest is then 1 and is not rounded.
"""


class Result(NamedTuple):
    """Where the result goes, and where a carry comes from."""

    out_desc: gl.tensor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    carry_out_ptr: gl.tensor
    carry_lse_ptr: gl.tensor
    query_rows: gl.tensor
    heads: gl.tensor


@compiled_once
@gluon.jit(
    do_not_specialize=["query_rows", "tiles", "heads", "query_head_stride", "key_head_stride", "value_head_stride"]
)
def attend_widest_kernel(
    query_desc, key_desc, value_desc, out_desc, out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr,
    start_ptr, stop_ptr, order_ptr, query_rows, tiles, heads,
    query_head_stride, key_head_stride, value_head_stride, scale_log2,
    GROUP: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `widest.PreparedWidestForward` for the arguments. Keys come by pieces of columns, values of rows."""
    D: gl.constexpr = block_columns(query_desc)
    N: gl.constexpr = block_rows(key_desc)
    # Swizzled so that pieces of the weights' columns are blocks of their own.
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=2 * block_rows(value_desc), element_bitwidth=16, rank=2
    )
    query = gl.allocate_shared_memory(query_desc.dtype, [ROWS, D], flat_layout(query_desc))
    loaded = allocate_barriers(1)
    keys = allocate_ring(key_desc, KEY_STAGES, 1)
    left_values = allocate_ring(value_desc, VALUE_STAGES, 1)
    right_values = allocate_ring(value_desc, VALUE_STAGES, 1)
    weights = allocate_factors(query_desc.dtype, N, WEIGHTS)
    fence_async_shared()
    walk = walk_of_queries(start_ptr, stop_ptr, order_ptr, query_rows, tiles, GROUP, N)
    result = Result(out_desc, out_ptr, lse_ptr, carry_out_ptr, carry_lse_ptr, query_rows, heads)
    gl.warp_specialize(
        [
            (accumulate, (walk, result, query, weights, left_values, 0, FLOAT_OUT)),
            (accumulate, (walk, result, query, weights, right_values, 1, FLOAT_OUT)),
            (weigh, (walk, result, query, loaded, keys, weights, start_ptr, stop_ptr, scale_log2)),
            (
                load_scored,
                (walk, query_desc, query, loaded.index(0), query_head_stride, key_desc, keys, key_head_stride, N),
            ),
            (load_summed, (walk, value_desc, left_values, right_values, value_head_stride, N)),
        ],
        [4, 4, 1, 1],
        [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2]],
    )


@gluon.jit
def weigh(walk, result, query, loaded, keys, weights, start_ptr, stop_ptr, scale_log2):
    """A warpgroup: scores and the online softmax. A carry is its initial state."""
    N: gl.constexpr = keys.blocks.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    rows = walk.first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = rows < result.query_rows
    low = gl.load(start_ptr + rows, mask=inside, other=0)
    high = gl.load(stop_ptr + rows, mask=inside, other=0)
    no_scores = gl.zeros([ROWS, N], gl.float32, SCORES)
    maximum = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = own_sums(no_scores)
    lse_rows = walk.head * result.query_rows + rows
    if result.carry_lse_ptr is not None:
        carried = gl.load(result.carry_lse_ptr + lse_rows, mask=inside, other=float("-inf"))
        unseen = carried == float("-inf")
        maximum = gl.where(unseen, LOWEST, carried * LOG2_E - OUTGROWN)
        # Four threads share a row, and add up their sums at the end.
        quarter = gl.where(unseen, 0.0, CARRIED_SUM / 4)
        total = total + gl.convert_layout(quarter, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]
    mbarrier.wait(loaded.index(0), 0)
    for block in range(walk.blocks):
        scores = multiply_pieces(query, keys, block, no_scores)
        scores = hide(scores, walk, walk.begin + block * N, low, high)
        tile, rescale, maximum, total = softmax_step(scores, maximum, total, scale_log2)
        slot, parity = block & 1, block >> 1 & 1
        mbarrier.wait(weights.empty.index(slot), parity ^ 1)
        weights.scales.index(slot).store(rescale)
        hand_over(weights, tile.to(query.dtype), block)
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES), assert_trivial=True)
    keyless = total == 0.0  # not so a row of nan, whose lse is to be nan: -inf would say that it has seen no key
    total_or_one = gl.where(keyless, 1.0, total)
    slot, parity = walk.blocks & 1, walk.blocks >> 1 & 1
    mbarrier.wait(weights.empty.index(slot), parity ^ 1)
    weights.scales.index(slot).store(1.0 / total_or_one)
    mbarrier.arrive(weights.full.index(slot), count=1)
    lse = gl.where(keyless, float("-inf"), (maximum + gl.log2(total_or_one)) * LN_2)
    gl.store(result.lse_ptr + lse_rows, lse, mask=inside)


@gluon.jit
def accumulate(walk, result, query, weights, values, PART: gl.constexpr, FLOAT_OUT: gl.constexpr):
    """A warpgroup: half of the columns of weights times values."""
    D: gl.constexpr = query.shape[1]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 4, 16])
    rows, heads = result.query_rows, result.heads
    first = gl.zeros([ROWS, D // 4], gl.float32, OUT)
    second = first
    if result.carry_out_ptr is not None:
        first, second = load_carry(result.carry_out_ptr, walk, rows, heads, PART, D, OUT)
        first, second = first * CARRIED_SUM, second * CARRIED_SUM
    for block in range(walk.blocks):
        first, second = multiply_factors(weights, values, first, second, block, True)
    slot, parity = walk.blocks & 1, walk.blocks >> 1 & 1
    mbarrier.wait(weights.full.index(slot), parity)
    scale = weights.scales.index(slot).load(gl.SliceLayout(1, OUT))[:, None]
    store_sums(
        result.out_desc, result.out_ptr, query, first * scale, second * scale, walk, rows, heads, PART, FLOAT_OUT
    )
