"""Ranks of a host, some of whose calls go by a list while others find their way, are noted, refused, or fail.

Ranks are processes. What they ask CUDA's driver for between GPUs is carried out by threads, one for each stream, at any
pace, in memory that the processes share: numbers are written and waited for. Nothing is copied or computed. Where
rounding is noted a host waits for its GPU, as one may have to that loads a kernel.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from queue import Queue
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import triton
from copy_engines import Machine, Streams, failing, one_of_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ringflash import ArgumentError, Mask, RankMismatchError, Sharding
from ringflash.functional import attention
from ringflash.kernels.cuda_driver import Events
from ringflash.kernels.gpu import recording
from ringflash.kernels.requests import of_thread
from ringflash.parallel.agreement.rounds import MOST_AHEAD, Agreement
from ringflash.parallel.execution import known_calls
from ringflash.parallel.transport import symmetric_memory
from ringflash.parallel.transport.driver import WRITE, Driver

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

GPU = torch.device("cuda", 0)

STUCK = 20.0
"""Seconds after which a host has waited too long for its GPU."""

LATE = 0.1
"""Seconds that other ranks have to go ahead before one fails."""

HALF = 1 << 31
"""Of the circle in which numbers are reached."""


class Stream(Streams):
    """Carries out what it is asked for, in order, by a thread of its own.

    Args:
        number: of the stream.
        pace: seconds that anything takes at most.
    """

    def __init__(self, number: int, pace: Callable[[], float]) -> None:
        super().__init__([])
        self.cuda_stream, self._pace = number, pace
        self._asked: Queue[Callable[[], None]] = Queue()
        threading.Thread(target=self._carry_out, daemon=True).start()

    def ask(self, function: Callable[[], None]) -> None:
        """Behind all that was asked for before."""
        self._asked.put(function)

    def _carry_out(self) -> None:
        while True:
            function = self._asked.get()
            time.sleep(self._pace())
            function()

    def record_event(self, event: SimpleNamespace | None = None) -> SimpleNamespace:
        """As torch's."""
        event = event or SimpleNamespace(cuda_event=0)
        event.happened = happened = threading.Event()
        self.ask(happened.set)
        return event

    def wait_event(self, event: SimpleNamespace) -> None:
        """As torch's: for what was recorded last."""
        self.ask(event.happened.wait)


class Host(Machine):
    """One rank's part of a machine with a GPU for each rank.

    Args:
        name: of the test, the same on all ranks.
        pace: seconds that a stream takes for anything at most.
    """

    def __init__(self, name: str, pace: Callable[[], float]) -> None:
        super().__init__(dist.get_world_size())
        self._name, self._pace, self._files = name, pace, count()
        self._streams: dict[int, Stream] = {}
        self._events: dict[int, SimpleNamespace] = {}
        self.current = self.stream()
        self.driver = Driver(self._copy, lambda rectangle, stream: None, self._operate)
        self.events = Events(
            lambda event, stream: self._streams[stream].record_event(self._events[event]) and None,
            lambda stream, event: self._streams[stream].wait_event(self._events[event]),
        )
        self.agreement = Agreement(dist.group.WORLD)
        self.rounds = _OnGPU(self.agreement)

    def stream(self, *_: object, **__: object) -> Stream:
        made = _Stream(len(self._streams), self._pace, self._events)
        self._streams[made.cuda_stream] = made
        return made

    def memory(self, nbytes: int) -> Tensor:
        self._place = f"/dev/shm/{self._name}-{next(self._files)}"
        with open(f"{self._place}-{dist.get_rank()}", "wb") as file:
            file.truncate(nbytes)
        dist.barrier()
        return self._map(dist.get_rank(), nbytes)

    def of_all_ranks(self, memory: Tensor, _: object) -> list[Tensor]:
        found = [memory if rank == dist.get_rank() else self._map(rank, memory.nbytes) for rank in range(self.ranks)]
        dist.barrier()
        os.unlink(f"{self._place}-{dist.get_rank()}")
        return found

    def _map(self, rank: int, nbytes: int) -> Tensor:
        return torch.from_file(f"{self._place}-{rank}", shared=True, size=nbytes, dtype=torch.uint8)

    def item(self) -> None:
        """Wait for the GPU, as `Tensor.item` does."""
        self._wait_for([self.current])

    def synchronize(self) -> None:
        """As `torch.cuda.synchronize`."""
        self._wait_for([*self._streams.values()])

    def _wait_for(self, streams: list[Stream]) -> None:
        for stream in streams:
            over = threading.Event()
            stream.ask(over.set)
            assert over.wait(STUCK), f"rank {dist.get_rank()} waits for what no rank asks for"

    def _copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._streams[stream].ask(lambda: None)

    def _operate(self, stream: int, operations: list[int]) -> None:
        for what, address, number, _ in zip(*[iter(operations)] * 4, strict=True):
            place = ctypes.c_uint32.from_address(address)
            carry_out = _write if what == WRITE else _wait
            self._streams[stream].ask(lambda f=carry_out, place=place, number=number: f(place, number))


