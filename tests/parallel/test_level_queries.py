"""Queries that cross to level shares inside of attention give what they give where they stay, whatever the mask."""

from __future__ import annotations

import pickle
from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from attention_cases import Answer, cases, tensors
from attention_cases import assert_as_exact_as_torch as assert_answer
from cases import Shape, any_partition, assert_as_exact_as_torch, masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ring import Problem, attend_share, joined
from sharded_cases import ShardedCase, any_sharding, solve_share

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.kernels.kept import Kept
from ringflash.parallel.execution.row_crossing import RowCrossing
from ringflash.parallel.lookup import shardings
from ringflash.parallel.planning import choose
from ringflash.parallel.planning.level_queries import level_queries
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import count, intersect


@settings(max_examples=100)
@given(any_partition(40, 6))
def test_level_shares_are_those_of_a_zigzag_and_ranks_keep_what_they_can(partition):
    level = level_queries(partition)
    assert level is not None
    assert sorted(level.segments) == sorted(Partition.zigzag(partition.length, partition.ranks).segments)
    if partition == Partition.contiguous(40, partition.ranks):  # one of its two halves
        kept = [count(intersect(a, b)) for a, b in zip(partition.segments, level.segments, strict=True)]
        assert all(2 * x >= n - 1 for x, n in zip(kept, partition.counts(), strict=True))


def test_they_cross_where_shares_are_uneven_under_a_long_mask_and_nothing_is_named():
    def described(partition: str, mask: Mask | None = None, seqlen: int = 131072, **options: object) -> str:
        mask = mask or Mask.causal()
        return Sharding(mask, seqlen=seqlen, partition=partition, rank=1, ranks=4, **options).describe()

    assert "queries cross to level shares" in described("contiguous")
    for said in (
        described("zigzag"),
        described("stripe", seqlen=4096),
        described("contiguous", Mask.bidirectional()),
        described("contiguous", Mask.sliding_window(1024)),
        described("contiguous", seqlen=512),
        described("contiguous", plan="ring"),
        described("contiguous", head_ranks=4),
        described("contiguous", hosts=2),
    ):
        assert "queries cross" not in said


@contextmanager
def _always() -> Generator[list[str]]:
    """Queries cross wherever they could; notes each time that they do."""
    noted: list[str] = []
    made = RowCrossing.__init__

    def note(self: RowCrossing, *arguments: object) -> None:
        noted.append("crossed")
        made(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "CLEARLY", 1e9)
        patch.setattr(choose, "_choices", Kept(2**20, size=lambda _: 1))
        patch.setattr(RowCrossing, "__init__", note)
        shardings.clear()
        yield noted
    shardings.clear()


def _attend(problem: Problem) -> dict[str, torch.Tensor]:
    with _always() as noted:
        found = attend_share(problem)
    assert len(noted) == 2  # forward and backward
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["causal", "bidirectional", "documents-causal", "window-sink", "prefix"])
def test_attention_of_queries_that_cross_equals_one_device(pool, ranks, name):
    for partition, shape in (("contiguous", Shape(length=61)), ("balanced", Shape(length=37, batch=2))):
        if partition == "balanced" and "documents" in name:
            continue  # of several sequences
        problem = Problem(masks(shape.length)[name], shape, partition)
        results = joined(problem, pool(ranks).run(_attend, problem))
        assert_as_exact_as_torch(results, problem.inputs(), problem.seen)


def _solve(sharded: ShardedCase) -> Answer:
    with _always():
        return solve_share(sharded)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dense=st.booleans(), ranks=st.integers(2, 4))
def test_any_features_are_as_exact_as_torch(pool, data, dense, ranks):
    case = data.draw(cases(torch.float32, dense=dense))
    sharded = data.draw(any_sharding(case, dense))
    assert_answer(sharded.joined(pool(ranks).run(_solve, sharded)), case, tensors(case))


def _kept_pairs(cross: bool) -> torch.Tensor:
    """Each number of out shows the fate of one pair."""
    length, heads = 48, 4
    query, value = torch.zeros(1, length, heads, 16), torch.eye(length)[None, :, None].expand(1, length, heads, length)
    with _always() as noted:
        sharding = Sharding(Mask.causal(), seqlen=length, partition="contiguous", plan=None if cross else "ring")
        mine = [sharding.shard(x, 1) for x in (query, query, value)]
        out, _ = attention(*mine, sharding=sharding, dropout=0.5, dropout_seed=torch.tensor([17]))
        assert bool(noted) == cross
        return sharding.unshard(out, 1) != 0


def test_the_same_pairs_drop(pool):
    (stay, *_), (cross, *_) = (pool(3).run(_kept_pairs, cross) for cross in (False, True))
    assert torch.equal(stay, cross)


def _fails(where: str, rank: int) -> str:
    with _always(), pytest.MonkeyPatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no more memory")

        x = torch.randn(1, 10, 2, 8, requires_grad=True)
        sharding = Sharding(seqlen=30, partition="contiguous")
        if where == "attend_backward":
            out, _ = attention(x, x, x, sharding=sharding)
        if dist.get_rank() == rank:
            patch.setattr(blockwise, where, fail)
        try:
            if where == "attend":
                attention(x, x, x, sharding=sharding)
            else:
                torch.autograd.grad(out.sum(), x)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "went well"


@pytest.mark.parametrize("where", ["attend", "attend_backward"])
def test_an_error_in_a_kernel_of_one_rank_is_heard_by_all(pool, where):
    said = pool(3).run(_fails, where, 1)
    assert "no more memory" in said[1]
    assert all("rank 1" in said[rank] for rank in (0, 2)), said


def _compiled() -> bool:
    with _always() as noted:
        sharding = Sharding(seqlen=30, partition="contiguous")
        leaves = [torch.randn(1, 10, 2, 8, requires_grad=True) for _ in range(3)]

        def both(attend):
            out = attend(*leaves, sharding=sharding)[0]
            return out, *torch.autograd.grad(out.square().sum(), leaves)

        torch._dynamo.reset()
        expected = both(attention)
        before = len(noted)
        found = both(torch.compile(attention, fullgraph=True, backend="aot_eager"))
        assert len(noted) == 2 * before == 4
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled_and_pickled_they_cross_as_well(pool):
    assert all(pool(3).run(_compiled, timeout=120))
    sharding = Sharding(seqlen=131072, partition="contiguous", rank=0, ranks=4)
    assert pickle.loads(pickle.dumps(sharding)).describe() == sharding.describe()


def test_where_level_queries_need_no_keys_of_others_they_stay():
    layout = [[(i, j) in ((3, 1), (1, 2)) for j in range(4)] for i in range(4)]
    mask, held = Mask.blocks(layout, 8), Partition.contiguous(32, 2)
    level = level_queries(held)
    assert level is not None
    assert not choose.choose(mask, level, held).predicted
    assert choose.choose(mask, held).predicted
    assert choose.choose(mask, held, level=level).level is None
