"""Tensors cross from some tokens of all heads to all tokens of some heads, and come home.

Between the moment when ranks agree to make a call and its end no rank may fail at what the others wait for. So a
tensor's way has three steps: it is made ready, with all memory that it takes; it travels; what came is looked at.

Legend: T rows of this rank, U rows of all ranks that exchange; H heads, h those of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.parallel.planning.heads import HeadShares, UnionRows
from ringflash.parallel.transport.send_recv import SendRecv


class Outward:
    """A tensor (T, H, ...) that becomes (U, h, ...).

    Args:
        x: with as many heads as one rank takes, times the ranks; any strides.
        rows: of the union.
    """

    def __init__(self, x: Tensor, rows: UnionRows) -> None:
        parts = x.unflatten(1, (len(rows.counts), -1)).transpose(0, 1)
        self.packed = parts.new_empty(parts.shape).copy_(parts)  # in memory of its own, which is used again
        self.arriving = x.new_empty(sum(rows.counts), *parts.shape[2:])
        self.result = self.arriving if rows.order is None else torch.empty_like(self.arriving)
        """(U, h, ...), once it has travelled."""
        self.rows = rows
        self.sends: Sequence[Tensor] = self.packed.unbind()
        self.receives: Sequence[Tensor] = self.arriving.split(rows.counts)

    def settle(self) -> None:
        """Put what arrived into the order of the union."""
        if self.rows.order is not None:
            torch.index_select(self.arriving, 0, self.rows.order, out=self.result)


class Homeward:
    """A tensor (U, h, ...) that becomes (T, H, ...).

    Args:
        shape: (U, h, ...).
        dtype: of it.
        crossed: a tensor of the same rows and heads, at which nobody looks any more when `fill` is called.
        in_its_memory: take that of `crossed`, where it is large enough; one tensor may.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, crossed: Outward, in_its_memory: bool = True) -> None:
        self._rows = crossed.rows
        of_parts = *crossed.packed.shape[:2], *shape[1:]
        self._arriving = _room(of_parts, dtype, crossed.packed, in_its_memory)
        self._packed = _room(shape, dtype, crossed.arriving, in_its_memory)
        self.sends: Sequence[Tensor] = self._packed.split(self._rows.counts)  # what nobody filled travels all the same
        self.receives: Sequence[Tensor] = self._arriving.unbind()

    def fill(self, x: Tensor) -> None:
        """Say what travels."""
        if self._rows.back is not None:
            torch.index_select(x, 0, self._rows.back, out=self._packed)
        elif x.is_contiguous():
            self.sends = x.split(self._rows.counts)
        else:
            self._packed.copy_(x)

    def settle(self) -> None:
        """Nothing is left to do before it is looked at."""

    def joined(self) -> Tensor:
        """(T, H, ...), once it has travelled, of heads that lie on one rank each."""
        return self._arriving.transpose(0, 1).flatten(1, 2)

    def summed(self, shares: HeadShares, key_heads: int) -> Tensor:
        """The same of key heads of which ranks have copies: (T, Hk, ...), their sum in the order of the ranks."""
        total = self._arriving.new_zeros(self._arriving.shape[1], key_heads, *self._arriving.shape[3:])
        for place, head in enumerate(shares.key_heads):
            total[:, head] += self._arriving[place // shares.keys, :, place % shares.keys]
        return total


def _room(shape: Sequence[int], dtype: torch.dtype, free: Tensor, take_it: bool) -> Tensor:
    """Memory for a tensor: some that is free, or new."""
    size = math.prod(shape)
    if take_it and free.dtype == dtype and size <= free.numel():
        return free.view(-1)[:size].view(shape)
    return free.new_empty(shape, dtype=dtype)


class HeadExchange:
    """Ranks that follow each other and exchange heads for tokens, as one of them sees it.

    Args:
        transport: between them.
        place: of this rank among them.
        queries: rows of the queries that they hold together.
        keys: the same of keys.
    """

    def __init__(self, transport: SendRecv, place: int, queries: UnionRows, keys: UnionRows) -> None:
        self.transport, self.place, self.queries, self.keys = transport, place, queries, keys
        self.ranks = len(queries.counts)
        self._others = [rank for rank in range(self.ranks) if rank != place]

    def run(self, tensors: Sequence[Outward | Homeward]) -> None:
        """Let tensors travel, in the same order on all ranks (NCCL: the current stream waits for them)."""
        sends = [(rank, x.sends[rank]) for x in tensors for rank in self._others]
        receives = [(rank, x.receives[rank]) for x in tensors for rank in self._others]
        ticket = self.transport.transfer(sends, receives)
        for x in tensors:
            x.receives[self.place].copy_(x.sends[self.place])
        ticket.wait()
        for x in tensors:
            x.settle()
