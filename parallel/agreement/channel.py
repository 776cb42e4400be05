"""How ranks talk to each other about their calls: on the host, beside the tensors' own way.

Making a channel needs all ranks of the group, at their first call. A rank that refuses its first call cannot wait for
that; until there is one, its herald repeats in the key-value store what it refused, for those who wait. So does that of
a rank that was told or waited too long, and gave the call up.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ringflash.errors import RankMismatchError
from ringflash.kernels.torch_private import default_store, is_destroyed
from ringflash.parallel.agreement.meetings import CALL, REFUSED, REFUSED_UNKNOWN, Said, meeting
from ringflash.parallel.agreement.shared_rounds import VALUES, SharedRounds, create
from ringflash.parallel.host import host

POLL = 0.02
"""Seconds between looks at what is not there yet."""

HERALDED_EVERY = 0.25
"""Seconds between a herald's words. What stands still longer was left by a process group of the same name before."""

NOTHING = (0,) * VALUES
"""Said by who only waits."""


class Line(Protocol):
    """What ranks say to all others, `VALUES` numbers at a time, in order.

    Attributes:
        heard: how much this rank has heard of each.
    """

    heard: list[int]

    def room(self) -> int:
        """How much more this rank can say before others hear it."""
        ...

    def say(self, values: Sequence[int]) -> None:
        """Say something, without waiting."""
        ...

    def hear(self, rank: int) -> tuple[int, ...] | None:
        """What another rank said next; None if it has not said more, as far as is known."""
        ...

    def wait(self, absent: Sequence[int]) -> None:
        """Wait for what one of some ranks says next, or for a part of the way there.

        Raises:
            RuntimeError: a rank has ended or does not come in time.
        """
        ...


class _ByGloo:
    """By collectives, to each of which every rank comes with one thing, or where it waits for others with nothing.

    So a rank hears what another said only when all have come as far. Hosts that have gone ahead and wait for their GPUs
    do not come meanwhile. But they have heard of calls up to the last `MOST_AHEAD`, and who waits for these before it
    goes on has asked its own GPU for all that theirs wait for, as long as a call waits on all ranks or on none.
    """

    def __init__(self, group: Any, rank: int, ranks: int) -> None:
        self._group, self._rank, self._ranks = group, rank, ranks
        self._open: deque[tuple[Any, list[torch.Tensor]]] = deque()
        self._come: list[deque[tuple[int, ...]]] = [deque() for _ in range(ranks)]
        self._failure: RuntimeError | None = None
        self.heard = [0] * ranks

    def room(self) -> int:
        return sys.maxsize

    def say(self, values: Sequence[int]) -> None:
        numbers = torch.zeros(self._ranks, VALUES, dtype=torch.int64, device="cpu")
        numbers[self._rank] = torch.tensor(values, device="cpu")
        options = dist.AllreduceOptions()  # each number is one rank's; all others have 0 there
        options.reduceOp = dist.ReduceOp.SUM  # pyrefly: ignore[bad-assignment]  # stub: pybind converts
        self._open.append((self._group.allreduce([numbers], options), [numbers]))

    def hear(self, rank: int) -> tuple[int, ...] | None:
        while self._failure is None and self._open and self._open[0][0].is_completed():
            try:
                self._take()
            except RuntimeError as error:  # of who waits
                self._failure = error
        if not self._come[rank]:
            return None
        self.heard[rank] += 1
        return self._come[rank].popleft()

    def wait(self, absent: Sequence[int]) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._open:
            self.say(NOTHING)
        self._take()

    def _take(self) -> None:
        work, [numbers] = self._open.popleft()
        work.wait()
        for come, values in zip(self._come, numbers.tolist(), strict=True):
            if tuple(values) != NOTHING:
                come.append(tuple(values))


