"""What every transport does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringflash.parallel.planning.pulls import Pull


class Ticket(Protocol):
    """Transfers under way; the tensors that they use stay alive until `wait`."""

    def wait(self) -> None:
        """Return when the transfers are done; on a GPU, when the current stream waits for them."""
        ...


class Shelf(Protocol):
    """Memory of all ranks in which each lays out its rows, and from which the others take them."""

    def publish(self, rows: Sequence[Tensor]) -> None:
        """Let the others take rows of some tensors of this rank; every rank does, once a call.

        Args:
            rows: contiguous tensors (rows, ...), on all ranks as many and alike but for the number of rows; none if
                nobody takes any.
        """
        ...

    def mark(self) -> torch.Event:
        """What the current stream has been asked for so far."""
        ...

    def pull(self, pulls: Sequence[Pull], targets: Sequence[Tensor], what: str, free: torch.Event) -> Ticket:
        """Take rows from their owners' tensors, and return without waiting.

        It can be asked for behind the work that it runs beside, so that a GPU does not wait for the host.

        Args:
            pulls: which rows.
            targets: for each published tensor the one that they fill.
            what: is taken and when, for errors.
            free: when nobody read any more what is filled.
        """
        ...

    def release(self) -> None:
        """Nothing more is taken in this call; every rank says so, behind all that it takes."""
        ...


class Transport(Protocol):
    """Moves rows between the ranks of a group."""

    def transfer(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
        first: bool = False,
    ) -> Ticket:
        """Ask for all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination rank in the group, contiguous tensor).
            receives: (source rank in the group, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
            what: is transferred and when, for errors.
            first: what is sent leaves before the current stream goes on, where it might have to wait for that.
        """
        ...

    @property
    def shelf(self) -> Shelf | None:
        """Where ranks can take rows from their owners themselves; None if they have to be sent."""
        ...
