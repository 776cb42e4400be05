"""Streams and mixtures: every document once an epoch, in an order that ranks do not change, resumed anywhere."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from folders import write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chats import messages_of
from test_data import documents

from ringflash.configs.schema import Config, DataConfig
from ringflash.errors import ArgumentError, CheckpointError, DataError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.corpus import streaming
from ringflash.training.corpus.batching import PackedBatches
from ringflash.training.corpus.passed_over import CUT, EMPTY, NOTHING_LEARNED, WITHOUT_TEXT
from ringflash.training.corpus.samples import EpochSamples, MixedSamples
from ringflash.training.corpus.training_data import read_data

SEPARATOR = 256
SEQLEN = 24


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BLOCK_SEQUENCES", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts in three files, of two kinds, and chats in two."""
    folder = tmp_path_factory.mktemp("streams")
    write_tokenizer(folder / "tokenizer")
    (folder / "texts").mkdir()
    rows = [{"meta": {"text": f"row {number} of {'many ' * (number % 7)}"}} for number in range(20)]
    (folder / "texts" / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows[:8], {"meta": None}, *rows[8:12]])))
    (folder / "texts" / "b.json").write_text(json.dumps(rows[12:]))
    (folder / "texts" / "c.txt").write_text("a text of its own")
    (folder / "texts" / "d.txt").write_text("")
    (folder / "chats").mkdir()
    chats = [{"messages": messages_of([(f"q{number}", f"a{number}")] * (number % 3 + 1))} for number in range(15)]
    chats.append({"messages": messages_of([("nobody", "x")])[:1]})
    for name, part in (("a", chats[:6]), ("b", chats[6:])):
        (folder / "chats" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def text_config(folder, **others):
    own = {"path": str(folder / "texts"), "validation": str(folder / "texts"), "text_field": "meta.text"}
    return _config(folder, DataConfig(streaming=True, **own | {"tokenizer": "bytes"} | others))


def chat_config(folder, **others):
    data = {"path": str(folder / "chats"), "format": "chat", "tokenizer": str(folder / "tokenizer")} | others
    return _config(folder, DataConfig(streaming=True, validation=str(folder / "chats"), **data))


def mixed_config(folder):
    sources = [
        {"path": str(folder / "texts"), "text_field": "meta.text", "weight": 3.0},
        {"path": str(folder / "chats"), "format": "chat", "weight": 1.5, "streaming": True},
        {"path": str(folder / "chats"), "format": "chat", "validation": str(folder / "chats")},
    ]
    sources[1]["validation"] = str(folder / "chats")
    written = ",".join("{" + ",".join(f"{key}: '{value}'" for key, value in each.items()) + "}" for each in sources)
    config = load([f"data.mixture=[{written}]", f"data.tokenizer={folder / 'tokenizer'}", f"train.seqlen={SEQLEN}"])
    config.data.cache_dir = str(folder / "cache")
    return config


def _config(folder, data):
    config = Config(data=data)
    config.data.cache_dir, config.train.seqlen = str(folder / "cache"), SEQLEN
    return config


CONFIGS = {"text": text_config, "chat": chat_config, "mixed": mixed_config}


def drawn(config, ranks, batch, batches, state=None):
    """Tokens and labels of some batches' sequences in global order, and the state behind them."""
    loaders = [PackedBatches(read_data(config).samples, batch, rank, ranks) for rank in range(ranks)]
    rows = [[] for _ in loaders]
    for loader, mine in zip(loaders, rows, strict=True):
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(batches):
            batch_ = next(loader)
            labels = batch_.get("labels", batch_["input_ids"])
            mine += [(row.tolist(), of_row.tolist()) for row, of_row in zip(batch_["input_ids"], labels, strict=True)]
    assert all(loader.state_dict() == loaders[0].state_dict() for loader in loaders)
    return [row for together in zip(*rows, strict=True) for row in together], loaders[0].state_dict()


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    before=st.sampled_from([(1, 1), (2, 1), (3, 2), (1, 4)]),
    after=st.sampled_from([(1, 1), (2, 2), (4, 1)]),
    batches=st.integers(1, 9),
)
def test_order_is_the_same_on_other_ranks_and_after_resuming_anywhere(folder, kind, before, after, batches):
    config = CONFIGS[kind](folder)
    first, state = drawn(config, *before, batches=batches)
    second, _ = drawn(config, *after, batches=4, state=state)
    expected, _ = drawn(config, 1, 1, len(first) + len(second))
    assert first + second == expected


