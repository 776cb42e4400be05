"""Starting from another run's weights, with other data, length, RoPE and seed; damaged checkpoints are stepped over."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import pytest
import torch
from test_loop import _train

from ringflash.errors import ArgumentError, CheckpointError
from ringflash.training.checkpoint.files import OPTIMIZER, WEIGHTS, file_of, newest
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.run.origin import _settings

OTHER = ["data.max_bytes=70000", "train.seqlen=1024", "seed=7", "model.rope_scaling.factor=4", "train.steps=3"]


@pytest.fixture(scope="module")
def folder(pool, tmp_path_factory):
    """A run of 12 steps, with checkpoints of each third."""
    folder = tmp_path_factory.mktemp("continuing")
    pool(2).run(_train, folder, "first", "train.steps=12", "checkpoint.every=4", "checkpoint.keep=3")
    return folder


def _weights(run):
    checkpoint = Checkpoint(newest(run / "checkpoints"))
    return {name: checkpoint.read(f"weight/{name}") for name in ("embed_tokens.weight", "layers.1.mlp.up_proj.weight")}


@pytest.mark.parametrize(
    ("engine", "scaling"), [("ddp", "linear"), ("fsdp2", "ntk"), ("zero2", "yarn"), ("zero3", "llama3")]
)
def test_a_run_starts_from_anothers_weights_with_other_data_length_rope_and_seed(pool, folder, engine, scaling):
    other = [*OTHER, f"engine={engine}", f"model.rope_scaling.rope_type={scaling}", "model.rope_theta=2e4"]
    pool(2).run(
        _train, folder, f"still-{engine}", f"checkpoint.weights={folder / 'first'}", "optimizer.lr=1e-30", *other
    )
    for name, weight in _weights(folder / f"still-{engine}").items():
        assert torch.equal(weight, _weights(folder / "first")[name]), name
    fresh = pool(2).run(_train, folder, f"fresh-{engine}", *other, "data.vocab_size=511")[0]
    found = pool(2).run(_train, folder, f"then-{engine}", f"checkpoint.weights={folder / 'first'}", *other)[0]
    assert sorted(found) == [1, 2, 3]
    assert found[1] < fresh[1] - 0.3  # it knows already what the first run has learned
    tokenizers = [(folder / run / "tokenizer" / "tokenizer.json").read_text() for run in ("first", f"then-{engine}")]
    assert tokenizers[0] == tokenizers[1]


def test_what_an_earlier_version_said_of_a_model_that_is_the_same_does_not_differ():
    now = dataclasses.asdict(load().model)
    known = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    before = now | {"rope_scaling": {key: now["rope_scaling"][key] for key in known}}
    assert _settings(before) == _settings(now)
    assert _settings(before) != _settings(now | {"rope_scaling": now["rope_scaling"] | {"rope_type": "yarn"}})


def test_such_a_run_goes_on_from_its_own_checkpoints_and_weights_may_be_any_checkpoint(pool, folder):
    step = folder / "first" / "checkpoints" / "step-00000004"
    start = f"checkpoint.weights={step}"
    whole = pool(2).run(_train, folder, "whole", start, *OTHER, "checkpoint.every=2")[0]
    first = pool(2).run(_train, folder, "whole", start, *OTHER)[0]  # all done: nothing is trained anew
    assert first == whole
    middle = f"checkpoint.resume={folder / 'whole' / 'checkpoints' / 'step-00000002'}"
    rest = pool(2).run(_train, folder, "rest", start, middle, *OTHER)[0]
    assert rest == {3: whole[3]}


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["model.hidden_size=32"], CheckpointError, "is of another model: embed_tokens.weight"),
        (["data.tokenizer=bpe", "data.vocab_size=511"], CheckpointError, "was trained with other tokens; leave data."),
        (["data.tokenizer=bytes", "model.vocab_size=512"], CheckpointError, "was trained with other tokens"),
    ],
)
def test_weights_of_another_model_or_other_tokens_are_refused_on_every_rank(pool, folder, overrides, error, said):
    start = f"checkpoint.weights={folder / 'first'}"
    for outcome in pool(2).outcomes(_train, folder, "refused", start, *OTHER, *overrides):
        assert isinstance(outcome.error, error)
        assert said in str(outcome.error)


def test_what_holds_no_weights_is_refused_by_name(tmp_path):
    for path, state in (("nowhere", "no such folder"), (tmp_path, "no complete checkpoint in it, nor is it one")):
        with pytest.raises(ArgumentError) as refused:
            check(load([f"checkpoint.weights={path}"]), 1)
        assert f"checkpoint.weights={path}: {state}" in str(refused.value)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(ArgumentError, match=r"lies in no run with a tokenizer; give that of its run as data\.token"):
        check(load([f"checkpoint.weights={tmp_path}"]), 1)


def _damage(checkpoint):
    with open(checkpoint / file_of(OPTIMIZER, 0), "r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")


def _train_aloud(folder, run, *overrides):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        curve = _train(folder, run, *overrides)
    return curve, said.getvalue()


def test_damaged_checkpoints_are_stepped_over_and_set_aside_in_the_same_run_directory(pool, folder):
    job = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=3")
    expected = pool(2).run(_train, folder, "damaged", *job)[0]
    there = folder / "damaged" / "checkpoints"
    whole = {step: (there / f"step-0000000{step}" / file_of(WEIGHTS, 1)).read_bytes() for step in (4, 6)}
    for step in (4, 6):
        _damage(there / f"step-0000000{step}")
    for outcome in pool(2).outcomes(_train, folder, "damaged", *job):
        assert isinstance(outcome.error, CheckpointError)
        assert str(outcome.error).endswith("checkpoint.resume=last_good goes on from the one before it")
    (curve, said), _ = pool(2).run(_train_aloud, folder, "damaged", "checkpoint.resume=last_good", *job)
    assert curve == expected
    assert said.count("set aside: ") == 2
    names = [f"step-0000000{step}" for step in (2, 4, 6)]
    assert sorted(path.name for path in there.glob("step-*")) == sorted([*names, *(f"{n}.damaged" for n in names[1:])])
    for step, data in whole.items():
        assert (there / f"step-0000000{step}" / file_of(WEIGHTS, 1)).read_bytes() == data
    lines = [json.loads(line) for line in (folder / "damaged" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6]


def test_where_all_are_damaged_nothing_starts_anew_and_where_none_is_there_a_run_begins(pool, folder):
    pool(2).run(_train, folder, "all", "train.steps=1", "checkpoint.resume=last_good")
    _damage(folder / "all" / "checkpoints" / "step-00000001")
    for outcome in pool(2).outcomes(_train, folder, "all", "train.steps=1", "checkpoint.resume=last_good"):
        assert isinstance(outcome.error, CheckpointError)
        assert "holds no checkpoint that is not damaged: " in str(outcome.error)
        assert f"{file_of(OPTIMIZER, 0)} is damaged" in str(outcome.error)
