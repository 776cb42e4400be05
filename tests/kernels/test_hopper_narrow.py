"""Kernels for rows that see few keys: they compile within their budget, are chosen where they may be, and are exact."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from aot import catch
from hopper_aot import Compiled, compile_call
from oracle import LAYOUTS, Problem, Results, assert_accurate, assert_same, draw_problem, errors, with_blocks
from stand_in import stand_in

from ringflash.kernels import hopper, reference
from ringflash.kernels.hopper import backward, forward, narrow
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.whole_backward import whole_backward
from ringflash.parallel.positions.band import band_of_bounds, band_of_mask
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import key_intervals

QUERIES, KEYS = 1000, 1200

EVERY_FORM = {(dim, dtype) for dim in (40, 64, 96, 128) for dtype in (torch.bfloat16, torch.float16)}


def for_every_form() -> AbstractContextManager:
    """Chosen also for what they were not held against float64 with."""
    return mock.patch.multiple(narrow, CHOSEN=EVERY_FORM, CHOSEN_WITH_MORE=EVERY_FORM)


# Machine code


def compiled(
    which: str,
    dim: int,
    group: int,
    band: int,
    dtype: torch.dtype = torch.bfloat16,
    finds_delta: bool = True,
    dkey_dtype: torch.dtype = torch.bfloat16,
) -> Compiled:
    """One of the kernels, of 16 query heads."""

    def on_paper(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, dout = (on_paper(QUERIES, 16, dim, dtype=dtype) for _ in range(2))
    key, value = (on_paper(KEYS, 16 // group, dim, dtype=dtype) for _ in range(2))
    bounds = (on_paper(QUERIES, dtype=torch.int32) for _ in range(2))
    intervals = KeyIntervals(*bounds, KEYS, band=band)
    intervals.kept(("key_tile_rows", 1, False), lambda: on_paper(KEYS, 4, dtype=torch.int32))
    intervals.kept(("key_tile_rows", narrow.KEY_TILE, False), lambda: on_paper(KEYS, 4, dtype=torch.int32))
    tiles = narrow.narrow_tiles(band, group, dim)
    assert tiles is not None
    lse, sinks = on_paper(16, QUERIES), on_paper(16, dtype=dtype)

    def launch() -> None:
        if which == "attend":
            prepared = narrow.PreparedNarrowForward(query, key, value, intervals, 0.1, sinks, tiles)
            prepared(query, key, value, intervals, sinks)
        else:
            operands = (dout, query, key, value)
            numbers = (lse, None, lse) if finds_delta else (lse, lse, None)
            prepared = narrow.PreparedNarrowBackward(operands, numbers, intervals, 0.1, dkey_dtype, tiles)
            others = "launch_dkey" if which == "dquery" else "launch_dquery"
            setattr(prepared, others, lambda *arguments: None)
            prepared(operands, numbers, intervals)

    return compile_call(catch(narrow, f"{which}_narrow_kernel", launch))


SHARED_LIMIT = 232448
PROCESSOR = {"registers": 65536, "shared": 233472}
"""Of a multiprocessor; programs take a kibibyte more than they ask for."""


SPILLED = 192
"""Bytes with triton 3.9, for as many programs on a multiprocessor; with 3.6 and 3.7.1 about 60."""

SPILLED_BY_MANY_KEYS = 96
"""The same of the most keys; with 3.6 and 3.7.1 none."""


def programs(found: Compiled) -> int:
    """Programs of 4 warps that a multiprocessor has room for."""
    return min(PROCESSOR["registers"] // (128 * found.registers), PROCESSOR["shared"] // (found.shared + 1024))


@pytest.mark.parametrize(
    ("dim", "least"),
    [(64, {"attend": 4, "dquery": 3, "dkey": 3}), (128, dict.fromkeys(("attend", "dquery", "dkey"), 2))],
)
@pytest.mark.parametrize("which", ["attend", "dquery", "dkey"])
def test_several_programs_of_a_window_of_128_fit_a_multiprocessor(which: str, dim: int, least: dict[str, int]) -> None:
    found = compiled(which, dim, group=8, band=128)
    assert found.warnings == []
    assert programs(found) >= least[which]
    assert found.spilled <= SPILLED


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("which", ["attend", "dquery"])
def test_tiles_of_the_most_keys_compile_with_few_spills(which: str, dim: int) -> None:
    found = compiled(which, dim, group=8, band=177)
    assert found.warnings == []
    assert found.spilled <= SPILLED_BY_MANY_KEYS
    assert found.shared <= SHARED_LIMIT


def test_launches_of_a_ring_fit_as_well() -> None:
    """Which are given delta, and give the gradients of keys in fp32."""
    kernels = {
        which: compiled(which, 64, 8, 128, torch.float16, finds_delta=False, dkey_dtype=torch.float32)
        for which in ("dquery", "dkey")
    }
    for found in kernels.values():
        assert found.warnings == []
        assert found.spilled <= SPILLED
        assert programs(found) >= 3


# Choice


def intervals_of(mask: Mask, queries: int, device: str = "cpu") -> KeyIntervals:
    positions = torch.arange(queries)
    boundaries = None if mask.boundaries is None else torch.tensor(mask.boundaries)
    found = key_intervals(mask, boundaries, positions, positions)
    return KeyIntervals(found.start.to(device), found.stop.to(device), queries, band=band_of_mask(mask))


WINDOW = intervals_of(Mask.sliding_window(127), 300)


@pytest.mark.parametrize(
    ("changed", "takes"),
    [
        ({}, True),
        ({"intervals": KeyIntervals(WINDOW.start, WINDOW.stop, 300)}, False),
        ({"intervals": intervals_of(Mask.sliding_window(177), 300)}, False),
        ({"intervals": intervals_of(Mask.causal() & Mask.documents([0, 130, 300]), 300)}, True),
        ({"intervals": KeyIntervals(WINDOW.start, WINDOW.stop, 300, WINDOW.start, WINDOW.start, band=128)}, False),
        ({"intervals": with_blocks(WINDOW, 1, (50, 24), 0, (0, 0))}, False),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"of": torch.float16}, False),
        ({"dims": (128, 128)}, True),
        ({"dims": (128, 128), "more": True}, False),
        ({"more": True}, True),
        ({"dims": (96, 96)}, False),
        ({"dims": (128, 64)}, False),
        ({"dims": (192, 192)}, False),
        ({"heads": (8, 8)}, True),
    ],
    ids=str,
)
def test_what_narrow_kernels_take(changed: dict, takes: bool) -> None:
    asked = {"intervals": WINDOW, "dtype": None, "more": False} | changed
    dims, heads, dtype = (asked.pop(x, y) for x, y in (("dims", (64, 64)), ("heads", (8, 1)), ("of", torch.bfloat16)))
    query, value = (torch.empty(300, *x, dtype=dtype, device="meta") for x in zip(heads, dims, strict=True))
    found = narrow.tiles_for(query, value, **asked)
    assert (found is not None) == takes


def test_modifiers_and_carries_go_to_other_kernels() -> None:
    """Of rows that these kernels take without."""
    query, key = torch.empty(300, 8, 64, dtype=torch.bfloat16), torch.empty(300, 1, 64, dtype=torch.bfloat16)
    lse, capped = torch.empty(8, 300), {"scale": 1.0, "modifiers": Modifiers(softcap=3.0)}
    of_rows = (query, query, key, key, lse, lse, WINDOW)
    narrow_ones = mock.Mock(side_effect=AssertionError("not chosen"))
    with (
        stand_in(hopper) as driver,
        mock.patch.object(forward, "attend_narrow", narrow_ones),
        mock.patch.object(backward, "backward_narrow", narrow_ones),
    ):
        with pytest.raises(AssertionError, match="not chosen"):
            hopper.attend(query, key, key, WINDOW, scale=1.0)
        hopper.attend(query, key, key, WINDOW, **capped)
        hopper.attend(query, key, key, WINDOW, scale=1.0, carry=(query.float(), lse))
        hopper.attend(query, key, key, WINDOW, scale=1.0, out_dtype=torch.float32)
        hopper.attend_backward(*of_rows, **capped)
        hopper.attend_backward(*of_rows, scale=1.0, carry=query.float())
        assert hopper.whole_backward(query, query, key, key, query, lse, None, WINDOW, **capped) is None
    assert len(driver.launches) >= 6


def test_one_row_for_all_heads_is_copied_for_boxes() -> None:
    """As the gradient of a mean over heads is, and keys that were expanded."""
    query, one = (torch.empty(300, n, 64, dtype=torch.bfloat16) for n in (8, 1))
    same, lse = one.expand(300, 8, 64), torch.empty(8, 300)
    with stand_in(hopper, by_driver=False) as driver:
        for _ in range(2):
            hopper.attend(query, same, same, WINDOW, scale=1.0)
            assert hopper.whole_backward(same, query, one, one, query, lse, None, WINDOW, scale=1.0)
    described = [y for launch in driver.launches for y in launch if hasattr(y, "block_shape") and len(y.shape) == 3]
    assert len(described) > 30
    assert all(0 not in y.strides and 0 not in y.base.stride() for y in described)


@given(st.integers(1, 400), st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16, 64]), st.sampled_from([40, 64, 96, 128]))
def test_tiles_have_room_for_all_keys_of_their_rows(band: int, group: int, dim: int) -> None:
    tiles = narrow.narrow_tiles(band, group, dim)
    if tiles is None:
        assert band > 129  # of which a tile of one head sees the most
    else:
        assert tiles.tokens * tiles.pack == 64
        assert group % tiles.pack == 0
        assert tiles.passes == 1 or dim <= 64
        assert tiles.keys + tiles.first_keys >= band + tiles.tokens * tiles.passes - 1


# Results on a GPU


def hopper_or_skip() -> None:
    if missing := hopper.supports("cuda", torch.bfloat16, 64):
        pytest.skip(missing)


@st.composite
def narrow_intervals(draw: st.DrawFn, group: int) -> KeyIntervals:
    """Windows, documents and anything else whose ends do not decrease, of few keys."""
    rows, keys, seed = draw(st.integers(1, 700)), draw(st.integers(1, 700)), draw(st.integers(0, 2**32 - 1))
    random = torch.Generator().manual_seed(seed)
    kind = draw(st.sampled_from(["window", "documents", "causal documents", "anything"]))
    row = torch.arange(rows)
    if kind == "window":
        left, right = draw(st.integers(0, 127)), draw(st.sampled_from([0, 0, 1, 9]))
        start, stop = row - left, row + 1 + right
    elif kind == "anything":  # rows may be empty
        near = draw(st.integers(1, 60))
        start = (row - torch.randint(-near, near, (rows,), generator=random)).cummax(0).values
        stop = (row + torch.randint(-near, near, (rows,), generator=random)).cummax(0).values
    else:
        lengths = torch.randint(1, draw(st.integers(2, 60)), (rows,), generator=random)
        edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        index = torch.searchsorted(edges, row, right=True)
        start, stop = edges[index - 1], row + 1 if kind == "causal documents" else edges[index]
    start, stop = (x.clamp(0, keys).int() for x in (start, stop))
    band = band_of_bounds(start.numpy(), stop.numpy())
    assume(narrow.narrow_tiles(band, group, 64) is not None)
    return KeyIntervals(start.cuda(), stop.cuda(), keys, band=band)


def solved(problem: Problem, sinks: torch.Tensor | None = None) -> tuple[Results, torch.Tensor]:
    """By these kernels, and delta."""
    operands = problem.query, problem.key, problem.value
    with for_every_form():
        assert narrow.tiles_for(problem.query, problem.value, problem.intervals, None) is not None
        out, lse = hopper.attend(*operands, problem.intervals, scale=problem.scale, sinks=sinks)
        *gradients, delta = hopper.whole_backward(
            problem.dout, *operands, out, lse, problem.dlse, problem.intervals, scale=problem.scale
        )
    return Results(out, lse, *gradients), delta


def solved_as_in_a_ring(problem: Problem) -> Results:
    """With delta from elsewhere, and the gradients of keys in fp32."""
    operands = problem.query, problem.key, problem.value
    settings = {"scale": problem.scale}
    with for_every_form():
        out, lse = hopper.attend(*operands, problem.intervals, **settings)
        delta = hopper.row_delta(problem.dout, out, problem.dlse)
        of_rows = lse, delta, problem.intervals
        gradients = hopper.attend_backward(problem.dout, *operands, *of_rows, **settings, dkey_dtype=torch.float32)
    assert [x.dtype for x in gradients] == [problem.query.dtype, torch.float32, torch.float32]
    return Results(out, lse, *gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2), (8, 1), (32, 2)], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 96, 128])
@settings(max_examples=12)
@given(data=st.data())
def test_narrow_kernels_are_as_accurate_as_torch(
    dim: int, heads: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    hopper_or_skip()
    intervals = data.draw(narrow_intervals(heads[0] // heads[1]))
    problem = draw_problem(
        intervals, heads, (dim, dim), dtype, data.draw(st.integers(0, 99)), data.draw(st.sampled_from(LAYOUTS))
    )
    results, delta = solved(problem)
    assert_accurate(results, problem)
    assert_accurate(solved_as_in_a_ring(problem), problem)
    out, _ = reference.attend(
        problem.query, problem.key, problem.value, intervals, scale=problem.scale, out_dtype=torch.float64
    )
    right = reference.row_delta(problem.dout, out, problem.dlse)
    assert (delta - right).abs().max() <= 1e-4 * (1 + right.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@settings(max_examples=15)
@given(data=st.data())
def test_learned_sinks_in_narrow_kernels_are_as_accurate_as_behind_others(dim: int, data: st.DataObject) -> None:
    hopper_or_skip()
    problem = draw_problem(data.draw(narrow_intervals(8)), (16, 2), (dim, dim), torch.bfloat16)
    logits = data.draw(st.lists(st.sampled_from([-float("inf"), -3.0, 0.1, 4.0]), min_size=16, max_size=16))
    sinks = torch.tensor(logits, device="cuda")
    operands = problem.query, problem.key, problem.value
    settings = {"scale": problem.scale}
    out, lse = reference.attend(*(x.double() for x in operands), problem.intervals, sinks=sinks, **settings)
    problem = replace(problem, dlse=problem.dlse.masked_fill(lse.isneginf(), 0))
    delta = reference.row_delta(problem.dout, out, problem.dlse)
    of_rows = lse, delta, problem.intervals
    right = Results(out, lse, *reference.attend_backward(problem.dout, *operands, *of_rows, **settings))
    unknown = KeyIntervals(problem.intervals.start, problem.intervals.stop, problem.intervals.key_count)
    out, lse = hopper.attend(*operands, unknown, sinks=sinks, **settings)
    *others, _ = whole_backward(hopper, problem.dout, *operands, out, lse, problem.dlse, unknown, **settings)
    theirs = errors(Results(out, lse, *others), right)
    for name, error in errors(solved(problem, sinks)[0], right).items():
        assert error <= 1.5 * theirs[name] + 1e-5, name


@pytest.mark.gpu
def test_narrow_kernels_repeat_bit_for_bit() -> None:
    hopper_or_skip()
    problem = draw_problem(intervals_of(Mask.sliding_window(127), 3001, "cuda"), (16, 2), (64, 64), torch.bfloat16)
    first, _ = solved(problem)
    for _ in range(100):
        assert_same(solved(problem)[0], first)


@pytest.mark.gpu
def test_nan_stays_in_rows_that_see_it_in_narrow_kernels() -> None:
    hopper_or_skip()
    problem = draw_problem(intervals_of(Mask.sliding_window(19), 200, "cuda"), (8, 1), (64, 64), torch.bfloat16)
    problem.key[[50, 51]] = torch.nan
    results, _ = solved(problem)
    seen = torch.zeros(200, dtype=torch.bool, device="cuda")
    seen[50:71] = True
    for x in (results.out, results.lse.T):
        assert torch.equal(x.isnan().flatten(1).any(1), seen)
        assert torch.equal(x.isnan().flatten(1).all(1), seen)
