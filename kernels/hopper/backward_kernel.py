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

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.hopper.compat import (
    WARPGROUP,
    async_load,
    async_store,
    meet,
    release,
    store_wait,
)
from ringflash.kernels.hopper.dquery import HALF, add_earlier, lay_down
from ringflash.kernels.hopper.schedule import stage_and_parity
from ringflash.kernels.hopper.turns import (
    Turns,
    add_in_turn,
    allocate_turns,
    first_place,
    hand_over,
    next_place,
)


class Stream(NamedTuple):
    """Blocks of a query-side tensor and a number for each of their rows, in stages of shared memory with barriers."""

    blocks: gl.shared_memory_descriptor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Rows(NamedTuple):
    """The query rows that a key tile visits, in `blocks` blocks from row `begin` on, for each head of a group.

    Blocks within full_begin to full_end need no mask.
    """

    begin: gl.tensor
    blocks: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    query_rows: gl.tensor
    padded_rows: gl.tensor
    first_head: gl.tensor


class Sums(NamedTuple):
    """Where gradients go."""

    dquery_desc: gl.tensor
    dkey_desc: gl.tensor
    dvalue_desc: gl.tensor
    dkey_ptr: gl.tensor
    dvalue_ptr: gl.tensor
    key_rows: gl.tensor
    key_heads: gl.tensor


