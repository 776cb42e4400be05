"""Blocks whose queries attend in rounds, on one device that holds a whole sequence.

A round is some rows of a block from its input to its output: all of a block but attention looks at one token at a time,
and attention at the keys so far. So of the length of a sequence are there only the stream of tokens, keys and values
(of grouped heads a fraction of the stream), and their gradients; queries, what attention gives, and what the
feed-forward makes of it are there for one round. The backward pass goes from the last round to the first: behind a
round, the gradients of its keys have all that they are to have. Gradients of keys and of weights are summed over rounds
in fp32, always in the same order.

Of each round its input, and attention's out and log-sum-exp, are kept on the device or in host memory, from where the
next round's come while one works. Attention never runs again.

Legend: T tokens, R of them in a round, C hidden size, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringflash.parallel.execution.query_rounds import RoundAttention
from ringflash.parallel.planning.query_rounds import QueryRound
from ringflash.recomputed import Region, here, within
from ringflash.training.memory.first_step import FirstStep
from ringflash.training.memory.host import Handle, HostMemory, Kept, Moved, store, twice
from ringflash.training.memory.rows import WeightSum, swiglu, swiglu_backward, weight_sums


@dataclass(frozen=True)
class Parts:
    """A block as it works on rows.

    Attributes:
        rounds: which rows when, from the first to the last.
        attention: how they attend.
        before: what attention is given: query (R, H, D), key and value (R, K, D), of rows (R, C) and which they are.
        keys: key and value alone.
        between: the stream (R, C) and its norm, of rows (R, C) and what attention gives for them (R, H, D).
        weights: of `before`, of `between`, and of the feed-forward (see `rows.swiglu`).
        whole: bytes that would be there beside what is kept if all rows of the block were computed again at once.
    """

    rounds: Sequence[QueryRound]
    attention: RoundAttention
    before: Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
    keys: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    weights: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
    whole: int


def in_rounds(parts: Parts, x_BTC: Tensor, keep: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
    """What a block gives, (B, T, C), without a graph.

    Args:
        parts: of the block.
        x_BTC: its input.
        keep: is given what attention gave for each round.
    """
    rows, result = x_BTC.flatten(0, 1), torch.empty_like(x_BTC, memory_format=torch.contiguous_format)
    rows_of_result = result.flatten(0, 1)
    whole: list[Tensor] = []
    for around in parts.rounds:
        query, *keys = parts.before(rows[around.rows], around.rows)
        whole = whole or [part.new_empty(len(rows), *part.shape[1:]) for part in keys]
        for all_rows, part in zip(whole, keys, strict=True):
            all_rows[around.rows] = part
        (key, value), attend, region = whole, parts.attention.forward, here.region
        if region is None:
            out, lse = attend(query, key, value, around)
        else:
            out, lse = region.attention(attend, (query, key, value, around))
        del query, keys  # before the feed-forward
        if keep is not None:
            keep(out, lse)
        stream, normed = parts.between(rows[around.rows], out)
        rows_of_result[around.rows] = swiglu(normed, *parts.weights[2]).add_(stream)
    return result


class RoundBlock:
    """One block of one forward pass, whose backward pass computes it again, round by round.

    Args:
        host: to which what is kept moves; None to keep it on the device.
        first_step: told what the block takes; None once that is known.
        module: the block as somebody calls it from outside.
        parts: of the block.
    """

    def __init__(
        self, host: HostMemory | None, first_step: FirstStep | None, module: Callable[..., Any], parts: Parts
    ) -> None:
        self._host, self._first_step, self._module, self._parts = host, first_step, module, parts
        self._kept = self._moved = 0
        self._inputs: list[Handle] = []
        self._attended: list[tuple[Handle, Handle]] = []
        self._source: Callable[[], Tensor] | None = None
        self._shape = torch.Size()

    @property
    def keeps_input(self) -> bool:
        """Whether it does, so that it may be run again for its output."""
        return bool(self._inputs)

    def run(self, source: Callable[[], Tensor] | None, x_BTC: Tensor) -> Tensor:
        """What the block gives; the graph of it holds what is kept.

        Args:
            source: gives the input in the backward pass; None to keep it.
            x_BTC: the input.
        """
        self._shape, self._source = x_BTC.shape, source
        if source is None:
            rows = x_BTC.detach().flatten(0, 1)
            self._inputs = [self._store(rows[around.rows]) for around in self._parts.rounds]
        weights = (weight for part in self._parts.weights for weight in part)
        result = _InRounds.apply(x_BTC, self, *weights)
        if self._first_step is not None:
            self._first_step.ran(self._kept, self._moved > 0)
            self._first_step.ran_again(self._parts.whole)
        return result

    def forward(self, x_BTC: Tensor) -> Tensor:
        """The rounds, which keep what attention gives."""
        return in_rounds(self._parts, x_BTC, self._keep)

    def output(self) -> Tensor:
        """The output once more, without a graph; everything stays as it is kept."""
        inputs = _Ahead([[each] for each in self._inputs], range(len(self._inputs)), again=True)
        x = torch.cat([rows for _ in self._inputs for rows in inputs.take()]).view(self._shape)
        with torch.no_grad(), within(_Given(self._attended)):
            found = self._module(x)
        return found

    def fetch(self) -> None:
        """Begin to bring back what is wanted first."""
        if self._inputs:
            self._inputs[0].fetch(again=True)

    def backward(self, dy_BTC: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the input and of all weights; what is kept is kept no longer.

        Args:
            dy_BTC: gradient of the output.
            needs: which of these somebody needs.
        """
        if not self._attended:
            raise twice()
        parts, dy = self._parts, dy_BTC.flatten(0, 1)
        inputs, attended, self._inputs, self._attended = self._take_inputs(), self._attended, [], []
        needed, rows = iter(needs[1:]), len(dy)
        sums = [weight_sums(part, [next(needed) for _ in part], rows) for part in parts.weights]
        dx = torch.empty_like(dy) if needs[0] else None
        backward = _Backward(parts, *self._keys(inputs), dy, dx, sums)
        order = range(len(parts.rounds) - 1, -1, -1)
        kept = _Ahead([(x, *of_attention) for x, of_attention in zip(inputs, attended, strict=True)], order)
        del inputs, attended
        for index in order:
            backward.round(parts.rounds[index], *kept.take())
        of_weights = [None if total is None else total.take() for part in sums for total in part]
        return [None if dx is None else dx.view(self._shape), *of_weights]

    def _keys(self, inputs: list[Handle]) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        ahead = _Ahead([[each] for each in inputs], range(len(inputs)), again=True)
        for around in self._parts.rounds:
            (x,) = ahead.take()
            keys = self._parts.keys(x, around.rows)
            found = found or [part.new_empty(self._shape[:-1].numel(), *part.shape[1:]) for part in keys]
            for whole, part in zip(found, keys, strict=True):
                whole[around.rows] = part
        return found[0], found[1]

    def _take_inputs(self) -> list[Handle]:
        if self._source is None:
            return self._inputs
        whole, self._source = self._source().flatten(0, 1), None
        return [Kept(whole[around.rows]) for around in self._parts.rounds]

    def _keep(self, out: Tensor, lse: Tensor) -> None:
        if self._host is not None:
            self._host.let_go()  # of the round before, whose way to the host this one's work has covered
        self._attended.append((self._store(out), self._store(lse)))

    def _store(self, x: Tensor) -> Handle:
        handle = store(x, self._host)
        self._kept += x.nbytes
        self._moved += x.nbytes if isinstance(handle, Moved) else 0
        return handle


