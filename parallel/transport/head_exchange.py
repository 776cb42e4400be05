"""Tensors cross from some tokens of all heads to all tokens of some heads, and come back.

What is sent is packed by heads, and arrives where kernels read it; what was computed leaves as it is, and is put
together where it comes back. So each number is copied once each way, where ranks hold few runs of tokens.

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
"""Bytes at whose multiples each tensor begins."""

Kind = tuple[int, int, torch.dtype]
"""Of a tensor (rows, h, D): h, D, and its dtype."""


WIDE = torch.int64
"""What bytes are copied as, where they can be: torch copies what has other strides number by number, of any size."""


def copy(source: Tensor, target: Tensor, rows: Tensor | None = None) -> None:
    """Copy a tensor, or some rows of it, into another of the same dtype; any strides."""
    if _is_wide(source) and _is_wide(target):
        source, target = source.view(WIDE), target.view(WIDE)
    if rows is None:
        target.copy_(source)
    else:
        torch.index_select(source, 0, rows, out=target)


def _is_wide(x: Tensor) -> bool:
    """Whether its rows are whole numbers of `WIDE`."""
    times = WIDE.itemsize // x.element_size()
    places = x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    return x.stride(-1) == 1 and not any(place % times for place in places) and x.data_ptr() % WIDE.itemsize == 0


class Sections:
    """Where each of several tensors (rows, h, D) lies in memory for them all.

    Args:
        kinds: of the tensors.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self._kinds = kinds
        sizes = [-(-heads * dim * dtype.itemsize // ALIGNED) * ALIGNED for heads, dim, dtype in kinds]
        *self._starts, self.width = accumulate(sizes, initial=0)
        """Bytes of a row of all."""
        self._gaps = self.width > sum(heads * dim * dtype.itemsize for heads, dim, dtype in kinds)

    def memory(self, *shape: int, device: torch.device) -> Tensor:
        """Memory for rows, (*shape, width); what lies between tensors is 0, so that it is the same each time."""
        make = torch.zeros if self._gaps else torch.empty
        return make(*shape, self.width, dtype=torch.uint8, device=device)

    def of(self, memory: Tensor) -> list[Tensor]:
        """The tensors, (..., h, D), each contiguous, in memory (..., width)."""
        shape, rows, flat = memory.shape[:-1], memory.shape[:-1].numel(), memory.view(-1)
        return [
            flat[rows * start : rows * start + rows * heads * dim * dtype.itemsize].view(dtype).view(*shape, heads, dim)
            for start, (heads, dim, dtype) in zip(self._starts, self._kinds, strict=True)
        ]


class Outward:
    """Tensors (T, H, D) that become (U, h, D).

    Args:
        tensors: each with as many heads as one rank takes, times the ranks; any strides.
        rows: of the union.
        place: of this rank among those that exchange.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: UnionRows, place: int) -> None:
        self.rows, self.place, ranks = rows, place, len(rows.counts)
        tokens, device = len(tensors[0]), tensors[0].device
        sections = Sections([(x.shape[1] // ranks, x.shape[2], x.dtype) for x in tensors])
        self.sent = sections.memory(ranks, tokens, device=device)
        self._parts = sections.of(self.sent)
        for part, x in zip(self._parts, tensors, strict=True):
            copy(x.unflatten(1, (ranks, -1)).transpose(0, 1), part)
        self.arriving = sections.memory(sum(rows.counts), device=device)
        self._arrived = sections.of(self.arriving)
        self.results = self._arrived if rows.order is None else [torch.empty_like(x) for x in self._arrived]
        """(U, h, D), once they have travelled."""

    def sends(self, place: int) -> list[Tensor]:
        """What goes to one of the ranks."""
        return [part[place, first:last] for part in self._parts for first, last, _ in self.rows.runs[self.place]]

    def receives(self, place: int) -> list[Tensor]:
        """What comes from one."""
        runs = self.rows.runs[place]
        return [x[there : there + last - first] for x in self._arrived for first, last, there in runs]

    def settle(self) -> None:
        """Bring what arrived rank by rank into the order of the union."""
        if self.rows.order is not None:
            for arrived, result in zip(self._arrived, self.results, strict=True):
                copy(arrived, result, self.rows.order)


class Returning:
    """Tensors (U, h, D) that become (T, H, D).

    Args:
        kinds: of the tensors.
        crossed: what crossed in the same rows; its memory serves again.
        kept: what arrived then is looked at later; otherwise by nobody any more.
    """

    def __init__(self, kinds: Sequence[Kind], crossed: Outward, kept: bool = False) -> None:
        self.rows, self.place, (ranks, tokens) = crossed.rows, crossed.place, crossed.sent.shape[:2]
        self.tensors, sections = len(kinds), Sections(kinds)
        # What lies in the order in which it leaves is not brought here. This is written to where it does not, and
        # travels as it is where something failed on this rank.
        free = crossed.sent.new_empty(0) if kept and self.rows.order is not None else crossed.arriving
        self._parts = sections.of(_room((sum(self.rows.counts), sections.width), free))
        self._arrived = sections.of(_room((ranks, tokens, sections.width), crossed.sent))

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Say what travels: contiguous tensors."""
        if self.rows.back is None:
            self._parts = list(tensors)
        else:
            for part, x in zip(self._parts, tensors, strict=True):
                copy(x, part, self.rows.back)

    def sends(self, place: int) -> list[Tensor]:
        """What goes to one of the ranks."""
        runs = self.rows.runs[place]
        return [x[there : there + last - first] for x in self._parts for first, last, there in runs]

    def receives(self, place: int) -> list[Tensor]:
        """What comes from one."""
        return [x[place, first:last] for x in self._arrived for first, last, _ in self.rows.runs[self.place]]

    def settle(self) -> None:
        """Nothing is left to do before it is looked at."""

    def joined(self, which: int) -> Tensor:
        """One of the tensors, (T, H, D), once they have travelled, of heads that lie on one rank each."""
        arrived = self._arrived[which].transpose(0, 1)
        result = arrived.new_empty(arrived.shape)
        copy(arrived, result)
        return result.flatten(1, 2)

    def summed(self, which: int, shares: HeadShares, key_heads: int) -> Tensor:
        """The same of key heads of which ranks have copies: (T, Hk, D), their sum in the order of the ranks."""
        arrived = self._arrived[which]
        total = arrived.new_zeros(arrived.shape[1], key_heads, arrived.shape[3])
        for place, head in enumerate(shares.key_heads):
            total[:, head] += arrived[place // shares.keys, :, place % shares.keys]
        return total


def taken_apart(arrived: Tensor, kinds: Sequence[Kind], rows: UnionRows) -> list[Tensor]:
    """The tensors (U, h, D) of what arrived in another pass."""
    parts = Sections(kinds).of(arrived)
    if rows.order is None:
        return parts
    results = [torch.empty_like(x) for x in parts]
    for part, result in zip(parts, results, strict=True):
        copy(part, result, rows.order)
    return results


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

    def run(self, ways: Sequence[Outward | Returning]) -> None:
        """Let rows travel, on all ranks the same ways (on a GPU, the current stream waits for them)."""
        sends = [(rank, x) for way in ways for rank, place in self._others for x in way.sends(place)]
        receives = [(rank, x) for way in ways for rank, place in self._others for x in way.receives(place)]
        ticket = self._transport.transfer(sends, receives, "heads")
        for way in ways:
            for here, there in zip(way.sends(self.place), way.receives(self.place), strict=True):
                there.copy_(here)
        ticket.wait()
        for way in ways:
            way.settle()
