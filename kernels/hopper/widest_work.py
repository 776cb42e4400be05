"""What the kernels for head dimension 512 share: who does what, what is loaded, and how 512 columns are summed.

A multiprocessor's registers hold the sums of 64 rows of 512 columns and not much beside. So a program owns 64 rows, of
queries or of keys, and walks over blocks of the other side's rows. One warpgroup computes the block's scores, and from
them weights or the scores' gradients, which it leaves in shared memory; two others multiply these with the block and
have half of the columns of the sums each; a warp each loads what the one and the others need. The tensor cores are
busy with the sums of one block while the scores of the next go through the softmax.

Legend: R owned rows, N rows of a block, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ringflash.kernels.hopper.blocks import block_columns, block_rows, head_place, load_block, store_block
from ringflash.kernels.hopper.compat import WARPGROUP, release, store_wait
from ringflash.kernels.hopper.fp32_rows import load_rows, store_rows
from ringflash.kernels.hopper.rings import allocate_full_and_empty
from ringflash.kernels.hopper.softmax import ROWS, rescale_if_needed


class Walk(NamedTuple):
    """Owned rows and the rows that a program visits for them, in `blocks` blocks from `begin` on for each of `members`.

    Members are heads: one where queries own, whose key head it is; where keys own all query heads of a group, from
    first_head on. Blocks within full_begin to full_end need no mask.
    """

    first_row: gl.tensor
    head: gl.tensor
    begin: gl.tensor
    blocks: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    first_head: gl.tensor
    members: gl.tensor


class Factors(NamedTuple):
    """What the scores' warpgroup leaves for the others: two tiles of factors in 16 bits, with barriers.

    scales: numbers for each row of a tile by which sums are multiplied before, and at the end.
    """

    tiles: gl.shared_memory_descriptor
    scales: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def walk_of_queries(start_ptr, stop_ptr, order_ptr, query_rows, tiles, GROUP: gl.constexpr, N: gl.constexpr):
    """Program = (key head, tile in `order`, query head of the group), the last fastest, as of the portable kernels."""
    program = gl.program_id(0)
    key_head = program // (GROUP * tiles)
    first_row = gl.load(order_ptr + program // GROUP % tiles) * ROWS
    last_row = gl.minimum(first_row + ROWS, query_rows) - 1
    begin, end = gl.load(start_ptr + first_row), gl.load(stop_ptr + last_row)
    full_begin, full_end = gl.load(start_ptr + last_row), gl.load(stop_ptr + first_row)
    blocks = gl.maximum((end - begin + N - 1) // N, 1)  # at least one, hidden if need be
    return Walk(first_row, key_head * GROUP + program % GROUP, begin, blocks, full_begin, full_end, key_head, 1)


@gluon.jit
def walk_of_keys(rows_of_tile_ptr, order_ptr, tiles, GROUP: gl.constexpr, N: gl.constexpr):
    """Program = (key head, tile in `order`), the last fastest; rows as of `KeyIntervals.key_tile_rows`."""
    key_head = gl.program_id(0) // tiles
    tile = gl.load(order_ptr + gl.program_id(0) % tiles)
    entry = rows_of_tile_ptr + tile * 4
    begin = gl.load(entry)
    blocks = gl.maximum((gl.load(entry + 3) - begin + N - 1) // N, 1)
    return Walk(
        tile * ROWS, key_head, begin, blocks, gl.load(entry + 1), gl.load(entry + 2), key_head * GROUP, GROUP
    )  # fmt: skip


@gluon.jit
def allocate_factors(dtype: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """Room for two tiles, each given back by two warpgroups."""
    tiles = gl.allocate_shared_memory(dtype, [2, ROWS, N], LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full, empty = allocate_full_and_empty(2, 2 * WARPGROUP)
    return Factors(tiles, scales, full, empty)


@gluon.jit
def place_in(step, STAGES: gl.constexpr):
    """Stage of a ring of any number of stages at a step, and its barriers' parity."""
    return step % STAGES, step // STAGES & 1


