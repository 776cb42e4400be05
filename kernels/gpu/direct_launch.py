"""Launches of compiled kernels by CUDA's driver itself, with arguments that have been laid out once.

What Triton does for a launch, beside asking the driver, takes 10 to 30 us of host time: for each tensor it asks the
driver whether the address is one of a GPU, for each descriptor it encodes a tensor map, and it calls hooks. Where
launches differ in addresses only, these are all there is to do anew: they are written where the driver reads them, and
a tensor map that has been encoded once is told another one (`cuTensorMapReplaceAddress`).

The order of a kernel's parameters and how tensor maps are encoded is Triton's own affair (`CudaLauncher`). Where it
does anything that is not known here, launches are left to it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs

from ringflash.kernels.cuda_driver import checked, library
from ringflash.kernels.requests import cannot_repeat, of_thread

NUMBERS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}
"""How numbers lie among parameters, by Triton's names of their types; others are left to Triton."""

ALIGNED = 128
"""Bytes. A tensor map takes as many, at multiples of 64; every other parameter takes up to 8."""

KNOWN = {
    "arg_annotations", "global_scratch_align", "global_scratch_size", "gsan_enabled", "kernel_signature", "launch",
    "launch_cooperative_grid", "launch_pdl", "num_ctas", "profile_scratch_align", "profile_scratch_size",
}  # fmt: skip
"""Attributes of Triton's launchers whose meaning is known here."""

PLAIN = {
    "global_scratch_size": 0, "gsan_enabled": False, "launch_cooperative_grid": False, "launch_pdl": False,
    "num_ctas": 1, "profile_scratch_size": 0,
}  # fmt: skip
"""What they are for launches that are made here."""


class Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    ]  # fmt: skip


class TensorMap(NamedTuple):
    """What a tensor map is encoded of, beside its address.

    Attributes:
        dtype: `CUtensorMapDataType`.
        shape: innermost dimension first; so are the others.
        strides: bytes from one to the next in all dimensions but the innermost.
        block: sizes of a block.
        swizzle: `CUtensorMapSwizzle`.
        fill: `CUtensorMapFloatOOBfill`.
    """

    dtype: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    swizzle: int
    fill: int


class Parameters(NamedTuple):
    """A kernel's parameters in order.

    Attributes:
        pointers: for each parameter that is an address: which parameter, and which of the launch's arguments.
        maps: for each that is a tensor map: the same, and what it is of.
        numbers: for each other: which parameter, and its bytes.
        count: of all.
    """

    pointers: list[tuple[int, int]]
    maps: list[tuple[int, int, TensorMap]]
    numbers: list[tuple[int, bytes]]
    count: int


def flat(arguments: Sequence[Any]) -> list[Any]:
    """Arguments of a launch with what tuples hold in their place."""
    return [y for x in arguments for y in (flat(x) if isinstance(x, tuple) else (x,))]


