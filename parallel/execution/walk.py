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

    Attributes:
        keys: on their way.
    """

    def __init__(
        self,
        ready: Ready,
        body: Callable[[StageProgram, Rows], None],
        settle: Callable[[StageProgram], None] | None = None,
    ) -> None:
        program = ready.program
        self._stages = [(stage,) for stage in program.stages] if settle is None else program.backward_stages
        self._transport, self._body, self._settle = ready.transport, body, settle
        self.keys = TravellingKeys(ready.inputs.keys(), program)
        self._failure: Exception | None = None

    def run(self) -> Exception | None:
        """Go all the way; what failed on this rank of several. Ranks have begun."""
        keys = self.keys
        if self._transport is not None:
            keys.start(self._transport)
        for index, pieces in enumerate(self._stages):
            keys.begin(index)
            for piece in pieces:
                if self._failure is None:
                    self._guarded(self._work, piece)
                keys.work_begun()
                if self._settle is not None:
                    self._guarded(self._settle, piece)
            keys.end()
        keys.close()
        return self._failure

    def _work(self, piece: StageProgram) -> None:
        if piece.launches:
            self._body(piece, piece.at_hand(self.keys.own, self.keys.arrived))

    def _guarded(self, function: Callable[[StageProgram], None], piece: StageProgram) -> None:
        try:
            function(piece)
        except Exception as error:
            if self._transport is None:
                raise
            self._failure = self._failure or error
