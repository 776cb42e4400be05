"""The tensors of a call cross to where all tokens are, for some of the heads, and what is computed there comes back.

Legend: T query and Tk key rows of this rank, U and Uk of all ranks that exchange; H query and Hk key heads, h and hk of
them on this rank; D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS, Inputs, Settings, crossing_kinds, keeps
from ringflash.parallel.planning.heads import HeadShares
from ringflash.parallel.transport.head_exchange import HeadExchange, Kind, Outward, Returning, taken_apart


class Crossing:
    """One pass of a call between ranks that exchange heads for tokens: one exchange before the plan, one behind.

    All memory that it takes is taken when it is made, before ranks agree to begin.

    Args:
        exchange: between the ranks.
        inputs: of the call, this rank's tokens.
        settings: of the call.
        of_rows: of the backward pass: dout (T, H, Dv), log-sum-exp and delta (H, T) fp32.
        table: of the backward pass, what the forward pass kept (see `call.keeps`).

    Attributes:
        heads: which of the query heads are here.
        first_head: the first of them.
        copied: ranks have copies of a key head.
        inputs: the call as the plan takes it, once `go` was called.
        of_rows: the same of the argument.
        shares: which heads each rank has.
        table: what the backward pass wants of what crossed, once `go` was called.
    """

    def __init__(
        self,
        exchange: HeadExchange,
        inputs: Inputs,
        settings: Settings,
        of_rows: tuple[Tensor, Tensor, Tensor] | None = None,
        table: Tensor | None = None,
    ) -> None:
        self._exchange, self._own, visible = exchange, inputs, inputs.key_visible
        self.shares = HeadShares.of(inputs.query.shape[1], inputs.key.shape[1], exchange.ranks)
        first = exchange.place * self.shares.queries
        self.heads = slice(first, first + self.shares.queries)
        self.first_head, self.copied = first, self.shares.copied
        keeps_inputs = keeps(inputs, settings)
        of_queries, of_keys, kept = [], [], []
        if of_rows is not None:
            dout, lse, delta = of_rows
            of_queries += [dout, torch.stack([lse, delta], -1).transpose(0, 1)]
        if table is not None and keeps_inputs:
            kept = taken_apart(table.view(torch.uint8), crossing_kinds(inputs, exchange.ranks), exchange.queries)
        else:
            of_queries.append(inputs.query)
            of_keys += [self._copied(x) for x in (inputs.key, inputs.value)]
            if visible is not None:
                of_keys.append(visible[:, None, None].expand(-1, exchange.ranks, 1))  # as if it were of heads
        self._outward = self._ways(of_queries, of_keys)
        found = [x for way in self._outward for x in way.results] + kept
        self.of_rows: tuple[Tensor, ...] = ()
        if of_rows is not None:
            dout, self._pairs, *found = found
            self.of_rows = dout, *self._pairs.new_empty(self._pairs.shape[::-1])
        self.inputs = inputs._replace(
            query=found[0],
            key=found[1],
            value=found[2],
            key_visible=None if visible is None else found[3][:, 0, 0],
            **inputs.of_heads(self.heads.start, self.heads.stop, self.shares.keys),
        )
        self.table = self._outward[0].arriving.view(torch.int32) if keeps_inputs and of_rows is None else None
        expected = self._expected(settings.needs)
        self._of_queries = len(expected[0])
        self._returning, self._places = self._ways_back(*expected)

    def _copied(self, of_keys: Tensor) -> Tensor:
        if not self.shares.copied:
            return of_keys
        return torch.stack([of_keys[:, head] for head in self.shares.key_heads], 1)

    def _ways(self, of_queries: list[Tensor], of_keys: list[Tensor]) -> list[Outward]:
        queries, keys, place = self._exchange.queries, self._exchange.keys, self._exchange.place
        if queries is keys or not of_keys:
            return [Outward([*of_queries, *of_keys], queries, place)]
        return [Outward(of_queries, queries, place), Outward(of_keys, keys, place)]

    def _expected(self, needs: int) -> tuple[list[Kind], list[Kind]]:
        """What comes back of query rows and of key rows: out and log-sum-exp, or gradients."""
        query, key, value = self._own[:3]
        heads, dtype = self.shares.queries, query.dtype
        if not self.of_rows:
            return [(heads, value.shape[-1], dtype), (heads, 1, torch.float32)], []
        of_query = [(heads, query.shape[-1], dtype)] if needs & NEEDS["query"] else []
        dtype = torch.promote_types(dtype, torch.float32) if self.shares.copied else dtype
        of_keys = [x for x, name in ((key, "key"), (value, "value")) if needs & NEEDS[name]]
        return of_query, [(self.shares.keys, x.shape[-1], dtype) for x in of_keys]

    def _ways_back(
        self, of_queries: list[Kind], of_keys: list[Kind]
    ) -> tuple[list[Returning], list[tuple[Returning, int]]]:
        """The ways, and for each tensor which of them it takes, and which it is on it."""
        if len(self._outward) == 1:
            both = [*of_queries, *of_keys]
            way = Returning(both, self._outward[0], kept=self.table is not None)
            return [way], [(way, i) for i in range(len(both))]
        kinds = of_queries, of_keys
        ways = [Returning(each, way) for each, way in zip(kinds, self._outward, strict=True)]
        return ways, [(way, i) for way, each in zip(ways, kinds, strict=True) for i in range(len(each))]

    def go(self) -> None:
        """Let everything cross."""
        self._exchange.run(self._outward)
        self._outward = []
        for x, pair in zip(self.of_rows[1:], self._pairs.unbind(-1) if self.of_rows else (), strict=True):
            x.copy_(pair.T)

    def cross_back(self, found: Sequence[Tensor], failure: Exception | None) -> Exception | None:
        """Let what was computed travel, and what the others computed come.

        Args:
            found: of the forward pass out (U, h, Dv) and log-sum-exp (h, U); of the backward pass those gradients of
                query (U, h, D), key (Uk, hk, D) and value (Uk, hk, Dv) that are needed, keys' in fp32 if ranks have
                copies of a key head.
            failure: what failed on this rank; others wait for it all the same.

        Returns:
            The failure, or one here.
        """
        if failure is None:
            try:
                rows = [(x if x.dim() == 3 else x.T[..., None]).contiguous() for x in found]
                for way in self._returning:
                    way.fill(rows[: way.tensors])
                    rows = rows[way.tensors :]
            except Exception as error:
                failure = error
        self._exchange.run(self._returning)
        return failure

    def results(self) -> list[Tensor]:
        """What came back: out (T, H, Dv) and log-sum-exp (H, T), or gradients like what they are of."""
        of_queries, of_keys = self._places[: self._of_queries], self._places[self._of_queries :]
        found = [way.joined(which) for way, which in of_queries]
        if not self.of_rows:
            return [found[0], found[1][..., 0].T.contiguous()]
        look = self._sum if self.shares.copied else Returning.joined
        return found + [look(way, which) for way, which in of_keys]

    def _sum(self, way: Returning, which: int) -> Tensor:
        key = self._own.key
        return way.summed(which, self.shares, key.shape[1]).to(key.dtype)
