"""Launches show each visible pair once, their bounds never step back, and a layout takes one for each interval."""

from __future__ import annotations

import pytest
import torch
from cases import any_blocks, any_mask, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.launches import Launch, launches
from ringflash.parallel.positions.mask import Mask


def shown(work: tuple[Launch, ...], queries: int, layout: torch.Tensor | None = None) -> torch.Tensor:
    """How often each pair is in a launch, (groups of heads, queries, keys)."""
    total = torch.zeros(1, queries, work[0].intervals.key_count, dtype=torch.int64)
    for launch in work:
        total = total + launch.showing(layout).visible()
    return total


@settings(max_examples=300)
@given(data=st.data(), length=st.integers(1, 60))
def test_launches_show_each_visible_pair_once_and_never_step_back(data, length):
    documents = torch.tensor([0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=3))), length])
    mask = data.draw(any_mask(length)).without_documents() & data.draw(any_blocks(length)) & Mask.documents(documents)
    held = st.lists(st.integers(0, length - 1), min_size=1, unique=True).map(sorted).map(torch.tensor)
    queries, keys = data.draw(held), data.draw(held)
    work = launches(mask, documents, queries, keys)
    assert torch.equal(shown(work, len(queries))[0], visible(mask, length)[queries][:, keys].long())
    for launch in work:
        for bound in (x for pair in launch.intervals.ranges() for x in pair):
            assert (bound.diff() >= 0).all()


@settings(max_examples=25)
@given(data=st.data(), length=st.integers(1, 60), sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_a_layout_that_comes_with_the_call_shows_to_each_group_what_it_shows_as_part_of_a_mask(data, length, sizes):
    documents = torch.tensor([0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=3))), length])
    rules = data.draw(any_mask(length)).without_documents().without_layout & Mask.documents(documents)
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    layout = torch.rand(3, *(-(-length // size) for size in sizes), generator=random) < 0.5
    held = st.lists(st.integers(0, length - 1), min_size=1, unique=True).map(sorted).map(torch.tensor)
    queries, keys = data.draw(held), data.draw(held)
    work = launches((rules & Mask.blocks(layout, sizes)).planned(), documents, queries, keys)
    found = shown(work, len(queries), layout)
    for group, of_group in zip(found, layout, strict=True):
        right = visible(rules & Mask.blocks(of_group, sizes), length)[queries][:, keys]
        assert torch.equal(group, right.long())


@pytest.mark.parametrize(
    ("mask", "count"),
    [(Mask.sliding_window(9, sink=3), 1), (Mask.causal(), 1), (Mask.sliding_window(9, sink=3) & Mask.causal(), 1)],
    ids=str,
)
def test_a_layout_takes_no_more_than_one_launch_for_each_interval(mask, count):
    random = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.3
    positions = torch.arange(64)
    assert len(launches(mask, None, positions, positions)) == count
    work = launches(mask & Mask.blocks(random, 4), None, positions, positions)
    assert len(work) == (2 if mask.two_intervals else 1)


@pytest.mark.parametrize(("size", "first", "units"), [(128, 0, (128, 128)), (64, 128, (64, 64)), (128, 40, (1, 1))])
def test_it_is_known_which_rows_stand_together_in_a_layout(size, first, units):
    """Blocks of a shard that begins at a multiple of them are whole ones of the kernels'."""
    positions = torch.arange(first, first + 512)
    mask = Mask.blocks(torch.ones(1, 16, 16, dtype=torch.bool), size)
    (launch,) = launches(mask, None, positions, positions)
    assert launch.places.units == units
    assert launch.of_keys(128, 256).places.units == units


def test_a_layout_that_does_not_come_is_missed():
    positions = torch.arange(8)
    (launch,) = launches(Mask.blocks(torch.ones(1, 2, 2, dtype=torch.bool), 4).planned(), None, positions, positions)
    with pytest.raises(ArgumentError, match="layout of blocks that comes with each call"):
        launch.showing(None)
