"""Every implementation against float64, within the one tolerance of oracle.py, over masks, shapes, dtypes and launches.

The Triton kernels run here on GPUs only; test_triton_*.py runs them in the interpreter.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    LAYOUTS,
    Problem,
    Results,
    any_blocks,
    any_intervals,
    any_modifiers,
    assert_accurate,
    assert_nan_stays,
    assert_same,
    between,
    dense_intervals,
    draw_modifiers,
    draw_problem,
    errors,
    exact,
    monotone_intervals,
    run,
    to_device,
    torch_own,
    torch_own_out_with_sinks,
    with_blocks,
)

from ringflash.errors import ArgumentError
from ringflash.kernels import reference
from ringflash.kernels.cpu import blockwise, rectangles
from ringflash.kernels.cpu.rectangle_attention import MatrixProducts
from ringflash.kernels.intervals import KeyIntervals, causal_intervals
from ringflash.kernels.kept import Kept
from ringflash.kernels.modifiers import Modifiers, keep_mask
from ringflash.kernels.reference import Carry
from ringflash.kernels.select import NAMES, select
from ringflash.kernels.whole_backward import whole_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def named(x: object) -> str:
    return str(x).removeprefix("torch.")


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype, longest: int) -> Problem:
    """Any problem: grouped heads, head dimensions from 16 to 256, layouts, and scales about the usual one."""
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    dims = st.sampled_from([16, 24, 32, 64, 40, 72, 128, 136, 256])
    dim = draw(dims)
    value_dim = draw(st.just(dim) | dims)
    intervals = draw(any_intervals(longest))
    if not intervals.has_sink_tokens and draw(st.integers(0, 3)) == 0:
        intervals = with_blocks(intervals, *draw(any_blocks(key_heads)))
    return draw_problem(
        intervals,
        (key_heads * group, key_heads),
        (dim, value_dim),
        dtype,
        seed=draw(st.integers(0, 2**32 - 1)),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.floats(0.25, 2.0)) * dim**-0.5,
    )


def check(kernels: ModuleType, problem: Problem, data: st.DataObject) -> None:
    """Accurate in one launch, and with the keys in up to three launches in either order."""
    cuts = data.draw(st.lists(st.integers(0, problem.intervals.key_count), max_size=2))
    out_dtype = data.draw(st.sampled_from([None, torch.float32]))
    results = run(kernels, problem, cuts, backwards=data.draw(st.booleans()), out_dtype=out_dtype)
    dtype = out_dtype or problem.query.dtype
    assert [results.out.dtype, results.dkey.dtype, results.dvalue.dtype] == [dtype] * 3
    assert results.lse.dtype == torch.float32
    assert_accurate(results, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=40)
@given(st.data())
def test_blockwise_is_as_accurate_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    check(blockwise, data.draw(problems(dtype, 400)), data)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=30)
@given(st.data())
def test_blockwise_with_modifiers_is_as_accurate_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(dtype, 150))
    modifiers = data.draw(any_modifiers(problem.intervals, problem.query.shape[1]))
    problem = replace(problem, modifiers=modifiers)
    check(blockwise, replace(problem, dlse=problem.dlse * problem.visible().any(-1)), data)


@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@settings(max_examples=20)
@given(st.data())
def test_matrix_product_tiles_are_as_accurate_as_torch(dtype: torch.dtype, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_math", lambda *operands: MatrixProducts)  # as on devices other than the CPU
        patch.setattr(rectangles, "BLOCK", (48, 80))  # several blocks also in small problems
        check(blockwise, data.draw(problems(dtype, 200)), data)


@settings(max_examples=25)
@given(st.data())
def test_the_reference_in_launches_is_the_reference_in_one(data: st.DataObject) -> None:
    check(reference, data.draw(problems(torch.float32, 60)), data)


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
@pytest.mark.parametrize("kernels", [reference, blockwise], ids=["reference", "blockwise"])
def test_no_rows_and_no_keys_give_zeros(kernels: ModuleType, queries: int, keys: int) -> None:
    intervals = monotone_intervals(queries, keys, seed=0, sink=True)
    problem = draw_problem(intervals, (4, 2), (16, 24), torch.float32)
    results = run(kernels, problem)
    assert_accurate(results, problem)
    if not keys:
        assert results.lse.isneginf().all()
        assert not results.out.any()


def test_nan_reaches_out_and_lse_through_later_launches() -> None:
    assert_nan_stays(reference, torch.float32, "cpu")


def test_rows_without_keys_keep_the_carry() -> None:
    problem = draw_problem(dense_intervals(6, 9), (2, 2), (16, 16), torch.float32)
    out, lse = blockwise.attend(problem.query, problem.key, problem.value, problem.intervals, scale=1.0)
    nothing = KeyIntervals(*torch.tensor([[4] * 6, [2] * 6], dtype=torch.int32), key_count=9)
    carry = (out.clone(), lse.clone())
    kept = blockwise.attend(problem.query, problem.key, problem.value, nothing, scale=1.0, carry=carry)
    assert torch.equal(kept[0], out)
    assert torch.equal(kept[1], lse)


# On GPUs

# Each row is compiled once or a few times, so there are few; masks and lengths change nothing that is compiled.
GPU_CASES = {
    "bf16-d64": (torch.bfloat16, (4, 2), (64, 64), False, 0),
    "bf16-d128-ring": (torch.bfloat16, (4, 1), (128, 128), False, 2),
    "bf16-d256": (torch.bfloat16, (2, 2), (256, 256), False, 0),
    "bf16-d512": (torch.bfloat16, (2, 1), (512, 512), False, 0),
    "bf16-d128-sink": (torch.bfloat16, (4, 2), (128, 128), True, 0),
    "bf16-d16": (torch.bfloat16, (2, 2), (16, 16), False, 0),
    "bf16-d192-v128": (torch.bfloat16, (2, 2), (192, 128), False, 0),
    "bf16-d192-v128-ring": (torch.bfloat16, (4, 2), (192, 128), False, 1),
    "bf16-d192": (torch.bfloat16, (4, 1), (192, 192), False, 1),
    "fp16-d128": (torch.float16, (2, 1), (128, 128), False, 0),
    "fp16-d40-v72-ring": (torch.float16, (3, 3), (40, 72), False, 1),
    "fp32-d64": (torch.float32, (2, 1), (64, 64), False, 0),
    "fp32-d128-v64-sink-ring": (torch.float32, (2, 2), (128, 64), True, 1),
}
# softcap, slopes, dropout, padding
GPU_MODIFIED_CASES = {
    "bf16-d128-all-ring": (torch.bfloat16, (4, 2), (128, 128), False, 1, (3.0, "of each row", 0.3, True)),
    "bf16-d128-dropout-sink": (torch.bfloat16, (2, 2), (128, 128), True, 0, (0.0, None, 0.6, False)),
    "bf16-d64-slopes": (torch.bfloat16, (4, 2), (64, 64), False, 1, (0.0, "of each row", 0.0, False)),
    "bf16-d128-slopes-ring": (torch.bfloat16, (4, 1), (128, 128), False, 1, (0.0, "of each row", 0.0, False)),
    "bf16-d256-slopes": (torch.bfloat16, (2, 1), (256, 256), False, 1, (0.0, "of all rows", 0.0, False)),
    "bf16-d256-softcap": (torch.bfloat16, (2, 1), (256, 256), False, 0, (3.0, None, 0.0, False)),
    "fp16-d64-all": (torch.float16, (3, 3), (64, 64), False, 0, (3.0, "heads first", 0.3, True)),
    "fp16-d128-slopes-padding": (torch.float16, (4, 1), (128, 128), False, 0, (0.0, "of all rows", 0.0, True)),
    "fp16-d40-v72-dropout-padding-ring": (torch.float16, (2, 1), (40, 72), False, 1, (0.0, None, 0.1, True)),
    "fp32-d64-all": (torch.float32, (2, 1), (64, 64), False, 0, (3.0, "of each row", 0.3, True)),
}
# Blocks wider than heads and modifiers: each changes what is compiled for Hopper. Modifiers as above, or None.
HOPPER_CASES = {
    "bf16-d96-ring": (torch.bfloat16, (4, 2), (96, 96), 1, None),
    "bf16-d80": (torch.bfloat16, (2, 1), (80, 80), 0, None),
    "bf16-d112-ring": (torch.bfloat16, (2, 2), (112, 112), 1, None),
    "bf16-d72-v40": (torch.bfloat16, (2, 1), (72, 40), 1, None),
    "bf16-d24": (torch.bfloat16, (2, 1), (24, 24), 1, None),
    "bf16-d120-v128": (torch.bfloat16, (2, 2), (120, 128), 1, None),
    "bf16-d176-v128": (torch.bfloat16, (2, 2), (176, 128), 1, None),
    "bf16-d512-ring": (torch.bfloat16, (4, 1), (512, 512), 2, None),
    "fp16-d512-ring": (torch.float16, (3, 3), (512, 512), 1, None),
    "bf16-d512-softcap-padding": (torch.bfloat16, (2, 1), (512, 512), 1, (3.0, None, 0.0, True)),
    "bf16-d512-dropout": (torch.bfloat16, (4, 2), (512, 512), 0, (0.0, None, 0.3, False)),
    "bf16-d64-padding": (torch.bfloat16, (4, 2), (64, 64), 1, (0.0, None, 0.0, True)),
    "bf16-d128-padding": (torch.bfloat16, (4, 1), (128, 128), 1, (0.0, None, 0.0, True)),
    "bf16-d256-slopes-padding": (torch.bfloat16, (2, 1), (256, 256), 1, (0.0, "of each row", 0.0, True)),
    "bf16-d64-softcap": (torch.bfloat16, (4, 2), (64, 64), 1, (3.0, None, 0.0, False)),
    "bf16-d128-softcap": (torch.bfloat16, (4, 2), (128, 128), 1, (3.0, None, 0.0, False)),
    "bf16-d256-softcap": (torch.bfloat16, (4, 2), (256, 256), 0, (3.0, None, 0.0, False)),
    "fp16-d128-softcap": (torch.float16, (4, 2), (128, 128), 0, (50.0, None, 0.0, False)),
    "bf16-d96-all-but-dropout": (torch.bfloat16, (4, 2), (96, 96), 1, (3.0, "of all rows", 0.0, True)),
    "bf16-d64-dropout-ring": (torch.bfloat16, (4, 2), (64, 64), 1, (0.0, None, 0.3, False)),
    "bf16-d128-dropout": (torch.bfloat16, (4, 2), (128, 128), 0, (0.0, None, 0.3, False)),
    "bf16-d128-dropout-padding-ring": (torch.bfloat16, (4, 1), (128, 128), 1, (0.0, None, 0.1, True)),
    "fp16-d128-softcap-dropout": (torch.float16, (4, 2), (128, 128), 0, (3.0, None, 0.6, False)),
    "bf16-d256-dropout-ring": (torch.bfloat16, (2, 1), (256, 256), 1, (0.0, None, 0.3, False)),
    "bf16-d128-all": (torch.bfloat16, (4, 2), (128, 128), 0, (3.0, "of each row", 0.3, True)),
    "bf16-d192-v128-dropout": (torch.bfloat16, (2, 2), (192, 128), 1, (0.0, None, 0.3, False)),
    "bf16-d192-v128-softcap-slopes": (torch.bfloat16, (2, 2), (192, 128), 0, (3.0, "heads first", 0.0, False)),
}
# heads, head dimensions, cuts, modifiers
HOPPER_TOKEN_CASES = {
    "d64": ((4, 2), (64, 64), 0, None),
    "d64-ring": ((4, 1), (64, 64), 1, None),
    "d128": ((4, 2), (128, 128), 0, None),
    "d128-ring": ((2, 2), (128, 128), 2, None),
    "d192-v128": ((4, 2), (192, 128), 1, None),
    "d256": ((2, 1), (256, 256), 1, None),
    "d512-ring": ((2, 1), (512, 512), 1, None),
    "d128-softcap": ((4, 2), (128, 128), 0, (3.0, None, 0.0, False)),
    "d128-dropout-ring": ((4, 2), (128, 128), 1, (0.0, None, 0.3, False)),
    "d64-slopes-padding": ((4, 2), (64, 64), 1, (0.0, "of each row", 0.0, True)),
}
on_gpu_kernels = pytest.mark.parametrize("name", [x for x in NAMES if x not in ("auto", "reference", "blockwise")])


def kernels_for(name: str, dtype: torch.dtype, dims: tuple[int, int]) -> ModuleType:
    """The named kernels, if they run on this."""
    try:
        return select("cuda", dtype, *dims, name)
    except ArgumentError as reason:
        pytest.skip(str(reason))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES)
@pytest.mark.parametrize("name", [x for x in NAMES if x not in ("auto", "reference")])
@settings(max_examples=20)
@given(st.data())
def test_gpu_kernels_are_as_accurate_as_torch(name: str, case: tuple, data: st.DataObject) -> None:
    dtype, heads, dims, sink, cut_count = case
    kernels = kernels_for(name, dtype, dims)
    intervals = to_device(data.draw(any_intervals(2000, sink)), "cuda")
    problem = draw_problem(intervals, heads, dims, dtype, seed=data.draw(st.integers(0, 2**32 - 1)))
    cuts = [data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)]
    assert_accurate(run(kernels, problem, cuts, backwards=data.draw(st.booleans())), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_MODIFIED_CASES.values(), ids=GPU_MODIFIED_CASES)
@pytest.mark.parametrize("name", [x for x in NAMES if x not in ("auto", "reference")])
@settings(max_examples=15)
@given(st.data())
def test_gpu_kernels_with_modifiers_are_as_accurate_as_torch(name: str, case: tuple, data: st.DataObject) -> None:
    dtype, heads, dims, sink, cut_count, kinds = case
    kernels = kernels_for(name, dtype, dims)
    intervals, seed = to_device(data.draw(any_intervals(1000, sink)), "cuda"), data.draw(st.integers(0, 2**63 - 1))
    modifiers = draw_modifiers(intervals, heads[0], seed, *kinds)
    problem = draw_problem(intervals, heads, dims, dtype, seed=seed, modifiers=modifiers)
    cuts = [data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)]
    assert_accurate(run(kernels, problem, cuts, backwards=data.draw(st.booleans())), problem)


def hopper_itself() -> ModuleType:
    """The Hopper kernels also for what they are not chosen for."""
    kernels_for("hopper", torch.bfloat16, (128, 128))
    return importlib.import_module("ringflash.kernels.hopper")


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES)
@settings(max_examples=15)
@given(st.data())
def test_hopper_kernels_are_as_accurate_as_torch_in_every_form(case: tuple, data: st.DataObject) -> None:
    dtype, heads, dims, cut_count, kinds = case
    intervals, seed = to_device(data.draw(any_intervals(1000, False)), "cuda"), data.draw(st.integers(0, 2**63 - 1))
    modifiers = None if kinds is None else draw_modifiers(intervals, heads[0], seed, *kinds)
    problem = draw_problem(intervals, heads, dims, dtype, seed=seed, modifiers=modifiers)
    cuts = [data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)]
    deterministic = data.draw(st.booleans())
    results = run(hopper_itself(), problem, cuts, backwards=data.draw(st.booleans()), deterministic=deterministic)
    assert_accurate(results, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [128, 1024], ids=["short chunks", "chunks"])
@pytest.mark.parametrize("case", HOPPER_TOKEN_CASES.values(), ids=HOPPER_TOKEN_CASES)
@settings(max_examples=15)
@given(st.data())
def test_hopper_kernels_take_sink_tokens_as_accurately_as_torch(case: tuple, chunk: int, data: st.DataObject) -> None:
    kernels = hopper_itself()
    from ringflash.kernels.hopper import backward, backward_tokens  # needs triton

    heads, dims, cut_count, kinds = case
    intervals, seed = to_device(data.draw(any_intervals(1500, True)), "cuda"), data.draw(st.integers(0, 2**63 - 1))
    modifiers = None if kinds is None else draw_modifiers(intervals, heads[0], seed, *kinds)
    problem = draw_problem(intervals, heads, dims, torch.bfloat16, seed=seed, modifiers=modifiers)
    cuts = [data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)]
    out_dtype = data.draw(st.sampled_from([None, torch.float32]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_tokens, "LEAST_ROWS", chunk)
        patch.setattr(backward, "prepared_calls", Kept())
        results = run(kernels, problem, cuts, backwards=data.draw(st.booleans()), out_dtype=out_dtype)
    assert_accurate(results, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [300, 1025, 5000])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_kernels_count_rows_once_that_see_a_tile_as_sink_tokens_alone(dim: int, rows: int) -> None:
    """As in a ring, where a launch has the sink tokens and windows far behind them."""
    row = torch.arange(rows, dtype=torch.int32, device="cuda")
    start = row.clamp(max=150) + 300
    sinks = torch.zeros_like(row), torch.full_like(row, 4)
    problem = draw_problem(KeyIntervals(start, start + 20, 470, *sinks), (4, 2), (dim, dim), torch.bfloat16)
    assert_accurate(run(hopper_itself(), problem), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("dropout", "first_head"), [(0.1, 0), (0.5, 32), (0.9, 1)])
def test_hopper_kernels_drop_the_pairs_of_the_definition(dim: int, dropout: float, first_head: int) -> None:
    """Keys and values are unit vectors, no two alike in a row's window: each number shows the fate of one pair."""
    kernels, rows, heads = hopper_itself(), 500, 3
    row = torch.arange(rows, dtype=torch.int32, device="cuda")
    intervals = KeyIntervals((row - (dim - 4)).clamp(min=0), row + 1, rows)
    modifiers = Modifiers(
        dropout=dropout,
        seed=torch.tensor([-(2**62) - 987654321], device="cuda"),
        query_positions=row + 2**31 - rows,
        key_positions=row * 4194304,
        first_head=first_head,
    )
    unit = (
        torch.eye(dim, device="cuda", dtype=torch.bfloat16)[row.long() % dim, None].expand(-1, heads, -1).contiguous()
    )
    query, launch = torch.zeros_like(unit), {"intervals": intervals, "scale": 1.0, "modifiers": modifiers}
    out, lse = kernels.attend(query, unit, unit, **launch)
    delta = torch.zeros_like(lse)
    dquery, _, _ = kernels.attend_backward(torch.ones_like(query), query, unit, unit, lse, delta, **launch)
    _, _, dvalue = kernels.attend_backward(unit, query, unit, unit, lse, delta, **launch)
    kept = keep_mask(replace(modifiers, first_head=0), first_head + heads)[first_head:] & intervals.visible()
    of_keys = torch.zeros(heads, rows, dim, device="cuda").index_add_(2, row % dim, kept.float())
    of_queries = torch.zeros(heads, rows, dim, device="cuda").index_add_(2, row % dim, kept.mT.float())
    assert torch.equal(out.transpose(0, 1) != 0, of_keys != 0)
    assert torch.equal(dquery.transpose(0, 1) != 0, of_keys != 0)
    assert torch.equal(dvalue.transpose(0, 1) != 0, of_queries != 0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES)
