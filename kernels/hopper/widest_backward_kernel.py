"""Backward kernels for head dimension 512; see widest_work for how their warps share the work.

Only one gradient's sums fit in registers, so each has a launch of its own, which computes scores anew: 8 products
instead of 5, but no atomics, and gradients repeat bit for bit. With keys as rows where keys own the sums,

    scores = K Q^T    weights = exp2(scale * scores - lse)                                     dV += weights dO
    dweights = V dO^T    dscores = weights * (dweights - delta)                                dK += dscores Q

and with queries as rows likewise dQ += dscores K. The latter two are the same kernel with other operands.
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

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_kernel import rows_seeing
from ringflash.kernels.hopper.backward_work import unseen_zero
from ringflash.kernels.hopper.blocks import block_columns, block_rows, flat_layout, head_place
from ringflash.kernels.hopper.compat import release
from ringflash.kernels.hopper.rings import allocate_barriers, allocate_ring
from ringflash.kernels.hopper.softmax import LOG2_E, ROWS
from ringflash.kernels.hopper.widest_work import (
    allocate_factors,
    fill,
    hand_over,
    hide,
    load_carry,
    load_owned,
    load_scored,
    load_summed,
    multiply_factors,
    multiply_pieces,
    place_in,
    store_sums,
    walk_of_keys,
    walk_of_queries,
)


class Gradient(NamedTuple):
    """Where the gradient of owned rows goes, of which there are so many, and where a carry comes from."""

    desc: gl.tensor
    ptr: gl.tensor
    carry_ptr: gl.tensor
    rows: gl.tensor
    heads: gl.tensor


class Seen(NamedTuple):
    """Which rows an owned row sees: from begin_ptr to end_ptr of queries; where keys own, which rows see it."""

    begin_ptr: gl.tensor
    end_ptr: gl.tensor
    rows_of_key_ptr: gl.tensor


class Numbers(NamedTuple):
    """Log-sum-exp and delta of query rows, (H, T)."""

    lse_ptr: gl.tensor
    delta_ptr: gl.tensor
    query_rows: gl.tensor


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "key_rows", "tiles", "key_heads", "query_head_stride", "dout_head_stride", "key_head_stride",
    ]
)  # fmt: skip
def dvalue_widest_kernel(
    key_desc, query_desc, dout_desc, dvalue_desc, dvalue_ptr, lse_ptr, rows_of_key_ptr, rows_of_tile_ptr, order_ptr,
    query_rows, key_rows, tiles, key_heads, query_head_stride, dout_head_stride, key_head_stride, scale,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr,
    FLOAT_OUT: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `widest.PreparedBackward` for the arguments. Queries come by pieces of columns, dout of rows."""
    D: gl.constexpr = block_columns(key_desc)
    N: gl.constexpr = block_rows(query_desc)
    # Swizzled so that pieces of the weights' columns are blocks of their own.
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=2 * block_rows(dout_desc), element_bitwidth=16, rank=2
    )
    key = gl.allocate_shared_memory(key_desc.dtype, [ROWS, D], flat_layout(key_desc))
    loaded = allocate_barriers(1)
    queries = allocate_ring(query_desc, QUERY_STAGES, 1)
    left_douts = allocate_ring(dout_desc, DOUT_STAGES, 1)
    right_douts = allocate_ring(dout_desc, DOUT_STAGES, 1)
    weights = allocate_factors(key_desc.dtype, N, WEIGHTS)
    fence_async_shared()
    walk = walk_of_keys(rows_of_tile_ptr, order_ptr, tiles, GROUP, N)
    gradient = Gradient(dvalue_desc, dvalue_ptr, None, key_rows, key_heads)
    numbers = Numbers(lse_ptr, None, query_rows)
    gl.warp_specialize(
        [
            (sum_dvalue, (walk, gradient, key, weights, left_douts, 0, FLOAT_OUT)),
            (sum_dvalue, (walk, gradient, key, weights, right_douts, 1, FLOAT_OUT)),
            (weigh_again, (walk, numbers, key_rows, key, loaded, queries, weights, rows_of_key_ptr, scale)),
            (load_scored, (walk, key_desc, key, loaded.index(0), key_head_stride, query_desc, queries,
                           query_head_stride, N)),
            (load_summed, (walk, dout_desc, left_douts, right_douts, dout_head_stride, N)),
        ],
        [4, 4, 1, 1],
        [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2]],
    )  # fmt: skip


