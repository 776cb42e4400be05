"""The launches of the kernels that show what a mask shows, for the rows of queries and keys at hand.

A launch shows an interval of keys to each row, or two (ringflash/kernels/intervals.py), and of one interval as much as
a layout of blocks shows. So there is one, but for a layout beside two intervals: then one for each interval.

Legend: T query rows of this rank, S key rows at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import BlockPlaces
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import block_places, key_intervals, layout_on_device


@dataclass(frozen=True)
class Launch:
    """One call of the kernels.

    Attributes:
        intervals: visible key rows of each query row.
        places: where rows stand in a layout that comes with the call; None where none does.
    """

    intervals: KeyIntervals
    places: BlockPlaces | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps, for counting bytes."""
        yield from self.intervals.tensors()
        if self.places is not None:
            yield from self.places.tensors()

    def of_keys(self, first: int, last: int) -> Launch:
        """The same over some of the key rows."""
        return Launch(self.intervals.of_keys(first, last), self.places and self.places.of_keys(first, last))

    def to(self, device: torch.device) -> Launch:
        """The same on another device."""
        return Launch(self.intervals.to(device), self.places and self.places.to(device))

    def showing(self, layout: Tensor | None) -> KeyIntervals:
        """What the kernels take, with the call's layout (G, query blocks, key blocks) if one is wanted."""
        if self.places is None:
            return self.intervals
        if layout is None:
            raise ArgumentError(
                "mask: the sharding's has a layout of blocks that comes with each call, and the call names no mask; "
                "pass one with its layout"
            )
        return self.intervals.with_blocks(self.places.showing(layout))


def launches(
    mask: Mask,
    boundaries: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    query_boundaries: Tensor | None = None,
) -> tuple[Launch, ...]:
    """Launches that show each visible pair once; at least one.

    Args:
        mask: rules; its own document boundaries are not read.
        boundaries: as in `visibility.position_bounds`.
        queries: (T,) int64, ascending global positions of the query rows.
        keys: (S,) int64, ascending global positions of the key rows.
        query_boundaries: as in `visibility.position_bounds`.
    """
    intervals = key_intervals(mask.without_layout, boundaries, queries, keys, query_boundaries)
    places = block_places(mask, boundaries, queries, keys, query_boundaries) if mask.has_layout else None
    return with_layout(mask, intervals, places)


def with_layout(mask: Mask, intervals: KeyIntervals, places: BlockPlaces | None) -> tuple[Launch, ...]:
    """Launches of what a mask shows beside its layout, and of that.

    Args:
        mask: rules.
        intervals: of the mask without its layout.
        places: where rows stand in the layout; None where there is none.
    """
    if places is None:
        return (Launch(intervals),)
    apart = [KeyIntervals(start, stop, intervals.key_count) for start, stop in intervals.ranges()]
    if mask.layout is None:
        return tuple(Launch(one, places) for one in apart)
    blocks = places.showing(layout_on_device(mask.layout, intervals.start.device))
    return tuple(Launch(one.with_blocks(blocks)) for one in apart)
