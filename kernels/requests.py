"""Requests to a GPU's driver as functions of addresses, which somebody may be noting to repeat them.

See ringflash.kernels.gpu.recording, which does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Noting(Protocol):
    """Who notes what is asked for."""

    def ask(self, what: object, function: Callable[[list[int]], Any], addresses: Sequence[int]) -> None:
        """See `ask`."""
        ...

    def draw(self, what: object, function: Callable[[list[int]], list[int]], sizes: Sequence[int]) -> list[int]:
        """See `draw`."""
        ...

    def launched(self, by: Any, arguments: Sequence[Any], addresses: Sequence[int], stream: int) -> None:
        """A `DirectLaunch` has launched: addresses of its tensors, those that it has maps of last."""
        ...

    def stays(self, address: int, nbytes: int) -> None:
        """See `stays`."""
        ...

    def cannot(self, why: str) -> None:
        """See `cannot_repeat`."""
        ...


class OfThread(threading.local):
    """Of this thread.

    Attributes:
        noting: who notes what it asks for.
    """

    noting: Noting | None = None


of_thread = OfThread()


def ask(what: object, function: Callable[[list[int]], Any], addresses: Sequence[int] = ()) -> None:
    """Call a function that asks a driver for something.

    Args:
        what: tells requests apart.
        function: of addresses; knows by itself all that is the same in calls alike, or changes from call to call in
            another way.
        addresses: that depend on a call's tensors.
    """
    who = of_thread.noting
    if who is None:
        function(list(addresses))
    else:
        who.ask(what, function, addresses)


def draw(what: object, function: Callable[[list[int]], list[int]], sizes: Sequence[int]) -> list[int]:
    """What a function gives: addresses of as many bytes, others in each call."""
    who = of_thread.noting
    return function([]) if who is None else who.draw(what, function, sizes)


def stays(address: int, nbytes: int) -> None:
    """Addresses there are the same in all calls that may repeat this one, whose asker holds the memory."""
    who = of_thread.noting
    if who is not None:
        who.stays(address, nbytes)


@contextmanager
def unnoted() -> Generator[None]:
    """Within a `with` something is made that stays, and is no part of what calls ask for."""
    who, of_thread.noting = of_thread.noting, None
    try:
        yield
    finally:
        of_thread.noting = who


def cannot_repeat(why: str) -> None:
    """Something is asked for that can only be asked for by the way that leads there."""
    who = of_thread.noting
    if who is not None:
        who.cannot(why)
