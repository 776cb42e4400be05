"""How fast a run is, and what of its GPUs it uses.

throughput = Throughput(device, operations_of(model), peak)
throughput.step(tokens, pairs, waited)     # behind each step
with throughput.paused():                  # while something is saved
    ...
speed = throughput.speed()                 # since the last one
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ringflash.training.estimate.hardware import GIB
from ringflash.training.estimate.operations import Operations


@dataclass(frozen=True)
class Speed:
    """Of some steps of all ranks.

    Attributes:
        ranks: how many.
        seconds: of a step.
        tokens_per_second: of all ranks together.
        waited: seconds of a step in which a rank waited for its batch, of the rank for which that is most.
        mfu: useful operations by what the GPUs could do; None where nobody knows one of these.
        memory: bytes of the GPU that had most in use at once, since the run began; None on CPUs.
    """

    ranks: int
    seconds: float
    tokens_per_second: float
    waited: float
    mfu: float | None = None
    memory: float | None = None

    @property
    def each(self) -> float:
        """Tokens a second of one rank."""
        return self.tokens_per_second / self.ranks

    def scalars(self) -> dict[str, float]:
        """For logs; those that are not known are left out."""
        found = {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_rank": self.each,
            "step_seconds": self.seconds,
            "data_wait_seconds": self.waited,
            "mfu": self.mfu,
            "memory_gib": None if self.memory is None else self.memory / GIB,
        }
        return {f"train/{name}": value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        """As progress is shown."""
        unit = "rank" if self.memory is None else "GPU"
        parts = [f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += [f"{self.each:,.0f}/{unit}"] if self.ranks > 1 else []
        parts += [f"MFU {self.mfu:.1%}"] if self.mfu is not None else []
        parts += [f"{self.memory / GIB:.1f} GiB"] if self.memory is not None else []
        return "  ".join([*parts, f"data wait {self.waited:.2f} s"])


class Throughput:
    """Counts what steps do, and the time that they take; the clock stands still while something else is done.

    Args:
        device: this rank's.
        operations: the useful ones; None where nobody knows them.
        peak: operations a second that each GPU could do; nan where nobody knows.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        device: torch.device,
        operations: Operations | None,
        peak: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._operations, self._peak, self._clock = device, operations, peak, clock
        self.begin()

    def begin(self) -> None:
        """Forget the steps so far."""
        self._steps, self._tokens, self._pairs, self._waited = 0, 0, 0.0, 0.0
        self._began = self._clock()

    def step(self, tokens: int, pairs: float, waited: float) -> None:
        """A step is done.

        Args:
            tokens: of all ranks.
            pairs: of a query of this rank and a key that it sees, in a layer.
            waited: seconds in which this rank waited for its batch.
        """
        self._steps += 1
        self._tokens += tokens
        self._pairs += pairs
        self._waited += waited

    @contextmanager
    def paused(self) -> Generator[None]:
        """What is done meanwhile takes no time."""
        paused = self._clock()
        yield
        self._began += self._clock() - paused

    def speed(self) -> Speed:
        """Of the steps since the last call; a collective of all ranks, which waits for the device."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._device)
        took = self._clock() - self._began
        most = [self._waited, float(torch.cuda.max_memory_allocated(self._device)) if on_gpu else 0.0]
        sums = torch.tensor([self._pairs], dtype=torch.float64, device=self._device)
        largest = torch.tensor(most, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        (pairs,), (waited, memory) = sums.tolist(), largest.tolist()
        ranks, mfu = dist.get_world_size(), None
        if self._operations is not None and not math.isnan(self._peak):
            mfu = self._operations.of(self._tokens, pairs) / (took * ranks * self._peak)
        found = Speed(
            ranks=ranks,
            seconds=took / max(1, self._steps),
            tokens_per_second=self._tokens / took,
            waited=waited / max(1, self._steps),
            mfu=mfu,
            memory=memory if on_gpu else None,
        )
        self.begin()
        return found
