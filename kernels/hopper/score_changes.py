"""Modifiers of scores inside the kernels: softcap, ALiBi and padding, as ringflash.kernels.modifiers defines them.

A field of `ScoreChanges` that is None takes its step out of the kernel when it is compiled, so that plain attention is
what it would be without this file. What a key brings along is one number, loaded with its block: its position with
ALiBi, infinite for padding; and without ALiBi 0, or -inf for padding, which is added.

Scores are raw, as query . key, and multiplied by a unit where they are exponentiated: by the scale, or with a softcap
by the softcap, as a bent score is tanh(scale / softcap * raw).

Legend: M query rows, N key rows of a block, S key rows.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.softmax import LOG2_E, outgrown, rescaled, softmax_step
from ringflash.kernels.modifiers import Modifiers


class ScoreChanges(NamedTuple):
    """What the kernel needs of modifiers.

    bend: scale over softcap. slopes: (T, H) with strides, to be multiplied by inverse_unit. key_numbers_desc: of the
    numbers that keys bring along.
    """

    bend: gl.tensor
    query_positions: gl.tensor
    slopes: gl.tensor
    slopes_row: gl.tensor
    slopes_head: gl.tensor
    inverse_unit: gl.tensor
    key_numbers_desc: gl.tensor


@gluon.jit
def rows_of_changes(changes, rows, inside, head, scores):
    """(position, slope) of query rows as fp32, along a product's result; of no meaning where nobody needs them."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    position = gl.zeros([rows.shape[0]], gl.float32, LAYOUT)
    slope = position
    if changes.slopes is not None:
        position = gl.load(changes.query_positions + rows, mask=inside, other=0).to(gl.float32)
        offset = rows.to(gl.int64) * changes.slopes_row + head.to(gl.int64) * changes.slopes_head
        slope = gl.load(changes.slopes + offset, mask=inside, other=0.0) * changes.inverse_unit
    return position, slope


@gluon.jit
def change_scores(scores, changes, key_numbers, position, slope, HIDES: gl.constexpr):
    """Raw scores of a block in the unit of the softmax, -inf for keys that are padding; see `softmax_of_changed`.

    Args:
        scores: (M, N).
        changes: see `ScoreChanges`.
        key_numbers: (N,) in shared memory.
        position: (M,) of the query rows.
        slope: (M,) of the query rows.
        HIDES: whether some keys are padding.
    """
    if changes.key_numbers_desc is not None:
        if changes.bend is not None:
            scores = bent_scores(scores, changes.bend)
        number = key_numbers.load(gl.SliceLayout(0, scores.type.layout))[None, :]
        if changes.slopes is None:
            scores = scores + number
        else:
            scores = scores - slope[:, None] * gl.abs(position[:, None] - number)
            if HIDES:
                scores = gl.where(number == float("inf"), float("-inf"), scores)
    return scores


@gluon.constexpr_function
def hidden_score(softcap):
    """Raw score of a hidden pair in the backward pass.

    A softcap would bend -inf to a finite score. Were scores hidden behind it, registers would have to hold them twice
    over the branch that does so, as the gradient needs what was bent.
    """
    return -3e38 if softcap else float("-inf")


BENT_WEIGHTS = gl.constexpr(
    "{ .reg .f32 bent, exponent, slope; mul.f32 bent, $2, $4; tanh.approx.f32 bent, bent;"
    " neg.f32 exponent, $3; fma.rn.f32 exponent, bent, $5, exponent; fma.rn.f32 exponent, $2, 0f0DA24260, exponent;"
    " ex2.approx.ftz.f32 $0, exponent; neg.f32 slope, bent; fma.rn.f32 slope, slope, bent, 0f3F800000;"
    " mul.f32 $1, $0, slope; }"
)
"""A raw score times 1e-30 is nothing, but that of a hidden pair leaves no weight."""


