"""Which transport a group of ranks has, and why."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError, RankMismatchError, UnsupportedError
from ringflash.kernels.kept import build_to_keep, capturing
from ringflash.kernels.torch_private import default_store, without_transforms
from ringflash.parallel.agreement.rounds import Agreement, agreement, digest_of
from ringflash.parallel.host import host
from ringflash.parallel.transport.base import Delivery, Expected, Parts, Shelf, Ticket, Transport
from ringflash.parallel.transport.send_recv import SendRecv
from ringflash.parallel.transport.symmetric_memory import SymmetricMemory, UnavailableError, allocate

MOST_RANKS = 16
"""That share symmetric memory: each has a mailbox for every other."""

VARIABLE = "RINGFLASH_TRANSPORT"
"""Names a transport, for measurements and for machines whose copy engines fail; in any script, as NCCL's variables."""
NAMES = ("symmetric_memory", "send_recv")

Said = TypeVar("Said")


class GroupTransport:
    """The transport of one group, chosen by all of its ranks together in their first call.

    Args:
        group: the process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self._by_device: dict[torch.device, Transport] = {}
        self._plain = SendRecv(group)
        self._now: Transport = self._plain
        self._most_bytes = 0
        self.known_calls: weakref.WeakKeyDictionary[object, Any] = weakref.WeakKeyDictionary()
        """What is kept of calls by their placement, as long as the memory that they use; see execution.known_calls."""
        self.why = "not chosen yet: that is done in the first call"
        """The transport's name, and why it is that one."""

    def open(self, device: torch.device, nbytes: int | None = None) -> None:
        """Before the transfers of each call; all ranks are at the same call, and in their first one they choose.

        Args:
            device: of the tensors.
            nbytes: the most that a rank publishes; None if such a call was made before.
        """
        self._most_bytes = max(self._most_bytes, nbytes or 0)
        chosen = self._by_device.get(device)
        if chosen is None:
            if capturing(device):
                raise UnsupportedError(
                    "the first call of a group of ranks within a CUDA graph's capture; make one before"
                )
            group = self._group()
            assert group is not None  # the caller holds it
            chosen, self.why = build_to_keep(lambda: choose(group, device), device)
            self._by_device[device] = chosen
        if isinstance(chosen, SymmetricMemory):
            if capturing(device):
                chosen = self._plain  # a graph would repeat the numbers of flags
            elif self._most_bytes > chosen.published_bytes:  # also where memory was not to be had the last time
                group = self._group()
                assert group is not None
                lease(chosen, self._most_bytes, group)
        self._now = chosen

    def open_again(self, memory: SymmetricMemory, device: torch.device, nbytes: int | None) -> None:
        """The same where `copy_engines` gave what the call goes by."""
        if nbytes is None:
            self._now = memory
        else:
            self.open(device, nbytes)

    def copy_engines(self, device: torch.device) -> SymmetricMemory | None:
        """What the next call goes by if it is not captured; None where that is something else, or not known."""
        found = self._by_device.get(device)
        return found if isinstance(found, SymmetricMemory) and self._most_bytes <= found.published_bytes else None

    @property
    def shelf(self) -> Shelf | None:
        """See `Transport`; of the call at hand, which ranks have begun."""
        return self._now.shelf

    def needs_room(self, device: torch.device) -> bool:
        """Whether `deliver` may need memory of the caller in the next call; ahead of the first one, it may."""
        return not isinstance(self._by_device.get(device), SymmetricMemory) or capturing(device)

    def abandon(self) -> None:
        """What the last calls wait for is not going to come; where the transport can, streams go on all the same."""
        if isinstance(self._now, SymmetricMemory):
            self._now.abandon()

    def transfer(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], what: str
    ) -> Ticket:
        """See `Transport`."""
        return self._now.transfer(sends, receives, what)

    def deliver(self, parts: Parts, expected: Expected, room: Sequence[Tensor], what: str) -> Delivery:
        """See `Transport`."""
        return self._now.deliver(parts, expected, room, what)


