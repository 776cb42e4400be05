"""What every rank of a host lays out for all others to take by copy engines, and who may write and read it when.

In each call a rank puts its rows on its shelf, memory that the others can read, and raises a flag at each of them. They
take what they need, when they need it and have room for it, and at last raise a flag at the rank, which may then lay
out its next rows. No rank waits for another's work, only for its rows to be there.

Rows of key and value lie beside each other, there and where they arrive: rows that lie together are one copy.

Flags count calls, so a wait is for a number that is reached, in a circle of 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.parallel.planning.pulls import Pull
from ringflash.parallel.transport.driver import BEHIND_ALL, REACHED, WAIT, WRITE, Driver, Rectangle, Requests

APART = 64
"""Bytes from flag to flag."""

CIRCLE = 1 << 32

MOST_RUNS = 4
"""Of rows that are laid out by a copy each."""

ALIGNED = 256
"""Bytes at whose multiples tensors begin."""

ALIGNED_ROWS = 16
"""Bytes of which rows are multiples that lie beside others: kernels read others slowly, or copy them first."""


def flag_bytes(ranks: int) -> int:
    """What a rank needs for its flags."""
    return 2 * ranks * APART


class Shelves:
    """This rank's part.

    Args:
        rank: of this process.
        flags: for each rank where its flags are, as this process sees it: `flag_bytes(ranks)`, zeros at first.
        taker: what the stream is asked for in whose order something is taken from others.
        driver: copies, waits and writes.
    """

    def __init__(self, rank: int, flags: Sequence[int], taker: Requests, driver: Driver) -> None:
        self._taker, self._driver = taker, driver

        def there(at: int, of: int) -> int:
            """Address of the flag at a rank that says what another has laid out."""
            return flags[at] + 2 * of * APART

        def taken(at: int, by: int) -> int:
            """Of the flag that says that another has taken all."""
            return flags[at] + (2 * by + 1) * APART

        peers = [peer for peer in range(len(flags)) if peer != rank]
        self._there = [there(rank, peer) for peer in range(len(flags))]
        self._told = [there(peer, rank) for peer in peers]
        self._taken = [taken(rank, peer) for peer in peers]
        self._released = [taken(peer, rank) for peer in peers]
        self._calls = self._last_released = 0
        self._seen: set[int] = set()

    def begin(self, stream: int) -> None:
        """What is laid out in the order of a stream behind this comes when nobody reads what was there before."""
        requests, number = Requests(self._driver, stream), self._calls % CIRCLE
        requests.operate([x for address in self._taken for x in (WAIT, address, number, REACHED)])
        requests.go()

    def end(self, stream: int) -> None:
        """What was laid out in the order of a stream may be taken."""
        requests = Requests(self._driver, stream)
        self._calls += 1
        self._seen.clear()
        number = self._calls % CIRCLE
        requests.operate([x for address in self._told for x in (WRITE, address, number, BEHIND_ALL)])
        requests.go()

    def awaited(self) -> list[tuple[int, int]]:
        """All flags that this rank's streams may be waiting for, and what lets them go on as if all had come."""
        return [(address, self._calls % CIRCLE) for address in (*self._there, *self._taken)]

    def expect(self, owner: int) -> None:
        """Go on when a rank's rows are there."""
        if owner not in self._seen:
            self._seen.add(owner)
            self._taker.wait_from(self._there[owner], self._calls % CIRCLE)

    def release(self) -> None:
        """Nothing more is taken in this call."""
        if self._last_released == self._calls:
            return
        self._last_released = self._calls
        number = self._calls % CIRCLE
        self._taker.operate([x for address in self._released for x in (WRITE, address, number, BEHIND_ALL)])
        self._taker.go()


# What lies where


Kind = tuple[int, torch.dtype]
"""Bytes of a tensor's row, and what they are."""


class Group(NamedTuple):
    """Tensors whose rows lie beside each other.

    Attributes:
        members: which of the tensors.
        offsets: where each one's part of a row begins.
        row: bytes of a row of all.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    row: int


@lru_cache(maxsize=256)
def groups(kinds: tuple[Kind, ...]) -> tuple[Group, ...]:
    """Which of some tensors lie together: those of one dtype, where kernels read them as well so."""
    together: dict[object, list[int]] = {}
    for index, (nbytes, dtype) in enumerate(kinds):
        together.setdefault(index if nbytes % ALIGNED_ROWS else dtype, []).append(index)
    found = []
    for members in together.values():
        *offsets, row = accumulate((kinds[i][0] for i in members), initial=0)
        found.append(Group(tuple(members), tuple(offsets), row))
    return tuple(found)


def kinds_of(rows: Sequence[Tensor]) -> tuple[Kind, ...]:
    """Of tensors (rows, ...)."""
    return tuple([(row_bytes(x), x.dtype) for x in rows])


def places(count: int, found: Sequence[Group]) -> list[int]:
    """Where the rows of each group begin, so many of each, and where the last ones end."""
    return list(accumulate((-(-count * group.row // ALIGNED) * ALIGNED for group in found), initial=0))


def bytes_to_publish(rows: Sequence[Tensor]) -> int:
    """What tensors take on a shelf."""
    return places(len(rows[0]), groups(kinds_of(rows)))[-1] if rows else 0


Lies = list[tuple[int, int, int, int, int, int]]
"""Of each copy: which tensor, its place on the shelf, bytes from row to row there, place in it, width and rows."""


def laid_out(lies: Lies, addresses: Sequence[int], shelf: int) -> list[Rectangle]:
    """What brings some rows of tensors to memory, each to where it lies if all do.

    Args:
        lies: from `lies_of`.
        addresses: of the tensors.
        shelf: address of the memory.
    """
    return [
        Rectangle(shelf + target, pitch, addresses[which] + source, width, width, count)
        for which, target, pitch, source, width, count in lies
    ]


def lies_of(rows: Sequence[Tensor], given: Sequence[tuple[int, int]]) -> Lies:
    """Where rows of some tensors lie.

    Args:
        rows: contiguous tensors (rows, ...).
        given: runs of rows to copy; many are copied as one, with what lies between them.
    """
    return _lies_of(kinds_of(rows), len(rows[0]), tuple(given))


@lru_cache(maxsize=1024)
def _lies_of(kinds: tuple[Kind, ...], count: int, given: tuple[tuple[int, int], ...]) -> Lies:
    runs = given if len(given) <= MOST_RUNS else ((given[0][0], given[-1][1]),)
    found, copied = groups(kinds), []
    for group, place in zip(found, places(count, found), strict=False):
        for which, offset in zip(group.members, group.offsets, strict=True):
            width = kinds[which][0]
            for first, last in runs:
                size = (width, last - first) if len(group.members) > 1 else (width * (last - first), 1)
                copied.append((which, place + first * group.row + offset, group.row, first * width, *size))
    return copied


def copies(pulled: tuple[Pull, ...], kinds: tuple[Kind, ...]) -> list[tuple[int, int, int, int, int]]:
    """What brings rows from owners' shelves.

    Returns:
        Of each copy: which group it fills, where from its first row on, the owner, the place on its shelf, and bytes.
    """
    found = groups(kinds)
    return [
        (index, filled * group.row, pull.owner, place + source * group.row, count * group.row)
        for pull in pulled
        for index, (group, place) in enumerate(zip(found, places(pull.keys, found), strict=False))
        for source, filled, count in pull.runs
    ]


def row_bytes(x: Tensor) -> int:
    """Of a tensor (rows, ...)."""
    return math.prod(x.shape[1:]) * x.element_size()
