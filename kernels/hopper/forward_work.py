"""What all warps of the forward kernel share, and the producer warp, which loads what the others compute with.

Legend: M query rows of a tile, N key rows of a block, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.gpu.block_lists import ListOperands
from ringflash.kernels.hopper.blocks import FIRST, block_columns, block_rows, flat_layout, head_place, load_block
from ringflash.kernels.hopper.compat import async_load
from ringflash.kernels.hopper.dropout import Dropout
from ringflash.kernels.hopper.fp32_rows import prefetch_rows
from ringflash.kernels.hopper.listed_blocks import list_of_tile, row_of_entry
from ringflash.kernels.hopper.rings import Ring, allocate_ring
from ringflash.kernels.hopper.schedule import (
    Schedule,
    Span,
    Tickets,
    block_count,
    draw,
    key_span,
    stage_and_parity,
    tile_and_head,
)
from ringflash.kernels.hopper.score_changes import ScoreChanges
from ringflash.kernels.hopper.sink_tokens import SinkTokens, tile_pieces, token_key
from ringflash.kernels.hopper.softmax import ROWS

CARRY_AHEAD = gl.constexpr(8)
"""Blocks before the end of a tile that its part of the carry is asked for."""


class Problem(NamedTuple):
    """What all warps need to know of the launch; by `begun` a warpgroup tells the next that it has begun a tile."""

    start_ptr: gl.tensor
    stop_ptr: gl.tensor
    query_rows: gl.tensor
    schedule: Schedule
    tickets: Tickets
    begun: gl.shared_memory_descriptor
    changes: ScoreChanges
    tokens: SinkTokens
    lists: ListOperands
    dropout: Dropout


class Inputs(NamedTuple):
    """What is loaded, and from one head to the next how many columns; see `blocks`."""

    query_desc: gl.tensor
    key_desc: gl.tensor
    value_desc: gl.tensor
    query_rest_desc: gl.tensor
    key_rest_desc: gl.tensor
    value_rest_desc: gl.tensor
    query_head_stride: gl.tensor
    key_head_stride: gl.tensor
    value_head_stride: gl.tensor


class Result(NamedTuple):
    """Where the consumers' results go, and where the carry and learned sinks come from."""

    out_desc: gl.tensor
    out_rest_desc: gl.tensor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    carry_desc: gl.tensor
    carry_out_ptr: gl.tensor
    carry_lse_ptr: gl.tensor
    sinks_ptr: gl.tensor


class Memory(NamedTuple):
    """Where it is loaded to; and `staging`, through which a warpgroup's result leaves.

    query_rest, key_rest and value_rest: of the same stages, with the same barriers; see blocks. key_numbers: likewise;
    see score_changes. key_positions: of the stages and with the barriers of values; see dropout.
    """

    query: Ring
    key: Ring
    query_rest: gl.shared_memory_descriptor
    key_rest: gl.shared_memory_descriptor
    value_rest: gl.shared_memory_descriptor
    key_numbers: gl.shared_memory_descriptor
    value: Ring
    key_positions: gl.shared_memory_descriptor
    carry: Ring
    staging: gl.shared_memory_descriptor


@gluon.jit
def allocate_rest(ring, desc):
    """Room for the rest of the columns of all stages of a ring, if there is one."""
    rest = ring.blocks  # stands for none
    if desc is not None:
        rest = gl.allocate_shared_memory(
            desc.dtype, [ring.blocks.shape[0], block_rows(desc), block_columns(desc)], flat_layout(desc)
        )
    return rest


@gluon.jit
def allocate_list(ring, desc):
    """Room for a number for each row of all stages of a ring, if there is a descriptor of such."""
    numbers = ring.full  # stands for none
    if desc is not None:
        numbers = gl.allocate_shared_memory(gl.float32, [ring.blocks.shape[0], ring.blocks.shape[1]], desc.layout)
    return numbers


@gluon.jit
def allocate_staging(queries, result, CONSUMERS: gl.constexpr, HAS_CARRY: gl.constexpr, OWN_STAGING: gl.constexpr):
    """The ring of carries and the place of results.

    A result leaves through shared memory, and if that has room a carry comes through the same place. If not the result
    takes the query's place, and the next tile's query cannot be loaded under this tile's last steps.
    """
    carries = queries
    staging = queries.blocks
    if OWN_STAGING:
        if HAS_CARRY:
            carries = allocate_ring(result.carry_desc, CONSUMERS, 1)
            staging = carries.blocks
        else:
            out_desc = result.out_desc
            staging = gl.allocate_shared_memory(
                out_desc.dtype, [CONSUMERS, ROWS, block_columns(out_desc)], flat_layout(out_desc)
            )
    return carries, staging


@gluon.jit
def fill(ring, desc, row, place, stage, parity, MORE_BYTES: gl.constexpr = 0):
    """Load the rows from `row` on of the head at `place` into a stage as soon as its consumers have given it back.

    What the caller loads behind that with the same barrier is of MORE_BYTES.
    """
    mbarrier.wait(ring.empty.index(stage), parity ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes + MORE_BYTES)
    load_block(desc, row, place, ring.full.index(stage), ring.blocks.index(stage))


