"""Byte n-gram language models: how much of a text simple counting predicts, in bits per byte.

Each order mixes its own counts with the order below by Witten and Bell's rule: behind a context h that was seen c(h)
times with T(h) different next bytes, P_n(w | h) = (c(hw) + T(h) P_{n-1}(w | h')) / (c(h) + T(h)); order 0 is uniform
over 256 bytes. A document starts from a start symbol that is never predicted itself, as the transformer's documents
start from a separator, so both code the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringflash.errors import ArgumentError
from ringflash.training.corpus.documents import Corpus

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
MAX_ORDER = 7
"""Nine bits a symbol: seven of them fit into the 64-bit keys."""

BASELINE_ORDER = 5
"""Of the longest n-grams that a run is compared with."""

START = 256
TRAIN_BYTES, VALIDATION_BYTES = 64 << 20, 32 << 20
"""Larger corpora are sampled: 64 MiB need about 3 GiB of memory."""


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted n-grams with their counts; sorted contexts with counts and distinct next bytes."""

    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray
    next_bytes: np.ndarray


class NgramModel:
    """Interpolated byte n-gram model of one order and all orders below it.

    Args:
        documents: byte strings to count, as uint8 arrays.
        order: length of the n-grams, 1 to 7.
    """

    def __init__(self, documents: Sequence[np.ndarray], order: int) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ArgumentError(f"order={order}; allowed is 1 to {MAX_ORDER}")
        self.orders = [_count(_keys(documents, n)) for n in range(1, order + 1)]

    def probabilities(self, documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """P_n of every byte of the documents, end to end, for n = 1 .. order."""
        mixed = np.full(sum(map(len, documents)), 1 / 256)
        by_order = []
        for n, counted in enumerate(self.orders, 1):
            keys = _keys(documents, n)
            gram_count = _look_up(counted.grams, counted.gram_counts, keys)
            context_count = _look_up(counted.contexts, counted.context_counts, keys >> 9)
            distinct = _look_up(counted.contexts, counted.next_bytes, keys >> 9)
            seen = context_count > 0
            denominator = np.where(seen, context_count + distinct, 1)
            mixed = np.where(seen, (gram_count + distinct * mixed) / denominator, mixed)
            by_order.append(mixed)
        return by_order

    def bits_per_byte(self, documents: Sequence[np.ndarray]) -> list[float]:
        """Mean -log2 P_n over all bytes of the documents, for n = 1 .. order."""
        return [float(-np.log2(p).mean()) for p in self.probabilities(documents)]


def baselines(corpus: Corpus) -> dict[str, float]:
    """Bits per byte of n-gram models, fit on the training part, on the validation part, by name and rising order.

    Example: baselines(corpus) -> {"unigram": 4.67, "bigram": 3.52, "trigram": 2.58, "4-gram": 1.99, "5-gram": 1.81}
    """
    model = NgramModel(corpus.train.sample(TRAIN_BYTES), BASELINE_ORDER)
    bits = model.bits_per_byte(corpus.validation.sample(VALIDATION_BYTES))
    return {NAMES.get(n, f"{n}-gram"): value for n, value in enumerate(bits, 1)}


def _keys(documents: Sequence[np.ndarray], order: int) -> np.ndarray:
    """For every byte the n-gram that ends with it, nine bits a symbol, the byte itself lowest."""
    lengths = np.array([len(document) for document in documents])
    width = order - 1
    padded = np.full(int(lengths.sum()) + width * len(documents), START, np.int64)
    targets = np.arange(int(lengths.sum())) + width * np.repeat(np.arange(1, len(documents) + 1), lengths)
    padded[targets] = np.concatenate([*documents, np.zeros(0, np.uint8)])
    keys = np.zeros(len(targets), np.int64)
    for back in range(width, -1, -1):
        keys = (keys << 9) | padded[targets - back]
    return keys


def _count(keys: np.ndarray) -> _Order:
    grams, gram_counts = np.unique(keys, return_counts=True)
    contexts, first, next_bytes = np.unique(grams >> 9, return_index=True, return_counts=True)
    context_counts = np.add.reduceat(gram_counts, first) if len(first) else gram_counts
    return _Order(grams, gram_counts, contexts, context_counts, next_bytes)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values of the wanted keys; 0 for those that are not there."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
