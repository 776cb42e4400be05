"""What is asked of CUDA's driver itself: copies that no SM takes part in, and streams that wait for a number in memory.

torch has neither: its copies pass through the dispatcher, at some microseconds each, and its waits for a signal are
kernels, which cannot start while a persistent kernel holds every SM. Both are functions of the CUDA Driver API ("Memory
Management", "Stream Memory Operations").
"""

from __future__ import annotations

import ctypes
from functools import cache

WAIT_UNTIL_EQUAL = 1
"""CU_STREAM_WAIT_VALUE_EQ."""

WRITE_BEHIND_ALL = 0
"""CU_STREAM_WRITE_VALUE_DEFAULT: what was written before is visible to the whole system first."""


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Copy bytes between addresses of any GPU or of pinned memory, in the order of a stream."""
    _check("cuMemcpyAsync", _driver().cuMemcpyAsync(target, source, nbytes, stream))


def write(address: int, number: int, stream: int) -> None:
    """Write a number into 4 bytes of any GPU's memory, or of pinned memory, behind all that a stream was asked for."""
    _check("cuStreamWriteValue32", _driver().cuStreamWriteValue32_v2(stream, address, number, WRITE_BEHIND_ALL))


def wait(address: int, number: int, stream: int) -> None:
    """Let what is behind it in a stream wait until 4 bytes of this GPU's memory are this number."""
    _check("cuStreamWaitValue32", _driver().cuStreamWaitValue32_v2(stream, address, number, WAIT_UNTIL_EQUAL))


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    for function in (driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2):
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return driver


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode() if text.value else "unknown"
        raise RuntimeError(f"{name} failed with {code}: {said}")
