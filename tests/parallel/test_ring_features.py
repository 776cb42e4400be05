"""Score modifiers and queries that differ from keys in length mean the same on any number of ranks.

Oracle: the definition in float64, one sequence at a time; for random cases and dropout that of attention_cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from attention_cases import Case as AnyCase
from attention_cases import Rules, cases, wide_heads
from cases import PARTITIONS, blocks, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from ring import place_in
from sharded_cases import ShardedCase, any_sharding, assert_ranks_are_as_exact_as_torch

from ringflash import ArgumentError, Mask, RankMismatchError
from ringflash.functional import attention
from ringflash.parallel.positions.partition import resolve

HEADS, KEY_HEADS, DIM = 4, 2, 16
NAMES = ("out", "lse", "query", "key", "value", "sinks")


@dataclass(frozen=True)
class Case:
    """Arguments of `attention`; per-key arguments are given whole and cut by `share`."""

    mask: Mask = field(default_factory=Mask.causal)
    batch: int = 1
    queries: int = 37
    keys: int = 37
    partition: str = "zigzag"
    padding: bool = False
    sinks: bool = False
    arguments: dict = field(default_factory=dict)

    def tensors(self):
        """query, key, value, sinks, the gradient of out, and the padding mask."""
        generator = torch.Generator().manual_seed(3)
        sizes = ((self.queries, HEADS), (self.keys, KEY_HEADS), (self.keys, KEY_HEADS))
        query, key, value = (torch.randn(self.batch, n, h, DIM, generator=generator) for n, h in sizes)
        sinks = torch.randn(HEADS, generator=generator)
        dout = torch.randn(query.shape, generator=generator)
        visible_keys = torch.rand(self.batch, self.keys, generator=generator) > 0.3
        return query, key, value, sinks, dout, visible_keys

    def rows(self, rank, ranks):
        """Query rows and key rows of a rank."""
        return [
            torch.tensor(
                [p for a, b in resolve(self.partition, n, ranks, self.mask).segments[rank] for p in range(a, b)]
            ).long()
            for n in (self.queries, self.keys)
        ]


def run(case, rank=0, ranks=1):
    """Out, log-sum-exp (B, s, H) and gradients of this rank's rows; the sinks' are this rank's part of a sum."""
    query, key, value, sinks, dout, visible_keys = case.tensors()
    query_rows, key_rows = case.rows(rank, ranks)
    leaves = [query[:, query_rows], key[:, key_rows], value[:, key_rows], sinks]
    leaves = [x.clone().requires_grad_() for x in leaves]
    torch.manual_seed(11)
    out, lse = attention(
        *leaves[:3],
        mask=case.mask,
        seqlen=case.queries,
        key_seqlen=case.keys,
        partition=case.partition,
        key_padding_mask=visible_keys[:, key_rows] if case.padding else None,
        sinks=leaves[3] if case.sinks else None,
        **case.arguments,
    )
    (out * dout[:, query_rows]).sum().backward()
    return [
        out.detach(),
        lse.detach().transpose(1, 2),
        *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves),
    ]


def _run_share(case):
    return run(case, *place_in(None))


def on_ranks(pool, ranks, case):
    shares = pool(ranks).run(_run_share, case)
    query, key, value = case.tensors()[:3]
    whole = [torch.full_like(x, torch.nan) for x in (query, query[..., 0], query, key, value)]
    for rank, share in enumerate(shares):
        query_rows, key_rows = case.rows(rank, ranks)
        for x, part, rows in zip(whole, share, (*[query_rows] * 3, key_rows, key_rows), strict=False):
            x[:, rows] = part
    return [*whole, sum(share[-1] for share in shares)]


def by_definition(case):
    query, key, value, sinks, dout, visible_keys = case.tensors()
    leaves = [x.double().requires_grad_() for x in (query, key, value, sinks)]
    scale = case.arguments.get("scale", DIM**-0.5)
    softcap, slopes = case.arguments.get("softcap", 0.0), case.arguments.get("alibi_slopes")
    aligned = case.mask & Mask.documents([0, case.keys], [0, case.queries])
    seen = visible(case.mask if case.queries == case.keys else aligned, case.queries, case.keys)
    places = torch.arange(case.queries) + case.keys - case.queries
    distance = (places[:, None] - torch.arange(case.keys)).abs()
    outs, sums = [], []
    for row in range(case.batch):
        k, v = (x[row].repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in leaves[1:3])
        scores = torch.einsum("thd,shd->hts", leaves[0][row], k) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if slopes is not None:
            slope = slopes if slopes.dim() == 1 else slopes[row]
            scores = scores - slope.double()[:, None, None] * distance
        hidden = ~(seen & visible_keys[row] if case.padding else seen)
        scores = scores.masked_fill(hidden, -torch.inf)
        if case.sinks:
            sink = leaves[3][:, None, None].expand(-1, case.queries, 1)
            with_sink = torch.cat([scores, sink], dim=-1)
            sums.append(with_sink.logsumexp(-1).T.detach())
            weights = with_sink.softmax(-1)[..., :-1]
        else:
            sums.append(scores.logsumexp(-1).T.detach())
            weights = scores.masked_fill(hidden.all(-1)[:, None], 0.0).softmax(-1).masked_fill(hidden, 0.0)
        outs.append(torch.einsum("hts,shd->thd", weights, v))
    out = torch.stack(outs)
    (out * dout).sum().backward()
    gradients = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return [out.detach(), torch.stack(sums), *gradients]


