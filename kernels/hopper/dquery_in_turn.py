"""Adding to the query's gradient in a fixed order, so that it repeats bit for bit.

Each block of query rows is visited by a range of key tiles. In every block, and for every head, the tiles add in
ascending order: a number in global memory says whose turn it is, a tile waits for its own and passes it on once its sum
has arrived. Two extra warps of each program do that, one for each consumer warpgroup, so that waiting for a turn stops
no one who computes until the next part of the gradient is ready.

No program waits for ever, nor long: programs start in ascending order of tiles, so those that one waits for have
started. And tiles visit their blocks from the last, heads of a group innermost. As neither end of the visited range
decreases from tile to tile, a tile that starts together with the one before it then reaches any block later, or at the
same time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringflash.kernels.hopper.blocks import flat_layout
from ringflash.kernels.hopper.compat import reinterpret, store_wait
from ringflash.kernels.hopper.dquery_accumulate import (
    HALF,
    add_part,
    lay_down,
    load_part,
    parts_in_step,
    store_first_part,
    store_rounded_part,
)

BLOCK_BY_BLOCK = gl.constexpr(1)
"""Orders in which a tile visits its blocks, from the last: for all heads of a group before the next,"""

HEAD_BY_HEAD = gl.constexpr(2)
"""or all blocks of a head before the next head's."""

PARTS = gl.constexpr(2)
"""Parts of a block of dQ, one for each consumer warpgroup, that are added in turns of their own."""

CACHED_BYTES = 40 * 2**20
"""Of the 50 MB of second-level cache, what the query rows may take that programs visit at the same time."""