@gluon.jit
def weigh_again(walk, numbers, key_rows, key, loaded, queries, weights, rows_of_key_ptr, scale):
    """A warpgroup: scores with keys as rows, and their weights."""
    N: gl.constexpr = queries.blocks.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    key_index = walk.first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    low, high = rows_seeing(rows_of_key_ptr, key_index, key_rows)
    no_scores = gl.zeros([ROWS, N], gl.float32, SCORES)
    mbarrier.wait(loaded.index(0), 0)
    step = 0
    for member in range(walk.members):
        for block in range(walk.blocks):
            first = walk.begin + block * N
            index = first + gl.arange(0, N, gl.SliceLayout(0, SCORES))
            lse = load_lse(numbers, walk.first_head + member, index)
            scores = multiply_pieces(key, queries, step, no_scores)
            scores = hide(scores, walk, first, low, high)
            tile = gl.exp2(scores * (scale * LOG2_E) - lse[None, :])
            hand_over(weights, tile.to(key.dtype), step)
            step += 1


@gluon.jit
def load_lse(numbers, head, row):
    """Log-sum-exp of query rows in base 2; inf where they see no key or do not exist, so that no weight is left."""
    inside = row < numbers.query_rows
    lse = gl.load(numbers.lse_ptr + head * numbers.query_rows + row, mask=inside, other=float("-inf"))
    return gl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@gluon.jit
def load_delta(numbers, head, row):
    """Delta of query rows."""
    return gl.load(numbers.delta_ptr + head * numbers.query_rows + row, mask=row < numbers.query_rows, other=0.0)


