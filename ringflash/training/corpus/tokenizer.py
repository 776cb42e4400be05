"""Tokenizers over bytes: a byte-level BPE trained here, single bytes, or one from a Hugging Face folder.

All three have `vocab_size`, `separator` (the token that opens every document and stands for no bytes), `encode`,
`encode_counted`, `decode` and `save`. `encode_counted` also says how many bytes each token stands for: loss in bits per
byte is exact, and comparable between tokenizers, because these counts sum to the length of the text.

By hand is the counting of bytes, which no library does; the BPE is of the library tokenizers, and chats are encoded by
`AutoTokenizer` (`corpus.chats`).

The BPE and the bytes take any byte string, also one that is not UTF-8, and give it back unchanged. The separator is
an id that no text can produce.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ringflash.errors import ArgumentError, DataError
from ringflash.training.extras import require

PATTERN = r"\s*\n[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
"""Pieces that no token crosses. A line end keeps the next line's indentation: 4 % fewer tokens of source code."""

KIND_FILE = "ringflash_tokenizer.json"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
KEPT = ("token*", KIND_FILE, SPECIAL_FILE, "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
"""Files of a Hugging Face folder that its tokenizer, and its chat template, may consist of."""


class Tokenizer(Protocol):
    """What the three tokenizers have in common."""

    vocab_size: int
    separator: int

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of each text, int64, without separators."""

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of each text, and the bytes that each token stands for; the counts sum to the text's length."""

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of some tokens; separators give nothing."""

    def save(self, folder: Path) -> None:
        """Write what `load` needs."""


class ByteTokenizer:
    """One token a byte, and the separator 256."""

    vocab_size = 257
    separator = 256

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:  # noqa: D102
        return [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:  # noqa: D102
        return [(ids, np.ones(len(ids), np.int64)) for ids in self.encode(texts)]

    def decode(self, ids: Iterable[int]) -> bytes:  # noqa: D102
        return bytes(i for i in map(int, ids) if i != self.separator)

    def save(self, folder: Path) -> None:  # noqa: D102
        write_kind(folder, "bytes")

    @staticmethod
    def alphabet() -> dict[str, int]:
        """The vocabulary by the characters that byte-level BPE writes for bytes."""
        return {character: byte for byte, character in _byte_alphabet().items()}


class BPETokenizer:
    """Byte-level BPE; every token is a byte string, `token_bytes[i]` that of token i."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        # Outside the backend's vocabulary: text that spells some special token stays text.
        self.separator = backend.get_vocab_size()
        self.vocab_size = self.separator + 1
        byte_of = {character: byte for byte, character in _byte_alphabet().items()}
        self.token_bytes = [b""] * self.vocab_size
        for token, index in backend.get_vocab().items():
            self.token_bytes[index] = bytes(byte_of[character] for character in token)
        self._lengths = np.array([len(token) for token in self.token_bytes])
        self._single = np.array([backend.token_to_id(_byte_alphabet()[byte]) for byte in range(256)])

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int) -> BPETokenizer:
        """Train on texts; short ones may give fewer than `vocab_size` tokens.

        Args:
            texts: byte strings; bytes that are not UTF-8 are left out of the training.
            vocab_size: tokens to end up with, separator included; at least 257.
        """
        if vocab_size < 257:
            raise ArgumentError(f"data.vocab_size={vocab_size}; 256 bytes and the separator need 257 or more")
        backend = tokenizers.Tokenizer(models.BPE())
        pieces = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator((text.decode("utf-8", "ignore") for text in texts), trainer)
        return cls(backend)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:  # noqa: D102
        try:
            strings = [text.decode() for text in texts]
        except UnicodeDecodeError:
            return [self._encode_any(text) for text in texts]
        encodings = self.backend.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def _encode_any(self, text: bytes) -> np.ndarray:
        # Bytes that are not UTF-8 become one token each; what lies between them is encoded as usual.
        ids: list[int] = []
        run = ""
        for character in [*text.decode("utf-8", "surrogateescape"), None]:
            if character is not None and not "\udc80" <= character <= "\udcff":
                run += character
                continue
            ids += self.backend.encode(run, add_special_tokens=False).ids
            run = ""
            if character is not None:
                ids.append(int(self._single[ord(character) - 0xDC00]))
        return np.array(ids, np.int64)

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:  # noqa: D102
        return [(ids, self._lengths[ids]) for ids in self.encode(texts)]

    def decode(self, ids: Iterable[int]) -> bytes:  # noqa: D102
        return b"".join(self.token_bytes[i] for i in ids)

    def save(self, folder: Path) -> None:  # noqa: D102
        self.backend.save(str(folder / TOKENIZER_FILE))
        write_kind(folder, "bpe")


