"""Ranks at any pace, of which some refuse calls: whatever comes first, calls meet the calls that they belong to.

Ranks are processes. A GPU that is not there carries out a call of its rank once all ranks have asked for it, as one
does whose keys, gradients or room in a mailbox come from others; hosts wait for it as for `Tensor.item`.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pool

from ringflash import ArgumentError, RankMismatchError
from ringflash.kernels.torch_private import default_store
from ringflash.parallel.agreement import channel, rounds
from ringflash.parallel.agreement.rounds import MOST_AHEAD, Agreement
from ringflash.parallel.agreement.shared_rounds import SLOTS

GPU = torch.device("cuda", 0)
STUCK = 8.0
"""Seconds after which a host has waited too long for its GPU."""


class Rank:
    """One rank's host and its GPU.

    Args:
        name: of the test, the same on all ranks.
    """

    def __init__(self, name: str) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.agreement = Agreement(dist.group.WORLD)
        self._store = dist.PrefixStore(name, default_store())
        self._asked = 0

    def call(self, digest: int, **settings: object) -> None:
        """Agree on a call and ask the GPU for it."""
        self.agreement.check(digest, lambda: {"call": digest}, GPU, **settings)
        self._asked += 1
        self._store.set(f"asked/{self.rank}", str(self._asked))

    def refuse(self, digest: int | None) -> None:
        """Refuse a call before any communication."""
        self.agreement.refuse(ArgumentError(f"no call {digest}"), digest)

    def item(self) -> None:
        """Wait for the GPU."""
        self.see_asked(self._asked, range(self.ranks))

    def see_asked(self, calls: int, ranks: Iterable[int]) -> None:
        """Wait until other ranks have asked their GPUs for so many calls."""
        begin = time.monotonic()
        for rank in ranks:
            while int(self._store.add(f"asked/{rank}", 0)) < calls:
                assert time.monotonic() - begin < STUCK, f"rank {self.rank} waits for what rank {rank} never asks for"
                time.sleep(0.001)

    def tell(self, what: str) -> None:
        """Let other ranks go on that `hear` of it."""
        self._store.set(what, "")

    def hear(self, what: str) -> None:
        """Wait for `tell`."""
        self._store.wait([what])


def _one_tries_alone(name: str, late: bool) -> None:
    at = Rank(name)
    for _ in range(2):
        at.call(3)
        at.call(2)
    for step in range(4):
        if step == 1 and at.rank == 0:
            at.see_asked(8 if late else 0, range(1, at.ranks))
            at.refuse(77)
            at.tell("refused")
        elif step == 1 and not late:
            at.hear("refused")
        at.call(3)
        at.call(2)
        at.item()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_call_that_one_rank_tries_alone_disturbs_nobody_who_has_gone_ahead(pool, ranks: int, late: bool) -> None:
    pool(ranks).run(_one_tries_alone, uuid.uuid4().hex, late, timeout=40)


def _at_any_pace(name: str, seed: int, steps: int, may_wait: bool) -> None:
    """All ranks make the same calls; each tries others alone, waits for its GPU and sleeps where it likes to."""
    at = Rank(name)
    common, own = random.Random(seed), random.Random(100 * seed + at.rank)
    for _ in range(steps):
        for _ in range(own.choice([0, 0, 0, 0, 1, 3]) if at.rank else 0):
            at.refuse(1000 + own.randrange(5))
        time.sleep(own.choice([0, 0, 0, 0.002, 0.02]))
        at.call(common.randrange(2, 6), waits=may_wait and own.random() < 0.3)
        if own.random() < 0.3:
            at.item()
    at.item()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_calls_meet_at_any_pace_whoever_waits_and_whatever_others_try_alone(pool, ranks: int, seed: int) -> None:
    pool(ranks).run(_at_any_pace, uuid.uuid4().hex, seed, 60, True, timeout=60)


@contextmanager
def _without_a_page() -> Iterator[None]:
    with mock.patch.object(channel, "create", side_effect=OSError):
        yield


def _at_any_pace_by_gloo(*arguments: object) -> None:
    with _without_a_page():
        _at_any_pace(*arguments)


def test_calls_meet_at_any_pace_by_gloo(pool) -> None:
    for seed in range(2):
        pool(3).run(_at_any_pace_by_gloo, uuid.uuid4().hex, seed, 60, False, timeout=60)


def _many_tried_alone(name: str) -> None:
    at = Rank(name)
    for step in range(4):
        if at.rank == 0 and step:
            for _ in range(3 * SLOTS):
                at.refuse(77)
        at.call(2)
        at.item()


def test_calls_meet_behind_more_refused_ones_than_others_can_read(pool) -> None:
    pool(2).run(_many_tried_alone, uuid.uuid4().hex, timeout=40)


def _raised_in(attend: Callable[[], None]) -> str:
    with pytest.raises(RankMismatchError) as raised:
        attend()
    return str(raised.value)


def _one_fails(name: str, late: bool, waits: bool) -> tuple[str, int, str]:
    """What a rank hears of another's failure within a call, after how many calls that it asked for, and later on."""
    at, asked = Rank(name), 0
    for _ in range(2):
        at.call(3)
        at.call(2)
    at.item()
    at.call(3)
    if at.rank == 1:
        at.see_asked(5 + MOST_AHEAD * (late and not waits), (0, *range(2, at.ranks)))
        at.agreement.close(MemoryError("tried to allocate 20 GiB"), GPU)
        at.tell("failed")
    elif not late:
        at.hear("failed")

    def go_on() -> None:
        nonlocal asked
        for _ in range(3):
            for digest in (2, 3):
                at.call(digest, waits=waits)
                asked += 1

    said = _raised_in(go_on)
    return said, asked, _raised_in(lambda: at.call(9))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("late", "waits"), [(False, False), (True, False), (True, True)])
