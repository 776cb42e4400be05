"""What tests share: none that needs a GPU without one, the same random examples, one thread each, slow files named."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).parent / "parallel"))

from pool import Pools

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


@pytest.fixture(scope="session")
def pool() -> Iterator[Pools]:
    """`pool(n).run(function, *args)` runs a module-level function on n gloo ranks and returns their results."""
    with Pools() as pools:
        yield pools


@pytest.fixture(autouse=True)
def _ranks_without_old_groups(request: pytest.FixtureRequest) -> None:
    if "pool" in request.fixturenames and isinstance(pools := request.getfixturevalue("pool"), Pools):
        pools.renew()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that a long run spent its time in."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.location[0]] += report.duration
    if seconds.total() < 60:
        return
    terminalreporter.section(f"slowest files, of {len(seconds)} in {seconds.total():.0f} s")
    for file, duration in seconds.most_common(15):
        terminalreporter.line(f"{duration:7.1f} s  {file}")
