"""Gluon's names as they changed from triton 3.6 to 3.9, and the three device operations it has no name for.

The rest of the package imports what moved from here, so a new triton is one file's work.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import _core
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in 3.8; the old names raise from 3.9 on.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait

if hasattr(tma, "async_atomic_add"):  # 3.8
    async_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @_core.builtin
    def async_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile in shared memory to global memory; complete after `store_wait`."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


_Block = gl.shared_memory_descriptor
_reinterpret = getattr(_Block, "reinterpret", None) or _Block._reinterpret  # public from 3.9 on


@_core.builtin
def reinterpret(block, dtype, shape, layout, _semantic=None):
    """A block's memory as another block of as many bytes."""
    return _reinterpret(block, dtype, shape, layout, _semantic=_semantic)


WARPGROUP = gl.constexpr(128)
"""Threads of a warpgroup, and so arrivals that one `release` makes."""


@gluon.jit
def release(empty):
    """Give a buffer back to its writer: every thread of the calling warpgroup arrives, so count WARPGROUP for each.

    `mbarrier.arrive` lets one thread arrive for all and so puts a barrier of the whole warpgroup in front of itself and
    of the next wait: four in each step of the forward's loop. This arrives thread by thread "once the thread's earlier
    cp.async copies are done", of which there are none, and needs no barrier.
    """
    async_copy.mbarrier_arrive(empty, increment_count=False)


@gluon.jit
def meet(NAME: gl.constexpr):
    """Wait at a named barrier until both warpgroups are there. Names "8" to "15" are free: the compiler uses 0 to 7."""
    lane = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "bar.sync " + NAME + ", 256; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
    )


barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in 3.7
