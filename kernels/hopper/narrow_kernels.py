"""Kernels for rows that see few keys, a window of 128 say: a program has all keys of its rows in shared memory at once.

A tile of 64 rows are a few tokens of several neighbouring heads of a group, which see the same keys; so the keys of a
tile are hardly more than those of a row, and the tokens behind them follow with the same keys in a further pass.
Scores of all keys are in registers: one softmax, without a running maximum. Programs are small, and several on a
multiprocessor hide each other's latency, in place of warps that load ahead.

The gradient of query needs the rows' delta, which is the sum of weights times their gradients over all keys that a row
sees; where one launch has them all the kernel finds it so, and neither out nor another pass over memory is needed.
Gradients of keys and values are summed in registers by the program that owns them, over all heads of the group in one
order. So nothing is set to zero before, added up in memory or rounded afterwards, and every result repeats bit for bit.

Legend: M query rows of a tile, N key rows of a block, R of the smaller one in front of it, D head dimension.
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
from ringflash.kernels.hopper.backward_kernel import store_float
from ringflash.kernels.hopper.compat import async_load, async_store, barrier, reinterpret, store_wait
from ringflash.kernels.hopper.rings import allocate_barriers
from ringflash.kernels.hopper.softmax import LN_2, LOG2_E

ROWS = gl.constexpr(64)
"""Query rows of a tile."""


@gluon.constexpr_function
def box_layout(desc, rows):
    """How `rows` rows of a descriptor's columns lie in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, desc.block_type.shape[-1]], desc.dtype)


@gluon.jit
def allocate_rows(desc, rows: gl.constexpr, count: gl.constexpr):
    """Room for `count` times as many rows of a descriptor's columns."""
    return gl.allocate_shared_memory(desc.dtype, [count, rows, desc.block_type.shape[-1]], box_layout(desc, rows))


@gluon.jit
def load_box(desc, a, b, full, block):
    """Load a descriptor's box, of three dimensions, to rows in shared memory."""
    async_load(desc, [a, b, 0], full, reinterpret(block, desc.dtype, desc.block_type.shape, desc.layout))


@gluon.jit
def store_box(desc, a, b, block):
    """Store rows in shared memory as a descriptor's box; complete after `store_wait`."""
    async_store(desc, [a, b, 0], reinterpret(block, desc.dtype, desc.block_type.shape, desc.layout))


class Pair(NamedTuple):
    """Keys or values of a program's rows in shared memory: N rows, and the R in front of them."""

    main: gl.shared_memory_descriptor
    first: gl.shared_memory_descriptor


@gluon.jit
def allocate_pair(desc, first_desc):
    """Room for a block of each descriptor."""
    N: gl.constexpr = desc.block_type.shape[1]
    R: gl.constexpr = first_desc.block_type.shape[1]
    return Pair(allocate_rows(desc, N, 1), allocate_rows(first_desc, R, 1))


@gluon.jit
def load_pair(desc, first_desc, key_head, begin, full, pair):
    """Load the rows from `begin` on of a key head."""
    load_box(first_desc, key_head, begin, full, pair.first.index(0))
    load_box(desc, key_head, begin + first_desc.block_type.shape[1], full, pair.main.index(0))


@gluon.jit
def multiply_pair(a, pair):
    """Rows of `a` times those of both blocks of a pair, the first block's first."""
    N: gl.constexpr = pair.main.shape[1]
    R: gl.constexpr = pair.first.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    FIRST_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    first = start_product(a, pair.first.index(0), FIRST_SCORES)
    main = start_product(a, pair.main.index(0), SCORES)
    first, main = warpgroup_mma_wait(0, deps=[first, main])
    return first, main


@gluon.jit
def start_sum(weights, block, sums, ADDS: gl.constexpr, SUMS: gl.constexpr):
    """Sums of a block's rows, each with its weight, added to `sums` or in their place."""
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    factor = gl.convert_layout(weights.to(block.dtype), FACTOR)
    return warpgroup_mma(factor, block.index(0), sums, use_acc=ADDS, is_async=True)


