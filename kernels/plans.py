"""What is worked out once for calls of one form, and found again by a single look-up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

KEPT = 4096
"""Forms of calls that are remembered; packed documents of another length bring a new one with every step."""

Plan = TypeVar("Plan")
Built = TypeVar("Built")


class Plans(dict):
    """Plans by form of call, forgotten all at once when there are too many."""

    def add(self, call: Hashable, plan: Plan) -> Plan:
        """Keep a plan."""
        if len(self) >= KEPT:
            self.clear()
        self[call] = plan
        return plan


def form(x: Tensor | None) -> tuple | None:
    """All that a plan may depend on of a tensor: not its address, and not what it holds."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


def build_to_keep(build: Callable[[], Built], device: torch.device) -> Built:
    """What `build` makes, its tensors in memory that may be kept from one call to the next.

    While torch.compile warms up for CUDA graphs (mode="reduce-overhead"), what this thread allocates lies where the
    graphs are going to work, and torch refuses what outlives the call. What another thread allocates lies elsewhere.
    """
    if not warming_up(device):
        return build()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def build_there() -> Built:
        with torch.cuda.stream(stream):
            return build()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build_there).result()


def warming_up(device: torch.device) -> bool:
    """Whether torch.compile may be warming up for CUDA graphs in this thread."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # a thread that has nothing to do with compiled code
        return False
    return manager is not None and manager.in_warmup
