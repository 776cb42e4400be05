"""Which tile a program works on when, and which blocks of the other side it visits.

A program is here, as in all of kernels/, what Triton calls one: a block of threads of a launch, with a number.

Tiles are numbered so that two things hold at once. Long tiles come first: rows are taken from the last to the first,
which for causal, document and window masks is longest first within a document and ends the launch with short tiles.
And tiles that read the same keys run at about the same time: heads are taken in sections whose keys and values fit in
the second-level cache together, rows within a section, heads innermost.

A launch has one program for each multiprocessor. Each takes its own number for its first ticket and then draws more, so
that no program waits for another and the loads of a tile run under the last steps of the one before.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.compat import WARPGROUP, release
from ringflash.kernels.hopper.rings import allocate_full_and_empty

CACHED_KEYS = 32 * 2**20
"""Bytes of keys and values that one section of heads may take of the 50 MB of second-level cache."""


def head_section(key_rows: int, key_heads: int, group: int, dim: int) -> int:
    """Query heads whose keys and values fit in the second-level cache together; whole groups, dividing all heads."""
    fitting = max(1, CACHED_KEYS // max(1, key_rows * dim * 4))
    return group * max(n for n in range(1, key_heads + 1) if key_heads % n == 0 and n <= fitting)


class Schedule(NamedTuple):
    """A launch's tiles: `tiles` for each of `heads` heads, taken in sections of `section` heads."""

    tiles: gl.tensor
    heads: gl.tensor
    section: gl.tensor


class Tickets(NamedTuple):
    """How the producer warp tells the consumers the next tile: two numbers in shared memory, with their barriers."""

    counter_ptr: gl.tensor
    numbers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Span(NamedTuple):
    """Key rows from `begin` to `end` that some query rows see; all of them see full_begin to full_end."""

    begin: gl.tensor
    end: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor


@gluon.jit
def allocate_tickets(counter_ptr, READERS: gl.constexpr):
    """Tickets that READERS warpgroups read; counter_ptr is an int32 zero."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], LAYOUT)
    full, empty = allocate_full_and_empty(2, READERS * WARPGROUP)
    return Tickets(counter_ptr, numbers, full, empty)


@gluon.jit
def draw(tickets, tiles_done):
    """Draw the ticket for the next tile, for the producer warp, and pass it on."""
    slot, parity = stage_and_parity(tiles_done, 2)
    number = gl.atomic_add(tickets.counter_ptr, 1) + gl.num_programs(0)
    mbarrier.wait(tickets.empty.index(slot), parity ^ 1)
    tickets.numbers.index(slot).store(gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(tickets.full.index(slot), count=1)
    return number


@gluon.jit
def read(tickets, tiles_done):
    """The ticket for the next tile, for a consumer warpgroup."""
    slot, parity = stage_and_parity(tiles_done, 2)
    mbarrier.wait(tickets.full.index(slot), parity)
    number = gl.max(tickets.numbers.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    release(tickets.empty.index(slot))
    return number


@gluon.jit
def tile_and_head(schedule, ticket):
    """Tile and head that a ticket is for, in the order above."""
    per_section = schedule.tiles * schedule.section
    within = ticket % per_section
    tile = schedule.tiles - 1 - within // schedule.section
    return tile, ticket // per_section * schedule.section + within % schedule.section


@gluon.jit
def key_span(start_ptr, stop_ptr, first_row, query_rows, M: gl.constexpr):
    """Keys that the query rows first_row to first_row + M see; those of the last row if none of them exists.

    Bounds never decrease along rows, so the first and the last row give them all.
    """
    first_row = gl.minimum(first_row, query_rows - 1)
    last_row = gl.minimum(first_row + M, query_rows) - 1
    return Span(
        gl.load(start_ptr + first_row),
        gl.load(stop_ptr + last_row),
        gl.load(start_ptr + last_row),
        gl.load(stop_ptr + first_row),
    )


@gluon.jit
def block_count(span, N: gl.constexpr):
    """Blocks of N keys that cover a span; at least one, hidden if need be."""
    return gl.maximum((span.end - span.begin + N - 1) // N, 1)


@gluon.jit
def own_blocks(span, own, blocks, N: gl.constexpr):
    """First and last (exclusive) of the blocks of a tile that the rows with the span `own` see; at least one."""
    first = gl.minimum((own.begin - span.begin) // N, blocks - 1)
    last = gl.minimum((own.end - span.begin + N - 1) // N, blocks)
    return first, gl.maximum(last, first + 1)


@gluon.jit
def stage_and_parity(step, STAGES: gl.constexpr):
    """Where a ring of 2^n stages stands at a step that counts on across tiles: the stage and its barriers' parity."""
    return step & (STAGES - 1), (step & STAGES) // STAGES
