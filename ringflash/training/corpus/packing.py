"""The documents of one epoch, packed into sequences of one length; any of them is found without the ones before it.

Texts are one stream of tokens, in the order of the epoch. Sequence j is stream[j (S-1) : j (S-1) + S]: it opens with
the token that the one before it ended with, so every token but the separators is predicted exactly once, each from all
that its sequence holds of its document, and at least from the token before it. A document that is cut goes on in the
next sequence as a segment of its own.

Chats stay whole: a turn is learned from all that was said before it. Best-fit decreasing (Johnson, 1973) puts them
into as few sequences as it can, and what is left of a sequence is padding. Only a chat that is longer than a sequence
is cut, as texts are. By hand, because the packers of libraries are fed in order, and know no way back to the middle of
an epoch.

S is the sequence length in tokens.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from ringflash.errors import ArgumentError
from ringflash.parallel.labels import IGNORED_LABEL
from ringflash.training.corpus.documents import Documents


class Packed(NamedTuple):
    """One sequence.

    Attributes:
        input_ids: (S,) int64.
        labels: (S,) int64, not shifted, -100 where nothing is learned; None where all is.
        ends: of its segments, ascending; behind the last one is padding.
        num_bytes: of text that its predictions stand for.
    """

    input_ids: np.ndarray
    labels: np.ndarray | None
    ends: list[int]
    num_bytes: int


class Packing(ABC):
    """The sequences of one epoch.

    Attributes:
        seqlen: S.
        counts_bytes: whether `Packed.num_bytes` is known.
        cut: chats that are longer than a sequence.
        documents: what is packed.
    """

    seqlen: int
    documents: Documents
    counts_bytes = False
    cut = 0

    @abstractmethod
    def __len__(self) -> int:
        """How many there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Packed:
        """Any of them."""


def pack(documents: Documents, seqlen: int, order: np.ndarray, keep_rest: bool = False) -> Packing:
    """Pack documents.

    Args:
        documents: texts or chats.
        seqlen: S.
        order: of the documents.
        keep_rest: pad what is left of texts behind the last whole sequence, in place of dropping it.
    """
    if seqlen < 2:
        raise ArgumentError(f"seqlen={seqlen}; allowed is 2 and more: one token to predict from another")
    if documents.learned is None:
        return TextPacking(documents, seqlen, order, keep_rest)
    return ChatPacking(documents, seqlen, order)


class TextPacking(Packing):
    """A stream of documents, cut; see the module."""

    def __init__(self, documents: Documents, seqlen: int, order: np.ndarray, keep_rest: bool) -> None:
        self.documents, self.seqlen, self._keep_rest = documents, seqlen, keep_rest
        self.counts_bytes = documents.token_bytes is not None
        self._starts = documents.offsets[:-1][order]
        lengths = documents.offsets[1:][order] - self._starts
        self._bounds = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self) -> int:
        tokens, advance = int(self._bounds[-1]), self.seqlen - 1
        return max(1, -(-(tokens - 1) // advance)) if self._keep_rest else max(0, tokens - 1) // advance

    def __getitem__(self, index: int) -> Packed:
        first = index * (self.seqlen - 1)
        there = min(self.seqlen, int(self._bounds[-1]) - first)
        input_ids = np.full(self.seqlen, self.documents.tokens[0], np.int64)
        self._read(self.documents.tokens, first, input_ids[:there])
        labels, num_bytes = None, 0
        if self._keep_rest:
            labels = np.full(self.seqlen, IGNORED_LABEL, np.int64)
            labels[:there] = input_ids[:there]
        if self.documents.token_bytes is not None:
            counts = np.zeros(there, np.int64)
            self._read(self.documents.token_bytes, first, counts)
            num_bytes = int(counts[1:].sum())  # the first token is predicted in the sequence before, or a separator
        inside = self._bounds[self._documents(first, there).start + 1 : self._documents(first, there).stop]
        return Packed(input_ids, labels, [*(inside - first).tolist(), there], num_bytes)

    def _documents(self, first: int, length: int) -> range:
        low = int(np.searchsorted(self._bounds, first, "right")) - 1
        return range(low, int(np.searchsorted(self._bounds, first + length, "left")))

    def _read(self, source: np.ndarray, first: int, target: np.ndarray) -> None:
        """Fill `target` with the stream from `first` on; `source` is laid out like the documents' tokens."""
        for i in self._documents(first, len(target)):
            start, stop = max(first, self._bounds[i]), min(first + len(target), self._bounds[i + 1])
            place = self._starts[i] + start - self._bounds[i]
            target[start - first : stop - first] = source[place : place + stop - start]


class ChatPacking(Packing):
    """Whole chats, several to a sequence; see the module."""

    def __init__(self, documents: Documents, seqlen: int, order: np.ndarray) -> None:
        assert documents.learned is not None
        self.documents, self.seqlen = documents, seqlen
        self._tokens, self._learned = documents.tokens, documents.learned
        pieces = []
        for start, stop in zip(documents.offsets[:-1][order], documents.offsets[1:][order], strict=True):
            self.cut += stop - start > seqlen
            for begin in range(int(start), max(int(start) + 1, int(stop) - 1), seqlen - 1):
                piece = begin, min(int(stop), begin + seqlen)
                if stop - start <= seqlen or self._learned[piece[0] + 1 : piece[1]].any():
                    pieces.append(piece)
        self._sequences = best_fit(pieces, seqlen)

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> Packed:
        input_ids = np.full(self.seqlen, self._tokens[0], np.int64)
        labels = np.full(self.seqlen, IGNORED_LABEL, np.int64)
        ends, at = [], 0
        for start, stop in self._sequences[index]:
            rows = slice(at, at + stop - start)
            input_ids[rows] = self._tokens[start:stop]
            labels[rows] = np.where(self._learned[start:stop], input_ids[rows], IGNORED_LABEL)
            at = rows.stop
            ends.append(at)
        return Packed(input_ids, labels, ends, 0)


def best_fit(pieces: list[tuple[int, int]], room: int) -> list[list[tuple[int, int]]]:
    """Pieces (start, stop) of at most `room` tokens in bins of that size; how many depends on their lengths alone."""
    bins: list[list[tuple[int, int]]] = []
    with_space: dict[int, list[int]] = {}  # bins by what is left in them
    spaces: list[int] = []  # the same keys, ascending
    for piece in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        length = piece[1] - piece[0]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            chosen, space = len(bins), room
            bins.append([])
        else:
            space = spaces[place]
            chosen = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        bins[chosen].append(piece)
        if left := space - length:
            if left not in with_space:
                with_space[left] = []
                bisect.insort(spaces, left)
            with_space[left].append(chosen)
    return bins
