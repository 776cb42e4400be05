"""Launches show each visible pair once, their bounds never step back, and random blocks take few of them."""

from __future__ import annotations

import pytest
import torch
from cases import any_blocks, any_mask, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.kernels import reference
from ringflash.kernels.cpu import blockwise
from ringflash.kernels.modifiers import Modifiers
from ringflash.parallel.planning.launches import Launch, attend, attend_backward, launches
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import key_intervals


def shown(work: tuple[Launch, ...], queries: int) -> torch.Tensor:
    """How often each pair is in a launch, (queries, keys)."""
    total = torch.zeros(queries, work[0].intervals.key_count, dtype=torch.int64)
    for launch in work:
        rows = torch.arange(queries) if launch.rows is None else launch.rows
        assert len(rows.unique()) == len(rows), "a row twice in a launch"
        total[rows] += launch.intervals.visible()
    return total


def selected(rows: int, each: int) -> torch.Tensor:
    """A layout of `each` random blocks in each row."""
    random = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0))
    return torch.zeros(rows, rows, dtype=torch.bool).scatter(1, random.argsort(1)[:, :each], True)


@settings(max_examples=300)
@given(data=st.data(), length=st.integers(1, 60))
def test_launches_show_each_visible_pair_once_and_never_step_back(data, length):
    documents = torch.tensor([0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=3))), length])
    mask = data.draw(any_mask(length)).without_documents() & data.draw(any_blocks(length)) & Mask.documents(documents)
    held = st.lists(st.integers(0, length - 1), min_size=1, unique=True).map(sorted).map(torch.tensor)
    queries, keys = data.draw(held), data.draw(held)
    work = launches(mask, documents, queries, keys)
    assert torch.equal(shown(work, len(queries)), visible(mask, length)[queries][:, keys].long())
    for launch in work:
        for bound in (x for pair in launch.intervals.ranges() for x in pair):
            assert (bound.diff() >= 0).all()


@pytest.mark.parametrize("mask", [Mask.bidirectional(), Mask.causal()], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("each", [4, 8])
def test_random_blocks_take_few_launches(each, mask):
    """About one for each of a row's blocks; runs of blocks that touch are longer than others and fit worse."""
    mask &= Mask.blocks(selected(64, each), 16) & Mask.documents([0, 1024])
    positions = torch.arange(1024)
    work = launches(mask, torch.tensor([0, 1024]), positions, positions)
    assert torch.equal(shown(work, 1024), visible(mask, 1024).long())
    assert len(work) <= min(each + 3, len(mask.layers) / 2)


def test_regular_masks_take_all_rows_as_they_lie():
    row, column = torch.arange(16)[:, None], torch.arange(16)[None, :]
    stripes = (column <= row) & ((column >= row - 2) | (column % 8 == 0))
    for mask, count in ((Mask.sliding_window(9, sink=3), 1), (Mask.blocks(stripes, 4), 3)):
        work = launches(mask, None, torch.arange(64), torch.arange(64))
        assert [launch.rows for launch in work] == [None] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("modified", [False, True])
def test_launches_of_picked_rows_give_what_launches_of_all_rows_give(modified, dtype):
    """In float64 to the last digits but for the log-sum-exp, which kernels keep in float32; others to theirs."""
    mask, positions = Mask.blocks(selected(24, 4), 3), torch.arange(72)
    random = torch.Generator().manual_seed(1)
    query, key, value, dout = (torch.randn(72, h, 16, generator=random).to(dtype) for h in (4, 2, 2, 4))
    modifiers = Modifiers(
        softcap=3.0,
        slopes=torch.rand(72, 4, generator=random),
        dropout=0.3,
        seed=torch.tensor([5]),
        query_positions=positions.int(),
        key_positions=positions.int(),
    )
    results = []
    picked = launches(mask, None, positions, positions)
    of_layers = [Launch(key_intervals(layer, None, positions, positions)) for layer in mask.layers]
    assert all(launch.rows is not None for launch in picked)
    for work, kernels in ((picked, blockwise), (of_layers, reference)):
        settings = {"scale": 0.25, "modifiers": modifiers if modified else None}
        accumulator = torch.promote_types(dtype, torch.float32)
        carry = dquery = None
        for launch in work:
            carry = attend(kernels, launch, query, key, value, carry=carry, out_dtype=accumulator, **settings)
        out, lse = carry
        rows, sums = (dout, query, key, value, lse, kernels.row_delta(dout, out)), [0, 0]
        for launch in work:
            settings |= {"carry": dquery, "dquery_dtype": accumulator, "dkey_dtype": accumulator}
            dquery, *of_keys = attend_backward(kernels, launch, *rows, **settings)
            sums = [a + b for a, b in zip(sums, of_keys, strict=True)]
        results.append((out, lse, dquery, *sums))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rows_that_no_launch_has_stay_empty():
    layout = selected(16, 4)
    layout[3] = layout[9] = False
    mask = Mask.blocks(layout, 4)
    positions = torch.arange(64)
    work = launches(mask, None, positions, positions)
    assert work[0].rows is not None
    blind = ~visible(mask, 64).any(1)
    carry = None
    for launch in work:
        carry = attend(
            blockwise,
            launch,
            *torch.randn(3, 64, 2, 8),
            scale=1.0,
            modifiers=None,
            carry=carry,
            out_dtype=torch.float32,
        )
    assert blind.sum() == 8
    assert not carry[0][blind].any()
    assert carry[1].isneginf().any(0).equal(blind)
