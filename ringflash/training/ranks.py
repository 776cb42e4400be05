"""What the ranks of a run say to each other beside tensors."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def from_rank_0(value: T) -> T:
    """What rank 0 passes, on every rank; a collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: T) -> list[T]:
    """What each rank passes, in their order, on every rank; a collective."""
    box = [value] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
