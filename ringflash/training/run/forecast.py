"""What a run is to take of its GPUs, and of time, said as it begins and beside what it then took."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist

from ringflash.training.estimate.hardware import GIB, Card, Hardware, card_of
from ringflash.training.estimate.sizes import Load
from ringflash.training.estimate.step import BLOCKS, Estimate
from ringflash.training.memory.host import available_bytes
from ringflash.training.ranks import from_all
from ringflash.training.run.throughput import Speed


def hardware_of_all(device: torch.device) -> Hardware | None:
    """What every rank has at least, so that all estimate the same; a collective. None on CPUs."""
    if device.type != "cuda":
        return None
    card = card_of(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory, peaks, host, together = zip(*from_all((card.memory, card.peak, available_bytes(), here)), strict=True)
    peak = peaks[0] if len(set(peaks)) == 1 else math.nan
    return Hardware(dist.get_world_size(), Card(min(memory), peak), min(host), max(together))


def load_of_all(shard: dict[str, Any], micro_batches: int) -> Load:
    """What a batch asks of all ranks; a collective.

    Args:
        shard: this rank's part of a micro-batch.
        micro_batches: of a step; the others are taken to be like this one.
    """
    sharding = shard["sharding"]
    tokens, pairs = zip(*from_all((sharding.batch * sharding.max_tokens, sharding.pairs)), strict=True)
    return Load(max(tokens), sum(pairs) * micro_batches)


def estimated(found: Estimate) -> str:
    """A line about what a step is to take."""
    return f"estimated: {_line(found.peak, found.host[BLOCKS], found.seconds, found.tokens_per_second, found.mfu)}"


def measured(speed: Speed, host: float, expected: Estimate | None) -> str:
    """A line about what steps took, and how far off was what had been said.

    Args:
        speed: of steps on GPUs.
        host: bytes of its host that a rank has moved blocks to.
        expected: what had been said, if anything was.
    """
    assert speed.memory is not None
    mfu = math.nan if speed.mfu is None else speed.mfu
    line = f"measured: {_line(speed.memory, host, speed.seconds, speed.each, mfu)}"
    if expected is None:
        return line
    ratios = {"memory": speed.memory / expected.peak, "time": speed.seconds / expected.seconds}
    off = ", ".join(f"{name} {ratio - 1:+.0%}" for name, ratio in ratios.items() if not math.isnan(ratio))
    return f"{line}; beside the estimate {off}"


def _line(memory: float, host: float, seconds: float, tokens_per_second: float, mfu: float) -> str:
    parts = [f"{memory / GIB:.1f} GiB of each GPU", f"{host / GIB:.1f} GiB of blocks moved to the host"]
    if not math.isnan(seconds):
        parts.append(f"{seconds:.2f} s a step, {tokens_per_second:,.0f} tokens/s/GPU")
    if not math.isnan(mfu):
        parts.append(f"MFU {mfu:.1%}")
    return ", ".join(parts)
