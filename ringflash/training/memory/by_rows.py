"""Blocks that are computed again some rows at a time, of all but attention, which alone looks at more than one token.

Such a block is one node of autograd, whose backward pass goes over the rows by itself: what a row-wise part makes of
all tokens is never there at once, and gradients of weights are summed over the rows in fp32, always in the same order.
What is kept of a block, on the device or in host memory, comes back rows by rows, the next ones while some are at work.

How attention is worked on is a subclass' own: in rounds (`rounds`), or at once (`at_once`).

Legend: T tokens, R of them at a time, C hidden size, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.torch_private import no_autocast
from ringflash.parallel.execution.query_rounds import RoundAttention
from ringflash.parallel.planning.query_rounds import QueryRound
from ringflash.training.memory.first_step import FirstStep
from ringflash.training.memory.host import Handle, HostMemory, Kept, Moved, pages_of, store, twice
from ringflash.training.memory.rows import WeightSum, swiglu, swiglu_backward, weight_sums


@dataclass(frozen=True)
class Parts:
    """A block as it works on rows, outside of autocast.

    Attributes:
        rows: which, from the first to the last.
        before: what attention is given: query (R, H, D), key and value (R, K, D), of rows (R, C) and which they are.
        keys: key and value alone.
        between: the stream (R, C) and its norm, of rows (R, C) and what attention gives for them (R, H, D).
        weights: of `before`, of `between`, and of the feed-forward (see `rows.swiglu`).
        at_once: attention of all queries, (T, H, D) of (T, H, D) and (T, K, D) twice.
        rounds: the same rows as rounds of queries, where one device can attend in them.
        in_rounds: how they attend.
        whole: bytes that would be there beside what is kept if all rows of the block were computed again at once.
    """

    rows: Sequence[slice]
    before: Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
    keys: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    weights: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
    at_once: Callable[[Tensor, Tensor, Tensor], Tensor]
    rounds: Sequence[QueryRound] | None
    in_rounds: RoundAttention
    whole: int

    def behind(self, x_RC: Tensor, out_RHD: Tensor) -> Tensor:
        """The block's output (R, C), of its input and of what attention gives."""
        stream, normed = self.between(x_RC, out_RHD)
        return swiglu(normed, *self.weights[2]).add_(stream)


class RowBlock(ABC):
    """One block of one forward pass.

    Args:
        host: to which what is kept moves; None to keep it on the device.
        first_step: told what the block takes; None once that is known.
        module: the block as somebody calls it from outside.
        parts: of the block.

    Attributes:
        kept: bytes that it keeps, on the device or moved.
        pages: of the host that this takes where it moves, as far as there was room.
    """

    def __init__(
        self, host: HostMemory | None, first_step: FirstStep | None, module: Callable[..., Any], parts: Parts
    ) -> None:
        self._host, self._first_step, self._module, self._parts = host, first_step, module, parts
        self.kept = self.pages = self._moved = 0
        self._inputs: list[Handle] = []
        self._source: Callable[[], Tensor] | None = None
        self._shape = torch.Size()
        self._done = False

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
            whole = x_BTC.detach().flatten(0, 1)
            self._inputs = [self._store(whole[rows]) for rows in self._parts.rows]
        weights = (weight for part in self._parts.weights for weight in part)
        result = _ByRows.apply(x_BTC, self, *weights)
        if self._first_step is not None:
            self._first_step.ran(self.kept, self._moved > 0)
            self._first_step.ran_again(self._parts.whole)
        return result

    def output(self) -> Tensor:
        """The output once more, without a graph; everything stays as it is kept."""
        if not self._inputs:
            raise twice()
        inputs = Ahead([[each] for each in self._inputs], again=True)
        x = torch.cat([inputs.take_one() for _ in self._inputs]).view(self._shape)
        with torch.no_grad():
            return self.output_of(x)

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
        if self._done:
            raise twice()
        self._done = True
        inputs, self._inputs = self._take_inputs(), []
        gradients = Gradients(self._parts, dy_BTC.flatten(0, 1), needs)
        self.backward_of(inputs, gradients)
        dx = gradients.dx
        return [None if dx is None else dx.view(self._shape), *gradients.of_weights()]

    @staticmethod
    @abstractmethod
    def without_graph(parts: Parts, x_BTC: Tensor, keep: Callable[..., None] | None = None) -> Tensor:
        """What a block gives, (B, T, C), without a graph.

        Args:
            parts: of the block.
            x_BTC: its input.
            keep: is given what attention gave, of rows as they attend.
        """

    @abstractmethod
    def forward(self, x_BTC: Tensor) -> Tensor:
        """The block, without a graph; keeps what attention gives."""

    @abstractmethod
    def output_of(self, x_BTC: Tensor) -> Tensor:
        """What the block gives, by way of its module, with what attention gave."""

    @abstractmethod
    def backward_of(self, inputs: list[Handle], gradients: Gradients) -> None:
        """The backward pass.

        Args:
            inputs: the input, rows by rows.
            gradients: to be found.
        """

    def of_all_rows(
        self, inputs: Sequence[Handle], of_rows: Callable[[Tensor, slice], Sequence[Tensor]]
    ) -> list[Tensor]:
        """What a part of the block makes of the input, (T, ...) each; the input stays as it is kept.

        Args:
            inputs: the input, rows by rows.
            of_rows: of rows (R, C) and which they are.
        """
        ahead = Ahead([[each] for each in inputs], again=True)
        return filled(self._parts, self._shape[:-1].numel(), lambda rows: of_rows(ahead.take_one(), rows))

    def _take_inputs(self) -> list[Handle]:
        if self._source is None:
            return self._inputs
        whole, self._source = self._source().flatten(0, 1), None
        return [Kept(whole[rows]) for rows in self._parts.rows]

    def _store(self, x: Tensor) -> Handle:
        handle = store(x, self._host)
        self.kept += x.nbytes
        self.pages += pages_of(x) if self._host is None or isinstance(handle, Moved) else 0
        self._moved += x.nbytes if isinstance(handle, Moved) else 0
        return handle


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: RowBlock, *weights: Tensor) -> Tensor:
        ctx.block = block
        return block.forward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        need_x, _, *need = ctx.needs_input_grad
        with no_autocast():  # in which the forward pass was not, see `Parts`
            dx, *of_weights = ctx.block.backward(dy, [need_x, *need])
        return (dx, None, *of_weights)


