"""Run `suite=sdpa` and `suite=prefill` on one GPU, then `suite=prefill` under torchrun on all GPUs of this machine.

    python docs/benchmarks/first.py runs/first
    python docs/benchmarks/first.py runs/first --sdpa tokens=256 --prefill shrink=16 tokens=64      # without GPUs

Each has a process of its own and a time limit, and writes NAME.json and NAME.png into the folder, which must be a new
one, also of what it had measured when it was cut off; what they print is in first.log. Without GPUs torchrun starts two
CPU processes. Tables are printed last; exits with 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

CHECKOUT = Path(__file__).resolve().parents[2]
BENCHMARK = CHECKOUT / "launch/benchmark.py"
GRACE = 45
"""Seconds that torchrun has to end its workers, for which it takes up to 30."""
LAST_LINES = 40


def commands(out: Path, sdpa: list[str], prefill: list[str]) -> dict[str, list[str]]:
    """By name."""
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    several = {f"prefill-{ranks}": [*torchrun, str(BENCHMARK), "suite=prefill", *prefill]} if ranks > 1 else {}
    alone = {
        "sdpa": [sys.executable, str(BENCHMARK), "suite=sdpa", *sdpa],
        "prefill-1": [sys.executable, str(BENCHMARK), "suite=prefill", *prefill],
    }
    return {name: [*command, f"out={out / name}.json"] for name, command in (alone | several).items()}


def run(name: str, command: list[str], log: Path, limit: float) -> tuple[bool, str]:
    """Whether it succeeded within `limit` seconds, and what it printed, which is added to the log."""
    print(f"{name}: {' '.join(command)}", flush=True)
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))  # what is here is measured
    with log.open("a+") as file:
        place = file.tell()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            good = process.wait(limit) == 0
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            good, ended = False, f"cut off after {limit:g} s"
            end(process)
        file.seek(place)
        printed = file.read()
    print(f"{name}: {ended}, {time.monotonic() - begin:.0f} s", flush=True)
    return good, printed


def end(process: subprocess.Popen) -> None:
    """Ask the process to end, and its workers through it; kill it if it does not."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_part(printed: str) -> str:
    """The table and what follows it; the last lines where there is none."""
    place = printed.rfind("\nwritten to ")
    return printed[place:].strip() if place >= 0 else "\n".join(printed.splitlines()[-LAST_LINES:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of figures and logs, which does not exist yet")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each")
    parser.add_argument("--sdpa", nargs="*", default=[], help="options of suite=sdpa")
    parser.add_argument("--prefill", nargs="*", default=[], help="options of suite=prefill")
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists; name a folder that does not")
    arguments.out.mkdir(parents=True)
    log = arguments.out / "first.log"
    results = {
        name: run(name, command, log, arguments.limit)
        for name, command in commands(arguments.out, arguments.sdpa, arguments.prefill).items()
    }
    for name, (good, printed) in results.items():
        print(f"\n=== {name}{'' if good else ' FAILED'}\n{last_part(printed)}")
    sys.exit(not all(good for good, _ in results.values()))


if __name__ == "__main__":
    main()
