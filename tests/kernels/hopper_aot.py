"""Compiles the Hopper kernels for sm_90 without a GPU, as the launchers launch them, and reads the machine code."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from aot import POINTERS, Caught
from ptxas import reporting, serialised, spilled
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

KEPT = ("HGMMA", "WARPGROUP.DEPBAR", "BAR.SYNC", "BAR.ARV", "SYNCS", "ARRIVES", "MUFU.EX2", "F2FP", "UTMA", "BRA")


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel uses.

    Attributes:
        registers: of a thread.
        spilled: bytes of registers that a thread stores to memory.
        shared: bytes of shared memory of a program.
        warnings: what ptxas says about wgmma that it serialised.
        binary: the machine code.
    """

    registers: int
    spilled: int
    shared: int
    warnings: list[str]
    binary: bytes

    @cached_property
    def blocks(self) -> dict[str, list[str]]:
        """Basic blocks by label, in order; each a list of the instructions of interest."""
        return basic_blocks(disassemble(self.binary))


def compile_call(call: Caught) -> Compiled:
    """Compile a caught call for sm_90."""
    signature, constants, attributes = {}, {}, {}
    given = {x.name: x.default for x in call.kernel.params if x.has_default} | call.constants
    for index, name in enumerate(call.kernel.arg_names):
        x = given[name] if name in given else call.arguments[name]
        if name in given or x is None:
            signature[name], constants[(index,)] = "constexpr", x
        elif isinstance(x, float):
            signature[name] = "fp32"
        elif isinstance(x, int):
            signature[name] = "i32"
        elif hasattr(x, "block_shape"):
            shape = ",".join(map(str, x.block_shape))
            signature[name] = f"tensordesc<{POINTERS[x.base.dtype][1:]}[{shape}],{x.layout!r}>"
        else:
            signature[name], attributes[(index,)] = POINTERS[x.dtype], [["tt.divisibility", 16]]
    source = GluonASTSource(call.kernel, signature, constants, attributes)
    with reporting():
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=call.options)
    report = compiled.metadata.ptxas
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return Compiled(
        registers, spilled(report), compiled.metadata.shared, list(serialised(report)), compiled.asm["cubin"]
    )


def disassemble(binary: bytes) -> str:
    """The instructions of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        command = [os.path.join(os.path.dirname(get_ptxas(90).path), "nvdisasm"), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def basic_blocks(code: str) -> dict[str, list[str]]:
    """Instructions of interest by basic block; waits and barriers with their number."""
    blocks, block = {"entry": []}, "entry"
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            block = label[1]
            blocks[block] = []
        elif found := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*)", line):
            name, rest = found.groups()
            kept = next((k for k in KEPT if name.startswith(k)), None)
            if kept == "WARPGROUP.DEPBAR":
                kept += " " + re.search(r"0x\d+", rest)[0]
            elif kept == "BRA" and (target := re.search(r"\.L_x_\d+", rest)):
                kept += " " + target[0]
            if kept:
                blocks[block].append(kept)
    return blocks
