"""What the backward launches of Hopper take of the intervals; kernels run in Triton's interpreter.

The interpreter is chosen when triton is first imported, so the test below runs in a pytest of its own.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_passes_in_interpreter
from oracle import any_intervals

from ringflash.kernels.hopper.backward_programs import (
    chunks_of_tokens,
    programs_in_order,
    programs_with_tokens,
    rows_seeing,
)
from ringflash.kernels.intervals import KeyIntervals

if not triton.knobs.runtime.interpret:

    def test_programs_pass_their_tests_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

else:

    @settings(max_examples=15, deadline=None)
    @given(any_intervals(300), st.sampled_from([64, 128]), st.integers(0, 2**32 - 1))
    def test_no_row_sees_padding_and_no_tile_with_padding_goes_without_a_mask(
        intervals: KeyIntervals, block: int, seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        visible = (torch.rand(intervals.key_count, generator=random) < 0.95).byte()
        for sink_tokens in {False, intervals.has_sink_tokens}:
            everything = rows_seeing(intervals, block, None, sink_tokens)
            of_keys, of_tiles = rows_seeing(intervals, block, visible, sink_tokens)
            assert torch.equal(of_keys, everything[0] * visible[:, None])
            for tile, (found, before) in enumerate(zip(of_tiles, everything[1], strict=True)):
                whole = bool(visible[tile * block : (tile + 1) * block].all())
                right = before.tolist() if whole else [*before[:2].tolist(), 0, before[3].item()]
                assert found.tolist() == right

    @settings(max_examples=30, deadline=None)
    @given(any_intervals(300), st.sampled_from([64, 128]), st.integers(1, 3))
    def test_each_tile_of_each_head_has_a_program(intervals: KeyIntervals, block: int, key_heads: int) -> None:
        tiles = -(-intervals.key_count // block)
        order = programs_in_order(intervals, block, key_heads)
        assert sorted(order.tolist()) == list(range(tiles * key_heads))
        assert programs_in_order(intervals, block, key_heads) is order, "made once"

    @settings(max_examples=15, deadline=None)
    @given(any_intervals(3000, True), st.sampled_from([64, 128]), st.integers(1, 3))
    def test_there_are_as_many_programs_as_a_launch_has(intervals: KeyIntervals, block: int, key_heads: int) -> None:
        tiles = -(-intervals.key_count // block)
        programs, order = programs_with_tokens(intervals, block, key_heads)
        chunks = chunks_of_tokens(tiles, intervals.query_count, key_heads, intervals.start.device)
        assert len(programs.work) == tiles + 2 * chunks
        assert sorted(order.tolist()) == list(range(len(programs.work) * key_heads))
        assert programs.work[:, 5].max() < 3 * chunks or not chunks
