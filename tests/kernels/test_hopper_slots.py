"""Adding up what several programs have found out about the same keys: in Triton's interpreter, and compiled.

As in test_triton_interpreter.py, tests of the interpreter run in a pytest of their own that the ordinary run starts.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
from aot import catch, compile_for
from interpreted import assert_passes_in_interpreter

from ringflash.kernels.hopper import backward_tokens
from ringflash.kernels.hopper.backward_tokens import Programs, add_slots

TILE = 32


def programs(split: list[list[int]]) -> Programs:
    return Programs(torch.empty(0, 6, dtype=torch.int32), torch.tensor(split, dtype=torch.int32).reshape(-1, 3))


if not triton.knobs.runtime.interpret:

    def test_slots_pass_their_tests_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

    def test_the_kernel_compiles_without_spills() -> None:
        gradient, slots = torch.empty(64, 2, 128, dtype=torch.bfloat16), torch.empty(3 * TILE, 2, 128)

        def launch() -> None:
            add_slots(programs([[0, 0, 2]]), (slots, slots), gradient, gradient, TILE)

        assert compile_for("sm_90", catch(backward_tokens, "add_slots_kernel", launch)).spilled == 0

    def test_nothing_is_launched_where_no_tile_can_be_cut() -> None:
        with mock.patch.object(backward_tokens, "add_slots_kernel") as kernel:
            add_slots(programs([]), (torch.empty(0), torch.empty(0)), torch.empty(1), torch.empty(1), TILE)
        assert not kernel.mock_calls

else:

    @pytest.mark.parametrize("dims", [(16, 40), (64, 64)], ids=str)
    def test_a_cut_tile_gets_the_sum_of_its_slots_and_others_keep_what_they_have(dims: tuple[int, int]) -> None:
        """Of the last tile, which is cut as well, only some rows exist."""
        key_rows, heads = 2 * TILE + 5, 3
        slots = tuple(torch.randn(6 * TILE, heads, dim) for dim in dims)
        gradients = [torch.randn(key_rows, heads, dim) for dim in dims]
        right = [x.clone() for x in gradients]
        for x, slot in zip(right, slots, strict=True):
            x[:TILE] = slot[:TILE] + slot[TILE : 2 * TILE] + slot[2 * TILE : 3 * TILE]
            x[2 * TILE :] = (slot[3 * TILE : 4 * TILE] + slot[4 * TILE : 5 * TILE])[:5]
        add_slots(programs([[0, 0, 3], [2, 3, 2], [0, 0, 0]]), slots, *gradients, TILE)
        for found, expected in zip(gradients, right, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
