"""Messages through mailboxes arrive whole and in order, whatever their sizes: copy engines played by threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.parallel.transport.driver import EQUAL, WRITE, Driver, Rectangle
from ringflash.parallel.transport.mailboxes import (
    CHUNKS,
    CIRCLE,
    MESSAGES,
    Mailboxes,
    bytes_of,
    chunks,
    flag_of,
    number_of,
    room_of,
)
from ringflash.parallel.transport.symmetric_memory import blocks

PATIENCE = 5.0
ALIGNED = 256


@given(st.lists(st.integers(0, 5000), max_size=6), st.integers(1, 1300))
def test_chunks_hold_every_byte_of_a_message_once_and_in_order(sizes, room):
    found = [piece for chunk in chunks(tuple(sizes), room) for piece in chunk]
    bytes_in_blocks = [(p.block, p.offset + i) for p in found for i in range(p.nbytes)]
    assert bytes_in_blocks == [(block, i) for block, size in enumerate(sizes) for i in range(size)]
    bytes_in_chunks = [
        (number, p.place + i)
        for number, chunk in enumerate(chunks(tuple(sizes), room))
        for p in chunk
        for i in range(p.nbytes)
    ]
    assert bytes_in_chunks == [divmod(i, room) for i in range(sum(sizes))]


class Host:
    """Memory with addresses, and streams that are carried out by threads; one thread a rank plays a shared queue."""

    def __init__(self) -> None:
        self.memory = bytearray(b"\0" * ALIGNED)  # nothing is at address 0
        self.queues: dict[int, deque] = {}
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def allocate(self, nbytes: int) -> int:
        address = len(self.memory)
        self.memory += b"\0" * (-(-nbytes // ALIGNED) * ALIGNED)
        return address

    def stream(self) -> int:
        number = len(self.queues)
        self.queues[number] = deque()
        thread = threading.Thread(target=self._work, args=(self.queues[number],), daemon=True)
        self.threads.append(thread)
        thread.start()
        return number

    def _work(self, queue: deque) -> None:
        while not self.over.is_set():
            if queue and queue[0]():
                queue.popleft()
            else:
                time.sleep(1e-5)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        def run() -> bool:
            self.memory[target : target + nbytes] = self.memory[source : source + nbytes]
            return True

        self.queues[stream].append(run)

    def copy_rows(self, x: Rectangle, stream: int) -> None:
        for row in range(x.rows):
            self.copy(x.target + row * x.target_pitch, x.source + row * x.source_pitch, x.width, stream)

    def operate(self, stream: int, operations: list[int]) -> None:
        for first in range(0, len(operations), 4):
            self.queues[stream].append(partial(self._operate, *operations[first : first + 4]))

    def _operate(self, kind: int, address: int, number: int, how: int) -> bool:
        if kind == WRITE:
            self.write(address, number.to_bytes(4, "little"))
            return True
        there = self.number(address)
        return there == number if how == EQUAL else (there - number) % 2**32 < 2**31

    @property
    def driver(self) -> Driver:
        """What is asked of its streams."""
        return Driver(self.copy, self.copy_rows, self.operate)

    def number(self, address: int) -> int:
        return int.from_bytes(self.memory[address : address + 4], "little")

    def write(self, address: int, text: bytes) -> None:
        self.memory[address : address + len(text)] = text

    def is_done(self) -> bool:
        return not any(self.queues.values())

    def finish(self) -> None:
        """Carry out all that was asked for."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_done() and time.monotonic() < deadline:
            time.sleep(0.001)
        done = self.is_done()
        self.over.set()
        for thread in self.threads:
            thread.join()
        assert done


def _ranks(host: Host, ranks: int, room: int, shared_queue: bool) -> list[Mailboxes]:
    bases = [host.allocate(bytes_of(ranks, room)) for _ in range(ranks)]
    found = []
    for rank in range(ranks):
        out = host.stream()
        inward = out if shared_queue else host.stream()
        progress = host.allocate(16 * ranks)
        found.append(Mailboxes(rank, bases, room, progress, out, inward, host.driver))
        found[-1].progress_at = progress
    return found


@st.composite
def transfers(draw):
    """Ranks, and for some transfers the sizes of the blocks from each rank to each other."""
    ranks = draw(st.integers(2, 4))
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=3)
    return ranks, draw(st.lists(st.dictionaries(st.sampled_from(pairs), sizes, max_size=len(pairs)), max_size=6))


