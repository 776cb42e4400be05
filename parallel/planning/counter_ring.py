"""Two rings that turn against each other: each block of keys travels both ways at once, half as far.

A link carries data in both directions at the same time, and a ring uses one of them. Here a rank attends in stage h to
the blocks from h ranks before and from h ranks behind it: half as many stages, and launches of twice as many keys.
"""

from __future__ import annotations

import numpy as np

from ringflash.parallel.planning.outline import Outline
from ringflash.parallel.planning.plan import Buffers, Move, Plan, RankPlan, Stage, without_idle_end
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, intersect, normalize
from ringflash.parallel.positions.union import Union
from ringflash.parallel.positions.visibility import needed_keys


def counter_ring(mask: Mask, queries: Partition, keys: Partition | None = None) -> Plan:
    """A ring each way over the ranks of a partition.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys, on as many ranks; like the queries if None.
    """
    keys = keys or queries
    needed = needed_keys(mask, queries.segments, keys.length)
    return Plan(
        "counter-ring",
        queries,
        keys,
        lambda rank: _of_rank(rank, queries, keys, needed),
        lambda: _outline(queries.ranks),
    )


def _reach(ranks: int) -> dict[int, int]:
    """How many ranks a block passes through going up (step 1), and going down; together all others."""
    return {1: ranks // 2, -1: (ranks - 1) // 2}


def _outline(ranks: int) -> Outline:
    rank, owner = np.ogrid[:ranks, :ranks]
    up = (rank - owner) % ranks
    upward = up <= _reach(ranks)[1]
    stage = np.where(upward, up, ranks - up)
    source = (rank - np.where(upward, 1, -1)) % ranks
    return Outline(ranks // 2 + 1, stage, np.where(stage, source, rank))


def _of_rank(rank: int, queries: Partition, keys: Partition, needed: list[Segments]) -> RankPlan:
    ranks, own = queries.ranks, keys.segments[rank]
    ways = [_Way(rank, step, reach, keys, needed) for step, reach in _reach(ranks).items()]
    stages = [Stage(work=intersect(own, needed[rank]), receives=_receives(ways, 0), sends=_sends(ways, 0))]
    for hop in range(1, ranks // 2 + 1):
        there = [way for way in ways if hop <= way.reach]
        foreign = [Move((rank - way.step * hop) % ranks, way.work[hop]) for way in there]
        readers = [(rank + way.step * hop) % ranks for way in there]
        reduces = [Move(reader, intersect(own, needed[reader])) for reader in readers]
        stages.append(
            Stage(
                work=normalize(interval for move in foreign for interval in move.segments),
                receives=_receives(ways, hop),
                sends=_sends(ways, hop),
                returns=_some(foreign),
                reduces=_some(reduces),
            )
        )
    kept = without_idle_end(stages)
    return RankPlan(rank, queries.segments[rank], own, kept, Buffers.of(kept))


class _Way:
    """What comes to a rank and goes on in one direction.

    Attributes:
        step: 1 if blocks go to higher ranks, otherwise -1.
        reach: how many ranks a block passes through.
        peers: the rank that blocks come from, and the one that they go to.
        work: by hop, what the rank attends to of the block that has come so far; hop 0 is its own.
        onward: by hop, what it passes on of it.
    """

    def __init__(self, rank: int, step: int, reach: int, keys: Partition, needed: list[Segments]) -> None:
        ranks = keys.ranks
        self.step, self.reach = step, reach
        self.peers = (rank - step) % ranks, (rank + step) % ranks
        self.work: list[Segments] = [()] * (reach + 1)
        self.onward = self.work.copy()
        wanted = Union()  # by the ranks that a block has yet to reach
        for hop in range(reach, -1, -1):
            block = keys.segments[(rank - step * hop) % ranks]
            self.work[hop] = intersect(block, needed[rank])
            self.onward[hop] = wanted.intersect(block)
            wanted.add(needed[(rank + step * (reach - hop + 1)) % ranks])


def _receives(ways: list[_Way], hop: int) -> tuple[Move, ...]:
    moves = [
        Move(way.peers[0], normalize((*way.work[hop + 1], *way.onward[hop + 1]))) for way in ways if hop < way.reach
    ]
    return _some(moves)


def _sends(ways: list[_Way], hop: int) -> tuple[Move, ...]:
    return _some([Move(way.peers[1], way.onward[hop], relayed=hop > 0) for way in ways if hop < way.reach])


def _some(moves: list[Move]) -> tuple[Move, ...]:
    return tuple(move for move in moves if move.segments)
