"""What figures depend on: the device, its memory, and how time is taken on it."""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist

from ringflash.launch.doctor import memory

TURN = 30
"""Milliseconds, or one call where that takes longer."""

GIB = 1 << 30

Timer = Callable[[int], float]
"""Milliseconds of a call, as the mean of so many."""


@dataclass(frozen=True)
class Place:
    """Where this process computes."""

    device: torch.device
    rank: int = 0
    ranks: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@contextmanager
def joined() -> Generator[Place]:
    """Where this process computes; under torchrun in a process group, which ends with the block if it began with it."""
    joins = dist.is_torchelastic_launched() and not dist.is_initialized()
    if joins:
        long = timedelta(hours=1)  # others wait while rank 0 measures what one device does
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, timeout=long)
        else:
            dist.init_process_group("gloo", timeout=long)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    yield Place(device, dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Place(device)
    if joins:  # after an error, ranks may be at different places and would wait for each other
        dist.barrier()  # whoever goes while another still talks to it may abort it
        dist.destroy_process_group()


def machine() -> dict[str, object]:
    """Device, versions, commit and command."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "device": device_name(),
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None,
        "commit": commit.stdout.strip(),
        "command": " ".join(["launch/benchmark.py", *(x for x in sys.argv[1:] if not x.startswith("out="))]),
    }


def device_name() -> str:
    """Name of the GPU at hand; of a CPU, its kind and how many threads compute."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def version_of(package: str) -> str | None:
    """Of an installed package; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lack_of_memory(needed: int, device: torch.device) -> str | None:
    """Why `needed` bytes cannot be had on a device; None where they can."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
        free = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = memory()[0]
    return f"{needed / GIB:.1f} GiB are needed, and {free / GIB:.1f} GiB are free" if needed > free else None


def synchronize(device: torch.device) -> None:
    """Wait for what a device has been asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timer_of(run: Callable[[], object], device: torch.device) -> Timer:
    """By events on a GPU, by the clock on a CPU."""
    return timed_by_events(run) if device.type == "cuda" else timed_by_clock(run)


def timed_by_events(run: Callable[[], object]) -> Timer:
    """Calls follow each other behind one that does not count; what they cost the host stays out while it is less."""

    def milliseconds(calls: int) -> float:
        run()  # the device is at work while the host prepares what is measured
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    return milliseconds


def timed_by_clock(run: Callable[[], object]) -> Timer:
    """Calls that return when they are done, one after the other."""

    def milliseconds(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls * 1e3

    return milliseconds


def in_turn(timers: dict[str, Timer], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, over rounds in which they take turns in random order.

    A card under load slows down within tenths of a second, and by the more the hotter what runs. So a turn is TURN
    milliseconds to get as warm as each makes the card, and as many again that count.
    """
    calls = {}
    for name, timer in timers.items():
        timer(1)
        calls[name] = max(1, round(TURN / timer(2)))
    order, found = random.Random(0), {name: [] for name in timers}
    for _ in range(rounds):
        for name in order.sample(list(timers), len(timers)):
            timers[name](calls[name])
            found[name].append(timers[name](calls[name]))
    return {name: statistics.median(times) for name, times in found.items()}
