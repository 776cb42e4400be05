"""Chats: what a row says, and its tokens with those that an assistant says.

A row holds `messages`, or `prompt` and `completion`, each a text or messages; beside messages it may hold `tools`. What
a message says is text, or a list of parts of text. The tokenizer's own chat template writes messages. Learned is what
the template marks as generated, by {% generation %}; if it marks nothing, the last turn of the assistant, with the
tokens that end it. Of a completion all is learned, and of a prompt nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ringflash.errors import DataError
from ringflash.training.corpus.rows import NAMED_FIELDS, Row, kind_of
from ringflash.training.corpus.tokenizer import write_kind

FIELDS = ("messages", "prompt", "completion", "tools", "conversations")
"""Fields of a row that are looked at."""

OF_MESSAGES = ("role", "content")
"""Fields of a message that are looked at."""

GENERATION = "generation %}"
"""In a template that says what is generated."""


def chat_of(record: Any, place: str) -> Row:
    """The chat of a JSON record, as JSON of its own; none where fields are null or empty, or a message says nothing.

    Args:
        record: what JSON says.
        place: file and number of the record.

    Raises:
        DataError: fields of other kinds.
    """
    if not isinstance(record, dict):
        raise DataError(f"data.path: {place} is no object; allowed are objects with messages, or prompt and completion")
    fields, record = tuple(record), _without_nulls(record)
    if "messages" in record:
        chat = {"messages": _messages(record["messages"], f"{place}: messages")}
        if not chat["messages"] or _says_nothing(chat["messages"]):
            return Row(place, None)
    elif "prompt" in record and "completion" in record:
        chat = _pair(record["prompt"], record["completion"], place)
        if not chat["completion"] or any(_says_nothing(part) for part in chat.values()):
            return Row(place, None)
    elif "conversations" in record:
        raise DataError(
            f"data.path: {place} has conversations; name it messages, a list of objects with role and content"
        )
    else:
        there = any(name in fields for name in ("messages", "prompt", "completion"))
        return Row(place, None, None if there else fields)
    if record.get("tools"):
        chat["tools"] = record["tools"]
    try:
        return Row(place, json.dumps(chat, ensure_ascii=False).encode())
    except (UnicodeEncodeError, TypeError) as error:
        raise DataError(f"data.path: {place} holds what is no text: {error}; write it anew in UTF-8") from error


def no_chat(file: object, others: Collection[str]) -> DataError:
    """The error for a file none of whose rows holds a chat."""
    named = ", ".join([*others][:NAMED_FIELDS]) or "none"
    return DataError(f"data.path: no row of {file} has messages, or prompt and completion; its fields are {named}")


def _pair(prompt: Any, completion: Any, place: str) -> dict[str, Any]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        return {
            "prompt": _messages(prompt, f"{place}: prompt"),
            "completion": _messages(completion, f"{place}: completion"),
        }
    raise DataError(f"data.path: {place}: prompt and completion must both be text, or both lists of messages")


def _messages(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"data.path: {place} is no list; allowed are lists of objects with role and content")
    return [_message(message, f"{place}, message {number},") for number, message in enumerate(value, 1)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"data.path: {place} has no role; allowed are objects with role and content")
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"text": part} for part in content]
        if not all(part.get("type", "text") == "text" and isinstance(part.get("text"), str) for part in parts):
            kinds = sorted({str(part.get("type", kind_of(part.get("text")))) for part in parts} - {"text"})
            raise DataError(
                f"data.path: {place} has parts of {' and '.join(kinds) or 'no text'}; allowed are parts of text"
            )
        return message | {
            "content": "".join(part["text"] for part in parts)
        }  # templates differ in what they do with lists
    if not isinstance(content, str):
        raise DataError(
            f"data.path: {place} has content that is {kind_of(content)}; allowed are text and lists of parts"
        )
    return message


def _says_nothing(messages: str | list[dict[str, Any]]) -> bool:
    """Whether a message has no content, and no call of a tool or the like; one of the assistant must not be empty."""

    def silent(message: dict[str, Any]) -> bool:
        if message["role"] == "assistant":
            return not any(value for name, value in message.items() if name != "role")
        return message.keys() == {"role"}

    return not isinstance(messages, str) and any(map(silent, messages))


def _without_nulls(value: Any) -> Any:
    """Without fields that are null, which parquet and Arrow add to objects that lack what others have."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


