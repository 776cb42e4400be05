"""Starting launch/train.py as a user does, in processes of its own, on a small text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from forks import alone, run_script

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
    """`launch` where nothing depends on torchrun: seconds less of each rank."""
    _, script, *words = command(None, *overrides)
    return run_script(script, *words, folder=folder, ranks=ranks, timeout=timeout)


def environment():
    """One thread each, and nothing of a surrounding torchrun."""
    return alone(dict(os.environ))


def losses(run):
    """{step: training loss} of a run's log, later entries over earlier ones."""
    entries = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}
