"""Which keys a tile of query rows walks over, and which pairs of a block are visible."""

import triton
import triton.language as tl

# Legend: M rows of a tile, N columns of a block; in the kernel for gradients of keys they are the other way around.


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


@triton.jit
def list_of_tile(lists, tile, tile_count, head):
    """Where the list of a tile begins, `ringflash.kernels.gpu.block_lists`; of no meaning without lists."""
    listed = head
    if lists.entries is not None:
        listed = lists.entries + tl.cast(head // lists.heads * tile_count + tile, tl.int64) * lists.length
    return listed


@triton.jit
def entry_at(lists, listed, place):
    """What a list says of the block at a place; without lists the place, which is the block's first row then."""
    entry = place
    if lists.entries is not None:
        entry = tl.load(listed + 1 + place)
    return entry


@triton.jit
def row_of_entry(lists, entry):
    """First row of a block."""
    row = entry
    if lists.entries is not None:
        row = entry & -2
    return row


@triton.jit
def bits_of_rows(lists, row_M, exists_M, head):
    """Where the bits of rows are, a pointer for each; of no meaning without bits."""
    bits_M = row_M
    if lists.bits is not None:
        layout_row_M = tl.load(lists.row_block + row_M, mask=exists_M, other=0)
        layout_row_M = tl.cast(head // lists.heads * lists.layout_rows + layout_row_M, tl.int64)
        bits_M = lists.bits + layout_row_M * lists.words
    return bits_M


@triton.jit
def unlisted_hidden(weights_MN, lists, entry, bits_M, NOTHING: tl.constexpr):
    """NOTHING in place of what the layout hides of a block."""
    BITS: tl.constexpr = lists.bits is not None
    if BITS and entry % 2 != 0:
        N: tl.constexpr = weights_MN.shape[1]
        column_N = tl.arange(0, N)
        words_MN = tl.zeros(weights_MN.shape, tl.int32)
        for word in tl.static_range((N + 31) // 32):  # a load of rows alone: what is loaded lies as scores do not
            word_M = tl.load(bits_M + (entry // 32 + word))
            words_MN = tl.where(column_N[None, :] // 32 == word, word_M[:, None], words_MN)
        shift_N = (row_of_entry(lists, entry) + column_N) % 32
        weights_MN = tl.where((words_MN >> shift_N[None, :]) & 1 != 0, weights_MN, NOTHING)
    return weights_MN
