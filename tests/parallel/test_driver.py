"""How CUDA's driver is asked for copies, played by a function of C's calling convention."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from ringflash.parallel.transport import driver
from ringflash.parallel.transport.driver import BESIDE_KERNELS, IN_STREAM_ORDER, MOST_COPIES

STREAM = 77


def _library(calls, code=0):
    pointer, size = ctypes.c_void_p, ctypes.c_size_t

    def play(targets, sources, sizes, count, attributes, applies_from, kinds, failed, stream):
        numbers = [(ctypes.c_uint64 * count).from_address(x) for x in (targets, sources, sizes)]
        asked = driver._Attributes.from_address(attributes)
        assert (asked.order, list(asked.source), list(asked.target), asked.flags) == (
            IN_STREAM_ORDER,
            [0, 0],
            [0, 0],
            BESIDE_KERNELS,
        )
        assert (kinds, ctypes.c_size_t.from_address(applies_from).value, stream) == (1, 0, STREAM)
        assert failed
        calls.append(count)
        for target, source, nbytes in zip(*numbers, strict=True):
            ctypes.memmove(target, source, nbytes)
        return code

    function = ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer)
    return SimpleNamespace(cuMemcpyBatchAsync=function(play), cuGetErrorString=lambda code, text: None)


@pytest.mark.parametrize("count", [1, MOST_COPIES, 2 * MOST_COPIES + 5])
def test_every_copy_is_asked_for_once_by_copy_engines(count):
    calls = []
    source = ctypes.create_string_buffer(bytes(i % 251 for i in range(4 * count)), 4 * count)
    target = ctypes.create_string_buffer(4 * count)
    begin, end = ctypes.addressof(target), ctypes.addressof(source)
    driver._copies(_library(calls))([(begin + 4 * i, end + 4 * i, 4) for i in range(count)], STREAM)
    assert target.raw == source.raw
    assert sum(calls) == count
    assert max(calls) <= MOST_COPIES


def test_what_the_driver_refuses_is_an_error():
    target = ctypes.create_string_buffer(4)
    copy = driver._copies(_library([], code=801))
    with pytest.raises(RuntimeError, match="cuMemcpyBatchAsync failed with 801"):
        copy([(ctypes.addressof(target), ctypes.addressof(target), 4)], STREAM)
