"""What the torch-operator kernels promise beside accuracy: how rectangles cover a call, memory, float64, bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from oracle import any_intervals, assert_accurate, assert_same, dense_intervals, draw_problem, run

from ringflash.kernels.cpu import blockwise
from ringflash.kernels.cpu.rectangle_attention import Fused, MatrixProducts
from ringflash.kernels.cpu.rectangles import STRIP, Kind, Rectangle, rectangles, visible
from ringflash.kernels.intervals import KeyIntervals, causal_intervals


def shown(rectangle: Rectangle, intervals: KeyIntervals) -> torch.Tensor:
    rows, keys = rectangle.rows.stop - rectangle.rows.start, rectangle.keys.stop - rectangle.keys.start
    if rectangle.kind is Kind.PARTIAL:
        return visible(rectangle, intervals)
    if rectangle.kind is Kind.CAUSAL:
        assert rows == keys
    every = torch.ones(rows, keys, dtype=torch.bool)
    return every.tril() if rectangle.kind is Kind.CAUSAL else every


@pytest.mark.parametrize("large", [True, False])
@settings(max_examples=150)
@given(any_intervals(500))
def test_rectangles_show_each_visible_pair_once(large: bool, intervals: KeyIntervals) -> None:
    times = torch.zeros(intervals.query_count, intervals.key_count, dtype=torch.int32)
    for rectangle in rectangles(intervals, large):
        times[rectangle.rows, rectangle.keys] += shown(rectangle, intervals)
    right = sum(
        (
            (start[:, None] <= torch.arange(intervals.key_count)) & (torch.arange(intervals.key_count) < stop[:, None])
        ).int()
        for start, stop in intervals.ranges()
    )
    assert torch.equal(times, right.int())


@settings(max_examples=150)
@given(any_intervals(500))
def test_masks_are_narrow_and_little_is_computed_in_vain(intervals: KeyIntervals) -> None:
    pairs = sum(int((stop - start).clamp(min=0).sum()) for start, stop in intervals.ranges())
    computed = 0
    for rectangle in rectangles(intervals, large=True):
        rows, keys = rectangle.rows.stop - rectangle.rows.start, rectangle.keys.stop - rectangle.keys.start
        assert rectangle.kind is not Kind.PARTIAL or rows <= STRIP
        computed += rows * keys
    assert computed <= 2 * pairs + 2 * STRIP * intervals.query_count


def test_a_causal_launch_is_one_rectangle_and_a_document_each_one_more() -> None:
    assert rectangles(causal_intervals(5000, 5000), large=True) == [
        Rectangle(slice(0, 5000), slice(0, 5000), Kind.CAUSAL, 0)
    ]
    row = torch.arange(5000, dtype=torch.int32)
    packed = KeyIntervals(torch.where(row < 2000, 0, 2000).int(), row + 1, 5000)
    assert [rectangle.rows for rectangle in rectangles(packed, large=True)] == [slice(0, 2000), slice(2000, 5000)]


@pytest.mark.parametrize("math", [Fused, MatrixProducts])
def test_a_loss_of_the_log_sum_exp_alone_has_its_gradient(math: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_math", lambda *operands: math)
    problem = draw_problem(causal_intervals(150, 200), (4, 2), (32, 32), torch.float32)
    problem = replace(problem, dout=torch.zeros_like(problem.dout))
    assert_accurate(run(blockwise, problem), problem)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12])
def test_gradients_of_any_size_survive(size: float) -> None:
    """Sums of squares of such gradients leave float32's range."""
    problem = draw_problem(causal_intervals(64, 64), (2, 2), (32, 32), torch.float32)
    problem = replace(problem, dlse=torch.zeros_like(problem.dlse))
    plain, sized = run(blockwise, problem), run(blockwise, replace(problem, dout=problem.dout * size))
    for name in ("dquery", "dkey", "dvalue"):
        torch.testing.assert_close(getattr(sized, name) / size, getattr(plain, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("math", [Fused, MatrixProducts])
def test_float64_passes_gradcheck(math: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_math", lambda *operands: math)
    intervals = KeyIntervals(*torch.tensor([[0, 0, 1, 3], [2, 0, 4, 5]], dtype=torch.int32).sort().values, 6)

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            out, lse = blockwise.attend(query, key, value, intervals, scale=0.5)
            ctx.save_for_backward(query, key, value, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            query, key, value, out, lse = ctx.saved_tensors
            delta = blockwise.row_delta(dout, out)
            return blockwise.attend_backward(dout, query, key, value, lse, delta, intervals, scale=0.5)

    problem = draw_problem(intervals, (2, 1), (8, 8), torch.float64)
    inputs = [x.requires_grad_() for x in (problem.query, problem.key, problem.value)]
    assert torch.autograd.gradcheck(Attend.apply, inputs)


def test_gradients_repeat_bit_for_bit() -> None:
    problem = draw_problem(causal_intervals(700, 700), (4, 2), (64, 64), torch.bfloat16)
    assert_same(run(blockwise, problem), run(blockwise, problem, deterministic=True))


@pytest.mark.parametrize("math", [Fused, MatrixProducts])
def test_memory_grows_with_the_rows_and_not_with_the_pairs(math: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_math", lambda *operands: math)

    def peak(rows: int) -> int:
        problem = draw_problem(dense_intervals(rows, rows), (1, 1), (16, 16), torch.float32)
        with torch.profiler.profile(profile_memory=True) as profile:
            run(blockwise, problem)
        return max(held(profile))

    assert peak(4096) < 6 * peak(1024)  # pairs grow by 16


def held(profile: torch.profiler.profile) -> Iterator[int]:
    """Bytes in use after each allocation and release."""
    total = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            yield total
