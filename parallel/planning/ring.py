"""The ring: each block of keys travels from its owner to the next rank, stage by stage, as far as somebody needs it.

After Liu et al., Ring Attention (arXiv 2310.01889), except that only the positions that a later rank still needs are
passed on: a window's ring ends early, and a causal ring drops what lies in the future of all that follow.
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

PIECE = 65536
"""Keys that the backward pass works on at once. Their gradients lie in fp32 beside the keys, three times over: the part
that is computed, the one that leaves and the one that arrives. Fewer keys take less memory and, where they are no more
than some thousand, more time."""


def ring(mask: Mask, queries: Partition, keys: Partition | None = None) -> Plan:
    """A ring over the ranks of a partition.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys, on as many ranks; like the queries if None.
    """
    keys = keys or queries
    needed = needed_keys(mask, queries.segments, keys.length)
    return Plan(
        "ring", queries, keys, lambda rank: _of_rank(rank, queries, keys, needed), lambda: _outline(queries.ranks)
    )


def _outline(ranks: int) -> Outline:
    rank, owner = np.ogrid[:ranks, :ranks]
    hop = (rank - owner) % ranks
    return Outline(ranks, hop, np.where(hop, (rank - 1) % ranks, rank), piece=PIECE)


def _of_rank(rank: int, queries: Partition, keys: Partition, needed: list[Segments]) -> RankPlan:
    ranks, own = queries.ranks, keys.segments[rank]
    work: list[Segments] = [()] * ranks
    onward, reduced = work.copy(), work.copy()
    wanted = Union()  # by the ranks from the next one to the one before the owner: those that a block has yet to reach
    for ahead in range(1, ranks + 1):
        owner, hop = (rank + ahead) % ranks, ranks - ahead  # hop: how far the owner's block has come when it is here
        work[hop] = intersect(keys.segments[owner], needed[rank])
        onward[hop] = wanted.intersect(keys.segments[owner])
        if hop:
            wanted.add(needed[owner])
            reduced[ahead] = intersect(own, needed[owner])
    stages = []
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    for hop in range(ranks):
        coming = normalize((*work[hop + 1], *onward[hop + 1])) if hop + 1 < ranks else ()
        owner, reader = (rank - hop) % ranks, (rank + hop) % ranks
        stages.append(
            Stage(
                work=work[hop],
                receives=(Move(before, coming),) if coming else (),
                sends=(Move(after, onward[hop], relayed=hop > 0),) if onward[hop] else (),
                returns=(Move(owner, work[hop]),) if hop and work[hop] else (),
                reduces=(Move(reader, reduced[hop]),) if reduced[hop] else (),
            )
        )
    kept = without_idle_end(stages)
    piece = PIECE if ranks > 1 else None  # one rank has no parts in fp32
    return RankPlan(rank, queries.segments[rank], own, kept, Buffers.of(kept, piece), piece)
