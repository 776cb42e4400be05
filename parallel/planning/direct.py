"""Keys come straight from their owners, in a few waves, each while the one before is attended to.

Fewer and larger launches than a ring's, and nothing travels through ranks that do not need it: for packed documents,
of which a rank needs little and from few. What is not passed on is sent once for each that needs it, and a wave lies in
memory at once.

Without waves, all keys come before anything is attended to, own and foreign ones in a single launch: for windows and
documents of which so little is needed that it comes in less time than a second launch takes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.loads import shared_keys
from ringflash.parallel.planning.outline import Outline
from ringflash.parallel.planning.plan import Buffers, Move, Plan, RankPlan, Stage, without_idle_end
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, intersect, normalize
from ringflash.parallel.positions.visibility import needed_keys


def direct(mask: Mask, queries: Partition, keys: Partition | None = None, waves: int = 1) -> Plan:
    """Pulls from the owners of keys.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys, on as many ranks; like the queries if None.
        waves: in how many stages foreign keys are attended to; from the nearest owners first, and equally many in each.
            0 for one stage of all keys.

    Raises:
        ArgumentError: fewer waves.
    """
    if waves < 0:
        raise ArgumentError(f"waves={waves}; allowed are integers from 0")
    keys = keys or queries
    needed = needed_keys(mask, queries.segments, keys.length)

    @cache
    def stages() -> np.ndarray:
        return _stages(shared_keys(keys, needed), waves)

    def outline() -> Outline:
        ranks = queries.ranks
        if waves == 0:
            stage, rank = np.ones((ranks, ranks), dtype=np.int64), np.arange(ranks)
            return Outline(2, stage, np.broadcast_to(rank, (ranks, ranks)))
        source = np.broadcast_to(np.arange(ranks), (ranks, ranks))
        return Outline(1 + waves, stages(), source)

    return Plan(
        f"direct-{waves}",
        queries,
        keys,
        lambda rank: (
            _of_rank(rank, queries, keys, needed, stages(), waves) if waves else _at_once(rank, queries, keys, needed)
        ),
        outline,
    )


def _at_once(rank: int, queries: Partition, keys: Partition, needed: list[Segments]) -> RankPlan:
    own, others = keys.segments[rank], [other for other in range(queries.ranks) if other != rank]
    pulled = tuple(Move(x, part) for x in others if (part := intersect(keys.segments[x], needed[rank])))
    given = tuple(Move(x, part) for x in others if (part := intersect(own, needed[x])))
    work = normalize((*intersect(own, needed[rank]), *(interval for move in pulled for interval in move.segments)))
    kept = without_idle_end([Stage(receives=pulled, sends=given), Stage(work=work, returns=pulled, reduces=given)])
    return RankPlan(rank, queries.segments[rank], own, kept, Buffers.of(kept))


def _stages(shared: np.ndarray, waves: int) -> np.ndarray:
    """(R, R), by (rank, owner): when a rank attends to the owner's keys. All ranks find the same for all."""
    ranks = len(shared)
    rank, hop = np.ogrid[:ranks, :ranks]
    by_hop = shared[rank, (rank - hop) % ranks]  # the nearest owner before a rank first
    by_hop[:, 0] = 0
    middle = by_hop.cumsum(1) - (by_hop + 1) // 2  # of an owner's keys among all that a rank needs, in this order
    wave = 1 + np.minimum(middle * waves // np.maximum(1, by_hop.sum(1, keepdims=True)), waves - 1)
    wave[:, 0] = 0
    return wave[rank, (rank - np.arange(ranks)) % ranks]


def _of_rank(
    rank: int,
    queries: Partition,
    keys: Partition,
    needed: list[Segments],
    stage_of: np.ndarray,
    waves: int,
) -> RankPlan:
    own = keys.segments[rank]
    pulled: list[list[Move]] = [[] for _ in range(waves + 1)]
    given = [x.copy() for x in pulled]
    for other in range(queries.ranks):
        if other != rank:
            part = intersect(keys.segments[other], needed[rank])
            if part:
                pulled[stage_of[rank, other]].append(Move(other, part))
            part = intersect(own, needed[other])
            if part:
                given[stage_of[other, rank]].append(Move(other, part))
    stages = []
    for stage in range(1 + waves):
        foreign = normalize(interval for move in pulled[stage] for interval in move.segments)
        stages.append(
            Stage(
                work=foreign if stage else intersect(own, needed[rank]),
                receives=tuple(pulled[stage + 1]) if stage < waves else (),
                sends=tuple(given[stage + 1]) if stage < waves else (),
                returns=tuple(pulled[stage]),
                reduces=tuple(given[stage]),
            )
        )
    kept = without_idle_end(stages)
    return RankPlan(rank, queries.segments[rank], own, kept, Buffers.of(kept))
