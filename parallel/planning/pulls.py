"""Which rows of whose keys come for a stage, for transports by which a rank takes them from their owners itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ringflash.parallel.positions.segments import Segments, count

Share = tuple[int, Segments]
"""A rank of the group, and the positions of the keys that it holds."""


class Pull(NamedTuple):
    """What is taken from one owner.

    Attributes:
        owner: rank in the group.
        keys: rows that it has.
        runs: (first row at the owner, first row in the buffer, rows) of what lies together in both.
    """

    owner: int
    keys: int
    runs: tuple[tuple[int, int, int], ...]


def pulls(shares: Sequence[Share], wanted: Segments) -> tuple[Pull, ...]:
    """Where rows of a buffer are to be found.

    Args:
        shares: of all ranks that a position may belong to.
        wanted: positions of the rows, ascending; they fill the buffer in this order.
    """
    places = _places(wanted)
    found = []
    for owner, held in shares:
        runs = _together(_places(held), places)
        if runs:
            found.append(Pull(owner, count(held), tuple(runs)))
    return tuple(found)


def _places(segments: Segments) -> list[tuple[int, int, int]]:
    """(start, stop, row of the start) by ascending start."""
    places, row = [], 0
    for start, stop in segments:
        places.append((start, stop, row))
        row += stop - start
    return sorted(places)


def _together(held: list[tuple[int, int, int]], wanted: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    i = j = 0
    while i < len(held) and j < len(wanted):
        start, stop = max(held[i][0], wanted[j][0]), min(held[i][1], wanted[j][1])
        if start < stop:
            source, target = held[i][2] + start - held[i][0], wanted[j][2] + start - wanted[j][0]
            first = runs[-1] if runs else (0, 0, 0)
            if runs and (first[0] + first[2], first[1] + first[2]) == (source, target):
                runs[-1] = (first[0], first[1], first[2] + stop - start)
            else:
                runs.append((source, target, stop - start))
        if held[i][1] <= wanted[j][1]:
            i += 1
        else:
            j += 1
    return runs
