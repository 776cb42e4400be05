"""What is worked out once for calls of one form, and found again by a single look-up."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from torch import Tensor

KEPT = 4096
"""Forms of calls that are remembered; packed documents of another length bring a new one with every step."""

Plan = TypeVar("Plan")


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
