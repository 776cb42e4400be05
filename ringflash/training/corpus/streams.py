"""Opening files: decompressed by what is inside, and without byte order marks."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow

from ringflash.errors import DataError

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""What libraries raise about files that are absent, damaged, or cut off."""


def _zstd(file: BinaryIO, mode: str) -> Any:
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


class Compression(NamedTuple):
    """How files of one compression begin, and what opens them."""

    suffix: str
    begins: bytes
    opens: Callable[..., Any]


COMPRESSIONS = (
    Compression(".gz", rb"\x1f\x8b", gzip.open),
    Compression(".bz2", rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    Compression(".xz", rb"\xfd7zXZ\x00", lzma.open),
    Compression(".zst", rb"\x28\xb5\x2f\xfd", _zstd),
)

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def inner_name(file: Path) -> str:
    """The name of a file in lower case, without the suffix of a compression."""
    name = file.name.lower()
    return next((name.removesuffix(each.suffix) for each in COMPRESSIONS if name.endswith(each.suffix)), name)


@contextmanager
def decompressed(file: Path) -> Generator[BinaryIO]:
    """The bytes of a file, decompressed if it begins as compressed ones do, whatever its name."""
    with file.open("rb") as raw:
        head = raw.read(16)
        raw.seek(0)
        found = next((each for each in COMPRESSIONS if re.match(each.begins, head)), None)
        named = next((each for each in COMPRESSIONS if file.name.lower().endswith(each.suffix)), None)
        if found is None and named is not None:
            what = f"begins with {head[:4]!r}" if head else "is empty"
            raise DataError(
                f"data.path: {file} is named {named.suffix}, but {what}; write it anew, or name it as what it is"
            )
        if found is None:
            yield raw
        else:
            with found.opens(raw, "rb") as stream, io.BufferedReader(stream) as buffered:
                yield buffered


def as_utf8(data: bytes, place: object) -> bytes:
    """Text in UTF-8 without a byte order mark, from what such a mark says; from UTF-8 if there is none.

    Raises:
        DataError: names the place of what is no text.
    """
    mark, encoding = next((each for each in MARKS if data.startswith(each[0])), (b"", "utf-8"))
    data = data.removeprefix(mark)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        where = len(mark) + error.start
        raise DataError(
            f"data.path: {place} is not {encoding.upper()} text: byte {data[error.start]:#04x} at {where}"
        ) from error
    return data if encoding == "utf-8" else text.encode()


def lines(stream: BinaryIO, file: Path) -> Iterator[bytes]:
    """Lines for `as_utf8`: cut at the line ends of the encoding that a byte order mark says."""
    first = stream.readline()
    if any(first.startswith(mark) for mark, encoding in MARKS if encoding != "utf-8"):
        yield from io.BytesIO(as_utf8(first + stream.read(), file))
    else:
        yield first
        yield from stream
