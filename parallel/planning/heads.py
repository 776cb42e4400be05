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
from ringflash.parallel.planning.program import segment_positions
from ringflash.parallel.positions.integers import integers
from ringflash.parallel.positions.segments import Segments, count


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
    """The rows of a union in ascending order of position, beside the order in which they arrive: rank by rank.

    Attributes:
        counts: how many rows come from each rank.
        order: (rows,) int64, which of those that arrived is each row of the union; None where that is its own number.
        back: (rows,) int64, the inverse of `order`; None with it.
    """

    counts: tuple[int, ...]
    order: Tensor | None
    back: Tensor | None

    @staticmethod
    def of(shares: tuple[Segments, ...], device: torch.device) -> UnionRows:
        """Those of ranks that hold some positions each."""
        runs, before = [], 0
        for start, stop in (interval for share in shares for interval in share):
            runs.append((start, before, before + stop - start))
            before += stop - start
        counts = tuple(map(count, shares))
        if runs == sorted(runs):
            return UnionRows(counts, None, None)
        order = segment_positions(tuple((first, last) for _, first, last in sorted(runs))).to(device)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=device)
        return UnionRows(counts, order, back)

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that it keeps on its device, for counting bytes."""
        return () if self.order is None or self.back is None else (self.order, self.back)
