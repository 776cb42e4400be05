"""Rows that are added to sums one after another, so that the sums are the same bit for bit wherever that is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """What is added to some rows of a sum.

    Attributes:
        which: of the sums.
        rows: of the sum, ascending; a slice with both ends or indices.
        address: of the contiguous rows that are added, of the sum's dtype.
        tensor: makes a tensor of them.
    """

    which: int
    rows: slice | Tensor
    address: int
    tensor: Callable[[], Tensor]


def add_rows(sums: Sequence[Tensor], parts: Sequence[Part]) -> None:
    """Add parts to tensors (rows, ...), in this order."""
    for part in parts:
        total, added = sums[part.which], part.tensor()
        if isinstance(part.rows, Tensor):
            total.index_add_(0, part.rows, added.to(total.dtype))
        else:
            total[part.rows].add_(added)
