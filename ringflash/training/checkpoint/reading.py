"""Opening a checkpoint: verified first, then read one tensor at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ringflash.errors import CheckpointError
from ringflash.training.checkpoint.files import (
    DAMAGED,
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Shapes,
    newest,
    place,
)
from ringflash.training.ranks import from_rank_0


class Checkpoint:
    """A checkpoint found good; reads its tensors one at a time.

    Attributes:
        state: what `save` was given.
    """

    def __init__(self, path: Path) -> None:
        """Verify a checkpoint; with torch.distributed every rank calls this, and rank 0 reads it through.

        Raises:
            CheckpointError: on every rank, naming the file that is missing or damaged.
        """
        self.path = path
        alone = not dist.is_initialized()
        problem = _problem(path) if alone or dist.get_rank() == 0 else None
        problem = problem if alone else from_rank_0(problem)
        if problem is not None:
            raise CheckpointError(problem)
        self.state: dict[str, Any] = json.loads((path / STATE).read_text())
        self._files = {name: safe_open(path / name, framework="pt") for name in (WEIGHTS, OPTIMIZER)}

    def read(self, name: str) -> Tensor:
        """Whole fp32 tensor by the name an engine gave it, on the CPU."""
        file, key = place(name)
        return self._files[file].get_tensor(key)

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise CheckpointError, naming a parameter, unless these are the parameters of the model."""
        weights = self._files[WEIGHTS]
        there = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        for name in [*shapes, *there]:
            if shapes.get(name) != there.get(name):
                raise CheckpointError(
                    f"{self.path} is of another model: {name} is {there.get(name, 'absent')} there and "
                    f"{shapes.get(name, 'absent')} here"
                )


def last_good(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a folder that is not damaged, and what was wrong with newer ones; a collective.

    Those are renamed, so that the run that goes on can save these steps anew.

    Raises:
        CheckpointError: all of them are damaged, or one cannot be renamed.
    """
    problems: list[str] = []
    while (path := from_rank_0(newest(root))) is not None:
        try:
            return Checkpoint(path), problems
        except CheckpointError as error:
            problems.append(str(error))
            if (problem := from_rank_0(_set_aside(path) if dist.get_rank() == 0 else None)) is not None:
                raise CheckpointError(f"{error}; it cannot be set aside: {problem}") from error
    if problems:
        raise CheckpointError(f"{root} holds no checkpoint that is not damaged: {'; '.join(problems)}")
    return None, problems


def _set_aside(path: Path) -> str | None:
    """Rename a damaged checkpoint; returns why it cannot be."""
    names = itertools.chain([f"{path.name}{DAMAGED}"], (f"{path.name}{DAMAGED}-{n}" for n in itertools.count(2)))
    try:
        path.rename(next(free for free in map(path.with_name, names) if not free.exists()))
    except OSError as error:
        return str(error)
    return None


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    if not path.is_dir():
        return f"{path}: no such checkpoint"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{path / MANIFEST}: format {manifest['format']}; this version reads format {FORMAT}"
        expected = {name: manifest["files"][name] for name in (WEIGHTS, OPTIMIZER, STATE)}
        for name, entry in expected.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{path / name} is damaged: {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{path / MANIFEST} is damaged: {type(error).__name__}: {error}"
    return None
