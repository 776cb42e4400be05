"""The tensors of a call cross to where all tokens are, for some of the heads, and what is computed there comes home.

Legend: T query and Tk key rows of this rank, U and Uk of all ranks that exchange; H query and Hk key heads, h and hk of
them on this rank; D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS, Inputs
from ringflash.parallel.planning.heads import HeadShares
from ringflash.parallel.transport.head_exchange import HeadExchange, Homeward, Outward

Guard = Callable[..., Any]
"""Calls a function; None if that fails, or something did before."""


class Crossing:
    """One pass of a call between ranks that exchange heads for tokens: one exchange before the plan, one behind.

    Args:
        exchange: between the ranks.
        inputs: of the call, this rank's tokens.
        gradients: of the backward pass: dout (T, H, Dv), log-sum-exp and delta (H, T) fp32.

    Attributes:
        heads: which of the query heads are here.
        inputs: the call as the plan takes it, once `go` was called.
        gradients: the same of the gradients.
        shares: which heads each rank has.
    """

    def __init__(
        self, exchange: HeadExchange, inputs: Inputs, gradients: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        self._exchange, self._own = exchange, inputs
        self.shares = HeadShares.of(inputs.query.shape[1], inputs.key.shape[1], exchange.ranks)
        first = exchange.place * self.shares.queries
        self.heads = slice(first, first + self.shares.queries)
        self._query = Outward(inputs.query, exchange.queries)
        self._keys = [Outward(self._copied(x), exchange.keys) for x in (inputs.key, inputs.value)]
        self._outward = [self._query, *self._keys]
        self._home: list[Homeward] = []
        self._looks: list[Callable[[], Tensor]] = []
        self.inputs = inputs._replace(
            query=self._query.result,
            key=self._keys[0].result,
            value=self._keys[1].result,
            key_visible=None if inputs.key_visible is None else self._cross_visible(inputs.key_visible),
            slopes=None if inputs.slopes is None else inputs.slopes[..., self.heads],
            sinks=None if inputs.sinks is None else inputs.sinks[self.heads],
        )
        self.gradients: tuple[Tensor, ...] = ()
        if gradients is not None:
            self._cross_gradients(*gradients)

    def _copied(self, of_keys: Tensor) -> Tensor:
        if not self.shares.copied:
            return of_keys
        return torch.stack([of_keys[:, head] for head in self.shares.key_heads], 1)

    def _cross_visible(self, key_visible: Tensor) -> Tensor:
        for_each = key_visible[:, None].expand(-1, self._exchange.ranks)  # as if it were of heads
        self._outward.append(Outward(for_each, self._exchange.keys))
        return self._outward[-1].result[:, 0]

    def _cross_gradients(self, dout: Tensor, lse: Tensor, delta: Tensor) -> None:
        rows = self._exchange.queries
        of_out, of_rows = Outward(dout, rows), Outward(torch.stack([lse, delta], -1).transpose(0, 1), rows)
        self._outward += [of_out, of_rows]
        self._of_rows = of_rows.result
        lse, delta = self._of_rows.new_empty(self._of_rows.shape[::-1])
        self.gradients = of_out.result, lse, delta

    def go(self) -> None:
        """Let everything cross."""
        self._exchange.run(self._outward)
        for x, of_rows in zip(self.gradients[1:], self._of_rows.unbind(-1) if self.gradients else (), strict=True):
            x.copy_(of_rows.T)
        self._outward = []

    # What comes home, for which there has to be room before ranks agree to begin

    def expect_out(self) -> None:
        """Make room for out and the log-sum-exp."""
        query, value = self._own.query, self._own.value
        out = self._expect(self._query, value.shape[-1], query.dtype)
        of_rows = self._expect(self._query, 1, torch.float32, again=False)
        self._looks = [out.joined, lambda: of_rows.joined()[..., 0].T.contiguous()]

    def out_home(self, guard: Guard, found: tuple[Tensor, Tensor] | None) -> list[Tensor] | None:
        """Let out (U, h, Dv) and log-sum-exp (h, U) travel; (T, H, Dv) and (H, T)."""
        return self._come_home(guard, () if found is None else (found[0], found[1].T[..., None]))

    def expect_gradients(self, needs: int, keys_dtype: torch.dtype) -> None:
        """Make room for gradients of query, key and value.

        Args:
            needs: which, as in `call.Settings`.
            keys_dtype: of those of key and value as they travel.
        """
        if needs & NEEDS["query"]:
            self._looks.append(self._expect(self._query, self._own.query.shape[-1], self._own.query.dtype).joined)
        for name, x in zip(("key", "value"), self._keys, strict=True):
            if needs & NEEDS[name]:
                home = self._expect(x, x.result.shape[-1], keys_dtype)
                self._looks.append(partial(self._of_key_heads, home))

    def gradients_home(self, guard: Guard, found: Sequence[Tensor] | None) -> list[Tensor] | None:
        """Let those gradients that are expected travel: (U, h, D), (Uk, hk, D), (Uk, hk, Dv); as the inputs were."""
        return self._come_home(guard, found or ())

    def _of_key_heads(self, home: Homeward) -> Tensor:
        key = self._own.key
        return (home.summed(self.shares, key.shape[1]) if self.shares.copied else home.joined()).to(key.dtype)

    def _expect(self, crossed: Outward, dim: int, dtype: torch.dtype, again: bool = True) -> Homeward:
        """Room for what is to come home, in the memory of what crossed unless that is taken `again` already."""
        shape = *crossed.result.shape[:2], dim
        self._home.append(Homeward(shape, dtype, crossed, again))
        return self._home[-1]

    def _come_home(self, guard: Guard, found: Sequence[Tensor]) -> list[Tensor] | None:
        for home, x in zip(self._home, found, strict=False):
            guard(home.fill, x)
        self._exchange.run(self._home)  # whatever failed: others wait for it
        return guard(lambda: [look() for look in self._looks])
