"""The whole loop on gloo workers: the same run however ranks are used, and its refusals."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal

import pytest
import torch
import torch.distributed as dist
from launcher import losses

from ringflash.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    RankMismatchError,
    RingflashError,
    RunStoppedError,
)
from ringflash.training.checkpoint.files import newest
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.run import loop
from ringflash.training.run import trainer as trainer_module
from ringflash.training.run.loop import train
from ringflash.training.run.throughput import Throughput


def _train(folder, run, *overrides):
    config = load(
        [
            "experiment=smoke",
            "logging=quiet",
            "logging.baselines=false",
            "train.steps=6",
            "train.validation_sequences=3",
            f"run_dir={folder / run}",
            f"data.cache_dir={folder / 'cache'}",
            *overrides,
        ]
    )
    check(config, torch.distributed.get_world_size())
    agree(config)
    train(config, torch.device("cpu"))
    return losses(folder / run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def curve(pool, folder):
    """Losses of two ranks that share each sequence."""
    return pool(2).run(_train, folder, "shared")[0]


USES = {
    "data": ["train.sequence_degree=1"],
    "larger_batches": ["train.micro_batch=2"],
    "contiguous": ["attention.partition=contiguous", "engine.memory=offload"],
    "zero1": ["train.sequence_degree=1", "engine=zero1"],
}


@pytest.mark.parametrize("use", USES)
def test_how_ranks_are_used_does_not_change_the_losses(pool, folder, curve, use):
    other = pool(2).run(_train, folder, use, *USES[use])[0]
    assert len(curve) == 6
    assert other == pytest.approx(curve, rel=2e-4)
    (bits, tokens), (expected, expected_tokens) = _validated(folder / use), _validated(folder / "shared")
    assert bits == pytest.approx(expected, rel=2e-4)
    assert tokens == expected_tokens


def _validated(run):
    """Bits per byte, and how many predictions there were for each range of context."""
    results = json.loads((run / "results.json").read_text())
    return results["bits_per_byte"], [position["tokens"] for position in results["loss_by_context"]]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_ranks_without_tokens_train_validate_save_and_go_on_as_one_device_does(pool, folder, engine):
    shape = ("train.seqlen=5", "train.global_batch=4", "train.validate_every=2", "engine.memory=offload")
    few = ("data.max_bytes=20000", "data=bytes", "train.validation_sequences=7", *shape)
    expected = pool(1).run(_train, folder, f"few-alone-{engine}", f"engine={engine}", *few)[0]
    pool(4).run(_train, folder, f"few-{engine}", f"engine={engine}", *few, "train.steps=3")
    found = pool(4).run(_train, folder, f"few-{engine}", f"engine={engine}", *few)[0]
    assert found == pytest.approx(expected, rel=2e-4)
    alone, shared = (_validated(folder / run) for run in (f"few-alone-{engine}", f"few-{engine}"))
    assert shared[0] == pytest.approx(alone[0], rel=2e-4)
    assert shared[1] == alone[1]


def test_another_seed_gives_another_run(pool, folder, curve):
    assert pool(2).run(_train, folder, "seed", "seed=1")[0] != pytest.approx(curve, rel=2e-4)


def test_one_batch_can_be_learned_by_heart(pool, folder):
    # Sequences of 64 tokens: twice as much as the model would learn of a text that changes.
    learned = pool(1).run(_train, folder, "heart", "debug=overfit", "train.steps=60", "train.seqlen=64")[0]
    assert learned[60] < 0.25 * learned[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_to_change(pool, folder):
    for outcome in pool(2).outcomes(_train, folder, "diverged", "optimizer.lr=1e30", "optimizer.clip=0"):
        assert isinstance(outcome.error, RingflashError)
        assert "optimizer.lr=1e+30" in str(outcome.error)


def test_weights_that_are_not_finite_replace_no_good_checkpoint(pool, folder):
    # Nothing is logged, and so nothing is looked at, before the end.
    job = ("optimizer.lr=1e30", "optimizer.clip=0", "logging.every=6", "checkpoint.every=1", "checkpoint.keep=1")
    for outcome in pool(1).outcomes(_train, folder, "lost", *job):
        assert isinstance(outcome.error, RingflashError)
    weights = Checkpoint(newest(folder / "lost" / "checkpoints")).read("weight/embed_tokens.weight")
    assert torch.isfinite(weights).all()


def _train_until_signalled(folder, run, rank, method, call, *overrides):
    """One rank receives SIGTERM at the beginning of a call of one of its trainer's methods."""
    before, calls = signal.getsignal(signal.SIGTERM), 0

    def interrupted(trainer, *arguments):
        nonlocal calls
        calls += 1
        if calls == call and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, *arguments)

    original = getattr(loop.Trainer, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, method, interrupted)
        with pytest.raises(RunStoppedError) as stopped:
            _train(folder, run, *overrides)
    assert signal.getsignal(signal.SIGTERM) == before
    return str(stopped.value)


