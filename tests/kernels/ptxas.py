"""What ptxas says of a kernel while Triton assembles it: so nothing is assembled twice, and with the options of use."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import triton


@contextmanager
def reporting() -> Iterator[None]:
    """Kernels for NVIDIA that `triton.compile` makes meanwhile have the report in `metadata.ptxas`.

    It lies in Triton's cache with them, under a key that other compilations do not have.
    """
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = _keep_report
        yield


def spilled(report: str) -> int:
    """Bytes of registers that a thread stores to memory."""
    return int(re.search(r"(\d+) bytes spill stores", report)[1])


def serialised(report: str) -> tuple[str, ...]:
    """What is said about wgmma that could not stay asynchronous."""
    return tuple(line for line in report.splitlines() if re.search(r"C75\d\d|serializ", line))


def _keep_report(backend: Any = None, stages: dict[str, Callable] | None = None, *_: Any) -> tuple[str, str] | None:
    """Without arguments Triton asks what to add to keys."""
    if stages is None:
        return "ptxas", "ptxas"
    if "cubin" in stages:
        stages["cubin"] = partial(_assemble, stages["cubin"])
    return None


def _assemble(assemble: Callable[[str, dict], bytes], source: str, metadata: dict) -> bytes:
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = assemble(source, metadata)
    metadata["ptxas"] = said.getvalue()
    return binary
