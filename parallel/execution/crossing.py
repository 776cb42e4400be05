"""The tensors of a call cross to where all tokens are, for some of the heads, and what is computed there comes home.

Legend: T query and Tk key rows of this rank, U and Uk of all ranks that exchange; H query and Hk key heads, h and hk of
them on this rank; D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS, Inputs, Settings
from ringflash.parallel.planning.heads import HeadShares
from ringflash.parallel.transport.head_exchange import HeadExchange, Homeward, Outward


class Crossing:
    """One pass of a call between ranks that exchange heads for tokens: one exchange before the plan, one behind.

    All memory that it takes is taken when it is made, before ranks agree to begin.

    Args:
        exchange: between the ranks.
        inputs: of the call, this rank's tokens.
        settings: of the call.
        of_rows: of the backward pass: dout (T, H, Dv), log-sum-exp and delta (H, T) fp32.

    Attributes:
        heads: which of the query heads are here.
        inputs: the call as the plan takes it, once `go` was called.
        of_rows: the same of the argument.
        shares: which heads each rank has.
    """

    def __init__(
        self,
        exchange: HeadExchange,
        inputs: Inputs,
        settings: Settings,
        of_rows: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        self._exchange, self._own, visible = exchange, inputs, inputs.key_visible
        self.shares = HeadShares.of(inputs.query.shape[1], inputs.key.shape[1], exchange.ranks)
        first = exchange.place * self.shares.queries
        self.heads = slice(first, first + self.shares.queries)
        of_queries, of_keys = [inputs.query], [self._copied(x) for x in (inputs.key, inputs.value)]
        if of_rows is not None:
            dout, lse, delta = of_rows
            of_queries += [dout, torch.stack([lse, delta], -1).transpose(0, 1)]
        if visible is not None:
            of_keys.append(visible[:, None, None].expand(-1, exchange.ranks, 1))  # as if it were of heads
        self._outward = self._ways(of_queries, of_keys)
        found = [x for way in self._outward for x in way.results]
        query, key, value = found[0], *found[len(of_queries) :][:2]
        self.inputs = inputs._replace(
            query=query,
            key=key,
            value=value,
            key_visible=None if visible is None else found[-1][:, 0, 0],
            slopes=None if inputs.slopes is None else inputs.slopes[..., self.heads],
            sinks=None if inputs.sinks is None else inputs.sinks[self.heads],
        )
        self.of_rows: tuple[Tensor, ...] = ()
        if of_rows is None:
            self._home, self._looks = self._way_of_out()
        else:
            self._pairs = found[2]
            self.of_rows = found[1], *self._pairs.new_empty(self._pairs.shape[::-1])
            self._home, self._looks = self._way_of_gradients(settings.needs)

    def _copied(self, of_keys: Tensor) -> Tensor:
        if not self.shares.copied:
            return of_keys
        return torch.stack([of_keys[:, head] for head in self.shares.key_heads], 1)

    def _ways(self, of_queries: list[Tensor], of_keys: list[Tensor]) -> list[Outward]:
        queries, keys = self._exchange.queries, self._exchange.keys
        if queries is keys:
            return [Outward([*of_queries, *of_keys], queries)]
        return [Outward(of_queries, queries), Outward(of_keys, keys)]

    def _way_of_out(self) -> tuple[list[Homeward], list[Callable[[], Tensor]]]:
        query, heads = self._own.query, self.shares.queries
        kinds = [(heads, self._own.value.shape[-1], query.dtype), (heads, 1, torch.float32)]
        home = Homeward(kinds, self._outward[0])
        return [home], [partial(home.joined, 0), lambda: home.joined(1)[..., 0].T.contiguous()]

    def _way_of_gradients(self, needs: int) -> tuple[list[Homeward], list[Callable[[], Tensor]]]:
        query, key, value = self._own[:3]
        dtype = torch.promote_types(key.dtype, torch.float32) if self.shares.copied else key.dtype
        of_query = [(self.shares.queries, query.shape[-1], query.dtype)] if needs & NEEDS["query"] else []
        of_keys = [
            (self.shares.keys, x.shape[-1], dtype)
            for x, name in ((key, "key"), (value, "value"))
            if needs & NEEDS[name]
        ]
        if len(self._outward) == 1:
            homes = [Homeward([*of_query, *of_keys], self._outward[0])]
        else:
            homes = [Homeward(of_query, self._outward[0]), Homeward(of_keys, self._outward[1])]
        before = len(of_query) if len(homes) == 1 else 0
        looks: list[Callable[[], Tensor]] = [partial(homes[0].joined, 0)] if of_query else []
        look = self._sum if self.shares.copied else Homeward.joined
        looks += [partial(look, homes[-1], before + i) for i in range(len(of_keys))]
        return homes, looks

    def _sum(self, home: Homeward, which: int) -> Tensor:
        key = self._own.key
        return home.summed(which, self.shares, key.shape[1]).to(key.dtype)

    def go(self) -> None:
        """Let everything cross."""
        self._exchange.run(self._outward)
        self._outward = []
        for x, pair in zip(self.of_rows[1:], self._pairs.unbind(-1) if self.of_rows else (), strict=True):
            x.copy_(pair.T)

    def come_home(self, found: Sequence[Tensor], failure: Exception | None) -> Exception | None:
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
                rows = [x if x.dim() == 3 else x.T[..., None] for x in found]
                for home in self._home:
                    home.fill(rows[: home.tensors])
                    rows = rows[home.tensors :]
            except Exception as error:
                failure = error
        self._exchange.run(self._home)
        return failure

    def results(self) -> list[Tensor]:
        """What came home: out (T, H, Dv) and log-sum-exp (H, T), or gradients like what they are of."""
        return [look() for look in self._looks]
