"""From text to a tokenized corpus, built once and cached.

    corpus = prepare(DataConfig(path=None, cache_dir="runs/cache"))
    batches = PackedBatches(corpus.train, seqlen=4096, batch=1, seed=0)
    next(batches)                  # {"input_ids": (1, 4096) int64, "cu_seqlens": [0, 1733, 4096]}

Every document is [separator, its tokens...]. The separator stands for no bytes and is never predicted; it is what the
first token is predicted from. So a model predicts every byte of a document, as the byte n-gram models do, and neither
is given or asked where a document ends.

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
from collections.abc import Generator
from pathlib import Path

import numpy as np
import tokenizers

from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError, DataError
from ringflash.training.corpus import tokenizer as tokenizing
from ringflash.training.corpus.building import build, gather, write_atomically
from ringflash.training.corpus.documents import Corpus, Documents
from ringflash.training.corpus.passed_over import PassedOver
from ringflash.training.corpus.sources import source_files, status

FORMAT = 3
"""Raise it when the cached files or their meaning change."""


def prepare(config: DataConfig) -> Corpus:
    """Read, split and tokenize what `config.path` names, or open the result that `config.cache_dir` holds.

    Raises:
        DataError: nothing to read, unreadable or undecodable text, an absent field or tokenizer, an unwritable cache;
            names the file, and the row and field in it.
    """
    if not 0 < config.validation_fraction < 1:
        raise ArgumentError(f"data.validation_fraction={config.validation_fraction}; allowed is between 0 and 1")
    if config.max_bytes is not None and config.max_bytes < 1:
        raise ArgumentError(f"data.max_bytes={config.max_bytes}; allowed is 1 and more, or null for all of the text")
    config = dataclasses.replace(config, tokenizer=config.tokenizer or "bpe")
    cache = Path(config.cache_dir).expanduser()
    passed_over = PassedOver()
    files, settings = source_files(config.path, passed_over), _settings(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            return _open(*_find_or_build(config, files, settings, cache, passed_over))
    except OSError as error:
        raise DataError(f"data.cache_dir={cache}: cannot keep tokens there: {error}") from error


# Finding and keeping


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    # The system releases the lock when its holder dies, so a killed build blocks nobody.
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_or_build(
    config: DataConfig, files: list[Path], settings: dict, cache: Path, passed_over: PassedOver
) -> tuple[Path, PassedOver]:
    # Names, sizes and times of the sources show whether they were read before; then they need not be read again.
    seen = _seen(files)
    pointer = cache / f"{_digest([settings, seen])}.ref"
    if (known := _known(pointer)) is not None:
        return known
    work = cache / f"building-{socket.gethostname()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        sha256, lengths = gather(config, files, work / "text.bin", passed_over)
        for file, before, after in zip(files, seen, _seen(files), strict=True):
            if before != after:
                raise DataError(f"data.path: {file} changed while it was read; start again once nothing writes to it")
        folder = cache / _digest([settings, sha256])[:32]
        if not _complete(folder):
            build(config, sha256, lengths, work)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        write_atomically(pointer, json.dumps({"folder": folder.name, "passed_over": passed_over.counts}))
        return folder, passed_over
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _seen(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(file.resolve()), now.st_size, now.st_mtime_ns) for file in files for now in [status(file)]]


def _known(pointer: Path) -> tuple[Path, PassedOver] | None:
    """The folder that was built from the same sources before, if it is complete, and what was passed over."""
    try:
        found = json.loads(pointer.read_text())
        folder, passed_over = pointer.with_name(found["folder"]), PassedOver(found["passed_over"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (folder, passed_over) if _complete(folder) else None


def _settings(config: DataConfig) -> dict:
    settings: dict = {"format": FORMAT, "tokenizers": tokenizers.__version__, **dataclasses.asdict(config)}
    del settings["cache_dir"], settings["path"]
    assert config.tokenizer is not None  # `prepare` has chosen
    if config.tokenizer not in ("bpe", "bytes"):
        folder = tokenizing.huggingface_folder(config.tokenizer)
        try:
            shapes_tokens = [file.read_bytes() for file in tokenizing.tokenizer_files(folder)]
        except OSError as error:
            raise DataError(f"data.tokenizer: cannot read {error.filename}: {error.strerror}") from error
        settings["tokenizer"] = [hashlib.sha256(content).hexdigest() for content in shapes_tokens]
    return settings


def _complete(folder: Path) -> bool:
    # The folder got its name when it was whole; sizes are checked because a crash may lose what was not yet on disk.
    try:
        sizes = json.loads((folder / "meta.json").read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _open(folder: Path, passed_over: PassedOver) -> Corpus:
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

    return Corpus(part("train"), part("validation"), tokenizing.load(folder), meta["sha256"], folder, passed_over)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
