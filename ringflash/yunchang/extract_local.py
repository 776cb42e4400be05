"""Which tokens each rank holds in yunchang's layouts, and those tokens of a whole tensor."""

from __future__ import annotations

import functools
import math

import numpy as np
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments
from ringflash.yunchang.globals import sequence_ranks

LAYOUTS = ("basic", "zigzag", "strip")


@functools.lru_cache(maxsize=64)
def partition_of(layout: str, seqlen: int, ring: int, ulysses: int, ulysses_low: bool) -> Partition:
    """The tokens of each rank: put in an order, in which those of one ring rank lie together, and cut into pieces.

    Args:
        layout: one of `LAYOUTS`.
        seqlen: tokens of all ranks.
        ring: see `SequenceRanks`.
        ulysses: see `SequenceRanks`.
        ulysses_low: see `SequenceRanks`.
    """
    ranks = ring * ulysses
    unit = math.lcm(ranks, 2 * ring) if layout == "zigzag" else ranks
    if seqlen % unit or seqlen == 0:
        raise ArgumentError(
            f"{seqlen} tokens in layout {layout!r} of ring degree {ring} and ulysses degree {ulysses}; allowed are "
            f"multiples of {unit}"
        )
    order, piece_of = np.arange(seqlen), np.arange(ranks)
    if layout == "zigzag":
        chunks = order.reshape(2 * ring, -1)
        order = np.stack([chunks[:ring], chunks[: -ring - 1 : -1]], axis=1)
        piece_of = piece_of if ulysses_low else piece_of % ring * ulysses + piece_of // ring
    elif layout == "strip":
        order = order.reshape(-1, ring).T
    return Partition(seqlen, tuple(map(_runs, order.reshape(ranks, -1)[piece_of])))


def _runs(positions: np.ndarray) -> Segments:
    """Ascending positions as intervals."""
    first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    last = np.append(first[1:], len(positions)) - 1
    return tuple(zip(positions[first].tolist(), (positions[last] + 1).tolist(), strict=True))


def extract_local(
    layout: str,
    value: Tensor,
    rank: int,
    world_size: int,
    rd: int | None = None,
    ud: int | None = None,
    dim: int = 1,
) -> Tensor:
    """This rank's tokens of a tensor that every rank holds whole. Differentiable.

    Args:
        layout: one of `LAYOUTS`.
        value: any tensor.
        rank: this process in the default group.
        world_size: number of ranks that share a sequence, where no degrees are given.
        rd: ring degree.
        ud: ulysses degree.
        dim: the tokens' dimension.
    """
    ring, ulysses = (world_size, 1) if rd is None or ud is None else (rd, ud)
    partition = partition_of(layout, value.shape[dim], ring, ulysses, sequence_ranks.ulysses_low)
    return value.index_select(dim, partition.positions(rank % partition.ranks).to(value.device))


EXTRACT_FUNC_DICT = {layout: functools.partial(extract_local, layout) for layout in LAYOUTS}
