"""Times of a plan, predicted and measured, by rank and stage: as text, and as a timeline.

Legend: N stages, R ranks.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ringflash.functional import attention
from ringflash.parallel.handles import placement_of
from ringflash.parallel.planning.cost import Pass, Prediction, Shape
from ringflash.parallel.planning.program import Program
from ringflash.parallel.sharding import Sharding
from ringflash.parallel.transport.base import Ticket
from ringflash.parallel.transport.select import GroupTransport

PASSES = ("forward", "backward")
REPEATS = 7
MOST_SHOWN = 16
"""Ranks whose times are printed one by one; of more, the quickest and the slowest of each stage."""


@dataclass(frozen=True)
class Times:
    """Seconds of one pass.

    Attributes:
        compute: (N, R) in launches.
        wait: (N, R) waiting for transfers behind them.
        rest: (R,) in the rest of a layer before.
    """

    compute: np.ndarray
    wait: np.ndarray
    rest: np.ndarray

    @property
    def total(self) -> float:
        """Until the last rank is done."""
        return float((self.rest + (self.compute + self.wait).sum(0)).max())


def predicted(prediction: Prediction) -> dict[str, Times]:
    """Times of the cost model."""
    passes: dict[str, Pass] = {"forward": prediction.forward, "backward": prediction.backward}
    return {name: Times(x.compute, x.wait, x.rest) for name, x in passes.items()}


# Measuring


class _Marks:
    """Points in time of this rank: events on a GPU's stream, a clock on CPUs."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._points: list[tuple[str, Any]] = []

    def mark(self, what: str) -> None:
        if self._on_gpu:
            point = torch.cuda.Event(enable_timing=True)
            point.record()
        else:
            point = time.perf_counter()
        self._points.append((what, point))

    def read(self) -> list[tuple[str, float]]:
        """What was marked, and seconds since the first mark."""
        first = self._points[0][1]
        if self._on_gpu:
            torch.cuda.synchronize()
            return [(what, first.elapsed_time(point) / 1e3) for what, point in self._points]
        return [(what, point - first) for what, point in self._points]


class _MarkedTicket:
    """Marks when a transfer is waited for, and when that is over."""

    def __init__(self, ticket: Ticket, marks: _Marks, what: str) -> None:
        self._ticket, self._marks, self._what = ticket, marks, what

    def wait(self) -> None:
        """See the ticket's own."""
        self._marks.mark("launches end")
        self._ticket.wait()
        self._marks.mark(self._what)


@contextmanager
def _marked(transport: GroupTransport, marks: _Marks) -> Generator[None]:
    """While what it transfers, and what is taken from its shelf, marks when it is waited for."""

    def marked(function: Callable[..., Ticket]) -> Callable[..., _MarkedTicket]:
        return lambda rows, targets, what, *since: _MarkedTicket(function(rows, targets, what, *since), marks, what)

    places = [(transport, "transfer")] + ([(transport.shelf, "pull")] if transport.shelf else [])
    for owner, name in places:
        vars(owner)[name] = marked(getattr(owner, name))
    try:
        yield
    finally:
        for owner, name in places:
            del vars(owner)[name]


