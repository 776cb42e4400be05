"""Documents laid end to end: their boundaries, checked, searched and intersected.

Boundaries ascend from 0 to the number of tokens; document i holds positions [boundaries[i], boundaries[i + 1]) and may
be empty. Queries may have boundaries of their own, in cross attention or where a cache is longer than the queries.
There are as many of them, and document i of the queries belongs to document i of the keys. None in their place: they
are those of the keys.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.integers import integers

Boundaries = tuple[int, ...]


def boundaries_of(
    cu_seqlens: Sequence[int], query_cu_seqlens: Sequence[int] | None
) -> tuple[Boundaries, Boundaries | None]:
    """Boundaries of keys and of queries, from what users pass; arguments as in `Mask.documents`."""
    keys = _checked_boundaries("cu_seqlens", cu_seqlens)
    queries = keys if query_cu_seqlens is None else _checked_boundaries("query_cu_seqlens", query_cu_seqlens)
    if len(queries) != len(keys):
        raise ArgumentError(f"query_cu_seqlens has {len(queries)} boundaries, cu_seqlens {len(keys)}; make them agree")
    return keys, None if queries == keys else queries


def document_at(position: int, boundaries: Boundaries) -> int:
    """Index of the document that holds a position."""
    index = bisect_right(boundaries, position) - 1
    if not 0 <= index < len(boundaries) - 1:
        raise ArgumentError(f"position {position} lies outside the documents, which end at {boundaries[-1]}")
    return index


def longest(boundaries: Boundaries) -> int:
    """Tokens of the longest document."""
    return max(b - a for a, b in itertools.pairwise(boundaries))


def refine(
    a: tuple[Boundaries | None, Boundaries | None], b: tuple[Boundaries | None, Boundaries | None]
) -> tuple[Boundaries | None, Boundaries | None]:
    """Boundaries of keys and of queries that separate what either of two such pairs separates; (None, None) nothing."""
    if a[0] is None or b[0] is None:
        return b if a[0] is None else a
    # `index` pins numbers that torch.compile would take for unknown: it does not sort those.
    pinned = ([tuple(map(operator.index, bounds or of[0])) for bounds in of] for of in (a, b))
    pairs_a, pairs_b = (tuple(zip(*of, strict=True)) for of in pinned)
    if pairs_a[-1] != pairs_b[-1]:
        raise ArgumentError(f"cannot intersect documents that end at {pairs_a[-1][0]} and at {pairs_b[-1][0]} tokens")
    pairs = next((x for x, y in ((pairs_a, pairs_b), (pairs_b, pairs_a)) if set(y) <= set(x)), None)
    if pairs is None:  # each as often as either has it, for empty documents count where each has a prefix length
        most = Counter(pairs_a) | Counter(pairs_b)
        pairs = sorted(pair for pair, times in most.items() for _ in range(times))  # torch 2.11 traces no .elements()
    keys, queries = zip(*pairs, strict=True)
    if any(x > y for x, y in itertools.pairwise(queries)):
        raise ArgumentError("cannot intersect documents whose query and key boundaries cross")
    return keys, None if queries == keys else queries


def _checked_boundaries(name: str, cu_seqlens: Sequence[int]) -> Boundaries:
    bounds = integers(name, cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = f"{bounds[:6]}{'...' if len(bounds) > 6 else ''}"
        raise ArgumentError(f"{name}={shown}; it must start at 0, never decrease, and end at the total length")
    return bounds
