"""What every transport does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ringflash.parallel.planning.pulls import Pull


class Ticket(Protocol):
    """Transfers under way; the tensors that they use stay alive until `wait`."""

    def wait(self) -> None:
        """Return when the transfers are done; on a GPU, when the current stream waits for them."""
        ...


class Arrived(NamedTuple):
    """Rows that came.

    Attributes:
        which: of the expected.
        tensor: which of its tensors.
        first: number of the first row.
        count: of rows.
        address: of the contiguous rows.
        rows: makes a tensor of them.
    """

    which: int
    tensor: int
    first: int
    count: int
    address: int
    rows: Callable[[], Tensor]


Add = Callable[[Sequence[Arrived]], None]
"""Adds rows that came to sums, one after another."""


Runs = tuple[tuple[int, int], ...]
"""Rows of a tensor: first and one behind the last of each stretch."""

Parts = Sequence[tuple[int, Sequence[tuple[Tensor, Runs]]]]
"""What leaves: (rank in the group, for each tensor a contiguous one and which of its rows, one run behind another)."""

Expected = Sequence[tuple[int, int]]
"""What comes: (rank in the group, rows of each of its tensors)."""


class Delivery(Protocol):
    """Parts of sums on their way between ranks; they stay alive until `collect`."""

    peers: frozenset[int]
    """Ranks from or to which nothing else can be delivered before this one is collected."""

    def collect(self, add: Add) -> None:
        """Hand over all that came, in an order that is the same each time and by each transport.

        Rows are to be read in the current stream, and are gone behind the call. Every rank collects its deliveries in
        the order in which it asked for them.
        """
        ...


class Shelf(Protocol):
    """Memory of all ranks in which each lays out its rows, and from which the others take them."""

    def publish(self, rows: Sequence[Tensor], given: Sequence[tuple[int, int]]) -> None:
        """Let the others take rows of some tensors of this rank; every rank does, once a call.

        Args:
            rows: contiguous tensors (rows, ...), on all ranks as many and alike but for the number of rows.
            given: which rows others take, in runs: first and one behind the last of each.
        """
        ...

    def mark(self) -> torch.Event:
        """What the current stream has been asked for so far."""
        ...

    def pull(
        self, pulls: tuple[Pull, ...], targets: Sequence[Tensor], what: str, free: torch.Event, last: bool
    ) -> Ticket:
        """Take rows from their owners' tensors, and return without waiting.

        It can be asked for behind the work that it runs beside, so that a GPU does not wait for the host.

        Args:
            pulls: which rows.
            targets: for each published tensor the one that they fill; their rows lie beside each other, see `shelves`.
            what: is taken and when, for errors.
            free: when nobody read any more what is filled.
            last: whether it is the last that is taken in this call.
        """
        ...

    def release(self) -> None:
        """Nothing more is taken in this call; every rank says so, behind all that it takes, or with the last of it."""
        ...


class Transport(Protocol):
    """Moves rows between the ranks of a group."""

    def transfer(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], what: str
    ) -> Ticket:
        """Ask for all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination rank in the group, contiguous tensor).
            receives: (source rank in the group, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
            what: is transferred and when, for errors.
        """
        ...

    def deliver(self, parts: Parts, expected: Expected, room: Sequence[Tensor], what: str) -> Delivery:
        """Send parts of sums to those who add them up, and return without waiting.

        Between two ranks, parts are matched in the order given; each rank is among `parts`, and among `expected`, once.

        Args:
            parts: see `Parts`.
            expected: see `Expected`.
            room: contiguous tensors (rows, ...) like those that come, for all expected rows; used by nobody else before
                they are collected. Without rows where a transport does not need them.
            what: is sent and when, for errors.
        """
        ...

    @property
    def shelf(self) -> Shelf | None:
        """Where ranks can take rows from their owners themselves; None if they have to be sent."""
        ...
