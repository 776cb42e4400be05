"""From text to packed batches: `prepare` builds a corpus once and caches it, `PackedBatches` deals it to data ranks.

    corpus = prepare(DataConfig(path=None), cache_dir="runs/cache")
    batches = PackedBatches(corpus.train, seqlen=4096, batch=1, seed=0)
    next(batches)                  # {"input_ids": (1, 4096) int64, "cu_seqlens": [0, 1733, 4096]}

Every document is [separator, its tokens...]. The separator stands for no bytes and is never predicted; it is what the
first token is predicted from. So a model predicts every byte of a document, as the byte n-gram models do, and neither
is told or asked where a document ends.

The cache is a folder named by a SHA-256 over the text and everything that shapes the tokens. Any rank may call
`prepare`: a file lock lets one per host build while the others wait, and a build that fails raises the same DataError
on each. Tokens and text are memory-mapped, so a corpus may be larger than memory (one document may not).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError, DataError
from ringflash.training import tokenizer as tokenizing
from ringflash.training.building import build, gather, sample, write_atomically
from ringflash.training.packing import PackedBatches, ValidationBatches
from ringflash.training.sources import source_files
from ringflash.training.tokenizer import Tokenizer

__all__ = ["Corpus", "Documents", "PackedBatches", "ValidationBatches", "prepare"]

FORMAT = 1
"""Raise it when the cached files or their meaning change."""


@dataclass(frozen=True)
class Documents:
    """Documents of the train or validation part.

    Attributes:
        tokens: all documents end to end, each opened by a separator; uint16 or uint32.
        offsets: (documents + 1,) int64; document i is tokens[offsets[i] : offsets[i + 1]].
        text: uint8, the whole corpus.
        spans: (documents, 2) int64; document i is text[spans[i, 0] : spans[i, 1]].
        token_bytes: uint32, bytes that each of `tokens` stands for; None for the training part.
        identity: names the text, the tokenizer and the part.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text: np.ndarray
    spans: np.ndarray
    token_bytes: np.ndarray | None
    identity: str

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted: all but the separators."""
        return len(self.tokens) - len(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def sample(self, max_bytes: int) -> list[np.ndarray]:
        """Text (uint8) of all documents, or of a fixed random choice of them that is cut to `max_bytes`."""
        return sample(self.text, self.spans, max_bytes)


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: what `prepare` returns.

    Attributes:
        train: documents to learn from, in the sources' order.
        validation: held-out documents, shuffled once, so that any first part of them represents the whole.
        tokenizer: the tokenizer of both.
        sha256: of the text and its division into documents.
        folder: the cache folder of this corpus.
    """

    train: Documents
    validation: Documents
    tokenizer: Tokenizer
    sha256: str
    folder: Path

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a predicted training token stands for, on average."""
        return self.train.num_bytes / self.train.num_tokens


def prepare(config: DataConfig, cache_dir: str | Path | None = None) -> Corpus:
    """Read, split and tokenize what `config.path` names, or open the cached result.

    Args:
        config: the data group of the configuration.
        cache_dir: where to keep the result; None for `config.cache_dir`.

    Raises:
        DataError: nothing to read, unreadable or undecodable text, an absent field or tokenizer, an unwritable cache.
    """
    if not 0 < config.validation_fraction < 1:
        raise ArgumentError(f"data.validation_fraction={config.validation_fraction}; allowed is between 0 and 1")
    if config.max_bytes is not None and config.max_bytes < 1:
        raise ArgumentError(f"data.max_bytes={config.max_bytes}; allowed is 1 and more, or null for all of the text")
    cache = Path(cache_dir or config.cache_dir).expanduser()
    files, settings = source_files(config.path), _settings(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            return _open(_find_or_build(config, files, settings, cache))
    except OSError as error:
        raise DataError(f"data.cache_dir={cache}: cannot keep tokens there: {error}") from error


# Finding and keeping


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The system releases the lock when its holder dies, so a killed build blocks nobody.
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_or_build(config: DataConfig, files: list[Path], settings: dict, cache: Path) -> Path:
    # Names, sizes and times of the sources tell whether they were read before; then they need not be read again.
    seen = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [_stat(file)]]
    pointer = cache / f"{_digest([settings, seen])}.ref"
    if pointer.exists() and _complete(cache / pointer.read_text()):
        return cache / pointer.read_text()
    work = cache / f"building-{socket.gethostname()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        sha256, lengths = gather(config, files, work / "text.bin")
        folder = cache / _digest([settings, sha256])[:32]
        if not _complete(folder):
            build(config, sha256, lengths, work)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        write_atomically(pointer, folder.name)
        return folder
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _settings(config: DataConfig) -> dict:
    settings = {"format": FORMAT, "tokenizers": tokenizers.__version__, **dataclasses.asdict(config)}
    del settings["cache_dir"], settings["path"]
    if config.tokenizer not in ("bpe", "bytes"):
        folder = tokenizing.huggingface_folder(config.tokenizer)
        try:
            shapes_tokens = [file.read_bytes() for file in sorted(folder.glob("token*.json"))]
        except OSError as error:
            raise DataError(f"data.tokenizer: cannot read {error.filename}: {error.strerror}") from error
        settings["tokenizer"] = [hashlib.sha256(content).hexdigest() for content in shapes_tokens]
    return settings


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}") from error


def _complete(folder: Path) -> bool:
    # The folder got its name when it was whole; sizes are checked because a crash may lose what was not yet on disk.
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _open(folder: Path) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    text = np.memmap(folder / "text.bin", np.uint8, "r")

    def part(name: str) -> Documents:
        counted = folder / f"{name}.token_bytes.bin"
        return Documents(
            tokens=np.memmap(folder / f"{name}.tokens.bin", meta["dtype"], "r"),
            offsets=np.load(folder / f"{name}.offsets.npy"),
            text=text,
            spans=np.load(folder / f"{name}.spans.npy"),
            token_bytes=np.memmap(counted, np.uint32, "r") if counted.exists() else None,
            identity=f"{folder.name}/{name}",
        )

    return Corpus(part("train"), part("validation"), tokenizing.load(folder), meta["sha256"], folder)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
