"""What a tokenized text is: documents end to end, those to learn from and those held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ringflash.training.corpus.passed_over import PassedOver
from ringflash.training.corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Documents:
    """Documents of the train or validation part.

    Attributes:
        tokens: all documents end to end, texts opened by a separator each; uint16 or uint32.
        offsets: (documents + 1,) int64; document i is tokens[offsets[i] : offsets[i + 1]].
        text: uint8, the whole corpus.
        spans: (documents, 2) int64; document i is text[spans[i, 0] : spans[i, 1]].
        token_bytes: uint32, bytes that each of `tokens` stands for; None for the training part and for chats.
        identity: names the text, the tokenizer and the part.
        learned: uint8, which of the `tokens` are learned; None where all are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text: np.ndarray
    spans: np.ndarray
    token_bytes: np.ndarray | None
    identity: str
    learned: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        """Tokens that are learned: of texts all but the separators."""
        return len(self.tokens) - len(self) if self.learned is None else int(np.count_nonzero(self.learned))

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
        passed_over: what the sources hold beside it.
    """

    train: Documents
    validation: Documents
    tokenizer: Tokenizer
    sha256: str
    folder: Path
    passed_over: PassedOver

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that a predicted training token stands for, on average; None of chats."""
        return None if self.train.learned is not None else self.train.num_bytes / self.train.num_tokens


def sample(text: np.ndarray, spans: np.ndarray, max_bytes: int) -> list[np.ndarray]:
    """Text of the spans, or of a fixed random choice of them that is cut to `max_bytes`."""
    lengths = spans[:, 1] - spans[:, 0]
    order = np.arange(len(spans))
    if lengths.sum() > max_bytes:
        order = np.random.default_rng(0).permutation(order)
        stop = np.searchsorted(np.cumsum(lengths[order]), max_bytes) + 1
        order = order[:stop]
    chosen, left = [], max_bytes
    for start, end in spans[order]:
        chosen.append(text[start : min(end, start + left)])
        left -= len(chosen[-1])
    return chosen
