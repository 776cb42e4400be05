"""A ring of rings for several hosts: blocks go round the ranks of a host before they go on to the next host.

In a plain ring, a block crosses to another host in every stage, over the one network link of the rank at the end of its
host, and all wait for that. Here it goes once round the fast links of a host first, and then all ranks of the host pass
what they have on at once, each over its own network link: hosts - 1 such stages instead of ranks - 1, and each link
carries 1 / (ranks a host) of what that one does. After LoongTrain (Gu et al., arXiv 2406.18485), but that only the
positions that a later rank still needs are passed on.
"""

from __future__ import annotations

import numpy as np

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.outline import Outline
from ringflash.parallel.planning.plan import Buffers, Move, Plan, RankPlan, Stage, without_idle_end
from ringflash.parallel.planning.ring import PIECE
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, intersect, normalize
from ringflash.parallel.positions.union import Union
from ringflash.parallel.positions.visibility import needed_keys


def double_ring(mask: Mask, queries: Partition, keys: Partition | None = None, hosts: int = 1) -> Plan:
    """Rings within hosts, and one over hosts.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys, on as many ranks; like the queries if None.
        hosts: how many hosts the ranks lie on, equally many on each, in order.

    Raises:
        ArgumentError: the hosts do not divide the ranks.
    """
    keys = keys or queries
    check_hosts(hosts, queries.ranks)
    needed = needed_keys(mask, queries.segments, keys.length)
    return Plan(
        "double-ring",
        queries,
        keys,
        lambda rank: _of_rank(rank, hosts, queries, keys, needed),
        lambda: _outline(hosts, queries.ranks),
    )


def check_hosts(hosts: int, ranks: int) -> None:
    """Raise ArgumentError unless ranks lie equally on hosts."""
    if hosts < 1 or ranks % hosts:
        raise ArgumentError(f"hosts={hosts}; allowed are numbers from 1 that divide the {ranks} ranks")


# A block visits, in stage (turn, step) after `turn` hosts and `step` ranks of this one, the rank `step` further round
# its host than where it came in, and it comes into the next host where it was last, `size` - 1 ranks further.


def _owner(rank: int, turn: int, step: int, hosts: int, size: int) -> int:
    host, local = divmod(rank, size)
    return (host - turn) % hosts * size + (local - step + turn) % size


def _reader(rank: int, turn: int, step: int, hosts: int, size: int) -> int:
    host, local = divmod(rank, size)
    return (host + turn) % hosts * size + (local + step - turn) % size


def _outline(hosts: int, ranks: int) -> Outline:
    size = ranks // hosts
    rank, owner = np.ogrid[:ranks, :ranks]
    turn = (rank // size - owner // size) % hosts
    step = (rank % size - owner % size + turn) % size
    within = rank // size * size + (rank - 1) % size
    source = np.where(step > 0, within, (rank - size) % ranks)
    return Outline(ranks, turn * size + step, np.where(rank == owner, rank, source), piece=PIECE)


def _of_rank(rank: int, hosts: int, queries: Partition, keys: Partition, needed: list[Segments]) -> RankPlan:
    ranks, own, size = queries.ranks, keys.segments[rank], queries.ranks // hosts
    host, local = divmod(rank, size)
    work: list[Segments] = [()] * ranks
    onward = work.copy()
    other_hosts = Union()  # what the hosts need that a block has yet to come to
    for turn in range(hosts - 1, -1, -1):
        this_host = Union()  # what the ranks of this one need that it has yet to come to
        for step in range(size - 1, -1, -1):
            stage = turn * size + step
            block = keys.segments[_owner(rank, turn, step, hosts, size)]
            work[stage] = intersect(block, needed[rank])
            onward[stage] = normalize((*this_host.intersect(block), *other_hosts.intersect(block)))
            this_host.add(needed[host * size + (local + size - step) % size])
        next_host = (host + hosts - turn) % hosts
        for other in range(next_host * size, (next_host + 1) * size):
            other_hosts.add(needed[other])
    stages = []
    inner = host * size + (local + 1) % size, host * size + (local - 1) % size
    outer = (rank + size) % ranks, (rank - size) % ranks
    for stage in range(ranks):
        turn, step = divmod(stage, size)
        after, before = inner if step + 1 < size else outer
        coming = normalize((*work[stage + 1], *onward[stage + 1])) if stage + 1 < ranks else ()
        reader = _reader(rank, turn, step, hosts, size)
        reduced = intersect(own, needed[reader]) if stage else ()
        stages.append(
            Stage(
                work=work[stage],
                receives=(Move(before, coming),) if coming else (),
                sends=(Move(after, onward[stage], relayed=stage > 0),) if onward[stage] else (),
                returns=(Move(_owner(rank, turn, step, hosts, size), work[stage]),) if stage and work[stage] else (),
                reduces=(Move(reader, reduced),) if reduced else (),
            )
        )
    kept = without_idle_end(stages)
    return RankPlan(rank, queries.segments[rank], own, kept, Buffers.of(kept, PIECE), PIECE)
