"""From text to batches: splits, caches, packing, resuming, and errors that name what is wrong."""

import itertools
import json
import math
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash import shard_batch
from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError, CheckpointError, DataError
from ringflash.training.corpus import building
from ringflash.training.corpus import prepare as preparing
from ringflash.training.corpus.batching import PackedBatches, ValidationBatches
from ringflash.training.corpus.building import split
from ringflash.training.corpus.documents import Documents
from ringflash.training.corpus.packing import pack
from ringflash.training.corpus.passed_over import PassedOver
from ringflash.training.corpus.prepare import prepare
from ringflash.training.corpus.reading import read_documents
from ringflash.training.corpus.samples import EpochSamples
from ringflash.training.corpus.sources import source_files

SEPARATOR = 256


def documents(lengths):
    """Byte-tokenized documents, every one of them of bytes that no other has at the same place."""
    texts = [np.random.default_rng(i).integers(0, 256, length).astype(np.uint8) for i, length in enumerate(lengths)]
    ends = np.cumsum(lengths)
    tokens = np.concatenate([np.concatenate([[SEPARATOR], text]) for text in texts]).astype(np.uint16)
    return Documents(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(np.array(lengths) + 1)]),
        text=np.concatenate(texts),
        spans=np.stack([ends - lengths, ends], axis=1),
        token_bytes=(tokens != SEPARATOR).astype(np.uint32),
        identity="test",
    )


def whole(docs, seqlen):
    """What is validated on."""
    return [pack(docs, seqlen, np.arange(len(docs)), keep_rest=True)]


def predictions(batch):
    """(token, next token) of all labelled tokens of a batch, as the training loop would see them."""
    shard = shard_batch(batch)
    predicted = shard["labels"] != -100
    return list(zip(shard["input_ids"][predicted].tolist(), shard["labels"][predicted].tolist(), strict=True))


def all_pairs(docs):
    bounds = zip(docs.offsets[:-1], docs.offsets[1:], strict=True)
    return Counter(
        pair for start, stop in bounds for pair in itertools.pairwise(docs.tokens[start:stop].astype(int).tolist())
    )


