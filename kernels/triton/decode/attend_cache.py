"""Attention of few queries to a long cache: the keys of each sequence are shared out over the whole chip.

A program takes one key head of one sequence, a tile of query rows and one of several parts of the keys. The rows of a
tile are the G query heads of that key head for each query, so keys and values are read once for all of them (Ainslie
et al., arXiv 2305.13245). Programs of different parts leave fp32 results that the last of them merges by their
log-sum-exp, in a fixed order: the same bits every time (split-KV as in Dao et al., Flash-Decoding, 2023, without a
second kernel: merge_parts.py).

What decides is how many bytes are on their way to a multiprocessor: launch_sizes.py keeps two blocks of keys and values
in flight for each of several programs, over 100 KiB on Hopper, a few times what memory latency asks for.

Legend: M query rows of a tile, N key rows of a block, D head dimension of keys, V of values; R rows and C columns that
are merged at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from ringflash.errors import ArgumentError
from ringflash.kernels.decode import Cache, Rotary, Rules
from ringflash.kernels.gpu.chips import DTYPES, chip_of, multiprocessors
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.row_blocks import LN_2, LOG2_E, padded
from ringflash.kernels.overrun import overrun_word, reason_code
from ringflash.kernels.triton.decode.cache_access import (
    cache_constants,
    cache_operands,
    cache_strides,
    last_page_of,
    load_rotated,
    page_within,
    rotary_operands,
    sequence_entry,
    tokens_before,
)
from ringflash.kernels.triton.decode.counters import counters
from ringflash.kernels.triton.decode.launch_sizes import LaunchSizes, choose_splits, launch_sizes
from ringflash.kernels.triton.decode.merge_parts import merge_if_last, merging, shape_of_merge


@triton.jit
def load_rows(first_N, inside_N, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows (N, PADDED_DIM) from pointers to their beginnings; zeros for rows that are not inside."""
    column_D = tl.arange(0, PADDED_DIM)
    inside_ND = inside_N[:, None]
    if DIM != PADDED_DIM:
        inside_ND = inside_ND & (column_D < DIM)[None, :]
    return tl.load(first_N[:, None] + column_D[None, :], mask=inside_ND, other=0.0)


