"""Dropout inside the kernels: the pairs that ringflash.kernels.modifiers.keep_mask drops, drawn where weights are.

A thread has a pair's weight in a register and draws the pair's word there. Of the ten rounds of Philox-4x32 much
depends on the key alone or on the query alone: the first round does, and all but one product of the next two. It is
worked out once for a key and once for a query, in words that `words_of_keys` and `words_of_queries` explain. The last
two rounds leave out what the first of the four words does not need. Beside that, 14 products are left for a pair.

What there is for dropout is compiled into a kernel only if its launch has some.

Legend: M query rows, N key rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.launcher import aligned
from ringflash.kernels.modifiers import PHILOX_KEYS, PHILOX_MULTIPLIERS, Modifiers, dropout_threshold


class Dropout(NamedTuple):
    """What a kernel needs of it; None for none.

    threshold: words below it, as unsigned numbers, drop their pair. kept: the share that is not dropped. positions:
    int32, of queries and of keys; one of the two as a descriptor, in the bits of fp32, as the tensor memory engine
    loads lists.
    """

    seed_ptr: gl.tensor
    threshold: gl.tensor
    kept: gl.tensor
    first_head: gl.tensor
    query_positions: gl.tensor
    key_positions: gl.tensor


def dropout_numbers(modifiers: Modifiers | None) -> tuple[int | None, float | None, int | None]:
    """Threshold, kept and first_head of `Dropout`; their types do not depend on their values."""
    if modifiers is None or not modifiers.dropout:
        return None, None, None
    threshold = dropout_threshold(modifiers.dropout)
    return threshold - (threshold >> 31 << 32), 1 - modifiers.dropout, modifiers.first_head


def listed(positions: Tensor) -> Tensor:
    """Positions as `Dropout` has those in a descriptor, at an address of whole 16 bytes."""
    positions = positions.contiguous()
    return (positions if aligned(positions) else positions.clone()).view(torch.float32)


FIRST, SECOND = (gl.constexpr(x) for x in PHILOX_MULTIPLIERS)


PAIRS = gl.constexpr(4)
"""Pairs that a thread draws for at a time: what one of them waits for the others fill, as so few warps run here."""


@gluon.constexpr_function
def drawing_assembly(count, negates):
    """PTX that drops numbers of `count` pairs: to zero, or to what is below zero where it negates.

    Operands, `count` of each: result, number; words of the query (2) and of the key (4); both words of the seed;
    threshold. Of the last three, which are all the same, the first one's are read.
    """
    first, second = (f"0x{x:08X}" for x in PHILOX_MULTIPLIERS)

    def operand(kind, pair=0):
        return f"${kind * count + pair}"

    lines = []

    def of_all(*texts):
        """Instructions of every pair, one after the other for all: @ ends a pair's own registers, # its operands."""
        for text in texts:
            for pair in range(count):
                own = text.replace("@", f"{pair}")
                for kind in range(8):
                    own = own.replace(f"#{kind}", operand(kind, pair))
                lines.append(own)

    def key_after(word, rounds):
        """The key of a round, in the register `key` and its word's number."""
        lines.append(f"add.u32 key{word}, {operand(8 + word)}, 0x{PHILOX_KEYS[word] * rounds % 2**32:08X};")

    of_all(
        "xor.b32 c@, #2, #4;",
        f"mul.wide.u32 q@, c@, {second};",
        "mov.b64 {b@, a@}, q@;",
        "xor.b32 a@, a@, #5;",
        "xor.b32 c@, #3, #6;",
        "mov.b32 d@, #7;",
    )
    for rounds in range(3, 8):
        key_after(0, rounds)
        key_after(1, rounds)
        of_all(
            f"mul.wide.u32 p@, a@, {first};",
            f"mul.wide.u32 q@, c@, {second};",
            "mov.b64 {low@, high@}, q@;",
            "lop3.b32 a@, high@, b@, key0, 0x96;",
            "mov.b32 b@, low@;",
            "mov.b64 {low@, high@}, p@;",
            "lop3.b32 c@, high@, d@, key1, 0x96;",
            "mov.b32 d@, low@;",
        )
    key_after(1, 8)
    key_after(0, 9)
    of_all(
        f"mul.wide.u32 p@, a@, {first};",
        f"mul.lo.u32 b@, c@, {second};",
        "mov.b64 {low@, high@}, p@;",
        "lop3.b32 c@, high@, d@, key1, 0x96;",
        f"mul.wide.u32 q@, c@, {second};",
        "mov.b64 {low@, high@}, q@;",
        "lop3.b32 a@, high@, b@, key0, 0x96;",
        f"setp.ge.u32 kept@, a@, {operand(10)};",
        "neg.f32 other@, #1;" if negates else "mov.f32 other@, 0f00000000;",
        "selp.f32 #0, #1, other@, kept@;",
    )
    kinds = {"b32": ("a", "b", "c", "d", "low", "high"), "b64": ("p", "q"), "f32": ("other",), "pred": ("kept",)}
    declared = [
        f".reg .{kind} {', '.join(f'{name}{pair}' for name in names for pair in range(count))};"
        for kind, names in kinds.items()
    ]
    return f"{{ .reg .b32 key0, key1; {' '.join(declared)} {' '.join(lines)} }}"


