"""launch/slurm.sh: two hosts that meet, a signal of the scheduler, and the same losses once it is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launcher import CHECKOUT, environment, losses
from test_loop import _train

JOB = ["experiment=smoke", "logging=quiet", "logging.baselines=false", "train.validation_sequences=2"]

# Two hosts on this machine: srun starts the command on each, and hands signals on.
SRUN = """#!/bin/bash
shift
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
wait $first; status=$?
while kill -0 $first 2>/dev/null; do wait $first; status=$?; done
while kill -0 $second 2>/dev/null; do wait $second; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo localhost; else echo "$@" >> "$SLURM_SUBMIT_DIR/requeued"; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """What Slurm gives a job's script."""
    (tmp_path / "bin").mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launch").symlink_to(CHECKOUT / "launch")
    return environment() | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "host[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "PROCESSES_PER_HOST": "1",
    }


def _start(cluster, *arguments):
    command = ["bash", str(CHECKOUT / "launch" / "slurm.sh"), *JOB, *arguments]
    return subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_for(path: Path, lines: int, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_that_is_preempted_saves_is_queued_again_and_ends_with_the_same_losses(pool, cluster, tmp_path):
    length = ("run_dir=run", "train.steps=40")
    first = _start(cluster, *length)
    _wait_for(tmp_path / "run" / "metrics.jsonl", 3, first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "stopped by a signal" in said
    assert (tmp_path / "requeued").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    stopped = max(losses(tmp_path / "run"))
    assert 3 <= stopped < 40
    second = _start(cluster, *length)
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert f"at step {stopped}" in said
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
    whole = pool(2).run(_train, tmp_path, "whole", "train.steps=40")[0]
    assert losses(tmp_path / "run") == pytest.approx(whole, rel=2e-4)


def test_a_job_whose_run_could_not_go_on_is_not_started(cluster):
    job = _start(cluster)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert said.startswith("give run_dir=FOLDER")
