"""Counters of counters.py: launches that may run at one time never share any. Streams and captures are played."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import Kept
from ringflash.kernels.triton.decode import counters, merge_parts

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a call finds: the current stream and whether it is being captured."""
    gpu = SimpleNamespace(stream=0, capturing=False)
    zeros = torch.zeros
    active = SimpleNamespace(get_current_stream=lambda index: gpu.stream)
    monkeypatch.setattr(counters, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(counters, "build_to_keep", lambda build, device: build())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(counters, "_shared", Kept())
    monkeypatch.setattr(counters, "_supply", {})
    monkeypatch.setattr(counters, "_supplies", [])
    return gpu


def assert_disjoint(found: list[Tensor]) -> None:
    ranges = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in found)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))


def test_launches_of_a_stream_share_counters_and_streams_do_not(gpu: SimpleNamespace) -> None:
    first, again = counters.counters(8, DEVICE), counters.counters(30, DEVICE)
    assert first.data_ptr() == again.data_ptr()
    gpu.stream = 7
    assert_disjoint([first, counters.counters(8, DEVICE)])
    assert counters.counters(5000, DEVICE).numel() >= 5000


def test_captured_launches_share_with_no_other(gpu: SimpleNamespace) -> None:
    found = [counters.counters(8, DEVICE)]
    gpu.capturing = True
    captured = [counters.counters(n, DEVICE) for n in (1, 8, 3, 130, 4)]
    assert all(x.data_ptr() % 16 == 0 and not x.any() for x in captured)
    assert [x.numel() for x in captured] == [1, 8, 3, 130, 4]
    gpu.capturing, gpu.stream = False, 7
    assert_disjoint([*found, *captured, counters.counters(8, DEVICE)])


def test_captures_without_a_supply_set_their_own_zeros(gpu: SimpleNamespace) -> None:
    gpu.capturing = True
    assert counters.counters(8, DEVICE).numel() == 8
    assert not counters._supplies
    gpu.capturing = False
    counters.counters(8, DEVICE)
    gpu.capturing = True
    too_many = counters.counters(counters.COUNTERS + 1, DEVICE)
    assert_disjoint([too_many, counters.counters(8, DEVICE)])


def test_a_supply_that_runs_low_is_replaced_outside_of_captures_and_kept(gpu: SimpleNamespace) -> None:
    counters.counters(8, DEVICE)
    gpu.capturing = True
    captured = [counters.counters(counters.COUNTERS // 2, DEVICE)]
    captured.append(counters.counters(8, DEVICE))
    assert len(counters._supplies) == 1
    gpu.capturing = False
    shared = counters.counters(8, DEVICE)
    gpu.capturing = True
    captured.append(counters.counters(8, DEVICE))
    assert len(counters._supplies) == 2
    assert_disjoint([shared, *captured])


def test_more_parts_than_are_merged_are_refused() -> None:
    assert merge_parts.merging(256)[0] == 2
    with pytest.raises(ArgumentError, match="splits=257; allowed are 1 to 256"):
        merge_parts.merging(257)


def test_supplies_end_and_captures_then_set_their_own_zeros(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "MOST_SUPPLIES", 2)
    captured = []
    for _ in range(5):
        gpu.capturing = False
        counters.counters(8, DEVICE)
        gpu.capturing = True
        captured.append(counters.counters(counters.COUNTERS - 4, DEVICE))
    assert len(counters._supplies) == 2
    assert_disjoint(captured)
