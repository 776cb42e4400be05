"""Forward attention over key intervals: one program computes one tile of query rows of one head.

The program walks over the tile's keys in three stretches, of which only the edges are masked, and keeps the online
softmax (Milakov & Gimelshein, arXiv 1805.02867; Dao, arXiv 2307.08691) in base 2 with the scale folded in. A carry is
nothing but its initial state: maximum = lse, sum = 1, accumulator = out.

Legend: M query rows of a tile, N key rows of a block, D head dimension of keys, V of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from ringflash.kernels.gpu.block_lists import NO_LISTS
from ringflash.kernels.gpu.chips import chip_of
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import aligned
from ringflash.kernels.gpu.modifiers_given import modifiers_aligned, modifiers_metadata
from ringflash.kernels.gpu.row_blocks import LN_2, LOG2_E, block_inside, block_offsets, load_block
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry
from ringflash.kernels.sinks import with_sinks
from ringflash.kernels.triton.attend.checks import check_operands
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
    ModifierOperands,
    biased,
    capped,
    dropped,
    kept_pairs,
    modifier_operands,
    of_keys,
    of_rows,
)
from ringflash.kernels.triton.attend.prepared_kernel import PreparedKernel
from ringflash.kernels.triton.attend.tile_sizes import Tiles, forward_tiles

Operands = tuple[Tensor, Tensor, Tensor]
"""query, key, value"""


@triton.jit
def attend_stretch(
    acc_MV, maximum_M, sum_M, q_MD, begin, end, interior, right,
    key, value, key_head, key_count, k_row, k_head, v_row, v_head,
    row_start_M, row_stop_M, scale_log2, modifiers, head, position_M, slope_M, lists, listed, bits_M,
    MASK: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [begin, end), or with lists over the blocks at these places of the tile's list.

    MASK says which blocks are masked: "all", "none", or "edges", which are those outside [interior, right).
    """
    for place in tl.range(begin, end, N if lists.entries is None else 1):
        entry = entry_at(lists, listed, place)
        column = row_of_entry(lists, entry)
        k_ND = load_block(key, key_head, column, key_count, k_row, k_head, N, DIM, PADDED_DIM, DESCRIPTORS)
        scores_MN = tl.dot(q_MD, k_ND.T, input_precision="ieee")
        position_N, shown_N = of_keys(modifiers, column + tl.arange(0, N), key_count)
        scores_MN = capped(scores_MN, modifiers)
        scores_MN = biased(
            scores_MN, modifiers, position_M[:, None], slope_M[:, None], position_N[None, :], shown_N[None, :]
        )
        if MASK == "all" or (MASK == "edges" and (column < interior or column >= right)):
            seen_MN = visible(column + tl.arange(0, N), row_start_M, row_stop_M)
            scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        scores_MN = unlisted_hidden(scores_MN, lists, entry, bits_M, float("-inf"))
        new_maximum_M = tl.maximum(maximum_M, tl.max(scores_MN, 1) * scale_log2)
        offset_M = new_maximum_M
        if (
            MASK != "none" or modifiers.key_visible is not None or lists.bits is not None
        ):  # a row may have seen no key so far: -inf - -inf is not a number
            offset_M = tl.where(new_maximum_M == float("-inf"), 0.0, new_maximum_M)
        weights_MN = tl.exp2(scores_MN * scale_log2 - offset_M[:, None])
        decay_M = tl.exp2(maximum_M - offset_M)
        sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
        if modifiers.seed is not None:
            kept_MN = kept_pairs(modifiers, head, position_M[:, None], position_N[None, :])
            weights_MN = dropped(weights_MN, kept_MN, modifiers)
        acc_MV = acc_MV * decay_M[:, None]
        v_NV = load_block(
            value, key_head, column, key_count, v_row, v_head, N, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS
        )
        acc_MV = tl.dot(weights_MN.to(v_NV.dtype), v_NV, acc_MV, input_precision="ieee")
        maximum_M = new_maximum_M
    return acc_MV, maximum_M, sum_M


