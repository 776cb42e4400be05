"""The documents of a file, by the kind of file it is.

By hand, because the readers of `datasets` pass over files and rows that they do not know, and name neither; streams go
through `datasets` with these functions.

A text file is one document; an object of a .json, .jsonl or .ndjson file and a row of a .parquet file are one each.
Suffixes count in any case, and in front of the suffix of a compression. Whatever cannot be read raises DataError with
the file, the row and what is wrong there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ringflash.errors import DataError
from ringflash.training.corpus.chats import FIELDS, OF_MESSAGES, chat_of, no_chat
from ringflash.training.corpus.passed_over import EMPTY, WITHOUT_TEXT, PassedOver
from ringflash.training.corpus.rows import CHATS, Row, no_field, parse, refuse_chat, text_of
from ringflash.training.corpus.streams import UNREADABLE, as_utf8, decompressed, inner_name, lines

ALLOWED = "text files, .json, .jsonl, .ndjson and .parquet, each also compressed (.gz, .bz2, .xz, .zst)"


class Wanted(NamedTuple):
    """What a row is read for: the text of a field, or a chat.

    Attributes:
        text_field: field or column that holds the text of a document, as "text" or "meta.text"; None for chats.
    """

    text_field: str | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that must not be there twice."""
        return (*FIELDS, *OF_MESSAGES) if self.text_field is None else (self.text_field,)

    def of(self, record: Any, place: str) -> Row:
        """The text or the chat of a record."""
        return chat_of(record, place) if self.text_field is None else text_of(record, self.text_field, place)

    def absent(self, file: Path, others: tuple[str, ...]) -> DataError:
        """The error for a file none of whose rows has it."""
        return no_chat(file, others) if self.text_field is None else no_field(file, self.text_field, others)


def read_documents(file: Path, text_field: str | None, passed_over: PassedOver) -> Iterator[bytes]:
    """The documents of one file in UTF-8, without empty ones; arguments are those of `read_rows`."""
    for row in read_rows(file, text_field, passed_over):
        assert row.text is not None
        yield row.text


def read_rows(file: Path, text_field: str | None, passed_over: PassedOver) -> Iterator[Row]:
    """The documents of one file in UTF-8 with their places, without empty ones.

    Args:
        file: of any of the kinds that are read.
        text_field: field or column that holds the text of a document, as "text" or "meta.text"; None for chats.
        passed_over: counts what is left out.

    Raises:
        DataError: names the file, the row and what is wrong there.
    """
    suffix = Path(inner_name(file)).suffix
    behind, wanted = "", Wanted(text_field)
    try:
        with decompressed(file) as stream:
            if suffix in (".csv", ".tsv"):
                raise DataError(f"data.path: {file} is a table; write it as .jsonl or .parquet, or as .txt to learn it")
            if suffix not in READERS:
                if text_field is None:
                    raise DataError(f"data.path: {file} holds no rows; data=chat reads {', '.join(READERS)}")
                yield from _text(stream, file, suffix, text_field, passed_over)
                return
            others, rows = None, 0
            for rows, row in enumerate(READERS[suffix](stream, file, wanted), 1):
                behind = f" behind {row.place.removeprefix(f'{file}, ')}"
                others = row.others if rows == 1 or row.others is None else others
                if row.text is None:
                    passed_over.add(WITHOUT_TEXT, row.place)
                else:
                    yield row
        if others is not None:
            raise wanted.absent(file, others)
        if not rows:
            passed_over.add(EMPTY, file)
    except UNREADABLE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DataError(f"data.path: cannot read {file}{behind}: {reason}; write it anew, or leave it out") from error


def _text(stream: BinaryIO, file: Path, suffix: str, text_field: str, passed_over: PassedOver) -> Iterator[Row]:
    try:
        text = as_utf8(stream.read(), file)
    except DataError as error:
        raise DataError(f"{error}; allowed are {ALLOWED}") from error
    if b"\0" in text:
        raise DataError(
            f"data.path: {file} is no text: it holds a zero byte at {text.index(0)}, as binary files do, and UTF-16 "
            f"without a byte order mark; allowed are {ALLOWED}"
        )
    if suffix != ".txt" and _holds_rows(text, text_field, file):
        raise DataError(
            f"data.path: {file} holds rows of JSON with data.text_field={text_field}; name it .jsonl, or .txt to learn "
            "it as it is written"
        )
    if text:
        yield Row(str(file), text)
    else:
        passed_over.add(EMPTY, file)


def _holds_rows(text: bytes, text_field: str, file: Path) -> bool:
    """Whether the first line of a text is an object with the field; DataError if it is a chat."""
    first = text[: text.find(b"\n") + 1 or len(text)]
    if not first.lstrip().startswith(b"{") or not _is_object(first):
        return False
    record = json.loads(first)
    refuse_chat(record, file)
    try:
        return text_of(record, text_field, str(file)).others is None
    except DataError:
        return False


