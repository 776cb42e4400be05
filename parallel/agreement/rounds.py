"""Ranks compare, call by call, what they are about to do; one that does something else is named.

Send and receive check neither sizes nor dtypes: a rank that makes another call than its peers gives wrong numbers, or a
hang. So each call to attention takes part in a round: the maxima of a few integers over all ranks of the group, through
a channel of its own (shared memory on one host, gloo among several). Every rank enters each round once, with the digest
of the call that it makes or with the word that it refused one, so the rounds number the calls and nothing can shift
ranks against each other. Only where digests differ do names and values travel, through the key-value store.

A call that is new to a rank waits for its round before anything is sent, and so do calls on CPUs, where everything
waits anyway. On a GPU a call like an earlier one goes ahead, and its round is looked at when a later one finds it over:
the host hardly ever waits for other hosts in a repeated call, and what differs is an error some calls later
(`MOST_AHEAD`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringflash.errors import RankMismatchError
from ringflash.kernels.torch_private import process_group as named_group
from ringflash.kernels.torch_private import transforms_active, without_transforms
from ringflash.parallel.agreement.channel import Channel, Herald, Joining, Reduction
from ringflash.parallel.mesh import Group, group_name, process_group

Description = Callable[[], Mapping[str, object]]
"""Names and values of a call, worked out only where ranks differ."""

REMEMBERED = 4096
"""Digests of calls that need not wait for their round; packed documents bring a new one with every step."""

NOTHING, REFUSED, REFUSED_UNKNOWN = range(3)
"""What a rank says in a round: that it makes a call, that it refused one, or one whose digest is not known."""

MOST_AHEAD = 4
"""Rounds that may be open while a rank goes ahead with calls that were made before."""

CLOSING = 1
"""Digest of a round that ends a call."""


@dataclass
class _Round:
    """One rank's part in a round.

    Attributes:
        number: which round.
        reduction: the maximum of digest, -digest, whether a call was refused, whether one was refused before its digest
            was known, and `nbytes`.
        digest: of this rank's call.
        describe: names and values of the call; None where this rank refused it, or knows already that it failed.
        nbytes: see `Agreement.check`.
        ahead: this rank went ahead with the call before the round was over.
    """

    number: int
    reduction: Reduction
    digest: int
    describe: Description | None
    nbytes: int = 0
    ahead: bool = False


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
    """The rounds of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()
        self._group = weakref.ref(group)
        self._channel: Channel | None = None
        self._joining: Joining | None = None
        self._herald: Herald | None = None
        self._backlog: list[tuple[int, int, str]] = []  # what this rank has to say in rounds that have not begun
        self._open: list[_Round] = []
        self._number = 0
        self._seen: set[int] = set()
        self._announced = ""
        self._on_gpu = False
        self._broken: str | None = None

    @property
    def is_broken(self) -> bool:
        """Whether no further call can be matched: ranks went ahead with different ones."""
        return self._broken is not None

    @_untransformed
    def check(self, digest: int, describe: Description, device: torch.device, nbytes: int = 0) -> int | None:
        """Make sure that all ranks make the same call, or will notice that they do not.

        Args:
            digest: of everything that must be the same on all ranks; 62 bits.
            describe: the same as names and values, in the order in which a disagreement is to be reported.
            device: of the call's tensors.
            nbytes: what may differ, and of which the greatest counts.

        Returns:
            The greatest `nbytes` of all ranks; None if this rank went ahead with a call that was made before.

        Raises:
            RankMismatchError: on every rank, naming the argument, the ranks and their values, or the rank that refused
                the call or did not come.
        """
        self._announced = ""
        self._on_gpu = device.type != "cpu"
        channel = self._joined(digest)
        known = self._on_gpu and digest in self._seen
        self._settle(channel, MOST_AHEAD - 1 if known else 0)
        self._open.append(self._begin(channel, digest, NOTHING, describe, nbytes))
        if known:
            self._open[-1].ahead = True
            return None
        most = self._settle(channel)
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen.add(digest)
        return most

    @_untransformed
    def refuse(self, error: Exception, digest: int | None = None, traced: bool = False) -> None:
        """Let the other ranks know that this one refuses a call, without waiting for them.

        Those that make the same call hear of it and raise. Those that make another one, because this rank tried
        something alone, are not disturbed, if the refused call's digest was known.

        Args:
            error: why.
            digest: of the call, where it was known before it was refused.
            traced: the error came up while torch.compile traced, which may happen again for the same call.
        """
        text = _text(error)
        if text == self._announced:
            # Notified already while this very call was traced, which is done again, or left for the eager call.
            self._announced = text if traced else ""
            return
        self._announced = text if traced else ""
        kind = REFUSED_UNKNOWN if digest is None else REFUSED
        if self._channel is None:
            group = self._group()
            if group is not None:
                self._herald = self._herald or Herald(group)
                self._herald.say(digest, text)
            self._backlog.append((digest or 0, kind, text))
            return
        self._refused(self._channel, digest or 0, kind, text)

    @_untransformed
    def close(self, failure: Exception | None, device: torch.device) -> None:
        """End a call that all ranks have begun.

        On CPUs the end is a round of its own, so that what fails on one rank is an error of the same call on all. On
        GPUs nobody waits: it stands in the place of this rank's next call, and the others hear of it when they look at
        that, at the latest `MOST_AHEAD` calls later. What they sent meanwhile nobody received, so no further call can
        be matched.

        Args:
            failure: what this rank's kernels raised within the call, if anything.
            device: of the call's tensors.

        Raises:
            RankMismatchError: another rank failed.
        """
        assert self._channel is not None  # `check` joined it
        if device.type == "cpu":
            if failure is None:
                self._open.append(self._begin(self._channel, CLOSING, NOTHING, lambda: {"pass": "the end of a call"}))
                self._settle(self._channel)
            else:
                self._refused(self._channel, CLOSING, REFUSED_UNKNOWN, _text(failure))
                self._settle(self._channel)
        elif failure is not None:
            self._refused(self._channel, CLOSING, REFUSED_UNKNOWN, _text(failure))
            self._broken = f"this rank raised an error within a call that the others went on with: {_text(failure)}"

    def _refused(self, channel: Channel, digest: int, kind: int, text: str) -> None:
        channel.post(self._number, {"raised": text, "digest": digest if kind == REFUSED else None})
        self._open.append(self._begin(channel, digest, kind, None))

    def _joined(self, digest: int) -> Channel:
        """The channel to the other ranks; the first call makes it, together with them."""
        if self._broken:
            raise RankMismatchError(self._broken)
        if self._channel is None:
            group = self._group()
            assert group is not None  # the caller holds it
            self._joining = self._joining or Joining(group)
            try:
                self._channel = self._joining.finish(digest)
            except RankMismatchError:
                # This call has a round all the same: that of the call which another rank refused.
                over = max(self._joining.heard.values(), default=0)
                while len(self._backlog) < over:
                    self._backlog.append((digest, NOTHING, ""))
                raise
            if self._herald is not None:
                self._herald.close()
            for earlier, kind, text in self._backlog:
                if kind == NOTHING:
                    self._channel.post(self._number, {"digest": earlier, "values": {}})
                    self._open.append(self._begin(self._channel, earlier, kind, None))
                else:
                    self._refused(self._channel, earlier, kind, text)
        return self._channel

    def _begin(self, channel: Channel, digest: int, kind: int, describe: Description | None, nbytes: int = 0) -> _Round:
        values = digest, -digest, int(kind == REFUSED), int(kind == REFUSED_UNKNOWN), nbytes
        self._number += 1
        return _Round(self._number - 1, channel.maximum(values), digest, describe, nbytes)

    def _settle(self, channel: Channel, left: int = 0) -> int:
        """Look at all rounds that have begun; so many may be left that are not over yet. The last one's `nbytes`."""
        most_bytes = 0
        while self._open and (len(self._open) > left or self._open[0].reduction.is_completed()):
            mine = self._open.pop(0)
            try:
                most, negated_least, refused, refused_unknown, most_bytes = mine.reduction.wait()
            except RuntimeError as error:
                self._broken = self._who_is_missing(channel, mine, error)
                if self._broken is None:
                    raise
                raise RankMismatchError(self._broken) from error
            alike = most == -negated_least and not refused and not refused_unknown
            if alike:
                continue
            if mine.describe is None:
                self._check_left_alone(most, most == -negated_least, bool(refused_unknown))
            elif self._has_to_repeat(channel, mine):
                again = self._begin(channel, mine.digest, NOTHING, mine.describe, mine.nbytes)
                again.ahead = mine.ahead
                self._open.append(again)
        return most_bytes

    def _check_left_alone(self, digest: int, same: bool, unknown: bool) -> None:
        """After a round in which this rank refused its call: raise if others went ahead with that call on GPUs.

        Args:
            digest: of the others' call.
            same: it is that of the refused one.
            unknown: the refused one's was not known.
        """
        if self._on_gpu and digest in self._seen and (same or unknown):
            self._broken = (
                "the other ranks went ahead with a call that this rank refused; no further one can be matched"
            )
            raise RankMismatchError(self._broken)

    def _has_to_repeat(self, channel: Channel, mine: _Round) -> bool:
        """After a round whose ranks were not alike: raise, or say that another rank refused a call of its own."""
        try:
            return self._compared(channel, mine)
        except RankMismatchError as error:
            if mine.ahead:  # what this rank has sent nobody receives
                self._broken = f"an earlier call went wrong, and what was sent cannot be matched any more: {error}"
            raise

    def _compared(self, channel: Channel, mine: _Round) -> bool:
        assert mine.describe is not None
        channel.post(mine.number, {"digest": mine.digest, "values": dict(mine.describe())})
        entries = channel.entries(mine.number)
        calls = {rank: x for rank, x in enumerate(entries) if "raised" not in x}
        if len({x["digest"] for x in calls.values()}) > 1:
            said = disagreement({rank: x["values"] for rank, x in calls.items()})
            raise RankMismatchError(said or f"ranks make calls of different digests: {calls}")
        for rank, x in enumerate(entries):
            if "raised" in x and x["digest"] in (None, mine.digest):
                where = "within attention" if mine.digest == CLOSING else "instead of coming to attention"
                raise RankMismatchError(f"rank {rank} raised an error {where}: {x['raised']}")
        return True

    def _who_is_missing(self, channel: Channel, mine: _Round, error: RuntimeError) -> str | None:
        """In words, if a round timed out; None if it ended in another way."""
        if "imed out" not in str(error) and "imeout" not in str(error):
            return None
        missing = channel.missing(mine.number)
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
    """The rounds of a process group, for as long as the group lives."""
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