@gluon.jit
def fill(ring, desc, row, place, step, COLUMN: gl.constexpr = 0):
    """Load the rows from `row` on of the head at `place`, columns from COLUMN on, as soon as there is room."""
    stage, parity = place_in(step, ring.blocks.shape[0])
    mbarrier.wait(ring.empty.index(stage), parity ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes)
    load_block(desc, row, place, ring.full.index(stage), ring.blocks.index(stage), COLUMN)


@gluon.jit
def load_owned(walk, desc, owned, loaded, head_stride):
    """Load the owned rows."""
    mbarrier.expect(loaded, desc.block_type.nbytes)
    load_block(desc, walk.first_row, head_place(desc, walk.head, head_stride), loaded, owned)


@gluon.jit
def load_scored(walk, owned_desc, owned, loaded, owned_head_stride, desc, ring, head_stride, N: gl.constexpr):
    """A warp: the owned rows, then the blocks they are multiplied with, by pieces of their columns."""
    PIECES: gl.constexpr = block_columns(owned_desc) // block_columns(desc)
    load_owned(walk, owned_desc, owned, loaded, owned_head_stride)
    step = 0
    for member in range(walk.members):
        place = head_place(desc, walk.first_head + member, head_stride)
        for block in range(walk.blocks):
            for piece in gl.static_range(PIECES):
                row = walk.begin + block * N
                fill(ring, desc, row, place, step * PIECES + piece, piece * block_columns(desc))
            step += 1


