"""Weights & Biases and Trackio, through the trackers of Accelerate."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringflash.configs.schema import Config, entries


class Trackers:
    """The trackers that a configuration asks for; every rank makes this, and that of rank 0 alone tells anything.

    Args:
        config: logging.wandb and logging.trackio; its name is the project.
        device: this rank's.
        folder: the run's; its name is the run's there too, and a run that goes on is continued there.
    """

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        self._there: list[Any] = []
        if not (config.logging.wandb or config.logging.trackio):
            return
        from accelerate import PartialState  # optional libraries
        from accelerate.tracking import TrackioTracker, WandBTracker

        PartialState(cpu=device.type == "cpu")  # its trackers' log asks who is the first
        if dist.get_rank() != 0:
            return
        if config.logging.wandb:
            known = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._there.append(WandBTracker(config.name, name=folder.name, id=known, resume="allow", dir=str(folder)))
        if config.logging.trackio:
            self._there.append(TrackioTracker(config.name, name=folder.name, resume="allow"))
        for tracker in self._there:
            tracker.start()
            tracker.store_init_configuration({key: _plain(value) for key, value, _ in entries(config)})

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log scalars of a step; a tracker that fails, as without a network, is given up with a warning."""
        for tracker in list(self._there):
            try:
                tracker.log(dict(scalars), step=step)
            except Exception as error:  # whatever it raises, training goes on
                warnings.warn(f"{type(tracker).__name__} stops at step {step}: {error}", stacklevel=2)
                self._there.remove(tracker)

    def finish(self) -> None:
        """Write out what is buffered."""
        for tracker in self._there:
            tracker.finish()
        self._there = []


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float) or value is None else str(value)
