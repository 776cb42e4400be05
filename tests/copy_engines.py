"""Copy engines of GPUs that are not there, for one rank of several: what they are asked for is noted.

Tensors lie on the CPU and are never read or written; the memory of all ranks is this one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from stand_in import StandIn, stand_in

from ringflash import Sharding
from ringflash.kernels import hopper
from ringflash.kernels.cuda_driver import Events, Memory
from ringflash.kernels.gpu import recording
from ringflash.kernels.hopper import forward
from ringflash.parallel.execution import call, known_calls
from ringflash.parallel.placement import Placement
from ringflash.parallel.transport import symmetric_memory
from ringflash.parallel.transport.driver import Driver
from ringflash.parallel.transport.mailboxes import bytes_of, room_of
from ringflash.parallel.transport.shelves import flag_bytes
from ringflash.parallel.transport.symmetric_memory import SymmetricMemory

Asked = list[tuple]
"""What was asked for in order: what, and arguments."""


class Streams:
    """Of a GPU that is not there."""

    cuda_stream = 0

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def wait_event(self, _: object) -> None:
        self.asked.append(("event", "wait"))

    def record_event(self, event: object = None) -> object:
        self.asked.append(("event", "record"))
        return event or SimpleNamespace(cuda_event=0)


class CopyEngines(SymmetricMemory):
    """As the transport of a group whose ranks have chosen them."""

    known_calls: WeakKeyDictionary

    def open(self, *_: object) -> None:
        """Nothing is to be chosen."""

    def open_again(self, *_: object) -> None:
        """Nothing is to be chosen."""

    def needs_room(self, _: torch.device) -> bool:
        """As `GroupTransport` says of copy engines."""
        return False

    def copy_engines(self, _: torch.device) -> SymmetricMemory:
        """As `GroupTransport` says of them."""
        return self

    current: Streams | None = None

    def _current(self) -> Streams:
        return self.current or self._writer


class Machine:
    """What notes what it is asked for.

    Args:
        ranks: of the group.
        by_page: whether the ranks share a page of memory for what they say of their calls.
    """

    current: Streams | None = None

    def __init__(self, ranks: int, by_page: bool = True) -> None:
        self.asked: Asked = []
        self.waited: list[bool] = []
        """Of each call whether it waits for the other ranks."""
        self.ranks = ranks
        self.driver = Driver(*map(self.noting, ("copy", "copy rows", "numbers")))
        self.events = Events(*(lambda *_, what=what: self.asked.append(("event", what)) for what in ("record", "wait")))
        self.rounds: Any = SimpleNamespace(
            check=lambda digest, describe, device, nbytes, waits: self.waited.append(waits),
            close=lambda *_: None,
            refuse=self.noting("refuse"),
            by_page=by_page,
        )

    def noting(self, what: str) -> Callable[..., None]:
        """Notes what it is called with."""
        return lambda *arguments: self.asked.append((what, *arguments))

    def stream(self, *_: object, **__: object) -> Streams:
        """As `torch.cuda.Stream`."""
        return Streams(self.asked)

    def memory(self, nbytes: int) -> torch.Tensor:
        """Zeros that other ranks see."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def of_all_ranks(self, memory: torch.Tensor, _: object) -> list[torch.Tensor]:
        """Every rank's."""
        return [memory] * self.ranks


@contextmanager
def one_of_ranks(sharding: Sharding, machine: Machine | None = None) -> Iterator[tuple[Asked, StandIn]]:
    """What is asked of CUDA's driver for transfers, and what for launches, in calls by a sharding of several ranks."""
    machine = machine or Machine(sharding.ranks)
    asked, noting = machine.asked, machine.noting
    group = SimpleNamespace(rank=lambda: sharding.rank, size=lambda: sharding.ranks)
    memory = machine.memory(bytes_of(sharding.ranks, room_of(sharding.ranks)) + flag_bytes(sharding.ranks))
    within = Memory(noting("copy within"), noting("copy rows within"), noting("zero"))
    with (
        stand_in(hopper) as launches,
        mock.patch.object(symmetric_memory, "driver", return_value=machine.driver),
        mock.patch.object(symmetric_memory, "event_functions", return_value=machine.events),
        mock.patch.object(recording, "memory_functions", return_value=within),
        mock.patch.object(forward, "first_ticket", forward.drawn_zero),  # as in the default stream
        mock.patch.object(symmetric_memory, "_of_all_ranks", machine.of_all_ranks),
        mock.patch.object(torch.cuda, "Stream", machine.stream),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch, "zeros", lambda *size, pin_memory=False, zeros=torch.zeros, **of: zeros(*size, **of)),
        mock.patch.object(call, "agreement", return_value=machine.rounds),
        mock.patch.object(known_calls, "agreement", return_value=machine.rounds),
        mock.patch.object(Placement, "bind"),
    ):
        engines = CopyEngines(group, memory, timedelta(hours=1))
        engines.known_calls = WeakKeyDictionary()
        engines.current = machine.current
        engines.use_shelf(machine.memory(1 << 22), group)
        sharding._placement.group = group
        with mock.patch.object(Placement, "transport", engines):
            yield asked, launches


@contextmanager
def failing(sharding: Sharding, which: str, late: float = 0.0) -> Iterator[None]:
    """The first launch of a pass fails, whether it goes by a list or not, after some seconds."""

    def failure(*_: object, **__: object) -> None:
        time.sleep(late)
        raise RuntimeError("a launch failed")

    for known in sharding._placement.transport.known_calls.get(sharding._placement, {}).values():
        if known.repeated is not None and known.form[0] == which:
            steps = known.repeated._steps
            first = next(i for i, (*_, is_work) in enumerate(steps) if is_work)
            steps[first] = (failure, *steps[first][1:])
    with mock.patch.object(hopper, {"forward": "attend", "backward": "attend_backward"}[which], failure):
        yield
