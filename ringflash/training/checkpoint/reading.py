"""Opening a checkpoint: verified first, by all ranks together, then read by name and range."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ringflash.errors import CheckpointError
from ringflash.training.checkpoint.files import (
    DAMAGED,
    MANIFEST,
    OFFSETS,
    OPTIMIZER,
    READABLE,
    SHARDING,
    STATE,
    WEIGHTS,
    WHOLE,
    Shapes,
    newest,
    place,
)
from ringflash.training.ranks import from_all, from_rank_0


class Checkpoint:
    """A checkpoint found good; reads whole tensors, or elements of them.

    Attributes:
        state: what `Saver` was given.
        only_weights: whether it holds nothing of an optimizer.
        sizes: shape of each tensor that can be read, by its name.
    """

    def __init__(self, path: Path, weights_alone: bool = False) -> None:
        """Verify a checkpoint; with torch.distributed every rank calls this, and each reads some of the files through.

        Args:
            path: its folder.
            weights_alone: whether nothing but weights will be read of it; then nothing else is verified.

        Raises:
            CheckpointError: on every rank, naming the file that is missing or damaged.
        """
        self.path = path
        sums, elements = _sums(path)
        self.only_weights = not any(name.startswith(OPTIMIZER) for name in sums)
        if weights_alone:
            sums = {name: entry for name, entry in sums.items() if not name.startswith(OPTIMIZER)}
        _verify(path, sums)
        self.state: dict[str, Any] = json.loads((path / STATE).read_text())
        self.sizes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        for name in sums:
            if name != STATE:
                self._index(name)
        self._check_complete(elements)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """Elements of an fp32 tensor by the name an engine gave it, on the CPU; see `engines.base.Read`."""
        if start is None or stop is None:
            whole = self.sizes[name]
            return self._elements(name, 0, math.prod(whole)).view(whole)
        return self._elements(name, start, stop)

    def check_shapes(self, shapes: Shapes) -> None:
        """Raise CheckpointError, naming a parameter, unless these are the parameters of the model."""
        there = {name.removeprefix("weight/"): x for name, x in self.sizes.items() if place(name)[0] == WEIGHTS}
        for name in [*shapes, *there]:
            if shapes.get(name) != there.get(name):
                raise CheckpointError(
                    f"{self.path} is of another model: {name} is {there.get(name, 'absent')} there and "
                    f"{shapes.get(name, 'absent')} here"
                )

    def _elements(self, name: str, start: int, stop: int) -> Tensor:
        wanted = torch.empty(stop - start, dtype=torch.float32)
        for part in self._parts[place(name)]:
            first, last = max(start, part.start), min(stop, part.start + part.size)
            if first < last:
                wanted[first - start : last - start] = part.read(first - part.start, last - part.start)
        return wanted

    def _index(self, name: str) -> None:
        """Note what a file holds."""
        kind = WEIGHTS if name.startswith(WEIGHTS) else OPTIMIZER
        file = safe_open(self.path / name, framework="pt")
        sharding = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
        for key in file.keys():  # noqa: SIM118
            shape = tuple(file.get_slice(key).get_shape())
            of = sharding.get(key, {OFFSETS: [0], WHOLE: shape})  # in format 1 all are whole
            start = 0 if shape == (whole := tuple(of[WHOLE])) else of[OFFSETS][0]
            self.sizes[key if kind == OPTIMIZER else f"weight/{key}"] = whole
            self._parts.setdefault((kind, key), []).append(_Part(file, key, start, shape))

    def _check_complete(self, elements: dict[str, int]) -> None:
        """Raise CheckpointError unless the parts of each tensor are each of its elements once, and no tensor lacks."""
        for name, whole in self.sizes.items():
            end = 0
            for part in sorted(self._parts[place(name)], key=lambda part: part.start):
                if part.start != end:
                    break
                end += part.size
            if end != math.prod(whole):
                raise CheckpointError(f"{self.path} is damaged: its files do not hold each element of {name} once")
        for kind in {kind for kind, _ in self._parts} & elements.keys():
            there = sum(part.size for key, parts in self._parts.items() if key[0] == kind for part in parts)
            if there != elements[kind]:
                raise CheckpointError(
                    f"{self.path} is damaged: its {kind} are {there:,} numbers, {MANIFEST} says {elements[kind]:,}"
                )


class _Part(NamedTuple):
    """What one file holds of a tensor: elements from `start` on, in a shape of their own."""

    file: safe_open
    key: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Elements of it, flat; of the file no more is read than the rows that they are in."""
        if not self.shape:
            return self.file.get_tensor(self.key).flatten()
        row = math.prod(self.shape[1:])
        first = start // row
        rows = self.file.get_slice(self.key)[first : -(-stop // row)]
        return rows.flatten()[start - first * row : stop - first * row]


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


def _sums(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What the manifest says, which rank 0 reads: size and SHA-256 of each file, and numbers in each kind of files."""
    alone = not dist.is_initialized()
    found = _manifest(path) if alone or dist.get_rank() == 0 else None
    found = found if alone else from_rank_0(found)
    if isinstance(found, str):
        raise CheckpointError(found)
    assert found is not None
    return found


def _manifest(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]] | str:
    """The same, or what is wrong with the manifest."""
    if not path.is_dir():
        return f"{path}: no such checkpoint"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] not in READABLE:
            formats = " and ".join(map(str, READABLE))
            return f"{path / MANIFEST}: format {manifest['format']}; this version reads formats {formats}"
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": entry["sha256"]} for name, entry in manifest["files"].items()
        }
        elements = {} if manifest["format"] == 1 else {kind: int(n) for kind, n in manifest["elements"].items()}
        if STATE not in files or not any(name.startswith(WEIGHTS) for name in files):
            return f"{path / MANIFEST} is damaged: it names no {STATE} or no {WEIGHTS}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} is damaged: {type(error).__name__}: {error}"
    return files, elements


def _verify(path: Path, sums: dict[str, dict[str, Any]]) -> None:
    """Compare files with their sums, each rank some of them; raises CheckpointError on every rank alike."""
    if not dist.is_initialized():
        problem = _problem(path, sums)
    else:
        # Largest first, in turn: the files of a kind are as large as each other.
        ordered = sorted(sums, key=lambda name: -sums[name]["bytes"])[dist.get_rank() :: dist.get_world_size()]
        problem = next(filter(None, from_all(_problem(path, {name: sums[name] for name in ordered}))), None)
    if problem is not None:
        raise CheckpointError(problem)


def _problem(path: Path, sums: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with files, or None."""
    try:
        for name, entry in sums.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{path / name} is damaged: {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return f"{path / name} is damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None
