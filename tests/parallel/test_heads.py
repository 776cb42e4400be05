"""Heads for tokens: any number of ranks that exchange them compute what the ring, one device and the definition do."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import chain

import pytest
import torch
from attention_cases import Case, Rules, cases
from cases import Shape, any_mask, any_partition, exact, inputs, problems, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from ring import Problem, assert_ring_is_exact
from sharded_cases import ShardedCase, any_sharding, assert_ranks_are_as_exact_as_torch, solve_share
from torch.utils.checkpoint import checkpoint

from ringflash import ArgumentError, DistributedFlashAttention, Mask, RankMismatchError, Sharding, shard_batch
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.parallel.planning.generators import NAMES as PLANS
from ringflash.parallel.planning.heads import MOST_RUNS, HeadShares, UnionRows
from ringflash.parallel.positions.segments import normalize
from ringflash.parallel.transport.head_exchange import Sections
from ringflash.parallel.transport.select import GroupTransport

SPLITS = [(2, 2), (3, 3), (4, 2), (4, 4)]
"""Ranks, and how many of them exchange heads."""

HEADS = [(12, 12), (12, 6), (12, 4), (12, 3), (12, 2), (12, 1)]
"""Query and key heads: for each split some that divide, some that do not, and fewer key heads than ranks."""


# Which heads and rows go where


@given(mine=st.integers(1, 6), group=st.integers(1, 6), ranks=st.integers(1, 6))
def test_each_query_head_finds_its_key_head_on_its_rank(mine, group, ranks):
    heads = mine * ranks
    key_heads = heads // group if heads % group == 0 else 1
    shares = HeadShares.of(heads, key_heads, ranks)
    assert len(shares.key_heads) == ranks * shares.keys
    assert shares.copied == (len(set(shares.key_heads)) < len(shares.key_heads))
    for head in range(heads):
        rank, place = divmod(head, shares.queries)
        of_key = rank * shares.keys + place // (shares.queries // shares.keys)
        assert shares.key_heads[of_key] == head // (heads // key_heads)


@settings(max_examples=50)
@given(problem=problems(40, 6))
def test_rows_arrive_in_the_order_of_their_union_or_are_brought_into_it(problem):
    _, partition = problem
    shares = partition.segments
    rows = UnionRows.of(shares, torch.device("cpu"))
    arriving = torch.full((partition.length,), -1)
    for rank, runs in enumerate(rows.runs):
        for first, last, there in runs:
            arriving[there : there + last - first] = partition.positions(rank)[first:last]
    assert rows.counts == tuple(partition.counts())
    if rows.order is None:
        assert arriving.tolist() == list(range(partition.length))
        assert max(map(len, rows.runs)) <= MOST_RUNS
    else:
        assert arriving[rows.order].tolist() == list(range(partition.length))
        assert torch.equal(arriving[rows.order][rows.back], arriving)
        assert max(map(len, rows.runs)) == 1


@settings(max_examples=50)
@given(problem=problems(40, 6))
def test_ranks_that_stand_for_one_hold_what_they_hold_together(problem):
    _, partition = problem
    for together in (x for x in range(1, partition.ranks + 1) if partition.ranks % x == 0):
        unions = partition.merged(together)
        assert unions.ranks == partition.ranks // together
        for rank in range(unions.ranks):
            shares = partition.segments[rank * together : (rank + 1) * together]
            assert unions.segments[rank] == normalize(chain(*shares))


# Results


@pytest.mark.parametrize("dense", [True, False], ids=["batch", "packed"])
@pytest.mark.parametrize(("ranks", "head_ranks"), SPLITS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_case_is_as_exact_as_torch(pool, ranks, head_ranks, dense, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    case = data.draw(cases(dtype, dense, same=data.draw(st.booleans())))
    case = replace(case, heads=data.draw(st.sampled_from(HEADS)))
    sharded = replace(data.draw(any_sharding(case, dense)), head_ranks=head_ranks)
    assert_ranks_are_as_exact_as_torch(pool, ranks, sharded)


@pytest.mark.parametrize(("ranks", "head_ranks"), SPLITS)
@settings(max_examples=10)
@given(data=st.data(), length=st.integers(1, 50), heads=st.sampled_from(HEADS))
def test_any_mask_under_any_partition_also_with_ranks_without_tokens(pool, ranks, head_ranks, data, length, heads):
    shape = Shape(data.draw(st.integers(1, 2)), length, *heads)
    mask = data.draw(any_mask(length)) if shape.batch == 1 else Mask.causal()
    partition = data.draw(any_partition(length, ranks) | st.sampled_from(["stripe", "contiguous"]))
    assert_ring_is_exact(pool, ranks, Problem(mask, shape, partition, head_ranks=head_ranks))


def _by_plan(plan, hosts, cuts):
    """Six ranks in three unions."""
    *whole, dout = inputs(Shape(length=41, heads=4, key_heads=1))
    sharding = Sharding(cu_seqlens=cuts, plan=plan, hosts=hosts, head_ranks=2)
    leaves = [sharding.shard(x, 1).requires_grad_() for x in whole]
    out, _ = attention(*leaves, sharding=sharding)
    gradients = torch.autograd.grad(out, leaves, sharding.shard(dout, 1))
    return [sharding.unshard(x.detach(), 1) for x in (out, *gradients)]


@pytest.mark.parametrize(("plan", "hosts"), [*((name, 1) for name in PLANS), ("double-ring", 3)])
def test_heads_are_the_outer_part_of_any_plan(pool, plan, hosts):
    for cuts in ([0, 41], [0, 13, 17, 41]):
        expected = exact(
            inputs(Shape(length=41, heads=4, key_heads=1)), visible(Mask.causal() & Mask.documents(cuts), 41)
        )
        for found in pool(6).run(_by_plan, plan, hosts, cuts):
            for x, right in zip(found, expected.values(), strict=True):
                torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)


EVERY_FEATURE = {"softcap": 2.0, "alibi": "documents", "dropout": 0.5, "padding": True, "sinks": True}
RULES = Rules(left=30, right=4, sink=2, chunk=48)


@pytest.mark.parametrize("heads", HEADS, ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize(("ranks", "head_ranks"), SPLITS)
def test_every_feature_at_once_gives_what_the_ring_gives(pool, ranks, head_ranks, heads):
    lengths = ((40, 40), (0, 0), (5, 5), (1, 1), (33, 33))
    case = Case(lengths, RULES, heads, dims=(16, 24), seed=1, **EVERY_FEATURE)
    ring = ShardedCase(case, dense=False, partition="zigzag")
    answers = [
        sharded.joined(pool(ranks).run(solve_share, sharded))
        for sharded in (ring, replace(ring, head_ranks=head_ranks))
    ]
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(x.abs().max() > 0.01 for x in answers[0])


def _pairs_that_are_kept(head_ranks, partition):
    """Values are unit vectors, so each number of out shows the fate of one pair."""
    length, heads, key_heads = 29, 6, 2
    sharding = Sharding(Mask.causal(), seqlen=length, partition=partition, head_ranks=head_ranks)
    query, key = torch.zeros(1, length, heads, 8), torch.zeros(1, length, key_heads, 8)
    value = torch.eye(length)[None, :, None].expand(1, length, key_heads, length)
    mine = [sharding.shard(x, 1) for x in (query, key, value)]
    out, _ = attention(*mine, sharding=sharding, dropout=0.5, dropout_seed=torch.tensor([17]))
    return sharding.unshard(out, 1) != 0


@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
def test_dropout_drops_the_very_pairs_that_it_drops_on_one_device_and_in_the_ring(pool, partition):
    alone = _pairs_that_are_kept(1, partition)
    assert 0.4 < alone.sum() / (6 * 29 * 30 / 2) < 0.6
    assert not torch.equal(alone[:, :, :3], alone[:, :, 3:])  # heads have pairs of their own
    for ranks, head_ranks in [(2, 1), (2, 2), (3, 3), (4, 2)]:
        for kept in pool(ranks).run(_pairs_that_are_kept, head_ranks, partition):
            assert torch.equal(kept, alone)


def _interfaces(head_ranks):
    """The same attention by a sharding, by the function, by the module, and by a batch's sharding."""
    mask, cuts = Mask.causal(), [0, 9, 40]
    *whole, dout = inputs(Shape(length=40))
    sharding = Sharding(mask, cu_seqlens=cuts, partition="balanced", head_ranks=head_ranks)
    batch = shard_batch({"input_ids": torch.arange(40)[None], "cu_seqlens": cuts}, head_ranks=head_ranks)
    assert batch["sharding"].head_ranks == sharding.head_ranks == head_ranks
    words = {"partition": "balanced", "head_ranks": head_ranks}
    module = DistributedFlashAttention(mask, **words)
    documents = {"cu_seqlens": torch.tensor(cuts), "seqlen": 40}
    found = []
    for of, call in (
        (sharding, lambda *x: attention(*x, sharding=sharding)[0]),
        (sharding, lambda *x: module(*x, sharding=sharding)),
        (sharding, lambda *x: module(*x, **documents)),
        (sharding, lambda *x: attention(*x, **documents, **words)[0]),
        (batch["sharding"], lambda *x: module(*x, sharding=batch["sharding"])),
        (sharding, lambda *x: attention(*x, sharding=pickle.loads(pickle.dumps(sharding)))[0]),
    ):
        leaves = [of.shard(x, 1).requires_grad_() for x in whole]
        out = call(*leaves)
        gradients = torch.autograd.grad(out, leaves, of.shard(dout, 1))
        found.append([of.unshard(x.detach(), 1) for x in (out, *gradients)])
    return found


