"""A run that surely cannot fit is refused before anything is started, with the keys that would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError
from ringflash.training.config.derived import sequence_degree
from ringflash.training.estimate.hardware import GIB, Hardware
from ringflash.training.estimate.step import Estimate, estimate, longest
from ringflash.training.memory.plan import AUTO

MOST_GPUS = 1024
"""GPUs up to which a number is looked for."""

Change = tuple[str, str, Any]
"""Part of the configuration, key in it, and its value."""


def refuse_what_cannot_fit(config: Config, hardware: Hardware, vocab_size: int | None = None) -> None:
    """Raise ArgumentError if a step takes more than the GPUs have for certain, see `Estimate.least`.

    Args:
        config: of a run with the recipe's own model.
        hardware: on which.
        vocab_size: of the tokenizer; None: as data.tokenizer says.
    """
    found = estimate(config, hardware, vocab_size)
    if found.least <= hardware.card.memory:
        return
    cures = remedies(config, hardware, vocab_size)
    raise ArgumentError(
        f"train.seqlen={config.train.seqlen} with engine={config.engine.name}, engine.memory={config.engine.memory} on "
        f"{hardware.gpus} GPUs: a step takes about {found.peak / GIB:.0f} GiB of each, which has "
        f"{hardware.card.memory / GIB:.0f} ({shares(found)}); "
        + (f"it fits with {'; or with '.join(cures)}" if cures else "no key makes it fit")
    )


def shares(found: Estimate) -> str:
    """What takes memory, the most first."""
    largest = sorted(found.device.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest if size >= 0.05 * GIB)


def remedies(config: Config, hardware: Hardware, vocab_size: int | None = None) -> list[str]:
    """What makes a run fit that does not, each by itself: the keys of one change, or of all, a length, more GPUs."""

    def fits(changed: Config, gpus: int = hardware.gpus) -> bool:
        return estimate(changed, dataclasses.replace(hardware, gpus=gpus), vocab_size).fits

    changes = list(_changes(config, hardware.gpus))
    found = [_said([change]) for change in changes if fits(_changed(config, [change]))]
    if not found and len(changes) > 1 and fits(_changed(config, changes)):
        found = [_said(changes)]
    gpus = hardware.gpus
    while not found and gpus < MOST_GPUS:
        gpus *= 2
        more = list(_changes(config, gpus))
        if fits(_changed(config, more), gpus):
            found = [f"{gpus} such GPUs{_said(more, first=' and ')}"]
    seqlen = longest(_changed(config, changes), hardware, vocab_size)
    if 0 < seqlen < config.train.seqlen:
        found.append(f"train.seqlen={seqlen}{_said(changes, first=' ')}")
    return found


def _changes(config: Config, gpus: int) -> Iterator[Change]:
    """What needs less memory than what the configuration says."""
    if config.engine.memory != AUTO:
        yield "engine", "memory", AUTO
    if config.engine.name in ("ddp", "zero1", "zero2") and config.optimizer.name == "adamw" and gpus > 1:
        yield "engine", "name", "zero3"
    if config.engine.host_gib is not None:
        yield "engine", "host_gib", None
    if config.train.micro_batch > 1:
        yield "train", "micro_batch", 1
    if sequence_degree(config, gpus) < gpus:
        yield "train", "sequence_degree", None


def _changed(config: Config, changes: Sequence[Change]) -> Config:
    for part, key, value in changes:
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{key: value})})
    return config


def _said(changes: Sequence[Change], first: str = "") -> str:
    """As on a command line; behind something else, with `first` between."""
    words = [
        f"engine={value}" if (part, key) == ("engine", "name") else f"{part}.{key}={'null' if value is None else value}"
        for part, key, value in changes
    ]
    return first + " ".join(words) if words else ""
