"""The backward kernel with one program for each multiprocessor, which takes tile after tile.

The consumers are those of backward_kernel that work ahead. What a program then does once and not for each tile is its
start: barriers, registers, the first reading of descriptors. The next tile's first queries load under this one's end.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ringflash.kernels.hopper.backward_kernel import (
    HALF,
    Sums,
    allocate_stream,
    consume_ahead,
    fill,
    ring_place,
    visiting_rows,
)
from ringflash.kernels.hopper.compat import WARPGROUP, async_load, release
from ringflash.kernels.hopper.schedule import Schedule, Tickets, allocate_tickets, draw, read, tile_and_head
from ringflash.kernels.hopper.turns import Turns


class Launch(NamedTuple):
    """What all warps need to know to find their tiles."""

    rows_of_tile_ptr: gl.tensor
    query_rows: gl.tensor
    padded_rows: gl.tensor
    key_rows: gl.tensor
    schedule: Schedule
    tickets: Tickets


@gluon.jit(
    do_not_specialize=[
        "query_rows", "padded_rows", "key_rows", "key_heads", "section",
        "query_head_stride", "dout_head_stride", "key_head_stride", "value_head_stride",
    ]
)  # fmt: skip
def attend_backward_persistent_kernel(
    query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc,
    dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, rows_of_key_ptr, rows_of_tile_ptr,
    counter_ptr, query_rows, padded_rows, key_rows, key_heads, section,
    query_head_stride, dout_head_stride, key_head_stride, value_head_stride, scale,
    GROUP: gl.constexpr, QUERY_STAGES: gl.constexpr, DOUT_STAGES: gl.constexpr, AHEAD: gl.constexpr,
    FLOAT_OUT: gl.constexpr, ORDERED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `launch_backward` for the arguments; counter_ptr is an int32 zero."""
    gl.static_assert(AHEAD and not ORDERED)
    M: gl.constexpr = query_desc.block_type.shape[0]
    N: gl.constexpr = key_desc.block_type.shape[0]
    dtype: gl.constexpr = query_desc.dtype
    queries = allocate_stream(query_desc, lse_desc, QUERY_STAGES)
    douts = allocate_stream(dout_desc, delta_desc, DOUT_STAGES)
    key = gl.allocate_shared_memory(dtype, [1, N, key_desc.block_type.shape[1]], key_desc.layout)
    value = gl.allocate_shared_memory(dtype, [1, N, value_desc.block_type.shape[1]], value_desc.layout)
    DSCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([N, M], dtype)
    dscores = gl.allocate_shared_memory(dtype, [2, N, M], DSCORES)
    dquery = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], dquery_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given_back = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(loaded.index(i), count=1)
    mbarrier.init(given_back.index(0), count=2 * WARPGROUP)
    tickets = allocate_tickets(counter_ptr, 2)
    fence_async_shared()

    schedule = Schedule((key_rows + N - 1) // N, key_heads, section)
    launch = Launch(rows_of_tile_ptr, query_rows, padded_rows, key_rows, schedule, tickets)
    sums = Sums(dquery_desc, dkey_desc, dvalue_desc, dkey_ptr, dvalue_ptr, key_rows, key_heads)
    gl.warp_specialize(
        [
            (consume_tiles, (launch, sums, queries, douts, key, value, dscores, dquery, loaded, given_back,
                             rows_of_key_ptr, scale, 0, GROUP, FLOAT_OUT)),
            (consume_tiles, (launch, sums, queries, douts, key, value, dscores, dquery, loaded, given_back,
                             rows_of_key_ptr, scale, 1, GROUP, FLOAT_OUT)),
            (produce_tiles, (launch, query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, queries, douts,
                             key, value, loaded, given_back, key_head_stride, value_head_stride,
                             query_head_stride, dout_head_stride, GROUP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def tile_at(launch, place, M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr):
    """Key tile, key head and visited rows of a place: tiles from the first, which is seen by most."""
    tile, key_head = tile_and_head(launch.schedule, place)
    key_tile = launch.schedule.tiles - 1 - tile
    rows = visiting_rows(
        launch.rows_of_tile_ptr, key_tile, launch.query_rows, launch.padded_rows, launch.key_rows, key_head * GROUP,
        M, N, 4,
    )  # fmt: skip
    return key_tile, key_head, rows


@gluon.jit
def consume_tiles(
    launch, sums, queries, douts, key, value, dscores, dquery, loaded, given_back, rows_of_key_ptr, scale,
    PART: gl.constexpr, GROUP: gl.constexpr, FLOAT_OUT: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup, over all of the program's tiles."""
    M: gl.constexpr = queries.blocks.shape[1]
    N: gl.constexpr = key.shape[1]
    no_turns = Turns(loaded, loaded, loaded, loaded)
    place = gl.program_id(0)
    tile = 0
    steps = 0
    stage = 0
    parity = 0
    while place < launch.schedule.tiles * launch.schedule.heads:
        key_tile, key_head, rows = tile_at(launch, place, M, N, GROUP)
        stage, parity = consume_ahead(
            rows, sums, queries, douts, key, value, dscores, dquery, no_turns, loaded, rows_of_key_ptr,
            key_tile * N, key_head, scale, tile, steps, stage, parity, PART, GROUP, FLOAT_OUT, False,
        )  # fmt: skip
        release(given_back.index(0))
        steps += rows.blocks * GROUP
        place = read(launch.tickets, tile)
        tile += 1


@gluon.jit
def produce_tiles(
    launch, query_desc, dout_desc, key_desc, value_desc, lse_desc, delta_desc, queries, douts, key, value,
    loaded, given_back, key_head_stride, value_head_stride, query_head_stride, dout_head_stride, GROUP: gl.constexpr,
):  # fmt: skip
    """The producer warp, over all of the program's tiles; keys and values come once they are given back."""
    M: gl.constexpr = query_desc.block_type.shape[0]
    N: gl.constexpr = key_desc.block_type.shape[0]
    QUERY_STAGES: gl.constexpr = queries.blocks.shape[0]
    DOUT_STAGES: gl.constexpr = douts.blocks.shape[0]
    place = gl.program_id(0)
    tile = 0
    step = 0
    while place < launch.schedule.tiles * launch.schedule.heads:
        key_tile, key_head, rows = tile_at(launch, place, M, N, GROUP)
        first_step = step
        for member in range(GROUP):
            head = rows.first_head + member
            for block in range(rows.blocks):
                row = rows.begin + block * M
                number = head * rows.padded_rows + row
                stage, parity = ring_place(step, QUERY_STAGES)
                fill(queries, query_desc, lse_desc, row, head * query_head_stride, number, stage, parity)
                stage, parity = ring_place(step, DOUT_STAGES)
                fill(douts, dout_desc, delta_desc, row, head * dout_head_stride, number, stage, parity)
                if step == first_step:
                    mbarrier.wait(given_back.index(0), (tile & 1) ^ 1)
                    mbarrier.expect(loaded.index(0), key_desc.block_type.nbytes)
                    async_load(key_desc, [key_tile * N, key_head * key_head_stride], loaded.index(0), key.index(0))
                    mbarrier.expect(loaded.index(1), value_desc.block_type.nbytes)
                    async_load(
                        value_desc, [key_tile * N, key_head * value_head_stride], loaded.index(1), value.index(0)
                    )
                step += 1
        place = draw(launch.tickets, tile)
        tile += 1
