"""Rounds between the ranks of one host, through a page of memory that they share: a round costs no system call.

Every rank has a few slots, one for each of its latest rounds, which it alone writes and all read. A round is over for a
rank when it has found it in a slot of every rank. None can be further ahead than `SLOTS`, because ranks look at their
rounds before that.

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
from datetime import timedelta
from pathlib import Path

SLOTS = 32
"""Rounds of a rank that the others may still look at."""

WORDS = 8
"""Of 8 bytes, in a slot: the round's number, its values, and a sum of both."""

VALUES = 5
"""Numbers of a rank in a round."""

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
        self._number = 0

    def __del__(self) -> None:
        os.close(self._file)

    def begin(self, values: tuple[int, ...]) -> SharedRound:
        """This rank's part in the next round: `VALUES` numbers of up to 62 bits and a sign."""
        number, self._number = self._number, self._number + 1
        at = self._place(self.rank, number)
        page = self._page
        NUMBER.pack_into(page, at, 0)  # nobody takes what is half written for this round, or for an earlier one
        BEHIND_NUMBER.pack_into(page, at + NUMBER.size, *values, _sum(number, values))
        NUMBER.pack_into(page, at, number + 1)
        return SharedRound(self, number, values)

    def of(self, rank: int, number: int) -> tuple[int, ...] | None:
        """A rank's values in a round; None if it has not come to it."""
        there, *values, total = SLOT.unpack_from(self._page, self._place(rank, number))
        return tuple(values) if there == number + 1 and total == _sum(number, tuple(values)) else None

    def has_ended(self, rank: int) -> bool:
        """Whether the process of another rank, never this one, is no more, or has left the group."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def _place(self, rank: int, number: int) -> int:
        return (rank * SLOTS + number % SLOTS) * WORDS * 8


class SharedRound:
    """A round under way.

    Args:
        rounds: of the group.
        number: which.
        values: of this rank.
    """

    def __init__(self, rounds: SharedRounds, number: int, values: tuple[int, ...]) -> None:
        self._rounds, self._number = rounds, number
        self._missing = [rank for rank in range(rounds.ranks) if rank != rounds.rank]
        self._most = values

    def is_completed(self) -> bool:
        """Whether all ranks have come."""
        while self._missing:
            values = self._rounds.of(self._missing[-1], self._number)
            if values is None:
                return False
            if values != self._most:
                self._most = tuple(map(max, self._most, values))
            self._missing.pop()
        return True

    def wait(self) -> list[int]:
        """The greatest of each of the ranks' values.

        Raises:
            RuntimeError: a rank has ended; or it does not come within the time limit.
        """
        pause, begin = SHORTEST, time.monotonic()
        looked = begin
        while not self.is_completed():
            time.sleep(pause)
            pause, now = min(2 * pause, LONGEST), time.monotonic()
            if now - looked > LOOKS_FOR_LIFE_EVERY:
                looked = now
                self._look_for_life()
            if now - begin > self._rounds.timeout.total_seconds():
                raise RuntimeError(f"timed out after {self._rounds.timeout}")
        return list(self._most)

    def _look_for_life(self) -> None:
        for rank in self._missing:
            if self._is_absent(rank) and self._rounds.has_ended(rank) and self._is_absent(rank):  # not come at last
                raise RuntimeError(f"rank {rank} has ended or left the group: the connection to it is closed")

    def _is_absent(self, rank: int) -> bool:
        return self._rounds.of(rank, self._number) is None


def nbytes(ranks: int) -> int:
    """Of the file for so many ranks."""
    return ranks * SLOTS * WORDS * 8


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


def _sum(number: int, values: tuple[int, ...]) -> int:
    """Another one for other values: processors may show another process what was written in another order."""
    return hash((number, *values)) & MASK