@pytest.mark.parametrize(("ranks", "head_ranks"), [(2, 2), (4, 2)])
def test_every_interface_takes_it(pool, ranks, head_ranks):
    expected = exact(inputs(Shape(length=40)), visible(Mask.causal() & Mask.documents([0, 9, 40]), 40))
    for of_rank in pool(ranks).run(_interfaces, head_ranks):
        for found in of_rank:
            for x, right in zip(found, expected.values(), strict=True):
                torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)


def _differentiated(head_ranks, cuts):
    """Gradients by autograd, compiled, through a checkpoint, and by torch.func, of packings of one length."""
    torch._dynamo.reset()
    function = lambda q, k, v, s: attention(q.sin(), k, v, sharding=s)[0].square()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for edges in cuts:
        sharding = Sharding(cu_seqlens=edges, partition="balanced", head_ranks=head_ranks)
        *whole, _ = inputs(Shape(length=24))
        leaves = [sharding.shard(x, 1).clone().requires_grad_() for x in whole]
        expected = torch.autograd.grad(function(*leaves, sharding).sum(), leaves)
        for out in (compiled(*leaves, sharding), checkpoint(function, *leaves, sharding, use_reentrant=False)):
            torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)
        out, backward = torch.func.vjp(lambda *x: function(*x, sharding), *[x.detach() for x in leaves])  # noqa: B023
        torch.testing.assert_close(backward(torch.ones_like(out)), expected)


