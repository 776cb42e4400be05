"""Exact attention in torch operators only: what runs on CPU, and on any device where Triton is absent.

The visible pairs of a call are cut into few large rectangles (rectangles.py). On CPU a rectangle is one call of torch's
fused operator, which returns the log-sum-exp; elsewhere, with modifiers, and where value has another head dimension, it
is a few matrix products (rectangle_attention.py). Rectangles of the same rows are merged by their log-sum-exp, so
memory grows with T and never with T x S.

Arithmetic is float32 for fp16, bf16 and fp32, and float64 for float64. The contract is that of reference.py.

Legend: T query rows, S key rows, H query heads, Hk key heads, G = H / Hk query heads of each key head, D head
dimension, Dv value's. Suffix _HGTD: dimensions in that order, views of (T, H, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.cpu.rectangle_attention import Fused, MatrixProducts, Scoring
from ringflash.kernels.cpu.rectangles import rectangles
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import check_blocks
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry
from ringflash.kernels.sinks import sink_gradient, with_sinks
from ringflash.kernels.sums import add_rows

__all__ = ["add_rows", "attend", "attend_backward", "row_delta", "sink_gradient"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> Carry:
    """Attention of every query row to the key rows it may see, merged into `carry`; see `reference.attend`."""
    out_dtype = out_dtype or query.dtype
    heads, dtype = query.shape[1], _accumulator(query.dtype)
    if carry is None:
        out = query.new_zeros((query.shape[0], heads, value.shape[2]), dtype=dtype)
        lse = query.new_full((heads, query.shape[0]), -torch.inf, dtype=dtype)
    else:
        out, lse = carry[0].to(dtype), carry[1].to(dtype)
    out_HGTD, lse_HGT = _grouped(out, key.shape[1]), lse.unflatten(0, (key.shape[1], -1))
    q, k, v = _operands(query, key, value)
    math, scoring = _math(query, value, modifiers), Scoring(intervals, scale, modifiers)
    _check(query, key, intervals)
    for rectangle in rectangles(intervals, math is Fused, key.shape[1]):
        rows, keys, heads = rectangle.rows, rectangle.keys, rectangle.heads
        of_keys = k[heads, :, keys], v[heads, :, keys]
        rectangle_out, rectangle_lse = math.forward(q[heads, :, rows], *of_keys, rectangle, scoring)
        _merge(out_HGTD[heads, :, rows], lse_HGT[heads, :, rows], rectangle_out, rectangle_lse)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out.to(out_dtype), lse.float()


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` over these keys; see `reference.attend_backward`.

    Rectangles are added in a fixed order: the result repeats bit for bit with and without `deterministic`.
    """
    key_heads, dtype = key.shape[1], _accumulator(query.dtype)
    dquery = query.new_zeros(query.shape, dtype=dtype) if carry is None else carry.to(dtype)
    dkey, dvalue = key.new_zeros(key.shape, dtype=dtype), value.new_zeros(value.shape, dtype=dtype)
    dq_HGTD, dk_HSD, dv_HSD = _grouped(dquery, key_heads), dkey.transpose(0, 1), dvalue.transpose(0, 1)

    q, k, v = _operands(query, key, value)
    math, scoring = _math(query, value, modifiers), Scoring(intervals, scale, modifiers)
    do = _grouped(_operand(dout, dtype), key_heads)
    do, of_delta = math.prepare(do, delta.to(dtype).unflatten(0, (key_heads, -1)))
    # A row without keys has lse -inf and only hidden pairs; 0 keeps exp(hidden - lse) at 0 instead of nan.
    lse_HGT = lse.to(dtype).nan_to_num(neginf=0.0).unflatten(0, (key_heads, -1))
    _check(query, key, intervals)
    for rectangle in rectangles(intervals, math is Fused, key_heads):
        rows, keys, heads = rectangle.rows, rectangle.keys, rectangle.heads
        of_rows = (do[heads, :, rows], of_delta[heads, :, rows], lse_HGT[heads, :, rows], q[heads, :, rows])
        dq, dk, dv = math.backward(*of_rows, k[heads, :, keys], v[heads, :, keys], rectangle, scoring)
        dq_HGTD[heads, :, rows] += dq
        dk_HSD[heads, keys] += dk
        dv_HSD[heads, keys] += dv
    dkey_dtype = dkey_dtype or key.dtype
    return dquery.to(dquery_dtype or query.dtype), dkey.to(dkey_dtype), dvalue.to(dkey_dtype)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """sum_d dout * out - dlse for each row and head, (H, T) fp32; see `reference.row_delta`."""
    dtype = _accumulator(out.dtype)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).T
    return (delta if dlse is None else delta - dlse).float().contiguous()


def _check(query: Tensor, key: Tensor, intervals: KeyIntervals) -> None:
    if intervals.blocks is not None:
        check_blocks(intervals.blocks, query, key)


def _math(query: Tensor, value: Tensor, modifiers: Modifiers | None) -> type[Fused] | type[MatrixProducts]:
    fused = query.device.type == "cpu" and query.shape[2] == value.shape[2] and modifiers is None
    return Fused if fused else MatrixProducts


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as (Hk, G, rows, D) in the accumulator's dtype; all G share their key head's memory."""
    heads, key_heads, dtype = query.shape[1], key.shape[1], _accumulator(query.dtype)
    q, k, v = (_grouped(_operand(x, dtype), key_heads) for x in (query, key, value))
    return q, k.expand(-1, heads // key_heads, -1, -1), v.expand(-1, heads // key_heads, -1, -1)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    # BLAS takes a row stride of at least the width; gradients of sums come with strides of 0.
    width = x.shape[2]
    plain = x.stride(2) == 1 and x.stride(0) >= width and x.stride(1) >= width
    return x if plain else x.clone(memory_format=torch.contiguous_format)


def _grouped(x: Tensor, key_heads: int) -> Tensor:
    """(T, H, D) viewed as (Hk, G, T, D)."""
    return x.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)


def _merge(out: Tensor, lse: Tensor, rectangle_out: Tensor, rectangle_lse: Tensor) -> None:
    """Adds a rectangle's keys to (out, lse), both in place."""
    merged = torch.logaddexp(lse, rectangle_lse)
    finite = merged.nan_to_num(neginf=0.0)
    out *= torch.exp(lse - finite)[..., None]
    out += rectangle_out * torch.exp(rectangle_lse - finite)[..., None]
    lse.copy_(merged)
