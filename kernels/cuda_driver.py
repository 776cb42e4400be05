"""CUDA's driver library itself, for what neither torch nor Triton asks of it, or asks in a longer way.

Functions are those of the CUDA Driver API, called by ctypes as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache


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
