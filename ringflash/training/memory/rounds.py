"""Blocks whose queries attend in rounds, on one device that holds a whole sequence.

A round is some rows of a block from its input to its output: all of a block but attention looks at one token at a time,
and attention at the keys so far. So of the length of a sequence are there only the stream of tokens, keys and values
(of grouped heads a fraction of the stream), and their gradients; queries, what attention gives, and what the
feed-forward makes of it are there for one round. The backward pass goes from the last round to the first: behind a
round, the gradients of its keys have all that they are to have. They are summed over rounds in fp32.

Of each round its input, and attention's out and log-sum-exp, are kept. Attention never runs again.

Legend: T tokens, R of them in a round, C hidden size, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ringflash.recomputed import Region, here, within
from ringflash.training.memory.by_rows import Ahead, Gradients, Parts, RowBlock
from ringflash.training.memory.host import Handle


class RoundBlock(RowBlock):
    """One block of one forward pass, whose backward pass computes it again, round by round; see RowBlock."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._attended: list[tuple[Handle, Handle]] = []

    @staticmethod
    def without_graph(parts: Parts, x_BTC: Tensor, keep: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
        """See RowBlock."""
        rows, result = x_BTC.flatten(0, 1), torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
        rows_of_result, attend, region = result.flatten(0, 1), parts.in_rounds.forward, here.region
        whole: list[Tensor] = []
        for around in parts.rounds or ():
            query, *keys = parts.before(rows[around.rows], around.rows)
            whole = whole or [part.new_empty(len(rows), *part.shape[1:]) for part in keys]
            for all_rows, part in zip(whole, keys, strict=True):
                all_rows[around.rows] = part
            key, value = whole
            if region is None:
                out, lse = attend(query, key, value, around)
            else:
                out, lse = region.attention(attend, (query, key, value, around))
            del query, keys  # before the feed-forward
            if keep is not None:
                keep(out, lse)
            rows_of_result[around.rows] = parts.behind(rows[around.rows], out)
        return result

    def forward(self, x_BTC: Tensor) -> Tensor:
        """See RowBlock."""
        return self.without_graph(self._parts, x_BTC, self._keep)

    def output_of(self, x_BTC: Tensor) -> Tensor:
        """See RowBlock."""
        with within(_Given(self._attended)):
            return self._module(x_BTC)

    def backward_of(self, inputs: list[Handle], gradients: Gradients) -> None:
        """See RowBlock."""
        rounds, attention = self._parts.rounds or (), self._parts.in_rounds
        key, value = self.of_all_rows(inputs, self._parts.keys)
        more = torch.promote_types(key.dtype, torch.float32)
        of_keys = [torch.zeros_like(x, dtype=more) for x in (key, value)]
        kept = Ahead([(x, *of_attention) for x, of_attention in zip(inputs[::-1], self._attended[::-1], strict=True)])
        inputs.clear()
        self._attended.clear()
        for around in reversed(rounds):
            rows = around.rows
            x, out, lse = kept.take()
            dout = gradients.behind_attention(rows, x, out)
            projected = gradients.projected(rows, x)
            query = projected.given[0].detach()
            dquery = attention.backward(dout, out, lse, query, key, value, around, *of_keys)
            dkeys = [whole[rows].to(key.dtype) for whole in of_keys]
            del x, out, lse, dout, query
            gradients.before_attention(rows, projected, (dquery, *dkeys))
            del projected, dquery, dkeys

    def _keep(self, out: Tensor, lse: Tensor) -> None:
        if self._host is not None:
            self._host.let_go()  # of the round before, whose way to the host this one's work has covered
        self._attended.append((self._store(out), self._store(lse)))


class _Given(Region):
    """Rounds that run for their output alone.

    Args:
        attended: what attention gave for each.
    """

    def __init__(self, attended: Sequence[tuple[Handle, Handle]]) -> None:
        self._found = Ahead(attended, again=True)

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        out, lse = self._found.take()
        return out, lse

    def spared(self, size: int) -> None:
        """See Region."""
