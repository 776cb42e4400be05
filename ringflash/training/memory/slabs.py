"""Slabs of host memory, which threads ask of the system, and page-lock, ahead of whoever takes them.

Only from page-locked memory does a GPU copy beside its work. Much of what locking takes is that the system finds pages
and clears them. torch has that done by the driver (`cudaHostAlloc`), which holds a lock meanwhile that work for the GPU
is started with, so that the GPU runs dry. Here threads touch the pages first, several at once, which keeps nobody, and
only then, one at a time, hand them to the driver (`cudaHostRegister`). torch does likewise under
`pinned_use_cuda_host_register`, but that is a setting of a whole process, and its user's.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
import warnings
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ringflash.training.memory.available import available_bytes, local_ranks

SLAB = 1 << 28
"""Bytes that are asked of the system at a time."""

THREADS = 8
"""How many ask for slabs at once, at most, and where that is no more than half of the processors."""

PATIENCE = 5.0
"""Seconds in which memory may still come: virtual machines may be given it as they use it."""


class Slabs:
    """Memory of the host for one device; ordinary memory, but otherwise the same, for a CPU.

    Args:
        device: which.
        limit: bytes that may be asked for at most.
        size: bytes of a slab; the last one may be smaller.

    Attributes:
        limit: becomes what the system has given once it refuses more.
        made: bytes that the system has given.
    """

    def __init__(self, device: torch.device, limit: int, size: int = SLAB) -> None:
        self.limit, self.made = limit, 0
        self._device, self._size = device, size
        self._changed, self._driver = threading.Condition(), threading.Lock()
        self._ready: deque[Tensor] = deque()
        self._expected = self._asked = self._given = self._running = 0
        self._error: BaseException | None = None
        self._closed = False

    def expect(self, total: int) -> None:
        """Have threads ask for slabs until there are so many bytes, given ones included; waits for nothing."""
        with self._changed:
            self._expected = max(self._expected, total)
            missing = -(-(min(self._expected, self.limit) - self._asked) // self._size)
            while self._running < min(missing, _threads()) and not self._closed:
                threading.Thread(target=self._work, name="slabs").start()
                self._running += 1

    def take(self) -> Tensor | None:
        """The next slab, (size,) uint8, once it is there; None where neither the limit nor the system allows more.

        Raises whatever else a thread ran into.
        """
        with self._changed:
            if not self._ready:
                self.expect(self._given + 1)
            while not self._ready and self._running and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            if not self._ready:
                return None
            slab = self._ready.popleft()
            self._given += slab.nbytes
            return slab

    def close(self) -> None:
        """Give back what nobody took; threads end, at the latest with the slab that they are at."""
        with self._changed:
            self._closed = True
            self._ready.clear()

    def _work(self) -> None:
        while (size := self._next()) > 0:
            slab = error = None
            try:
                slab = host_memory(size, self._device, self._driver)
            except (RuntimeError, MemoryError, OSError):
                pass  # the system has less than it said
            except BaseException as unknown:  # whoever takes slabs has to hear of it
                error = unknown
            with self._changed:
                if error is not None:
                    self._error = error
                elif slab is None:
                    self._asked -= size
                    self.limit = min(self.limit, self._asked)
                elif not self._closed:
                    self.made += size
                    self._ready.append(slab)
                self._changed.notify_all()

    def _next(self) -> int:
        """Bytes of the slab that a thread is to ask for; 0 for none: it is to end."""
        with self._changed:
            left = self._closed or self._error is not None or not threading.main_thread().is_alive()
            more = not left and self._asked < min(self._expected, self.limit)
            size = min(self._size, self.limit - self._asked) if more else 0
            self._asked += size
            if not size:
                self._running -= 1
                self._changed.notify_all()
            return size


def host_memory(size: int, device: torch.device, driver: threading.Lock) -> Tensor:
    """Memory of the host, (size,) uint8, page-locked for a GPU until nothing refers to it.

    Args:
        size: bytes; whole pages of the system.
        device: that copies from and to it.
        driver: held while the driver locks it, so that others who start work on the device wait for one slab at most.

    Raises:
        RuntimeError, MemoryError, OSError: the system refuses it.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    _await_available(local_ranks() * _threads() * size)  # others may each be at a slab, too
    memory = _Memory(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.touch()
    with driver:
        if memory.lock(device):
            return torch.frombuffer(memory, dtype=torch.uint8)
    del memory  # its pages are free again before the driver looks for its own
    warnings.warn("the driver does not lock memory of this process; it has its own, which takes longer", stacklevel=1)
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _await_available(size: int) -> None:
    """Raise MemoryError where a system has no more than that: it kills whoever touches what it does not have."""
    end = time.monotonic() + PATIENCE
    while available_bytes() < size:
        if time.monotonic() >= end:
            raise MemoryError
        time.sleep(0.1)


class _Memory(mmap.mmap):
    """Pages of this process."""

    _address = 0
    _device: torch.device | None = None

    def touch(self) -> None:
        """Have the system give all pages, without Python's lock."""
        with suppress(OSError):  # a system without them
            self.madvise(mmap.MADV_HUGEPAGE)
        self.madvise(mmap.MADV_DONTFORK)  # a child would get copies of locked pages, not share them
        for part in torch.frombuffer(self, dtype=torch.uint8)[:: mmap.PAGESIZE].split(1 << 14):  # one thread of torch's
            part.zero_()

    def lock(self, device: torch.device) -> bool:
        """Have the driver lock them, and a device reach them; whether it did."""
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        with torch.cuda.device(device):  # threads begin with the first
            refused = int(_runtime().cudaHostRegister(address, len(self), 0))
        if not refused:
            self._address, self._device = address, device
        return not refused

    def __del__(self) -> None:
        """Ahead of the system's taking them back; when a process ends, the driver sees to it."""
        if self._device is None or sys.is_finalizing():
            return
        with suppress(RuntimeError), torch.cuda.device(self._device):  # of a device that failed
            torch.cuda.synchronize()  # nothing copies any more
            _runtime().cudaHostUnregister(self._address)


def _runtime() -> Any:
    """CUDA's, whose calls here leave Python's lock to others."""
    return torch.cuda.cudart()


def _threads() -> int:
    return max(1, min(THREADS, (os.cpu_count() or 1) // (2 * local_ranks())))