def test_who_goes_on_behind_a_rank_that_failed_hears_of_it(pool, ranks: int, late: bool, waits: bool) -> None:
    outcomes = pool(ranks).run(_one_fails, uuid.uuid4().hex, late, waits, timeout=40)
    for rank, (said, asked, later) in enumerate(outcomes):
        assert "MemoryError: tried to allocate 20 GiB" in said
        assert "MemoryError: tried to allocate 20 GiB" in later
        assert rank == 1 or "rank 1 raised an error" in said
        assert asked == (0 if rank == 1 or waits or not late else MOST_AHEAD)


def _one_refuses_what_others_went_ahead_with(name: str) -> list[str]:
    at = Rank(name)
    for _ in range(2):
        at.call(3)
    at.item()
    if at.rank == 0:
        at.see_asked(3, range(1, at.ranks))
        at.refuse(3)

    def go_on() -> None:
        for _ in range(MOST_AHEAD + 1):
            at.call(3)

    return [_raised_in(go_on), _raised_in(lambda: at.call(4))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_can_match_calls_where_one_refused_what_others_went_ahead_with(pool, ranks: int) -> None:
    refused, *others = pool(ranks).run(_one_refuses_what_others_went_ahead_with, uuid.uuid4().hex, timeout=40)
    assert all("went ahead with a call that this rank refused" in said for said in refused)
    for said in others:
        assert all("rank 0 raised an error instead of coming to attention" in x for x in said)


def _two_refuse_their_first_call(name: str) -> str | None:
    at, said = Rank(name), None
    if at.rank == 2:
        said = _raised_in(lambda: at.call(2))
        at.tell("told")
    else:
        at.refuse(None)
        at.hear("told")
    for digest in (3, 4, 3, 4):
        at.call(digest)
    at.item()
    return said


def test_a_first_call_that_two_ranks_refused_is_an_error_of_the_third_once(pool) -> None:
    *_, said = pool(3).run(_two_refuse_their_first_call, uuid.uuid4().hex, timeout=40)
    assert "raised an error instead of coming to attention: ArgumentError: no call None" in said


def _one_stalls(name: str) -> str | None:
    at = Rank(name)
    for _ in range(2):
        at.call(3)
    at.item()
    if at.rank:
        at.call(3) if at.rank == 2 else None  # ahead
        time.sleep(6.0)
        return None
    at.call(3)
    return _raised_in(lambda: at.call(4))


def test_of_ranks_that_are_not_there_those_are_named_that_have_not_come() -> None:
    with Pool(3, timeout=30.0, group_timeout=2.0) as own:
        said = own.run(_one_stalls, uuid.uuid4().hex)[0]
    assert said.startswith("rank 1 has not come to call 2 of attention")


def _one_is_stuck_in_another_call(name: str) -> str | None:
    at = Rank(name)
    for _ in range(2):
        at.call(3)
        at.call(2)
    at.item()
    with mock.patch.object(rounds, "PATIENCE", 0.5):
        if at.rank == 1:
            at.call(2)
            at.hear("raised")  # as a host does that waits for its GPU
            return _raised_in(lambda: at.call(3))
        at.see_asked(5, [1])
        said = _raised_in(lambda: at.call(3))
        at.tell("raised")
        return said


def test_nobody_waits_long_for_words_of_a_rank_that_went_ahead(pool) -> None:
    said, late = pool(2).run(_one_is_stuck_in_another_call, uuid.uuid4().hex, timeout=40)
    assert "rank 1 went ahead and does not say with what" in said
    assert "ranks disagree on call: 3 on rank 0; 2 on rank 1" in late
