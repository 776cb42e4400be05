"""GPUs: how much memory they have, and how many operations a second they could do."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from ringflash.training.memory.plan import SPARE

GIB = 2**30

STARTED = 2 * 10**9
"""Bytes that CUDA, NCCL and libraries take of a GPU beside tensors."""

PEAKS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("mi300x", 1307e12),
)
"""Words of a GPU's name, and the operations a second of its dense products in bfloat16, as its maker says."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: bytes.
        peak: operations a second of dense products in bfloat16; nan where nobody here knows.
    """

    memory: float
    peak: float


CARDS = {"h100": Card(85.0e9, 989e12), "h200": Card(150.1e9, 989e12)}
"""GPUs by name; memory is what torch says of them."""


def peak_of(name: str) -> float:
    """Operations a second of a GPU of that name, see `PEAKS`; nan for one that is not there, or a part of one."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if "mig" in words:
        return math.nan
    return next((peak for known, peak in PEAKS if words.issuperset(known.split())), math.nan)


def card_of(device: torch.device) -> Card:
    """A GPU of this machine."""
    found = torch.cuda.get_device_properties(device)
    return Card(found.total_memory, peak_of(found.name))


@dataclass(frozen=True)
class Hardware:
    """What a run is to have.

    Attributes:
        gpus: ranks.
        card: each of them.
        host_bytes: memory of a host, free before the run.
        gpus_per_host: ranks of a host.
    """

    gpus: int
    card: Card
    host_bytes: float
    gpus_per_host: int = 8

    @property
    def hosts(self) -> int:
        """How many."""
        return -(-self.gpus // self.gpus_per_host)

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return (1 - SPARE) * (self.card.memory - STARTED)

    @property
    def host_share(self) -> float:
        """Of a host's memory, what each rank has of it."""
        return self.host_bytes / min(self.gpus, self.gpus_per_host)
