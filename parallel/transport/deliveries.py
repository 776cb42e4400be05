"""Parts of sums, gradients of keys, pushed straight to the ranks that add them up, through their mailboxes.

A part is written where its owner reads it, by a copy engine, beside whatever kernels run on both GPUs, and is added
from there: nothing is copied within a GPU. What has no room in a mailbox is written while the owner adds what is there.

Parts are added level by level: the first chunk of every message, then the second of each, and so on. Chunks beyond the
first ones are asked for only behind the reading of those whose place they take, on both sides in this order. So what
waits in one level depends on earlier ones alone, and there is no deadlock even where all streams share one queue, if
ranks collect what they have with a peer before they deliver to it, or expect from it, again (`peers`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ringflash.kernels.kept import Kept
from ringflash.parallel.transport.base import Add, Arrived
from ringflash.parallel.transport.mailboxes import CHUNKS, TOGETHER, Block, Filled, Mailboxes, chunks


class Portion(NamedTuple):
    """Rows of a message that travel together.

    Attributes:
        message: which one.
        first: row.
        rows: how many.
    """

    message: int
    first: int
    rows: int


Levels = tuple[tuple[Portion, ...], ...]

_levels = Kept(4 * 2**20, size=lambda found: 200 + 200 * sum(map(len, found)))
"""Of messages of sizes seen before, as those of a model's layers are."""


def levels(messages: tuple[tuple[int, int], ...], room: int) -> Levels:
    """The first portion of every message, then the second of each, and so on.

    Args:
        messages: rows of each, and bytes of a row.
        room: bytes of a chunk.
    """
    found = _levels.get((messages, room))
    return _levels.add((messages, room), _new_levels(messages, room)) if found is None else found


def _new_levels(messages: tuple[tuple[int, int], ...], room: int) -> Levels:
    found: list[list[Portion]] = []
    for message, (rows, row_bytes) in enumerate(messages):
        size = rows_together(row_bytes, room)
        for level, first in enumerate(range(0, rows, size)):
            if level == len(found):
                found.append([])
            found[level].append(Portion(message, first, min(size, rows - first)))
    return tuple(map(tuple, found))


def rows_together(row_bytes: int, room: int) -> int:
    """Rows of so many bytes that a chunk holds."""
    return room // row_bytes


class PushedParts:
    """What one rank pushes, and what it expects, in one delivery.

    Args:
        mailboxes: of this rank.
        room: bytes of a chunk.
        outgoing: for each message the rank that it is for, the memory that makes it up and bytes of a row.
        incoming: for each message the rank that it comes from, its rows and bytes of a row.
    """

    def __init__(
        self,
        mailboxes: Mailboxes,
        room: int,
        outgoing: Sequence[tuple[int, list[Block], int]],
        incoming: Sequence[tuple[int, int, int]],
    ) -> None:
        self._mailboxes = mailboxes
        self._owners = list(dict.fromkeys(owner for owner, *_ in outgoing))
        self._incoming = [(sender, row_bytes) for sender, _, row_bytes in incoming]
        self.levels = levels(tuple([(rows, row_bytes) for _, rows, row_bytes in incoming]), room)
        self._later: dict[int, list[tuple[int, Filled]]] = {}
        """By the level behind which there is room for them at their owner."""
        cut = [
            (owner, blocks, chunks(tuple([n for _, n in blocks]), rows_together(row_bytes, room) * row_bytes))
            for owner, blocks, row_bytes in outgoing
        ]
        used: Counter[int] = Counter()
        level_of: dict[tuple[int, int], int] = {}
        now: list[Filled] = []
        for level in range(max([len(found) for *_, found in cut], default=0)):
            for owner, blocks, found in cut:
                if level >= len(found):
                    continue
                number = used[owner]
                level_of[owner, number] = level
                used[owner] += 1
                filled = Filled(mailboxes.to[owner], blocks, found[level])
                if number < CHUNKS:
                    now.append(filled)
                else:
                    behind = level_of[owner, number - CHUNKS]
                    self._later.setdefault(behind, []).append((owner, filled))
        mailboxes.fill(now)
        mailboxes.go()

    def collect(
        self, add: Add, memory: Tensor, like: Sequence[Tensor], stream: int
    ) -> tuple[list[tuple[int, int, int, bool]], Exception | None]:
        """See `Delivery`.

        Args:
            add: see there.
            memory: of this rank, in which its mailboxes begin.
            like: for each tensor of a sender, what its rows are like.
            stream: the current one.

        Returns:
            Of each rank with which messages were exchanged: itself, the place in the memory of progress and what is
            there when its messages are over, and whether they came. And what `add` failed with, if it did; nothing was
            added since, and all has travelled.
        """
        boxes, failure = self._mailboxes, None
        requests = boxes.requests(stream)
        for level in range(max(len(self.levels), 1 + max(self._later, default=-1))):
            for portions in self._together(level):
                emptied = boxes.arrived([boxes.from_[self._incoming[x.message][0]] for x in portions], requests)
                requests.go()
                try:
                    if failure is None:
                        add([_arrived(*x, box, memory, like) for x, box in zip(portions, emptied.boxes, strict=True)])
                except Exception as error:  # others wait for what is still to be written, and for room
                    failure = error
                emptied.tell(requests)
            if level in self._later:
                requests.go()
                boxes.fill([filled for _, filled in self._later[level]])
                boxes.go()
        senders = dict.fromkeys(sender for sender, _ in self._incoming)
        ends = [(sender, *boxes.received(sender, requests), True) for sender in senders]
        requests.go()
        ends += [(owner, *end, False) for owner, end in zip(self._owners, boxes.sent(self._owners), strict=True)]
        return ends, failure

    def _together(self, level: int) -> Iterator[list[Portion]]:
        """Portions of a level, as many at a time as are waited for together."""
        some, nbytes = [], 0
        for x in self.levels[level] if level < len(self.levels) else ():
            size = x.rows * self._incoming[x.message][1]
            if some and nbytes + size > TOGETHER:
                yield some
                some, nbytes = [], 0
            some.append(x)
            nbytes += size
        if some:
            yield some

    @property
    def peers(self) -> frozenset[int]:
        """Ranks whose next delivery, or to which the next one, must wait until this one is collected."""
        later = (owner for found in self._later.values() for owner, _ in found)
        return frozenset([*(sender for sender, _ in self._incoming), *later])


def _arrived(message: int, first: int, count: int, address: int, memory: Tensor, like: Sequence[Tensor]) -> Arrived:
    """Rows at an address in some memory."""
    which, tensor = divmod(message, len(like))
    x, place = like[tensor], address - memory.data_ptr()

    def rows() -> Tensor:
        shape = count, *x.shape[1:]
        return memory[place : place + math.prod(shape) * x.element_size()].view(x.dtype).view(shape)

    return Arrived(which, tensor, first, count, address, rows)
