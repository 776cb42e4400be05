"""Cuts the visible pairs of a call into few rectangles, for kernels that work rectangle by rectangle.

A document under a causal mask is one rectangle however long it is, the interior of a window needs no mask, and what
nobody sees is in no rectangle.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import KeyBlocks

STRIP = 128
"""Rows of a rectangle whose rows see different keys, unless they follow one of the two patterns of `_strips`."""

BLOCK = (128, 512)
"""Most rows and keys of a small rectangle: its scores, 256 KiB a head, stay in cache."""


class Kind(enum.Enum):
    """Which pairs of a rectangle are visible."""

    FULL = "all of them"
    CAUSAL = "row i of the rectangle sees its keys up to i; as many keys as rows"
    PARTIAL = "each pair has to be looked at"


class Rectangle(NamedTuple):
    """A rectangle of query rows x key rows, and which range of the rows it shows: 0 for keys, 1 for sink tokens.

    heads: of which key heads.
    """

    rows: slice
    keys: slice
    kind: Kind
    range: int
    heads: slice = slice(None)


def rectangles(intervals: KeyIntervals, large: bool, key_heads: int = 1) -> list[Rectangle]:
    """The rectangles of a call, each visible pair in exactly one.

    Args:
        intervals: what each row sees; read in one copy, and the list is kept with them.
        large: FULL and CAUSAL rectangles may be of any size; else rectangles are BLOCK at most, and none is CAUSAL.
        key_heads: of the call.
    """

    def build() -> list[Rectangle]:
        if not intervals.query_count:
            return []
        bounds = torch.stack([bound for pair in intervals.ranges() for bound in pair]).cpu().numpy().astype(np.int64)
        ranges = bounds.reshape(-1, 2, intervals.query_count)
        make = _large_rectangles if large else _small_rectangles
        return list(make(ranges) if intervals.blocks is None else _in_blocks(ranges, intervals.blocks, key_heads, make))

    return intervals.kept(("rectangles", large, key_heads), build, of_blocks=True)


def visible(rectangle: Rectangle, intervals: KeyIntervals) -> Tensor | None:
    """(R, K) visible pairs of a PARTIAL rectangle."""
    if rectangle.kind is not Kind.PARTIAL:
        return None
    column = torch.arange(rectangle.keys.start, rectangle.keys.stop, device=intervals.start.device)
    start, stop = intervals.ranges()[rectangle.range]
    return (start[rectangle.rows, None] <= column) & (column < stop[rectangle.rows, None])


def _in_blocks(
    ranges: np.ndarray, blocks: KeyBlocks, key_heads: int, make: Callable[[np.ndarray], Iterator[Rectangle]]
) -> Iterator[Rectangle]:
    """Rectangles within runs of rows that stand in one row of the layout, and of keys that it shows to them."""
    shown, query_block, key_block = (x.cpu().numpy() for x in (blocks.shown, blocks.query_block, blocks.key_block))
    edges = _edges(query_block)
    for group, layout in enumerate(shown):
        heads = slice(*(key_heads // len(shown) * n for n in (group, group + 1)))
        for first, last in pairwise(edges):
            keys = layout[query_block[first], key_block]
            for start, stop in pairwise(_edges(keys)):
                if not keys[start]:
                    continue
                for found in make(ranges[:, :, first:last].clip(start, stop)):
                    rows = slice(found.rows.start + first, found.rows.stop + first)
                    yield found._replace(rows=rows, heads=heads)


def _edges(x: np.ndarray) -> list[int]:
    """Where runs of equal values begin, and the end."""
    return [0, *(np.flatnonzero(x[1:] != x[:-1]) + 1).tolist(), len(x)] if len(x) else []


def _large_rectangles(ranges: np.ndarray) -> Iterator[Rectangle]:
    ranges[:, 1] = ranges.max(1)  # a range that ends before it starts is empty
    for first, last in _strips(ranges):
        for index, (start, stop) in enumerate(ranges[:, :, first:last]):
            for rows, keys, kind in _strip_rectangles(start, stop):
                yield Rectangle(slice(first + rows, last), slice(*keys), kind, index)


def _strips(ranges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows to be cut into rectangles together.

    A run of any length in which every row sees the same keys, or one key more than the row before (as within a causal
    document), needs no mask at all. Rows of no such run go STRIP at a time.
    """
    steps = np.diff(ranges)
    still = (steps[0, 0] == 0) & (steps[1:] == 0).all((0, 1))
    link = np.where(still & (steps[0, 1] <= 1), steps[0, 1] + 1, 0)  # to the row before: 1 same keys, 2 one more
    before = np.concatenate([[0], link[:-1]])
    edges = np.flatnonzero((link == 0) | ((link != before) & (before != 0))) + 1
    edges = np.concatenate([[0], edges, [ranges.shape[2]]])
    done = 0
    for run in np.flatnonzero(np.diff(edges) >= STRIP):
        yield from _short_strips(ranges, done, edges[run])
        yield edges[run], edges[run + 1]
        done = edges[run + 1]
    yield from _short_strips(ranges, done, ranges.shape[2])


def _short_strips(ranges: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
    for row in range(first, last, STRIP):
        yield from _thrifty(ranges, row, min(row + STRIP, last))


def _thrifty(ranges: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Halves a strip while most of what its rows span together is hidden, as where documents are many."""
    count, start, stop = last - first, ranges[:, 0, first:last], ranges[:, 1, first:last]
    visible = (stop - start).sum()
    hidden = count * (stop[:, -1] - start[:, 0]).sum() - visible
    if count > 1 and hidden > max(visible, count * STRIP):
        yield from _thrifty(ranges, first, first + count // 2)
        yield from _thrifty(ranges, first + count // 2, last)
    else:
        yield first, last


def _strip_rectangles(start: np.ndarray, stop: np.ndarray) -> Iterator[tuple[int, tuple[int, int], Kind]]:
    """(first row of the strip, keys, kind) of the rectangles of one strip."""
    seeing = np.flatnonzero(start < stop)
    if not seeing.size:
        return
    skipped = int(seeing[0])
    start, stop = start[skipped:].tolist(), stop[skipped:].tolist()
    rising = len(stop) > 1 and stop == list(range(stop[0], stop[0] + len(stop)))
    # Keys that all rows see lie between; the causal rectangle takes the first row's last key too.
    inner = (start[-1], stop[0] - rising)
    constant = start[0] == start[-1]
    if inner[1] - inner[0] < STRIP and not (constant and (rising or stop[0] == stop[-1])):
        yield skipped, (start[0], stop[-1]), Kind.PARTIAL
        return
    if start[0] < inner[0]:
        yield skipped, (start[0], inner[0]), Kind.PARTIAL
    if inner[0] < inner[1]:
        yield skipped, inner, Kind.FULL
    if inner[1] < stop[-1]:
        yield skipped, (inner[1], stop[-1]), Kind.CAUSAL if rising else Kind.PARTIAL


def _small_rectangles(ranges: np.ndarray) -> Iterator[Rectangle]:
    row_count = ranges.shape[2]
    for first in range(0, row_count, BLOCK[0]):
        last = min(first + BLOCK[0], row_count)
        for index, (start, stop) in enumerate(ranges[:, :, first:last].tolist()):
            for key in range(start[0], stop[-1], BLOCK[1]):
                key_last = min(key + BLOCK[1], stop[-1])
                full = start[-1] <= key and key_last <= stop[0]
                yield Rectangle(slice(first, last), slice(key, key_last), Kind.FULL if full else Kind.PARTIAL, index)