def test_an_epoch_of_a_stream_holds_every_text_once_and_the_next_one_mixes_anew(folder):
    samples = read_data(text_config(folder)).samples
    epochs = {0: Counter(), 1: Counter()}
    order = {0: [], 1: []}
    while samples.epoch < 2:
        packed, epoch = samples.draw(True), int(samples.epoch)
        if epoch == 2:
            break
        start = 0
        for end in packed.ends:
            epochs[epoch].update(itertools.pairwise(packed.input_ids[start:end].tolist()))
            order[epoch] += [bytes(x for x in packed.input_ids[start:end].tolist() if x != SEPARATOR)]
            start = end
    rows = [f"row {number} of {'many ' * (number % 7)}" for number in range(20)] + ["a text of its own"]
    expected = Counter()
    for row in rows:
        expected.update(itertools.pairwise([SEPARATOR, *row.encode()]))
    assert epochs[0] == epochs[1] == expected
    assert order[0] != order[1]
    assert samples.passed_over.counts[WITHOUT_TEXT][0] == 2  # one in each epoch
    assert samples.passed_over.counts[EMPTY][0] == 2


def test_a_stream_of_chats_learns_what_a_corpus_of_them_learns(folder):
    def learned(config):
        samples, found = read_data(config).samples, Counter()
        while samples.epoch < 1:
            packed = samples.draw(True)
            if samples.epoch < 1 or not config.data.streaming:
                found.update(int(token) for token in packed.labels if token != -100)
        return found, samples

    streamed, samples = learned(chat_config(folder))
    config = chat_config(folder)
    config.data.streaming = False
    expected, whole = learned(config)
    assert streamed == expected
    assert samples.passed_over.counts[NOTHING_LEARNED][0] >= 1
    assert samples.passed_over.counts[CUT][0] >= whole.cut > 0  # it has begun a second epoch


@pytest.mark.parametrize("streaming", [False, True])
def test_where_no_chat_can_be_learned_from_it_is_said_why(folder, tmp_path, streaming):
    turns = [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 5))
    config = chat_config(folder, path=str(tmp_path / "a.jsonl"))
    config.data.streaming = streaming
    with pytest.raises(
        DataError, match=r"nothing in it can be learned; passed over: chats in which nothing is learned"
    ):
        read_data(config).samples.draw(True)


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), draws=st.integers(1, 200))
def test_each_part_of_a_mixture_has_its_share_of_any_number_of_sequences(weights, draws):
    parts = [EpochSamples(documents([40 + number]), 8, 0) for number in range(len(weights))]
    mixed = MixedSamples(parts, weights)
    for _ in range(draws):
        mixed.draw(False)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part.drawn - draws * weight / sum(weights)) < max(2, len(weights))


