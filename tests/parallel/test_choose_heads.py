"""Ranks exchange heads unasked where that is predicted to be faster, and compute what the plan computes."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from attention_cases import Case, Rules
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_cases import ShardedCase, solve_share

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels.kept import Kept
from ringflash.parallel.execution.call import Settings
from ringflash.parallel.execution.operators import TENSORS
from ringflash.parallel.lookup import shardings
from ringflash.parallel.planning import choose, choose_heads
from ringflash.parallel.planning.choose import MEMORY
from ringflash.parallel.planning.machine import COPY_ENGINE
from ringflash.recomputed import Region, within

# What is chosen


def exchanged(mask, **place):
    """Whether heads are, on four H100s whose copy engines move keys."""
    with mock.patch.object(choose, "_known", return_value=COPY_ENGINE):
        return Sharding(mask, **({"rank": 1, "ranks": 4, "token_work": 0} | place))._placement.heads_choice(0)


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
def test_long_causal_sequences_are_attended_by_heads_and_short_ones_by_a_plan(partition):
    """As measured (docs/benchmarks/ring.md): at 131,072 tokens heads win, at 32,768 a plan of level shares does."""
    for seqlen in (131072, 1 << 20):
        assert exchanged(Mask.causal(), seqlen=seqlen, partition=partition)
    assert not exchanged(Mask.causal(), seqlen=4096, partition=partition)
    assert bool(exchanged(Mask.causal(), seqlen=32768, partition=partition)) == (partition == "contiguous")


def test_windows_and_level_documents_stay_with_a_plan():
    cuts = list(range(0, 131073, 8192))
    assert not exchanged(Mask.sliding_window(4096), seqlen=524288, partition="contiguous")
    assert not exchanged(Mask.causal(), cu_seqlens=cuts, partition="balanced")


def test_what_was_said_is_done():
    for said in ({"head_ranks": 1}, {"head_ranks": 2}, {"plan": "ring"}, {"hosts": 2}):
        assert not exchanged(Mask.causal(), seqlen=131072, **said)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(15, 19), ranks=st.sampled_from([2, 4, 8]), partition=st.sampled_from(["zigzag", "contiguous"])
)
def test_what_is_chosen_takes_less_time_and_no_more_memory_than_is_allowed(tokens, ranks, partition):
    place = {"seqlen": 1 << tokens, "ranks": ranks, "partition": partition}
    found = exchanged(Mask.causal(), **place)
    with mock.patch.object(choose, "_known", return_value=COPY_ENGINE):
        plan = Sharding(Mask.causal(), rank=0, token_work=0, **place)._placement.choice(0)
    share = (1 << tokens) // ranks
    cost = choose_heads.by_heads(plan, np.full(ranks, share), share)
    faster = cost.total < 0.99 * (plan.cost.total + plan.crossing)
    fits = cost.memory <= max(MEMORY, plan.predicted["ring"].memory)
    assert (found is not None) == (faster and fits and plan.cost.attention >= choose.LEAST)


def test_a_sharding_says_that_heads_are_exchanged_and_why():
    with mock.patch.object(choose, "_known", return_value=COPY_ENGINE):
        said = Sharding(seqlen=131072, rank=0, ranks=4, token_work=0).describe()
    assert (
        "all 4 ranks exchange heads for tokens where these divide a layer's query heads; predicted to take 0." in said
    )
    assert "else ring: keys go from rank to rank" in said


# What is computed


def _everywhere():
    """Where heads are exchanged wherever they can be."""
    patch = pytest.MonkeyPatch()
    for name in ("AT_ALL", "CLEARLY"):
        patch.setattr(choose_heads, name, 1e9)
    patch.setattr(choose_heads, "LEAST", 0.0)
    patch.setattr(choose, "_choices", Kept(2**20, size=lambda _: 1))
    shardings.clear()
    return patch


def _used(sharding):
    """Masks whose calls exchanged heads."""
    return sorted(index for index, x in sharding._placement._of_heads.items() if x._exchanges)


def _unasked(sharded):
    patch = _everywhere()
    try:
        found = solve_share(sharded)
        return found, [bool(_used(x)) for x in shardings._found.values()]
    finally:
        patch.undo()
        shardings.clear()


EVERY_FEATURE = {"softcap": 2.0, "alibi": "documents", "dropout": 0.5, "padding": True, "sinks": True}


@pytest.mark.parametrize("heads", [(12, 12), (12, 4), (12, 2), (10, 5)], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_feature_gives_what_the_plan_gives(pool, ranks, heads):
    lengths = ((40, 40), (0, 0), (5, 5), (1, 1), (33, 33))
    case = Case(lengths, Rules(left=30, right=4, sink=2), heads, dims=(16, 24), seed=1, **EVERY_FEATURE)
    sharded = ShardedCase(case, dense=False)
    plan = sharded.joined(pool(ranks).run(solve_share, replace(sharded, head_ranks=1)))
    answers, by_heads = zip(*pool(ranks).run(_unasked, replace(sharded, head_ranks=None)), strict=True)
    for found, right in zip(sharded.joined(answers), plan, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert by_heads == ([heads[0] % ranks == 0],) * ranks


def _layers(compiled):
    """Layers of a window, of all keys, and of a mask that the sharding was not made for; eager, or compiled."""
    patch = _everywhere()
    try:
        masks = [Mask.sliding_window(5), Mask.causal()]
        free, plan = (Sharding(masks, seqlen=40, head_ranks=n) for n in (None, 1))
        torch.manual_seed(free.rank)
        leaves = [torch.randn(1, free.tokens, n, 16, requires_grad=True) for n in (4, 2, 2)]
        results = []
        for sharding in (plan, free):

            def layers(*leaves, sharding=sharding):
                found = [attention(*leaves, mask=x, sharding=sharding)[0] for x in (*masks, Mask.sliding_window(3))]
                return sum(x.square().sum() for x in found)

            loss = torch.compile(layers, backend="aot_eager", fullgraph=True) if compiled else layers
            results.append(torch.autograd.grad(loss(*leaves), leaves))
        for found, right in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
        return _used(free), _used(plan)
    finally:
        patch.undo()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_each_mask_goes_its_own_way(pool, compiled):
    for free, plan in pool(2).run(_layers, compiled, timeout=120):
        assert free == [0, 1, 2]
        assert plan == []


class _Noting(Region):
    def attention(self, operator, arguments):
        self.sizes = Settings(*arguments[TENSORS:]).sizes
        return operator(*arguments)[:2]

    def spared(self, size):
        raise NotImplementedError


def _kept_in_a_region():
    patch = _everywhere()
    try:
        sharding = Sharding(seqlen=40)
        query = torch.randn(1, sharding.tokens, 4, 16, requires_grad=True)
        with within(noting := _Noting()):
            out, _ = attention(query, query, query, sharding=sharding)
        again, _ = attention(query, query, query, sharding=sharding)
        found, right = (torch.autograd.grad(x.sum(), query)[0] for x in (out, again))
        torch.testing.assert_close(found, right)
        return noting.sizes, sharding.crossing(None)
    finally:
        patch.undo()


def test_what_is_computed_again_crosses_again(pool):
    for in_a_region, outside in pool(2).run(_kept_in_a_region):
        assert in_a_region == ()
        assert outside == (40, 2, 0)


# What all ranks must find


def test_what_ranks_compare_says_that_queries_may_cross_and_that_heads_may():
    patch = _everywhere()
    patch.setattr(choose, "CLEARLY", 1e9)
    try:
        text = Sharding(Mask.causal(), seqlen=48, partition="contiguous", rank=0, ranks=2)._placement.plan_text(0)
    finally:
        patch.undo()
    assert text.endswith(" with level queries or by heads")


def _named_on_one_rank(head_ranks):
    """Both masks are in the sharding of rank 0; the other's is added by its call."""
    patch = _everywhere()
    try:
        window, causal = Mask.sliding_window(5), Mask.causal()
        first = dist.get_rank() == 0
        sharding = Sharding(
            [causal, window] if first else [causal], seqlen=40, partition="zigzag", head_ranks=head_ranks
        )
        query = torch.randn(1, sharding.tokens, 4, 16, requires_grad=True)
        attention(query, query, query, mask=window, sharding=sharding)[0].sum().backward()
        return query.grad.abs().sum().item() > 0
    finally:
        patch.undo()


@pytest.mark.parametrize("head_ranks", [None, 1, 2])
def test_masks_that_a_call_adds_are_those_that_another_rank_has_named(pool, head_ranks):
    assert pool(2).run(_named_on_one_rank, head_ranks) == [True, True]
