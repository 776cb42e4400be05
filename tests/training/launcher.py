"""Starting launch/train.py as a user does, in processes of its own, on a small text."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

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


def launch_forked(folder, *overrides, timeout=60):
    """`launch` of one process that need not import torch: seconds less."""
    words = command(None, *overrides)
    process = server().Process(target=_run_forked, args=(folder, words[1:]))
    process.start()
    process.join(timeout)
    out, error = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, process.exitcode, out, error)


def _run_forked(folder, words):
    os.chdir(folder)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment())
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def environment():
    """One thread each, and nothing of a surrounding torchrun."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(run):
    """{step: training loss} of a run's log, later entries over earlier ones."""
    entries = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
