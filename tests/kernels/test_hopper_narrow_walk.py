"""The kernel for rows that see few keys whose programs walk along them: what waits for what, and who finds what.

What a program's warps do is written down once more here, in `Program`, as kernels/hopper/narrow_walk_kernel.py has it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ringflash.kernels.hopper import narrow_walk
from ringflash.kernels.hopper.narrow_walk import ends_of_blocks, sees_few_blocks
from ringflash.kernels.hopper.narrow_walk_kernel import CONSUMERS, SLOTS, STAGES
from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.positions.band import band_of_bounds

BLOCK = narrow_walk.BLOCK
WARPGROUPS, RING, PLACES = CONSUMERS.value, STAGES.value, SLOTS.value


class Barrier:
    """An mbarrier: a phase ends after so many arrivals."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.left, self.phase = arrivals, arrivals, 0

    def arrive(self) -> None:
        self.left -= 1
        if not self.left:
            self.left, self.phase = self.arrivals, self.phase + 1

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Program:
    """One program of the kernel; each warp is a generator of what it waits for: a barrier and a parity."""

    def __init__(self, intervals: KeyIntervals, first_block: int, span: int, tokens: int, found: dict) -> None:
        self.start, self.stop = intervals.start.tolist(), intervals.stop.tolist()
        self.table, self.ends = intervals.key_tile_rows(BLOCK).tolist(), ends_of_blocks(intervals).tolist()
        self.tokens, self.found, self.first_block = tokens, found, first_block
        rows, blocks = intervals.query_count, len(self.table)
        self.owned = min(span, blocks - first_block)
        finding = -(-self.ends[first_block - 1] // tokens) if first_block else 0
        end = -(-self.ends[first_block + self.owned - 1] // tokens)
        if first_block + self.owned == blocks:
            end = -(-rows // tokens)
        self.first_tile = min(self.table[first_block][0] // tokens, finding)
        last_stop = self.stop[max(min(end * tokens, rows), 1) - 1]
        self.loaded = (
            min(max(-(-last_stop // BLOCK), first_block), blocks) - first_block if end > self.first_tile else 0
        )
        self.finding, self.steps = finding - self.first_tile, end - self.first_tile
        self.rows_full, self.numbers_full = ([Barrier(1) for _ in range(RING)] for _ in range(2))
        self.rows_empty = [Barrier(WARPGROUPS) for _ in range(RING)]
        self.keys_full, self.keys_empty = ([Barrier(1) for _ in range(PLACES)] for _ in range(2))
        self.dscores_full = [Barrier(WARPGROUPS) for _ in range(2)]
        self.dscores_empty = [Barrier(1) for _ in range(2)]
        self.tile_in: list = [None] * RING
        self.block_in: list = [None] * PLACES
        self.dscores: dict = {}
        self.kept: dict = {}

    def warps(self) -> list[Iterator]:
        return [self.load_tiles(), self.load_keys(), self.find_numbers(), *map(self.consume, range(WARPGROUPS))]

    def load_tiles(self) -> Iterator:
        for step in range(self.steps):
            yield self.rows_empty[step % RING], step // RING % 2 ^ 1
            self.tile_in[step % RING] = step
            self.rows_full[step % RING].arrive()

    def load_keys(self) -> Iterator:
        for block in range(self.loaded):
            yield self.keys_empty[block % PLACES], block // PLACES % 2 ^ 1
            self.block_in[block % PLACES] = block
            self.keys_full[block % PLACES].arrive()

    def find_numbers(self) -> Iterator:
        for step in range(self.steps):
            yield self.rows_full[step % RING], step // RING % 2
            assert self.tile_in[step % RING] == step
            self.numbers_full[step % RING].arrive()

    def consume(self, part: int) -> Iterator:
        at, self.kept[part] = 0, None
        own_blocks = max(self.loaded - part + WARPGROUPS - 1, 0) // WARPGROUPS
        for number in range(own_blocks + 1):
            block = part + number * WARPGROUPS
            real = block < self.loaded
            begin_step = end_step = self.steps
            if real:
                begin_step = self.table[self.first_block + block][0] // self.tokens - self.first_tile
                end_step = -(-self.ends[self.first_block + block] // self.tokens) - self.first_tile
                yield self.keys_full[block % PLACES], block // PLACES % 2
            end_step = max(min(end_step, self.steps), at)
            seen: Counter = Counter()
            for step in range(at, end_step):
                yield from self.step(part, step, block, step >= begin_step, seen)
            at = end_step
            if real:
                last = at - 1 - self.finding
                if last >= 0:
                    yield self.dscores_empty[last % 2], last // 2 % 2
                assert self.block_in[block % PLACES] == block
                if block < self.owned:
                    self.found["keys"].update([self.first_block + block])
                    self.found["pairs"].update(seen)
                self.keys_empty[block % PLACES].arrive()
        for block in range(part + own_blocks * WARPGROUPS, self.owned, WARPGROUPS):
            self.found["keys"].update([self.first_block + block])

    def step(self, part: int, step: int, block: int, active: bool, seen: Counter) -> Iterator:
        found = step - self.finding
        yield self.rows_full[step % RING], step // RING % 2
        yield self.numbers_full[step % RING], step // RING % 2
        tile = self.first_tile + step
        assert self.tile_in[step % RING] == step
        if self.kept[part] is not None:
            self.rows_empty[self.kept[part]].arrive()
            self.kept[part] = None
        if found >= 0:
            yield self.dscores_empty[found % 2], found // 2 % 2 ^ 1
        if active:
            assert self.block_in[block % PLACES] == block
            seen.update([(tile, self.first_block + block)])
        self.dscores[found % 2, part] = (step, block if active else None)
        if found >= 0:
            self.dscores_full[found % 2].arrive()
            if found % WARPGROUPS == part:
                yield self.dscores_full[found % 2], found // 2 % 2
                first = self.start[tile * self.tokens] // BLOCK - self.first_block
                of_tile = []
                for other in range(first, first + WARPGROUPS) if first < self.loaded else ():
                    of_step, of_block = self.dscores[found % 2, other % WARPGROUPS]
                    assert of_step == step
                    place = (other if other < self.loaded else first) % PLACES
                    if of_block is not None:
                        assert of_block == other == self.block_in[place]
                        of_tile.append(self.first_block + other)
                    assert self.block_in[place] is not None  # no numbers that nobody wrote
                assert tile not in self.found["tiles"]
                self.found["tiles"][tile] = of_tile
                self.dscores_empty[found % 2].arrive()
                self.kept[part] = step % RING
                return
        self.rows_empty[step % RING].arrive()


def run(program: Program, seed: int) -> None:
    """Warps take turns at random, until all are through."""
    pace = random.Random(seed)
    warps = program.warps()
    waits = [next(warp, None) for warp in warps]
    while any(wait is not None for wait in waits):
        able = [i for i, wait in enumerate(waits) if wait is not None and wait[0].passed(wait[1])]
        assert able, "all warps wait for ever"
        chosen = pace.choice(able)
        waits[chosen] = next(warps[chosen], None)


@st.composite
def narrow_intervals(draw: st.DrawFn) -> KeyIntervals:
    """Rows that see few keys, some of them none, with gaps between what they see."""
    rows = draw(st.integers(1, 900))
    pace = random.Random(draw(st.integers(0, 2**32 - 1)))
    width, jump = draw(st.sampled_from([(1, 0), (40, 0), (122, 0), (100, 300), (60, 20)]))
    start, stop, first, last = [], [], 0, 0
    for _ in range(rows):
        if jump and pace.random() < 0.01:
            first = last = last + pace.randrange(jump)
        if pace.random() < 0.97:
            last = last + 1
        first = max(first, last - width)
        start.append(first)
        stop.append(last if pace.random() < 0.95 else max(stop[-1:] or [0]))
    stop = torch.tensor(stop).cummax(0).values
    return KeyIntervals(torch.tensor(start), stop, int(stop[-1]) + draw(st.integers(1, 400)))


@settings(max_examples=150, deadline=None)
@given(narrow_intervals(), st.sampled_from([8, 16, 32, 64]), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_programs_never_wait_for_ever_and_find_every_gradient_once(
    intervals: KeyIntervals, tokens: int, span: int, seed: int
) -> None:
    band = band_of_bounds(intervals.start.numpy(), intervals.stop.numpy())
    assume(sees_few_blocks(band, None, tokens))
    found: dict = {"keys": Counter(), "pairs": Counter(), "tiles": {}}
    blocks = -(-intervals.key_count // BLOCK)
    for first_block in range(0, blocks, span):
        run(Program(intervals, first_block, span, tokens, found), seed)
    tiles = -(-intervals.query_count // tokens)
    visible = torch.zeros(tiles * tokens, blocks * BLOCK, dtype=torch.bool)
    visible[: intervals.query_count, : intervals.key_count] = intervals.visible()
    seen = visible.view(tiles, tokens, blocks, BLOCK).any(3).any(1)
    pairs = {(tile, block) for tile, block in seen.nonzero().tolist()}
    assert found["keys"] == Counter(range(blocks))
    assert set(found["pairs"]) >= pairs
    assert set(found["pairs"].values()) <= {1}
    assert sorted(found["tiles"]) == [*range(tiles)]
    assert {(tile, block) for tile, of_tile in found["tiles"].items() for block in of_tile} >= pairs


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_tiles_of_a_window_of_128_see_three_blocks(tokens: int) -> None:
    for rows in (1, 200, 1000):
        row = torch.arange(rows)
        intervals = KeyIntervals((row - 127).clamp(min=0), row + 1, rows)
        assert sees_few_blocks(128, (127, 0), tokens)
        found: dict = {"keys": Counter(), "pairs": Counter(), "tiles": {}}
        for first_block in range(0, -(-rows // BLOCK), 4):
            run(Program(intervals, first_block, 4, tokens, found), rows)
        assert sorted(found["tiles"]) == [*range(-(-rows // tokens))]
        assert max(map(len, found["tiles"].values())) <= WARPGROUPS