@pytest.mark.parametrize(("ranks", "head_ranks"), [(2, 2), (4, 2)])
def test_what_is_kept_serves_every_way_of_differentiating(pool, ranks, head_ranks):
    pool(ranks).run(_differentiated, head_ranks, [[0, 24], [0, 7, 24], [0, 3, 20, 24]], timeout=120)


# What it costs, and what it leaves alone


class Exchanges:
    """The exchanges of heads while it is open: for each how many bytes are sent, and the kinds of what travels."""

    def __enter__(self):
        self.sent, self.kinds, self._patch = [], [], pytest.MonkeyPatch()
        transfer, layout = GroupTransport.transfer, Sections.__init__

        def noted(transport, sends, receives, what, *since):
            if what == "heads":
                self.sent.append(sum(x.nbytes for _, x in sends))
            return transfer(transport, sends, receives, what, *since)

        def laid_out(sections, kinds):
            self.kinds.append(kinds)
            layout(sections, kinds)

        self._patch.setattr(GroupTransport, "transfer", noted)
        self._patch.setattr(Sections, "__init__", laid_out)
        return self

    def __exit__(self, *_):
        self._patch.undo()


def _of_some(which, key_length):
    """Gradients of one or two tensors, how often rows travelled in each pass, and how many bytes came back."""
    *whole, dout = _tensors(key_length)
    sharding = Sharding(Mask.bidirectional(), seqlen=30, key_seqlen=key_length, head_ranks=3)
    leaves = [sharding.shard(x, 1, keys=i > 0) for i, x in enumerate(whole)]
    wanted = [leaves[i].requires_grad_() for i in which]
    with Exchanges() as forward:
        out, _ = attention(*leaves, sharding=sharding)
    with Exchanges() as backward:
        gradients = torch.autograd.grad(out, wanted, sharding.shard(dout, 1))
    whole = [sharding.unshard(x, 1, keys=i > 0) for i, x in zip(which, gradients, strict=True)]
    return whole, (len(forward.sent), len(backward.sent)), backward.sent


