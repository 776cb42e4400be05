"""Kernels whose types, grid and numbers are settled once, so that a repeated launch pays for its tensors only.

Triton's own `kernel[grid](...)` finds out on every call what type each argument has and which compiled kernel that
makes: 20 to 40 us of host time for kernels of 30 arguments, which is longer than attention over 1,024 tokens runs. For
arguments of the same types it is the same one, so a `Launcher` keeps the one that its first call has compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from ringflash.kernels.gpu.direct_launch import BY_TRITON, DirectLaunch, direct_launch, flat, hooked
from ringflash.kernels.requests import cannot_repeat

ALIGNMENT = 16
"""Bytes. Triton compiles another kernel for addresses that are no multiple of it."""


def aligned(*tensors: Tensor | None) -> bool:
    """Whether Triton takes the addresses of all tensors to be multiples of `ALIGNMENT`, as a `Launcher` wants."""
    address = 0
    for x in tensors:
        if x is not None:
            address |= x.data_ptr()
    return address % ALIGNMENT == 0


class Description(NamedTuple):
    """All that a descriptor holds but the tensor.

    Attributes:
        kind: class of the descriptor.
        attributes: its attributes, which have been checked.
    """

    kind: type
    attributes: dict[str, object]


def description_of(found: Any) -> Description:
    """What other tensors with the metadata of a descriptor's are described with, see `descriptor_of`."""
    return Description(type(found), {**vars(found), "base": None})


def descriptor_of(x: Tensor, description: Description) -> Any:
    """A tensor's descriptor, from a description that has been checked. It holds an address: each call makes its own."""
    found = object.__new__(description.kind)
    found.__dict__.update(description.attributes, base=x)
    return found


class Launcher:
    """Launches one kernel, with everything given but the tensors.

    Args:
        programs: how many.
        numbers: the arguments between the tensors and the compile-time constants; tuples of tensors may follow them,
            see `__call__`.
        constants: compile-time constants.
        options: what the compiler is told.
        direct: whether tensors will be `aligned`, so that one compiled kernel serves all calls.
        descriptions: of the first of the tensors, by which those are handed over as descriptors; None for pointers.
    """

    __slots__ = (
        "_by_driver", "_compiled", "_constants", "_descriptions", "_device", "_direct", "_grid", "_kernel", "_numbers",
        "_options",
    )  # fmt: skip

    def __init__(
        self,
        programs: int,
        numbers: tuple,
        constants: Mapping[str, object],
        options: Mapping[str, object],
        direct: bool,
        descriptions: Sequence[Description | None] = (),
    ) -> None:
        self._direct = direct
        self._descriptions = [(index, x) for index, x in enumerate(descriptions) if x is not None]
        self._by_driver: DirectLaunch | None = None
        self._grid = (programs, 1, 1)
        self._numbers = numbers
        self._constants = dict(constants)
        self._options = dict(options)
        self._kernel: Any = None
        self._compiled: Any = None
        self._device: Any = None

    def __call__(self, kernel: Any, tensors: tuple, *rest: tuple) -> None:
        """Launch on the current device and stream.

        Args:
            kernel: the same one in every call.
            tensors: the first arguments: tensors, descriptors or None, each with the same metadata in every call; or
                numbers, the same in every call.
            rest: what follows the numbers.
        """
        # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
        if self._kernel is kernel and self._device == (device := driver.active.get_current_device()):
            by_driver = self._by_driver
            if by_driver is not None and not hooked():
                arguments = tensors if by_driver.reach <= len(tensors) else flat((*tensors, *self._numbers, *rest))
                # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
                if by_driver(driver.active.get_current_stream(device), arguments):
                    return
            cannot_repeat(BY_TRITON)
            self._compiled[self._grid](*self._described(tensors), *self._numbers, *rest, *self._constants.values())
            return
        cannot_repeat(BY_TRITON)
        arguments = (*self._described(tensors), *self._numbers, *rest)
        compiled = kernel[self._grid[:1]](*arguments, **self._constants, **self._options)
        if self._direct and isinstance(compiled, CompiledKernel):  # the interpreter returns none
            last = kernel.params[len(arguments) :]  # with those left to their defaults: the launcher counts
            self._constants = {x.name: self._constants.get(x.name, x.default) for x in last}
            self._by_driver = direct_launch(compiled, self._grid, (*arguments, *self._constants.values()))
            if self._by_driver is not None:
                self._by_driver.prepare(flat((*tensors, *self._numbers, *rest)))
            # The kernel last: another thread may be looking.
            # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
            self._compiled, self._device, self._kernel = compiled, driver.active.get_current_device(), kernel

    def at(self, kernel: Any, addresses: Sequence[int]) -> bool:
        """Launch like an earlier call, which had no descriptors, with other addresses of its tensors.

        Returns:
            Whether that can be: not before there was a call.
        """
        by_driver = self._by_driver
        if by_driver is None or self._kernel is not kernel or hooked():
            return False
        # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
        device = driver.active.get_current_device()
        # pyrefly: ignore[missing-attribute]  # stub: a GPU's driver has it
        return self._device == device and by_driver.at(driver.active.get_current_stream(device), addresses)

    def _described(self, tensors: tuple) -> list:
        found = list(tensors)
        for index, description in self._descriptions:
            found[index] = descriptor_of(found[index], description)
        return found
