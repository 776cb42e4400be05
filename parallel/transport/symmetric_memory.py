"""Transfers by the copy engines of one host's NVIDIA GPUs, through memory that each can read of the others.

A kernel of torch.distributed's NCCL needs SMs, and a persistent attention kernel holds all of them: what is to travel
beside it starts when it ends. Copy engines need none, but carry only what goes from one GPU to another (`driver`).
4 x H100, 16 MiB to a neighbour: 55 GB/s by send and receive, 252 by a copy engine (`planning/machine.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime import driver as triton_driver

from ringflash.kernels.cuda_driver import event_functions
from ringflash.kernels.kept import Kept
from ringflash.kernels.requests import ask, cannot_repeat, of_thread, stays
from ringflash.kernels.torch_private import symmetric_memory
from ringflash.parallel.planning.pulls import Pull
from ringflash.parallel.transport.base import Add, Expected, Parts
from ringflash.parallel.transport.deliveries import Coming, End, Leaving, PushedParts
from ringflash.parallel.transport.driver import BEHIND_ALL, EQUAL, WAIT, WRITE, Requests, driver
from ringflash.parallel.transport.mailboxes import APART, Block, Mailboxes, bytes_of, number_of, room_of
from ringflash.parallel.transport.shelves import (
    Kind,
    Shelves,
    copies,
    flag_bytes,
    groups,
    kinds_of,
    laid_out,
    lies_of,
    row_bytes,
)

LEAST_SHELF, LARGE_SHELF, PAGE = 16 << 20, 512 << 20, 2 << 20
"""Bytes to publish in: at least, from where on hardly more than needed, and multiples of."""

SMALL = 16 << 20
"""Bytes that are laid out by one launch, not by copies of the driver, whatever lies between those that others take."""

LOOKS_EVERY = 0.5
"""Seconds."""

QUEUES = 8
"""Of a GPU, in which streams are carried out, by default."""

GRACE = 5.0
"""Seconds beyond the limit: ranks that wait on the host, where they can raise an error, have the same limit."""

PATIENCE = 5.0
"""Seconds in which nothing comes, after which it is taken that nothing will where ranks have parted."""


class UnavailableError(RuntimeError):
    """There is no symmetric memory here, and why."""


class Posted:
    """A transfer by copy engines."""

    def __init__(self, memory: SymmetricMemory, events: Sequence[torch.Event], tensors: tuple) -> None:
        self._memory, self._events, self._tensors = memory, events, tensors

    def __del__(self) -> None:
        self.wait()  # nobody may have, where a call fails; the memory is not to serve again before

    def wait(self) -> None:
        """See `Ticket`."""
        if self._events:
            self._memory.wait(self._events)
        self._events, self._tensors = (), ()


class _Pushed:
    """A delivery by copy engines."""

    def __init__(
        self,
        memory: SymmetricMemory,
        pushed: PushedParts,
        tensors: tuple[Sequence, Sequence[Tensor]],
        what: str,
    ) -> None:
        self.peers = pushed.peers
        self._memory, self._what = memory, what
        self._pushed: PushedParts | None = pushed
        self._tensors = tensors

    def __del__(self) -> None:
        if self._pushed is not None:  # as where a call fails; others wait for what is still to be written
            with torch.cuda.device(self._memory.device):
                self.collect(lambda _: None)

    def collect(self, add: Add) -> None:
        """See `Delivery`."""
        if self._pushed is not None:
            pushed, self._pushed = self._pushed, None
            self._memory.collect(pushed, self._tensors[1], add, self._what)
            self._tensors = (), ()


class SymmetricMemory:
    """Copies between the GPUs of a group's ranks, which are all on one host. Made by all of them together.

    This rank's GPU is the current device wherever something is asked for.

    Args:
        group: the process group.
        memory: this rank's, from `allocate`.
        timeout: after which a transfer that does not end ends the process, with a word on standard error, as NCCL's do:
            nothing else can be waiting for a stream that never comes to its end.

    Raises:
        UnavailableError: the memory of another rank cannot be read.
    """

    def __init__(self, group: dist.ProcessGroup, memory: Tensor, timeout: timedelta) -> None:
        self._rank, ranks, self.device, self._memory = group.rank(), group.size(), memory.device, memory
        device = memory.device
        self._peers = _of_all_ranks(memory, group)
        self._shelf, self._shelves = memory.new_empty(0), [memory.new_empty(0)] * ranks
        self.shelves_so_far = 0
        """How often ranks have begun to publish elsewhere."""
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._events: list[torch.Event] = []
        """That nobody is going to wait for any more."""
        self._shelf_addresses = [0] * ranks
        self._kept = Kept(256)
        self._progress = torch.zeros(3 * ranks, dtype=torch.int32, device="cpu", pin_memory=True)
        self._progress_address = self._progress.data_ptr()
        self._asked = [0] * ranks
        # No more: a GPU has eight queues for streams by default, and streams that share one wait for each other.
        self._writer, self._taker, self._puller = (torch.cuda.Stream(device, priority=-1) for _ in range(3))
        """Of messages to and from others, and of what is published, which must not wait behind those."""
        with torch.cuda.device(device):
            for peer in self._peers:
                write = [WRITE, peer.data_ptr(), 0, BEHIND_ALL]  # what is there already
                driver().operate(self._writer.cuda_stream, write)
        torch.cuda.synchronize(device)
        bases = [x.data_ptr() for x in self._peers]
        both = self._writer.cuda_stream, self._taker.cuda_stream
        self._mailboxes = Mailboxes(self._rank, bases, room_of(ranks), self._progress_address, *both, driver())
        flags = [base + bytes_of(ranks, room_of(ranks)) for base in bases]
        self._taking = Requests(driver(), self._puller.cuda_stream)
        self._published = Shelves(self._rank, flags, self._taking, driver())
        self._watch = _Watch(self._rank, self._progress, timeout)
        weakref.finalize(self, self._watch.over.set)

    def _current(self) -> torch.cuda.Stream:
        """The current stream; torch's own function takes longer than to record an event in it."""
        raw = triton_driver.active.get_current_stream(self.device.index)  # pyrefly: ignore[missing-attribute]  # stub
        found = self._streams.get(raw)
        if found is None:
            found = self._streams[raw] = torch.cuda.current_stream(self.device)
        return found

    def mark(self) -> torch.Event:
        """See `Shelf`."""
        return self._record(self._current())

    def _record(self, stream: torch.cuda.Stream) -> torch.Event:
        if of_thread.noting is None:
            return stream.record_event(self._events.pop() if self._events else None)
        event = stream.record_event()  # of the calls that repeat this one, where nobody else has it
        handles, record = (_handle(event), stream.cuda_stream), event_functions().record
        ask("mark", lambda _, held=event: record(*handles))
        return event

    def _wait(self, stream: torch.cuda.Stream, event: torch.Event) -> None:
        if of_thread.noting is None:
            stream.wait_event(event)
            self._events.append(event)
        else:
            handles, wait = (stream.cuda_stream, _handle(event)), event_functions().wait
            ask("wait", lambda _, held=event: wait(*handles))

    def wait(self, events: Sequence[torch.Event]) -> None:
        """Let the current stream wait for what `mark` and transfers recorded, for which nobody else waits."""
        stream = self._current()
        for event in events:
            self._wait(stream, event)

    # Messages

    def transfer(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], what: str
    ) -> Posted:
        """See `Transport`."""
        outgoing, incoming = blocks(sends), blocks(receives)
        if not outgoing and not incoming:
            return Posted(self, (), ())
        cannot_repeat("a transfer")
        streams = [self._writer] * bool(outgoing) + [self._taker] * bool(incoming)
        now = self.mark()
        for stream in streams:
            stream.wait_event(now)  # what is sent is there, and nobody reads what is filled
        self._events.append(now)
        ends = self._mailboxes.transfer(outgoing, incoming)
        events = [self._record(stream) for stream in streams]
        senders = len(incoming)
        for i, (peer, end) in enumerate(zip((*incoming, *outgoing), ends, strict=True)):
            self._watch.expect(*end, what, peer, i < senders)
        return Posted(self, events, (sends, receives))

    def deliver(self, parts: Parts, expected: Expected, room: Sequence[Tensor], what: str) -> _Pushed:
        """See `Transport`; `room` says what rows are like, and is not used."""
        sizes = [row_bytes(x) for x in room]
        outgoing = [
            Leaving(owner, x.data_ptr(), runs, size)
            for owner, tensors in parts
            for (x, runs), size in zip(tensors, sizes, strict=True)
        ]
        incoming = [Coming(sender, rows, size) for sender, rows in expected for size in sizes]
        if outgoing:
            self._wait(self._writer, self.mark())
        pushed = PushedParts(self._mailboxes, room_of(len(self._peers)), outgoing, incoming)
        ask("push", lambda addresses: self._expect(pushed.push(addresses), what), [x.address for x in outgoing])
        return _Pushed(self, pushed, (parts, room), what)

    def collect(self, pushed: PushedParts, like: Sequence[Tensor], add: Add, what: str) -> None:
        """See `Delivery`."""
        stream = self._current().cuda_stream
        failure = pushed.collect(add, self._peers[self._rank], like, stream, lambda ends: self._expect(ends, what))
        if pushed.writes:
            self.wait([self._record(self._writer)])  # the memory of parts may serve again
        if failure is not None:
            raise failure

    def _expect(self, ends: Sequence[End], what: str) -> None:
        for peer, place, number, comes in ends:
            self._watch.expect(place, number, what, peer, comes)

    # What is laid out

    @property
    def shelf(self) -> SymmetricMemory:
        """See `Transport`."""
        return self

    @property
    def published_bytes(self) -> int:
        """How much a rank can publish."""
        return self._shelf.nbytes

    def new_shelf(self, nbytes: int) -> Tensor:
        """Memory to publish more, of this rank alone; what lay there before is not read any more.

        Raises:
            UnavailableError: there is none.
        """
        torch.cuda.synchronize(self.device)
        self._shelf, self._shelves = self._memory.new_empty(0), []
        try:
            return symmetric_memory().empty(shelf_size(nbytes), dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise UnavailableError(f"torch's symmetric memory: {_first_line(error)}") from error

    def use_shelf(self, memory: Tensor, group: dist.ProcessGroup) -> None:
        """Publish there from now on; all ranks of the group do."""
        self._shelves = _of_all_ranks(memory, group)
        self._shelf_addresses = [x.data_ptr() for x in self._shelves]
        self._shelf = memory
        self.shelves_so_far += 1

    def publish(self, rows: Sequence[Tensor], given: Sequence[tuple[int, int]]) -> None:
        """See `Shelf`."""
        stream = self._current().cuda_stream
        ask("room to publish", lambda _: self._published.begin(stream))
        if given:
            self._lay_out(rows, given, stream)
        ask("publish", lambda _: self._published.end(stream))

    def _lay_out(self, rows: Sequence[Tensor], given: Sequence[tuple[int, int]], stream: int) -> None:
        from ringflash.kernels.gpu.launcher import aligned  # which machines without GPUs do not import
        from ringflash.kernels.gpu.lay_rows import lay_rows

        first, last, kinds = given[0][0], given[-1][1], kinds_of(rows)
        [group, *others] = groups(kinds)
        if len(group.members) == 2 and not others and (last - first) * group.row <= SMALL:
            one, other = (x[first:last] for x in rows)
            if aligned(one, other):
                stays(self._shelf.data_ptr(), self._shelf.nbytes)  # or calls would find their way anew
                lay_rows(one, other, self._shelf[first * group.row : last * group.row])
                return
        lies, shelf, copy_rows = lies_of(rows, given), self._shelf.data_ptr(), driver().copy_rows

        def lay_out(addresses: Sequence[int]) -> None:
            for rectangle in laid_out(lies, addresses, shelf):
                copy_rows(rectangle, stream)

        ask("lay out", lay_out, [x.data_ptr() for x in rows])

    def pull(
        self, pulls: tuple[Pull, ...], targets: Sequence[Tensor], what: str, free: torch.Event, last: bool
    ) -> Posted:
        """See `Shelf`."""
        self._wait(self._puller, free)
        kinds = kinds_of(targets)
        pull = partial(self._pull, pulls, self._copies(pulls, kinds), what, last)
        ask("pull", pull, [targets[group.members[0]].data_ptr() for group in groups(kinds)])
        return Posted(self, [self._record(self._puller)], (targets,))

    def _pull(
        self,
        pulls: tuple[Pull, ...],
        copied: list[tuple[int, int, int, int, int]],
        what: str,
        last: bool,
        filled: Sequence[int],
    ) -> None:
        first, asked, shelves = 2 * len(self._peers), self._asked, self._shelf_addresses
        for pull in pulls:
            owner = pull.owner
            self._published.expect(owner)
            asked[owner] += 1
            number = number_of(asked[owner])
            self._taking.write(self._progress_address + 4 * (first + owner), number)
            self._watch.expect(first + owner, number, what, owner, True)
        self._taking.copies([(filled[group] + x, shelves[owner] + y, n) for group, x, owner, y, n in copied])
        if last:
            self._published.release()
        self._taking.go()

    def _copies(self, pulls: tuple[Pull, ...], kinds: tuple[Kind, ...]) -> list[tuple[int, int, int, int, int]]:
        """See `copies`; found again by the object, as the plan's own are."""
        found = self._kept.get(id(pulls))
        if found is None or found[0] is not pulls or found[1] != kinds:
            found = self._kept.add(id(pulls), (pulls, kinds, copies(pulls, kinds)))
        return found[2]

    def release(self) -> None:
        """See `Shelf`."""
        ask("release", lambda _: self._published.release())

    # The end

    def abandon(self) -> None:
        """Let streams come to their end where other ranks do not come any more: what they wait for is never sent.

        GPUs may be far behind their hosts, at calls that all ranks make, so nothing is done as long as something comes.
        What streams find then is nobody's. No further call can be made.
        """
        # No daemon: a process that ends waits for this, and then for its streams.
        threading.Thread(target=self._go_on_alone, name="ringflash goes on alone").start()

    def _go_on_alone(self) -> None:
        self._watch.wait_while_something_comes(PATIENCE)
        awaited = [*self._mailboxes.awaited(), *self._published.awaited()]
        operations = [x for address, number in awaited for x in (WRITE, address, number, BEHIND_ALL)]
        with torch.cuda.device(self.device):
            # One of these shares its queue with no stream that waits.
            streams = [torch.cuda.Stream(self.device, priority=-1) for _ in range(QUEUES)]
            give_up = time.monotonic() + GRACE
            # Again and again: what others were still at may come behind it, with smaller numbers.
            while self._watch.is_waiting() and time.monotonic() < give_up:
                for stream in streams:
                    driver().operate(stream.cuda_stream, operations)
                time.sleep(LOOKS_EVERY / 10)


def shelf_size(nbytes: int) -> int:
    """Bytes of a shelf for so many; somewhat more, because the next packed sequence may take more."""
    generous = 2 * nbytes if nbytes < LARGE_SHELF // 2 else max(LARGE_SHELF, nbytes + nbytes // 16)
    return -(-max(LEAST_SHELF, generous) // PAGE) * PAGE


def leased_bytes(ranks: int, published: int) -> int:
    """What a group takes of each of its GPUs, from its first call on, and torch does not count among its tensors.

    Args:
        ranks: of the group.
        published: bytes of the keys and values of the rank that has most.
    """
    return bytes_of(ranks, room_of(ranks)) + flag_bytes(ranks) + shelf_size(published)


def allocate(ranks: int, device: torch.device) -> Tensor:
    """Symmetric memory for `SymmetricMemory` over so many ranks; zeros. No other rank takes part.

    Raises:
        UnavailableError: there is none, and why.
    """
    try:
        size = bytes_of(ranks, room_of(ranks)) + flag_bytes(ranks)
        memory = symmetric_memory().empty(size, dtype=torch.uint8, device=device)
        memory.zero_()
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            stream, address = torch.cuda.Stream().cuda_stream, memory.data_ptr()
            driver().copy(address + APART, address, 4, stream)  # a machine may not be able to
            driver().operate(stream, [WRITE, address, 0, BEHIND_ALL, WAIT, address, 0, EQUAL])
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


def _handle(event: torch.Event) -> int:
    """CUDA's own."""
    return event.cuda_event  # pyrefly: ignore[missing-attribute]  # a CUDA event's


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


def blocks(pairs: Sequence[tuple[int, Tensor]]) -> dict[int, list[Block]]:
    """By rank the memory of its tensors; parts of one allocation that lie one behind another are one block.

    Two allocations may lie so too, and the driver refuses a copy that goes on from one to the other.
    """
    found: dict[int, list[Block]] = {}
    last: dict[int, int] = {}
    for peer, x in pairs:
        address, nbytes = x.data_ptr(), x.numel() * x.element_size()
        if not nbytes:
            continue
        of_rank, storage = found.setdefault(peer, []), x.untyped_storage().data_ptr()
        if of_rank and sum(of_rank[-1]) == address and last[peer] == storage:
            of_rank[-1] = of_rank[-1][0], of_rank[-1][1] + nbytes
        else:
            of_rank.append((address, nbytes))
        last[peer] = storage
    return found


class _Expected(NamedTuple):
    number: int
    since: float
    what: str
    peer: int
    comes: bool

    def text(self) -> str:
        """What is waited for."""
        return f"{self.what} from rank {self.peer}" if self.comes else f"rank {self.peer} to take {self.what}"


class _Watch:
    """Ends the process when a transfer does not end: a thread that reads what the copy engines write for the host."""

    def __init__(self, rank: int, progress: Tensor, timeout: timedelta) -> None:
        self._rank, self._timeout = rank, timeout
        self._progress = progress.numpy()  # reading it asks nothing of CUDA, so it disturbs no capture of a graph
        self._expected: list[deque[tuple]] = [deque() for _ in range(len(progress))]
        self.over = threading.Event()
        """Nothing more is expected."""
        threading.Thread(target=self._look_again, daemon=True, name="ringflash transfers").start()

    def expect(self, index: int, number: int, what: str, peer: int, comes: bool) -> None:
        """Progress at `index` is to become this number, when something has come from a rank, or was taken by it."""
        self._expected[index].append((number, time.monotonic(), what, peer, comes))

    def is_waiting(self) -> bool:
        """Whether something that was expected is not there yet; for any thread."""
        last = [(index, tuple(expected)[-1:]) for index, expected in enumerate(self._expected)]
        return any(number != self._progress[index] for index, found in last for number, *_ in found)

    def wait_while_something_comes(self, patience: float) -> None:
        """Until all is there, or nothing has come for so many seconds; for any thread."""
        before, since = b"", time.monotonic()
        while self.is_waiting() and time.monotonic() - since < patience:
            now = self._progress.tobytes()
            if now != before:
                before, since = now, time.monotonic()
            time.sleep(LOOKS_EVERY / 10)

    def _look_again(self) -> None:
        while not self.over.wait(LOOKS_EVERY):
            for index, expected in enumerate(self._expected):
                self._look(int(self._progress[index]), expected)

    def _look(self, now: int, expected: deque[tuple]) -> None:
        if any(number == now for number, *_ in tuple(expected)):
            while expected.popleft()[0] != now:
                pass
        first = _Expected(*expected[0]) if expected else None
        if first is not None and time.monotonic() - first.since > self._timeout.total_seconds() + GRACE:
            print(
                f"ringflash: rank {self._rank} ends, having waited more than {self._timeout} for {first.text()}",
                file=sys.stderr,
                flush=True,
            )
            os.kill(os.getpid(), signal.SIGABRT)