@settings(max_examples=30, deadline=None)
@given(problem=transfers(), room=st.integers(1, 3).map(lambda x: x * ALIGNED), shared_queue=st.booleans())
def test_messages_of_any_sizes_arrive_in_order_without_deadlock(problem, room, shared_queue):
    ranks, all_transfers = problem
    host = Host()
    prepared, expected = [], []
    for number, found in enumerate(all_transfers):
        sends, receives = ([{} for _ in range(ranks)] for _ in range(2))
        for (writer, reader), sizes in found.items():
            for block, size in enumerate(sizes):
                text = bytes((number * 7 + writer * 31 + reader * 17 + block * 5 + i) % 251 for i in range(size))
                source, target = host.allocate(size), host.allocate(size)
                host.write(source, text)
                sends[writer].setdefault(reader, []).append((source, size))
                receives[reader].setdefault(writer, []).append((target, size))
                expected.append((target, text))
        prepared.append((sends, receives))
    boxes = _ranks(host, ranks, room, shared_queue)
    over = {}
    for number, (sends, receives) in enumerate(prepared):
        for rank in range(ranks):
            ends = boxes[rank].transfer(sends[rank], receives[rank])
            assert len(ends) == len(sends[rank]) + len(receives[rank])
            over |= {boxes[rank].progress_at + 4 * place: number for place, number in ends}
    host.finish()
    for target, text in expected:
        assert bytes(host.memory[target : target + len(text)]) == text
    assert all(host.number(address) == number for address, number in over.items())


def test_flags_count_in_a_circle():
    """As often as a chunk is used: what is waited for has not been reached the time before."""
    assert [flag_of(i) for i in (0, 1, CIRCLE - 2, CIRCLE - 1, CIRCLE)] == [1, 2, CIRCLE - 1, 0, 1]
    assert len({number_of(i) for i in range(MESSAGES)}) == MESSAGES
    assert number_of(MESSAGES) == number_of(0) != 0


@settings(max_examples=20, deadline=None)
@given(problem=transfers(), stops=st.integers(0, 3), shared_queue=st.booleans())
def test_streams_of_ranks_that_give_up_come_to_their_end(problem, stops, shared_queue):
    """A rank stops asking, for good, in the midst of the transfers."""
    ranks, all_transfers = problem
    host = Host()
    boxes = _ranks(host, ranks, ALIGNED, shared_queue)
    for number, found in enumerate(all_transfers):
        for rank in range(ranks):
            if rank == 0 and number >= stops:
                continue
            sends, receives = ({}, {})
            for (writer, reader), sizes in found.items():
                blocks = [(host.allocate(size), size) for size in sizes]
                if writer == rank:
                    sends[reader] = blocks
                if reader == rank:
                    receives[writer] = blocks
            boxes[rank].transfer(sends, receives)
    other = host.stream()
    for rank in range(ranks):
        host.operate(other, [x for address, flag in boxes[rank].awaited() for x in (WRITE, address, flag, 0)])
    deadline = time.monotonic() + PATIENCE
    while not host.is_done() and time.monotonic() < deadline:
        time.sleep(0.001)
        for rank in range(ranks):
            host.operate(other, [x for address, flag in boxes[rank].awaited() for x in (WRITE, address, flag, 0)])
            time.sleep(0.001)
    host.finish()


@pytest.mark.parametrize("ranks", range(2, 17))
def test_chunks_begin_where_numbers_of_any_size_can_be_read(ranks):
    assert room_of(ranks) % ALIGNED == 0
    assert bytes_of(ranks, room_of(ranks)) % 4 == 0  # where flags of shelves begin


@pytest.mark.parametrize("ranks", [2, 8])
def test_addresses_of_two_ranks_mailboxes_do_not_meet(ranks):
    bases, room = [ALIGNED * 10_000 * rank for rank in range(ranks)], ALIGNED
    boxes = [Mailboxes(rank, bases, room, 0, 0, 0, Driver(None, None, None)) for rank in range(ranks)]
    used = set()
    for rank in range(ranks):
        for peer in range(ranks):
            mine, theirs = boxes[rank].to[peer], boxes[peer].from_[rank]
            assert all(0 <= x - bases[peer] < bytes_of(ranks, room) for x in mine.boxes)  # where the reader reads them
            assert (mine.boxes, mine.filled, mine.emptied) == (theirs.boxes, theirs.filled, theirs.emptied)
            for address, nbytes in [(x, room) for x in mine.boxes] + [(x, 4) for x in mine.filled + mine.emptied]:
                span = range(address, address + nbytes)
                assert used.isdisjoint(span)
                used.update(span)
            assert len(mine.boxes) == CHUNKS
    assert max(used) < bases[-1] + bytes_of(ranks, room)


def test_blocks_never_go_on_from_one_allocation_to_another():
    both = torch.empty(20)
    first, second, other = both[:7], both[7:19], torch.empty(3)
    bytes_of_7, bytes_of_12 = 28, 48
    address = first.data_ptr()
    assert blocks([(1, first), (2, other), (1, second)]) == {
        1: [(address, bytes_of_7 + bytes_of_12)],
        2: [(other.data_ptr(), 12)],
    }
    assert blocks([(1, second), (1, first)])[1] == [(address + bytes_of_7, bytes_of_12), (address, bytes_of_7)]
    for _ in range(50):  # small allocations of a CPU often lie one behind another
        x, y = (torch.empty(16) for _ in range(2))
        assert len(blocks([(0, x), (0, y)])[0]) == 2
    page = np.zeros(64, dtype=np.uint8)  # so that it is certain
    x, y = torch.from_numpy(page[:32]), torch.from_numpy(page[32:])
    assert x.data_ptr() + 32 == y.data_ptr()
    assert blocks([(0, x), (0, y)])[0] == [(x.data_ptr(), 32), (y.data_ptr(), 32)]
