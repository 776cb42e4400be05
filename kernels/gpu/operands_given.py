"""What every kernel on GPUs asks of the operands of a call; what is wrong with them is said in words."""

from __future__ import annotations

from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.modifiers_given import check_modifiers
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import check_blocks
from ringflash.kernels.modifiers import Modifiers


def check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError unless they are (T, H, D), (S, Hk, D) and (S, Hk, Dv) with H a multiple of Hk."""
    if query.shape[1] % key.shape[1] or value.shape[:2] != key.shape[:2] or key.shape[2] != query.shape[2]:
        raise ArgumentError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}; allowed are "
            "(T, H, D), (S, Hk, D), (S, Hk, Dv) with H a multiple of Hk"
        )


def check_scoring(
    query: Tensor, key: Tensor, intervals: KeyIntervals, scale: float, modifiers: Modifiers | None
) -> None:
    """Raise ArgumentError for what says nothing of these rows: intervals, blocks, scale or modifiers."""
    if intervals.query_count != query.shape[0] or intervals.key_count != key.shape[0]:
        raise ArgumentError(
            f"intervals are for {intervals.query_count} query and {intervals.key_count} key rows; "
            f"query has {query.shape[0]}, key has {key.shape[0]}"
        )
    if intervals.blocks is not None:
        check_blocks(intervals.blocks, query, key)
    if not 0.0 < scale < float("inf"):
        raise ArgumentError(f"scale={scale}; allowed are positive finite numbers")
    if modifiers is not None:
        check_modifiers(modifiers, query, key)