@gluon.jit(
    do_not_specialize=[
        "query_rows", "padded_rows", "key_rows", "key_heads", "section",
        "query_head_stride", "dout_head_stride", "key_head_stride", "value_head_stride",
    ]
)  # fmt: skip
def attend_backward_kernel(
    query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc,
    dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    tile_order_ptr, turn_of_tile_ptr, turn_now_ptr, query_rows, padded_rows, key_rows, key_heads, section,
    query_head_stride, dout_head_stride, key_head_stride, value_head_stride, scale,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `launch_backward` for the arguments."""
    M: gl.constexpr = query_desc.block_type.shape[0]
    N: gl.constexpr = key_desc.block_type.shape[0]
    dtype: gl.constexpr = query_desc.dtype
    queries = allocate_stream(query_desc, lse_desc, QUERY_STAGES)
    douts = allocate_stream(dout_desc, delta_desc, DOUT_STAGES)
    key = gl.allocate_shared_memory(dtype, [1, N, key_desc.block_type.shape[1]], key_desc.layout)
    value = gl.allocate_shared_memory(dtype, [1, N, value_desc.block_type.shape[1]], value_desc.layout)
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], dtype)
    dscores = gl.allocate_shared_memory(dtype, [2, N, M], DSCORES)
    dquery = gl.allocate_shared_memory(gl.float32, [2 if ORDERED else 4, HALF, HALF], dquery_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(loaded.index(i), count=1)
    if ORDERED:
        section = gl.load(section)
    key_tile, key_head = key_tile_and_head(key_rows, key_heads, section, tile_order_ptr, N, ORDERED)
    turns = Turns(turn_now_ptr, turn_of_tile_ptr, loaded, loaded)  # stands for none
    if ORDERED:
        turns = allocate_turns(turn_now_ptr, gl.load(turn_of_tile_ptr + key_tile))
    fence_async_shared()

    first_key = key_tile * N
    ALIGNED: gl.constexpr = M if ORDERED else 4
    rows = visiting_rows(rows_of_tile_ptr, key_tile, query_rows, padded_rows, key_rows, key_head * GROUP, M, N, ALIGNED)
    sums = Sums(dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, key_rows, key_heads)
    if ORDERED:
        gl.warp_specialize(
            [
                (consume, (rows, sums, queries, douts, key, value, dscores, dquery, turns, loaded, rows_of_key_ptr,
                           first_key, key_head, scale, 0, GROUP, FLOAT_OUT, ORDERED)),
                (consume, (rows, sums, queries, douts, key, value, dscores, dquery, turns, loaded, rows_of_key_ptr,
                           first_key, key_head, scale, 1, GROUP, FLOAT_OUT, ORDERED)),
                (produce, (rows, query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, queries, douts,
                           key, value, loaded, first_key, key_head * key_head_stride, key_head * value_head_stride,
                           query_head_stride, dout_head_stride, GROUP, ORDERED)),
                (add_in_turn, (turns, rows, dquery_desc, dquery, queries, 0, GROUP)),
                (add_in_turn, (turns, rows, dquery_desc, dquery, queries, 1, GROUP)),
            ],
            [4, 1, 1, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (rows, sums, queries, douts, key, value, dscores, dquery, turns, loaded, rows_of_key_ptr,
                           first_key, key_head, scale, 0, GROUP, FLOAT_OUT, ORDERED)),
                (consume, (rows, sums, queries, douts, key, value, dscores, dquery, turns, loaded, rows_of_key_ptr,
                           first_key, key_head, scale, 1, GROUP, FLOAT_OUT, ORDERED)),
                (produce, (rows, query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, queries, douts,
                           key, value, loaded, first_key, key_head * key_head_stride, key_head * value_head_stride,
                           query_head_stride, dout_head_stride, GROUP, ORDERED)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def key_tile_and_head(key_rows, key_heads, section, order_ptr, N: gl.constexpr, ORDERED: gl.constexpr):
    """This program's key tile and head, in the mirrored order of schedule.py: tiles from the first, section by section.

    The last section's tiles go from the one that most rows see to the one that fewest see, over all documents, so that
    no multiprocessor begins with a long one when most are done. Turns need them as they come.
    """
    tiles = (key_rows + N - 1) // N
    per_section = tiles * section
    within = gl.program_id(0) % per_section
    tile = within // section
    if not ORDERED:
        last = gl.program_id(0) + per_section >= gl.num_programs(0)
        tile = gl.load(order_ptr + tile, mask=last, other=tile)
    return tile, gl.program_id(0) // per_section * section + within % section


@gluon.jit
def visiting_rows(
    table_ptr, key_tile, query_rows, padded_rows, key_rows, first_head,
    M: gl.constexpr, N: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """The query rows of a key tile, from its entry in `KeyIntervals.key_tile_rows`; one block at least.

    They begin at a multiple of ALIGNED: 4, as the tensor memory engine wants the first of a row's numbers aligned to
    16 bytes; or M, so that the blocks of all tiles are the same.
    """
    entry = table_ptr + key_tile * 4
    begin = gl.load(entry) // ALIGNED * ALIGNED
    blocks = gl.maximum((gl.load(entry + 3) - begin + M - 1) // M, 1)
    # Rows behind the last key are zeros, whose weights must not reach dQ as infinity times zero: mask the whole tile.
    full_end = gl.where((key_tile + 1) * N > key_rows, 0, gl.load(entry + 2))
    return Rows(begin, blocks, gl.load(entry + 1), full_end, query_rows, padded_rows, first_head)


@gluon.jit
def ring_place(step, STAGES: gl.constexpr):
    """Stage and parity of a ring of 2^n or of 3 stages at a step."""
    if STAGES == 3:
        turn = step // 3
        stage, parity = step - turn * 3, turn & 1
    else:
        stage, parity = stage_and_parity(step, STAGES)
    return stage, parity


@gluon.jit
def next_stage(stage, parity, STAGES: gl.constexpr):
    """Stage and parity of the step after."""
    last = stage + 1 == STAGES
    return gl.where(last, 0, stage + 1), gl.where(last, parity ^ 1, parity)


@gluon.jit
def allocate_stream(desc, numbers_desc, STAGES: gl.constexpr):
    """Room for STAGES blocks of a descriptor, each given back by both warpgroups."""
    blocks = gl.allocate_shared_memory(
        desc.dtype, [STAGES, desc.block_type.shape[0], desc.block_type.shape[1]], desc.layout
    )
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, desc.block_type.shape[0]], numbers_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2 * WARPGROUP)
    return Stream(blocks, numbers, full, empty)


@gluon.jit
def fill(stream, desc, numbers_desc, row, column, number, stage, parity):
    """Load the block at (row, column) and its rows' numbers into a stage once both warpgroups have given it back."""
    mbarrier.wait(stream.empty.index(stage), parity ^ 1)
    mbarrier.expect(stream.full.index(stage), desc.block_type.nbytes + numbers_desc.block_type.nbytes)
    async_load(desc, [row, column], stream.full.index(stage), stream.blocks.index(stage))
    async_load(numbers_desc, [number], stream.full.index(stage), stream.numbers.index(stage))


@gluon.jit
def produce(
    rows, query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, queries, douts, key, value, loaded,
    first_key, key_column, value_column, query_head_stride, dout_head_stride,
    GROUP: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """The producer warp: the tile's keys and values, then the query-side blocks of each step."""
    M: gl.constexpr = query_desc.block_type.shape[0]
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    mbarrier.expect(loaded.index(0), key_desc.block_type.nbytes)
    async_load(key_desc, [first_key, key_column], loaded.index(0), key.index(0))
    mbarrier.expect(loaded.index(1), value_desc.block_type.nbytes)
    async_load(value_desc, [first_key, value_column], loaded.index(1), value.index(0))
    step = 0
    for outer in range(rows.blocks if ORDERED else GROUP):
        for inner in range(GROUP if ORDERED else rows.blocks):
            block, member = inner, outer
            if ORDERED:
                block, member = rows.blocks - 1 - outer, inner
            head = rows.first_head + member
            row = rows.begin + block * M
            number = head * rows.padded_rows + row
            stage, parity = ring_place(step, QUERY_STAGES)
            fill(queries, query_desc, lse_desc, row, head * query_head_stride, number, stage, parity)
            stage, parity = ring_place(step, DOUT_STAGES)
            fill(douts, dout_desc, delta_desc, row, head * dout_head_stride, number, stage, parity)
            step += 1


@gluon.jit
def consume(
    rows, sums, queries, douts, key, value, dscores, dquery, turns, loaded, rows_of_key_ptr,
    first_key, key_head, scale, PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: key rows PART * 64 to PART * 64 + 64 of the tile."""
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
    key_index = first_key + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    seeing = rows_of_key_ptr + key_index * 4
    first_seeing = gl.load(seeing, mask=key_index < sums.key_rows, other=0)
    last_seeing = gl.load(seeing + 3, mask=key_index < sums.key_rows, other=0)
    dkey = gl.zeros([HALF, D], gl.float32, SUMS)
    dvalue = gl.zeros([HALF, D], gl.float32, SUMS)
    no_scores = gl.zeros([HALF, M], gl.float32, SCORES)
    no_dquery = gl.zeros([HALF, HALF], gl.float32, DQUERY)
    scale_log2 = scale * 1.4426950408889634

    mbarrier.wait(loaded.index(0), 0)
    mbarrier.wait(loaded.index(1), 0)
    mbarrier.wait(queries.full.index(0), 0)
    token = warpgroup_mma(own_key, queries.blocks.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[token])
    if EARLY:
        lse = queries.numbers.index(0).load(COLUMNS)
        mbarrier.wait(douts.full.index(0), 0)
        minus_delta = douts.numbers.index(0).load(COLUMNS)

    block, member = first_place(rows, ORDERED)
    steps = rows.blocks * GROUP
    for step in range(steps):
        stage = ring_place(step, QUERY_STAGES)[0]
        dout_stage, parity = ring_place(step, DOUT_STAGES)
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
        next_stage, parity = ring_place(step + 1, QUERY_STAGES)
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
            next_dout, parity = ring_place(step + 1, DOUT_STAGES)
            mbarrier.wait(douts.full.index(next_dout), parity, pred=step + 1 < steps)
            minus_delta = douts.numbers.index(next_dout).load(COLUMNS)
        scores, dkey = warpgroup_mma_wait(0, deps=[scores_token, dkey_token])
        release(queries.empty.index(stage))
        block, member = next_place(rows, block, member, GROUP, ORDERED)

    if not ORDERED:
        fence_async_shared()
    # Both warpgroups have read all of the keys: theirs were last read for dQ, before the last wait of each.
    meet("8")
    if not ORDERED:
        staging = dquery.index(PART * 2 + (steps & 1 ^ 1))
        add_earlier(sums.dquery_desc, staging, rows, steps, block, member, M, D, PART)
    first_row = first_key + PART * HALF
    store_sum(sums, sums.dvalue_desc, sums.dvalue_ptr, dvalue, own_value, first_row, key_head, FLOAT_OUT, SUMS)
    store_sum(sums, sums.dkey_desc, sums.dkey_ptr, dkey * scale, own_key, first_row, key_head, FLOAT_OUT, SUMS)
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
def unseen_zero(row):
    """Zero, which the compiler does not know of a row number.

    It would otherwise compute the addresses of all pieces of the keys and values before the loop, and then keep them
    in memory for want of registers.
    """
    return row >> 31


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
