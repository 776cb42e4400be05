"""What attention knows beside its arguments: that ranks work alone, and the sharding of the model at work."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from ringflash.parallel.sharding import Sharding


@dataclass
class _AtWork:
    """State of this process.

    Attributes:
        alone: how many `alone` blocks are open.
        sharding: of the batch in the forward pass at work; None outside of one, and where its batch has none.
    """

    alone: int = 0
    sharding: Sharding | None = None


at_work = _AtWork()


@contextmanager
def alone() -> Generator[None]:
    """Every rank works for itself: calls whose batch was not sharded are attended on this device only."""
    at_work.alone += 1
    try:
        yield
    finally:
        at_work.alone -= 1
