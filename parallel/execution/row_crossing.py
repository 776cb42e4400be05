"""Query rows cross to the ranks that work on them, and what is computed there comes back; keys stay.

Legend: T query rows of this rank, U of those that it works on; H query heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS, Inputs, Settings
from ringflash.parallel.transport.row_exchange import RowExchange


class RowCrossing:
    """One pass of a call whose queries are worked on elsewhere: one exchange before the plan, one behind.

    All memory that it takes is taken when it is made, before ranks agree to begin.

    Args:
        exchange: between the ranks.
        inputs: of the call, this rank's rows.
        settings: of the call.
        of_rows: of the backward pass: dout (T, H, Dv), log-sum-exp and delta (H, T) fp32.

    Attributes:
        inputs: the call as the plan takes it, once `go` was called.
        of_rows: the same of the argument.
    """

    first_head = 0
    table = None
    copied = False

    def __init__(
        self,
        exchange: RowExchange,
        inputs: Inputs,
        settings: Settings,
        of_rows: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        self._exchange, rows = exchange, exchange.rows
        query, value = inputs.query, inputs.value
        self._held = [query.contiguous()]
        if of_rows is not None:
            dout, lse, delta = of_rows
            self._held += [dout.contiguous(), torch.stack([lse, delta], -1).transpose(0, 1).contiguous()]
        self._level = [x.new_empty(rows, *x.shape[1:]) for x in self._held]
        self.inputs = inputs._replace(query=self._level[0])
        self.of_rows: tuple[Tensor, ...] = ()
        if of_rows is not None:
            numbers = self._level[2]
            self.of_rows = self._level[1], *numbers.new_empty(2, *numbers.shape[1::-1])
        self._results: list[Tensor] = []
        if of_rows is None:
            like = [(value.shape[-1], query.dtype), (1, torch.float32)]
        else:
            like = [(query.shape[-1], query.dtype)] if settings.needs & NEEDS["query"] else []
        self._expected = [query.new_empty(*query.shape[:2], dim, dtype=dtype) for dim, dtype in like]
        # What travels where something failed: any memory of the right size.
        first = [x for x in self._level[:1] if self._expected and x.shape[1:] == self._expected[0].shape[1:]]
        self._fallback = first + [x.new_empty(rows, *x.shape[1:]) for x in self._expected[len(first) :]]

    def go(self) -> None:
        """Let everything cross."""
        self._exchange.there(self._held, self._level)
        self._held = []
        for x, numbers in zip(self.of_rows[1:], self._level[2].unbind(-1) if self.of_rows else (), strict=True):
            x.copy_(numbers.T)

    def cross_back(self, found: Sequence[Tensor], failure: Exception | None) -> Exception | None:
        """Let what was computed of rows travel, and what the others computed come.

        Args:
            found: of the forward pass out (U, H, Dv) and log-sum-exp (H, U); of the backward pass those gradients of
                query (U, H, D), key and value that are needed.
            failure: what failed on this rank; others wait for it all the same.

        Returns:
            The failure, or one here.
        """
        sent = self._fallback
        try:
            if failure is None:
                sent = self._of_rows(found)
        except Exception as error:
            failure = error
        self._exchange.back(sent, self._expected)
        self._results = [*self._expected, *found[len(self._expected) :]]
        return failure

    def _of_rows(self, found: Sequence[Tensor]) -> list[Tensor]:
        rows = [x.contiguous() for x in found[: len(self._expected)]]
        if not self.of_rows:
            rows[1] = self._fallback[1].copy_(rows[1].T[..., None])
        return rows

    def results(self) -> list[Tensor]:
        """What came back: out (T, H, Dv) and log-sum-exp (H, T); or gradients, those of keys as they were."""
        if self.of_rows:
            return self._results
        out, lse = self._results
        return [out, lse[..., 0].T.contiguous()]
