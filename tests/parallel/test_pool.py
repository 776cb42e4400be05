"""The pool itself: results by rank, errors with their tracebacks, and no hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import MOST_THREADS, Pool, Pools, WorkerError


def _rank_and_sum(x):
    total = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), torch.get_num_threads(), os.getpid()


def _fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} refuses")


def _fail_everywhere():
    raise ValueError("no rank agrees")


def _wait_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


def _die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_the_order_of_ranks_from_the_same_workers(pool):
    first, second = pool(2).run(_rank_and_sum, 10), pool(2).run(_rank_and_sum, 20)
    assert [row[:3] for row in first] == [(0, 21, 1), (1, 21, 1)]
    assert [row[:3] for row in second] == [(0, 41, 1), (1, 41, 1)]
    assert [row[3] for row in first] == [row[3] for row in second]


def test_an_error_on_every_rank_is_raised_with_all_tracebacks_and_keeps_the_workers(pool):
    before = pool(2).run(_rank_and_sum, 0)
    with pytest.raises(ValueError, match="no rank agrees") as caught:
        pool(2).run(_fail_everywhere)
    notes = "\n".join(caught.value.__notes__)
    assert "rank 0 of 2" in notes
    assert "rank 1 of 2" in notes
    assert "in _fail_everywhere" in notes
    assert pool(2).run(_rank_and_sum, 0) == before


def test_failed_silent_and_dead_ranks_are_named_and_the_next_call_works():
    with Pool(2, grace=5.0) as pool:
        with pytest.raises(ValueError, match="rank 1 refuses"):
            pool.run(_fail_on, 1)
        with pytest.raises(WorkerError, match="rank 1 had not answered") as caught:
            pool.run(_wait_on, 1, timeout=1.0)
        assert "in _wait_on" in "\n".join(caught.value.__notes__)
        outcomes = pool.outcomes(_die_on, 0)
        assert "rank 0 died with exit code -9" in str(outcomes[0].error)
        assert outcomes[1].error is None
        assert len(pool.run(_rank_and_sum, 1)) == 2


def _leave_groups(number):
    for _ in range(number):
        dist.new_group([0, 1])


def test_ranks_with_many_groups_of_earlier_tests_are_replaced_and_others_stay():
    with Pools() as pools:
        first = pools(2).run(os.getpid)
        pools(2).run(_leave_groups, 2)
        pools.renew()
        assert pools(2).run(os.getpid) == first
        pools(2).run(_leave_groups, MOST_THREADS)
        pools.renew()
        assert not set(pools(2).run(os.getpid)) & set(first)
