"""The parts of a block that look at one token at a time, in tiles of tokens.

Beside their inputs and outputs they have no more at hand than one tile takes, however long a shard is: nothing as wide
as the feed-forward, and nothing in fp32, exists for all of its tokens. How many tokens make a tile follows from widths
alone, and no tile communicates, so that ranks with other numbers of tokens need not agree on how many they have. All
weights are used once in a pass, so that engines see each gradient once, and whole.

Legend: B sequences, T tokens, C hidden size, F width of the feed-forward, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from ringflash.kernels.torch_private import has_gradient_hooks
from ringflash.recomputed import here

TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Elements of one tensor of a tile: as many as stay in a core's cache, or as keep a GPU's products busy."""

FP32_SHARE = 4
"""Tiles of what is computed in fp32, element by element, are smaller by this: they need no more to keep a GPU busy."""


def swiglu(x_BTC: Tensor, gate_FC: Tensor, up_FC: Tensor, down_CF: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T (Shazeer, arXiv 2002.05202), (B, T, C).

    For the backward pass x is kept, and what it makes of gate and up unless it runs in a `ringflash.recomputed.Region`.

    Args:
        x_BTC: activations.
        gate_FC: weight; used in the dtype of x, as the others are.
        up_FC: likewise.
        down_CF: likewise.
    """
    held = _Box()
    return _SwiGLU.apply(_Held.apply(x_BTC, held), gate_FC, up_FC, down_CF, held, torch.is_grad_enabled())


def swiglu_backward(
    rows: Tensor,
    weights: Sequence[Tensor],
    dout: Tensor,
    sums: Sequence[WeightSum | None],
    kept: Sequence[Tensor] = (),
    need_x: bool = True,
) -> Tensor | None:
    """Gradient of the rows (T, C) of `swiglu`; those of the weights are added to their sums.

    Args:
        rows: x.
        weights: of gate, up and down.
        dout: (T, C).
        sums: of gate, up and down; None for those whose gradient nobody needs.
        kept: products of x with gate and up, (T, F) each; none if they are to be computed again.
        need_x: whether somebody needs the rows' gradient.
    """
    gate, up, down = (weight.to(rows.dtype) for weight in weights)
    dx = torch.empty_like(rows) if need_x else None
    for tile in tiles(len(rows), gate.shape[0], rows.device):
        gated, raised = [each[tile] for each in kept] or [rows[tile] @ weight.T for weight in (gate, up)]
        activated, dgated, draised = _silu_product_backward(gated, raised, dout[tile] @ down)
        for total, left, right in zip(
            sums, (dgated, draised, dout[tile]), (rows[tile], rows[tile], activated), strict=True
        ):
            if total is not None:
                total.add(left.T @ right, of_all=len(left))
        if dx is not None:
            torch.mm(dgated, gate, out=dx[tile])
            dx[tile].addmm_(draised, up)
    return dx


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x (..., C) over their root mean squares, in fp32, then scaled; same shape and dtype."""
    if torch.compiler.is_compiling():  # what is in fp32 stays in registers
        return _normed(x, weight.float(), eps)
    if x.device.type == "cuda" and x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel, which has fp32 in its registers alone
    return _RMSNorm.apply(x, weight, eps)


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (d, d + D/2) of a head by its position's angle, in fp32; same dtype out.

    Args:
        x_BTHD: queries or keys.
        cos: (B, T, 1, D/2) fp32; no gradient.
        sin: likewise.
    """
    return _turned(x_BTHD, cos, sin) if torch.compiler.is_compiling() else _Rotate.apply(x_BTHD, cos, sin)


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor], width: int, tokens: int, elements: int
) -> Tensor:
    """What a function of each token gives, tile by tile; in the backward pass each tile is computed again.

    Where the tokens of a rank are one tile on average, this is the function. Ranks do the same, whatever each has: the
    two have weights' gradients ready in another order, in which ZeRO 2 sums what ranks have. It is, too, where
    something is to happen to a weight's gradient, of which tiles find parts.

    Args:
        function: of (1, T, C) for any T, without a word to other ranks.
        x: (B, T, C).
        weights: that it uses.
        width: of the widest that it makes of a token.
        tokens: of a rank on average.
        elements: of that width in a tile, see `TILE_ELEMENTS`.
    """
    if tokens * width <= elements or any(map(has_gradient_hooks, weights)):
        return function(x)
    held, call = _Box(), _Call(function, max(1, elements // width), x.device)
    return _Tiled.apply(_Held.apply(x, held), held, call, *weights)


def tiles(rows: int, width: int, device: torch.device, share: int = 1) -> Iterator[slice]:
    """Slices of so many rows of which each holds about as many elements as a tile may.

    Args:
        rows: of all tiles together.
        width: elements of a row.
        device: where they are.
        share: by which tiles are smaller.
    """
    return _slices(rows, max(1, TILE_ELEMENTS[device.type] // share // width))


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


class _Box:
    """Where the backward pass of what is in tiles finds what `_Held` keeps."""

    context: Any = None

    def beside(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input, to be saved by who has it in front of anything else, if it is not kept here."""
        return (x,) if self.context is None else ()

    def taken(self, saved: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input, and what else was saved."""
        return (saved[0], saved[1:]) if self.context is None else (self.context.saved_tensors[0], saved)


class _Held(torch.autograd.Function):
    """Keeps an input before what has it runs: where that is computed again, nothing may want more of it than this.

    It cannot keep what has no gradient, as then it is no part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Box) -> Tensor:
        ctx.save_for_backward(x)
        held.context = ctx if ctx.needs_input_grad[0] else None
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        return dx, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, held: _Box, backward: bool) -> Tensor:
        ctx.held, ctx.weights = held, (gate, up, down)
        rows, width = x.flatten(0, -2), gate.shape[0]
        gate, up, down = (weight.to(x.dtype) for weight in ctx.weights)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows_of_out = out.flatten(0, -2)
        region, size = here.region, 2 * len(rows) * width * x.element_size()
        if region is not None:
            region.spared(size)
        wanted = region is None and backward and any(ctx.needs_input_grad)  # these say nothing of torch.no_grad
        kept = [x.new_empty(len(rows), width) for _ in range(2 if wanted else 0)]
        for tile in tiles(len(rows), width, x.device):
            gated, raised = (rows[tile] @ weight.T for weight in (gate, up))
            if kept:
                kept[0][tile], kept[1][tile] = gated, raised
            torch.mm(_silu_product(gated, raised), down.T, out=rows_of_out[tile])
        ctx.save_for_backward(*held.beside(x), *kept)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        x, kept = ctx.held.taken(ctx.saved_tensors)
        rows, dout = x.flatten(0, -2), dout.flatten(0, -2)
        need_x, *need = ctx.needs_input_grad
        sums = weight_sums(ctx.weights, need[:3], len(rows))
        dx = swiglu_backward(rows, ctx.weights, dout, sums, kept, need_x)
        return (None if dx is None else dx.view(x.shape), *(total and total.take() for total in sums), None, None)


