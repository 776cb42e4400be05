"""Kernels small enough to be right or wrong at sight, to learn what compute-sanitizer's racecheck follows.

    compute-sanitizer --tool racecheck python tests/race_controls.py specialize

`specialize` has nothing but gl.warp_specialize. `guarded` hands numbers over by two mbarriers; so does `released`,
where readers arrive as the Hopper kernels' do. `unguarded` leaves the mbarriers out: a true race.

What racecheck reports of the first three, it may report of the Hopper kernels as well (docs/benchmarks/kernels.md).
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ringflash.kernels.hopper.compat import WARPGROUP, release

ROUNDS = gl.constexpr(4)


@gluon.jit
def store_own(out_ptr, PART: gl.constexpr):
    """A worker that shares nothing with the other."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    gl.store(out_ptr + PART * 32 + lane, lane)


@gluon.jit
def specialize_kernel(out_ptr):
    """Two workers that share nothing."""
    gl.warp_specialize([(store_own, (out_ptr, 0)), (store_own, (out_ptr, 1))], [1], [24])


@gluon.jit
def read_numbers(out_ptr, number, full, empty, GUARDED: gl.constexpr, RELEASED: gl.constexpr):
    """Add up ROUNDS numbers."""
    total = 0
    for turn in range(ROUNDS):
        if GUARDED:
            mbarrier.wait(full, turn & 1)
        total += gl.max(number.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        if RELEASED:
            release(empty)
        elif GUARDED:
            mbarrier.arrive(empty, count=1)
    gl.store(out_ptr, total)


@gluon.jit
def write_numbers(number, full, empty, GUARDED: gl.constexpr):
    """Write 1 to ROUNDS, one after the other, to the same place."""
    for turn in range(ROUNDS):
        if GUARDED:
            mbarrier.wait(empty, turn & 1 ^ 1)
        number.store(gl.full([1], turn + 1, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        if GUARDED:
            mbarrier.arrive(full, count=1)


@gluon.jit
def numbers_kernel(out_ptr, GUARDED: gl.constexpr, RELEASED: gl.constexpr):
    """One worker writes numbers to shared memory, the other reads them."""
    number = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=WARPGROUP if RELEASED else 1)
    gl.warp_specialize(
        [
            (read_numbers, (out_ptr, number, full, empty, GUARDED, RELEASED)),
            (write_numbers, (number, full, empty, GUARDED)),
        ],
        [1],
        [24],
    )


if __name__ == "__main__":
    mode = sys.argv[1]
    out = torch.zeros(64, dtype=torch.int32, device="cuda")
    if mode == "specialize":
        specialize_kernel[(1,)](out, num_warps=4)
        assert out.tolist() == [*range(32)] * 2
    else:
        numbers_kernel[(1,)](out, mode != "unguarded", mode == "released", num_warps=4)
        assert mode == "unguarded" or out[0].item() == 10
    print("done", mode)
