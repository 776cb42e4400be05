"""What a run tells others: trackers through Accelerate, torch's profiler, and a needle in a haystack."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loop import _train

from ringflash.errors import ArgumentError, DataError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.corpus.tokenizer import ByteTokenizer
from ringflash.training.run.needle import DEPTHS, NUMBER, SENTENCE, haystacks

# Writes down how it is called, as the two libraries are called by Accelerate's trackers.
LIBRARY = """
import json, os

class Config:
    def update(self, values, **options):
        write("config", values)

config = Config()

def write(kind, values):
    with open(os.path.join(os.environ["CALLS"], __name__ + ".jsonl"), "a") as file:
        file.write(json.dumps([kind, values]) + "\\n")

class Run:
    def log(self, values, step=None):
        if step == int(os.environ.get("FAILS_AT", "-1")):
            raise ConnectionError("no network")
        write("log", [step, values])
    def finish(self):
        write("finish", None)

def init(**options):
    write("init", options)
    return Run()
"""


@pytest.fixture
def libraries(tmp_path):
    for name in ("wandb", "trackio"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(LIBRARY)
    return lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]


def _train_tracked(folder, fails_at, *overrides):
    """A run where both libraries can be imported; returns what it warned of."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.syspath_prepend(folder / "site")
        patch.setenv("CALLS", str(folder))
        patch.setenv("FAILS_AT", str(fails_at))
        _train(folder, "mine", "train.steps=4", *overrides)
        for name in ("wandb", "trackio"):
            sys.modules.pop(name, None)
    return [str(each.message) for each in warned]


def test_trackers_are_told_of_the_configuration_and_every_scalar_once(pool, libraries, tmp_path):
    warned, others = pool(2).run(_train_tracked, tmp_path, 3, "logging.wandb=true", "logging.trackio=true")
    for name in ("wandb", "trackio"):
        kinds = [kind for kind, _ in libraries(name)]
        assert kinds == ["init", "config", "log", "log"]  # and at the third it failed: training went on
        assert libraries(name)[0][1]["project"] == "smoke"
        assert libraries(name)[0][1]["name"] == "mine"
        assert libraries(name)[0][1]["resume"] == "allow"
        assert libraries(name)[1][1]["train.steps"] == 4
        step, scalars = libraries(name)[2][1]
        assert step == 1
        assert scalars["train/loss"] > 0
    assert "WandBTracker stops at step 3: no network" in warned
    assert not [said for said in others if "stops at step" in said]


def test_a_tracked_run_that_goes_on_is_the_same_run_there(pool, libraries, tmp_path):
    for _ in range(2):
        pool(1).run(_train_tracked, tmp_path, -1, "logging.wandb=true")
    calls = libraries("wandb")
    begun = [values for kind, values in calls if kind == "init"]
    assert len(begun) == 2
    assert begun[0] == begun[1]
    assert [kind for kind, _ in calls].count("finish") == 2


def test_trackers_that_are_not_installed_are_named(monkeypatch):
    for name in ("wandb", "trackio"):
        for absent, install in ((name, name), ("accelerate", r"'ringflash\[huggingface\]'")):
            find = lambda library, absent=absent: None if library == absent else library  # noqa: E731
            monkeypatch.setattr("ringflash.training.extras.find_spec", find)
            with pytest.raises(ArgumentError, match=rf"logging\.{name}=true needs {absent}: pip install {install}"):
                check(load([f"logging.{name}=true"]), 1)


def test_the_profiler_records_so_many_steps_of_every_rank(pool, tmp_path):
    pool(2).run(_train, tmp_path, "profiled", "logging.profile_steps=2")
    for rank in range(2):
        events = json.loads((tmp_path / "profiled" / "profile" / f"rank{rank}.json").read_text())["traceEvents"]
        steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
        assert steps == {"ProfilerStep#2", "ProfilerStep#3"}  # torch counts from 0
        assert any("ringflash" in event.get("name", "") for event in events)


