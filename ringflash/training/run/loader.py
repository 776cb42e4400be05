"""Batches sharded ahead of the step: while the device computes, a thread draws the next batch and makes its `Sharding`.

A new packing needs a partition, a plan and a program of its own. Made in the step they would be waited for; here they
are ready when the step begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ringflash.training.corpus.batching import PackedBatches


class ShardedBatches:
    """This rank's part of each batch, in order, one of them always made ahead.

    Args:
        batches: the batches of this rank's sequence group.
        shard: from a batch to this rank's part of it; runs in a thread.

    Attributes:
        waited: seconds in which `take` had to wait for a batch, since the beginning.
    """

    def __init__(self, batches: PackedBatches, shard: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._batches, self._shard = batches, shard
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ringflash-loader")
        self._coming: Future | None = None
        self.waited = 0.0
        self._taken = batches.state_dict(), batches.epoch

    def take(self) -> dict[str, Any]:
        """The next batch; what was raised while it was made is raised here."""
        began = time.monotonic()
        shard, self._taken = self._next().result()
        self.waited += time.monotonic() - began
        self._coming = self._thread.submit(self._make)
        return shard

    def peek(self) -> dict[str, Any]:
        """The batch that `take` gives next."""
        return self._next().result()[0]

    @property
    def epoch(self) -> float:
        """Passes over the training part up to the batch that was taken last."""
        return self._taken[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands behind the batch that was taken last: what is made ahead is made again on resuming."""
        return self._taken[0]

    def _next(self) -> Future:
        if self._coming is None:
            self._coming = self._thread.submit(self._make)
        return self._coming

    def _make(self) -> tuple[dict[str, Any], tuple[dict[str, Any], float]]:
        shard = self._shard(next(self._batches))
        return shard, (self._batches.state_dict(), self._batches.epoch)
