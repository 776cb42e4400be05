"""Blocks of rows of one head, as Triton kernels read and write them; and the constants of a softmax in base 2."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_block(
    x,
    head,
    row,
    rows,
    row_stride,
    head_stride,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rows row..row+BLOCK of one head, (BLOCK, PADDED_DIM); zeros behind the last row and the last column.

    `x` is a descriptor of the (head, row, column) view, which the copy engine bounds by itself, or a pointer. Offsets
    are 64-bit up to the first row, 32-bit within a block.
    """
    if DESCRIPTOR:
        block = x.load([head, row, 0]).reshape(BLOCK, PADDED_DIM)
    else:
        block_row = tl.arange(0, BLOCK)
        column = tl.arange(0, PADDED_DIM)
        first = x + tl.cast(head, tl.int64) * head_stride + tl.cast(row, tl.int64) * row_stride
        pointers = first + block_row[:, None] * row_stride + column[None, :]
        inside = row + block_row[:, None] < rows
        if DIM != PADDED_DIM:
            inside = inside & (column[None, :] < DIM)
        block = tl.load(pointers, mask=inside, other=0.0)
    return block


@triton.jit
def block_offsets(head, row, heads, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Offsets of a block of rows in a contiguous (rows, heads, DIM) tensor."""
    first = (tl.cast(row, tl.int64) * heads + head) * DIM
    return first + tl.arange(0, BLOCK)[:, None] * (heads * DIM) + tl.arange(0, PADDED_DIM)[None, :]


@triton.jit
def block_inside(row, rows, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Which elements of a block of rows exist in a (rows, ..., DIM) tensor."""
    return (row + tl.arange(0, BLOCK)[:, None] < rows) & (tl.arange(0, PADDED_DIM)[None, :] < DIM)


def padded(dim: int) -> int:
    """Columns of a block that holds `dim`: the matrix units need a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())  # triton.next_power_of_2 takes 6 us
