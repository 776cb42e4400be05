"""Keys and values on their way from rank to rank, stage by stage."""

from __future__ import annotations

import torch

from ringflash.parallel.execution.rows import Rows, memory_for, one_behind_another, row_by_row, rows_of
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.stage_program import picked
from ringflash.parallel.transport.base import Shelf, Ticket, Transport


class TravellingKeys:
    """This rank's keys, and those that come for the stage at hand.

    Where transports can, ranks take keys from their owners themselves. That is asked for behind a stage's first launch,
    so that the GPU does not wait for the host. Otherwise keys are sent, as the plan says, and asked for ahead of it.

    All memory that travelling takes is taken when this is made, before the ranks begin.

    Args:
        own: this rank's keys, values and, if any, which keys are visible.
        program: what it does.
        transport: between ranks.
    """

    def __init__(self, own: Rows, program: Program, transport: Transport) -> None:
        self._program, self._transport = program, transport
        self.arrived: Rows = ()
        """What came for the stage at hand."""
        self.pulled = False
        """Whether that is what this stage attends to alone, in ascending order of position."""
        self._shelf: Shelf | None = None
        self._ticket: Ticket | None = None
        self._free: torch.Event | None = None
        self._coming: Rows = ()
        self._index = self._filled = 0
        self._sent = tuple([x.contiguous() for x in own])
        receiving = [index for index, stage in enumerate(program.stages) if stage.receives]
        self._last = receiving[-1] if receiving else -1
        needed = min(2, len(receiving))
        self._memory = [memory_for(own, program.buffers.arrivals) for _ in range(needed)]
        self._buffers: list[Rows] = []

    def start(self) -> None:
        """Ranks begin, and own keys are there."""
        self._shelf = self._transport.shelf  # known since they begin
        self.pulled = self._shelf is not None
        tensors, count = row_by_row if self.pulled else one_behind_another, self._program.buffers.arrivals
        self._buffers = [tensors(memory, self._sent, count) for memory in self._memory]
        if self._shelf is not None:
            self._shelf.publish(self._sent, self._program.given)

    def begin(self, index: int) -> None:
        """A stage begins."""
        self._index, self._coming, stage = index, (), self._program.stages[index]
        if stage.receives:
            self._coming = self._buffers[self._filled % 2]
            self._filled += 1
        if self._shelf is not None:
            self._free = self._shelf.mark() if stage.receives else None
        elif stage.sends or stage.receives:
            sends = [pair for s in stage.sends for pair in rows_of(s, self.arrived if s.relayed else self._sent)]
            receives = [pair for s in stage.receives for pair in rows_of(s, self._coming)]
            self._ticket = self._transport.transfer(sends, receives, self._what)

    def work_begun(self) -> None:
        """The first launch of the stage was asked for, if it has one."""
        if self._shelf is not None and self._free is not None:
            pulls, last = self._program.pulls[self._index], self._index == self._last
            self._ticket, self._free = self._shelf.pull(pulls, self._coming, self._what, self._free, last), None

    @property
    def _what(self) -> str:
        return f"keys and values for stage {self._index + 1}"

    def end(self) -> None:
        """What comes for the next stage is there when the current stream has come here."""
        if self._ticket is not None:
            self._ticket.wait()
            self._ticket = None
        received = None if self.pulled else self._program.stages[self._index].received
        self.arrived = tuple([picked(x, received) for x in self._coming])

    def close(self) -> None:
        """Nothing more comes."""
        if self._shelf is not None:
            self._shelf.release()
        self._memory, self._buffers, self._coming, self.arrived = [], [], (), ()
