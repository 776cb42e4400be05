"""What is asked of CUDA's driver itself: copies that no SM takes part in, and streams that wait for a number in memory.

torch has neither. Its waits for a signal are kernels, which cannot start while a persistent kernel holds every SM. The
functions are those of the CUDA Driver API ("Memory Management", "Stream Memory Operations"), called as they are: a call
takes the driver 3 to 5 us, and each layer of Python around it would add to that.

Only copies between two GPUs are by copy engines. Within a GPU the driver copies by a kernel, also where it is asked for
two dimensions, for several at once or for overlap with kernels (`cuMemcpyBatchAsync`): beside
attention over 32,768 tokens, each of these ended when attention did (H100, driver of CUDA 13.0).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

WAIT_UNTIL_REACHED = 0
"""CU_STREAM_WAIT_VALUE_GEQ, in a circle."""

WAIT_UNTIL_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""

WRITE_BEHIND_ALL = 0
"""CU_STREAM_WRITE_VALUE_DEFAULT: what was written before is visible to the whole system first."""

IN_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM."""

BESIDE_KERNELS = 1
"""CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE."""

MOST_COPIES = 256
"""In one call."""

Copy = tuple[int, int, int]
"""Target and source, addresses of any GPU, and bytes."""


class Driver(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error. A stream is not the default one.

    Attributes:
        copy: (copies, stream): carry out copies in the order of a stream, among each other in any.
        wait: (stream, address, number): let what is behind it in a stream wait until 4 bytes of this GPU's memory are
            this number.
        wait_from: likewise, or have passed it.
        write: (stream, address, number): write a number into 4 bytes of any GPU's memory, or of pinned memory, behind
            all that a stream was asked for.
    """

    copy: Callable[[Sequence[Copy], int], None]
    wait: Callable[[int, int, int], None]
    wait_from: Callable[[int, int, int], None]
    write: Callable[[int, int, int], None]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; where memory lies, the driver finds out."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("target", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


@cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        OSError: it has none.
        AttributeError: it is older than 570 (CUDA 12.8).
    """
    library = ctypes.CDLL("libcuda.so.1")
    of_numbers = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    arguments = (1, "stream"), (1, "address"), (1, "number")
    wait = of_numbers(("cuStreamWaitValue32_v2", library), (*arguments, (1, "flags", WAIT_UNTIL_EQUAL)))
    wait_from = of_numbers(("cuStreamWaitValue32_v2", library), (*arguments, (1, "flags", WAIT_UNTIL_REACHED)))
    write = of_numbers(("cuStreamWriteValue32_v2", library), (*arguments, (1, "flags", WRITE_BEHIND_ALL)))
    for function in (wait, wait_from, write):
        function.restype = _checked(library, "an operation on memory in a stream")
    return Driver(_copies(library), wait, wait_from, write)


def _copies(library: ctypes.CDLL) -> Callable[[Sequence[Copy], int], None]:
    function, pointer = library.cuMemcpyBatchAsync, ctypes.c_void_p
    function.argtypes = [
        pointer,
        pointer,
        pointer,
        ctypes.c_size_t,
        pointer,
        pointer,
        ctypes.c_size_t,
        pointer,
        pointer,
    ]
    function.restype = _checked(library, "cuMemcpyBatchAsync")
    targets, sources, sizes = ((ctypes.c_uint64 * MOST_COPIES)() for _ in range(3))
    attributes = _Attributes(order=IN_STREAM_ORDER, flags=BESIDE_KERNELS)
    applies_from, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    fixed = tuple(map(ctypes.addressof, (targets, sources, sizes)))
    attributed = (*map(ctypes.addressof, (attributes, applies_from)), 1, ctypes.addressof(failed))

    def copy(copies: Sequence[Copy], stream: int, _alive: object = (attributes, applies_from, failed)) -> None:
        for first in range(0, len(copies), MOST_COPIES):
            part = copies[first : first + MOST_COPIES]
            for index, (target, source, nbytes) in enumerate(part):
                targets[index], sources[index], sizes[index] = target, source, nbytes
            function(*fixed, len(part), *attributed, stream)

    return copy


def _checked(library: ctypes.CDLL, name: str) -> Callable[[int], None]:
    def check(code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed with {code}: {text.value.decode() if text.value else 'unknown'}")

    return check
