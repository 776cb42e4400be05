"""Partitions hold every position exactly once, evenly, for any length on any number of ranks."""

from __future__ import annotations

from itertools import accumulate

import pytest
from cases import OTHERS, any_mask, blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import NAMES, Partition, resolve


def build(kind: str, mask: Mask, length: int, ranks: int) -> Partition:
    if kind in OTHERS:
        return resolve(kind, length, ranks, mask)
    return Partition.balanced(mask, length, ranks) if kind == "balanced" else getattr(Partition, kind)(length, ranks)


def positions(partition: Partition, rank: int) -> list[int]:
    return [position for start, stop in partition.segments[rank] for position in range(start, stop)]


def tokens(partition: Partition) -> list[int]:
    return [len(positions(partition, rank)) for rank in range(len(partition.segments))]


def work(partition: Partition, mask: Mask, length: int) -> list[int]:
    """Live pairs whose query each rank holds."""
    pairs = [0] * length
    for layer in mask.layers:
        for query in range(length):
            intervals = (layer.sink_interval(query), layer.key_interval(query))
            pairs[query] += sum(max(0, min(stop, length) - start) for start, stop in intervals)
    return [sum(pairs[query] for query in positions(partition, rank)) for rank in range(len(partition.segments))]


def imbalance(amounts: list[int]) -> float:
    return max(amounts) * len(amounts) / sum(amounts)


def packed(lengths: list[int]) -> Mask:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return Mask.causal() & Mask.documents(bounds)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(NAMES), length=st.integers(0, 200), ranks=st.integers(1, 16))
def test_every_position_is_held_exactly_once_in_ascending_segments(data, kind, length, ranks):
    mask = data.draw(any_mask(length)) if length else Mask.causal()
    partition = build(kind, mask, length, ranks)
    assert partition.length == length
    assert len(partition.segments) == ranks
    for segments in partition.segments:
        bounds = [bound for segment in segments for bound in segment]
        assert bounds == sorted(bounds)
        assert all(start < stop for start, stop in segments)
    held = sorted(position for rank in range(ranks) for position in positions(partition, rank))
    assert held == list(range(length))


def test_partitions_that_hold_the_same_are_equal_however_they_are_cut():
    whole = Partition(9, (((0, 2), (5, 9)), ((2, 5),)))
    cut = Partition(9, (((0, 1), (1, 2), (5, 7), (7, 9)), ((2, 3), (3, 5))))
    assert cut == whole
    assert (cut.digest, hash(cut), cut.spec()) == (whole.digest, hash(whole), whole.spec())
    assert Partition.zigzag(10, 2).repeat(2).segments[0] == ((0, 2), (7, 12), (17, 20))


@given(length=st.integers(0, 3000), ranks=st.integers(1, 33))
def test_contiguous_shares_are_one_run_each_and_differ_by_at_most_one_token(length, ranks):
    partition = Partition.contiguous(length, ranks)
    assert all(len(segments) <= 1 for segments in partition.segments)
    assert max(tokens(partition)) - min(tokens(partition)) <= 1
    assert [p for rank in range(ranks) for p in positions(partition, rank)] == list(range(length))


@given(length=st.integers(0, 3000), ranks=st.integers(1, 33))
def test_zigzag_gives_each_rank_an_early_chunk_and_the_late_chunk_that_mirrors_it(length, ranks):
    partition = Partition.zigzag(length, ranks)
    chunk = length / (2 * ranks)
    for rank, segments in enumerate(partition.segments):
        assert len(segments) <= 2
        held = positions(partition, rank)
        assert all(
            rank * chunk - 1 <= p <= (rank + 1) * chunk + 1
            or length - (rank + 1) * chunk - 1 <= p <= length - rank * chunk + 1
            for p in held
        )
    assert max(tokens(partition)) - min(tokens(partition)) <= 2