def _recorded(folder, run, *overrides):
    """How many steps a run recorded, of one rank."""
    _train(folder, run, *overrides)
    path = folder / run / "profile" / "rank0.json"
    if not path.exists():
        return None
    events = json.loads(path.read_text())["traceEvents"]
    return len({name for event in events if (name := event.get("name", "")).startswith("ProfilerStep")})


def test_chosen_steps_are_recorded_and_those_that_are_done_are_not_again(pool, tmp_path):
    chosen = ("logging.profile_steps=3", "logging.profile_from=2", "train.steps=5")
    assert pool(1).run(_recorded, tmp_path, "chosen", *chosen) == [3]
    pool(1).run(_train, tmp_path, "goes-on", "train.steps=3")
    assert pool(1).run(_recorded, tmp_path, "goes-on", *chosen) == [1]  # of 2, 3 and 4 the last
    pool(1).run(_train, tmp_path, "past", "train.steps=4")
    assert pool(1).run(_recorded, tmp_path, "past", *chosen) == [None]


def test_debug_profile_records_two_steps(pool, tmp_path):
    assert pool(1).run(_recorded, tmp_path, "debug", "debug=profile", "train.steps=5") == [2]


def test_steps_to_record_that_never_come_are_refused():
    for keys in (["logging.profile_from=3"], ["debug=profile", "logging.profile_from=5"]):
        with pytest.raises(ArgumentError, match=r"logging\.profile_from"):
            check(load(keys), 1)


@given(seqlen=st.integers(200, 1500), documents=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_each_haystack_holds_the_sentence_at_its_depth_and_asks_for_the_number_at_its_end(seqlen, documents):
    text = [np.full(length, 65 + i, np.uint16) for i, length in enumerate(documents)]
    found = list(haystacks(text, ByteTokenizer(), seqlen))
    assert {hay.length for hay in found} <= {seqlen, seqlen // 2, seqlen // 4, seqlen // 8}
    assert [hay.depth for hay in found] == [*DEPTHS] * (len(found) // len(DEPTHS))
    for hay in found:
        ids = hay.batch["input_ids"][0, : hay.length].tolist()
        text_ = bytes(ids[1:])
        assert text_.count(SENTENCE) == 2
        assert text_.endswith(SENTENCE + NUMBER)
        around = len(text_) - 2 * len(SENTENCE + NUMBER)
        assert text_.index(SENTENCE) == round(hay.depth * around)
        learned = hay.batch["labels"][0] != -100
        assert bytes(hay.batch["input_ids"][0][learned].tolist()) == NUMBER
        assert hay.batch["cu_seqlens"] == [0, hay.length]


def test_a_sequence_too_short_for_a_needle_is_refused_before_training(pool, tmp_path):
    for outcome in pool(2).outcomes(_train, tmp_path, "short", "logging.needle=true", "data=bytes", "train.seqlen=64"):
        assert isinstance(outcome.error, DataError)
        assert "need more than train.seqlen=64 tokens" in str(outcome.error)
    assert not (tmp_path / "short" / "checkpoints").exists()


def test_any_ranks_find_needles_as_surely_as_one(pool, tmp_path):
    job = ("logging.needle=true", "data=bytes", "train.seqlen=500", "train.steps=3")
    found = {}
    for ranks, use in ((1, []), (2, []), (4, ["train.sequence_degree=2", "engine=zero3"])):
        pool(ranks).run(_train, tmp_path, f"needles-{ranks}", *job, *use)
        assert (tmp_path / f"needles-{ranks}" / "needles.png").read_bytes().startswith(b"\x89PNG")
        found[ranks] = json.loads((tmp_path / f"needles-{ranks}" / "results.json").read_text())["needles"]
    logs = {ranks: torch.tensor([each["probability"] for each in needles]).log() for ranks, needles in found.items()}
    assert [each["length"] for each in found[1]] == [250] * 5 + [500] * 5
    for ranks in (2, 4):
        torch.testing.assert_close(logs[ranks], logs[1], rtol=1e-3, atol=0)
