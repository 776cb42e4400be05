"""Everything that a run reads: the order of the sequences to learn from, and those to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ringflash.configs.schema import Config, DataConfig
from ringflash.errors import DataError
from ringflash.training.config.derived import sources, tokenizer_of
from ringflash.training.corpus import tokenizer as tokenizing
from ringflash.training.corpus.chats import ChatTokenizer, Encoded
from ringflash.training.corpus.documents import Corpus
from ringflash.training.corpus.packing import Packing, pack
from ringflash.training.corpus.passed_over import PassedOver
from ringflash.training.corpus.prepare import prepare, tokenizer_identity
from ringflash.training.corpus.samples import EpochSamples, MixedSamples, Samples
from ringflash.training.corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is validated on.

    Attributes:
        samples: the order of the sequences to learn from.
        validation: sequences that are held out.
        tokenizer: of all of it.
        identity: names all of it; the same on ranks that read the same.
        num_tokens: tokens to learn in an epoch; None of streams.
        cut: chats that are longer than a sequence.
        passed_over: what the sources hold beside it; of streams it grows.
        corpus: the text, where all is one text; n-gram models count it too.
    """

    samples: Samples
    validation: list[Packing]
    tokenizer: Tokenizer
    identity: str
    num_tokens: int | None
    cut: int
    passed_over: list[PassedOver]
    corpus: Corpus | None

    @property
    def counts_bytes(self) -> bool:
        """Whether losses can be given in bits per byte."""
        return all(packing.counts_bytes for packing in self.validation)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes that a learned token stands for, on average, where all is one text."""
        return None if self.corpus is None else self.corpus.bytes_per_token


def read_data(config: Config) -> TrainingData:
    """Read, and tokenize unless it is streamed, what a configuration names.

    Raises:
        DataError: see `prepare`.
    """
    whole = dataclasses.replace(config.data, tokenizer=tokenizer_of(config))
    parts = [_read(each, config) for each in sources(whole)]
    if len(parts) == 1:
        return parts[0]
    counts = [part.num_tokens for part in parts]
    return TrainingData(
        MixedSamples([part.samples for part in parts], [each.weight for each in whole.mixture]),
        [packing for part in parts for packing in part.validation],
        parts[0].tokenizer,
        " ".join(part.identity for part in parts),
        None if None in counts else sum(count for count in counts if count is not None),
        sum(part.cut for part in parts),
        [passed_over for part in parts for passed_over in part.passed_over],
        None,
    )


def _read(data: DataConfig, config: Config) -> TrainingData:
    seqlen, streamed = config.train.seqlen, data.streaming
    samples: Samples
    if streamed:
        from ringflash.training.corpus.streaming import StreamedSamples  # an optional library

        tokenizer, encode = _encoder(data)
        samples = stream = StreamedSamples(data, encode, " ".join(_named(data)), seqlen, config.seed)
        identity, passed_over, num_tokens, cut, corpus = stream.identity, stream.passed_over, None, 0, None
    else:
        corpus = prepare(data)
        if not len(corpus.train):
            raise DataError(f"data.path={data.path}: nothing in it can be learned; {corpus.passed_over}")
        samples = EpochSamples(corpus.train, seqlen, config.seed)
        tokenizer, passed_over, identity = corpus.tokenizer, corpus.passed_over, corpus.train.identity
        num_tokens, cut = corpus.train.num_tokens, samples.cut
    held_out, left = (None, []) if corpus is None else (corpus.validation, [])
    if data.validation is not None:
        other = dataclasses.replace(data, path=data.validation, validation=None, max_bytes=None)
        try:
            beside = prepare(other, tokenizer)
        except DataError as error:
            raise DataError(str(error).replace("data.path", "data.validation", 1)) from error
        held_out, left = beside.validation, [beside.passed_over]
        identity += f" {held_out.identity}"
        corpus = None if corpus is None else dataclasses.replace(corpus, validation=held_out)
    assert held_out is not None  # of a stream, data.validation is required
    if not len(held_out):
        raise DataError(
            f"data.path={data.path}: nothing can be learned in what is held out; give data.validation=PATH, or a "
            f"larger data.validation_fraction={data.validation_fraction}"
        )
    if corpus is not None and corpus.train.learned is not None:
        corpus = None
    validation = [pack(held_out, seqlen, np.arange(len(held_out)), keep_rest=True)]
    return TrainingData(samples, validation, tokenizer, identity, num_tokens, cut, [passed_over, *left], corpus)


def _named(data: DataConfig) -> list[str]:
    assert data.tokenizer is not None
    return ["bytes"] if data.tokenizer == "bytes" else tokenizer_identity(data.tokenizer)


def _encoder(data: DataConfig) -> tuple[Tokenizer, Callable[[bytes, str], Encoded]]:
    """The tokenizer of a stream, and what it makes of a document."""
    assert data.tokenizer is not None
    tokenizer = tokenizing.named(data.tokenizer)
    if data.format == "chat":
        return tokenizer, ChatTokenizer(data.tokenizer).encode

    def encode(text: bytes, place: str) -> Encoded:
        ids = np.concatenate([[tokenizer.separator], *tokenizer.encode([text])])
        return Encoded(ids, np.ones(len(ids), bool))

    return tokenizer, encode