@settings(max_examples=10)
@given(st.data())
def test_hopper_kernels_take_listed_blocks_as_accurately_as_torch(case: tuple, data: st.DataObject) -> None:
    """Whole blocks of the kernels', and blocks that begin and end within them."""
    dtype, heads, dims, cut_count, kinds = case
    intervals, seed = data.draw(any_intervals(1000, False)), data.draw(st.integers(0, 2**32 - 1))
    intervals = to_device(with_blocks(intervals, *data.draw(any_blocks(heads[1]))), "cuda")
    modifiers = None if kinds is None else draw_modifiers(intervals, heads[0], seed, *kinds)
    problem = draw_problem(intervals, heads, dims, dtype, seed=seed, modifiers=modifiers)
    cuts = [data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)]
    assert_accurate(run(hopper_itself(), problem, cuts, backwards=data.draw(st.booleans())), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_results_with_listed_blocks_repeat_bit_for_bit_on_hopper(dim: int) -> None:
    """But for dQ, unless asked, when the portable kernels give gradients."""
    kernels = hopper_itself()
    intervals = to_device(with_blocks(causal_intervals(3001, 3001), 2, (128, 128), seed=0), "cuda")
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16)
    first, exactly = run(kernels, problem), run(kernels, problem, deterministic=True)
    for _ in range(100):
        again = run(kernels, problem)
        assert_same(replace(again, dquery=first.dquery), first)
    assert_same(run(kernels, problem, deterministic=True), exactly)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_results_with_sink_tokens_repeat_bit_for_bit_on_hopper(dim: int) -> None:
    """But for dQ, unless asked, when the portable kernels give gradients."""
    kernels, row = hopper_itself(), torch.arange(3001, device="cuda")
    start = (row - 200).clamp(min=0)
    intervals = KeyIntervals(start, row + 1, 3001, torch.zeros_like(row), start.clamp(max=4))
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16)
    first, exactly = run(kernels, problem), run(kernels, problem, deterministic=True)
    for _ in range(100):
        again = run(kernels, problem)
        assert_same(replace(again, dquery=first.dquery), first)
    assert_same(run(kernels, problem, deterministic=True), exactly)