@compiled_once
@triton.jit(do_not_specialize=["query_count", "key_count", "tile_count"])
def attend_kernel(
    query, key, value, out, lse, carry_out, carry_lse, start, stop, sink_start, sink_stop, order,
    query_count, key_count, tile_count, heads, scale_log2, q_row, q_head, k_row, k_head, v_row, v_head,
    modifiers, lists,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    HAS_CARRY: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr, SPLIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Program = (key head, tile in `order`, query head of the group), the last fastest.

    So the programs that run at one time share the keys of few heads, which then stay in the cache.
    """
    program = tl.program_id(0)
    key_head = program // (GROUP * tile_count)
    tile = tl.load(order + program // GROUP % tile_count)
    head = key_head * GROUP + program % GROUP
    first_row = tile * M
    last_row = tl.minimum(first_row + M, query_count) - 1
    row_M = first_row + tl.arange(0, M)
    exists_M = row_M < query_count
    lse_M = tl.cast(head, tl.int64) * query_count + row_M
    out_MV = block_offsets(head, first_row, heads, M, VALUE_DIM, PADDED_VALUE_DIM)
    inside_MV = block_inside(first_row, query_count, M, VALUE_DIM, PADDED_VALUE_DIM)

    if HAS_CARRY:
        maximum_M = tl.load(carry_lse + lse_M, mask=exists_M, other=float("-inf")) * LOG2_E
        sum_M = tl.where(maximum_M == float("-inf"), 0.0, 1.0)
        acc_MV = tl.load(carry_out + out_MV, mask=inside_MV & (sum_M[:, None] > 0.0), other=0.0)
    else:
        maximum_M = tl.full([M], float("-inf"), tl.float32)
        sum_M = tl.zeros([M], tl.float32)
        acc_MV = tl.zeros([M, PADDED_VALUE_DIM], tl.float32)

    q_MD = load_block(query, head, first_row, query_count, q_row, q_head, M, DIM, PADDED_DIM, DESCRIPTORS)
    position_M, slope_M = of_rows(modifiers, head, row_M, exists_M)
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
        acc_MV, maximum_M, sum_M = attend_stretch(
            acc_MV, maximum_M, sum_M, q_MD, sink_begin, sink_end, sink_end, sink_end,
            key, value, key_head, key_count, k_row, k_head, v_row, v_head, row_start_M, row_stop_M, scale_log2,
            modifiers, head, position_M, slope_M, lists, listed, bits_M,
            "all", N, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS,
        )  # fmt: skip
    row_start_M = tl.load(start + row_M, mask=exists_M, other=0)
    row_stop_M = tl.load(stop + row_M, mask=exists_M, other=0)
    IN_PARTS: tl.constexpr = SPLIT and lists.entries is None
    bounds = (begin, interior, right, end) if IN_PARTS else (begin, end)
    for part in tl.static_range(3 if IN_PARTS else 1):
        acc_MV, maximum_M, sum_M = attend_stretch(
            acc_MV, maximum_M, sum_M, q_MD, bounds[part], bounds[part + 1], interior, right,
            key, value, key_head, key_count, k_row, k_head, v_row, v_head, row_start_M, row_stop_M, scale_log2,
            modifiers, head, position_M, slope_M, lists, listed, bits_M,
            ("none" if part == 1 else "all") if IN_PARTS else "edges",
            N, DIM, PADDED_DIM, VALUE_DIM, PADDED_VALUE_DIM, DESCRIPTORS,
        )  # fmt: skip

    divisor_M = tl.where(sum_M == 0.0, 1.0, sum_M)  # nan stays: the lse of a row without keys would hide it
    tl.store(out + out_MV, (acc_MV / divisor_M[:, None]).to(out.dtype.element_ty), mask=inside_MV)
    tl.store(lse + lse_M, (maximum_M + tl.log2(divisor_M)) * LN_2, mask=exists_M)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> Carry:
    """See ringflash.kernels.reference.attend. A carry is overwritten where its tensors can hold the result."""
    out_dtype = out_dtype or query.dtype
    if sinks is not None:  # weighed in before anything is rounded
        settings = {"scale": scale, "modifiers": modifiers, "carry": carry, "out_dtype": torch.float32}
        out, lse = with_sinks(*attend(query, key, value, intervals, **settings), sinks)
        return out.to(out_dtype), lse
    carry = carry and (carry[0].contiguous(), carry[1].contiguous())
    carry_out, carry_lse = carry or (None, None)
    ranges = (intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop)
    direct = aligned(query, key, value, carry_out, carry_lse, *ranges) and modifiers_aligned(modifiers)
    operands = (query, key, value)
    call = (
        *map(metadata, (query, key, value, carry_out, carry_lse)), out_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink_tokens,
        intervals.blocks and intervals.blocks.metadata(), scale,
        modifiers_metadata(modifiers), direct or tuple(map(aligned, operands)),
    )  # fmt: skip
    prepared = prepared_calls.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, modifiers)
        dropout = modifiers is not None and bool(modifiers.dropout)
        dim = max(query.shape[2], value.shape[2])
        tiles = forward_tiles(chip_of(query.device), query.dtype, dim, dropout)
        prepared = PreparedForward(operands, intervals, scale, tiles, direct, carry is not None)
        prepared_calls.add(call, prepared)
    return prepared(operands, intervals, modifier_operands(modifiers, scale), carry, out_dtype)


prepared_calls = Kept()
"""`PreparedForward` by what `attend` was asked for."""


class PreparedForward(PreparedKernel):
    """The kernel that gives the result and its log-sum-exp."""

    def __init__(
        self, operands: Operands, intervals: KeyIntervals, scale: float, tiles: Tiles, direct: bool, has_carry: bool
    ) -> None:
        super().__init__(operands, intervals, (scale * LOG2_E.value,), tiles, direct, HAS_CARRY=has_carry)
        (query_count, heads, _), value_dim = operands[0].shape, operands[2].shape[2]
        self.out_shape, self.lse_shape = (query_count, heads, value_dim), (heads, query_count)

    def __call__(
        self,
        operands: Operands,
        intervals: KeyIntervals,
        modifiers: ModifierOperands,
        carry: Carry | None,
        out_dtype: torch.dtype,
    ) -> Carry:
        """Result and lse."""
        query = operands[0]
        if carry and out_dtype == torch.float32:
            out, lse = carry
        else:
            out = query.new_empty(self.out_shape, dtype=out_dtype)
            lse = carry[1] if carry else query.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty:
            if carry:
                return carry[0].to(out_dtype), lse
            return out.zero_(), lse.fill_(-torch.inf)
        tensors = (
            *operands, out, lse, *(carry or (None, None)),
            intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop,
            self.list_order(intervals) if self.has_lists else intervals.query_order(self.sizes[0]),
        )  # fmt: skip
        self.launch(attend_kernel, tensors, modifiers, self.lists(intervals) if self.has_lists else NO_LISTS)
        return out, lse
