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


def contains(outer: Segments, inner: Segments) -> bool:
    """Whether every position of `inner` is in `outer`."""
    return count(intersect(normalize(outer), normalize(inner))) == count(normalize(inner))


def count(segments: Segments) -> int:
    """Number of positions."""
    return sum(stop - start for start, stop in segments)
