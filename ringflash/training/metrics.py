"""What a run shows and writes: progress, scalars, and the loss by position in the context.

    with ScalarLog(folder, rank) as log, ProgressDisplay(total_steps=300, rank=rank) as progress:
        for step in range(1, 301):
            ...
            progress.update(step, loss=loss, tokens_per_second=speed)
            log.write(step, {"train/loss": loss, "train/tokens_per_second": speed})

Ranks other than 0 may make the same calls; they show and write nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

from ringflash.batches import IGNORED_LABEL


class ScalarLog:
    """Scalars as lines of JSON in `metrics.jsonl`, and for TensorBoard in `tensorboard/`.

    Args:
        folder: the run's folder; an existing log is continued.
        rank: only rank 0 writes.
        tensorboard: whether to write for TensorBoard too.
        start_step: last step that an earlier part of the run is kept of.
    """

    def __init__(self, folder: str | Path, rank: int = 0, tensorboard: bool = True, start_step: int = 0) -> None:
        self._lines = self._board = None
        if rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "metrics.jsonl").open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import, and not always wanted

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log some scalars of one step; what is not finite becomes null in the JSON.

        A log that cannot be written, on a full disk say, is given up with a warning; training goes on.
        """
        try:
            if self._lines is not None:
                finite = {name: float(value) if math.isfinite(value) else None for name, value in scalars.items()}
                self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
                self._lines.flush()
            if self._board is not None:
                for name, value in scalars.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            warnings.warn(f"the log stops at step {step}: {error}", stacklevel=2)
            self.close()

    def close(self) -> None:
        """Write out what is buffered, as far as that is possible."""
        for sink in (self._lines, self._board):
            if sink is not None:
                with contextlib.suppress(OSError):
                    sink.close()
        self._lines = self._board = None

    def __enter__(self) -> ScalarLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_scalars(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} of a metrics.jsonl, null as nan.

    Where a resumed run went back to an earlier step, what was logged from that step on before is left out. A last line
    that was cut off by a crash is left out too.
    """
    entries: list[dict[str, Any]] = []
    for line in Path(path).read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        while entries and entries[-1]["step"] > entry["step"]:
            entries.pop()
        entries.append(entry)
    scalars: dict[str, dict[int, float]] = {}
    for entry in entries:
        for name in entry.keys() - {"step", "time"}:
            scalars.setdefault(name, {})[entry["step"]] = math.nan if entry[name] is None else entry[name]
    return {name: sorted(values.items()) for name, values in scalars.items()}


class ProgressDisplay:
    """Step, loss, tokens per second, step time and time left: a bar on a terminal, else a line now and then.

    Args:
        total_steps: steps of the whole run.
        start_step: steps that are already done.
        rank: only rank 0 shows anything.
        enabled: False shows nothing but `note`s.
        every_seconds: between lines, where there is no terminal; the first and the last step always get one.
        console: where to write; standard output if None.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        enabled: bool = True,
        every_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.every_seconds, self._clock = total_steps, every_seconds, clock
        self._console = (console or Console(soft_wrap=True, highlight=False)) if rank == 0 else None
        self._shown = rank == 0 and enabled
        self._step, self._time, self._line_time = start_step, clock(), -math.inf
        self._step_seconds: float | None = None
        self._bar = self._task = None
        if self._shown and self._console.is_terminal:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done."""
        now = self._clock()
        if step > self._step:
            # Recent steps count most: the first ones, which compile and warm up, are soon forgotten.
            latest = (now - self._time) / (step - self._step)
            previous = latest if self._step_seconds is None else self._step_seconds
            self._step_seconds = 0.9 * previous + 0.1 * latest
            self._step, self._time = step, now
        if not self._shown:
            return
        seconds = self._step_seconds or 0.0
        text = (
            f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {_duration(seconds, fine=True)}/step  "
            f"{_duration(seconds * (self.total_steps - step))} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._line_time >= self.every_seconds or step >= self.total_steps:
            self._line_time = now
            self._console.print(f"step {step}/{self.total_steps}  {text}", markup=False)

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._console is not None:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


BINS_PER_OCTAVE = 2
"""Ranges of context grow by 2 ** (1 / BINS_PER_OCTAVE)."""


class PositionBin(NamedTuple):
    """Mean loss in nats per token behind `first` to `last` tokens of context."""

    first: int
    last: int
    loss: float
    tokens: int


class PositionLoss:
    """Sums of losses by position in a document, or in the part of it that its sequence holds.

    Attributes:
        totals: (2, seqlen) float64 on the CPU: losses in nats, predictions. Sum it over ranks (all_reduce) before
            `bins`.
    """

    def __init__(self, seqlen: int) -> None:
        self.totals = torch.zeros(2, seqlen, dtype=torch.float64)

    def add(self, position_ids: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Add predictions, three tensors of one shape; those with the label -100 do not count."""
        predicted = labels.cpu() != IGNORED_LABEL
        positions = position_ids.cpu()[predicted]
        values = losses.detach().cpu()[predicted].double()
        self.totals[0].index_add_(0, positions, values)
        self.totals[1].index_add_(0, positions, torch.ones_like(values))

    def bins(self) -> list[PositionBin]:
        """Means over growing ranges of context; ranges without tokens are left out."""
        seqlen = self.totals.shape[1]
        steps = math.ceil(math.log2(seqlen) * BINS_PER_OCTAVE) + 1
        edges = sorted({min(seqlen, round(2 ** (i / BINS_PER_OCTAVE))) for i in range(steps)} | {seqlen})
        starts = [0, *edges]
        sums = [self.totals[:, start:stop].sum(dim=1).tolist() for start, stop in zip(starts, edges, strict=False)]
        return [
            PositionBin(start + 1, stop, nats / count, int(count))
            for start, stop, (nats, count) in zip(starts, edges, sums, strict=False)
            if count
        ]


def _duration(seconds: float, fine: bool = False) -> str:
    if fine and seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