def _tensors(key_length):
    """Query, key, value and dout; 16 numbers of fp32 are whole 16 bytes."""
    query, _, _, dout = inputs(Shape(length=30, heads=12, key_heads=3))
    _, key, value, _ = inputs(Shape(length=key_length, heads=12, key_heads=3))
    return query, key, value, dout


@pytest.mark.parametrize("key_length", [30, 21])
@pytest.mark.parametrize("which", [[0], [1], [2], [1, 2], [0, 2]], ids=str)
def test_gradients_of_some_tensors_are_those_of_all_and_nothing_else_comes_home(pool, which, key_length):
    everything = _tensors(key_length)
    expected = [*exact(everything, visible(Mask.bidirectional(), 30, key_length)).values()][1:]
    returned = 0
    for found, exchanges, sent in pool(3).run(_of_some, which, key_length):
        for x, i in zip(found, which, strict=True):
            torch.testing.assert_close(x.double(), expected[i], atol=2e-5, rtol=2e-5)
        assert exchanges == (2, 2)
        again = 0 if key_length == 30 else 10 * 64 + 7 * 2 * 16  # numbers of query, key and value
        assert sent[0] == 2 * 4 * (10 * 64 + again) + 2 * 10 * 32  # beside dout's, log-sum-exp and delta
        returned += sent[-1]
    assert returned == sum(everything[i].nbytes * 2 // 3 for i in which)  # two thirds of the heads are elsewhere


def _saved(head_ranks):
    """Bytes that one call keeps for its backward pass."""
    *whole, _ = inputs(Shape(length=512, heads=8, key_heads=4))
    sharding = Sharding(seqlen=512, head_ranks=head_ranks)
    leaves = [sharding.shard(x, 1).requires_grad_() for x in whole]
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        kept = attention(*leaves, sharding=sharding)
    assert kept[0].requires_grad
    return sum(storages.values())


def test_what_crossed_is_kept_in_place_of_what_it_was(pool):
    for ring, heads in zip(pool(4).run(_saved, 1), pool(4).run(_saved, 4), strict=True):
        assert 0.95 < heads / ring < 1.05


def _repeat(key_heads):
    """Kinds of gradients on their way back; they are the same each time."""
    *whole, dout = (x.bfloat16() for x in inputs(Shape(length=30, heads=12, key_heads=key_heads)))
    sharding = Sharding(seqlen=30, head_ranks=3)
    leaves = [sharding.shard(x, 1).requires_grad_() for x in whole]
    runs = []
    for _ in range(3):
        out, _ = attention(*leaves, sharding=sharding)
        with Exchanges() as exchanges:
            runs.append(torch.autograd.grad(out, leaves, sharding.shard(dout, 1)))
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))
    return [dtype for _, _, dtype in exchanges.kinds[-1]]


@pytest.mark.parametrize(("key_heads", "dtype"), [(3, torch.bfloat16), (12, torch.bfloat16), (1, torch.float32)])
def test_gradients_of_key_heads_repeat_and_travel_in_fp32_where_they_are_sums(pool, key_heads, dtype):
    for dtypes in pool(3).run(_repeat, key_heads):
        assert dtypes == [torch.bfloat16, dtype, dtype]


