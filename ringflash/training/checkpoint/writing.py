"""Writing what one rank writes of a checkpoint: into a folder of another name, hashed and synced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ringflash.training.checkpoint.files import OPTIMIZER, WEIGHTS, Entry, Shapes, file_of, header, place
from ringflash.training.engines.base import Piece

BLOCK = 1 << 24
"""Bytes that are written at a time; between two of them a writer can be told to stop."""

Blocks = Callable[[Piece], Iterable[memoryview]]
"""Gives the bytes of a piece."""


class StoppedError(Exception):
    """A writer was told to stop."""


def straight(piece: Piece) -> Iterable[memoryview]:
    """Bytes of a piece, from where it lies."""
    data = piece.take().to("cpu", torch.float32).contiguous().numpy()
    return [memoryview(data).cast("B")]  # pyrefly: ignore[bad-argument-type]  # stub: arrays are buffers


def write_pieces(
    folder: Path, rank: int, pieces: Sequence[Piece], sizes: Shapes, blocks: Blocks, stopped: Callable[[], bool]
) -> dict[str, dict[str, Any]]:
    """Write a rank's files.

    Args:
        folder: is there already.
        rank: whose.
        pieces: what it writes.
        sizes: shape of each whole tensor.
        blocks: gives their bytes.
        stopped: asked again and again.

    Returns:
        "bytes" and "sha256" of each file; there is none of a kind of which there is nothing to write.

    Raises:
        OSError: as of a full disk.
        StoppedError: it was told to stop.
    """
    written = {}
    for kind in (WEIGHTS, OPTIMIZER):
        mine = [piece for piece in pieces if place(piece.name)[0] == kind]
        if not mine:
            continue
        entries = [Entry(place(piece.name)[1], piece.start, piece.size, sizes[piece.name]) for piece in mine]
        name = file_of(kind, rank)
        with HashedFile(folder / name) as file:
            file.write(header(entries))
            for piece in mine:
                for data in blocks(piece):
                    for start in range(0, len(data), BLOCK):
                        if stopped():
                            raise StoppedError
                        file.write(data[start : start + BLOCK])
            written[name] = file.close()
    return written


class HashedFile:
    """A new file that is hashed while it is written, and synced when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close or on the way out
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, int | str]:
        """Sync to disk; returns size and hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # what was buffered does not fit on the disk either
            self._file.close()
