"""Attention within what a backward pass computes again: it runs once, and what it gave is kept.

Activation checkpointing runs parts of a model twice. Attention is the only thing in there that communicates, and at
long context nearly all of the time. So whoever runs something twice does it within a `Region`, which attention asks
before it runs; everything else is told nothing, and no operator is looked at.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Region(ABC):
    """Something that runs twice, the second time in the backward pass."""

    @abstractmethod
    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Out (T, H, Dv) and lse (H, T), from the operator or from what it gave the first time.

        Args:
            operator: attention; gives (out, lse, what its backward pass wants).
            arguments: its own; query (T, H, D), key and value (T', Hk, D) are the first three.
        """

    @abstractmethod
    def spared(self, size: int) -> None:
        """Hear of bytes that something would have kept for its backward pass if it did not run in a region."""


class _Here(threading.local):
    """What is at work in this thread: the backward pass may run in one of its own."""

    region: Region | None = None


here = _Here()
"""Its `region` is None outside of any."""


@contextmanager
def within(inner: Region) -> Generator[None]:
    """Work in a region."""
    outer, here.region = here.region, inner
    try:
        yield
    finally:
        here.region = outer
