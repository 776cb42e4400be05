"""Backward kernel for rows that see few keys: all gradients in one pass over query rows.

A program owns blocks of keys that follow each other, of one key head, and walks along the tiles of query rows that see
them. Three warpgroups have a block of keys each, and with it the sums of its gradients. Once no row ahead sees a block,
its warpgroup writes these and takes the third block from there. So queries, dout and out are read once, by the tensor
memory engine, and what leaves is rounded once and repeats bit for bit; only tiles that see blocks of two programs
are taken by both.

    scores  = K Q^T            weights = exp2(scale * scores - lse)        dV += weights dO
    dweights = V dO^T - delta  dscores = weights * dweights                dK += dscores Q

Dscores pass through shared memory to the warpgroup whose turn it is, which makes of all three the tile's gradient of
query. Two more warps find delta. A tile sees three blocks of keys at most, see `narrow.walks`.

Legend: M query rows of a tile, N key rows of a block, D head dimension.
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
from ringflash.kernels.hopper.backward_kernel import rows_seeing, store_float
from ringflash.kernels.hopper.compat import WARPGROUP, reinterpret, release, store_wait
from ringflash.kernels.hopper.narrow_kernels import ROWS, allocate_barriers, allocate_rows, load_box, store_box
from ringflash.kernels.hopper.schedule import stage_and_parity
from ringflash.kernels.hopper.softmax import LOG2_E

CONSUMERS = gl.constexpr(3)
"""Warpgroups, and blocks of keys that a tile sees at most."""

STAGES = gl.constexpr(4)
"""Tiles of query rows on their way; a power of two, as is the next."""

SLOTS = gl.constexpr(4)
"""Blocks of keys in shared memory."""


PIECES = gl.constexpr(4)
"""In which delta of a tile is found."""


class Walk(NamedTuple):
    """What a program works on.

    Blocks of keys are first_block and those behind it: `owned` of them are its own, `loaded` are seen by its tiles. Of
    its `steps`, each for a tile and some heads of the group, those from `finding` on are for the gradient of query.
    """

    key_head: gl.tensor
    first_block: gl.tensor
    owned: gl.tensor
    loaded: gl.tensor
    first_tile: gl.tensor
    finding: gl.tensor
    steps: gl.tensor


class Memory(NamedTuple):
    """Shared memory and its barriers.

    Of `numbers` each stage has two rows, for lse and delta. Of dscores each parity of a step has a block for each
    warpgroup.
    """

    queries: gl.shared_memory_descriptor
    douts: gl.shared_memory_descriptor
    outs: gl.shared_memory_descriptor
    numbers: gl.shared_memory_descriptor
    key_blocks: gl.shared_memory_descriptor
    value_blocks: gl.shared_memory_descriptor
    dscores: gl.shared_memory_descriptor
    rows_full: gl.shared_memory_descriptor
    rows_empty: gl.shared_memory_descriptor
    numbers_full: gl.shared_memory_descriptor
    keys_full: gl.shared_memory_descriptor
    keys_empty: gl.shared_memory_descriptor
    dscores_full: gl.shared_memory_descriptor
    dscores_empty: gl.shared_memory_descriptor


class Bounds(NamedTuple):
    """Rows and keys that see each other: see `narrow.PreparedNarrowWalk`."""

    start_ptr: gl.tensor
    ends_ptr: gl.tensor
    rows_of_key_ptr: gl.tensor
    rows_of_tile_ptr: gl.tensor
    tokens: gl.tensor
    key_rows: gl.tensor
    key_heads: gl.tensor


@compiled_once
@gluon.jit(do_not_specialize=["tokens", "key_rows", "key_heads", "span"])
def backward_narrow_kernel(
    query_desc, dout_desc, out_desc, key_desc, value_desc, dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr,
    lse_ptr, dlse_ptr, delta_ptr, start_ptr, stop_ptr, ends_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    tokens, key_rows, key_heads, span, scale, scale_log2,
    GROUP: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Program = (span blocks of keys, key head), the latter fastest."""
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    PACK: gl.constexpr = query_desc.block_type.shape[1]
    N: gl.constexpr = key_desc.block_type.shape[1]
    PACKS: gl.constexpr = GROUP // PACK
    bounds = Bounds(start_ptr, ends_ptr, rows_of_key_ptr, rows_of_tile_ptr, tokens, key_rows, key_heads)
    walk = find_walk(bounds, stop_ptr, span, TOKENS, N, PACKS)
    queries, douts = allocate_rows(query_desc, ROWS, STAGES), allocate_rows(dout_desc, ROWS, STAGES)
    outs = allocate_rows(query_desc, ROWS, STAGES)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES * 2, ROWS], NUMBERS)
    keys, values = allocate_rows(key_desc, N, SLOTS), allocate_rows(value_desc, N, SLOTS)
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, ROWS], query_desc.dtype)
    dscores = gl.allocate_shared_memory(query_desc.dtype, [2 * CONSUMERS, N, ROWS], DSCORES)
    memory = Memory(
        queries, douts, outs, numbers, keys, values, dscores,
        allocate_barriers(STAGES), allocate_counting(STAGES, CONSUMERS * WARPGROUP), allocate_barriers(STAGES),
        allocate_barriers(SLOTS), allocate_counting(SLOTS, WARPGROUP),
        allocate_counting(2, CONSUMERS), allocate_counting(2, WARPGROUP),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (walk, bounds, memory, dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr,
                       scale, scale_log2, 0, PACKS, DIM)),
            (consume, (walk, bounds, memory, dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr,
                       scale, scale_log2, 1, PACKS, DIM)),
            (consume, (walk, bounds, memory, dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr,
                       scale, scale_log2, 2, PACKS, DIM)),
            (load_tiles, (walk, memory, query_desc, dout_desc, out_desc, PACKS)),
            (load_keys, (walk, memory, key_desc, value_desc)),
            (find_numbers, (walk, memory, lse_ptr, dlse_ptr, delta_ptr, tokens, TOKENS, PACK, PACKS,
                            out_desc is not None)),
        ],
        [4, 4, 1, 1, 2],
        [160, 160, 32, 32, 32],
    )  # fmt: skip


