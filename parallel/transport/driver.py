"""What is asked of CUDA's driver itself: copies between GPUs, and streams that wait for numbers.

torch has neither. Its waits for a signal are kernels, which cannot start while a persistent kernel holds every SM. The
functions are those of the CUDA Driver API ("Memory Management", "Stream Memory Operations"), called as they are: a call
takes the driver 3 to 5 us, and each layer of Python around it would add to that.

Only copies between two GPUs are by copy engines. Within a GPU the driver copies by a kernel, also where it is asked for
two dimensions, for several at once or for overlap with kernels (`cuMemcpyBatchAsync`): beside attention over 32,768
tokens, each of these ended when attention did (H100, driver of CUDA 13.0).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

WAIT_UNTIL_REACHED = 0
"""CU_STREAM_WAIT_VALUE_GEQ, in a circle."""

WAIT_UNTIL_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""

WRITE_BEHIND_ALL = 0
"""CU_STREAM_WRITE_VALUE_DEFAULT: what was written before is visible to the whole system first."""


class Driver(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error.

    Attributes:
        copy: (target, source, nbytes, stream): copy bytes between addresses of any GPU, in the order of a stream.
        wait: (stream, address, number): let what is behind it in a stream wait until 4 bytes of this GPU's memory are
            this number.
        wait_from: likewise, or have passed it.
        write: (stream, address, number): write a number into 4 bytes of any GPU's memory, or of pinned memory, behind
            all that a stream was asked for.
    """

    copy: Callable[[int, int, int, int], None]
    wait: Callable[[int, int, int], None]
    wait_from: Callable[[int, int, int], None]
    write: Callable[[int, int, int], None]


@cache
def driver() -> Driver:
    """The driver of this machine. OSError if it has none."""
    library = ctypes.CDLL("libcuda.so.1")
    copy = library.cuMemcpyAsync
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    of_numbers = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    arguments = (1, "stream"), (1, "address"), (1, "number")
    wait = of_numbers(("cuStreamWaitValue32_v2", library), (*arguments, (1, "flags", WAIT_UNTIL_EQUAL)))
    wait_from = of_numbers(("cuStreamWaitValue32_v2", library), (*arguments, (1, "flags", WAIT_UNTIL_REACHED)))
    write = of_numbers(("cuStreamWriteValue32_v2", library), (*arguments, (1, "flags", WRITE_BEHIND_ALL)))
    copy.restype = _checked(library, "cuMemcpyAsync")
    wait.restype = wait_from.restype = _checked(library, "cuStreamWaitValue32")
    write.restype = _checked(library, "cuStreamWriteValue32")
    return Driver(copy, wait, wait_from, write)


def _checked(library: ctypes.CDLL, name: str) -> Callable[[int], None]:
    def check(code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            library.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed with {code}: {text.value.decode() if text.value else 'unknown'}")

    return check
