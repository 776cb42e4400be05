"""Transfers by the copy engines of one host's NVIDIA GPUs, through memory that each can read of the others.

A kernel of torch.distributed's NCCL needs SMs, and a persistent attention kernel holds all of them: what is to travel
beside it starts when it ends. Copy engines need none. 4 x H100, 16 MiB to a neighbour: 55 GB/s by send and receive, 252
by a copy engine (`planning/machine.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime import driver as triton_driver

from ringflash.kernels.torch_private import symmetric_memory
from ringflash.parallel.transport.driver import driver
from ringflash.parallel.transport.mailboxes import APART, Block, Mailboxes, bytes_of

MOST_ROOM, LEAST_ROOM, ROOMS = 16 << 20, 4 << 20, 64 << 20
"""Bytes of a chunk, and of a chunk for each rank. Of more, a message would wait longer for its first; of fewer, the
host has more to ask for than the copy engines to do."""

READERS = 2
"""Streams of a lane that read; a transfer from several ranks at once uses them in turn."""

LANES = 2

LOOKS_EVERY = 0.5
"""Seconds."""

GRACE = 5.0
"""Seconds beyond the limit: ranks that wait on the host, where they can raise an error, have the same limit."""


def room_of(ranks: int) -> int:
    """Bytes of a chunk in a group of so many ranks; three for each rank are taken on every GPU, 192 MiB."""
    return max(LEAST_ROOM, min(MOST_ROOM, ROOMS // ranks))


class UnavailableError(RuntimeError):
    """There is no symmetric memory here, and why."""


class Posted:
    """A transfer by copy engines."""

    def __init__(
        self,
        current: Callable[[], torch.cuda.Stream],
        sent: Sequence[torch.Event],
        received: Sequence[torch.Event],
        tensors: tuple,
    ) -> None:
        self._current, self.sent, self._received, self._tensors = current, sent, received, tensors

    def __del__(self) -> None:
        self.wait()  # nobody may have, where a call fails; the memory is not to serve again before

    def wait_received(self) -> None:
        """See `Ticket`."""
        self._wait(self._received)
        self._received = ()

    def wait(self) -> None:
        """See `Ticket`."""
        self._wait((*self._received, *self.sent))
        self.sent, self._received, self._tensors = (), (), ()

    def _wait(self, events: Sequence[torch.Event]) -> None:
        if events:
            stream = self._current()
            for event in events:
                stream.wait_event(event)


class SymmetricMemory:
    """Copies between the GPUs of a group's ranks, which are all on one host. Made by all of them together.

    Args:
        group: the process group.
        memory: this rank's, from `allocate`.
        timeout: after which a transfer that does not end ends the process, with a word on standard error, as NCCL's do:
            nothing else can be waiting for a stream that never comes to its end.

    Raises:
        UnavailableError: the memory of another rank cannot be read.
    """

    def __init__(self, group: dist.ProcessGroup, memory: Tensor, timeout: timedelta) -> None:
        self._rank, ranks, self._device, self._memory = group.rank(), group.size(), memory.device, memory
        device = memory.device
        self._peers = _of_all_ranks(memory, group)
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._progress = torch.zeros(2 * LANES * ranks, dtype=torch.int32, device="cpu", pin_memory=True)
        self._lanes = [[torch.cuda.Stream(device, priority=-1) for _ in range(1 + READERS)] for _ in range(LANES)]
        """A writer and readers for what was there earlier, and for what has just been made; see `Transport`."""
        with torch.cuda.device(device):
            for peer in self._peers:
                driver().write(torch.cuda.current_stream().cuda_stream, peer.data_ptr(), 0)  # what is there already
        torch.cuda.synchronize(device)
        self._mailboxes = Mailboxes(
            self._rank,
            [x.data_ptr() for x in self._peers],
            room_of(ranks),
            self._progress.data_ptr(),
            [
                [(lane[0].cuda_stream, lane[1 + peer % READERS].cuda_stream) for peer in range(ranks)]
                for lane in self._lanes
            ],
            driver(),
        )
        self._watch = _Watch(self._rank, self._progress, timeout)
        weakref.finalize(self, self._watch.over.set)

    sends_early = True

    def mark(self) -> torch.Event:
        """See `Transport`."""
        return self._current().record_event()

    def _current(self) -> torch.cuda.Stream:
        """The current stream; torch's own function takes longer than to record an event in it."""
        raw = triton_driver.active.get_current_stream(self._device.index)  # pyrefly: ignore[missing-attribute]  # stub
        found = self._streams.get(raw)
        if found is None:
            found = self._streams[raw] = torch.cuda.current_stream(self._device)
        return found

    def transfer(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
        ready: torch.Event | None = None,
        free: Sequence[torch.Event] | None = None,
    ) -> Posted:
        """See `Transport`."""
        outgoing, incoming = _blocks(sends), _blocks(receives)
        if not outgoing and not incoming:
            return Posted(self._current, (), (), ())
        lane = int(ready is None)
        writer, *readers = self._lanes[lane]
        readers = [readers[i] for i in dict.fromkeys(peer % READERS for peer in incoming)]
        with torch.cuda.device(self._device):
            if ready is None or free is None:
                now = self.mark()
                ready, free = ready or now, (now,) if free is None else free
            if outgoing:
                writer.wait_event(ready)
            for stream in readers:
                for event in free:
                    stream.wait_event(event)
            ends = self._mailboxes.transfer(outgoing, incoming, lane)
            sent, received = [writer.record_event()] * bool(outgoing), [stream.record_event() for stream in readers]
        words = [f"{what} from rank {peer}" for peer in incoming] + [f"rank {peer} to take {what}" for peer in outgoing]
        for (place, number), word in zip(ends, words, strict=True):
            self._watch.expect(place, number, word)
        return Posted(self._current, sent, received, (sends, receives))