@gluon.jit
def load_summed(walk, desc, left, right, head_stride, N: gl.constexpr):
    """A warp: the blocks that are summed, by pieces of their rows, each half of the columns for one warpgroup."""
    HEIGHT: gl.constexpr = block_rows(desc)
    step = 0
    for member in range(walk.members):
        place = head_place(desc, walk.first_head + member, head_stride)
        for block in range(walk.blocks):
            for piece in gl.static_range(N // HEIGHT):
                row = walk.begin + block * N + piece * HEIGHT
                fill(left, desc, row, place, step)
                fill(right, desc, row, place, step, block_columns(desc))
                step += 1


@gluon.jit
def multiply_pieces(owned, ring, step, no_scores):
    """Owned rows times a block's, which comes by pieces of its columns; they are given back as they are done with."""
    STAGES: gl.constexpr = ring.blocks.shape[0]
    WIDTH: gl.constexpr = ring.blocks.shape[2]
    PIECES: gl.constexpr = owned.shape[1] // WIDTH
    token = no_scores
    before = step  # stands for none
    for piece in gl.static_range(PIECES):
        stage, parity = place_in(step * PIECES + piece, STAGES)
        mbarrier.wait(ring.full.index(stage), parity)
        token = warpgroup_mma(
            owned.slice(piece * WIDTH, WIDTH, 1), ring.blocks.index(stage).permute((1, 0)), token,
            use_acc=piece > 0, is_async=True,
        )  # fmt: skip
        if piece > 0:
            token = warpgroup_mma_wait(1, deps=[token])
            release(ring.empty.index(before))
        before = stage
    scores = warpgroup_mma_wait(0, deps=[token])
    release(ring.empty.index(before))
    return scores


@gluon.jit
def hide(scores, walk, first, low, high):
    """-inf where an owned row, which sees rows low to high, does not see a row of the block from `first` on."""
    N: gl.constexpr = scores.shape[1]
    if (first < walk.full_begin) | (first + N > walk.full_end):
        index = first + gl.arange(0, N, gl.SliceLayout(0, scores.type.layout))[None, :]
        scores = gl.where((index >= low[:, None]) & (index < high[:, None]), scores, float("-inf"))
    return scores


@gluon.jit
def hand_over(factors, tile, step):
    """Leave a tile of factors for the warpgroups that sum."""
    slot, parity = step & 1, step >> 1 & 1
    mbarrier.wait(factors.empty.index(slot), parity ^ 1)
    factors.tiles.index(slot).store(tile)
    fence_async_shared()
    mbarrier.arrive(factors.full.index(slot), count=1)


@gluon.jit
def multiply_factors(factors, values, first, second, step, RESCALES: gl.constexpr):
    """A warpgroup's two sums with a step's factors times its columns of the block, which comes by pieces of its rows.

    Two products, as ptxas does not compile one of 256 columns where 512 threads share the registers.
    """
    STAGES: gl.constexpr = values.blocks.shape[0]
    HEIGHT: gl.constexpr = values.blocks.shape[1]
    HALF: gl.constexpr = values.blocks.shape[2] // 2
    PIECES: gl.constexpr = factors.tiles.shape[2] // HEIGHT
    slot, parity = step & 1, step >> 1 & 1
    mbarrier.wait(factors.full.index(slot), parity)
    if RESCALES:
        scale = factors.scales.index(slot).load(gl.SliceLayout(1, first.type.layout))
        first = rescale_if_needed(first, scale, HALF)
        second = rescale_if_needed(second, scale, HALF)
    tile = factors.tiles.index(slot)
    first_token, second_token = first, second
    before = step  # stands for none
    for piece in gl.static_range(PIECES):
        stage, parity = place_in(step * PIECES + piece, STAGES)
        mbarrier.wait(values.full.index(stage), parity)
        part = tile.slice(piece * HEIGHT, HEIGHT, 1)
        block = values.blocks.index(stage)
        first_token = warpgroup_mma(part, block.slice(0, HALF, 1), first_token, is_async=True)
        second_token = warpgroup_mma(part, block.slice(HALF, HALF, 1), second_token, is_async=True)
        if piece > 0:
            first_token, second_token = warpgroup_mma_wait(2, deps=[first_token, second_token])
            release(values.empty.index(before))
        before = stage
    first, second = warpgroup_mma_wait(0, deps=[first_token, second_token])
    release(values.empty.index(before))
    release(factors.empty.index(slot))
    return first, second


@gluon.jit
def load_carry(carry_ptr, walk, rows, heads, PART: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A warpgroup's two sums of owned rows in fp32."""
    QUARTER: gl.constexpr = WIDTH // 4
    column: gl.constexpr = PART * 2 * QUARTER
    first = load_rows(carry_ptr, walk.first_row, column, walk.head, rows, heads, WIDTH, QUARTER, LAYOUT)
    second = load_rows(carry_ptr, walk.first_row, column + QUARTER, walk.head, rows, heads, WIDTH, QUARTER, LAYOUT)
    return first, second


@gluon.jit
def store_sums(
    desc, ptr, staging, first, second, walk, rows, heads, PART: gl.constexpr, FLOAT_OUT: gl.constexpr
):  # fmt: skip
    """Store a warpgroup's two sums: in fp32 from registers, else through the place of the owned rows."""
    WIDTH: gl.constexpr = staging.shape[1]
    QUARTER: gl.constexpr = WIDTH // 4
    column: gl.constexpr = PART * 2 * QUARTER
    if FLOAT_OUT:
        store_rows(ptr, first, walk.first_row, column, walk.head, rows, heads, WIDTH)
        store_rows(ptr, second, walk.first_row, column + QUARTER, walk.head, rows, heads, WIDTH)
    else:
        staging.slice(column, QUARTER, 1).store(first.to(staging.dtype))
        staging.slice(column + QUARTER, QUARTER, 1).store(second.to(staging.dtype))
        fence_async_shared()
        half = staging.slice(column, 2 * QUARTER, 1)
        store_block(desc, walk.first_row, head_place(desc, walk.head, WIDTH), column, half)
        store_wait(0)  # shared memory must outlive the reading of it
