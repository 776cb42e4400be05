"""Rounds of the ranks of a host, through memory that they share."""

from __future__ import annotations

import os
import random
import signal
import time
import zlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from pool import Pool

from ringflash.parallel.agreement import channel, shared_rounds
from ringflash.parallel.agreement.channel import Channel
from ringflash.parallel.agreement.shared_rounds import SLOTS, SharedRounds

LEFT_OPEN = 5
SECONDS = timedelta(seconds=20)


def _channel(name):
    """Through the store of the pool's group; each test has a name of its own."""
    return Channel(dist.get_rank(), dist.get_world_size(), zlib.crc32(name.encode()))


def _values(rank, number):
    generator = random.Random(1000 * number + rank)
    return generator.getrandbits(62), -generator.getrandbits(62), *(generator.getrandbits(n) for n in (1, 1, 40))


def _rounds_at_any_pace(seed, rounds):
    """Some rounds are waited for at once, some later; every rank has its own pace."""
    made, pace, open_, found = _channel(f"pace {seed}"), random.Random(seed + dist.get_rank()), [], []
    for number in range(rounds):
        open_.append(made.maximum(_values(dist.get_rank(), number)))
        if pace.random() < 0.05:
            time.sleep(pace.random() / 100)
        while open_ and (len(open_) > LEFT_OPEN or pace.random() < 0.5 or open_[0].is_completed()):
            found.append(tuple(open_.pop(0).wait()))
    found += [tuple(x.wait()) for x in open_]
    return type(made._page), found


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_round_gives_every_rank_the_greatest_of_all_ranks_values(pool, ranks):
    rounds = 20 * SLOTS
    expected = [tuple(map(max, *(_values(rank, number) for rank in range(ranks)))) for number in range(rounds)]
    for kind, found in pool(ranks).run(_rounds_at_any_pace, 0, rounds):
        assert kind is SharedRounds
        assert found == expected


def _no_page(which):
    with pytest.MonkeyPatch.context() as patch:
        if which == "no memory" and dist.get_rank() == 0:
            patch.setattr(shared_rounds, "FOLDER", Path("/nowhere"))
        if which == "not to be opened" and dist.get_rank() == 1:
            patch.setattr(channel, "SharedRounds", _refused)
        if which == "another host":
            patch.setattr(channel, "host", lambda: f"host {dist.get_rank() % 2}")
        made = _channel(which)
    return made._page, made.maximum((dist.get_rank(), -dist.get_rank(), 0, 7, 9)).wait()


def _refused(*_):
    raise PermissionError


@pytest.mark.parametrize("which", ["no memory", "not to be opened", "another host"])
def test_ranks_that_cannot_all_share_memory_use_gloo(pool, which):
    assert pool(3).run(_no_page, which) == [(None, [2, 0, 0, 7, 9])] * 3


def test_no_file_is_left_behind(pool):
    pool(2).run(_rounds_at_any_pace, 1, 3)
    assert not list(shared_rounds.FOLDER.glob("ringflash-*"))


def _until_one_ends(deed):
    made = _channel("ends")
    assert made._page is not None
    made.maximum((1, 1, 1, 1, 1)).wait()
    if dist.get_rank() == 1:
        if deed == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        del made
        return None
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 has ended or left the group"):
        made.maximum((2, 2, 2, 2, 2)).wait()
    return time.monotonic() - begin


@pytest.mark.parametrize("deed", ["killed", "leaves"])
def test_a_rank_that_ends_or_leaves_is_named_at_once(deed):
    with Pool(3) as own:
        outcomes = own.outcomes(_until_one_ends, deed)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].details
        assert outcomes[rank].value < 5


def _left_before_the_others_look():
    made = _channel("last")
    last = made.maximum((dist.get_rank(),) * 5)
    if dist.get_rank() == 1:
        last.wait()
        return None
    time.sleep(0.5)
    return last.wait()


def test_the_last_round_of_a_rank_that_left_counts(pool):
    assert pool(2).run(_left_before_the_others_look)[0] == [1] * 5