def _silu_product(gated: Tensor, raised: Tensor) -> Tensor:
    fused = _fused(gated)
    return F.silu(gated).mul_(raised) if fused is None else fused.silu_product(gated, raised)


def _silu_product_backward(gated: Tensor, raised: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The product, and the gradients of both."""
    if (fused := _fused(gated)) is not None:
        return fused.silu_product_backward(gated, raised, dout)
    gated, raised = (x.detach().requires_grad_() for x in (gated, raised))
    with torch.enable_grad():
        activated = F.silu(gated) * raised
    dgated, draised = torch.autograd.grad(activated, (gated, raised), dout)
    return activated.detach(), dgated, draised


class WeightSum:
    """The gradient of a weight, part by part; in fp32 at least if there are several parts.

    Args:
        weight: whose.
        rows: tokens that it is the sum over.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight, self._rows = weight, rows
        self._whole: Tensor | None = None

    def add(self, part: Tensor, of_all: int) -> None:
        """Add the gradient over so many of the tokens."""
        if self._whole is None:
            more = torch.promote_types(part.dtype, torch.float32)
            self._whole = part if of_all == self._rows else part.to(more)
        else:
            self._whole += part

    def take(self) -> Tensor:
        """The gradient, in the weight's dtype; zeros of no tokens, as engines sum what all ranks have."""
        return torch.zeros_like(self._weight) if self._whole is None else self._whole.to(self._weight.dtype)


def weight_sums(weights: Sequence[Tensor], need: Sequence[bool], rows: int) -> list[WeightSum | None]:
    """Sums over so many tokens for those weights whose gradients somebody needs."""
    return [WeightSum(weight, rows) if wanted else None for weight, wanted in zip(weights, need, strict=True)]


class _Call:
    """A function as it was called, of tiles of any rows."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, device: torch.device) -> None:
        self._function, self._size, self._device = function, size, device.type
        self._casts = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def __call__(self, rows: Tensor) -> Tensor:
        """(T, C) -> (T, C')."""
        enabled, dtype = self._casts
        # Autocast would hand on copies of weights that it made without a graph.
        with torch.autocast(self._device, dtype, enabled, cache_enabled=False):
            return self._function(rows[None])[0]

    def tiles(self, rows: Tensor) -> Iterator[slice]:
        """Of all rows."""
        return _slices(len(rows), self._size)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: _Box, call: _Call, *weights: Tensor) -> Tensor:
        ctx.held, ctx.call, ctx.weights = held, call, weights
        rows = x.flatten(0, -2)
        first, *rest = call.tiles(rows)
        part = call(rows[first])
        out = part.new_empty(*x.shape[:-1], part.shape[-1])
        rows_of_out = out.flatten(0, -2)
        rows_of_out[first] = part
        for tile in rest:
            rows_of_out[tile] = call(rows[tile])
        ctx.save_for_backward(*held.beside(x))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        x, _ = ctx.held.taken(ctx.saved_tensors)
        rows, dout = x.flatten(0, -2), dout.flatten(0, -2)
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        dx = torch.empty_like(rows) if need_x else None
        wanted = [weight for weight, each in zip(ctx.weights, need, strict=True) if each]
        sums = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in wanted]
        for tile in ctx.call.tiles(rows):
            own = rows[tile].detach().requires_grad_(need_x)
            with torch.enable_grad():
                out = ctx.call(own)
            inputs = [*([own] if need_x else []), *wanted]
            found = list(torch.autograd.grad(out, inputs, dout[tile]))
            if dx is not None:
                dx[tile] = found.pop(0)
            for total, part in zip(sums, found, strict=True):
                total += part
        of_weights = iter(total.to(weight.dtype) for total, weight in zip(sums, wanted, strict=True))
        gradients = (next(of_weights) if each else None for each in need)
        return (None if dx is None else dx.view(x.shape), None, None, *gradients)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.weight, ctx.eps = weight, eps
        ctx.save_for_backward(x)
        rows = x.flatten(0, -2)
        out = torch.empty_like(rows)
        for tile in tiles(len(rows), rows.shape[1], x.device, FP32_SHARE):
            out[tile] = _normed(rows[tile], weight.float(), eps)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        (x,) = ctx.saved_tensors
        rows, dout = x.flatten(0, -2), dout.flatten(0, -2)
        dx, dweight = torch.empty_like(rows), torch.zeros_like(ctx.weight, dtype=torch.float32)
        for tile in tiles(len(rows), rows.shape[1], x.device, FP32_SHARE):
            own, weight = rows[tile].detach().requires_grad_(), ctx.weight.detach().float().requires_grad_()
            with torch.enable_grad():
                out = _normed(own, weight, ctx.eps)
            dx[tile], part = torch.autograd.grad(out, (own, weight), dout[tile])
            dweight += part
        return dx.view(x.shape), dweight.to(ctx.weight.dtype), None


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Of a tile; the weight is in fp32."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:  # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
        cos, sin = ctx.saved_tensors
        return _rotated(dout, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    rows, cos, sin = (each.flatten(0, 1) for each in (x, cos, sin))
    if (fused := _fused(x)) is not None:
        return fused.rotate(rows.contiguous(), cos.contiguous(), sin.contiguous(), sign).view(x.shape)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for tile in tiles(len(rows), rows[:1].numel() or 1, x.device, FP32_SHARE):
        out[tile] = _turned(rows[tile], cos[tile], sign * sin[tile])
    return out.view(x.shape)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _fused(x: Tensor) -> ModuleType | None:
    """Kernels for what has no product in it, where there are any for such a tensor."""
    if x.device.type != "cuda":
        return None
    from ringflash.kernels.gpu import elementwise  # an optional library

    return elementwise if elementwise.supports(x) else None
