"""A driver for Triton that stands for an H100 that is not there: kernels are compiled, and their launches noted.

Tensors lie on the CPU and are never read or written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ringflash.kernels import select
from ringflash.kernels.gpu import row_delta
from ringflash.kernels.hopper import backward as hopper_backward
from ringflash.kernels.hopper import checks as hopper_checks
from ringflash.kernels.hopper import forward as hopper_forward
from ringflash.kernels.kept import Kept
from ringflash.kernels.triton import attend as triton
from ringflash.kernels.triton.attend import backward, checks, forward

DEVICES = count(1000)
"""Triton keeps programs by device: what is compiled for a stand-in must be nobody else's."""


class StandIn:
    """What Triton asks of a driver.

    Attributes:
        device: number of the device that is not there.
        launches: arguments of each launch, beginning with the grid, the stream and the loaded program.
    """

    def __init__(self) -> None:
        self.device = next(DEVICES)
        self.launches = []
        programs = count(1)
        self.utils = SimpleNamespace(
            load_binary=lambda *binary: ("module", next(programs), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, source: object, metadata: object):
        """The launcher of a compiled program."""
        return lambda *arguments: self.launches.append(arguments)

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
def stand_in(kernels: ModuleType = triton) -> Iterator[StandIn]:
    """Triton's driver while this lasts.

    Args:
        kernels: the package that calls choose, `ringflash.kernels.triton.attend` or `ringflash.kernels.hopper`; both
            take tensors on the CPU for Hopper's.
    """

    def choice(*problem: object) -> ModuleType:
        return kernels

    found = StandIn()
    chip = {"chip_of": _hopper}
    with (
        mock.patch.object(driver, "_active", found),
        mock.patch.object(select, "_select", choice),
        mock.patch.multiple(checks, **chip),
        mock.patch.multiple(forward, **chip, prepared_calls=Kept()),
        mock.patch.multiple(row_delta, **chip, launchers=Kept()),
        mock.patch.multiple(backward, **chip, prepared_calls=Kept()),
        mock.patch.object(hopper_checks, "supports", _supported),
        mock.patch.object(hopper_checks, "runs_on", _supported),
        mock.patch.multiple(hopper_forward, multiprocessors=_multiprocessors, prepared_calls=Kept()),
        mock.patch.multiple(hopper_backward, prepared_calls=Kept()),
    ):
        yield found
