"""How a mask's layers become launches of the kernels, for the rows of queries and keys at hand.

A launch takes rows whose visible ranges never step back (ringflash/kernels/intervals.py), but nothing says that they be
all rows, or in the order of the tensor. So where a mask has many layers, their stretches of rows are packed anew: into
launches of rows that are picked from the tensor in the order of the keys that they see. For random blocks that needs
hardly more launches than a row has runs of blocks, where layers in the order of rows are many times as many.

Legend: T query rows of this rank, S key rows at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry
from ringflash.kernels.sinks import with_sinks
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import key_intervals

PACKING_GAIN = 2
"""How many launches over all rows one over picked rows must save: picking and putting back is work, too."""


@dataclass(frozen=True)
class Launch:
    """One call of the kernels.

    Attributes:
        intervals: visible key rows of each row of the launch.
        rows: (rows of the launch,) int64, which of the T query rows they are; None for all of them as they lie.
    """

    intervals: KeyIntervals
    rows: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps, for counting bytes."""
        yield from (x for x in (*self.intervals.tensors(), self.rows) if x is not None)

    def of_keys(self, first: int, last: int) -> Launch:
        """The same over some of the key rows."""
        start, stop, *sinks = [x.clamp(first, last) - first for pair in self.intervals.ranges() for x in pair]
        return Launch(KeyIntervals(start, stop, last - first, *sinks), self.rows)

    def to(self, device: torch.device) -> Launch:
        """The same on another device."""
        bounds = [x.to(device) for pair in self.intervals.ranges() for x in pair]
        rows = None if self.rows is None else self.rows.to(device)
        return Launch(KeyIntervals(bounds[0], bounds[1], self.intervals.key_count, *bounds[2:]), rows)


def launches(
    mask: Mask,
    boundaries: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    query_boundaries: Tensor | None = None,
) -> tuple[Launch, ...]:
    """Launches that show each visible pair once; at least one. The host reads what masks of several layers show.

    Args:
        mask: rules; its own document boundaries are not read.
        boundaries: as in `visibility.position_bounds`.
        queries: (T,) int64, ascending global positions of the query rows.
        keys: (S,) int64, ascending global positions of the key rows.
        query_boundaries: as in `visibility.position_bounds`.
    """
    layers, packed = mask.layers, []
    if len(layers) > 1:
        pieces = _pieces(layers, boundaries, queries, keys, query_boundaries)
        layers = [layer for layer, piece in zip(layers, pieces, strict=True) if piece.rows.size] or layers[:1]
        packed = [] if mask.two_intervals else _packed(pieces, len(queries))
    if packed and len(packed) * PACKING_GAIN <= len(layers):
        bounds = ((torch.from_numpy(x).to(queries.device) for x in piece) for piece in packed)
        return tuple(Launch(KeyIntervals(start, stop, len(keys)), rows) for rows, start, stop in bounds)
    return tuple(Launch(key_intervals(layer, boundaries, queries, keys, query_boundaries)) for layer in layers)


def attend(
    kernels: ModuleType,
    launch: Launch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    modifiers: Modifiers | None,
    carry: Carry | None,
    out_dtype: torch.dtype,
    sinks: Tensor | None = None,
) -> Carry:
    """`kernels.attend` over the rows of a launch; the others keep their carry, or start one. May overwrite the carry.

    Args:
        kernels: from `ringflash.kernels.select`.
        launch: which rows, and what they see.
        query: (T, H, D); so have modifiers and carry T rows. The rest is as in `kernels.reference.attend`.
        key: see there.
        value: see there.
        scale: see there.
        modifiers: see there.
        carry: see there.
        out_dtype: see there.
        sinks: see there; they join all rows.
    """
    rows, intervals = launch.rows, launch.intervals
    if rows is None:
        settings = {"scale": scale, "modifiers": modifiers, "carry": carry, "out_dtype": out_dtype, "sinks": sinks}
        return kernels.attend(query, key, value, intervals, **settings)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    if carry is None:
        out = query.new_zeros(*query.shape[:2], value.shape[2], dtype=accumulator)
        carry = out, query.new_full(query.shape[1::-1], -torch.inf, dtype=torch.float32)
    out, lse = carry
    of_rows = kernels.attend(
        query[rows],
        key,
        value,
        intervals,
        scale=scale,
        modifiers=_of_rows(modifiers, rows),
        carry=(out[rows], lse.index_select(1, rows)),
        out_dtype=accumulator,
    )
    carry = out.index_copy_(0, rows, of_rows[0]), lse.index_copy_(1, rows, of_rows[1])
    out, lse = carry if sinks is None else with_sinks(*carry, sinks)
    return out.to(out_dtype), lse