class HuggingFaceTokenizer:
    """A tokenizer of a Hugging Face folder, with the folder's own bos or eos token as separator.

    Its `tokenizer.json` is read by the library tokenizers, which says of each token where it stands in the text, and
    needs no Transformers. A folder without that file, as of SentencePiece, is read by `AutoTokenizer`.

    Bytes are counted by each token's offsets in the text, so they sum to the text's length under any normalizer; among
    the tokens of one character, the first has all of its bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / TOKENIZER_FILE).is_file():
            try:
                self.backend = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            except Exception as error:  # the library raises plain Exception
                raise DataError(
                    f"data.tokenizer: {folder / TOKENIZER_FILE} is no readable tokenizer: {error}; copy it anew"
                ) from error
        else:
            self.backend = _made_by_transformers(folder)
        self.backend.no_padding()
        self.backend.no_truncation()
        # Text that spells a special token is text.
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab()
        if not vocabulary:
            raise DataError(f"data.tokenizer: {folder / TOKENIZER_FILE} has no tokens; copy it anew")
        self.separator = _separator(folder, vocabulary)
        self.vocab_size = max(self.separator, *vocabulary.values()) + 1

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:  # noqa: D102
        encodings = self._encoded(self.backend.encode_batch_fast, _decoded(texts))
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def _encoded(self, encode: Callable[..., list[Any]], strings: list[str]) -> list[Any]:
        try:
            return encode(strings, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"data.tokenizer: {self.folder / TOKENIZER_FILE} has no tokens for this text: {error}; take a "
                "tokenizer that encodes any"
            ) from error

    def encode_counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:  # noqa: D102
        strings = _decoded(texts)
        encodings = self._encoded(self.backend.encode_batch, strings)
        return [
            (np.array(encoding.ids, np.int64), _bytes_by_offset(string, encoding.offsets))
            for string, encoding in zip(strings, encodings, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> bytes:  # noqa: D102
        kept = [int(i) for i in ids if i != self.separator]
        return self.backend.decode(kept, skip_special_tokens=False).encode()

    def save(self, folder: Path) -> None:  # noqa: D102
        for file in tokenizer_files(self.folder) if folder.resolve() != self.folder.resolve() else ():
            shutil.copyfile(file, folder / file.name)
        if not (folder / TOKENIZER_FILE).is_file():
            self.backend.save(str(folder / TOKENIZER_FILE))
        write_kind(folder, "huggingface")


def load(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into a folder."""
    try:
        kind = json.loads((folder / KIND_FILE).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"data.tokenizer: cannot read {folder / KIND_FILE}: {error!r}; copy the folder anew") from error
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer(tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)))
    return HuggingFaceTokenizer(folder)


def named(tokenizer: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, if it needs no training: "bytes", or a folder, also of a run."""
    if tokenizer == "bytes":
        return ByteTokenizer()
    folder = Path(tokenizer).expanduser()
    return load(folder) if (folder / KIND_FILE).is_file() else HuggingFaceTokenizer(huggingface_folder(tokenizer))


def fingerprint(tokenizer: Any) -> str:
    """What tells a tokenizer's tokens from another one's, however its files are written."""
    backend = getattr(tokenizer, "backend", None) or getattr(tokenizer, "auto", None)
    vocabulary = {} if backend is None else backend.get_vocab()
    return hashlib.sha256(json.dumps([tokenizer.vocab_size, sorted(vocabulary.items())]).encode()).hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a Hugging Face folder that shape its tokens, sorted by name."""
    return sorted({file for pattern in KEPT for file in folder.glob(pattern) if file.is_file()})


def huggingface_folder(path: str) -> Path:
    """The folder that `data.tokenizer=path` names; DataError if it holds no tokenizer.json."""
    folder = Path(path).expanduser()
    if (folder / KIND_FILE).is_file():
        return folder
    if folder.name == TOKENIZER_FILE:
        folder = folder.parent
    if not any((folder / name).is_file() for name in (TOKENIZER_FILE, CONFIG_FILE)):
        there = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else None
        state = (
            "no such folder" if there is None else f"no {TOKENIZER_FILE} in it, only {', '.join(there) or 'nothing'}"
        )
        raise DataError(f"data.tokenizer={path}: {state}; allowed are bpe, bytes, or a folder with a {TOKENIZER_FILE}")
    return folder


def _made_by_transformers(folder: Path) -> tokenizers.Tokenizer:
    require(f"data.tokenizer={folder}, which has no {TOKENIZER_FILE},", "transformers")
    from transformers import AutoTokenizer  # an optional library

    try:
        found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return found.backend_tokenizer
    except Exception as error:  # of damaged files it raises anything
        raise DataError(f"data.tokenizer={folder}: no readable tokenizer: {error}") from error


def _separator(folder: Path, vocabulary: dict[str, int]) -> int:
    named: dict[str, Any] = {}
    for config in (folder / SPECIAL_FILE, folder / CONFIG_FILE):  # the second one holds what older versions wrote apart
        if not config.exists():
            continue
        try:
            found = json.loads(config.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"data.tokenizer: {config} cannot be read as JSON: {error}; copy it anew") from error
        if not isinstance(found, dict):
            raise DataError(f"data.tokenizer: {config} holds a {type(found).__name__}, not an object; copy it anew")
        named |= found
    for key in ("bos_token", "eos_token"):
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocabulary:
            return vocabulary[token]
    return max(vocabulary.values()) + 1


def _bytes_by_offset(string: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    # Token i stands for what lies between the furthest end before it and its own; the last also for what is left.
    position = np.zeros(len(string) + 1, np.int64)
    np.cumsum([len(character.encode()) for character in string], out=position[1:])
    if not offsets:
        return np.zeros(0, np.int64)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    ends[-1] = len(string)
    return np.diff(position[ends], prepend=0)


def _decoded(texts: Sequence[bytes]) -> list[str]:
    try:
        return [text.decode() for text in texts]
    except UnicodeDecodeError as error:
        raise DataError(f"data.tokenizer: a Hugging Face tokenizer takes UTF-8 text only: {error}") from error


def _byte_alphabet() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte: itself, or the next one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_kind(folder: Path, kind: str) -> None:
    """Write by which of the three a folder is to be read."""
    (folder / KIND_FILE).write_text(json.dumps({"kind": kind}))
