"""Plans compute every visible pair once, and the verifier that says so is itself held against brute force."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from cases import MASKS, PARTITIONS, any_blocks, any_mask, masks, visible
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringflash.parallel.planning.plan import Plan, Stage, Transfer, ring
from ringflash.parallel.planning.verify import PlanError, verify
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve


def positions(segments) -> list[int]:
    return [position for start, stop in segments for position in range(start, stop)]


def simulate(plan: Plan, mask: Mask) -> torch.Tensor:
    """Walk a plan with sets of positions, knowing nothing of the verifier; count how often each pair is computed."""
    ranks = len(plan.partition.segments)
    queries, held = ([positions(own) for own in deal.segments] for deal in (plan.partition, plan.keys))
    seen = visible(mask, plan.partition.length, plan.keys.length)
    computed = torch.zeros(seen.shape, dtype=torch.int64)
    present = [set(own) for own in held]
    for stage in plan.stages:
        for rank in range(ranks):
            keys = positions(stage.work[rank])
            assert set(keys) <= present[rank], "attends keys that are not there"
            if keys and queries[rank]:
                rows, columns = torch.tensor(queries[rank])[:, None], torch.tensor(keys)
                computed[rows, columns] += seen[rows, columns]
        arriving: list[list[int]] = [[] for _ in range(ranks)]
        for transfer in stage.sends:
            moved = positions(transfer.segments)
            assert transfer.source != transfer.destination
            assert set(moved) <= present[transfer.source] | set(held[transfer.source]), "sends what is not there"
            arriving[transfer.destination] += moved
        assert all(len(set(moved)) == len(moved) for moved in arriving), "the same keys arrive twice"
        assert all(len(moved) <= plan.buffer_tokens for moved in arriving), "more arrives than there is room for"
        present = [set(moved) for moved in arriving]
    return computed


def check_by_brute_force(plan: Plan, mask: Mask) -> None:
    assert torch.equal(simulate(plan, mask), visible(mask, plan.partition.length, plan.keys.length).long())
    assert plan.buffer_tokens <= max(len(positions(own)) for own in plan.keys.segments), "memory above O(S/P)"


@st.composite
def problems(draw: st.DrawFn, longest: int, most_ranks: int) -> tuple[Mask, Partition]:
    length, ranks = draw(st.integers(1, longest)), draw(st.integers(1, most_ranks))
    mask = draw(any_mask(length))
    kind = draw(st.sampled_from([*PARTITIONS, "random"]))
    if kind != "random":
        return mask, resolve(kind, length, ranks, mask)
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=3 * ranks))})
    owners = draw(st.lists(st.integers(0, ranks - 1), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    pieces = list(pairwise(cuts))
    shares = (tuple(p for p, owner in zip(pieces, owners, strict=True) if owner == rank) for rank in range(ranks))
    return mask, Partition(length, tuple(shares))


@st.composite
def block_problems(draw: st.DrawFn, longest: int, most_ranks: int) -> tuple[Mask, Partition]:
    mask, partition = draw(problems(longest, most_ranks))
    return mask & draw(any_blocks(partition.length)), partition


QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=2500, **QUICKLY)
@given(problems(longest=5000, most_ranks=16))
def test_the_verifier_accepts_every_ring(problem):
    mask, partition = problem
    verify(ring(mask, partition), mask)


@settings(max_examples=500, **QUICKLY)
@given(problems(longest=70, most_ranks=9))
def test_a_ring_computes_every_visible_pair_exactly_once_by_brute_force(problem):
    mask, partition = problem
    check_by_brute_force(ring(mask, partition), mask)


@settings(max_examples=300, **QUICKLY)
@given(block_problems(longest=70, most_ranks=9))
def test_rings_of_any_blocks_compute_every_visible_pair_exactly_once_by_brute_force(problem):
    mask, partition = problem
    plan = ring(mask, partition)
    verify(plan, mask)
    check_by_brute_force(plan, mask)


def test_only_blocks_that_a_rank_sees_travel():
    selected = Mask.blocks(torch.eye(8).bool() | (torch.arange(8) == 3), 512)  # each its own block, all the fourth
    plan = ring(selected, Partition.contiguous(4096, 8))
    verify(plan, selected)
    assert plan.moved_tokens() == 7 * 512


@settings(max_examples=300, **QUICKLY)
@given(
    data=st.data(), ranks=st.integers(1, 9), cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)
)
def test_queries_and_keys_of_unequal_lengths_too(data, ranks, cuts):
    keys, queries = ([0, *accumulate(lengths)] for lengths in zip((5, 7), *cuts, strict=True))
    rules = data.draw(any_mask(max(keys[-1], queries[-1], 1))).without_documents()
    mask = rules & Mask.documents(keys, queries)
    kinds = st.sampled_from([Partition.contiguous, Partition.zigzag])
    plan = ring(mask, data.draw(kinds)(queries[-1], ranks), data.draw(kinds)(keys[-1], ranks))
    verify(plan, mask)
    check_by_brute_force(plan, mask)


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask_under_every_partition_by_brute_force(name, kind):
    for length, ranks in ((60, 4), (61, 3), (7, 4), (1, 3), (2, 8)):
        mask = masks(length)[name] if length > 6 else Mask.causal()
        plan = ring(mask, resolve(kind, length, ranks, mask))
        verify(plan, mask)
        check_by_brute_force(plan, mask)


def _edit(plan: Plan, index: int, **changes) -> Plan:
    stages = list(plan.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(plan, stages=tuple(stages))


def _with_work(plan: Plan, index: int, rank: int, segments) -> Plan:
    work = list(plan.stages[index].work)
    work[rank] = tuple(segments)
    return _edit(plan, index, work=tuple(work))


def drop_a_transfer(plan: Plan, which: int) -> Plan:
    index = which % (len(plan.stages) - 1)
    sends = list(plan.stages[index].sends)
    del sends[which % len(sends)]
    return _edit(plan, index, sends=tuple(sends))


def shorten_a_transfer(plan: Plan, which: int) -> Plan:
    index = which % (len(plan.stages) - 1)
    sends = list(plan.stages[index].sends)
    transfer = sends[which % len(sends)]
    (start, stop), *rest = transfer.segments
    kept = ((start + 1, stop), *rest) if stop - start > 1 else tuple(rest)
    sends[which % len(sends)] = replace(transfer, segments=kept)
    return _edit(plan, index, sends=tuple(sends))


def send_what_is_not_held(plan: Plan, which: int) -> Plan:
    index = which % (len(plan.stages) - 1)
    sends = list(plan.stages[index].sends)
    transfer = sends[which % len(sends)]
    foreign = plan.partition.segments[transfer.destination]
    sends[which % len(sends)] = replace(transfer, segments=tuple(sorted((*transfer.segments, *foreign))))
    return replace(_edit(plan, index, sends=tuple(sends)), buffer_tokens=10 * plan.buffer_tokens)


def send_to_itself(plan: Plan, which: int) -> Plan:
    index = which % (len(plan.stages) - 1)
    sends = list(plan.stages[index].sends)
    sends[which % len(sends)] = replace(sends[which % len(sends)], destination=sends[which % len(sends)].source)
    return _edit(plan, index, sends=tuple(sends))


def send_to_nobody(plan: Plan, which: int) -> Plan:
    sends = (*plan.stages[0].sends, Transfer(0, plan.partition.ranks, plan.partition.segments[0]))
    return _edit(plan, 0, sends=sends)


def send_twice(plan: Plan, which: int) -> Plan:
    index = which % (len(plan.stages) - 1)
    sends = plan.stages[index].sends
    return replace(_edit(plan, index, sends=(*sends, sends[which % len(sends)])), buffer_tokens=10**6)


def repeat_work(plan: Plan, which: int) -> Plan:
    stages = plan.stages
    later = Stage(stages[0].work, ())
    own = tuple(Transfer((r + 1) % len(w), r, w[r]) for w in (stages[0].work,) for r in range(len(w)) if w[r])
    return replace(plan, stages=(*stages[:-1], replace(stages[-1], sends=own), later))


def attend_the_same_keys_twice_in_a_stage(plan: Plan, which: int) -> Plan:
    rank = which % plan.partition.ranks
    return _with_work(plan, 0, rank, plan.stages[0].work[rank] * 2)


def forget_work(plan: Plan, which: int) -> Plan:
    rank = which % plan.partition.ranks
    return _with_work(plan, 0, rank, plan.stages[0].work[rank][1:])


def work_on_absent_keys(plan: Plan, which: int) -> Plan:
    rank = which % plan.partition.ranks
    other = plan.partition.segments[(rank + 1) % plan.partition.ranks]
    return _with_work(plan, 0, rank, sorted((*plan.stages[0].work[rank], *other)))


def lose_the_last_stage(plan: Plan, which: int) -> Plan:
    return replace(plan, stages=plan.stages[:-1])


def end_with_a_send(plan: Plan, which: int) -> Plan:
    return _edit(plan, -1, sends=(Transfer(0, 1, plan.partition.segments[0]),))


def understate_memory(plan: Plan, which: int) -> Plan:
    most = max(len(positions(transfer.segments)) for stage in plan.stages for transfer in stage.sends)
    return replace(plan, buffer_tokens=most - 1)


MUTATIONS = (
    drop_a_transfer,
    shorten_a_transfer,
    send_what_is_not_held,
    send_to_itself,
    send_to_nobody,
    send_twice,
    repeat_work,
    attend_the_same_keys_twice_in_a_stage,
    forget_work,
    work_on_absent_keys,
    lose_the_last_stage,
    end_with_a_send,
    understate_memory,
)


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("mask", [Mask.causal(), Mask.bidirectional()], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_the_verifier_refuses_a_damaged_plan(mutate, mask, kind):
    for length, ranks in ((48, 4), (31, 3)):
        plan = ring(mask, resolve(kind, length, ranks, mask))
        verify(plan, mask)
        for which in range(8):
            with pytest.raises(PlanError):
                verify(mutate(plan, which), mask)


@settings(max_examples=300, **QUICKLY)
@given(problem=problems(longest=40, most_ranks=5), data=st.data())
def test_whatever_the_verifier_accepts_is_right_by_brute_force(problem, data):
    mask, partition = problem
    plan = ring(mask, partition)
    index = data.draw(st.integers(0, len(plan.stages) - 1))
    rank = data.draw(st.integers(0, partition.ranks - 1))
    cut = data.draw(st.integers(0, 40))
    if data.draw(st.booleans()):
        kept = [(start, min(stop, cut)) for start, stop in plan.stages[index].work[rank] if start < cut]
        plan = _with_work(plan, index, rank, kept)
    elif plan.stages[index].sends:
        sends = list(plan.stages[index].sends)
        which = data.draw(st.integers(0, len(sends) - 1))
        kept = tuple((start, min(stop, cut)) for start, stop in sends[which].segments if start < cut)
        sends[which] = replace(sends[which], segments=kept)
        plan = _edit(plan, index, sends=tuple(sends))
    try:
        verify(plan, mask)
    except PlanError:
        return
    check_by_brute_force(plan, mask)


def test_key_gradients_return_to_their_owners_once_for_each_rank_that_used_them():
    mask = masks(60)["documents-window-sink"]
    plan = ring(mask, Partition.zigzag(60, 4))
    expected, returned = Counter(), Counter()
    for index, stage in enumerate(plan.stages):
        for rank, work in enumerate(stage.work):
            own = set(positions(plan.partition.segments[rank]))
            expected.update((rank, position) for position in positions(work) if position not in own)
        for transfer in plan.returns(index):
            assert set(positions(transfer.segments)) <= set(positions(plan.partition.segments[transfer.destination]))
            returned.update((transfer.source, position) for position in positions(transfer.segments))
    assert returned == expected
    assert set(expected.values()) == {1}


def test_a_window_moves_only_its_own_length_and_stops_early():
    plan = ring(Mask.sliding_window(99), Partition.contiguous(4096, 8))
    assert len(plan.stages) == 2
    assert plan.moved_tokens() == 7 * 99


def test_documents_that_lie_within_ranks_move_nothing():
    plan = ring(Mask.documents(range(0, 4097, 256)), Partition.contiguous(4096, 8))
    assert len(plan.stages) == 1
    assert plan.moved_tokens() == 0


def test_one_rank_needs_no_communication():
    plan = ring(Mask.causal(), Partition.zigzag(100, 1))
    assert [stage.sends for stage in plan.stages] == [()]


def test_memory_is_one_share_also_on_many_ranks():
    plan = ring(Mask.causal(), Partition.zigzag(2**20, 256))
    assert plan.buffer_tokens == 2**20 // 256
    assert max(len(positions(t.segments)) for t in plan.stages[0].sends) <= plan.buffer_tokens
