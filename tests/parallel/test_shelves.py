"""What ranks lay out for all others is what those take, call by call: copy engines played by threads."""

from __future__ import annotations

import ctypes
import random
import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mailboxes import PATIENCE, Host

from ringflash.parallel.execution.rows import memory_for, row_by_row
from ringflash.parallel.planning.pulls import pulls
from ringflash.parallel.positions.segments import count, normalize
from ringflash.parallel.transport.driver import WRITE, Rectangle, Requests
from ringflash.parallel.transport.shelves import (
    Shelves,
    bytes_to_publish,
    copies,
    flag_bytes,
    groups,
    kinds_of,
    laid_out,
    lies_of,
)

BYTES = 64


def _text(rank, call):
    return bytes((rank * 31 + call * 7 + i) % 251 for i in range(BYTES))


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(2, 4), calls=st.integers(1, 12), seed=st.integers(0, 999), shared_queue=st.booleans())
def test_ranks_take_what_was_laid_out_in_the_same_call_whoever_takes_what_and_when(ranks, calls, seed, shared_queue):
    host, pace = Host(), random.Random(seed)
    flags = [host.allocate(flag_bytes(ranks)) for _ in range(ranks)]
    shelves = [host.allocate(BYTES) for _ in range(ranks)]
    main = [host.stream() for _ in range(ranks)]
    streams = [main[rank] if shared_queue else host.stream() for rank in range(ranks)]
    takers = [Requests(host.driver, stream) for stream in streams]
    parts = [Shelves(rank, flags, takers[rank], host.driver) for rank in range(ranks)]
    expected = []

    def make_call(rank, call):
        laid_out = host.allocate(BYTES)
        host.write(laid_out, _text(rank, call))
        parts[rank].begin(main[rank])
        host.copy_rows(Rectangle(shelves[rank], 8, laid_out, 8, 8, BYTES // 8), main[rank])
        parts[rank].end(main[rank])
        for owner in range(ranks):
            for _ in range(0 if owner == rank else pace.choice((0, 1, 2))):
                first = pace.randrange(BYTES)
                target = host.allocate(BYTES - first)
                parts[rank].expect(owner)
                takers[rank].copies([(target, shelves[owner] + first, BYTES - first)])
                expected.append((target, _text(owner, call)[first:]))
        parts[rank].release()

    ahead = [0] * ranks  # hosts run ahead of each other as they like
    while min(ahead) < calls:
        rank = pace.choice([rank for rank in range(ranks) if ahead[rank] < calls])
        make_call(rank, ahead[rank])
        ahead[rank] += 1
    host.finish()
    for target, text in expected:
        assert bytes(host.memory[target : target + len(text)]) == text


@settings(max_examples=15, deadline=None)
@given(ranks=st.integers(2, 4), calls=st.integers(1, 5), stops=st.integers(0, 4), shared_queue=st.booleans())
def test_streams_of_ranks_that_give_up_come_to_their_end(ranks, calls, stops, shared_queue):
    """A rank stops coming to calls, for good; others have gone ahead with some."""
    host = Host()
    flags = [host.allocate(flag_bytes(ranks)) for _ in range(ranks)]
    main = [host.stream() for _ in range(ranks)]
    takers = [Requests(host.driver, main[rank] if shared_queue else host.stream()) for rank in range(ranks)]
    parts = [Shelves(rank, flags, takers[rank], host.driver) for rank in range(ranks)]
    for call in range(calls):
        for rank in range(int(call >= stops), ranks):
            parts[rank].begin(main[rank])
            parts[rank].end(main[rank])
            for owner in range(ranks):
                if owner != rank:
                    parts[rank].expect(owner)
            parts[rank].release()
    rescue, give_up = host.stream(), time.monotonic() + PATIENCE
    while True:  # others may still write smaller numbers
        for part in parts:
            host.operate(rescue, [x for address, number in part.awaited() for x in (WRITE, address, number, 0)])
        time.sleep(0.002)
        if host.is_done() or time.monotonic() > give_up:
            break
    host.finish()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), length=st.integers(1, 60), with_visible=st.booleans())
def test_copies_bring_the_rows_that_a_stage_reads_from_wherever_they_lie(data, ranks, length, with_visible):
    owner_of = data.draw(st.lists(st.integers(0, ranks - 1), min_size=length, max_size=length))
    shares = [(rank, normalize((i, i + 1) for i in range(length) if owner_of[i] == rank)) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(length)
    whole = [torch.randn(length, 2, 3, generator=generator), torch.randn(length, 2, 5, generator=generator).bfloat16()]
    whole += [torch.randint(2, (length,), dtype=torch.uint8, generator=generator)] if with_visible else []
    own = [[x[[i for i in range(length) if owner_of[i] == rank]] for x in whole] for rank in range(ranks)]
    shelves = [torch.zeros(max(map(bytes_to_publish, own)), dtype=torch.uint8) for _ in range(ranks)]
    wanted = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    for rank, (rows, shelf) in enumerate(zip(own, shelves, strict=True)):
        mine = [wanted[i] for i in range(length) if owner_of[i] == rank]
        given = normalize((i, i + 1) for i, x in enumerate(mine) if x)
        lies = lies_of(rows, given) if given else []
        for x in laid_out(lies, [x.data_ptr() for x in rows], shelf.data_ptr()):
            for row in range(x.rows):
                ctypes.memmove(x.target + row * x.target_pitch, x.source + row * x.source_pitch, x.width)
    coming = normalize((i, i + 1) for i in range(length) if wanted[i])
    targets = row_by_row(memory_for(whole, count(coming)), whole, count(coming))
    found, kinds = pulls(shares, coming), kinds_of(whole)
    assert all(pull.keys == len(own[pull.owner][0]) for pull in found)
    for group, target, owner, source, nbytes in copies(found, kinds):
        first = targets[groups(kinds)[group].members[0]].data_ptr()
        ctypes.memmove(first + target, shelves[owner].data_ptr() + source, nbytes)
    for x, target in zip(whole, targets, strict=True):
        assert torch.equal(target, x[torch.tensor(wanted)])


@given(
    kinds=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16])), min_size=1),
    rows=st.integers(0, 9),
)
def test_rows_that_lie_beside_each_other_share_no_memory_and_begin_where_kernels_read_them(kinds, rows):
    like = [torch.empty(3, width, dtype=dtype) for width, dtype in kinds]
    memory = memory_for(like, rows)
    found = row_by_row(memory, like, rows)
    for index, x in enumerate(found):
        x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32).fill_(index)
    for index, x in enumerate(found):
        assert (x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32) == index).all()
        assert (x.shape, x.dtype) == ((rows, *like[index].shape[1:]), like[index].dtype)
        if like[index][0].nbytes % 16 == 0:
            assert x.stride(0) * x.itemsize % 16 == x.storage_offset() * x.itemsize % 16 == 0
