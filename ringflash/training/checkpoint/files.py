"""Names of a checkpoint's files and of what is in them, and which folders are checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1
PARTIAL = ".partial"
"""Ends the names of what is not yet whole."""

DAMAGED = ".damaged"
"""Ends the names of checkpoints that were set aside."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter by its name."""


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


def place(name: str) -> tuple[str, str]:
    """File and key of an engine's tensor."""
    kind, _, parameter = name.partition("/")
    return (WEIGHTS, parameter) if kind == "weight" else (OPTIMIZER, name)
