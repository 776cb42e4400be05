"""Checkpoints that are whole or not there, and are checked before they are used.

    checkpoints/
      step-00000300/
        weights.safetensors     fp32 weights by parameter name
        optimizer.safetensors   AdamW's moments, "exp_avg/<parameter>" and "exp_avg_sq/<parameter>"
        state.json              step, position in the data, random state, the model's shape, the configuration
        manifest.json           size and SHA-256 of each file
      latest                    name of the newest folder

A checkpoint is written into a folder of another name, synced to disk, and renamed: a crash or a full disk leaves the
ones before it as they were. Tensors are whole whatever engine wrote them, and pass through memory one by one. Loaders
of safetensors return flipped bits without a word, so every file is compared with the manifest first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from ringflash.errors import CheckpointError
from ringflash.training.optimizer import MOMENTS

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1
PARTIAL = ".partial"

T = TypeVar("T")

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter by its name."""


def save(
    root: Path, step: int, tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, state: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint; every rank calls this, rank 0 writes.

    Args:
        root: the folder of all checkpoints.
        step: optimizer steps done; larger than that of any checkpoint there.
        tensors: an engine's `tensors()`, in the order of `shapes`.
        shapes: the parameters.
        state: what else is needed to continue; must fit into JSON.
        keep: newest checkpoints to keep.

    Raises:
        CheckpointError: on every rank, if it could not be written; earlier checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    writer = _Writer(final, shapes) if dist.get_rank() == 0 else None
    for name, tensor in tensors:  # gathered from all ranks, so all go on if the disk of rank 0 is full
        if writer is not None:
            writer.attempt(lambda name=name, tensor=tensor: writer.add(name, tensor))
    if writer is not None:
        writer.attempt(lambda: writer.commit(state))
        writer.attempt(lambda: _prune(root, keep))
    error = from_rank_0(None if writer is None else writer.error)
    if error is not None:
        found = newest(root)
        kept = f"the last good one is {found}" if found else "there is no earlier one"
        raise CheckpointError(f"{final}: not saved: {error}; {kept}")
    return final


def newest(root: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, if there is one."""
    return max(filter(_complete, _steps(root)), key=step_of, default=None)


def step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint folder has behind it, from its name."""
    return int(path.name.removeprefix("step-"))


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
        file, key = _place(name)
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


class _Writer:
    """Streams tensors into the two safetensors files of a folder that is not yet a checkpoint."""

    def __init__(self, final: Path, shapes: Shapes) -> None:
        self.final, self.partial = final, final.with_name(final.name + PARTIAL)
        self.error: str | None = None
        self._files: dict[str, _HashedFile] = {}
        self.attempt(lambda: self._begin(shapes))

    def attempt(self, action: Callable[[], None]) -> None:
        """Run it unless something failed before; on an operating system's error clean up and remember it."""
        if self.error is not None:
            return
        try:
            action()
        except OSError as error:
            self.error = str(error)
            for file in self._files.values():
                file.abandon()
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        self._files[_place(name)[0]].write(memoryview(data).cast("B"))

    def commit(self, state: dict[str, Any]) -> None:
        self._files[STATE] = _HashedFile(self.partial / STATE)
        self._files[STATE].write(json.dumps(state, indent=1).encode())
        manifest = {"format": FORMAT, "files": {name: file.close() for name, file in self._files.items()}}
        _write_synced(self.partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(self.partial)
        self.partial.rename(self.final)
        latest = self.final.with_name("latest")
        _write_synced(latest.with_name("latest" + PARTIAL), self.final.name.encode())
        os.replace(latest.with_name("latest" + PARTIAL), latest)
        _sync_folder(self.final.parent)

    def _begin(self, shapes: Shapes) -> None:
        for left in self.final.parent.glob(f"step-*{PARTIAL}"):  # from a run that was killed while saving
            _remove(left)
        if not _complete(self.final):  # from one that was killed while removing it
            _remove(self.final)
        self.partial.mkdir(parents=True)
        entries = {WEIGHTS: [], OPTIMIZER: []}
        for name, shape in shapes.items():
            for kind in ("weight", *MOMENTS):
                file, key = _place(f"{kind}/{name}")
                entries[file].append((key, shape))
        for file, contents in entries.items():
            self._files[file] = _HashedFile(self.partial / file)
            self._files[file].write(_safetensors_header(contents))


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close or abandon
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, int | str]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # what was buffered does not fit on the disk either
            self._file.close()


def _safetensors_header(contents: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """Header of a safetensors file of fp32 tensors that follow in this order."""
    header, offset = {}, 0
    for name, shape in contents:
        end = offset + 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _place(name: str) -> tuple[str, str]:
    """File and key of an engine's tensor."""
    kind, _, parameter = name.partition("/")
    return (WEIGHTS, parameter) if kind == "weight" else (OPTIMIZER, name)


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


def _steps(root: Path) -> list[Path]:
    """Everything that is named like a checkpoint, by rising step."""
    there = root.iterdir() if root.is_dir() else ()
    return sorted((path for path in there if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def _complete(path: Path) -> bool:
    # A folder gets its name when all is written, and loses its manifest before anything else.
    return (path / MANIFEST).is_file()


def _prune(root: Path, keep: int) -> None:
    complete = [path for path in _steps(root) if _complete(path)]
    for path in set(_steps(root)) - set(complete[-keep:]):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        # The manifest goes first: what is left of a removal that was cut short does not count as a checkpoint.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def from_rank_0(value: T) -> T:
    """What rank 0 passes, on every rank; a collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
