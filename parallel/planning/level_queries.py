"""Queries that cross to level shares inside of attention, where the ranks' own shares are not level.

Some layers want each rank to hold tokens that follow each other: linear attention, state space models, convolutions.
Under a causal mask the last of four ranks then has seven times the work of the first. Queries weigh little beside that:
they cross to the ranks of a zigzag, are attended there to keys that stay where they are, and the result comes back.
"""

from __future__ import annotations

import numpy as np

from ringflash.parallel.planning.cost import Shape
from ringflash.parallel.planning.machine import Machine
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, count, intersect, normalize

MOST_RANKS, MOST_RUNS = 16, 8
"""Among more ranks, or where each holds more runs of positions, finding out what stays takes too long."""


def level_queries(partition: Partition) -> Partition | None:
    """A zigzag of the same positions, each rank with that of its shares of which it holds the most; None of too many.

    Args:
        partition: which positions each rank holds.
    """
    ranks = partition.ranks
    runs = sum(map(len, partition.segments))
    if ranks > MOST_RANKS or runs > MOST_RUNS * ranks or partition.length < 2 * ranks:
        return None
    shares = Partition.zigzag(partition.length, ranks).segments
    kept = np.array([[count(intersect(own, share)) for share in shares] for own in partition.segments])
    chosen: list[Segments] = [()] * ranks
    for _ in range(ranks):
        rank, share = np.unravel_index(kept.argmax(), kept.shape)
        chosen[rank] = normalize(shares[share])
        kept[rank, :] = kept[:, share] = -1
    return Partition(partition.length, tuple(chosen))


def crossing_seconds(held: Partition, level: Partition, machine: Machine, shape: Shape) -> float:
    """What it costs that queries cross to other shares, and results and gradients, too, in both passes.

    Forward, queries go there and the result comes back; backward, queries and the result's gradient go there, and the
    queries' gradient comes back. What arrives is copied once more.
    """
    leaving = max(
        count(own) - count(intersect(own, there)) for own, there in zip(held.segments, level.segments, strict=True)
    )
    once = leaving * shape.heads * shape.head_dim * shape.element
    sizes = np.array([once, once, 2 * once, once])
    return float(machine.inside.time(sizes).sum() + 2 * sizes.sum() / machine.memory)
