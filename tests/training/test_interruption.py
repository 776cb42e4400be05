"""What a signal does to a process that trains, and when it is seen on a device that runs behind."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from ringflash.training.run.interruption import SIGNALS, Answer, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_and_afterwards_mean_what_they_did(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with StopSignals() as signals:
            assert not signals.received()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert signals.received()
        assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_outside_of_the_main_thread_nothing_is_changed():
    found = []

    def enter():
        with StopSignals() as signals:
            found.append((signal.getsignal(signal.SIGTERM), signals.received()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]


def test_a_cpu_is_asked_for_the_step_at_hand():
    answer = Answer()
    assert [answer(torch.tensor(x)) for x in (0.0, 1.0, 0.0)] == [False, True, False]


class _Event:
    """A point in the work of a GPU that has come no further than this test says."""

    done = 0
    made = 0

    def record(self):
        _Event.made += 1
        self.number = _Event.made

    def synchronize(self):
        assert self.number <= _Event.done, "waited for the step that is still being computed"


def test_a_gpu_is_asked_for_the_step_before_and_never_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    answer, answers = Answer(), []
    for step, asked in enumerate((0.0, 1.0, 0.0)):
        _Event.done = step  # all steps but the latest
        on_gpu = SimpleNamespace(device=torch.device("cuda"), to=lambda *_, x=asked, **__: torch.tensor(x))
        answers.append(answer(on_gpu))
    assert answers == [False, False, True]


@pytest.mark.gpu
def test_the_answer_of_a_gpu_comes_one_call_later():
    answer = Answer()
    asked = [torch.full((), x, device="cuda") for x in (0.0, 1.0, 0.0)]
    assert [answer(x) for x in asked] == [False, False, True]
