"""Building a corpus folder: gather the text, hold documents out, train the tokenizer, write the tokens.

Files of the folder: text.bin (all documents end to end); for each part, tokens.bin, offsets.npy and spans.npy as in
`documents.Documents`, of texts for validation token_bytes.bin too, of chats learned.bin; the tokenizer's own; and
meta.json, which is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ringflash.configs.schema import DataConfig
from ringflash.errors import DataError
from ringflash.training.corpus import tokenizer as tokenizing
from ringflash.training.corpus.chats import ChatTokenizer
from ringflash.training.corpus.documents import sample
from ringflash.training.corpus.passed_over import PassedOver
from ringflash.training.corpus.reading import read_documents
from ringflash.training.corpus.tokenizer import Tokenizer

TOKENIZER_BYTES = 64 << 20
"""A BPE is trained on at most this much text."""

PIECE_BYTES, GROUP_BYTES = 1 << 20, 16 << 20
"""Longer documents are encoded in pieces, cut at line ends; a group of pieces is encoded in parallel."""


def gather(config: DataConfig, files: list[Path], target: Path, passed_over: PassedOver) -> tuple[str, np.ndarray]:
    """Write all documents end to end; returns a SHA-256 of text and lengths, and the lengths."""
    digest, lengths, left = hashlib.sha256(), [], config.max_bytes
    with target.open("wb") as out:
        for document in (text for file in files for text in read_documents(file, wanted_field(config), passed_over)):
            if left is not None:
                if config.format == "text":
                    document = document[:left].decode(errors="ignore").encode()
                elif len(document) > left:  # a chat is read as a whole
                    break
                left -= len(document)
            out.write(document)
            digest.update(document)
            lengths.append(len(document))
            if left is not None and left <= 3:  # less than a character may need
                break
    if not sum(lengths):
        said = f"; {passed_over}" if passed_over.counts else ""
        raise DataError(f"data.path={config.path}: no text in its {len(files)} files{said}")
    array = np.array(lengths, np.int64)
    digest.update(array.tobytes())
    return digest.hexdigest(), array


def wanted_field(config: DataConfig) -> str | None:
    """The field of text that rows are read for; None for chats."""
    return config.text_field if config.format == "text" else None


def build(
    config: DataConfig,
    sha256: str,
    lengths: np.ndarray,
    work: Path,
    place_of: Callable[[int], str],
    known: Tokenizer | None = None,
) -> None:
    """Split and tokenize what `gather` wrote into the folder `work`, and write everything else beside it.

    Args:
        config: how.
        sha256: of the text.
        lengths: of the documents, in bytes.
        work: the folder.
        place_of: file and row of a document, for messages.
        known: see `prepare`.
    """
    text = np.memmap(work / "text.bin", np.uint8, "r")
    train, validation, numbers = _spans(text, lengths, config, known is not None)
    assert config.tokenizer is not None  # `prepare` has chosen
    nothing_learned: list[int] = []
    if config.format == "chat":
        chats = ChatTokenizer(config.tokenizer)
        dtype = _dtype(chats.vocab_size)
        for part, spans, those in (("train", train, numbers[0]), ("validation", validation, numbers[1])):
            nothing_learned += _write_chats(chats, text, spans, those, work, part, dtype, place_of)
        chats.save(work)
    else:
        tokenizer = known or _tokenizer(config, text, train)
        dtype = _dtype(tokenizer.vocab_size)
        _write_tokens(tokenizer, text, train, work, "train", dtype)
        _write_tokens(tokenizer, text, validation, work, "validation", dtype)
        tokenizer.save(work)
    first = place_of(min(nothing_learned)) if nothing_learned else ""
    sizes = {file.name: file.stat().st_size for file in sorted(work.iterdir())}
    meta = {"sha256": sha256, "dtype": dtype.name, "sizes": sizes, "nothing_learned": [len(nothing_learned), first]}
    write_atomically(work / "meta.json", json.dumps(meta))


def _tokenizer(config: DataConfig, text: np.ndarray, train: np.ndarray) -> Tokenizer:
    assert config.tokenizer is not None
    if config.tokenizer != "bpe":
        return tokenizing.named(config.tokenizer)
    chosen = sample(text, train, TOKENIZER_BYTES)
    return tokenizing.BPETokenizer.train((document.tobytes() for document in chosen), config.vocab_size)


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _spans(
    text: np.ndarray, lengths: np.ndarray, config: DataConfig, all_held_out: bool
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Spans of the documents to learn from and of those held out, and the numbers of both among all."""
    ends = np.cumsum(lengths)
    spans, numbers = np.stack([ends - lengths, ends], axis=1), np.arange(len(lengths))
    nothing = np.zeros(len(spans), bool)
    if all_held_out or config.validation is not None:
        held_out = ~nothing if all_held_out else nothing
    elif len(spans) > 1:
        held_out = split(lengths, config.validation_fraction)
    else:
        return *_cut(text, config), (numbers, numbers)
    mixed = np.random.default_rng(0).permutation(numbers[held_out])
    return spans[~held_out], spans[mixed], (numbers[~held_out], mixed)


