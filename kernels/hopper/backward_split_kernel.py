"""Backward kernel for queries and keys of 192 columns and values of 128, as of multi-head latent attention (MLA).

As backward_kernel, but for what three accumulators leave no registers for: the next step's scores do not start under
this one's last products, and weights are kept rounded. The columns of queries and keys come in two parts, see blocks.
Of the first each warpgroup computes half of dQ from the dscores of both, of the rest all of dQ from its own keys'.

Legend: M query rows of a block, N key rows of a tile, D head dimension of values.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.gpu.block_lists import ListOperands
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_kernel import hide, rows_seeing, store_sum, store_sums, weigh
from ringflash.kernels.hopper.backward_tokens import Tokens
from ringflash.kernels.hopper.backward_work import Inputs, Sums, allocate_buffers, find_work, produce, unseen_zero
from ringflash.kernels.hopper.blocks import FIRST, add_block, block_rows, flat_layout, head_place
from ringflash.kernels.hopper.compat import meet, release, store_wait
from ringflash.kernels.hopper.dquery_accumulate import HALF, earlier_block, lay_down
from ringflash.kernels.hopper.schedule import stage_and_parity


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "padded_rows", "key_rows", "key_heads",
        "query_head_stride", "dout_head_stride", "key_head_stride", "value_head_stride",
    ]
)  # fmt: skip
def attend_backward_split_kernel(
    query_desc, dout_desc, key_desc, value_desc, query_rest_desc, key_rest_desc, lse_desc, delta_desc,
    dquery_desc, dkey_desc, dkey_rest_desc, dvalue_desc, dkey_ptr, dvalue_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    order_ptr, query_positions_desc, query_slopes_desc, key_positions_ptr, query_rows, padded_rows, key_rows, key_heads,
    query_head_stride, dout_head_stride, key_head_stride, value_head_stride, scale, bend,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, DIMS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `backward.PreparedBackward` for the arguments."""
    inputs = Inputs(
        query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, query_positions_desc, query_slopes_desc,
        None, query_rest_desc, key_rest_desc, query_head_stride, dout_head_stride, key_head_stride, value_head_stride,
    )  # fmt: skip
    buffers = allocate_buffers(inputs, QUERY_STAGES, DOUT_STAGES)
    M: gl.constexpr = block_rows(query_desc)
    N: gl.constexpr = block_rows(key_desc)
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], query_desc.dtype)
    dscores = gl.allocate_shared_memory(query_desc.dtype, [2, N, M], DSCORES)
    dquery = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], flat_layout(dquery_desc))
    work = find_work(
        buffers, rows_of_tile_ptr, order_ptr, rows_of_tile_ptr, rows_of_tile_ptr, rows_of_tile_ptr,
        Tokens(None, None, None, None, None), ListOperands(None, None, None, None, None, None, None), query_rows,
        padded_rows, key_rows, key_heads, GROUP, False,
    )  # fmt: skip
    fence_async_shared()
    sums = Sums(dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, key_rows, key_heads)
    gl.warp_specialize(
        [
            (consume_split, (work, sums, dkey_rest_desc, buffers, dscores, dquery, rows_of_key_ptr, key_positions_ptr,
                             scale, bend, 0, GROUP, FLOAT_OUT, DIMS)),
            (consume_split, (work, sums, dkey_rest_desc, buffers, dscores, dquery, rows_of_key_ptr, key_positions_ptr,
                             scale, bend, 1, GROUP, FLOAT_OUT, DIMS)),
            (produce, (inputs, work, buffers, GROUP, False)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def consume_split(
    work, sums, dkey_rest_desc, buffers, dscores, dquery, rows_of_key_ptr, key_positions_ptr, scale, bend,
    PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr, DIMS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: key rows PART * 64 to PART * 64 + 64 of the tile."""
    rows = work.rows
    queries, douts, key, value = buffers.queries, buffers.douts, buffers.key, buffers.value
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    M: gl.constexpr = queries.blocks.shape[1]
    D: gl.constexpr = value.shape[2]
    REST: gl.constexpr = buffers.key_rest.shape[2]
    dtype: gl.constexpr = key.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    SUMS_REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    FACTOR_REST: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS_REST, k_width=2)
    DQUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)

    key_index = work.first_key + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    first_seeing, last_seeing = rows_seeing(rows_of_key_ptr, key_index, sums.key_rows)
    dkey = gl.zeros([HALF, D], gl.float32, SUMS)
    dkey_rest = gl.zeros([HALF, REST], gl.float32, SUMS_REST)
    dvalue = gl.zeros([HALF, D], gl.float32, SUMS)
    no_scores = gl.zeros([HALF, M], gl.float32, SCORES)
    no_dquery = gl.zeros([HALF, HALF], gl.float32, DQUERY)
    scale_log2 = scale * 1.4426950408889634
    if bend is not None:
        scale_log2 = scale_log2 / bend
    key_position = first_seeing  # stands for none
    if key_positions_ptr is not None:
        key_position = gl.load(key_positions_ptr + key_index, mask=key_index < sums.key_rows, other=0).to(gl.float32)
    mbarrier.wait(buffers.loaded.index(0), 0)
    mbarrier.wait(buffers.loaded.index(1), 0)

    block, member = 0, 0
    steps = rows.blocks * GROUP
    for step in range(steps):
        stage, parity = stage_and_parity(step, QUERY_STAGES)
        row = rows.begin + block * M
        head = rows.first_head + member
        keys_now, rest_now = key.index(unseen_zero(row)), buffers.key_rest.index(unseen_zero(row))
        own_key, own_rest = keys_now.slice(PART * HALF, HALF, 0), rest_now.slice(PART * HALF, HALF, 0)
        own_value = value.index(unseen_zero(row)).slice(PART * HALF, HALF, 0)
        query, query_rest = queries.blocks.index(stage), buffers.query_rest.index(stage)
        mbarrier.wait(queries.full.index(stage), parity)
        token = warpgroup_mma(own_key, query.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        token = warpgroup_mma(own_rest, query_rest.permute((1, 0)), token, is_async=True)
        dout_stage, parity = stage_and_parity(step, DOUT_STAGES)
        dout = douts.blocks.index(dout_stage)
        lse = queries.numbers.index(stage).load(COLUMNS)
        scores = warpgroup_mma_wait(0, deps=[token])
        positions, slopes = buffers.query_positions.index(stage), buffers.query_slopes.index(stage)
        if (row < rows.full_begin) | (row + M > rows.full_end):
            scores = hide(scores, row, first_seeing, last_seeing, bend is not None)
        weights, sloping = weigh(
            scores, lse, scale_log2, bend, positions, slopes, key_position, key_positions_ptr is not None
        )
        weights = settle_rounded(weights.to(dtype))
        sloping = weights if bend is None else sloping.to(dtype)
        mbarrier.wait(douts.full.index(dout_stage), parity)
        dweights_token = warpgroup_mma(own_value, dout.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        dvalue_token = warpgroup_mma(gl.convert_layout(weights, FACTOR), dout, dvalue, is_async=True)
        dvalue, dweights = warpgroup_mma_wait(0, deps=[dvalue_token, dweights_token])
        dweights = dweights + douts.numbers.index(dout_stage).load(COLUMNS)[None, :]
        rounded = (sloping.to(gl.float32) * dweights).to(dtype)
        # Two buffers, as in backward_kernel.
        shared = dscores.index(step & 1)
        shared.slice(PART * HALF, HALF, 0).store(rounded)
        fence_async_shared()
        meet("8")
        release(douts.empty.index(dout_stage))

        first_token = warpgroup_mma(
            shared.permute((1, 0)), keys_now.slice(PART * HALF, HALF, 1), no_dquery, use_acc=False, is_async=True
        )
        staging = dquery.index(PART)
        if step > 0:
            earlier_row, earlier_head = earlier_block(rows, block, member, M)
            add_columns(sums.dquery_desc, staging, earlier_row, earlier_head, DIMS[0], FIRST)
        store_wait(0)
        lay_down(staging, warpgroup_mma_wait(0, deps=[first_token]) * scale)
        rest_token = warpgroup_mma(
            shared.slice(PART * HALF, HALF, 0).permute((1, 0)), own_rest, no_dquery, use_acc=False, is_async=True
        )
        dkey_token = warpgroup_mma(gl.convert_layout(rounded, FACTOR), query, dkey, is_async=True)
        dkey_rest_token = warpgroup_mma(gl.convert_layout(rounded, FACTOR_REST), query_rest, dkey_rest, is_async=True)
        fence_async_shared()
        add_columns(sums.dquery_desc, staging, row, head, DIMS[0], PART * HALF)
        rest, dkey, dkey_rest = warpgroup_mma_wait(0, deps=[rest_token, dkey_token, dkey_rest_token])
        release(queries.empty.index(stage))
        store_wait(0)
        lay_down(staging, rest * scale)
        last = block + 1 == rows.blocks
        member = gl.where(last, member + 1, member)
        block = gl.where(last, 0, block + 1)

    fence_async_shared()
    # Both warpgroups have read all of the keys: theirs were last read for dQ, before the last wait of each.
    meet("8")
    row, head = earlier_block(rows, block, member, M)
    add_columns(sums.dquery_desc, dquery.index(PART), row, head, DIMS[0], FIRST)
    first_row, head = work.first_key + PART * HALF, work.key_head
    own_key, own_value = key.index(0).slice(PART * HALF, HALF, 0), value.index(0).slice(PART * HALF, HALF, 0)
    whole_rest = buffers.key_rest.index(0)
    store_sums(
        work, sums, dkey, dvalue, scale, key.index(0), value.index(0), own_key, own_value, PART, FLOAT_OUT, DIMS, SUMS
    )
    store_sum(
        sums, dkey_rest_desc, sums.dkey_ptr, dkey_rest * scale, whole_rest, whole_rest.slice(PART * HALF, HALF, 0),
        first_row, head, PART, DIMS[0], FLOAT_OUT, SUMS_REST, FIRST,
    )  # fmt: skip
    store_wait(0)


@gluon.constexpr_function
def settle_assembly(count):
    """PTX of `settle_rounded` for `count` registers of two numbers each."""
    joined = " ".join(f"or.b32 all, all, ${i};" for i in range(count + 1, 2 * count))
    moved = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(1, count))
    return (
        f"{{ .reg .pred odd; .reg .b32 all; mov.b32 all, ${count}; {joined} and.b32 all, all, 0x80008000;"
        f" setp.ne.u32 odd, all, 0; vote.sync.any.pred odd, odd, 0xffffffff;"
        f" selp.b32 $0, 0x7FFF7FFF, ${count}, odd; {moved} }}"
    )


@gluon.constexpr_function
def settle_operands(count):
    """Constraints of `settle_assembly`."""
    return ",".join(["=&r"] * count + ["r"] * count)


@gluon.jit
def settle_rounded(weights):
    """`weights`, which are never negative, known before any branch or wait that follows; see `softmax.settle`.

    ptxas would otherwise start the next product while scores and their exponentials still have registers.
    """
    COUNT: gl.constexpr = weights.shape[1] // 4
    return gl.inline_asm_elementwise(
        settle_assembly(COUNT), settle_operands(COUNT), [weights], dtype=weights.dtype, is_pure=False, pack=2 * COUNT
    )


@gluon.jit
def add_columns(dquery_desc, staging, row, head, DIM: gl.constexpr, COLUMN: gl.constexpr):
    """Add 64 columns of dQ, from COLUMN on, that have been laid down."""
    add_block(dquery_desc, row, head_place(dquery_desc, head, DIM), COLUMN, staging)
