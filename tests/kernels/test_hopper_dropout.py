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


def run_ptx(assembly: str, operands: list[int | float]) -> float:
    """Result of the instructions that dropout's PTX is of; words are Python's ints, numbers its floats."""
    registers: dict[str, int | float | bool] = {f"${i}": x for i, x in enumerate(operands)}

    def value(name: str) -> int | float:
        if name.startswith(("0x", "0f")):
            return 0.0 if name == "0f00000000" else int(name, 16)
        return registers[name]

    for line in re.sub(r"[{}]", "", assembly.replace("{low, high}", "low:high").replace("{x1, x0}", "x1:x0")).split(
        ";"
    ):
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
    return registers["$0"]


def low_and_high(x: int, multiplier: object) -> tuple[int, int]:
    """What `dropout.products` gives in a kernel, high word first."""
    product = (x & LOW_32) * getattr(multiplier, "value", multiplier)
    return product >> 32, product & LOW_32


@given(WORDS, WORDS, WORDS, st.integers(0, 200), WORDS, st.booleans())
def test_a_pairs_word_is_that_of_the_definition(
    first: int, second: int, query: int, head: int, key: int, negates: bool
) -> None:
    """Dropped if it is below a threshold, which tells the word."""
    counters = (torch.tensor([x]) for x in (key, query, head))
    seed = second << 32 | first
    word = int(philox(torch.tensor([seed - (seed >> 63 << 64)]), *counters))
    high, low = low_and_high(head, PHILOX_MULTIPLIERS[1])
    draw = dropout.Draw(first, second, high, low)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout, "products", low_and_high)
        words = (*dropout.words_of_queries.fn(draw, query), *dropout.words_of_keys.fn(draw, key))
    words = [x & LOW_32 for x in words]
    assembly = dropout.drawing_assembly(negates)
    for threshold, result in ((word, 0.5), (word + 1, -0.5 if negates else 0.0)):
        if threshold <= LOW_32:
            assert run_ptx(assembly, [0.0, 0.5, *words, first, second, threshold]) == result


def test_thresholds_keep_their_bits_as_signed_numbers() -> None:
    for share in (0.1, 0.5, 0.9):
        threshold, kept, head = dropout.dropout_numbers(Modifiers(dropout=share, first_head=3))
        assert -(2**31) <= threshold < 2**31
        assert threshold % 2**32 == dropout_threshold(share)
        assert (kept, head) == (1 - share, 3)
