"""Blocks whose queries attend all at once, as on ranks that share a sequence, and whose other parts go by rows.

Of attention's backward pass everything is there for all tokens: query, key, value, out, and their gradients. But
nothing else is, beside the gradients of the block's output and input: query, key and value are made ahead of it and
again behind it, rows by rows, from the block's input, which is not there whole.

A block keeps its input, and attention's out and log-sum-exp. Attention and its communication never run again.

Legend: T tokens, C hidden size, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS
from ringflash.parallel.execution.operators import call_attention_backward
from ringflash.recomputed import Region, within
from ringflash.training.memory.by_rows import Ahead, Gradients, Parts, RowBlock, filled
from ringflash.training.memory.host import Handle

NEEDED = NEEDS["query"] | NEEDS["key"] | NEEDS["value"]
"""Gradients that a block asks of attention."""


class OnceBlock(RowBlock):
    """One block of one forward pass, whose backward pass computes it again, rows by rows; see RowBlock."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._call = _Call()
        self._attended: list[Handle] = []

    @staticmethod
    def without_graph(parts: Parts, x_BTC: Tensor, keep: Callable[[Tensor], None] | None = None) -> Tensor:
        """See RowBlock."""
        rows = x_BTC.flatten(0, 1)
        out = parts.at_once(*filled(parts, len(rows), lambda own: parts.before(rows[own], own)))
        if keep is not None:
            keep(out)
        result = torch.empty_like(x_BTC, memory_format=torch.contiguous_format)  # behind attention, which needs most
        rows_of_result = result.flatten(0, 1)
        for own in parts.rows:
            rows_of_result[own] = parts.behind(rows[own], out[own])
        return result

    def forward(self, x_BTC: Tensor) -> Tensor:
        """See RowBlock."""
        with within(self._call):
            return self.without_graph(self._parts, x_BTC, self._keep)

    def output_of(self, x_BTC: Tensor) -> Tensor:
        """See RowBlock."""
        out, lse = Ahead([self._attended], again=True).take()
        with within(_Given(out, lse)):
            return self._module(x_BTC)

    def backward_of(self, inputs: list[Handle], gradients: Gradients) -> None:
        """See RowBlock."""
        given = self._given(inputs)
        out, lse = Ahead([self._attended]).take()
        self._attended.clear()
        ahead, dout = Ahead([[each] for each in inputs], again=True), torch.empty_like(out)
        for rows in self._parts.rows:
            dout[rows] = gradients.behind_attention(rows, ahead.take_one(), out[rows])
        of_attention = self._call.backward(dout, out, lse, given)
        del dout, out, lse, given
        ahead = Ahead([[each] for each in inputs])
        inputs.clear()
        for rows in self._parts.rows:
            projected = gradients.projected(rows, ahead.take_one())
            gradients.before_attention(rows, projected, [whole[rows] for whole in of_attention])
            del projected

    def _given(self, inputs: Sequence[Handle]) -> list[Tensor]:
        """Query, key and value, while what attention gave comes back."""
        for handle in self._attended:
            handle.fetch()
        return self.of_all_rows(inputs, self._parts.before)

    def _keep(self, out: Tensor) -> None:
        self._attended = [self._store(out), self._store(self._call.lse())]


class _Call(Region):
    """A block's call of attention, which runs without a graph and whose backward pass is asked for by hand."""

    def __init__(self) -> None:
        self._lse: Tensor | None = None
        self._table: Tensor | None = None
        self._others: Sequence[Any] = ()

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        # The last one says which gradients are wanted: none, as there is no graph.
        self._others = *arguments[3:-1], NEEDED
        out, self._lse, self._table = operator(*arguments[:3], *self._others)
        return out, self._lse

    def lse(self) -> Tensor:
        """Log-sum-exp (H, T); once."""
        lse, self._lse = self._lse, None
        assert lse is not None  # there was a call
        return lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of query, key and value, which attention was given; a call of all ranks."""
        return call_attention_backward(dout, None, out, lse, self._table, *given, *self._others)[:3]

    def spared(self, size: int) -> None:
        """See Region."""


class _Given(Region):
    """A block that runs for its output alone.

    Args:
        out: what attention gave.
        lse: likewise.
    """

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self._found = out, lse

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        return self._found

    def spared(self, size: int) -> None:
        """See Region."""
