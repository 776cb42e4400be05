"""Rows of several tensors that belong together: of key, value and, if any, which keys are visible."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ringflash.parallel.planning.program import Shipment, picked

Rows = tuple[Tensor, ...]
"""The same rows of each."""

ALIGNED = 16
"""Bytes at whose multiples each tensor begins, as kernels want."""


def rows_beside(like: Sequence[Tensor], count: int, dtype: torch.dtype | None = None) -> Rows:
    """New tensors of so many rows each, those of one dtype behind one another in memory: one copy can fill them.

    Args:
        like: (rows, ...), tensors whose other dimensions and device they have.
        count: of rows.
        dtype: theirs; each one's own if None.
    """
    found: list[Tensor] = []
    for kind in dict.fromkeys(dtype or x.dtype for x in like):
        alike = [x for x in like if (dtype or x.dtype) == kind]
        step = max(1, ALIGNED // kind.itemsize)
        sizes = [-(-count * prod(x.shape[1:]) // step) * step for x in alike]
        memory = alike[0].new_empty(sum(sizes), dtype=kind)
        for x, part in zip(alike, memory.split(sizes), strict=True):
            found.append(part[: count * prod(x.shape[1:])].view(count, *x.shape[1:]))
    return tuple(found)


def rows_of(shipment: Shipment, tensors: Rows) -> list[tuple[int, Tensor]]:
    """What goes to, or comes from, a rank: (rank, rows) of each tensor."""
    return [(shipment.peer, picked(x, shipment.rows)) for x in tensors]
