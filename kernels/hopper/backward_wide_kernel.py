"""Backward kernel for head dimension 256: as backward_kernel, with another split of the work between the warpgroups.

A program keeps 64 key rows. Each warpgroup has half of the keys for the scores and dweights, and half of the columns
for the three sums, whose accumulators would not fit otherwise. So weights and dscores both pass through shared memory,
and scores stand with the queries as rows.

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

from ringflash.kernels.gpu.block_lists import ListOperands
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_kernel import store_float
from ringflash.kernels.hopper.backward_tokens import Tokens, mask_of
from ringflash.kernels.hopper.backward_work import Inputs, Sums, allocate_buffers, find_work, produce, unseen_zero
from ringflash.kernels.hopper.blocks import block_rows, flat_layout, head_place, store_part
from ringflash.kernels.hopper.compat import meet, release, store_wait
from ringflash.kernels.hopper.dquery_accumulate import HALF, add_earlier, add_part, lay_down
from ringflash.kernels.hopper.dquery_in_turn import (
    add_in_turn,
    first_block_and_member,
    hand_over,
    next_block_and_member,
)
from ringflash.kernels.hopper.dropout import Dropout, draw_for, drop, seed_of, words_of_keys, words_of_queries
from ringflash.kernels.hopper.listed_blocks import bits_of_rows, hide_unlisted
from ringflash.kernels.hopper.rows_visited import LISTED, entry_of, row_of, way_to_walk
from ringflash.kernels.hopper.schedule import stage_and_parity
from ringflash.kernels.hopper.score_changes import bent_weights, hidden_score


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "padded_rows", "key_rows", "key_heads",
        "query_head_stride", "dout_head_stride", "key_head_stride", "value_head_stride", "threshold", "first_head",
        "list_length", "list_heads", "list_words", "list_rows",
    ]
)  # fmt: skip
def attend_backward_wide_kernel(
    query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc,
    dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr,
    work_ptr, tokens_of_key_ptr, tokens_of_tile_ptr, dkey_slots_ptr, dvalue_slots_ptr,
    query_positions_desc, query_slopes_desc, key_positions_ptr, seed_ptr, dropout_queries_desc, dropout_keys_ptr,
    entries_ptr, bits_ptr, row_block_ptr,
    query_rows, padded_rows, key_rows, key_heads,
    query_head_stride, dout_head_stride, key_head_stride, value_head_stride, scale, bend,
    threshold, kept, first_head, list_length, list_heads, list_words, list_rows,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr, DIMS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `backward.PreparedBackward` for the arguments."""
    inputs = Inputs(
        query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, query_positions_desc, query_slopes_desc,
        dropout_queries_desc, None, None, query_head_stride, dout_head_stride, key_head_stride, value_head_stride,
    )  # fmt: skip
    buffers = allocate_buffers(inputs, QUERY_STAGES, DOUT_STAGES)
    M: gl.constexpr = block_rows(query_desc)
    N: gl.constexpr = block_rows(key_desc)
    # Swizzled over half a row, so that each warpgroup's half is a block of its own.
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(query_desc.dtype, [2, M, N], SQUARE)
    dscores = gl.allocate_shared_memory(query_desc.dtype, [2, M, N], SQUARE)
    dquery = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], flat_layout(dquery_desc))
    dropout = Dropout(seed_ptr, threshold, kept, first_head, dropout_queries_desc, dropout_keys_ptr)
    tokens = Tokens(work_ptr, tokens_of_key_ptr, tokens_of_tile_ptr, dkey_slots_ptr, dvalue_slots_ptr)
    lists = ListOperands(entries_ptr, list_length, list_heads, bits_ptr, list_words, list_rows, row_block_ptr)
    TOKENS: gl.constexpr = work_ptr is not None
    LISTS: gl.constexpr = entries_ptr is not None
    WALK: gl.constexpr = way_to_walk(TOKENS, LISTS)
    gl.static_assert(TOKENS + LISTS + (ORDERED != 0) <= 1)
    work = find_work(
        buffers, rows_of_tile_ptr, order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr, tokens, lists, query_rows,
        padded_rows, key_rows, key_heads, GROUP, ORDERED,
    )  # fmt: skip
    if TOKENS and work.first_key < 0:
        return
    fence_async_shared()
    sums = Sums(dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, key_rows, key_heads)
    if ORDERED:
        gl.warp_specialize(
            [
                (consume_wide, (work, sums, tokens, lists, dropout, buffers, weights, dscores, dquery,
                                rows_of_key_ptr, key_positions_ptr, scale, bend, 0, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (consume_wide, (work, sums, tokens, lists, dropout, buffers, weights, dscores, dquery,
                                rows_of_key_ptr, key_positions_ptr, scale, bend, 1, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (produce, (inputs, work, buffers, GROUP, ORDERED)),
                (add_in_turn, (work.turns, work.rows, dquery_desc, dquery, buffers.queries, 0, GROUP, ORDERED)),
                (add_in_turn, (work.turns, work.rows, dquery_desc, dquery, buffers.queries, 1, GROUP, ORDERED)),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume_wide, (work, sums, tokens, lists, dropout, buffers, weights, dscores, dquery,
                                rows_of_key_ptr, key_positions_ptr, scale, bend, 0, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (consume_wide, (work, sums, tokens, lists, dropout, buffers, weights, dscores, dquery,
                                rows_of_key_ptr, key_positions_ptr, scale, bend, 1, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (produce, (inputs, work, buffers, GROUP, ORDERED, WALK)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def consume_wide(
    work, sums, tokens, lists, dropout, buffers, weights_buffers, dscores_buffers, dquery, rows_of_key_ptr,
    key_positions_ptr, scale, bend,
    PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr, DIMS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: half of the tile's keys, then half of the columns."""
    rows, turns = work.rows, work.turns
    queries, douts, key, value = buffers.queries, buffers.douts, buffers.key, buffers.value
    STAGES: gl.constexpr = queries.blocks.shape[0]
    M: gl.constexpr = queries.blocks.shape[1]
    N: gl.constexpr = key.shape[1]
    D: gl.constexpr = key.shape[2]
    dtype: gl.constexpr = key.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 2, 16])
    DQUERY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    TOKENS: gl.constexpr = tokens.work_ptr is not None
    WALK: gl.constexpr = way_to_walk(TOKENS, lists.entries is not None)
    BITS: gl.constexpr = lists.bits is not None
    DROPS: gl.constexpr = dropout.seed_ptr is not None

    key_index = work.first_key + PART * (N // 2) + gl.arange(0, N // 2, gl.SliceLayout(0, SCORES))
    dkey = gl.zeros([N, D // 2], gl.float32, SUMS)
    dvalue = gl.zeros([N, D // 2], gl.float32, SUMS)
    no_scores = gl.zeros([M, N // 2], gl.float32, SCORES)
    no_dquery = gl.zeros([HALF, HALF], gl.float32, DQUERY)
    scale_log2 = scale * 1.4426950408889634
    if bend is not None:
        scale_log2 = scale_log2 / bend
    gradient_scale, seed = scale, scale  # the latter stands for none
    if DROPS:
        gradient_scale, seed = scale / dropout.kept, seed_of(dropout)
    mbarrier.wait(buffers.loaded.index(0), 0)
    mbarrier.wait(buffers.loaded.index(1), 0)

    block, member = first_block_and_member(rows, ORDERED)
    entry = entry_of(rows, block, WALK)
    steps = rows.blocks * GROUP
    for step in range(steps):
        stage, parity = stage_and_parity(step, STAGES)
        row = row_of(rows, block, entry, M, WALK)
        full_begin, full_end, seeing_ptr = mask_of(rows, block, tokens, rows_of_key_ptr)
        head = rows.first_head + member
        query = queries.blocks.index(stage)
        dout = douts.blocks.index(0)
        keys_now = key.index(unseen_zero(row))
        values_now = value.index(unseen_zero(row))
        own_key = keys_now.slice(PART * (N // 2), N // 2, 0)
        own_value = values_now.slice(PART * (N // 2), N // 2, 0)
        mbarrier.wait(queries.full.index(stage), parity)
        scores_token = warpgroup_mma(query, own_key.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(douts.full.index(0), step & 1)
        dweights_token = warpgroup_mma(dout, own_value.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores_token])
        NONE: gl.constexpr = hidden_score(bend is not None)
        if (row < full_begin) | (row + M > full_end):
            index = (row + gl.arange(0, M, ROWS))[:, None]
            inside = key_index < sums.key_rows
            seeing = seeing_ptr + (key_index + unseen_zero(row)) * 4
            after_first = index >= gl.load(seeing, mask=inside, other=0)[None, :]
            before_last = index < gl.load(seeing + 3, mask=inside, other=0)[None, :]
            scores = gl.where(after_first & before_last, scores, NONE)
        if BITS and (entry & 1) != 0:
            index = row + gl.arange(0, M, ROWS)
            bits = bits_of_rows(lists, index, index < rows.query_rows, work.key_head)
            scores = hide_unlisted(scores, bits, work.first_key + PART * (N // 2), NONE)
        offset = queries.numbers.index(stage).load(ROWS)[:, None]
        if key_positions_ptr is not None:
            inside = key_index < sums.key_rows
            key_position = gl.load(key_positions_ptr + (key_index + unseen_zero(row)), mask=inside, other=0)
            distance = buffers.query_positions.index(stage).load(ROWS)[:, None] - key_position.to(gl.float32)[None, :]
            offset = offset + buffers.query_slopes.index(stage).load(ROWS)[:, None] * gl.abs(distance)
        if bend is None:
            weights = gl.exp2(scores * scale_log2 - offset)
            sloping = weights
        else:
            weights, sloping = bent_weights(scores, offset, bend, scale_log2)
        if DROPS:
            draw = draw_for(dropout, seed, head)
            inside = key_index < sums.key_rows
            position = gl.load(dropout.key_positions + (key_index + unseen_zero(row)), mask=inside, other=0)
            a, b, c, d = words_of_keys(draw, position)
            position = buffers.dropout_queries.index(stage).load(ROWS).to(gl.int32, bitcast=True)
            high, low = words_of_queries(draw, position)
            of_key = a[None, :], b[None, :], c[None, :], d[None, :]
            signed = drop(weights, dropout, draw, (high[:, None], low[:, None]), of_key, True)
            weights = gl.where(signed < 0.0, 0.0, signed)
            if bend is None:
                sloping = gl.abs(signed)
        # Two buffers of each, as in backward_kernel.
        all_weights = weights_buffers.index(step & 1)
        all_dscores = dscores_buffers.index(step & 1)
        all_weights.slice(PART * (N // 2), N // 2, 1).store(weights.to(dtype))
        minus_delta = douts.numbers.index(0).load(ROWS)[:, None]
        dweights = warpgroup_mma_wait(0, deps=[dweights_token])
        if DROPS:
            dweights = gl.where(signed < 0.0, 0.0, dweights)
        dweights = dweights + minus_delta
        all_dscores.slice(PART * (N // 2), N // 2, 1).store((sloping * dweights).to(dtype))
        fence_async_shared()
        meet("8")

        dvalue_token = warpgroup_mma(
            all_weights.permute((1, 0)), dout.slice(PART * (D // 2), D // 2, 1), dvalue, is_async=True
        )
        first_token = warpgroup_mma(
            all_dscores, keys_now.slice(PART * (D // 2), HALF, 1), no_dquery, use_acc=False, is_async=True
        )
        dkey_token = warpgroup_mma(
            all_dscores.permute((1, 0)), query.slice(PART * (D // 2), D // 2, 1), dkey, is_async=True
        )
        second_token = warpgroup_mma(
            all_dscores, keys_now.slice(PART * (D // 2) + HALF, HALF, 1), no_dquery, use_acc=False, is_async=True
        )
        if not ORDERED:
            add_earlier(sums.dquery_desc, dquery.index(PART), rows, step, block, member, M, D, PART, WALK)
        if WALK == LISTED:
            following, _ = next_block_and_member(rows, block, member, GROUP, ORDERED)
            entry = entry_of(rows, following, WALK)
        dvalue = warpgroup_mma_wait(3, deps=[dvalue_token])
        release(douts.empty.index(0))
        first = warpgroup_mma_wait(2, deps=[first_token]) * gradient_scale
        if ORDERED:
            hand_over(turns, dquery, first, step * 2, PART)
        else:
            store_wait(0)
            lay_down(dquery.index(PART), first)
            fence_async_shared()
            add_part(sums.dquery_desc, dquery.index(PART), row, head, D, PART, 0)
        dkey = warpgroup_mma_wait(1, deps=[dkey_token])
        release(queries.empty.index(stage))
        second = warpgroup_mma_wait(0, deps=[second_token]) * gradient_scale
        if ORDERED:
            hand_over(turns, dquery, second, step * 2 + 1, PART)
        else:
            store_wait(0)
            lay_down(dquery.index(PART), second)
        block, member = next_block_and_member(rows, block, member, GROUP, ORDERED)

    if not ORDERED:
        fence_async_shared()
    meet("8")  # both warpgroups have read all of the keys and values
    if not ORDERED:
        add_earlier(sums.dquery_desc, dquery.index(PART), rows, steps, block, member, M, D, PART, WALK)
    if DROPS:
        dvalue = dvalue / dropout.kept
    if TOKENS and work.slot >= 0:
        row, column, heads, head = work.slot * N, PART * (D // 2), sums.key_heads, work.key_head
        store_float(tokens.dvalue_slots_ptr, dvalue, row, row + N, heads, head, DIMS[1], column, SUMS)
        store_float(tokens.dkey_slots_ptr, dkey * gradient_scale, row, row + N, heads, head, DIMS[0], column, SUMS)
    else:
        store_halves(work, sums, dkey, dvalue, gradient_scale, key, value, PART, FLOAT_OUT, DIMS, SUMS)
    store_wait(0)  # shared memory must outlive the reading of it


@gluon.jit
def store_halves(
    work, sums, dkey, dvalue, scale, key, value,
    PART: gl.constexpr, FLOAT_OUT: gl.constexpr, DIMS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's half of the columns of both gradients."""
    first_key, head = work.first_key, work.key_head
    store_columns(
        sums, sums.dvalue_desc, sums.dvalue_ptr, dvalue, value.index(0), first_key, head, PART, DIMS[1], FLOAT_OUT, SUMS
    )
    store_columns(
        sums, sums.dkey_desc, sums.dkey_ptr, dkey * scale, key.index(0), first_key, head,
        PART, DIMS[0], FLOAT_OUT, SUMS,
    )  # fmt: skip


@gluon.jit
def store_columns(
    sums, desc, ptr, total, staging, first_row, key_head,
    PART: gl.constexpr, DIM: gl.constexpr, FLOAT_OUT: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write half of the columns of the key rows' gradient, in fp32 or through the rows' own place in 16 bits."""
    D: gl.constexpr = staging.shape[1]
    if FLOAT_OUT:
        store_float(ptr, total, first_row, sums.key_rows, sums.key_heads, key_head, DIM, PART * (D // 2), SUMS)
    else:
        half = staging.slice(PART * (D // 2), D // 2, 1)
        half.store(total.to(staging.dtype))
        fence_async_shared()
        store_part(desc, first_row, head_place(desc, key_head, DIM), PART * (D // 2), staging, half, PART)
