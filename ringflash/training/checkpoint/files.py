"""Names of a checkpoint's files and of what is in them, and which folders are checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""What the names of safetensors begin with; `file_of` gives that of a rank."""

STATE, MANIFEST = "state.json", "manifest.json"
FORMAT = 2
READABLE = (1, 2)
"""Formats that are read. In the first one rank wrote all, whole tensors in two files without numbers."""

PARTIAL = ".partial"
"""Ends the names of what is not yet whole."""

DAMAGED = ".damaged"
"""Ends the names of checkpoints that were set aside."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter by its name."""

SHARDING, OFFSETS, WHOLE = "DCP_SHARDING_INFO", "saved_offsets", "whole"
"""Where torch.distributed.checkpoint looks for where a piece begins; beside it, ours, the shape of the whole tensor."""


class Entry(NamedTuple):
    """What a file holds of a tensor: `size` elements from `start` on of the flattened whole, of shape `whole`."""

    key: str
    start: int
    size: int
    whole: tuple[int, ...]


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, if there is one."""
    return max(filter(is_complete, steps(root)), key=step_of, default=None)


def found_at(path: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest one of the run that it is; None if it is neither."""
    return path if is_complete(path) else newest(path / "checkpoints")


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint folder has behind it, from its name."""
    return int(path.name.removeprefix("step-"))


def steps(root: Path) -> list[Path]:
    """Everything that is named like a checkpoint, by rising step."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in there if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def is_complete(path: Path) -> bool:
    """Whether it is a checkpoint: a folder is given its name when all is written, and loses its manifest first."""
    return (path / MANIFEST).is_file()


def partial_of(final: Path) -> Path:
    """The folder that gets this name once it is a checkpoint."""
    return final.with_name(final.name + PARTIAL)


def place(name: str) -> tuple[str, str]:
    """Kind of file and key of an engine's tensor."""
    kind, _, parameter = name.partition("/")
    return (WEIGHTS, parameter) if kind == "weight" else (OPTIMIZER, name)


def file_of(kind: str, rank: int) -> str:
    """The file that a rank writes."""
    return f"{kind}-{rank:05d}.safetensors"


def header(entries: Sequence[Entry]) -> bytes:
    """How a safetensors file of fp32 elements begins, which follow in this order.

    A tensor that is whole has its shape, and pieces of one are flat.
    """
    found: dict[str, Any] = {}
    sharding, offset = {}, 0
    for entry in entries:
        whole = entry.size == math.prod(entry.whole)
        shape = entry.whole if whole else (entry.size,)
        end = offset + 4 * entry.size
        found[entry.key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        sharding[entry.key] = {OFFSETS: [0] * len(shape) if whole else [entry.start], WHOLE: list(entry.whole)}
        offset = end
    metadata = {"format": "pt", SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0"}
    text = json.dumps({"__metadata__": metadata, **found}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
