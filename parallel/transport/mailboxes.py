"""Messages between the ranks of a host through memory that all of them can write: who may write and read what when.

Each rank has a mailbox for every writer: a few chunks of memory, and two flags for each chunk. The writer fills a chunk
and raises its `filled` flag at the reader; the reader, whose stream waits for that, uses the bytes and raises the
`emptied` flag at the writer, who may then fill the chunk again. A message is as many chunks as it needs, so the memory
does not depend on it. Copies, flags and waits are asked for in the order of streams, and no host takes part. Writers'
copies, between GPUs, are carried out by copy engines, whatever kernels are at; readers', within a GPU, are kernels.

Flags count the times that a chunk was used, in a circle of 2^32; a wait is for a number that is reached. A chunk's two
flags are raised in turn, so none is ever more than one ahead of the other, unless a rank gives up (`awaited`).

Ranks ask for the chunks of a transfer level by level: the first of every message to write, the first of every message
to read, the second of each, and so on. What waits in one level depends on earlier ones alone, or on what is written in
the same; so there is no deadlock even where all streams share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from ringflash.parallel.transport.driver import BEHIND_ALL, REACHED, WAIT, WRITE, Driver, Requests

CHUNKS = 3
"""In each mailbox: one is filled, one is read, and one is on its way to be emptied."""

APART = 64
"""Bytes from flag to flag."""

CIRCLE = 1 << 32
"""Numbers that flags go through."""

MESSAGES = 1 << 15
"""Numbers that messages which are over go through."""

ALIGNED = 256
"""Bytes of which chunks are multiples, so that flags and numbers of any size lie where they can be read."""

MOST_ROOM, LEAST_ROOM, ROOMS = 24 << 20, 4 << 20, 96 << 20
"""Bytes of a chunk, and of a chunk for each rank. Of more, a message would wait longer for its first; of fewer, the
host has more to ask for than the copy engines to do, and less of a message leaves at once."""

TOGETHER = 8 << 20
"""Bytes of chunks that are asked for together, with one request for what streams wait for and one for their flags. Copy
engines take 25 us for as many, longer than it takes to ask; of more, the first would wait for the last."""

Block = tuple[int, int]
"""Address and bytes of some memory."""

Item = TypeVar("Item")


class Piece(NamedTuple):
    """Bytes that lie together in a block and in a chunk.

    Attributes:
        block: which of the message's.
        offset: in the block.
        nbytes: how many.
        place: in the chunk.
    """

    block: int
    offset: int
    nbytes: int
    place: int


def room_of(ranks: int) -> int:
    """Bytes of a chunk in a group of so many ranks; three for each rank are taken on every GPU, 288 MiB of 4 ranks."""
    return max(LEAST_ROOM, min(MOST_ROOM, ROOMS // ranks)) // ALIGNED * ALIGNED


@lru_cache(maxsize=1024)
def chunks(sizes: tuple[int, ...], room: int) -> tuple[tuple[Piece, ...], ...]:
    """Where the bytes of blocks of these sizes, one behind another, lie in chunks of so many bytes.

    What is one block to the writer may be several to the reader, and the other way round.
    """
    found: list[list[Piece]] = []
    place = room
    for block, size in enumerate(sizes):
        offset = 0
        while offset < size:
            if place == room:
                found.append([])
                place = 0
            nbytes = min(size - offset, room - place)
            found[-1].append(Piece(block, offset, nbytes, place))
            offset, place = offset + nbytes, place + nbytes
    return tuple(map(tuple, found))


def bytes_of(ranks: int, room: int) -> int:
    """What a rank needs for its mailboxes and flags, with chunks of so many bytes."""
    return ranks * CHUNKS * (room + 2 * APART)


@dataclass
class Way:
    """From one rank to another.

    Attributes:
        boxes: addresses of the chunks, at the reader.
        filled: addresses of their flags, at the reader.
        emptied: addresses of their flags, at the writer.
        used: chunks that were asked for so far.
    """

    boxes: tuple[int, ...]
    filled: tuple[int, ...]
    emptied: tuple[int, ...]
    used: int = 0

    def turn(self) -> tuple[int, int]:
        """Which chunk comes next, and how often it was used."""
        times, chunk = divmod(self.used, CHUNKS)
        self.used += 1
        return chunk, times

    def last_turns(self) -> list[int]:
        """What the flags of each chunk say of its last use."""
        return [(self.used - chunk + CHUNKS - 1) // CHUNKS % CIRCLE for chunk in range(CHUNKS)]


def flag_of(times: int) -> int:
    """What a flag says of the use with this number; at first it holds 0."""
    return (times + 1) % CIRCLE


def number_of(messages: int) -> int:
    """What progress says of so many messages; never what it holds at first, 0."""
    return messages % MESSAGES + 1


class Mailboxes:
    """This rank's part in all messages.

    Args:
        rank: of this process.
        bases: for each rank where its memory is, as this process sees it: `bytes_of(ranks, room)`, zeros at first.
        room: bytes of a chunk.
        progress: address of memory that the host reads: two places of 4 bytes for each rank, with the number of the
            last message from it and to it that is over.
        writer: stream in whose order messages are written.
        reader: stream in whose order they are read.
        driver: copies, waits and writes.
    """

    def __init__(
        self,
        rank: int,
        bases: Sequence[int],
        room: int,
        progress: int,
        writer: int,
        reader: int,
        driver: Driver,
    ) -> None:
        self._room, self._progress = room, progress
        self._driver = driver
        self._out, self._in = Requests(driver, writer), Requests(driver, reader)
        ranks = range(len(bases))
        self._asked = [0] * (2 * len(bases))
        self.to = [Way(*_addresses(bases, rank, peer, room)) for peer in ranks]
        self.from_ = [Way(*_addresses(bases, peer, rank, room)) for peer in ranks]

    def transfer(
        self,
        sends: dict[int, list[Block]],
        receives: dict[int, list[Block]],
    ) -> list[tuple[int, int]]:
        """Ask for one message to, and one from, each of some ranks.

        Between two ranks messages are matched in the order in which they are asked for.

        Args:
            sends: by the reader's rank the blocks of its message.
            receives: by the writer's rank the blocks that take its message, as many bytes together.

        Returns:
            Of each message, first those received, the place in the memory of progress, and what is there when it is
            over.
        """
        outgoing = [self._filled(self.to[p], blocks) for p, blocks in sends.items()]
        incoming = [self._filled(self.from_[p], blocks) for p, blocks in receives.items()]
        levels = max(map(len, outgoing + incoming), default=0)
        for level in range(levels):
            for some in together([found[level] for found in outgoing if level < len(found)], Filled.nbytes):
                self.fill(some)
            self._out.go()
            for some in together([found[level] for found in incoming if level < len(found)], Filled.nbytes):
                self._empty(some)
            if level + 1 < levels:
                self._in.go()
        ends = [self.received(peer, self._in) for peer in receives]
        self._in.go()
        return ends + self.sent(list(sends))

    def received(self, peer: int, requests: Requests) -> tuple[int, int]:
        """A message from a rank is over, behind this in a stream: its place among progress, and the number there."""
        return self._over(2 * peer, requests)

    def sent(self, peers: Sequence[int]) -> list[tuple[int, int]]:
        """The same of messages to ranks, and all that the writer was told to ask for is asked for."""
        ends = [self._over(2 * peer + 1, self._out) for peer in peers]
        self._out.go()
        return ends

    def _over(self, place: int, requests: Requests) -> tuple[int, int]:
        self._asked[place] += 1
        number = number_of(self._asked[place])
        requests.write(self._progress + 4 * place, number)
        return place, number

    def _filled(self, way: Way, blocks: list[Block]) -> list[Filled]:
        """The chunks of a message."""
        return [
            Filled(way, [(blocks[x.block][0] + x.offset, x.place, x.nbytes) for x in chunk])
            for chunk in chunks(tuple([nbytes for _, nbytes in blocks]), self._room)
        ]

    def fill(self, filled: Sequence[Filled]) -> None:
        """Write next chunks of messages together, in the order of the writer; it is all asked for behind `go`."""
        waits: list[int] = []
        writes: list[int] = []
        copied: list[tuple[int, int, int]] = []
        for way, copies in filled:
            chunk, times = way.turn()
            if times:
                waits += WAIT, way.emptied[chunk], flag_of(times - 1), REACHED
            writes += WRITE, way.filled[chunk], flag_of(times), BEHIND_ALL
            box = way.boxes[chunk]
            copied += [(box + place, address, nbytes) for address, place, nbytes in copies]
        out = self._out
        out.operate(waits)
        out.copies(copied)
        out.operate(writes)

    def awaited(self) -> list[tuple[int, int]]:
        """All flags that this rank's streams may be waiting for, and what lets them go on as if all had come."""
        coming = [(way.filled, way) for way in self.from_]
        return [
            flag
            for flags, way in [*coming, *((way.emptied, way) for way in self.to)]
            for flag in zip(flags, way.last_turns(), strict=True)
        ]

    def requests(self, stream: int) -> Requests:
        """To ask for what a stream does with messages that arrive."""
        return Requests(self._driver, stream)

    def go(self) -> None:
        """All that the writer was told to ask for is asked for."""
        self._out.go()

    def arrived(self, ways: Sequence[Way], requests: Requests) -> Emptied:
        """The next chunks of messages, in the order of a stream. They are there until they are told to be emptied."""
        boxes: list[int] = []
        waits: list[int] = []
        emptied: list[int] = []
        for way in ways:
            chunk, times = way.turn()
            number = flag_of(times)
            waits += WAIT, way.filled[chunk], number, REACHED
            emptied += WRITE, way.emptied[chunk], number, BEHIND_ALL
            boxes.append(way.boxes[chunk])
        requests.operate(waits)
        return Emptied(boxes, emptied)

    def _empty(self, filled: Sequence[Filled]) -> None:
        emptied = self.arrived([way for way, _ in filled], self._in)
        for box, (_, copies) in zip(emptied.boxes, filled, strict=True):
            self._in.copies([(address, box + place, nbytes) for address, place, nbytes in copies])
        emptied.tell(self._in)


