"""What a program of the backward kernels works on: a key tile and the rows that see it, and how these are loaded.

Legend: M query rows of a block, N key rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.blocks import FIRST, block_columns, block_rows, flat_layout, head_place, load_block
from ringflash.kernels.hopper.compat import WARPGROUP, async_load
from ringflash.kernels.hopper.dquery_in_turn import BLOCK_BY_BLOCK, HEAD_BY_HEAD, Turns, allocate_turns
from ringflash.kernels.hopper.listed_blocks import list_of_tile
from ringflash.kernels.hopper.rings import allocate_barriers, allocate_full_and_empty
from ringflash.kernels.hopper.rows_visited import RANGE, Rows, entry_of, row_of
from ringflash.kernels.hopper.schedule import stage_and_parity


class Inputs(NamedTuple):
    """What is loaded, and from one head to the next how many columns; see `blocks`."""

    query_desc: gl.tensor
    dout_desc: gl.tensor
    key_desc: gl.tensor
    value_desc: gl.tensor
    lse_desc: gl.tensor
    delta_desc: gl.tensor
    query_positions_desc: gl.tensor
    query_slopes_desc: gl.tensor
    dropout_queries_desc: gl.tensor
    query_rest_desc: gl.tensor
    key_rest_desc: gl.tensor
    query_head_stride: gl.tensor
    dout_head_stride: gl.tensor
    key_head_stride: gl.tensor
    value_head_stride: gl.tensor


class Stream(NamedTuple):
    """Blocks of a query-side tensor and a number for each of their rows, in stages of shared memory with barriers."""

    blocks: gl.shared_memory_descriptor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Buffers(NamedTuple):
    """Where it is loaded to: streams of queries and of out's gradient, the tile's keys and values with two barriers.

    query_positions and query_slopes, with ALiBi, have the stages and barriers of the queries; so has dropout_queries,
    positions for dropout. query_rest and key_rest are of the queries and the keys, see blocks.
    """

    queries: Stream
    query_positions: gl.shared_memory_descriptor
    query_slopes: gl.shared_memory_descriptor
    dropout_queries: gl.shared_memory_descriptor
    query_rest: gl.shared_memory_descriptor
    key_rest: gl.shared_memory_descriptor
    douts: Stream
    key: gl.shared_memory_descriptor
    value: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor


class Work(NamedTuple):
    """A program's key tile, from the row first_key on, of a key head; and the query rows that it visits.

    slot: where its sums are left with sink tokens, if not negative; see backward_tokens.
    """

    first_key: gl.tensor
    key_head: gl.tensor
    rows: Rows
    turns: Turns
    slot: gl.tensor


class Sums(NamedTuple):
    """Where gradients go."""

    dquery_desc: gl.tensor
    dkey_desc: gl.tensor
    dvalue_desc: gl.tensor
    dkey_ptr: gl.tensor
    dvalue_ptr: gl.tensor
    key_rows: gl.tensor
    key_heads: gl.tensor


@gluon.jit
def allocate_buffers(inputs, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr):
    """Room for what is loaded."""
    queries = allocate_stream(inputs.query_desc, inputs.lse_desc, QUERY_STAGES)
    douts = allocate_stream(inputs.dout_desc, inputs.delta_desc, DOUT_STAGES)
    key_desc, value_desc = inputs.key_desc, inputs.value_desc
    N: gl.constexpr = block_rows(key_desc)
    key = gl.allocate_shared_memory(key_desc.dtype, [1, N, block_columns(key_desc)], flat_layout(key_desc))
    value = gl.allocate_shared_memory(value_desc.dtype, [1, N, block_columns(value_desc)], flat_layout(value_desc))
    loaded = allocate_barriers(2)
    positions, slopes = queries.numbers, queries.numbers  # stand for none
    if inputs.query_slopes_desc is not None:
        M: gl.constexpr = block_rows(inputs.query_desc)
        positions = gl.allocate_shared_memory(gl.float32, [QUERY_STAGES, M], inputs.query_positions_desc.layout)
        slopes = gl.allocate_shared_memory(gl.float32, [QUERY_STAGES, M], inputs.query_slopes_desc.layout)
    dropout_queries = queries.numbers  # stands for none
    if inputs.dropout_queries_desc is not None:
        layout: gl.constexpr = inputs.dropout_queries_desc.layout
        dropout_queries = gl.allocate_shared_memory(gl.float32, [QUERY_STAGES, block_rows(inputs.query_desc)], layout)
    query_rest, key_rest = queries.blocks, key  # stand for none
    if inputs.key_rest_desc is not None:
        query_rest_desc, key_rest_desc = inputs.query_rest_desc, inputs.key_rest_desc
        REST: gl.constexpr = block_columns(key_rest_desc)
        query_rest = gl.allocate_shared_memory(
            key.dtype, [QUERY_STAGES, block_rows(query_rest_desc), REST], flat_layout(query_rest_desc)
        )
        key_rest = gl.allocate_shared_memory(key.dtype, [1, N, REST], flat_layout(key_rest_desc))
    return Buffers(queries, positions, slopes, dropout_queries, query_rest, key_rest, douts, key, value, loaded)


@gluon.jit
def allocate_stream(desc, numbers_desc, STAGES: gl.constexpr):
    """Room for STAGES blocks of a descriptor, each given back by both warpgroups."""
    blocks = gl.allocate_shared_memory(desc.dtype, [STAGES, block_rows(desc), block_columns(desc)], flat_layout(desc))
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, block_rows(desc)], numbers_desc.layout)
    full, empty = allocate_full_and_empty(STAGES, 2 * WARPGROUP)
    return Stream(blocks, numbers, full, empty)


@gluon.jit
def find_work(
    buffers, rows_of_tile_ptr, order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr, tokens, lists, query_rows,
    padded_rows, key_rows, key_heads, GROUP: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """This program's work, by `backward_order`; where dQ is added in turn, tiles from the first, section by section.

    Then order_ptr is None; else turns and section_ptr are. With sink tokens by `backward_tokens`; first_key is negative
    where there is none. With lists the rows of the tile's list.
    """
    M: gl.constexpr = buffers.queries.blocks.shape[1]
    N: gl.constexpr = buffers.key.shape[1]
    # What stands for none must not be None, which triton 3.6 cannot return.
    turns = Turns(rows_of_tile_ptr, 0, buffers.loaded, buffers.loaded)
    slot = key_rows  # stands for none
    if ORDERED:
        section = gl.load(section_ptr)
        per_section = (key_rows + N - 1) // N * section
        within = gl.program_id(0) % per_section
        key_tile, key_head = within // section, gl.program_id(0) // per_section * section + within % section
        turns = allocate_turns(turn_now_ptr, gl.load(turn_of_tile_ptr + key_tile))
    else:
        place = gl.load(order_ptr + gl.program_id(0))
        key_tile, key_head = place // key_heads, place % key_heads
    first_head = key_head * GROUP
    if tokens.work_ptr is not None:
        entry = tokens.work_ptr + key_tile * 6  # a program's number so far
        key_tile, slot = gl.load(entry), gl.load(entry + 5)
        rows = rows_and_tokens(
            rows_of_tile_ptr, tokens, entry, key_tile, query_rows, padded_rows, key_rows, first_head, M, N
        )
    else:
        ALIGNED: gl.constexpr = M if ORDERED else 4
        rows = visiting_rows(rows_of_tile_ptr, key_tile, query_rows, padded_rows, key_rows, first_head, M, N, ALIGNED)
        if lists.entries is not None:
            entries = list_of_tile(lists, key_tile, (key_rows + N - 1) // N, key_head)
            rows = listed_rows(rows, entries)
    return Work(key_tile * N, key_head, rows, turns, slot)


@gluon.jit
def visiting_rows(
    rows_of_tile_ptr, key_tile, query_rows, padded_rows, key_rows, first_head,
    M: gl.constexpr, N: gl.constexpr, ALIGNED: gl.constexpr,
):  # fmt: skip
    """The query rows of a key tile, from its entry in `KeyIntervals.key_tile_rows`; one block at least.

    They begin at a multiple of ALIGNED: 4, as the tensor memory engine wants the first of a row's numbers aligned to
    16 bytes; or M, so that the blocks of all tiles are the same.
    """
    entry = rows_of_tile_ptr + key_tile * 4
    begin = gl.load(entry) // ALIGNED * ALIGNED
    blocks = gl.maximum((gl.load(entry + 3) - begin + M - 1) // M, 1)
    # Rows behind the last key are zeros, whose weights must not reach dQ as infinity times zero: mask the whole tile.
    full_end = gl.where((key_tile + 1) * N > key_rows, 0, gl.load(entry + 2))
    # Without sink tokens what is behind the first four stands for none.
    # What stands for none without lists must not be None, which triton 3.6 cannot return.
    return Rows(
        begin, blocks, gl.load(entry + 1), full_end, 0, 0, 0, 0, rows_of_tile_ptr, query_rows, padded_rows, first_head
    )


@gluon.jit
def listed_rows(rows, entries):
    """The same, but the blocks of a list."""
    return Rows(
        rows.begin, gl.load(entries), rows.full_begin, rows.full_end, 0, 0, 0, 0, entries, rows.query_rows,
        rows.padded_rows, rows.first_head,
    )  # fmt: skip


@gluon.jit
def rows_and_tokens(
    rows_of_tile_ptr, tokens, work, key_tile, query_rows, padded_rows, key_rows, first_head,
    M: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """As `visiting_rows`, of a program's work, see `backward_tokens.Programs`; key_tile may be negative."""
    begin, token_begin = gl.load(work + 1) // 4 * 4, gl.load(work + 3)
    own_blocks = gl.maximum((gl.load(work + 2) - begin + M - 1) // M, 0)
    blocks = own_blocks + gl.maximum((gl.load(work + 4) - token_begin + M - 1) // M, 0)
    # The one block of a program without rows is of the tile's own range, which no row sees: as sink tokens it is seen.
    own_blocks = gl.where(blocks == 0, 1, own_blocks)
    entry = gl.maximum(key_tile, 0) * 4 + 1
    ragged = (key_tile + 1) * N > key_rows
    return Rows(
        begin, gl.maximum(blocks, 1),
        gl.load(rows_of_tile_ptr + entry), gl.where(ragged, 0, gl.load(rows_of_tile_ptr + entry + 1)),
        own_blocks, token_begin,
        gl.load(tokens.rows_of_tile_ptr + entry), gl.where(ragged, 0, gl.load(tokens.rows_of_tile_ptr + entry + 1)),
        rows_of_tile_ptr, query_rows, padded_rows, first_head,
    )  # fmt: skip


@gluon.jit
def produce(
    inputs, work, buffers, GROUP: gl.constexpr, ORDERED: gl.constexpr, WALK: gl.constexpr = RANGE
):  # fmt: skip
    """The producer warp: the tile's keys and values, then the query-side blocks of each step."""
    queries, douts, loaded = buffers.queries, buffers.douts, buffers.loaded
    rows = work.rows
    M: gl.constexpr = queries.blocks.shape[1]
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    REST_BYTES: gl.constexpr = 0 if inputs.key_rest_desc is None else inputs.key_rest_desc.block_type.nbytes
    mbarrier.expect(loaded.index(0), inputs.key_desc.block_type.nbytes + REST_BYTES)
    place = head_place(inputs.key_desc, work.key_head, inputs.key_head_stride)
    load_block(inputs.key_desc, work.first_key, place, loaded.index(0), buffers.key.index(0))
    if inputs.key_rest_desc is not None:
        load_block(inputs.key_rest_desc, work.first_key, place, loaded.index(0), buffers.key_rest.index(0), FIRST)
    mbarrier.expect(loaded.index(1), inputs.value_desc.block_type.nbytes)
    place = head_place(inputs.value_desc, work.key_head, inputs.value_head_stride)
    load_block(inputs.value_desc, work.first_key, place, loaded.index(1), buffers.value.index(0))
    step = 0
    for outer in range(rows.blocks if ORDERED == BLOCK_BY_BLOCK else GROUP):
        for inner in range(GROUP if ORDERED == BLOCK_BY_BLOCK else rows.blocks):
            block, member = inner, outer
            if ORDERED == BLOCK_BY_BLOCK:
                block, member = rows.blocks - 1 - outer, inner
            elif ORDERED == HEAD_BY_HEAD:
                block = rows.blocks - 1 - inner
            head = rows.first_head + member
            row = row_of(rows, block, entry_of(rows, block, WALK), M, WALK)
            number = head * rows.padded_rows + row
            stage, parity = stage_and_parity(step, QUERY_STAGES)
            place = head_place(inputs.query_desc, head, inputs.query_head_stride)
            fill_queries(inputs, buffers, row, place, number, stage, parity)
            stage, parity = stage_and_parity(step, DOUT_STAGES)
            place = head_place(inputs.dout_desc, head, inputs.dout_head_stride)
            fill(douts, inputs.dout_desc, inputs.delta_desc, row, place, number, stage, parity)
            step += 1


@gluon.jit
def fill_queries(inputs, buffers, row, place, number, stage, parity):
    """As `fill`, and with ALiBi the rows' positions and slopes; and what else there is for them."""
    ALIBI: gl.constexpr = inputs.query_slopes_desc is not None
    REST: gl.constexpr = inputs.query_rest_desc is not None
    DROPS: gl.constexpr = inputs.dropout_queries_desc is not None
    NUMBERS: gl.constexpr = (2 * ALIBI + DROPS) * inputs.lse_desc.block_type.nbytes
    REST_BYTES: gl.constexpr = inputs.query_rest_desc.block_type.nbytes if REST else 0
    queries = buffers.queries
    fill(queries, inputs.query_desc, inputs.lse_desc, row, place, number, stage, parity, NUMBERS + REST_BYTES)
    full = queries.full.index(stage)
    if ALIBI:
        async_load(inputs.query_positions_desc, [number], full, buffers.query_positions.index(stage))
        async_load(inputs.query_slopes_desc, [number], full, buffers.query_slopes.index(stage))
    if DROPS:
        async_load(inputs.dropout_queries_desc, [row], full, buffers.dropout_queries.index(stage))
    if REST:
        load_block(inputs.query_rest_desc, row, place, full, buffers.query_rest.index(stage), FIRST)


@gluon.jit
def fill(stream, desc, numbers_desc, row, place, number, stage, parity, MORE_BYTES: gl.constexpr = 0):
    """Load a head's block from `row` on and its rows' numbers into a stage once both warpgroups have given it back.

    What the caller loads behind that with the same barrier is of MORE_BYTES.
    """
    mbarrier.wait(stream.empty.index(stage), parity ^ 1)
    mbarrier.expect(stream.full.index(stage), desc.block_type.nbytes + numbers_desc.block_type.nbytes + MORE_BYTES)
    load_block(desc, row, place, stream.full.index(stage), stream.blocks.index(stage))
    async_load(numbers_desc, [number], stream.full.index(stage), stream.numbers.index(stage))


@gluon.jit
def unseen_zero(row):
    """Zero, which the compiler does not know of a row number.

    It would otherwise compute the addresses of all pieces of the keys and values before the loop, and then keep them
    in memory for want of registers.
    """
    return row >> 31
