"""Backward kernel for head dimensions 64 and 128: a program keeps 128 key rows and walks over the query rows they see.

One producer warp loads; two warpgroups have 64 of the key rows each and compute, transposed so that what they feed to
the tensor cores next is already in registers (Shah et al., FlashAttention-3, arXiv 2407.08608):

    scores  = K Q^T            weights  = exp2(scale * scores - lse)       dV += weights dO
    dweights = V dO^T - delta  dscores = weights * dweights                dK += dscores Q       dQ += dscores^T K

Only dscores passes through shared memory, because a query row's gradient sums over both warpgroups' keys: each computes
half of dQ from both halves of dscores and adds it to global memory in fp32. A step's products are issued so that each
piece of arithmetic runs under some of them: the exponentials under dweights, dscores under dV, the way out of dQ under
dK and the next step's scores.

Legend: M query rows of a block, N key rows of a tile, D head dimension.
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

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_work import Inputs, Sums, allocate_buffers, find_work, produce, unseen_zero
from ringflash.kernels.hopper.compat import async_store, meet, release, store_wait
from ringflash.kernels.hopper.dquery_accumulate import HALF, add_earlier, lay_down
from ringflash.kernels.hopper.dquery_in_turn import (
    add_in_turn,
    first_block_and_member,
    hand_over,
    next_block_and_member,
)
from ringflash.kernels.hopper.schedule import stage_and_parity


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "padded_rows", "key_rows", "key_heads",
        "query_head_stride", "dout_head_stride", "key_head_stride", "value_head_stride",
    ]
)  # fmt: skip
def attend_backward_kernel(
    query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc,
    dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr, query_rows, padded_rows, key_rows, key_heads,
    query_head_stride, dout_head_stride, key_head_stride, value_head_stride, scale,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `backward.PreparedBackward` for the arguments."""
    inputs = Inputs(
        query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc,
        query_head_stride, dout_head_stride, key_head_stride, value_head_stride,
    )  # fmt: skip
    buffers = allocate_buffers(inputs, QUERY_STAGES, DOUT_STAGES)
    M: gl.constexpr = query_desc.block_type.shape[0]
    N: gl.constexpr = key_desc.block_type.shape[0]
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], query_desc.dtype)
    dscores = gl.allocate_shared_memory(query_desc.dtype, [2, N, M], DSCORES)
    dquery = gl.allocate_shared_memory(gl.float32, [2 if ORDERED else 4, HALF, HALF], dquery_desc.layout)
    work = find_work(
        buffers, rows_of_tile_ptr, order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr, query_rows, padded_rows,
        key_rows, key_heads, GROUP, ORDERED,
    )  # fmt: skip
    fence_async_shared()
    sums = Sums(dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, key_rows, key_heads)
    if ORDERED:
        gl.warp_specialize(
            [
                (consume, (work, sums, buffers, dscores, dquery, rows_of_key_ptr, scale, 0, GROUP, FLOAT_OUT, ORDERED)),
                (consume, (work, sums, buffers, dscores, dquery, rows_of_key_ptr, scale, 1, GROUP, FLOAT_OUT, ORDERED)),
                (produce, (inputs, work, buffers, GROUP, ORDERED)),
                (add_in_turn, (work.turns, work.rows, dquery_desc, dquery, buffers.queries, 0, GROUP)),
                (add_in_turn, (work.turns, work.rows, dquery_desc, dquery, buffers.queries, 1, GROUP)),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (work, sums, buffers, dscores, dquery, rows_of_key_ptr, scale, 0, GROUP, FLOAT_OUT, ORDERED)),
                (consume, (work, sums, buffers, dscores, dquery, rows_of_key_ptr, scale, 1, GROUP, FLOAT_OUT, ORDERED)),
                (produce, (inputs, work, buffers, GROUP, ORDERED)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


@gluon.jit
def consume(
    work, sums, buffers, dscores, dquery, rows_of_key_ptr, scale,
    PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: key rows PART * 64 to PART * 64 + 64 of the tile."""
    rows, turns = work.rows, work.turns
    queries, douts, key, value = buffers.queries, buffers.douts, buffers.key, buffers.value
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    M: gl.constexpr = queries.blocks.shape[1]
    D: gl.constexpr = key.shape[2]
    dtype: gl.constexpr = key.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    DQUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    # The next step's numbers are loaded under this one's last products, where registers are left for them.
    EARLY: gl.constexpr = D == 128

    own_key = key.index(0).slice(PART * HALF, HALF, 0)
    own_value = value.index(0).slice(PART * HALF, HALF, 0)
    key_index = work.first_key + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    seeing = rows_of_key_ptr + key_index * 4
    first_seeing = gl.load(seeing, mask=key_index < sums.key_rows, other=0)
    last_seeing = gl.load(seeing + 3, mask=key_index < sums.key_rows, other=0)
    dkey = gl.zeros([HALF, D], gl.float32, SUMS)
    dvalue = gl.zeros([HALF, D], gl.float32, SUMS)
    no_scores = gl.zeros([HALF, M], gl.float32, SCORES)
    no_dquery = gl.zeros([HALF, HALF], gl.float32, DQUERY)
    scale_log2 = scale * 1.4426950408889634

    mbarrier.wait(buffers.loaded.index(0), 0)
    mbarrier.wait(buffers.loaded.index(1), 0)
    mbarrier.wait(queries.full.index(0), 0)
    token = warpgroup_mma(own_key, queries.blocks.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[token])
    if EARLY:
        lse = queries.numbers.index(0).load(COLUMNS)
        mbarrier.wait(douts.full.index(0), 0)
        minus_delta = douts.numbers.index(0).load(COLUMNS)

    block, member = first_block_and_member(rows, ORDERED)
    steps = rows.blocks * GROUP
    for step in range(steps):
        stage = stage_and_parity(step, QUERY_STAGES)[0]
        dout_stage, parity = stage_and_parity(step, DOUT_STAGES)
        dout = douts.blocks.index(dout_stage)
        row = rows.begin + block * M
        own_key = key.index(unseen_zero(row)).slice(PART * HALF, HALF, 0)
        if not EARLY:
            mbarrier.wait(douts.full.index(dout_stage), parity)
            minus_delta = douts.numbers.index(dout_stage).load(COLUMNS)
        initial, _ = gl.broadcast(minus_delta[None, :], no_scores)
        dweights_token = warpgroup_mma(own_value, dout.permute((1, 0)), initial, is_async=True)
        if not EARLY:
            lse = queries.numbers.index(stage).load(COLUMNS)
        weights = weigh(scores, lse, rows, row, first_seeing, last_seeing, scale_log2)
        dvalue_token = warpgroup_mma(gl.convert_layout(weights.to(dtype), FACTOR), dout, dvalue, is_async=True)
        dweights = warpgroup_mma_wait(1, deps=[dweights_token])
        rounded = (weights * dweights).to(dtype)
        dscores_factor = gl.convert_layout(rounded, FACTOR)
        # Two buffers: whoever writes one again has passed the barrier of the step between, and so has the other
        # warpgroup, whose dQ of the step before it is then done.
        shared = dscores.index(step & 1)
        shared.slice(PART * HALF, HALF, 0).store(rounded)
        fence_async_shared()
        meet("8")
        dvalue = warpgroup_mma_wait(0, deps=[dvalue_token])
        release(douts.empty.index(dout_stage))

        keys_now = key.index(unseen_zero(row))
        dquery_token = start_dquery(shared, keys_now, no_dquery, PART)
        if not ORDERED:
            staging = dquery.index(PART * 2 + (step & 1 ^ 1))
            add_earlier(sums.dquery_desc, staging, rows, step, block, member, M, D, PART)
        # The last step has no next one: its scores are of old numbers and unused.
        next_stage, parity = stage_and_parity(step + 1, QUERY_STAGES)
        mbarrier.wait(queries.full.index(next_stage), parity, pred=step + 1 < steps)
        scores_token = warpgroup_mma(
            own_key, queries.blocks.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        dkey_token = warpgroup_mma(dscores_factor, queries.blocks.index(stage), dkey, is_async=True)

        part_of_dquery = warpgroup_mma_wait(2, deps=[dquery_token]) * scale
        if ORDERED:
            hand_over(turns, dquery, part_of_dquery, step, PART)
        else:
            store_wait(1)
            lay_down(dquery.index(PART * 2 + (step & 1)), part_of_dquery)
        if EARLY:
            lse = queries.numbers.index(next_stage).load(COLUMNS)
            next_dout, parity = stage_and_parity(step + 1, DOUT_STAGES)
            mbarrier.wait(douts.full.index(next_dout), parity, pred=step + 1 < steps)
            minus_delta = douts.numbers.index(next_dout).load(COLUMNS)
        scores, dkey = warpgroup_mma_wait(0, deps=[scores_token, dkey_token])
        release(queries.empty.index(stage))
        block, member = next_block_and_member(rows, block, member, GROUP, ORDERED)

    if not ORDERED:
        fence_async_shared()
    # Both warpgroups have read all of the keys: theirs were last read for dQ, before the last wait of each.
    meet("8")
    if not ORDERED:
        staging = dquery.index(PART * 2 + (steps & 1 ^ 1))
        add_earlier(sums.dquery_desc, staging, rows, steps, block, member, M, D, PART)
    first_row = work.first_key + PART * HALF
    store_sum(sums, sums.dvalue_desc, sums.dvalue_ptr, dvalue, own_value, first_row, work.key_head, FLOAT_OUT, SUMS)
    store_sum(sums, sums.dkey_desc, sums.dkey_ptr, dkey * scale, own_key, first_row, work.key_head, FLOAT_OUT, SUMS)
    store_wait(0)


@gluon.jit
def start_dquery(dscores, key, no_dquery, PART: gl.constexpr):
    """The product for a warpgroup's part of dQ."""
    if key.shape[1] == 64:  # half of the rows
        dscores_part = dscores.slice(PART * HALF, HALF, 1).permute((1, 0))
        token = warpgroup_mma(dscores_part, key, no_dquery, use_acc=False, is_async=True)
    else:  # half of the columns
        token = warpgroup_mma(
            dscores.permute((1, 0)), key.slice(PART * HALF, HALF, 1), no_dquery, use_acc=False, is_async=True
        )
    return token


@gluon.jit
def weigh(scores, lse, rows, row, first_seeing, last_seeing, scale_log2):
    """Weights of the query rows from `row` on; none where a row does not see a key.

    A key is seen by the rows first_seeing to last_seeing, without the latter. lse has factor log2 e.
    """
    M: gl.constexpr = scores.shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    if (row < rows.full_begin) | (row + M > rows.full_end):
        index = (row + gl.arange(0, M, COLUMNS))[None, :]
        scores = gl.where((index >= first_seeing[:, None]) & (index < last_seeing[:, None]), scores, float("-inf"))
    return gl.exp2(scores * scale_log2 - lse[None, :])


@gluon.jit
def store_sum(sums, desc, ptr, total, staging, first_row, key_head, FLOAT_OUT: gl.constexpr, SUMS: gl.constexpr):
    """Write 64 key rows' gradient: straight from registers in fp32, through the rows' own place in 16 bits."""
    D: gl.constexpr = staging.shape[1]
    if FLOAT_OUT:
        row = gl.arange(0, HALF, gl.SliceLayout(1, SUMS))[:, None]
        column = gl.arange(0, D, gl.SliceLayout(0, SUMS))[None, :]
        base = ptr + (first_row.to(gl.int64) * sums.key_heads + key_head) * D
        inside = (first_row + row < sums.key_rows) & (column < D)
        gl.store(base + row * (sums.key_heads * D) + column, total, mask=inside)
    else:
        staging.store(total.to(staging.dtype))
        fence_async_shared()
        async_store(desc, [first_row, key_head * D], staging)
