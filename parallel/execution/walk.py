"""The way through the stages of a program."""

from __future__ import annotations

from collections.abc import Callable

from ringflash.parallel.execution.call import Ready
from ringflash.parallel.execution.rows import Rows
from ringflash.parallel.execution.travelling_keys import TravellingKeys
from ringflash.parallel.planning.program import StageProgram


class Walk:
    """Goes from stage to stage: works on the keys that are there while others travel, settles, waits.

    Where work fails, out of memory say, transfers go on all the same once the ranks have begun a call: others have,
    too, and would wait for ever. They hear of the error when the call ends on CPUs, on GPUs some calls later
    (`Agreement`).

    Args:
        ready: what to walk with.
        body: the work of a stage, or of a piece of it, on the rows that it attends to.
        settle: what follows the work of each piece of a stage, in the backward pass.
    """

    def __init__(
        self,
        ready: Ready,
        body: Callable[[StageProgram, Rows], None],
        settle: Callable[[StageProgram], None] | None = None,
    ) -> None:
        program = ready.program
        self._stages = [(stage,) for stage in program.stages] if settle is None else program.backward_stages
        self._several, self._body, self._settle = ready.transport is not None, body, settle
        self._early = ready.transport is not None and ready.transport.sends_early
        self._keys = TravellingKeys(ready.inputs.keys(), program, ready.transport)
        self._failure: Exception | None = None
        self._begun: StageProgram | None = None
        self._started = False

    def start(self) -> None:
        """Own keys are there. Nothing is sent before ranks begin, but the GPU need not wait for that."""
        self._started = True
        self._keys.start()
        if self._early:
            self._work(self._stages[0][0])
            self._begun = self._stages[0][0]

    def run(self) -> Exception | None:
        """Go all the way; what failed on this rank of several."""
        if not self._started:
            self.start()
        for index, pieces in enumerate(self._stages):
            self._keys.begin(index)
            for piece in pieces:
                if piece is not self._begun and self._failure is None:
                    self._guarded(self._work, piece)
                self._keys.work_begun()
                if self._settle is not None:
                    self._guarded(self._settle, piece)
            self._keys.end()
        self._keys.close()
        return self._failure

    def _work(self, piece: StageProgram) -> None:
        if piece.launches:
            self._body(piece, piece.at_hand(self._keys.own, self._keys.arrived))

    def _guarded(self, function: Callable[[StageProgram], None], piece: StageProgram) -> None:
        try:
            function(piece)
        except Exception as error:
            if not self._several:
                raise
            self._failure = self._failure or error
