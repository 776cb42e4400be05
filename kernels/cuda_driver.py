"""CUDA's driver library itself, for what neither torch nor Triton asks of it, or asks in a longer way.

Functions are those of the CUDA Driver API, called by ctypes as they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import NamedTuple


@cache
def library() -> ctypes.CDLL:
    """The driver of this machine. OSError if it has none."""
    return ctypes.CDLL("libcuda.so.1")


def checked(name: str) -> Callable[[int], None]:
    """A result type for functions of the library: RuntimeError with the function's name where one reports an error."""

    def check(code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            library().cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name} failed with {code}: {text.value.decode() if text.value else 'unknown'}")

    return check


class Events(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error.

    Attributes:
        record: (event, stream): the event is what the stream was asked for so far.
        wait: (stream, event): what the stream is asked for from now on waits for that.
    """

    record: Callable[[int, int], None]
    wait: Callable[[int, int], None]


@cache
def event_functions() -> Events:
    """The driver's. OSError if this machine has none."""
    record, wait_with = library().cuEventRecord, library().cuStreamWaitEvent
    record.argtypes = [ctypes.c_void_p] * 2
    wait_with.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    record.restype, wait_with.restype = checked("cuEventRecord"), checked("cuStreamWaitEvent")
    return Events(record, lambda stream, event: wait_with(stream, event, 0))


class Rectangle(NamedTuple):
    """Rows of bytes to copy.

    Attributes:
        target: address of the first row.
        target_pitch: bytes from row to row.
        source: likewise.
        source_pitch: likewise.
        width: bytes of a row.
        rows: how many.
    """

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    rows: int


class Memory(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error.

    Attributes:
        copy: (target, source, nbytes, stream): copy bytes between addresses of any GPU, in the order of a stream.
        copy_rows: (rectangle, stream): the same of rows that lie apart.
        zero: (target, nbytes, stream): fill bytes with zeros.
    """

    copy: Callable[[int, int, int, int], None]
    copy_rows: Callable[[Rectangle, int], None]
    zero: Callable[[int, int, int], None]


_COPY_2D = struct.Struct("<" + 2 * "QQI4xQQQQ" + "QQ")
"""`CUDA_MEMCPY2D`: x, y, memory type, host, device, array and pitch of the source, of the target; width, height."""

_DEVICE = 2
"""CU_MEMORYTYPE_DEVICE."""


@cache
def memory_functions() -> Memory:
    """The driver's. OSError if this machine has none."""
    pointer = ctypes.c_void_p
    copy, copy_2d, fill = library().cuMemcpyAsync, library().cuMemcpy2DAsync_v2, library().cuMemsetD8Async
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, pointer]
    copy_2d.argtypes = [ctypes.c_char_p, pointer]
    fill.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, pointer]
    for function, name in ((copy, "cuMemcpyAsync"), (copy_2d, "cuMemcpy2DAsync"), (fill, "cuMemsetD8Async")):
        function.restype = checked(name)

    def copy_rows(rectangle: Rectangle, stream: int) -> None:
        target, target_pitch, source, source_pitch, width, rows = rectangle
        of_source = 0, 0, _DEVICE, 0, source, 0, source_pitch
        copy_2d(_COPY_2D.pack(*of_source, 0, 0, _DEVICE, 0, target, 0, target_pitch, width, rows), stream)

    def zero(target: int, nbytes: int, stream: int) -> None:
        fill(target, 0, nbytes, stream)

    return Memory(copy, copy_rows, zero)