def turns_of_tiles(tile_rows: Tensor, query_rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Turn of each key tile, and the first and the last turn of each block of query rows.

    Tiles are numbered in ascending order, without those that no row sees: they add nothing and have no turn. So the
    visitors of a block have consecutive turns, from the block's first on: neither end of the rows that see a tile ever
    decreases, and so no tile between two visitors passes the block by.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        query_rows: number of query rows.
        block: rows of a block; blocks begin at its multiples.

    Returns:
        (tiles,) int32, -1 for tiles that no row sees; (blocks, 2) int32, the last turn below the first for blocks
        without visitors.

    Example:
        >>> turns, bounds = turns_of_tiles(torch.tensor([[0, 0, 2, 4], [4, 4, 4, 4], [3, 3, 8, 8]]), 8, block=4)
        >>> turns, bounds.tolist()
        (tensor([ 0, -1,  1], dtype=torch.int32), [[0, 1], [1, 1]])
    """
    begin, end = (tile_rows[:, column].contiguous() for column in (0, 3))
    seen = end > begin
    seen_so_far = torch.nn.functional.pad(seen.cumsum(0, dtype=torch.int32), (1, 0))
    turns = torch.where(seen, seen_so_far[:-1], -1)
    first_rows = torch.arange(0, query_rows, block, dtype=end.dtype, device=end.device)
    first = seen_so_far[torch.searchsorted(end, first_rows, right=True)]
    last = seen_so_far[torch.searchsorted(begin, first_rows + block)] - 1
    return turns, torch.stack([first, last], 1)


def ends_of_tiles(turns: Tensor, bounds: Tensor) -> Tensor:
    """Of each key tile, the blocks from which on its turn is the first, and in front of which it is the last.

    Args:
        turns: (tiles,), of `turns_of_tiles`.
        bounds: (blocks, 2), of `turns_of_tiles`.

    Returns:
        (tiles, 2) int32, any numbers for tiles without a turn.

    Example:
        >>> ends_of_tiles(torch.tensor([0, -1, 1]), torch.tensor([[0, 1], [1, 1]])).tolist()
        [[0, 0], [0, 0], [1, 2]]
    """
    first, last = (x.contiguous() for x in bounds.unbind(1))
    from_on, below = torch.searchsorted(first, turns), torch.searchsorted(last, turns, right=True)
    return torch.stack([from_on, below], 1).to(torch.int32)


def heads_in_turn(tile_rows: Tensor, key_heads: int, row_bytes: int) -> Tensor:
    """Key heads to work on at a time, (1,) int32: a divisor of `key_heads`.

    The more heads the programs that run at a time are spread over, the fewer tiles of each head wait for one another.
    But the rows that they visit must stay in the second-level cache: twice the mean of all tiles, which under a causal
    mask is a document's length.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        key_heads: number of key heads.
        row_bytes: bytes of queries, out's gradient and dQ in a row, of one key head's group.

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
    ready = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(PARTS):
        mbarrier.init(ready.index(part), count=1)
        mbarrier.init(free.index(part), count=1)
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


class Rounding(NamedTuple):
    """How a block of dQ is rounded by the program whose turn is the last.

    desc: of dQ in 16 bits. first_from: number of the block from which on this program's turn is the first in each.
    last_below: in front of this block it is the last. earlier: what the others have added up of each part, with
    barriers.
    """

    desc: gl.tensor
    first_from: gl.tensor
    last_below: gl.tensor
    earlier: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor


@gluon.jit
def allocate_rounding(desc, dquery_desc, ends_ptr, key_tile):
    """Rounding with its memory; ends as of `ends_of_tiles`."""
    earlier = gl.allocate_shared_memory(gl.float32, [PARTS, HALF, HALF], flat_layout(dquery_desc))
    loaded = gl.allocate_shared_memory(gl.int64, [PARTS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(PARTS):
        mbarrier.init(loaded.index(part), count=1)
    first_from, last_below = gl.load(ends_ptr + key_tile * 2), gl.load(ends_ptr + key_tile * 2 + 1)
    return Rounding(desc, first_from, last_below, earlier, loaded)


@gluon.jit
def add_and_round_in_turn(
    turns, rounding, rows, dquery_desc, parts, queries, PART: gl.constexpr, GROUP: gl.constexpr, ORDERED: gl.constexpr
):  # fmt: skip
    """As `add_in_turn`, but the first in a block stores, so that nothing has to be zero, and the last rounds the sum.

    Turns are awaited ahead of the part, and passed on behind the next, by when the sum has arrived.
    """
    M: gl.constexpr = queries.blocks.shape[1]
    D: gl.constexpr = queries.blocks.shape[2]
    gl.static_assert(parts_in_step(D) == 1)
    blocks_of_head = (rows.query_rows + M - 1) // M
    part, earlier, loaded = parts.index(PART), rounding.earlier.index(PART), rounding.loaded.index(PART)
    blocks = reinterpret(earlier, rounding.desc.dtype, [4, HALF, HALF // 2], flat_layout(rounding.desc))
    adds = turns.own >= 0
    loads = 0
    before_ptr, passes = turns.now_ptr, turns.own < -1  # false
    block, member = first_block_and_member(rows, ORDERED)
    for step in range(rows.blocks * GROUP):
        row = rows.begin + block * M
        head = rows.first_head + member
        number = row // M
        now_ptr = turns.now_ptr + (head * blocks_of_head + number) * PARTS + PART
        is_last = adds & (number < rounding.last_below)
        is_first = number >= rounding.first_from
        if adds & (number < rounding.first_from):
            wait_for_turn(now_ptr, turns.own)
            if is_last:
                load_part(dquery_desc, earlier, row, head, loaded, D, PART)
        mbarrier.wait(turns.ready.index(PART), step & 1)
        if is_last:
            if number < rounding.first_from:
                mbarrier.wait(loaded, loads & 1)
                loads += 1
            round_sum(part, earlier, is_first, rounding.desc.dtype)
            fence_async_shared()
            mbarrier.arrive(turns.free.index(PART), count=1)
            if passes:
                pass_turn(before_ptr)
            store_rounded_part(rounding.desc, blocks, row, head, D, PART)
            store_wait(0)
        else:
            if adds:
                if is_first:
                    store_first_part(dquery_desc, part, row, head, D, PART)
                else:
                    add_part(dquery_desc, part, row, head, D, PART, 0)
            store_wait(0)
            mbarrier.arrive(turns.free.index(PART), count=1)
            if passes:
                pass_turn_before(before_ptr)
        before_ptr, passes = now_ptr, adds & (number >= rounding.last_below)
        block, member = next_block_and_member(rows, block, member, GROUP, ORDERED)
    if passes:
        pass_turn(before_ptr)


@gluon.jit
def round_sum(part, earlier, is_alone, dtype: gl.constexpr):
    """One warp: part and what was added before it, unless it is alone, in 16 bits where the latter lay."""
    SLICE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [1, 1], [1, 0])
    FLOATS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    ROUNDED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    # As many rows of 32 columns, first those of the first columns: so both lie in memory.
    own = reinterpret(part, gl.float32, [16, 8, HALF // 2], FLOATS)
    before = reinterpret(earlier, gl.float32, [16, 8, HALF // 2], FLOATS)
    rounded = reinterpret(earlier, dtype, [32, 8, HALF // 2], ROUNDED)
    if is_alone:
        for i in range(16):
            rounded.index(i).store(own.index(i).load(SLICE).to(dtype))
    else:
        for i in range(16):
            rounded.index(i).store((own.index(i).load(SLICE) + before.index(i).load(SLICE)).to(dtype))


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
def pass_turn_before(now_ptr):
    """As `pass_turn`, but of the part before the one that was added last."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 lane; cp.async.bulk.wait_group 1; fence.proxy.async.global; bar.warp.sync -1;"
        " elect.sync lane|one, -1; @one red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, 0; }",
        "=r,l", [gl.full([32], now_ptr.to(gl.int64), gl.int64, LANES)], dtype=gl.int32, is_pure=False, pack=1,
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