@gluon.jit
def bent_weights(scores, offset, bend, unit_log2):
    """exp2 of capped scores less an offset, and the same times the softcap's slope, for the backward pass.

    In one piece, lest the compiler does each step for all scores before the next, for which registers are too few.
    """
    scores, offset = gl.broadcast(scores, offset)
    bend = gl.full(scores.shape, bend, gl.float32, scores.type.layout)
    unit_log2 = gl.full(scores.shape, unit_log2, gl.float32, scores.type.layout)
    return gl.inline_asm_elementwise(
        BENT_WEIGHTS, "=&f,=&f,f,f,f,f", [scores, offset, bend, unit_log2],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
    )  # fmt: skip


def _float_bits(*numbers: float) -> tuple[str, ...]:
    """Numbers as PTX writes them."""
    return tuple(f"0f{struct.pack('>f', x).hex().upper()}" for x in numbers)


BEND_LEVELS = gl.constexpr(
    (
        _float_bits(0.3, -0.33312108746922464, 0.1264066969400692),
        _float_bits(0.75, -0.33328044785462324, 0.13253358396168197, -0.04986595498996735, 0.012750472859742599),
    )
)
"""Up to the first number of each, tanh(x) is x + x^3 (a + b x^2 + ...) within 3e-7; the others are a, b and so on."""


@gluon.constexpr_function
def bend_assembly(count, levels, weighs):
    """PTX that bends a thread's `count` scores, tanh(scale / softcap * score), in their place.

    The operand behind them is scale over softcap. If it `weighs`, each row's maximum comes before that operand and the
    softcap in base 2 behind it, and what takes the scores' place are their weights, of which -inf has none.

    Multiply-adds alone, as few as a warp's largest score allows, unless it is beyond the last level: exponentials and
    reciprocals, two for each score, would keep the special function unit, which has the softmax's as well, busier than
    the tensor cores.
    """
    scores = [f"${i}" for i in range(count)]
    maxima = [f"${2 * count + i}" for i in range(count)]
    bend, unit = (f"${3 * count}", f"${4 * count}") if weighs else (f"${2 * count}", "0f3F800000")
    declared = " ".join(f".reg .f32 k{i};" for i in range(max(map(len, levels)) - 1))
    text = [f"{{ .reg .pred beyond, hidden; .reg .f32 most, size, square, power, first, sum; {declared}"]
    text.append(f"mul.f32 first, {bend}, {unit}; mov.f32 most, 0f00000000;")
    text += [f"abs.f32 size, {x}; max.f32 most, most, size;" for x in scores]
    text.append(f"mul.f32 most, most, {bend};")
    for level, numbers in enumerate(levels):
        limit, *terms = numbers
        text.append(f"setp.gt.f32 beyond, most, {limit}; vote.sync.any.pred beyond, beyond, 0xffffffff;")
        text.append(f"@beyond bra.uni BEYOND{level}; mul.f32 square, {bend}, {bend}; mul.f32 power, first, square;")
        text += [f"mul.f32 k{i}, power, {x}; mul.f32 power, power, square;" for i, x in enumerate(terms)]
        for x, maximum in zip(scores, maxima, strict=True):
            text.append(f"mul.f32 square, {x}, {x}; mov.f32 sum, k{len(terms) - 1};")
            text += [f"fma.rn.f32 sum, sum, square, k{i};" for i in reversed(range(len(terms) - 1))]
            text.append("fma.rn.f32 sum, sum, square, first;")
            if weighs:
                text.append(f"neg.f32 size, {maximum}; fma.rn.f32 sum, {x}, sum, size; ex2.approx.ftz.f32 {x}, sum;")
            else:
                text.append(f"mul.f32 {x}, {x}, sum;")
        text.append(f"bra.uni DONE; BEYOND{level}:")
    for x, maximum in zip(scores, maxima, strict=True):
        text.append(f"setp.eq.f32 hidden, {x}, 0fFF800000;")
        text.append(f"mul.f32 {x}, {x}, {bend}; mul.f32 {x}, {x}, 0f4038AA3B; ex2.approx.ftz.f32 {x}, {x};")
        text.append(f"add.f32 {x}, {x}, 0f3F800000; rcp.approx.ftz.f32 {x}, {x};")
        text.append(f"fma.rn.f32 {x}, {x}, 0fC0000000, 0f3F800000;")
        if weighs:
            text.append(f"neg.f32 size, {maximum}; fma.rn.f32 {x}, {x}, {unit}, size; ex2.approx.ftz.f32 {x}, {x};")
            text.append(f"selp.f32 {x}, 0f00000000, {x}, hidden;")
    return " ".join((*text, "DONE: }"))


