"""Host time that it takes one rank to plan a sequence, as a table of milliseconds.

    python docs/benchmarks/planning.py

No GPU and no other rank takes part: a rank makes its own plan alone. The rank is the middle one, and what all ranks
would share, such as which keys each of them needs, counts as its own. Time is the process's on one core, the least of
three, because other work on the machine makes it longer and nothing makes it shorter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from ringflash.parallel.planning.choose import choose
from ringflash.parallel.planning.generators import plan_named
from ringflash.parallel.planning.rank_program import rank_program
from ringflash.parallel.positions.balance import TOKEN_WORK
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import resolve

RANKS = (8, 64, 512)
LENGTHS = (2**20, 5 * 2**20)
CASES = (("causal", "zigzag"), ("packed", "balanced"), ("packed", "zigzag"))
TIMES = ("partition ms", "choice ms", "plan ms", "program ms", "total ms")
COLUMNS = ("ranks", "tokens", "mask", "partition", "chosen", *TIMES, "stages", "moved by the rank", "program's bytes")

T = TypeVar("T")


def packed(length: int, mean: int = 8192, sigma: float = 1.0, seed: int = 0) -> Mask:
    """Causal documents of log-normal lengths."""
    random, bounds = np.random.default_rng(seed), [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + 1 + int(random.lognormal(math.log(mean) - sigma**2 / 2, sigma))))
    return Mask.causal() & Mask.documents(bounds)


def timed(make: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    """What is made, and milliseconds."""
    least = math.inf
    for _ in range(repeats):
        started = time.process_time()
        made = make()
        least = min(least, time.process_time() - started)
    return made, least * 1e3


def line(ranks: int, length: int, name: str, kind: str) -> list[str]:
    mask, device = Mask.causal() if name == "causal" else packed(length), torch.device("cpu")
    partition, sharding = timed(lambda: resolve(kind, length, ranks, mask))
    choice, choosing = timed(lambda: choose(mask, partition, hosts=ranks // 8, token_work=TOKEN_WORK))
    plan, planning = timed(lambda: plan_named(choice.name, mask, partition, hosts=ranks // 8).of(ranks // 2))
    program, lowering = timed(lambda: rank_program(plan, mask, device))
    times = [f"{x:.1f}" for x in (sharding, choosing, planning, lowering, sharding + choosing + planning + lowering)]
    sizes = [str(len(plan.stages)), f"{plan.moved_tokens / length:.2f} S", f"{program.nbytes() / 2**20:.1f} MiB"]
    return [str(ranks), f"{length // 2**20}M", name, kind, choice.name, *times, *sizes]


def main() -> None:
    torch.set_num_threads(1)
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print("| " + " | ".join(cells) + " |")
    for ranks in RANKS:
        for length in LENGTHS:
            for name, kind in CASES:
                print("| " + " | ".join(line(ranks, length, name, kind)) + " |", flush=True)


if __name__ == "__main__":
    main()
