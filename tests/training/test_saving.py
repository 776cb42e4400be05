"""Checkpoints that are written while training goes on, or never, or of weights alone."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import recipe
import torch
import torch.distributed as dist
from test_loop import _train

from ringflash.errors import ArgumentError, CheckpointError, RingflashError, RunStoppedError
from ringflash.export import export
from ringflash.training.checkpoint import host_copy, meeting, writing
from ringflash.training.checkpoint.files import newest
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.engines.base import Piece
from ringflash.training.memory import slabs
from ringflash.training.run import loop

SMALL = ("data.max_bytes=60000", "train.validation_sequences=1")
EACH_SECOND = (*SMALL, "checkpoint.every=2", "checkpoint.keep=9")


def _names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def curve(pool, folder):
    """Losses of a run that waits for its checkpoints."""
    return pool(2).run(_train, folder, "waiting", *EACH_SECOND, "checkpoint.background=false")[0]


@contextlib.contextmanager
def _steps_and_writes(write, rank=1):
    """Count steps, and have one rank's files begin by `write(steps done so far)`."""
    done, step, begin = [0], loop.Trainer.train_step, writing.HashedFile.__init__

    def counted(trainer, stop):
        done[0] += 1
        return step(trainer, stop)

    def noted(file, path):
        if dist.get_rank() == rank:
            write(done, path)
        begin(file, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", counted)
        patch.setattr(writing.HashedFile, "__init__", noted)
        yield


def _wait_for_a_step(done, path):
    """Until training is two steps behind the checkpoint's."""
    if "step-00000002" in str(path):
        deadline = time.monotonic() + 5
        while done[0] < 4:
            if time.monotonic() > deadline:
                raise OSError("training waits")
            time.sleep(0.01)


def _train_and_write(folder, run, *overrides):
    with _steps_and_writes(_wait_for_a_step), contextlib.redirect_stdout(io.StringIO()) as said:
        curve = _train(folder, run, *EACH_SECOND, *overrides)
    return curve, said.getvalue()


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_training_goes_on_while_what_it_was_is_written(pool, folder, curve, engine):
    overrides = (f"engine={engine}",)
    found, said = pool(2).run(_train_and_write, folder, f"beside-{engine}", *overrides)[0]
    assert found == pytest.approx(curve, rel=2e-4)
    assert "training waits" not in said
    names = ["latest", "step-00000002", "step-00000004", "step-00000006"]
    assert _names(folder / f"beside-{engine}") == names
    pool(2).run(_train, folder, f"waiting-{engine}", *EACH_SECOND, "checkpoint.background=false", *overrides)
    for name in names[1:]:
        first, second = (
            recipe.stored(folder / f"{how}-{engine}" / "checkpoints" / name) for how in ("beside", "waiting")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_without_background_training_waits(pool, folder, curve):
    found, said = pool(2).run(_train_and_write, folder, "waits", "checkpoint.background=false")[0]
    assert found == curve
    assert "step-00000002: not saved: training waits; there is no earlier one; training goes on" in said
    assert _names(folder / "waits") == ["latest", "step-00000004", "step-00000006"]


def _train_without_room(folder, run):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(host_copy, "available_bytes", lambda: 1 << 29 if dist.get_rank() else 1 << 40)
        _train(folder, run, *EACH_SECOND)
    return said.getvalue()


def test_where_host_memory_has_no_room_that_is_said_and_training_waits(pool, folder, curve):
    said = pool(2).run(_train_without_room, folder, "without-room")[0]
    assert said.count("WARNING: host memory has no room for a copy of ") == 1
    assert _names(folder / "without-room") == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def _die(done, path):
    if "step-00000004" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)


def _train_until_killed(folder, run):
    with _steps_and_writes(_die):
        _train(folder, run, *EACH_SECOND, "timeout=5")


def test_a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint(pool, folder, curve):
    first, second = pool(2).outcomes(_train_until_killed, folder, "killed", timeout=60)
    assert first.error is not None
    assert "died with exit code -9" in str(second.error)
    assert newest(folder / "killed" / "checkpoints").name == "step-00000002"
    found = pool(2).run(_train, folder, "killed", *EACH_SECOND)[0]
    assert found == pytest.approx(curve, rel=1e-6)
    assert _names(folder / "killed") == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def _begin_and_raise(folder):
    tensor, start = torch.ones(1200), 600 * dist.get_rank()
    with Saver(folder, torch.device("cpu"), 1) as saver:
        saver.reserve(2400)
        saver.begin(1, [Piece("weight/x", start, 600, lambda: tensor[start:][:600])], {"weight/x": (1200,)}, {})
        raise KeyError(dist.get_rank())


def _raise_while_writing(folder):
    """An error that other ranks may not have; the disk takes a minute for what is being written."""
    write = writing.HashedFile.write

    def slowly(file, data):
        time.sleep(0.2)
        write(file, data)

    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BLOCK", 8)
        patch.setattr(writing.HashedFile, "write", slowly)
        with pytest.raises(KeyError):
            _begin_and_raise(folder)
    return time.monotonic() - began, [thread.name for thread in threading.enumerate()].count("checkpoint")


def test_an_error_of_training_ends_the_writing_too(pool, tmp_path):
    for took, threads in pool(2).run(_raise_while_writing, tmp_path):
        assert took < 20
        assert threads == 0
    assert newest(tmp_path) is None


def _fail(done, path):
    if "step-00000002" in str(path):
        raise OSError(28, os.strerror(28))


def _train_and_fail(folder, run):
    with _steps_and_writes(_fail), contextlib.redirect_stdout(io.StringIO()) as said:
        curve = _train(folder, run, *EACH_SECOND)
    return curve, said.getvalue()


def test_a_full_disk_of_one_rank_beside_training_costs_that_checkpoint_and_is_said(pool, folder, curve):
    (found, said), _ = pool(2).run(_train_and_fail, folder, "full")
    assert found == curve
    assert said.count("step-00000002: not saved: [Errno 28] No space left on device; there is no earlier one") == 1
    assert _names(folder / "full") == ["latest", "step-00000004", "step-00000006"]


def _signalled_while_writing(folder, run):
    """SIGTERM in step 3, while that of step 2 is written and would take long."""
    reached = threading.Event()

    def slow(done, path):
        if "step-00000002" in str(path):
            reached.set()

    write = writing.HashedFile.write

    def slowly(file, data):
        if reached.is_set() and dist.get_rank() == 1 and threading.current_thread().name == "checkpoint":
            time.sleep(0.5)
        write(file, data)

    step = loop.Trainer.train_step

    def signalled(trainer, stop):
        if trainer.step == 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", signalled)
        patch.setattr(writing.HashedFile, "write", slowly)
        with _steps_and_writes(slow), pytest.raises(RunStoppedError):
            _train(folder, run, *EACH_SECOND)


def test_a_signal_saves_the_latest_step_and_gives_up_what_is_still_being_written(pool, folder, curve):
    pool(2).run(_signalled_while_writing, folder, "signalled")
    assert _names(folder / "signalled") == ["latest", "step-00000003"]
    assert pool(2).run(_train, folder, "signalled", *EACH_SECOND)[0] == curve


def test_never_leaves_no_checkpoint(pool, folder, curve):
    assert pool(2).run(_train, folder, "never", *SMALL, "checkpoint.every=never")[0] == curve
    assert not (folder / "never" / "checkpoints").exists()
    assert (folder / "never" / "results.json").exists()


def _signalled(folder, run, *overrides):
    step = loop.Trainer.train_step

    def signalled(trainer, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", signalled)
        with pytest.raises(RingflashError) as stopped:
            _train(folder, run, *SMALL, *overrides)
    assert not isinstance(stopped.value, RunStoppedError)  # whose status asks for another start
    return str(stopped.value)


def test_what_a_signal_stops_without_a_checkpoint_to_go_on_from_says_so(pool, folder):
    for said in pool(2).run(_signalled, folder, "stopped", "checkpoint.every=never"):
        assert said == "stopped by a signal after step 1 of 6; checkpoint.every=never: it is not saved"
    path = folder / "weights-stopped" / "checkpoints" / "step-00000001"
    for said in pool(2).run(_signalled, folder, "weights-stopped", "checkpoint.only_weights=true"):
        assert f"{path} holds its weights alone, which checkpoint.weights starts anew from" in said
    assert Checkpoint(path).only_weights


def test_weights_alone_start_a_new_run_and_an_export_but_no_run_goes_on_from_them(pool, folder, curve, tmp_path):
    run = folder / "weights"
    assert pool(2).run(_train, folder, "weights", *EACH_SECOND, "checkpoint.only_weights=true")[0] == curve
    path = run / "checkpoints" / "step-00000004"
    assert not list(path.glob("optimizer*"))
    found, expected = recipe.stored(path), recipe.stored(folder / "waiting" / "checkpoints" / path.name)
    assert found.keys() == {name for name in expected if name.startswith("weight/")}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for resume in ("auto", "last_good", str(path)):
        run_dir = "weights" if resume != str(path) else "weights-on"
        for outcome in pool(2).outcomes(
            _train, folder, run_dir, *SMALL, f"checkpoint.resume={resume}", "train.steps=8"
        ):
            assert isinstance(outcome.error, CheckpointError)
            assert "holds weights alone (checkpoint.only_weights=true), from which no run goes on" in str(outcome.error)
    starts = [f"checkpoint.weights={folder / name / 'checkpoints' / path.name}" for name in ("weights", "waiting")]
    first, second = (pool(2).run(_train, folder, f"from{i}", *SMALL, x)[0] for i, x in enumerate(starts))
    assert first == second
    assert export(path, tmp_path / "out") < 1e-5


def _train_elsewhere(folder, *overrides):
    mine = folder / f"host{dist.get_rank()}"
    mine.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(mine)
    try:
        with contextlib.suppress(FileNotFoundError if dist.get_rank() else ()):  # its folder has no log
            _train(Path(), "run", *SMALL, *overrides)
    finally:
        os.chdir(before)


def _save_elsewhere(folder):
    tensor = torch.ones(4)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    mine = Piece("weight/x", half.start, 2, lambda: tensor[half])
    with pytest.raises(CheckpointError) as caught:
        Saver(folder / f"host{dist.get_rank()}", torch.device("cpu"), 1).save(1, [mine], {"weight/x": (4,)}, {})
    return str(caught.value)


def test_a_folder_that_ranks_do_not_share_is_refused_before_training_unless_nothing_is_saved(pool, tmp_path):
    for outcome in pool(2).outcomes(_train_elsewhere, tmp_path):
        assert isinstance(outcome.error, ArgumentError)
        assert "run_dir=run: rank 1 does not see what rank 0 writes there" in str(outcome.error)
    for said in pool(2).run(_save_elsewhere, tmp_path):
        assert "on rank 1; run_dir has to be a folder that all ranks see" in said
    pool(2).run(_train_elsewhere, tmp_path, "checkpoint.every=never")


def test_every_rank_hears_what_rank_0_makes_of_what_all_say(pool):
    found = pool(3).run(_meet, "together")
    assert found == [["0", "1", "2"]] * 3


def _meet(name):
    return meeting.Meeting(name, lambda: False).hold(str(dist.get_rank()), lambda said: said)


def _meet_without(absent):
    """Nobody comes, and after a while nobody waits any more."""
    if dist.get_rank() == absent:
        return "absent"
    until = time.monotonic() + 0.3
    return meeting.Meeting(f"without-{absent}", lambda: time.monotonic() > until).hold("here", lambda said: said)


def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_wanted(pool):
    assert pool(2).run(_meet_without, 1) == [["here", None], "absent"]
    assert pool(2).run(_meet_without, 0) == ["absent", None]


@pytest.mark.parametrize("sizes", [[3], [70, 1, 9], [1] * 40])
def test_a_copy_on_the_host_is_what_was_copied_across_its_slabs(sizes, monkeypatch):
    monkeypatch.setattr(host_copy, "SLAB", 4 * 32)
    monkeypatch.setattr(host_copy, "from_all", lambda value: [value])
    copy = host_copy.HostCopy(torch.device("cpu"))
    whole = [torch.arange(size) + 0.5 for size in sizes]
    mine = [Piece(f"weight/{i}", 0, len(x), lambda x=x: x) for i, x in enumerate(whole)]
    assert not copy.fill(mine)
    assert copy.reserve(4 * sum(sizes))
    assert copy.fill(mine)
    expected = [bytes(memoryview(x.numpy()).cast("B")) for x in whole]
    for tensor in whole:
        tensor.zero_()
    assert [b"".join(copy.read(piece)) for piece in mine] == expected
    before = {slab.data_ptr() for slab in copy._slabs}
    monkeypatch.setattr(slabs, "host_memory", lambda *_: pytest.fail("it has as much"))
    assert copy.reserve(4 * sum(sizes))
    assert {slab.data_ptr() for slab in copy._slabs} == before
    assert not copy.reserve(1 << 60)