class Channel:
    """A few integers of each rank on the host, and names and values through the store.

    Ranks of one host share a page of memory for the integers. Others have gloo.

    Args:
        rank: of this process in the group.
        ranks: size of the group.
        identity: drawn by the group together, so that nothing is read that an earlier group of its name has left.
    """

    def __init__(self, rank: int, ranks: int, identity: int) -> None:
        self._rank, self._ranks = rank, ranks
        store = dist.PrefixStore(f"ringflash/{identity:x}", default_store())
        self._store = dist.PrefixStore("words", store)
        self.timeout: timedelta = store.timeout  # pyrefly: ignore[missing-attribute]  # stub lacks it
        page = self._shared_page()
        gloo = dist.PrefixStore("gloo", store)
        self.by_page = page is not None
        """Whether a rank hears of another one's calls whatever the others are at."""
        self.line: Line = page or _ByGloo(dist.ProcessGroupGloo(gloo, rank, ranks, self.timeout), rank, ranks)

    def _shared_page(self) -> SharedRounds | None:
        """Memory that all ranks share; None on all of them where not all have it."""
        if len(set(self._of_all_ranks("host", host()))) > 1:
            return None
        file, path, page = None, "", None
        try:
            if self._rank == 0:
                file, path = create(self._ranks)
        except OSError:
            path = ""
        path = self._of_all_ranks("page", str(path))[0]
        try:
            if path:
                file = os.open(path, os.O_RDWR) if file is None else file
                page = SharedRounds(file, self._rank, self._ranks, self.timeout)
        except OSError:
            page = None
        have_it = all(self._of_all_ranks("has page", "yes" if page else ""))
        if self._rank == 0 and path:
            os.unlink(path)
        return page if have_it else None

    def _of_all_ranks(self, what: str, mine: str) -> list[str]:
        self._store.set(f"{what}/{self._rank}", mine)
        return [self._store.get(f"{what}/{rank}").decode() for rank in range(self._ranks)]

    def post(self, number: int, entry: dict[str, object]) -> None:
        """Tell more of the thing with this number that this rank says."""
        self._store.set(f"{number}/{self._rank}", json.dumps(entry, default=str))

    def entry(self, rank: int, number: int, seconds: float | None = None) -> dict | None:
        """What a rank tells of the thing with this number that it said; None if nothing within so many seconds."""
        key = f"{number}/{rank}"
        if seconds is not None:
            try:
                self._store.wait([key], min(timedelta(seconds=max(seconds, POLL)), self.timeout))
            except RuntimeError:
                return None
        return json.loads(self._store.get(key))

    def waiting(self, number: int) -> set[int]:
        """Ranks that say within a second that they wait in the meeting with this number, of which this one is."""
        self._store.set(f"waits/{number}/{self._rank}", "")
        missing = set(range(self._ranks))
        for _ in range(round(1 / POLL)):
            missing = {rank for rank in missing if not self._store.check([f"waits/{number}/{rank}"])}
            time.sleep(POLL)
        return set(range(self._ranks)) - missing


def _place(group: dist.ProcessGroup, *what: object) -> str:
    return "/".join(map(str, ("ringflash/before", group.group_name, *what)))


class _Beacon:
    """Says something in the store again and again, so that others know that it is not left from before.

    Args:
        group: the words are of this group, and end with it.
        place: key in the store.
        every: seconds between words.
    """

    def __init__(self, group: dist.ProcessGroup, place: str, every: float) -> None:
        self._group, self._key, self._every = weakref.ref(group), place, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self.word: object = None

    def say(self, word: object) -> None:
        """Say this from now on."""
        self.word = word
        if not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """End it; returns when nothing more is going to be said."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _left(self) -> bool:
        group = self._group()
        return group is None or is_destroyed(group)

    def _repeat(self) -> None:
        store = default_store()
        count = random.SystemRandom().getrandbits(30)
        while not self._over.is_set() and not self._left():
            count += 1
            try:
                store.set(self._key, json.dumps([count, self.word]))
            except RuntimeError:  # the store went with the program
                return
            self._over.wait(self._every)


class _Ear:
    """Hears beacons that go on speaking while it listens."""

    def __init__(self) -> None:
        self._store = default_store()
        self._first: dict[str, int] = {}

    def word(self, place: str) -> Any:
        """What is said there; None if nothing is, or nothing new."""
        if not self._store.check([place]):
            return None
        count, word = json.loads(self._store.get(place))
        return None if self._first.setdefault(place, count) == count else word


class Herald:
    """Says what a rank said before there was a channel, until one is made or the group is gone."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._beacon = _Beacon(group, _place(group, "early", group.rank()), HERALDED_EVERY)
        default_store().set(_place(group, "early"), "")  # others need not look at every rank before

    def say(self, early: Sequence[tuple[Said, str]]) -> None:
        """All that this rank said so far, and why."""
        self._beacon.say([(*said[:2], text) for said, text in early])

    def close(self) -> None:
        """End it."""
        self._beacon.close()


