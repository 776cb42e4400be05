"""Which global positions each rank holds: the only place that decides where a token goes.

A partition is a tuple of ascending segments for each rank. Lengths need not divide anything; a rank may hold nothing.

    Partition.zigzag(length=10, ranks=2).segments      # (((0, 2), (7, 10)), ((2, 7),)): chunks 0 and 3, 1 and 2
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, count, normalize
from ringflash.parallel.positions.visibility import visible_pairs

BY_DOCUMENT = ("contiguous_per_document", "zigzag_per_document")

NAMES = ("contiguous", "zigzag", "balanced", "stripe", *BY_DOCUMENT)

BALANCED_CHUNKS_PER_RANK = 16
"""Granularity of `balanced`: finer balances better, coarser keeps neighbours together and moves fewer bytes."""

BALANCED_TOLERANCE = 1.05
"""`balanced` stops exchanging chunks once the busiest rank is within this factor of the mean."""

WORK_SAMPLES = 2**16
"""Query positions at which `balanced` looks at the work; sequences up to this length are looked at everywhere."""


@dataclass(frozen=True)
class Partition:
    """Global positions held by each rank.

    Attributes:
        length: total number of positions.
        segments: for each rank its ascending half-open intervals; together they hold each position exactly once. Those
            that touch are joined, so that partitions that hold the same are equal.
    """

    length: int
    segments: tuple[Segments, ...]

    def __post_init__(self) -> None:
        starts, stops, ranks = self.owners
        edges = [0, *stops.tolist()]
        if starts.tolist() != edges[:-1] or edges[-1] != self.length:
            raise ArgumentError(
                f"segments={str(self.segments)[:200]} must hold each of {self.length} positions exactly once"
            )
        if any(list(segments) != sorted(segments) for segments in self.segments):
            raise ArgumentError(f"segments={str(self.segments)[:200]}; each rank's must be in ascending order")
        if (ranks[1:] == ranks[:-1]).any() or (starts == stops).any():
            object.__setattr__(self, "segments", tuple(map(normalize, self.segments)))
            del vars(self)["owners"]

    @staticmethod
    def contiguous(length: int, ranks: int, documents: Sequence[int] | None = None) -> Partition:
        """Rank r holds the r-th of `ranks` equal parts (sizes differ by at most one).

        Args:
            length: number of positions.
            ranks: number of ranks.
            documents: their boundaries, to divide each of them like that, and what lies behind them, instead of all
                positions together.
        """
        _check_sizes(length, ranks)
        return _from_parts(length, documents, np.arange(ranks)[:, None])

    @staticmethod
    def zigzag(length: int, ranks: int, documents: Sequence[int] | None = None) -> Partition:
        """Rank r holds parts r and 2 * ranks - 1 - r of 2 * ranks: equal work under a causal mask.

        Args:
            length: see `contiguous`.
            ranks: see `contiguous`.
            documents: see `contiguous`.
        """
        _check_sizes(length, ranks)
        early = np.arange(ranks)
        return _from_parts(length, documents, np.stack([early, 2 * ranks - 1 - early], axis=1))

    @staticmethod
    def stripe(length: int, ranks: int) -> Partition:
        """Rank r holds positions r, r + ranks, r + 2 * ranks and so on: equal work under a causal mask.

        A plan for it has as many segments as there are tokens, so it takes 15 microseconds a token to make.
        """
        _check_sizes(length, ranks)
        starts, stops = range(length), range(1, length + 1)
        return Partition(
            length, tuple(tuple(zip(starts[r::ranks], stops[r::ranks], strict=True)) for r in range(ranks))
        )

    @staticmethod
    def balanced(
        masks: Mask | Sequence[Mask], length: int, ranks: int, weights: Sequence[int] | None = None
    ) -> Partition:
        """Equal tokens and nearly equal work for any mask, documents included.

        Starts from contiguous shares and exchanges chunks between the busiest and other ranks until the busiest has at
        most 5% more visible pairs than the mean, so that what can stay together does.

        Args:
            masks: what a query sees; of several, the sum is levelled.
            length: number of positions.
            ranks: number of ranks.
            weights: how many layers have each of the masks; one each if None.
        """
        _check_sizes(length, ranks)
        masks = (masks,) if isinstance(masks, Mask) else masks
        chunks = max(1, min(BALANCED_CHUNKS_PER_RANK, length // ranks)) * ranks
        edges = np.arange(chunks + 1) * length // chunks
        work: Any = sum(
            weight * _work(mask, edges) for mask, weight in zip(masks, weights or (1,) * len(masks), strict=True)
        )
        return _from_chunks(edges, length, _exchange_until_level(work, ranks))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)

    def repeat(self, batch: int) -> Partition:
        """The same for each of `batch` sequences laid end to end."""
        if batch == 1:
            return self
        shifted = (
            tuple((start + i * self.length, stop + i * self.length) for i in range(batch) for start, stop in segments)
            for segments in self.segments
        )
        return Partition(self.length * batch, tuple(shifted))

    def merged(self, together: int) -> Partition:
        """What ranks hold together of which so many that follow each other stand for one."""
        if together == 1:
            return self
        unions = (chain(*self.segments[first : first + together]) for first in range(0, self.ranks, together))
        return Partition(self.length, tuple(map(normalize, unions)))

    def count(self, rank: int) -> int:
        """Number of positions on a rank."""
        return count(self.segments[rank])

    def counts(self) -> list[int]:
        """Number of positions on each rank."""
        return list(map(self.count, range(self.ranks)))

    def positions(self, rank: int) -> Tensor:
        """Ascending global positions that a rank holds, (tokens,) int64 on the CPU."""
        parts = [torch.arange(start, stop) for start, stop in self.segments[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    @cached_property
    def owners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, stop and rank of every segment of every rank, (segments,) int64 each, in the order of positions."""
        flat = np.array([x for segments in self.segments for x in segments], dtype=np.int64).reshape(-1, 2)
        ranks = np.repeat(np.arange(self.ranks), [len(segments) for segments in self.segments])
        order = np.argsort(flat[:, 0], kind="stable")
        return flat[order, 0], flat[order, 1], ranks[order]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that tell partitions apart."""
        starts, stops, ranks = self.owners
        return hashlib.blake2b(b"".join(x.tobytes() for x in (starts, stops, ranks)), digest_size=16).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __getstate__(self) -> dict[str, object]:
        return {"length": self.length, "segments": self.segments}

    def spec(self) -> str:
        """The partition as a string from which `resolve` makes it again."""
        # JSON written by hand, because torch.compile traces this and cannot trace the json module.
        shares = [", ".join([f"[{start}, {stop}]" for start, stop in share]) for share in self.segments]
        return "[" + ", ".join([f"[{share}]" for share in shares]) + "]"


def check_name(partition: str | Partition) -> None:
    """Raise ArgumentError unless this is a `Partition` or a known name."""
    if not isinstance(partition, Partition) and partition not in NAMES:
        raise ArgumentError(f"partition={partition!r}; allowed are {', '.join(NAMES)} or a Partition")


def resolve(
    partition: str | Partition,
    length: int,
    ranks: int,
    masks: Mask | Sequence[Mask],
    batch: int = 1,
    weights: Sequence[int] | None = None,
) -> Partition:
    """The partition of one sequence that a name, a `Partition` or its `spec` stands for.

    Args:
        partition: name, `Partition`, or `Partition.spec()`.
        length: tokens of one sequence.
        ranks: number of ranks.
        masks: what "balanced" levels the work for, over the `batch` sequences laid end to end; for the partitions of
            each document, whose documents.
        batch: number of sequences, all sharded alike.
        weights: as in `Partition.balanced`.

    Raises:
        ArgumentError: unknown name, a partition for another length or number of ranks, or one that looks at documents
            for several sequences of differing ones or for cross attention.
    """
    if isinstance(partition, str) and partition in ("contiguous", "zigzag", "stripe"):
        return getattr(Partition, partition)(length, ranks)
    if isinstance(partition, str) and partition in ("balanced", *BY_DOCUMENT):
        masks = (masks,) if isinstance(masks, Mask) else masks
        masks = masks if batch == 1 else [_same_for_each_row(partition, mask, length, batch) for mask in masks]
        if partition == "balanced":
            return Partition.balanced(masks, length, ranks, weights)
        _check_self_attention(partition, masks[0])
        return getattr(Partition, partition.removesuffix("_per_document"))(length, ranks, masks[0].boundaries)
    if isinstance(partition, str):
        if not partition.startswith("["):
            check_name(partition)
        segments = tuple(tuple((start, stop) for start, stop in rank) for rank in json.loads(partition))
        partition = Partition(sum(count(rank) for rank in segments), segments)
    if partition.ranks != ranks or partition.length != length:
        raise ArgumentError(
            f"partition shards {partition.length} positions to {partition.ranks} ranks; "
            f"needed are {length} positions and {ranks} ranks"
        )
    return partition


def _check_self_attention(partition: str, mask: Mask) -> None:
    if mask.query_boundaries is not None:
        raise ArgumentError(f"partition={partition!r} takes self-attention; shard cross attention contiguous or zigzag")


def _check_sizes(length: int, ranks: int) -> None:
    if length < 0 or ranks < 1:
        raise ArgumentError(f"length={length}, ranks={ranks}; allowed are lengths from 0 and ranks from 1")


def _same_for_each_row(partition: str, mask: Mask, length: int, batch: int) -> Mask:
    _check_self_attention(partition, mask)
    rows = {i * length for i in range(batch + 1)}
    if mask.boundaries is not None and set(mask.boundaries) != rows:
        raise ArgumentError(f"partition={partition!r} with documents takes one packed sequence, not a batch of {batch}")
    return mask.without_documents()


def _from_parts(length: int, documents: Sequence[int] | None, owned: np.ndarray) -> Partition:
    """The same parts of each document, and of what lies behind the last; owned is (ranks, parts of a rank)."""
    bounds = np.unique([0, *(documents or ()), length])
    if bounds[0] < 0 or bounds[-1] > length:
        raise ArgumentError(f"documents={str(documents)[:200]}; allowed are boundaries from 0 to length={length}")
    parts = owned.size
    edges = bounds[:-1, None] + np.diff(bounds)[:, None] * np.arange(parts) // parts
    of_documents = np.arange(len(edges))[:, None] * parts + owned[:, None]
    return _from_chunks(np.append(edges, length), length, of_documents.reshape(len(owned), -1))


def _from_chunks(edges: np.ndarray, length: int, owned: np.ndarray) -> Partition:
    """Chunk i holds positions [edges[i], edges[i + 1]); owned, (ranks, chunks of a rank), says whose it is."""
    owned = np.sort(owned, axis=1)
    starts, stops = edges[owned].tolist(), edges[owned + 1].tolist()
    return Partition(length, tuple(normalize(zip(*bounds, strict=True)) for bounds in zip(starts, stops, strict=True)))


def _work(mask: Mask, edges: np.ndarray) -> np.ndarray:
    """Visible pairs of the queries of each chunk, from samples that lie evenly."""
    _check_self_attention("balanced", mask)
    length = int(edges[-1])
    mask = mask if mask.boundaries else mask & Mask.documents((0, length))
    assert mask.boundaries is not None
    if mask.boundaries[-1] > length:
        raise ArgumentError(f"the mask's documents end at {mask.boundaries[-1]}; the sequence has {length} positions")
    every = max(1, -(-length // WORK_SAMPLES))
    samples = torch.arange(every // 2, length, every)
    pairs = visible_pairs(mask, torch.tensor(mask.boundaries), samples).numpy()
    running = np.concatenate([[0], pairs.cumsum() * every])
    at_edges = running[np.searchsorted(samples.numpy(), edges)]
    return at_edges[1:] - at_edges[:-1]


def _exchange_until_level(work: np.ndarray, ranks: int) -> np.ndarray:
    """Chunks of each rank: contiguous shares, then exchanges that lower the busiest rank's work."""
    owned = np.arange(len(work)).reshape(ranks, -1)
    held = work[owned]
    total = held.sum(axis=1)
    mean = total.sum() / ranks
    for _ in range(len(work) * 4):
        busiest = int(total.argmax())
        if total[busiest] <= mean * BALANCED_TOLERANCE:
            break
        swap = _best_swap(held, total, busiest)
        if swap is None:
            break
        other, give, take = swap
        owned[busiest, give], owned[other, take] = owned[other, take], owned[busiest, give]
        held[busiest, give], held[other, take] = held[other, take], held[busiest, give]
        moved = held[other, take] - held[busiest, give]
        total[busiest] -= moved
        total[other] += moved
    return owned


def _best_swap(held: np.ndarray, total: np.ndarray, busiest: int) -> tuple[int, int, int] | None:
    """The exchange with the least busy rank that can help which brings the two closest together.

    Args:
        held: (ranks, chunks of a rank) work of each chunk.
        total: (ranks,) its sums.
        busiest: the rank that is to get rid of work.

    Returns:
        The other rank, and which of the chunks of each are exchanged.
    """
    for other in _least_first(total):
        gap = total[busiest] - total[other]
        left = np.abs(gap - 2 * held[busiest][:, None] + 2 * held[other])  # of the gap, by what is given and taken
        best = int(left.argmin())
        if left.flat[best] < gap:
            return other, *divmod(best, held.shape[1])
    return None


def _least_first(total: np.ndarray) -> Iterator[int]:
    """Indices by ascending value; sorts only if the least one does not serve."""
    yield int(total.argmin())
    yield from np.argsort(total, kind="stable")[1:].tolist()
