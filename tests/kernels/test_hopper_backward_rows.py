"""What the Hopper backward kernels read of query rows, found in one pass, as it is defined: in Triton's interpreter.

The interpreter is chosen when triton is first imported, so the test below runs in a pytest of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import assert_passes_in_interpreter

from ringflash.kernels import reference
from ringflash.kernels.hopper.backward_rows import PreparedRows, PreparedSlopes

if not triton.knobs.runtime.interpret:

    def test_rows_pass_their_test_in_the_interpreter() -> None:
        assert_passes_in_interpreter(__file__)

else:

    @settings(max_examples=10, deadline=None)
    @given(
        st.integers(1, 140), st.integers(1, 3), st.sampled_from([(64, 64), (40, 24), (128, 96)]), st.booleans(),
        st.booleans(), st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def test_delta_and_zeros_come_with_rows(
        rows: int, heads: int, dims: tuple[int, int], heads_first: bool, has_dlse: bool, seed: int
    ) -> None:
        """Whether delta is found or given, what is laid out is the same."""
        random = torch.Generator().manual_seed(seed)
        dout, out = (torch.randn(heads, rows, dims[1], generator=random).half().transpose(0, 1) for _ in range(2))
        dout = dout if heads_first else dout.contiguous()
        query = torch.zeros(rows, heads, dims[0], dtype=torch.float16)
        lse = torch.randn(heads, rows, generator=random)
        lse[:, rows // 2] = -math.inf  # no keys
        dlse = torch.randn(rows, heads, generator=random).T if has_dlse else None
        delta = reference.row_delta(dout, out, dlse)
        padded_rows = -(-rows // 128) * 128
        found = PreparedRows(dout, query, lse, None, (out, dlse), padded_rows, 1.0)(
            dout, query, lse, None, (out, dlse), None
        )
        given = PreparedRows(dout, query, lse, delta, None, padded_rows, 1.0)(dout, query, lse, delta, None, None)
        torch.testing.assert_close(found.delta, delta.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.minus_delta, given.minus_delta, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.scaled_lse, given.scaled_lse)
        assert found.scaled_lse.view(heads, padded_rows)[:, rows // 2].eq(math.inf).all()
        assert found.scaled_lse.view(heads, padded_rows)[:, rows:].eq(math.inf).all()
        assert torch.equal(found.dquery, torch.zeros(rows, heads, dims[0]))

    @settings(max_examples=10, deadline=None)
    @given(st.integers(1, 1300), st.integers(1, 3), st.booleans(), st.integers(0, 2**32 - 1))
    def test_positions_and_slopes_lie_as_rows_do(rows: int, heads: int, of_all_rows: bool, seed: int) -> None:
        """Slopes times log2 e; zeros behind the last row."""
        random = torch.Generator().manual_seed(seed)
        shape = heads if of_all_rows else (rows, heads)
        slopes = torch.rand(shape, generator=random).expand(rows, heads)
        positions = torch.randint(0, 2**20, (rows,), generator=random, dtype=torch.int32)
        padded_rows = -(-rows // 128) * 128 + 128
        laid = PreparedSlopes(slopes, padded_rows, True)(positions, slopes)
        for x, right in zip(laid, (positions.expand(heads, rows), slopes.T / math.log(2)), strict=True):
            x = x.view(heads, padded_rows)
            torch.testing.assert_close(x[:, :rows], right.float(), rtol=1e-6, atol=0)
            assert not x[:, rows:].any()
