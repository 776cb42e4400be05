"""Partitions hold every position exactly once, evenly, for any length on any number of ranks."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise, product

import pytest
from cases import OTHERS, any_mask, blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.balance import CELLS, TILE, Clock
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import NAMES, Partition, default_partition, resolve
from ringflash.parallel.positions.segments import count, intersect
from ringflash.parallel.positions.visibility import needed_keys


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


# Shares that take equally long


def predicted(partition: Partition, masks: dict[Mask, int], token_work: int) -> list[int]:
    """Time of each rank in pairs: that of tiles around each query, and of the rest of the layers."""
    assert partition.length <= CELLS, "longer sequences are looked at in places only"
    time = [sum(masks.values()) * token_work] * partition.length
    for mask, layers in masks.items():
        time = [a + layers * b for a, b in zip(time, keys_of_tiles(mask, partition.length), strict=True)]
    return [sum(max(1, time[query]) for query in positions(partition, rank)) for rank in range(partition.ranks)]


@lru_cache(maxsize=4)
def keys_of_tiles(mask: Mask, length: int) -> list[int]:
    """What the first and the last query of a tile around each query see, in whole tiles."""
    keys = [0] * length
    for query in range(length):
        first, last = max(0, query - TILE // 2), min(length - 1, query + TILE // 2 - 1)
        for layer in mask.layers:
            for seen in (layer.key_interval, layer.sink_interval):
                keys[query] += -(-max(0, min(seen(last)[1], length) - seen(first)[0]) // TILE) * TILE
    return keys


def cut_documents(partition: Partition, boundaries: Sequence[int]) -> int:
    """How many documents lie on more than one rank."""
    owner = [0] * partition.length
    for rank in range(partition.ranks):
        for position in positions(partition, rank):
            owner[position] = rank
    return sum(len(set(owner[start:stop])) > 1 for start, stop in pairwise(boundaries))


@st.composite
def packings(draw: st.DrawFn) -> Mask:
    """Causal documents of any lengths, some of them long."""
    lengths = draw(st.lists(st.integers(1, 300) | st.integers(1, 2000), min_size=2, max_size=40))
    mask = packed(lengths)
    return mask & Mask.sliding_window(draw(st.integers(0, 400))) if draw(st.booleans()) else mask


@settings(max_examples=80, deadline=None)
@given(mask=packings(), ranks=st.integers(1, 12), token_work=st.sampled_from([0, 500, 20_000]))
def test_balanced_shares_take_equally_long_and_hold_no_more_tokens_than_allowed(mask, ranks, token_work):
    """As long as a token's time is little of a rank's: with a handful of tokens on each nothing can be level."""
    length = mask.boundaries[-1]
    partition = Partition.balanced(mask, length, ranks, token_work=token_work)
    assert max(tokens(partition)) <= max(-(-length // ranks), int(1.2 * length / ranks))
    assert min(tokens(partition)) >= min(1, length // ranks)
    if length >= 200 * ranks:
        assert imbalance(predicted(partition, {mask: 1}, token_work)) <= 1.05


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(Mask.causal(), id="causal"),
        pytest.param(Mask.sliding_window(200), id="window"),
        pytest.param(Mask.prefix_lm(700), id="prefix"),
        pytest.param(Mask.causal() & Mask.chunked(500), id="chunks"),
        pytest.param(packed([1500, 100, 30, 30, 900, 1, 4, 700, 400, 431]), id="packed"),
        pytest.param(packed([64] * 64), id="packed-short"),
        pytest.param(packed([3000, *[16] * 68, 8]), id="packed-one-long"),
        pytest.param(Mask.documents([0, 2000, 3000]), id="tail-behind-documents"),
        pytest.param(Mask.causal() & blocks(4096, 4096, 64, seed=4, share=0.2), id="blocks"),
        pytest.param(Mask.causal([(300, 900), (2000, 3500)]), id="spans"),
        pytest.param(Mask.shared_prefix([1024], [[384] * 8]), id="shared-prefix"),
        pytest.param(Mask.shared_prefix([700, 40, 300], [[100, 700, 20], [60] * 20, [1, 500, 535]]), id="groups"),
    ],
)
def test_so_they_do_for_every_kind_of_mask(mask):
    for ranks, token_work in product((2, 3, 4, 8, 16), (0, 20_000)):
        partition = Partition.balanced(mask, 4096, ranks, token_work=token_work)
        assert max(tokens(partition)) <= 1.2 * 4096 / ranks + 1
        assert imbalance(predicted(partition, {mask: 1}, token_work)) <= 1.06


def test_several_masks_are_levelled_by_how_many_layers_have_each():
    documents = Mask.documents([0, 1700, 2000, 2600, 4096])
    masks = {Mask.causal() & documents: 1, Mask.sliding_window(64) & documents: 5}
    partition = Partition.balanced(tuple(masks), 4096, 4, tuple(masks.values()), token_work=100)
    assert imbalance(predicted(partition, masks, 100)) <= 1.03
    assert imbalance(predicted(Partition.balanced(tuple(masks), 4096, 4, token_work=100), masks, 100)) > 1.03


def test_short_documents_cost_whole_tiles():
    """A quarter of the pairs that documents of four times their length have, and nearly the same time."""
    short, long = (packed([size] * (2048 // size)) for size in (16, 64))
    assert sum(work(Partition.contiguous(2048, 1), short, 2048)) < 0.3 * sum(
        work(Partition.contiguous(2048, 1), long, 2048)
    )
    whole = Partition.contiguous(2048, 1)
    assert predicted(whole, {short: 1}, 0)[0] > 0.7 * predicted(whole, {long: 1}, 0)[0]
    both = packed([16] * 128 + [64] * 32)
    halves = Partition.balanced(both, 4096, 2, token_work=0)
    assert max(tokens(halves)) < 1.1 * 2048


@settings(max_examples=120, deadline=None)
@given(mask=packings(), ranks=st.integers(1, 8))
def test_only_documents_that_fit_nowhere_are_cut(mask, ranks):
    """Those too long for a rank, and of the others fewer than there are ranks."""
    length, boundaries = mask.boundaries[-1], mask.boundaries
    partition = Partition.balanced(mask, length, ranks)
    long = sum((stop - start) * ranks > length for start, stop in pairwise(boundaries))
    assert cut_documents(partition, boundaries) <= min(len(boundaries) - 1, long + 2 * ranks)
    alike = packed([50] * (4 * ranks))
    assert cut_documents(Partition.balanced(alike, 200 * ranks, ranks), alike.boundaries) == 0


def test_little_moves_of_many_documents():
    """Nothing at 8 ranks, where each holds some; equal shares of tokens and of pairs moved a third of all keys."""
    for ranks, most in ((8, 0), (64, 0.7)):
        mask = log_normal(2**20, 8192)
        moved = direct_moves(Partition.balanced(mask, 2**20, ranks), mask)
        assert moved <= most * 2**20
        assert moved < 0.75 * direct_moves(Partition.zigzag(2**20, ranks), mask)


def log_normal(length: int, mean: int, seed: int = 0) -> Mask:
    lengths, bounds = random.Random(seed), [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + 1 + int(lengths.lognormvariate(math.log(mean) - 0.5, 1))))
    return Mask.causal() & Mask.documents(bounds)


def direct_moves(partition: Partition, mask: Mask) -> int:
    """Foreign keys that ranks see, each counted once for each rank that sees it."""
    needed = needed_keys(mask, partition.segments, partition.length)
    return sum(count(x) - count(intersect(x, own)) for x, own in zip(needed, partition.segments, strict=True))


@pytest.mark.parametrize("mean", [64, 2048, 8192, 65536])
@pytest.mark.parametrize("ranks", [8, 64])
def test_a_million_tokens_are_dealt_out_within_a_blink(ranks, mean):
    mask, seconds = log_normal(2**20, mean), []
    for _ in range(5):
        started = time.process_time()
        Partition.balanced(mask, 2**20, ranks)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.02


def test_shares_are_counted_in_whole_numbers_alone():
    """So that machines that round differently make the same: no time is a float."""
    clock = Clock((packed([300, 20, 700]),), (1,), 1020, 5)
    assert all(type(clock.until(position)) is int for position in (0, 1, 500, 1020))
    assert all(clock.position(clock.until(position)) == position for position in range(1021))


@pytest.mark.parametrize(
    ("mask", "length", "batch", "name"),
    [
        (Mask.causal(), 30, 1, "zigzag"),
        (packed([30]), 30, 1, "zigzag"),
        (packed([10, 20]), 30, 1, "balanced"),
        (packed([10, 0, 0, 20]), 40, 1, "balanced"),
        (packed([30, 0]), 30, 1, "zigzag"),
        (packed([10, 20, 30]), 30, 2, "zigzag"),
        (Mask.documents([0, 4, 9], [0, 2, 5]), 5, 1, "zigzag"),
    ],
)
def test_packed_documents_are_balanced_where_nothing_else_is_named(mask, length, batch, name):
    assert default_partition(mask, length, batch) == name


@pytest.mark.parametrize("wrong", [{"token_work": -1}, {"most_tokens": 0.9}])
def test_settings_of_balanced_that_cannot_be_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"{name}={value}"):
        Partition.balanced(Mask.causal(), 8, 2, **wrong)


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
