"""The order in which Hopper programs add to the query's gradient: no turn is missing, none is taken twice.

What a program does is written down once more here, in `visits` and `run`, as backward_work.py and dquery_in_turn.py of
kernels/hopper have it.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from oracle import any_intervals, dense_intervals, monotone_intervals

from ringflash.kernels.hopper.dquery_in_turn import heads_in_turn, turns_of_tiles
from ringflash.kernels.intervals import KeyIntervals, causal_intervals

BLOCKS = st.sampled_from([1, 3, 8, 16])
NOBODY = KeyIntervals(torch.full((40,), 30), torch.full((40,), 30), key_count=90)


def visits(entry: list[int], rows: int) -> list[int]:
    """Blocks of `rows` query rows that the program of a key tile visits, in its order; one at least."""
    begin = entry[0] // rows
    return [*reversed(range(begin, max(-(-entry[3] // rows), begin + 1)))]


def order_of(intervals: KeyIntervals, keys: int, rows: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Each tile's visits and turn, and each block's first turn."""
    table = intervals.key_tile_rows(keys)
    turns, first_turns = turns_of_tiles(table, intervals.query_count, rows)
    assert turns.dtype == first_turns.dtype == torch.int32
    return [visits(entry, rows) for entry in table.tolist()], turns.tolist(), first_turns.tolist()


@settings(max_examples=500)
@given(any_intervals(120, sink=False), BLOCKS, BLOCKS)
@example(NOBODY, 8, 8)
@example(dense_intervals(1, 100), 8, 8)
@example(causal_intervals(100, 30), 8, 8)
@example(causal_intervals(30, 100), 8, 8)
@example(monotone_intervals(40, 100, seed=1, sink=False), 1, 16)
def test_the_visitors_of_a_block_have_all_turns_from_its_first_on(
    intervals: KeyIntervals, keys: int, rows: int
) -> None:
    visited, turns, first_turns = order_of(intervals, keys, rows)
    assert len(first_turns) == -(-intervals.query_count // rows)
    seen = [tile for tile, turn in enumerate(turns) if turn >= 0]
    assert [turns[tile] for tile in seen] == [*range(len(seen))]
    for block, first in enumerate(first_turns):
        taken = [turns[tile] for tile in seen if block in visited[tile]]
        assert taken == [*range(first, first + len(taken))]
    assert all(block < len(first_turns) for tile in seen for block in visited[tile])


@settings(max_examples=200)
@given(any_intervals(120, sink=False), BLOCKS, BLOCKS)
def test_a_tile_visits_all_rows_that_see_it_and_has_a_turn_if_there_are_any(
    intervals: KeyIntervals, keys: int, rows: int
) -> None:
    visited, turns, _ = order_of(intervals, keys, rows)
    for tile, turn in enumerate(turns):
        seeing = intervals.visible()[:, tile * keys : (tile + 1) * keys].any(1).nonzero().flatten().tolist()
        assert turn >= 0 or not seeing
        assert {row // rows for row in seeing} <= {*visited[tile]}


def run(visited: list[list[int]], turns: list[int], now: list[int], resident: int, seed: int) -> list[list[int]]:
    """Tiles that added to each block, in order: programs start in order, `resident` at a time, and run at any pace."""
    pace = random.Random(seed)
    added: list[list[int]] = [[] for _ in now]
    waiting, running = [*range(len(visited))], []
    left = [iter(blocks) for blocks in visited]
    at = [next(blocks) for blocks in left]
    while waiting or running:
        while waiting and len(running) < resident:
            running.append(waiting.pop(0))
        able = [tile for tile in running if turns[tile] < 0 or now[at[tile]] >= turns[tile]]
        assert able, f"tiles {running} wait for ever"
        tile = pace.choice(able)
        if turns[tile] >= 0:
            assert now[at[tile]] == turns[tile], "two tiles have the same turn"
            added[at[tile]].append(tile)
            now[at[tile]] += 1
        at[tile] = next(left[tile], -1)
        if at[tile] < 0:
            running.remove(tile)
    return added


@settings(max_examples=300)
@given(
    any_intervals(80, sink=False), BLOCKS, BLOCKS, st.sampled_from([1, 2, 5, 1000]), st.integers(0, 2**32 - 1)
)  # fmt: skip
@example(NOBODY, 8, 8, 2, 0)
def test_programs_never_wait_for_ever_and_always_add_in_the_same_order(
    intervals: KeyIntervals, keys: int, rows: int, resident: int, seed: int
) -> None:
    visited, turns, first_turns = order_of(intervals, keys, rows)
    added = run(visited, turns, first_turns, resident, seed)
    for block, tiles in enumerate(added):
        assert tiles == [tile for tile, turn in enumerate(turns) if turn >= 0 and block in visited[tile]]


@settings(max_examples=200)
@given(
    any_intervals(60, sink=False), BLOCKS, BLOCKS, st.sampled_from([1, 2, 5]), st.integers(1, 4), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_heads_of_a_group_do_not_wait_for_ever_in_either_order(
    intervals: KeyIntervals, keys: int, rows: int, resident: int, group: int, by_head: bool, seed: int
) -> None:
    """Blocks of several heads, which have turns of their own, are numbered as so many blocks."""
    visited, turns, first_turns = order_of(intervals, keys, rows)
    count = len(first_turns)
    orders = [
        [head * count + block for head in range(group) for block in blocks]
        if by_head
        else [head * count + block for block in blocks for head in range(group)]
        for blocks in visited
    ]
    added = run(orders, turns, first_turns * group, resident, seed)
    for place, tiles in enumerate(added):
        assert tiles == [tile for tile, turn in enumerate(turns) if turn >= 0 and place % count in visited[tile]]


@given(any_intervals(100, sink=False), st.integers(1, 48), st.integers(0, 10**7))
def test_heads_worked_on_at_a_time_divide_all_heads(intervals: KeyIntervals, key_heads: int, row_bytes: int) -> None:
    (section,) = heads_in_turn(intervals.key_tile_rows(8), key_heads, row_bytes).tolist()
    assert 1 <= section <= key_heads
    assert key_heads % section == 0


def test_fewer_heads_are_worked_on_at_a_time_the_longer_the_documents() -> None:
    causal = [causal_intervals(length, length).key_tile_rows(128) for length in (2048, 8192, 16384, 32768)]
    assert [heads_in_turn(table, 16, row_bytes=1024).item() for table in causal] == [16, 4, 2, 1]
