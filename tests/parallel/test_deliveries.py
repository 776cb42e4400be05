"""Parts pushed to the ranks that add them up come whole, each row once, in an order that is always the same.

Copy engines are played by threads, see test_mailboxes.py; adding is played by copies in the order of a rank's stream.
"""

from __future__ import annotations

import random
from itertools import pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_mailboxes import ALIGNED, Host, _ranks

from ringflash.parallel.transport.deliveries import Coming, Leaving, PushedParts, levels

ROW = 8
"""Bytes of a row."""


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), max_size=6), st.integers(30, 100))
def test_levels_hold_every_row_once_and_of_each_message_in_order(messages, room):
    found = [portion for level in levels(tuple(messages), room) for portion in level]
    for message, (rows, row_bytes) in enumerate(messages):
        mine = [(x.first, x.rows) for x in found if x.message == message]
        assert [i for first, count in mine for i in range(first, first + count)] == list(range(rows))
        assert all(count * row_bytes <= room for _, count in mine)
    for level in levels(tuple(messages), room):
        assert [x.message for x in level] == sorted({x.message for x in level})


@st.composite
def stages(draw):
    """Ranks, and for some stages the rows of the parts from each rank to each other, and in how many runs they lie."""
    ranks = draw(st.integers(2, 4))
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    size = st.tuples(st.integers(1, 400), st.integers(1, 3))
    return ranks, draw(st.lists(st.dictionaries(st.sampled_from(pairs), size, max_size=len(pairs)), max_size=5))


def _text(stage, writer, reader, tensor, rows):
    return bytes((stage * 7 + writer * 31 + reader * 17 + tensor * 101 + i) % 251 for i in range(rows * ROW))


class Rank:
    """One rank's way through the stages: parts of a stage leave, and are added some stages later."""

    def __init__(self, host, boxes, rank, room, tensors, ahead):
        self.host, self.boxes, self.rank, self.room, self.tensors, self.ahead = host, boxes, rank, room, tensors, ahead
        self.pending, self.found = [], []
        self.fails = False
        self.main = boxes._out._stream if boxes._in._stream == boxes._out._stream else host.stream()
        self.like = [torch.empty(0, ROW, dtype=torch.uint8)] * tensors

    def settle(self, stage, parts):
        peers = {a for a, b in parts if b == self.rank} | {b for a, b in parts if a == self.rank}
        while len(self.pending) >= self.ahead or any(peers & pushed.peers for _, _, pushed in self.pending):
            self.collect()
        outgoing, incoming = [], []
        for (writer, reader), (rows, runs) in parts.items():
            for tensor in range(self.tensors):
                if writer == self.rank:
                    lies = self._lie(_text(stage, writer, reader, tensor, rows), runs)
                    outgoing.append(Leaving(reader, *lies, ROW))
                if reader == self.rank:
                    incoming.append(Coming(writer, rows, ROW))
        pushed = PushedParts(self.boxes, self.room, outgoing, incoming)
        pushed.push([x.address for x in outgoing])
        self.pending.append((stage, parts, pushed))

    def _lie(self, text, runs):
        """Text in runs that lie two rows apart: address of the first row and where they are."""
        rows = len(text) // ROW
        edges = [rows * i // runs for i in range(runs + 1)]
        found = tuple((first + 2 * i, last + 2 * i) for i, (first, last) in enumerate(pairwise(edges)))
        address = self.host.allocate((rows + 2 * runs) * ROW)
        for (first, _), (begin, end) in zip(found, pairwise(edges), strict=True):
            self.host.write(address + first * ROW, text[begin * ROW : end * ROW])
        return address, found

    def collect(self):
        stage, parts, pushed = self.pending.pop(0)
        senders = [(a, rows) for (a, b), (rows, _) in parts.items() if b == self.rank]

        def add(arrived):
            for which, tensor, first, count, address, rows in arrived:
                if self.fails:
                    raise RuntimeError("no memory")
                assert (rows().data_ptr(), rows().shape) == (address, (count, ROW))
                target = self.host.allocate(count * ROW)
                self.host.copy(target, address, count * ROW, self.main)
                self.found.append((stage, senders[which][0], tensor, first, count * ROW, target))

        failure = pushed.collect(add, self.host.tensor, self.like, self.main, lambda _: None)
        assert (failure is not None) == (self.fails and any(rows for _, rows in senders))


class Addresses(Host):
    """Memory that does not move, so that tensors can lie in it; its addresses are those of the process."""

    def __init__(self):
        super().__init__()
        self.memory = bytearray(64 << 20)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.base, self.used = self.tensor.data_ptr(), ALIGNED

    def allocate(self, nbytes):
        address = self.base + self.used
        self.used += -(-nbytes // ALIGNED) * ALIGNED
        assert self.used <= len(self.memory)
        return address

    def copy(self, target, source, nbytes, stream):
        super().copy(target - self.base, source - self.base, nbytes, stream)

    def number(self, address):
        return super().number(address - self.base)

    def write(self, address, text):
        super().write(address - self.base, text)


@settings(max_examples=25, deadline=None)
@given(
    problem=stages(),
    rows=st.integers(1, 40),
    tensors=st.integers(1, 2),
    ahead=st.integers(1, 3),
    shared_queue=st.booleans(),
    seed=st.integers(0, 999),
)
@example((2, [{(0, 1): (400, 1)}] * 3), 40, 1, 2, False, 0)
def test_parts_come_whole_and_without_deadlock(problem, rows, tensors, ahead, shared_queue, seed):
    ranks, all_parts = problem
    host, pace = Addresses(), random.Random(seed)
    boxes = _ranks(host, ranks, rows * ROW, shared_queue)
    found = [Rank(host, boxes[rank], rank, rows * ROW, tensors, ahead) for rank in range(ranks)]
    waiting = [list(enumerate(all_parts)) for _ in range(ranks)]
    while any(waiting):
        rank = pace.choice([rank for rank in range(ranks) if waiting[rank]])
        found[rank].settle(*waiting[rank].pop(0))
    for rank in pace.sample(found, ranks):
        while rank.pending:
            rank.collect()
    host.finish()
    for rank in found:
        for stage, parts in enumerate(all_parts):
            for (writer, reader), (count, _) in parts.items():
                for tensor in range(tensors if reader == rank.rank else 0):
                    mine = [x for x in rank.found if x[:3] == (stage, writer, tensor)]
                    assert [x[3] for x in mine] == sorted(x[3] for x in mine)
                    whole = b"".join(bytes(host.memory[x - host.base : x - host.base + n]) for *_, n, x in mine)
                    assert whole == _text(stage, writer, reader, tensor, count)


@settings(max_examples=15, deadline=None)
@given(problem=stages(), rows=st.integers(1, 40), shared_queue=st.booleans(), odd=st.integers(0, 3))
def test_a_rank_that_cannot_add_holds_up_nobody(problem, rows, shared_queue, odd):
    ranks, all_parts = problem
    host = Addresses()
    boxes = _ranks(host, ranks, rows * ROW, shared_queue)
    found = [Rank(host, boxes[rank], rank, rows * ROW, 2, 1) for rank in range(ranks)]
    found[odd % ranks].fails = True
    for stage, parts in enumerate(all_parts):
        for rank in found:
            rank.settle(stage, parts)
    for rank in found:
        while rank.pending:
            rank.collect()
    host.finish()
    assert not found[odd % ranks].found
