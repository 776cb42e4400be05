"""Documents, as byte strings in a fixed order, from the standard library, a folder, or one file.

`source_files` lists what `data.path` means, without reading it; `read_documents` yields the text. A text file is one
document; a line of a .jsonl and a row of a .parquet file are one each. Whatever cannot be read raises DataError with
the file's name and what is wrong in it; empty documents are left out.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ringflash.errors import DataError

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def source_files(path: str | None) -> list[Path]:
    """The files to read, sorted by their path below the root.

    Args:
        path: a folder (all files in it, at any depth, but hidden ones), a file, or None for the running interpreter's
            standard library without its tests.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, NOT_LIBRARY) if file.suffix == ".py"]
        if not files:
            raise DataError(
                f"data.path=null: this Python keeps no source text in {root}; give data.path a folder of text"
            )
        return [root / file for file in files]
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"data.path={path}: no such file or folder")
    files = [root / file for file in _walk(root)]
    if not files:
        raise DataError(f"data.path={path}: no files in it; allowed are text files, .jsonl and .parquet")
    return files


def read_documents(file: Path, text_field: str) -> Iterator[bytes]:
    """The documents of one file that are not empty.

    Args:
        file: .jsonl and .parquet hold many documents, any other file is the text of one, in UTF-8.
        text_field: field or column that holds the text of a .jsonl or .parquet document.
    """
    try:
        if file.suffix == ".jsonl":
            documents = _read_jsonl(file, text_field)
        elif file.suffix == ".parquet":
            documents = _read_parquet(file, text_field)
        else:
            documents = _read_text(file)
        yield from (document for document in documents if document)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"data.path: cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _walk(root: Path, left_out: Collection[str] = ()) -> list[Path]:
    # Sorted by parts, so that the order does not depend on the file system.
    def unreadable(error: OSError) -> None:
        raise DataError(f"data.path: cannot read folder {error.filename}: {error.strerror}") from error

    found = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name).relative_to(root) for name in files if not name.startswith(".")]
    return sorted(found, key=lambda file: file.parts)


def _read_text(file: Path) -> Iterator[bytes]:
    text = file.read_bytes()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {file} is not UTF-8 text: byte {text[error.start]:#04x} at {error.start}"
        ) from error
    yield text


def _read_jsonl(file: Path, text_field: str) -> Iterator[bytes]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"data.path: {file}, line {number} is not JSON in UTF-8: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                there = f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
                raise DataError(
                    f"data.path: {file}, line {number} has no text in data.text_field={text_field}; {there}"
                )
            try:
                yield record[text_field].encode()
            except UnicodeEncodeError as error:
                raise DataError(f"data.path: {file}, line {number} holds half a surrogate pair: {error}") from error


def _read_parquet(file: Path, text_field: str) -> Iterator[bytes]:
    with pyarrow.parquet.ParquetFile(file) as table:
        schema = table.schema_arrow
        if text_field not in schema.names:
            there = ", ".join(schema.names)
            raise DataError(f"data.path: {file} has no column data.text_field={text_field}; its columns are {there}")
        kind = schema.field(text_field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"data.path: column data.text_field={text_field} of {file} holds {kind}, not strings")
        for batch in table.iter_batches(columns=[text_field]):
            yield from ((value.as_py() or "").encode() for value in batch.column(0))