class Projected(NamedTuple):
    """Rows of a block's input (R, C), and what attention is given of them, with a graph."""

    x: Tensor
    given: tuple[Tensor, Tensor, Tensor]


class Gradients:
    """Gradients of a block, as its rows are worked on.

    Args:
        parts: of the block.
        dy: (T, C), gradient of the output.
        needs: which gradients somebody needs, of the input and of each weight.

    Attributes:
        dx: (T, C), that of the input; None if nobody needs it.
    """

    def __init__(self, parts: Parts, dy: Tensor, needs: Sequence[bool]) -> None:
        needed = iter(needs[1:])
        self._parts, self._dy = parts, dy
        self._sums = [weight_sums(part, [next(needed) for _ in part], len(dy)) for part in parts.weights]
        self.dx = torch.empty_like(dy) if needs[0] else None

    def behind_attention(self, rows: slice, x: Tensor, out: Tensor) -> Tensor:
        """Gradient of what attention gave; that of the input begins, with what went past attention.

        Args:
            rows: which.
            x: (R, C), these of the input.
            out: (R, H, D), what attention gave for them.
        """
        dy = self._dy[rows]
        x, out = x.detach().requires_grad_(self.dx is not None), out.detach().requires_grad_()
        with torch.enable_grad():
            stream, normed = self._parts.between(x, out)
        dnormed = swiglu_backward(normed.detach(), self._parts.weights[2], dy, self._sums[2])
        dx, dout = self._found((stream, normed), (x, out), (dy, dnormed), 1)
        assert dout is not None
        if self.dx is not None and dx is not None:
            self.dx[rows] = dx
        return dout

    def projected(self, rows: slice, x: Tensor) -> Projected:
        """What attention is given, once more.

        Args:
            rows: which.
            x: (R, C), these of the input.
        """
        x = x.detach().requires_grad_(self.dx is not None)
        with torch.enable_grad():
            return Projected(x, self._parts.before(x, rows))

    def before_attention(self, rows: slice, projected: Projected, of_attention: Sequence[Tensor]) -> None:
        """That of the input, with what went through attention; comes behind `behind_attention`.

        Args:
            rows: which.
            projected: of these rows.
            of_attention: gradients of query, key and value.
        """
        (dx,) = self._found(projected.given, (projected.x,), of_attention, 0)
        if self.dx is not None and dx is not None:
            self.dx[rows] += dx

    def of_weights(self) -> list[Tensor | None]:
        """Those of all weights, once all rows have been."""
        return [None if total is None else total.take() for part in self._sums for total in part]

    def _found(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], douts: Sequence[Tensor | None], part: int
    ) -> list[Tensor | None]:
        """Those of the inputs; those of the weights of a part go into their sums."""
        sums: list[WeightSum] = [total for total in self._sums[part] if total is not None]
        weights = [
            weight
            for weight, total in zip(self._parts.weights[part], self._sums[part], strict=True)
            if total is not None
        ]
        own = [each for each in inputs if each.requires_grad]
        if not own and not weights:
            return [None] * len(inputs)
        learned = [(x, dx) for x, dx in zip(outputs, douts, strict=True) if x.requires_grad]
        found = torch.autograd.grad([x for x, _ in learned], [*own, *weights], [dx for _, dx in learned])
        for total, gradient in zip(sums, found[len(own) :], strict=True):
            total.add(gradient, len(inputs[0]))
        of_inputs = iter(found)
        return [next(of_inputs) if each.requires_grad else None for each in inputs]


class Ahead:
    """Tensors that were kept, which come while the ones before them are at work.

    Args:
        kept: what belongs together, in the order in which it is wanted.
        again: it stays where it is; else nothing here holds on to it.
    """

    def __init__(self, kept: Iterable[Sequence[Handle]], again: bool = False) -> None:
        self._coming, self._again = deque([*handles] for handles in kept), again

    def take(self) -> list[Tensor]:
        """The next ones."""
        handles = self._coming.popleft()
        for handle in (*handles, *(self._coming[0] if self._coming else ())):
            handle.fetch(self._again)
        return [handle.get() for handle in handles]

    def take_one(self) -> Tensor:
        """The next one, where nothing belongs together."""
        (found,) = self.take()
        return found


def filled(parts: Parts, count: int, of_rows: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors of all rows, (T, ...) each, from what a function gives of some.

    Args:
        parts: of a block.
        count: T.
        of_rows: called for all rows, from the first to the last.
    """
    whole: list[Tensor] = []
    for rows in parts.rows:
        found = of_rows(rows)
        whole = whole or [part.new_empty(count, *part.shape[1:]) for part in found]
        for tensor, part in zip(whole, found, strict=True):
            tensor[rows] = part
    return whole
