"""What all warps of the forward kernel share, and the producer warp, which loads what the others compute with.

Legend: M query rows of a tile, N key rows of a block, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.compat import WARPGROUP, async_load
from ringflash.kernels.hopper.fp32_rows import prefetch_rows
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


class Inputs(NamedTuple):
    """What is loaded, and from one head to the next how many columns; see `operands.descriptor`."""

    query_desc: gl.tensor
    key_desc: gl.tensor
    value_desc: gl.tensor
    query_head_stride: gl.tensor
    key_head_stride: gl.tensor
    value_head_stride: gl.tensor


class Result(NamedTuple):
    """Where the consumers' results go, and where the carry and learned sinks come from."""

    out_desc: gl.tensor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor
    carry_desc: gl.tensor
    carry_out_ptr: gl.tensor
    carry_lse_ptr: gl.tensor
    sinks_ptr: gl.tensor


class Ring(NamedTuple):
    """Stages of shared memory that the producer fills and the consumers give back, with their barriers."""

    blocks: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Memory(NamedTuple):
    """Where it is loaded to; and `staging`, through which a warpgroup's result leaves.

    key_numbers: of each stage of keys, whose barriers are theirs as well; see score_changes.
    """

    query: Ring
    key: Ring
    key_numbers: gl.shared_memory_descriptor
    value: Ring
    carry: Ring
    staging: gl.shared_memory_descriptor


@gluon.jit
def allocate_ring(desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """Room for STAGES tiles of a descriptor, each given back by so many warpgroups."""
    blocks = gl.allocate_shared_memory(
        desc.dtype, [STAGES, desc.block_type.shape[0], desc.block_type.shape[1]], desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS * WARPGROUP)
    return Ring(blocks, full, empty)


@gluon.jit
def allocate_key_numbers(keys, changes):
    """Room for the numbers of all stages of keys."""
    numbers = keys.full  # stands for none
    if changes.key_numbers_desc is not None:
        numbers = gl.allocate_shared_memory(
            gl.float32, [keys.blocks.shape[0], keys.blocks.shape[1]], changes.key_numbers_desc.layout
        )
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
                out_desc.dtype, [CONSUMERS, ROWS, out_desc.block_type.shape[1]], out_desc.layout
            )
    return carries, staging


@gluon.jit
def fill(ring, desc, row, column, stage, parity):
    """Load the tile at (row, column) into a stage as soon as its consumers have given it back."""
    mbarrier.wait(ring.empty.index(stage), parity ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes)
    async_load(desc, [row, column], ring.full.index(stage), ring.blocks.index(stage))


@gluon.jit
def fill_keys(keys, desc, row, column, key_numbers, numbers_desc, stage, parity):
    """Load a block of keys, and with it their numbers if there are any."""
    if numbers_desc is None:
        fill(keys, desc, row, column, stage, parity)
    else:
        mbarrier.wait(keys.empty.index(stage), parity ^ 1)
        mbarrier.expect(keys.full.index(stage), desc.block_type.nbytes + numbers_desc.block_type.nbytes)
        async_load(desc, [row, column], keys.full.index(stage), keys.blocks.index(stage))
        async_load(numbers_desc, [row], keys.full.index(stage), key_numbers.index(stage))


@gluon.jit
def tile_span(problem, first_row, M: gl.constexpr):
    """Keys that a tile's rows see. Where numbers are loaded with them, blocks begin at whole 16 bytes of numbers."""
    span = key_span(problem.start_ptr, problem.stop_ptr, first_row, problem.query_rows, M)
    if problem.changes.key_numbers_desc is not None:
        span = Span(span.begin & -4, span.end, span.full_begin, span.full_end)
    return span


@gluon.jit
def produce(
    problem, inputs, result, memory, GROUP: gl.constexpr, HAS_CARRY: gl.constexpr, OWN_STAGING: gl.constexpr
):  # fmt: skip
    """The producer warp: queries of all warpgroups, then key and value blocks in turn, tile after tile."""
    queries, keys, values, carries = memory.query, memory.key, memory.value, memory.carry
    CONSUMERS: gl.constexpr = queries.blocks.shape[0]
    STAGES: gl.constexpr = keys.blocks.shape[0]
    M: gl.constexpr = CONSUMERS * ROWS
    N: gl.constexpr = keys.blocks.shape[1]
    D: gl.constexpr = queries.blocks.shape[2]
    step = 0
    tiles_done = 0
    ticket = gl.program_id(0)
    while ticket < problem.schedule.tiles * problem.schedule.heads:
        tile, head = tile_and_head(problem.schedule, ticket)
        first_row = tile * M
        span = tile_span(problem, first_row, M)
        key_column = head // GROUP * inputs.key_head_stride
        value_column = head // GROUP * inputs.value_head_stride
        for part in gl.static_range(CONSUMERS):
            fill(
                queries, inputs.query_desc, first_row + part * ROWS, head * inputs.query_head_stride, part,
                tiles_done & 1,
            )  # fmt: skip
        blocks = block_count(span, N)
        for block in range(blocks):
            stage, parity = stage_and_parity(step, STAGES)
            fill_keys(
                keys, inputs.key_desc, span.begin + block * N, key_column, memory.key_numbers,
                problem.changes.key_numbers_desc, stage, parity,
            )  # fmt: skip
            fill(values, inputs.value_desc, span.begin + block * N, value_column, stage, parity)
            step += 1
            # Late, as the second-level cache would not keep it for all of the tile; not before the first block is on
            # its way, for which the consumers wait.
            if HAS_CARRY and block == gl.maximum(blocks - CARRY_AHEAD, 0):
                prefetch_rows(
                    result.carry_out_ptr, result.carry_lse_ptr, first_row, head, problem.query_rows,
                    problem.schedule.heads, M, D,
                )  # fmt: skip
        # Behind all blocks: the consumers give the carry's place back in the midst of them, and a wait for that must
        # not keep a block from them.
        if HAS_CARRY and OWN_STAGING:
            for part in gl.static_range(CONSUMERS):
                fill(carries, result.carry_desc, first_row + part * ROWS, head * D, part, tiles_done & 1)
        ticket = draw(problem.tickets, tiles_done)
        tiles_done += 1
