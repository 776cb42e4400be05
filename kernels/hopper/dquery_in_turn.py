"""Adding to the query's gradient in a fixed order, so that it repeats bit for bit.

Each block of query rows is visited by a range of key tiles. In every block, and for every head, the tiles add in
ascending order: a number in global memory says whose turn it is, a tile waits for its own and passes it on once its sum
has arrived. Two extra warps of each program do that, one for each consumer warpgroup, so that waiting for a turn stops
no one who computes until the next part of the gradient is ready.

No program waits for ever, nor long: programs start in ascending order of tiles, so those that one waits for have
started. And tiles visit their blocks from the last, heads of a group innermost. As neither end of the visited range
decreases from tile to tile, a tile that starts together with the one before it then reaches any block later, or at the
same time. So it does head after head, too, if all tiles visit as many rows, as under a window; and then what it visits
is visited again much sooner, while it is in the second-level cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringflash.kernels.hopper.compat import store_wait
from ringflash.kernels.hopper.dquery_accumulate import add_part, lay_down, parts_in_step
from ringflash.kernels.hopper.rings import allocate_full_and_empty

BLOCK_BY_BLOCK = gl.constexpr(1)
"""Orders in which a tile visits its blocks, from the last: for all heads of a group before the next,"""

HEAD_BY_HEAD = gl.constexpr(2)
"""or all blocks of a head before the next head's."""

PARTS = gl.constexpr(2)
"""Parts of a block of dQ, one for each consumer warpgroup, that are added in turns of their own."""

CACHED_BYTES = 40 * 2**20
"""Of the 50 MB of second-level cache, what the query rows may take that programs visit at the same time."""


