"""Tensors cross from some tokens of all heads to all tokens of some heads, and come home: one all-to-all each way.

Whatever crosses lies side by side in rows of bytes, for a collective costs the host the same however much it moves.

Between the moment when ranks agree to make a call and its end no rank may fail at what the others wait for. So a way
has three steps: it is made ready, with all memory that it takes; the rows travel; what came is looked at.

Legend: T rows of this rank, U rows of all ranks that exchange; H heads, h those of one rank; D numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.parallel.planning.heads import HeadShares, UnionRows

ALIGNED = 16
"""Bytes at whose multiples a tensor's part of a row begins."""

Kind = tuple[int, int, torch.dtype]
"""Of a tensor (rows, h, D): h, D, and its dtype."""


class Columns:
    """Where each of several tensors (rows, h, D) lies in rows of bytes.

    Args:
        kinds: of the tensors.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        sizes = [-(-heads * dim * dtype.itemsize // ALIGNED) * ALIGNED for heads, dim, dtype in kinds]
        *self._starts, self.width = accumulate(sizes, initial=0)

    def split(self, rows: Tensor) -> list[Tensor]:
        """Views of the tensors, (..., h, D), in rows (..., width)."""
        return [
            rows[..., start : start + heads * dim * dtype.itemsize].view(dtype).unflatten(-1, (heads, dim))
            for start, (heads, dim, dtype) in zip(self._starts, self._kinds, strict=True)
        ]


class Outward:
    """Tensors (T, H, D) that become (U, h, D).

    Args:
        tensors: each with as many heads as one rank takes, times the ranks; any strides.
        rows: of the union.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: UnionRows) -> None:
        self.rows, ranks, (tokens, device) = rows, len(rows.counts), (len(tensors[0]), tensors[0].device)
        columns = Columns([(x.shape[1] // ranks, x.shape[2], x.dtype) for x in tensors])
        self.sent = torch.empty(ranks, tokens, columns.width, dtype=torch.uint8, device=device)
        for part, x in zip(columns.split(self.sent), tensors, strict=True):
            part.copy_(x.unflatten(1, (ranks, -1)).transpose(0, 1))
        self.arriving = torch.empty(sum(rows.counts), columns.width, dtype=torch.uint8, device=device)
        self._arrived = columns.split(self.arriving)
        self.results = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in self._arrived]
        """(U, h, D), once they have travelled."""

    def settle(self) -> None:
        """Take what arrived apart, in the order of the union."""
        for result, arrived in zip(self.results, self._arrived, strict=True):
            if self.rows.order is None:
                result.copy_(arrived)
            else:
                torch.index_select(arrived, 0, self.rows.order, out=result)

    def splits(self) -> tuple[list[int], list[int]]:
        """How many rows go to each of the ranks, and come from each."""
        return [self.sent.shape[1]] * len(self.rows.counts), list(self.rows.counts)


class Homeward:
    """Tensors (U, h, D) that become (T, H, D).

    Args:
        kinds: of the tensors.
        crossed: what crossed in the same rows; nobody looks at it any more, and its memory serves again.
    """

    def __init__(self, kinds: Sequence[Kind], crossed: Outward) -> None:
        self.rows, (ranks, tokens) = crossed.rows, crossed.sent.shape[:2]
        self.tensors, columns = len(kinds), Columns(kinds)
        self.sent = _room((sum(self.rows.counts), columns.width), crossed.arriving)
        self._parts = columns.split(self.sent)
        self.arriving = _room((ranks, tokens, columns.width), crossed.sent)
        self._arrived = columns.split(self.arriving)

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Say what travels; what nobody filled travels all the same."""
        for part, x in zip(self._parts, tensors, strict=True):
            if self.rows.order is None:
                part.copy_(x)
            else:
                part.index_copy_(0, self.rows.order, x)

    def settle(self) -> None:
        """Nothing is left to do before it is looked at."""

    def splits(self) -> tuple[list[int], list[int]]:
        """How many rows go to each of the ranks, and come from each."""
        return list(self.rows.counts), [self.arriving.shape[1]] * len(self.rows.counts)

    def joined(self, which: int) -> Tensor:
        """One of the tensors, (T, H, D), once they have travelled, of heads that lie on one rank each."""
        return self._arrived[which].transpose(0, 1).flatten(1, 2)

    def summed(self, which: int, shares: HeadShares, key_heads: int) -> Tensor:
        """The same of key heads of which ranks have copies: (T, Hk, D), their sum in the order of the ranks."""
        arrived = self._arrived[which]
        total = arrived.new_zeros(arrived.shape[1], key_heads, arrived.shape[3])
        for place, head in enumerate(shares.key_heads):
            total[:, head] += arrived[place // shares.keys, :, place % shares.keys]
        return total


def _room(shape: Sequence[int], free: Tensor) -> Tensor:
    """Memory for rows: some that is free, or new."""
    size = math.prod(shape)
    return free.view(-1)[:size].view(shape) if size <= free.numel() else free.new_empty(shape)


class HeadExchange:
    """Ranks that follow each other and exchange heads for tokens, as one of them sees it.

    Args:
        group: of which they are some, and all others do the same at the same time: no group has to be made for them.
        ranks: how many exchange.
        queries: rows of the queries that they hold together.
        keys: the same of keys; the same object where those lie as the queries do.
    """

    def __init__(self, group: dist.ProcessGroup, ranks: int, queries: UnionRows, keys: UnionRows) -> None:
        self._group, self.ranks, self.queries, self.keys = group, ranks, queries, keys
        self.place = group.rank() % ranks
        """Of this rank among those that exchange."""

    def run(self, ways: Sequence[Outward | Homeward]) -> None:
        """Let rows travel, in the same order on all ranks (NCCL: the current stream waits for them)."""
        before = self._group.rank() - self.place
        behind = self._group.size() - before - self.ranks
        ways = [way for way in ways if way.sent.shape[-1]]  # where no gradient is needed, nothing travels
        for way in ways:
            sent, received = ([0] * before + rows + [0] * behind for rows in way.splits())
            to, of = way.arriving.flatten(0, -2), way.sent.flatten(0, -2)
            dist.all_to_all_single(to, of, received, sent, group=self._group)
        for way in ways:
            way.settle()
