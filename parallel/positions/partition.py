"""Which global positions each rank holds: the only place where tokens are dealt to ranks.

A partition is a tuple of ascending segments for each rank. Lengths need not divide anything; a rank may hold nothing.

    Partition.zigzag(length=10, ranks=2).segments      # (((0, 2), (7, 10)), ((2, 7),)): chunks 0 and 3, 1 and 2
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, count, normalize
from ringflash.parallel.positions.visibility import visible_pairs

NAMES = ("contiguous", "zigzag", "balanced")

BALANCED_CHUNKS_PER_RANK = 16
"""Granularity of `balanced`: finer balances better, coarser keeps neighbours together and moves fewer bytes."""

BALANCED_TOLERANCE = 1.05
"""`balanced` stops exchanging chunks once the busiest rank is within this factor of the mean."""


@dataclass(frozen=True)
class Partition:
    """Global positions held by each rank.

    Attributes:
        length: total number of positions.
        segments: for each rank its ascending half-open intervals; together they hold each position exactly once.
    """

    length: int
    segments: tuple[Segments, ...]

    def __post_init__(self) -> None:
        everything = sorted(interval for segments in self.segments for interval in segments)
        ends = [0, *(stop for _, stop in everything)]
        if [start for start, _ in everything] != ends[:-1] or ends[-1] != self.length:
            raise ArgumentError(
                f"segments={str(self.segments)[:200]} must hold each of {self.length} positions exactly once"
            )
        if any(list(segments) != sorted(segments) for segments in self.segments):
            raise ArgumentError(f"segments={str(self.segments)[:200]}; each rank's must be in ascending order")

    @staticmethod
    def contiguous(length: int, ranks: int) -> Partition:
        """Rank r holds the r-th of `ranks` equal parts (sizes differ by at most one)."""
        _check_sizes(length, ranks)
        return _from_chunks(length, ranks, [[rank] for rank in range(ranks)])

    @staticmethod
    def zigzag(length: int, ranks: int) -> Partition:
        """Rank r holds parts r and 2 * ranks - 1 - r of 2 * ranks: equal work under a causal mask."""
        _check_sizes(length, ranks)
        return _from_chunks(length, 2 * ranks, [[rank, 2 * ranks - 1 - rank] for rank in range(ranks)])

    @staticmethod
    def balanced(mask: Mask, length: int, ranks: int) -> Partition:
        """Equal tokens and nearly equal work for any mask, documents included.

        Starts from contiguous shares and exchanges chunks between the busiest and other ranks until the busiest has at
        most 5% more visible pairs than the mean, so that what can stay together does.
        """
        _check_sizes(length, ranks)
        chunks = max(1, min(BALANCED_CHUNKS_PER_RANK, length // ranks)) * ranks
        _check_self_attention(mask)
        mask = mask if mask.boundaries else mask & Mask.documents((0, length))
        documents = torch.tensor(mask.boundaries)
        if documents[-1] != length:
            raise ArgumentError(f"the mask's documents end at {documents[-1]}; the sequence has {length} positions")
        visible = visible_pairs(mask, documents, torch.arange(length))
        running = torch.cat([torch.zeros(1, dtype=torch.int64), visible.cumsum(0)])
        edges = torch.tensor([_edge(length, chunks, i) for i in range(chunks + 1)])
        work = (running[edges[1:]] - running[edges[:-1]]).tolist()
        return _from_chunks(length, chunks, _exchange_until_level(work, ranks))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)

    def repeat(self, batch: int) -> Partition:
        """The same deal for each of `batch` sequences laid end to end."""
        shifted = (
            tuple((start + i * self.length, stop + i * self.length) for i in range(batch) for start, stop in segments)
            for segments in self.segments
        )
        return Partition(self.length * batch, tuple(shifted))

    def counts(self) -> list[int]:
        """Number of positions on each rank."""
        return [count(segments) for segments in self.segments]

    def positions(self, rank: int) -> Tensor:
        """Ascending global positions that a rank holds, (tokens,) int64 on the CPU."""
        parts = [torch.arange(start, stop) for start, stop in self.segments[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def spec(self) -> str:
        """The partition as a string from which `resolve` makes it again."""
        # JSON written by hand, because torch.compile traces this and cannot trace the json module.
        shares = [", ".join([f"[{start}, {stop}]" for start, stop in share]) for share in self.segments]
        return "[" + ", ".join([f"[{share}]" for share in shares]) + "]"


def check_name(partition: str | Partition) -> None:
    """Raise ArgumentError unless this is a `Partition` or a known name."""
    if not isinstance(partition, Partition) and partition not in NAMES:
        raise ArgumentError(f"partition={partition!r}; allowed are {', '.join(NAMES)} or a Partition")


def resolve(partition: str | Partition, length: int, ranks: int, mask: Mask, batch: int = 1) -> Partition:
    """The partition of one sequence that a name, a `Partition` or its `spec` stands for.

    Args:
        partition: name, `Partition`, or `Partition.spec()`.
        length: tokens of one sequence.
        ranks: number of ranks.
        mask: what "balanced" levels the work for, over the `batch` sequences laid end to end.
        batch: number of sequences, all dealt alike.

    Raises:
        ArgumentError: unknown name, a partition for another length or number of ranks, or "balanced" for several
            sequences of differing documents.
    """
    if partition == "contiguous":
        return Partition.contiguous(length, ranks)
    if partition == "zigzag":
        return Partition.zigzag(length, ranks)
    if partition == "balanced":
        _check_self_attention(mask)
        return Partition.balanced(mask if batch == 1 else _same_for_each_row(mask, length, batch), length, ranks)
    if isinstance(partition, str):
        if not partition.startswith("["):
            check_name(partition)
        segments = tuple(tuple((start, stop) for start, stop in rank) for rank in json.loads(partition))
        partition = Partition(sum(count(rank) for rank in segments), segments)
    if partition.ranks != ranks or partition.length != length:
        raise ArgumentError(
            f"partition deals {partition.length} positions to {partition.ranks} ranks; "
            f"needed are {length} positions and {ranks} ranks"
        )
    return partition


def _check_self_attention(mask: Mask) -> None:
    if mask.query_boundaries is not None:
        raise ArgumentError("partition='balanced' takes self-attention; deal cross attention contiguous or zigzag")


def _check_sizes(length: int, ranks: int) -> None:
    if length < 0 or ranks < 1:
        raise ArgumentError(f"length={length}, ranks={ranks}; allowed are lengths from 0 and ranks from 1")


def _same_for_each_row(mask: Mask, length: int, batch: int) -> Mask:
    rows = {i * length for i in range(batch + 1)}
    if mask.boundaries is not None and set(mask.boundaries) != rows:
        raise ArgumentError(f"partition='balanced' with documents takes one packed sequence, not a batch of {batch}")
    return mask.without_documents()


def _edge(length: int, parts: int, index: int) -> int:
    return index * length // parts


def _from_chunks(length: int, parts: int, owned: list[list[int]]) -> Partition:
    segments = (
        normalize((_edge(length, parts, chunk), _edge(length, parts, chunk + 1)) for chunk in chunks)
        for chunks in owned
    )
    return Partition(length, tuple(segments))


def _exchange_until_level(work: list[int], ranks: int) -> list[list[int]]:
    """Chunks of each rank: contiguous shares, then exchanges that lower the busiest rank's work."""
    share = len(work) // ranks
    owned = [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]
    total = [sum(work[chunk] for chunk in chunks) for chunks in owned]
    mean = sum(total) / ranks
    for _ in range(len(work) * 4):
        busiest = max(range(ranks), key=total.__getitem__)
        if total[busiest] <= mean * BALANCED_TOLERANCE:
            break
        swap = _best_swap(work, owned, total, busiest)
        if swap is None:
            break
        give, other, take = swap
        owned[busiest][owned[busiest].index(give)] = take
        owned[other][owned[other].index(take)] = give
        moved = work[give] - work[take]
        total[busiest] -= moved
        total[other] += moved
    return owned


def _best_swap(work: list[int], owned: list[list[int]], total: list[int], busiest: int) -> tuple[int, int, int] | None:
    """The exchange with the least busy rank that can help which brings the two closest together."""
    for other in sorted(range(len(owned)), key=total.__getitem__):
        gap = total[busiest] - total[other]
        swaps = [
            (abs(gap - 2 * (work[give] - work[take])), give, take)
            for give in owned[busiest]
            for take in owned[other]
            if 0 < work[give] - work[take] < gap
        ]
        if swaps:
            _, give, take = min(swaps)
            return give, other, take
    return None
