"""What kernels are told beforehand of how many keys a few rows see together holds for every two rows of a launch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import any_mask, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.planning.launches import Launch
from ringflash.parallel.planning.local_program import local_program
from ringflash.parallel.planning.rank_program import rank_program
from ringflash.parallel.planning.ring import ring
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.band import band_of_bounds, band_of_mask
from ringflash.parallel.positions.mask import Mask

CPU = torch.device("cpu")


def least_band(intervals: KeyIntervals) -> int:
    """By definition, from every two rows."""
    start, stop = intervals.start.tolist(), intervals.stop.tolist()
    return max((stop[u] - start[t] - (u - t) for u in range(len(stop)) for t in range(u + 1)), default=0)


def assert_bands_hold(stages: tuple[StageProgram, ...]) -> None:
    """For each launch that has one."""
    for intervals in _intervals(stages):
        if intervals.band is not None:
            assert not intervals.has_sink_tokens
            assert least_band(intervals) <= intervals.band


@st.composite
def narrow_masks(draw: st.DrawFn, length: int) -> Mask:
    """Any mask, within a window or chunks."""
    near = [Mask.sliding_window(draw(st.integers(0, 9)), draw(st.none() | st.integers(0, 9))), Mask.chunked(7)]
    mask = draw(any_mask(length))
    return mask if mask.branches is not None or mask.spans is not None else mask & draw(st.sampled_from(near))


@settings(max_examples=150)
@given(st.data())
def test_bands_of_one_device_hold(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 40))
    mask = data.draw(narrow_masks(length))
    boundaries = None if mask.boundaries is None else torch.tensor(mask.boundaries)
    own = None if mask.query_boundaries is None else torch.tensor(mask.query_boundaries)
    queries = length if own is None else int(own[-1])
    for known in (mask, mask.without_documents()):  # boundaries on a device are nobody's to read
        assert_bands_hold(local_program(known, boundaries, own, queries, length, CPU).stages)


@settings(max_examples=60)
@given(problems(40, 4))
def test_bands_of_ranks_hold(problem: tuple) -> None:
    mask, partition = problem
    for mine in ring(mask, partition).ranks:
        program = rank_program(mine, mask, CPU)
        assert_bands_hold(program.stages)
        assert_bands_hold(tuple(piece.piece(1, 2) for piece in program.stages if piece.launches))


@pytest.mark.parametrize(
    ("mask", "band"),
    [
        (Mask.sliding_window(127), 128),
        (Mask.sliding_window(127, None), None),
        (Mask.sliding_window(3, 4), 8),
        (Mask.causal(), None),
        (Mask.causal() & Mask.documents([0, 5, 12, 12]), 7),
        (Mask.documents([0, 5, 12]), 13),
        (Mask.causal() & Mask.documents([0, 300]) & Mask.sliding_window(9), 10),
        (Mask.causal() & Mask.chunked(16), 16),
        (Mask.prefix_lm(4) & Mask.chunked(16), 19),
        (Mask.causal([(2, 9), (20, 25)]) & Mask.sliding_window(9, None), 16),
        (Mask(boundaries=(0,)), 1),
        (Mask.sliding_window(9, sink=2), None),
        (Mask.shared_prefix([3], [[2, 2]]), None),
        (Mask.documents([0, 5], [0, 4]), None),
    ],
)
def test_bands_of_masks_are_as_narrow_as_rules_say(mask: Mask, band: int | None) -> None:
    assert band_of_mask(mask) == band


@settings(max_examples=100)
@given(st.lists(st.integers(0, 20), max_size=12), st.lists(st.integers(0, 20), min_size=12, max_size=12))
def test_band_of_bounds_is_the_least(start: list[int], stop: list[int]) -> None:
    first, last = np.array(sorted(start), dtype=np.int32), np.array(sorted(stop[: len(start)]), dtype=np.int32)
    least = max(0, least_band(KeyIntervals(torch.from_numpy(first), torch.from_numpy(last), 20)))
    assert band_of_bounds(first, last) == least


@pytest.mark.parametrize(
    ("mask", "even"),
    [
        (Mask.sliding_window(1022), True),
        (Mask.sliding_window(4095), True),
        (Mask.sliding_window(8191), False),
        (Mask.sliding_window(1022) & Mask.documents([0, 8192, 16384]), True),
        (Mask.sliding_window(1022) & Mask.documents([0, 1000, 2000, 16384]), True),
        (Mask.sliding_window(1022) & Mask.documents([*range(0, 16385, 2048)]), False),
        (Mask.causal() & Mask.documents([0, 8192, 16384]), False),
        (Mask.causal() & Mask.chunked(1024), False),
        (Mask.causal(), False),
        (Mask.sliding_window(1022, sink=4), False),
    ],
)
def test_programs_know_where_rows_see_as_many_keys_each(mask: Mask, even: bool) -> None:
    boundaries = None if mask.boundaries is None else torch.tensor(mask.boundaries)
    [intervals] = _intervals(local_program(mask, boundaries, None, 16384, 16384, CPU).stages)
    assert intervals.even == even
    assert intervals.to(CPU).even == even
    if boundaries is not None:  # on a device they are nobody's to read
        [intervals] = _intervals(local_program(mask.without_documents(), boundaries, None, 16384, 16384, CPU).stages)
        assert not intervals.even


def test_programs_of_windows_and_documents_know_their_band() -> None:
    windows = Mask.sliding_window(15)
    assert [x.band for x in _intervals(local_program(windows, None, None, 40, 40, CPU).stages)] == [16]
    documents = Mask.causal() & Mask.documents([0, 10, 22, 40])
    program = local_program(documents, torch.tensor(documents.boundaries), None, 40, 40, CPU)
    assert [x.band for x in _intervals(program.stages)] == [18]
    moved = Launch(_intervals(program.stages)[0]).to(CPU)
    assert moved.intervals.band == 18


def _intervals(stages: tuple[StageProgram, ...]) -> list[KeyIntervals]:
    return [launch.intervals for stage in stages for launch in stage.launches]
