"""Tensors cross from some tokens of all heads to all tokens of some heads, and come home.

Whatever crosses lies side by side in rows of bytes, so that each rank sends one message to each other: what the host is
asked for does not depend on how much crosses.

Between the moment when ranks agree to make a call and its end no rank may fail at what the others wait for. So a way
has three steps: it is made ready, with all memory that it takes; the rows travel; what came is looked at.

Legend: T rows of this rank, U rows of all ranks that exchange; H heads, h those of one rank; D numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ringflash.parallel.planning.heads import HeadShares, UnionRows
from ringflash.parallel.transport.base import Transport

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

    @property
    def sends(self) -> Sequence[Tensor]:
        """What goes to each of the ranks."""
        return self.sent.unbind()

    @property
    def receives(self) -> Sequence[Tensor]:
        """What comes from each."""
        return self.arriving.split(self.rows.counts)


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

    @property
    def sends(self) -> Sequence[Tensor]:
        """What goes to each of the ranks."""
        return self.sent.split(self.rows.counts)

    @property
    def receives(self) -> Sequence[Tensor]:
        """What comes from each."""
        return self.arriving.unbind()

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
        transport: of the group of which they are some.
        rank: this one in the group.
        ranks: how many exchange.
        queries: rows of the queries that they hold together.
        keys: the same of keys; the same object where those lie as the queries do.
    """

    def __init__(self, transport: Transport, rank: int, ranks: int, queries: UnionRows, keys: UnionRows) -> None:
        self._transport, self.ranks, self.queries, self.keys = transport, ranks, queries, keys
        self.place = rank % ranks
        """Of this rank among those that exchange."""
        first = rank - self.place
        self._others = [(first + place, place) for place in range(ranks) if place != self.place]

    def run(self, ways: Sequence[Outward | Homeward]) -> None:
        """Let rows travel, on all ranks the same ways (on a GPU, the current stream waits for them)."""
        sends = [(rank, way.sends[place]) for way in ways for rank, place in self._others]
        receives = [(rank, way.receives[place]) for way in ways for rank, place in self._others]
        ticket = self._transport.transfer(sends, receives, "heads")
        for way in ways:
            way.receives[self.place].copy_(way.sends[self.place])
        ticket.wait()
        for way in ways:
            way.settle()