SLOPES = torch.tensor([0.5, 0.25, 0.03, 0.0])

CASES = {
    "softcap": Case(arguments={"softcap": 3.0}),
    "alibi": Case(arguments={"alibi_slopes": SLOPES}),
    "alibi-bidirectional": Case(Mask.bidirectional(), arguments={"alibi_slopes": SLOPES}),
    "alibi-of-each-sequence": Case(batch=2, arguments={"alibi_slopes": torch.stack([SLOPES, SLOPES.flip(0)])}),
    "padding": Case(batch=2, padding=True),
    "padding-bidirectional": Case(Mask.bidirectional(), batch=2, padding=True),
    "sinks": Case(sinks=True),
    "sinks-window": Case(Mask.sliding_window(6), sinks=True),
    "sinks-padding": Case(Mask.sliding_window(2), sinks=True, padding=True),
    "everything": Case(
        Mask.causal() & Mask.sliding_window(20, sink=3),
        batch=2,
        padding=True,
        sinks=True,
        arguments={"softcap": 4.0, "alibi_slopes": SLOPES, "scale": 0.4},
    ),
    "more-keys": Case(queries=11, keys=37),
    "more-queries": Case(queries=37, keys=11),
    "cross": Case(Mask.bidirectional(), batch=2, queries=9, keys=40),
    "more-keys-window": Case(Mask.sliding_window(7, sink=2), queries=11, keys=37),
    "more-keys-alibi-softcap": Case(queries=5, keys=37, arguments={"softcap": 3.0, "alibi_slopes": SLOPES}),
    "one-query": Case(queries=1, keys=37),
    "blocks-everything": Case(
        blocks(37, 37, (5, 4), seed=6) & Mask.causal() & Mask.sliding_window(20, sink=3),
        batch=2,
        padding=True,
        sinks=True,
        arguments={"softcap": 4.0, "alibi_slopes": SLOPES, "scale": 0.4},
    ),
    "blocks-more-keys": Case(blocks(11, 37, (3, 4), seed=7), queries=11, keys=37, batch=2),
    "blocks-more-queries": Case(blocks(37, 11, 4, seed=8), queries=37, keys=11, arguments={"alibi_slopes": SLOPES}),
}


ALLOWED = [
    pytest.param(name, partition, id=f"{name}-{partition}")
    for name, case in CASES.items()
    for partition in PARTITIONS
    if partition != "balanced" or case.queries == case.keys
]
"""Cases and partitions; "balanced" takes self-attention."""


