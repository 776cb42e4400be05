"""Chats: read from any file, written by the tokenizer's template, and learned where an assistant speaks."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from folders import MARKED, UNMARKED, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import predictions

from ringflash.configs.schema import DataConfig
from ringflash.errors import ArgumentError, DataError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.corpus.batching import PackedBatches, ValidationBatches
from ringflash.training.corpus.chats import ChatTokenizer
from ringflash.training.corpus.documents import Documents
from ringflash.training.corpus.packing import best_fit, pack
from ringflash.training.corpus.passed_over import NOTHING_LEARNED, WITHOUT_TEXT, PassedOver
from ringflash.training.corpus.prepare import prepare
from ringflash.training.corpus.reading import read_documents
from ringflash.training.corpus.samples import EpochSamples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    for name, template in (("marked", MARKED), ("unmarked", UNMARKED), ("none", None)):
        write_tokenizer(folder / name, template)
    return folder


def turn(role, content):
    return {"role": role, "content": content}


words = st.text(st.characters(codec="utf-8", exclude_characters="<|>", exclude_categories=["Cs", "Cc"]), max_size=12)
exchanges = st.lists(st.tuples(words, words.filter(str.strip)), min_size=1, max_size=3)


def messages_of(pairs):
    return [turn(role, content) for pair in pairs for role, content in zip(("user", "assistant"), pair, strict=True)]


def encode(folder, record):
    chats = ChatTokenizer(str(folder))
    found = chats.encode(json.dumps(record).encode(), "a.jsonl, line 3")
    return chats.auto, found.ids.tolist(), found.learned


# Tokens


@settings(max_examples=25)
@given(pairs=exchanges)
def test_what_the_template_marks_is_learned_and_nothing_else(folder, pairs):
    tokenizer, ids, learned = encode(folder / "marked", {"messages": messages_of(pairs)})
    assert ids == tokenizer.apply_chat_template(messages_of(pairs))["input_ids"]
    said = tokenizer.decode(np.array(ids)[learned])
    assert said == "".join(f"{answer}<|end|>" for _, answer in pairs)


@settings(max_examples=25)
@given(pairs=exchanges, behind=st.booleans())
def test_without_marks_the_last_turn_of_the_assistant_is_learned(folder, pairs, behind):
    messages = messages_of(pairs) + ([turn("user", "and then?")] if behind else [])
    tokenizer, ids, learned = encode(folder / "unmarked", {"messages": messages})
    assert ids == tokenizer.apply_chat_template(messages_of(pairs))["input_ids"]  # nothing depends on what is behind
    assert tokenizer.decode(np.array(ids)[learned]) == f"{pairs[-1][1]}<|end|>"
    before = tokenizer.apply_chat_template(messages_of(pairs)[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(before)] == before
    assert not learned[: len(before)].any()


@pytest.mark.parametrize("name", ["marked", "unmarked", "none"])
def test_of_prompt_and_completion_the_completion_is_learned(folder, name):
    tokenizer, ids, learned = encode(folder / name, {"prompt": "What is 12 and", "completion": " 30? It is 42."})
    given = tokenizer("What is 12 and")["input_ids"]
    assert ids == given + tokenizer(" 30? It is 42.")["input_ids"] + [tokenizer.eos_token_id]
    assert learned.tolist() == [False] * len(given) + [True] * (len(ids) - len(given))
    if name != "none":
        chat = {"prompt": [turn("user", "hello")], "completion": [turn("assistant", "you?")]}
        tokenizer, ids, learned = encode(folder / name, chat)
        assert tokenizer.decode(np.array(ids)[learned]) == "you?<|end|>"


def test_tools_reach_the_template(tmp_path):
    write_tokenizer(tmp_path, "{{ tools[0]['name'] }}" + UNMARKED)
    chat = {"messages": messages_of([("a", "b")]), "tools": [{"name": "hammer"}]}
    tokenizer, ids, _ = encode(tmp_path, chat)
    assert tokenizer.decode(ids).startswith("hammer<|begin|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template, which messages need"),
        ("{{ raise_exception('no system here') }}", "refuses it: no system here"),
        ("{% for m in messages %}{{ messages|length }}{{ m['content'] }}{% endfor %}", "writes the messages before"),
    ],
    ids=["none", "raises", "changes"],
)
def test_a_chat_that_its_template_cannot_write_is_refused_by_its_place(tmp_path, template, said):
    write_tokenizer(tmp_path / "tokenizer", template)
    rows = [{"prompt": "a", "completion": "b"}, {"messages": messages_of([("a", "b")])}] * 3
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = _config(tmp_path, tmp_path / "tokenizer", tmp_path / "chats.jsonl")
    with pytest.raises(DataError) as refused:
        prepare(config)
    assert said in str(refused.value)
    assert "data.tokenizer=" in str(refused.value)
    if template is not None:
        assert "chats.jsonl, line " in str(refused.value)
        assert int(str(refused.value).split("line ")[1].split(":")[0]) % 2 == 0


def _config(folder, tokenizer, path, **others):
    return DataConfig(
        path=str(path), format="chat", tokenizer=str(tokenizer), cache_dir=str(folder / "cache"), **others
    )


# Reading

CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TAUGHT = [
    [turn("user", "grüße"), turn("assistant", "hi")],
    [turn("system", ""), turn("user", "x"), {**turn("assistant", "y"), "name": "z"}],
    [turn("user", "x"), CALL, turn("tool", "1"), turn("assistant", "one")],
]
SILENT = [
    None,
    [],
    [turn("user", None), turn("assistant", "hi")],
    [turn("user", "x"), turn("assistant", None)],
    [turn("user", "x"), turn("assistant", "")],
    [turn("user", "x"), {"role": "assistant"}],
]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "parquet", "jsonl.gz", "JSONL"])
@pytest.mark.parametrize("taught", [TAUGHT, []], ids=["some", "silent"])
def test_chats_are_read_alike_from_every_kind_of_file(tmp_path, suffix, taught):
    file = tmp_path / f"chats.{suffix}"
    rows = [{"messages": messages, "id": number} for number, messages in enumerate([*SILENT, *taught])]
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    passed_over = PassedOver()
    found = [json.loads(chat) for chat in read_documents(file, None, passed_over)]
    call = {name: value for name, value in CALL.items() if value is not None}
    assert found == [{"messages": [call if each is CALL else each for each in messages]} for messages in taught]
    assert passed_over.counts[WITHOUT_TEXT][0] == len(SILENT)


@pytest.mark.parametrize("parts", [[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], ["a ", "b"]])
def test_parts_of_text_are_one_text_whatever_the_template_does_with_lists(tmp_path, parts):
    rows = [{"messages": [turn("user", parts), turn("assistant", "c")]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (found,) = read_documents(tmp_path / "a.jsonl", None, PassedOver())
    assert json.loads(found) == {"messages": [turn("user", "a b"), turn("assistant", "c")]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x"}], "no row of .* has messages, or prompt and completion; its fields are text"),
        ([{"messages": "hello"}], "line 1: messages is no list"),
        ([{"messages": [{"from": "human"}]}], "line 1: messages, message 1, has no role"),
        ([{"messages": [turn("user", 3)]}], "line 1: messages, message 1, has content that is a number"),
        ([{"messages": [turn("user", math.nan)]}], "line 1: messages, message 1, has content that is a number"),
        ([{"messages": [turn("user", {"a": "b"})]}], "line 1: messages, message 1, has content that is an object"),
        ([{"messages": [turn("user", [{"type": "image"}])]}], "line 1: messages, message 1, has parts of image"),
        ([{"messages": [turn("user", [3])]}], "line 1: messages, message 1, has parts of a number"),
        ([{"conversations": []}], "line 1 has conversations; name it messages"),
        ([{"prompt": "a", "completion": [turn("assistant", "b")]}], "line 1: prompt and completion must both be text"),
        ([[1]], "line 1 is no object"),
    ],
)
def test_rows_that_are_no_chats_are_refused_by_name(tmp_path, rows, said):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=said):
        list(read_documents(tmp_path / "a.jsonl", None, PassedOver()))


def test_texts_are_no_chats(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a.txt holds no rows; data=chat reads .jsonl, .ndjson, .json, .parquet"):
        list(read_documents(tmp_path / "a.txt", None, PassedOver()))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=x"], "data.format=chat with data.tokenizer=bpe, which has no chat template"),
        (["data.tokenizer=x"], "data.path=null; the standard library holds no chats"),
    ],
)
def test_chats_need_a_path_and_a_tokenizer_with_a_template(overrides, said):
    with pytest.raises(ArgumentError) as refused:
        check(load(["data=chat", *overrides]), 1)
    assert said in str(refused.value)


def test_a_corpus_of_chats_is_kept_and_says_what_teaches_nothing(folder, tmp_path):
    rows = [{"messages": messages_of([(f"question {i}", f"answer {i}")])} for i in range(20)]
    rows.insert(4, {"messages": [turn("user", "nobody answers")]})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = _config(tmp_path, folder / "marked", tmp_path / "a.jsonl", validation_fraction=0.2)
    for _ in range(2):  # built, and found
        corpus = prepare(config)
        assert corpus.passed_over.counts == {NOTHING_LEARNED: (1, f"{tmp_path / 'a.jsonl'}, line 5")}
        assert len(corpus.train) + len(corpus.validation) == 20
        assert len(corpus.validation) == 4
    other = prepare(_config(tmp_path, folder / "unmarked", tmp_path / "a.jsonl", validation_fraction=0.2))
    assert other.folder != corpus.folder  # another template


# Packing


def chats(lengths, learned):
    """Tokens count up, so that each stands for its place."""
    ends = np.cumsum(lengths)
    learned = np.resize(np.array(learned, np.uint8), ends[-1])
    learned[ends - 1] = 1  # something is
    return Documents(
        tokens=np.arange(ends[-1], dtype=np.uint32),
        offsets=np.concatenate([[0], ends]),
        text=np.zeros(0, np.uint8),
        spans=np.zeros((len(lengths), 2), np.int64),
        token_bytes=None,
        identity="chats",
        learned=learned,
    )


some_chats = st.builds(
    chats, st.lists(st.integers(2, 40), min_size=1, max_size=12), st.lists(st.booleans(), min_size=1, max_size=9)
)


def to_learn(docs):
    """Every pair of neighbours whose second token is learned."""
    bounds = itertools.pairwise(docs.offsets.tolist())
    return Counter((at - 1, at) for start, stop in bounds for at in range(start + 1, stop) if docs.learned[at])


@given(docs=some_chats, seqlen=st.integers(2, 30), seed=st.integers(0, 3))
def test_every_epoch_learns_every_learned_token_once_from_all_of_its_chat_that_fits(docs, seqlen, seed):
    samples = EpochSamples(docs, seqlen, seed)
    whole = [range(*bounds) for bounds in itertools.pairwise(docs.offsets.tolist())]
    batches = PackedBatches(samples, 1)
    for _ in range(2):
        seen = Counter()
        for _ in range(samples.samples_per_epoch):
            batch = next(batches)
            seen.update(predictions(batch))
            ids = batch["input_ids"].flatten().tolist()
            for start, stop in itertools.pairwise(batch["cu_seqlens"]):
                chat = next(each for each in whole if ids[start] in each)
                assert ids[start:stop] == list(range(ids[start], ids[start] + stop - start))
                assert stop - start == len(chat) or len(chat) > seqlen
        assert seen == to_learn(docs)
    assert samples.cut == sum(len(chat) > seqlen for chat in whole)


@given(docs=some_chats, seqlen=st.integers(2, 30), batch=st.integers(1, 3), ranks=st.integers(1, 3))
def test_validation_learns_every_learned_token_once_on_any_ranks(docs, seqlen, batch, ranks):
    packing = pack(docs, seqlen, np.arange(len(docs)), keep_rest=True)
    parts = [list(ValidationBatches([packing], batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert sum((Counter(predictions(each.batch)) for part in parts for each in part), Counter()) == to_learn(docs)


@given(lengths=st.lists(st.integers(1, 20), max_size=40), seed=st.integers(0, 3))
def test_best_fit_keeps_every_piece_once_in_bins_that_are_full_but_for_what_fits_nowhere(lengths, seed):
    pieces = [
        (start, start + length) for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False)
    ]
    mixed = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
    bins = best_fit(mixed, 20)
    assert sorted(piece for each in bins for piece in each) == pieces
    filled = sorted(sum(stop - start for start, stop in each) for each in bins)
    assert all(size <= 20 for size in filled)
    assert all(a + b > 20 for a, b in itertools.pairwise(filled))  # no two bins would go into one
    assert len(bins) == len(best_fit(pieces, 20))
