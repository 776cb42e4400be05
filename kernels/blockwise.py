"""Exact attention in torch operators only: what runs on CPU, and on any device where Triton is absent.

The visible pairs of a launch are cut into few large rectangles (tiles). A document under a causal mask is one tile
however long it is, the interior of a window needs no mask, and what nobody sees is never computed. On CPU a tile is one
call of torch's fused operator, which returns the log-sum-exp; elsewhere, and where value has another head dimension, it
is a few matrix products. Tiles of the same rows are merged by their log-sum-exp: memory grows with T, not with T x S.

Arithmetic is float32 for fp16, bf16 and fp32, and float64 for float64. The contract is that of reference.py.

Legend: T query rows, S key rows, H query heads, Hk key heads, G = H / Hk query heads of each key head, D head
dimension, Dv value's; R rows and K keys of one tile. Suffix _HGTD: dimensions in that order, a view where possible.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.reference import Carry

STRIP = 128
"""Rows of a tile whose rows see different keys, unless they follow one of the two patterns of `_strips`."""

BLOCK = (256, 1024)
"""Rows and keys of a matrix-product tile: bounds its scores to 1 MiB for each head."""


class Kind(enum.Enum):
    """Which pairs of a tile are visible."""

    FULL = "all of them"
    CAUSAL = "row i of the tile sees its keys up to i; as many keys as rows"
    PARTIAL = "each pair has to be looked at"


class Tile(NamedTuple):
    """A rectangle of query rows x key rows, and which range of the rows it shows: 0 for keys, 1 for sink keys."""

    rows: slice
    keys: slice
    kind: Kind
    range: int


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
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
    fused = _has_fused(query, value)
    tile_forward = _fused_forward if fused else _matmul_forward
    for tile in _tiles(intervals, fused):
        rows, keys = tile.rows, tile.keys
        tile_out, tile_lse = tile_forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, tile, intervals)
        _merge(out_HGTD[:, :, rows], lse_HGT[:, :, rows], tile_out, tile_lse)
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
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` over these keys; see `reference.attend_backward`.

    Tiles are added in a fixed order: the result repeats bit for bit with and without `deterministic`.
    """
    key_heads, dtype = key.shape[1], _accumulator(query.dtype)
    dquery = query.new_zeros(query.shape, dtype=dtype) if carry is None else carry.to(dtype)
    dkey, dvalue = key.new_zeros(key.shape, dtype=dtype), value.new_zeros(value.shape, dtype=dtype)
    dq_HGTD, dk_HSD, dv_HSD = _grouped(dquery, key_heads), dkey.transpose(0, 1), dvalue.transpose(0, 1)

    q, k, v = _operands(query, key, value)
    do = _grouped(_operand(dout, dtype), key_heads)
    do, out = _stand_in_for_out(do, delta.to(dtype).unflatten(0, (key_heads, -1)))
    # A row without keys has lse -inf and only hidden pairs; 0 keeps exp(hidden - lse) at 0 instead of nan.
    lse_HGT = lse.to(dtype).nan_to_num(neginf=0.0).unflatten(0, (key_heads, -1))
    fused = _has_fused(query, value)
    tile_backward = _fused_backward if fused else _matmul_backward
    for tile in _tiles(intervals, fused):
        rows, keys = tile.rows, tile.keys
        of_rows = (do[:, :, rows], out[:, :, rows], lse_HGT[:, :, rows], q[:, :, rows])
        dq, dk, dv = tile_backward(*of_rows, k[:, :, keys], v[:, :, keys], scale, tile, intervals)
        dq_HGTD[:, :, rows] += dq
        dk_HSD[:, keys] += dk
        dv_HSD[:, keys] += dv
    dkey_dtype = dkey_dtype or key.dtype
    return dquery.to(dquery_dtype or query.dtype), dkey.to(dkey_dtype), dvalue.to(dkey_dtype)


def row_delta(dout: Tensor, out: Tensor, dlse: Tensor | None = None) -> Tensor:
    """sum_d dout * out - dlse for each row and head, (H, T) fp32; see `reference.row_delta`."""
    dtype = _accumulator(out.dtype)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).T
    return (delta if dlse is None else delta - dlse).float().contiguous()


# Operands


