"""Ranks compare, call by call, what they are about to do; one that does something else is named.

Send and receive check neither sizes nor dtypes: a rank that makes another call than its peers gives wrong numbers, or a
hang. So each call to attention is said to all ranks of the group before, through a channel of its own (shared memory on
one host, gloo among several): a digest, or the word that this rank refused one. Which calls of ranks meet follows from
what they say in which order (`meetings`), so it is the same on all ranks, whatever is slow, and a call that one rank
refuses alone shifts none. Only where calls that meet differ do names and values travel, through the key-value store.

A call that is new to the ranks waits for the others, and so do calls on CPUs, where everything waits anyway. On a GPU a
call like an earlier one goes ahead, and its meeting is looked at when a later one finds it over: the host hardly ever
waits for other hosts in a repeated call, and what differs is an error some calls later (`MOST_AHEAD`). Which calls are
new is the same on all ranks, as these have met the same. Among ranks of a host one may wait (`waits`) where others go
ahead: all it needs is that they have come to the same call. Whoever's GPU waits for something of this rank's has come,
or waits for what this rank's GPU was asked for before.

Every rank says whether it goes ahead. Where ranks are apart in a call with which somebody did, GPUs wait for what
nobody sends, be it keys, gradients, or room for these, and no further call can be matched: all ranks find that in the
same meeting. What fails within a call on a GPU goes through the transfers to that call's end; then the rank says that
it ended, and no other one goes on behind that. Who hears of either raises, asks its GPU for nothing more, and lets its
streams go on (`SymmetricMemory.abandon`). A host that waits for its GPU meanwhile hears nothing: its process ends at
the time limit of transfers, as what its GPU would find is nobody's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ringflash.errors import RankMismatchError
from ringflash.kernels.torch_private import process_group as named_group
from ringflash.kernels.torch_private import transforms_active, without_transforms
from ringflash.parallel.agreement.channel import Channel, Herald, Joining
from ringflash.parallel.agreement.meetings import (
    CALL,
    ENDED,
    KIND,
    REFUSED,
    REFUSED_UNKNOWN,
    TOLD,
    Said,
    meeting,
)
from ringflash.parallel.mesh import Group, group_name, process_group

Description = Callable[[], Mapping[str, object]]
"""Names and values of a call, worked out only where ranks differ."""

REMEMBERED = 4096
"""Digests of calls that need not wait for the others; packed documents bring a new one with every step."""

MOST_AHEAD = 4
"""Calls that may not have met yet while a rank goes ahead with those that were made before."""

CLOSING = 1
"""Digest of what ends a call."""

RESERVED = 24
"""Room that refused calls leave to others, which may be `MOST_AHEAD` twice over and some of which is not known that
they are heard. Of refused calls for which there is no other room nobody hears; who made them would miss this rank."""

WRONG = "an earlier call went wrong, and what was sent cannot be matched any more"

PATIENCE = 10.0
"""Seconds for names and values of a rank that went ahead, and whose host may wait for its GPU meanwhile."""


class _Mine(NamedTuple):
    """What this rank has said.

    Attributes:
        number: of that among all that it said.
        said: to the others.
        describe: names and values of a call; None of anything else.
    """

    number: int
    said: Said
    describe: Description | None


def _untransformed(function: Callable) -> Callable:
    """Runs a method as if torch.func were not at work, which would wrap the tensors that ranks compare."""

    @functools.wraps(function)
    def run(*arguments: object, **settings: object) -> object:
        if not transforms_active():
            return function(*arguments, **settings)
        with without_transforms():
            return function(*arguments, **settings)

    return run


class Agreement:
    """The ranks of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self._group = weakref.ref(group)
        self._channel: Channel | None = None
        self._joining: Joining | None = None
        self._herald: Herald | None = None
        self._backlog: list[tuple[Said, str]] = []  # what this rank has to say once there is a channel
        self._mine: deque[_Mine] = deque()  # that has not met what others say
        self._calls = 0  # among these
        self._theirs: list[Any] = [None] * self.ranks  # what each says next, `Said`, where that is known
        self._others = [rank for rank in range(self.ranks) if rank != self.rank]
        self._met = self._number = 0
        self._seen: set[int] = set()
        self._announced = ""
        self._broken: str | None = None

    @property
    def is_broken(self) -> bool:
        """Whether no further call can be matched: ranks went ahead with different ones."""
        return self._broken is not None

    @property
    def by_page(self) -> bool:
        """Whether a rank may wait where others go ahead."""
        return self._channel is not None and self._channel.by_page

    @_untransformed
    def check(
        self, digest: int, describe: Description, device: torch.device, nbytes: int = 0, waits: bool = False
    ) -> int | None:
        """Make sure that all ranks make the same call, or will notice that they do not.

        Args:
            digest: of everything that must be the same on all ranks; 62 bits.
            describe: the same as names and values, in the order in which a disagreement is to be reported.
            device: of the call's tensors.
            nbytes: what may differ, and of which the greatest counts.
            waits: do not go ahead, so that what GPUs wait for comes whatever happens to other ranks; see `by_page`.

        Returns:
            The greatest `nbytes` of all ranks; None if such a call was made before.

        Raises:
            RankMismatchError: on every rank, naming the argument, the ranks and their values, or the rank that refused
                the call or did not come.
        """
        self._announced = ""
        channel = self._joined(digest)
        known = device.type != "cpu" and digest in self._seen
        ahead = known and not waits
        self._say(channel, Said(CALL, digest, nbytes, int(ahead)), describe)
        met = self._settle(channel, MOST_AHEAD if ahead else 0)
        if known:
            return None
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen.add(digest)
        return max([said.nbytes for said in met])

    @_untransformed
    def refuse(self, error: Exception, digest: int | None = None, traced: bool = False) -> None:
        """Let the other ranks know that this one refuses a call, without waiting for them.

        Those that make the same call hear of it and raise. Those that make another one, because this rank tried
        something alone, are not disturbed, if the refused call's digest was known.

        Args:
            error: why; where it is that ranks have parted, which all of them have found already, nothing is said.
            digest: of the call, where it was known before it was refused.
            traced: the error came up while torch.compile traced, which may happen again for the same call.
        """
        if isinstance(error, RankMismatchError):  # within what is refused; said again, it would meet the next call
            return
        text = _text(error)
        if text == self._announced:
            # Notified already while this very call was traced, which is done again, or left for the eager call.
            self._announced = text if traced else ""
            return
        self._announced = text if traced else ""
        kind = REFUSED_UNKNOWN if digest is None else REFUSED
        said = Said(kind, digest or 0)
        if self._channel is None:
            self._say_early(said, text)
        else:
            self._say_refused(self._channel, said, text)

    @_untransformed
    def close(self, failure: Exception | None, device: torch.device) -> None:
        """End a call that all ranks have begun.

        On CPUs the ranks meet at the end, so that what fails on one rank is an error of the same call on all. On GPUs
        nobody waits: this rank ends, and the others hear of it in their next call, or where they have gone ahead, at
        the latest `MOST_AHEAD` calls later. What they sent meanwhile nobody received, so no further call can be
        matched.

        Args:
            failure: what this rank's kernels raised within the call, if anything.
            device: of the call's tensors.

        Raises:
            RankMismatchError: another rank failed.
        """
        assert self._channel is not None  # `check` joined it
        if device.type == "cpu":
            if failure is None:
                self._say(self._channel, Said(CALL, CLOSING), lambda: {"pass": "the end of a call"})
            else:
                self._say_failed(self._channel, Said(REFUSED_UNKNOWN), _text(failure))
            self._settle(self._channel)
        elif failure is not None:
            self._say_failed(self._channel, Said(ENDED), _text(failure))
            self._broken = f"this rank raised an error within a call that the others went on with: {_text(failure)}"

    def _say(self, channel: Channel, said: Said, describe: Description | None = None) -> None:
        self._mine.append(_Mine(self._number, said, describe))
        self._number += 1
        self._calls += said.kind == CALL
        channel.line.say(said)

    def _say_failed(self, channel: Channel, said: Said, text: str) -> None:
        channel.post(self._number, {"raised": text})
        self._say(channel, said)

    def _say_refused(self, channel: Channel, said: Said, text: str) -> None:
        if channel.line.room() > RESERVED:
            self._say_failed(channel, said, text)

    def _say_early(self, said: Said, text: str) -> None:
        """Before there is a channel: now for those who wait for one, and again in it."""
        self._backlog.append((said, text))
        group = self._group()
        if group is not None:
            self._herald = self._herald or Herald(group)
            self._herald.say(self._backlog)

    def _joined(self, digest: int) -> Channel:
        """The channel to the other ranks; the first call makes it, together with them."""
        if self._broken:
            raise RankMismatchError(self._broken)
        if self._channel is None:
            group = self._group()
            assert group is not None  # the caller holds it
            self._joining = self._joining or Joining(group)
            try:
                self._channel = self._joining.finish([said for said, _ in self._backlog], digest)
            except RankMismatchError as error:  # it meets what was refused all the same, or who comes too late
                self._say_early(Said(TOLD if self._joining.told else REFUSED, digest), _text(error))
                raise
            if self._herald is not None:
                self._herald.close()
            for said, text in self._backlog:
                self._say_refused(self._channel, said, text)
        return self._channel

    def _settle(self, channel: Channel, left: int = 0) -> list[Said]:
        """Look at what ranks say; so many of this rank's calls may not have met others. What met last."""
        met: list[Said] = []
        while self._mine:
            silent = self._silent(channel)
            if not silent:
                met = self._meet(channel)
            elif self._calls > left:
                self._wait(channel, silent)
            else:
                break
        return met

    def _silent(self, channel: Channel) -> list[int]:
        """Ranks that have not said yet what this rank's next thing meets."""
        silent, line = [], channel.line
        for rank in self._others:
            said = self._theirs[rank]
            if said is None:
                heard = line.hear(rank)
                if heard is None:
                    silent.append(rank)
                    continue
                said = self._theirs[rank] = Said._make(heard)
            if said[KIND] == ENDED:
                text = self._raised(channel, rank, line.heard[rank] - 1)
                self._broken = f"{WRONG}: {text}"
                raise RankMismatchError(self._broken)
        return silent

    def _wait(self, channel: Channel, silent: list[int]) -> None:
        try:
            channel.line.wait(silent)
        except RuntimeError as error:
            self._broken = self._who_is_missing(channel, silent, error)
            if self._broken is None:
                raise
            raise RankMismatchError(self._broken) from error

    def _meet(self, channel: Channel) -> list[Said]:
        """What ranks say next meets."""
        mine = self._mine[0]
        self._theirs[self.rank] = mine.said
        said, found = [*self._theirs], meeting(self._theirs)
        self._met += 1
        for rank in found.over:
            self._theirs[rank] = None
        if self._theirs[self.rank] is None:
            self._mine.popleft()
            self._calls -= mine.said.kind == CALL
        if found.apart:
            self._raise_apart(channel, mine, said)
        return said

    def _raise_apart(self, channel: Channel, mine: _Mine, said: list[Said]) -> None:
        """Some ranks came for a call that others did not come for; this is an error of those that came, once."""
        gone_ahead = any(x.ahead for x in said)
        if mine.said.kind != CALL:
            if gone_ahead:
                self._broken = (
                    "the other ranks went ahead with a call that this rank refused; no further one can be matched"
                )
                raise RankMismatchError(self._broken)
            return
        text = self._how_apart(channel, mine, said)
        if gone_ahead:  # what was sent nobody receives
            self._broken = f"{WRONG}: {text}"
        raise RankMismatchError(text)

    def _how_apart(self, channel: Channel, mine: _Mine, said: list[Said]) -> str:
        assert mine.describe is not None  # of a call
        channel.post(mine.number, {"values": dict(mine.describe())})
        numbers = [heard - 1 for heard in channel.line.heard]  # of what met
        numbers[self.rank] = mine.number
        if len({x.digest for x in said if x.kind == CALL}) == 1:
            rank = next(rank for rank, x in enumerate(said) if x.kind in (REFUSED, REFUSED_UNKNOWN))
            where = "within attention" if mine.said.digest == CLOSING else "instead of coming to attention"
            return self._raised(channel, rank, numbers[rank], where)
        values, more, give_up = {}, "", time.monotonic() + PATIENCE
        for rank, x in enumerate(said):
            if x.kind == CALL:
                told = channel.entry(rank, numbers[rank], give_up - time.monotonic() if x.ahead else None)
                if told is None:
                    more += f"; rank {rank} went ahead and does not say with what"
                else:
                    values[rank] = told["values"]
        return (disagreement(values) or f"ranks make calls of different digests: {values}") + more

    def _raised(self, channel: Channel, rank: int, number: int, where: str = "within attention") -> str:
        """What a rank raised that says so with this number."""
        told = channel.entry(rank, number)
        assert told is not None  # told before it was said
        return f"rank {rank} raised an error {where}: {told['raised']}"

    def _who_is_missing(self, channel: Channel, silent: list[int], error: RuntimeError) -> str | None:
        """In words, if waiting for silent ranks timed out; None if it ended in another way."""
        if "imed out" not in str(error) and "imeout" not in str(error):
            return None
        waiting_too = channel.waiting(self._met)
        missing, mine = sorted({*silent} - waiting_too), next(x for x in self._mine if x.said.kind == CALL)
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "another rank"
        shown = {} if mine.describe is None else dict(mine.describe())
        return (
            f"{ranks} has not come to call {mine.number} of attention, to which rank {self.rank} came with {shown}: "
            f"timed out after {channel.timeout}"
        )


