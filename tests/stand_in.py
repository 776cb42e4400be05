"""A driver for Triton that stands for an H100 that is not there: kernels are compiled, and their launches noted.

Tensors lie on the CPU and are never read or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ringflash.kernels import select
from ringflash.kernels.gpu import add_rows, block_lists, direct_launch, lay_rows, round_numbers, row_delta
from ringflash.kernels.hopper import backward as hopper_backward
from ringflash.kernels.hopper import checks as hopper_checks
from ringflash.kernels.hopper import forward as hopper_forward
from ringflash.kernels.hopper import narrow, widest
from ringflash.kernels.kept import Kept
from ringflash.kernels.triton import attend as triton
from ringflash.kernels.triton.attend import backward, checks, forward

DEVICES = count(1000)
"""Triton keeps programs by device: what is compiled for a stand-in must be nobody else's."""


class CudaLauncher:
    """Triton's launcher of a compiled program, in which nothing is out of the ordinary.

    Args:
        launches: where each launch is noted.
    """

    def __init__(self, launches: list) -> None:
        self.launch = launches
        vars(self).update(direct_launch.PLAIN)

    def __call__(self, *arguments: object) -> None:
        self.launch.append(arguments)


class Launched(NamedTuple):
    """A launch by CUDA's driver itself.

    Attributes:
        function: the loaded program.
        grid: how many programs.
        stream: in whose order.
        parameters: address of an array of their addresses.
        maps: (address, what it is of) by the address of each tensor map.
    """

    function: int
    grid: tuple[int, ...]
    stream: int
    parameters: int
    maps: dict[int, tuple[int, direct_launch.TensorMap]]


class StandIn:
    """What Triton asks of a driver, and what is asked of CUDA's own.

    Attributes:
        device: number of the device that is not there.
        launches: of each launch by Triton the arguments, beginning with the grid, the stream and the loaded program; of
            each by CUDA's driver what it was.
    """

    def __init__(self) -> None:
        self.device = next(DEVICES)
        self.launches = []
        programs = count(1)
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: ("module", next(programs), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

        self.maps = {}

    def launcher_cls(self, source: object, metadata: object) -> CudaLauncher:
        """The launcher of a compiled program."""
        return CudaLauncher(self)

    def append(self, launch: object) -> None:
        """Note a launch."""
        self.launches.append(launch)

    def functions(self) -> direct_launch.Functions:
        """What is asked of CUDA's driver."""
        return direct_launch.Functions(self._launch, self._encode, self._move)

    def _launch(self, config: int, function: int, parameters: int, _: None) -> None:
        of = direct_launch.Config.from_address(config)
        self.append(Launched(function, tuple(of.grid), of.stream or 0, parameters, dict(self.maps)))

    def _encode(self, place: int, dtype: int, rank: int, address: int, *arrays_and_numbers: object) -> None:
        shape, strides, block, _, _, swizzle, _, fill = arrays_and_numbers
        of = direct_launch.TensorMap(dtype, (*shape,), (*strides,)[: rank - 1], (*block,), swizzle, fill)
        self.maps[place] = address, of

    def _move(self, place: int, address: int) -> None:
        self.maps[place] = address, self.maps[place][1]

    def get_current_device(self) -> int:
        """See `device`."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 90, 32)


def _hopper(device: torch.device) -> str:
    return "hopper"


def _supported(*problem: object) -> None:
    return None


def _multiprocessors(device: torch.device) -> int:
    return 132


@contextmanager
def stand_in(kernels: ModuleType = triton, by_driver: bool = True) -> Iterator[StandIn]:
    """Triton's driver while this lasts.

    Args:
        kernels: the package that calls choose, `ringflash.kernels.triton.attend` or `ringflash.kernels.hopper`; both
            take tensors on the CPU for Hopper's.
        by_driver: whether repeated launches are made by CUDA's driver itself; by Triton otherwise.
    """

    def choice(*problem: object) -> ModuleType:
        return kernels

    found = StandIn()
    no_functions = mock.Mock(side_effect=OSError)
    chip = {"chip_of": _hopper}
    with (
        mock.patch.object(driver, "_active", found),
        mock.patch.object(direct_launch, "functions", found.functions if by_driver else no_functions),
        mock.patch.object(select, "_select", choice),
        mock.patch.multiple(checks, **chip),
        mock.patch.multiple(forward, **chip, prepared_calls=Kept()),
        mock.patch.multiple(row_delta, **chip, launchers=Kept()),
        mock.patch.multiple(backward, **chip, prepared_calls=Kept()),
        mock.patch.object(hopper_checks, "supports", _supported),
        mock.patch.object(hopper_checks, "runs_on", _supported),
        mock.patch.multiple(hopper_forward, multiprocessors=_multiprocessors, prepared_calls=Kept()),
        mock.patch.multiple(hopper_backward, prepared_calls=Kept()),
        mock.patch.multiple(widest, prepared_calls=Kept()),
        mock.patch.multiple(add_rows, launchers=Kept()),
        mock.patch.multiple(lay_rows, launchers=Kept()),
        mock.patch.multiple(round_numbers, launchers=Kept()),
        mock.patch.multiple(block_lists, _kept=Kept()),
        mock.patch.multiple(narrow, prepared_forwards=Kept(), prepared_backwards=Kept()),
    ):
        yield found
