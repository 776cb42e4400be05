"""Messages between the ranks of a host through memory that all of them can read: who may write and read what when.

Each rank has a mailbox for every reader: a few chunks of memory, and two flags for each chunk. The writer fills a chunk
and raises its `filled` flag at the reader; the reader, whose stream waits for that, takes the bytes and raises the
`emptied` flag at the writer, who may then fill the chunk again. A message is as many chunks as it needs, so the memory
does not depend on it. Copies, flags and waits are asked for in the order of streams and carried out by the copy
engines: no SM and no host takes part.

Flags count the times that a chunk was used, in a circle. A chunk's two flags are raised in turn, so waiting for the one
number that comes next is enough.

Ranks ask for the chunks of a transfer level by level: the first of every message to write, the first of every message
to read, the second of each, and so on. What waits in one level depends on earlier ones alone, or on what is written in
the same; so there is no deadlock even where all streams share one queue (CUDA_DEVICE_MAX_CONNECTIONS=1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

CHUNKS = 3
"""In each mailbox: one is filled, one is read, and one is on its way to be emptied."""

APART = 64
"""Bytes from flag to flag."""

ALIGNED = 256
"""Each piece of a message begins at such an address of a chunk."""

CIRCLE = 1 << 15
"""Numbers that flags go through."""

Block = tuple[int, int]
"""Address and bytes of some memory."""


class Piece(NamedTuple):
    """Bytes of a block that lie in a chunk.

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


@lru_cache(maxsize=1024)
def chunks(sizes: tuple[int, ...], room: int) -> tuple[tuple[Piece, ...], ...]:
    """How blocks of these sizes, one after another, lie in chunks of so many bytes; the same for writer and reader."""
    found: list[tuple[Piece, ...]] = []
    chunk: list[Piece] = []
    place = 0
    for block, size in enumerate(sizes):
        offset = 0
        while offset < size:
            if place == room:
                found.append(tuple(chunk))
                chunk, place = [], 0
            nbytes = min(size - offset, room - place)
            chunk.append(Piece(block, offset, nbytes, place))
            offset += nbytes
            place = min(room, -(-(place + nbytes) // ALIGNED) * ALIGNED)
    return (*found, tuple(chunk)) if chunk else tuple(found)


def bytes_of(ranks: int, room: int) -> int:
    """What a rank needs for its mailboxes and flags, with chunks of so many bytes."""
    return ranks * CHUNKS * (room + 2 * APART)


@dataclass
class Way:
    """From one rank to another.

    Attributes:
        boxes: addresses of the chunks, at the writer.
        filled: addresses of their flags, at the reader.
        emptied: addresses of their flags, at the writer.
        stream: in whose order this rank's part is carried out.
        used: chunks that were asked for so far.
        done: transfers that were asked for so far.
    """

    boxes: tuple[int, ...]
    filled: tuple[int, ...]
    emptied: tuple[int, ...]
    stream: int
    used: int = 0
    done: int = 0

    def turn(self) -> tuple[int, int]:
        """Which chunk comes next, and how often it was used."""
        times, chunk = divmod(self.used, CHUNKS)
        self.used += 1
        return chunk, times


def mark(times: int) -> int:
    """What a flag says of the use with this number; never what it holds at first, 0."""
    return times % CIRCLE + 1


class Mailboxes:
    """This rank's part in all messages.

    Args:
        rank: of this process.
        bases: for each rank where its memory is, as this process sees it: `bytes_of(ranks, room)`, zeros at first.
        room: bytes of a chunk.
        numbers: address of a table of the numbers 0 to CIRCLE, 4 bytes each.
        progress: address of memory that the host reads: two numbers for each rank, the last transfer read from it and
            the last written to it that are over.
        streams: (to, from) for each rank: in whose order writing and reading is carried out.
        copy: (target, source, nbytes, stream), as in `driver`.
        wait: (address, number, stream), likewise.
    """

    def __init__(
        self,
        rank: int,
        bases: Sequence[int],
        room: int,
        numbers: int,
        progress: int,
        streams: Sequence[tuple[int, int]],
        copy: Callable[[int, int, int, int], None],
        wait: Callable[[int, int, int], None],
    ) -> None:
        self._room, self._numbers, self._progress = room, numbers, progress
        self._copy, self._wait = copy, wait
        ranks = range(len(bases))
        self.to = [Way(*_addresses(bases, rank, peer, room), streams[peer][0]) for peer in ranks]
        self.from_ = [Way(*_addresses(bases, peer, rank, room), streams[peer][1]) for peer in ranks]

    def transfer(self, sends: dict[int, list[Block]], receives: dict[int, list[Block]]) -> None:
        """Ask for one message to, and one from, each of some ranks.

        Args:
            sends: by the reader's rank the blocks of its message.
            receives: by the writer's rank the blocks that take its message, of the same sizes.
        """
        outgoing = [(self.to[peer], blocks, self._chunks(blocks)) for peer, blocks in sends.items()]
        incoming = [(self.from_[peer], blocks, self._chunks(blocks)) for peer, blocks in receives.items()]
        for level in range(max([len(found) for *_, found in outgoing + incoming], default=0)):
            for way, blocks, found in outgoing:
                if level < len(found):
                    self._fill(way, blocks, found[level])
            for way, blocks, found in incoming:
                if level < len(found):
                    self._empty(way, blocks, found[level])
        for which, ways, peers in ((1, self.to, sends), (0, self.from_, receives)):
            for peer in peers:
                ways[peer].done += 1
                self._raise(self._progress + 4 * (2 * peer + which), mark(ways[peer].done), ways[peer].stream)

    def _chunks(self, blocks: list[Block]) -> tuple[tuple[Piece, ...], ...]:
        return chunks(tuple([nbytes for _, nbytes in blocks]), self._room)

    def _fill(self, way: Way, blocks: list[Block], chunk: tuple[Piece, ...]) -> None:
        number, times = way.turn()
        if times:
            self._wait(way.emptied[number], mark(times - 1), way.stream)
        for piece in chunk:
            source = blocks[piece.block][0] + piece.offset
            self._copy(way.boxes[number] + piece.place, source, piece.nbytes, way.stream)
        self._raise(way.filled[number], mark(times), way.stream)

    def _empty(self, way: Way, blocks: list[Block], chunk: tuple[Piece, ...]) -> None:
        number, times = way.turn()
        self._wait(way.filled[number], mark(times), way.stream)
        for piece in chunk:
            target = blocks[piece.block][0] + piece.offset
            self._copy(target, way.boxes[number] + piece.place, piece.nbytes, way.stream)
        self._raise(way.emptied[number], mark(times), way.stream)

    def _raise(self, flag: int, number: int, stream: int) -> None:
        self._copy(flag, self._numbers + 4 * number, 4, stream)


def _addresses(
    bases: Sequence[int], writer: int, reader: int, room: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the boxes and the two kinds of flags between two ranks."""
    flags = len(bases) * CHUNKS * room
    return (
        tuple([bases[writer] + (reader * CHUNKS + i) * room for i in range(CHUNKS)]),
        tuple([bases[reader] + flags + (2 * (writer * CHUNKS + i)) * APART for i in range(CHUNKS)]),
        tuple([bases[writer] + flags + (2 * (reader * CHUNKS + i) + 1) * APART for i in range(CHUNKS)]),
    )
