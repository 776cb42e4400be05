"""What the kernels over tiles take alike, worked out once for calls alike."""

from __future__ import annotations

from torch import Tensor

import triton
from ringflash.kernels.gpu.block_lists import (
    BlockLists,
    ListOperands,
    key_lists,
    list_operands,
    longest_lists_first,
    query_lists,
)
from ringflash.kernels.gpu.launcher import Launcher
from ringflash.kernels.gpu.row_blocks import padded
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.triton.attend.descriptors import describable, described
from ringflash.kernels.triton.attend.tile_sizes import Tiles


class PreparedKernel:
    """A kernel whose programs own a tile of rows of one head, ready to be launched for calls like the first.

    Args:
        operands: query, key, value and, for gradients, dout; checked.
        intervals: as in `attend`.
        scales: the kernel's numbers before the operands' strides.
        tiles: sizes of tiles and blocks.
        direct: whether all tensors are `aligned`.
        owns_keys: whether the tiles are of keys and key heads; otherwise of query rows and query heads.
        **constants: compile-time constants of this kernel alone.

    Attributes:
        empty: whether there are no query rows or no keys, hence nothing to launch.
        sizes: rows of a tile and of the blocks that it visits.
        has_lists: whether tiles visit blocks of lists.
        launch: to be given the tensors, the operands first.
    """

    def __init__(
        self,
        operands: tuple[Tensor, ...],
        intervals: KeyIntervals,
        scales: tuple[float, ...],
        tiles: Tiles,
        direct: bool,
        owns_keys: bool = False,
        **constants: bool | str,
    ) -> None:
        (query_count, heads, dim), (key_count, key_heads, value_dim) = operands[0].shape, operands[2].shape
        self.empty = not query_count or not key_count
        descriptors = not self.empty and tiles.descriptors and describable(*operands)
        blocks = (tiles.queries, tiles.keys, tiles.keys, tiles.queries)[: len(operands)]
        descriptions = [described(x, block) for x, block in zip(operands, blocks, strict=True)] if descriptors else ()
        self.sizes = (tiles.keys, tiles.queries) if owns_keys else (tiles.queries, tiles.keys)
        self._owns_keys, self.has_lists = owns_keys, intervals.blocks is not None
        owned_rows, owned_heads = (key_count, key_heads) if owns_keys else (query_count, heads)
        self._heads = owned_heads
        tile_count = triton.cdiv(owned_rows, self.sizes[0])
        strides = [stride for x in operands for stride in x.stride()[:2]]
        self.launch = Launcher(
            tile_count * owned_heads,
            (query_count, key_count, tile_count, owned_heads, *scales, *strides),
            dict(
                GROUP=heads // key_heads, M=tiles.queries, N=tiles.keys, DIM=dim, PADDED_DIM=padded(dim),
                VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim),
                HAS_SINK_TOKENS=intervals.has_sink_tokens, SPLIT=tiles.split, DESCRIPTORS=descriptors, **constants,
            ),
            tiles.options(),
            direct,
            descriptions,
        )  # fmt: skip

    def list_order(self, intervals: KeyIntervals) -> Tensor:
        """Tiles, those with the most blocks first."""
        name = ("list_order", self._owns_keys, *self.sizes)
        return intervals.kept(name, lambda: longest_lists_first(self._lists(intervals)), of_blocks=True)

    def lists(self, intervals: KeyIntervals) -> ListOperands:
        """Blocks that tiles visit."""
        return list_operands(self._lists(intervals), self._heads)

    def _lists(self, intervals: KeyIntervals) -> BlockLists:
        return (query_lists if self._owns_keys else key_lists)(intervals, *self.sizes)
