"""Lists of the blocks that tiles visit, made on the device from a layout; see ringflash.kernels.key_blocks.

A tile is of rows of one side, queries in the forward pass; it visits blocks of the other side, the columns. A block is
listed if the layout shows one of its pairs, and if it lies within what the tile's rows see by their intervals. If the
layout hides some of its pairs as well, rows bring along which columns they see, a bit for each.

Legend: G groups of heads, R and C rows and columns of the layout, here of tiles' side and of blocks'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher, aligned
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata

WORD = 32
"""Columns of a word of bits."""

ALIGNED = 128
"""Columns: as many bits as end with whole blocks, whatever their size."""


class BlockLists(NamedTuple):
    """What tiles visit.

    Attributes:
        entries: (G, tiles, blocks + 1) int32. The number of blocks, at least one; the first row of each, ascending,
            plus one where some of its pairs are to be hidden. A tile that sees nothing has one block, behind the last
            row.
        bits: (G, R, words) int32, which columns a row of the layout shows; None where no block has pairs to be hidden.
        row_block: the layout's row of each row of the tiles' side; None without bits.
    """

    entries: Tensor
    bits: Tensor | None
    row_block: Tensor | None


class ListOperands(NamedTuple):
    """`BlockLists` as kernels take them, for each `heads` heads; None for none.

    entries: `length` numbers a tile. bits: `words` words for each of the layout's `layout_rows` rows; None, as
    row_block, where no block has pairs to be hidden.
    """

    entries: Tensor | None = None
    length: int | None = None
    heads: int | None = None
    bits: Tensor | None = None
    words: int | None = None
    layout_rows: int | None = None
    row_block: Tensor | None = None


NO_LISTS = ListOperands()
"""Tiles visit what their rows see."""


def list_operands(lists: BlockLists, heads: int) -> ListOperands:
    """The operands of lists for so many heads."""
    groups, _, length = lists.entries.shape
    bits = (None, None) if lists.bits is None else (lists.bits.shape[2], lists.bits.shape[1])
    return ListOperands(lists.entries, length, heads // groups, lists.bits, *bits, lists.row_block)


def longest_lists_first(lists: BlockLists) -> Tensor:
    """Tiles, those with the most blocks of all groups first; (tiles,) int32."""
    return torch.argsort(lists.entries[:, :, 0].sum(0), descending=True, stable=True).to(torch.int32)


def key_lists(intervals: KeyIntervals, rows: int, keys: int) -> BlockLists:
    """Blocks of `keys` keys for tiles of `rows` query rows."""

    def build() -> BlockLists:
        blocks = intervals.blocks
        assert blocks is not None
        side = Side(blocks.query_block, rows, blocks.units[0]), Side(blocks.key_block, keys, blocks.units[1])
        seen = Seen(intervals.start, rows, intervals.stop, rows, rows - 1, intervals.query_count - 1)
        return _lists(blocks.shown, *side, seen)

    return intervals.kept(("key_lists", rows, keys), build, of_blocks=True)


def query_lists(intervals: KeyIntervals, keys: int, rows: int) -> BlockLists:
    """Blocks of `rows` query rows for tiles of `keys` keys."""

    def build() -> BlockLists:
        blocks = intervals.blocks
        assert blocks is not None
        side = Side(blocks.key_block, keys, blocks.units[1]), Side(blocks.query_block, rows, blocks.units[0])
        seeing = intervals.key_tile_rows(keys)
        return _lists(blocks.shown.transpose(1, 2), *side, Seen(seeing, 4, seeing, 4, 3, seeing.numel()))

    return intervals.kept(("query_lists", keys, rows), build, of_blocks=True)


def query_bits(intervals: KeyIntervals) -> tuple[Tensor, Tensor]:
    """Which keys queries of each row of the layout see, as `BlockLists.bits`; and the row of each query row."""
    blocks = intervals.blocks
    assert blocks is not None
    shown = blocks.shown.view(torch.uint8)

    bits = intervals.kept(("query_bits",), lambda: _made(PreparedBits, shown, blocks.key_block), of_blocks=True)
    return bits, blocks.query_block


class Side(NamedTuple):
    """Rows of a launch, of tiles or of the blocks that they visit.

    Attributes:
        place: (rows,) int32, the layout's row, or column, of each.
        size: rows of a tile or block.
        unit: rows that are known to have the same place, as in `BlockPlaces.units`.
    """

    place: Tensor
    size: int
    unit: int

    @property
    def step(self) -> int:
        """Rows of a tile or block that have the same place."""
        return min(self.size, self.unit)


class Seen(NamedTuple):
    """Where it is written which columns a tile sees.

    Attributes:
        begin: the first column that tile i sees is at i * begin_step.
        begin_step: see begin.
        end: one behind the last column is at i * end_step + end_offset, but no further than at `last`.
        end_step: see end.
        end_offset: see end.
        last: see end.
    """

    begin: Tensor
    begin_step: int
    end: Tensor
    end_step: int
    end_offset: int
    last: int


def _lists(shown: Tensor, tiles: Side, blocks: Side, seen: Seen) -> BlockLists:
    """Lists for tiles of the rows of a layout, (G, R, C) bool, of blocks of its columns."""
    shown = shown.view(torch.uint8)
    numbers = tiles[1:], blocks[1:], seen[1], seen[3:]
    entries = _made(PreparedLists, shown, tiles.place, blocks.place, seen.begin, seen.end, numbers=numbers)
    if tiles.step == tiles.size and blocks.step == blocks.size:
        return BlockLists(entries, None, None)
    return BlockLists(entries, _made(PreparedBits, shown, blocks.place), tiles.place)


_kept = Kept()
"""What is prepared, by what it depends on."""


def _made(kind: type[Any], *tensors: Tensor, numbers: tuple = ()) -> Tensor:
    """What a `kind`, prepared by the first call of this form, makes of tensors."""
    name = kind, *map(metadata, tensors), numbers, aligned(*tensors)
    prepared = _kept.get(name) or _kept.add(name, kind(*tensors, *numbers))
    return prepared(*tensors)


class PreparedLists:
    """Worked out once for layouts of the same form: launches that make `BlockLists.entries`.

    Args:
        shown: (G, R, C) uint8.
        rows: places of the tiles' rows.
        columns: places of the blocks'.
        begin: as in `Seen`.
        end: as in `Seen`.
        tiles: size and unit, as in `Side`.
        blocks: likewise.
        begin_step: as in `Seen`.
        of_end: as in `Seen`, the numbers behind end.
    """

    def __init__(
        self,
        shown: Tensor,
        rows: Tensor,
        columns: Tensor,
        begin: Tensor,
        end: Tensor,
        tiles: tuple[int, int],
        blocks: tuple[int, int],
        begin_step: int,
        of_end: tuple[int, int, int],
    ) -> None:
        groups, _, layout_columns = shown.shape
        (tile, unit), (block, block_unit) = tiles, blocks
        tile_count, block_count = -(-len(rows) // tile), -(-len(columns) // block)
        direct = aligned(shown, rows, columns, begin, end)
        self.shape, self.alike = (groups, tile_count, block_count + 1), unit >= tile
        # Of a tile's rows together: bit 0 if any sees a column of the layout, bit 1 if all do.
        self.together = groups, tile_count, layout_columns
        chunks = -(-layout_columns // CHUNK.value)
        self.launch_rows = Launcher(
            groups * tile_count * chunks, (len(rows), tile_count, layout_columns, chunks, *shown.stride()),
            {"TILE": tile, "STEP": min(unit, tile)}, {}, direct,
        )  # fmt: skip
        self.launch_lists = Launcher(
            groups * tile_count,
            (len(columns), tile_count, block_count, *self._strides(shown), begin_step, *of_end),
            {"TILE": tile, "BLOCK": block, "STEP": min(block_unit, block)}, {}, direct,
        )  # fmt: skip

    def _strides(self, shown: Tensor) -> tuple[int, ...]:
        return shown.stride() if self.alike else (self.together[1] * self.together[2], self.together[2], 1)

    def __call__(self, shown: Tensor, rows: Tensor, columns: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """(G, tiles, blocks + 1) int32."""
        entries, row_block = rows.new_empty(self.shape), rows
        if not self.alike:
            together = shown.new_empty(self.together)
            self.launch_rows(rows_together_kernel, (shown, together, rows))
            shown, row_block = together, None
        self.launch_lists(list_blocks_kernel, (shown, row_block, entries, columns, begin, end))
        return entries


class PreparedBits:
    """Likewise for `BlockLists.bits`.

    Args:
        shown: (G, R, C) uint8.
        columns: places of the blocks' rows.
    """

    def __init__(self, shown: Tensor, columns: Tensor) -> None:
        groups, layout_rows, _ = shown.shape
        words = -(-len(columns) // ALIGNED) * (ALIGNED // WORD)
        self.shape, chunks = (groups, layout_rows, words), -(-words // WORDS.value)
        numbers = (len(columns), layout_rows, words, chunks, *shown.stride())
        self.launch = Launcher(groups * layout_rows * chunks, numbers, {}, {}, aligned(shown, columns))

    def __call__(self, shown: Tensor, columns: Tensor) -> Tensor:
        """(G, R, words) int32."""
        bits = columns.new_empty(self.shape)
        self.launch(bits_kernel, (shown, bits, columns))
        return bits


CHUNK = tl.constexpr(128)
"""Columns of a layout, or blocks, that a program looks at together."""

WORDS = tl.constexpr(32)
"""Words of bits that a program makes."""


@compiled_once
@triton.jit(do_not_specialize=["rows", "tiles", "columns", "chunks", "group_stride", "row_stride", "column_stride"])
def rows_together_kernel(
    shown_ptr, together_ptr, row_block_ptr, rows, tiles, columns, chunks, group_stride, row_stride, column_stride,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """What a tile's rows see together, of which STEP at a time are alike. Program = (group, tile, CHUNK columns)."""
    of_tile, column = tl.program_id(0) // chunks, tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    tile, group = of_tile % tiles, of_tile // tiles
    inside = column < columns
    seen = shown_ptr + tl.cast(group, tl.int64) * group_stride + column * column_stride
    some = tl.zeros([CHUNK], tl.int32)
    every = tl.full([CHUNK], 1, tl.int32)
    for row in range(tile * TILE, tile * TILE + TILE, STEP):
        layout_row = tl.load(row_block_ptr + tl.minimum(row, rows - 1))
        shown = tl.load(seen + tl.cast(layout_row, tl.int64) * row_stride, mask=inside, other=0).to(tl.int32)
        some, every = some | shown, every & shown
    place = tl.cast(of_tile, tl.int64) * columns + column
    tl.store(together_ptr + place, (some + 2 * every).to(tl.uint8), mask=inside)


