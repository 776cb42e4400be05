"""Writing a checkpoint: into a folder of another name, hashed and synced, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import CheckpointError
from ringflash.training.checkpoint.files import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    PARTIAL,
    STATE,
    WEIGHTS,
    Shapes,
    is_complete,
    newest,
    place,
    steps,
)
from ringflash.training.engines.optimizer import MOMENTS
from ringflash.training.ranks import from_rank_0

Moments = Callable[[str], Mapping[str, tuple[int, ...]]]
"""Shape of each thing that the optimizer keeps for a parameter, by the parameter's name."""


def save(
    root: Path,
    step: int,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Shapes,
    state: dict[str, Any],
    keep: int,
    moments: Moments | None = None,
) -> Path:
    """Write a checkpoint; every rank calls this, rank 0 writes.

    Args:
        root: the folder of all checkpoints.
        step: optimizer steps done; larger than that of any checkpoint there.
        tensors: an engine's `tensors()`, in the order of `shapes`.
        shapes: the parameters.
        state: what else is needed to continue; must fit into JSON.
        keep: newest checkpoints to keep.
        moments: what the optimizer keeps for a parameter; None: AdamW's moments, of its shape.

    Raises:
        CheckpointError: on every rank, if it could not be written; earlier checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    moments = moments or (lambda name: dict.fromkeys(MOMENTS, shapes[name]))
    writer = _Writer(final, shapes, moments) if dist.get_rank() == 0 else None
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


class _Writer:
    """Streams tensors into the two safetensors files of a folder that is not yet a checkpoint."""

    def __init__(self, final: Path, shapes: Shapes, moments: Moments) -> None:
        self.final, self.partial = final, final.with_name(final.name + PARTIAL)
        self.error: str | None = None
        self._files: dict[str, _HashedFile] = {}
        self.attempt(lambda: self._begin(shapes, moments))

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
        # pyrefly: ignore[bad-argument-type]  # stub: arrays are buffers, said from Python 3.12
        self._files[place(name)[0]].write(memoryview(data).cast("B"))

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

    def _begin(self, shapes: Shapes, moments: Moments) -> None:
        for left in self.final.parent.glob(f"step-*{PARTIAL}"):  # from a run that was killed while saving
            _remove(left)
        if not is_complete(self.final):  # from one that was killed while removing it
            _remove(self.final)
        self.partial.mkdir(parents=True)
        entries = {WEIGHTS: [], OPTIMIZER: []}
        for name, whole in shapes.items():
            for kind, shape in {"weight": whole, **moments(name)}.items():
                file, key = place(f"{kind}/{name}")
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


def _prune(root: Path, keep: int) -> None:
    complete = [path for path in steps(root) if is_complete(path)]
    for path in set(steps(root)) - set(complete[-keep:]):
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