def _has_fused(query: Tensor, value: Tensor) -> bool:
    """Whether torch's fused operator takes these."""
    return query.device.type == "cpu" and query.shape[2] == value.shape[2]


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


def _stand_in_for_out(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """A pair (dout, out) whose row products are `delta`.

    The fused backward takes out only to form sum_d dout * out. That sum is given here, with the log-sum-exp's gradient
    already in it, so out becomes the multiple of dout that has it. A sum of squares loses nothing to cancellation.
    """
    largest = dout.abs().amax(-1, keepdim=True)
    # Where dout (all but) vanishes and delta does not, as for a loss of the log-sum-exp alone, no multiple reaches it:
    # a dout too small to be seen beside delta takes its place.
    least = delta.abs()[..., None] * 2.0**-60
    dout = torch.where(largest < least, least, dout)
    largest = torch.maximum(largest, least)
    direction = dout / torch.where(largest > 0, largest, 1)
    square = (direction * direction).sum(-1, keepdim=True)
    factor = delta[..., None] / (largest * square)
    return dout, direction * torch.where(largest > 0, factor, 0)


def _merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Adds a tile's keys to (out, lse), both in place."""
    merged = torch.logaddexp(lse, tile_lse)
    finite = merged.nan_to_num(neginf=0.0)
    out *= torch.exp(lse - finite)[..., None]
    out += tile_out * torch.exp(tile_lse - finite)[..., None]
    lse.copy_(merged)


# Tiles of torch's fused CPU operator


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: Tile, intervals: KeyIntervals
) -> tuple[Tensor, Tensor]:
    mask = _visible(tile, intervals)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=tile.kind is Kind.CAUSAL, attn_mask=_additive(mask, q.dtype), scale=scale
    )
    # The operator reports 0 for a row whose every key is masked.
    return out, lse if mask is None else lse.masked_fill(~mask.any(1), -torch.inf)


def _fused_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: Tile,
    intervals: KeyIntervals,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dropout_p=0.0,
        is_causal=tile.kind is Kind.CAUSAL,
        attn_mask=_additive(_visible(tile, intervals), q.dtype),
        scale=scale,
    )
    return dq, dk.sum(1), dv.sum(1)


def _additive(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


# Tiles of matrix products


def _matmul_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, tile: Tile, intervals: KeyIntervals
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, tile, intervals)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp_(scores.sub_(lse.nan_to_num(neginf=0.0)[..., None]))
    return (weights.flatten(1, 2) @ v[:, 0]).unflatten(1, q.shape[1:3]), lse


def _matmul_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    tile: Tile,
    intervals: KeyIntervals,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.exp_(_scores(q, k, scale, tile, intervals).sub_(lse[..., None])).flatten(1, 2)
    delta = (dout * out).sum(-1)
    group_rows, q, dout = q.shape[1:3], q.flatten(1, 2), dout.flatten(1, 2)
    dscores = (dout @ v[:, 0].mT).sub_(delta.flatten(1, 2)[..., None]).mul_(weights).mul_(scale)
    return (dscores @ k[:, 0]).unflatten(1, group_rows), dscores.mT @ q, weights.mT @ dout


def _scores(q: Tensor, k: Tensor, scale: float, tile: Tile, intervals: KeyIntervals) -> Tensor:
    """(Hk, G, R, K); -inf where a pair is hidden."""
    scores = (q.flatten(1, 2) @ k[:, 0].mT).mul_(scale).unflatten(1, q.shape[1:3])
    mask = _visible(tile, intervals)
    return scores if mask is None else scores.masked_fill_(~mask, -torch.inf)


def _visible(tile: Tile, intervals: KeyIntervals) -> Tensor | None:
    """(R, K) visible pairs of a PARTIAL tile."""
    if tile.kind is not Kind.PARTIAL:
        return None
    column = torch.arange(tile.keys.start, tile.keys.stop, device=intervals.start.device)
    start, stop = intervals.ranges()[tile.range]
    return (start[tile.rows, None] <= column) & (column < stop[tile.rows, None])


# Which tiles a launch is cut into


