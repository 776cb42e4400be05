"""Tile bounds and orders of KeyIntervals against a walk over every row and key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import any_intervals, dense_intervals

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
