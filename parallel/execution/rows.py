"""Rows of several tensors that belong together: of key, value and, if any, which keys are visible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ringflash.parallel.planning.stage_program import Shipment, picked

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
    for kind, size, places in _places(tuple([(x.shape[1:], dtype or x.dtype) for x in like]), count):
        memory = like[0].new_empty(size, dtype=kind)
        found += [memory.as_strided(*place) for place in places]
    return tuple(found)


@lru_cache(maxsize=256)
def _places(
    kinds: tuple[tuple[torch.Size, torch.dtype], ...], count: int
) -> list[tuple[torch.dtype, int, list[tuple[tuple[int, ...], tuple[int, ...], int]]]]:
    """Of each dtype how many numbers there are, and shape, strides and beginning of each tensor among them."""
    found = []
    for kind in dict.fromkeys(kind for _, kind in kinds):
        places, size, step = [], 0, max(1, ALIGNED // kind.itemsize)
        for shape in (shape for shape, of in kinds if of == kind):
            whole = (count, *shape)
            strides = tuple(prod(whole[i + 1 :]) for i in range(len(whole)))
            places.append((whole, strides, size))
            size += -(-prod(whole) // step) * step
        found.append((kind, size, places))
    return found


def rows_of(shipment: Shipment, tensors: Rows) -> list[tuple[int, Tensor]]:
    """What goes to, or comes from, a rank: (rank, rows) of each tensor."""
    return [(shipment.peer, picked(x, shipment.rows)) for x in tensors]