def choose(group: dist.ProcessGroup, device: torch.device) -> tuple[Transport, str]:
    """The fastest transport that every rank can have, and why it is that one; all ranks of the group call it together.

    Raises:
        ArgumentError: a rank's environment asks for a transport that there is not; on all ranks.
    """
    if device.type != "cuda":
        return SendRecv(group), f"send_recv: tensors are on {device.type}"
    wanted = os.environ.get(VARIABLE, NAMES[0])
    memory, why = _memory(wanted, group, device)
    said = _of_all_ranks((wanted, host(), why, _made.count), group)
    for rank, (name, *_) in enumerate(said):
        if name not in NAMES:
            raise ArgumentError(f"{VARIABLE}={name} on rank {rank}; allowed are {' and '.join(NAMES)}")
    hosts = len({where for _, where, *_ in said})
    reason = f"the ranks are on {hosts} hosts" if hosts > 1 else _first([why for _, _, why, _ in said])
    if not reason and len({made for *_, made in said}) > 1:
        # torch numbers what is joined in each process, and would wait for a number that another has not come to.
        reason = "some ranks have joined memory in other groups before; make the first call in the largest group"
    if not reason:
        assert memory is not None  # or there were a reason
        made, why = None, ""
        _made.count += 1
        try:
            made = SymmetricMemory(group, memory, _timeout())
        except Exception as error:  # whatever it is, the others wait for a word
            why = str(error) or type(error).__name__
        reason = _first(_of_all_ranks(why, group))
        if made is not None and not reason:
            return made, "symmetric_memory: by copy engines, through memory that the GPUs of a host share"
    if hosts == 1 and torch.version.hip is None and wanted == NAMES[0] and group.rank() == 0:
        warnings.warn(f"ranks of one host transfer by send and receive, not by copy engines: {reason}", stacklevel=2)
    return SendRecv(_own_communicator(group)), f"send_recv: {reason}"


def lease(transport: SymmetricMemory, nbytes: int, group: dist.ProcessGroup) -> None:
    """Memory for what each rank publishes; all ranks of the group call it together.

    Raises:
        RuntimeError: a rank has no such memory, or it cannot be shared; on all ranks.
    """
    memory, why = None, ""
    try:
        memory = transport.new_shelf(nbytes)
    except UnavailableError as error:
        why = str(error)
    said = _of_all_ranks((why, _made.count), group)
    reason = _first([why for why, _ in said])
    if not reason and len({made for _, made in said}) > 1:
        reason = "some ranks have joined memory in other groups since; make the call with the most keys before"
    if reason:
        raise RuntimeError(f"{nbytes} bytes for keys that other GPUs read: {reason}")
    assert memory is not None
    _made.count += 1
    transport.use_shelf(memory, group)
    _of_all_ranks("", group)  # none publishes before all can read


def _memory(wanted: str, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor | None, str]:
    """This rank's symmetric memory, or why there is none."""
    if wanted != "symmetric_memory":
        return None, f"{VARIABLE}={wanted}"
    if torch.version.hip is not None:
        return None, "the GPU is not NVIDIA's"
    if group.size() > MOST_RANKS:
        return None, f"the group has {group.size()} ranks, and {MOST_RANKS} is the most"
    try:
        return allocate(group.size(), device), ""
    except UnavailableError as error:
        return None, str(error)


def _of_all_ranks(value: Said, group: dist.ProcessGroup) -> list[Said]:
    values = [value] * group.size()
    with without_transforms():
        dist.all_gather_object(values, value, group=group)
    return values


def _first(reasons: list[str]) -> str:
    """The first rank's that has one; empty if none has."""
    return next((f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why), "")


def _own_communicator(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks by NCCL, in whose stream no gradients of DDP, FSDP or ZeRO are reduced.

    Where the group is not that of all ranks it is one that was made for sequences, and is taken as it is.
    """
    if group.size() != dist.get_world_size():
        return group
    made = dist.new_group(dist.get_process_group_ranks(group), timeout=_timeout(), backend="nccl")
    assert isinstance(made, dist.ProcessGroup)  # this rank is one of them
    return made


class _Made:
    """How often this process has joined symmetric memory with others."""

    count = 0


_made = _Made()


def _timeout() -> timedelta:
    return default_store().timeout  # pyrefly: ignore[missing-attribute]  # stub lacks it


_transports: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupTransport] = weakref.WeakKeyDictionary()


def transport_of(group: dist.ProcessGroup) -> GroupTransport:
    """The transport of a process group, for as long as the group lives."""
    found = _transports.get(group)
    if found is None:
        found = _transports[group] = GroupTransport(group)
    return found


def check_all_alike(group: dist.ProcessGroup, what: str, known: Mapping[str, object], device: torch.device) -> None:
    """Make sure that all ranks are about to do the same beside attention, as `Agreement.check` does.

    Args:
        group: the process group.
        what: they do.
        known: names and values of all that must be the same.
        device: of the tensors.

    Raises:
        RankMismatchError: see `Agreement.check`.
    """
    checked(agreement(group), transport_of(group), digest_of((what, known)), lambda: known, device)


def checked(rounds: Agreement, transport: GroupTransport, *arguments: Any) -> int | None:
    """See `Agreement.check`. Where no call can be matched any more, nothing waits for others that was asked for."""
    try:
        return rounds.check(*arguments)
    except RankMismatchError:
        if rounds.is_broken:
            transport.abandon()
        raise
