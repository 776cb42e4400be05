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
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.kept import Kept
from ringflash.kernels.requests import ask, draw
from ringflash.parallel.transport.base import Add, Arrived
from ringflash.parallel.transport.driver import Requests
from ringflash.parallel.transport.mailboxes import CHUNKS, Emptied, Filled, Mailboxes, Way, chunks, together


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


class Coming(NamedTuple):
    """A message that is expected: from which rank, how many rows, and bytes of a row."""

    sender: int
    rows: int
    row_bytes: int


@lru_cache(maxsize=1024)
def portions_together(coming: tuple[Coming, ...], room: int) -> tuple[tuple[tuple[Portion, ...], ...], ...]:
    """The portions of each level, as many at a time as are waited for together."""
    found = levels(tuple([(x.rows, x.row_bytes) for x in coming]), room)
    return tuple(tuple(map(tuple, together(x, lambda p: p.rows * coming[p.message].row_bytes))) for x in found)


class Leaving(NamedTuple):
    """A message that is pushed.

    Attributes:
        owner: rank that it is for.
        address: of a contiguous tensor.
        runs: of rows that make it up: first and one behind the last of each.
        row_bytes: of a row.
    """

    owner: int
    address: int
    runs: tuple[tuple[int, int], ...]
    row_bytes: int


class Written(NamedTuple):
    """A chunk to write.

    Attributes:
        owner: rank that it is for.
        message: which one.
        copies: (place in the message's tensor, place in the chunk, bytes) of what lies together.
    """

    owner: int
    message: int
    copies: tuple[tuple[int, int, int], ...]

    def nbytes(self) -> int:
        """All that is written."""
        return sum([nbytes for *_, nbytes in self.copies])


Groups = tuple[tuple[Written, ...], ...]
"""Chunks in their order, those that are asked for together."""


class Order(NamedTuple):
    """In which order chunks are written.

    Attributes:
        now: what their owners have room for.
        later: the others, by the level behind which there is room for them.
    """

    now: Groups
    later: dict[int, Groups]


@lru_cache(maxsize=1024)
def order_of(messages: tuple[tuple[int, tuple[tuple[int, int], ...], int], ...], room: int) -> Order:
    """What is written when.

    Args:
        messages: owner, runs and bytes of a row of each.
        room: bytes of a chunk.
    """
    cut = []
    for message, (owner, runs, row_bytes) in enumerate(messages):
        blocks = [(first * row_bytes, (last - first) * row_bytes) for first, last in runs if first < last]
        found = chunks(tuple([nbytes for _, nbytes in blocks]), rows_together(row_bytes, room) * row_bytes)
        cut.append(
            [
                Written(owner, message, tuple([(blocks[x.block][0] + x.offset, x.place, x.nbytes) for x in chunk]))
                for chunk in found
            ]
        )
    used: Counter[int] = Counter()
    level_of: dict[tuple[int, int], int] = {}
    now: list[Written] = []
    later: dict[int, list[Written]] = {}
    for level, of_level in enumerate(zip_longest(*cut)):
        for x in filter(None, of_level):
            number = used[x.owner]
            level_of[x.owner, number] = level
            used[x.owner] += 1
            there = now if number < CHUNKS else later.setdefault(level_of[x.owner, number - CHUNKS], [])
            there.append(x)
    return Order(_grouped(now), {level: _grouped(found) for level, found in later.items()})


def _grouped(found: list[Written]) -> Groups:
    return tuple(map(tuple, together(found, Written.nbytes)))


class End(NamedTuple):
    """When messages that were exchanged with a rank are over.

    Attributes:
        peer: the rank.
        place: in the memory of progress.
        number: that is there then.
        comes: whether they come from it.
    """

    peer: int
    place: int
    number: int
    comes: bool


