"""Shares of a sequence that take every rank equally long, hold about as many tokens each, and keep documents together.

A document that lies whole on one rank moves nothing, wherever that is. So documents are packed like parcels: longest
first, each to the rank that has most room for it. Only one that fits nowhere is cut, over as few neighbouring ranks as
have room: from its front on where its tokens take equally long, as under a window, and otherwise folded, each rank a
piece of the cheap end with a piece of the dear one, as zigzag does for a causal mask.

Everything is counted in integers: ranks make their shares each for itself, and must find the same.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from math import lcm
from typing import NamedTuple

import numpy as np
import torch

from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Interval, Segments, normalize
from ringflash.parallel.positions.visibility import position_bounds

TOKEN_WORK = 5 * 4096
"""What the rest of a layer costs a token, in visible pairs of attention: of a model of some 8 billion parameters."""

MOST_TOKENS = 1.2
"""Times the mean number of tokens that a rank may hold: activations need memory."""

TOLERANCE = 1.02
"""Times the mean predicted time within which a rank takes whole documents; cutting to less is not worth the moves."""

TILE = 128
"""Queries, and keys, that kernels work on together: all of a tile's queries pay for what the first and last see."""

CELLS = 2**14
"""Stretches of a sequence within which every token is taken to cost the same."""

PARTS = 16
"""Short neighbouring documents are placed together, as such a part of a rank's share or a smaller one."""

MOST_PLACED = 1024
"""Of the whole, where that is more of them than this, up to four times as large: each takes microseconds."""

LEAST_CUT = 64
"""A document is not cut for a smaller part of a rank's time than this one."""

ROUNDS = 2
"""Exchanges between the busiest and the idlest, for each rank, after all is placed: where so many tokens are short
documents that their ranks may not hold more of them, or where costs go up and down within a document."""

TRIED = 8
"""Ranks that are asked whether they have room for a document, the least loaded first."""

NEAR = 16
"""Ranks in a row that a document is cut over before a rank elsewhere is looked for."""


def token_work(width: int) -> int:
    """`TOKEN_WORK` of a model: 6 operations for each of a layer's 13 width^2 weights, against 14 width for a pair."""
    return TOKEN_WORK * width // 4096


def balanced_shares(
    masks: Sequence[Mask], weights: Sequence[int], length: int, ranks: int, token_work: int, most_tokens: float
) -> tuple[Segments, ...]:
    """The positions of each rank.

    Args:
        masks: what queries see in the layers, with the same documents, which end within the length.
        weights: how many layers have each mask.
        length: number of positions.
        ranks: number of ranks.
        token_work: see `TOKEN_WORK`.
        most_tokens: see `MOST_TOKENS`.
    """
    if not length:
        return ((),) * ranks
    clock = Clock(masks, weights, length, token_work)
    packing = _Packing(clock, ranks, most_tokens)
    packing.pack(_units(masks, length))
    packing.level()
    packing.fill_empty()
    return tuple(normalize(share) for share in packing.shares)


