"""Copy engines of GPUs that are not there, for one rank of several: what they are asked for is noted.

Tensors lie on the CPU and are never read or written; the memory of all ranks is this one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
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

    def _current(self) -> Streams:
        return self._writer


@contextmanager
def one_of_ranks(sharding: Sharding, by_page: bool = True) -> Iterator[tuple[Asked, StandIn]]:
    """What is asked of CUDA's driver for transfers, and what for launches, in calls by a sharding of several ranks.

    Args:
        sharding: of this rank.
        by_page: whether the ranks share a page of memory for what they say of their calls.
    """
    asked: Asked = []

    def noting(what: str) -> Callable[..., None]:
        return lambda *arguments: asked.append((what, *arguments))

    group = SimpleNamespace(rank=lambda: sharding.rank, size=lambda: sharding.ranks)
    waited: list[bool] = []
    rounds = SimpleNamespace(
        check=lambda digest, describe, device, nbytes, waits: waited.append(waits),
        waited=waited,
        close=lambda *_: None,
        refuse=noting("refuse"),
        by_page=by_page,
    )
    size = bytes_of(sharding.ranks, room_of(sharding.ranks)) + flag_bytes(sharding.ranks)
    memory = torch.zeros(size, dtype=torch.uint8)
    events = Events(lambda *_: asked.append(("event", "record")), lambda *_: asked.append(("event", "wait")))
    within = Memory(noting("copy within"), noting("copy rows within"), noting("zero"))
    with (
        stand_in(hopper) as launches,
        mock.patch.object(
            symmetric_memory, "driver", return_value=Driver(*map(noting, ("copy", "copy rows", "numbers")))
        ),
        mock.patch.object(symmetric_memory, "event_functions", return_value=events),
        mock.patch.object(recording, "memory_functions", return_value=within),
        mock.patch.object(forward, "first_ticket", forward.drawn_zero),  # as in the default stream
        mock.patch.object(symmetric_memory, "_of_all_ranks", lambda x, _: [x] * sharding.ranks),
        mock.patch.object(torch.cuda, "Stream", return_value=Streams(asked)),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch, "zeros", lambda *size, pin_memory=False, zeros=torch.zeros, **of: zeros(*size, **of)),
        mock.patch.object(call, "agreement", return_value=rounds),
        mock.patch.object(known_calls, "agreement", return_value=rounds),
        mock.patch.object(Placement, "bind"),
    ):
        engines = CopyEngines(group, memory, timedelta(hours=1))
        engines.known_calls = WeakKeyDictionary()
        engines.use_shelf(torch.zeros(1 << 22, dtype=torch.uint8), group)
        sharding._placement.group = group
        with mock.patch.object(Placement, "transport", engines):
            yield asked, launches
