"""The second range of keys: sink tokens, or a prompt that several continuations share; see ringflash.kernels.intervals.

A tile of query rows visits the blocks of its sink tokens first, then those of its own range of keys. Between the sink
tokens of two documents lies all of the first one. A tile that has rows of both would walk through it for nothing, so
what it visits comes in two pieces: keys up to the widest gap that none of its rows sees, and those behind.

What there is for sink tokens is compiled into a kernel only if its launch has some.

Legend: M query rows of a tile, N key rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.intervals import KeyIntervals

ALIGNED = 4
"""Keys: pieces begin at multiples, as the tensor memory engine takes the numbers that keys bring along."""


def token_pieces(intervals: KeyIntervals, rows: int, block: int) -> Tensor:
    """Keys that a tile of `rows` query rows visits for sink tokens, in blocks of `block`; (tiles, 4) int32.

    Begin and end of the first piece, begin and end of the second one; an empty piece ends where it begins. No block of
    the first reaches into the second. Nothing is read by the host.

    Example:
        >>> bounds = torch.tensor([[9, 9, 30, 39], [10, 11, 39, 40], [0, 0, 30, 30], [2, 2, 30, 32]])
        >>> token_pieces(KeyIntervals(*bounds[:2], 40, *bounds[2:]), rows=4, block=8)  # documents of 30 and 10
        tensor([[ 0,  2, 28, 32]], dtype=torch.int32)
    """

    def build() -> Tensor:
        start, stop = intervals.ranges()[1]
        count = len(start)
        first = torch.arange(0, count, rows, device=start.device)
        last = (first + rows).clamp(max=count) - 1
        gaps = torch.full((len(first) * rows,), -1, dtype=torch.int32, device=start.device)
        gaps[: count - 1] = start[1:] - stop[:-1]  # behind each row
        gaps[last] = -1  # behind a tile's last row is the next tile
        width, behind = gaps.view(-1, rows).max(1)
        split = width >= block + ALIGNED
        row = torch.minimum(first + behind, last)
        begin, end = start[first], stop[last]
        gap_begin = torch.where(split, stop[row], end)
        gap_end = torch.where(split, start[torch.minimum(row + 1, last)], end)
        begin, gap_end = (x // ALIGNED * ALIGNED for x in (begin, gap_end))
        end = torch.where(split, end, gap_end)
        return torch.stack([begin, gap_begin.maximum(begin), gap_end, end.maximum(gap_end)], 1)

    return intervals.kept(("token_pieces", rows, block), build)


class SinkTokens(NamedTuple):
    """Each row's range of sink tokens, and `token_pieces` of tiles; None for none."""

    start_ptr: gl.tensor
    stop_ptr: gl.tensor
    pieces_ptr: gl.tensor


FEW = gl.constexpr(16)
"""Keys that a block may be cut down to: what a product takes at least."""


class Pieces(NamedTuple):
    """What a tile visits, `blocks` blocks in all, of which first_blocks are from `begin` on and the others `again`.

    few: whether it is one block, of which only the first `FEW` keys are sink tokens.
    """

    begin: gl.tensor
    again: gl.tensor
    first_blocks: gl.tensor
    blocks: gl.tensor
    few: gl.tensor


@gluon.jit
def tile_pieces(tokens, tile, N: gl.constexpr):
    """Pieces of a tile."""
    entry = tokens.pieces_ptr + tile * 4
    begin, again = gl.load(entry), gl.load(entry + 2)
    first, second = gl.load(entry + 1) - begin, gl.load(entry + 3) - again
    first_blocks, blocks = (first + N - 1) // N, (first + N - 1) // N + (second + N - 1) // N
    return Pieces(begin, again, first_blocks, blocks, (blocks == 1) & (first + second <= FEW))


@gluon.jit
def token_key(pieces, block, N: gl.constexpr):
    """First key of a block of the pieces."""
    first = block < pieces.first_blocks
    return gl.where(first, pieces.begin + block * N, pieces.again + (block - pieces.first_blocks) * N)