some_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(lengths=some_lengths, seqlen=st.integers(2, 30), batch=st.integers(1, 3), ranks=st.integers(1, 3))
def test_validation_predicts_every_token_once_and_counts_every_byte(lengths, seqlen, batch, ranks):
    docs = documents(lengths)
    parts = [ValidationBatches(whole(docs, seqlen), batch, rank, ranks) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    seen, num_bytes = Counter(), 0
    for part in parts:
        counted = list(part)
        assert len(counted) == len(part)
        for batch_, batch_bytes in counted:
            assert batch_["input_ids"].shape == (batch, seqlen)
            pairs = predictions(batch_)
            assert sum(target != SEPARATOR for _, target in pairs) == batch_bytes
            seen.update(pairs)
            num_bytes += batch_bytes
    assert seen == all_pairs(docs)
    assert num_bytes == docs.num_bytes


@given(
    lengths=some_lengths,
    seqlen=st.integers(2, 12),
    batch=st.integers(1, 4),
    ranks=st.integers(1, 4),
    sequences=st.integers(1, 9),
)
def test_so_many_validation_sequences_are_the_same_predictions_whatever_batch_and_ranks(
    lengths, seqlen, batch, ranks, sequences
):
    docs = documents(lengths)
    alone = ValidationBatches(whole(docs, seqlen), 1)
    expected, expected_bytes = Counter(), 0
    for _, (batch_, num_bytes) in zip(range(sequences), alone, strict=False):
        expected.update(predictions(batch_))
        expected_bytes += num_bytes
    parts = [list(ValidationBatches(whole(docs, seqlen), batch, rank, ranks, sequences)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sum((Counter(predictions(batch_)) for part in parts for batch_, _ in part), Counter()) == expected
    assert sum(num_bytes for part in parts for _, num_bytes in part) == expected_bytes


def test_so_many_validation_sequences_of_a_mixture_are_some_of_each_source():
    parts = [pack for lengths in ([40], [9], [30]) for pack in whole(documents(lengths), 8)]
    found = ValidationBatches(parts, 1, sequences=5)
    firsts = [counted.batch["input_ids"].tolist() for counted in found]
    expected = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert firsts == [[parts[part][index].input_ids.tolist()] for part, index in expected]
    assert sum(counted.num_bytes for counted in ValidationBatches(parts, 1)) == 40 + 9 + 30


@given(lengths=some_lengths, seqlen=st.integers(2, 20), seed=st.integers(0, 3))
def test_an_epoch_predicts_every_token_at_most_once_and_drops_only_the_tail(lengths, seqlen, seed):
    docs = documents(lengths)
    if len(docs.tokens) < seqlen:
        return
    batches = PackedBatches(EpochSamples(docs, seqlen, seed), 1)
    seen = Counter(pair for _ in range(batches.samples.samples_per_epoch) for pair in predictions(next(batches)))
    assert not seen - all_pairs(docs)
    assert (all_pairs(docs) - seen).total() < seqlen - 1


def test_segments_are_pieces_of_documents():
    docs = documents([5, 90, 13, 1, 40])
    wholes = [bytes(docs.text[start:stop]) for start, stop in docs.spans]
    batch = next(PackedBatches(EpochSamples(docs, 32, 0), 4))
    assert batch["input_ids"].dtype == torch.int64
    bounds = batch["cu_seqlens"]
    assert bounds == sorted(set(bounds))
    assert {0, 32, 64, 96, 128} <= set(bounds)
    flat = batch["input_ids"].flatten().tolist()
    for start, stop in itertools.pairwise(bounds):
        segment = flat[start:stop]
        assert SEPARATOR not in segment[1:]
        text = bytes(segment[1:] if segment[0] == SEPARATOR else segment)
        assert any(text in whole for whole in wholes)


def drawn(docs, ranks, batch, batches, state=None, seed=0):
    """The sequences of some batches in global order."""
    loaders = [PackedBatches(EpochSamples(docs, 16, seed), batch, rank, ranks) for rank in range(ranks)]
    if state is not None:
        for loader in loaders:
            loader.load_state_dict(state)
    rows = [[row.tolist() for _ in range(batches) for row in next(loader)["input_ids"]] for loader in loaders]
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    return [row for together in zip(*rows, strict=True) for row in together], loaders[0].state_dict()


@settings(max_examples=30)
@given(before=st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 4)]), after=st.sampled_from([(1, 1), (2, 2), (4, 1)]))
def test_order_is_the_same_on_other_ranks_and_after_resuming(before, after):
    docs = documents([30, 7, 55, 18, 2, 70])
    expected, _ = drawn(docs, 1, 1, 60)
    first, state = drawn(docs, *before, batches=3)
    state = json.loads(json.dumps(state))
    second, _ = drawn(docs, *after, batches=4, state=state)
    assert first + second == expected[: len(first + second)]


def test_epochs_and_seeds_shuffle_differently():
    docs = documents([20] * 12)
    rows, _ = drawn(docs, 1, 1, 2 * 16)
    assert len(rows[0]) == 16
    assert rows[:16] != rows[16:]
    assert drawn(docs, 1, 1, 16, seed=1)[0] != rows[:16]


def test_state_of_another_order_is_refused():
    docs = documents([50, 50])
    state = PackedBatches(EpochSamples(docs, 16, 0), 1).state_dict()
    for other in (PackedBatches(EpochSamples(docs, 8, 0), 1), PackedBatches(EpochSamples(docs, 16, 1), 1)):
        with pytest.raises(CheckpointError, match=r"data (seqlen|seed)="):
            other.load_state_dict(state)


def test_too_few_tokens_and_bad_arguments_are_named():
    docs = documents([5])
    with pytest.raises(DataError, match=r"6 tokens, fewer than one sequence of train.seqlen=7"):
        PackedBatches(EpochSamples(docs, 7, 0), 1)
    with pytest.raises(ArgumentError, match="data_rank=2"):
        PackedBatches(EpochSamples(docs, 4, 0), 1, data_rank=2, data_ranks=2)
    with pytest.raises(ArgumentError, match="seqlen=1"):
        ValidationBatches(whole(docs, 1), 1)
    with pytest.raises(ArgumentError, match="batch=0"):
        ValidationBatches(whole(docs, 4), 0)


