"""How much memory of the host there is to be had."""

from __future__ import annotations

import os
from pathlib import Path


def share_of_host(others: float = 0) -> int:
    """Bytes of host memory that this process may use: its part of most of what is free on this machine.

    Args:
        others: of its part, what something else in this process is to take.
    """
    part = available_bytes() / local_ranks()
    return max(0, int(USED * (part - others)))


USED = 0.85
"""Share of the free host memory that may be used; data, checkpoints and the ranks' own buffers are to have the rest."""


def local_ranks() -> int:
    """Ranks on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_bytes() -> int:
    """Host memory that this process and those beside it may still take: what the system has, or their group's limit."""
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]  # counts caches that give way
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    for folder, limit, used, cached in GROUPS:
        try:
            statistics = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            taken = int(Path(folder, used).read_text()) - int(statistics[cached])
            found.append(int(Path(folder, limit).read_text()) - taken)
        except (OSError, KeyError, ValueError):
            continue  # no such file, or "max"
    return max(0, min(found))


GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux says how much memory a container may have and has, and how much of that are caches that give way."""
