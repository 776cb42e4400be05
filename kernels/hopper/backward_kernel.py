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

from ringflash.kernels.gpu.block_lists import ListOperands
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_tokens import Tokens, mask_of
from ringflash.kernels.hopper.backward_work import Inputs, Sums, allocate_buffers, find_work, produce, unseen_zero
from ringflash.kernels.hopper.blocks import block_columns, block_rows, flat_layout, head_place, store_part
from ringflash.kernels.hopper.compat import meet, release, store_wait
from ringflash.kernels.hopper.dquery_accumulate import HALF, add_earlier, lay_down
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
def attend_backward_kernel(
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
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], query_desc.dtype)
    dscores = gl.allocate_shared_memory(query_desc.dtype, [2, N, M], DSCORES)
    dquery = gl.allocate_shared_memory(gl.float32, [2 if ORDERED else 4, HALF, HALF], flat_layout(dquery_desc))
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
                (consume, (work, sums, tokens, lists, dropout, buffers, dscores, dquery, rows_of_key_ptr,
                           key_positions_ptr, scale, bend, 0, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (consume, (work, sums, tokens, lists, dropout, buffers, dscores, dquery, rows_of_key_ptr,
                           key_positions_ptr, scale, bend, 1, GROUP, FLOAT_OUT, ORDERED, DIMS)),
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
                (consume, (work, sums, tokens, lists, dropout, buffers, dscores, dquery, rows_of_key_ptr,
                           key_positions_ptr, scale, bend, 0, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (consume, (work, sums, tokens, lists, dropout, buffers, dscores, dquery, rows_of_key_ptr,
                           key_positions_ptr, scale, bend, 1, GROUP, FLOAT_OUT, ORDERED, DIMS)),
                (produce, (inputs, work, buffers, GROUP, ORDERED, WALK)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def consume(
    work, sums, tokens, lists, dropout, buffers, dscores, dquery, rows_of_key_ptr, key_positions_ptr, scale, bend,
    PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr, DIMS: gl.constexpr,
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
    TOKENS: gl.constexpr = tokens.work_ptr is not None
    WALK: gl.constexpr = way_to_walk(TOKENS, lists.entries is not None)
    BITS: gl.constexpr = lists.bits is not None
    DROPS: gl.constexpr = dropout.seed_ptr is not None
    # The next step's numbers are loaded under this one's last products, where registers are left for them.
    EARLY: gl.constexpr = D == 128

    own_key = key.index(0).slice(PART * HALF, HALF, 0)
    own_value = value.index(0).slice(PART * HALF, HALF, 0)
    key_index = work.first_key + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    first_seeing, last_seeing = key_index, key_index  # stand for none
    if not TOKENS:
        first_seeing, last_seeing = rows_seeing(rows_of_key_ptr, key_index, sums.key_rows)
    bits = bits_of_rows(lists, key_index, key_index < sums.key_rows, work.key_head)
    dkey = gl.zeros([HALF, D], gl.float32, SUMS)
    dvalue = gl.zeros([HALF, D], gl.float32, SUMS)
    no_scores = gl.zeros([HALF, M], gl.float32, SCORES)
    no_dquery = gl.zeros([HALF, HALF], gl.float32, DQUERY)
    scale_log2 = scale * 1.4426950408889634
    if bend is not None:
        scale_log2 = scale_log2 / bend
    key_position = first_seeing  # stands for none
    if key_positions_ptr is not None:
        key_position = gl.load(key_positions_ptr + key_index, mask=key_index < sums.key_rows, other=0).to(gl.float32)
    gradient_scale, seed = scale, scale  # the latter stands for none
    if DROPS:
        gradient_scale, seed = scale / dropout.kept, seed_of(dropout)
        dropout_position = gl.load(dropout.key_positions + key_index, mask=key_index < sums.key_rows, other=0)

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
    entry = entry_of(rows, block, WALK)
    steps = rows.blocks * GROUP
    for step in range(steps):
        stage = stage_and_parity(step, QUERY_STAGES)[0]
        dout_stage, parity = stage_and_parity(step, DOUT_STAGES)
        dout = douts.blocks.index(dout_stage)
        row = row_of(rows, block, entry, M, WALK)
        full_begin, full_end, seeing_ptr = mask_of(rows, block, tokens, rows_of_key_ptr)
        own_key = key.index(unseen_zero(row)).slice(PART * HALF, HALF, 0)
        if not EARLY:
            mbarrier.wait(douts.full.index(dout_stage), parity)
            minus_delta = douts.numbers.index(dout_stage).load(COLUMNS)
        initial, _ = gl.broadcast(minus_delta[None, :], no_scores)
        dweights_token = warpgroup_mma(own_value, dout.permute((1, 0)), initial, is_async=True)
        if not EARLY:
            lse = queries.numbers.index(stage).load(COLUMNS)
        positions, slopes = buffers.query_positions.index(stage), buffers.query_slopes.index(stage)
        if (row < full_begin) | (row + M > full_end):
            seen_from, seen_to = first_seeing, last_seeing
            if TOKENS:
                seen_from, seen_to = rows_seeing(seeing_ptr, key_index, sums.key_rows)
            scores = hide(scores, row, seen_from, seen_to, bend is not None)
        if BITS and (entry & 1) != 0:
            scores = hide_unlisted(scores, bits, row, hidden_score(bend is not None))
        weights, sloping = weigh(
            scores, lse, scale_log2, bend, positions, slopes, key_position, key_positions_ptr is not None
        )
        if DROPS:
            draw = draw_for(dropout, seed, rows.first_head + member)
            position = buffers.dropout_queries.index(stage).load(COLUMNS).to(gl.int32, bitcast=True)
            signed = drop_pairs(weights, dropout, draw, position, dropout_position)
            weights = gl.where(signed < 0.0, 0.0, signed)
            if bend is None:
                sloping = gl.abs(signed)
        dvalue_token = warpgroup_mma(gl.convert_layout(weights.to(dtype), FACTOR), dout, dvalue, is_async=True)
        dweights = warpgroup_mma_wait(1, deps=[dweights_token])
        if DROPS:
            dweights = gl.where(signed < 0.0, douts.numbers.index(dout_stage).load(COLUMNS)[None, :], dweights)
        rounded = (sloping * dweights).to(dtype)
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
            add_earlier(sums.dquery_desc, staging, rows, step, block, member, M, D, PART, WALK)
        # The last step has no next one: its scores are of old numbers and unused.
        next_stage, parity = stage_and_parity(step + 1, QUERY_STAGES)
        mbarrier.wait(queries.full.index(next_stage), parity, pred=step + 1 < steps)
        scores_token = warpgroup_mma(
            own_key, queries.blocks.index(next_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        dkey_token = warpgroup_mma(dscores_factor, queries.blocks.index(stage), dkey, is_async=True)
        if WALK == LISTED:
            following, _ = next_block_and_member(rows, block, member, GROUP, ORDERED)
            entry = entry_of(rows, following, WALK)

        part_of_dquery = warpgroup_mma_wait(2, deps=[dquery_token]) * gradient_scale
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
        add_earlier(sums.dquery_desc, staging, rows, steps, block, member, M, D, PART, WALK)
    if DROPS:
        dvalue = dvalue / dropout.kept
    if TOKENS and work.slot >= 0:
        row = work.slot * (2 * HALF) + PART * HALF
        heads, head = sums.key_heads, work.key_head
        store_float(tokens.dvalue_slots_ptr, dvalue, row, row + HALF, heads, head, DIMS[1], 0, SUMS)
        store_float(tokens.dkey_slots_ptr, dkey * gradient_scale, row, row + HALF, heads, head, DIMS[0], 0, SUMS)
    else:
        store_sums(
            work, sums, dkey, dvalue, gradient_scale, key.index(0), value.index(0), own_key, own_value,
            PART, FLOAT_OUT, DIMS, SUMS,
        )  # fmt: skip
    store_wait(0)  # shared memory must outlive the reading of it


@gluon.jit
def store_sums(
    work, sums, dkey, dvalue, scale, key, value, own_key, own_value,
    PART: gl.constexpr, FLOAT_OUT: gl.constexpr, DIMS: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's 64 rows of both gradients."""
    first_row, head = work.first_key + PART * HALF, work.key_head
    store_sum(
        sums, sums.dvalue_desc, sums.dvalue_ptr, dvalue, value, own_value, first_row, head,
        PART, DIMS[1], FLOAT_OUT, SUMS,
    )  # fmt: skip
    store_sum(
        sums, sums.dkey_desc, sums.dkey_ptr, dkey * scale, key, own_key, first_row, head,
        PART, DIMS[0], FLOAT_OUT, SUMS,
    )  # fmt: skip


@gluon.jit
def drop_pairs(weights, dropout, draw, query_position, key_position):
    """Weights, with keys as rows, negative where dropout drops them: what scores' gradients take of them remains."""
    high, low = words_of_queries(draw, query_position)
    a, b, c, d = words_of_keys(draw, key_position)
    of_key = a[:, None], b[:, None], c[:, None], d[:, None]
    return drop(weights, dropout, draw, (high[None, :], low[None, :]), of_key, True)


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
def rows_seeing(seeing_ptr, key_index, key_rows):
    """First of the rows that see keys, and one behind the last; from `KeyIntervals.key_tile_rows` of single keys."""
    seeing = seeing_ptr + key_index * 4
    first = gl.load(seeing, mask=key_index < key_rows, other=0)
    return first, gl.load(seeing + 3, mask=key_index < key_rows, other=0)


@gluon.jit
def hide(scores, row, first_seeing, last_seeing, BENT: gl.constexpr):
    """No score where a query row from `row` on does not see a key, which rows first_seeing to last_seeing do."""
    index = (row + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout)))[None, :]
    seen = (index >= first_seeing[:, None]) & (index < last_seeing[:, None])
    return gl.where(seen, scores, hidden_score(BENT))


@gluon.jit
def weigh(scores, lse, scale_log2, bend, positions, slopes, key_position, ALIBI: gl.constexpr):
    """Weights of a block's query rows, and what the gradients of scores take.

    The latter are weights, times the slope of the softcap at each score. lse has factor log2 e, as slopes have.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    offset = lse[None, :]
    if ALIBI:
        distance = gl.abs(positions.load(COLUMNS)[None, :] - key_position[:, None])
        offset = offset + slopes.load(COLUMNS)[None, :] * distance
    if bend is None:
        weights = gl.exp2(scores * scale_log2 - offset)
        sloping = weights
    else:
        weights, sloping = bent_weights(scores, offset, bend, scale_log2)
    return weights, sloping


@gluon.jit
def store_sum(
    sums, desc, ptr, total, whole, own, first_row, key_head,
    PART: gl.constexpr, DIM: gl.constexpr, FLOAT_OUT: gl.constexpr, SUMS: gl.constexpr, COLUMN: gl.constexpr = 0,
):  # fmt: skip
    """Write columns from COLUMN on of 64 key rows' gradient.

    In fp32 straight from registers, in 16 bits through the rows' own place in `whole`, by the columns of desc's blocks.
    """
    D: gl.constexpr = own.shape[1]
    if FLOAT_OUT:
        store_float(ptr, total, first_row, sums.key_rows, sums.key_heads, key_head, DIM, COLUMN, SUMS)
    else:
        BLOCK: gl.constexpr = block_columns(desc)
        PARTS: gl.constexpr = whole.shape[0] // HALF
        own.store(total.to(own.dtype))
        fence_async_shared()
        place = head_place(desc, key_head, DIM)
        if BLOCK == D:
            store_part(desc, first_row, place, COLUMN, whole, own, PART)
        else:
            for i in gl.static_range(D // BLOCK):
                columns = own.slice(i * BLOCK, BLOCK, 1)
                store_part(desc, first_row, place, COLUMN + i * BLOCK, whole, columns, i * PARTS + PART)


@gluon.jit
def store_float(
    ptr, total, first_row, rows, heads, head, DIM: gl.constexpr, COLUMN: gl.constexpr, SUMS: gl.constexpr
):  # fmt: skip
    """Write a sum to the rows from first_row on, columns from COLUMN on, of a contiguous (rows, heads, DIM) tensor."""
    row = gl.arange(0, total.shape[0], gl.SliceLayout(1, SUMS))[:, None]
    column = COLUMN + gl.arange(0, total.shape[1], gl.SliceLayout(0, SUMS))[None, :]
    base = ptr + (first_row.to(gl.int64) * heads + head) * DIM
    inside = (first_row + row < rows) & (column < DIM)
    gl.store(base + row * (heads * DIM) + column, total, mask=inside)
