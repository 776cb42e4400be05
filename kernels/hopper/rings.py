"""Stages of shared memory that one warp fills and others read and give back, and the barriers that tell of it."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.blocks import block_columns, block_rows, flat_layout
from ringflash.kernels.hopper.compat import WARPGROUP


class Ring(NamedTuple):
    """Stages with their barriers: each is `full` when its loads have arrived, `empty` when all readers gave it back."""

    blocks: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def allocate_ring(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Room for STAGES blocks of a descriptor, each given back by READERS warpgroups."""
    blocks = gl.allocate_shared_memory(desc.dtype, [STAGES, block_rows(desc), block_columns(desc)], flat_layout(desc))
    full, empty = allocate_full_and_empty(STAGES, READERS * WARPGROUP)
    return Ring(blocks, full, empty)


@gluon.jit
def allocate_full_and_empty(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers of stages: one arrival makes a stage full, so many make it empty."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return full, empty


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr):
    """Barriers at which one arrival counts."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=1)
    return barriers