def measure(sharding: Sharding, shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Times]:
    """Median times of attention by a sharding on all ranks of its group, each of which calls this.

    Args:
        sharding: of one mask; bound to its group.
        shape: of the attention.
        device: of this rank.
        dtype: of the tensors.
    """
    placement, index = placement_of(sharding.handle())
    program, ranks = placement.program(index, device), sharding.ranks
    transport = placement.transport
    sizes = (sharding.batch, sharding.tokens)
    query, key, value, dout = (
        torch.randn(*sizes, heads, shape.head_dim, device=device, dtype=dtype)
        for heads in (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    found: dict[str, list[np.ndarray]] = {name: [] for name in PASSES}
    for repeat in range(REPEATS + 2):
        out: list[Tensor] = []
        for name in PASSES:
            dist.barrier(sharding.group)
            marks = _Marks(device)
            with _marked(transport, marks):
                marks.mark("begins")
                if name == "forward":
                    out.append(attention(*leaves, sharding=sharding)[0])
                else:
                    torch.autograd.grad(out[0], leaves, dout)
                marks.mark("ends")
            if repeat >= 2:  # the first calls compile and allocate
                found[name].append(_by_stage(marks.read(), program))
    mine = {name: np.median(np.stack(x), axis=0) for name, x in found.items()}
    gathered: list[dict[str, np.ndarray]] = [{} for _ in range(ranks)]
    dist.all_gather_object(gathered, mine, group=sharding.group)
    return {name: _together([each[name] for each in gathered]) for name in PASSES}


def _by_stage(marks: list[tuple[str, float]], program: Program) -> np.ndarray:
    """(N, 2) seconds of launches and of waits in each stage of this rank.

    A stage ends where the keys for the next one have come, or such as it passed on have left; what follows the last
    such stage is the next one's.
    """
    times = np.zeros((len(program.stages), 2))
    last, stage = 0.0, 0
    for what, now in marks[1:]:
        times[stage, 0 if what in ("launches end", "ends") else 1] += now - last
        last = now
        if (of_keys := re.fullmatch(r"keys and values for stage (\d+)", what)) is not None:
            stage = min(len(times) - 1, int(of_keys[1]))
    idle = [not stage.launches for stage in program.stages]  # what passes there is waiting, as for the end of a call
    times[idle, 1] += times[idle, 0]
    times[idle, 0] = 0
    return times


def _together(ranks: list[np.ndarray]) -> Times:
    """Of all ranks, whose programs may have fewer stages than others'."""
    stages = max(len(x) for x in ranks)
    padded = np.stack([np.pad(x, ((0, stages - len(x)), (0, 0))) for x in ranks], axis=1)
    return Times(padded[..., 0], padded[..., 1], np.zeros(len(ranks)))


# Showing


def as_text(times: dict[str, Times], beside: dict[str, Times] | None = None) -> str:
    """A line for each rank of each stage: milliseconds of its launch and of its wait, predicted and measured.

    Args:
        times: predicted.
        beside: measured.
    """
    lines = []
    for name, found in times.items():
        other = None if beside is None else beside[name]
        measured = "" if other is None else f", measured {_ms(other.total)}"
        lines += ["", f"{name}: predicted {_ms(found.total)} ms{measured}{' ms' if measured else ''}"]
        for stage in range(len(found.compute)):
            lines.append(f"  stage {stage}: launch + wait, ms")
            lines += [f"    {line}" for line in _of_stage(found, other, stage)]
    return "\n".join(lines[1:])


def _of_stage(found: Times, other: Times | None, stage: int) -> list[str]:
    ranks = found.compute.shape[1]
    shown = range(ranks)
    if ranks > MOST_SHOWN:
        busy = (found.compute + found.wait)[stage]
        shown = sorted({int(busy.argmin()), int(busy.argmax())})
    lines = []
    for rank in shown:
        line = f"rank {rank}: {_ms(found.compute[stage, rank])} + {_ms(found.wait[stage, rank])}"
        if other is not None and stage < len(other.compute):
            line += f"; measured {_ms(other.compute[stage, rank])} + {_ms(other.wait[stage, rank])}"
        lines.append(line)
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def draw(path: Path, title: str, times: dict[str, Times], beside: dict[str, Times] | None = None) -> None:
    """A timeline: for each rank a lane of what was predicted, and below it one of what was measured.

    Args:
        path: of the picture; its suffix says which kind.
        title: above it.
        times: predicted.
        beside: measured.
    """
    rows: list[tuple[str, dict[str, Times]]] = [("predicted", times)]
    if beside is not None:
        rows.append(("measured", beside))
    ranks = times["forward"].compute.shape[1]
    figure = Figure(figsize=(12, 1.6 + 0.22 * ranks * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for panel, name in zip(figure.subplots(1, 2), PASSES, strict=True):
        for number, (_, found) in enumerate(rows):
            at = np.arange(ranks) * len(rows) + number
            begun = found[name].rest
            for stage in range(len(found[name].compute)):
                for values, style in (
                    (found[name].compute[stage], {"color": f"C{stage % 10}", "alpha": 1 - 0.35 * number}),
                    (found[name].wait[stage], {"color": "none", "edgecolor": "#888", "hatch": "///"}),
                ):
                    panel.barh(at, values * 1e3, left=begun * 1e3, height=0.85, linewidth=0.3, **style)
                    begun = begun + values
        labels = [
            f"rank {rank} {what}" if len(rows) > 1 else f"rank {rank}" for rank in range(ranks) for what, _ in rows
        ]
        panel.set_yticks(range(ranks * len(rows)), labels, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlabel("ms; colours are stages, hatched is waiting")
        panel.set_title(name)
    figure.savefig(path, dpi=100)
