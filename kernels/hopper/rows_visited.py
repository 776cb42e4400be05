"""The query rows that a key tile of the backward pass visits: a range, one of two ranges, or blocks of a list.

Legend: M query rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper.listed_blocks import row_of_entry

RANGE = gl.constexpr(0)
"""Ways to walk: blocks that follow each other,"""

TOKENS = gl.constexpr(1)
"""the same and behind them those of rows that see the tile as sink tokens,"""

LISTED = gl.constexpr(2)
"""or blocks from a list, see ringflash.kernels.gpu.block_lists."""


class Rows(NamedTuple):
    """The query rows that a key tile visits, in `blocks` blocks from row `begin` on, for each head of a group.

    Blocks within full_begin to full_end need no mask. With sink tokens the first own_blocks are of rows that see the
    tile in their own range of keys, the others of rows that see it as sink tokens, from token_begin on. With lists the
    blocks are those in entries_ptr, behind their number.
    """

    begin: gl.tensor
    blocks: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    own_blocks: gl.tensor
    token_begin: gl.tensor
    token_full_begin: gl.tensor
    token_full_end: gl.tensor
    entries_ptr: gl.tensor
    query_rows: gl.tensor
    padded_rows: gl.tensor
    first_head: gl.tensor


@gluon.constexpr_function
def way_to_walk(has_tokens, has_lists):
    """Which of the three."""
    return LISTED if has_lists else TOKENS if has_tokens else RANGE


@gluon.jit
def entry_of(rows, block, WALK: gl.constexpr):
    """What the list says of a block; of no meaning without one."""
    entry = block
    if WALK == LISTED:
        entry = gl.load(rows.entries_ptr + 1 + block)
    return entry


@gluon.jit
def row_of(rows, block, entry, M: gl.constexpr, WALK: gl.constexpr):
    """First row of a block."""
    row = rows.begin + block * M
    if WALK == TOKENS:
        row = gl.where(block < rows.own_blocks, row, rows.token_begin + (block - rows.own_blocks) * M)
    if WALK == LISTED:
        row = row_of_entry(entry)
    return row
