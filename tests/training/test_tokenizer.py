"""Tokenizers: every byte string comes back, and byte counts are exact."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from ringflash.errors import ArgumentError, DataError
from ringflash.training.corpus.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    HuggingFaceTokenizer,
    huggingface_folder,
    load,
)

SAMPLE = b"def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return self.f(12345)\n" * 40


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([SAMPLE, "naïve — ünïcödé 漢字 🙂".encode()], vocab_size=400)


any_text = st.one_of(
    st.binary(max_size=200),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100).map(str.encode),
    st.lists(st.sampled_from([b"return ", b"\n    ", b"self", b"\xff", b"\xed\xa0\x80", "é".encode()])).map(b"".join),
)


@given(texts=st.lists(any_text, max_size=4))
def test_bpe_gives_back_any_bytes_and_counts_them(bpe, texts):
    for text, ids, (same, counts) in zip(texts, bpe.encode(texts), bpe.encode_counted(texts), strict=True):
        assert bpe.decode(ids) == text
        assert np.array_equal(ids, same)
        assert counts.sum() == len(text)
        assert [len(bpe.token_bytes[i]) for i in ids] == counts.tolist()
        assert bpe.separator not in ids


@given(text=st.binary(max_size=200))
def test_byte_tokenizer_gives_back_any_bytes(text):
    tokenizer = ByteTokenizer()
    ((ids, counts),) = tokenizer.encode_counted([text])
    assert tokenizer.decode([tokenizer.separator, *ids]) == text
    assert counts.sum() == len(text) == len(ids)


def test_bpe_merges_what_is_frequent(bpe):
    (ids,) = bpe.encode([SAMPLE])
    assert bpe.vocab_size <= 400
    assert len(ids) <= len(SAMPLE) / 3
    assert b"\n    " in bpe.token_bytes


def test_separator_is_out_of_reach_of_text(bpe):
    assert bpe.separator == bpe.vocab_size - 1
    assert bpe.token_bytes[bpe.separator] == b""
    assert bpe.decode([bpe.separator]) == b""


def test_bpe_refuses_a_vocabulary_smaller_than_the_bytes():
    with pytest.raises(ArgumentError, match="vocab_size=256"):
        BPETokenizer.train([SAMPLE], 256)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_saved_tokenizer_is_the_same(bpe, kind, tmp_path):
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    tokenizer.save(tmp_path)
    loaded = load(tmp_path)
    assert (loaded.vocab_size, loaded.separator) == (tokenizer.vocab_size, tokenizer.separator)
    assert np.array_equal(loaded.encode([SAMPLE])[0], tokenizer.encode([SAMPLE])[0])
    for damage in ("{", "[]", "{}"):
        (tmp_path / "ringflash_tokenizer.json").write_text(damage)
        with pytest.raises(DataError, match=r"cannot read .*ringflash_tokenizer\.json: .*; copy the folder anew"):
            load(tmp_path)


def write_huggingface(folder, config=None):
    """A tokenizer of words, lower-cased and stripped of accents: tokens do not spell the text."""
    words = ["[UNK]", "<eos>", "return", "x", "naive", "\n"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()],
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


@given(texts=st.lists(st.text(alphabet="Return x naïve é漢\n", min_size=1, max_size=50), max_size=3))
def test_huggingface_byte_counts_sum_to_the_text_under_a_lossy_normalizer(huggingface, texts):
    encoded = [text.encode() for text in texts]
    for text, (ids, counts) in zip(encoded, huggingface.encode_counted(encoded), strict=True):
        assert len(ids) == len(counts)
        assert counts.min(initial=0) >= 0
        assert counts.sum() == (len(text) if len(ids) else 0)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_huggingface(folder, {"bos_token": None, "eos_token": {"content": "<eos>"}})
    return HuggingFaceTokenizer(folder)


def test_huggingface_separator_is_its_own_and_not_reached_by_text(huggingface):
    assert huggingface.separator == 1
    ids, plain = huggingface.encode([b"x <eos> x", b"return x"])
    assert 1 not in ids
    assert plain.tolist() == [2, 3]


def test_huggingface_without_named_separator_gets_one_behind_the_vocabulary(tmp_path):
    write_huggingface(tmp_path)
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.separator == 6
    assert tokenizer.vocab_size == 7
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<eos>"}}')  # as older versions wrote
    assert HuggingFaceTokenizer(tmp_path).separator == 1


def test_huggingface_refuses_what_is_not_utf8(huggingface):
    with pytest.raises(DataError, match="UTF-8"):
        huggingface.encode([b"\xff"])


def test_huggingface_folder_of_a_byte_level_bpe_gives_its_tokens(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = HuggingFaceTokenizer(tmp_path)
    text = SAMPLE + "naïve 漢字 🙂".encode()
    ((ids, counts),) = loaded.encode_counted([text])
    assert np.array_equal(ids, bpe.encode([text])[0])
    assert counts.sum() == len(text)
    assert loaded.decode([loaded.separator, *ids]) == text


@given(text=st.text(alphabet="ab 漢é🙂\n", min_size=1, max_size=30))
def test_huggingface_counts_bytes_under_prefix_spaces_and_byte_fallback(sentencepiece, text):
    ((_, counts),) = sentencepiece.encode_counted([text.encode()])
    assert counts.sum() == len(text.encode())
    assert counts.min() >= 0


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    backend = tokenizers.Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder)


def test_huggingface_folder_says_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        huggingface_folder(str(tmp_path / "none"))
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(DataError, match=r"no tokenizer\.json in it, only vocab\.txt"):
        huggingface_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no readable tokenizer"):
        HuggingFaceTokenizer(huggingface_folder(str(tmp_path / "tokenizer.json")))


def test_a_folder_without_tokenizer_json_is_read_by_transformers_and_kept_with_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["the way there and the way back"] * 9, trainer)
    backend.model.save(str(tmp_path))  # vocab.json and merges.txt, as GPT-2's
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = HuggingFaceTokenizer(huggingface_folder(str(tmp_path)))
    text = "the way back, and the grüße"
    assert tokenizer.encode([text.encode()])[0].tolist() == expected(text)["input_ids"]
    ((ids, counts),) = tokenizer.encode_counted([text.encode()])
    assert counts.sum() == len(text.encode())
    (tmp_path / "kept").mkdir()
    tokenizer.save(tmp_path / "kept")
    assert load(tmp_path / "kept").encode([text.encode()])[0].tolist() == ids.tolist()
