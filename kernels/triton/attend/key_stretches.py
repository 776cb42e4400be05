"""Which keys a tile of query rows walks over, and which pairs of a block are visible."""

import triton
import triton.language as tl


@triton.jit
def key_stretches(start, stop, first_row, last_row, BLOCK: tl.constexpr):
    """The keys a tile of query rows walks over: (begin, interior, right, end).

    [begin, interior): whole blocks that some row may not see yet (left edge), [interior, right): whole blocks that
    every row sees, [right, end): keys that some row may no longer see (right edge).
    """
    begin = tl.load(start + first_row)
    end = tl.load(stop + last_row)
    seen_by_all = tl.load(start + last_row)
    edge = tl.maximum(tl.minimum(seen_by_all, end) - begin, 0)
    interior = begin + tl.cdiv(edge, BLOCK) * BLOCK
    full = tl.maximum(tl.load(stop + first_row) - interior, 0)
    right = interior + full // BLOCK * BLOCK
    return begin, interior, right, end


@triton.jit
def visible(column, row_start, row_stop):
    """(rows, columns) that the rows may see."""
    return (row_start[:, None] <= column[None, :]) & (column[None, :] < row_stop[:, None])
