"""What is kept between calls stays within bounds."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ringflash import Mask
from ringflash.kernels import intervals
from ringflash.kernels import kept as keeping
from ringflash.kernels.intervals import causal_intervals
from ringflash.kernels.kept import MOST_KEPT, Kept, TensorNotes, metadata
from ringflash.parallel.positions import visibility


def test_values_are_found_again_until_there_are_too_many() -> None:
    kept = Kept(most=3)
    assert [kept.add(name, name.upper()) for name in "abc"] == ["A", "B", "C"]
    assert kept == {"a": "A", "b": "B", "c": "C"}
    kept.add("d", "D")
    assert kept == {"d": "D"}


def test_by_default_values_are_counted() -> None:
    kept = Kept()
    for number in range(MOST_KEPT + 1):
        kept.add(number, number)
    assert len(kept) == 1


def test_a_note_about_a_tensor_ends_with_its_values_and_with_the_tensor() -> None:
    notes: TensorNotes[str] = TensorNotes()
    x = torch.zeros(3)
    notes.put(x, "zeros")
    assert notes.get(x) == "zeros"
    assert notes.get(x.view(3)) is None
    x += 1
    assert notes.get(x) is None
    notes.put(x, "ones")
    del x
    gc.collect()
    assert not notes._of


def test_values_may_be_weighed_and_one_that_is_too_heavy_is_kept_alone() -> None:
    kept = Kept(most=10, size=len)
    for value in ("four", "five.", "x", "much too heavy", "y"):
        assert kept.add(value, value) == value
        assert sum(map(len, kept)) <= 10 or len(kept) == 1
    assert set(kept) == {"y"}


def test_metadata_tells_shapes_strides_and_dtypes_apart_and_not_addresses_or_numbers() -> None:
    x = torch.zeros(4, 6)
    assert metadata(x) == metadata(torch.ones(4, 6))
    others = (None, x.T, x[:, :5], x[::2].expand(2, 6), x.half(), x.to("meta"))
    assert len({metadata(x), *map(metadata, others)}) == len(others) + 1


def test_edges_of_tiles_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = Kept(10_000, size=intervals._edges.size)
    monkeypatch.setattr(intervals, "_edges", edges)
    for keys in range(100, 300):
        causal_intervals(keys, keys).key_tile_rows(1)
        assert sum(x.nbytes for pair in edges.values() for x in pair) <= 10_000
    assert edges


def test_a_captured_graph_has_edges_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are kept are forgotten one day, and a graph reads where it was captured."""
    edges = Kept()
    monkeypatch.setattr(intervals, "_edges", edges)
    before = intervals._tile_edges(100, 16, torch.device("cpu"))
    monkeypatch.setattr(intervals, "capturing", lambda device: True)
    captured = [intervals._tile_edges(count, 16, torch.device("cpu")) for count in (100, 50)]
    assert list(edges.values()) == [before]
    assert all(torch.equal(a, b) for a, b in zip(captured[0], before, strict=True))
    assert captured[0][0] is not before[0]


def test_what_a_captured_graph_reads_of_a_mask_outlives_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Mask.blocks(torch.ones(3, 3, dtype=torch.bool), 16).layout
    device = torch.device("cpu")
    monkeypatch.setattr(visibility, "_tensors", Kept())
    monkeypatch.setattr(keeping, "_captured", {})
    read: list[weakref.ref] = []
    for captured in (False, True):
        monkeypatch.setattr(keeping, "capturing", lambda device, captured=captured: captured)
        read = [
            weakref.ref(x)
            for x in (*visibility._layout_bounds(layout, device), visibility._prefix_on_device((3, 4), device))
        ]
        visibility._tensors.clear()
        gc.collect()
        assert [x() is not None for x in read] == [captured] * len(read)