def _text(error: Exception) -> str:
    said = error.args[0] if error.args else ""  # torch 2.11 does not trace str(error)
    return f"{type(error).__name__}: {said}"


def digest_of(values: object) -> int:
    """62 bits of anything whose text is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 2


def disagreement(values: Mapping[int, Mapping[str, object]]) -> str | None:
    """The first entry that not all ranks have the same, in words, from what each rank has."""
    for name in dict.fromkeys(name for value in values.values() for name in value):
        shown = {rank: json.dumps(value.get(name)) for rank, value in values.items()}
        if len(set(shown.values())) > 1:
            return f"ranks disagree on {name}: {_by_value(shown)}"
    return None


def _by_value(shown: Mapping[int, str]) -> str:
    ranks_of: dict[str, list[int]] = {}
    for rank, value in shown.items():
        ranks_of.setdefault(value, []).append(rank)
    return "; ".join(f"{value} on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}" for value, r in ranks_of.items())


_agreements: weakref.WeakKeyDictionary[dist.ProcessGroup, Agreement] = weakref.WeakKeyDictionary()


def agreement(group: dist.ProcessGroup) -> Agreement:
    """Of a process group, for as long as the group lives."""
    found = _agreements.get(group)
    if found is None:
        found = _agreements[group] = Agreement(group)
    return found


def refuse(group: Group, error: Exception) -> None:
    """Let the other ranks of a group, if there are any, know of an error that keeps this one from calling attention."""
    name = group_name(group)
    if not name:
        return
    if torch.compiler.is_compiling():
        _refuse_traced(name, error.args[0] if error.args else "", type(error).__name__)
    else:
        found = process_group(group)
        assert found is not None  # it has a name
        agreement(found).refuse(error)


@torch.compiler.assume_constant_result
def _refuse_traced(name: str, said: str, kind: str) -> None:
    """Runs while torch.compile traces; where the trace ends in the error, nothing else would notify the others."""
    group = named_group(name)
    agreement(group).refuse(type(kind, (Exception,), {})(said), traced=True)
