"""Compiles Triton kernels for chips that are not there, and reads what they would use of them.

The compiler that ships with triton needs no GPU. Kernels are compiled as the launchers launch them: the launcher runs
on tensors without storage, and a stand-in for the kernel catches its arguments.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from ptxas import reporting, serialised, spilled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ringflash.kernels.gpu import block_lists
from ringflash.kernels.key_blocks import KeyBlocks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Bytes of shared memory that one program may use."""

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Unlaunched:
    """Stands for a kernel that is not to be launched, and not looked at."""

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: None


@contextlib.contextmanager
def lists_on_paper() -> Iterator[None]:
    """Lists of blocks are made without storage, by no kernel."""
    names = ("rows_together_kernel", "list_blocks_kernel", "bits_kernel")
    with mock.patch.multiple(block_lists, **{name: Unlaunched() for name in names}):
        yield


def blocks_on_paper(queries: int, keys: int, size: int, device: str = "meta") -> KeyBlocks:
    """A layout of blocks of `size` rows and keys for two groups of heads."""
    empty = functools.partial(torch.empty, device=device)
    places = (empty(n, dtype=torch.int32) for n in (queries, keys))
    return KeyBlocks(*places, (size, size), empty(2, queries // size + 1, keys // size + 1, dtype=torch.bool))


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses."""

    registers: int
    spilled: int
    """Bytes (NVIDIA: stores of one thread; AMD: vector registers times 4)."""
    shared: int
    warnings: tuple[str, ...]
    """What ptxas says about wgmma that it had to serialise."""
    assembly: str


class Caught:
    """Stands for a kernel: `Caught(kernel)[grid](*arguments, **constants)` records the call instead of launching."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self._record

    def _record(self, *arguments, **keywords):
        self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False))
        self.constants = {name: x for name, x in keywords.items() if name in self.kernel.arg_names}
        self.options = {name: x for name, x in keywords.items() if name not in self.kernel.arg_names}


def catch(module, kernel_name: str, launch) -> Caught:
    """The call of `module.kernel_name` that `launch()` makes."""
    caught = Caught(getattr(module, kernel_name))
    with mock.patch.object(module, kernel_name, caught):
        launch()
    return caught


def compile_for(target: str, call: Caught) -> Resources:
    """Compile a caught call for one of TARGETS."""
    unspecialised = call.kernel.do_not_specialize or ()
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(call.kernel.arg_names):
        if name in call.constants:
            signature[name], constants[(index,)] = "constexpr", call.constants[name]
        else:
            specialised = name not in unspecialised
            signature[name] = _type_of(call.arguments[name], (index,), specialised, constants, attributes)
    source = ASTSource(call.kernel, signature, constants, attributes)
    with reporting():
        compiled = triton.compile(source, target=TARGETS[target], options=call.options)
    return _read_amd(compiled) if TARGETS[target].backend == "hip" else _read_nvidia(compiled)


def _type_of(x, path: tuple[int, ...], specialised: bool, constants: dict, attributes: dict) -> str | tuple:
    """The type of an argument as Triton's launcher finds it; notes at `path` what it knows of the value beside."""
    if isinstance(x, tuple):
        types = [_type_of(y, (*path, i), specialised, constants, attributes) for i, y in enumerate(x)]
        return type(x)(*types) if hasattr(x, "_fields") else tuple(types)
    if x is None:
        constants[path] = None
        return "constexpr"
    if isinstance(x, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[x.dtype]
    if isinstance(x, float):
        return "fp32"
    if isinstance(x, int):
        if specialised and x % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"
    return f"tensordesc<{POINTERS[x.base.dtype][1:]}{list(x.block_shape)}>"


def _read_nvidia(compiled) -> Resources:
    report = compiled.metadata.ptxas
    return Resources(
        registers=int(re.search(r"Used (\d+) registers", report)[1]),
        spilled=spilled(report),
        shared=compiled.metadata.shared,
        warnings=serialised(report),
        assembly=compiled.asm["ptx"],
    )


def _read_amd(compiled) -> Resources:
    text = compiled.asm["amdgcn"]
    return Resources(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
        spilled=4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
        shared=compiled.metadata.shared,
        warnings=(),
        assembly=text,
    )
