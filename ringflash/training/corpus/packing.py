"""Documents packed end to end into sequences of one length.

The documents of an epoch, in shuffled order, are one stream of tokens. Sequence j is stream[j (S-1) : j (S-1) + S]: it
opens with the token that the one before it ended with, so every token but the separators is predicted exactly once in
an epoch, each from all that its sequence holds of its document, and at least from the token before it. A document that
is cut goes on in the next sequence as a segment of its own. Any sequence is found without walking the ones before it,
so resuming costs nothing.

S is the sequence length in tokens, B the sequences of a batch on one data rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from ringflash.errors import ArgumentError, CheckpointError, DataError
from ringflash.parallel.labels import IGNORED_LABEL
from ringflash.training.corpus.documents import Documents


class PackedBatches:
    """Endless batches {"input_ids": (B, S) int64, "cu_seqlens": boundaries over the B * S tokens}, on the CPU.

    Sequence i of the global order, which depends on documents, seqlen and seed alone, goes to data rank
    i % data_ranks. The state is the number of sequences that all ranks together have drawn, so a run goes on in the
    same order on another number of ranks and with another batch size. What is left at an epoch's end and fills no
    sequence is dropped; the next epoch shuffles anew.

    Example: next(PackedBatches(corpus.train, seqlen=4096, batch=2, seed=0, data_rank=1, data_ranks=4))
    """

    def __init__(
        self, documents: Documents, seqlen: int, batch: int, seed: int, data_rank: int = 0, data_ranks: int = 1
    ) -> None:
        _check(seqlen, batch, data_rank, data_ranks)
        self.documents, self.seqlen, self.batch, self.seed = documents, seqlen, batch, seed
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.samples = 0
        self.samples_per_epoch = (len(documents.tokens) - 1) // (seqlen - 1)
        if len(documents.tokens) < seqlen:
            raise DataError(
                f"the training part has {len(documents.tokens)} tokens, fewer than one sequence of "
                f"train.seqlen={seqlen}; give more text in data.path or a shorter train.seqlen"
            )
        self._epoch = -1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        mine = [self.samples + self.data_rank + i * self.data_ranks for i in range(self.batch)]
        self.samples += self.batch * self.data_ranks
        input_ids = np.empty((self.batch, self.seqlen), np.int64)
        cu_seqlens = [0]
        for row, sample in enumerate(mine):
            epoch, index = divmod(sample, self.samples_per_epoch)
            if epoch != self._epoch:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
                self._stream, self._epoch = _Stream(self.documents, order), epoch
            first = index * (self.seqlen - 1)
            self._stream.read(self.documents.tokens, first, input_ids[row])
            cu_seqlens += self._stream.boundaries(first, self.seqlen, row * self.seqlen)
        return {"input_ids": torch.from_numpy(input_ids), "cu_seqlens": cu_seqlens}

    @property
    def epoch(self) -> float:
        """Passes over the training part so far."""
        return self.samples / self.samples_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the global order stands; the same on every rank."""
        return {
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "documents": self.documents.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; CheckpointError if that was over another order of samples."""
        for name, here in self.state_dict().items():
            if name != "samples" and state[name] != here:
                raise CheckpointError(f"the checkpoint was trained with data {name}={state[name]}, here it is {here}")
        self.samples = int(state["samples"])


class CountedBatch(NamedTuple):
    """A validation batch and what it amounts to.

    Attributes:
        batch: {"input_ids": (B, S) int64, "labels": (B, S) int64, not shifted, -100 in padding, "cu_seqlens"}, which
            `ringflash.shard_batch` takes.
        num_bytes: bytes of text that its predictions stand for.
    """

    batch: dict[str, Any]
    num_bytes: int


class ValidationBatches:
    """All documents once, in a fixed order, as `CountedBatch`es; may be iterated again and again.

    Over all batches of all data ranks every token is predicted once, and the bytes sum to the text's. So bits per byte
    is (sum of losses in nats) / ln 2 / (sum of num_bytes), also of the first sequences only. Padding at the end makes
    the batches of all data ranks equally many, so what is predicted depends on neither them nor the batch.

    Args:
        documents: those to validate on.
        seqlen: tokens of a sequence.
        batch: sequences of a batch.
        data_rank: whose batches.
        data_ranks: how many there are.
        sequences: no more than this many, over all data ranks; None for all.
    """

    def __init__(
        self,
        documents: Documents,
        seqlen: int,
        batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        sequences: int | None = None,
    ) -> None:
        _check(seqlen, batch, data_rank, data_ranks)
        if documents.token_bytes is None:
            raise ArgumentError("documents: the training part keeps no byte counts; give the validation part")
        self.documents, self.seqlen, self.batch = documents, seqlen, batch
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.samples = max(1, -(-(len(documents.tokens) - 1) // (seqlen - 1)))
        self.samples = self.samples if sequences is None else min(self.samples, sequences)
        self._stream = _Stream(documents, np.arange(len(documents)))

    def __len__(self) -> int:
        return -(-self.samples // (self.batch * self.data_ranks))

    def __iter__(self) -> Iterator[CountedBatch]:
        for number in range(len(self)):
            first = number * self.batch * self.data_ranks + self.data_rank
            yield self._batch([first + i * self.data_ranks for i in range(self.batch)])

    def _batch(self, samples: list[int]) -> CountedBatch:
        tokens, counts = self.documents.tokens, self.documents.token_bytes
        assert counts is not None  # the constructor has looked
        input_ids = np.full((self.batch, self.seqlen), self.documents.tokens[0], np.int64)
        labels = np.full((self.batch, self.seqlen), IGNORED_LABEL, np.int64)
        num_bytes = np.zeros((self.batch, self.seqlen), np.int64)
        cu_seqlens = [0]
        for row, sample in enumerate(samples):
            first = sample * (self.seqlen - 1)
            there = min(self.seqlen, max(0, len(tokens) - first)) if sample < self.samples else 0
            bounds = self._stream.boundaries(first, there, row * self.seqlen) if there else []
            self._stream.read(tokens, first, input_ids[row, :there])
            self._stream.read(counts, first, num_bytes[row, :there])
            labels[row, :there] = input_ids[row, :there]
            cu_seqlens += bounds if there == self.seqlen else [*bounds, (row + 1) * self.seqlen]
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "cu_seqlens": cu_seqlens,
        }
        # A row's first token is predicted in the row before, or is a separator.
        return CountedBatch(batch, int(num_bytes[:, 1:].sum()))


class _Stream:
    """Documents in some order, end to end; positions in the stream to places in the token file."""

    def __init__(self, documents: Documents, order: np.ndarray) -> None:
        self.starts = documents.offsets[:-1][order]
        lengths = documents.offsets[1:][order] - self.starts
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])

    def _documents(self, first: int, length: int) -> range:
        low = int(np.searchsorted(self.bounds, first, "right")) - 1
        return range(low, int(np.searchsorted(self.bounds, first + length, "left")))

    def read(self, source: np.ndarray, first: int, target: np.ndarray) -> None:
        """Fill `target` with the stream from `first` on; `source` is laid out like the documents' tokens."""
        if not len(target):
            return
        for i in self._documents(first, len(target)):
            start, stop = max(first, self.bounds[i]), min(first + len(target), self.bounds[i + 1])
            place = self.starts[i] + start - self.bounds[i]
            target[start - first : stop - first] = source[place : place + stop - start]

    def boundaries(self, first: int, length: int, shift: int) -> list[int]:
        """Ends of the segments of stream[first : first + length], counted from `shift`."""
        inside = self.bounds[self._documents(first, length).start + 1 : self._documents(first, length).stop]
        return [*(inside - first + shift).tolist(), shift + length]


def _check(seqlen: int, batch: int, data_rank: int, data_ranks: int) -> None:
    if seqlen < 2:
        raise ArgumentError(f"seqlen={seqlen}; allowed is 2 and more: one token to predict from another")
    if batch < 1:
        raise ArgumentError(f"batch={batch}; allowed is 1 and more")
    if not 0 <= data_rank < data_ranks:
        raise ArgumentError(f"data_rank={data_rank}; allowed is 0 to data_ranks - 1 = {data_ranks - 1}")
