"""What is asked of CUDA's driver itself: copies between GPUs, and streams that wait for numbers.

torch has neither. Its waits for a signal are kernels, which cannot start while a persistent kernel holds every SM. The
functions are those of the CUDA Driver API ("Memory Management", "Stream Memory Operations"), called as they are.

A request takes the driver 3 to 8 us, whether it waits for one number or writes twelve (`cuStreamBatchMemOp`: 2.8 us for
one, 4.2 for twelve, on an H200's host). So numbers that follow each other in a stream are one request. Copies are one
each: several at once (`cuMemcpyBatchAsync`) take the host hardly less than one by one, 34 us against 46 for six.

Only copies between two GPUs are by copy engines. Within a GPU the driver copies by a kernel, also where it is asked for
two dimensions, for several at once or for overlap with kernels (`cuMemcpyBatchAsync`): beside attention over 32,768
tokens, each of these ended when attention did (H100, driver of CUDA 13.0).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from ringflash.kernels.cuda_driver import Rectangle, checked, library, memory_functions

WAIT, WRITE = 1, 2
"""CU_STREAM_MEM_OP_WAIT_VALUE_32 and CU_STREAM_MEM_OP_WRITE_VALUE_32."""

REACHED, EQUAL = 0, 1
"""CU_STREAM_WAIT_VALUE_GEQ, in a circle, and CU_STREAM_WAIT_VALUE_EQ."""

BEHIND_ALL = 0
"""CU_STREAM_WRITE_VALUE_DEFAULT: what was written before is visible to the whole system first."""

MOST_TOGETHER = 128
"""Operations of a request; the driver takes 255."""


class Driver(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error.

    Attributes:
        copy: (target, source, nbytes, stream): copy bytes between addresses of any GPU, in the order of a stream.
        copy_rows: (rectangle, stream): the same of rows that lie apart.
        operate: (stream, operations): waits and writes, in this order, four numbers each: `WAIT` or `WRITE`, address of
            4 bytes, number, and how. What is behind a wait in the stream waits until 4 bytes of this GPU's memory hold
            the number, or have reached it; a write of 4 bytes of any GPU's memory, or of pinned memory, comes behind
            all that the stream was asked for.
    """

    copy: Callable[[int, int, int, int], None]
    copy_rows: Callable[[Rectangle, int], None]
    operate: Callable[[int, list[int]], None]


class Requests:
    """What a stream is asked for in order, in as few requests as that allows.

    Nothing is sure to have been asked for before `go`.

    Args:
        driver: to ask.
        stream: whose order it is.
    """

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver, self._stream = driver, stream
        self._operations: list[int] = []

    def wait_from(self, address: int, number: int) -> None:
        """Go on when this number is there, or one behind it in a circle of 2^32."""
        self._operations += WAIT, address, number, REACHED

    def write(self, address: int, number: int) -> None:
        """Write a number."""
        self._operations += WRITE, address, number, BEHIND_ALL

    def operate(self, operations: Sequence[int]) -> None:
        """Several of these, each as `Driver.operate` takes it."""
        self._operations += operations

    def copies(self, copied: Sequence[tuple[int, int, int]]) -> None:
        """Copies of bytes: target, source and how many."""
        if copied and self._operations:
            self.go()
        copy, stream = self._driver.copy, self._stream
        for target, source, nbytes in copied:
            copy(target, source, nbytes, stream)

    def go(self) -> None:
        """Ask for what is left."""
        if self._operations:
            operations, self._operations = self._operations, []
            self._driver.operate(self._stream, operations)


@cache
def driver() -> Driver:
    """The driver of this machine. OSError if it has none."""
    pointer = ctypes.c_void_p
    batch = library().cuStreamBatchMemOp_v2
    batch.argtypes = [pointer, ctypes.c_uint, ctypes.c_char_p, ctypes.c_uint]
    batch.restype = checked("cuStreamBatchMemOp")

    def operate(stream: int, operations: list[int]) -> None:
        for first in range(0, len(operations), 4 * MOST_TOGETHER):
            some = operations[first : first + 4 * MOST_TOGETHER]
            count = len(some) // 4
            batch(stream, count, _params(count).pack(*some), 0)

    memory = memory_functions()
    return Driver(memory.copy, memory.copy_rows, operate)


@cache
def _params(count: int) -> struct.Struct:
    """So many `CUstreamBatchMemOpParams`."""
    return struct.Struct("<" + count * "QQQQ16x")
