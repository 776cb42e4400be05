"""What all tests share: GPU tests are skipped without a GPU, random examples repeat, one thread each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every run, whatever the machine: a test fails for everybody or for nobody. Look for new ones with
# `pytest --hypothesis-profile=explore`.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

torch.set_num_threads(1)
torch.set_printoptions(threshold=8, edgeitems=1)  # failing examples show tensors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without)
