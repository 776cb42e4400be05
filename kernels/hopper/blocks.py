"""Blocks of rows of one head, on their way between global and shared memory by the tensor memory engine.

Blocks as wide as the rows, or parts of them, take descriptors in which heads lie side by side in one long row: two
dimensions, whatever the strides. A block that is wider than its rows must not reach into the next head: its descriptor
has heads as a dimension of their own, and the engine reads zeros behind the last column and writes nothing there.

A head dimension that is no power of two and larger than 128 comes in two parts, the first of 128 columns; what is
behind them is called the rest.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.hopper.compat import async_add, async_load, async_store, reinterpret

FIRST = gl.constexpr(128)
"""Columns in front of the rest."""


@gluon.constexpr_function
def block_rows(desc):
    """Rows of a descriptor's block."""
    return desc.block_type.shape[-2]


@gluon.constexpr_function
def block_columns(desc):
    """Columns of a descriptor's block."""
    return desc.block_type.shape[-1]


@gluon.constexpr_function
def has_head_dimension(desc):
    """Whether heads are a dimension of their own."""
    return len(desc.block_type.shape) == 3


@gluon.constexpr_function
def flat_layout(desc):
    """How a block lies in shared memory, as rows and columns."""
    if not has_head_dimension(desc):
        return desc.layout
    rows, columns = desc.block_type.shape[-2:]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], desc.dtype)


@gluon.jit
def with_head(desc, block):
    """A block of rows and columns as the engine wants it."""
    if has_head_dimension(desc):
        block = reinterpret(block, desc.dtype, desc.block_type.shape, desc.layout)
    return block


@gluon.jit
def head_place(desc, head, head_stride):
    """Where a head is, as the functions below take it: its number, or its first column where heads are side by side."""
    place = head
    if not has_head_dimension(desc):
        place = head * head_stride
    return place


@gluon.jit
def load_block(desc, row, place, barrier, block, COLUMN: gl.constexpr = 0):
    """Load a head's rows from `row` on, columns from COLUMN on."""
    if has_head_dimension(desc):
        async_load(desc, [place, row, COLUMN], barrier, with_head(desc, block))
    else:
        async_load(desc, [row, place + COLUMN], barrier, block)


@gluon.jit
def store_block(desc, row, place, column, block):
    """Store a head's rows from `row` on, columns from `column` on; complete after `store_wait`."""
    if has_head_dimension(desc):
        async_store(desc, [place, row, column], with_head(desc, block))
    else:
        async_store(desc, [row, place + column], block)


@gluon.jit
def store_part(desc, row, place, column, whole, own, part):
    """As `store_block`, of the part `own` of a block `whole`.

    It is the part of that number as they lie in memory: some rows of 64 columns, then those of the next 64; or columns
    of all rows.
    """
    if has_head_dimension(desc):
        # Of the whole, as triton 3.8 does not reinterpret a part.
        count: gl.constexpr = whole.shape[0] * whole.shape[1] // (block_rows(desc) * block_columns(desc))
        shape: gl.constexpr = [count, 1, block_rows(desc), block_columns(desc)]
        parts = reinterpret(whole, desc.dtype, shape, desc.layout)
        async_store(desc, [place, row, column], parts.index(part))
    else:
        async_store(desc, [row, place + column], own)


@gluon.jit
def add_block(desc, row, place, column, block):
    """As `store_block`, but added to what is there."""
    if has_head_dimension(desc):
        async_add(desc, [place, row, column], with_head(desc, block))
    else:
        async_add(desc, [row, place + column], block)
