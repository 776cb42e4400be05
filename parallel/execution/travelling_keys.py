"""Keys and values on their way from rank to rank, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ringflash.parallel.execution.rows import Rows, rows_beside, rows_of
from ringflash.parallel.planning.program import Program, picked
from ringflash.parallel.transport.base import Ticket, Transport


class TravellingKeys:
    """This rank's keys, and those that come for the stage at hand.

    A transfer that cannot begin before earlier work of the GPU is over is asked for ahead of a stage's first launch.
    Any other is asked for behind it, so that the GPU does not wait for the host.

    All memory that travelling takes is taken when this is made, before the ranks agree to begin.

    Args:
        own: this rank's keys, values and, if any, which keys are visible.
        program: what it does.
        transport: between ranks; None on one device.
    """

    def __init__(self, own: Rows, program: Program, transport: Transport | None) -> None:
        self.own, self._stages, self._transport = own, program.stages, transport
        self.arrived: Rows = ()
        """What came for the stage at hand."""
        self._filled = 0
        self._coming: Rows = ()
        self._asked: Callable[[], Ticket] | None = None
        self._ticket: Ticket | None = None
        self._leaving: list[Ticket] = []
        self._ahead: list[list[tuple[int, Tensor]]] = [[] for _ in program.stages]
        self._gathers: list[tuple[Tensor, Tensor, Tensor]] = []
        if transport is None:
            return
        self._sent = tuple([x.contiguous() for x in own])
        if transport.sends_early:
            self._make_ready_ahead(program)
        needed = min(2, sum([bool(stage.receives) for stage in program.stages]))
        self._buffers = [rows_beside(own, program.buffers.arrivals) for _ in range(needed)]

    def _make_ready_ahead(self, program: Program) -> None:
        """What of own keys can leave before its stage."""
        for pairs, stage in zip(self._ahead, program.sent_ahead, strict=True):
            for s in stage.sends:
                if isinstance(s.rows, Tensor):
                    targets = rows_beside(self._sent, s.count)
                    self._gathers += [(source, s.rows, x) for source, x in zip(self._sent, targets, strict=True)]
                    pairs += [(s.peer, x) for x in targets]
                else:
                    pairs += rows_of(s, self._sent)

    def start(self) -> None:
        """Own keys are there, for the current stream."""
        for source, rows, target in self._gathers:
            torch.index_select(source, 0, rows, out=target)
        if self._transport is not None:
            self._start = self._transport.mark()

    def begin(self, index: int) -> None:
        """A stage begins."""
        stage, self._coming = self._stages[index], ()
        self._received = stage.received
        if not stage.sends and not stage.receives:
            return
        assert self._transport is not None  # one device sends nothing
        if stage.receives:
            self._coming = self._buffers[self._filled % 2]
            self._filled += 1
        ahead = self._ahead[index]
        sends = ahead or [pair for s in stage.sends for pair in rows_of(s, self.arrived if s.relayed else self._sent)]
        receives = [pair for s in stage.receives for pair in rows_of(s, self._coming)]
        now = self._transport.mark() if index else self._start
        ready = self._start if ahead or not sends else now
        free = None if now is None else [now, *(event for x in self._leaving[-1:] for event in x.sent)]
        what = f"keys and values for stage {index + 1}"
        self._asked = partial(self._transport.transfer, sends, receives, what, ready, free)
        if not self._transport.sends_early:
            self.work_begun()

    def work_begun(self) -> None:
        """The first launch of the stage was asked for, if it has one."""
        if self._asked is not None:
            self._ticket, self._asked = self._asked(), None

    def end(self) -> None:
        """What comes for the next stage is there when the current stream has come here."""
        if self._ticket is not None:
            self._ticket.wait_received()
            self._leaving.append(self._ticket)
        self._ticket = None
        self.arrived = tuple([picked(x, self._received) for x in self._coming])

    def close(self) -> None:
        """Nothing is on its way any more when the current stream has come here."""
        for ticket in self._leaving:
            ticket.wait()
