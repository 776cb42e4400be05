"""What a run shows while it runs.

    with ProgressDisplay(total_steps=300, rank=rank) as progress:
        progress.update(step, loss, speed)

Ranks other than 0 may make the same calls; they show nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ringflash.training.run.throughput import Speed


class ProgressDisplay:
    """Step, loss, speed, step time and time left: a bar on a terminal, else a line now and then.

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
        if self._shown and self._console is not None and self._console.is_terminal:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)
            self._bar.start()

    def update(self, step: int, loss: float, speed: Speed) -> None:
        """Show that `step` steps are done, the latest of them so fast."""
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
            f"loss {loss:.4f}  {speed}  {_duration(seconds, fine=True)}/step  "
            f"{_duration(seconds * (self.total_steps - step))} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._console is not None and (now - self._line_time >= self.every_seconds or step >= self.total_steps):
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


def _duration(seconds: float, fine: bool = False) -> str:
    if fine and seconds < 10:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