def assert_as_exact_as_torch_with_sinks(problem: Problem, sinks: torch.Tensor, found: Carry, right: Carry) -> None:
    """out and lse, by the one tolerance rule."""
    theirs = (torch_own_out_with_sinks(problem, sinks) - right[0]).abs().max()
    assert (found[0].double() - right[0]).abs().max() <= 2 * theirs + 1e-5
    of_lse = errors(torch_own(problem), exact(problem))["lse"]
    assert (found[1] - right[1]).abs().max() <= 2 * of_lse + 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(96, 96), (192, 128), (192, 192), (256, 256)], ids=str)
@pytest.mark.parametrize("carried", [False, True])
def test_learned_sinks_join_in_the_hopper_kernel(dims: tuple[int, int], carried: bool) -> None:
    kernels = hopper_itself()
    problem = draw_problem(causal_intervals(500, 700, "cuda"), (4, 2), dims, torch.bfloat16)
    sinks, cut = torch.randn(4, device="cuda"), 300 if carried else 0
    settings, carry = {"scale": problem.scale}, None
    keys = problem.key, problem.value
    if carried:
        first = between(problem.intervals, 0, cut)
        carry = kernels.attend(
            problem.query, *(x[:cut] for x in keys), first, **settings, carry=None, out_dtype=torch.float32
        )
    last = between(problem.intervals, cut, 700)
    out, lse = kernels.attend(problem.query, *(x[cut:] for x in keys), last, **settings, carry=carry, sinks=sinks)
    operands = (problem.query.double(), problem.key.double(), problem.value.double())
    right, right_lse = reference.attend(*operands, problem.intervals, **settings, sinks=sinks)
    assert_as_exact_as_torch_with_sinks(problem, sinks, (out, lse), (right, right_lse))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [64, 512])
