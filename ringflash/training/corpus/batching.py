"""Batches of packed sequences: those to train on, of an endless order, and those to validate on, all once.

S is the sequence length in tokens, B the sequences of a batch on one data rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ringflash.errors import ArgumentError
from ringflash.parallel.labels import IGNORED_LABEL
from ringflash.training.corpus.packing import Packed, Packing
from ringflash.training.corpus.samples import Samples


class PackedBatches:
    """Endless batches {"input_ids": (B, S) int64, "cu_seqlens": boundaries over the B * S tokens}, on the CPU.

    Where not all is learned there are also "labels" (B, S) int64, not shifted, -100 where nothing is.

    Sequence i of the order goes to data rank i % data_ranks. The state is that of the order behind what all ranks
    together have drawn, so a run goes on in the same order on another number of ranks and with another batch size.

    Args:
        samples: the order.
        batch: B.
        data_rank: whose batches.
        data_ranks: how many there are.

    Example: next(PackedBatches(EpochSamples(corpus.train, seqlen=4096, seed=0), batch=2, data_rank=1, data_ranks=4))
    """

    def __init__(self, samples: Samples, batch: int, data_rank: int = 0, data_ranks: int = 1) -> None:
        _check(batch, data_rank, data_ranks)
        self.samples, self.batch, self.data_rank, self.data_ranks = samples, batch, data_rank, data_ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        turns = [turn % self.data_ranks == self.data_rank for turn in range(self.batch * self.data_ranks)]
        return collate([packed for mine in turns if (packed := self.samples.draw(mine)) is not None])

    @property
    def epoch(self) -> float:
        """Passes over the documents so far."""
        return self.samples.epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the global order stands; the same on every rank."""
        return self.samples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; CheckpointError if that was over another order of samples."""
        self.samples.load_state_dict(state)


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
    """All sequences once, in a fixed order, as `CountedBatch`es; may be iterated again and again.

    Over all batches of all data ranks every token of texts is predicted once, and the bytes sum to the text's. So bits
    per byte is (sum of losses in nats) / ln 2 / (sum of num_bytes), also of the first sequences only. Padding at the
    end makes the batches of all data ranks equally many, so what is predicted depends on neither them nor the batch.

    Args:
        packings: sequences to validate on, of one length.
        batch: sequences of a batch.
        data_rank: whose batches.
        data_ranks: how many there are.
        sequences: no more than this many, over all data ranks; None for all.
    """

    def __init__(
        self,
        packings: Sequence[Packing],
        batch: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        sequences: int | None = None,
    ) -> None:
        _check(batch, data_rank, data_ranks)
        self.batch, self.data_rank, self.data_ranks = batch, data_rank, data_ranks
        longest = max(map(len, packings))  # of each source the first ones first, so that a part of all has some of each
        places = [(packing, index) for index in range(longest) for packing in packings if index < len(packing)]
        self._places, self._first = places[:sequences], packings[0]

    def __len__(self) -> int:
        return -(-len(self._places) // (self.batch * self.data_ranks))

    def __iter__(self) -> Iterator[CountedBatch]:
        padding = self._first[0]
        labels = np.full(self._first.seqlen, IGNORED_LABEL, np.int64)
        padding = Packed(np.full_like(labels, padding.input_ids[0]), labels, [self._first.seqlen], 0)
        for number in range(len(self)):
            first = number * self.batch * self.data_ranks + self.data_rank
            mine = [first + i * self.data_ranks for i in range(self.batch)]
            chosen = [self._places[i] if i < len(self._places) else None for i in mine]
            rows = [padding if place is None else place[0][place[1]] for place in chosen]
            yield CountedBatch(collate(rows), sum(row.num_bytes for row in rows))


def collate(rows: Sequence[Packed]) -> dict[str, Any]:
    """One batch of sequences; the padding of each is a document, but behind the last one, where it belongs to none."""
    seqlen, cu_seqlens = len(rows[0].input_ids), [0]
    for number, row in enumerate(rows):
        ends = row.ends if number == len(rows) - 1 else [*row.ends, seqlen]
        cu_seqlens += sorted({number * seqlen + end for end in ends} - {cu_seqlens[-1]})
    batch = {"input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows])), "cu_seqlens": cu_seqlens}
    if any(row.labels is not None for row in rows):
        labels = [row.input_ids if row.labels is None else row.labels for row in rows]
        batch["labels"] = torch.from_numpy(np.stack(labels))
    return batch


def _check(batch: int, data_rank: int, data_ranks: int) -> None:
    if batch < 1:
        raise ArgumentError(f"batch={batch}; allowed is 1 and more")
    if not 0 <= data_rank < data_ranks:
        raise ArgumentError(f"data_rank={data_rank}; allowed is 0 to data_ranks - 1 = {data_ranks - 1}")
