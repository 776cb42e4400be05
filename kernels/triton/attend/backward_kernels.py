"""Kernels of the backward pass: one owns tiles of query rows, the other tiles of keys.

Each owner sums all that concerns its rows in registers, over the query heads of a group as well, in a fixed order: no
atomics, the same bits every time, at the price of computing scores and their gradients twice (Dao, arXiv 2307.08691,
algorithm 2, split in two). Where the sums of key and value do not fit registers together, each has a launch of its own,
which computes scores once more.

Legend: M query rows, N key rows, D head dimension of keys, V of values.
"""

import triton
import triton.language as tl
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.row_blocks import LOG2_E, block_inside, block_offsets, load_block
from ringflash.kernels.triton.attend.key_stretches import (
    bits_of_rows,
    entry_at,
    key_stretches,
    list_of_tile,
    row_of_entry,
    unlisted_hidden,
    visible,
)
from ringflash.kernels.triton.attend.modify_scores import (
    biased,
    blind_rows_aside,
    capped,
    dropped,
    kept_pairs,
    of_keys,
    of_rows,
    through_cap,
)


@triton.jit
def dquery_stretch(
    dq_MD, q_MD, do_MV, lse_M, delta_M, begin, end, interior, right,
    key, value, key_head, key_count, k_row, k_head, v_row, v_head,
    row_start_M, row_stop_M, scale_log2, modifiers, head, position_M, slope_M, lists, listed, bits_M,
    MASK: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [begin, end) give to the gradient of a tile of query rows; MASK as in attend_stretch."""
    for place in tl.range(begin, end, N if lists.entries is None else 1):
        entry = entry_at(lists, listed, place)
        column = row_of_entry(lists, entry)
        k_ND = load_block(key, key_head, column, key_count, k_row, k_head, N, DIM, PADDED_DIM, DESCRIPTORS)
        capped_MN = capped(tl.dot(q_MD, k_ND.T, input_precision="ieee"), modifiers)
        position_N, shown_N = of_keys(modifiers, column + tl.arange(0, N), key_count)
        scores_MN = biased(
            capped_MN, modifiers, position_M[:, None], slope_M[:, None], position_N[None, :], shown_N[None, :]
        )
        v_NV = load_block(
            value, key_head, column, key_count, v_row, v_head, N, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS
        )
        dweights_MN = tl.dot(do_MV, v_NV.T, input_precision="ieee")
        weights_MN = tl.exp2(scores_MN * scale_log2 - lse_M[:, None])
        if MASK == "all" or (MASK == "edges" and (column < interior or column >= right)):
            seen_MN = visible(column + tl.arange(0, N), row_start_M, row_stop_M)
            weights_MN = tl.where(seen_MN, weights_MN, 0.0)
        weights_MN = unlisted_hidden(weights_MN, lists, entry, bits_M, 0.0)
        if modifiers.seed is not None:
            kept_MN = kept_pairs(modifiers, head, position_M[:, None], position_N[None, :])
            dweights_MN = dropped(dweights_MN, kept_MN, modifiers)
        dscores_MN = through_cap(weights_MN * (dweights_MN - delta_M[:, None]), capped_MN, modifiers)
        dq_MD = tl.dot(dscores_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    return dq_MD


@compiled_once
@triton.jit(do_not_specialize=["query_count", "key_count", "tile_count"])
def dquery_kernel(
    query, key, value, dout, lse, delta, dquery, carry, lse_and_delta, start, stop, sink_start, sink_stop, order,
    query_count, key_count, tile_count, heads, scale, scale_log2,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, modifiers, lists,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    HAS_CARRY: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Programs and their walk over keys are those of the forward kernel.

    Each also writes the log-sum-exp, in base 2, and delta of its rows side by side, as `dkey_kernel` reads them.
    """
    program = tl.program_id(0)
    key_head = program // (GROUP * tile_count)
    tile = tl.load(order + program // GROUP % tile_count)
    head = key_head * GROUP + program % GROUP
    first_row = tile * M
    last_row = tl.minimum(first_row + M, query_count) - 1
    row_M = first_row + tl.arange(0, M)
    exists_M = row_M < query_count
    head_rows = tl.cast(head, tl.int64) * query_count
    lse_M = tl.load(lse + head_rows + row_M, mask=exists_M, other=0.0) * LOG2_E
    delta_M = tl.load(delta + head_rows + row_M, mask=exists_M, other=0.0)
    pair_M2 = (head_rows + row_M)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(lse_and_delta + pair_M2, tl.join(lse_M, delta_M), mask=exists_M[:, None])
    lse_M = blind_rows_aside(lse_M, modifiers)
    position_M, slope_M = of_rows(modifiers, head, row_M, exists_M)
    q_MD = load_block(query, head, first_row, query_count, q_row, q_head, M, DIM, PADDED_DIM, DESCRIPTORS)
    do_MV = load_block(dout, head, first_row, query_count, do_row, do_head, M, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS)
    dq_MD = tl.zeros([M, PADDED_DIM], tl.float32)
    begin, interior, right, end = key_stretches(start, stop, first_row, last_row, N)
    listed, bits_M = list_of_tile(lists, tile, tile_count, head), bits_of_rows(lists, row_M, exists_M, head)
    if lists.entries is not None:
        begin, end = 0, tl.load(listed)
        interior, right = tl.load(start + last_row), tl.load(stop + first_row) - (N - 1)
    if HAS_SINK_TOKENS:
        row_start_M = tl.load(sink_start + row_M, mask=exists_M, other=0)
        row_stop_M = tl.load(sink_stop + row_M, mask=exists_M, other=0)
        sink_begin = tl.load(sink_start + first_row)
        sink_end = tl.load(sink_stop + last_row)
        dq_MD = dquery_stretch(
            dq_MD, q_MD, do_MV, lse_M, delta_M, sink_begin, sink_end, sink_end, sink_end,
            key, value, key_head, key_count, k_row, k_head, v_row, v_head, row_start_M, row_stop_M, scale_log2,
            modifiers, head, position_M, slope_M, lists, listed, bits_M,
            "all", N, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS,
        )  # fmt: skip
    row_start_M = tl.load(start + row_M, mask=exists_M, other=0)
    row_stop_M = tl.load(stop + row_M, mask=exists_M, other=0)
    IN_PARTS: tl.constexpr = SPLIT and lists.entries is None
    bounds = (begin, interior, right, end) if IN_PARTS else (begin, end)
    for part in tl.static_range(3 if IN_PARTS else 1):
        dq_MD = dquery_stretch(
            dq_MD, q_MD, do_MV, lse_M, delta_M, bounds[part], bounds[part + 1], interior, right,
            key, value, key_head, key_count, k_row, k_head, v_row, v_head, row_start_M, row_stop_M, scale_log2,
            modifiers, head, position_M, slope_M, lists, listed, bits_M,
            ("none" if part == 1 else "all") if IN_PARTS else "edges",
            N, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS,
        )  # fmt: skip

    offsets = block_offsets(head, first_row, heads, M, DIM, PADDED_DIM)
    inside = block_inside(first_row, query_count, M, DIM, PADDED_DIM)
    dq_MD = dq_MD * scale
    if HAS_CARRY:
        dq_MD += tl.load(carry + offsets, mask=inside, other=0.0)
    tl.store(dquery + offsets, dq_MD.to(dquery.dtype.element_ty), mask=inside)


@triton.jit
def dkey_stretch(
    dk_ND, dv_NV, k_ND, v_NV, begin, end, interior, right, column_N, start, stop,
    query, dout, lse_and_delta, head, query_count, q_row, q_head, do_row, do_head, scale_log2,
    modifiers, position_N, shown_N, lists, listed, bits_N,
    MASK: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, DESCRIPTORS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows [begin, end) of a head give to the gradients of a key tile. MASK: see attend_stretch.

    SUMS: "both", or the gradient that alone is summed, "key" or "value".
    """
    head_rows = tl.cast(head, tl.int64) * query_count
    STEP: tl.constexpr = M if lists.entries is None else 1
    STAGES: tl.constexpr = None if lists.entries is None else 1  # with entries loaded ahead as well it would spill
    for place in tl.range(begin, end, STEP, num_stages=STAGES):
        entry = entry_at(lists, listed, place)
        row = row_of_entry(lists, entry)
        row_M = row + tl.arange(0, M)
        exists_M = row_M < query_count
        q_MD = load_block(query, head, row, query_count, q_row, q_head, M, DIM, PADDED_DIM, DESCRIPTORS)
        # One load for both, because each costs the program a barrier a block.
        pair_M2 = (head_rows + row_M)[:, None] * 2 + tl.arange(0, 2)[None, :]
        lse_M, delta_M = tl.split(tl.load(lse_and_delta + pair_M2, mask=exists_M[:, None], other=0.0))
        # Transposed, so that weights and dscores are left operands as they come, without a way through memory.
        capped_NM = capped(tl.dot(k_ND, q_MD.T, input_precision="ieee"), modifiers)
        position_M, slope_M = of_rows(modifiers, head, row_M, exists_M)
        scores_NM = biased(
            capped_NM, modifiers, position_M[None, :], slope_M[None, :], position_N[:, None], shown_N[:, None]
        )
        lse_M = blind_rows_aside(lse_M, modifiers)
        weights_NM = tl.exp2(scores_NM * scale_log2 - lse_M[None, :])
        # The mask also hides rows without any key, whose lse is -inf.
        if MASK == "all" or (MASK == "edges" and (row < interior or row >= right)):
            row_start_M = tl.load(start + row_M, mask=exists_M, other=0)
            row_stop_M = tl.load(stop + row_M, mask=exists_M, other=0)
            weights_NM = tl.where(visible(column_N, row_start_M, row_stop_M).T, weights_NM, 0.0)
        weights_NM = unlisted_hidden(weights_NM, lists, entry, bits_N, 0.0)
        do_MV = load_block(dout, head, row, query_count, do_row, do_head, M, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS)
        dropped_NM = weights_NM
        if modifiers.seed is not None:
            kept_NM = kept_pairs(modifiers, head, position_M[None, :], position_N[:, None])
            dropped_NM = dropped(weights_NM, kept_NM, modifiers)
        if SUMS != "key":
            dv_NV = tl.dot(dropped_NM.to(do_MV.dtype), do_MV, dv_NV, input_precision="ieee")
        if SUMS != "value":
            dweights_NM = tl.dot(v_NV, do_MV.T, input_precision="ieee")
            if modifiers.seed is not None:
                dweights_NM = dropped(dweights_NM, kept_NM, modifiers)
            dscores_NM = through_cap(weights_NM * (dweights_NM - delta_M[None, :]), capped_NM, modifiers)
            dk_ND = tl.dot(dscores_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision="ieee")
    return dk_ND, dv_NV


@compiled_once
@triton.jit(do_not_specialize=["query_count", "key_count", "tile_count"])
def dkey_kernel(
    query, key, value, dout, lse_and_delta, dkey, dvalue, start, stop, sink_start, sink_stop, rows, sink_token_rows,
    order, query_count, key_count, tile_count, key_heads, scale, scale_log2,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, modifiers, lists,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Program = (key head, tile in `order`), the last fastest; walks over the query rows that see the tile."""
    key_head = tl.program_id(0) // tile_count
    tile = tl.load(order + tl.program_id(0) % tile_count)
    column = tile * N
    column_N = column + tl.arange(0, N)
    k_ND = load_block(key, key_head, column, key_count, k_row, k_head, N, DIM, PADDED_DIM, DESCRIPTORS)
    v_NV = k_ND  # stands for none
    if SUMS != "value":
        v_NV = load_block(
            value, key_head, column, key_count, v_row, v_head, N, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS
        )
    position_N, shown_N = of_keys(modifiers, column_N, key_count)
    NONE: tl.constexpr = 16  # the fewest columns, of a sum that is not asked for
    dk_ND = tl.zeros([N, NONE if SUMS == "value" else PADDED_DIM], tl.float32)
    dv_NV = tl.zeros([N, NONE if SUMS == "key" else PADDED_VALUE_DIM], tl.float32)

    any_begin = tl.load(rows + tile * 4)
    all_begin = tl.load(rows + tile * 4 + 1)
    all_end = tl.load(rows + tile * 4 + 2)
    any_end = tl.load(rows + tile * 4 + 3)
    interior = any_begin + tl.cdiv(all_begin - any_begin, M) * M
    right = interior + tl.maximum(all_end - interior, 0) // M * M
    listed = list_of_tile(lists, tile, tile_count, key_head)
    bits_N = bits_of_rows(lists, column_N, column_N < key_count, key_head)
    if lists.entries is not None:
        any_begin, any_end = 0, tl.load(listed)
        interior, right = all_begin, all_end - (M - 1)
    IN_PARTS: tl.constexpr = SPLIT and lists.entries is None
    bounds = (any_begin, interior, right, any_end) if IN_PARTS else (any_begin, any_end)
    for member in tl.range(0, GROUP):
        head = key_head * GROUP + member
        if HAS_SINK_TOKENS:
            sink_begin = tl.load(sink_token_rows + tile * 4)
            sink_end = tl.load(sink_token_rows + tile * 4 + 3)
            dk_ND, dv_NV = dkey_stretch(
                dk_ND, dv_NV, k_ND, v_NV, sink_begin, sink_end, sink_end, sink_end, column_N, sink_start, sink_stop,
                query, dout, lse_and_delta, head, query_count, q_row, q_head, do_row, do_head, scale_log2,
                modifiers, position_N, shown_N, lists, listed, bits_N,
                "all", M, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS, SUMS,
            )  # fmt: skip
        for part in tl.static_range(3 if IN_PARTS else 1):
            dk_ND, dv_NV = dkey_stretch(
                dk_ND, dv_NV, k_ND, v_NV, bounds[part], bounds[part + 1], interior, right, column_N, start, stop,
                query, dout, lse_and_delta, head, query_count, q_row, q_head, do_row, do_head, scale_log2,
                modifiers, position_N, shown_N, lists, listed, bits_N,
                ("none" if part == 1 else "all") if IN_PARTS else "edges",
                M, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS, SUMS,
            )  # fmt: skip

    if SUMS != "value":
        dk_offsets = block_offsets(key_head, column, key_heads, N, DIM, PADDED_DIM)
        dk_inside = block_inside(column, key_count, N, DIM, PADDED_DIM)
        tl.store(dkey + dk_offsets, (dk_ND * scale).to(dkey.dtype.element_ty), mask=dk_inside)
    if SUMS != "key":
        dv_offsets = block_offsets(key_head, column, key_heads, N, VALUE_DIM, PADDED_VALUE_DIM)
        dv_inside = block_inside(column, key_count, N, VALUE_DIM, PADDED_VALUE_DIM)
        tl.store(dvalue + dv_offsets, dv_NV.to(dvalue.dtype.element_ty), mask=dv_inside)
