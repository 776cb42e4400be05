"""Every generator beside the ring: plans are right by `verify` and by brute force, and attention by them is exact."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import PARTITIONS, Shape, any_mask, any_partition, inputs, masks, problems, visible
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_damage import damaged
from plan_oracle import positions, stage_of, walk
from ring import Problem, assert_as_exact_as_torch, joined
from test_plan import MILLION, moved_tokens, packed
from test_program import check as check_program

from ringflash import DistributedFlashAttention
from ringflash.errors import ArgumentError
from ringflash.functional import attention
from ringflash.parallel.lookup import shardings
from ringflash.parallel.planning.generators import NAMES, in_words, plan_named
from ringflash.parallel.planning.loads import SAMPLES, loads
from ringflash.parallel.planning.plan import Plan
from ringflash.parallel.planning.verify import PlanError, verify
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve
from ringflash.parallel.positions.segments import count, normalize
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.parallel.sharding import Sharding
from ringflash.parallel.transport.send_recv import SendRecv, Ticket

QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
OTHERS = tuple(name for name in NAMES if name != "ring")


@st.composite
def generators(draw: st.DrawFn, ranks: int) -> Callable[..., Plan]:
    """Any generator but the ring, with any hosts and waves."""
    name = draw(st.sampled_from(["counter-ring", "double-ring", "direct"]))
    hosts = draw(st.sampled_from([x for x in range(1, ranks + 1) if ranks % x == 0]))
    name = f"direct-{draw(st.integers(0, ranks + 1))}" if name == "direct" else name
    return lambda mask, queries, keys=None: plan_named(name, mask, queries, keys, hosts)


# Right for all ranks


@settings(max_examples=2500, **QUICKLY)
@given(problem=problems(longest=5000, most_ranks=16), data=st.data())
def test_the_verifier_accepts_every_plan_of_every_generator(problem, data):
    mask, partition = problem
    verify(data.draw(generators(partition.ranks))(mask, partition), mask)


@settings(max_examples=400, **QUICKLY)
@given(problem=problems(longest=70, most_ranks=9), data=st.data())
def test_brute_force_agrees(problem, data):
    mask, queries = problem
    keys = data.draw(st.just(queries) | any_partition(queries.length, queries.ranks))
    plan = data.draw(generators(queries.ranks))(mask, queries, keys)
    verify(plan, mask)
    walk(plan, mask)


@settings(max_examples=150, **QUICKLY)
@given(
    data=st.data(), ranks=st.integers(1, 9), cuts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6)
)
def test_queries_and_keys_of_unequal_lengths_too(data, ranks, cuts):
    keys, queries = ([0, *accumulate(lengths)] for lengths in zip((5, 7), *cuts, strict=True))
    rules = data.draw(any_mask(max(keys[-1], queries[-1], 1))).without_documents()
    mask = rules & Mask.documents(keys, queries)
    kinds = st.sampled_from([Partition.contiguous, Partition.zigzag])
    shares = data.draw(kinds)(queries[-1], ranks), data.draw(kinds)(keys[-1], ranks)
    plan = data.draw(generators(ranks))(mask, *shares)
    verify(plan, mask)
    walk(plan, mask)


@settings(max_examples=500, **QUICKLY)
@given(problem=problems(longest=40, most_ranks=6), data=st.data())
def test_whatever_the_verifier_accepts_of_damaged_plans_is_right_by_brute_force(problem, data):
    mask, partition = problem
    plan = data.draw(damaged(data.draw(generators(partition.ranks))(mask, partition)))
    try:
        verify(plan, mask)
    except PlanError:
        return
    walk(plan, mask)


@settings(max_examples=200, **QUICKLY)
@given(problem=problems(longest=60, most_ranks=6), data=st.data())
def test_programs_name_the_rows_of_their_plans(problem, data):
    mask, partition = problem
    check_program(data.draw(generators(partition.ranks))(mask, partition), mask)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ranks", [64, 256, 1024])
@pytest.mark.parametrize("mask", [Mask.sliding_window(5000), packed(MILLION)], ids=["window", "packed"])
def test_the_verifier_accepts_windows_and_packed_documents_on_many_ranks(mask, ranks, name):
    plan = plan_named(name, mask, Partition.contiguous(MILLION, ranks), hosts=ranks // 8)
    verify(plan, mask)
    assert moved_tokens(plan) < MILLION * ranks // 8


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kind", ["zigzag", "balanced"])
def test_the_verifier_accepts_whole_causal_plans_of_64_ranks(kind, name):
    verify(plan_named(name, Mask.causal(), resolve(kind, MILLION, 64, Mask.causal()), hosts=8), Mask.causal())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mask", [Mask.causal(), packed(MILLION)], ids=["causal", "packed"])
def test_some_of_1024_ranks_attend_what_they_see_and_agree_with_their_peers(mask, name):
    plan = plan_named(name, mask, Partition.zigzag(MILLION, 1024), hosts=128)
    some = {rank: plan.of(rank) for rank in (0, 1, 8, 500, 501, 508, 1023)}
    for rank, mine in some.items():
        work = [interval for stage in mine.stages for interval in stage.work]
        seen = normalize(x for segment in mine.queries for x in mask.keys_needed(segment))
        assert normalize(work) == seen
        assert count(tuple(work)) == count(seen)  # nothing twice
        for peer, theirs in some.items():
            for index in range(len(mine.stages)):
                here, there = stage_of(mine, index), stage_of(theirs, index)
                for leaves, comes in (("sends", "receives"), ("returns", "reduces")):
                    sent = [move.segments for move in getattr(here, leaves) if move.peer == peer]
                    assert sent == [move.segments for move in getattr(there, comes) if move.peer == rank]


# What they are for


def test_a_ring_each_way_takes_half_as_many_stages_and_moves_no_more():
    mask, partition = Mask.bidirectional(), Partition.contiguous(4096, 8)
    ring, both = plan_named("ring", mask, partition), plan_named("counter-ring", mask, partition)
    assert [max(len(mine.stages) for mine in plan.ranks) for plan in (ring, both)] == [8, 5]
    assert moved_tokens(both) == moved_tokens(ring)
    assert len(both.of(3).stages[1].receives) == 2


def test_a_ring_of_rings_crosses_to_other_hosts_in_one_stage_for_each():
    plan = plan_named("double-ring", Mask.bidirectional(), Partition.contiguous(4096, 8), hosts=2)
    for mine in plan.ranks:
        crossing = [i for i, stage in enumerate(mine.stages) if any(x.peer // 4 != mine.rank // 4 for x in stage.sends)]
        assert crossing == [3]


@pytest.mark.parametrize("waves", [1, 2, 3, 7])
def test_direct_pulls_come_from_owners_alone_in_equal_waves(waves):
    plan = plan_named(f"direct-{waves}", Mask.bidirectional(), Partition.contiguous(4200, 8))
    for mine in plan.ranks:
        assert not any(move.relayed for stage in mine.stages for move in stage.sends)
        sizes = [count(stage.work) for stage in mine.stages[1:]]
        assert len(sizes) == waves
        assert max(sizes) - min(sizes) <= 525  # one owner's more


def test_without_waves_everything_comes_first_and_is_attended_to_at_once():
    mask = Mask.sliding_window(100)
    for mine in plan_named("direct-0", mask, Partition.contiguous(4200, 8)).ranks:
        first, second = mine.stages
        assert not first.work
        assert count(second.work) == 525 + 100 * (mine.rank > 0)
        assert [move.peer for move in first.receives] == [mine.rank - 1] * (mine.rank > 0)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(("ranks", "mask"), [(64, packed(MILLION)), (512, packed(MILLION))], ids=["64", "512"])
def test_one_rank_makes_its_plan_within_a_blink(name, ranks, mask):
    partition, seconds = resolve("balanced", MILLION, ranks, mask), []
    for _ in range(3):
        started = time.process_time()
        plan_named(name, mask, partition, hosts=ranks // 8).of(ranks // 2)
        seconds.append(time.process_time() - started)
    assert min(seconds) < (0.01 if ranks == 64 else 0.06)


@pytest.mark.parametrize("name", [*NAMES, "direct-12"])
def test_every_plan_has_words(name):
    assert in_words(name).startswith("keys ")


@pytest.mark.parametrize("name", ["", "rings", "direct", "direct--1", "direct-x", 3])
def test_a_plan_that_there_is_not_is_refused_by_name(name):
    with pytest.raises(ArgumentError, match=f"plan={name!r}; allowed are ring, counter-ring"):
        Sharding(seqlen=8, rank=0, ranks=2, plan=name)
    with pytest.raises(ArgumentError, match="hosts=3; allowed are numbers from 1 that divide the 4 ranks"):
        Sharding(seqlen=8, rank=0, ranks=4, hosts=3)


# In numbers


@settings(max_examples=300, **QUICKLY)
@given(problem=problems(longest=70, most_ranks=8), data=st.data())
def test_loads_count_pairs_and_keys(problem, data):
    mask, queries = problem
    keys = data.draw(st.just(queries) | any_partition(queries.length, queries.ranks))
    found = loads(mask, queries, keys, needed_keys(mask, queries.segments, keys.length))
    seen = visible(mask, queries.length).long()
    rows, columns = (torch.zeros(queries.ranks, queries.length, dtype=torch.int64) for _ in range(2))
    for table, partition in ((rows, queries), (columns, keys)):
        for rank in range(queries.ranks):
            table[rank, positions(partition.segments[rank])] = 1
    assert queries.length <= SAMPLES
    assert np.array_equal(found.pairs, (rows @ seen @ columns.T).numpy())
    if mask.layout is None and not mask.prefix:
        assert found.queries.tolist() == queries.counts()
    # Keys that `keys_needed` counts may be hidden from every query by another rule; what is seen is counted.
    used = ((rows @ seen > 0).long() @ columns.T).numpy()
    assert (found.keys >= used).all()


@settings(max_examples=300, **QUICKLY)
@given(problem=problems(longest=300, most_ranks=9), data=st.data())
def test_an_outline_says_what_the_ranks_do(problem, data):
    """In which stages, from where, and how many keys; of those that are passed on no more than there are."""
    mask, partition = problem
    name = data.draw(st.sampled_from(NAMES))
    hosts = data.draw(st.sampled_from([x for x in range(1, partition.ranks + 1) if partition.ranks % x == 0]))
    plan = plan_named(name, mask, partition, hosts=hosts)
    outline = plan.outline
    keys = loads(mask, partition, partition, needed_keys(mask, partition.segments, partition.length)).keys
    carried = outline.carried(keys)
    assert outline.stage.min() == (name == "direct-0")
    assert outline.stage.max() < outline.stages
    for mine in plan.ranks:
        assert len(mine.stages) <= outline.stages
        for index, stage in enumerate(mine.stages):
            for move in stage.returns:
                assert outline.stage[mine.rank, move.peer] == index
                assert keys[mine.rank, move.peer] == count(move.segments)
            arriving = (outline.stage[mine.rank] == index + 1) & (np.arange(partition.ranks) != mine.rank)
            for move in stage.receives:
                blocks = arriving & (outline.source[mine.rank] == move.peer)
                assert keys[mine.rank, blocks].sum() <= carried[mine.rank, blocks].sum() <= count(move.segments)
            senders = {move.peer for move in stage.receives}
            assert set(outline.source[mine.rank, arriving & (keys[mine.rank] > 0)].tolist()) <= senders
            if mask == Mask.causal() and name != "counter-ring":
                assert carried[mine.rank, arriving].sum() == sum(count(move.segments) for move in stage.receives)


# Attention


def _attend(problem: Problem, plan: str, hosts: int, head_ranks: int = 1) -> dict[str, torch.Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sharding = Sharding(
        problem.mask,
        batch=problem.shape.batch,
        seqlen=problem.shape.length,
        partition=problem.partition,
        plan=plan,
        hosts=hosts if ranks % hosts == 0 else 1,
        head_ranks=head_ranks,
    )
    rows = problem.rows(rank, ranks)
    *leaves, dout = (x[:, rows] for x in problem.inputs())
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = attention(*leaves, sharding=sharding)
    gradients = torch.autograd.grad(out, leaves, dout)
    results = zip(("out", "dq", "dk", "dv", "lse"), (out, *gradients, lse.transpose(1, 2)), strict=True)
    return {name: x.detach() for name, x in results}


@pytest.mark.parametrize("plan", OTHERS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_attention_by_every_plan_equals_one_device(pool, ranks, plan):
    for kind in PARTITIONS:
        for name in ("causal", "bidirectional", "documents-window-sink", "prefix", "blocks-causal-documents"):
            problem = Problem(masks(61)[name], partition=kind)
            results = joined(problem, pool(ranks).run(_attend, problem, plan, 2))
            assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


@pytest.mark.parametrize("plan", OTHERS)
def test_heads_are_exchanged_as_the_outer_part_of_every_plan(pool, plan):
    for name in ("causal", "documents-window-sink"):
        problem = Problem(masks(61)[name], partition="balanced")
        results = joined(problem, pool(4).run(_attend, problem, plan, 2, 2))
        assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


class GatheredShelf:
    """Every rank sees what each has laid out: what copy engines do, by a collective."""

    def __init__(self):
        self.laid_out = None
        self.taken = False

    def publish(self, rows, given):
        assert self.laid_out is None
        self.taken = False
        self.laid_out = [None] * dist.get_world_size()
        mine = [torch.full_like(x, 5) for x in rows]  # what is not laid out is wrong
        for first, last in given:
            for x, y in zip(rows, mine, strict=True):
                y[first:last] = x[first:last]
        dist.all_gather_object(self.laid_out, mine)

    def mark(self):
        return "now"

    def pull(self, pulls, targets, what, free, last):
        assert free == "now"
        assert not self.taken
        self.taken = last
        for target in targets:
            target.fill_(5)  # what is not taken is wrong
        filled = 0
        for pull in pulls:
            assert pull.owner != dist.get_rank()
            for source, target in zip(self.laid_out[pull.owner], targets, strict=True):
                assert len(source) == pull.keys
                for first, place, rows in pull.runs:
                    target[place : place + rows] = source[first : first + rows]
            filled += sum(rows for *_, rows in pull.runs)
        assert filled <= len(targets[0])
        return Ticket([], [], what)

    def release(self):
        self.laid_out = None


def _attend_by_pulls(problem, plan, hosts, head_ranks):
    with pytest.MonkeyPatch.context() as patch:
        shelf = GatheredShelf()
        patch.setattr(SendRecv, "shelf", shelf)
        return _attend(problem, plan, hosts, head_ranks)


@pytest.mark.parametrize("head_ranks", [1, 2])
@pytest.mark.parametrize("plan", ["ring", *OTHERS])
def test_keys_that_ranks_take_from_their_owners_are_those_of_the_plan(pool, plan, head_ranks):
    for partition in ("balanced", "stripe", "zigzag"):
        problem = Problem(masks(61)["documents-window-sink"], partition=partition)
        results = joined(problem, pool(4).run(_attend_by_pulls, problem, plan, 2, head_ranks))
        assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    length=st.integers(1, 80),
    ranks=st.integers(2, 4),
    plan=st.sampled_from([*OTHERS, "direct-4"]),
    hosts=st.sampled_from([1, 2]),
)
def test_any_mask_and_dtype_by_any_plan(pool, data, length, ranks, plan, hosts):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    kind = data.draw(st.sampled_from(PARTITIONS))
    problem = Problem(data.draw(any_mask(length)), partition=kind, dtype=dtype, seed=length)
    problem = Problem(problem.mask, type(problem.shape)(length=length), kind, dtype, seed=length)
    results = joined(problem, pool(ranks).run(_attend, problem, plan, hosts))
    assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


def _named_in_a_call(compiled: bool) -> dict[str, torch.Tensor]:
    problem = Problem(masks(61)["documents-causal"])
    *leaves, dout = (x[:, problem.rows(dist.get_rank(), dist.get_world_size())] for x in problem.inputs())
    leaves = [x.requires_grad_() for x in leaves]
    module = DistributedFlashAttention(problem.mask, plan="counter-ring")
    torch._dynamo.reset()
    attend = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    out = attend(*leaves, seqlen=61)
    taken = {x._placement.plan_name(0) for x in shardings._found.values() if x.seqlen == 61}
    assert "counter-ring" in taken
    shardings.clear()
    gradients = torch.autograd.grad(out, leaves, dout)
    return {name: x.detach() for name, x in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True)}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plan_may_be_named_where_a_sharding_is_looked_up(pool, compiled):
    problem = Problem(masks(61)["documents-causal"])
    results = joined(problem, pool(3).run(_named_in_a_call, compiled, timeout=120))
    assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


def test_a_plan_named_beside_a_sharding_or_that_there_is_not_is_refused():
    x = torch.randn(1, 8, 2, 8)
    with pytest.raises(ArgumentError, match="plan beside sharding"):
        attention(x, x, x, sharding=Sharding(seqlen=8), plan="ring")
    with pytest.raises(ArgumentError, match="plan='rings'; allowed are ring"):
        attention(x, x, x, plan="rings")
    with pytest.raises(ArgumentError, match="plan='rings'; allowed are ring"):
        DistributedFlashAttention(plan="rings")


def _plans_differ() -> str:
    plan = "ring" if dist.get_rank() == 0 else "counter-ring"
    sharding = Sharding(Mask.causal(), seqlen=16, plan=plan)
    x = torch.randn(1, sharding.tokens, 2, 8)
    try:
        attention(x, x, x, sharding=sharding)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def test_ranks_with_different_plans_are_told_so_by_name(pool):
    for said in pool(2).run(_plans_differ):
        assert said.startswith("RankMismatchError")
        assert "plan" in said
        assert "counter-ring" in said


def _some_gradients(plan, hosts):
    """Each subset of query, key and value whose gradients somebody asks for; alone, and how much memory each holds."""
    sharding = Sharding(Mask.bidirectional(), seqlen=41, plan=plan, hosts=hosts)
    *whole, dout = inputs(Shape(length=41, heads=4, key_heads=2))
    mine = [sharding.shard(x, 1) for x in (*whole, dout)]
    found, right = [], None
    for wanted in ((0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(mine[:3])]
        out, _ = attention(*leaves, sharding=sharding)
        gradients = torch.autograd.grad(out, [leaves[i] for i in wanted], mine[3])
        right = gradients if right is None else right
        found += [torch.equal(x, right[i]) for i, x in zip(wanted, gradients, strict=True)]
        found += [x.untyped_storage().nbytes() == x.nbytes for x in gradients]
    return all(found)


@pytest.mark.parametrize("plan", NAMES)
def test_gradients_of_some_inputs_are_those_of_all_and_hold_no_memory_beside(pool, plan):
    assert all(pool(4).run(_some_gradients, plan, 2))