class _InRounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: RoundBlock, *weights: Tensor) -> Tensor:
        ctx.block = block
        return block.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        need_x, _, *need = ctx.needs_input_grad
        dx, *of_weights = ctx.block.backward(dy, [need_x, *need])
        return (dx, None, *of_weights)


class _Backward:
    """The backward pass of a block, from its last round to its first one.

    Args:
        parts: of the block.
        key: (T, K, D).
        value: likewise.
        dy: (T, C), gradient of the output.
        dx: (T, C), to be filled with that of the input; None if nobody needs it.
        sums: for those weights whose gradients somebody needs, as in `Parts.weights`.
    """

    def __init__(
        self,
        parts: Parts,
        key: Tensor,
        value: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        sums: Sequence[Sequence[WeightSum | None]],
    ) -> None:
        self._parts, self._keys, self._dy, self._dx, self._sums = parts, (key, value), dy, dx, sums
        more = torch.promote_types(key.dtype, torch.float32)
        self._dkeys = [torch.zeros_like(x, dtype=more) for x in self._keys]

    def round(self, around: QueryRound, x: Tensor, out: Tensor, lse: Tensor) -> None:
        """Take one round; those behind it have been.

        Args:
            around: which.
            x: (R, C), its rows of the input.
            out: (R, H, D), what attention gave.
            lse: likewise.
        """
        dstream, dout = self._behind_attention(around, x, out)
        rows, dtype = around.rows, x.dtype
        x = x.detach().requires_grad_(self._dx is not None)
        with torch.enable_grad():
            projected = self._parts.before(x, rows)
        dquery = self._parts.attention.backward(
            dout, out, lse, projected[0].detach(), *self._keys, around, *self._dkeys
        )
        del dout
        douts = dquery, *(whole[rows].to(dtype) for whole in self._dkeys)
        found = self._gradients(projected, (x,), douts, 0, len(x))[0]
        if self._dx is not None and dstream is not None and found is not None:
            torch.add(dstream, found, out=self._dx[rows])

    def _behind_attention(self, around: QueryRound, x: Tensor, out: Tensor) -> tuple[Tensor | None, Tensor]:
        """Gradients of the input, as far as it went past attention, and of out."""
        dy = self._dy[around.rows]
        x, out = x.detach().requires_grad_(self._dx is not None), out.detach().requires_grad_()
        with torch.enable_grad():
            stream, normed = self._parts.between(x, out)
        dnormed = swiglu_backward(normed.detach(), self._parts.weights[2], dy, self._sums[2])
        dstream, dout = self._gradients((stream, normed), (x, out), (dy, dnormed), 1, len(x))
        assert dout is not None
        return dstream, dout

    def _gradients(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        douts: Sequence[Tensor | None],
        part: int,
        rows: int,
    ) -> list[Tensor | None]:
        """Those of the inputs; those of the weights of a part go into their sums."""
        sums = self._sums[part]
        weights = [weight for weight, total in zip(self._parts.weights[part], sums, strict=True) if total is not None]
        own = [each for each in inputs if each.requires_grad]
        learned = [(x, dx) for x, dx in zip(outputs, douts, strict=True) if x.requires_grad]
        if not own and not weights:
            return [None] * len(inputs)
        found = torch.autograd.grad([x for x, _ in learned], [*own, *weights], [dx for _, dx in learned])
        for total, gradient in zip([each for each in sums if each is not None], found[len(own) :], strict=True):
            total.add(gradient, rows)
        of_inputs = iter(found)
        return [next(of_inputs) if each.requires_grad else None for each in inputs]


class _Ahead:
    """Tensors that were kept, which come while the ones before them are at work.

    Args:
        kept: what belongs together.
        order: in which it is wanted.
        again: it stays where it is; else nothing holds on to it.
    """

    def __init__(self, kept: Sequence[Sequence[Handle]], order: Iterable[int], again: bool = False) -> None:
        self._coming, self._again = deque([*kept[index]] for index in order), again

    def take(self) -> list[Tensor]:
        """The next ones."""
        handles = self._coming.popleft()
        for handle in (*handles, *(self._coming[0] if self._coming else ())):
            handle.fetch(self._again)
        return [handle.get() for handle in handles]


class _Given(Region):
    """Rounds that run for their output alone.

    Args:
        attended: what attention gave for each.
    """

    def __init__(self, attended: list[tuple[Handle, Handle]]) -> None:
        self._found = _Ahead(attended, range(len(attended)), again=True)

    def attention(self, operator: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """See Region."""
        out, lse = self._found.take()
        return out, lse

    def spared(self, size: int) -> None:
        """See Region."""
