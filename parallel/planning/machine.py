"""How fast a machine computes and moves keys: what the cost model knows of it.

    python launch/plan.py calibrate=true          # measures this machine and keeps it in the user's cache folder

Without that, figures of H100s stand in. All ranks must go by the same ones, so a measurement is made by all ranks
together, and each host keeps the same file; a sharding's digest covers which plan was chosen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ringflash.errors import ArgumentError

MIB = 2**20
GIGA = 1e9


@dataclass(frozen=True)
class Link:
    """Transfers of one rank.

    Attributes:
        sizes: bytes, ascending.
        seconds: what a transfer of as many takes.
        hidden: share of a transfer that goes on while the rank computes. NCCL's sends need processors that a launch
            of attention holds until it ends.
        ahead: keys are taken from their owners, who lay them out when a pass begins, whatever those are at.
    """

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]
    hidden: float
    ahead: bool = False

    def __post_init__(self) -> None:
        ascending = all(list(x) == sorted(x) and x and x[0] > 0 for x in (self.sizes, self.seconds))
        if not ascending or len(self.sizes) != len(self.seconds) or not 0 <= self.hidden <= 1:
            raise ArgumentError(f"{self}; allowed are as many ascending sizes as seconds, and shares from 0 to 1")

    def time(self, sizes: np.ndarray) -> np.ndarray:
        """Seconds for each of some sizes in bytes: none for nothing, and never less for more."""
        longest, last = self.sizes[-1], self.seconds[-1]
        found = np.interp(sizes, self.sizes, self.seconds)
        found = np.where(sizes > longest, last * sizes / longest, found)
        return np.where(sizes > 0, found, 0.0)


def link(speeds: Mapping[int, float], hidden: float, latency: float, ahead: bool = False) -> Link:
    """A link from measured speeds.

    Args:
        speeds: GB/s by size in MiB.
        hidden: see `Link`.
        latency: seconds of the smallest transfer.
        ahead: see `Link`.
    """
    sizes = tuple(mib * MIB for mib in sorted(speeds))
    seconds = tuple(size / GIGA / speeds[mib] for size, mib in zip(sizes, sorted(speeds), strict=True))
    return Link((1.0, *sizes), (min(latency, seconds[0]), *seconds), hidden, ahead)


REACHED = {64: (0.79, 0.9), 128: (1.0, 1.0), 256: (1.2, 0.63)}
"""By dimension of heads, the shares of a machine's rates that kernels reach, forward and backward, on H100s
(docs/benchmarks/kernels.md). What lies between is taken for the next of these."""


@dataclass(frozen=True)
class Machine:
    """A kind of device, and how devices are joined.

    Attributes:
        name: for people.
        processors: of a device, among which the tiles of a launch are divided.
        forward: operations a second of attention with heads of 128, forward, in launches that fill the device.
        backward: the same of its backward pass.
        memory: bytes a second that a device reads or writes.
        launch: seconds that a launch takes beside its work.
        sharded: share of these rates that launches reach in a plan under which keys travel.
        inside: transfers between devices of a host.
        outside: transfers between hosts, each device over a link of its own.
    """

    name: str
    processors: int
    forward: float
    backward: float
    memory: float
    launch: float
    inside: Link
    outside: Link
    sharded: float = 0.97

    def __post_init__(self) -> None:
        rates = (self.processors, self.forward, self.backward, self.memory)
        if not all(x > 0 for x in rates) or self.launch < 0:
            raise ArgumentError(f"{self}; allowed are rates above 0")

    def rates(self, head_dim: int) -> tuple[float, float]:
        """Operations a second of attention with heads of some dimension, forward and backward."""
        forward, backward = next((x for dim, x in REACHED.items() if head_dim <= dim), REACHED[256])
        return self.forward * forward, self.backward * backward

    def text(self) -> str:
        """As JSON; `from_text` reads it."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_text(text: str) -> Machine:
        """What `text` wrote.

        Raises:
            ArgumentError: it is something else.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            for name in ("inside", "outside"):
                known = values[name]
                values[name] = Link(tuple(known["sizes"]), tuple(known["seconds"]), known["hidden"], known["ahead"])
            return Machine(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(
                f"not what `python launch/plan.py calibrate=true` writes ({type(error).__name__}: {error})"
            ) from error


# Measured on 4 x H100 with NVLink (docs/benchmarks/ring.md), and what 400 Gb/s leave of themselves.
_NETWORK = {1: 12.0, 4: 27.0, 16: 40.0, 64: 45.0}
_H100: dict[str, Any] = {
    "processors": 132,
    "forward": 650e12,
    "backward": 590e12,
    "memory": 2.8e12,
    "launch": 15e-6,
}

SEND_RECV = Machine(
    name="H100, NCCL send and receive",
    inside=link({4: 22, 16: 55, 64: 105, 256: 244}, hidden=0.3, latency=60e-6),
    outside=link(_NETWORK, hidden=0.0, latency=60e-6),
    **_H100,
)
"""H100s whose keys travel by torch.distributed's send and receive."""

COPY_ENGINE = Machine(
    name="H100, copy engines",
    inside=link({4: 104, 16: 252, 64: 332, 256: 361}, hidden=1.0, latency=15e-6, ahead=True),
    outside=link(_NETWORK, hidden=0.0, latency=60e-6),
    **_H100,
)
"""H100s whose copy engines pull keys within a host, without processors."""


def cache_path() -> Path:
    """Where the measurement of this machine is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringflash" / "machine.json"


MOST_SHARING = 16
"""Ranks of one host that reach each other by copy engines."""


def machine_for(ranks: int, hosts: int, path: Path | None = None) -> Machine:
    """What was measured here, or H100s as so many ranks on so many hosts would use them.

    Args:
        ranks: how many.
        hosts: on how many hosts.
        path: of the measurement; `cache_path()` if None.

    Raises:
        ArgumentError: the file is none of ours.
    """
    return measured_machine(path) or (COPY_ENGINE if hosts == 1 and ranks <= MOST_SHARING else SEND_RECV)


def measured_machine(path: Path | None = None) -> Machine | None:
    """What was measured here, if anything was.

    Args:
        path: of the measurement; `cache_path()` if None.

    Raises:
        ArgumentError: the file is none of ours.
    """
    path = path or cache_path()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error}") from error
    try:
        return Machine.from_text(text)
    except ArgumentError as error:
        raise ArgumentError(f"{path} is {error}; remove it, or measure anew") from error