class Clock:
    """Predicted time of stretches of a sequence, forward and backward through all layers, in pairs.

    Args:
        masks: see `balanced_shares`.
        weights: see there.
        length: see there.
        token_work: see there.
    """

    def __init__(self, masks: Sequence[Mask], weights: Sequence[int], length: int, token_work: int) -> None:
        self.length, self._every = length, max(1, -(-length // CELLS))
        edges = np.append(np.arange(0, length, self._every), length)
        density = np.full(len(edges) - 1, sum(weights) * token_work, dtype=np.int64)
        middle = torch.from_numpy((edges[:-1] + edges[1:]) // 2)
        for mask, weight in zip(masks, weights, strict=True):
            density += weight * _keys_of_tiles(mask, middle, length)
        np.maximum(density, 1, out=density)
        self._arrays = np.append(0, (density * np.diff(edges)).cumsum()), np.append(density, 0)
        self._until, self._density = self._arrays[0].tolist(), density.tolist()

    def until(self, position: int) -> int:
        """Time of all tokens before a position."""
        cell = position // self._every
        if cell >= len(self._density):
            return self._until[-1]
        return self._until[cell] + (position - cell * self._every) * self._density[cell]

    def until_each(self, positions: np.ndarray) -> np.ndarray:
        """`until` of many."""
        until, density = self._arrays
        cells = np.where(positions < self.length, positions // self._every, len(self._density))
        return until[cells] + (positions - cells * self._every) * density[cells]

    def between(self, start: int, stop: int) -> int:
        """Time of the tokens [start, stop)."""
        return self.until(stop) - self.until(start)

    def position(self, time: int) -> int:
        """The position before which tokens take so long together, or the last such."""
        if time >= self._until[-1]:
            return self.length
        cell = bisect_right(self._until, time) - 1
        return cell * self._every + (time - self._until[cell]) // self._density[cell]

    def density(self, position: int) -> int:
        """Time of the token at a position."""
        return self._density[position // self._every]


def _keys_of_tiles(mask: Mask, positions: torch.Tensor, length: int) -> np.ndarray:
    """Keys that a tile around each query position works on, of all layers of a mask; whole tiles of keys."""
    boundaries = torch.tensor(mask.boundaries if mask.boundaries else (0, length))
    around = torch.cat([positions - TILE // 2, positions + (TILE - 1) // 2]).clamp_(0, length - 1)
    keys = torch.zeros_like(positions)
    for layer in mask.layers:
        bounds = position_bounds(layer, boundaries, around)
        for start, stop in (bounds[:2], bounds[2:]):
            seen = (stop[len(positions) :] - start[: len(positions)]).clamp_(min=0)
            keys += (seen + (TILE - 1)) // TILE * TILE
    return keys.numpy()


def _units(masks: Sequence[Mask], length: int) -> list[int]:
    """Edges between which queries of every mask see only each other: those of documents, and of chunks of them."""
    common = None
    for mask in masks:
        edges = np.unique([0, *(mask.boundaries or ()), length])
        if mask.chunks:
            size = lcm(*mask.chunks) if len(mask.chunks) > 1 else mask.chunks[0]
            edges = np.unique(np.concatenate([np.arange(a, b, size) for a, b in pairwise(edges.tolist())] + [edges]))
        common = edges if common is None else np.intersect1d(common, edges)
    assert common is not None
    return common.tolist()


class _Packing:
    """Shares while they are made.

    Attributes:
        shares: intervals of each rank, in no order.
    """

    def __init__(self, clock: Clock, ranks: int, most_tokens: float) -> None:
        self.clock, self.ranks = clock, ranks
        self.mean = max(1, clock.until(clock.length) // ranks)
        self.most_time = int(self.mean * TOLERANCE)
        self.mean_tokens = max(1, clock.length // ranks)
        self.most_tokens = max(-(-clock.length // ranks), int(clock.length * most_tokens / ranks))
        self.shares: list[list[Interval]] = [[] for _ in range(ranks)]
        self.time, self.tokens = [0] * ranks, [0] * ranks
        self._by_load = [(0.0, rank) for rank in range(ranks)]  # a heap; entries that hold no longer stay in it

    # Packing

    def pack(self, edges: Sequence[int]) -> None:
        """Give every unit to ranks: whole ones first, those too long for a rank before."""
        units = self._together(edges)
        long = [(a, b) for a, b in units if not self._fits(0, 0, a, b)]
        part = self._part_of_long(long)
        for start, stop in self._longest_first(long):
            self._cut(start, stop, part)
        left = self._place(unit for unit in units if self._fits(0, 0, *unit))
        # What fits nowhere together with its neighbours may do without them.
        alone = [pair for a, b in left for pair in pairwise(edges[bisect_left(edges, a) : bisect_right(edges, b)])]
        for start, stop in self._place(alone):
            self._cut(start, stop, self.mean)

    def _together(self, edges: Sequence[int]) -> list[Interval]:
        """Units between edges; neighbours that are small are joined, for thousands of them take long to place."""
        parts = max(PARTS // 4, min(PARTS, MOST_PLACED // self.ranks))
        times, tokens = np.diff(self.clock.until_each(np.array(edges))), np.diff(edges)
        load = np.maximum(times * parts / self.mean, tokens * parts / self.mean_tokens)
        group = np.floor(np.where(load < 1, load, 0).cumsum())
        joined = (load[1:] < 1) & (load[:-1] < 1) & (group[1:] == group[:-1])
        return list(pairwise(np.array(edges)[np.concatenate([[True], ~joined, [True]])].tolist()))

    def _longest_first(self, units: Iterable[Interval]) -> list[Interval]:
        return sorted(units, key=lambda unit: (-self.clock.between(*unit), unit))

    def _place(self, units: Iterable[Interval]) -> list[Interval]:
        """Whole units to the rank that is least loaded; those that fit nowhere are returned."""
        left = []
        for start, stop in self._longest_first(units):
            rank = self._roomy(start, stop)
            if rank is None:
                left.append((start, stop))
            else:
                self._give(rank, start, stop)
        return left

    def _fits(self, time: int, tokens: int, start: int, stop: int) -> bool:
        return tokens + stop - start <= self.most_tokens and time + self.clock.between(start, stop) <= self.most_time

    def _roomy(self, start: int, stop: int) -> int | None:
        """Which of some of the least loaded ranks has room for a unit."""
        heap, found, passed = self._by_load, None, []
        while heap and found is None and len(passed) < TRIED:
            load, rank = heappop(heap)
            if load == self._load(rank):
                passed.append((load, rank))
                found = rank if self._fits(self.time[rank], self.tokens[rank], start, stop) else None
        for entry in passed:
            heappush(heap, entry)
        return found

    def _load(self, rank: int) -> float:
        return max(self.time[rank] / self.mean, self.tokens[rank] / self.mean_tokens)

    def _part_of_long(self, long: Sequence[Interval]) -> int:
        """Time that a rank spends on units that have to be cut anyway.

        All of it, which cuts least, unless the others would then have to hold too many tokens: short documents are many
        tokens for little time. Then all ranks share in the long ones.
        """
        time = sum(self.clock.between(*unit) for unit in long)
        short = self.clock.length - sum(stop - start for start, stop in long)
        enough = short <= (self.ranks - time / self.mean) * self.most_tokens
        return self.mean if enough else max(1, -(-time // self.ranks))

    def _give(self, rank: int, start: int, stop: int) -> None:
        if start < stop:
            self.shares[rank].append((start, stop))
            self.time[rank] += self.clock.between(start, stop)
            self.tokens[rank] += stop - start
            heappush(self._by_load, (self._load(rank), rank))

    # Cutting

    def _cut(self, start: int, stop: int, part: int) -> None:
        """Divide a unit among ranks, so much time at most on each: the one with most of it left, and those beside it.

        Where none has any, each takes somewhat more than the mean; and where that is too little, those with least time
        take as many tokens as they may hold.
        """
        for limit in (self.mean, self.most_time, None):
            while start < stop:
                rank = min(range(self.ranks), key=lambda r: (self.tokens[r] >= self.most_tokens, self.time[r]))
                before = stop - start
                for near in range(rank, rank + NEAR):
                    start, stop = self._cut_for(near % self.ranks, start, stop, part, limit)
                if stop - start == before:
                    break

    def _cut_for(self, rank: int, start: int, stop: int, part: int, limit: int | None) -> Interval:
        """Give a rank what it has time and place for; the rest is returned."""
        place = self.most_tokens - self.tokens[rank]
        if start >= stop or place < 1:
            return start, stop
        room = max(self.mean, self.clock.density(start)) if limit is None else min(part, limit - self.time[rank])
        if room * LEAST_CUT >= part:
            front, back = self._slice(start, stop, room, place)
            self._give(rank, start, front)
            self._give(rank, back, stop)
            return front, back
        return start, stop

    def _slice(self, start: int, stop: int, room: int, place: int) -> tuple[int, int]:
        """Where to cut off a front and a back that take so long together, in at most so many tokens."""
        clock, size = self.clock, stop - start
        begin, end = clock.until(start), clock.until(stop)
        if end - begin <= room and size <= place:
            return stop, stop
        front = min(stop, clock.position(begin + room))
        if front - start <= min(place, self.most_tokens * room // self.mean):
            return front, stop
        tokens = min(place, size, -(-size * room // (end - begin)))  # what is left then has as many for its time
        # The more of the tokens are from the front, which is cheap, the less time they take.
        given = bisect_left(
            range(tokens), -room, key=lambda x: begin - clock.until(start + x) + clock.until(stop - tokens + x) - end
        )
        return start + given, stop - tokens + given

    # Repairs

    def level(self) -> None:
        """Move ends of intervals from the busiest to an idle rank near it as long as that helps."""
        time = np.array(self.time)
        for _ in range(ROUNDS * self.ranks):
            busiest = int(time.argmax())
            idle = np.flatnonzero(time <= (self.mean + time.min()) // 2)
            if time[busiest] <= self.most_time or not idle.size:
                return
            nearest = int(idle[np.abs(idle - busiest).argmin()])
            if not self._exchange(busiest, nearest):
                return
            time[[busiest, nearest]] = self.time[busiest], self.time[nearest]

    def _exchange(self, busiest: int, idle: int) -> bool:
        """Give dear tokens, for cheap ones where there is no place for more; whether that was possible."""
        surplus = min(self.time[busiest] - self.mean, self.mean - self.time[idle])
        dear, place = self._end(busiest, dearest=True), self.most_tokens - self.tokens[idle]
        given, taken = min(surplus // dear.density, dear.tokens), 0
        if given > place and self.shares[idle]:
            cheap = self._end(idle, dearest=False)
            if dear.density <= cheap.density:
                return False
            given = taken = min(surplus // (dear.density - cheap.density), dear.tokens, cheap.tokens)
            self._move(idle, busiest, cheap, taken)
        if given < 1:
            return False
        self._move(busiest, idle, dear, given)
        return True

    def _end(self, rank: int, dearest: bool) -> _End:
        """The dearest or cheapest end of a rank's intervals."""
        ends = (
            _End(self.clock.density(stop - 1 if at_stop else start), stop - start, index, at_stop)
            for index, (start, stop) in enumerate(self.shares[rank])
            for at_stop in (False, True)
            if start < stop  # what was there may all be elsewhere by now
        )
        return (max if dearest else min)(ends)

    def _move(self, source: int, target: int, end: _End, tokens: int) -> None:
        start, stop = self.shares[source][end.index]
        cut = stop - tokens if end.at_stop else start + tokens
        piece, rest = ((cut, stop), (start, cut)) if end.at_stop else ((start, cut), (cut, stop))
        self.shares[source][end.index] = rest
        self.time[source] -= self.clock.between(*piece)
        self.tokens[source] -= tokens
        self._give(target, *piece)

    def fill_empty(self) -> None:
        """A token for each rank, where there are as many: models cannot do with none."""
        for rank in (r for r in range(self.ranks) if not self.tokens[r]):
            richest = max(range(self.ranks), key=self.tokens.__getitem__)
            if self.tokens[richest] > 1:
                self._move(richest, rank, self._end(richest, dearest=True), 1)


class _End(NamedTuple):
    """One end of an interval: time of its last token, tokens of the interval, which one, and whether where it stops."""

    density: int
    tokens: int
    index: int
    at_stop: bool