@given(lengths=st.lists(st.integers(1, 1000), min_size=2, max_size=300), fraction=st.floats(0.01, 0.9))
def test_split_holds_out_a_fair_share(lengths, fraction):
    held_out = split(np.array(lengths), fraction)
    assert 0 < held_out.sum() < len(lengths)
    assert abs(held_out.sum() - fraction * len(lengths)) <= 1.5
    if len(lengths) * fraction >= 3:
        shorter = np.array(lengths) <= np.median(lengths)
        assert held_out[shorter].any()
        assert max(np.array(lengths)[held_out]) >= np.median(lengths)


# prepare


def prepare_in(folder, config):
    return prepare(replace(config, cache_dir=str(folder)))


def write_folder(folder):
    for i in range(30):
        file = folder / ("sub" if i % 2 else ".") / f"{i:02}.txt"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(f"document {i}: " + "some words, naïve ones too\n" * (i + 1))
    (folder / ".hidden").write_bytes(b"\xff")


@pytest.fixture
def text_folder(tmp_path):
    write_folder(tmp_path / "text")
    return tmp_path / "text"


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_prepare_keeps_the_text_of_every_document(text_folder, tmp_path, tokenizer):
    config = DataConfig(path=str(text_folder), tokenizer=tokenizer, vocab_size=300, validation_fraction=0.2)
    corpus = prepare_in(tmp_path / "cache", config)
    texts = []
    for part in (corpus.train, corpus.validation):
        for i, (start, stop) in enumerate(part.spans):
            ids = part.tokens[part.offsets[i] : part.offsets[i + 1]]
            assert ids[0] == corpus.tokenizer.separator
            assert corpus.tokenizer.decode(ids) == part.text[start:stop].tobytes()
            texts.append(part.text[start:stop].tobytes())
    assert sorted(texts) == sorted(file.read_bytes() for file in source_files(str(text_folder), PassedOver()))
    assert (len(corpus.train), len(corpus.validation)) == (24, 6)
    assert corpus.validation.token_bytes.sum() == corpus.validation.num_bytes
    assert corpus.bytes_per_token == pytest.approx(corpus.train.num_bytes / corpus.train.num_tokens)


