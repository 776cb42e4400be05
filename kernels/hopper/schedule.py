"""Which tile a program works on when, and which blocks of the other side it visits.

Tiles are numbered so that two things hold at once. Long tiles come first: rows are taken from the last to the first,
which for causal, document and window masks is longest first within a document and ends the launch with short tiles.
And tiles that read the same keys run at about the same time: heads are taken in sections whose keys and values fit in
the second-level cache together, rows within a section, heads innermost.

A launch has one program for each tile, or fewer programs that take several tiles each, forth and back through the
numbers (the program with the longest tile of one turn gets the shortest of the next).
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


class Schedule(NamedTuple):
    """A launch's tiles: `tiles` for each of `heads` heads, taken in sections of `section` heads."""

    tiles: gl.tensor
    heads: gl.tensor
    section: gl.tensor


class Span(NamedTuple):
    """Blocks that a tile visits: `blocks` of them from row `begin` on; rows full_begin to full_end need no mask."""

    begin: gl.tensor
    blocks: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor


@gluon.jit
def turns_of(schedule):
    """Tiles that this program works on."""
    programs = gl.num_programs(0)
    full_turns = schedule.tiles * schedule.heads // programs
    return full_turns + gl.where(place_in_turn(full_turns) < schedule.tiles * schedule.heads, 1, 0)


@gluon.jit
def place_in_turn(turn):
    """Number of the tile that this program takes in its given turn: forth in even turns, back in odd ones."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def tile_and_head(schedule, place):
    """Tile and head of a place in the order above."""
    per_section = schedule.tiles * schedule.section
    within = place % per_section
    tile = schedule.tiles - 1 - within // schedule.section
    return tile, place // per_section * schedule.section + within % schedule.section


@gluon.jit
def key_span(start_ptr, stop_ptr, first_row, rows, M: gl.constexpr, N: gl.constexpr):
    """Key blocks of N rows that the query rows first_row to first_row + M see; at least one, hidden if need be.

    Bounds never decrease along rows, so the tile's first and last row give them all.
    """
    last_row = gl.minimum(first_row + M, rows) - 1
    begin = gl.load(start_ptr + first_row)
    end = gl.load(stop_ptr + last_row)
    blocks = gl.maximum((end - begin + N - 1) // N, 1)
    return Span(begin, blocks, gl.load(start_ptr + last_row), gl.load(stop_ptr + first_row))


@gluon.jit
def needs_mask(span, first, N: gl.constexpr):
    """Whether some row of the tile does not see all of the block of N rows at `first`."""
    return (first < span.full_begin) | (first + N > span.full_end)


@gluon.jit
def stage_and_parity(step, STAGES: gl.constexpr):
    """Where a ring of 2^n stages stands at a step that counts on across tiles: the stage and its barriers' parity."""
    return step & (STAGES - 1), (step & STAGES) // STAGES
