"""What ranks lay out for all others is what those take, call by call: copy engines played by threads."""

from __future__ import annotations

import ctypes
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mailboxes import Host

from ringflash.parallel.planning.pulls import pulls
from ringflash.parallel.positions.segments import count, normalize
from ringflash.parallel.transport.driver import Driver
from ringflash.parallel.transport.shelves import Shelves, bytes_to_publish, copies, flag_bytes, lay_out

BYTES = 64


def _text(rank, call):
    return bytes((rank * 31 + call * 7 + i) % 251 for i in range(BYTES))


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(2, 4), calls=st.integers(1, 12), seed=st.integers(0, 999), shared_queue=st.booleans())
def test_ranks_take_what_was_laid_out_in_the_same_call_whoever_takes_what_and_when(ranks, calls, seed, shared_queue):
    host, pace = Host(), random.Random(seed)
    driver = Driver(host.copy, host.wait, host.wait_from, host.raise_flag)
    flags = [host.allocate(flag_bytes(ranks)) for _ in range(ranks)]
    shelves = [host.allocate(BYTES) for _ in range(ranks)]
    main = [host.stream() for _ in range(ranks)]
    streams = [main[rank] if shared_queue else host.stream() for rank in range(ranks)]
    parts = [Shelves(rank, flags, streams[rank], driver) for rank in range(ranks)]
    expected = []

    def make_call(rank, call):
        laid_out = host.allocate(BYTES)
        host.write(laid_out, _text(rank, call))
        parts[rank].clear(main[rank])
        host.copy(shelves[rank], laid_out, BYTES, main[rank])
        parts[rank].publish(main[rank])
        for owner in range(ranks):
            for _ in range(0 if owner == rank else pace.choice((0, 1, 2))):
                first = pace.randrange(BYTES)
                target = host.allocate(BYTES - first)
                parts[rank].take(owner, [(target, shelves[owner] + first, BYTES - first)])
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


@settings(max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), length=st.integers(1, 60), with_visible=st.booleans())
def test_copies_bring_the_rows_that_a_stage_reads_from_wherever_they_lie(data, ranks, length, with_visible):
    owner_of = data.draw(st.lists(st.integers(0, ranks - 1), min_size=length, max_size=length))
    shares = [(rank, normalize((i, i + 1) for i in range(length) if owner_of[i] == rank)) for rank in range(ranks)]
    generator = torch.Generator().manual_seed(length)
    whole = [torch.randn(length, 2, 3, generator=generator), torch.randn(length, 2, 5, generator=generator).bfloat16()]
    whole += [torch.randint(2, (length,), dtype=torch.uint8, generator=generator)] if with_visible else []
    own = [[x[[i for i in range(length) if owner_of[i] == rank]] for x in whole] for rank in range(ranks)]
    room = max(map(bytes_to_publish, own))
    shelves = [torch.zeros(room, dtype=torch.uint8) for _ in range(ranks)]
    wanted = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    for rank, (rows, shelf) in enumerate(zip(own, shelves, strict=True)):
        mine = [wanted[i] for i in range(length) if owner_of[i] == rank]
        lay_out(rows, shelf, normalize((i, i + 1) for i, x in enumerate(mine) if x))
    coming = normalize((i, i + 1) for i in range(length) if wanted[i])
    targets = [x.new_zeros(count(coming), *x.shape[1:]) for x in whole]
    for pull in pulls(shares, coming):
        assert pull.keys == len(own[pull.owner][0])
        for target, source, nbytes in copies(pull, shelves[pull.owner].data_ptr(), targets):
            ctypes.memmove(target, source, nbytes)
    for x, target in zip(whole, targets, strict=True):
        assert torch.equal(target, x[torch.tensor(wanted)])
