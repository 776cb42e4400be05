"""Transfers by torch.distributed send and receive: works with gloo and NCCL, on any network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.parallel.transport.base import Add, Arrived, Expected, Parts, Runs
from ringflash.parallel.transport.deliveries import levels
from ringflash.parallel.transport.mailboxes import room_of
from ringflash.parallel.transport.shelves import row_bytes


class Ticket:
    """Transfers under way. Holds on to the tensors they use until `wait`."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor], what: str) -> None:
        self._works, self._tensors, self._what = works, tensors, what

    def wait(self) -> None:
        """Return when the transfers are done (NCCL: when the current stream waits for them)."""
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            error.add_note(f"while ranks transferred {self._what}")
            raise
        self._works, self._tensors = [], []


class Delivery:
    """Parts under way; see `Delivery` in base.py."""

    peers: frozenset[int] = frozenset()

    def __init__(self, ticket: Ticket, arriving: list[Tensor], tensors: int, room: int) -> None:
        self._ticket, self._arriving, self._tensors, self._room = ticket, arriving, tensors, room

    def collect(self, add: Add) -> None:
        """See base.py; in the order in which mailboxes have it, so that sums are the same bit for bit."""
        self._ticket.wait()
        sizes = tuple([(len(x), row_bytes(x)) for x in self._arriving])
        for level in levels(sizes, self._room):
            add([self._arrived(*portion) for portion in level])
        self._arriving = []

    def _arrived(self, message: int, first: int, count: int) -> Arrived:
        rows = self._arriving[message][first : first + count]
        return Arrived(*divmod(message, self._tensors), first, count, rows.data_ptr(), lambda: rows)


class SendRecv:
    """Sends and receives between ranks of one process group.

    Args:
        group: the process group.
    """

    shelf = None

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)  # a transport lives as long as its group, which must not live for it
        self._global_rank = [dist.get_global_rank(group, rank) for rank in range(group.size())]

    def transfer(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
    ) -> Ticket:
        """See `Transport`."""
        operations = [self._operation(dist.irecv, rank, tensor) for rank, tensor in receives if tensor.numel()]
        operations += [self._operation(dist.isend, rank, tensor) for rank, tensor in sends if tensor.numel()]
        if not operations:
            return Ticket([], [], what)
        return Ticket(dist.batch_isend_irecv(operations), [operation.tensor for operation in operations], what)

    def deliver(self, parts: Parts, expected: Expected, room: Sequence[Tensor], what: str) -> Delivery:
        """See `Transport`."""
        sends = [(owner, _joined(x, runs)) for owner, tensors in parts for x, runs in tensors]
        receives, filled = [], 0
        for sender, rows in expected:
            receives += [(sender, x[filled : filled + rows]) for x in room]
            filled += rows
        ticket = self.transfer(sends, receives, what)
        return Delivery(ticket, [x for _, x in receives], len(room), room_of(len(self._global_rank)))

    def _operation(self, function: Callable, rank: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(function, tensor, self._global_rank[rank], self._group())


def _joined(x: Tensor, runs: Runs) -> Tensor:
    rows = [x[first:last] for first, last in runs]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
