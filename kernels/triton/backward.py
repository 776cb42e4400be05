"""Launches of the backward kernels: the gradient of query first, whose kernel leaves what that of keys reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.plans import Plans, form
from ringflash.kernels.triton.backward_kernels import dkey_kernel, dquery_kernel
from ringflash.kernels.triton.blocks import LOG2_E
from ringflash.kernels.triton.launch import aligned
from ringflash.kernels.triton.modifiers import ModifierOperands, modifier_operands, modifiers_aligned, modifiers_form
from ringflash.kernels.triton.operands import check_operands, operand
from ringflash.kernels.triton.tile_plan import TilePlan
from ringflash.kernels.triton.tiles import Tiles, chip_of, key_gradient_tiles, query_gradient_tiles

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
    call = (
        form(dout), form(query), form(key), form(value), form(lse), form(delta), form(carry), dquery_dtype, dkey_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink, scale, modifiers_form(modifiers), direct,
    )  # fmt: skip
    operands = (query, key, value, dout)
    plan = plans.get(call)
    if plan is None:
        check_operands(query, key, value, intervals, scale, modifiers)
        if dout.dtype != query.dtype:
            raise ArgumentError(f"dout is {dout.dtype}; allowed is the query's dtype, {query.dtype}")
        dropout = modifiers is not None and bool(modifiers.dropout)
        row = (chip_of(query.device), query.dtype, max(query.shape[2], value.shape[2]), dropout)
        of_query = QueryGradientPlan(operands, intervals, scale, query_gradient_tiles(*row), direct, carry is not None)
        of_keys = KeyGradientPlan(operands, intervals, scale, key_gradient_tiles(*row), direct)
        plan = plans.add(call, (of_query, of_keys))
    of_query, of_keys = plan
    modified = modifier_operands(modifiers, scale)
    dquery, pairs = of_query(operands, lse, delta, intervals, modified, carry, dquery_dtype)
    dkey, dvalue = of_keys(operands, pairs, intervals, modified, dkey_dtype)
    return dquery, dkey, dvalue


plans = Plans()
"""`QueryGradientPlan` and `KeyGradientPlan` by what `attend_backward` was asked for."""


class QueryGradientPlan(TilePlan):
    """The launch that gives the gradient of query."""

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
        """Gradient of query, and (H, T, 2) lse in base 2 and delta for `KeyGradientPlan`."""
        in_place = carry is not None and dquery_dtype == torch.float32
        dquery = carry if in_place else operands[0].new_empty(operands[0].shape, dtype=dquery_dtype)
        pairs = lse.new_empty((*lse.shape, 2))
        if self.empty:
            return dquery.zero_() if carry is None else carry.to(dquery_dtype), pairs
        tensors = (
            *map(operand, operands, self.descriptions), lse, delta, dquery, carry, pairs,
            intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop,
            intervals.query_order(self.tile_rows),
        )  # fmt: skip
        self.launch(dquery_kernel, tensors, modifiers)
        return dquery, pairs


class KeyGradientPlan(TilePlan):
    """The launch that gives the gradients of key and value."""

    def __init__(self, operands: Operands, intervals: KeyIntervals, scale: float, tiles: Tiles, direct: bool) -> None:
        scales = (scale, scale * LOG2_E.value)
        super().__init__(operands, intervals, scales, tiles, direct, owns_keys=True)

    def __call__(
        self,
        operands: Operands,
        pairs: Tensor,
        intervals: KeyIntervals,
        modifiers: ModifierOperands,
        dkey_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of key and value; `pairs` as `QueryGradientPlan` leaves them."""
        _, key, value, _ = operands
        dkey, dvalue = (x.new_empty(x.shape, dtype=dkey_dtype) for x in (key, value))
        if self.empty:
            return dkey.zero_(), dvalue.zero_()
        tensors = (
            *map(operand, operands, self.descriptions), pairs, dkey, dvalue,
            intervals.start, intervals.stop, intervals.sink_start, intervals.sink_stop,
            intervals.key_tile_rows(self.tile_rows),
            intervals.key_tile_rows(self.tile_rows, sink=True) if intervals.has_sink else None,
            intervals.key_order(self.tile_rows),
        )  # fmt: skip
        self.launch(dkey_kernel, tensors, modifiers)
        return dkey, dvalue