@pytest.mark.parametrize(
    ("rank", "method", "call", "step", "overrides"),
    [
        (0, "train_step", 3, 3, []),
        (1, "train_step", 6, 6, []),
        (1, "validate", 1, 2, ["train.validate_every=2"]),
        (0, "validate", 1, 4, ["train.validate_every=4", "checkpoint.every=2"]),
        (1, "validate", 1, 6, []),
        (1, "begin_save", 1, 3, ["checkpoint.every=2"]),
    ],
    ids=["in_a_step", "in_the_last_step", "in_a_validation", "once_saved", "in_the_last_validation", "in_a_save"],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on_from_there(
    pool, folder, curve, rank, method, call, step, overrides
):
    run = f"signalled-{method}-{step}"
    for said in pool(2).run(_train_until_signalled, folder, run, rank, method, call, *overrides):
        assert said == f"stopped by a signal after step {step} of 6; it is saved"
    assert newest(folder / run / "checkpoints").name == f"step-{step:08}"
    assert not (folder / run / "results.json").exists()
    assert pool(2).run(_train, folder, run)[0] == curve
    assert (folder / run / "results.json").exists()


def _train_by_the_clock(folder):
    """A step takes one second of a clock that stands still otherwise, a validation or a checkpoint ten."""
    now = 0.0

    def taking(seconds, method):
        def timed(trainer, *arguments):
            nonlocal now
            now += seconds
            return method(trainer, *arguments)

        return timed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "Throughput", functools.partial(Throughput, clock=lambda: now))
        for name, seconds in (("train_step", 1), ("validate", 10), ("begin_save", 10)):
            patch.setattr(loop.Trainer, name, taking(seconds, getattr(loop.Trainer, name)))
        _train(folder, "speed", "logging.every=3", "train.validate_every=2", "checkpoint.every=4")


def test_speed_counts_training_and_neither_validations_nor_checkpoints(pool, folder):
    pool(1).run(_train_by_the_clock, folder)
    lines = [json.loads(line) for line in (folder / "speed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/tokens_per_second"] for line in lines if "train/loss" in line] == [2 * 512] * 2


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["checkpoint.resume=never"], ArgumentError, "already holds step-00000006; give another run_dir"),
        (["model.hidden_size=32"], CheckpointError, "is of another model: embed_tokens.weight"),
        (
            ["model.rope_theta=5e5"],
            CheckpointError,
            "model: rope_theta is 10000.0 there and 500000.0 here; checkpoint.w",
        ),
        (
            ["attention=sliding_window"],
            CheckpointError,
            "model: attention.mask is causal there and sliding_window here",
        ),
        (["data.max_bytes=300000"], CheckpointError, "documents"),
        (["train.seqlen=256"], CheckpointError, "seqlen=512, here it is 256"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_run_that_does_not_fit_its_checkpoint_is_refused_on_every_rank(pool, folder, curve, overrides, error, said):
    for outcome in pool(2).outcomes(_train, folder, "shared", *overrides):
        assert isinstance(outcome.error, error)
        assert said in str(outcome.error)


def _train_where_files_differ(folder, differ):
    mine = folder / f"host{dist.get_rank()}"
    (mine / "text").mkdir(parents=True, exist_ok=True)
    if differ != "absent" or dist.get_rank() == 0:
        (mine / "text" / "a.txt").write_text(f"{dist.get_rank()} ways\n" * 10_000)
    before = os.getcwd()
    os.chdir(mine)
    try:
        _train(folder, differ, "data.path=text")
    finally:
        os.chdir(before)


@pytest.mark.parametrize("differ", ["content", "absent"])
def test_ranks_that_read_different_text_are_notified(pool, tmp_path, differ):
    first, second = pool(2).outcomes(_train_where_files_differ, tmp_path, differ)
    assert isinstance(first.error, RankMismatchError)
    assert "data.path=text" in str(first.error)
    assert isinstance(second.error, RankMismatchError if differ == "content" else DataError)


def _train_and_listen(folder):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _train(folder, "listened", f"data.path={folder / 'text'}", "train.steps=1", "train.seqlen=64")
    return said.getvalue()


def test_what_of_the_data_is_passed_over_is_said(pool, tmp_path):
    (tmp_path / "text").mkdir()
    rows = [{"text": f"{number} words\n" * 200} for number in range(9)] + [{"text": None}] * 2
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text" / ".b.txt").touch()
    (said,) = pool(1).run(_train_and_listen, tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("passed over")]
    hidden, without = tmp_path / "text" / ".b.txt", tmp_path / "text" / "a.jsonl"
    assert line == (
        f"passed over: hidden files and folders (1, the first is {hidden}); rows without text (2, the first is "
        f"{without}, line 10)"
    )


def _stream_and_listen(folder):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        stream = (
            "data.streaming=true",
            f"data.validation={folder / 'text'}",
            "data.tokenizer=bytes",
            "data.max_bytes=null",
        )
        _train(folder, "streamed", f"data.path={folder / 'text'}", *stream, "train.steps=2", "train.seqlen=64")
    return said.getvalue()


def test_what_of_a_stream_is_passed_over_is_said_at_the_end(pool, tmp_path):
    (tmp_path / "text").mkdir()
    rows = [{"text": f"{number} words\n" * 9} for number in range(9)] + [{"text": None}] * 2
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (said,) = pool(1).run(_stream_and_listen, tmp_path)
    saved = said.index("saved ")
    assert "passed over: rows without text (2, the first is" in said[:saved]  # of what it is validated on
    assert "passed over: rows without text (" in said[saved:]


def test_a_run_folder_that_cannot_be_made_is_refused_on_every_rank(pool, tmp_path):
    (tmp_path / "file").touch()
    for outcome in pool(2).outcomes(_train, tmp_path, "file/run"):
        assert isinstance(outcome.error, ArgumentError)
        assert "cannot write there" in str(outcome.error)


def test_a_text_shorter_than_a_sequence_is_refused(pool, folder):
    for outcome in pool(2).outcomes(_train, folder, "short", "train.seqlen=10000000"):
        assert "train.seqlen=10000000" in str(outcome.error)