def _cut(text: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of one document the last part is held out, from a line's start on if there is one near."""
    if config.format == "chat":
        raise DataError(
            f"data.path={config.path} is one chat, of which none can be held out; give data.validation=PATH"
        )
    cut = max(1, int(len(text) * (1 - config.validation_fraction)))
    ahead = text[cut : cut + max(4, (len(text) - cut) // 2)].tobytes()
    cut += _line_end(ahead, 0) or _character_start(ahead)
    if cut >= len(text):
        raise DataError(f"data.path: one document of {len(text)} bytes is too short to hold a part of it out")
    return np.array([[0, cut]]), np.array([[cut, len(text)]])


def split(lengths: np.ndarray, fraction: float) -> np.ndarray:
    """Which of at least two documents are held out, as a boolean array.

    Every 1/fraction-th document by length is held out: short and long ones in the proportion of the whole, never the
    longest (of the standard library it is one file of 6 %), always at least one.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    steps = np.floor(np.arange(len(order) + 1) * fraction + 0.5)
    chosen = order[(np.diff(steps) > 0) & (np.arange(len(order)) > 0)]
    held_out = np.zeros(len(order), bool)
    held_out[chosen if len(chosen) else order[len(order) // 2]] = True
    return held_out


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_tokens(
    tokenizer: Tokenizer, text: np.ndarray, spans: np.ndarray, work: Path, part: str, dtype: np.dtype
) -> None:
    counted = part == "validation"
    offsets, total = [], 0
    with contextlib.ExitStack() as files:
        out = files.enter_context((work / f"{part}.tokens.bin").open("wb"))
        counts = files.enter_context((work / f"{part}.token_bytes.bin").open("wb")) if counted else None
        for group in _groups(text, spans):
            pieces = [piece for _, piece in group]
            encoded = tokenizer.encode_counted(pieces) if counted else [(ids, None) for ids in tokenizer.encode(pieces)]
            for (opens, _), (ids, num_bytes) in zip(group, encoded, strict=True):
                head = [tokenizer.separator] if opens else []
                offsets += [total] if opens else []
                total += len(head) + len(ids)
                out.write(np.array(head, dtype).tobytes() + ids.astype(dtype).tobytes())
                if counts is not None and num_bytes is not None:
                    counts.write(np.array([0] * len(head), np.uint32).tobytes() + num_bytes.astype(np.uint32).tobytes())
    np.save(work / f"{part}.offsets.npy", np.array([*offsets, total], np.int64))
    np.save(work / f"{part}.spans.npy", spans)


def _write_chats(
    chats: ChatTokenizer,
    text: np.ndarray,
    spans: np.ndarray,
    numbers: np.ndarray,
    work: Path,
    part: str,
    dtype: np.dtype,
    place_of: Callable[[int], str],
) -> list[int]:
    """Write the tokens of chats, and which are learned; returns the numbers of those that teach nothing, left out."""
    offsets, kept, left_out = [0], [], []
    with (work / f"{part}.tokens.bin").open("wb") as out, (work / f"{part}.learned.bin").open("wb") as learned:
        for number, (start, stop) in zip(numbers.tolist(), spans, strict=True):
            try:
                found = chats.encode(text[start:stop].tobytes(), f"chat {number}")
            except DataError as error:
                raise DataError(str(error).replace(f"chat {number}:", f"{place_of(number)}:", 1)) from error
            if not found.learned[1:].any():
                left_out.append(number)
                continue
            out.write(found.ids.astype(dtype).tobytes())
            learned.write(found.learned.astype(np.uint8).tobytes())
            offsets.append(offsets[-1] + len(found.ids))
            kept.append((start, stop))
    np.save(work / f"{part}.offsets.npy", np.array(offsets, np.int64))
    np.save(work / f"{part}.spans.npy", np.array(kept, np.int64).reshape(-1, 2))
    return left_out


def _groups(text: np.ndarray, spans: np.ndarray) -> Iterator[list[tuple[bool, bytes]]]:
    """Pieces of documents, each with whether it opens its document, in groups to encode at once."""
    group, size = [], 0
    for start, end in spans:
        position = start
        while position < end:
            piece = text[position : min(end, position + PIECE_BYTES)].tobytes()
            if position + len(piece) < end:
                piece = piece[: _line_end(piece, -1) or _character_start(piece, last=True)]
            group.append((position == start, piece))
            position += len(piece)
            size += len(piece)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _line_end(piece: bytes, which: int) -> int:
    """Just behind the first (0) or last (-1) line end; 0 if there is none."""
    return (piece.find(b"\n") if which == 0 else piece.rfind(b"\n")) + 1


def _character_start(piece: bytes, last: bool = False) -> int:
    """The first or last place in a piece of UTF-8 where a character starts."""
    places = range(len(piece) - 1, 0, -1) if last else range(len(piece))
    return next((i for i in places if piece[i] & 0xC0 != 0x80), len(piece))