def test_prepare_opens_the_cache_until_something_changes(text_folder, tmp_path):
    config = DataConfig(path=str(text_folder), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    first = prepare(config)
    built = (first.folder / "meta.json").stat().st_mtime_ns
    again = prepare(config)
    assert (again.folder, (again.folder / "meta.json").stat().st_mtime_ns) == (first.folder, built)
    os.utime(text_folder / "00.txt", ns=(1, 1))  # same content: read anew, and found to be the same
    assert prepare(config).folder == first.folder
    assert (first.folder / "meta.json").stat().st_mtime_ns == built
    (text_folder / "00.txt").write_text("something else")
    changed = prepare(config)
    assert changed.folder != first.folder
    assert changed.sha256 != first.sha256
    assert not list((tmp_path / "cache").glob("building*"))


def test_prepare_rebuilds_a_cache_that_lost_something(text_folder, tmp_path):
    config = DataConfig(path=str(text_folder), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    first = prepare(config)
    tokens = np.array(first.train.tokens)
    os.truncate(first.folder / "train.tokens.bin", 10)
    assert np.array_equal(prepare(config).train.tokens, tokens)


def test_only_one_of_several_ranks_builds_while_the_others_wait(text_folder, tmp_path, monkeypatch):
    builds = []

    def slow_build(*arguments):
        builds.append(1)
        time.sleep(0.3)
        building.build(*arguments)

    monkeypatch.setattr(preparing, "build", slow_build)
    config = DataConfig(path=str(text_folder), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as ranks:
        corpora = list(ranks.map(prepare, [config] * 4))
    assert builds == [1]
    assert len({corpus.sha256 for corpus in corpora}) == 1


def test_a_build_that_fails_fails_on_every_rank_and_blocks_nobody(text_folder, tmp_path):
    (text_folder / "bad.txt").write_bytes(b"\xff")
    config = DataConfig(path=str(text_folder), tokenizer="bytes", cache_dir=str(tmp_path / "cache"))
    with ThreadPoolExecutor(3) as ranks:
        errors = [ranks.submit(prepare, config).exception(timeout=30) for _ in range(3)]
    assert all(isinstance(error, DataError) and "bad.txt" in str(error) for error in errors)
    (text_folder / "bad.txt").unlink()
    assert len(prepare(config).train) > 0


def test_one_file_is_cut_at_a_line_into_train_and_validation(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i} naïve\n" for i in range(500)))
    corpus = prepare_in(tmp_path / "cache", DataConfig(path=str(tmp_path / "book.txt"), tokenizer="bytes"))
    ((start, cut),), ((again, end),) = corpus.train.spans, corpus.validation.spans
    text = corpus.train.text
    assert (start, cut, end) == (0, again, len(text))
    assert text[cut - 1] == ord("\n")
    assert 0.03 < (end - cut) / end < 0.05


def test_one_file_of_one_line_is_cut_between_characters(tmp_path):
    (tmp_path / "book.txt").write_text("漢字" * 500 + "\n")
    corpus = prepare_in(tmp_path / "cache", DataConfig(path=str(tmp_path / "book.txt"), tokenizer="bytes"))
    for part in (corpus.train, corpus.validation):
        ((start, end),) = part.spans
        part.text[start:end].tobytes().decode()
    assert 0.04 < corpus.validation.num_bytes / 3001 < 0.06


def test_long_documents_are_encoded_in_pieces_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("ringflash.training.corpus.building.PIECE_BYTES", 50)
    monkeypatch.setattr("ringflash.training.corpus.building.GROUP_BYTES", 120)
    text = ("漢字" * 40 + "\n" + "word " * 30 + "\n\n  end") * 3
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text[::-1])
    corpus = prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path), vocab_size=280))
    for part in (corpus.train, corpus.validation):
        assert corpus.tokenizer.decode(part.tokens).decode() in (text, text[::-1])
        assert np.count_nonzero(part.tokens == corpus.tokenizer.separator) == 1


def test_jsonl_and_parquet_hold_many_documents(tmp_path):
    texts = ["first — one", "", "second\none", "third"]
    lines = "\n".join(json.dumps({"id": 1, "body": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    expected = [text.encode() for text in texts if text]
    assert list(read_documents(tmp_path / "a.jsonl", "body", PassedOver())) == expected
    assert list(read_documents(tmp_path / "a.parquet", "body", PassedOver())) == expected
    corpus = prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path), text_field="body", tokenizer="bytes"))
    assert len(corpus.train) + len(corpus.validation) == 6


def test_max_bytes_reads_no_more_and_cuts_no_character(text_folder, tmp_path):
    for limit in (700, 701, 702):
        config = DataConfig(path=str(text_folder), tokenizer="bytes", max_bytes=limit)
        corpus = prepare_in(tmp_path / "cache", config)
        size = corpus.train.num_bytes + corpus.validation.num_bytes
        assert limit - 3 <= size <= limit
        corpus.train.text.tobytes().decode()


def test_sample_is_all_or_a_fixed_part():
    docs = documents([10, 200, 30, 60])
    assert sum(map(len, docs.sample(300))) == 300
    first, again = docs.sample(120), docs.sample(120)
    assert sum(map(len, first)) == 120
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_standard_library_is_read_without_its_tests():
    files = source_files(None, PassedOver())
    names = {file.name for file in files}
    assert {"argparse.py", "typing.py"} <= names
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(file.parts[-4:-1]) for file in files)
    assert files == source_files(None, PassedOver())
    assert sum(file.stat().st_size for file in files) > 5e6