def attend_backward(
    kernels: ModuleType,
    launch: Launch,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    modifiers: Modifiers | None,
    carry: Tensor | None,
    dquery_dtype: torch.dtype,
    **settings: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.attend_backward` over the rows of a launch, as `attend` is `kernels.attend`."""
    rows, intervals = launch.rows, launch.intervals
    if rows is None:
        settings |= {"modifiers": modifiers, "carry": carry, "dquery_dtype": dquery_dtype}
        return kernels.attend_backward(dout, query, key, value, lse, delta, intervals, **settings)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    dquery = query.new_zeros(query.shape, dtype=accumulator) if carry is None else carry
    settings |= {"modifiers": _of_rows(modifiers, rows), "carry": dquery[rows], "dquery_dtype": accumulator}
    of_heads = (lse.index_select(1, rows), delta.index_select(1, rows))
    of_rows, dkey, dvalue = kernels.attend_backward(
        dout[rows], query[rows], key, value, *of_heads, intervals, **settings
    )
    return dquery.index_copy_(0, rows, of_rows).to(dquery_dtype), dkey, dvalue


def _of_rows(modifiers: Modifiers | None, rows: Tensor) -> Modifiers | None:
    if modifiers is None:
        return None
    of_queries = {name: getattr(modifiers, name) for name in ("slopes", "query_positions")}
    of_rows: dict[str, Any] = {name: x if x is None else x[rows] for name, x in of_queries.items()}
    return replace(modifiers, **of_rows)


class _Piece(NamedTuple):
    """Ascending rows that see a key, or several such runs of rows, and what each row sees, without sinks."""

    rows: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def part(self, begin: int, end: int) -> _Piece:
        """Some of the rows."""
        return _Piece(*(x[begin:end] for x in self))


def _pieces(
    layers: tuple[Mask, ...],
    boundaries: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    query_boundaries: Tensor | None,
) -> list[_Piece]:
    """What each layer shows, looking only at the rows whose blocks it has: layers may be hundreds."""
    own, pieces = boundaries if query_boundaries is None else query_boundaries, []
    begin = 0 if own is None else own[torch.searchsorted(own, queries, right=True) - 1]
    assert layers[0].layout is not None
    block = (queries - begin) // layers[0].layout.size
    # A tail behind the documents may reach beyond the layout; it sees nothing, whichever block it is said to be in.
    block = block.clamp(max=len(layers[0].layout.rows) - 1)
    for layer in layers:
        assert layer.layout is not None
        has_block = torch.tensor([bool(runs) for runs in layer.layout.rows], device=queries.device)
        rows = has_block[block].nonzero()[:, 0]
        intervals = key_intervals(layer, boundaries, queries[rows], keys, query_boundaries)
        seeing = torch.stack([start < stop for start, stop in intervals.ranges()]).any(0)
        pieces.append(_Piece(*(x[seeing].cpu().numpy() for x in (rows, intervals.start, intervals.stop))))
    return pieces


def _packed(pieces: list[_Piece], queries: int) -> list[_Piece]:
    """Stretches of rows that lie together, each in the first pack that ends before it and has none of its rows."""
    packs: list[list[_Piece]] = []
    taken: list[np.ndarray] = []
    stretches = [stretch for piece in pieces if piece.rows.size for stretch in _stretches(piece)]
    for stretch in sorted(stretches, key=lambda x: (x.start[0], x.stop[0])):
        rows = slice(stretch.rows[0], stretch.rows[-1] + 1)
        for pack, busy in zip(packs, taken, strict=True):
            last = pack[-1]
            if last.start[-1] <= stretch.start[0] and last.stop[-1] <= stretch.stop[0] and not busy[rows].any():
                break
        else:
            pack, busy = [], np.zeros(queries, dtype=bool)
            packs.append(pack)
            taken.append(busy)
        pack.append(stretch)
        busy[rows] = True
    return [_Piece(*(np.concatenate(x) for x in zip(*pack, strict=True))) for pack in packs]


def _stretches(piece: _Piece) -> list[_Piece]:
    """A layer's rows, cut where they or their bounds leap."""
    leaps = (np.diff(piece.rows) > 1) | (np.diff(piece.start) > 1) | (np.diff(piece.stop) > 1)
    edges = [0, *(np.flatnonzero(leaps) + 1).tolist(), len(piece.rows)]
    return [piece.part(begin, end) for begin, end in pairwise(edges)]
