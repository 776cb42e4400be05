"""What CUDA's driver is handed: structures as its header has them, and no more requests than it takes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator
from itertools import zip_longest
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringflash.kernels import cuda_driver
from ringflash.parallel.transport import driver as transport_driver
from ringflash.parallel.transport.driver import (
    BEHIND_ALL,
    EQUAL,
    MOST_TOGETHER,
    REACHED,
    WAIT,
    WRITE,
    Rectangle,
    Requests,
)

STREAM = 77


class Library:
    """Functions of the driver, by name, with what they were handed."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.fails = 0
        for name, read in READ.items():
            setattr(self, name, self._function(name, read))

    def _function(self, name: str, read: Callable) -> object:
        def call(*arguments: object) -> None:
            self.asked.append((name, *read(*arguments)))
            function.restype(self.fails)

        function = mock.Mock(side_effect=call)
        function.__name__ = name
        return function


def _operations(stream: int, count: int, params: bytes, flags: int) -> tuple:
    """`CUstreamBatchMemOpParams`: 48 bytes each, a union of operations; operation, address, value and flags."""
    assert flags == 0
    assert len(params) == 48 * count <= 48 * 255
    assert all(set(params[first + 32 : first + 48]) == {0} for first in range(0, len(params), 48))
    return stream, [
        (*struct.unpack_from("<I4xQ", params, first), *struct.unpack_from("<QI", params, first + 16))
        for first in range(0, len(params), 48)
    ]


def _copy_2d(address: int, stream: int) -> tuple:
    """`CUDA_MEMCPY2D`: x, y, memory type, host, device, array and pitch of the source, of the target; width, height."""
    there = struct.unpack("<" + 2 * "QQI4xQQQQ" + "QQ", ctypes.string_at(address, 128))
    device = 2
    assert there[:4] == there[7:11] == (0, 0, device, 0)
    assert there[5] == there[12] == 0
    return stream, Rectangle(there[11], there[13], there[4], there[6], *there[14:])


READ = {
    "cuMemcpyAsync": lambda *arguments: arguments,
    "cuMemsetD8Async": lambda *arguments: arguments,
    "cuEventRecord": lambda *arguments: arguments,
    "cuStreamWaitEvent": lambda *arguments: arguments,
    "cuMemcpy2DAsync_v2": _copy_2d,
    "cuStreamBatchMemOp_v2": _operations,
}


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    found = Library()
    found.cuGetErrorString = lambda code, text: None
    with (
        mock.patch.object(transport_driver, "library", return_value=found),
        mock.patch.object(cuda_driver, "library", return_value=found),
    ):
        for cached in (transport_driver.driver, cuda_driver.memory_functions, cuda_driver.event_functions):
            cached.cache_clear()
        yield found
    for cached in (transport_driver.driver, cuda_driver.memory_functions, cuda_driver.event_functions):
        cached.cache_clear()


requests = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["wait_from", "write"]), st.integers(0, 2**60), st.integers(0, 2**32 - 1)),
        st.tuples(
            st.just("operate"),
            st.lists(st.integers(0, 2**60), max_size=3).map(lambda x: [y for a in x for y in (WAIT, a, 7, EQUAL)]),
        ),
        st.tuples(
            st.just("copies"),
            st.lists(st.tuples(st.integers(0, 2**60), st.integers(0, 2**60), st.integers(1, 2**40)), max_size=3),
        ),
    ),
    max_size=30,
)


@given(asked=requests, times=st.sampled_from([1, 40]))
def test_a_stream_is_asked_for_everything_in_order_numbers_together(library: Library, asked: list, times: int) -> None:
    library.asked = []
    stream = Requests(transport_driver.driver(), STREAM)
    for name, *arguments in times * asked:
        getattr(stream, name)(*arguments)
    stream.go()
    stream.go()
    found, expected = [], []
    for name, *arguments in library.asked:
        if name == "cuStreamBatchMemOp_v2":
            where, operations = arguments
            kinds = {(WAIT, EQUAL): "wait", (WAIT, REACHED): "wait_from", (WRITE, BEHIND_ALL): "write"}
            found += [(kinds[kind, how], address, number) for kind, address, number, how in operations]
        else:
            *copied, where = arguments
            found.append(("copy", *copied))
        assert where == STREAM
    for name, *arguments in times * asked:
        if name == "operate":
            expected += [("wait", address, 7) for address in arguments[0][1::4]]
        elif name == "copies":
            expected += [("copy", *copied) for copied in arguments[0]]
        else:
            expected.append((name, *arguments))
    assert found == expected
    batches = [len(x[2]) for x in library.asked if x[0] == "cuStreamBatchMemOp_v2"]
    assert all(size <= MOST_TOGETHER for size in batches)
    numbers = [x[0].startswith("w") for x in found]
    runs = sum(here and not behind for here, behind in zip_longest(numbers, numbers[1:]))
    assert len(batches) <= runs + sum(batches) // MOST_TOGETHER


@given(rectangle=st.builds(Rectangle, *[st.integers(1, 2**40)] * 6))
def test_rows_of_bytes_are_copied_in_the_order_of_a_stream(library: Library, rectangle: Rectangle) -> None:
    library.asked = []
    transport_driver.driver().copy_rows(rectangle, STREAM)
    assert library.asked == [("cuMemcpy2DAsync_v2", STREAM, rectangle)]


def test_memory_is_filled_with_zeros_in_the_order_of_a_stream(library: Library) -> None:
    library.asked = []
    cuda_driver.memory_functions().zero(1 << 40, 4096, STREAM)
    assert library.asked == [("cuMemsetD8Async", 1 << 40, 0, 4096, STREAM)]


def test_events_are_recorded_and_waited_for(library: Library) -> None:
    library.asked = []
    cuda_driver.event_functions().record(8, STREAM)
    cuda_driver.event_functions().wait(STREAM, 8)
    assert library.asked == [("cuEventRecord", 8, STREAM), ("cuStreamWaitEvent", STREAM, 8, 0)]


def test_what_the_driver_refuses_is_an_error_by_name(library: Library) -> None:
    stream = Requests(transport_driver.driver(), STREAM)
    with mock.patch.object(library, "fails", 700):
        stream.write(1, 2)
        with pytest.raises(RuntimeError, match="cuStreamBatchMemOp failed with 700"):
            stream.go()
        with pytest.raises(RuntimeError, match="cuMemcpyAsync failed with 700"):
            stream.copies([(1, 2, 3)])