def _tiles(intervals: KeyIntervals, fused: bool) -> list[Tile]:
    """The launch's tiles; the bounds are read in one copy, and the list is kept with the intervals."""

    def build() -> list[Tile]:
        if not intervals.query_count:
            return []
        bounds = torch.stack([bound for pair in intervals.ranges() for bound in pair]).cpu().numpy().astype(np.int64)
        ranges = bounds.reshape(-1, 2, intervals.query_count)
        return list(_fused_tiles(ranges) if fused else _matmul_tiles(ranges))

    return intervals._cached(("blockwise", fused), build)


def _fused_tiles(ranges: np.ndarray) -> Iterator[Tile]:
    ranges[:, 1] = ranges.max(1)  # a range that ends before it starts is empty
    for first, last in _strips(ranges):
        for index, (start, stop) in enumerate(ranges[:, :, first:last]):
            for rows, keys, kind in _strip_tiles(start, stop):
                yield Tile(slice(first + rows, last), slice(*keys), kind, index)


def _strips(ranges: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows to be cut into tiles together.

    A run of any length in which every row sees the same keys, or one key more than the row before (as within a causal
    document), needs no mask at all. Rows of no such run go STRIP at a time.
    """
    steps = np.diff(ranges)
    still = (steps[0, 0] == 0) & (steps[1:] == 0).all((0, 1))
    link = np.where(still & (steps[0, 1] <= 1), steps[0, 1] + 1, 0)  # to the row before: 1 same keys, 2 one more
    before = np.concatenate([[0], link[:-1]])
    edges = np.flatnonzero((link == 0) | ((link != before) & (before != 0))) + 1
    edges = np.concatenate([[0], edges, [ranges.shape[2]]])
    done = 0
    for run in np.flatnonzero(np.diff(edges) >= STRIP):
        yield from _short_strips(ranges, done, edges[run])
        yield edges[run], edges[run + 1]
        done = edges[run + 1]
    yield from _short_strips(ranges, done, ranges.shape[2])


def _short_strips(ranges: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
    for row in range(first, last, STRIP):
        yield from _thrifty(ranges, row, min(row + STRIP, last))


def _thrifty(ranges: np.ndarray, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Halves a strip while most of what its rows span together is hidden, as where documents are many."""
    count, start, stop = last - first, ranges[:, 0, first:last], ranges[:, 1, first:last]
    visible = (stop - start).sum()
    hidden = count * (stop[:, -1] - start[:, 0]).sum() - visible
    if count > 1 and hidden > max(visible, count * STRIP):
        yield from _thrifty(ranges, first, first + count // 2)
        yield from _thrifty(ranges, first + count // 2, last)
    else:
        yield first, last


def _strip_tiles(start: np.ndarray, stop: np.ndarray) -> Iterator[tuple[int, tuple[int, int], Kind]]:
    """(first row of the strip, keys, kind) of the tiles of one strip."""
    seeing = np.flatnonzero(start < stop)
    if not seeing.size:
        return
    skipped = int(seeing[0])
    start, stop = start[skipped:].tolist(), stop[skipped:].tolist()
    rising = len(stop) > 1 and stop == list(range(stop[0], stop[0] + len(stop)))
    # Keys that all rows see lie between; the causal tile takes the first row's last key too.
    inner = (start[-1], stop[0] - rising)
    constant = start[0] == start[-1]
    if inner[1] - inner[0] < STRIP and not (constant and (rising or stop[0] == stop[-1])):
        yield skipped, (start[0], stop[-1]), Kind.PARTIAL
        return
    if start[0] < inner[0]:
        yield skipped, (start[0], inner[0]), Kind.PARTIAL
    if inner[0] < inner[1]:
        yield skipped, inner, Kind.FULL
    if inner[1] < stop[-1]:
        yield skipped, (inner[1], stop[-1]), Kind.CAUSAL if rising else Kind.PARTIAL


def _matmul_tiles(ranges: np.ndarray) -> Iterator[Tile]:
    row_count = ranges.shape[2]
    for first in range(0, row_count, BLOCK[0]):
        last = min(first + BLOCK[0], row_count)
        for index, (start, stop) in enumerate(ranges[:, :, first:last].tolist()):
            for key in range(start[0], stop[-1], BLOCK[1]):
                key_last = min(key + BLOCK[1], stop[-1])
                full = start[-1] <= key and key_last <= stop[0]
                yield Tile(slice(first, last), slice(key, key_last), Kind.FULL if full else Kind.PARTIAL, index)