class Joining:
    """This rank's way into the channel of a group, which all of its ranks make together at their first call.

    Through the store alone: a rank that does not come must not be waited for by a collective of the group, into which
    its next collective, whatever that is, would run. Rank 0 draws an identity and says it until all have arrived. Who
    gives up leaves again, but not once all are there: others make the channel then, and wait for it.

    Args:
        group: the process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank, self._ranks, self._store, self._ear = group.rank(), group.size(), default_store(), _Ear()
        self._identity: int | None = None
        self._identity_place = _place(group, "identity")
        self._anything_early = _place(group, "early")
        self._heralds = {rank: _place(group, "early", rank) for rank in range(self._ranks) if rank != self._rank}
        self.told = False
        """Whether what `finish` raised last is another rank's error."""
        self._beacon: _Beacon | None = None
        if self._rank == 0:
            self._identity = random.SystemRandom().getrandbits(62)
            self._beacon = _Beacon(group, self._identity_place, POLL)
            self._beacon.say(self._identity)

    def finish(self, early: Sequence[Said], digest: int) -> Channel:
        """The channel.

        Args:
            early: what this rank has said so far.
            digest: of the call that it comes with.

        Raises:
            RankMismatchError: a rank says meanwhile that it refused its first call, and it may be this one; or not all
                ranks come within the time that torch.distributed was told to wait.
        """
        timeout = self._store.timeout  # pyrefly: ignore[missing-attribute]  # stub lacks it
        deadline, said = time.monotonic() + timeout.total_seconds(), [*early, Said(CALL, digest)]
        while not self._all_are_there():
            text = self._refused(said)
            self.told = text is not None
            if text is None and time.monotonic() > deadline:
                text = (
                    f"not every rank has come to its first call of attention, to which rank {self._rank} came; "
                    f"{self._missing()}: timed out after {timeout}"
                )
            if text is not None and self._leaves():
                raise RankMismatchError(text)
            time.sleep(POLL)
        channel = Channel(self._rank, self._ranks, self._known())
        if self._beacon is not None:
            self._beacon.close()
        return channel

    def _known(self) -> int:
        assert self._identity is not None  # where all are there
        return self._identity

    def _all_are_there(self) -> bool:
        if self._identity is None:
            self._identity = self._ear.word(self._identity_place)
            if self._identity is None:
                return False
        return len(self._here(lambda here: here | {self._rank})) == self._ranks

    def _leaves(self) -> bool:
        """Whether this rank is not waited for any more."""
        if self._identity is None:
            return True
        return self._rank not in self._here(lambda here: here if len(here) == self._ranks else here - {self._rank})

    def _here(self, change: Callable[[set[int]], set[int]]) -> set[int]:
        """The ranks that are there, once that is changed."""
        place, before = f"ringflash/{self._identity:x}/here", ""
        while True:
            here = change(set(json.loads(before or "[]")))
            after = json.dumps(sorted(here))
            found = before if after == before else self._store.compare_set(place, before, after).decode()
            if found == after:
                return here
            before = found

    def _missing(self) -> str:
        if self._identity is None:
            return "rank 0 has not"
        missing = [str(rank) for rank in range(self._ranks) if rank not in self._here(lambda here: here)]
        return f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} {'have' if len(missing) > 1 else 'has'} not"

    def _refused(self, mine: Sequence[Said]) -> str | None:
        """What another rank raised instead of coming to the last thing that this one says."""
        if not self._store.check([self._anything_early]):
            return None
        for rank, place in self._heralds.items():
            heard = self._ear.word(place) or ()
            met = _met_by_last(mine, [Said(kind, digest) for kind, digest, _ in heard])
            if met is not None and heard[met][0] in (REFUSED, REFUSED_UNKNOWN):
                return f"rank {rank} raised an error instead of coming to attention: {heard[met][2]}"
        return None


def _met_by_last(mine: Sequence[Said], theirs: Sequence[Said]) -> int | None:
    """Which thing of another rank the last one of this rank is over with, as if there were no others."""
    next_of = [0, 0]
    while next_of[0] < len(mine) and next_of[1] < len(theirs):
        met = [*next_of]
        over = meeting([mine[met[0]], theirs[met[1]]]).over
        for who in over:
            next_of[who] += 1
        if next_of[0] == len(mine):
            return met[1] if len(over) == 2 else None
    return None
