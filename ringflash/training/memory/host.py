"""Memory of the host, for what the backward pass does not need for a while.

Tensors leave the device, and come back, on a stream of their own, in pages that are never given back to the system:
page-locking takes longer than moving. So it is begun ahead, by `slabs`, as soon as somebody knows how much is to move.
Each step has other sizes, as ranks hold other numbers of tokens; pages fit all. On a CPU all of this is the same, in
ordinary memory and without streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import RingflashError
from ringflash.training.memory.slabs import SLAB, Slabs

PAGE = 1 << 22
"""Bytes of a page: large enough for a transfer to be fast, small enough that a log-sum-exp wastes little."""

assert SLAB % PAGE == 0


class HostMemory:
    """Pages of host memory, and the stream on which they are filled and emptied.

    Attributes:
        used: bytes in pages that hold something now.
        moved: bytes that were moved to the host since the beginning.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self._slabs = Slabs(device, limit // PAGE * PAGE, SLAB)
        self.device, self.used, self.moved = device, 0, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: list[Tensor] = []
        self._leaving: list[tuple[torch.Event, Tensor, int]] = []

    @property
    def limit(self) -> int:
        """Bytes that may be used at most; what the system has, once it refused more."""
        return self._slabs.limit

    @property
    def taken(self) -> int:
        """Bytes that were asked of the system."""
        return self._slabs.made

    def expect(self, pages: int) -> None:
        """Have so many pages more than are in use now, or as many as the limit allows; waits for nothing."""
        self._slabs.expect(self.used + pages * PAGE)

    def move(self, tensor: Tensor) -> Moved | None:
        """Begin to move a tensor to the host; None where its pages are not to be had.

        It stays on the device until `let_go`.
        """
        count = pages_of(tensor)
        if not self._provide(count):
            return None
        pages = [self._free.pop() for _ in range(count)]
        self.used += count * PAGE
        self.moved += tensor.nbytes
        source = tensor.detach().contiguous()
        if self.stream is None:
            _copy(_bytes(source), pages, to_pages=True)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                _copy(_bytes(source), pages, to_pages=True)
                self._leaving.append((self.stream.record_event(), source, source._version))
        return Moved(self, source, pages)

    def let_go(self) -> None:
        """Free the device's memory of all that has begun to move; later work on the device waits until it has."""
        for moved, source, version in self._leaving:
            _check_unchanged(source, version)
            torch.cuda.current_stream(self.device).wait_event(moved)
        self._leaving.clear()

    def take_back(self, pages: list[Tensor]) -> None:
        """Have pages free again; whatever fills them next does so on the same stream that emptied them."""
        self._free += pages
        self.used -= len(pages) * PAGE

    def __del__(self) -> None:
        """Nobody moves anything any more."""
        self._slabs.close()

    def _provide(self, count: int) -> bool:
        """Whether that many pages are free, after asking the system for more if the limit allows."""
        if self.used + count * PAGE > self.limit:
            return False
        if len(self._free) < count:
            self.expect(count)
        while len(self._free) < count:
            slab = self._slabs.take()
            if slab is None:
                return False
            self._free += slab.split(PAGE)
        return True


class Moved:
    """A tensor in host memory."""

    def __init__(self, host: HostMemory, source: Tensor, pages: list[Tensor]) -> None:
        self._host, self._pages = host, pages
        self._shape, self._dtype, self.nbytes = source.shape, source.dtype, source.nbytes
        self._there: Tensor | None = None
        self._arrived: torch.Event | None = None

    def fetch(self, again: bool = False) -> None:
        """Begin to bring it back.

        Args:
            again: it stays in host memory, too, from where it is to be brought back again.
        """
        if self._there is not None:
            return
        host = self._host
        self._there = torch.empty(self._shape, dtype=self._dtype, device=host.device)
        if host.stream is None:
            _copy(_bytes(self._there), self._pages, to_pages=False)
        else:
            host.stream.wait_stream(torch.cuda.current_stream(host.device))  # its memory was something else's
            with torch.cuda.stream(host.stream):
                _copy(_bytes(self._there), self._pages, to_pages=False)
                self._arrived = host.stream.record_event()
        if not again:
            self.release()

    def get(self) -> Tensor:
        """The tensor, on the device."""
        self.fetch()
        if self._arrived is not None:
            torch.cuda.current_stream(self._host.device).wait_event(self._arrived)
            self._arrived = None
        found = self._there
        assert found is not None
        if self._pages:  # where it still is
            self._there = None
        return found.detach()

    def release(self) -> None:
        """Give its pages back."""
        self._host.take_back(self._pages)
        self._pages = []

    def __del__(self) -> None:
        """Of a pass that ended before its backward pass, pages and what is under way are left."""
        if self._arrived is not None:
            torch.cuda.current_stream(self._host.device).wait_event(self._arrived)
        self.release()


class Kept:
    """A tensor that stays on the device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor.detach(), tensor._version

    def fetch(self, again: bool = False) -> None:
        """Nothing: it is there."""

    def get(self) -> Tensor:
        """The tensor."""
        _check_unchanged(self._tensor, self._version)
        return self._tensor.detach()


Handle = Kept | Moved
"""A tensor that is kept somewhere."""


def store(tensor: Tensor, host: HostMemory | None) -> Handle:
    """Keep a tensor: in host memory if there is room, else on the device."""
    return (None if host is None else host.move(tensor)) or Kept(tensor)


def pages_of(tensor: Tensor) -> int:
    """How many pages it takes."""
    return -(-tensor.nbytes // PAGE)


def twice() -> RingflashError:
    """What was kept for a backward pass is gone."""
    return RingflashError("the backward pass of a block ran twice; engine.memory=keep allows that")


def _check_unchanged(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RingflashError(
            "a model changes the input or the attention of its blocks in place, which its backward pass wants as they "
            "were; engine.memory=keep allows that"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _copy(tensor: Tensor, pages: list[Tensor], to_pages: bool) -> None:
    for number, page in enumerate(pages):
        part = tensor[number * PAGE : (number + 1) * PAGE]
        source, target = (part, page[: len(part)]) if to_pages else (page[: len(part)], part)
        target.copy_(source, non_blocking=True)
