"""What a run is to take of its GPUs, and of time, said as it begins and beside what it then took."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from ringflash.configs.schema import Config
from ringflash.training.config.derived import compute_dtype
from ringflash.training.estimate.fitting import (
    refuse_weights_that_cannot_fit,
    refuse_what_cannot_fit,
    remedies,
    shares,
)
from ringflash.training.estimate.hardware import GIB, Card, Hardware, card_of
from ringflash.training.estimate.lasting import weights_of
from ringflash.training.estimate.sizes import Load
from ringflash.training.estimate.step import BLOCKS, Estimate, estimate, in_seconds, unknown
from ringflash.training.memory.available import available_bytes, local_ranks
from ringflash.training.model.decoder import Decoder
from ringflash.training.ranks import from_all
from ringflash.training.run.loader import ShardedBatches
from ringflash.training.run.throughput import Speed


class Forecast:
    """What is expected of a run on GPUs; of one on CPUs, nothing.

    Everything in here is a collective, but for what gives a line.

    Args:
        config: of the run.
        device: this rank's.

    Raises:
        ArgumentError: a step of the recipe's own model surely takes more memory than the GPUs have.

    Of a model of a folder that is found out once the model is there.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        precision = "bf16" if compute_dtype(config) == torch.bfloat16 else "fp32"
        self._config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
        self._hardware = hardware_of_all(device)
        self._found: Estimate | None = None
        self._unknown: str | None = None
        self._vocab_size = 1  # at least, of a tokenizer that is not read yet
        if self._hardware is not None and self._config.model.path is None:
            refuse_what_cannot_fit(self._config, self._hardware, self._vocab_size)

    @property
    def peak(self) -> float:
        """Operations a second that each GPU could do; nan where nobody knows."""
        return math.nan if self._hardware is None else self._hardware.card.peak

    def see_model(self, model: Decoder) -> None:
        """There is the model, on the meta device.

        Raises:
            ArgumentError: its weights, gradients and optimizer alone take more memory than the GPUs have, or a step of
                a model of a folder surely does.
        """
        if self._hardware is None:
            return
        refuse_weights_that_cannot_fit(self._config, self._hardware, weights_of(model))
        self._unknown = unknown(self._config, self._hardware.gpus)
        if self._config.model.path is not None and self._unknown is None:
            refuse_what_cannot_fit(self._config, self._hardware)

    def see_batches(self, batches: ShardedBatches, micro_batches: int, vocab_size: int) -> None:
        """There are the batches, of which the first is looked at.

        Args:
            batches: of this rank.
            micro_batches: of a step.
            vocab_size: of the tokenizer.
        """
        if self._hardware is not None and self._unknown is None:
            self._vocab_size = vocab_size
            load = load_of_all(batches.peek(), micro_batches)
            self._found = estimate(self._config, self._hardware, vocab_size, load)

    def lines(self) -> list[str]:
        """What is expected, with a warning where it may not fit."""
        if self._unknown is not None:
            return [f"not estimated: {self._unknown}"]
        if self._found is None or self._hardware is None:
            return []
        found, lines = self._found, [estimated(self._found)]
        if not found.fits:
            cures = remedies(self._config, self._hardware, self._vocab_size)
            less = f"; what is estimated to fit: {'; or '.join(cures)}" if cures else ""
            takes = f"of each GPU {shares(found.device)} GiB, of the host for each {shares(found.host) or 'no'} GiB"
            lines.append(f"WARNING: it may not fit ({takes}){less}")
        return lines

    def beside(self, speed: Speed, moved: int) -> str:
        """What steps on GPUs took, beside what was expected of them.

        Args:
            speed: of the steps.
            moved: bytes of its host that a rank has moved blocks to.
        """
        return measured(speed, moved, self._found)


def hardware_of_all(device: torch.device) -> Hardware | None:
    """What every rank has at least, so that all estimate the same; a collective. None on CPUs."""
    if device.type != "cuda":
        return None
    card = card_of(device)
    found = card.memory, card.peak, available_bytes(), local_ranks()
    memory, peaks, host, together = zip(*from_all(found), strict=True)
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
        parts.append(f"{in_seconds(seconds)} a step, {tokens_per_second:,.0f} tokens/s/GPU")
    if not math.isnan(mfu):
        parts.append(f"MFU {mfu:.1%}")
    return ", ".join(parts)
