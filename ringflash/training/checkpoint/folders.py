"""A checkpoint's folder: begun under another name, given its own once all is in it, removed manifest first. Rank 0."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringflash.training.checkpoint.files import FORMAT, MANIFEST, PARTIAL, STATE, is_complete, partial_of, steps
from ringflash.training.checkpoint.writing import HashedFile


def begin(final: Path) -> None:
    """Make an empty folder to write a checkpoint into; what killed runs left is removed.

    Raises:
        OSError: there is such a checkpoint already, or nothing can be written there.
    """
    if is_complete(final):
        raise FileExistsError(f"{final} is there already")
    remove(final)  # from a run that was killed while removing it
    for left in final.parent.glob(f"step-*{PARTIAL}"):  # from one that was killed while saving
        remove(left)
    partial_of(final).mkdir(parents=True)


def commit(final: Path, files: Mapping[str, Mapping[str, Any]], elements: Mapping[str, int], state: bytes) -> None:
    """Give the folder that all ranks have written into its name.

    Args:
        final: that name.
        files: size and hash of each file that is in it.
        elements: how many numbers are in each kind of files.
        state: what `state.json` is to hold.
    """
    partial = partial_of(final)
    with HashedFile(partial / STATE) as file:
        file.write(state)
        sums = {**files, STATE: file.close()}
    manifest = {"format": FORMAT, "files": sums, "elements": elements}
    _write_synced(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(partial)
    partial.rename(final)
    latest = final.with_name("latest")
    _write_synced(latest.with_name("latest" + PARTIAL), final.name.encode())
    os.replace(latest.with_name("latest" + PARTIAL), latest)
    _sync_folder(final.parent)


def give_up(final: Path) -> None:
    """Remove what was written of a checkpoint that will be none."""
    shutil.rmtree(partial_of(final), ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what is left of others."""
    complete = [path for path in steps(root) if is_complete(path)]
    for path in set(steps(root)) - set(complete[-keep:]):
        remove(path)


def remove(path: Path) -> None:
    """Remove whatever a path is, if anything."""
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
