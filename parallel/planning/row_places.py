"""Where positions stand among the rows of a tensor that holds some of them.

Legend: a tensor's rows are positions in ascending order, or those of segments in the order in which these are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.parallel.positions.segments import Segments, count

Rows = slice | Tensor
"""Rows of a tensor: a slice where they lie together (no copy), otherwise their indices."""

ALIGNED = 4
"""Rows of int32 tables begin at whole 16 bytes, as the kernels' copies want."""


def segment_positions(segments: Segments, device: torch.device | None = None) -> Tensor:
    """The positions themselves, (positions,) int64 on the CPU, or int32 on a device."""
    dtype = torch.int64 if device is None else torch.int32
    parts = [torch.arange(start, stop, dtype=dtype, device=device) for start, stop in segments]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def rows_at(held: Segments, wanted: Segments, device: torch.device) -> Rows:
    """Where wanted positions, in ascending order, stand in a tensor that holds the positions `held`, in any order."""
    if held == wanted:
        return slice(0, count(held))
    runs = runs_at(held, wanted)
    if len(runs) <= 1:
        return slice(*runs[0]) if runs else slice(0, 0)
    return segment_positions(tuple(runs)).to(device)


def runs_at(held: Segments, wanted: Segments) -> list[tuple[int, int]]:
    """The same as first and one-behind-last rows of what lies together."""
    places, before = [], 0
    for start, stop in held:
        places.append((start, stop, before))
        before += stop - start
    places.sort()
    runs: list[tuple[int, int]] = []
    place = 0
    for start, stop in wanted:
        while start < stop:
            while places[place][1] <= start:
                place += 1
            first, last, before = places[place]
            end = min(stop, last)
            row = before + start - first
            if runs and runs[-1][1] == row:
                runs[-1] = runs[-1][0], row + end - start
            else:
                runs.append((row, row + end - start))
            start = end
    return runs


def part_of(rows: Rows | None, first: int, last: int) -> Rows:
    """Some of the rows that others are."""
    if rows is None:
        return slice(first, last)
    return slice(rows.start + first, rows.start + last) if isinstance(rows, slice) else rows[first:last]


def aligned(count: int) -> int:
    """The next multiple of `ALIGNED`."""
    return -(-count // ALIGNED) * ALIGNED