class PushedParts:
    """What one rank pushes, and what it expects, in one delivery.

    Args:
        mailboxes: of this rank.
        room: bytes of a chunk.
        outgoing: messages that it pushes.
        incoming: messages that it expects.
    """

    def __init__(
        self, mailboxes: Mailboxes, room: int, outgoing: Sequence[Leaving], incoming: Sequence[Coming]
    ) -> None:
        self._mailboxes, self._room = mailboxes, room
        self._addresses = [x.address for x in outgoing]
        self._senders = [x.sender for x in incoming]
        self._portions = portions_together(tuple(incoming), room)
        order = order_of(tuple([(owner, runs, row_bytes) for owner, _, runs, row_bytes in outgoing]), room)
        self._now, self._later = order.now, order.later
        self.writes = bool(outgoing)
        """Whether there is anything to push."""
        self._owners = list(dict.fromkeys([x.owner for x in outgoing]))

    def push(self, addresses: Sequence[int]) -> list[End]:
        """Begin.

        Args:
            addresses: of the outgoing messages' tensors.

        Returns:
            Of each rank to which everything was pushed at once what `collect` says of it otherwise.
        """
        for some in self._now:
            self._write(some, addresses)
        sent = [] if self._later else self._end_writing()
        self._mailboxes.go()
        return sent

    def _end_writing(self) -> list[End]:
        ends = zip(self._owners, self._mailboxes.sent(self._owners), strict=True)
        return [End(owner, *end, comes=False) for owner, end in ends]

    def _write(self, some: Sequence[Written], addresses: Sequence[int]) -> None:
        boxes = self._mailboxes
        boxes.fill(
            [
                Filled(boxes.to[owner], [(addresses[message] + x, place, n) for x, place, n in copies])
                for owner, message, copies in some
            ]
        )

    def collect(
        self,
        add: Add,
        memory: Tensor,
        like: Sequence[Tensor],
        stream: int,
        ended: Callable[[list[End]], None],
    ) -> Exception | None:
        """See `Delivery`.

        Args:
            add: see there.
            memory: of this rank, in which its mailboxes begin.
            like: for each tensor of a sender, what its rows are like.
            stream: the current one.
            ended: is told when messages are over.

        Returns:
            What `add` failed with, if it did; nothing was added since, and all has travelled.
        """
        boxes, failure = self._mailboxes, None
        requests = boxes.requests(stream)
        for level in range(max(len(self._portions), 1 + max(self._later, default=-1))):
            for portions in self._portions[level] if level < len(self._portions) else ():
                reading = Reading(boxes, [boxes.from_[self._senders[message]] for message, *_ in portions], requests)
                found = draw("chunks", reading.begin, [self._room] * len(portions))
                try:
                    if failure is None:
                        add([_arrived(*x, box, memory, like) for x, box in zip(portions, found, strict=True)])
                except Exception as error:  # others wait for what is still to be written, and for room
                    failure = error
                ask("emptied", reading.end)
            if level in self._later:
                ask("later chunks", partial(self._go_on, level, requests), self._addresses)
        ask("collected", partial(self._end, requests, ended))
        return failure

    def _go_on(self, level: int, requests: Requests, addresses: Sequence[int]) -> None:
        requests.go()
        for some in self._later[level]:
            self._write(some, addresses)
        self._mailboxes.go()

    def _end(self, requests: Requests, ended: Callable[[list[End]], None], _: object) -> None:
        boxes = self._mailboxes
        ends = [End(x, *boxes.received(x, requests), comes=True) for x in dict.fromkeys(self._senders)]
        requests.go()
        ended(ends + (self._end_writing() if self._later else []))

    @property
    def peers(self) -> frozenset[int]:
        """Ranks whose next delivery, or to which the next one, must wait until this one is collected."""
        return frozenset([*self._senders, *(x.owner for found in self._later.values() for some in found for x in some)])


class Reading:
    """Chunks that are read together, in the order of a stream.

    Args:
        boxes: of this rank.
        ways: from the ranks that write them.
        requests: of the stream.
    """

    def __init__(self, boxes: Mailboxes, ways: Sequence[Way], requests: Requests) -> None:
        self._boxes, self._ways, self._requests = boxes, ways, requests
        self._emptied = Emptied([], [])

    def begin(self, _: object = None) -> list[int]:
        """Their addresses; they are there behind this."""
        self._emptied = self._boxes.arrived(self._ways, self._requests)
        self._requests.go()
        return self._emptied.boxes

    def end(self, _: object = None) -> None:
        """They have been read."""
        self._emptied.tell(self._requests)


def _arrived(message: int, first: int, count: int, address: int, memory: Tensor, like: Sequence[Tensor]) -> Arrived:
    """Rows at an address in some memory."""
    which, tensor = divmod(message, len(like))
    rows = partial(_view, memory, address - memory.data_ptr(), (count, *like[tensor].shape[1:]), like[tensor].dtype)
    return Arrived(which, tensor, first, count, address, rows)


def _view(memory: Tensor, place: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[place : place + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