def _what_a_rank_holds():
    labels = torch.arange(48).view(2, 24)
    with_heads, ring = (Sharding(batch=2, seqlen=24, head_ranks=n) for n in (2, 1))
    assert with_heads.spans() == ring.spans()
    assert torch.equal(with_heads.position_ids, ring.position_ids)
    assert torch.equal(with_heads.labels(labels), ring.labels(labels))
    assert torch.equal(with_heads.unshard(with_heads.shard(labels, 1), 1), labels)
    assert with_heads.digest != ring.digest
    assert with_heads.tokens == ring.tokens


def test_what_a_rank_holds_does_not_depend_on_it(pool):
    pool(4).run(_what_a_rank_holds)


# Refusals


def _refused():
    x = torch.randn(1, 6, 6, 8)
    for arguments, message in (
        ({"head_ranks": 3}, "head_ranks=3; allowed are numbers that divide the 4 ranks"),
        ({"head_ranks": 0}, "head_ranks=0; allowed are numbers that divide the 4 ranks"),
        ({"head_ranks": 2.0}, "head_ranks=.*2.0.*; allowed are integers"),
        ({"head_ranks": 4}, "query has 6 heads, head_ranks=4; the first must be a multiple"),
        ({"sharding": Sharding(seqlen=24, head_ranks=4)}, "query has 6 heads, head_ranks=4"),
        ({"sharding": Sharding(seqlen=24), "head_ranks": 2}, "head_ranks beside sharding"),
    ):
        # All ranks refuse it, so nobody waits; then the next one compares with nothing that is left.
        with pytest.raises((ArgumentError, RankMismatchError), match=message):
            attention(x, x, x, **arguments)
    attention(x, x, x, head_ranks=2)


def test_what_cannot_be_divided_is_refused_by_name_and_shifts_no_rank(pool):
    pool(4).run(_refused)
    for arguments in ({"ranks": 4, "head_ranks": 3}, {"ranks": 2, "head_ranks": 4}, {"ranks": 1, "head_ranks": 2}):
        with pytest.raises(ArgumentError, match=f"head_ranks={arguments['head_ranks']}; allowed are numbers that"):
            Sharding(seqlen=8, rank=0, **arguments)


def _launches(head_ranks):
    """Sizes of the launches of one forward pass: rows and heads of the query, rows of keys."""
    *whole, _ = inputs(Shape(length=40, heads=4, key_heads=2))
    sharding = Sharding(seqlen=40, partition="contiguous", head_ranks=head_ranks, plan="ring")
    kernel, sizes = blockwise.attend, []

    def attend(query, key, *others, **settings):
        sizes.append((*query.shape[:2], *key.shape[:2]))
        return kernel(query, key, *others, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "attend", attend)
        attention(*[sharding.shard(x, 1) for x in whole], sharding=sharding)
    return sizes


def test_ranks_work_on_the_heads_and_tokens_that_are_theirs(pool):
    assert pool(4).run(_launches, 4) == [[(40, 1, 40, 1)]] * 4
    assert pool(4).run(_launches, 2) == [[(20, 2, 20, 1)]] * 2 + [[(20, 2, 20, 1)] * 2] * 2
    assert pool(4).run(_launches, 1)[3] == [(10, 4, 10, 2)] * 4


def test_what_a_device_needs_is_made_ahead_and_counted():
    """In a loader's thread, without a group; nothing lies there where ranks arrive in order."""
    device, sizes = torch.device("cpu"), {}
    for partition in ("stripe", "zigzag", "contiguous"):
        for head_ranks in (1, 4):
            sharding = Sharding(seqlen=4096, rank=1, ranks=4, partition=partition, head_ranks=head_ranks)
            before = sharding.nbytes()
            sharding.prepare(device)
            sizes[partition, head_ranks] = sharding.nbytes() - before
            assert pickle.loads(pickle.dumps(sharding)).nbytes() == before
            prepared, rows = sharding.nbytes(), sharding.shard(torch.zeros(4096), 0)
            assert sharding.nbytes() - prepared == len(rows) * 8  # where they are taken from
    assert sizes["zigzag", 4] == sizes["contiguous", 4]
    assert sizes["stripe", 4] - sizes["contiguous", 4] == 2 * 4096 * 8  # order and back, the same of queries and keys