def bad_folder(folder, name, content):
    (folder / "good.txt").write_text("good text\n" * 50)
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"abc\xff", r"a\.bin is not UTF-8 text: byte 0xff at 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2 cannot be read as JSON: .*each line must hold one"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 3}',
            r"no row of .*a\.jsonl has data.text_field=text; its fields are body, id",
        ),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1 is a list; allowed are objects with a field of text"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: data.text_field=text holds half a surrogate pair at character 0"),
        ("a.parquet", b"not parquet", r"cannot read .*a\.parquet: .*; write it anew, or leave it out"),
    ],
)
def test_undecodable_text_names_the_file_and_the_place(tmp_path, name, content, message):
    folder = bad_folder(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(folder), tokenizer="bytes"))
    assert not list((tmp_path / ".cache").glob("building*"))


def test_parquet_without_the_column_names_what_is_there(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no row of .*a\.parquet has data.text_field=text; its fields are body, n"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"data\.text_field=n holds int64, not text; name a column of text"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path), text_field="n"))


def test_missing_empty_and_unreadable_paths_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none: no such file or folder"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path / "none")))
    with pytest.raises(DataError, match="no files in it"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path)))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="no text in its 1 files"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path)))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"cannot read .*gone\.txt: No such file"):
        prepare_in(tmp_path / ".cache", DataConfig(path=str(tmp_path)))


def test_unwritable_cache_and_bad_values_are_named(text_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir=.*file"):
        prepare_in(tmp_path / "file", DataConfig(path=str(text_folder)))
    with pytest.raises(ArgumentError, match="validation_fraction=0"):
        prepare_in(tmp_path / "cache", DataConfig(path=str(text_folder), validation_fraction=0.0))
    with pytest.raises(ArgumentError, match="max_bytes=0"):
        prepare_in(tmp_path / "cache", DataConfig(path=str(text_folder), max_bytes=0))
    with pytest.raises(DataError, match=r"data.tokenizer=gpt9: no such folder"):
        prepare_in(tmp_path / "cache", DataConfig(path=str(text_folder), tokenizer="gpt9"))
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match="too short to hold a part of it out"):
        prepare_in(tmp_path / "cache", DataConfig(path=str(tmp_path / "one.txt")))


def test_bits_per_byte_of_a_uniform_model_is_eight(text_folder, tmp_path):
    corpus = prepare_in(tmp_path / "cache", DataConfig(path=str(text_folder), tokenizer="bytes"))
    nats = num_bytes = 0.0
    for batch, batch_bytes in ValidationBatches(whole(corpus.validation, 64), 2):
        nats += len(predictions(batch)) * math.log(256)
        num_bytes += batch_bytes
    assert nats / math.log(2) / num_bytes == pytest.approx(8)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_what_is_named_to_validate_on_is_all_that_is_held_out(text_folder, tmp_path, tokenizer):
    from ringflash.configs.schema import Config
    from ringflash.training.corpus.training_data import read_data

    (tmp_path / "long.txt").write_text("a long document of another kind\n" * 90)
    data = DataConfig(path=str(text_folder), tokenizer=tokenizer, vocab_size=300, cache_dir=str(tmp_path / "cache"))
    config = Config(data=data)
    config.train.seqlen = 64
    split = read_data(config)
    data.validation = str(tmp_path / "long.txt")
    found = read_data(config)
    assert found.num_tokens > split.num_tokens  # nothing of data.path is held out
    (packing,) = found.validation
    decoded = b"".join(found.corpus.tokenizer.decode(packing.documents.tokens.astype(int).tolist()).splitlines(True))
    assert decoded == (tmp_path / "long.txt").read_bytes()
    assert sum(packing[i].num_bytes for i in range(len(packing))) == len(decoded)
    assert found.corpus.tokenizer.vocab_size == found.tokenizer.vocab_size
    assert found.identity != split.identity
    data.validation = str(tmp_path / "absent")
    with pytest.raises(DataError, match=r"^data\.validation=.*absent: no such file or folder"):
        read_data(config)
    (tmp_path / "bad.jsonl").write_text('{"text": 3}')
    data.validation = str(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"^data\.validation: .*bad\.jsonl, line 1: data\.text_field=text is a number"):
        read_data(config)