class Encoded(NamedTuple):
    """Tokens of a chat.

    Attributes:
        ids: int64.
        learned: bool, which of them are learned.
    """

    ids: np.ndarray
    learned: np.ndarray


class ChatTokenizer:
    """The tokenizer of a Hugging Face folder, with its chat template.

    Args:
        folder: for `AutoTokenizer`.

    Raises:
        DataError: it holds no tokenizer, or one that does not know which characters a token stands for.
    """

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer  # an optional library

        self.folder = folder
        try:
            path = Path(folder).expanduser()
            found: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of damaged files it raises anything
            raise DataError(f"data.tokenizer={folder}: no readable tokenizer: {error}") from error
        if not found.is_fast:
            raise DataError(
                f"data.tokenizer={folder}: {type(found).__name__} does not say which characters its tokens stand "
                "for; allowed are those that have a tokenizer.json"
            )
        self.auto = found
        self.vocab_size: int = max(len(self.auto), *(index + 1 for index in self.auto.get_vocab().values()))
        template: Any = self.auto.chat_template
        self.marks = isinstance(template, str) and GENERATION in template

    def encode(self, chat: bytes, place: str) -> Encoded:
        """Tokens of a chat.

        Args:
            chat: what `chat_of` made of a row.
            place: of the row, for messages.

        Raises:
            DataError: the template refuses the chat, or writes a part of it in another way by itself than in the whole.
        """
        record = json.loads(chat)
        tools = record.get("tools")
        if "messages" in record:
            if self.marks:
                return self._marked(record["messages"], tools, place)
            messages = record["messages"]
            last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
            if last < 0:
                return Encoded(np.zeros(0, np.int64), np.zeros(0, bool))
            return self._behind(messages[:last], messages[: last + 1], tools, place)
        if isinstance(record["prompt"], list):
            return self._behind(record["prompt"], record["prompt"] + record["completion"], tools, place)
        return self._completion(record["prompt"], record["completion"])

    def _marked(self, messages: list, tools: Any, place: str) -> Encoded:
        found = self._rendered(
            messages, tools, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Encoded(np.array(found["input_ids"], np.int64), np.array(found["assistant_masks"], bool))

    def _behind(self, given: list, messages: list, tools: Any, place: str) -> Encoded:
        """Learned is what the template writes behind the messages that are given."""
        whole = self._rendered(messages, tools, place, tokenize=False)
        before = self._rendered(given, tools, place, tokenize=False, add_generation_prompt=True) if given else ""
        if not whole.startswith(before):
            raise DataError(
                f"data.path: {place}: the chat template of data.tokenizer={self.folder} writes the messages before the "
                "answer in another way when the answer is there; mark the answer in the template by {% generation %}"
            )
        found = self.auto(whole, add_special_tokens=False, return_offsets_mapping=True)
        ends = np.array([end for _, end in found["offset_mapping"]], np.int64)
        return Encoded(np.array(found["input_ids"], np.int64), ends > len(before))

    def _completion(self, prompt: str, completion: str) -> Encoded:
        """A prompt has the tokens that it has by itself, as when an answer to it is generated."""
        given = self.auto(prompt)["input_ids"] if prompt else []
        end = self.auto.eos_token_id
        if given and given[-1] == end:  # some tokenizers end every text
            given = given[:-1]
        learned = self.auto(completion, add_special_tokens=not given)["input_ids"]
        learned += [end] if end is not None and learned[-1:] != [end] else []
        ids = np.array([*given, *learned], np.int64)
        return Encoded(ids, np.arange(len(ids)) >= len(given))

    def _rendered(self, messages: list, tools: Any, place: str, **options: Any) -> Any:
        if not self.auto.chat_template:
            raise DataError(f"data.tokenizer={self.folder} has no chat template, which messages need")
        try:
            return self.auto.apply_chat_template(messages, tools=tools, **options)
        except Exception as error:  # a template raises what it likes
            raise DataError(
                f"data.path: {place}: the chat template of data.tokenizer={self.folder} refuses it: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the files of the tokenizer, for `tokenizer.load` too."""
        self.auto.save_pretrained(folder)
        write_kind(folder, "huggingface")