@gluon.jit
def sum_dvalue(walk, gradient, key, weights, douts, PART: gl.constexpr, FLOAT_OUT: gl.constexpr):
    """A warpgroup: half of the columns of weights times dout."""
    D: gl.constexpr = key.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 4, 16])
    first = gl.zeros([ROWS, D // 4], gl.float32, SUMS)
    second = first
    for step in range(walk.blocks * walk.members):
        first, second = multiply_factors(weights, douts, first, second, step, False)
    store_sums(
        gradient.desc, gradient.ptr, key, first, second, walk, gradient.rows, gradient.heads, PART, FLOAT_OUT
    )  # fmt: skip


@compiled_once
@gluon.jit(
    do_not_specialize=[
        "query_rows", "owned_rows", "tiles", "owned_heads",
        "owned_head_stride", "other_owned_head_stride", "block_head_stride", "other_head_stride",
    ]
)  # fmt: skip
def dscores_widest_kernel(
    owned_desc, other_owned_desc, block_desc, other_desc, gradient_desc, gradient_ptr, carry_ptr, lse_ptr, delta_ptr,
    start_ptr, stop_ptr, rows_of_key_ptr, rows_of_tile_ptr, order_ptr,
    query_rows, owned_rows, tiles, owned_heads,
    owned_head_stride, other_owned_head_stride, block_head_stride, other_head_stride, scale,
    GROUP: gl.constexpr, STAGES: gl.constexpr, OTHER_STAGES: gl.constexpr, FLOAT_OUT: gl.constexpr,
    OWNS_KEYS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradient of queries, or of keys if they own: see `widest.PreparedBackward` for the arguments.

    Owned are queries and dout, visited are keys and values; or owned are keys and values, visited queries and dout.
    """
    D: gl.constexpr = block_columns(owned_desc)
    N: gl.constexpr = block_rows(block_desc)
    both_owned = gl.allocate_shared_memory(owned_desc.dtype, [2, ROWS, D], flat_layout(owned_desc))
    owned, other_owned = both_owned.index(0), both_owned.index(1)
    loaded = allocate_barriers(2)
    blocks = allocate_ring(block_desc, STAGES, 3)
    others = allocate_ring(other_desc, OTHER_STAGES, 1)
    FACTORS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, N], owned_desc.dtype)
    dscores = allocate_factors(owned_desc.dtype, N, FACTORS)
    fence_async_shared()
    if OWNS_KEYS:
        walk = walk_of_keys(rows_of_tile_ptr, order_ptr, tiles, GROUP, N)
    else:
        walk = walk_of_queries(start_ptr, stop_ptr, order_ptr, query_rows, tiles, GROUP, N)
    gradient = Gradient(gradient_desc, gradient_ptr, carry_ptr, owned_rows, owned_heads)
    numbers = Numbers(lse_ptr, delta_ptr, query_rows)
    seen = Seen(start_ptr, stop_ptr, rows_of_key_ptr)
    gl.warp_specialize(
        [
            (sum_gradient, (walk, gradient, owned, dscores, blocks, scale, 0, FLOAT_OUT)),
            (sum_gradient, (walk, gradient, owned, dscores, blocks, scale, 1, FLOAT_OUT)),
            (differentiate, (walk, numbers, seen, owned_rows, both_owned, loaded, blocks, others, dscores,
                             scale, OWNS_KEYS)),
            (load_blocks, (walk, owned_desc, owned, loaded.index(0), owned_head_stride, block_desc, blocks,
                           block_head_stride)),
            (load_scored, (walk, other_owned_desc, other_owned, loaded.index(1), other_owned_head_stride, other_desc,
                           others, other_head_stride, N)),
        ],
        [4, 4, 1, 1],
        [REGISTERS[0], REGISTERS[1], REGISTERS[2], REGISTERS[2]],
    )  # fmt: skip


@gluon.jit
def load_blocks(walk, owned_desc, owned, loaded, owned_head_stride, desc, blocks, head_stride):
    """A warp: the owned rows, then whole blocks, which are used for scores and for the sums."""
    load_owned(walk, owned_desc, owned, loaded, owned_head_stride)
    step = 0
    for member in range(walk.members):
        place = head_place(desc, walk.first_head + member, head_stride)
        for block in range(walk.blocks):
            fill(blocks, desc, walk.begin + block * block_rows(desc), place, step)
            step += 1


@gluon.jit
def differentiate(
    walk, numbers, seen, owned_rows, both_owned, loaded, blocks, others, dscores, scale,
    OWNS_KEYS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: scores, and their gradients under the next block's products."""
    N: gl.constexpr = blocks.blocks.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    row = walk.first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    if OWNS_KEYS:
        low, high = rows_seeing(seen.rows_of_key_ptr, row, owned_rows)
    else:
        low = gl.load(seen.begin_ptr + row, mask=row < owned_rows, other=0)
        high = gl.load(seen.end_ptr + row, mask=row < owned_rows, other=0)
        lse, delta = load_lse(numbers, walk.head, row)[:, None], load_delta(numbers, walk.head, row)[:, None]
    no_scores = gl.zeros([ROWS, N], gl.float32, SCORES)
    for i in gl.static_range(2):
        mbarrier.wait(loaded.index(i), 0)
    scores_token, token = start_most(both_owned, 0, blocks, others, 0, True, no_scores)
    scores, dweights = finish(both_owned, 0, blocks, others, 0, True, scores_token, token)
    steps = walk.blocks * walk.members
    block, member = 0, 0
    for step in range(steps):
        first = walk.begin + block * N
        if OWNS_KEYS:
            index = first + gl.arange(0, N, gl.SliceLayout(0, SCORES))
            head = walk.first_head + member
            lse, delta = load_lse(numbers, head, index)[None, :], load_delta(numbers, head, index)[None, :]
        # The last step has no next one: its products are of old rows and unused.
        more = step + 1 < steps
        scores_token, token = start_most(both_owned, unseen_zero(first), blocks, others, step + 1, more, no_scores)
        scores = hide(scores, walk, first, low, high)
        weights = gl.exp2(scores * (scale * LOG2_E) - lse)
        hand_over(dscores, (weights * (dweights - delta)).to(both_owned.dtype), step)
        scores, dweights = finish(both_owned, unseen_zero(first), blocks, others, step + 1, more, scores_token, token)
        last = block + 1 == walk.blocks
        member = gl.where(last, member + 1, member)
        block = gl.where(last, 0, block + 1)


@gluon.jit
def start_most(both_owned, zero, blocks, others, step, more, no_scores):
    """A block's products but for the last piece of one, which there is no room for yet.

    The scores come last, and are under way when this returns: meanwhile that piece is loaded where the first one was.
    """
    owned, other_owned = both_owned.index(zero), both_owned.index(zero + 1)
    STAGES: gl.constexpr = others.blocks.shape[0]
    WIDTH: gl.constexpr = others.blocks.shape[2]
    PIECES: gl.constexpr = owned.shape[1] // WIDTH
    token = no_scores
    before = step  # stands for none
    for piece in gl.static_range(PIECES - 1):
        stage, parity = place_in(step * PIECES + piece, STAGES)
        mbarrier.wait(others.full.index(stage), parity, pred=more)
        token = warpgroup_mma(
            other_owned.slice(piece * WIDTH, WIDTH, 1), others.blocks.index(stage).permute((1, 0)), token,
            use_acc=piece > 0, is_async=True,
        )  # fmt: skip
        if piece > 0:
            token = warpgroup_mma_wait(1, deps=[token])
            release(others.empty.index(before))
        before = stage
    stage, parity = place_in(step, blocks.blocks.shape[0])
    mbarrier.wait(blocks.full.index(stage), parity, pred=more)
    scores_token = warpgroup_mma(
        owned, blocks.blocks.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
    )
    return scores_token, token


@gluon.jit
def finish(both_owned, zero, blocks, others, step, more, scores_token, token):
    """The products that `start_most` has left under way, with the last piece."""
    other_owned = both_owned.index(zero + 1)
    STAGES: gl.constexpr = others.blocks.shape[0]
    WIDTH: gl.constexpr = others.blocks.shape[2]
    PIECES: gl.constexpr = other_owned.shape[1] // WIDTH
    token = warpgroup_mma_wait(1, deps=[token])
    release(others.empty.index(place_in(step * PIECES + PIECES - 2, STAGES)[0]))
    stage, parity = place_in(step * PIECES + PIECES - 1, STAGES)
    mbarrier.wait(others.full.index(stage), parity, pred=more)
    token = warpgroup_mma(
        other_owned.slice((PIECES - 1) * WIDTH, WIDTH, 1), others.blocks.index(stage).permute((1, 0)), token,
        is_async=True,
    )  # fmt: skip
    scores, dweights = warpgroup_mma_wait(0, deps=[scores_token, token])
    release(others.empty.index(stage))
    release(blocks.empty.index(place_in(step, blocks.blocks.shape[0])[0]))
    return scores, dweights


@gluon.jit
def sum_gradient(walk, gradient, owned, dscores, blocks, scale, PART: gl.constexpr, FLOAT_OUT: gl.constexpr):
    """A warpgroup: half of the columns of dscores times blocks."""
    D: gl.constexpr = owned.shape[1]
    STAGES: gl.constexpr = blocks.blocks.shape[0]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // 4, 16])
    first = gl.zeros([ROWS, D // 4], gl.float32, SUMS)
    second = first
    if gradient.carry_ptr is not None:
        first, second = load_carry(gradient.carry_ptr, walk, gradient.rows, gradient.heads, PART, D, SUMS)
        first, second = first / scale, second / scale
    for step in range(walk.blocks * walk.members):
        slot, parity = step & 1, step >> 1 & 1
        mbarrier.wait(dscores.full.index(slot), parity)
        stage, parity = place_in(step, STAGES)
        mbarrier.wait(blocks.full.index(stage), parity)
        tile, block = dscores.tiles.index(slot), blocks.blocks.index(stage)
        first_token = warpgroup_mma(tile, block.slice(PART * (D // 2), D // 4, 1), first, is_async=True)
        second_token = warpgroup_mma(tile, block.slice(PART * (D // 2) + D // 4, D // 4, 1), second, is_async=True)
        first, second = warpgroup_mma_wait(0, deps=[first_token, second_token])
        release(blocks.empty.index(stage))
        release(dscores.empty.index(slot))
    store_sums(
        gradient.desc, gradient.ptr, owned, first * scale, second * scale, walk, gradient.rows, gradient.heads,
        PART, FLOAT_OUT,
    )  # fmt: skip
