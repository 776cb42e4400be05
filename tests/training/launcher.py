"""Starting launch/train.py as a user does, in processes of its own, on a small text."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from pool import server

CHECKOUT = Path(__file__).parents[2]


def command(ranks, *overrides, experiment="smoke"):
    """The command line; ranks=None starts one process without torchrun."""
    start = [sys.executable]
    if ranks is not None:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*start, str(CHECKOUT / "launch" / "train.py"), f"experiment={experiment}", *overrides]


def launch(folder, ranks, *overrides, experiment="smoke", timeout=240):
    """Run to the end with `folder` as working directory."""
    arguments = command(ranks, *overrides, experiment=experiment)
    return subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)


def launch_forked(folder, ranks, *overrides, timeout=240):
    """`launch` where nothing depends on torchrun: ranks that need not import torch, which saves seconds of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = command(None, *overrides)
    started = [
        server().Process(target=_run_forked, args=(folder, words[1:], i, ranks, port)) for i in range(ranks or 1)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(deadline - time.monotonic())
    status = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert None not in status, f"still running after {timeout} s: {status}"
    out, error = ("".join(_said(folder, name, i).read_text() for i in range(ranks or 1)) for name in ("out", "error"))
    return subprocess.CompletedProcess(words, max(status, key=abs), out, error)


def _said(folder, name, rank):
    return Path(folder).with_name(f"{Path(folder).name}-{name}-{rank}")


def _run_forked(folder, words, rank, ranks, port):
    os.environ.clear()
    os.environ.update(environment())
    if ranks is not None:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
    for name, descriptor in (("out", 1), ("error", 2)):
        os.dup2(os.open(_said(folder, name, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(folder)
    sys.argv = words
    torch.set_num_threads(1)
    runpy.run_path(words[0], run_name="__main__")


def environment():
    """One thread each, and nothing of a surrounding torchrun."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run):
    """{step: training loss} of a run's log, later entries over earlier ones."""
    entries = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
