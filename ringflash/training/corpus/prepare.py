"""From text to a tokenized corpus, built once and cached.

    corpus = prepare(DataConfig(path=None, cache_dir="runs/cache"))
    batches = PackedBatches(EpochSamples(corpus.train, seqlen=4096, seed=0), batch=1)
    next(batches)                  # {"input_ids": (1, 4096) int64, "cu_seqlens": [0, 1733, 4096]}

Every document is [separator, its tokens...]. The separator stands for no bytes and is never predicted; it is what the
first token is predicted from. So a model predicts every byte of a document, as the byte n-gram models do, and neither
is given or asked where a document ends. A chat is the tokens that its template gives.

The cache is a folder named by a SHA-256 over the text and everything that shapes the tokens. Any rank may call
`prepare`: a file lock lets one per host build while the others wait, and a build that fails raises the same DataError
on each. Tokens and text are memory-mapped, so a corpus may be larger than memory (one document may not).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Generator
from importlib import metadata
from pathlib import Path

import numpy as np
import tokenizers

from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError, DataError
from ringflash.training.corpus import tokenizer as tokenizing
from ringflash.training.corpus.building import build, gather, wanted_field, write_atomically
from ringflash.training.corpus.documents import Corpus, Documents
from ringflash.training.corpus.passed_over import NOTHING_LEARNED, PassedOver
from ringflash.training.corpus.reading import read_rows
from ringflash.training.corpus.sources import source_files, status
from ringflash.training.corpus.tokenizer import BPETokenizer, Tokenizer

FORMAT = 4
"""Raise it when the cached files or their meaning change."""

OF_STREAMS = ("streaming", "subset", "split", "revision")
"""Keys of `data` that say nothing about a corpus that is tokenized as a whole."""


def prepare(config: DataConfig, known: Tokenizer | None = None) -> Corpus:
    """Read, split and tokenize what `config.path` names, or open the result that `config.cache_dir` holds.

    Args:
        config: what to read, and how.
        known: the tokenizer of the documents to learn from, if all of these are to be held out.

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
    files, settings = source_files(config.path, passed_over), _settings(config, known)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            return _open(*_find_or_build(config, files, settings, cache, passed_over, known))
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
    config: DataConfig,
    files: list[Path],
    settings: dict,
    cache: Path,
    passed_over: PassedOver,
    known: Tokenizer | None,
) -> tuple[Path, PassedOver]:
    # Names, sizes and times of the sources show whether they were read before; then they need not be read again.
    seen = _seen(files)
    pointer = cache / f"{_digest([settings, seen])}.ref"
    if (built := _built(pointer)) is not None:
        return built
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
            build(config, sha256, lengths, work, lambda number: _place(config, files, number), known)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(work, folder)
        write_atomically(pointer, json.dumps({"folder": folder.name, "passed_over": passed_over.counts}))
        return folder, passed_over
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _place(config: DataConfig, files: list[Path], number: int) -> str:
    """File and row of a document, for a message: read once more, so that nobody has to remember them all."""
    rows = (row for file in files for row in read_rows(file, wanted_field(config), PassedOver()))
    return next(itertools.islice(rows, number, None)).place


def _seen(files: list[Path]) -> list[tuple[str, int, int]]:
    return [(str(file.resolve()), now.st_size, now.st_mtime_ns) for file in files for now in [status(file)]]


def _built(pointer: Path) -> tuple[Path, PassedOver] | None:
    """The folder that was built from the same sources before, if it is complete, and what was passed over."""
    try:
        found = json.loads(pointer.read_text())
        folder, passed_over = pointer.with_name(found["folder"]), PassedOver(found["passed_over"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (folder, passed_over) if _complete(folder) else None


def _settings(config: DataConfig, known: Tokenizer | None) -> dict:
    settings: dict = {"version": FORMAT, "tokenizers": tokenizers.__version__, **dataclasses.asdict(config)}
    for name in ("cache_dir", "path", "validation", "mixture", *OF_STREAMS):
        del settings[name]
    settings["held_out"] = "nothing" if config.validation is not None else "a share"
    if known is not None:
        settings["held_out"] = _digest(known.backend.to_str()) if isinstance(known, BPETokenizer) else "all"
    assert config.tokenizer is not None  # `prepare` has chosen
    if config.format == "chat":
        settings["transformers"] = metadata.version("transformers")
    if config.tokenizer not in ("bpe", "bytes"):
        settings["tokenizer"] = tokenizer_identity(config.tokenizer)
    return settings


def tokenizer_identity(tokenizer: str) -> list[str]:
    """SHA-256 sums of the files of a tokenizer's folder, which tell it from others."""
    try:
        files = tokenizing.tokenizer_files(tokenizing.huggingface_folder(tokenizer))
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    except OSError as error:
        raise DataError(f"data.tokenizer: cannot read {error.filename}: {error.strerror}") from error


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
        def optional(kind: str, dtype: type) -> np.ndarray | None:
            return _mapped(file, dtype) if (file := folder / f"{name}.{kind}.bin").exists() else None

        return Documents(
            tokens=_mapped(folder / f"{name}.tokens.bin", meta["dtype"]),
            offsets=np.load(folder / f"{name}.offsets.npy"),
            text=text,
            spans=np.load(folder / f"{name}.spans.npy"),
            token_bytes=optional("token_bytes", np.uint32),
            identity=f"{folder.name}/{name}",
            learned=optional("learned", np.uint8),
        )

    number, first = meta["nothing_learned"]
    if number:
        passed_over = PassedOver(passed_over.counts | {NOTHING_LEARNED: (number, first)})

    return Corpus(part("train"), part("validation"), tokenizing.load(folder), meta["sha256"], folder, passed_over)


def _mapped(file: Path, dtype: str | type) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