@gluon.jit
def fill_with_rest(ring, desc, rest, rest_desc, row, place, stage, parity, MORE_BYTES: gl.constexpr = 0):
    """As `fill`, and the rest of the columns if there is one."""
    if rest_desc is None:
        fill(ring, desc, row, place, stage, parity, MORE_BYTES)
    else:
        fill(ring, desc, row, place, stage, parity, MORE_BYTES + rest_desc.block_type.nbytes)
        load_block(rest_desc, row, place, ring.full.index(stage), rest.index(stage), FIRST)


@gluon.jit
def fill_with_numbers(ring, desc, rest, rest_desc, numbers, numbers_desc, row, place, stage, parity):
    """As `fill_with_rest`, and with it a number for each row if there are any."""
    NUMBERS: gl.constexpr = 0 if numbers_desc is None else numbers_desc.block_type.nbytes
    fill_with_rest(ring, desc, rest, rest_desc, row, place, stage, parity, NUMBERS)
    if numbers_desc is not None:
        async_load(numbers_desc, [row], ring.full.index(stage), numbers.index(stage))


@gluon.jit
def tile_span(problem, first_row, M: gl.constexpr):
    """Keys that a tile's rows see. Where numbers are loaded with them, blocks begin at whole 16 bytes of numbers."""
    span = key_span(problem.start_ptr, problem.stop_ptr, first_row, problem.query_rows, M)
    NUMBERS: gl.constexpr = problem.changes.key_numbers_desc is not None
    if NUMBERS or problem.dropout.key_positions is not None:
        span = Span(span.begin & -4, span.end, span.full_begin, span.full_end)
    return span


@gluon.jit
def produce(
    problem, inputs, result, memory, GROUP: gl.constexpr, HAS_CARRY: gl.constexpr, OWN_STAGING: gl.constexpr
):  # fmt: skip
    """The producer warp: queries of all warpgroups, then key and value blocks in turn, tile after tile.

    Of sink tokens first, if there are any. With lists, the blocks of the tile's list.
    """
    queries, keys, values, carries = memory.query, memory.key, memory.value, memory.carry
    CONSUMERS: gl.constexpr = queries.blocks.shape[0]
    STAGES: gl.constexpr = keys.blocks.shape[0]
    M: gl.constexpr = CONSUMERS * ROWS
    N: gl.constexpr = keys.blocks.shape[1]
    REST: gl.constexpr = 0 if inputs.value_rest_desc is None else memory.value_rest.shape[2]
    WIDTH: gl.constexpr = values.blocks.shape[2] + REST
    TOKENS: gl.constexpr = problem.tokens.pieces_ptr is not None
    LISTS: gl.constexpr = problem.lists.entries is not None
    step = 0
    tiles_done = 0
    ticket = gl.program_id(0)
    while ticket < problem.schedule.tiles * problem.schedule.heads:
        tile, head = tile_and_head(problem.schedule, ticket)
        first_row = tile * M
        span = tile_span(problem, first_row, M)
        key_place = head_place(inputs.key_desc, head // GROUP, inputs.key_head_stride)
        value_place = head_place(inputs.value_desc, head // GROUP, inputs.value_head_stride)
        query_place = head_place(inputs.query_desc, head, inputs.query_head_stride)
        for part in gl.static_range(CONSUMERS):
            fill_with_rest(
                queries, inputs.query_desc, memory.query_rest, inputs.query_rest_desc, first_row + part * ROWS,
                query_place, part, tiles_done & 1,
            )  # fmt: skip
        blocks = block_count(span, N)
        if TOKENS:
            pieces = tile_pieces(problem.tokens, tile, N)
            blocks += pieces.blocks
        if LISTS:
            listed = list_of_tile(problem.lists, tile, problem.schedule.tiles, head)
            blocks, entry = gl.load(listed), gl.load(listed + 1)
        for block in range(blocks):
            stage, parity = stage_and_parity(step, STAGES)
            row = span.begin + block * N
            if TOKENS:
                row = gl.where(block < pieces.blocks, token_key(pieces, block, N), row - pieces.blocks * N)
            if LISTS:
                row = row_of_entry(entry)
                entry = gl.load(listed + gl.minimum(block + 2, blocks))
            fill_with_numbers(
                keys, inputs.key_desc, memory.key_rest, inputs.key_rest_desc, memory.key_numbers,
                problem.changes.key_numbers_desc, row, key_place, stage, parity,
            )  # fmt: skip
            fill_with_numbers(
                values, inputs.value_desc, memory.value_rest, inputs.value_rest_desc, memory.key_positions,
                problem.dropout.key_positions, row, value_place, stage, parity,
            )  # fmt: skip
            step += 1
            # Late, as the second-level cache would not keep it for all of the tile; not before the first block is on
            # its way, for which the consumers wait.
            if HAS_CARRY and block == gl.maximum(blocks - CARRY_AHEAD, 0):
                prefetch_rows(
                    result.carry_out_ptr, result.carry_lse_ptr, first_row, head, problem.query_rows,
                    problem.schedule.heads, M, WIDTH,
                )  # fmt: skip
        # Behind all blocks: the consumers give the carry's place back in the midst of them, and a wait for that must
        # not keep a block from them.
        if HAS_CARRY and OWN_STAGING:
            carry_place = head_place(result.carry_desc, head, WIDTH)
            for part in gl.static_range(CONSUMERS):
                fill(carries, result.carry_desc, first_row + part * ROWS, carry_place, part, tiles_done & 1)
        ticket = draw(problem.tickets, tiles_done)
        tiles_done += 1
