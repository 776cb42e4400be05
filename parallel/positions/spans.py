"""Stretches of tokens that see each other whole inside of a causal sequence, as those of an image do."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.segments import Segments


def spans_of(given: Sequence[Sequence[int]]) -> Segments:
    """Spans from what users pass; arguments as in `Mask.causal`."""
    spans = [integers("spans", span) for span in given]
    edges = [edge for span in spans for edge in span]
    whole = all(len(span) == 2 and span[0] < span[1] for span in spans)
    if not whole or any(a > b for a, b in itertools.pairwise([0, *edges])):
        shown = f"{spans[:6]}{'...' if len(spans) > 6 else ''}"
        raise ArgumentError(
            f"spans={shown}; allowed are pairs (start, stop) with 0 <= start < stop, in ascending order and apart"
        )
    return tuple((start, stop) for start, stop in spans)


def tables(spans: Segments) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts, and for each number of them that a position has reached the stop of the last; 0 of none."""
    return tuple(start for start, _ in spans), (0, *(stop for _, stop in spans))


def stop_of(position: int, spans: Segments) -> int:
    """One behind the last token that the one at a position sees: of its span, or itself."""
    index = bisect_right(spans, position, key=lambda span: span[0]) - 1
    return max(position + 1, spans[index][1] if index >= 0 else 0)
