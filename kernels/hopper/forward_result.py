"""How a tile's result leaves the forward kernel: merged with a carry, the result of earlier launches.

Legend: D head dimension.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ringflash.kernels.hopper.blocks import flat_layout, has_head_dimension, head_place, store_block
from ringflash.kernels.hopper.compat import reinterpret
from ringflash.kernels.hopper.fp32_rows import load_rows, store_rows
from ringflash.kernels.hopper.softmax import LOG2_E, LOWEST, ROWS


@gluon.jit
def merge_sums(maximum, total, carried_lse):
    """Row maximum and sum with a carry's weight; factors of the rows' own accumulator and of the carry's.

    A learned sink is a carry of zeros.
    """
    # A row without keys so far has no weight, one of nan a weight of nan.
    carried_maximum = gl.where(carried_lse == float("-inf"), LOWEST, carried_lse * LOG2_E)
    new_maximum = gl.maximum(maximum, carried_maximum)
    carry_weight = gl.where(carried_lse == float("-inf"), 0.0, gl.exp2(carried_maximum - new_maximum))
    own_weight = gl.exp2(maximum - new_maximum)
    return new_maximum, total * own_weight + carry_weight, own_weight, carry_weight


@gluon.jit
def merge_halves(problem, result, out, first_row, first_column, head, own_weight, carry_weight, WIDTH: gl.constexpr):
    """The weighted sum of an accumulator and the carry, of which registers hold no more than half beside it."""
    D: gl.constexpr = out.shape[1]
    first_half, second_half = gl.split(out.reshape([ROWS, 2, D // 2]).permute((0, 2, 1)))
    HALF: gl.constexpr = first_half.type.layout
    carried = load_carried(problem, result, first_row, first_column, head, WIDTH, D // 2, HALF)
    first_half = weighted_sum(first_half, own_weight, carried, carry_weight)
    carried = load_carried(problem, result, first_row, first_column + D // 2, head, WIDTH, D // 2, HALF)
    second_half = weighted_sum(second_half, own_weight, carried, carry_weight)
    whole = gl.join(first_half, second_half).permute((0, 2, 1)).reshape([ROWS, D])
    return gl.convert_layout(whole, out.type.layout, assert_trivial=True)


@gluon.jit
def load_carried(
    problem, result, first_row, first_column, head, WIDTH: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr
):
    """COLUMNS columns of a warpgroup's rows of the carry, whose rows have WIDTH."""
    return load_rows(
        result.carry_out_ptr, first_row, first_column, head, problem.query_rows, problem.schedule.heads, WIDTH,
        COLUMNS, LAYOUT,
    )  # fmt: skip


@gluon.jit
def weighted_sum(a, weight_of_a, b, weight_of_b):
    """Of two tiles, each row with its own weights."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, a.type.layout)
    b = b * gl.convert_layout(weight_of_b, LAYOUT, assert_trivial=True)[:, None]
    return a * gl.convert_layout(weight_of_a, LAYOUT, assert_trivial=True)[:, None] + b


@gluon.jit
def store_out(
    problem, result, out_desc, staging, out, first_row, first_column, head,
    WIDTH: gl.constexpr, DIRECT_OUT: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's rows: through shared memory or, in fp32, straight from registers (whole sectors)."""
    if DIRECT_OUT:
        base, heads = result.out_ptr, problem.schedule.heads
        store_rows(base, out, first_row, first_column, head, problem.query_rows, heads, WIDTH)
    else:
        dtype: gl.constexpr = out_desc.dtype
        if staging.dtype != dtype:  # a carry's place, which has room for twice as many rows in 16 bits
            D: gl.constexpr = out.shape[1]
            if has_head_dimension(out_desc):
                staging = reinterpret(staging, dtype, [2, ROWS, D], flat_layout(out_desc)).index(0)
            else:
                staging = reinterpret(staging, dtype, [2 * ROWS, D], flat_layout(out_desc)).slice(0, ROWS, 0)
        staging.store(out.to(dtype))
        fence_async_shared()
        store_block(out_desc, first_row, head_place(out_desc, head, WIDTH), first_column, staging)
