"""Heads for tokens: ranks that follow each other have the tokens of all of them, each for a part of the heads.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509), and the outer part of any plan (USP, Fang and Zhao, arXiv
2405.07719): ranks that exchange heads stand for one rank, whose share of the sequence is the union of theirs, and the
plan is one of such unions. It is carried out among the ranks that have the same part of the heads.

    ranks 0 1 2 3, two of which exchange:   0 and 1 have one union, 2 and 3 another; 0 and 2 form a ring, and 1 and 3
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.row_places import segment_positions
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.segments import Segments, count

MOST_RUNS = 4
"""Runs of rows of one rank that travel apart to arrive in their places; of more, the host would have more to ask for
than the GPU to bring into order."""


ROOM = 2**30
"""Bytes that the queries' gradient may take in fp32 before fewer heads are worked on at a time (`head_groups`). Where
it takes more, launches over half of the heads still fill a GPU many times over."""


LONG = 2**15
"""Keys that a query sees on average from which on heads may be worked on in groups, whose results are copied to where
those of all heads lie: a hundredth of the time of attention to so many, and more of attention to fewer."""


def rows_in_groups(rows: int, seen: float) -> int:
    """What `head_groups` is told of rows: none where attention is too short for it.

    Args:
        rows: of queries, on the rank that has the most.
        seen: keys that a query sees on average.
    """
    return rows if seen >= LONG else 0


def check_head_ranks(head_ranks: int, ranks: int) -> None:
    """Raise ArgumentError unless the ranks that share a sequence can be divided by as many as exchange heads."""
    (found,) = integers("head_ranks", (head_ranks,))
    if found < 1 or ranks % found:
        raise ArgumentError(
            f"head_ranks={head_ranks!r}; allowed are numbers that divide the {ranks} ranks of a sequence"
        )


def check_heads(heads: int, head_ranks: int) -> None:
    """Raise ArgumentError unless query heads can be divided among the ranks that exchange them."""
    if heads % head_ranks:
        raise ArgumentError(f"query has {heads} heads, head_ranks={head_ranks}; the first must be a multiple")


def head_groups(rows: int, heads: int, key_heads: int, head_dim: int, exchanging: int = 1) -> int:
    """Into how many groups of heads, one after another, a call is divided so that each fits into `ROOM`, or nearly.

    Args:
        rows: from `rows_in_groups`: all ranks must find the same.
        heads: of queries.
        key_heads: of keys; a group has all queries of its own.
        head_dim: of a query's head.
        exchanging: ranks among which a group's query heads are divided.
    """
    nbytes, found = 4 * rows * heads * head_dim, 1
    room = ROOM if exchanging == 1 else ROOM // 2  # what crossed lies beside it, and launches are over more rows
    for groups in range(2, key_heads + 1):
        if found * room >= nbytes:
            break
        if key_heads % groups == 0 and (heads // groups) % exchanging == 0:
            found = groups
    return found


@dataclass(frozen=True)
class HeadShares:
    """Which heads each of the ranks that exchange has.

    Attributes:
        queries: how many query heads each has; the first has the first of them.
        keys: how many key heads each has to them, as many query heads to each.
        key_heads: their numbers, rank by rank, (ranks * keys,). They never decrease. Where ranks are more than key
            heads, or a key head's queries lie on several, its number is there several times.
        copied: a key head is there several times; its gradient is the sum over its places.
    """

    queries: int
    keys: int
    key_heads: tuple[int, ...]
    copied: bool

    @staticmethod
    @lru_cache(maxsize=64)
    def of(heads: int, key_heads: int, ranks: int) -> HeadShares:
        """Those of so many query heads, as `check_heads` allows them, and key heads."""
        mine, group = heads // ranks, heads // key_heads
        alike = math.gcd(mine, group)  # query heads that lie on one rank and have one key head, from any multiple on
        numbers = tuple(first // group for first in range(0, heads, alike))
        return HeadShares(mine, mine // alike, numbers, len(numbers) > key_heads)


@dataclass(frozen=True, eq=False)
class UnionRows:
    """The rows of a union in ascending order of position, and how they arrive.

    Attributes:
        counts: how many rows come from each rank.
        runs: for each rank, what of its rows arrives together: its first and one behind its last row, and where the
            first of them then lies. In the order of the union where that takes few runs; else rank by rank.
        order: (rows,) int64, which of those that arrived is each row of the union; None if they arrive in that order.
        back: (rows,) int64, the inverse of `order`; None with it.
    """

    counts: tuple[int, ...]
    runs: tuple[tuple[tuple[int, int, int], ...], ...]
    order: Tensor | None
    back: Tensor | None

    @staticmethod
    def of(shares: tuple[Segments, ...], device: torch.device) -> UnionRows:
        """Those of ranks that hold some positions each."""
        counts = tuple(map(count, shares))
        runs = _runs_in_order(shares)
        if max(map(len, runs)) <= MOST_RUNS:
            return UnionRows(counts, tuple(map(tuple, runs)), None, None)
        firsts = [sum(counts[:rank]) for rank in range(len(counts))]
        pieces = [
            (place, first + start, first + stop)
            for own, first in zip(runs, firsts, strict=True)
            for start, stop, place in own
        ]
        order = segment_positions(tuple((start, stop) for _, start, stop in sorted(pieces))).to(device)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=device)
        one_by_one = tuple(((0, size, first),) for size, first in zip(counts, firsts, strict=True))
        return UnionRows(counts, one_by_one, order, back)

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that it keeps on its device, for counting bytes."""
        return () if self.order is None or self.back is None else (self.order, self.back)


def _runs_in_order(shares: tuple[Segments, ...]) -> list[list[tuple[int, int, int]]]:
    """For each rank the runs of its rows that lie together in the union: first, one behind the last, their place."""
    runs: list[list[tuple[int, int, int]]] = [[] for _ in shares]
    held = [0] * len(shares)
    place, last = 0, None
    for start, stop, rank in sorted((*interval, rank) for rank, share in enumerate(shares) for interval in share):
        size, first = stop - start, held[rank]
        if rank == last:
            before = runs[rank].pop()
            runs[rank].append((before[0], first + size, before[2]))
        else:
            runs[rank].append((first, first + size, place))
        held[rank], place, last = first + size, place + size, rank
    return runs
