"""Documents that are read and tokenized while training, by `datasets`, from local files or from the Hugging Face hub.

Rows are read in blocks of some sequences' tokens. A block's documents are shuffled and packed as an epoch's are, and
what is left of its last sequence is padded, so nothing is dropped. The state is that of `datasets` at the block's
beginning, and how many of its sequences were drawn: resuming reads one block again and goes on bit for bit. (Blocks
stand by hand where `datasets` has a buffer to shuffle in, because the library forgets what is in it when it resumes.)

Local files are read by the same rules as a corpus (`corpus.reading`), in an order that is shuffled for each epoch.
Every rank reads and tokenizes the whole stream, so that the order of sequences knows nothing of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import IterableDataset, load_dataset

from ringflash.configs.schema import DataConfig
from ringflash.errors import DataError
from ringflash.training.corpus.building import wanted_field
from ringflash.training.corpus.chats import Encoded
from ringflash.training.corpus.documents import Documents
from ringflash.training.corpus.packing import Packed, Packing
from ringflash.training.corpus.passed_over import CUT, NOTHING_LEARNED, WITHOUT_TEXT, PassedOver
from ringflash.training.corpus.reading import Wanted, read_rows
from ringflash.training.corpus.rows import Row
from ringflash.training.corpus.samples import Samples, check_same, shuffled
from ringflash.training.corpus.sources import source_files, status

BLOCK_SEQUENCES = 64
"""Sequences of a block, at least: so much is shuffled, and read again on resuming."""


class StreamedSamples(Samples):
    """Packed sequences of a stream; see the module.

    Args:
        config: where the rows come from.
        encode: tokens of a document, from its text or chat and its place.
        encoder: names the tokenizer.
        seqlen: tokens of a sequence.
        seed: of the order.

    Attributes:
        passed_over: counts what was left out so far.
        identity: names the rows and the tokenizer.
    """

    def __init__(
        self, config: DataConfig, encode: Callable[[bytes, str], Encoded], encoder: str, seqlen: int, seed: int
    ) -> None:
        self.seqlen, self.seed, self.passed_over = seqlen, seed, PassedOver()
        self._config, self._encode, self._wanted = config, encode, Wanted(wanted_field(config))
        self._files = _local_files(config, self.passed_over)
        self.identity = hashlib.sha256(json.dumps([_named(config, self._files), encoder]).encode()).hexdigest()[:32]
        self._begin(epoch=0)

    def draw(self, wanted: bool) -> Packed | None:
        """See Samples."""
        packing, order = self._current()
        while self._index == len(packing):
            self._block, self._index, self._packed, self._from = self._block + 1, 0, None, self._then
            packing, order = self._current()
        index, self._index = self._index, self._index + 1
        return packing[int(order[index])] if wanted else None

    def state_dict(self) -> dict[str, Any]:
        """See Samples."""
        return {
            "epoch": self._epoch,
            "block": self._block,
            "index": self._index,
            "stream": self._from,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "documents": self.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Samples."""
        check_same(state, self.state_dict(), ("seqlen", "seed", "documents"))
        self._begin(state["epoch"])
        self._block, self._index, self._from = state["block"], state["index"], state["stream"]
        if self._from is not None:
            self._row = self._from["row"]
            self._rows_there.load_state_dict(self._from["datasets"])
            self._documents = self._read()

    @property
    def epoch(self) -> float:
        """Passes over the rows that were ended."""
        return float(self._epoch)

    def _begin(self, epoch: int) -> None:
        self._epoch, self._block, self._index, self._row = epoch, 0, 0, 0
        self._from: dict[str, Any] | None = None
        self._then: dict[str, Any] | None = None
        self._packed: tuple[Packing, np.ndarray] | None = None
        self._rows_there = self._open(epoch)
        self._documents = self._read()

    def _open(self, epoch: int) -> IterableDataset:
        config = self._config
        if self._files is None:
            assert config.path is not None
            try:
                found: Any = load_dataset(
                    config.path, config.subset, split=config.split, revision=config.revision, streaming=True
                )
            except Exception as error:  # of what it does not find it raises anything
                raise DataError(
                    f"data.path={config.path} is no file or folder here, and no data set of the hub: {error}"
                ) from error
            return found
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self._files))
        files = [str(self._files[i]) for i in order]
        return IterableDataset.from_generator(
            _rows_of_files, gen_kwargs={"files": files, "text_field": self._wanted.text_field}
        )

    def _current(self) -> tuple[Packing, np.ndarray]:
        """The block at hand, read if it is not there."""
        while self._packed is None:
            self._packed = self._pack()
            if self._packed is None:
                if self._block == 0:
                    said = f"; {self.passed_over}" if self.passed_over.counts else ""
                    raise DataError(f"data.path={self._config.path}: nothing in it can be learned{said}")
                self._begin(self._epoch + 1)
        return self._packed

    def _pack(self) -> tuple[Packing, np.ndarray] | None:
        """Read and pack a block; None at the end of the stream."""
        there, tokens = [], 0
        for document in self._documents:
            there.append(document)
            tokens += len(document.ids)
            if tokens > BLOCK_SEQUENCES * (self.seqlen - 1):
                break
        self._then = {"row": self._row, "datasets": self._rows_there.state_dict()}
        if not there:
            return None
        documents = Documents(
            tokens=np.concatenate([each.ids for each in there]),
            offsets=np.cumsum([0, *(len(each.ids) for each in there)]),
            text=np.zeros(0, np.uint8),
            spans=np.zeros((len(there), 2), np.int64),
            token_bytes=None,
            identity=self.identity,
            learned=None if self._wanted.text_field else np.concatenate([each.learned for each in there]),
        )
        return shuffled(documents, self.seqlen, (self.seed, self._epoch, self._block), keep_rest=True)

    def _read(self) -> Iterator[Encoded]:
        """Tokens of the documents from where the stream stands."""
        try:
            for item in self._rows_there:
                self._row += 1
                row = self._row_of(item)
                if row is None:
                    continue
                if row.text is None:
                    if row.others is not None and self._row == 1:
                        raise self._wanted.absent(Path(str(self._config.path)), row.others)
                    self.passed_over.add(WITHOUT_TEXT, row.place)
                    continue
                found = self._encode(row.text, row.place)
                if found.learned[1:].any():
                    if self._wanted.text_field is None and len(found.ids) > self.seqlen:
                        self.passed_over.add(CUT, row.place)
                    yield found
                else:
                    self.passed_over.add(NOTHING_LEARNED, row.place)
        except DataError:
            raise
        except Exception as error:  # of damaged files and of networks `datasets` raises anything
            raise DataError(
                f"data.path={self._config.path}: cannot read it: {type(error).__name__}: {error}"
            ) from error

    def _row_of(self, item: dict[str, Any]) -> Row | None:
        if self._files is None:
            return self._wanted.of(item, f"{self._config.path}, row {self._row}")
        if item["left_out"] is not None:
            self.passed_over.merge(json.loads(item["left_out"]))
            return None
        return Row(item["place"], item["text"])


def _rows_of_files(files: list[str], text_field: str | None) -> Iterator[dict[str, Any]]:
    """Documents of files, and behind each file what of it was left out; a file is what `datasets` counts as a shard."""
    for file in files:
        left_out = PassedOver()
        for row in read_rows(Path(file), text_field, left_out):
            yield {"place": row.place, "text": row.text, "left_out": None}
        if left_out.counts:
            yield {"place": file, "text": None, "left_out": json.dumps(left_out.counts)}


def _local_files(config: DataConfig, passed_over: PassedOver) -> list[Path] | None:
    """The files that data.path names; None if it names a data set of the hub."""
    if config.path is not None and not Path(config.path).expanduser().exists():
        return None
    return source_files(config.path, passed_over)


def _named(config: DataConfig, files: list[Path] | None) -> list[Any]:
    """What tells a stream from another: names and sizes of its files, wherever they lie, or its name on the hub."""
    reads = [config.format, config.text_field]
    if files is None:
        return [*reads, config.path, config.subset, config.split, config.revision]
    return [*reads, *([file.name, status(file).st_size] for file in files)]