def turns_of_tiles(tile_rows: Tensor, query_rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Turn of each key tile, and the first turn of each block of query rows.

    Tiles are numbered in ascending order, without those that no row sees: they add nothing and have no turn. So the
    visitors of a block have consecutive turns, from the block's first on: neither end of the rows that see a tile ever
    decreases, and so no tile between two visitors passes the block by.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        query_rows: number of query rows.
        block: rows of a block; blocks begin at its multiples.

    Returns:
        (tiles,) int32, -1 for tiles that no row sees; (blocks,) int32, any number for blocks without visitors.

    Example:
        >>> turns_of_tiles(torch.tensor([[0, 0, 2, 4], [4, 4, 4, 4], [3, 3, 8, 8]]), query_rows=8, block=4)
        (tensor([ 0, -1,  1], dtype=torch.int32), tensor([0, 1], dtype=torch.int32))
    """
    begin, end = tile_rows[:, 0], tile_rows[:, 3].contiguous()
    seen = end > begin
    seen_so_far = torch.nn.functional.pad(seen.cumsum(0, dtype=torch.int32), (1, 0))
    turns = torch.where(seen, seen_so_far[:-1], -1)
    first_rows = torch.arange(0, query_rows, block, dtype=end.dtype, device=end.device)
    return turns, seen_so_far[torch.searchsorted(end, first_rows, right=True)]


def heads_in_turn(tile_rows: Tensor, key_heads: int, row_bytes: int) -> Tensor:
    """Key heads to work on at a time, (1,) int32: a divisor of `key_heads`.

    The more heads the programs that run at a time are spread over, the fewer tiles of each head wait for one another.
    But the rows that they visit must stay in the second-level cache: twice the mean of all tiles, which under a causal
    mask is a document's length.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        key_heads: number of key heads.
        row_bytes: bytes of queries, out's gradient and dQ in a row, of the heads that a tile visits together: of one
            key head's group, or head by head of one.

    Example:
        >>> heads_in_turn(torch.tensor([[0, 0, 2, 4096], [2048, 4096, 4096, 4096]]), key_heads=12, row_bytes=1024)
        tensor([6], dtype=torch.int32)
    """
    rows = 2 * (tile_rows[:, 3] - tile_rows[:, 0]).float().mean()
    heads = torch.arange(1, key_heads + 1, dtype=torch.int32, device=tile_rows.device)
    fitting = (key_heads % heads == 0) & (heads * rows * row_bytes <= CACHED_BYTES)
    return torch.where(fitting, heads, 1).max().reshape(1)


class Turns(NamedTuple):
    """Whose turn it is, and how the consumers hand their parts of dQ to the warps that wait for it.

    now_ptr: the turn of (head, block, part). own: this program's, -1 if it adds nothing.
    """

    now_ptr: gl.tensor
    own: gl.tensor
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


@gluon.jit
def allocate_turns(now_ptr, own):
    """Turns with their barriers."""
    ready, free = allocate_full_and_empty(PARTS, 1)
    return Turns(now_ptr, own, ready, free)


@gluon.jit
def hand_over(turns, parts, part_of_dquery, use, PART: gl.constexpr):
    """Leave a part of dQ, the use-th of this warpgroup, to the warp that adds it."""
    mbarrier.wait(turns.free.index(PART), (use & 1) ^ 1)
    lay_down(parts.index(PART), part_of_dquery)
    fence_async_shared()
    mbarrier.arrive(turns.ready.index(PART), count=1)


@gluon.jit
def add_in_turn(
    turns, rows, dquery_desc, parts, queries, PART: gl.constexpr, GROUP: gl.constexpr, ORDERED: gl.constexpr
):  # fmt: skip
    """A warp that adds one warpgroup's parts of dQ to global memory, each when it is this program's turn."""
    M: gl.constexpr = queries.blocks.shape[1]
    D: gl.constexpr = queries.blocks.shape[2]
    PIECES: gl.constexpr = parts_in_step(D)
    blocks_of_head = (rows.query_rows + M - 1) // M
    part = parts.index(PART)
    block, member = first_block_and_member(rows, ORDERED)
    for step in range(rows.blocks * GROUP):
        row = rows.begin + block * M
        head = rows.first_head + member
        now_ptr = turns.now_ptr + (head * blocks_of_head + row // M) * PARTS + PART
        for piece in gl.static_range(PIECES):
            mbarrier.wait(turns.ready.index(PART), (step * PIECES + piece) & 1)
            if turns.own >= 0:
                if piece == 0:
                    wait_for_turn(now_ptr, turns.own)
                add_part(dquery_desc, part, row, head, D, PART, piece)
            store_wait(0)
            mbarrier.arrive(turns.free.index(PART), count=1)
        if turns.own >= 0:
            pass_turn(now_ptr)
        block, member = next_block_and_member(rows, block, member, GROUP, ORDERED)


@gluon.jit
def first_block_and_member(rows, ORDERED: gl.constexpr):
    """Block and member of the group that a program's first step is for."""
    block = 0
    if ORDERED:
        block = rows.blocks - 1
    return block, 0


@gluon.jit
def next_block_and_member(rows, block, member, GROUP: gl.constexpr, ORDERED: gl.constexpr):
    """Block and member of the next step: block after block, head after head; or an order that this file is about."""
    if ORDERED == BLOCK_BY_BLOCK:
        last = member + 1 == GROUP
        member = gl.where(last, 0, member + 1)
        block = gl.where(last, block - 1, block)
    elif ORDERED == HEAD_BY_HEAD:
        member = gl.where(block == 0, member + 1, member)
        block = gl.where(block == 0, rows.blocks, block) - 1
    else:
        last = block + 1 == rows.blocks
        member = gl.where(last, member + 1, member)
        block = gl.where(last, 0, block + 1)
    return block, member


@gluon.jit
def wait_for_turn(now_ptr, own):
    """Return when it is this program's turn, with all that the programs before have added in place.

    The tensor memory engine, which adds next, does not see what threads have waited for without the fence.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    address = gl.full([32], now_ptr.to(gl.int64), gl.int64, LANES)
    gl.inline_asm_elementwise(
        "{ .reg .pred early; .reg .s32 now; AGAIN: ld.acquire.gpu.global.s32 now, [$1]; setp.lt.s32 early, now, $2;"
        " @early bra AGAIN; fence.proxy.async.global; mov.b32 $0, now; }",
        "=r,l,r", [address, gl.full([32], own, gl.int32, LANES)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(now_ptr):
    """Make it the next program's turn, once all that this warp has added is in global memory."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 lane; cp.async.bulk.wait_group 0; fence.proxy.async.global; bar.warp.sync -1;"
        " elect.sync lane|one, -1; @one red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, 0; }",
        "=r,l", [gl.full([32], now_ptr.to(gl.int64), gl.int64, LANES)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
