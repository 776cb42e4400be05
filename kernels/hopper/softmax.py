"""The online softmax of a warpgroup's 64 query rows, in registers, base 2 (Milakov, Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-1e30)
"""Row maximum before any key: finite, so that a hidden score (-inf) less the maximum is -inf and not nan."""

ROWS = gl.constexpr(64)
"""Query rows of a warpgroup."""

OUTGROWN = gl.constexpr(2.0)
"""By so much, base 2, a row's scores have to outgrow the maximum in use before another takes its place.

Until then sums need no rescaling. But a row's largest weight, which is 1 against its own maximum, is rounded
like the others, which adds as much to the error as rounding out does where that weight is most of the row.
"""


@gluon.jit
def hide(scores, own, row_start, row_stop, first_key, N: gl.constexpr, SCORES: gl.constexpr):
    """-inf where a row does not see a key. Most blocks on a border have only hidden keys before it or behind it."""
    if first_key < own.full_begin:
        keys = first_key + gl.arange(0, N, gl.SliceLayout(0, SCORES))[None, :]
        scores = gl.where((keys >= row_start[:, None]) & (keys < row_stop[:, None]), scores, float("-inf"))
    elif first_key + N > own.full_end:
        keys = first_key + gl.arange(0, N, gl.SliceLayout(0, SCORES))[None, :]
        scores = gl.where(keys < row_stop[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def softmax_step(scores, maximum, total, scale_log2):
    """Weights of a block against the row maximum, the factor that brings earlier sums to it, maximum and sums."""
    new_maximum = outgrown(gl.max(scores, 1) * scale_log2, maximum)
    weights = gl.exp2(scores * scale_log2 - new_maximum[:, None])
    rescale, new_total = rescaled(weights, maximum, new_maximum, total)
    return weights, rescale, new_maximum, new_total


@gluon.jit
def outgrown(largest, maximum):
    """The row maximum in use from now on."""
    return gl.where(largest > maximum + OUTGROWN, largest, maximum)


@gluon.jit
def rescaled(weights, maximum, new_maximum, total):
    """The factor that brings sums to the new maximum, and sums with a block's weights."""
    rescale = gl.exp2(maximum - new_maximum)
    own_rescale = gl.convert_layout(rescale, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    return rescale, settle(total * own_rescale[:, None] + own_sums(weights))


@gluon.jit
def own_sums(weights):
    """Sums of what each thread has of the rows, (ROWS, 4): four threads share a row, and add up their sums once a tile.

    A thread has columns 8 i + 2 j and 8 i + 2 j + 1 for all i, where j is its place among the four.
    """
    return gl.sum(gl.sum(weights.reshape([ROWS, weights.shape[1] // 8, 4, 2]), 3), 1)


SETTLE = gl.constexpr(
    "{ .reg .pred odd; setp.lt.f32 odd, $2, 0f00000000; setp.lt.or.f32 odd, $3, 0f00000000, odd;"
    " vote.sync.any.pred odd, odd, 0xffffffff; selp.f32 $0, 0f7FC00000, $2, odd; selp.f32 $1, 0f7FC00000, $3, odd; }"
)


@gluon.jit
def settle(total):
    """`total`, which is never negative, known before any branch or wait that follows.

    ptxas would otherwise move exponentials and their sums behind the wait for the tensor cores, under whose products
    they are to run. A vote of the warp it does not move.
    """
    return gl.inline_asm_elementwise(SETTLE, "=f,=f,f,f", [total], dtype=gl.float32, is_pure=False, pack=2)


@gluon.constexpr_function
def rescale_assembly(count):
    """PTX that multiplies a thread's `count` accumulators by their rows' factors unless all are one.

    A branch that a warp takes as one. The accumulators 0 and 2 of a thread are of its two rows.
    """
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (
        f"{{ .reg .pred one; setp.eq.f32 one, ${2 * count}, 0f3F800000;"
        f" setp.eq.and.f32 one, ${2 * count + 2}, 0f3F800000, one;"
        f" vote.sync.all.pred one, one, 0xffffffff; @one bra.uni DONE; {products} DONE: }}"
    )


@gluon.constexpr_function
def rescale_operands(count):
    """Constraints of `rescale_assembly`."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def rescale_if_needed(out, rescale, D: gl.constexpr):
    """`out` times each row's factor; no work in a warp whose factors are all one."""
    out, factor = gl.broadcast(out, rescale[:, None])
    return gl.inline_asm_elementwise(
        rescale_assembly(D // 2), rescale_operands(D // 2), [out, factor],
        dtype=gl.float32, is_pure=False, pack=D // 2,
    )  # fmt: skip