def _json_lines(stream: BinaryIO, file: Path, wanted: Wanted) -> Iterator[Row]:
    return _rows_of_lines(enumerate(lines(stream, file), 1), file, wanted)


def _rows_of_lines(numbered: Iterator[tuple[int, bytes]], file: Path, wanted: Wanted) -> Iterator[Row]:
    for number, line in numbered:
        place = f"{file}, line {number}"
        text = as_utf8(line, place).decode()
        if text.strip():
            yield wanted.of(parse(text, wanted.fields, place, "; each line must hold one object"), place)


def _json(stream: BinaryIO, file: Path, wanted: Wanted) -> Iterator[Row]:
    """One object, a list of objects, or, as such files are often written, an object on each line."""
    numbered = enumerate(lines(stream, file), 1)
    written = ((number, line) for number, line in numbered if line.strip())
    first, second = next(written, (1, b"")), next(written, None)
    if second is not None and _is_object(first[1]):
        yield from _rows_of_lines(itertools.chain([first, second], numbered), file, wanted)
        return
    number, begun = first
    begun = b"\n" * (number - 1) + begun  # so that JSON's errors count lines as an editor does
    if second is not None:
        begun += b"\n" * (second[0] - number - 1) + second[1]
    text = as_utf8(begun + b"".join(line for _, line in numbered), file).decode()
    if not text.strip():
        raise DataError(f"data.path: {file} is empty; write it anew, or leave it out")
    whole = parse(
        text, wanted.fields, str(file), "; allowed are an object, a list of objects, and an object on each line"
    )
    for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
        place = f"{file}, object {number}"
        yield wanted.of(record, place)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parquet(stream: BinaryIO, file: Path, wanted: Wanted) -> Iterator[Row]:
    source: Any = stream if stream.seekable() else pyarrow.BufferReader(stream.read())
    with pyarrow.parquet.ParquetFile(source) as table:
        if not table.metadata.num_rows:
            return
        if wanted.text_field is None:
            yield from _chats_of_parquet(table, file)
            return
        field = wanted.text_field
        path = _column(table.schema_arrow, field, file)
        number = 0
        for batch in table.iter_batches(columns=[field]):
            column = batch.column(batch.schema.get_field_index(path[0]))
            if path[1:]:
                column = pyarrow.compute.struct_field(column, path[1:])  # pyrefly: ignore[missing-attribute]  # made at import
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pyarrow.large_binary()):  # so that bytes which are no text are found here
                number += 1
                place = f"{file}, row {number}"
                text = value.as_py() or None
                yield Row(place, text and as_utf8(text, f"{place}: data.text_field={field}"))


def _chats_of_parquet(table: pyarrow.parquet.ParquetFile, file: Path) -> Iterator[Row]:
    names = table.schema_arrow.names
    there = [name for name in FIELDS if name in names]
    for name in there:
        if names.count(name) > 1:
            raise DataError(f"data.path: {file} has {names.count(name)} columns {name}; keep one of them")
    number = 0
    for batch in table.iter_batches(columns=there or None):
        for record in batch.to_pylist():
            number += 1
            yield chat_of(record, f"{file}, row {number}")


def _column(schema: pyarrow.Schema, field: str, file: Path) -> list[str]:
    """Names that lead to the column of text."""
    path: list[str] = []
    there: Any = schema
    kind: Any = None
    for part in [field] if field in schema.names else field.split("."):
        if kind is not None and not pyarrow.types.is_struct(kind):
            raise DataError(
                f"data.path: {file}: data.text_field={field}, but column {'.'.join(path)} holds {kind}, which has no "
                f"field {part}"
            )
        names = [each.name for each in there]
        if names.count(part) > 1:
            raise DataError(f"data.path: {file} has {names.count(part)} columns {part}; keep one of them")
        if part not in names:
            refuse_chat(schema.names, file)
            raise no_field(file, field, _names(schema))
        path.append(part)
        kind = there = there.field(part).type
    while pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    strings = pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view
    if not any(is_kind(kind) for is_kind in (*strings, pyarrow.types.is_null)):
        if any(field in names for names in CHATS):
            refuse_chat(schema.names, file)
        raise DataError(f"data.path: {file}: data.text_field={field} holds {kind}, not text; name a column of text")
    return path


def _names(schema: Any) -> list[str]:
    """Columns as `data.text_field` names them."""
    names = []
    for each in schema:
        inner = _names(each.type) if pyarrow.types.is_struct(each.type) else []
        names += [f"{each.name}.{name}" for name in inner] or [each.name]
    return names


READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".parquet": _parquet}
"""By the suffix of files that hold rows; all others hold the text of one document."""
