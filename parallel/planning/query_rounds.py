"""Queries in rounds: one device that holds a whole sequence attends with some of its queries after others.

Nothing as long as the sequence is then there of queries, of what attention gives, or of their gradients. As in a ring,
where keys come in stages, a round is a launch over the rows at hand, and gradients of keys are sums over the rounds;
here it is time that the queries lie apart in. A round sees no key behind its last query, so that keys may be made round
by round, too, and those of a round have their whole gradients once the rounds from the last one down to it are done.

Legend: T rows of queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.planning.launches import launches
from ringflash.parallel.planning.ring import PIECE
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, intersect
from ringflash.parallel.positions.visibility import needed_keys

ROWS = 128
"""Rounds have a multiple of these rows, as many as tiles of the kernels have."""


@dataclass(frozen=True)
class QueryRound:
    """Some queries, and what they see.

    Attributes:
        rows: which of the T they are.
        keys: of the T keys, from the first to the last that they see; none if there is none.
        needed: of all keys those that they see.
        shown: what each launch shows of these keys to these queries.
    """

    rows: slice
    keys: slice
    needed: Segments
    shown: tuple[KeyIntervals, ...]

    def pieces(self) -> Iterator[slice]:
        """The keys in pieces of at most `PIECE`, so that no more of their gradients' parts is there at once.

        Pieces that nobody sees are left out.
        """
        for first in range(self.keys.start, self.keys.stop, PIECE):
            piece = first, min(first + PIECE, self.keys.stop)
            if intersect((piece,), self.needed):
                yield slice(*piece)


def query_rounds(mask: Mask, rows: int, most: int, device: torch.device) -> tuple[QueryRound, ...] | None:
    """Rounds of equally many queries; None where a query sees keys behind its round, or only a call says what.

    Args:
        mask: with its documents, the same of queries and keys.
        rows: T.
        most: queries of a round, or `ROWS` if that is more.
        device: of the launches' tensors.
    """
    if mask.has_layout and mask.layout is None:
        return None
    size = size_of_rounds(rows, most)
    slices = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    all_needed = needed_keys(mask, [((own.start, own.stop),) for own in slices], rows)
    if any(needed and needed[-1][1] > own.stop for own, needed in zip(slices, all_needed, strict=True)):
        return None
    boundaries = None if mask.boundaries is None else torch.tensor(mask.boundaries, device=device)
    found = []
    for own, needed in zip(slices, all_needed, strict=True):
        keys = slice(needed[0][0], needed[-1][1]) if needed else slice(own.start, own.start)
        positions = [torch.arange(x.start, x.stop, device=device) for x in (own, keys)]
        work = launches(mask, boundaries, *positions) if needed else ()
        found.append(QueryRound(own, keys, needed, tuple(launch.showing(None) for launch in work)))
    return tuple(found)


def size_of_rounds(rows: int, most: int) -> int:
    """Queries of each round but the last, which may have fewer; see `query_rounds`."""
    most = max(most // ROWS, 1) * ROWS
    count = -(-rows // most) or 1
    return max(1, -(-rows // count // ROWS)) * ROWS