@gluon.constexpr_function
def drawing_operands(count):
    """Constraints of `drawing_assembly`."""
    return ",".join(["=&f"] * count + ["f"] * count + ["r"] * (9 * count))


@gluon.constexpr_function
def key_step(word, rounds):
    """What is added to a word of the seed by the end of so many rounds, as a signed number of 32 bits."""
    step = PHILOX_KEYS[word] * rounds % 2**32
    return step - (step >> 31 << 32)


class Draw(NamedTuple):
    """What words of a head's pairs depend on beside positions.

    The seed's two words, and high and low word of the first round's product of the query head.
    """

    first: gl.tensor
    second: gl.tensor
    head_high: gl.tensor
    head_low: gl.tensor


@gluon.jit
def seed_of(dropout):
    """The seed's two words, which the compiler then knows to be the same in all threads of a warp."""
    seed = gl.load(dropout.seed_ptr)
    return same_in_warp(seed.to(gl.int32)), same_in_warp((seed >> 32).to(gl.int32))


@gluon.jit
def draw_for(dropout, seed, head):
    """See `Draw`."""
    product = (head + dropout.first_head).to(gl.int64) * SECOND
    return Draw(seed[0], seed[1], (product >> 32).to(gl.int32), product.to(gl.int32))


@gluon.jit
def same_in_warp(number):
    """The number, which all threads of a warpgroup have."""
    spread = gl.full([1], number, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    spread = gl.inline_asm_elementwise(
        "redux.sync.or.b32 $0, $1, 0xffffffff;", "=r,r", [spread], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.max(spread, 0)


@gluon.jit
def words_of_queries(draw, position):
    """(high, low) of the second round's product of what the first leaves of a query's position."""
    return products(position ^ draw.head_high ^ draw.first, FIRST)


@gluon.jit
def words_of_keys(draw, position):
    """What a key's position gives the words of its pairs, with the rounds' keys where they are the last to join.

    Low word of the first round's product; low word of the second round's; high and low word of the third round's.
    """
    high, first_low = products(position, FIRST)
    high, second_low = products(high ^ draw.second, SECOND)
    high, third_low = products(high ^ draw.head_low ^ (draw.first + key_step(0, 1)), FIRST)
    return (
        first_low ^ (draw.second + key_step(1, 1)), second_low ^ (draw.first + key_step(0, 2)),
        high ^ (draw.second + key_step(1, 2)), third_low,
    )  # fmt: skip


@gluon.jit
def products(x, MULTIPLIER: gl.constexpr):
    """High and low word of a product; all words are int32 here."""
    product = x.to(gl.uint32, bitcast=True).to(gl.int64) * MULTIPLIER
    return (product >> 32).to(gl.int32), product.to(gl.int32)


@gluon.jit
def drop(weights, dropout, draw, of_query, of_key, NEGATES: gl.constexpr):
    """Weights of pairs, of those that dropout drops zero, or what is below zero where it NEGATES.

    Args:
        weights: of the pairs.
        dropout: see `Dropout`.
        draw: see `draw_for`.
        of_query: `words_of_queries`, broadcast along keys.
        of_key: `words_of_keys`, broadcast along queries.
        NEGATES: see above.
    """
    shape: gl.constexpr = weights.shape
    LAYOUT: gl.constexpr = weights.type.layout
    operands = (
        weights, spread(weights, of_query[0]), spread(weights, of_query[1]),
        spread(weights, of_key[0]), spread(weights, of_key[1]), spread(weights, of_key[2]), spread(weights, of_key[3]),
        gl.full(shape, draw.first, gl.int32, LAYOUT), gl.full(shape, draw.second, gl.int32, LAYOUT),
        gl.full(shape, dropout.threshold, gl.int32, LAYOUT),
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        drawing_assembly(PAIRS, NEGATES), drawing_operands(PAIRS), operands,
        dtype=gl.float32, is_pure=False, pack=PAIRS,
    )  # fmt: skip


@gluon.jit
def spread(weights, word):
    """A word for each row, (M, 1), or for each column, (1, N), as one for each pair."""
    _, word = gl.broadcast(weights, word)
    return word
