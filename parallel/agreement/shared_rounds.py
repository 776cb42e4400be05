"""What the ranks of a host say of their calls, through a page of memory that they share: it costs no system call.

Every rank has a few slots, one for each of the latest things that it said, which it alone writes and all read, each at
its own pace and whether or not others are there. How much each has heard it says in the page, too, so that no slot is
written again before.

A rank that ends is noticed by the lock that the system takes from it: a POSIX record lock on one byte of the file,
which ends with the process, however that ends, and which a child does not inherit.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

SLOTS = 64
"""What a rank said that others have not heard yet."""

TOLD_EVERY = 8
"""Things that a rank heard, it says how many there were."""

WORDS = 8
"""Of 8 bytes, in a slot: its number, its values, and a sum of both."""

VALUES = 4
"""Numbers that a rank says at a time."""

FOLDER = Path("/dev/shm")

SHORTEST, LONGEST = 2e-5, 1e-3
"""Seconds between looks."""

LOOKS_FOR_LIFE_EVERY = 0.05
"""Seconds."""

MASK = (1 << 62) - 1

NUMBER, BEHIND_NUMBER = struct.Struct("q"), struct.Struct(f"{VALUES + 1}q")
"""How a slot lies there; in native order, for which Python writes numbers whole."""

SLOT = struct.Struct(f"{VALUES + 2}q")
"""All of it."""


class SharedRounds:
    """One rank's view of the page.

    Args:
        file: of `nbytes` zeros, open for reading and writing; the same for all ranks, and nobody else's. Not closed
            elsewhere: that would end this rank's lock.
        rank: of this process.
        ranks: how many there are.
        timeout: for the other ranks to come.
    """

    def __init__(self, file: int, rank: int, ranks: int, timeout: timedelta) -> None:
        self._file, self.rank, self.ranks, self.timeout = file, rank, ranks, timeout
        self._page = mmap.mmap(file, nbytes(ranks))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        self._said = 0
        self.heard = [0] * ranks
        """How much this rank has heard of each."""

    def __del__(self) -> None:
        os.close(self._file)

    def room(self) -> int:
        """How much more this rank can say before others hear it; some of them have heard a little more."""
        heard = [self._heard_by(other) for other in range(self.ranks) if other != self.rank]
        return SLOTS - (self._said - min(heard, default=self._said))

    def say(self, values: Sequence[int]) -> None:
        """`VALUES` numbers of up to 62 bits and a sign, for which there is room."""
        number, self._said = self._said, self._said + 1
        at = self._place(self.rank, number)
        page = self._page
        NUMBER.pack_into(page, at, 0)  # nobody takes what is half written for this, or for what was there before
        BEHIND_NUMBER.pack_into(page, at + NUMBER.size, *values, _sum((number + 1, *values)))
        NUMBER.pack_into(page, at, number + 1)

    def hear(self, rank: int) -> tuple[int, ...] | None:
        """What another rank said next; None if it has not said more."""
        number = self.heard[rank]
        found = SLOT.unpack_from(self._page, self._place(rank, number))
        if found[0] != number + 1 or found[-1] != _sum(found[:-1]):
            return None
        self.heard[rank] = number + 1
        if number % TOLD_EVERY == 0:
            NUMBER.pack_into(self._page, self._place_heard(self.rank, rank), number + 1)
        return found[1:-1]

    def wait(self, absent: Sequence[int]) -> None:
        """Until one of some ranks has said more.

        Raises:
            RuntimeError: a rank has ended; or none says anything within the time limit.
        """
        pause, begin = SHORTEST, time.monotonic()
        looked = begin
        while all(map(self._is_silent, absent)):
            time.sleep(pause)
            pause, now = min(2 * pause, LONGEST), time.monotonic()
            if now - looked > LOOKS_FOR_LIFE_EVERY:
                looked = now
                self._look_for_life(absent)
            if now - begin > self.timeout.total_seconds():
                raise RuntimeError(f"timed out after {self.timeout}")

    def has_ended(self, rank: int) -> bool:
        """Whether the process of another rank, never this one, is no more, or has left the group."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _look_for_life(self, absent: Sequence[int]) -> None:
        for rank in absent:
            if self.has_ended(rank) and self._is_silent(rank):  # it did not say more at last
                raise RuntimeError(f"rank {rank} has ended or left the group: the connection to it is closed")

    def _is_silent(self, rank: int) -> bool:
        number = self.heard[rank]
        return NUMBER.unpack_from(self._page, self._place(rank, number))[0] != number + 1

    def _heard_by(self, reader: int) -> int:
        return NUMBER.unpack_from(self._page, self._place_heard(reader, self.rank))[0]

    def _place(self, rank: int, number: int) -> int:
        return (rank * SLOTS + number % SLOTS) * WORDS * 8

    def _place_heard(self, reader: int, rank: int) -> int:
        return self.ranks * SLOTS * WORDS * 8 + (reader * self.ranks + rank) * NUMBER.size


def nbytes(ranks: int) -> int:
    """Of the file for so many ranks."""
    return ranks * SLOTS * WORDS * 8 + ranks * ranks * NUMBER.size


def create(ranks: int) -> tuple[int, Path]:
    """A new file for `SharedRounds`, and its path.

    Raises:
        OSError: there is no memory that processes share by name, or not enough.
    """
    file, path = tempfile.mkstemp(prefix="ringflash-", dir=FOLDER)
    try:
        os.posix_fallocate(file, 0, nbytes(ranks))
    except OSError:
        os.close(file)
        os.unlink(path)
        raise
    return file, Path(path)


def _sum(values: tuple[int, ...]) -> int:
    """Another one for other values: processors may show another process what was written in another order."""
    return hash(values) & MASK
