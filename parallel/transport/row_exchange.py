"""Rows that cross from the ranks that hold them to those that work on them, and back.

Between the moment when ranks agree to make a call and its end no rank may fail at what the others wait for: all memory
is taken by the caller before.

Legend: T rows of this rank where they are held, U rows where they are worked on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, intersect
from ringflash.parallel.transport.base import Transport


class RowExchange:
    """One rank's part.

    Args:
        transport: of the group.
        rank: this one in the group.
        held: which positions each rank holds.
        level: which positions each rank works on.
    """

    def __init__(self, transport: Transport, rank: int, held: Partition, level: Partition) -> None:
        self._transport, self._rank = transport, rank
        self.rows = level.count(rank)
        """U."""
        ranks = range(held.ranks)
        self._leaving = [(peer, _rows(held.segments[rank], level.segments[peer])) for peer in ranks]
        self._coming = [(peer, _rows(level.segments[rank], held.segments[peer])) for peer in ranks]

    def there(self, held: Sequence[Tensor], level: Sequence[Tensor]) -> None:
        """Fill tensors (U, ...) with what ranks hold in tensors (T, ...); all contiguous."""
        self._run(held, level, self._leaving, self._coming)

    def back(self, level: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        """Fill tensors (T, ...) with what ranks have in tensors (U, ...); all contiguous."""
        self._run(level, held, self._coming, self._leaving)

    def _run(
        self,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        leaving: list[tuple[int, list[tuple[int, int]]]],
        coming: list[tuple[int, list[tuple[int, int]]]],
    ) -> None:
        me = self._rank
        sends = [(peer, x[a:b]) for x in sources for peer, runs in leaving if peer != me for a, b in runs]
        receives = [(peer, x[a:b]) for x in targets for peer, runs in coming if peer != me for a, b in runs]
        ticket = self._transport.transfer(sends, receives, "query rows")
        for source, target in zip(sources, targets, strict=True):
            for (a, b), (c, d) in zip(leaving[me][1], coming[me][1], strict=True):
                target[c:d].copy_(source[a:b])
        ticket.wait()


def _rows(mine: Segments, others: Segments) -> list[tuple[int, int]]:
    """First and one behind the last row, among those of positions `mine`, of each run that is among others, too.

    Both ends find the same runs, one for each stretch of positions that lies together on both.
    """
    rows, before = [], 0
    for start, stop in mine:
        rows += [(before + a - start, before + b - start) for a, b in intersect(((start, stop),), others)]
        before += stop - start
    return rows
