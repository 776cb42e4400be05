"""Arithmetic on sets of positions, kept as ascending tuples of disjoint half-open intervals."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[int, int]
"""Half-open range of positions [start, stop)."""

Segments = tuple[Interval, ...]
"""Ascending, disjoint, non-empty half-open intervals of global positions."""


def normalize(intervals: Iterable[Interval]) -> Segments:
    """Sort, drop empty intervals and join those that touch or overlap."""
    joined: list[list[int]] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return tuple((start, stop) for start, stop in joined)


def intersect(a: Segments, b: Segments) -> Segments:
    """Positions in both sets; intervals of `a` that touch each other stay apart."""
    if not a or not b or a[-1][1] <= b[0][0] or b[-1][1] <= a[0][0]:
        return ()
    common = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            common.append((start, stop))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(common)


def cut(segments: Segments, first: int, last: int) -> Segments:
    """The positions from the `first` of them up to, not including, the `last`, by their number."""
    parts, before = [], 0
    for start, stop in segments:
        parts.append((max(start, start + first - before), min(stop, start + last - before)))
        before += stop - start
    return tuple((start, stop) for start, stop in parts if start < stop)


def contains(outer: Segments, inner: Segments) -> bool:
    """Whether every position of `inner` is in `outer`."""
    return count(intersect(normalize(outer), normalize(inner))) == count(normalize(inner))


def count(segments: Segments) -> int:
    """Number of positions."""
    return sum(stop - start for start, stop in segments)