class Filled(NamedTuple):
    """A chunk of a message: whose, and (address, place in the chunk, bytes) of what makes it up, or takes it."""

    way: Way
    copies: list[tuple[int, int, int]]

    def nbytes(self) -> int:
        """All that is copied."""
        return sum([nbytes for *_, nbytes in self.copies])


class Emptied(NamedTuple):
    """Chunks that are read.

    Attributes:
        boxes: their addresses.
        operations: what tells their writers that they may be filled again.
    """

    boxes: list[int]
    operations: list[int]

    def tell(self, requests: Requests) -> None:
        """Behind all that a stream was asked for, nobody reads them any more."""
        requests.operate(self.operations)


def together(items: Sequence[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, some at a time: as many as are `TOGETHER`, and one where it is more."""
    some, total = [], 0
    for x in items:
        size = nbytes(x)
        if some and total + size > TOGETHER:
            yield some
            some, total = [], 0
        some.append(x)
        total += size
    if some:
        yield some


def _addresses(
    bases: Sequence[int], writer: int, reader: int, room: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the boxes and the two kinds of flags between two ranks."""
    flags = len(bases) * CHUNKS * room
    return (
        tuple([bases[reader] + (writer * CHUNKS + i) * room for i in range(CHUNKS)]),
        tuple([bases[reader] + flags + (2 * (writer * CHUNKS + i)) * APART for i in range(CHUNKS)]),
        tuple([bases[writer] + flags + (2 * (reader * CHUNKS + i) + 1) * APART for i in range(CHUNKS)]),
    )
