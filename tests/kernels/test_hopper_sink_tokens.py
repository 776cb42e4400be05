"""What the Hopper kernels visit for sink tokens; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import any_intervals

from ringflash.kernels.hopper import backward_tokens
from ringflash.kernels.hopper.backward_order import order_of_programs
from ringflash.kernels.hopper.backward_tokens import Programs, chunk_count, order_with_chunks, programs_of_tiles
from ringflash.kernels.hopper.sink_tokens import token_pieces
from ringflash.kernels.intervals import KeyIntervals


def visited(piece: list[int], block: int) -> range:
    """Keys of the blocks of a piece."""
    begin, end = piece
    return range(begin, begin + -(-(end - begin) // block) * block)


@given(any_intervals(90, sink=True), st.sampled_from([2, 8, 64]), st.sampled_from([4, 16]))
def test_a_tile_visits_each_sink_token_that_its_rows_see_once(intervals: KeyIntervals, rows: int, block: int) -> None:
    pieces = token_pieces(intervals, rows, block)
    assert pieces.dtype == torch.int32
    bounds = list(zip(intervals.sink_start.tolist(), intervals.sink_stop.tolist(), strict=True))
    for tile, entry in enumerate(pieces.tolist()):
        first, second = (visited(piece, block) for piece in (entry[:2], entry[2:]))
        assert first.start % 4 == 0
        assert second.start % 4 == 0
        walked = [*first, *second]
        seen = [key for start, stop in bounds[tile * rows : (tile + 1) * rows] for key in range(start, stop)]
        assert all(walked.count(key) == 1 for key in seen)


@given(st.integers(40, 200), st.integers(1, 100), st.integers(1, 4))
def test_a_tile_with_rows_of_two_documents_walks_through_neither(first: int, second: int, tokens: int) -> None:
    """But for their sink tokens; the window is of 8."""
    row = torch.arange(first + second)
    document = torch.where(row < first, 0, first)
    start = torch.maximum(document, row - 7)
    intervals = KeyIntervals(start, row + 1, len(row), document, torch.minimum(document + tokens, start))
    for begin, end, again, behind in token_pieces(intervals, 32, 8).tolist():
        assert end - begin <= 8
        assert behind - again <= 8


TILE, BLOCK = 16, 64


@st.composite
def windows(draw: st.DrawFn) -> KeyIntervals:
    """Documents with a window and sink tokens, of which some are seen by many rows."""
    lengths = torch.tensor(draw(st.lists(st.integers(1, 700), min_size=1, max_size=4)))
    row = torch.arange(int(lengths.sum()))
    document = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    start = torch.maximum(document, row + 1 - draw(st.integers(1, 40)))
    stop = torch.minimum(document + draw(st.integers(1, 40)), start)
    return KeyIntervals(start, row + 1, len(row), document, stop)


ANY_INTERVALS = windows() | any_intervals(400, sink=True)
PROCESSORS = st.integers(1, 60)


def programs_for(intervals: KeyIntervals, key_heads: int, processors: int) -> tuple[Programs, int]:
    """Programs of short chunks, and how many there are."""
    own, tokens = (intervals.key_tile_rows(TILE, sink_tokens) for sink_tokens in (False, True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_tokens, "LEAST_ROWS", 128)
        programs = programs_of_tiles(own, tokens, intervals.query_count, key_heads, processors)
        return programs, chunk_count(len(own), intervals.query_count, key_heads, processors)


@given(ANY_INTERVALS, st.integers(1, 3), PROCESSORS)
@settings(max_examples=60)
def test_programs_visit_each_pair_once_and_what_they_find_is_added_up_once(
    intervals: KeyIntervals, key_heads: int, processors: int
) -> None:
    tiles = -(-intervals.key_count // TILE)
    if not tiles:
        return
    programs, chunks = programs_for(intervals, key_heads, processors)
    assert programs.work.dtype == programs.split.dtype == torch.int32
    assert len(programs.work) == tiles + 2 * chunks
    assert programs.work[:tiles, 0].tolist() == list(range(tiles))

    visits = torch.zeros(intervals.query_count, tiles * TILE, dtype=torch.int32)
    left, written = {}, []
    for tile, *ends, slot in programs.work.tolist():
        if tile < 0:
            continue
        key = torch.arange(tile * TILE, (tile + 1) * TILE)
        for first, behind, (start, stop) in zip(ends[::2], ends[1::2], intervals.ranges(), strict=True):
            first = first // 4 * 4
            behind = first + -(-max(behind - first, 0) // BLOCK) * BLOCK  # whole blocks
            rows = torch.arange(first, min(behind, intervals.query_count))[:, None]
            visits[rows, key] += ((start[rows] <= key) & (key < stop[rows])).int()
        if slot < 0:
            written.append(tile)
        else:
            assert slot not in left
            left[slot] = tile
    assert torch.equal(visits[:, : intervals.key_count], intervals.visible().int())
    assert visits.sum() == intervals.visible().sum()

    for tile, first, count in programs.split.tolist():
        if count:
            assert [left.pop(slot) for slot in range(first, first + count)] == [tile] * count
            assert first + count <= 3 * chunks
            written.append(tile)
    assert not left
    assert sorted(written) == list(range(tiles))


def test_tiles_that_many_rows_see_are_cut() -> None:
    """Else the test above would say nothing of chunks."""
    row = torch.arange(700)
    start = (row - 20).clamp(min=0)
    intervals = KeyIntervals(start, row + 1, 700, torch.zeros_like(row), start.clamp(max=20))
    split = programs_for(intervals, 2, 20)[0].split
    assert split[split[:, 2] > 0, 0].tolist() == [0, 1]
    assert split[:2, 2].min() > 2


@given(ANY_INTERVALS, st.integers(1, 3), PROCESSORS)
@settings(max_examples=30)
def test_every_program_of_every_head_has_a_turn(intervals: KeyIntervals, key_heads: int, processors: int) -> None:
    if not intervals.key_count:
        return
    programs, _ = programs_for(intervals, key_heads, processors)
    order = order_of_programs(intervals.key_tile_rows(TILE), key_heads, processors)
    order = order_with_chunks(order, programs, key_heads)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(len(programs.work) * key_heads))
    used = programs.work[order // key_heads, 0] >= 0
    assert not used[used.sum() :].any()  # those without use come last


def test_the_column_of_sink_tokens_is_cut_until_no_program_is_longer_than_the_window_and_a_chunk() -> None:
    """Window of 1,023 and 4 sink tokens over 65,536, 8 key heads, 132 multiprocessors."""
    row = torch.arange(65_536, dtype=torch.int32)
    start = (row - 1022).clamp(min=0)
    intervals = KeyIntervals(start, row + 1, len(row), torch.zeros_like(row), start.clamp(max=4))
    own, tokens = (intervals.key_tile_rows(128, sink_tokens) for sink_tokens in (False, True))
    work = programs_of_tiles(own, tokens, len(row), 8, 132).work
    used = work[work[:, 0] >= 0].long()
    rows = (used[:, 2] - used[:, 1]).clamp(min=0) + (used[:, 4] - used[:, 3]).clamp(min=0)
    everything = rows.sum() * 8 / 132
    assert tokens[0, 3] - tokens[0, 0] > 64_000
    assert rows.max() <= everything / 10
