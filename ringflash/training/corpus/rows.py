"""Rows of JSON and parquet: which text is in the field that `data.text_field` names, by one rule for both.

By hand, because `datasets` takes the first rows' types for all, and passes over what it does not know. A field may lie
within others: "meta.text" is text in meta, unless there is a field of that very name. A row whose field is absent, null
or empty has no text, and is passed over; in a file, some row must have the field. All else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from ringflash.errors import DataError

CHATS = (("messages",), ("conversations",), ("prompt", "completion"))
"""Fields by which chats are known."""

NAMED_FIELDS = 12
"""Of a row whose field is absent, an error names so many others."""


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: file and number, for messages.
        text: of the field, or a chat as JSON, in UTF-8; None without any.
        others: the fields that there are, if the one that was asked for is not among them.
    """

    place: str
    text: bytes | None
    others: tuple[str, ...] | None = None


def parse(line: str, fields: Collection[str], place: str, hint: str = "") -> Any:
    """What JSON says.

    Args:
        line: the JSON.
        fields: which must not be there twice.
        place: of the line.
        hint: what to do about text that is no JSON.
    """
    try:
        return json.loads(
            line, object_pairs_hook=_once({*fields, *(part for field in fields for part in field.split("."))}, place)
        )
    except RecursionError as error:
        raise DataError(f"data.path: {place} nests deeper than Python's JSON reader goes; flatten it") from error
    except ValueError as error:
        raise DataError(f"data.path: {place} cannot be read as JSON: {error}{hint}") from error


def _once(names: Collection[str], place: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            there = [name for name, _ in pairs]
            for name in names:
                if there.count(name) > 1:
                    raise DataError(f"data.path: {place} has {there.count(name)} fields {name}; keep one of them")
        return record

    return made


def text_of(record: Any, field: str, place: str) -> Row:
    """The text of a JSON record.

    Args:
        record: what JSON says.
        field: `data.text_field`.
        place: file and number of the record.

    Raises:
        DataError: it is no object, it is a chat, or its field holds something else than text.
    """
    if not isinstance(record, dict):
        raise DataError(f"data.path: {place} is {kind_of(record)}; allowed are objects with a field of text")
    value, reached = record, []
    for part in [field] if field in record else field.split("."):
        if value is None:
            break
        if not isinstance(value, dict):
            raise DataError(
                f"data.path: {place}: data.text_field={field}, but {'.'.join(reached)} is {kind_of(value)}, which has "
                f"no field {part}"
            )
        if part not in value:
            refuse_chat(record, place)
            return Row(place, None, tuple(_names(record)))
        value = value[part]
        reached.append(part)
    if value is None:
        return Row(place, None)
    if not isinstance(value, str):
        if any(field in names for names in CHATS):
            refuse_chat(record, place)
        raise DataError(f"data.path: {place}: data.text_field={field} is {kind_of(value)}; name a field of text")
    try:
        return Row(place, value.encode() or None)
    except UnicodeEncodeError as error:
        raise DataError(
            f"data.path: {place}: data.text_field={field} holds half a surrogate pair at character {error.start}; "
            "write it anew in UTF-8, which has none"
        ) from error


def refuse_chat(fields: Collection[str], place: object) -> None:
    """Raise DataError, which says what can be done, if rows with these fields are chats."""
    for names in CHATS:
        if set(names) <= set(fields):
            raise DataError(
                f"data.path: {place} holds chats ({' and '.join(names)}); data=chat learns what their assistant says. "
                "To learn all of it, write each as the tokenizer's apply_chat_template(messages, tokenize=False) does "
                "into one field, and name it by data.text_field"
            )


def no_field(file: object, field: str, others: Collection[str]) -> DataError:
    """The error for a file none of whose rows has the field.

    Args:
        file: which.
        field: `data.text_field`.
        others: fields that there are.
    """
    named = ", ".join([*others][:NAMED_FIELDS]) + (", ..." if len(others) > NAMED_FIELDS else "")
    return DataError(f"data.path: no row of {file} has data.text_field={field}; its fields are {named or 'none'}")


def _names(record: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Fields of a record as `data.text_field` names them."""
    stack = [(prefix, record)]
    while stack:
        prefix, value = stack.pop()
        for name, inner in value.items():
            if isinstance(inner, dict) and inner:
                stack.append((f"{prefix}{name}.", inner))
            else:
                yield prefix + name


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
