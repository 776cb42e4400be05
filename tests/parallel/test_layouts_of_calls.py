"""Layouts of blocks that come with a call, of groups of heads, as a model's router makes them.

Oracle: each group's heads by themselves on one device, under a mask that has their layout as a part.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from cases import PARTITIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from ringflash import ArgumentError, Mask, RankMismatchError, Sharding
from ringflash.functional import attention
from ringflash.parallel.execution import call
from ringflash.parallel.lookup import shardings
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.parallel.planning import heads as planned

NAMES = ("out", "lse", "query", "key", "value")


@dataclass(frozen=True)
class Problem:
    """Attention under rules and a layout for each of some groups of heads."""

    length: int
    groups: int
    heads: tuple[int, int] = (8, 4)
    sizes: tuple[int, int] = (8, 8)
    rules: Mask = field(default_factory=Mask.causal)
    cu_seqlens: tuple[int, ...] | None = None
    partition: str = "zigzag"
    head_ranks: int | None = 1
    seed: int = 0

    def tensors(self) -> list[torch.Tensor]:
        """query, key, value and the gradient of out, in float64."""
        random = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(1, self.length, self.heads[i], 16, generator=random, dtype=torch.float64) for i in (0, 1, 1, 0)
        ]

    def layout(self) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed + 1)
        counts = (-(-self.length // size) for size in self.sizes)
        return torch.rand(self.groups, *counts, generator=random) < 0.4

    def mask(self) -> Mask:
        return self.rules & Mask.blocks(self.layout(), self.sizes)


def solve(operands: list[torch.Tensor], mask: Mask, **settings) -> list[torch.Tensor]:
    """Out, log-sum-exp (B, s, H) and gradients."""
    *leaves, dout = (x.clone() for x in operands)
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = attention(*leaves, mask=mask, **settings)
    return [out.detach(), lse.detach().transpose(1, 2), *torch.autograd.grad(out, leaves, dout)]


def group_by_group(problem: Problem) -> list[torch.Tensor]:
    found = []
    for group, layout in enumerate(problem.layout()):
        own = [
            x[:, :, x.shape[2] // problem.groups * group : x.shape[2] // problem.groups * (group + 1)]
            for x in problem.tensors()
        ]
        mask = problem.rules & Mask.blocks(layout.tolist(), problem.sizes)
        found.append(solve(own, mask, cu_seqlens=problem.cu_seqlens, group=ONE_DEVICE))
    return [torch.cat(x, 2) for x in zip(*found, strict=True)]


def sharding_of(problem: Problem) -> Sharding:
    return Sharding(
        problem.mask(),
        seqlen=problem.length,
        cu_seqlens=problem.cu_seqlens,
        partition=problem.partition,
        head_ranks=problem.head_ranks,
    )


def on_a_rank(problem: Problem) -> list[torch.Tensor]:
    """The whole results, as this rank gathers them."""
    sharding = sharding_of(problem)
    found = solve([sharding.shard(x, 1) for x in problem.tensors()], problem.mask(), sharding=sharding)
    return [sharding.unshard(x, 1) for x in found]


def assert_right(found: list[torch.Tensor], problem: Problem) -> None:
    for name, x, right in zip(NAMES, found, group_by_group(problem), strict=True):
        torch.testing.assert_close(x, right, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data(), ranks=st.integers(1, 4))
def test_any_layout_of_groups_of_heads_is_what_each_group_gets_alone(pool, data, ranks):
    length = data.draw(st.integers(1, 90))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=3))), length]
    window = Mask.sliding_window(20, sink=3)
    problem = Problem(
        length,
        data.draw(st.sampled_from([1, 2, 4])),
        sizes=data.draw(st.tuples(st.integers(2, 20), st.integers(2, 20))),
        rules=data.draw(st.sampled_from([Mask.causal(), Mask.bidirectional(), window])),
        cu_seqlens=data.draw(st.sampled_from([None, tuple(edges)])),
        partition=data.draw(st.sampled_from(PARTITIONS)),
        seed=data.draw(st.integers(0, 99)),
    )
    for found in pool(ranks).run(on_a_rank, problem):
        assert_right(found, problem)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("ranks", "head_ranks", "heads"), [(2, 2, (8, 4)), (4, 2, (8, 4)), (4, 4, (8, 4)), (4, 4, (12, 4))]
)
def test_ranks_that_exchange_heads_take_the_layouts_of_theirs(pool, ranks, head_ranks, heads, groups):
    problem = Problem(60, groups, heads, head_ranks=head_ranks)
    for found in pool(ranks).run(on_a_rank, problem):
        assert_right(found, problem)


def test_ranks_that_copy_key_heads_take_the_layouts_of_theirs(pool):
    """Four ranks, two key heads: each has half of the queries of one."""
    problem = Problem(60, 2, (8, 2), head_ranks=4)
    for found in pool(4).run(on_a_rank, problem):
        assert_right(found, problem)


def _in_groups(problem: Problem) -> list[torch.Tensor]:
    shardings.clear()  # they know how many groups there are
    with mock.patch.object(planned, "ROOM", 1), mock.patch.object(planned, "LONG", 0):
        return on_a_rank(problem)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_that_are_worked_on_in_groups_take_the_layouts_of_theirs(pool, groups):
    problem = Problem(60, groups)
    for found in pool(2).run(_in_groups, problem):
        assert_right(found, problem)


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_sharding_serves_every_layout_of_its_sizes(pool, ranks):
    for found in pool(ranks).run(_several_layouts):
        for x, right in zip(*found, strict=True):
            torch.testing.assert_close(x, right, atol=1e-6, rtol=1e-6)


def _several_layouts() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    problems = [Problem(50, 2, seed=seed) for seed in (1, 2)]
    sharding, found = sharding_of(problems[0]), []
    for problem in problems:
        out, _ = attention(
            *(sharding.shard(x, 1) for x in problem.tensors()[:3]), mask=problem.mask(), sharding=sharding
        )
        found.append(sharding.unshard(out, 1))
    assert len(sharding.masks) == 1
    return found, [group_by_group(problem)[0] for problem in problems]


def test_a_sharding_keeps_no_layout_that_comes_with_calls():
    mask, sharding = Problem(50, 2).mask(), Sharding(Mask.causal(), seqlen=50)
    of_layout = weakref.ref(mask.blocks_given)
    sharding.handle(mask)
    Sharding(mask, seqlen=50).handle(mask)
    assert [x.routed is not None for x in sharding.masks] == [False, True]
    del mask
    assert of_layout() is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_code_that_routes_and_attends_compiles_once_without_a_break(pool, ranks):
    assert all(pool(ranks).run(_compiled, timeout=120))


def _compiled() -> bool:
    problem = Problem(64, 2)
    sharding = sharding_of(problem)

    def routed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(3, dim=2).indices, True)
        mask = Mask.causal() & Mask.blocks(chosen, problem.sizes)
        return attention(query, key, value, mask=mask, sharding=sharding)[0]

    operands = [sharding.shard(x, 1).requires_grad_() for x in problem.tensors()[:3]]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(routed, fullgraph=True, backend=counter)
    for seed in range(3):
        scores = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(seed))
        found, expected = compiled(*operands, scores), routed(*operands, scores)
        gradients = [torch.autograd.grad(x.sum(), operands) for x in (found, expected)]
        if not (torch.equal(found, expected) and all(map(torch.equal, *gradients))):
            return False
    return counter.frame_count == 1


def test_documents_of_which_the_host_knows_nothing_have_layouts_as_well(monkeypatch):
    """What is made of cu_seqlens on a GPU, made here on the CPU."""
    problem = Problem(70, 2, cu_seqlens=(0, 13, 13, 37, 70))
    expected = group_by_group(problem)
    monkeypatch.setattr(call.Inputs, "on_device", lambda inputs: True)
    monkeypatch.setattr("ringflash.functional.on_a_device", lambda x: isinstance(x, torch.Tensor))
    edges = torch.tensor(problem.cu_seqlens)
    found = solve(problem.tensors(), problem.mask(), cu_seqlens=edges, group=ONE_DEVICE)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, atol=1e-6, rtol=1e-6)


def _of_another_size() -> None:
    problem = Problem(64, 1 if torch.distributed.get_rank() else 2)
    query, key, value, _ = (x[:, :32] for x in problem.tensors())
    attention(query, key, value, mask=problem.mask())


def test_ranks_whose_layouts_differ_in_size_hear_of_it(pool):
    with pytest.raises(RankMismatchError, match="mask"):
        pool(2).run(_of_another_size)


x = torch.randn(1, 16, 4, 8)
LAYOUT = torch.ones(3, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.blocks(LAYOUT.float(), 4), "layout is torch.float32"),
        (lambda: Mask.blocks(LAYOUT[:, :, :0], 4), "layout is torch.bool .3, 4, 0."),
        (lambda: Mask.blocks(LAYOUT[None], 4), "allowed is bool"),
        (lambda: Mask.blocks(LAYOUT, 4) & Mask.blocks(LAYOUT[0], 4), "two of a kind"),
        (lambda: Mask.blocks(LAYOUT, 4) & Mask.blocks(LAYOUT[:1], 4), "such of the same blocks"),
        (lambda: attention(x, x, x, mask=Mask.blocks(LAYOUT, 4)), "groups that divide the 4 key heads"),
        (lambda: attention(x, x, x, mask=Mask.blocks(LAYOUT[:2], 2)), "reaches over 8 queries, .* has 16"),
        (lambda: attention(x, x, x, mask=Mask.blocks(LAYOUT[:2].to("meta"), 4)), "is on meta; allowed is the query's"),
        (
            lambda: attention(x, x, x, sharding=Sharding(Mask.blocks(LAYOUT[:2], 4), seqlen=16)),
            "layout that comes with each call",
        ),
        (lambda: attention(x, x, x, mask=Mask.blocks(LAYOUT[:2], 4).planned()), "its layout of blocks is missing"),
    ],
)
def test_what_is_wrong_with_a_layout_is_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_two_layouts_of_the_same_blocks_show_what_both_show():
    a, b = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    found = attention(x, x, x, mask=Mask.causal() & Mask.blocks(a, 4) & Mask.blocks(b, 4))[0]
    assert torch.equal(found, attention(x, x, x, mask=Mask.causal() & Mask.blocks(a & b, 4))[0])
