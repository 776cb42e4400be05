"""Tiles that visit the blocks of a list in place of a range; see ringflash.kernels.gpu.block_lists.

What there is for lists is compiled into a kernel only if its launch has some, and what hides single pairs of a block
only if the layout's blocks are not whole ones of the kernel's.

Legend: R rows of scores, C columns.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.block_lists import ListOperands


def list_tensors(lists: ListOperands) -> tuple[Tensor | None, ...]:
    """The tensors among operands, in the order of the kernels' arguments."""
    return lists.entries, lists.bits, lists.row_block


def list_numbers(lists: ListOperands) -> tuple[int | None, ...]:
    """The numbers, likewise."""
    return lists.length, lists.heads, lists.words, lists.layout_rows


@gluon.jit
def list_of_tile(lists, tile, tiles, head):
    """Where the list of a tile begins: its number of blocks, and behind that its blocks."""
    return lists.entries + (head // lists.heads * tiles + tile).to(gl.int64) * lists.length


@gluon.jit
def row_of_entry(entry):
    """First row of a block."""
    return entry & -2


@gluon.jit
def bits_of_rows(lists, rows, inside, head):
    """Where the bits of rows are, a pointer for each; of no meaning without bits."""
    places = rows
    if lists.bits is not None:
        layout_row = gl.load(lists.row_block + rows, mask=inside, other=0)
        layout_row = (head // lists.heads * lists.layout_rows + layout_row).to(gl.int64)
        places = lists.bits + layout_row * lists.words
    return places


@gluon.jit
def hide_unlisted(scores, bits, first_column, none):
    """`none` where the layout hides the pair of a row and a column.

    Args:
        scores: (R, C).
        bits: (R,) from `bits_of_rows`.
        first_column: first of the columns, a multiple of 32.
        none: what takes the place of a hidden pair's score.
    """
    R: gl.constexpr = scores.shape[0]
    WORDS: gl.constexpr = scores.shape[1] // 32
    LAYOUT: gl.constexpr = scores.type.layout
    # A thread has columns 8 a + 2 b + c of each word, for all a and c.
    PARTS: gl.constexpr = scores.reshape([R, WORDS, 4, 4, 2]).type.layout
    ONES: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, PARTS)))
    places = gl.convert_layout(bits, gl.SliceLayout(1, ONES))[:, None]
    word = gl.load(places + (first_column // 32 + gl.arange(0, WORDS, gl.SliceLayout(0, ONES)))[None, :])
    word = gl.expand_dims(gl.expand_dims(gl.expand_dims(word, 2), 3), 4)
    column = gl.convert_layout(gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT)) & 31, gl.SliceLayout(0, LAYOUT))
    all_words = gl.convert_layout(
        gl.broadcast(word, gl.zeros([R, WORDS, 4, 4, 2], gl.int32, PARTS))[0].reshape([R, scores.shape[1]]), LAYOUT,
        assert_trivial=True,
    )  # fmt: skip
    return gl.where((all_words >> column[None, :]) & 1 != 0, scores, none)