@gluon.constexpr_function
def bend_operands(count, weighs):
    """Constraints of `bend_assembly`."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * (count * (3 if weighs else 1)))


@gluon.jit
def bent_scores(scores, bend):
    """tanh(bend * scores), within 3e-7."""
    COUNT: gl.constexpr = scores.shape[0] * scores.shape[1] // 128
    bend = gl.full(scores.shape, bend, gl.float32, scores.type.layout)
    return gl.inline_asm_elementwise(
        bend_assembly(COUNT, BEND_LEVELS, False), bend_operands(COUNT, False), [scores, bend],
        dtype=gl.float32, is_pure=False, pack=COUNT,
    )  # fmt: skip


@gluon.jit
def softmax_of_changed(scores, changes, maximum, total, unit_log2):
    """`softmax_step` of what `change_scores` has left, which a softcap alone has not bent yet.

    As a cap keeps the order of scores, rows have their maxima before it. Then a score's bend and exponent are one chain
    of multiply-adds: two fewer.
    """
    if changes.bend is None or changes.key_numbers_desc is not None:
        weights, rescale, new_maximum, new_total = softmax_step(scores, maximum, total, unit_log2)
    else:
        COUNT: gl.constexpr = scores.shape[0] * scores.shape[1] // 128
        largest = gl.max(scores, 1)
        bent = 1.0 - 2.0 / (gl.exp2(largest * (changes.bend * (2.0 * LOG2_E))) + 1.0)
        bent = gl.where(largest == float("-inf"), float("-inf"), bent)  # no score, so none that a cap would bend
        new_maximum = outgrown(bent * unit_log2, maximum)
        scores, maxima = gl.broadcast(scores, new_maximum[:, None])
        bend = gl.full(scores.shape, changes.bend, gl.float32, scores.type.layout)
        unit = gl.full(scores.shape, unit_log2, gl.float32, scores.type.layout)
        weights = gl.inline_asm_elementwise(
            bend_assembly(COUNT, BEND_LEVELS, True), bend_operands(COUNT, True), [scores, maxima, bend, unit],
            dtype=gl.float32, is_pure=False, pack=COUNT,
        )  # fmt: skip
        rescale, new_total = rescaled(weights, maximum, new_maximum, total)
    return weights, rescale, new_maximum, new_total


def key_numbers(modifiers: Modifiers) -> Tensor | None:
    """A number for each key row as the kernel takes it, (S,) fp32; None where modifiers need none.

    Positions are exact up to 2^24.
    """
    positions = None if modifiers.slopes is None else modifiers.key_positions
    given = modifiers.key_visible if positions is None else positions
    if given is None:
        return None
    count = given.shape[0]
    numbers = given.new_empty(count, dtype=torch.float32)
    if count:
        key_numbers_kernel[(triton.cdiv(count, 1024),)](positions, modifiers.key_visible, numbers, count)
    return numbers


@compiled_once
@triton.jit(do_not_specialize=["count"])
def key_numbers_kernel(positions, visible, numbers, count):
    """See `key_numbers`. Program = 1,024 keys."""
    key = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    number = tl.zeros([1024], tl.float32)
    hidden = float("-inf")
    if positions is not None:
        number = tl.load(positions + key, mask=key < count, other=0).to(tl.float32)
        hidden = float("inf")
    if visible is not None:
        number = tl.where(tl.load(visible + key, mask=key < count, other=0) != 0, number, hidden)
    tl.store(numbers + key, number, mask=key < count)
