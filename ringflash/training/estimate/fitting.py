"""A run that surely cannot fit is refused before anything is started, with what would make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError
from ringflash.training.config.derived import accumulation, sequence_degree
from ringflash.training.estimate.hardware import GIB, Hardware
from ringflash.training.estimate.lasting import BUFFERS, Held, Weights, held
from ringflash.training.estimate.step import estimate, longest
from ringflash.training.memory.plan import AUTO

MOST_GPUS = 1024
"""GPUs up to which a number is looked for."""

Fits = Callable[[Config, Hardware], bool]
"""Whether a configuration fits."""

Change = tuple[str, str, Any]
"""Part of the configuration, key in it, and its value."""

OFFLOADED: list[Change] = [("engine", "name", "fsdp2"), ("engine", "offload", True)]
"""What has weights, gradients and optimizer on the host, where steps take longer."""


def refuse_what_cannot_fit(config: Config, hardware: Hardware, vocab_size: int | None = None) -> None:
    """Raise ArgumentError if a step takes more than the GPUs have for certain, see `Estimate.least`.

    Args:
        config: of a run.
        hardware: on which.
        vocab_size: of the tokenizer; None: as data.tokenizer says.
    """
    found = estimate(config, hardware, vocab_size)
    if found.least > hardware.card.memory:
        what = f"train.seqlen={config.train.seqlen} with {_of_engine(config)}: a step takes about"
        raise _refusal(what, found.device, hardware, remedies(config, hardware, vocab_size))


def refuse_weights_that_cannot_fit(config: Config, hardware: Hardware, weights: Weights) -> None:
    """Raise ArgumentError if a model's weights, gradients and optimizer alone take more than the GPUs have.

    Args:
        config: of a run with any model.
        hardware: on which.
        weights: of the model.
    """

    def of(config: Config, hardware: Hardware) -> Held:
        return held(config.engine, weights, hardware.gpus, config.optimizer.name)

    def fits(config: Config, hardware: Hardware) -> bool:
        found = of(config, hardware)
        return sum(found.device.values()) <= hardware.room and sum(found.host.values()) <= hardware.host_share

    found = of(config, hardware).device
    if sum(found.values()) - found[BUFFERS] > hardware.card.memory:
        cures = _changes_that_fit(config, hardware, fits)
        raise _refusal(f"{_of_engine(config)}: the model alone takes", found, hardware, cures)


def remedies(config: Config, hardware: Hardware, vocab_size: int | None = None) -> list[str]:
    """What makes a run fit that does not, each by itself: the keys of one change, or of all, more GPUs, a length."""
    found = _changes_that_fit(config, hardware, lambda config, more: estimate(config, more, vocab_size).fits)
    changes = list(_changes(config, hardware.gpus))
    seqlen = longest(_changed(config, changes), hardware, vocab_size)
    if 0 < seqlen < config.train.seqlen:
        found.append(f"train.seqlen={seqlen}{_said(changes, first=' ')}")
    return found


def shares(device: Mapping[str, float]) -> str:
    """What takes memory in GiB, the most first."""
    largest = sorted(device.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest if size >= 0.05 * GIB)


def _of_engine(config: Config) -> str:
    return f"engine={config.engine.name}, engine.memory={config.engine.memory}"


def _refusal(what: str, device: Mapping[str, float], hardware: Hardware, cures: Sequence[str]) -> ArgumentError:
    return ArgumentError(
        f"{what} {sum(device.values()) / GIB:.0f} GiB of each of {hardware.gpus} GPUs, which has "
        f"{hardware.card.memory / GIB:.0f} ({shares(device)}); "
        + (f"it fits with {'; or with '.join(cures)}" if cures else "no key makes it fit")
    )


def _changes_that_fit(config: Config, hardware: Hardware, fits: Fits) -> list[str]:
    changes = list(_changes(config, hardware.gpus))
    found = [_said([change]) for change in changes if fits(_changed(config, [change]), hardware)]
    if not found and len(changes) > 1 and fits(_changed(config, changes), hardware):
        found = [_said(changes)]
    if found:
        return found
    away = [change for change in changes if change[:2] != ("engine", "name")] + OFFLOADED
    if _may_be_offloaded(config) and fits(_changed(config, away), hardware):
        found.append(_said(away))
    while hardware.gpus < MOST_GPUS:
        hardware = dataclasses.replace(hardware, gpus=2 * hardware.gpus)
        changes = list(_changes(config, hardware.gpus))
        if fits(_changed(config, changes), hardware):
            return [*found, f"{hardware.gpus} such GPUs{_said(changes, first=' and ')}"]
    return found


def _may_be_offloaded(config: Config) -> bool:
    """Whether the engine may be one that has weights and optimizer on the host, and is none yet."""
    engine = config.engine
    return config.optimizer.name == "adamw" and engine.deepspeed is None and not (engine.offload or engine.compile)


def _changes(config: Config, gpus: int) -> Iterator[Change]:
    """What needs less memory than what the configuration says."""
    if config.engine.memory != AUTO:
        yield "engine", "memory", AUTO
    if _takes_less_under_zero3(config, gpus) and config.optimizer.name == "adamw" and gpus > 1:
        yield "engine", "name", "zero3"
    if config.engine.host_gib is not None:
        yield "engine", "host_gib", None
    if config.train.micro_batch > 1:
        yield "train", "micro_batch", 1
    if sequence_degree(config, gpus) < gpus:
        yield "train", "sequence_degree", None


def _takes_less_under_zero3(config: Config, gpus: int) -> bool:
    """Of what engines hold; FSDP2 has gradients of whole weights between the micro-batches of a step."""
    engine = config.engine
    if engine.name == "fsdp2":
        only_its_own = engine.offload or engine.compile or engine.reduce != "fp32"  # keys
        return accumulation(config, gpus) > 1 and not only_its_own
    return engine.name in ("ddp", "zero1", "zero2")


def _changed(config: Config, changes: Sequence[Change]) -> Config:
    for part, key, value in changes:
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{key: value})})
    return config


def _said(changes: Sequence[Change], first: str = "") -> str:
    """As on a command line; behind something else, with `first` between."""
    words = [
        f"engine={value}" if (part, key) == ("engine", "name") else f"{part}.{key}={_as_word(value)}"
        for part, key, value in changes
    ]
    return first + " ".join(words) if words else ""


def _as_word(value: Any) -> str:
    return {None: "null", True: "true"}[value] if value is None or value is True else str(value)
