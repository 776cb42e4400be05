"""torch's profiler over a few steps of a run, for chrome://tracing and Perfetto."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

PASSED_OVER, WARM_UP = 1, 1
"""Steps that are not recorded: the first compiles, and in the next one the profiler starts."""


class Profiler:
    """Records `steps` steps into `profile/rank0.json` and so on; none where `steps` is 0.

    Args:
        folder: the run's.
        steps: how many.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._profile = None
        if not steps:
            return
        path = folder / "profile" / f"rank{dist.get_rank()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(skip_first=PASSED_OVER, wait=0, warmup=WARM_UP, active=steps, repeat=1),
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