def test_states_of_other_data_are_refused(folder):
    _, state = drawn(text_config(folder), 1, 1, 2)
    for change in ({"path": str(folder / "texts" / "a.jsonl")}, {"tokenizer": str(folder / "tokenizer")}):
        with pytest.raises(CheckpointError, match=r"data documents=.*checkpoint.weights=PATH"):
            read_data(text_config(folder, **change)).samples.load_state_dict(state)
    mixed = read_data(mixed_config(folder)).samples
    with pytest.raises(CheckpointError, match="data weights="):
        mixed.load_state_dict(mixed.state_dict() | {"weights": [1.0, 1.0, 1.0]})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.streaming=true", "data=bytes"], "data.streaming=true holds nothing out; give data.validation=PATH"),
        (["data.streaming=true", "data.validation=x"], "data.tokenizer=bpe is trained on one text"),
        (["data.mixture=[{path: a}]"], "data.tokenizer=bpe is trained on one text"),
        (["data.mixture=[{weight: 2}]"], "data.mixture[0].path is missing"),
        (["data.mixture=[{path: a, weight: 0}]"], "data.mixture[0].weight=0.0; it must be positive"),
        (["data.mixture=[{path: a, format: csv}]"], "data.mixture[0].format='csv'; allowed are text, chat"),
        (["data.mixture=[{path: a}]", "data.path=b"], "data.path=b beside data.mixture"),
        (["data.mixture=[{path: a, streaming: true}]", "data=bytes"], "data.mixture[0].streaming=true holds nothing"),
    ],
)
def test_streams_and_mixtures_that_cannot_work_are_refused_by_name(overrides, said):
    with pytest.raises(ArgumentError) as refused:
        check(load(overrides), 1)
    assert said in str(refused.value)


def test_streams_need_datasets(monkeypatch):
    monkeypatch.setattr("ringflash.training.extras.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"data\.streaming=true needs datasets: pip install 'ringflash\[hugg"):
        check(load(["data.streaming=true", "data=bytes", "data.validation=x"]), 1)


def test_what_a_stream_cannot_read_is_named(folder, tmp_path):
    own = {"path": str(tmp_path), "text_field": "text", "validation": str(folder / "texts" / "c.txt")}
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}')
    samples = read_data(text_config(folder, **own)).samples
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: data\.text_field=text is a number"):
        samples.draw(True)
    (tmp_path / "a.jsonl").write_text('{"text": null}')
    with pytest.raises(DataError, match=r"nothing in it can be learned; passed over: rows without text \(1"):
        read_data(text_config(folder, **own)).samples.draw(True)


def test_a_name_that_is_no_path_here_is_asked_of_the_hub_with_all_that_names_it(folder, monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        from datasets import Dataset

        asked.append((arguments, named))
        rows = [{"meta": {"text": f"of the hub {number}"}} for number in range(9)]
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(streaming, "load_dataset", load_dataset)
    more = {"subset": "en", "split": "train", "revision": "abc"}
    config = text_config(folder, path="owner/name", **more)
    expected, _ = drawn(config, 1, 1, 9)
    first, state = drawn(config, 2, 1, 2)
    second, _ = drawn(config, 1, 1, 5, state=state)
    assert first + second == expected
    assert asked[0] == (("owner/name", "en"), {"split": "train", "revision": "abc", "streaming": True})
    assert np.array(expected).max() == SEPARATOR


def test_rows_of_the_hub_may_lack_the_field_and_keep_their_numbers_wherever_a_run_goes_on(folder, monkeypatch):
    def load_dataset(*arguments, **named):
        from datasets import IterableDataset

        return IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(streaming, "load_dataset", load_dataset)
    rows = [{"meta": {"text": f"of the hub {n}"}} if n % 6 == 0 else {"other": n} for n in range(48)]
    config = text_config(folder, path="owner/name")
    expected, _ = drawn(config, 1, 1, 12)
    for middle in range(1, 12):
        _, state = drawn(config, 1, 1, middle)
        assert drawn(config, 1, 1, 12 - middle, state=state)[0] == expected[middle:]
    rows[40] = {"meta": {"text": 3}}
    with pytest.raises(DataError, match=r"owner/name, row 41: data\.text_field=meta\.text is a number"):
        drawn(config, 1, 1, 12, state=drawn(config, 1, 1, 5)[1])


def test_a_name_that_the_hub_does_not_have_is_refused_as_such(folder, monkeypatch):
    def load_dataset(*arguments, **named):
        raise FileNotFoundError("404")

    monkeypatch.setattr(streaming, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"data.path=owner/name is no file or folder here, and no data set of the hub"):
        read_data(text_config(folder, path="owner/name"))
