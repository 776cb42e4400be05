"""Training that is killed, or whose disk fills up, goes on from its last good checkpoint to the same losses."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))

from launcher import command, environment, launch_forked, losses

from ringflash.training.run.interruption import STOPPED

JOB = (
    "logging=quiet",
    "logging.baselines=false",
    "train.steps=12",
    "train.validation_sequences=1",
    "checkpoint.every=4",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    result = launch_forked(folder, 2, "run_dir=run", *JOB)
    assert result.returncode == 0, result.stderr
    return folder, losses(folder / "run")


def _workers(launcher):
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.parametrize(("engine", "next_ranks"), [("ddp", 2), ("zero3", 1)])
def test_a_killed_rank_ends_the_run_and_the_next_start_continues_it(whole, tmp_path, engine, next_ranks):
    folder, expected = whole
    job = ("run_dir=run", f"engine={engine}", f"data.cache_dir={folder / 'runs' / 'cache'}", *JOB)
    started = time.monotonic()
    with subprocess.Popen(
        command(2, *job), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        while not (tmp_path / "run/checkpoints/step-00000004").exists():
            assert run.poll() is None
            assert time.monotonic() < started + 200
            time.sleep(0.01)
        os.kill(_workers(run.pid)[1], signal.SIGKILL)
        assert run.wait(timeout=60) != 0  # its peer does not wait for ever
    assert len(losses(tmp_path / "run")) < 12
    result = launch_forked(tmp_path, next_ranks, *job)
    assert result.returncode == 0, result.stderr
    curve = losses(tmp_path / "run")
    assert curve == pytest.approx(expected, rel=1e-4)


def _start_and_signal(folder, ranks, job, target, number):
    """Signal a process of a run in its first steps; returns the exit status and the output."""
    log = folder / "run" / "metrics.jsonl"
    started = time.monotonic()
    with subprocess.Popen(
        command(ranks, "run_dir=run", *job),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        while not (log.exists() and log.read_text()):
            assert run.poll() is None
            assert time.monotonic() < started + 200
            time.sleep(0.01)
        os.kill(target(run.pid), number)
        output, _ = run.communicate(timeout=60)
    return run.returncode, output


LONG = (*JOB, "checkpoint.every=0", "train.steps=40")


@pytest.fixture(scope="module")
def uninterrupted(whole, tmp_path_factory):
    """Losses of the long run on so many ranks."""
    cache = f"data.cache_dir={whole[0] / 'runs' / 'cache'}"

    @functools.cache
    def of(ranks):
        folder = tmp_path_factory.mktemp("uninterrupted")
        result = launch_forked(folder, ranks, "run_dir=run", cache, *LONG)
        assert result.returncode == 0, result.stderr
        return losses(folder / "run")

    return of


@pytest.mark.parametrize(
    ("ranks", "target", "number"),
    [
        (2, lambda launcher: launcher, signal.SIGTERM),
        (2, lambda launcher: _workers(launcher)[1], signal.SIGINT),
        (None, lambda process: process, signal.SIGTERM),
    ],
    ids=["torchrun", "one_rank", "without_torchrun"],
)
def test_a_run_that_is_signalled_to_stop_saves_its_step_and_the_next_start_continues_it(
    whole, uninterrupted, tmp_path, ranks, target, number
):
    folder, _ = whole
    job = (f"data.cache_dir={folder / 'runs' / 'cache'}", *LONG)
    status, output = _start_and_signal(tmp_path, ranks, job, target, number)
    done = len(losses(tmp_path / "run"))
    assert done < 40
    assert f"stopped by a signal: saved run/checkpoints/step-{done:08}; run_dir=run goes on from there" in output
    for rank in range(ranks or 1):
        said = f"rank {rank}: stopped by a signal after step {done} of 40; it is saved; exit status {STOPPED}"
        assert said in output
    assert status == (STOPPED if ranks is None else 1)  # torchrun's own status
    result = launch_forked(tmp_path, ranks, "run_dir=run", *job)
    assert result.returncode == 0, result.stderr
    assert f"at step {done}" in result.stdout
    assert losses(tmp_path / "run") == uninterrupted(ranks)


def test_a_disk_that_fills_up_costs_checkpoints_but_not_the_run(whole, tmp_path):
    folder, expected = whole
    # The limit lets the first checkpoint's files through only in part; the run learns on and fails at its end.
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 200; exec "$@"', "bash"]
    job = ("run_dir=run", f"data.cache_dir={folder / 'runs' / 'cache'}", *JOB)
    result = subprocess.run(
        [*limited, *command(2, *job)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode != 0
    assert result.stdout.count("not saved: [Errno 27] File too large") == 2
    assert "training goes on" in result.stdout
    assert "CheckpointError" in result.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name.startswith("step-")]
