"""The way through the stages of a program."""

from __future__ import annotations

from collections.abc import Callable

from ringflash.parallel.execution.call import Ready
from ringflash.parallel.execution.rows import Rows
from ringflash.parallel.execution.travelling_keys import TravellingKeys
from ringflash.parallel.planning.stage_program import StageProgram


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
        program, own = ready.program, ready.inputs.keys()
        self._stages = list(zip(program.stages)) if settle is None else program.backward_stages
        self._own, self._body, self._settle = own, body, settle
        self._keys = None if ready.transport is None else TravellingKeys(own, program, ready.transport)
        self._failure: Exception | None = None

    def run(self) -> Exception | None:
        """Go all the way; what failed on this rank of several. Ranks have begun."""
        if self._keys is not None:
            self._among_ranks(self._keys)
            return self._failure
        for pieces in self._stages:
            for piece in pieces:
                if piece.launches:
                    self._body(piece, piece.at_hand(self._own, ()))
                if self._settle is not None:
                    self._settle(piece)
        return None

    def _among_ranks(self, keys: TravellingKeys) -> None:
        keys.start()
        for index, pieces in enumerate(self._stages):
            keys.begin(index)
            for piece in pieces:
                try:
                    if piece.launches and self._failure is None:
                        self._body(piece, piece.at_hand(self._own, keys.arrived, keys.pulled))
                except Exception as error:
                    self._failure = error
                keys.work_begun()
                try:
                    if self._settle is not None:
                        self._settle(piece)
                except Exception as error:
                    self._failure = self._failure or error
            keys.end()
        keys.close()
