"""Plans compute every visible pair and return every gradient once; `verify`, which says so, is held to brute force."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from cases import MASKS, PARTITIONS, any_blocks, any_mask, any_partition, masks, problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_damage import FAULTS, damaged
from plan_oracle import direct, moved, positions, stage_of, walk, with_stages

from ringflash.parallel.planning.plan import Buffers, Move, Plan, RankPlan, Stage
from ringflash.parallel.planning.ring import ring
from ringflash.parallel.planning.verify import PlanError, verify
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve
from ringflash.parallel.positions.segments import count, normalize

QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
MILLION = 2**20


def check(plan: Plan, mask: Mask) -> None:
    """A ring is right by brute force, `verify` agrees, and it takes one share of memory."""
    verify(plan, mask)
    walk(plan, mask)
    share = max(plan.keys.counts())
    assert all(max(x.arrivals, x.returns, x.reduces) <= share for x in (mine.buffers for mine in plan.ranks))


def moved_tokens(plan: Plan) -> int:
    return sum(mine.moved_tokens for mine in plan.ranks)


def packed(length: int, mean: int = 8192, seed: int = 0) -> Mask:
    """Causal documents of log-normal lengths."""
    lengths, bounds = random.Random(seed), [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + 1 + int(lengths.lognormvariate(math.log(mean) - 0.5, 1))))
    return Mask.causal() & Mask.documents(bounds)


# Every pair and every gradient once


@settings(max_examples=2500, **QUICKLY)
@given(problems(longest=5000, most_ranks=16))
def test_the_verifier_accepts_every_ring(problem):
    mask, partition = problem
    verify(ring(mask, partition), mask)


@settings(max_examples=500, **QUICKLY)
@given(problems(longest=70, most_ranks=9))
def test_a_ring_computes_every_visible_pair_exactly_once_by_brute_force(problem):
    mask, partition = problem
    check(ring(mask, partition), mask)


@settings(max_examples=300, **QUICKLY)
@given(problem=problems(longest=70, most_ranks=9), data=st.data())
def test_rings_of_any_blocks_compute_every_visible_pair_exactly_once_by_brute_force(problem, data):
    mask, partition = problem
    mask &= data.draw(any_blocks(partition.length))
    check(ring(mask, partition), mask)


@settings(max_examples=300, **QUICKLY)
@given(
    data=st.data(), ranks=st.integers(1, 9), cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)
)
def test_queries_and_keys_of_unequal_lengths_too(data, ranks, cuts):
    keys, queries = ([0, *accumulate(lengths)] for lengths in zip((5, 7), *cuts, strict=True))
    rules = data.draw(any_mask(max(keys[-1], queries[-1], 1))).without_documents()
    mask = rules & Mask.documents(keys, queries)
    kinds = st.sampled_from([Partition.contiguous, Partition.zigzag])
    check(ring(mask, data.draw(kinds)(queries[-1], ranks), data.draw(kinds)(keys[-1], ranks)), mask)


@settings(max_examples=100, **QUICKLY)
@given(problem=problems(longest=20, most_ranks=5), batch=st.integers(2, 4))
def test_batches_of_sequences_laid_end_to_end_too(problem, batch):
    mask, partition = problem
    mask = mask.without_documents() & Mask.documents(range(0, batch * partition.length + 1, partition.length))
    check(ring(mask, partition.repeat(batch)), mask)


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_under_every_partition_by_brute_force(name, kind):
    for length, ranks in ((60, 4), (61, 3), (7, 4), (1, 3), (2, 8)):
        mask = masks(length)[name] if length > 6 else Mask.causal()
        check(ring(mask, resolve(kind, length, ranks, mask)), mask)


def test_key_gradients_return_to_their_owners_once_for_each_rank_that_used_them():
    plan = ring(masks(60)["documents-window-sink"], Partition.zigzag(60, 4))
    used, returned = Counter(), Counter()
    for mine in plan.ranks:
        own = set(positions(mine.keys))
        for stage in mine.stages:
            used.update((mine.rank, position) for position in positions(stage.work) if position not in own)
            for move in stage.returns:
                assert set(positions(move.segments)) <= set(positions(plan.keys.segments[move.peer]))
                returned.update((mine.rank, position) for position in positions(move.segments))
    assert returned == used
    assert set(used.values()) == {1}


# Plans that no generator makes


def by_hand() -> tuple[Plan, Mask]:
    """Rank 1 attends to some own keys while foreign ones arrive, and to the rest with those, last of all."""
    halves = Partition.contiguous(8, 2)
    first = (
        Stage(work=((0, 4),), sends=(Move(1, ((0, 4),)),)),
        Stage(reduces=(Move(1, ((0, 4),)),)),
    )
    second = (
        Stage(work=((4, 6),), receives=(Move(0, ((0, 4),)),)),
        Stage(work=((0, 4), (6, 8)), returns=(Move(0, ((0, 4),)),)),
    )
    ranks = (
        RankPlan(0, ((0, 4),), ((0, 4),), first, Buffers(reduces=4)),
        RankPlan(1, ((4, 8),), ((4, 8),), second, Buffers(arrivals=4, returns=4)),
    )
    return Plan("by hand", halves, halves, ranks.__getitem__), Mask.causal()


def test_own_keys_may_be_attended_with_foreign_ones_and_last():
    plan, mask = by_hand()
    verify(plan, mask)
    walk(plan, mask)


def test_what_own_keys_and_foreign_ones_give_together_is_returned_in_part():
    plan, mask = by_hand()
    own, mixed = plan.ranks[1].stages
    everything = with_stages(plan, 1, (own, replace(mixed, returns=(Move(0, mixed.work),))), Buffers(4, 6, 0))
    nothing = with_stages(plan, 1, (own, replace(mixed, returns=())))
    for damage in (everything, nothing):
        with pytest.raises(PlanError):
            verify(damage, mask)
        with pytest.raises(AssertionError):
            walk(damage, mask)


@settings(max_examples=500, **QUICKLY)
@given(problem=problems(longest=60, most_ranks=7), data=st.data(), waves=st.integers(2, 5))
def test_the_verifier_accepts_keys_fetched_from_their_owners_in_any_order_and_own_keys_whenever(problem, data, waves):
    mask, queries = problem
    keys = data.draw(st.just(queries) | any_partition(queries.length, queries.ranks))
    plan = direct(
        mask, queries, keys, waves, lambda rank, owner, _: data.draw(st.integers(int(rank != owner), waves - 1))
    )
    verify(plan, mask)
    walk(plan, mask)


# Damage


def last_of_all(mask: Mask, partition: Partition) -> Plan:
    """Foreign keys in two waves, own ones with the second."""
    return direct(mask, partition, partition, 3, lambda rank, owner, _: 2 - (rank != owner and (rank + owner) % 2))


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.bidirectional()], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("generate", [ring, last_of_all], ids=lambda generate: generate.__name__)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_verifier_refuses_a_damaged_plan_and_so_does_brute_force(fault, generate, mask, kind):
    for length, ranks in ((48, 4), (31, 3)):
        plan = generate(mask, resolve(kind, length, ranks, mask))
        verify(plan, mask)
        walk(plan, mask)
        for which in range(8):
            broken = fault(plan, which)
            with pytest.raises(PlanError):
                verify(broken, mask)
            with pytest.raises(AssertionError):
                walk(broken, mask)


@pytest.mark.parametrize("name", [field for field in vars(Buffers())])
def test_the_verifier_refuses_a_plan_of_one_stage_that_understates_memory(name):
    plan, mask = by_hand()
    for mine in plan.ranks:
        size = getattr(mine.buffers, name)
        damage = with_stages(plan, mine.rank, mine.stages, replace(mine.buffers, **{name: size - 1}))
        if size:
            with pytest.raises(PlanError, match=name):
                verify(damage, mask)


def test_the_verifier_refuses_a_plan_of_one_rank_for_all():
    mask = Mask.documents(range(0, 65, 16))  # nothing moves, so no rank notices what the others do
    plan = ring(mask, Partition.contiguous(64, 4))
    with pytest.raises(PlanError):
        verify(Plan("one for all", plan.queries, plan.keys, lambda rank: plan.of(0)), mask)


@settings(max_examples=1500, **QUICKLY)
@given(problem=problems(longest=40, most_ranks=5), data=st.data())
def test_whatever_the_verifier_accepts_is_right_by_brute_force(problem, data):
    mask, partition = problem
    plan = data.draw(st.sampled_from([ring, last_of_all]))(mask, partition)
    plan = data.draw(damaged(plan))
    try:
        verify(plan, mask)
    except PlanError:
        return
    walk(plan, mask)


# What moves


def test_a_window_moves_only_its_own_length_and_stops_early():
    plan = ring(Mask.sliding_window(99), Partition.contiguous(4096, 8))
    assert max(len(mine.stages) for mine in plan.ranks) == 2
    assert moved_tokens(plan) == 7 * 99


def test_documents_that_lie_within_ranks_move_nothing():
    plan = ring(Mask.documents(range(0, 4097, 256)), Partition.contiguous(4096, 8))
    assert all(len(mine.stages) == 1 for mine in plan.ranks)
    assert moved_tokens(plan) == 0
    assert all(mine.buffers == Buffers() for mine in plan.ranks)


def test_one_rank_needs_no_communication():
    (mine,) = ring(Mask.causal(), Partition.zigzag(100, 1)).ranks
    assert mine.stages == (Stage(work=((0, 100),)),)
    assert mine.buffers == Buffers()


def test_only_blocks_that_a_rank_sees_travel():
    selected = Mask.blocks(torch.eye(8).bool() | (torch.arange(8) == 3), 512)  # each its own block, all the fourth
    plan = ring(selected, Partition.contiguous(4096, 8))
    verify(plan, selected)
    assert moved_tokens(plan) == 7 * 512


def test_memory_is_one_share_also_on_many_ranks():
    plan = ring(Mask.causal(), Partition.zigzag(MILLION, 256))
    for mine in (plan.of(rank) for rank in (0, 1, 128, 255)):
        assert mine.buffers.arrivals == MILLION // 256
        assert max(len(moved(stage.sends)) for stage in mine.stages) == MILLION // 256
        assert max(mine.buffers.returns, mine.buffers.reduces) <= MILLION // 256


def test_buffers_are_what_the_stages_need():
    for mine in ring(masks(61)["documents-window-sink"], Partition.zigzag(61, 5)).ranks:
        needs = ([len(moved(getattr(stage, name))) for stage in mine.stages] for name in ("receives", "returns"))
        assert (mine.buffers.arrivals, mine.buffers.returns) == tuple(map(max, needs))
        assert mine.buffers.reduces == max(len(moved(stage.reduces)) for stage in mine.stages)


# One rank at a time, and many of them


@settings(max_examples=100, **QUICKLY)
@given(problem=problems(longest=200, most_ranks=16), data=st.data())
def test_a_rank_makes_its_own_plan_as_if_all_were_made(problem, data):
    mask, partition = problem
    rank = data.draw(st.integers(0, partition.ranks - 1))
    assert ring(mask, partition).of(rank) == ring(mask, partition).ranks[rank]


def test_asking_for_one_rank_makes_no_other():
    made = []
    plan = ring(Mask.causal(), Partition.zigzag(64, 8))
    counted = Plan("counted", plan.queries, plan.keys, lambda rank: made.append(rank) or plan.of(rank))
    assert counted.of(3).rank == 3
    assert made == [3]
    assert [mine.rank for mine in counted.ranks] == list(range(8))


@pytest.mark.parametrize("kind", ["zigzag", "balanced"])
def test_a_rank_of_64_is_planned_for_a_packed_million_tokens_within_a_blink(kind):
    mask, seconds = packed(MILLION), []
    for _ in range(5):
        started = time.process_time()
        ring(mask, resolve(kind, MILLION, 64, mask)).of(32)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1  # a hundredth to a fiftieth of a second is what it takes


def test_the_cost_of_one_plan_grows_with_the_ranks_and_not_with_their_square():
    """By the number of stages and pieces, which is what is worked on."""
    for ranks in (64, 256, 1024):
        mine = ring(Mask.causal(), Partition.zigzag(MILLION, ranks)).of(ranks // 2)
        moves = sum(len(getattr(stage, name)) for stage in mine.stages for name in ("receives", "sends", "returns"))
        assert len(mine.stages) <= ranks
        assert moves <= 3 * ranks
        assert sum(len(stage.work) for stage in mine.stages) <= 2 * ranks


@pytest.mark.parametrize("ranks", [64, 256, 1024])
@pytest.mark.parametrize("mask", [Mask.sliding_window(5000), packed(MILLION)], ids=["window", "packed"])
def test_the_verifier_accepts_windows_and_packed_documents_on_many_ranks(mask, ranks):
    plan = ring(mask, Partition.contiguous(MILLION, ranks))
    verify(plan, mask)
    assert moved_tokens(plan) < MILLION * ranks // 8


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("mask", [Mask.causal(), packed(MILLION)], ids=["causal", "packed"])
def test_the_verifier_accepts_whole_rings_of_64_ranks(mask, kind):
    verify(ring(mask, resolve(kind, MILLION, 64, mask)), mask)


def test_the_verifier_accepts_a_whole_causal_ring_of_256_ranks():
    verify(ring(Mask.causal(), Partition.zigzag(MILLION, 256)), Mask.causal())


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [Mask.causal(), packed(MILLION)], ids=["causal", "packed"])
def test_some_of_1024_ranks_attend_what_they_see_and_agree_with_their_peers(mask, kind):
    plan = ring(mask, resolve(kind, MILLION, 1024, mask))
    some = {rank: plan.of(rank) for rank in (0, 1, 500, 501, 1023)}
    for rank, mine in some.items():
        work = [interval for stage in mine.stages for interval in stage.work]
        seen = normalize(x for segment in mine.queries for x in mask.keys_needed(segment))
        assert normalize(work) == seen
        assert count(work) == count(seen)  # nothing twice
        for peer, theirs in some.items():
            for index in range(1024):
                here, there = stage_of(mine, index), stage_of(theirs, index)
                for leaves, comes in (("sends", "receives"), ("returns", "reduces")):
                    sent = [move.segments for move in getattr(here, leaves) if move.peer == peer]
                    assert sent == [move.segments for move in getattr(there, comes) if move.peer == rank]


def test_the_verifier_refuses_keys_on_more_or_fewer_ranks_than_queries():
    for ranks in (3, 5):
        with pytest.raises(PlanError, match=f"keys on {ranks}"):
            verify(ring(Mask.causal(), Partition.contiguous(60, 4), Partition.contiguous(60, ranks)), Mask.causal())
