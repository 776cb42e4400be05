"""Which global positions each rank holds: the only place that decides where a token goes.

A partition is a tuple of ascending segments for each rank. Lengths need not divide anything; a rank may hold nothing.

    Partition.zigzag(length=10, ranks=2).segments      # (((0, 2), (7, 10)), ((2, 7),)): chunks 0 and 3, 1 and 2
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.balance import MOST_TOKENS, TOKEN_WORK, balanced_shares
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, count, normalize

BY_DOCUMENT = ("contiguous_per_document", "zigzag_per_document")

NAMES = ("contiguous", "zigzag", "balanced", "stripe", *BY_DOCUMENT)


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
        masks: Mask | Sequence[Mask],
        length: int,
        ranks: int,
        weights: Sequence[int] | None = None,
        token_work: int = TOKEN_WORK,
        most_tokens: float = MOST_TOKENS,
    ) -> Partition:
        """Shares that take equally long, for any mask, with documents whole on one rank wherever they fit.

        Args:
            masks: what a query sees; of several, the sum is levelled.
            length: number of positions.
            ranks: number of ranks.
            weights: how many layers have each of the masks; one each if None.
            token_work: what the rest of a layer costs a token, forward and backward, in visible pairs; 0 levels
                attention alone. `balance.token_work` has it for a model's width.
            most_tokens: times the mean number of tokens that a rank may hold. With less, more documents are cut.
        """
        _check_sizes(length, ranks)
        if token_work < 0 or most_tokens < 1:
            raise ArgumentError(f"token_work={token_work}, most_tokens={most_tokens}; allowed are from 0, and from 1")
        masks = (masks,) if isinstance(masks, Mask) else masks
        for mask in masks:
            _check_self_attention("balanced", mask)
            if mask.boundaries is not None and mask.boundaries[-1] > length:
                raise ArgumentError(
                    f"the mask's documents end at {mask.boundaries[-1]}; the sequence has {length} positions"
                )
        weights = weights or (1,) * len(masks)
        return Partition(length, balanced_shares(masks, weights, length, ranks, token_work, most_tokens))

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


def default_partition(mask: Mask, length: int, batch: int = 1) -> str:
    """What is taken where no partition was named: "balanced" for packed documents and branches, "zigzag" for all else.

    Args:
        mask: with its documents, over the `batch` sequences laid end to end.
        length: of one sequence.
        batch: number of sequences, all sharded alike.
    """
    if batch > 1 or mask.boundaries is None or mask.query_boundaries is not None or mask.boundaries[-1] > length:
        return "zigzag"
    return "balanced" if len(set(mask.boundaries)) > 2 or mask.branches is not None else "zigzag"


def resolve(
    partition: str | Partition,
    length: int,
    ranks: int,
    masks: Mask | Sequence[Mask],
    batch: int = 1,
    weights: Sequence[int] | None = None,
    token_work: int = TOKEN_WORK,
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
        token_work: likewise.

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
            return Partition.balanced(masks, length, ranks, weights, token_work)
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
    if mask.spans is not None or mask.branches is not None:
        raise ArgumentError(
            f"partition={partition!r} with spans or a shared prefix takes one packed sequence, not a batch of {batch}"
        )
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
