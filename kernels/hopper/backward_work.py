"""What a program of the backward kernels works on: a key tile and the rows that see it, and how these are loaded.

Legend: M query rows of a block, N key rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.compat import WARPGROUP, async_load
from ringflash.kernels.hopper.dquery_in_turn import Turns, allocate_turns
from ringflash.kernels.hopper.schedule import stage_and_parity


class Inputs(NamedTuple):
    """What is loaded, and from one head to the next how many columns; see `operands.descriptor`."""

    query_desc: gl.tensor
    dout_desc: gl.tensor
    key_desc: gl.tensor
    value_desc: gl.tensor
    lse_desc: gl.tensor
    delta_desc: gl.tensor
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
    """Where it is loaded to: streams of queries and of out's gradient, the tile's keys and values with two barriers."""

    queries: Stream
    douts: Stream
    key: gl.shared_memory_descriptor
    value: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor


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


class Work(NamedTuple):
    """A program's key tile, from the row first_key on, of a key head; and the query rows that it visits."""

    first_key: gl.tensor
    key_head: gl.tensor
    rows: Rows
    turns: Turns


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
    N: gl.constexpr = key_desc.block_type.shape[0]
    D: gl.constexpr = key_desc.block_type.shape[1]
    key = gl.allocate_shared_memory(key_desc.dtype, [1, N, D], key_desc.layout)
    value = gl.allocate_shared_memory(value_desc.dtype, [1, N, D], value_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(loaded.index(i), count=1)
    return Buffers(queries, douts, key, value, loaded)


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
def find_work(
    buffers, rows_of_tile_ptr, order_ptr, turn_of_tile_ptr, turn_now_ptr, section_ptr, query_rows, padded_rows,
    key_rows, key_heads, GROUP: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """This program's work, by `backward_order`; where dQ is added in turn, tiles from the first, section by section.

    Then order_ptr is None; else turns and section_ptr are.
    """
    M: gl.constexpr = buffers.queries.blocks.shape[1]
    N: gl.constexpr = buffers.key.shape[1]
    # What stands for none must not be None, which triton 3.6 cannot return.
    turns = Turns(rows_of_tile_ptr, 0, buffers.loaded, buffers.loaded)
    if ORDERED:
        section = gl.load(section_ptr)
        per_section = (key_rows + N - 1) // N * section
        within = gl.program_id(0) % per_section
        key_tile, key_head = within // section, gl.program_id(0) // per_section * section + within % section
        turns = allocate_turns(turn_now_ptr, gl.load(turn_of_tile_ptr + key_tile))
    else:
        place = gl.load(order_ptr + gl.program_id(0))
        key_tile, key_head = place // key_heads, place % key_heads
    ALIGNED: gl.constexpr = M if ORDERED else 4
    rows = visiting_rows(rows_of_tile_ptr, key_tile, query_rows, padded_rows, key_rows, key_head * GROUP, M, N, ALIGNED)
    return Work(key_tile * N, key_head, rows, turns)


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
    return Rows(begin, blocks, gl.load(entry + 1), full_end, query_rows, padded_rows, first_head)


@gluon.jit
def produce(inputs, work, buffers, GROUP: gl.constexpr, ORDERED: gl.constexpr):
    """The producer warp: the tile's keys and values, then the query-side blocks of each step."""
    queries, douts, loaded = buffers.queries, buffers.douts, buffers.loaded
    rows = work.rows
    M: gl.constexpr = queries.blocks.shape[1]
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    mbarrier.expect(loaded.index(0), inputs.key_desc.block_type.nbytes)
    key_column = work.key_head * inputs.key_head_stride
    async_load(inputs.key_desc, [work.first_key, key_column], loaded.index(0), buffers.key.index(0))
    mbarrier.expect(loaded.index(1), inputs.value_desc.block_type.nbytes)
    value_column = work.key_head * inputs.value_head_stride
    async_load(inputs.value_desc, [work.first_key, value_column], loaded.index(1), buffers.value.index(0))
    step = 0
    for outer in range(rows.blocks if ORDERED else GROUP):
        for inner in range(GROUP if ORDERED else rows.blocks):
            block, member = inner, outer
            if ORDERED:
                block, member = rows.blocks - 1 - outer, inner
            head = rows.first_head + member
            row = rows.begin + block * M
            number = head * rows.padded_rows + row
            stage, parity = stage_and_parity(step, QUERY_STAGES)
            column = head * inputs.query_head_stride
            fill(queries, inputs.query_desc, inputs.lse_desc, row, column, number, stage, parity)
            stage, parity = stage_and_parity(step, DOUT_STAGES)
            column = head * inputs.dout_head_stride
            fill(douts, inputs.dout_desc, inputs.delta_desc, row, column, number, stage, parity)
            step += 1


@gluon.jit
def fill(stream, desc, numbers_desc, row, column, number, stage, parity):
    """Load the block at (row, column) and its rows' numbers into a stage once both warpgroups have given it back."""
    mbarrier.wait(stream.empty.index(stage), parity ^ 1)
    mbarrier.expect(stream.full.index(stage), desc.block_type.nbytes + numbers_desc.block_type.nbytes)
    async_load(desc, [row, column], stream.full.index(stage), stream.blocks.index(stage))
    async_load(numbers_desc, [number], stream.full.index(stage), stream.numbers.index(stage))


@gluon.jit
def unseen_zero(row):
    """Zero, which the compiler does not know of a row number.

    It would otherwise compute the addresses of all pieces of the keys and values before the loop, and then keep them
    in memory for want of registers.
    """
    return row >> 31
