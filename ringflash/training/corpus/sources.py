"""Which files `data.path` means: the standard library's, a folder's, or one."""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Collection
from pathlib import Path

from ringflash.errors import DataError
from ringflash.training.corpus.passed_over import HIDDEN, READ_ALREADY, SPECIAL, PassedOver
from ringflash.training.corpus.reading import ALLOWED

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(path: str | None, passed_over: PassedOver) -> list[Path]:
    """The files to read, sorted by their path below the root.

    Args:
        path: a folder, a file, or None for the running interpreter's standard library without its tests. Of a folder
            all files at any depth, but those whose name, or whose folder's, begins with a dot. Symbolic links are
            followed; what is reached twice, as by a link to a folder around it, is read once.
        passed_over: counts what is left out of a folder.

    Raises:
        DataError: there is nothing to read, or something that cannot be.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, PassedOver(), NOT_LIBRARY) if file.suffix == ".py"]
        if not files:
            raise DataError(
                f"data.path=null: this Python keeps no source text in {root}; give data.path a folder of text"
            )
        return files
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        absent = "no such file or folder; data.streaming=true reads data sets of the Hugging Face hub"
        what = "it is neither a file nor a folder" if root.exists() else absent
        raise DataError(f"data.path={path}: {what}")
    files = _walk(root, passed_over)
    if not files:
        said = f"; {passed_over}" if passed_over.counts else ""
        raise DataError(f"data.path={path}: no files in it; allowed are {ALLOWED}{said}")
    return files


def status(file: Path) -> os.stat_result:
    """Size and times of a file that must be there."""
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}") from error


def _walk(root: Path, passed_over: PassedOver, left_out: Collection[str] = ()) -> list[Path]:
    files, reached = [], set()

    def visit(path: Path, real: str) -> None:
        if real in reached:
            passed_over.add(READ_ALREADY, path)
            return
        reached.add(real)
        kind = status(path).st_mode
        if stat.S_ISREG(kind):
            files.append(path)
        elif not stat.S_ISDIR(kind):
            passed_over.add(SPECIAL, path)
        elif path.name not in left_out or path == root:
            for name, is_link in _entries(path):  # sorted, so that the order does not depend on the file system
                if name.startswith("."):
                    passed_over.add(HIDDEN, path / name)
                else:
                    visit(path / name, os.path.realpath(path / name) if is_link else os.path.join(real, name))

    visit(root, os.path.realpath(root))
    return files


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a symbolic link."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_symlink()) for entry in entries)
    except OSError as error:
        raise DataError(f"data.path: cannot read folder {folder}: {error.strerror}") from error
