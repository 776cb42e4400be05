"""Plans on hosts that are not there: predicted efficiency by the number of GPUs, as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ringflash.parallel.planning.cost import Shape, predict
from ringflash.parallel.planning.generators import NAMES, plan_named
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import Machine
from ringflash.parallel.positions.balance import TOKEN_WORK
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.visibility import needed_keys

RANKS = (8, 64, 512)
RANKS_A_HOST = 8
TOKENS_A_RANK = (16384, 65536)
MEAN = 8192

Share = tuple[str, int, int, str, float]
"""Case, tokens a GPU, GPUs, plan, and the share of one GPU's speed at equal work, of a layer of some 8B model."""


def packed(length: int) -> Mask:
    """Causal documents of log-normal lengths, of `MEAN` tokens in the mean."""
    random, bounds = np.random.default_rng(0), [0]
    while bounds[-1] < length:
        bounds.append(min(length, bounds[-1] + 1 + int(random.lognormal(math.log(MEAN) - 0.5, 1))))
    return Mask.causal() & Mask.documents(bounds)


CASES: dict[str, tuple[Callable[[int], Mask], Callable[[Mask, int, int], Partition]]] = {
    "causal, zigzag": (lambda _: Mask.causal(), lambda _, length, ranks: Partition.zigzag(length, ranks)),
    f"documents of {MEAN:,} tokens, balanced": (
        packed,
        lambda mask, length, ranks: Partition.balanced(mask, length, ranks),
    ),
}


def simulate(machine: Machine, shape: Shape) -> list[Share]:
    """Forward and backward of every case by every plan."""
    shares: list[Share] = []
    for case, (mask_of, partition_of) in CASES.items():
        for tokens in TOKENS_A_RANK:
            for ranks in RANKS:
                mask = mask_of(tokens * ranks)
                partition = partition_of(mask, tokens * ranks, ranks)
                needed = needed_keys(mask, partition.segments, partition.length)
                found = loads(mask, partition, partition, needed)
                operations = float(found.pairs.sum()) * 4 * shape.heads * shape.head_dim / ranks
                rest = tokens * TOKEN_WORK * 14 * shape.heads * shape.head_dim / machine.forward
                ideal = operations / machine.forward + 2.5 * operations / machine.backward + rest
                for name in NAMES:
                    hosts = ranks // RANKS_A_HOST
                    outline = plan_named(name, mask, partition, hosts=hosts).outline
                    cost = predict(outline, found, machine, shape, hosts, TOKEN_WORK)
                    shares.append((case, tokens, ranks, name, ideal / cost.total))
    return shares


def as_table(shares: list[Share]) -> str:
    """A line for each case and number of GPUs, a column for each plan."""
    lines = ["| case | tokens a GPU | GPUs | " + " | ".join(NAMES) + " |", "|" + "---|" * (3 + len(NAMES))]
    by_line: dict[tuple[str, int, int], dict[str, float]] = {}
    for case, tokens, ranks, name, share in shares:
        by_line.setdefault((case, tokens, ranks), {})[name] = share
    for (case, tokens, ranks), found in by_line.items():
        cells = " | ".join(f"{found[name]:.2f}" for name in NAMES)
        lines.append(f"| {case} | {tokens:,} | {ranks} | {cells} |")
    return "\n".join(lines)


def draw(path: Path, shares: list[Share], machine: Machine) -> None:
    """A panel for each case and number of tokens, a line for each plan."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Predicted, not measured: a layer's share of one GPU's speed at equal work, forward + backward\n"
        f"{machine.name}, hosts of {RANKS_A_HOST}, between them 400 Gb/s a GPU"
    )
    panels = figure.subplots(len(CASES), len(TOKENS_A_RANK), sharex=True, sharey=True)
    for row, case in zip(panels, CASES, strict=True):
        for panel, tokens in zip(row, TOKENS_A_RANK, strict=True):
            for number, name in enumerate(NAMES):
                found = [share for *what, share in shares if what[:2] == [case, tokens] and what[3] == name]
                panel.plot(range(len(RANKS)), found, f"C{number}o-", label=name)
            panel.set_title(f"{case}, {tokens:,} tokens a GPU", fontsize=10)
            panel.set_xticks(range(len(RANKS)), [f"{ranks} GPUs" for ranks in RANKS])
            panel.set_ylim(0, 1.05)
            panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
