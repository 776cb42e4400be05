"""The reference against autograd through the formula it stands for, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Problem, any_intervals, draw_problem, run
from torch import Tensor

from ringflash.kernels import reference
from ringflash.kernels.intervals import KeyIntervals


def formula(query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, scale: float) -> tuple[Tensor, Tensor]:
    """Attention row by row and head by head, as a textbook writes it."""
    group = query.shape[1] // key.shape[1]
    visible = intervals.visible()
    outs, lses = [], []
    for row in range(query.shape[0]):
        keys = visible[row].nonzero().flatten()
        for head in range(query.shape[1]):
            scores = scale * key[keys, head // group] @ query[row, head]
            outs.append(torch.softmax(scores, 0) @ value[keys, head // group])
            lses.append(torch.logsumexp(scores, 0))
    out = torch.stack(outs).reshape(query.shape[0], query.shape[1], value.shape[2])
    return out, torch.stack(lses).reshape(query.shape[:2]).T


@settings(max_examples=40)
@given(any_intervals(14), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([(8, 8), (16, 5)]))
def test_reference_equals_autograd_of_the_formula(
    intervals: KeyIntervals, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    problem = draw_problem(intervals, heads, dims, torch.float64)
    inputs = [x.clone().requires_grad_() for x in (problem.query, problem.key, problem.value)]
    out, lse = formula(*inputs, intervals, problem.scale)
    gradients = torch.autograd.grad((out, lse), inputs, (problem.dout, problem.dlse.double()), allow_unused=True)
    results = run(reference, problem)
    torch.testing.assert_close(results.out, out.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results.lse.double(), lse.detach(), rtol=1e-6, atol=1e-6)
    ours = (results.dquery, results.dkey, results.dvalue)
    for mine, right in zip(ours, gradients, strict=True):  # lse and delta pass through float32
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_come_in_the_dtypes_asked_for(dtype: torch.dtype) -> None:
    problem: Problem = draw_problem(
        KeyIntervals(*torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), 3), (2, 1), (8, 8), dtype
    )
    plain, wide = run(reference, problem), run(reference, problem, out_dtype=torch.float32)
    assert {plain.out.dtype, plain.dquery.dtype, plain.dkey.dtype, plain.dvalue.dtype} == {dtype}
    assert {wide.out.dtype, wide.dkey.dtype, wide.dvalue.dtype} == {torch.float32}
    assert plain.lse.dtype == torch.float32