class _Stream(Stream):
    """Whose events a driver knows by their handles."""

    def __init__(self, number: int, pace: Callable[[], float], events: dict[int, SimpleNamespace]) -> None:
        super().__init__(number, pace)
        self._events = events

    def record_event(self, event: SimpleNamespace | None = None) -> SimpleNamespace:
        found = super().record_event(event)
        if event is None:
            found.cuda_event = len(self._events) + 1
            self._events[found.cuda_event] = found
        return found


def _write(place: ctypes.c_uint32, number: int) -> None:
    place.value = number


def _wait(place: ctypes.c_uint32, number: int) -> None:
    while (place.value - number) % (1 << 32) >= HALF:
        time.sleep(1e-4)


class _OnGPU:
    """What ranks say, of calls whose tensors lie on the CPU in place of a GPU."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement

    def __getattr__(self, name: str) -> object:
        return getattr(self._agreement, name)

    def check(self, digest: int, describe: Callable, device: torch.device, nbytes: int, waits: bool) -> int | None:
        return self._agreement.check(digest, describe, GPU, nbytes, waits)

    def close(self, failure: Exception | None, device: torch.device) -> None:
        self._agreement.close(failure, GPU)


class Calls:
    """Passes of attention of one rank, at its own pace.

    Args:
        host: of the rank.
        own: the rank's own random numbers.
    """

    def __init__(self, host: Host, own: random.Random) -> None:
        self.host, self.own = host, own
        self.waits_for_gpu = True
        """Whether the host does, at times."""
        place = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "head_ranks": 1}
        masks = (Mask.causal(), 512), (Mask.sliding_window(100, 0), 768)
        self.shardings = [Sharding(mask, seqlen=n, **place) for mask, n in masks]

    def step(self, which: int, fails: str | None = None) -> None:
        """Both passes, of which one may fail."""
        sharding = self.shardings[which]
        leaves = [torch.zeros(1, sharding.tokens, 2, 64).bfloat16().requires_grad_() for _ in range(3)]
        with nullcontext() if fails != "forward" else failing(sharding, fails, LATE):
            out, _ = attention(*leaves, sharding=sharding)
        self._dawdle()
        with nullcontext() if fails != "backward" else failing(sharding, fails, LATE):
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        self._dawdle()

    def steps_from(self, which: int, fails: str | None) -> None:
        """More than a rank may go ahead with, the first of which may fail."""
        for step in range(MOST_AHEAD + 1):
            self.step(which, None if step else fails)

    def _dawdle(self) -> None:
        own = self.own.random()
        if own < 0.15:
            self.host.item() if self.waits_for_gpu else None
        elif own < 0.3:
            time.sleep(own / 10)
        elif own < 0.4:
            self.host.agreement.refuse(ArgumentError("tried alone"), self.own.randrange(2, 6))


@contextmanager
def _rank(name: str, seed: int) -> Iterator[tuple[Calls, list]]:
    """This rank, and of each call how it went: "walked", "noted" or "by a list"."""
    own = random.Random(100 * seed + dist.get_rank())
    slow = own.choice([0.0, 0.0, 0.0005])
    pace = random.Random(own.random())
    host, went = Host(name, lambda: slow * pace.random()), []
    original, ran = known_calls.KnownCall.results, recording.Repeated.run

    def results(self, walk):
        def walked():
            went.append("walked" if of_thread.noting is None else "noted")
            return walk()

        return original(self, walked)

    def run(*arguments):
        went.append("by a list")
        return ran(*arguments)

    def load_and_round(*arguments):
        host.synchronize()
        round_numbers(*arguments)

    calls, round_numbers = Calls(host, own), recording.round_numbers
    with (
        one_of_ranks(calls.shardings[0], host) as (_, driver),
        torch.autograd.set_multithreading_enabled(False),
        mock.patch.object(known_calls.KnownCall, "results", results),
        mock.patch.object(recording.Repeated, "run", run),
        mock.patch.object(recording, "round_numbers", load_and_round),
        mock.patch.object(known_calls, "UNNOTED", own.choice([0, 1, 2, 3, 1 << 30])),  # by lists from other calls on
    ):
        driver.append = lambda _: None
        calls.shardings[1]._placement.group = calls.shardings[0]._placement.group
        yield calls, went


def _any_way(name: str, seed: int) -> list[str]:
    common = random.Random(seed)
    with _rank(name, seed) as (calls, went):
        for _ in range(12):
            calls.step(common.randrange(2))
        calls.host.item()
        dist.barrier()
        return went


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_come_to_the_end_of_calls_that_each_makes_in_its_own_way(pool, ranks: int) -> None:
    apart = 0
    for seed in range(3):
        went = pool(ranks).run(_any_way, uuid.uuid4().hex, seed, timeout=120)
        apart += sum(len(set(ways)) > 1 for ways in zip(*went, strict=True))
    assert apart > 8


def _ahead(name: str, unnoted: int) -> tuple[str, list[bool]]:
    """How rank 0's last call went, with which it goes ahead, and whether tensors of it are gone before others come."""
    with _rank(name, 0) as (calls, went), mock.patch.object(known_calls, "UNNOTED", unnoted):
        calls.waits_for_gpu = False
        for _ in range(6):
            calls.step(0)
        dist.barrier()
        dist.barrier() if dist.get_rank() else None
        leaves = [torch.zeros(1, calls.shardings[0].tokens, 2, 64).bfloat16().requires_grad_() for _ in range(3)]
        held = [StorageWeakRef(x.untyped_storage()) for x in leaves]
        attention(*leaves, sharding=calls.shardings[0])
        del leaves
        gc.collect()
        gone = [x.expired() for x in held]
        dist.barrier() if not dist.get_rank() else None
        calls.host.item()
        dist.barrier()
        return went[-1], gone


