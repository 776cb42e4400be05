"""torch's profiler over a few steps of a run, for chrome://tracing and Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 1
"""Steps ahead of those that are recorded, in which the profiler starts, which takes long."""

SETTLED = 3
"""The first step that is recorded where nobody chose: one compiles, and the next may be the first in its memory."""


class Profiler:
    """Records `steps` steps into `profile/rank0.json` and so on; none where `steps` is 0.

    Args:
        folder: the run's.
        steps: how many.
        first: number of the first of them, as logs count steps; None for the third from here on. Steps that the run
            has behind it are not recorded again.
        done: how many those are.
    """

    def __init__(self, folder: Path, steps: int, first: int | None = None, done: int = 0) -> None:
        self._profile = None
        first = done + SETTLED if first is None else first
        begin = max(first, done + 1)
        left = first + steps - begin
        if left <= 0:
            return
        warm_up = min(WARM_UP, begin - 1 - done)
        path = folder / "profile" / f"rank{dist.get_rank()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=begin - 1 - done - warm_up, wait=0, warmup=warm_up, active=left, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
        )

    def step(self) -> None:
        """A step is done."""
        if self._profile is not None:
            self._profile.step()

    def __enter__(self) -> Profiler:
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.__exit__(kind, error, traceback)