@compiled_once
@triton.jit(
    do_not_specialize=[
        "columns", "tiles", "blocks", "group_stride", "row_stride", "column_stride",
        "begin_step", "end_step", "end_offset", "last",
    ]
)  # fmt: skip
def list_blocks_kernel(
    shown_ptr, row_block_ptr, entries_ptr, column_block_ptr, begin_ptr, end_ptr, columns, tiles, blocks,
    group_stride, row_stride, column_stride, begin_step, end_step, end_offset, last,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The entries of a tile, of whose columns STEP at a time are alike. Program = (group, tile).

    Without row_block_ptr, shown_ptr is of what rows see together; else all rows of a tile have the place of its first.
    """
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    entries = entries_ptr + tl.cast(tl.program_id(0), tl.int64) * (blocks + 1)
    layout_row = tile
    if row_block_ptr is not None:
        layout_row = tl.load(row_block_ptr + tile * TILE)
    shown = shown_ptr + tl.cast(group, tl.int64) * group_stride + tl.cast(layout_row, tl.int64) * row_stride
    begin = tl.load(begin_ptr + tile * begin_step)
    end = tl.load(end_ptr + tl.minimum(tile * end_step + end_offset, last))
    count = 0
    for first in range(begin // BLOCK // CHUNK * CHUNK, tl.cdiv(end, BLOCK), CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = (block * BLOCK < end) & (block * BLOCK + BLOCK > begin)
        some = tl.zeros([CHUNK], tl.int32)
        every = tl.full([CHUNK], 1, tl.int32)
        for step in range(0, BLOCK, STEP):
            column = tl.minimum(block * BLOCK + step, columns - 1)
            layout_column = tl.load(column_block_ptr + column, mask=inside, other=0)
            seen = tl.load(shown + layout_column * column_stride, mask=inside, other=0).to(tl.int32)
            some = some | (seen & 1)
            every = every & (seen if row_block_ptr is not None else seen // 2)
        place = count + tl.cumsum(some, 0)
        tl.store(entries + place, block * BLOCK + 1 - every, mask=some != 0)
        count += tl.sum(some, 0)
    if count == 0:
        tl.store(entries + 1, blocks * BLOCK)
    tl.store(entries, tl.maximum(count, 1))


@compiled_once
@triton.jit(
    do_not_specialize=["columns", "layout_rows", "words", "chunks", "group_stride", "row_stride", "column_stride"]
)
def bits_kernel(
    shown_ptr, bits_ptr, column_block_ptr, columns, layout_rows, words, chunks, group_stride, row_stride, column_stride
):  # fmt: skip
    """Which columns a row of the layout shows. Program = (group, row, WORDS words)."""
    of_row, word = tl.program_id(0) // chunks, tl.program_id(0) % chunks * WORDS + tl.arange(0, WORDS)
    row, group = of_row % layout_rows, of_row // layout_rows
    bit = tl.arange(0, 32)
    column = word[:, None] * 32 + bit[None, :]
    layout_column = tl.load(column_block_ptr + column, mask=column < columns, other=0)
    seen = shown_ptr + tl.cast(group, tl.int64) * group_stride + tl.cast(row, tl.int64) * row_stride
    shown = tl.load(seen + layout_column * column_stride, mask=column < columns, other=0).to(tl.int32)
    place = tl.cast(of_row, tl.int64) * words + word
    tl.store(bits_ptr + place, tl.sum(shown << bit[None, :], 1), mask=word < words)
