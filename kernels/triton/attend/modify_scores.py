"""Modifies the scores of one block of pairs as ringflash.kernels.modifiers defines, for forward and backward alike.

The kernels keep scores raw, as query . key, and multiply by the scale where they exponentiate. Softcap and slopes are
divided by the scale instead, which comes to the same. A field that is None takes its step out of the kernel when it is
compiled. Positions and slopes come broadcast, (M, 1) and (1, N) or transposed, so the orientation is the caller's.

Legend: M query rows, N key rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

import triton
import triton.language as tl
from ringflash.kernels.modifiers import Modifiers, dropout_threshold


class ModifierOperands(NamedTuple):
    """Modifiers as the kernels take them; None for what is not asked for."""

    softcap: float | None = None
    """Divided by the scale."""
    slopes: Tensor | None = None
    slopes_row: int | None = None
    slopes_head: int | None = None
    inverse_scale: float | None = None
    """What slopes are multiplied by."""
    seed: Tensor | None = None
    threshold: int | None = None
    """Random words below it, as unsigned numbers, drop their pair."""
    inverse_kept: float | None = None
    """1 / (1 - dropout)."""
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    key_visible: Tensor | None = None
    first_head: int | None = None
    """Added to the numbers of heads; None for 0, of which kernels know nothing."""


def modifier_operands(modifiers: Modifiers | None, scale: float) -> ModifierOperands:
    """The operands of checked modifiers."""
    if modifiers is None:
        return ModifierOperands()
    operands = ModifierOperands(
        softcap=modifiers.softcap / scale if modifiers.softcap else None,
        key_visible=None if modifiers.key_visible is None else modifiers.key_visible.contiguous(),
    )
    if (slopes := modifiers.slopes) is not None:
        row, head = slopes.stride()
        operands = operands._replace(slopes=slopes, slopes_row=row, slopes_head=head, inverse_scale=1 / scale)
    if modifiers.dropout:
        threshold = dropout_threshold(modifiers.dropout)
        operands = operands._replace(
            seed=modifiers.seed,
            # Of the same bits as a signed number: an argument's type must not depend on its value.
            threshold=threshold - (threshold >> 31 << 32),
            inverse_kept=1 / (1 - modifiers.dropout),
            first_head=modifiers.first_head or None,
        )
    if modifiers.slopes is not None or modifiers.dropout:
        operands = operands._replace(
            query_positions=modifiers.query_positions.contiguous(), key_positions=modifiers.key_positions.contiguous()
        )
    return operands


@triton.jit
def of_rows(modifiers, head, row_M, exists_M):
    """(positions, slopes) of query rows; zeros that nobody reads where no modifier needs them."""
    position_M = tl.zeros(row_M.shape, tl.int32)
    slope_M = tl.zeros(row_M.shape, tl.float32)
    if modifiers.query_positions is not None:
        position_M = tl.load(modifiers.query_positions + row_M, mask=exists_M, other=0)
    if modifiers.slopes is not None:
        offset_M = row_M.to(tl.int64) * modifiers.slopes_row + tl.cast(head, tl.int64) * modifiers.slopes_head
        slope_M = tl.load(modifiers.slopes + offset_M, mask=exists_M, other=0.0) * modifiers.inverse_scale
    return position_M, slope_M


@triton.jit
def of_keys(modifiers, column_N, key_count):
    """(positions, whether visible) of key rows; zeros that nobody reads where no modifier needs them."""
    position_N = tl.zeros(column_N.shape, tl.int32)
    shown_N = tl.zeros(column_N.shape, tl.int1)
    if modifiers.key_positions is not None:
        position_N = tl.load(modifiers.key_positions + column_N, mask=column_N < key_count, other=0)
    if modifiers.key_visible is not None:
        shown_N = tl.load(modifiers.key_visible + column_N, mask=column_N < key_count, other=0) != 0
    return position_N, shown_N


@triton.jit
def capped(scores, modifiers):
    """Raw scores after the softcap."""
    if modifiers.softcap is not None:
        scores = modifiers.softcap * tanh(scores / modifiers.softcap)
    return scores


@triton.jit
def through_cap(dscores, capped_scores, modifiers):
    """The gradient of what `capped` returned, brought to what it was given."""
    if modifiers.softcap is not None:
        bent = capped_scores / modifiers.softcap
        dscores = dscores * (1.0 - bent * bent)
    return dscores


@triton.jit
def biased(scores, modifiers, query_position, slope, key_position, shown):
    """Capped scores with ALiBi, -inf where the key is padding."""
    if modifiers.slopes is not None:
        scores = scores - slope * tl.abs(query_position - key_position).to(tl.float32)
    if modifiers.key_visible is not None:
        scores = tl.where(shown, scores, float("-inf"))
    return scores


@triton.jit
def blind_rows_aside(lse, modifiers):
    """Log-sum-exp for weights exp(score - lse): inf in rows without keys, whose weights are then 0 without a mask."""
    if modifiers.key_visible is not None:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse


@triton.jit
def kept_pairs(modifiers, head, query_position, key_position):
    """Which pairs dropout keeps; only with dropout."""
    if modifiers.first_head is not None:
        head += modifiers.first_head
    word, _, _, _ = tl.philox(tl.load(modifiers.seed), key_position, query_position, head, 0)
    return word >= tl.cast(modifiers.threshold, tl.uint32, bitcast=True)


@triton.jit
def dropped(weights, kept, modifiers):
    """Weights, or gradients of weights, after dropout."""
    return tl.where(kept, weights * modifiers.inverse_kept, 0.0)


@triton.jit
def tanh(x):
    """Within 3 units of float32's last place, small arguments included; Triton itself has none on every backend."""
    square = x * x
    # A polynomial of tanh(x) / x in x * x, fitted at Chebyshev nodes: 1 - 2 / (exp(2 x) + 1) would cancel here.
    series = -0.05385250 + square * (0.02100364 + square * -0.00610495)
    small = x + x * square * (-0.33333329 + square * (0.13332782 + square * series))
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.885390081777927) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))
