"""What ranks say to each other while they write: through the store, as training's collectives go on meanwhile.

A thread that took part in collectives would have to do so in an order with those of the steps. The store has none, and
its calls are short, so that a thread can be told at any moment that nobody will come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ringflash.kernels.torch_private import default_store


class Meeting:
    """One exchange: every rank says something, rank 0 makes something of it, and every rank hears that.

    Args:
        name: its own, the same on all ranks.
        left: asked while waiting: whether to wait no longer.
    """

    def __init__(self, name: str, left: Callable[[], bool]) -> None:
        self._rank, self._ranks, self._left = dist.get_rank(), dist.get_world_size(), left
        self._store = dist.PrefixStore(f"ringflash/checkpoint/{name}", default_store())
        self._seconds = self._store.timeout.total_seconds()  # pyrefly: ignore[missing-attribute]  # stub lacks it

    def hold(self, mine: Any, conclude: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 concludes from what all say.

        Args:
            mine: what this rank says; must fit into JSON.
            conclude: called by rank 0 with what each rank said, None for one that did not come in time.
        """
        if self._rank:
            self._store.set(str(self._rank), json.dumps(mine))
            return self._hear("outcome")
        found = conclude([mine, *(self._hear(str(rank)) for rank in range(1, self._ranks))])
        self._store.set("outcome", json.dumps(found))
        return found

    def _hear(self, key: str) -> Any:
        """What was said under a key; None if nothing came within the store's time limit, or nobody waits any more."""
        deadline, pause = time.monotonic() + self._seconds, 0.001
        while not self._store.check([key]):
            if self._left() or time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        found = json.loads(self._store.get(key))
        if self._rank == 0:
            self._store.delete_key(key)  # a store keeps everything else for as long as the run takes
        return found