@gluon.jit
def of_rows(x, scores):
    """A number of each row, as the rows of `scores` have it; nothing moves."""
    return gl.convert_layout(x, gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def hide_pair(first, main, begin, row_start, row_stop, all_begin, all_end, hidden):
    """`hide` of both blocks of keys, which begin at `begin`."""
    first = hide(first, begin, row_start, row_stop, all_begin, all_end, hidden)
    main = hide(main, begin + first.shape[1], row_start, row_stop, all_begin, all_end, hidden)
    return first, main


@gluon.jit
def hide(scores, first_key, row_start, row_stop, all_begin, all_end, hidden):
    """`hidden` where a row does not see a key; all rows see the keys from all_begin to all_end, if there are any.

    Blocks of a window are cut on one side only.
    """
    ROW: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    N: gl.constexpr = scores.shape[1]
    if first_key < all_begin:
        key = first_key + gl.arange(0, N, gl.SliceLayout(0, scores.type.layout))[None, :]
        start = gl.convert_layout(row_start, ROW, assert_trivial=True)
        stop = gl.convert_layout(row_stop, ROW, assert_trivial=True)
        scores = gl.where((key >= start[:, None]) & (key < stop[:, None]), scores, hidden)
    elif first_key + N > all_end:
        if N > 32:  # rows of a window end within few keys
            front, back = halves(scores)
            if first_key + N // 2 > all_end:
                front = hide_behind(front, first_key, row_stop, hidden)
            middle, end = halves(back)
            if first_key + 3 * N // 4 > all_end:
                middle = hide_behind(middle, first_key + N // 2, row_stop, hidden)
            end = hide_behind(end, first_key + 3 * N // 4, row_stop, hidden)
            BACK: gl.constexpr = back.type.layout
            WHOLE: gl.constexpr = scores.type.layout
            scores = joined(front, joined(middle, end, BACK), WHOLE)
        else:
            scores = hide_behind(scores, first_key, row_stop, hidden)
    return scores


@gluon.jit
def hide_behind(scores, first_key, row_stop, hidden):
    """`hidden` from where on a row sees no keys."""
    LAYOUT: gl.constexpr = scores.type.layout
    key = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    stop = gl.convert_layout(row_stop, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    return gl.where(key < stop[:, None], scores, hidden)


@gluon.jit
def halves(x):
    """The first half of the columns, and the second."""
    M: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    return gl.split(x.reshape([M, 2, HALF]).permute((0, 2, 1)))


@gluon.jit
def joined(a, b, LAYOUT: gl.constexpr):
    """What `halves` was given."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = a.shape[1] * 2
    whole = gl.join(a, b).permute((0, 2, 1)).reshape([M, N])
    return gl.convert_layout(whole, LAYOUT, assert_trivial=True)


@gluon.jit
def of_tile(start_ptr, stop_ptr, token, tokens, TOKENS: gl.constexpr, PACK: gl.constexpr, LAYOUT: gl.constexpr):
    """First key of each row and one behind its last, and the keys that all rows see: begin and end."""
    own = token + gl.arange(0, TOKENS * PACK, LAYOUT) // PACK
    row_start = gl.load(start_ptr + own, mask=own < tokens, other=0)
    row_stop = gl.load(stop_ptr + own, mask=own < tokens, other=0)
    last = gl.minimum(token + TOKENS, tokens) - 1
    return row_start, row_stop, gl.load(start_ptr + last), gl.load(stop_ptr + gl.minimum(token, tokens - 1))


@gluon.jit
def start_product(a, b, LAYOUT: gl.constexpr):
    """Rows of `a` times rows of `b`."""
    M: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[0]
    nothing = gl.zeros([M, N], gl.float32, LAYOUT)
    return warpgroup_mma(a, b.permute((1, 0)), nothing, use_acc=False, is_async=True)


@compiled_once
@gluon.jit(do_not_specialize=["tokens"])
def attend_narrow_kernel(
    query_desc, key_desc, first_key_desc, value_desc, first_value_desc, out_desc, lse_ptr, start_ptr, stop_ptr,
    sinks_ptr, tokens, heads, scale_log2, GROUP: gl.constexpr,
):  # fmt: skip
    """Program = (PASSES tiles, heads of a tile), the latter fastest. See `narrow.PreparedNarrowForward`."""
    TOKENS: gl.constexpr = out_desc.block_type.shape[0]
    PACK: gl.constexpr = out_desc.block_type.shape[1]
    PASSES: gl.constexpr = query_desc.block_type.shape[0] // TOKENS
    N: gl.constexpr = key_desc.block_type.shape[1]
    V: gl.constexpr = out_desc.block_type.shape[2]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    dtype: gl.constexpr = query_desc.dtype

    packs = heads // PACK
    head = gl.program_id(0) % packs * PACK
    first_token = gl.program_id(0) // packs * (PASSES * TOKENS)
    key_head = head // GROUP
    begin = gl.load(start_ptr + first_token)
    queries = allocate_rows(query_desc, ROWS, PASSES)
    keys, values = allocate_pair(key_desc, first_key_desc), allocate_pair(value_desc, first_value_desc)
    full = allocate_barriers(2)
    fence_async_shared()
    OF_KEYS: gl.constexpr = key_desc.block_type.nbytes + first_key_desc.block_type.nbytes
    mbarrier.expect(full.index(0), OF_KEYS + query_desc.block_type.nbytes)
    mbarrier.expect(full.index(1), value_desc.block_type.nbytes + first_value_desc.block_type.nbytes)
    load_box(query_desc, first_token, head, full.index(0), queries)
    load_pair(key_desc, first_key_desc, key_head, begin, full.index(0), keys)
    load_pair(value_desc, first_value_desc, key_head, begin, full.index(1), values)

    row = gl.arange(0, ROWS, ROW)
    own_head = head + row % PACK
    no_out = gl.zeros([ROWS, V], gl.float32, OUT)
    for number in range(PASSES):
        token = first_token + number * TOKENS
        own = token + row // PACK
        # Loaded anew, lest the compiler keeps the numbers of all keys in registers from pass to pass.
        begin = gl.load(start_ptr + first_token)
        row_start, row_stop, all_begin, all_end = of_tile(start_ptr, stop_ptr, token, tokens, TOKENS, PACK, ROW)
        if sinks_ptr is not None:
            sink = gl.load(sinks_ptr + own_head).to(gl.float32) * LOG2_E
        query = queries.index(number)
        mbarrier.wait(full.index(0), 0)
        first_scores, scores = multiply_pair(query, keys)
        hidden = float("-inf")
        first_scores, scores = hide_pair(first_scores, scores, begin, row_start, row_stop, all_begin, all_end, hidden)
        maximum = gl.maximum(gl.max(scores, 1), of_rows(gl.max(first_scores, 1), scores))
        maximum = maximum * scale_log2
        if sinks_ptr is not None:
            maximum = gl.maximum(maximum, sink)
        offset = gl.where(maximum == float("-inf"), 0.0, maximum)
        first_weights = gl.exp2(first_scores * scale_log2 - of_rows(offset, first_scores)[:, None])
        weights = gl.exp2(scores * scale_log2 - offset[:, None])
        total = gl.sum(weights, 1) + of_rows(gl.sum(first_weights, 1), weights)
        if sinks_ptr is not None:
            total += gl.exp2(sink - offset)
        mbarrier.wait(full.index(1), 0)
        out_token = start_sum(first_weights, values.first, no_out, False, OUT)
        out_token = start_sum(weights, values.main, out_token, True, OUT)
        divisor = gl.where(total == 0.0, 1.0, total)
        lse = (maximum + gl.log2(divisor)) * LN_2
        gl.store(lse_ptr + own_head.to(gl.int64) * tokens + own, lse, mask=own < tokens)
        share = of_rows(1.0 / divisor, no_out)
        out = warpgroup_mma_wait(0, deps=[out_token]) * share[:, None]
        query.store(out.to(dtype))  # its place, as nobody reads it any more
        fence_async_shared()
        store_box(out_desc, token, head, query)
    store_wait(0)


@compiled_once
@gluon.jit(do_not_specialize=["tokens"])
def dquery_narrow_kernel(
    query_desc, dout_desc, key_desc, first_key_desc, value_desc, first_value_desc, dquery_desc, lse_ptr, dlse_ptr,
    delta_ptr, numbers_ptr, start_ptr, stop_ptr, tokens, heads, scale, scale_log2,
    GROUP: gl.constexpr, FINDS_DELTA: gl.constexpr,
):  # fmt: skip
    """Programs as in `attend_narrow_kernel`. Finds delta if asked; leaves what `dkey_narrow_kernel` needs of rows."""
    TOKENS: gl.constexpr = dquery_desc.block_type.shape[0]
    PACK: gl.constexpr = dquery_desc.block_type.shape[1]
    PASSES: gl.constexpr = query_desc.block_type.shape[0] // TOKENS
    N: gl.constexpr = key_desc.block_type.shape[1]
    D: gl.constexpr = query_desc.block_type.shape[2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    dtype: gl.constexpr = query_desc.dtype

    packs = heads // PACK
    head = gl.program_id(0) % packs * PACK
    first_tile = gl.program_id(0) // packs * PASSES
    key_head = head // GROUP
    begin = gl.load(start_ptr + first_tile * TOKENS)
    queries, douts = allocate_rows(query_desc, ROWS, PASSES), allocate_rows(dout_desc, ROWS, PASSES)
    keys, values = allocate_pair(key_desc, first_key_desc), allocate_pair(value_desc, first_value_desc)
    full = allocate_barriers(2)
    fence_async_shared()
    OF_KEYS: gl.constexpr = key_desc.block_type.nbytes + first_key_desc.block_type.nbytes
    OF_VALUES: gl.constexpr = value_desc.block_type.nbytes + first_value_desc.block_type.nbytes
    mbarrier.expect(full.index(0), OF_KEYS + query_desc.block_type.nbytes)
    mbarrier.expect(full.index(1), OF_VALUES + dout_desc.block_type.nbytes)
    load_box(query_desc, first_tile * TOKENS, head, full.index(0), queries)
    load_box(dout_desc, first_tile * TOKENS, head, full.index(1), douts)
    load_pair(key_desc, first_key_desc, key_head, begin, full.index(0), keys)
    load_pair(value_desc, first_value_desc, key_head, begin, full.index(1), values)

    row = gl.arange(0, ROWS, ROW)
    of_head = (head + row % PACK).to(gl.int64) * tokens
    no_sums = gl.zeros([ROWS, D], gl.float32, SUMS)
    own = first_tile * TOKENS + row // PACK
    next_lse = gl.load(lse_ptr + of_head + own, mask=own < tokens, other=0.0)
    for number in range(PASSES):
        token = (first_tile + number) * TOKENS
        own = token + row // PACK
        place = of_head + own
        begin = gl.load(start_ptr + first_tile * TOKENS)  # anew, as in `attend_narrow_kernel`
        row_start, row_stop, all_begin, all_end = of_tile(start_ptr, stop_ptr, token, tokens, TOKENS, PACK, ROW)
        lse = next_lse * LOG2_E
        next_lse = gl.load(lse_ptr + place + TOKENS, mask=own + TOKENS < tokens, other=0.0)
        lse = gl.where(lse == float("-inf"), float("inf"), lse)  # rows without keys: no weight is left
        query, dout = queries.index(number), douts.index(number)
        mbarrier.wait(full.index(0), 0)
        first_scores, scores = multiply_pair(query, keys)
        first_weights = gl.exp2(first_scores * scale_log2 - of_rows(lse, first_scores)[:, None])
        weights = gl.exp2(scores * scale_log2 - lse[:, None])
        first_weights, weights = hide_pair(first_weights, weights, begin, row_start, row_stop, all_begin, all_end, 0.0)
        mbarrier.wait(full.index(1), 0)
        first_dweights, dweights = multiply_pair(dout, values)
        if FINDS_DELTA:
            first_delta = gl.sum(first_weights * first_dweights, 1)
            delta = gl.sum(weights * dweights, 1) + of_rows(first_delta, weights)
            if dlse_ptr is not None:
                delta -= gl.load(dlse_ptr + place, mask=own < tokens, other=0.0)
            gl.store(delta_ptr + place, delta, mask=own < tokens)
        else:
            delta = gl.load(delta_ptr + place, mask=own < tokens, other=0.0)
        first_dscores = first_weights * (first_dweights - of_rows(delta, first_dweights)[:, None])
        dquery = start_sum(first_dscores, keys.first, no_sums, False, SUMS)
        dquery = start_sum(weights * (dweights - delta[:, None]), keys.main, dquery, True, SUMS)
        numbers = numbers_ptr + ((first_tile + number).to(gl.int64) * packs + head // PACK) * (2 * ROWS) + row
        gl.store(numbers, lse / -scale_log2)
        gl.store(numbers + ROWS, -delta)
        dquery = warpgroup_mma_wait(0, deps=[dquery])
        query.store((dquery * scale).to(dtype))
        fence_async_shared()
        store_box(dquery_desc, token, head, query)
    store_wait(0)


@compiled_once
@gluon.jit(do_not_specialize=["key_rows"])
def dkey_narrow_kernel(
    query_desc, dout_desc, numbers_desc, key_desc, value_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr,
    rows_of_key_ptr, rows_of_tile_ptr, key_rows, key_heads, scale, scale_log2,
    GROUP: gl.constexpr, STAGES: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """Program = (tile of keys, key head), the latter fastest; walks over the tiles of query rows that see its keys.

    Transposed, so that weights and the gradients of scores are left factors as they come, in registers.
    """
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    PACK: gl.constexpr = query_desc.block_type.shape[1]
    N: gl.constexpr = key_desc.block_type.shape[1]
    D: gl.constexpr = key_desc.block_type.shape[2]
    V: gl.constexpr = value_desc.block_type.shape[2]
    PACKS: gl.constexpr = GROUP // PACK
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    DKEY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DVALUE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    dtype: gl.constexpr = query_desc.dtype

    key_head = gl.program_id(0) % key_heads
    tile = gl.program_id(0) // key_heads
    first_key = tile * N
    seeing = rows_of_tile_ptr + tile * 4
    any_begin, full_begin = gl.load(seeing), gl.load(seeing + 1)
    full_end, any_end = gl.load(seeing + 2), gl.load(seeing + 3)
    first_tile = any_begin // TOKENS
    steps = gl.where(any_begin < any_end, (any_end + TOKENS - 1) // TOKENS - first_tile, 0) * PACKS

    queries, douts = allocate_rows(query_desc, ROWS, STAGES), allocate_rows(dout_desc, ROWS, STAGES)
    numbers = gl.allocate_shared_memory(gl.float32, [STAGES, 2 * ROWS], numbers_desc.layout)
    key, value = allocate_rows(key_desc, N, 1).index(0), allocate_rows(value_desc, N, 1).index(0)
    full = allocate_barriers(STAGES + 1)
    fence_async_shared()
    mbarrier.expect(full.index(STAGES), key_desc.block_type.nbytes + value_desc.block_type.nbytes)
    load_box(key_desc, key_head, first_key, full.index(STAGES), key)
    load_box(value_desc, key_head, first_key, full.index(STAGES), value)
    packs = key_heads * PACKS
    for step in gl.static_range(STAGES - 1):
        load_step(
            query_desc, dout_desc, numbers_desc, queries, douts, numbers, full, first_tile, key_head, packs, step,
            steps, step, PACKS,
        )  # fmt: skip

    key_index = first_key + gl.arange(0, N, gl.SliceLayout(1, SCORES))
    first_seeing = gl.load(rows_of_key_ptr + key_index * 4, mask=key_index < key_rows, other=0)
    last_seeing = gl.load(rows_of_key_ptr + key_index * 4 + 3, mask=key_index < key_rows, other=0)
    dkey = gl.zeros([N, D], gl.float32, DKEY)
    dvalue = gl.zeros([N, V], gl.float32, DVALUE)
    nothing = gl.zeros([N, ROWS], gl.float32, SCORES)
    mbarrier.wait(full.index(STAGES), 0)
    stage, parity = 0, 0
    for step in range(steps):
        barrier()  # nobody reads the stage before this one any more
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        load_step(
            query_desc, dout_desc, numbers_desc, queries, douts, numbers, full, first_tile, key_head, packs,
            step + STAGES - 1, steps, before, PACKS,
        )  # fmt: skip
        query, dout = queries.index(stage), douts.index(stage)
        mbarrier.wait(full.index(stage), parity)
        scores, _ = gl.broadcast(numbers.index(stage).slice(0, ROWS).load(COLUMN)[None, :], nothing)
        scores = warpgroup_mma(key, query.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        dweights, _ = gl.broadcast(numbers.index(stage).slice(ROWS, ROWS).load(COLUMN)[None, :], nothing)
        dweights = warpgroup_mma(value, dout.permute((1, 0)), dweights, is_async=True)
        weights = gl.exp2(scores * scale_log2)
        token = (first_tile + step // PACKS) * TOKENS
        if (token < full_begin) | (token + TOKENS > full_end):
            own = (token + gl.arange(0, ROWS, COLUMN) // PACK)[None, :]
            weights = gl.where((own >= first_seeing[:, None]) & (own < last_seeing[:, None]), weights, 0.0)
        factor = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(operand_index=0, parent=DVALUE, k_width=2))
        dvalue = warpgroup_mma(factor, dout, dvalue, is_async=True)
        dweights = warpgroup_mma_wait(1, deps=[dweights])
        dscores = (weights * dweights).to(dtype)
        factor = gl.convert_layout(dscores, gl.DotOperandLayout(operand_index=0, parent=DKEY, k_width=2))
        dkey = warpgroup_mma(factor, query, dkey, is_async=True)
        dkey, dvalue = warpgroup_mma_wait(0, deps=[dkey, dvalue])
        stage += 1
        if stage == STAGES:
            stage, parity = 0, parity ^ 1
    if dkey_desc is None:  # in fp32 straight from registers, of which a warp has whole sectors
        store_float(dkey_ptr, dkey * scale, first_key, key_rows, key_heads, key_head, DIM, 0, DKEY)
        store_float(dvalue_ptr, dvalue, first_key, key_rows, key_heads, key_head, DIM, 0, DVALUE)
    else:
        barrier()
        key.store((dkey * scale).to(dtype))
        value.store(dvalue.to(dtype))
        fence_async_shared()
        store_box(dkey_desc, key_head, first_key, key)
        store_box(dvalue_desc, key_head, first_key, value)
        store_wait(0)


@gluon.jit
def load_step(
    query_desc, dout_desc, numbers_desc, queries, douts, numbers, full, first_tile, key_head, packs, step, steps,
    stage, PACKS: gl.constexpr,
):  # fmt: skip
    """Load what a step of `dkey_narrow_kernel` works on, if there is such a step."""
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    PACK: gl.constexpr = query_desc.block_type.shape[1]
    if step < steps:
        tile, pack = first_tile + step // PACKS, key_head * PACKS + step % PACKS
        mbarrier.expect(
            full.index(stage),
            query_desc.block_type.nbytes + dout_desc.block_type.nbytes + numbers_desc.block_type.nbytes,
        )
        load_box(query_desc, tile * TOKENS, pack * PACK, full.index(stage), queries.index(stage))
        load_box(dout_desc, tile * TOKENS, pack * PACK, full.index(stage), douts.index(stage))
        at = (tile * packs + pack) * (2 * ROWS)
        async_load(numbers_desc, [at], full.index(stage), numbers.index(stage))
