"""A run that a signal stops ends after the step it is in, with a checkpoint, on all ranks together.

SIGTERM is what schedulers send to a job they are about to take away, SIGINT what a terminal sends for Ctrl-C. Signals
may reach only some ranks, or reach them in different steps, so each rank notifies the others in the step's last
reduction (`Engine.train_step`), and all stop after the first step in which any was signalled.

    answer = Answer()
    with StopSignals() as signals:
        loss, norm, asked = engine.train_step(batches, lr, signals.received)
        stop = answer(asked)
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor

STOPPED = 75
"""Exit status of a process whose run was stopped and saved a checkpoint. EX_TEMPFAIL of sysexits.h: a temporary
failure, try again; unlike 128 + 15 it cannot be taken for a process that a signal killed with nothing saved."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process; afterwards they mean what they did.

    Repeated ones are only noted too: a scheduler may signal a launcher, which passes it on, and its processes as well.
    Outside of a process's main thread Python handles no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: dict[signal.Signals, Any] = {}

    def received(self) -> bool:
        """Whether this process was signalled to stop."""
        return self._received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True


class Answer:
    """Reads a scalar of each step on the host without keeping a GPU waiting for its next step."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, asked: Tensor) -> bool:
        """Whether the scalar is not 0; on a GPU that of the call before, since this one's is still being computed."""
        if asked.device.type != "cuda":
            return bool(asked)
        copied = torch.cuda.Event()
        latest = asked.to("cpu", non_blocking=True), copied
        copied.record()
        before, self._before = self._before, latest
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0])


def ignore_signals() -> None:
    """Let no late signal change the exit status of a process that is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