@given(length=st.integers(0, 300), ranks=st.integers(1, 33))
def test_stripe_deals_out_token_by_token(length, ranks):
    partition = Partition.stripe(length, ranks)
    assert [positions(partition, rank) for rank in range(ranks)] == [[*range(length)][r::ranks] for r in range(ranks)]


@given(lengths=st.lists(st.integers(0, 40), max_size=6), ranks=st.integers(1, 9), kind=st.sampled_from(OTHERS[1:]))
def test_a_partition_of_each_document_cuts_it_as_if_it_were_alone(lengths, ranks, kind):
    """The last one lies behind the boundaries, and is cut as well."""
    edges = [0, *accumulate(lengths)]
    mask = Mask.documents(edges[:-1]) if len(edges) > 2 else Mask.causal()
    partition = resolve(kind, edges[-1], ranks, mask)
    alone = getattr(Partition, kind.removesuffix("_per_document"))
    for rank in range(ranks):
        expected = [
            start + p for start, n in zip(edges, lengths, strict=False) for p in positions(alone(n, ranks), rank)
        ]
        assert positions(partition, rank) == expected


@pytest.mark.parametrize("kind", OTHERS[1:])
def test_what_a_partition_of_each_document_cannot_cut_is_refused(kind):
    with pytest.raises(ArgumentError, match=f"partition='{kind}' takes self-attention"):
        resolve(kind, 8, 2, Mask.documents([0, 3, 8], [0, 4, 8]))
    with pytest.raises(ArgumentError, match=f"partition='{kind}' with documents takes one packed sequence"):
        resolve(kind, 8, 2, Mask.documents([0, 3, 8, 16]), batch=2)
    assert resolve(kind, 8, 2, Mask.documents([0, 8, 16]), batch=2).length == 8
    with pytest.raises(ArgumentError, match=r"documents=\(0, 9\); allowed are boundaries from 0 to length=8"):
        resolve(kind, 8, 2, Mask.documents([0, 9]))


@pytest.mark.parametrize("kind", ["zigzag", "stripe"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_zigzag_and_stripe_balance_causal_work(kind, ranks):
    length = 128 * ranks + 5
    assert imbalance(work(build(kind, Mask.causal(), length, ranks), Mask.causal(), length)) <= 1.02


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(Mask.causal(), id="causal"),
        pytest.param(Mask.sliding_window(200), id="window"),
        pytest.param(Mask.prefix_lm(700), id="prefix"),
        pytest.param(packed([1500, 100, 30, 30, 900, 1, 4, 700, 400, 431]), id="packed"),
        pytest.param(packed([64] * 64), id="packed-short"),
        pytest.param(packed([3000, *[16] * 68, 8]), id="packed-one-long"),
        pytest.param(Mask.causal() & blocks(4096, 4096, 64, seed=4, share=0.2), id="blocks"),
    ],
)
def test_balanced_shares_have_equal_tokens_and_nearly_equal_work(mask, ranks):
    length = 4096
    partition = Partition.balanced(mask, length, ranks)
    assert imbalance(tokens(partition)) <= 1.05
    assert imbalance(work(partition, mask, length)) <= 1.1


@pytest.mark.parametrize("kind", NAMES)
def test_repeat_lays_copies_of_every_share_end_to_end(kind):
    partition = build(kind, Mask.causal(), 11, 3)
    repeated = partition.repeat(4)
    assert repeated.length == 44
    for rank in range(3):
        once = positions(partition, rank)
        assert positions(repeated, rank) == [row * 11 + position for row in range(4) for position in once]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize(("length", "ranks"), [(-1, 2), (5, 0), (5, -3)])
def test_impossible_sizes_are_refused_by_name_and_value(kind, length, ranks):
    bad = ("length", length) if length < 0 else ("ranks", ranks)
    with pytest.raises(ArgumentError, match=f"{bad[0]}.*{bad[1]}"):
        build(kind, Mask.causal(), length, ranks)
