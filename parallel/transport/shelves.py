"""What every rank of a host lays out for all others to take by copy engines, and who may write and read it when.

In each call a rank puts its rows on its shelf, memory that the others can read, and raises a flag at each of them. They
take what they need, when they need it and have room for it, and at last raise a flag at the rank, which may then lay
out its next rows. No rank waits for another's work, only for its rows to be there.

Flags count calls, so a wait is for a number that is reached, in a circle of 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from ringflash.parallel.planning.pulls import Pull
from ringflash.parallel.transport.driver import Driver

APART = 64
"""Bytes from flag to flag."""

CIRCLE = 1 << 32

MOST_RUNS = 4
"""Of rows that are laid out by a copy each."""

ALIGNED = 256
"""Bytes at whose multiples each tensor begins."""


def flag_bytes(ranks: int) -> int:
    """What a rank needs for its flags."""
    return 2 * ranks * APART


class Shelves:
    """This rank's part.

    Args:
        rank: of this process.
        flags: for each rank where its flags are, as this process sees it: `flag_bytes(ranks)`, zeros at first.
        stream: in whose order something is taken from others.
        driver: copies, waits and writes.
    """

    def __init__(self, rank: int, flags: Sequence[int], stream: int, driver: Driver) -> None:
        self._rank, self._flags, self._stream, self._driver = rank, flags, stream, driver
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

    def take(self, owner: int, copies: Iterable[tuple[int, int, int]]) -> None:
        """Take something from a rank's shelf: (target, source, nbytes) of each copy."""
        if owner not in self._seen:
            self._seen.add(owner)
            self._driver.wait_from(self._stream, self._there(self._rank, owner), self._calls % CIRCLE)
        for target, source, nbytes in copies:
            self._driver.copy(target, source, nbytes, self._stream)

    def release(self) -> None:
        """Nothing more is taken in this call."""
        for peer in self._peers:
            self._driver.write(self._stream, self._taken(peer, self._rank), self._calls % CIRCLE)

    def _there(self, at: int, of: int) -> int:
        """Address of the flag at a rank that says what another has laid out."""
        return self._flags[at] + 2 * of * APART

    def _taken(self, at: int, by: int) -> int:
        """Of the flag that says that another has taken all."""
        return self._flags[at] + (2 * by + 1) * APART


# What lies where


def bytes_to_publish(rows: Sequence[Tensor]) -> int:
    """What tensors take on a shelf."""
    return _places(len(rows[0]), rows)[-1] if rows else 0


def lay_out(rows: Sequence[Tensor], shelf: Tensor, given: Sequence[tuple[int, int]]) -> None:
    """Copy some rows of tensors (rows, ...) into bytes of memory, each to where it lies if all do.

    Args:
        rows: the tensors.
        shelf: memory.
        given: runs of rows to copy; many are copied as one, with what lies between them.
    """
    if not given:
        return
    runs = given if len(given) <= MOST_RUNS else ((given[0][0], given[-1][1]),)
    for x, place in zip(rows, _places(len(rows[0]), rows), strict=False):
        there = shelf[place : place + x.nbytes].view(x.dtype).view(x.shape)
        for first, last in runs:
            there[first:last].copy_(x[first:last])


def copies(pull: Pull, shelf: int, targets: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
    """Target, source and bytes of what brings rows from an owner's shelf.

    Args:
        pull: which rows.
        shelf: address of the owner's.
        targets: contiguous tensors, like those that lie there but for the number of rows.
    """
    for target, place in zip(targets, _places(pull.keys, targets), strict=False):
        row, to = row_bytes(target), target.data_ptr()
        for source, filled, count in pull.runs:
            yield to + filled * row, shelf + place + source * row, count * row


def _places(count: int, like: Sequence[Tensor]) -> list[int]:
    """Where each tensor of so many rows lies, and where the last one ends."""
    return list(accumulate((-(-count * row_bytes(x) // ALIGNED) * ALIGNED for x in like), initial=0))


def row_bytes(x: Tensor) -> int:
    """Of a tensor (rows, ...)."""
    return math.prod(x.shape[1:]) * x.element_size()