@on_gpu_kernels
def test_gpu_kernels_take_any_layout(name: str, dim: int, layout: str) -> None:
    intervals = causal_intervals(517, 1031, "cuda")
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16, layout=layout)
    assert_accurate(run(kernels_for(name, torch.bfloat16, (dim, dim)), problem), problem)


@pytest.mark.gpu
@on_gpu_kernels
def test_gpu_kernels_take_row_statistics_of_any_stride(name: str) -> None:
    kernels = kernels_for(name, torch.bfloat16, (64, 64))
    problem = draw_problem(causal_intervals(300, 300, "cuda"), (4, 2), (64, 64), torch.bfloat16)
    operands, scale = (problem.query, problem.key, problem.value), problem.scale
    out, lse = kernels.attend(*operands, problem.intervals, scale=scale)
    delta = kernels.row_delta(problem.dout, out)
    plain, strided = (
        kernels.attend_backward(problem.dout, *operands, *rows, problem.intervals, scale=scale, deterministic=True)
        for rows in ((lse, delta), (lse.T.contiguous().T, delta.T.contiguous().T))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("keys", [0, 7])
@pytest.mark.parametrize("dim", [64, 512])
@on_gpu_kernels
def test_no_rows_and_no_keys_give_zeros_on_gpus(name: str, dim: int, queries: int, keys: int) -> None:
    intervals = to_device(monotone_intervals(queries, keys, seed=0, sink=False), "cuda")
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16)
    assert_accurate(run(kernels_for(name, torch.bfloat16, (dim, dim)), problem), problem)


