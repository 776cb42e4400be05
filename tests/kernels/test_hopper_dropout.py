"""What the Hopper kernels draw for dropout, by running the PTX that does so; no GPU is needed."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from ringflash.kernels.hopper import dropout
from ringflash.kernels.modifiers import LOW_32, PHILOX_MULTIPLIERS, Modifiers, dropout_threshold, philox

WORDS = st.integers(0, LOW_32)


def run_ptx(assembly: str, operands: dict[str, int | float]) -> dict[str, int | float]:
    """Registers behind the instructions that dropout's PTX is of; words are Python's ints, numbers its floats."""
    registers = dict(operands)

    def value(name: str) -> int | float:
        if name.startswith(("0x", "0f")):
            return 0.0 if name == "0f00000000" else int(name, 16)
        return registers[name]

    joined = re.sub(r"\{(\w+), (\w+)\}", r"\1:\2", assembly)
    for line in re.sub(r"[{}]", "", joined).split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, result, *rest = re.split(r",?\s+", line.strip())
        given = [value(x) for x in rest]
        if name == "mov.b64":
            low, high = result.split(":")
            registers[low], registers[high] = given[0] & LOW_32, given[0] >> 32
            continue
        registers[result] = {
            "xor.b32": lambda a, b: a ^ b,
            "lop3.b32": lambda a, b, c, _: a ^ b ^ c,
            "add.u32": lambda a, b: (a + b) & LOW_32,
            "mul.wide.u32": lambda a, b: a * b,
            "mul.lo.u32": lambda a, b: a * b & LOW_32,
            "mov.b32": lambda a: a,
            "mov.f32": lambda a: a,
            "neg.f32": lambda a: -a,
            "setp.ge.u32": lambda a, b: a >= b,
            "selp.f32": lambda a, b, kept: a if kept else b,
        }[name](*given)
    return registers


def low_and_high(x: int, multiplier: object) -> tuple[int, int]:
    """What `dropout.products` gives in a kernel, high word first."""
    product = (x & LOW_32) * getattr(multiplier, "value", multiplier)
    return product >> 32, product & LOW_32


@given(WORDS, WORDS, st.integers(0, 200), st.lists(st.tuples(WORDS, WORDS), min_size=4, max_size=4), st.booleans())
def test_a_pairs_word_is_that_of_the_definition(
    first: int, second: int, head: int, pairs: list[tuple[int, int]], negates: bool
) -> None:
    """A pair is dropped if its word is below the threshold, and at no threshold less, which tells the word."""
    seed, count = second << 32 | first, len(pairs)
    seed = torch.tensor([seed - (seed >> 63 << 64)])
    query, key = (torch.tensor(x) for x in zip(*pairs, strict=True))
    right = philox(seed, key, query, torch.tensor([head])).tolist()
    draw = dropout.Draw(first, second, *low_and_high(head, PHILOX_MULTIPLIERS[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "products", low_and_high)
        words = [(*dropout.words_of_queries.fn(draw, x), *dropout.words_of_keys.fn(draw, y)) for x, y in pairs]
    assembly = dropout.drawing_assembly(count, negates)
    for threshold in {*right, *(min(x + 1, LOW_32) for x in right)}:
        given = [(0.0, 0.5 + i, *(x & LOW_32 for x in words[i]), first, second, threshold) for i in range(count)]
        operands = {f"${kind * count + i}": x for i, row in enumerate(given) for kind, x in enumerate(row)}
        found = run_ptx(assembly, operands)
        for i, word in enumerate(right):
            number = 0.5 + i
            assert found[f"${i}"] == (number if word >= threshold else -number if negates else 0.0)


def test_thresholds_keep_their_bits_as_signed_numbers() -> None:
    for share in (0.1, 0.5, 0.9):
        threshold, kept, head = dropout.dropout_numbers(Modifiers(dropout=share, first_head=3))
        assert -(2**31) <= threshold < 2**31
        assert threshold % 2**32 == dropout_threshold(share)
        assert (kept, head) == (1 - share, 3)
