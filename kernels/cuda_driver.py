"""CUDA's driver library itself, for what neither torch nor Triton asks of it, or asks in a longer way.

Functions are those of the CUDA Driver API, called by ctypes as they are.
"""

from __future__ import annotations

import ctypes
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


class Memory(NamedTuple):
    """Functions that raise RuntimeError where the driver reports an error.

    Attributes:
        copy: (target, source, nbytes, stream): copy bytes between addresses of any GPU, in the order of a stream.
        zero: (target, nbytes, stream): fill bytes with zeros.
    """

    copy: Callable[[int, int, int, int], None]
    zero: Callable[[int, int, int], None]


@cache
def memory_functions() -> Memory:
    """The driver's. OSError if this machine has none."""
    copy, fill = library().cuMemcpyAsync, library().cuMemsetD8Async
    copy.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    fill.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, ctypes.c_size_t, ctypes.c_void_p]
    copy.restype, fill.restype = checked("cuMemcpyAsync"), checked("cuMemsetD8Async")

    def zero(target: int, nbytes: int, stream: int) -> None:
        fill(target, 0, nbytes, stream)

    return Memory(copy, zero)
