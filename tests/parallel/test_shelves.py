"""What ranks lay out for all others is what those take, call by call: copy engines played by threads."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st
from test_mailboxes import PATIENCE, Host

from ringflash.parallel.transport.driver import Driver
from ringflash.parallel.transport.shelves import Shelves, flag_bytes

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
    streams = [[main[rank] if shared_queue else host.stream() for _ in range(ranks)] for rank in range(ranks)]
    parts = [Shelves(rank, flags, streams[rank], driver) for rank in range(ranks)]
    expected = []

    def make_call(rank, call):
        laid_out = host.allocate(BYTES)
        host.write(laid_out, _text(rank, call))
        parts[rank].clear(main[rank])
        host.copy([(shelves[rank], laid_out, BYTES)], main[rank])
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
    deadline = time.monotonic() + PATIENCE
    while not host.is_done() and time.monotonic() < deadline:
        time.sleep(0.001)
    done = host.is_done()
    host.over.set()
    for thread in host.threads:
        thread.join()
    assert done
    for target, text in expected:
        assert bytes(host.memory[target : target + len(text)]) == text