@pytest.mark.parametrize(("name", "partition"), ALLOWED)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_feature_equals_its_definition(pool, ranks, name, partition):
    case = Case(**{**CASES[name].__dict__, "partition": partition})
    for what, found, expected in zip(NAMES, on_ranks(pool, ranks, case), by_definition(case), strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5, msg=lambda m, x=what: f"{x}: {m}")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def named(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("dense", [True, False], ids=["batch", "packed"])
@settings(max_examples=20)
@given(data=st.data())
def test_any_features_on_any_ranks_are_as_exact_as_torch(pool, dense, dtype, data):
    case = data.draw(cases(dtype, dense, same=data.draw(st.booleans())))
    case = data.draw(st.just(case) | wide_heads(case))
    ranks = data.draw(st.integers(2, 3))
    assert_ranks_are_as_exact_as_torch(pool, ranks, data.draw(any_sharding(case, dense)))


EVERY_FEATURE = {"softcap": 2.0, "alibi": "documents", "dropout": 0.5, "padding": True, "sinks": True}
SELF = ((40, 40), (0, 0), (5, 5), (1, 1), (33, 33))
CROSS = ((40, 52), (0, 3), (5, 0), (1, 70), (33, 33))


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize(
    ("lengths", "partition"),
    [(SELF, "contiguous"), (SELF, "zigzag"), (SELF, "balanced"), (CROSS, "contiguous"), (CROSS, "zigzag")],
    ids=["self-contiguous", "self-zigzag", "self-balanced", "cross-contiguous", "cross-zigzag"],
)
@pytest.mark.parametrize("features", [{}, {"padding": True}, EVERY_FEATURE], ids=["plain", "padding", "every-feature"])
def test_documents_with_padding_and_of_cross_attention(pool, features, lengths, partition, dtype):
    rules = Rules(left=30, right=4, sink=2, chunk=48)
    sharded = ShardedCase(
        AnyCase(lengths, rules, dims=(16, 24), dtype=dtype, **features), dense=False, partition=partition
    )
    for ranks in (2, 3):
        assert_ranks_are_as_exact_as_torch(pool, ranks, sharded)


@pytest.mark.parametrize("partition", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize(
    "case",
    [
        Case(arguments={"dropout": 0.3}),
        Case(batch=2, padding=True, sinks=True, arguments={"dropout": 0.5, "softcap": 5.0, "alibi_slopes": SLOPES}),
        Case(Mask.causal() & Mask.documents([0, 5, 21, 37]), arguments={"dropout": 0.1}),
        Case(blocks(37, 37, (5, 4), seed=9), batch=2, padding=True, arguments={"dropout": 0.4, "softcap": 5.0}),
    ],
    ids=["causal", "with-all", "documents", "blocks"],
)
def test_dropout_drops_the_same_pairs_on_any_number_of_ranks(pool, case, partition):
    case = Case(**{**case.__dict__, "partition": partition})
    alone = run(case)
    without = run(Case(**{**case.__dict__, "arguments": {**case.arguments, "dropout": 0.0}}))
    assert (alone[0] - without[0]).abs().max() > 0.05
    for ranks in (2, 4):
        for found, expected in zip(on_ranks(pool, ranks, case), alone, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def _slopes_of_documents(cu_seqlens, slopes):
    rank, ranks = place_in(None)
    case = Case()
    query, key, value = case.tensors()[:3]
    rows, _ = case.rows(rank, ranks)
    mine = (x[:, rows] for x in (query, key, value))
    return attention(*mine, cu_seqlens=cu_seqlens, alibi_slopes=slopes, seqlen=case.queries)[0]


def test_each_document_may_have_its_own_slopes(pool):
    case, cuts = Case(), [0, 5, 21, 37]
    slopes = torch.stack([SLOPES, SLOPES.flip(0), 2 * SLOPES])
    query, key, value = case.tensors()[:3]
    expected = torch.empty_like(query)
    for document, (start, stop) in enumerate(pairwise(cuts)):
        parts = (x[:, start:stop] for x in (query, key, value))
        expected[:, start:stop] = attention(*parts, alibi_slopes=slopes[document])[0]
    for ranks in (1, 2, 3):
        whole = torch.empty_like(query)
        for rank, share in enumerate(pool(ranks).run(_slopes_of_documents, cuts, slopes)):
            whole[:, case.rows(rank, ranks)[0]] = share
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


def _disagree(name, values):
    rank = dist.get_rank()
    x = torch.randn(1, 6, 2, 16)
    arguments = {name: values[rank]} if values[rank] is not None else {}
    with pytest.raises(RankMismatchError, match=name) as error:
        attention(x, x, x, **arguments)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("softcap", (2.0, 3.0)),
        ("dropout", (0.1, 0.2)),
        ("key_padding_mask", (None, torch.ones(1, 6, dtype=torch.bool))),
        ("alibi_slopes", (None, torch.ones(2))),
        ("mask", tuple(blocks(600, 600, 6, seed=seed) for seed in (0, 1))),
    ],
)
def test_ranks_with_different_features_are_notified(pool, name, values):
    pool(2).run(_disagree, name, values, timeout=15)


def _documents_in_all_ways(cuts):
    rank, case = dist.get_rank(), Case()
    query, key, value = (x[:, case.rows(rank, 3)[0]] for x in case.tensors()[:3])
    ways = [{"cu_seqlens": cuts}, {"cu_seqlens": torch.tensor(cuts)}, {"mask": Mask.causal() & Mask.documents(cuts)}]
    found = [attention(query, key, value, seqlen=case.queries, **ways[(rank + turn) % 3])[0] for turn in range(3)]
    assert all(torch.equal(found[0], out) for out in found)


def test_ranks_may_pass_the_same_documents_in_different_ways(pool):
    pool(3).run(_documents_in_all_ways, [0, 5, 21, 37], timeout=15)


def _layout_too_short_on_one(expected):
    x = torch.randn(1, 6, 2, 16)
    length = (12, 11)[dist.get_rank()]
    with pytest.raises(
        expected[dist.get_rank()], match="layout reaches over 11 queries, a document or sequence has 12"
    ):
        attention(x, x, x, mask=blocks(length, length, 1, seed=0))


def test_a_layout_that_is_too_short_is_refused_before_communication(pool):
    pool(2).run(_layout_too_short_on_one, (RankMismatchError, ArgumentError), timeout=15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes.*\(3,\)"),
        ({"alibi_slopes": torch.ones(2).double()}, r"alibi_slopes.*float64"),
        ({"key_padding_mask": torch.ones(1, 5, dtype=torch.bool)}, r"key_padding_mask.*\(1, 5\)"),
        ({"key_padding_mask": torch.ones(1, 6)}, r"key_padding_mask.*float32"),
        ({"sinks": torch.ones(3)}, r"sinks.*\(3,\)"),
        ({"query_cu_seqlens": [0, 6]}, "query_cu_seqlens"),
    ],
    ids=str,
)
def test_values_that_are_not_supported_are_refused_by_name(arguments, message):
    x = torch.randn(1, 6, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        attention(x, x, x, **arguments)
