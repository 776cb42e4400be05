"""What every transport does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ticket(Protocol):
    """Transfers under way; the tensors that they use stay alive until `wait`."""

    def wait(self) -> None:
        """Return when the transfers are done; on a GPU, when the current stream waits for them."""
        ...


class Transport(Protocol):
    """Moves rows between the ranks of a group."""

    @property
    def sends_early(self) -> bool:
        """Whether what is sent can leave while the current stream is still at something else, see `transfer`."""
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
    ) -> Ticket:
        """Ask for all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination rank in the group, contiguous tensor).
            receives: (source rank in the group, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
            what: is transferred and when, for errors.
            ready: from `mark`, when what is sent was there; None if it is only now. What is sent may then leave while
                the current stream is still at something earlier, and no rank waits for another's work.
        """
        ...
