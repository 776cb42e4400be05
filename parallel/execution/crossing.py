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
        self._exchange = exchange
        query, key = inputs.query, inputs.key
        self.shares = HeadShares.of(query.shape[1], key.shape[1], exchange.ranks)
        first = exchange.place * self.shares.queries
        self.heads = slice(first, first + self.shares.queries)
        of_query = Outward(query, exchange.queries)
        of_keys = [Outward(self._copied(x), exchange.keys) for x in (key, inputs.value)]
        self._outward = [of_query, *of_keys]
        self.inputs = inputs._replace(
            query=of_query.result,
            key=of_keys[0].result,
            value=of_keys[1].result,
            key_visible=None if inputs.key_visible is None else self._cross_visible(inputs.key_visible),
            slopes=None if inputs.slopes is None else inputs.slopes[..., self.heads],
            sinks=None if inputs.sinks is None else inputs.sinks[self.heads],
        )
        self._home: list[Homeward] = []
        self._looks: list[Callable[[], Tensor]] = []
        self.of_rows: tuple[Tensor, ...] = ()
        if of_rows is None:
            self._expect_out(of_query, inputs.value.shape[-1])
        else:
            self._cross_rows(*of_rows)
            self._expect_gradients(settings.needs, of_query, of_keys, key)

    def _copied(self, of_keys: Tensor) -> Tensor:
        if not self.shares.copied:
            return of_keys
        return torch.stack([of_keys[:, head] for head in self.shares.key_heads], 1)

    def _cross_visible(self, key_visible: Tensor) -> Tensor:
        for_each = key_visible[:, None].expand(-1, self._exchange.ranks)  # as if it were of heads
        self._outward.append(Outward(for_each, self._exchange.keys))
        return self._outward[-1].result[:, 0]

    def _cross_rows(self, dout: Tensor, lse: Tensor, delta: Tensor) -> None:
        rows = self._exchange.queries
        of_out, of_both = Outward(dout, rows), Outward(torch.stack([lse, delta], -1).transpose(0, 1), rows)
        self._outward += [of_out, of_both]
        self._both = of_both.result
        self.of_rows = of_out.result, *self._both.new_empty(self._both.shape[::-1])

    def _expect_out(self, of_query: Outward, value_dim: int) -> None:
        out = self._expect(of_query, value_dim, of_query.result.dtype)
        lse = self._expect(of_query, 1, torch.float32, in_its_memory=False)
        self._looks = [out.joined, lambda: lse.joined()[..., 0].T.contiguous()]

    def _expect_gradients(self, needs: int, of_query: Outward, of_keys: Sequence[Outward], key: Tensor) -> None:
        if needs & NEEDS["query"]:
            home = self._expect(of_query, of_query.result.shape[-1], key.dtype)
            self._looks.append(home.joined)
        dtype = torch.promote_types(key.dtype, torch.float32) if self.shares.copied else key.dtype
        for name, x in zip(("key", "value"), of_keys, strict=True):
            if needs & NEEDS[name]:
                home = self._expect(x, x.result.shape[-1], dtype)
                sums = partial(self._sum, home, key.shape[1], key.dtype)
                self._looks.append(sums if self.shares.copied else home.joined)

    def _sum(self, home: Homeward, key_heads: int, dtype: torch.dtype) -> Tensor:
        return home.summed(self.shares, key_heads).to(dtype)

    def _expect(self, crossed: Outward, dim: int, dtype: torch.dtype, in_its_memory: bool = True) -> Homeward:
        self._home.append(Homeward((*crossed.result.shape[:2], dim), dtype, crossed, in_its_memory))
        return self._home[-1]

    def go(self) -> None:
        """Let everything cross."""
        self._exchange.run(self._outward)
        self._outward = []
        if self.of_rows:
            for x, both in zip(self.of_rows[1:], self._both.unbind(-1), strict=True):
                x.copy_(both.T)

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
                for home, x in zip(self._home, found, strict=True):
                    home.fill(x if x.dim() == 3 else x.T[..., None])
            except Exception as error:
                failure = error
        self._exchange.run(self._home)
        return failure

    def results(self) -> list[Tensor]:
        """What came home: out (T, H, Dv) and log-sum-exp (H, T), or gradients like what they are of."""
        return [look() for look in self._looks]