@pytest.mark.gpu
@on_gpu_kernels
def test_gpu_kernels_are_as_accurate_as_torch_on_a_long_ragged_problem(name: str) -> None:
    problem = draw_problem(causal_intervals(5003, 6007, "cuda"), (2, 1), (128, 128), torch.float16)
    assert_accurate(run(kernels_for(name, torch.float16, (128, 128)), problem), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 512])
@on_gpu_kernels
def test_error_on_gpus_does_not_grow_with_the_number_of_launches(name: str, dim: int) -> None:
    problem = draw_problem(causal_intervals(2048, 2048, "cuda"), (4, 1), (dim, dim), torch.bfloat16)
    right, kernels = exact(problem), kernels_for(name, torch.bfloat16, (dim, dim))
    one, eight = (errors(run(kernels, problem, cuts), right) for cuts in ((), range(256, 2048, 256)))
    for result, error in eight.items():
        assert error <= 1.1 * one[result] + 1e-5, f"{result}: {error:.3g} in eight launches, {one[result]:.3g} in one"


@pytest.mark.gpu
@pytest.mark.parametrize("before", [0, 300], ids=["first keys", "keys behind a longer document's"])
@pytest.mark.parametrize("dim", [64, 512])
@on_gpu_kernels
def test_a_later_launch_does_not_round_the_largest_weight_of_a_row(name: str, dim: int, before: int) -> None:
    """99% of the weight is on the second launch's last key: 2^7.2 to 2^7.9 times that of each key of the first launch.

    That key may come behind others, which earlier rows of the same tile see and later ones do not.
    """
    kernels = kernels_for(name, torch.bfloat16, (dim, dim))
    query = torch.zeros(200, 2, dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.zeros(2, 3 + before, 2, dim, device="cuda", dtype=torch.bfloat16)
    query[..., 0] = 1 + torch.rand(200, 2, device="cuda") / 10
    key[-1, :, 0] = 40
    value.normal_()
    own = torch.arange(200, device="cuda") >= (56 if before else 0)
    second = KeyIntervals(torch.where(own, before, 0), torch.where(own, before + 1, before), key_count=before + 1)
    carry = None
    for keys, intervals in ((slice(0, 2), dense_intervals(200, 2, "cuda")), (slice(2, None), second)):
        carry = kernels.attend(
            query, key[keys], value[keys], intervals, scale=0.125, carry=carry, out_dtype=torch.float32
        )
    seen = torch.cat([own.new_ones(200, 2), second.visible()], 1)
    scores = (query[..., None, 0].double() * key[:, :, 0].T.double() * 0.125).masked_fill(~seen[:, None], -torch.inf)
    error = carry[0] - torch.einsum("qhk,khd->qhd", scores.softmax(-1), value.double())
    assert error.abs().max() < 2**-12 * value.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 512])
