"""The order in which the backward kernel's programs take tiles; no GPU is needed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import any_intervals

from ringflash.kernels.hopper.backward_order import LONG, SHORT, order_of_lists, order_of_programs
from ringflash.kernels.intervals import KeyIntervals, causal_intervals

PROCESSORS = st.integers(1, 40)


def _order(intervals: KeyIntervals, block: int, key_heads: int, processors: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = order_of_programs(intervals.key_tile_rows(block), key_heads, processors)
    assert order.dtype == torch.int32
    return order // key_heads, order % key_heads


@given(any_intervals(90, sink=False), st.sampled_from([1, 4, 16]), st.integers(1, 6), PROCESSORS)
def test_every_tile_of_every_head_is_taken_once(intervals, block, key_heads, processors):
    tiles = -(-intervals.key_count // block)
    if not tiles:
        return
    tile, head = _order(intervals, block, key_heads, processors)
    assert sorted(zip(tile.tolist(), head.tolist(), strict=True)) == [
        (i, j) for i in range(tiles) for j in range(key_heads)
    ]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 6), PROCESSORS)
def test_documents_come_the_longest_first_each_at_a_stretch_and_a_heads_tiles_as_they_lie(
    lengths, key_heads, processors
):
    rows = torch.arange(sum(lengths), dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    start = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths))[document].int()
    tile, head = _order(KeyIntervals(start, rows + 1, len(rows)), 1, key_heads, processors)  # of one key each
    taken = document[tile].unique_consecutive().tolist()
    assert sorted(taken) == list(range(len(lengths)))
    assert [lengths[i] for i in taken] == sorted(lengths, reverse=True)
    for i in range(len(lengths)):
        for j in range(key_heads):
            mine = tile[(document[tile] == i) & (head == j)]
            assert torch.equal(mine, mine.sort().values)


def test_as_many_heads_go_together_as_fill_the_processors_and_all_where_a_document_does_alone():
    for processors, together in ((4, 1), (7, 1), (8, 2), (15, 2), (16, 4), (99, 4), (3, 4)):
        _, head = _order(causal_intervals(4, 4), 1, 4, processors)
        assert head[: 4 * together].sort().values.tolist() == [j for j in range(together) for _ in range(4)]
        assert head[:together].tolist() == list(range(together))


@given(st.data(), st.integers(1, 9), st.sampled_from([(1, 3), (2, 2), (4, 2)]), PROCESSORS)
def test_of_lists_long_ones_begin_then_some_heads_after_others_and_short_ones_fill_up_the_end(
    data, tiles, heads, processors
):
    groups, per_group = heads
    counts = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(1, 40), min_size=tiles, max_size=tiles), min_size=groups, max_size=groups)
        )
    )
    key_heads = groups * per_group
    order = order_of_lists(counts, key_heads, processors)
    tile, head = order // key_heads, order % key_heads
    assert order.sort().values.tolist() == list(range(tiles * key_heads))
    length = counts[head // per_group, tile]
    share = length.sum() / processors
    band = 1 + (length * SHORT < share).int() - (length * LONG > share).int()
    assert torch.equal(band, band.sort().values)
    together = next((n for n in range(1, key_heads) if key_heads % n == 0 and n * tiles >= processors), key_heads)
    turn = torch.where(band == 1, head // together, 0)
    assert torch.equal(turn[band == 1], turn[band == 1].sort().values)
    alike = (band.diff() == 0) & (turn.diff() == 0)
    assert (length.diff()[alike] <= 0).all()
