"""What every rank of a host lays out for all others to take by copy engines, and who may write and read it when.

In each call a rank puts its rows on its shelf, memory that the others can read, and raises a flag at each of them. They
take what they need, when they need it and have room for it, and at last raise a flag at the rank, which may then lay
out its next rows. No rank waits for another's work, only for its rows to be there.

Flags count calls, so a wait is for a number that is reached, in a circle of 2^32.
"""

from __future__ import annotations

from collections.abc import Sequence

from ringflash.parallel.transport.driver import Copy, Driver

APART = 64
"""Bytes from flag to flag."""

CIRCLE = 1 << 32


def flag_bytes(ranks: int) -> int:
    """What a rank needs for its flags."""
    return 2 * ranks * APART


class Shelves:
    """This rank's part.

    Args:
        rank: of this process.
        flags: for each rank where its flags are, as this process sees it: `flag_bytes(ranks)`, zeros at first.
        streams: for each rank in which order of what is taken from it.
        driver: copies, waits and writes.
    """

    def __init__(self, rank: int, flags: Sequence[int], streams: Sequence[int], driver: Driver) -> None:
        self._rank, self._flags, self._streams, self._driver = rank, flags, streams, driver
        self._peers = [peer for peer in range(len(flags)) if peer != rank]
        self._calls = 0
        self._seen: set[int] = set()

    def clear(self, stream: int) -> None:
        """Behind this in a stream, nobody reads any more what was laid out in the last call."""
        for peer in self._peers:
            self._driver.wait_from(stream, self._taken(self._rank, peer), self._calls % CIRCLE)

    def publish(self, stream: int) -> None:
        """What a stream was asked for so far lies there."""
        self._calls += 1
        self._seen.clear()
        for peer in self._peers:
            self._driver.write(stream, self._there(peer, self._rank), self._calls % CIRCLE)

    def take(self, owner: int, copies: Sequence[Copy]) -> None:
        """Take something from a rank's shelf."""
        stream = self._streams[owner]
        if owner not in self._seen:
            self._seen.add(owner)
            self._driver.wait_from(stream, self._there(self._rank, owner), self._calls % CIRCLE)
        self._driver.copy(copies, stream)

    def release(self) -> None:
        """Nothing more is taken in this call."""
        for peer in self._peers:
            self._driver.write(self._streams[peer], self._taken(peer, self._rank), self._calls % CIRCLE)

    def _there(self, at: int, of: int) -> int:
        """Address of the flag at a rank that says what another has laid out."""
        return self._flags[at] + 2 * of * APART

    def _taken(self, at: int, by: int) -> int:
        """Of the flag that says that another has taken all."""
        return self._flags[at] + (2 * by + 1) * APART
