"""Ranks find out that they disagree before the first transfer that would hang or mix up numbers.

Send and receive check neither sizes nor dtypes, so ranks compare what they are about to do whenever it is something
new, or follows on something that it has not followed on before. The comparison goes through the key-value store of
torch.distributed, not through a collective: a rank that does not come is found by name, one that came before with
another signature is quoted, and one that raised an error instead says which.

What agreed before is not compared again, so a rank that changes alone between calls that all ranks know goes through.
That is found afterwards; see `history`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from ringflash.errors import RankMismatchError
from ringflash.parallel.agreement.history import History, disagreement
from ringflash.parallel.mesh import Group, group_name, process_group

REMEMBERED = 4096
"""Comparisons that need not be made again; packed documents give a new one with every step."""

RAISED = "raised"
"""Key under which a rank posts its error in place of a signature."""


def signature(values: Mapping[str, object]) -> str:
    """What ranks compare: names and values as JSON text, in the order in which a disagreement is to be reported."""
    return json.dumps(values, default=str)


class Agreement:
    """Compares signatures between the ranks of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        store = dist.PrefixStore(f"ringflash/{group.group_name}", dist.distributed_c10d._get_default_store())
        # The store may outlive the group, as torchrun's does, and hold what an earlier group of this name compared.
        life = store.add(f"lives/{self.rank}", 1)
        self._store = dist.PrefixStore(str(life), store)
        self._seen: set[tuple[str, str]] = set()
        self._last = ""
        self._turn = 0
        self._announced = ""
        self._history = History(self._store, self.rank, self.ranks)

    def check(self, text: str, patience: timedelta | None = None) -> None:
        """Compare a signature with all ranks, unless it repeats the last one or once agreed right behind that one.

        Args:
            text: from `signature`.
            patience: how long to wait for the other ranks; as long as torch.distributed was told to if None.

        Raises:
            RankMismatchError: on every rank, naming the argument, the ranks and their values.
        """
        patience = self._store.timeout if patience is None else patience
        step = (self._last, text)
        if text != self._last and step not in self._seen:
            self._end_announcement()
            self._compare(text, patience)
            if len(self._seen) >= REMEMBERED:  # all ranks remember the same, so all forget at once
                self._seen.clear()
            self._seen.add(step)
        self._last = text
        self._history.add(text, patience)

    def tell(self, error: Exception) -> None:
        """Let ranks that wait for this one's next signature know that it raised an error instead."""
        text = signature({RAISED: f"{type(error).__name__}: {error}"})
        if text != self._announced:
            self._end_announcement()
        self._announced = ""
        self._post(text)

    def announce(self, error: str) -> None:
        """Like `tell`, from traced code, which may run again, and may or may not be followed by `tell`."""
        text = signature({RAISED: error})
        if text != self._announced:
            self._end_announcement()
        self._announced = text
        self._set(text)

    def _end_announcement(self) -> None:
        if self._announced:  # nothing more was told of it; the other ranks have read it
            self._announced = ""
            self._turn += 1

    def _compare(self, text: str, patience: timedelta) -> None:
        turn = self._post(text)
        others = [json.loads(self._read(turn, rank, patience)) for rank in range(self.ranks)]
        for rank, other in enumerate(others):
            if RAISED in other:
                raise RankMismatchError(f"rank {rank} raised an error instead of coming to attention: {other[RAISED]}")
        if said := disagreement(others):
            raise RankMismatchError(said)
        if turn:  # every rank has come to this turn, so none still reads the one before
            self._store.delete_key(f"{turn - 1}/{self.rank}")

    def _post(self, text: str) -> int:
        self._set(text)
        self._turn += 1
        return self._turn - 1

    def _set(self, text: str) -> None:
        self._store.set(f"latest/{self.rank}", text)
        self._store.set(f"{self._turn}/{self.rank}", text)

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


@cache
def agreement(group: dist.ProcessGroup) -> Agreement:
    """The `Agreement` of a process group; one for as long as the group lives."""
    return Agreement(group)


@contextmanager
def errors_told(group: dist.ProcessGroup) -> Iterator[None]:
    """Around what one rank may fail at before the ranks compare: the others hear of the error and do not wait."""
    try:
        yield
    except Exception as error:
        tell_peers(group, error)
        raise


def tell_peers(group: Group, error: Exception) -> None:
    """Let the other ranks of a group, if there are any, know of an error that keeps this one from coming."""
    name = group_name(group)
    if not name:
        return
    if torch.compiler.is_compiling():
        said = error.args[0] if error.args else ""  # torch 2.11 does not trace str(error)
        _announce(name, f"{type(error).__name__}: {said}")
    else:
        agreement(process_group(group)).tell(error)


@torch.compiler.assume_constant_result
def _announce(name: str, error: str) -> None:
    """Runs while torch.compile traces; where the trace ends in the error, nothing else would tell the others."""
    agreement(dist.distributed_c10d._resolve_process_group(name)).announce(error)
