"""What the ranks of a host say, through memory that they share; and what those of several say by gloo."""

from __future__ import annotations

import os
import random
import signal
import time
import zlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from ringflash.parallel.agreement import channel, shared_rounds
from ringflash.parallel.agreement.channel import Channel
from ringflash.parallel.agreement.shared_rounds import SLOTS, VALUES, SharedRounds

LEFT_OPEN = 5
SECONDS = timedelta(seconds=20)


def _line(name):
    """Through the store of the pool's group; each test has a name of its own."""
    return Channel(dist.get_rank(), dist.get_world_size(), zlib.crc32(name.encode())).line


def _values(rank, number):
    generator = random.Random(1000 * number + rank)
    return generator.randint(1, 5), *(generator.getrandbits(n) for n in (62, 40, 1))


def _hear_next(line, rank):
    while (heard := line.hear(rank)) is None:
        line.wait([rank])
    return heard


def _said_at_any_pace(seed, count):
    """What each rank heard of each other one; some is heard at once, some later, and every rank has its own pace."""
    line, pace = _line(f"pace {seed}"), random.Random(seed + dist.get_rank())
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    heard = {rank: [] for rank in others}
    for number in range(count):
        line.say(_values(dist.get_rank(), number))
        if pace.random() < 0.05:
            time.sleep(pace.random() / 100)
        for rank in others:
            while len(heard[rank]) <= number and (number - len(heard[rank]) >= LEFT_OPEN or pace.random() < 0.5):
                heard[rank].append(_hear_next(line, rank))
    for rank in others:
        heard[rank] += [_hear_next(line, rank) for _ in range(count - len(heard[rank]))]
    return type(line), heard


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_hears_all_that_each_other_one_says_in_order(pool, ranks):
    count = 20 * SLOTS
    said = {rank: [_values(rank, number) for number in range(count)] for rank in range(ranks)}
    for rank, (kind, heard) in enumerate(pool(ranks).run(_said_at_any_pace, 0, count)):
        assert kind is SharedRounds
        assert heard == {other: said[other] for other in range(ranks) if other != rank}


def _heard_while_others_are_away():
    """Rank 0 hears rank 1, which says five things, while rank 2 has said nothing and does not listen."""
    line = _line("away")
    if dist.get_rank() == 1:
        for number in range(5):
            line.say(_values(1, number))
    heard = [_hear_next(line, 1) for _ in range(5)] if dist.get_rank() == 0 else None
    dist.barrier()
    return heard


def test_who_shares_memory_hears_a_rank_whatever_a_third_one_is_at(pool):
    assert pool(3).run(_heard_while_others_are_away)[0] == [_values(1, number) for number in range(5)]


def _room():
    line, rank = _line("room"), dist.get_rank()
    found = [line.room()]
    for number in range(SLOTS if rank == 0 else 0):
        line.say(_values(0, number))
    found.append(line.room())
    dist.barrier()
    heard = [] if rank == 0 else [_hear_next(line, 0) for _ in range(SLOTS if rank == 1 else 3)]
    dist.barrier()
    return [*found, line.room()], heard


def test_a_rank_knows_how_much_more_it_may_say_before_the_last_one_has_heard(pool):
    (room, _), *others = pool(3).run(_room)
    assert room[:2] == [SLOTS, 0]
    assert 0 < room[2] <= 3
    for _, heard in others:
        assert heard == [_values(0, number) for number in range(len(heard))]


def _no_page(which):
    with pytest.MonkeyPatch.context() as patch:
        if which == "no memory" and dist.get_rank() == 0:
            patch.setattr(shared_rounds, "FOLDER", Path("/nowhere"))
        if which == "not to be opened" and dist.get_rank() == 1:
            patch.setattr(channel, "SharedRounds", _refused)
        if which in ("another host", "another device"):
            patch.setattr(channel, "host", lambda: f"host {dist.get_rank() % 2}")
        made = Channel(dist.get_rank(), dist.get_world_size(), zlib.crc32(which.encode()))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made.line.say((1, rank, 7, 9))
    made.line.say((2, rank, 7, 9)) if rank == 1 else None  # the others only wait for it
    heard = [_hear_next(made.line, other) for other in range(ranks) if other != rank]
    return made.by_page, heard, [_hear_next(made.line, 1)] if rank != 1 else made.line.wait([0])


def _refused(*_):
    raise PermissionError


@pytest.mark.parametrize("which", ["no memory", "not to be opened", "another host"])
def test_ranks_that_cannot_all_share_memory_use_gloo(pool, which):
    for rank, (by_page, heard, more) in enumerate(pool(3).run(_no_page, which)):
        assert not by_page
        assert heard == [(1, other, 7, 9) for other in range(3) if other != rank]
        assert more == (None if rank == 1 else [(2, 1, 7, 9)])


def _by_gloo_where_tensors_are_made_elsewhere():
    with torch.device("meta"):
        return _no_page("another device")


def test_what_ranks_say_by_gloo_is_on_the_cpu_whatever_torchs_default_device_is(pool):
    for rank, (by_page, heard, _) in enumerate(pool(3).run(_by_gloo_where_tensors_are_made_elsewhere)):
        assert not by_page
        assert heard == [(1, other, 7, 9) for other in range(3) if other != rank]


def test_no_file_is_left_behind(pool):
    pool(2).run(_said_at_any_pace, 1, 3)
    assert not list(shared_rounds.FOLDER.glob("ringflash-*"))


def _until_one_ends(deed):
    line, others = _line("ends"), [rank for rank in range(3) if rank != dist.get_rank()]
    assert isinstance(line, SharedRounds)
    line.say((1,) * VALUES)
    for rank in others:
        _hear_next(line, rank)
    if dist.get_rank() == 1:
        if deed == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        del line
        return None
    begin = time.monotonic()
    line.say((2,) * VALUES)
    with pytest.raises(RuntimeError, match="rank 1 has ended or left the group"):
        _hear_next(line, 1)
    return time.monotonic() - begin


@pytest.mark.parametrize("deed", ["killed", "leaves"])
def test_a_rank_that_ends_or_leaves_is_named_at_once(deed):
    with Pool(3) as own:
        outcomes = own.outcomes(_until_one_ends, deed)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].details
        assert outcomes[rank].value < 5


def _left_before_the_others_look():
    line = _line("last")
    line.say((1 + dist.get_rank(),) * VALUES)
    if dist.get_rank() == 1:
        return _hear_next(line, 0)
    time.sleep(0.5)
    return _hear_next(line, 1)


def test_the_last_word_of_a_rank_that_left_counts(pool):
    assert pool(2).run(_left_before_the_others_look) == [(2,) * VALUES, (1,) * VALUES]