@gluon.jit
def allocate_counting(count: gl.constexpr, arrivals: gl.constexpr):
    """Barriers at which so many arrivals count."""
    barriers = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def find_walk(bounds, stop_ptr, span, TOKENS: gl.constexpr, N: gl.constexpr, PACKS: gl.constexpr):
    """This program's work: tiles from the first that sees an own block to the last.

    The gradient of query is found of those that see no block in front of the own ones; and of tiles without any keys by
    somebody, too.
    """
    key_head = gl.program_id(0) % bounds.key_heads
    first_block = gl.program_id(0) // bounds.key_heads * span
    blocks = (bounds.key_rows + N - 1) // N
    owned = gl.minimum(span, blocks - first_block)
    tiles = (bounds.tokens + TOKENS - 1) // TOKENS
    before = gl.load(bounds.ends_ptr + gl.maximum(first_block - 1, 0))
    finding = gl.where(first_block == 0, 0, (before + TOKENS - 1) // TOKENS)
    end = (gl.load(bounds.ends_ptr + first_block + owned - 1) + TOKENS - 1) // TOKENS
    end = gl.where(first_block + owned == blocks, tiles, end)
    first_tile = gl.minimum(gl.load(bounds.rows_of_tile_ptr + first_block * 4) // TOKENS, finding)
    last_stop = gl.load(stop_ptr + gl.maximum(gl.minimum(end * TOKENS, bounds.tokens), 1) - 1)
    loaded = gl.minimum(gl.maximum((last_stop + N - 1) // N, first_block), blocks) - first_block
    loaded = gl.where(end > first_tile, loaded, 0)
    return Walk(
        key_head, first_block, owned, loaded, first_tile, (finding - first_tile) * PACKS, (end - first_tile) * PACKS
    )


@gluon.jit
def load_tiles(walk, memory, query_desc, dout_desc, out_desc, PACKS: gl.constexpr):
    """A warp that loads tiles of query rows."""
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    PACK: gl.constexpr = query_desc.block_type.shape[1]
    BYTES: gl.constexpr = query_desc.block_type.nbytes * (2 if out_desc is None else 3)
    for step in range(walk.steps):
        stage, parity = stage_and_parity(step, STAGES)
        token, pack = (walk.first_tile + step // PACKS) * TOKENS, walk.key_head * PACKS + step % PACKS
        full = memory.rows_full.index(stage)
        mbarrier.wait(memory.rows_empty.index(stage), parity ^ 1)
        mbarrier.expect(full, BYTES)
        load_box(query_desc, token, pack * PACK, full, memory.queries.index(stage))
        load_box(dout_desc, token, pack * PACK, full, memory.douts.index(stage))
        if out_desc is not None:
            load_box(out_desc, token, pack * PACK, full, memory.outs.index(stage))


@gluon.jit
def load_keys(walk, memory, key_desc, value_desc):
    """A warp that loads blocks of keys and of values."""
    N: gl.constexpr = key_desc.block_type.shape[1]
    for block in range(walk.loaded):
        slot, parity = stage_and_parity(block, SLOTS)
        full = memory.keys_full.index(slot)
        mbarrier.wait(memory.keys_empty.index(slot), parity ^ 1)
        mbarrier.expect(full, key_desc.block_type.nbytes + value_desc.block_type.nbytes)
        load_box(key_desc, walk.key_head, (walk.first_block + block) * N, full, memory.key_blocks.index(slot))
        load_box(value_desc, walk.key_head, (walk.first_block + block) * N, full, memory.value_blocks.index(slot))


@gluon.jit
def find_numbers(
    walk, memory, lse_ptr, dlse_ptr, delta_ptr, tokens,
    TOKENS: gl.constexpr, PACK: gl.constexpr, PACKS: gl.constexpr, FINDS_DELTA: gl.constexpr,
):  # fmt: skip
    """Two warps that lay down each tile's lse, with factor log2 e, and delta."""
    D: gl.constexpr = memory.douts.shape[2]
    dtype: gl.constexpr = memory.douts.dtype
    EACH: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    PIECE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0])
    pieces = reinterpret(memory.numbers, gl.float32, [STAGES * 2 * PIECES, ROWS // PIECES], memory.numbers.layout)
    next_place, next_inside = places_of_rows(walk, 0, tokens, TOKENS, PACK, PACKS, EACH)
    next_lse = gl.load(lse_ptr + next_place, mask=next_inside, other=0.0)
    for step in range(walk.steps):
        stage, parity = stage_and_parity(step, STAGES)
        place, inside, lse = next_place, next_inside, next_lse * LOG2_E
        lse = gl.where(lse == float("-inf"), float("inf"), lse)  # rows without keys: no weight is left
        change = lse  # stands for none
        if not FINDS_DELTA:
            change = gl.load(delta_ptr + place, mask=inside, other=0.0)
        elif dlse_ptr is not None:
            change = gl.load(dlse_ptr + place, mask=inside, other=0.0)
        next_place, next_inside = places_of_rows(walk, step + 1, tokens, TOKENS, PACK, PACKS, EACH)
        next_lse = gl.load(lse_ptr + next_place, mask=next_inside, other=0.0)
        mbarrier.wait(memory.rows_full.index(stage), parity)
        memory.numbers.index(stage * 2).store(lse)
        if FINDS_DELTA:
            dout = reinterpret(memory.douts.index(stage), dtype, [PIECES, ROWS // PIECES, D], memory.douts.layout)
            out = reinterpret(memory.outs.index(stage), dtype, [PIECES, ROWS // PIECES, D], memory.outs.layout)
            for i in gl.static_range(PIECES):
                product = dout.index(i).load(PIECE).to(gl.float32) * out.index(i).load(PIECE).to(gl.float32)
                pieces.index((stage * 2 + 1) * PIECES + i).store(gl.sum(product, 1))
            delta = memory.numbers.index(stage * 2 + 1).load(EACH)
            if dlse_ptr is not None:
                delta -= change
                memory.numbers.index(stage * 2 + 1).store(delta)
            gl.store(delta_ptr + place, delta, mask=inside)
        else:
            memory.numbers.index(stage * 2 + 1).store(change)
        mbarrier.arrive(memory.numbers_full.index(stage), count=1)


@gluon.jit
def places_of_rows(
    walk, step, tokens, TOKENS: gl.constexpr, PACK: gl.constexpr, PACKS: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Where a step's rows are in an (H, T) tensor, and which of them are."""
    row = gl.arange(0, ROWS, LAYOUT)
    own = (walk.first_tile + step // PACKS) * TOKENS + row // PACK
    head = (walk.key_head * PACKS + step % PACKS) * PACK + row % PACK
    return head.to(gl.int64) * tokens + own, own < tokens


@gluon.jit
def consume(
    walk, bounds, memory, dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, scale, scale_log2,
    PART: gl.constexpr, PACKS: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """A warpgroup: blocks PART, PART + 3 and so on."""
    TOKENS: gl.constexpr = dquery_desc.block_type.shape[0]
    PACK: gl.constexpr = dquery_desc.block_type.shape[1]
    N: gl.constexpr = memory.key_blocks.shape[1]
    D: gl.constexpr = memory.key_blocks.shape[2]
    dtype: gl.constexpr = memory.key_blocks.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)

    nothing = gl.zeros([N, ROWS], gl.float32, SCORES)
    no_sums = gl.zeros([N, D], gl.float32, SUMS)
    at = 0
    kept = -1  # stage whose place in shared memory a gradient of query may still be leaving from
    own_blocks = gl.maximum(walk.loaded - PART + CONSUMERS - 1, 0) // CONSUMERS
    for number in range(own_blocks + 1):  # behind the last the tiles that are left
        block = PART + number * CONSUMERS
        is_real = block < walk.loaded
        slot, parity_of_slot = stage_and_parity(block, SLOTS)
        entry = bounds.rows_of_tile_ptr + (walk.first_block + block) * 4
        begin = gl.load(entry, mask=is_real, other=0)
        full_begin = gl.load(entry + 1, mask=is_real, other=0)
        full_end = gl.load(entry + 2, mask=is_real, other=0)
        end = gl.load(bounds.ends_ptr + walk.first_block + block, mask=is_real, other=0)
        begin_step = gl.where(is_real, (begin // TOKENS - walk.first_tile) * PACKS, walk.steps)
        end_step = gl.where(is_real, ((end + TOKENS - 1) // TOKENS - walk.first_tile) * PACKS, walk.steps)
        end_step = gl.maximum(gl.minimum(end_step, walk.steps), at)
        key_index = (walk.first_block + block) * N + gl.arange(0, N, gl.SliceLayout(1, SCORES))
        first_seeing, last_seeing = rows_seeing(bounds.rows_of_key_ptr, key_index, bounds.key_rows)
        key, value = memory.key_blocks.index(slot), memory.value_blocks.index(slot)
        mbarrier.wait(memory.keys_full.index(slot), parity_of_slot, pred=is_real)
        dkey, dvalue = no_sums, no_sums
        for step in range(at, end_step):
            stage, parity = stage_and_parity(step, STAGES)
            token = (walk.first_tile + step // PACKS) * TOKENS
            found = step - walk.finding  # of tiles whose gradient of query is found, this one's number, if not negative
            buffer = found & 1
            parity_of_buffer = (found >> 1) & 1
            first_key = gl.load(bounds.start_ptr + token)
            dscores_block = memory.dscores.index(buffer * CONSUMERS + PART)
            mbarrier.wait(memory.rows_full.index(stage), parity)
            mbarrier.wait(memory.numbers_full.index(stage), parity)
            if step >= begin_step:
                query, dout = memory.queries.index(stage), memory.douts.index(stage)
                scores_token = warpgroup_mma(key, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores_token])
                minus_delta = 0.0 - memory.numbers.index(stage * 2 + 1).load(COLUMN)
                initial, _ = gl.broadcast(minus_delta[None, :], nothing)
                lse = memory.numbers.index(stage * 2).load(COLUMN)
                dweights_token = warpgroup_mma(value, dout.permute((1, 0)), initial, is_async=True)
                weights = gl.exp2(scores * scale_log2 - lse[None, :])
                if (token < full_begin) | (token + TOKENS > full_end):
                    own = (token + gl.arange(0, ROWS, COLUMN) // PACK)[None, :]
                    seen = (own >= first_seeing[:, None]) & (own < last_seeing[:, None])
                    weights = gl.where(seen, weights, 0.0)
                factor = gl.convert_layout(weights.to(dtype), FACTOR)
                dvalue_token = warpgroup_mma(factor, dout, dvalue, is_async=True)
                kept = give_back(memory, kept)
                dweights = warpgroup_mma_wait(1, deps=[dweights_token])
                rounded = (weights * dweights).to(dtype)
                factor = gl.convert_layout(rounded, FACTOR)
                dkey_token = warpgroup_mma(factor, query, dkey, is_async=True)
                mbarrier.wait(memory.dscores_empty.index(buffer), parity_of_buffer ^ 1, pred=found >= 0)
                dscores_block.store(rounded)
                fence_async_shared()
                mbarrier.arrive(memory.dscores_full.index(buffer), count=1, pred=found >= 0)
                dvalue, dkey = warpgroup_mma_wait(0, deps=[dvalue_token, dkey_token])
            else:
                kept = give_back(memory, kept)
                mbarrier.wait(memory.dscores_empty.index(buffer), parity_of_buffer ^ 1, pred=found >= 0)
                dscores_block.store(nothing.to(dtype))
                fence_async_shared()
                mbarrier.arrive(memory.dscores_full.index(buffer), count=1, pred=found >= 0)
            if (found >= 0) & (found % CONSUMERS == PART):
                mbarrier.wait(memory.dscores_full.index(buffer), parity_of_buffer)
                dquery = find_dquery(memory, buffer, first_key // N - walk.first_block, walk.loaded, no_sums)
                release(memory.dscores_empty.index(buffer))
                head = (walk.key_head * PACKS + step % PACKS) * PACK
                # In out's place, from which delta has been found.
                place = memory.outs.index(stage)
                place.store((dquery * scale).to(dtype))
                fence_async_shared()
                store_box(dquery_desc, token, head, place)
                kept = stage
            else:
                release(memory.rows_empty.index(stage))
        at = end_step
        if is_real:
            # Keys are last read for the gradient of query of the tile in front.
            last = at - 1 - walk.finding
            mbarrier.wait(memory.dscores_empty.index(last & 1), (last >> 1) & 1, pred=last >= 0)
            if block < walk.owned:
                store_sums(
                    dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, dkey * scale, dvalue, value,
                    (walk.first_block + block) * N, walk.key_head, bounds, DIM, SUMS,
                )  # fmt: skip
            release(memory.keys_empty.index(slot))
    store_wait(0)
    # Own blocks that no row sees, by way of dscores that have been read for the last time.
    last = (walk.steps - walk.finding - 1) // 2 * 2
    mbarrier.wait(memory.dscores_empty.index(0), (last >> 1) & 1, pred=walk.steps > walk.finding)
    unseen = PART + own_blocks * CONSUMERS
    for block in range(unseen, walk.owned, CONSUMERS):
        store_sums(
            dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, no_sums, no_sums, memory.dscores.index(PART),
            (walk.first_block + block) * N, walk.key_head, bounds, DIM, SUMS,
        )  # fmt: skip


@gluon.jit
def give_back(memory, stage):
    """Give a stage back that a gradient of query has left from since, if it is not negative; -1."""
    if stage >= 0:
        store_wait(0)
        release(memory.rows_empty.index(stage))
    return -1


@gluon.jit
def find_dquery(memory, buffer, first_seen, loaded, no_sums):
    """The gradient of query of a tile, but for the scale, from dscores of the three blocks from first_seen on.

    Those behind the last have zeros, which are multiplied by any keys.
    """
    dquery = no_sums
    if first_seen < loaded:
        for i in gl.static_range(CONSUMERS):
            block = first_seen + i
            own = memory.dscores.index(buffer * CONSUMERS + block % CONSUMERS)
            keys = memory.key_blocks.index(gl.where(block < loaded, block, first_seen) & (SLOTS - 1))
            dquery = warpgroup_mma(own.permute((1, 0)), keys, dquery, is_async=True)
        dquery = warpgroup_mma_wait(0, deps=[dquery])
    return dquery


@gluon.jit
def store_sums(
    dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, dkey, dvalue, place, first_key, key_head, bounds,
    DIM: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of keys and of values, in 16 bits by way of a place in shared memory."""
    if dkey_desc is None:
        store_float(dkey_ptr, dkey, first_key, bounds.key_rows, bounds.key_heads, key_head, DIM, 0, SUMS)
        store_float(dvalue_ptr, dvalue, first_key, bounds.key_rows, bounds.key_heads, key_head, DIM, 0, SUMS)
    else:
        place.store(dvalue.to(place.dtype))
        fence_async_shared()
        store_box(dvalue_desc, key_head, first_key, place)
        store_wait(0)
        place.store(dkey.to(place.dtype))
        fence_async_shared()
        store_box(dkey_desc, key_head, first_key, place)
        store_wait(0)
