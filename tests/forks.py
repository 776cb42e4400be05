"""Scripts as forks of a process that has imported torch: each rank starts in tenths of a second, not in seconds.

They run as `python script` or, on several ranks, as torchrun's processes do. What torchrun does itself is not there.
"""

from __future__ import annotations

import gc
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pool import server


def run_script(
    script: Path, *words: str, folder: Path, ranks: int | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess:
    """Run a script to its end with `folder` as working directory; ranks=None is one process that knows of no rank.

    The output is that of rank 0, then that of rank 1, and so on. No rank sees a GPU.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [str(script), *words]
    with tempfile.TemporaryDirectory() as said:
        started = [
            server().Process(target=_run, args=(command, folder, said, rank, ranks, port)) for rank in range(ranks or 1)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        status = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        out, error = ("".join(path.read_text() for path in sorted(Path(said).glob(f"{x}*"))) for x in ("out", "error"))
    if None in status:
        raise subprocess.TimeoutExpired(command, timeout, out, error)
    return subprocess.CompletedProcess(command, max(status, key=abs), out, error)


def alone(environment: dict[str, str]) -> dict[str, str]:
    """An environment with one thread, no GPU, and nothing of a surrounding torchrun."""
    kept = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(command: list[str], folder: Path, said: str, rank: int, ranks: int | None, port: int) -> None:
    gc.freeze()
    os.environ.update(alone(dict(os.environ)))
    if ranks is not None:
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_PORT": port,
        }
        where = {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "none"}
        os.environ.update(where | {name: str(number) for name, number in numbers.items()})
    for name, descriptor in (("out", 1), ("error", 2)):
        os.dup2(os.open(Path(said, f"{name}{rank}"), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    torch.set_num_threads(1)
    runpy.run_path(command[0], run_name="__main__")