@triton.jit
def modified(scores_MN, distance_MN, slope_M, scale, softcap, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """Scores in base 2: scaled, capped, with ALiBi. `scale` has LOG2_E in it, and 2 / softcap where CAPPED."""
    x_MN = scores_MN * scale
    if CAPPED:  # tanh(x) = 1 - 2 / (1 + exp(2 x)) at both infinities
        x_MN = (softcap * LOG2_E) * (1.0 - 2.0 / (1.0 + tl.exp2(x_MN)))
    if SLOPED:
        x_MN -= (slope_M * LOG2_E)[:, None] * tl.abs(distance_MN).to(tl.float32)
    return x_MN


@compiled_once
@triton.jit(
    do_not_specialize=[
        "offset", "appended", "query_count", "capacity", "entries", "rotary_rows", "splits", "tiles", "left", "right",
        "part_rows",
    ]
)  # fmt: skip
def attend_cache_kernel(
    query, key, value, out, lse, parts, parts_lse, counters, overrun,
    lengths, batch_index, block_table, cos, sin, leftpad, slopes,
    offset, appended, query_count, capacity, entries, rotary_rows, key_heads, splits, tiles, part_rows, scale, softcap,
    left, right, block_table_row, cos_row, sin_row, slopes_row,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, CAPPED: tl.constexpr,
    LEVELS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, CDNA: tl.constexpr, OVERRUN: tl.constexpr,
):  # fmt: skip
    """Program = (sequence, part of its keys, key head, tile of query rows), the last fastest.

    So programs that run at one time read the same pages of memory, in which the heads of a token lie side by side.
    Results of part p lie p * part_rows rows behind those of part 0, or without parts (LEVELS = 0) in out and lse.
    """
    tile = tl.program_id(0) % tiles
    key_head = tl.program_id(0) // tiles % key_heads
    part = tl.program_id(0) // (tiles * key_heads) % splits
    sequence = tl.cast(tl.program_id(0) // (tiles * key_heads) // splits, tl.int64)

    used = tokens_before(sequence, lengths, offset)
    total = used + appended
    row_M = tile * M + tl.arange(0, M)
    query_M = row_M // GROUP
    exists_M = query_M < query_count
    head_M = key_head * GROUP + row_M % GROUP
    position_M = total - query_count + query_M
    first_query = tile * M // GROUP
    last_query = tl.minimum((tile * M + M - 1) // GROUP, query_count - 1)

    # Rows of the cache that some row of the tile sees, and each row's own.
    begin = 0
    if leftpad is not None:
        begin = tl.maximum(tl.load(leftpad + sequence), 0)
    end = tl.minimum(total, capacity)
    start_M = tl.zeros([M], tl.int32) + begin
    stop_M = tl.zeros([M], tl.int32) + end
    if HAS_LEFT:
        start_M = tl.maximum(start_M, position_M - left)
        begin = tl.maximum(begin, total - query_count + first_query - left)
    if HAS_RIGHT:
        stop_M = tl.minimum(stop_M, position_M + right + 1)
        end = tl.minimum(end, total - query_count + last_query + right + 1)
    # Blocks begin at multiples of N, so that none lies in two pages if N divides a page.
    first_block = begin // N
    blocks = tl.maximum(tl.cdiv(tl.maximum(end, 0), N) - first_block, 0)
    share = tl.cdiv(blocks, splits)
    from_block = first_block + tl.minimum(part * share, blocks)
    to_block = first_block + tl.minimum(part * share + share, blocks)

    rotary_row_M = used + (query_M if HAS_LEFT or HAS_RIGHT else tl.zeros([M], tl.int32))
    q_MD = load_rotated(
        query + sequence * q_batch + tl.cast(query_M, tl.int64) * q_row + head_M * q_head, exists_M, rotary_row_M,
        cos, sin, cos_row, sin_row, rotary_rows, DIM, PADDED_DIM, ROTATED, INTERLEAVED,
    )  # fmt: skip
    slope_M = tl.zeros([M], tl.float32)
    if slopes is not None:
        slope_M = tl.load(slopes + sequence * slopes_row + head_M, mask=exists_M, other=0.0)

    k_base = key + key_head * k_head
    v_base = value + key_head * v_head
    if PAGE == 0:
        entry = sequence_entry(sequence, batch_index)
        k_base += entry * k_batch
        v_base += entry * v_batch
    else:
        block_table += sequence * block_table_row
    last_page = last_page_of(used, appended, capacity, block_table, PAGE)  # comes while keys are at work
    maximum_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    acc_MV = tl.zeros([M, PADDED_VALUE_DIM], tl.float32)
    for block in tl.range(from_block, to_block):
        column = block * N
        column_N = column + tl.arange(0, N)
        inside_N = (column_N >= begin) & (column_N < end)
        if PAGE == 0:
            k_first_N = k_base + tl.cast(column, tl.int64) * k_row + tl.arange(0, N) * k_row
            v_first_N = v_base + tl.cast(column, tl.int64) * v_row + tl.arange(0, N) * v_row
        elif PAGE % N == 0:
            page = page_within(tl.load(block_table + column // PAGE), entries)
            row = tl.cast(column % PAGE, tl.int64)
            k_first_N = k_base + page * k_batch + row * k_row + tl.arange(0, N) * k_row
            v_first_N = v_base + page * v_batch + row * v_row + tl.arange(0, N) * v_row
        else:
            page_N = page_within(tl.load(block_table + column_N // PAGE, mask=inside_N, other=0), entries)
            row_N = (column_N % PAGE).to(tl.int64)
            k_first_N = k_base + page_N * k_batch + row_N * k_row
            v_first_N = v_base + page_N * v_batch + row_N * v_row
        k_ND = load_rows(k_first_N, inside_N, DIM, PADDED_DIM)
        scores_MN = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        distance_MN = position_M[:, None] - column_N[None, :]
        scores_MN = modified(scores_MN, distance_MN, slope_M, scale, softcap, CAPPED, slopes is not None)
        seen_MN = (column_N[None, :] >= start_M[:, None]) & (column_N[None, :] < stop_M[:, None])
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(scores_MN, 1))
        # A row may have seen no key so far: -inf - -inf is not a number.
        offset_M = tl.where(new_maximum_M == float("-inf"), 0.0, new_maximum_M)
        weights_MN = tl.exp2(scores_MN - offset_M[:, None])
        decay_M = tl.exp2(maximum_M - offset_M)
        sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
        v_NV = load_rows(v_first_N, inside_N, VALUE_DIM, PADDED_VALUE_DIM)
        acc_MV = tl.dot(weights_MN.to(v_NV.dtype), v_NV, acc_MV * decay_M[:, None], input_precision="ieee")
        maximum_M = new_maximum_M

    if overrun is not None:
        tells = (tile == 0) & (key_head == 0) & (part == 0)
        tl.store(overrun, OVERRUN, mask=tells & ((last_page < 0) | (last_page >= entries)))
    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)
    heads = key_heads * GROUP
    result = sequence * query_count
    lse_M = result * heads + head_M * query_count + query_M
    column_V = tl.arange(0, PADDED_VALUE_DIM)
    out_M = ((result + query_M) * heads + head_M) * VALUE_DIM
    inside_MV = exists_M[:, None] & (column_V < VALUE_DIM)[None, :]
    out_MV = acc_MV / divisor_M[:, None]
    if LEVELS == 0:
        part_out, part_lse = out, lse
    else:
        ahead = tl.cast(part, tl.int64) * part_rows
        part_out, part_lse = parts + ahead * VALUE_DIM, parts_lse + ahead
    tl.store(part_lse + lse_M, (maximum_M + tl.log2(divisor_M)) * LN_2, mask=exists_M)
    tl.store(part_out + out_M[:, None] + column_V[None, :], out_MV.to(part_out.dtype.element_ty), mask=inside_MV)
    if LEVELS > 0:
        merge_if_last(
            parts, parts_lse, out, lse, counters, (sequence * key_heads + key_head) * tiles + tile, part, splits,
            part_rows, result * heads, key_head, tile, query_count, heads, LEVELS, GROUP, M, R, C, VALUE_DIM, CDNA,
        )  # fmt: skip


def missing(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int) -> str | None:
    """None where these kernels run, otherwise the reason in words why they do not."""
    try:
        chip_of(device)
    except ArgumentError as error:
        return str(error)
    if dtype not in DTYPES:
        return f"q is {dtype}; they take float16, bfloat16 and float32"
    most = 256 if dtype == torch.float32 else 512
    for name, x in (("headdim", dim), ("headdim of v_cache", value_dim)):
        if x % 8 or not 8 <= x <= most:
            return f"{name}={x}; they take multiples of 8 up to {most} in {dtype}"
    return None


def attend(
    query: Tensor, cache: Cache, rules: Rules, rotary: Rotary | None = None, appended: int = 0, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """See ringflash.kernels.cpu.decode.attend; `splits` is in how many parts keys are shared out, 0 chooses."""
    (batch, count, heads, dim), key_heads, value_dim = query.shape, cache.key.shape[2], cache.value.shape[3]
    rows, widest = count * heads // key_heads, max(dim, value_dim)
    many = batch * key_heads >= 2 * multiprocessors(query.device)
    sizes = launch_sizes(chip_of(query.device), query.dtype, widest, many)
    tile_rows = min(max(16, 1 << (rows - 1).bit_length()), sizes.queries) if rows else 16
    programs = batch * key_heads * -(-rows // tile_rows)
    if splits == 0 and programs:
        splits = choose_splits(programs, -(-cache.capacity // sizes.keys), multiprocessors(query.device))
    return launch(query, cache, rules, rotary, appended, splits, sizes, tile_rows)


def launch(
    query: Tensor,
    cache: Cache,
    rules: Rules,
    rotary: Rotary | None,
    appended: int,
    splits: int,
    sizes: LaunchSizes,
    tile_rows: int,
) -> tuple[Tensor, Tensor]:
    """`attend` with given sizes and splits."""
    (batch, count, heads, dim), key_heads, value_dim = query.shape, cache.key.shape[2], cache.value.shape[3]
    group = heads // key_heads
    tile_count = -(-count * group // tile_rows)
    out = query.new_empty((batch, count, heads, value_dim))
    lse = query.new_empty((batch, heads, count), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    levels, results, counted = merging(splits)
    parts, parts_lse, zeros = None, None, None
    if levels:
        parts = query.new_empty((results, *out.shape), dtype=torch.float32)
        parts_lse = query.new_empty((results, *lse.shape), dtype=torch.float32)
        zeros = counters(batch * key_heads * tile_count * counted, query.device)
    merged_rows, merged_columns = shape_of_merge(min(count * group, tile_rows), padded(value_dim), sizes.warps)
    # Any bound as large as this is none; larger numbers would overflow in the kernel.
    widest = cache.capacity + appended + count
    slopes, capped, chip = rules.slopes, rules.softcap > 0, chip_of(query.device)
    # Merging would be compiled to share a multiprocessor with more programs than there are, and spill.
    registers = {"maxnreg": sizes.registers} if levels and chip not in ("cdna", "interpreter") else {}
    attend_cache_kernel[(batch * splits * key_heads * tile_count,)](
        query, cache.key, cache.value, out, lse, parts, parts_lse, zeros, overrun_word(cache),
        *cache_operands(cache), *rotary_operands(rotary),
        None if cache.leftpad is None else cache.leftpad.contiguous(),
        slopes if slopes is None or slopes.stride(-1) == 1 else slopes.contiguous(),
        cache.offset, appended, count, cache.capacity, cache.key.shape[0],
        0 if rotary is None else rotary.cos.shape[0], key_heads, splits, tile_count, lse.numel(),
        rules.scale * LOG2_E.value * (2 / rules.softcap if capped else 1.0), float(rules.softcap),
        min(rules.left or 0, widest), min(rules.right or 0, widest),
        *cache_strides(cache, rotary), slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        *query.stride()[:3], *cache.key.stride()[:3], *cache.value.stride()[:3],
        GROUP=group, M=tile_rows, N=sizes.keys, DIM=dim, PADDED_DIM=padded(dim),
        VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim),
        LEVELS=levels, R=merged_rows, C=merged_columns, CDNA=chip == "cdna", OVERRUN=reason_code(cache),
        # One query stands at the last key: nothing is to its right.
        HAS_LEFT=rules.left is not None, HAS_RIGHT=rules.right is not None and count > 1, CAPPED=capped,
        # Pages are looked up as far ahead of their rows' loads as these are of their use.
        **cache_constants(cache, rotary), num_warps=sizes.warps,
        num_stages=sizes.stages if cache.block_table is None else 2 * sizes.stages - 1, **registers,
    )  # fmt: skip
    return out, lse