def allocate(ranks: int, device: torch.device) -> Tensor:
    """Symmetric memory for `SymmetricMemory` over so many ranks; zeros. No other rank takes part.

    Raises:
        UnavailableError: there is none, and why.
    """
    try:
        memory = symmetric_memory().empty(bytes_of(ranks, room_of(ranks)), dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            stream, address = torch.cuda.Stream().cuda_stream, memory.data_ptr()
            driver().copy([(address + APART, address, 4)], stream)  # a machine may not be able to
            driver().write(stream, address, 0)
            driver().wait(stream, address, 0)
        torch.cuda.synchronize(device)
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise UnavailableError(f"torch's symmetric memory: {_first_line(error)}") from error
    return memory


def _of_all_ranks(memory: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Every rank's memory as this process sees it."""
    try:
        with _without_multicast():
            handle = symmetric_memory().rendezvous(memory, group)
        return [handle.get_buffer(rank, memory.shape, memory.dtype) for rank in range(group.size())]
    except RuntimeError as error:
        raise UnavailableError(f"torch's symmetric memory: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def _without_multicast() -> Generator[None]:
    """NVLink multicast is not used, and making it fails or hangs on some hosts."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _blocks(pairs: Sequence[tuple[int, Tensor]]) -> dict[int, list[Block]]:
    """By rank the memory of its tensors; those that lie one behind another are one block."""
    found: dict[int, list[Block]] = {}
    for peer, x in pairs:
        address, nbytes = x.data_ptr(), x.numel() * x.element_size()
        if not nbytes:
            continue
        blocks = found.setdefault(peer, [])
        if blocks and sum(blocks[-1]) == address:
            blocks[-1] = blocks[-1][0], blocks[-1][1] + nbytes
        else:
            blocks.append((address, nbytes))
    return found


class _Expected(NamedTuple):
    number: int
    since: float
    what: str


class _Watch:
    """Ends the process when a transfer does not end: a thread that reads what the copy engines write for the host."""

    def __init__(self, rank: int, progress: Tensor, timeout: timedelta) -> None:
        self._rank, self._timeout = rank, timeout
        self._progress = progress.numpy()  # reading it asks nothing of CUDA, so it disturbs no capture of a graph
        self._expected: list[deque[_Expected]] = [deque() for _ in range(len(progress))]
        self.over = threading.Event()
        """Nothing more is expected."""
        threading.Thread(target=self._look_again, daemon=True, name="ringflash transfers").start()

    def expect(self, index: int, number: int, what: str) -> None:
        """Progress at `index` is to become this number."""
        self._expected[index].append(_Expected(number, time.monotonic(), what))

    def _look_again(self) -> None:
        while not self.over.wait(LOOKS_EVERY):
            for index, expected in enumerate(self._expected):
                self._look(int(self._progress[index]), expected)

    def _look(self, now: int, expected: deque[_Expected]) -> None:
        if any(x.number == now for x in tuple(expected)):
            while expected.popleft().number != now:
                pass
        if expected and time.monotonic() - expected[0].since > self._timeout.total_seconds() + GRACE:
            print(
                f"ringflash: rank {self._rank} ends, having waited more than {self._timeout} for {expected[0].what}",
                file=sys.stderr,
                flush=True,
            )
            os.kill(os.getpid(), signal.SIGABRT)
