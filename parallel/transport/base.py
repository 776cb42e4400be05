"""What every transport does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ticket(Protocol):
    """Transfers under way; the tensors that they use stay alive until `wait`."""

    @property
    def sent(self) -> Sequence[torch.Event]:
        """When what is sent has left; nothing where `wait_received` waits for that too."""
        ...

    def wait_received(self) -> None:
        """Return when what is received is there; on a GPU, when the current stream waits for it."""
        ...

    def wait(self) -> None:
        """Return when the transfers are done; on a GPU, when the current stream waits for them."""
        ...


class Transport(Protocol):
    """Moves rows between the ranks of a group."""

    @property
    def sends_early(self) -> bool:
        """Whether a transfer can be asked for behind the work that it is to run beside, see `transfer`."""
        ...

    def mark(self) -> torch.Event | None:
        """What the current stream has been asked for so far; None where no stream can wait for it."""
        ...

    def transfer(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
        ready: torch.Event | None = None,
        free: Sequence[torch.Event] | None = None,
    ) -> Ticket:
        """Ask for all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination rank in the group, contiguous tensor).
            receives: (source rank in the group, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
            what: is transferred and when, for errors.
            ready: from `mark`, when what is sent was there; None if it is only now. What is sent may then leave while
                the current stream is still at something later, and no rank waits for another's work.
            free: when nobody read any more what is filled, from `mark` and `Ticket.sent`; None if it is only now.
        """
        ...
