"""Tile bounds and orders of KeyIntervals against a walk over every row and key."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import any_intervals, dense_intervals, with_blocks

from ringflash.errors import ArgumentError
from ringflash.kernels import reference
from ringflash.kernels.cpu import blockwise
from ringflash.kernels.cpu.rectangles import Kind, rectangles, visible
from ringflash.kernels.intervals import KeyIntervals, causal_intervals

BLOCKS = st.sampled_from([1, 3, 16, 32])


def tiles(count: int, block: int) -> list[range]:
    return [range(first, min(first + block, count)) for first in range(0, count, block)]


@settings(max_examples=200)
@given(any_intervals(70), BLOCKS)
def test_key_tile_rows_bound_the_rows_that_see_a_tile(intervals: KeyIntervals, block: int) -> None:
    for sink_tokens, (start, stop) in enumerate(intervals.ranges()):
        bounds = list(zip(start.tolist(), stop.tolist(), strict=True))
        table = intervals.key_tile_rows(block, sink_tokens=bool(sink_tokens)).tolist()
        assert len(table) == len(tiles(intervals.key_count, block))
        for keys, (any_begin, all_begin, all_end, any_end) in zip(
            tiles(intervals.key_count, block), table, strict=True
        ):
            assert 0 <= any_begin <= all_begin <= all_end <= any_end <= intervals.query_count
            for row, (first, last) in enumerate(bounds):
                if any(first <= key < last for key in keys):
                    assert any_begin <= row < any_end
                if all_begin <= row < all_end:
                    assert first <= keys[0] <= keys[-1] < last


@settings(max_examples=200)
@given(any_intervals(70, sink=False), BLOCKS)
def test_without_empty_rows_key_tile_rows_are_tight(intervals: KeyIntervals, block: int) -> None:
    assume(bool((intervals.start < intervals.stop).all()))
    for keys, row in zip(tiles(intervals.key_count, block), intervals.key_tile_rows(block).tolist(), strict=True):
        seen = intervals.visible()[:, keys[0] : keys[-1] + 1]
        some, every = (torch.nonzero(x).flatten().tolist() for x in (seen.any(1), seen.all(1)))
        assert list(range(row[0], row[3])) == some
        assert list(range(row[1], row[2])) == every


@settings(max_examples=200)
@given(any_intervals(70), BLOCKS)
def test_orders_hold_every_tile_once_the_longest_first(intervals: KeyIntervals, block: int) -> None:
    ranges = [(start.tolist(), stop.tolist()) for start, stop in intervals.ranges()]
    spans = [
        sum(max(stop[rows[-1]] - start[rows[0]], 0) for start, stop in ranges)
        for rows in tiles(intervals.query_count, block)
    ]
    order = intervals.query_order(block)
    assert order.dtype == torch.int32
    assert sorted(order.tolist()) == list(range(len(spans)))
    assert [spans[i] for i in order.tolist()] == sorted(spans, reverse=True)

    tables = [intervals.key_tile_rows(block, sink_tokens) for sink_tokens in (False, True)[: len(ranges)]]
    heights = sum(table[:, 3] - table[:, 0] for table in tables).tolist()
    order = intervals.key_order(block).tolist()
    assert sorted(order) == list(range(len(heights)))
    assert [heights[i] for i in order] == sorted(heights, reverse=True)


@given(any_intervals(50))
def test_visible_lists_the_pairs_of_all_ranges(intervals: KeyIntervals) -> None:
    ranges = [(start.tolist(), stop.tolist()) for start, stop in intervals.ranges()]
    right = [
        [any(start[row] <= key < stop[row] for start, stop in ranges) for key in range(intervals.key_count)]
        for row in range(intervals.query_count)
    ]
    assert intervals.visible().tolist() == right


@given(any_intervals(300))
def test_random_intervals_keep_the_promise_that_kernels_rely_on(intervals: KeyIntervals) -> None:
    for bound in (bound for pair in intervals.ranges() for bound in pair):
        assert bound.dtype == torch.int32
        assert bool((bound.diff() >= 0).all())
        assert bound.min() >= 0
        assert bound.max() <= intervals.key_count
    if intervals.has_sink_tokens:
        assert bool((intervals.sink_stop <= intervals.start).all())


@pytest.mark.parametrize(("queries", "keys"), [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)])
def test_causal_aligns_to_the_last_key(queries: int, keys: int) -> None:
    right = torch.ones(queries, keys).tril(keys - queries).bool()
    assert torch.equal(causal_intervals(queries, keys).visible(), right)
    assert dense_intervals(queries, keys).visible().all()


def test_bounds_may_come_strided_and_in_any_integer_type() -> None:
    plain = causal_intervals(6, 9)
    columns = torch.stack([plain.start, plain.stop], dim=1).long()
    intervals = KeyIntervals(columns[:, 0], columns[:, 1], 9)
    assert all(bound.is_contiguous() and bound.dtype == torch.int32 for bound in (intervals.start, intervals.stop))
    assert torch.equal(intervals.visible(), plain.visible())
    assert torch.equal(intervals.key_tile_rows(4), plain.key_tile_rows(4))


def test_blocks_beside_sink_tokens_are_refused() -> None:
    with pytest.raises(ArgumentError, match="blocks and sink tokens"):
        with_blocks(KeyIntervals(*torch.zeros(2, 4).int(), 9, *torch.zeros(2, 4).int()), 1, (2, 2), seed=0)


@pytest.mark.parametrize("kernels", [blockwise, reference], ids=["blockwise", "reference"])
def test_blocks_of_groups_that_do_not_divide_the_key_heads_are_refused(kernels: ModuleType) -> None:
    intervals = with_blocks(causal_intervals(4, 4), 3, (2, 2), seed=0)
    with pytest.raises(ArgumentError, match="3 groups of heads; allowed are divisors of the 2 key heads"):
        kernels.attend(*torch.zeros(3, 4, 2, 8), intervals, scale=1.0)


def test_what_was_worked_out_of_intervals_alone_serves_them_with_other_blocks() -> None:
    """A router's layout is new in each call; where rows lie is not."""
    first = with_blocks(causal_intervals(40, 40), 1, (8, 8), seed=0)
    second = first.with_blocks(with_blocks(causal_intervals(40, 40), 1, (8, 8), seed=1).blocks)
    assert first.key_tile_rows(16) is second.key_tile_rows(16)
    for intervals in (first, second):
        assert torch.equal(of_rectangles(intervals), intervals.visible()[0])


def of_rectangles(intervals: KeyIntervals) -> torch.Tensor:
    shown = torch.zeros(intervals.query_count, intervals.key_count, dtype=torch.bool)
    for rectangle in rectangles(intervals, large=True):
        pairs = visible(rectangle, intervals)
        rows, keys = (s.stop - s.start for s in (rectangle.rows, rectangle.keys))
        if rectangle.kind is Kind.CAUSAL:
            pairs = torch.ones(rows, keys).tril().bool()
        shown[rectangle.rows, rectangle.keys] |= torch.ones(rows, keys).bool() if pairs is None else pairs
    return shown
