"""Training that is killed, or whose disk fills up, goes on from its last good checkpoint to the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "training"))

from launcher import command, environment, launch, losses

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
    result = launch(folder, 2, "run_dir=run", *JOB)
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
    result = launch(tmp_path, next_ranks, *job)
    assert result.returncode == 0, result.stderr
    curve = losses(tmp_path / "run")
    assert curve == pytest.approx(expected, rel=1e-4)


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
