"""Ranks find out that they disagree before the first transfer that would hang or mix up numbers.

Send and receive check neither sizes nor dtypes, so ranks compare what they are about to do once for every new
signature. The comparison goes through the key-value store of torch.distributed, not through a collective: a rank
that does not come is found by name, and a rank that has come before with another signature is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from functools import lru_cache

import torch.distributed as dist

from ringflash.errors import RankMismatchError

PATIENCE = timedelta(minutes=5)
"""How long to wait for a rank that has not yet come to a comparison."""


class Agreement:
    """Compares signatures between the ranks of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        default_store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"ringflash/{group.group_name}", default_store)
        self._seen: set[str] = set()
        self._turn = 0

    def check(self, values: Mapping[str, object], patience: timedelta = PATIENCE) -> None:
        """Compare a signature with all ranks, unless this very signature was compared before.

        Args:
            values: name -> value; compared by their JSON text.
            patience: how long to wait for the other ranks.

        Raises:
            RankMismatchError: on every rank, naming the argument, the ranks and their values.
        """
        text = json.dumps(values, sort_keys=True, default=str)
        if text in self._seen:
            return
        turn, self._turn = self._turn, self._turn + 1
        self._store.set(f"latest/{self.rank}", text)
        self._store.set(f"{turn}/{self.rank}", text)
        texts = [self._read(turn, rank, patience) for rank in range(self.ranks)]
        others = [json.loads(other) for other in texts]
        for name in values:
            shown = [json.dumps(other.get(name), default=str) for other in others]
            if len(set(shown)) > 1:
                raise RankMismatchError(f"ranks disagree on {name}: {_by_value(shown)}")
        self._seen.add(text)

    def _read(self, turn: int, rank: int, patience: timedelta) -> str:
        try:
            self._store.wait([f"{turn}/{rank}"], patience)
        except (RuntimeError, TimeoutError) as error:
            latest = f"latest/{rank}"
            last = self._store.get(latest).decode() if self._store.check([latest]) else "nothing yet"
            raise RankMismatchError(
                f"rank {rank} has not come to attention with a new signature within {patience}; "
                f"its latest was {last}; this is rank {self.rank}"
            ) from error
        return self._store.get(f"{turn}/{rank}").decode()


@lru_cache(maxsize=64)
def agreement(group: dist.ProcessGroup) -> Agreement:
    """The `Agreement` of a process group; one for as long as the group lives."""
    return Agreement(group)


def _by_value(shown: list[str]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, value in enumerate(shown):
        ranks_of.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in ranks_of.items())