@on_gpu_kernels
def test_nan_reaches_out_and_lse_through_later_launches_on_gpus(name: str, dim: int) -> None:
    assert_nan_stays(kernels_for(name, torch.bfloat16, (dim, dim)), torch.bfloat16, "cuda", dim)


@pytest.mark.gpu
@pytest.mark.parametrize("cut_count", [0, 1])
@pytest.mark.parametrize(
    "dims", [(40, 40), (64, 64), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512)], ids=str
)
@on_gpu_kernels
@settings(max_examples=10)
@given(st.data())
def test_learned_sinks_join_the_last_launch_on_gpus(
    name: str, dims: tuple[int, int], cut_count: int, data: st.DataObject
) -> None:
    """Held against the definition, within what rounding out allows; rows without keys have all weight on the sink."""
    kernels = kernels_for(name, torch.bfloat16, dims)
    intervals = to_device(data.draw(any_intervals(1000, sink=False)), "cuda")
    problem = draw_problem(intervals, (4, 2), dims, torch.bfloat16, seed=data.draw(st.integers(0, 2**32 - 1)))
    sinks = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=4, max_size=4)), device="cuda")
    edges = [0, *sorted(data.draw(st.integers(0, intervals.key_count)) for _ in range(cut_count)), intervals.key_count]
    carry = None
    for first, last in itertools.pairwise(edges):
        behind = last == intervals.key_count and first == edges[-2]
        carry = kernels.attend(
            problem.query, problem.key[first:last], problem.value[first:last], between(intervals, first, last),
            scale=problem.scale, carry=carry, out_dtype=None if behind else torch.float32,
            sinks=sinks if behind else None,
        )  # fmt: skip
    operands = (problem.query.double(), problem.key.double(), problem.value.double())
    out, lse = reference.attend(*operands, intervals, scale=problem.scale, sinks=sinks)
    assert_as_exact_as_torch_with_sinks(problem, sinks, carry, (out, lse))
    delta = kernels.row_delta(problem.dout, carry[0])
    right = reference.sink_gradient(sinks.double(), carry[1], delta)
    assert (kernels.sink_gradient(sinks, carry[1], delta) - right).abs().max() <= 1e-5 * (1 + right.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("section", [1, 2])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_kernels_are_accurate_with_heads_in_sections(
    dim: int, section: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the keys of all heads are too many for the second-level cache, or a document's tiles for a GPU."""
    kernels = kernels_for("hopper", torch.bfloat16, (dim, dim))
    from ringflash.kernels.hopper import backward, backward_programs, forward  # needs triton

    monkeypatch.setattr(forward, "head_section", lambda *sizes: section * 2)
    monkeypatch.setattr(backward_programs, "multiprocessors", lambda device: section * 11)
    for module in (forward, backward):
        monkeypatch.setattr(module, "prepared_calls", Kept())
    for intervals in (causal_intervals(1001, 1300, "cuda"), to_device(monotone_intervals(900, 1100, 3, False), "cuda")):
        problem = draw_problem(intervals, (8, 4), (dim, dim), torch.bfloat16)
        assert_accurate(run(kernels, problem), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 512])
@on_gpu_kernels
def test_deterministic_gradients_repeat_bit_for_bit_on_gpus(name: str, dim: int) -> None:
    problem = draw_problem(causal_intervals(3001, 3001, "cuda"), (4, 2), (dim, dim), torch.bfloat16)
    kernels = kernels_for(name, torch.bfloat16, (dim, dim))
    first = run(kernels, problem, deterministic=True)
    for _ in range(100):
        assert_same(run(kernels, problem, deterministic=True), first)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@on_gpu_kernels
@settings(max_examples=20)
@given(st.data())
def test_deterministic_gradients_are_as_accurate_as_torch_over_any_mask(
    name: str, dim: int, data: st.DataObject
) -> None:
    kernels = kernels_for(name, torch.bfloat16, (dim, dim))
    intervals = replace(to_device(data.draw(any_intervals(2000, sink=False)), "cuda"), even=data.draw(st.booleans()))
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16, seed=data.draw(st.integers(0, 2**32 - 1)))
    cuts = data.draw(st.lists(st.integers(0, intervals.key_count), max_size=1))
    first, again = (run(kernels, problem, cuts, deterministic=True) for _ in range(2))
    assert_accurate(first, problem)
    assert_same(first, again)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@settings(max_examples=10)
