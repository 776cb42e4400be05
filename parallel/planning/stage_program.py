"""What one rank does in one stage: which rows it attends to, launches, and what goes and comes meanwhile.

Legend: S key rows that a stage attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ringflash.parallel.planning.launches import Launch
from ringflash.parallel.planning.row_places import Rows, part_of
from ringflash.parallel.positions.segments import Segments, count, cut


@dataclass(frozen=True)
class Shipment:
    """Rows that go to another rank or come from one.

    Attributes:
        peer: rank in the group.
        rows: of the tensor that they are taken from, or are put or added into; None for all of it.
        count: number of rows.
        relayed: rows to send lie among what arrived for the stage, not among this rank's own keys.
        runs: the same rows, where they are a few runs: first and one behind the last of each.
    """

    peer: int
    rows: Rows | None
    count: int
    relayed: bool = False
    runs: tuple[tuple[int, int], ...] = ()


def picked(x: Tensor, rows: Rows | None) -> Tensor:
    """Rows of a tensor; contiguous if the tensor is."""
    return x if rows is None else x[rows]


def runs_of(x: Tensor, shipment: Shipment) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """A tensor that has the rows of a shipment, and where, one run behind another; in one piece where they are many."""
    if shipment.runs:
        return x, shipment.runs
    if isinstance(shipment.rows, slice):
        return x, ((shipment.rows.start, shipment.rows.stop),)
    rows = picked(x, shipment.rows)
    return rows, ((0, len(rows)),)


@dataclass(frozen=True)
class StageProgram:
    """What this rank does in one stage.

    Attributes:
        launches: calls of the kernels over the keys attended; none if the stage has no work here.
        own: rows of this rank's own keys that are attended to, or None.
        arrived: rows among what arrived for the stage that are attended to, in ascending order of position, or None.
        pulled: the same where this rank takes them from their owners: those rows alone, in that order.
        beside: how own rows and pulled ones lie among those attended to, where these are a few runs: (first row there,
            first row at hand, rows, whether they are own).
        order: puts the own rows with the arrived ones behind them into ascending order; None where they are already.
        key_segments: global positions of the keys attended to.
        is_last: no later stage has work here, so the result may leave in the model's dtype.
        sends: keys to send while attending.
        receives: keys that come for the next stage; rows of the buffer that they fill.
        received: all rows of the buffer that are filled then; None for the whole buffer.
        coming: their positions, in the order in which they lie there.
        returns: gradient parts to send to the owners in the backward pass; rows of the attended keys.
        reduces: gradient parts that come from others; rows of this rank's own keys.
        kept: which of the attended rows are own, or None.
        everything: all own keys are attended to and nothing else, as they lie.
        index: which of the stages it is, or is a piece of.
        offset: where a piece of a stage begins among the keys that the stage attends to.
    """

    launches: tuple[Launch, ...] = ()
    own: Rows | None = None
    arrived: Rows | None = None
    pulled: slice | None = None
    beside: tuple[tuple[int, int, int, bool], ...] = ()
    order: Rows | None = None
    key_segments: Segments = ()
    is_last: bool = True
    sends: tuple[Shipment, ...] = ()
    receives: tuple[Shipment, ...] = ()
    received: Rows | None = None
    coming: Segments = ()
    returns: tuple[Shipment, ...] = ()
    reduces: tuple[Shipment, ...] = ()
    kept: Rows | None = None
    everything: bool = False
    index: int = 0
    offset: int = 0

    @cached_property
    def peers(self) -> frozenset[int]:
        """Ranks to which gradient parts go, and from which some come."""
        return frozenset([s.peer for s in (*self.returns, *self.reduces)])

    def kept_of(self, part: Tensor) -> Tensor:
        """The own rows of a gradient of the keys attended to."""
        if not self.beside or isinstance(self.kept, slice):
            return part[self.kept]
        own = [(there, size) for there, _, size, is_own in self.beside if is_own]
        rows, first = part.new_empty(sum(size for _, size in own), *part.shape[1:]), 0
        for there, size in own:
            rows[first : first + size].copy_(part[there : there + size])
            first += size
        return rows

    def pieces(self, size: int) -> tuple[StageProgram, ...]:
        """The stage for the backward pass, so many keys at a time; transfers of keys are the whole stage's."""
        keys = count(self.key_segments) if self.launches else 0
        most = max([keys, *(shipment.count for shipment in self.reduces)])
        if most <= size:
            return (self,)
        return tuple(self.piece(first, min(first + size, keys), first + size) for first in range(0, most, size))

    def piece(self, first: int, last: int, behind: int = 0) -> StageProgram:
        """The work on some of the keys, and what their gradients travel for.

        Args:
            first: of the keys attended to.
            last: one behind the last of them; no more than `first` if there are none.
            behind: one behind the last row of each of `reduces` that arrives with it.
        """
        there, keys = first < last, count(self.key_segments)
        return StageProgram(
            launches=tuple(launch.of_keys(first, last) for launch in self.launches) if there else (),
            own=part_of(self.own, first, last) if there and self.own is not None else None,
            arrived=part_of(self.arrived, first, last) if there and self.arrived is not None else None,
            pulled=slice(first, last) if there and self.pulled is not None else None,
            key_segments=cut(self.key_segments, first, last),
            is_last=self.is_last and last == keys,
            returns=tuple(Shipment(s.peer, None, last - first) for s in self.returns) if there else (),
            reduces=tuple(
                Shipment(s.peer, part_of(s.rows, first, min(behind, s.count)), min(behind, s.count) - first)
                for s in self.reduces
                if first < s.count
            ),
            kept=slice(0, last - first) if there and self.kept is not None else None,
            index=self.index,
            offset=first,
        )

    def at_hand(self, own: tuple[Tensor, ...], arrived: tuple[Tensor, ...], pulled: bool = False) -> tuple[Tensor, ...]:
        """The rows attended to, of each tensor of this rank's own keys and of what arrived, or was pulled."""
        if self.everything:
            return own
        rows = self.pulled if pulled else self.arrived
        if rows is None:
            return tuple([x[self.own] for x in own])
        if self.own is None:
            return tuple([x[rows] for x in arrived])
        if pulled and self.beside:
            return tuple([_side_by_side(x, y, self.beside) for x, y in zip(own, arrived, strict=True)])
        both = (torch.cat([x[self.own], y[rows]]) for x, y in zip(own, arrived, strict=True))
        return tuple(x if self.order is None else x[self.order] for x in both)


def _side_by_side(own: Tensor, pulled: Tensor, runs: Sequence[tuple[int, int, int, bool]]) -> Tensor:
    result = own.new_empty(sum(run[2] for run in runs), *own.shape[1:])
    for there, first, size, is_own in runs:
        result[there : there + size].copy_((own if is_own else pulled)[first : first + size])
    return result
