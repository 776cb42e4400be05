"""Forward kernel: one producer warp that loads, two or three warpgroups of 64 query rows each that compute.

In a step of the key loop a warpgroup has the scores of block j and the weights-times-values of block j-1 in flight on
the tensor cores, and does the softmax of block j under the latter (Shah et al., FlashAttention-3, arXiv 2407.08608).
Meanwhile the other warpgroups' products fill what gaps it leaves.

A carry, the merged result of earlier launches, is loaded under a tile's last blocks and merged behind its last product.
Then each warpgroup begins a tile when the one before it has its first scores, so that they do not end all at once, when
the tensor cores would stand still.

Legend: T query rows, S key rows, H query heads, Hk key heads, D head dimension, M query rows of a tile, N key rows of
a block.
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
from ringflash.kernels.hopper.compat import (
    WARPGROUP,
    release,
    store_wait,
)
from ringflash.kernels.hopper.dropout import Dropout, draw_for, seed_of, words_of_queries
from ringflash.kernels.hopper.forward_result import merge_halves, merge_sums, store_out, weighted_sum
from ringflash.kernels.hopper.forward_steps import (
    attend_block,
    attend_tokens,
    drop_block,
    pass_over,
    rescale_all,
    start_rest,
    start_scores,
)
from ringflash.kernels.hopper.forward_work import (
    Inputs,
    Memory,
    Problem,
    Result,
    allocate_list,
    allocate_rest,
    allocate_staging,
    produce,
    tile_span,
)
from ringflash.kernels.hopper.listed_blocks import bits_of_rows, hide_unlisted, list_of_tile, row_of_entry
from ringflash.kernels.hopper.rings import allocate_ring
from ringflash.kernels.hopper.schedule import (
    Schedule,
    allocate_tickets,
    block_count,
    key_span,
    own_blocks,
    read,
    stage_and_parity,
    tile_and_head,
)
from ringflash.kernels.hopper.score_changes import ScoreChanges, change_scores, rows_of_changes, softmax_of_changed
from ringflash.kernels.hopper.sink_tokens import SinkTokens, tile_pieces
from ringflash.kernels.hopper.softmax import LN_2, LOWEST, ROWS, hide, own_sums


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "tiles", "heads", "section", "query_head_stride", "key_head_stride", "value_head_stride",
        "slopes_row", "slopes_head", "threshold", "first_head",
        "list_length", "list_heads", "list_words", "list_rows",
    ]
)  # fmt: skip
def attend_kernel(
    query_desc, key_desc, value_desc, query_rest_desc, key_rest_desc, value_rest_desc, out_desc, out_rest_desc,
    out_ptr, lse_ptr, carry_desc, carry_out_ptr, carry_lse_ptr,
    start_ptr, stop_ptr, token_start_ptr, token_stop_ptr, token_pieces_ptr, counter_ptr, sinks_ptr,
    query_positions_ptr, slopes_ptr, key_numbers_desc, seed_ptr, dropout_queries_ptr, dropout_keys_desc,
    entries_ptr, bits_ptr, row_block_ptr,
    query_rows, tiles, heads, section, query_head_stride, key_head_stride, value_head_stride, scale_log2,
    bend, slopes_row, slopes_head, inverse_unit, threshold, kept, first_head,
    list_length, list_heads, list_words, list_rows,
    GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, HAS_CARRY: gl.constexpr,
    HIDES_KEYS: gl.constexpr, OWN_STAGING: gl.constexpr, DIRECT_OUT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `forward.PreparedForward` for the arguments."""
    inputs = Inputs(
        query_desc, key_desc, value_desc, query_rest_desc, key_rest_desc, value_rest_desc,
        query_head_stride, key_head_stride, value_head_stride,
    )  # fmt: skip
    result = Result(out_desc, out_rest_desc, out_ptr, lse_ptr, carry_desc, carry_out_ptr, carry_lse_ptr, sinks_ptr)
    queries = allocate_ring(query_desc, CONSUMERS, 1)
    keys = allocate_ring(key_desc, STAGES, CONSUMERS)
    values = allocate_ring(value_desc, STAGES, CONSUMERS)
    tickets = allocate_tickets(counter_ptr, CONSUMERS)
    carries, staging = allocate_staging(queries, result, CONSUMERS, HAS_CARRY, OWN_STAGING)
    changes = ScoreChanges(
        bend, query_positions_ptr, slopes_ptr, slopes_row, slopes_head, inverse_unit, key_numbers_desc
    )
    query_rest, key_rest = allocate_rest(queries, query_rest_desc), allocate_rest(keys, key_rest_desc)
    value_rest = allocate_rest(values, value_rest_desc)
    numbers, positions = allocate_list(keys, key_numbers_desc), allocate_list(values, dropout_keys_desc)
    memory = Memory(queries, keys, query_rest, key_rest, value_rest, numbers, values, positions, carries, staging)
    begun = gl.allocate_shared_memory(gl.int64, [CONSUMERS - 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS - 1):
        mbarrier.init(begun.index(i), count=WARPGROUP)
    fence_async_shared()
    tokens = SinkTokens(token_start_ptr, token_stop_ptr, token_pieces_ptr)
    lists = ListOperands(entries_ptr, list_length, list_heads, bits_ptr, list_words, list_rows, row_block_ptr)
    gl.static_assert(token_pieces_ptr is None or entries_ptr is None)
    dropout = Dropout(seed_ptr, threshold, kept, first_head, dropout_queries_ptr, dropout_keys_desc)
    schedule = Schedule(tiles, heads, section)
    problem = Problem(start_ptr, stop_ptr, query_rows, schedule, tickets, begun, changes, tokens, lists, dropout)
    gl.static_assert(CONSUMERS == 2 or CONSUMERS == 3)
    KEY_REST: gl.constexpr = key_rest_desc is not None
    VALUE_REST: gl.constexpr = value_rest_desc is not None
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (problem, result, memory, scale_log2, 0, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT,
                           KEY_REST, VALUE_REST)),
                (consume, (problem, result, memory, scale_log2, 1, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT,
                           KEY_REST, VALUE_REST)),
                (produce, (problem, inputs, result, memory, GROUP, HAS_CARRY, OWN_STAGING)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (problem, result, memory, scale_log2, 0, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT,
                           KEY_REST, VALUE_REST)),
                (consume, (problem, result, memory, scale_log2, 1, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT,
                           KEY_REST, VALUE_REST)),
                (consume, (problem, result, memory, scale_log2, 2, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT,
                           KEY_REST, VALUE_REST)),
                (produce, (problem, inputs, result, memory, GROUP, HAS_CARRY, OWN_STAGING)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def consume(
    problem, result, memory, scale_log2,
    PART: gl.constexpr, HAS_CARRY: gl.constexpr, HIDES_KEYS: gl.constexpr, OWN_STAGING: gl.constexpr,
    DIRECT_OUT: gl.constexpr, KEY_REST: gl.constexpr, VALUE_REST: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: rows PART * 64 to PART * 64 + 64 of each tile."""
    M: gl.constexpr = memory.query.blocks.shape[0] * ROWS
    N: gl.constexpr = memory.key.blocks.shape[1]
    TOKENS: gl.constexpr = problem.tokens.pieces_ptr is not None
    LISTS: gl.constexpr = problem.lists.entries is not None
    step = 0
    tiles_done = 0
    ticket = gl.program_id(0)
    while ticket < problem.schedule.tiles * problem.schedule.heads:
        tile, head = tile_and_head(problem.schedule, ticket)
        first_row = tile * M
        span = tile_span(problem, first_row, M)
        blocks = block_count(span, N)
        pieces = span  # stands for none
        if TOKENS:
            pieces = tile_pieces(problem.tokens, tile, N)
        listed = problem.start_ptr  # stands for none
        if LISTS:
            listed = list_of_tile(problem.lists, tile, problem.schedule.tiles, head)
            blocks = gl.load(listed)
        attend_tile(
            problem, result, memory, pieces, listed, span, blocks, first_row + PART * ROWS, head, step, tiles_done,
            scale_log2, PART, HAS_CARRY, HIDES_KEYS, OWN_STAGING, DIRECT_OUT, KEY_REST, VALUE_REST,
        )  # fmt: skip
        step += blocks
        if TOKENS:
            step += pieces.blocks
        ticket = read(problem.tickets, tiles_done)
        tiles_done += 1
    if not DIRECT_OUT:
        store_wait(0)  # shared memory must outlive the last store's reading of it


@gluon.jit
def attend_tile(
    problem, result, memory, pieces, listed, span, blocks, first_row, head, step, tiles_done, scale_log2,
    PART: gl.constexpr, HAS_CARRY: gl.constexpr, HIDES_KEYS: gl.constexpr, OWN_STAGING: gl.constexpr,
    DIRECT_OUT: gl.constexpr, KEY_REST: gl.constexpr, VALUE_REST: gl.constexpr,
):  # fmt: skip
    """One warpgroup's 64 rows over the tile's key blocks that they see, from the initial state to the stored result.

    With lists, these are the blocks of the one at `listed`.
    """
    queries, keys, values, carries = memory.query, memory.key, memory.value, memory.carry
    STAGES: gl.constexpr = keys.blocks.shape[0]
    N: gl.constexpr = keys.blocks.shape[1]
    D: gl.constexpr = values.blocks.shape[2]
    REST: gl.constexpr = memory.value_rest.shape[2]
    WIDTH: gl.constexpr = D + REST if VALUE_REST else D
    dtype: gl.constexpr = keys.blocks.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OUT_REST: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, REST, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    CARRY_LANDS: gl.constexpr = HAS_CARRY and OWN_STAGING
    TOKENS: gl.constexpr = problem.tokens.pieces_ptr is not None
    LISTS: gl.constexpr = problem.lists.entries is not None
    BITS: gl.constexpr = problem.lists.bits is not None
    DROPS: gl.constexpr = problem.dropout.seed_ptr is not None

    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    inside = rows < problem.query_rows
    row_start = gl.load(problem.start_ptr + rows, mask=inside, other=0)
    row_stop = gl.load(problem.stop_ptr + rows, mask=inside, other=0)
    no_scores = gl.zeros([ROWS, N], gl.float32, SCORES)
    changes = problem.changes
    position, slope = rows_of_changes(changes, rows, inside, head, no_scores)
    out = gl.zeros([ROWS, D], gl.float32, OUT)
    out_rest = step  # stands for none
    if VALUE_REST:
        out_rest = gl.zeros([ROWS, REST], gl.float32, OUT_REST)
    maximum = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = own_sums(no_scores)
    query = queries.blocks.index(PART)
    draw, words = step, step  # stand for none
    if DROPS:
        draw = draw_for(problem.dropout, seed_of(problem.dropout), head)
        words = words_of_queries(draw, gl.load(problem.dropout.query_positions + rows, mask=inside, other=0))
    if TOKENS:
        out, out_rest, maximum, total = attend_tokens(
            problem, memory, pieces, first_row, step, tiles_done, position, slope, draw, words, no_scores, out,
            out_rest, maximum, total, scale_log2, PART, HIDES_KEYS, KEY_REST, VALUE_REST,
        )  # fmt: skip
        step += pieces.blocks
    own = key_span(problem.start_ptr, problem.stop_ptr, first_row, problem.query_rows, ROWS)
    first, last = own_blocks(span, own, blocks, N)
    if LISTS:
        first, last = blocks * 0, blocks
    pass_over(keys, values, step, step + first, STAGES)

    # The first block has no earlier one to overlap with.
    first_key = span.begin + first * N
    entry, bits = first_key, rows  # stand for none
    if LISTS:
        bits = bits_of_rows(problem.lists, rows, inside, head)
        entry = gl.load(listed + 1)
        first_key = row_of_entry(entry)
    stage, parity = stage_and_parity(step + first, STAGES)
    mbarrier.wait(queries.full.index(PART), tiles_done & 1)
    mbarrier.wait(keys.full.index(stage), parity)
    # One barrier does, as no warpgroup is a tile ahead of another: the producer loads queries for all at once.
    if CARRY_LANDS and PART > 0:
        mbarrier.wait(problem.begun.index(PART - 1), tiles_done & 1)
    scores_token = start_scores(memory, query, stage, no_scores, PART, KEY_REST)
    scores = warpgroup_mma_wait(0, deps=[scores_token])
    scores = change_scores(scores, changes, memory.key_numbers.index(stage), position, slope, HIDES_KEYS)
    release(keys.empty.index(stage))
    if CARRY_LANDS and queries.blocks.shape[0] > PART + 1:
        release(problem.begun.index(PART))
    scores = hide(scores, own, row_start, row_stop, first_key, N, SCORES)
    if BITS and (entry & 1) != 0:
        scores = hide_unlisted(scores, bits, first_key, float("-inf"))
    weights, rescale, maximum, total = softmax_of_changed(scores, problem.changes, maximum, total, scale_log2)
    if DROPS:
        weights = drop_block(weights, problem, memory, draw, words, stage, parity)
    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
    mbarrier.wait(values.full.index(stage), parity)
    if TOKENS:
        out, out_rest = rescale_all(out, out_rest, rescale, VALUE_REST)
    if CARRY_LANDS and tiles_done > 0:
        # The earlier tile's result has left the carry's place.
        store_wait(0)
        release(carries.empty.index(PART))

    if LISTS:
        entry = gl.load(listed + gl.minimum(2, blocks))  # the last once more, where there is no next one
    for block in range(first + 1, last):
        earlier = stage
        stage, parity = stage_and_parity(step + block, STAGES)
        first_key = span.begin + block * N
        this_entry = entry
        if LISTS:
            first_key = row_of_entry(entry)
            entry = gl.load(listed + gl.minimum(block + 2, blocks))  # for the next step
        out, out_rest, weights, maximum, total = attend_block(
            problem, memory, query, own, row_start, row_stop, position, slope, draw, words, bits, this_entry, no_scores,
            first_key, stage, parity, earlier, weights, out, out_rest, maximum, total, scale_log2,
            PART, HIDES_KEYS, KEY_REST, VALUE_REST,
        )  # fmt: skip

    if OWN_STAGING or DIRECT_OUT:
        release(queries.empty.index(PART))
    out_token = warpgroup_mma(weights, values.blocks.index(stage), out, is_async=True)
    if VALUE_REST:
        rest_token = start_rest(weights, memory.value_rest.index(stage), out_rest)
    if HAS_CARRY:
        carried_lse = gl.load(result.carry_lse_ptr + head * problem.query_rows + rows, mask=inside, other=float("-inf"))
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, SCORES), assert_trivial=True)
    if HAS_CARRY:
        maximum, total, own_weight, carry_weight = merge_sums(maximum, total, carried_lse)
    if result.sinks_ptr is not None:
        sink = gl.load(result.sinks_ptr + head).to(gl.float32)
        sink = gl.full([ROWS], sink, gl.float32, gl.SliceLayout(1, SCORES))
        maximum, total, earlier_weight, _ = merge_sums(maximum, total, sink)
        if HAS_CARRY:
            own_weight, carry_weight = own_weight * earlier_weight, carry_weight * earlier_weight
    keyless = total == 0.0  # not so a row of nan, whose lse is to be nan: -inf would say that it has seen no key
    total_or_one = gl.where(keyless, 1.0, total)
    lse = gl.where(keyless, float("-inf"), (maximum + gl.log2(total_or_one)) * LN_2)
    gl.store(result.lse_ptr + head * problem.query_rows + rows, lse, mask=inside)
    factor = 1.0 / total_or_one
    if DROPS:
        if HAS_CARRY:
            own_weight = own_weight / problem.dropout.kept
        else:
            factor = factor / problem.dropout.kept
    if result.sinks_ptr is not None and not HAS_CARRY:
        factor = factor * earlier_weight
    if VALUE_REST:
        out, out_rest = warpgroup_mma_wait(0, deps=[out_token, rest_token])
    else:
        out = warpgroup_mma_wait(0, deps=[out_token])
    release(values.empty.index(stage))
    pass_over(keys, values, step + last, step + blocks, STAGES)
    if not HAS_CARRY:
        out = out * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        if VALUE_REST:
            out_rest = out_rest * gl.convert_layout(factor, gl.SliceLayout(1, OUT_REST))[:, None]
    elif CARRY_LANDS:
        mbarrier.wait(carries.full.index(PART), tiles_done & 1)
        carried = carries.blocks.index(PART).load(OUT)
        out = weighted_sum(out, own_weight * factor, carried, carry_weight * factor)
    else:
        weighs = (own_weight * factor, carry_weight * factor)
        out = merge_halves(problem, result, out, first_row, 0, head, weighs[0], weighs[1], WIDTH)
        if VALUE_REST:
            out_rest = merge_halves(problem, result, out_rest, first_row, D, head, weighs[0], weighs[1], WIDTH)
    if not DIRECT_OUT:
        store_wait(0)  # the earlier tile's store has read the buffer
    store_out(problem, result, result.out_desc, memory.staging.index(PART), out, first_row, 0, head, WIDTH, DIRECT_OUT)
    if VALUE_REST:
        place = memory.query_rest.index(PART)
        store_out(problem, result, result.out_rest_desc, place, out_rest, first_row, D, head, WIDTH, DIRECT_OUT)
    if not (OWN_STAGING or DIRECT_OUT):
        store_wait(0)
        release(queries.empty.index(PART))