@pytest.mark.parametrize(("unnoted", "way"), [(0, "by a list"), (1 << 30, "walked")])
def test_calls_that_have_not_met_hold_no_tensors(pool, unnoted: int, way: str) -> None:
    assert pool(2).run(_ahead, uuid.uuid4().hex, unnoted, timeout=60)[0] == (way, [True] * 3)


def _apart(name: str, seed: int, fails: str | None) -> tuple[str, int]:
    """Rank 1 fails in a pass, or makes another call than the rest; what each rank hears, and how many passes later."""
    short = {"PATIENCE": 0.3, "GRACE": STUCK}
    with _rank(name, seed) as (calls, went), mock.patch.multiple(symmetric_memory, **short):
        for step in range(6):
            calls.step(step % 2)
        calls.host.item()
        dist.barrier()
        before, odd, calls.waits_for_gpu = len(went), dist.get_rank() == 1, False
        with pytest.raises((RuntimeError, RankMismatchError)) as raised:
            calls.steps_from(int(odd and fails is None), fails if odd else None)
        calls.host.item()  # streams come to their end
        for thread in threading.enumerate():
            if thread.name == "ringflash goes on alone":
                thread.join()
        dist.barrier()
        return str(raised.value), len(went) - before


@pytest.mark.parametrize("fails", ["forward", "backward", None])
@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_hear_of_one_that_fails_or_goes_apart_and_streams_come_to_their_end(
    pool, ranks: int, fails: str | None
) -> None:
    for seed in range(2):
        outcomes = pool(ranks).run(_apart, uuid.uuid4().hex, seed, fails, timeout=120)
        for rank, (said, passes) in enumerate(outcomes):
            if fails is None:
                assert "ranks disagree on mask" in said
            else:
                assert said == "a launch failed" if rank == 1 else "rank 1 raised an error within attention" in said
            assert (
                passes <= 2 + MOST_AHEAD + 1
            )  # of the step that fails, ahead of what is heard, and the one that raises
