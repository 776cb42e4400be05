"""Documents laid end to end: their boundaries, checked, searched and intersected.

Boundaries ascend from 0; document i holds positions [boundaries[i], boundaries[i + 1]) and may be empty. Tokens behind
the last boundary, as padding is, belong to no document: they see nothing, and nobody sees them. Queries may have
boundaries of their own, in cross attention or where a cache is longer than the queries. There are as many of them, and
document i of the queries belongs to document i of the keys. None in their place: they are those of the keys.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

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


def document_at(position: int, boundaries: Boundaries) -> int | None:
    """Index of the document that holds a position; None behind the last one."""
    if position < 0:
        raise ArgumentError(f"position {position} lies before the documents; allowed is 0 and more")
    index = bisect_right(boundaries, position) - 1
    return index if index < len(boundaries) - 1 else None


def longest(boundaries: Boundaries) -> int:
    """Tokens of the longest document; 0 where there is none."""
    return max((b - a for a, b in itertools.pairwise(boundaries)), default=0)


def refine(
    a: tuple[Boundaries | None, Boundaries | None], b: tuple[Boundaries | None, Boundaries | None]
) -> tuple[Boundaries | None, Boundaries | None]:
    """Boundaries of keys and of queries that separate what either of two such pairs separates; (None, None) nothing."""
    if a[0] is None or b[0] is None:
        return b if a[0] is None else a
    # `index` pins numbers that torch.compile would take for unknown: it does not sort those.
    pinned = ([tuple(map(operator.index, bounds or of[0] or ())) for bounds in of] for of in (a, b))
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


def rows_apart(
    keys: Boundaries | None, queries: Boundaries | None, batch: int, key_seqlen: int, seqlen: int
) -> tuple[Boundaries, Boundaries | None]:
    """Boundaries of documents that also end where the sequences of a batch do, as far as documents reach.

    Args:
        keys: boundaries over the batch * key_seqlen keys, or None for one document in each sequence.
        queries: those of the batch * seqlen queries, where they differ.
        batch: number of sequences laid end to end.
        key_seqlen: keys of a sequence.
        seqlen: queries of a sequence.
    """
    ends = [(i * key_seqlen, i * seqlen) for i in range(batch + 1)]
    if keys is not None:
        own = keys if queries is None else queries
        for name, bounds, total in (("cu_seqlens", keys, ends[-1][0]), ("query_cu_seqlens", own, ends[-1][1])):
            if bounds[-1] > total:
                name = name if queries is not None else "cu_seqlens"
                raise ArgumentError(f"{name} ends at {bounds[-1]}, behind the last of {total} tokens over all ranks")
        if batch == 1:
            return keys, queries
        last = keys[-1], own[-1]
        ends = [*((key, query) for key, query in ends if key <= last[0] and query <= last[1]), last]
    of_keys, of_queries = (tuple(bounds) for bounds in zip(*dict.fromkeys(ends), strict=True))
    rows = of_keys, None if of_queries == of_keys else of_queries
    found: Any = rows if keys is None else refine((keys, queries), rows)
    return found


def _checked_boundaries(name: str, cu_seqlens: Sequence[int]) -> Boundaries:
    bounds = integers(name, cu_seqlens)
    if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in itertools.pairwise(bounds)):
        shown = f"{bounds[:6]}{'...' if len(bounds) > 6 else ''}"
        raise ArgumentError(f"{name}={shown}; it must start at 0, never decrease, and end at the total length")
    return bounds
