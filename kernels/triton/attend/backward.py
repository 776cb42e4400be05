"""Launches of the backward kernels: the gradient of query first, whose kernel leaves what that of keys reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.block_lists import NO_LISTS
from ringflash.kernels.gpu.chips import chip_of
from ringflash.kernels.gpu.launcher import aligned
from ringflash.kernels.gpu.modifiers_given import modifiers_aligned, modifiers_metadata
from ringflash.kernels.gpu.row_blocks import LOG2_E
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton.attend.backward_kernels import dkey_kernel, dquery_kernel
from ringflash.kernels.triton.attend.checks import check_operands
from ringflash.kernels.triton.attend.modify_scores import (
    ModifierOperands,
    modifier_operands,
)
from ringflash.kernels.triton.attend.prepared_kernel import PreparedKernel
from ringflash.kernels.triton.attend.tile_sizes import (
    Tiles,
    key_gradient_tiles,
    query_gradient_tiles,
    value_gradient_tiles,
)

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""query, key, value, dout"""


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ringflash.kernels.reference.attend_backward. A carry is overwritten where it can hold the result."""
    dquery_dtype, dkey_dtype = dquery_dtype or query.dtype, dkey_dtype or key.dtype
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    lse, delta, carry = lse.contiguous(), delta.contiguous(), None if carry is None else carry.contiguous()
    ranges = (intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop)
    direct = aligned(query, key, value, dout, lse, delta, carry, *ranges) and modifiers_aligned(modifiers)
    operands = (query, key, value, dout)
    call = (
        *map(metadata, (dout, query, key, value, lse, delta, carry)), dquery_dtype, dkey_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink_tokens,
        intervals.blocks and intervals.blocks.metadata(), scale,
        modifiers_metadata(modifiers), direct or tuple(map(aligned, operands)),
    )  # fmt: skip
    prepared = prepared_calls.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, modifiers)
        if dout.dtype != query.dtype:
            raise ArgumentError(f"dout is {dout.dtype}; allowed is the query's dtype, {query.dtype}")
        dropout = modifiers is not None and bool(modifiers.dropout)
        row = (chip_of(query.device), query.dtype, max(query.shape[2], value.shape[2]), dropout)
        query_tiles, key_tiles = query_gradient_tiles(*row), key_gradient_tiles(*row)
        value_tiles = value_gradient_tiles(*row[:3])
        of_query = PreparedQueryGradient(operands, intervals, scale, query_tiles, direct, carry is not None)
        sums = "both" if value_tiles is None else "key"
        of_keys = PreparedKeyGradient(operands, intervals, scale, key_tiles, direct, sums)
        of_values = value_tiles and PreparedKeyGradient(operands, intervals, scale, value_tiles, direct, "value")
        prepared = prepared_calls.add(call, (of_query, of_keys, of_values))
    of_query, of_keys, of_values = prepared
    modified = modifier_operands(modifiers, scale)
    dquery, pairs = of_query(operands, lse, delta, intervals, modified, carry, dquery_dtype)
    dkey, dvalue = of_keys(operands, pairs, intervals, modified, dkey_dtype)
    if of_values is not None:
        _, dvalue = of_values(operands, pairs, intervals, modified, dkey_dtype)
    return dquery, dkey, dvalue


prepared_calls = Kept()
"""`PreparedQueryGradient` and `PreparedKeyGradient`, perhaps another one for values, by what was asked for."""


class PreparedQueryGradient(PreparedKernel):
    """The kernel that gives the gradient of query."""

    def __init__(
        self, operands: Operands, intervals: KeyIntervals, scale: float, tiles: Tiles, direct: bool, has_carry: bool
    ) -> None:
        scales = (scale, scale * LOG2_E.value)
        super().__init__(operands, intervals, scales, tiles, direct, HAS_CARRY=has_carry)

    def __call__(
        self,
        operands: Operands,
        lse: Tensor,
        delta: Tensor,
        intervals: KeyIntervals,
        modifiers: ModifierOperands,
        carry: Tensor | None,
        dquery_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Gradient of query, and (H, T, 2) lse in base 2 and delta for `PreparedKeyGradient`."""
        in_place = carry is not None and dquery_dtype == torch.float32
        dquery = carry if in_place else operands[0].new_empty(operands[0].shape, dtype=dquery_dtype)
        pairs = lse.new_empty((*lse.shape, 2))
        if self.empty:
            return dquery.zero_() if carry is None else carry.to(dquery_dtype), pairs
        tensors = (
            *operands, lse, delta, dquery, carry, pairs,
            intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop,
            self.list_order(intervals) if self.has_lists else intervals.query_order(self.sizes[0]),
        )  # fmt: skip
        self.launch(dquery_kernel, tensors, modifiers, self.lists(intervals) if self.has_lists else NO_LISTS)
        return dquery, pairs


class PreparedKeyGradient(PreparedKernel):
    """The kernel that gives the gradients of key and value, or with `sums` "key" or "value" that one alone."""

    def __init__(
        self,
        operands: Operands,
        intervals: KeyIntervals,
        scale: float,
        tiles: Tiles,
        direct: bool,
        sums: str = "both",
    ) -> None:
        scales = (scale, scale * LOG2_E.value)
        super().__init__(operands, intervals, scales, tiles, direct, owns_keys=True, SUMS=sums)
        self.sums = sums

    def __call__(
        self,
        operands: Operands,
        pairs: Tensor,
        intervals: KeyIntervals,
        modifiers: ModifierOperands,
        dkey_dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of key and value, None for what is not summed; `pairs` as `PreparedQueryGradient` leaves them."""
        _, key, value, _ = operands
        dkey = None if self.sums == "value" else key.new_empty(key.shape, dtype=dkey_dtype)
        dvalue = None if self.sums == "key" else value.new_empty(value.shape, dtype=dkey_dtype)
        if self.empty:
            return tuple(x if x is None else x.zero_() for x in (dkey, dvalue))
        tensors = (
            *operands, pairs, dkey, dvalue,
            intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop,
            intervals.key_tile_rows(self.sizes[0]),
            intervals.key_tile_rows(self.sizes[0], sink_tokens=True) if intervals.has_sink_tokens else None,
            self.list_order(intervals) if self.has_lists else intervals.key_order(self.sizes[0]),
        )  # fmt: skip
        self.launch(dkey_kernel, tensors, modifiers, self.lists(intervals) if self.has_lists else NO_LISTS)
        return dkey, dvalue
