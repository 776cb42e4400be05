"""The ranks that share a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ringflash.errors import ArgumentError


@dataclass
class SequenceRanks:
    """What `set_seq_parallel_pg` was given.

    Attributes:
        group: the ranks that share a sequence; None for the default group.
        ulysses: how many exchange heads in yunchang; 0 before anything was given.
        ring: how many form one of its rings.
        ulysses_low: those that exchange heads are neighbours; else those of a ring are.
    """

    group: dist.ProcessGroup | None = None
    ulysses: int = 0
    ring: int = 0
    ulysses_low: bool = True


sequence_ranks = SequenceRanks()


def set_seq_parallel_pg(
    sp_ulysses_degree: int, sp_ring_degree: int, rank: int, world_size: int, use_ulysses_low: bool = True
) -> None:
    """Say which ranks share a sequence: each `sp_ulysses_degree * sp_ring_degree` that follow each other.

    Every rank of the default group has to call it.

    Args:
        sp_ulysses_degree: how many exchange heads in yunchang.
        sp_ring_degree: how many form one of its rings.
        rank: this process in the default group.
        world_size: of the default group.
        use_ulysses_low: those that exchange heads are neighbours; else those of a ring are.

    Raises:
        ArgumentError: the ranks cannot be divided like that.
    """
    degree = sp_ulysses_degree * sp_ring_degree
    if min(sp_ulysses_degree, sp_ring_degree) < 1 or world_size % degree:
        raise ArgumentError(
            f"sp_ulysses_degree={sp_ulysses_degree}, sp_ring_degree={sp_ring_degree}; allowed are positive numbers "
            f"whose product divides world_size={world_size}"
        )
    found = None
    for first in range(0, world_size, degree) if degree < world_size else ():
        made: Any = dist.new_group([*range(first, first + degree)])
        found = made if first <= rank < first + degree else found
    sequence_ranks.group, sequence_ranks.ulysses_low = found, use_ulysses_low
    sequence_ranks.ulysses, sequence_ranks.ring = sp_ulysses_degree, sp_ring_degree
