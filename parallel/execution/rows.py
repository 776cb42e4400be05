"""Rows of several tensors that belong together: of key, value and, if any, which keys are visible."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ringflash.parallel.planning.stage_program import Shipment, picked
from ringflash.parallel.transport.shelves import Group, groups

Rows = tuple[Tensor, ...]
"""The same rows of each."""

ALIGNED = 16
"""Bytes at whose multiples each tensor begins, as kernels want."""


def rows_beside(like: Sequence[Tensor], count: int, dtype: torch.dtype | None = None) -> Rows:
    """New contiguous tensors of so many rows each.

    Args:
        like: (rows, ...), tensors whose other dimensions and device they have.
        count: of rows.
        dtype: theirs; each one's own if None.
    """
    return one_behind_another(memory_for(like, count, dtype), like, count, dtype)


def memory_for(like: Sequence[Tensor], count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """New memory for so many rows of each of some tensors: of each dtype one piece."""
    return [like[0].new_empty(size, dtype=kind) for kind, size in _sizes(_kinds(like, dtype), count)]


def one_behind_another(
    memory: list[Tensor], like: Sequence[Tensor], count: int, dtype: torch.dtype | None = None
) -> Rows:
    """Contiguous tensors in `memory_for` them."""
    return _tensors(memory, _behind(_kinds(like, dtype), count))


def row_by_row(memory: list[Tensor], like: Sequence[Tensor], count: int) -> Rows:
    """Tensors in `memory_for` them whose rows lie beside each other, as they come from `shelves`."""
    return _tensors(memory, _beside(_kinds(like, None), count))


def _tensors(memory: list[Tensor], places: list[tuple]) -> Rows:
    return tuple([memory[which].as_strided(*place) for which, *place in places])


Kinds = tuple[tuple[torch.Size, torch.dtype], ...]
"""Of tensors the shape of a row, and the dtype."""


def _kinds(like: Sequence[Tensor], dtype: torch.dtype | None) -> Kinds:
    return tuple([(x.shape[1:], dtype or x.dtype) for x in like])


@lru_cache(maxsize=256)
def _sizes(kinds: Kinds, count: int) -> list[tuple[torch.dtype, int]]:
    """Of each dtype how many numbers there are."""
    sizes: dict[torch.dtype, int] = {}
    for (_, dtype), (*_, end) in zip(kinds, _ends(kinds, count), strict=True):
        sizes[dtype] = max(end, sizes.get(dtype, 0))
    return list(sizes.items())


def _groups(kinds: Kinds) -> tuple[Group, ...]:
    return groups(tuple([(prod(shape) * dtype.itemsize, dtype) for shape, dtype in kinds]))


def _ends(kinds: Kinds, count: int) -> list[tuple[int, int, int]]:
    """Of each tensor which memory it lies in, and where it begins and ends there, in numbers, if it is contiguous.

    Those whose rows may lie beside each other follow each other.
    """
    dtypes = list(dict.fromkeys(dtype for _, dtype in kinds))
    ends: dict[torch.dtype, int] = {}
    found = {}
    for index in (index for group in _groups(kinds) for index in group.members):
        shape, dtype = kinds[index]
        begin, step = ends.get(dtype, 0), max(1, ALIGNED // dtype.itemsize)
        ends[dtype] = begin + -(-count * prod(shape) // step) * step
        found[index] = dtypes.index(dtype), begin, ends[dtype]
    return [found[index] for index in range(len(kinds))]


@lru_cache(maxsize=256)
def _behind(kinds: Kinds, count: int) -> list[tuple]:
    """Of each tensor which memory it lies in, its shape, strides and where it begins."""
    places = zip(kinds, _ends(kinds, count), strict=True)
    return [
        (which, (count, *shape), (prod(shape), *_strides(shape)), begin) for (shape, _), (which, begin, _) in places
    ]


@lru_cache(maxsize=256)
def _beside(kinds: Kinds, count: int) -> list[tuple]:
    """The same where rows lie beside each other."""
    ends, found = _ends(kinds, count), {}
    for group in _groups(kinds):
        which, begin, _ = ends[group.members[0]]
        for index, offset in zip(group.members, group.offsets, strict=True):
            shape, dtype = kinds[index]
            strides = group.row // dtype.itemsize, *_strides(shape)
            found[index] = which, (count, *shape), strides, begin + offset // dtype.itemsize
    return [found[index] for index in range(len(kinds))]


def _strides(shape: torch.Size) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def rows_of(shipment: Shipment, tensors: Rows) -> list[tuple[int, Tensor]]:
    """What goes to, or comes from, a rank: (rank, rows) of each tensor."""
    return [(shipment.peer, picked(x, shipment.rows)) for x in tensors]
