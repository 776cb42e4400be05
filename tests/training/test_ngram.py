"""N-gram models against a definition that is slow and plain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError
from ringflash.training.corpus.ngram import NgramModel, baselines
from ringflash.training.corpus.prepare import prepare

documents = st.lists(st.text("aab", min_size=0, max_size=8).map(str.encode), min_size=1, max_size=5)


def arrays(texts):
    return [np.frombuffer(text, np.uint8) for text in texts]


def witten_bell(train, order, context, byte):
    """P of `byte` behind a tuple of symbols, by the formula, counting anew each time."""
    if order == 0:
        return 1 / 256
    history = context[len(context) - (order - 1) :]
    following = []
    for text in train:
        symbols = (256,) * (order - 1) + tuple(text)
        following += [symbols[i] for i in range(order - 1, len(symbols)) if symbols[i - order + 1 : i] == history]
    distinct = len(set(following))
    lower = witten_bell(train, order - 1, context, byte)
    if not following:
        return lower
    return (following.count(byte) + distinct * lower) / (len(following) + distinct)


@given(train=documents, text=st.text("abc", min_size=1, max_size=6).map(str.encode), order=st.integers(1, 4))
def test_probabilities_are_those_of_the_formula(train, text, order):
    by_order = NgramModel(arrays(train), order).probabilities(arrays([text]))
    context = (256,) * order
    for place, byte in enumerate(text):
        for n in range(1, order + 1):
            assert by_order[n - 1][place] == pytest.approx(witten_bell(train, n, context, byte))
        context = (*context, byte)


@given(train=documents, prefix=st.text("ab", max_size=5).map(str.encode), order=st.integers(1, 7))
def test_probabilities_of_the_next_byte_sum_to_one(train, prefix, order):
    texts = [prefix + bytes([byte]) for byte in range(256)]
    for probabilities in NgramModel(arrays(train), order).probabilities(arrays(texts)):
        last = probabilities.reshape(256, len(prefix) + 1)[:, -1]
        assert last.sum() == pytest.approx(1)
        assert last.min() > 0


def test_documents_do_not_see_each_other():
    model = NgramModel(arrays([b"ab" * 50]), 3)
    together = model.probabilities(arrays([b"aba", b"bab"]))[2]
    assert np.array_equal(together[:3], model.probabilities(arrays([b"aba"]))[2])
    assert np.array_equal(together[3:], model.probabilities(arrays([b"bab"]))[2])


def test_longer_contexts_help_where_they_should():
    texts = arrays([b"the cat sat on the mat. " * 20])
    bits = NgramModel(texts, 5).bits_per_byte(texts)
    assert bits == sorted(bits, reverse=True)
    assert bits[4] < 0.5 < 3 < bits[0]


def test_order_is_checked():
    with pytest.raises(ArgumentError, match="order=8"):
        NgramModel([], 8)


def test_baselines_are_fit_on_the_training_part_and_scored_on_the_other(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} says: " + "good day\n" * (20 - i))
    corpus = prepare(DataConfig(path=str(tmp_path), tokenizer="bytes", cache_dir=str(tmp_path / ".cache")))
    bits = baselines(corpus)
    assert list(bits) == ["unigram", "bigram", "trigram", "4-gram", "5-gram"]
    train, validation = corpus.train.sample(10**6), corpus.validation.sample(10**6)
    assert list(bits.values()) == NgramModel(train, 5).bits_per_byte(validation)
    assert bits["5-gram"] < bits["unigram"]
