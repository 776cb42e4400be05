"""What is worked out once and kept: for calls alike, found again by a single look-up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ringflash.kernels.torch_private import warming_up

MOST_KEPT = 4096
"""Kinds of calls that are remembered; packed documents of another length bring a new one with every step."""

Value = TypeVar("Value")


class Kept(dict):
    """Values by key, forgotten all at once when there would be too many.

    Args:
        most: what the values may come to together.
        size: what a value counts for; 1 if None.
    """

    def __init__(self, most: int = MOST_KEPT, size: Callable[[Any], int] | None = None) -> None:
        super().__init__()
        self.most, self.size = most, size
        self.total = 0

    def add(self, key: Hashable, value: Value) -> Value:
        """Keep a value."""
        size = 1 if self.size is None else self.size(value)
        if self.total + size > self.most:
            self.clear()
        self.total += size
        self[key] = value
        return value

    def clear(self) -> None:
        """Forget all values."""
        super().clear()
        self.total = 0


class TensorNotes(Generic[Value]):
    """Notes about single tensors: beside them, so that none travels with one, and gone with it or with its values."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref, int, Value]] = {}

    def put(self, x: Tensor, note: Value) -> None:
        """Note something about a tensor, in place of an earlier note."""
        if torch.compiler.is_compiling() or x.is_inference():
            return
        number = id(x)
        ended = weakref.ref(x, lambda _: self._of.pop(number, None))
        self._of[number] = ended, x._version, note

    def get(self, x: Tensor) -> Value | None:
        """What was noted about this very tensor, if it holds what it held then."""
        found = self._of.get(id(x))
        if found is None or found[0]() is not x or found[1] != x._version:
            return None
        return found[2]


def metadata(x: Tensor | None) -> tuple | None:
    """All that may be worked out from a tensor beforehand: not its address, and not what it holds."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device)


_captured: dict[int, object] = {}
"""What CUDA graphs read that were captured by hand, for good: nothing tells when such a graph is gone."""


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: what is computed now holds nothing before the graph runs."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def hold_if_captured(value: Value, device: torch.device) -> Value:
    """`value`, for good where a CUDA graph that is being captured reads it: whoever else keeps it may forget it."""
    if capturing(device):
        _captured[id(value)] = value
    return value


def build_to_keep(build: Callable[[], Value], device: torch.device) -> Value:
    """What `build` makes, its tensors in memory that may be kept from one call to the next.

    While torch.compile warms up for CUDA graphs (mode="reduce-overhead"), what this thread allocates lies where the
    graphs are going to work, and torch refuses what outlives the call. What another thread allocates lies elsewhere.
    """
    if not warming_up(device):
        return build()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def build_there() -> Value:
        with torch.cuda.stream(stream):
            return build()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(build_there).result()
