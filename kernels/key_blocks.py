"""Which blocks of keys each block of queries sees, beside the intervals: for masks that are no interval of keys.

A layout says it, a matrix of booleans for each group of heads, and each query row and each key row of a launch has its
place in it. So blocks may be of any size, begin where documents do, and lie in pieces in the rows of a shard. The
layout may be a router's, on a GPU: nothing here is read by the host but what `BlockPlaces.units` promises of places.

What kernels read are lists made of it on the device (`ringflash.kernels.gpu.block_lists`): for each of their tiles the
blocks of the other side that it visits, whole ones as they lie, and others with a mask.

Legend: T query rows, S key rows, G groups of heads, R and C rows and columns of the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from ringflash.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class BlockPlaces:
    """Where the rows of a launch stand in a layout that is still to come.

    Attributes:
        query_block: (T,) int32, the layout's row of each query row.
        key_block: (S,) int32, the layout's column of each key row.
        units: rows and keys. As many query rows from each multiple of units[0] on are known to stand in one row of the
            layout, and key rows likewise; powers of two.
    """

    query_block: Tensor
    key_block: Tensor
    units: tuple[int, int]

    def tensors(self) -> Iterator[Tensor]:
        """All of it, for counting bytes."""
        yield from (x for x in vars(self).values() if isinstance(x, Tensor))

    def of_keys(self, first: int, last: int) -> Self:
        """The same over some of the key rows, in memory of their own: kernels rely on where tensors begin."""
        units = self.units[0], math.gcd(self.units[1], first)
        return replace(self, key_block=self.key_block[first:last].clone(), units=units)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def showing(self, shown: Tensor) -> KeyBlocks:
        """With the layout."""
        return KeyBlocks(self.query_block, self.key_block, self.units, shown)


@dataclass(frozen=True, eq=False)
class KeyBlocks(BlockPlaces):
    """A layout, and where the rows of a launch stand in it.

    Attributes:
        shown: (G, R, C) bool, whether queries of a row of the layout see keys of a column. G divides the key heads, and
            the heads of a group follow each other.
    """

    shown: Tensor

    def visible(self) -> Tensor:
        """Dense boolean (G, T, S) matrix of pairs that the layout shows, for the dense reference."""
        return self.shown[:, self.query_block.long()][:, :, self.key_block.long()]

    def metadata(self) -> tuple:
        """All that launches depend on, but for the rows and their number."""
        return self.shown.shape, self.units


def check_blocks(blocks: KeyBlocks, query: Tensor, key: Tensor) -> None:
    """Raise ArgumentError unless blocks are for these rows (T, H, D) and (S, Hk, D)."""
    rows = len(blocks.query_block), len(blocks.key_block)
    if rows != (query.shape[0], key.shape[0]):
        raise ArgumentError(
            f"blocks are for {rows[0]} query and {rows[1]} key rows; query has {query.shape[0]}, key has {key.shape[0]}"
        )
    groups = blocks.shown.shape[0]
    if not groups or key.shape[1] % groups:
        raise ArgumentError(
            f"blocks are of {groups} groups of heads; allowed are divisors of the {key.shape[1]} key heads"
        )


UNITS = (128, 64, 32, 16)
"""What `unit_of` tells apart: kernels' tiles are no longer, and shorter ones are as good as none."""


def unit_of(places: Tensor) -> int:
    """The largest of `UNITS`, or 1, of which as many rows from each multiple on have the same place; on the CPU."""
    changes = (places[1:] != places[:-1]).nonzero()[:, 0] + 1
    return next((unit for unit in UNITS if not (changes % unit).any()), 1)
