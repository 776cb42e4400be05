"""Ranks compare what they did a while ago, which costs nothing that can be measured.

A call that agreed before is not compared again (see `agreement`). So a rank that repeats its latest call, while another
goes to a different one that all ranks know too, does not find out before the results are wrong. Digests of all calls,
compared every so often and one period late, when the others' have long been there, show it then, by name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ringflash.errors import RankMismatchError

PERIOD = 256
"""Calls in a digest; each period costs one message to the store and one answer from it, whatever the ranks."""

SLOTS = 4
"""Places in the store for digests: enough that every rank has read what was in one before it is used again."""


class History:
    """The calls of one rank, compared with those of the others."""

    def __init__(self, store: dist.Store, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._period = 0
        self._calls: list[str] = []
        self._calls_before: list[str] = []

    def add(self, text: str, patience: timedelta) -> None:
        """Note a call, and compare those of the period before this one whenever this one ends.

        Args:
            text: from `agreement.signature`.
            patience: how long to wait for ranks that are more than a period behind.

        Raises:
            RankMismatchError: on every rank, naming the argument, the ranks and their values.
        """
        self._calls.append(text)
        if len(self._calls) == PERIOD:
            period, calls, before = self._period, self._calls, self._calls_before
            self._period, self._calls, self._calls_before = period + 1, [], calls
            self._set(f"digest/{period % SLOTS}", period, hashlib.sha256("\n".join(calls).encode()).hexdigest()[:16])
            if period:
                self._compare(period - 1, before, patience)

    def _compare(self, period: int, calls: list[str], patience: timedelta) -> None:
        if len(set(self._of_all(f"digest/{period % SLOTS}", period, patience))) == 1:
            return
        self._set("calls", period, json.dumps(calls))
        calls_of_ranks = map(json.loads, self._of_all("calls", period, patience))
        for index, made in enumerate(zip(*calls_of_ranks, strict=True)):
            if said := disagreement([json.loads(text) for text in made]):
                raise RankMismatchError(
                    f"{2 * PERIOD - index} calls to attention ago {said}. Each had agreed before, so they were not "
                    "compared again; results since then are wrong"
                )

    def _set(self, key: str, period: int, value: str) -> None:
        self._store.set(f"{key}/{self._rank}", f"{period} {value}")

    def _of_all(self, key: str, period: int, patience: timedelta) -> list[str]:
        """What every rank has set under a key for a period."""
        deadline = time.monotonic() + patience.total_seconds()
        keys = [f"{key}/{rank}" for rank in range(self._ranks)]
        late = RankMismatchError(
            f"rank {self._rank} has made {(period + 2) * PERIOD} calls to attention; within {patience}, not every "
            f"other rank of the group has made {(period + 1) * PERIOD}"
        )
        try:
            self._store.wait(keys, patience)
        except (RuntimeError, TimeoutError) as error:
            raise late from error
        values = []
        for place, found in zip(keys, self._store.multi_get(keys), strict=True):
            number, value = found.decode().split(" ", 1)
            while int(number) != period:  # a rank that lags has not replaced what it set there before
                if time.monotonic() > deadline:
                    raise late
                time.sleep(0.01)
                number, value = self._store.get(place).decode().split(" ", 1)
            values.append(value)
        return values


def disagreement(values: Sequence[dict[str, object]]) -> str | None:
    """The first entry that not all ranks have the same, in words, from what each rank has."""
    for name in dict.fromkeys(name for value in values for name in value):
        shown = [json.dumps(value.get(name)) for value in values]
        if len(set(shown)) > 1:
            return f"ranks disagree on {name}: {_by_value(shown)}"
    return None


def _by_value(shown: list[str]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, value in enumerate(shown):
        ranks_of.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in ranks_of.items())