@given(st.data())
def test_hopper_gradients_are_as_accurate_with_delta_found_beside_them(
    dim: int, deterministic: bool, data: st.DataObject
) -> None:
    kernels = kernels_for("hopper", torch.bfloat16, (dim, dim))
    intervals = replace(to_device(data.draw(any_intervals(900, sink=False)), "cuda"), even=data.draw(st.booleans()))
    layout = data.draw(st.sampled_from(LAYOUTS))
    problem = draw_problem(intervals, (4, 2), (dim, dim), torch.bfloat16, layout=layout)
    query, key, value, scale = problem.query, problem.key, problem.value, problem.scale
    out, lse = kernels.attend(query, key, value, intervals, scale=scale)
    rows = problem.dout, query, key, value, out, lse, problem.dlse
    *gradients, delta = whole_backward(kernels, *rows, intervals, scale=scale, deterministic=deterministic)
    assert_accurate(Results(out, lse, *gradients), problem)
    torch.testing.assert_close(
        delta, reference.row_delta(problem.dout, out, problem.dlse).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [128, 512])
@on_gpu_kernels
def test_attention_repeats_bit_for_bit_on_gpus(name: str, dim: int) -> None:
    problem = draw_problem(causal_intervals(3001, 3001, "cuda"), (4, 2), (dim, dim), torch.bfloat16)
    kernels = kernels_for(name, torch.bfloat16, (dim, dim))
    first, *repeats = (
        kernels.attend(problem.query, problem.key, problem.value, problem.intervals, scale=problem.scale)
        for _ in range(1000)
    )
    assert all(torch.equal(a, b) for again in repeats for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
@on_gpu_kernels
def test_offsets_beyond_32_bits_on_gpus(name: str) -> None:
    """Every tensor holds more than 2^31 elements; the last rows are compared, which lie behind that."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    kernels = kernels_for(name, torch.bfloat16, (128, 128))
    whole = windowed_problem(1_100_000, window=64, device="cuda")
    assert whole.query.numel() > 2**31
    assert_last_rows_accurate(kernels, whole, window=64, count=200)


@pytest.mark.gpu
@on_gpu_kernels
def test_131072_tokens_of_head_dimension_512_on_gpus(name: str) -> None:
    """Held against float64 on the last rows, which see all keys, and on the last keys, which only they see."""
    tokens, last = 131_072, 100
    kernels = kernels_for(name, torch.bfloat16, (512, 512))
    whole = draw_problem(causal_intervals(tokens, tokens, "cuda"), (2, 1), (512, 512), torch.bfloat16)
    end = replace(
        whole,
        query=whole.query[-last:],
        dout=whole.dout[-last:],
        dlse=whole.dlse[:, -last:].contiguous(),
        intervals=causal_intervals(last, tokens, "cuda"),
    )

    def ends(results: Results) -> Results:
        return Results(**{name: x[:, -last:] if name == "lse" else x[-last:] for name, x in vars(results).items()})

    right = ends(exact(end))
    theirs = errors(ends(torch_own(end)), right)
    for name, error in errors(ends(run(kernels, whole)), right).items():
        assert error <= 2 * theirs[name] + 1e-5, f"{name}: error {error:.3g}, torch's own {theirs[name]:.3g}"


def windowed_problem(tokens: int, window: int, device: str) -> Problem:
    row = torch.arange(tokens, device=device, dtype=torch.int32)
    intervals = KeyIntervals((row - window).clamp(min=0), row + 1, tokens)
    random = torch.Generator(device).manual_seed(0)
    tensors = (
        torch.empty(tokens, 16, 128, device=device, dtype=torch.bfloat16).normal_(generator=random) for _ in range(4)
    )
    return Problem(*tensors, torch.zeros(16, tokens, device=device), intervals, 128**-0.5)


def assert_last_rows_accurate(kernels: ModuleType, whole: Problem, window: int, count: int) -> None:
    """Hold the last `count` rows against the same problem without the rows that they do not depend on."""
    first = whole.intervals.query_count - count - window

    def last(results: Results) -> Results:
        ends = {name: x[:, -count:] if name == "lse" else x[-count:] for name, x in vars(results).items()}
        return Results(**ends)

    cut = Problem(
        *(x[first:].clone() for x in (whole.query, whole.key, whole.value, whole.dout)),
        whole.dlse[:, first:],
        between(
            KeyIntervals(whole.intervals.start[first:], whole.intervals.stop[first:], whole.intervals.key_count),
            first,
            whole.intervals.key_count,
        ),
        whole.scale,
    )
    right = last(exact(cut))
    theirs = errors(last(torch_own(cut)), right)
    for name, error in errors(last(run(kernels, whole)), right).items():
        assert error <= 2 * theirs[name] + 1e-5, name


def test_the_comparison_of_last_rows_is_right_where_all_can_be_seen() -> None:
    assert_last_rows_accurate(blockwise, windowed_problem(400, window=30, device="cpu"), window=30, count=100)