def leaves(types: Sequence[Any], arguments: Sequence[Any], first: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Place among `flat` arguments, type, and argument; a constant may be a tuple, and has one type."""
    for kind, x in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from leaves(kind, x, first)
        else:
            yield first, kind, x
        first += len(flat((x,)))


def parameters(types: Sequence[Any], arguments: Sequence[Any], maps: Sequence[Any]) -> Parameters | None:
    """What Triton makes parameters of; None where it is not known how.

    Args:
        types: of the kernel's signature.
        arguments: of one launch, descriptors in place of the tensors that they describe.
        maps: for each descriptor what Triton's compiler says of it.
    """
    found, rest = Parameters([], [], [], 0), iter(maps)
    place = 0
    for index, kind, x in leaves(types, arguments):
        if kind == "constexpr":
            continue
        if kind.startswith("*") and (x is None or isinstance(x, Tensor)):
            if x is None:
                found.numbers.append((place, bytes(8)))
            else:
                found.pointers.append((place, index))
        elif kind.startswith("tensordesc"):
            of_map = tensor_map(x, next(rest, None))
            if of_map is None:
                return None
            found.maps.append((place, index, of_map))
            for number in (*[struct.pack("<i", n) for n in x.shape], *[struct.pack("<q", n) for n in x.strides]):
                place += 1
                found.numbers.append((place, number))
        elif kind in NUMBERS and isinstance(x, (int, float)):
            found.numbers.append((place, struct.pack(NUMBERS[kind], x)))
        else:
            return None
        place += 1
    scratch = [(place, bytes(8)), (place + 1, bytes(8))]  # addresses of memory that plain launches have none of
    return found._replace(numbers=found.numbers + scratch, count=place + 2)


def tensor_map(x: Any, compiled: dict[str, Any] | None) -> TensorMap | None:
    """What a descriptor's tensor map is of, as Triton's launchers encode it; None where it is not known how."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    if compiled is None or compiled["fp4_padded"] or compiled.get("is_im2col") or x.strides[-1] != 1:
        return None
    if getattr(x, "round_f32_to_tf32", False):
        return None
    return TensorMap(
        dtype=TMA_DTYPE_DEVICE_TO_HOST[compiled["elem_type"]],
        shape=tuple(reversed(x.shape)),
        strides=tuple(stride * compiled["elem_size"] for stride in reversed(x.strides[:-1])),
        block=tuple(reversed(compiled["block_size"])),
        swizzle=compiled["swizzle"],
        fill=1 if x.padding == "nan" else 0,
    )


class Functions(NamedTuple):
    """Of the driver.

    Attributes:
        launch: (config, kernel, parameters, nothing).
        encode: `cuTensorMapEncodeTiled`.
        move: (tensor map, address).
    """

    launch: Callable[..., None]
    encode: Callable[..., None]
    move: Callable[[int, int], None]


@cache
def functions() -> Functions:
    """The driver's. AttributeError where it is too old to have one."""
    cuda, pointer = library(), ctypes.c_void_p
    launch, encode, move = cuda.cuLaunchKernelEx, cuda.cuTensorMapEncodeTiled, cuda.cuTensorMapReplaceAddress
    launch.argtypes = [pointer] * 4
    encode.argtypes = [pointer, ctypes.c_int, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer]
    encode.argtypes += [ctypes.c_int] * 4
    move.argtypes = [pointer, pointer]
    for function in (launch, encode, move):
        function.restype = checked(function.__name__)
    return Functions(launch, encode, move)


class Laid:
    """A kernel's parameters in memory, of one thread: the driver reads them while another thread may be launching.

    Args:
        of: what they are.
        arguments: of a launch, tensors where they have descriptors.
    """

    def __init__(self, of: Parameters, arguments: Sequence[Any], driver: Functions) -> None:
        self._driver = driver
        size = 8 * of.count + ALIGNED * (1 + len(of.maps))
        self._memory = ctypes.create_string_buffer(size)
        begin = ctypes.addressof(self._memory)
        self._places = (ctypes.c_void_p * of.count)()
        self.address = ctypes.addressof(self._places)
        """Of the addresses of all parameters, as the driver wants it."""
        self.pointers = (ctypes.c_uint64 * len(of.pointers)).from_buffer(self._memory)
        """The parameters that are addresses."""
        others = begin + 8 * len(of.pointers)
        for number, (place, _) in enumerate(of.pointers):
            self._places[place] = begin + 8 * number
        for number, (place, value) in enumerate(of.numbers):
            self._places[place] = others + 8 * number
            ctypes.memmove(others + 8 * number, value, len(value))
        end = others + 8 * len(of.numbers)
        first = -(-end // ALIGNED) * ALIGNED
        self.maps: list[list[int]] = []
        """Of each tensor map which argument it is of, where it is and the address that it has."""
        for number, (place, index, x) in enumerate(of.maps):
            self._places[place] = first + ALIGNED * number
            self.maps.append([index, first + ALIGNED * number, arguments[index].data_ptr()])
            self._encode(x, *self.maps[-1][1:])

    def _encode(self, x: TensorMap, place: int, address: int) -> None:
        rank = len(x.shape)
        arrays = (ctypes.c_uint64 * rank)(*x.shape), (ctypes.c_uint64 * rank)(*x.strides)
        sizes = (ctypes.c_uint32 * rank)(*x.block), (ctypes.c_uint32 * rank)(*[1] * rank)
        interleave_none, promotion_128_bytes = 0, 2
        numbers = interleave_none, x.swizzle, promotion_128_bytes, x.fill
        self._driver.encode(place, x.dtype, rank, address, *arrays, *sizes, *numbers)


class DirectLaunch:
    """Launches one compiled kernel for arguments that differ from those of an earlier launch in addresses only.

    Args:
        function: the driver's handle of the kernel.
        config: of the launch.
        of: the kernel's parameters.
        driver: its functions.
    """

    def __init__(
        self, function: int, config: tuple[tuple[int, ...], int, int], of: Parameters, driver: Functions
    ) -> None:
        self._function, self._config, self._of, self._driver = function, config, of, driver
        pointers = [index for _, index in of.pointers]
        self._pointed = itemgetter(*pointers) if len(pointers) > 1 else lambda x: [x[i] for i in pointers]
        self.reach = 1 + max([*pointers, *(index for _, index, _ in of.maps)], default=-1)
        """How many of the arguments a launch needs, from the first on."""
        self._of_thread = threading.local()

    def __call__(self, stream: int, arguments: Sequence[Any]) -> bool:
        """Launch; False for a thread's first launch, which is left to Triton: it makes sure of the thread's context.

        Args:
            stream: in whose order.
            arguments: `flat`, tensors where they have descriptors; `reach` of them or more.
        """
        try:
            config, laid, config_address = self._of_thread.ready
        except AttributeError:
            self.prepare(arguments)
            return False
        laid.pointers[:] = list(map(Tensor.data_ptr, self._pointed(arguments)))
        for found in laid.maps:
            index, place, before = found
            address = arguments[index].data_ptr()
            if address != before:
                self._driver.move(place, address)
                found[2] = address
        config.stream = stream
        self._driver.launch(config_address, self._function, laid.address, None)
        who = of_thread.noting
        if who is not None:
            moved = [arguments[index] for index, *_ in laid.maps]
            who.launched(self, arguments, [x.data_ptr() for x in (*self._pointed(arguments), *moved)], stream)
        return True

    def at(self, stream: int, addresses: Sequence[int]) -> bool:
        """The same for addresses of all tensors, in their order, where there are no descriptors."""
        ready = getattr(self._of_thread, "ready", None)
        if ready is None or len(addresses) != len(ready[1].pointers):
            return False
        config, laid, config_address = ready
        laid.pointers[:] = addresses
        config.stream = stream
        self._driver.launch(config_address, self._function, laid.address, None)
        who = of_thread.noting
        if who is not None:
            who.launched(self, (), addresses, stream)
        return True

    def again(self, arguments: Sequence[Any], stream: int) -> Callable[[list[int]], None]:
        """A function that launches like this one: of addresses, first of pointers and then of what has tensor maps.

        Not for two threads at once.

        Args:
            arguments: of an earlier launch; none where there are no descriptors.
            stream: in whose order.
        """
        config, laid = self._config_for(stream), Laid(self._of, arguments, self._driver)
        pointers, maps, count = laid.pointers, laid.maps, len(laid.pointers)
        launch, move, function = self._driver.launch, self._driver.move, self._function
        config_address, parameters_address = ctypes.addressof(config), laid.address

        def launch_again(addresses: list[int], _: object = (config, laid)) -> None:
            if maps:
                for found, address in zip(maps, addresses[count:], strict=True):
                    if address != found[2]:
                        move(found[1], address)
                        found[2] = address
                del addresses[count:]
            pointers[:] = addresses
            launch(config_address, function, parameters_address, None)

        return launch_again

    def _config_for(self, stream: int | None) -> Config:
        grid, threads, shared = self._config
        return Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared, stream, None, 0)

    def prepare(self, arguments: Sequence[Any]) -> None:
        """Be ready for launches of this thread, which has launched by Triton, or is about to; arguments as there."""
        config = self._config_for(None)
        self._of_thread.ready = config, Laid(self._of, arguments, self._driver), ctypes.addressof(config)


def direct_launch(compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> DirectLaunch | None:
    """Launches of a kernel that Triton has launched; None where that is left to Triton.

    Args:
        compiled: the kernel.
        grid: how many programs.
        arguments: of the launch, constants included, as Triton was given them.
    """
    run = compiled.run
    if type(run).__name__ != "CudaLauncher" or not vars(run).keys() <= KNOWN:
        return None
    if any(getattr(run, name, value) != value for name, value in PLAIN.items()):
        return None
    warps, _, shared = compiled.packed_metadata
    types = list(compiled.src.signature.values())
    of = parameters(types, arguments, getattr(compiled.metadata, "tensordesc_meta", None) or ())
    if of is None:
        return None
    try:
        return DirectLaunch(compiled.function, (grid, 32 * warps, shared), of, functions())
    except (OSError, AttributeError):
        return None


def hooked() -> bool:
    """Whether somebody else wants to hear of launches, as profilers do; Triton tells them."""
    before, behind = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    calls = getattr(before, "calls", before)
    return bool((calls and calls != [told]) or getattr(behind, "calls", behind))


BY_TRITON = "a launch by Triton"


def told(metadata: object) -> None:
    """What Triton calls at its launches while somebody notes what is asked for."""
    cannot_repeat(BY_TRITON)


class _Listeners:
    """How many threads note what is asked for: the last one to end takes the hook away, which is there once."""

    lock, count = threading.Lock(), 0


@contextmanager
def listening() -> Generator[bool]:
    """Within a `with` this thread's `cannot_repeat` is called at launches by Triton; whether it has hooks that can."""
    hook = knobs.runtime.launch_enter_hook
    if not hasattr(hook, "add"):  # as before there were several
        yield False
        return
    with _Listeners.lock:
        _Listeners.count += 1
        hook.add(told)
    try:
        yield True
    finally:
        with _Listeners.lock:
            _Listeners.count -= 1
            if not _Listeners.count:
                hook.remove(told)
