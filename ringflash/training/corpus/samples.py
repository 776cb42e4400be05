"""Endless orders of packed sequences, which any number of ranks draws from alike, and goes on in after a checkpoint.

Every rank of every sequence group walks over all sequences and takes its own, so the order knows nothing of ranks.
States are plain data, the same on every rank.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from ringflash.errors import CheckpointError, DataError
from ringflash.training.corpus.documents import Documents
from ringflash.training.corpus.packing import Packed, Packing, pack


class Samples(ABC):
    """An endless order of packed sequences.

    Attributes:
        seqlen: tokens of each.
    """

    seqlen: int

    @property
    @abstractmethod
    def epoch(self) -> float:
        """Passes over the documents so far."""

    @property
    def samples_per_epoch(self) -> int | None:
        """Sequences of a pass; None where only the end of it will tell."""
        return None

    @abstractmethod
    def draw(self, wanted: bool) -> Packed | None:
        """The next sequence; None in its place if it is not wanted."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, and by what it is made."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; CheckpointError if that was in another order."""


def check_same(state: dict[str, Any], here: dict[str, Any], names: Sequence[str]) -> None:
    """Raise CheckpointError if an order was made by something else."""
    for name in names:
        if state.get(name) != here[name]:
            raise CheckpointError(
                f"the checkpoint was trained with data {name}={state.get(name)}, here it is {here[name]}; "
                "checkpoint.weights=PATH starts a new run from its weights alone"
            )


class EpochSamples(Samples):
    """Documents that are there as a whole, shuffled anew in each epoch.

    The order depends on documents, seqlen and seed alone. Any sequence is found without the ones before it. Of texts,
    what is left at an epoch's end and fills no sequence is dropped.

    Args:
        documents: texts or chats.
        seqlen: tokens of a sequence.
        seed: of the order.
    """

    def __init__(self, documents: Documents, seqlen: int, seed: int) -> None:
        self.documents, self.seqlen, self.seed = documents, seqlen, seed
        self.drawn = 0
        self._packing, self._epoch = self._pack(0), 0
        self.cut = self._packing.cut
        self._in_epoch = len(self._packing)
        if not self._in_epoch:
            raise DataError(
                f"the training part has {len(documents.tokens)} tokens, fewer than one sequence of "
                f"train.seqlen={seqlen}; give more text in data.path or a shorter train.seqlen"
            )

    @property
    def epoch(self) -> float:
        """See Samples."""
        return self.drawn / self._in_epoch

    @property
    def samples_per_epoch(self) -> int:
        """See Samples."""
        return self._in_epoch

    def draw(self, wanted: bool) -> Packed | None:
        """See Samples."""
        epoch, index = divmod(self.drawn, self._in_epoch)
        self.drawn += 1
        if not wanted:
            return None
        if epoch != self._epoch:
            self._packing, self._epoch = self._pack(epoch), epoch
        return self._packing[int(self._order[index])]

    def state_dict(self) -> dict[str, Any]:
        """See Samples."""
        return {
            "samples": self.drawn,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "documents": self.documents.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Samples."""
        check_same(state, self.state_dict(), ("seqlen", "seed", "documents"))
        self.drawn = int(state["samples"])

    def _pack(self, epoch: int) -> Packing:
        packing, self._order = shuffled(self.documents, self.seqlen, (self.seed, epoch))
        return packing


def shuffled(
    documents: Documents, seqlen: int, seed: tuple[int, ...], keep_rest: bool = False
) -> tuple[Packing, np.ndarray]:
    """Documents packed in a drawn order, and the order of the sequences: of texts, as they follow each other."""
    random = np.random.default_rng(seed)
    packing = pack(documents, seqlen, random.permutation(len(documents)), keep_rest)
    # Chats are packed by falling length.
    order = np.arange(len(packing)) if documents.learned is None else random.permutation(len(packing))
    return packing, order


class MixedSamples(Samples):
    """Several orders, mixed by weights: of any number of sequences each has its share, to within one of them or two.

    Each sequence is taken from the order that is furthest behind its share, so nothing is drawn by lot.

    Args:
        parts: the orders, of one sequence length.
        weights: their shares, of any positive sum.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float]) -> None:
        self.parts, self.weights = list(parts), [float(weight) for weight in weights]
        self.seqlen = parts[0].seqlen
        self._shares = np.array(self.weights) / sum(self.weights)
        self._counts = np.zeros(len(parts), np.int64)

    @property
    def epoch(self) -> float:
        """Passes over the part that was seen least often."""
        return min(part.epoch for part in self.parts)

    def draw(self, wanted: bool) -> Packed | None:
        """See Samples."""
        behind = self._shares * (self._counts.sum() + 1) - self._counts
        chosen = int(behind.argmax())
        self._counts[chosen] += 1
        return self.parts[chosen].draw(wanted)

    def state_dict(self) -> dict[str, Any]:
        """See Samples."""
        return {
            "weights": self.weights,
            "counts": self._counts.tolist(),
            "parts": [copy.deepcopy(part.state_dict()) for part in self.parts],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Samples."""
        check_same(state, self.state_dict(), ("weights",))
        for part, inner in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(inner)
        self._counts = np.array(state["counts"], np.int64)
