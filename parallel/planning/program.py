"""A plan as one rank executes it: positions turned into rows of tensors on a device.

Legend: T query rows of this rank, S key rows that a stage attends to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import build_to_keep
from ringflash.parallel.planning.launches import Launch, launches
from ringflash.parallel.planning.plan import Buffers, Move, RankPlan, Stage
from ringflash.parallel.planning.pulls import Pull, Share, pulls
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, count, cut, intersect, normalize
from ringflash.parallel.positions.visibility import places, position_bounds

Rows = slice | Tensor
"""Rows of a tensor: a slice where they lie together (no copy), otherwise their indices."""

ALIGNED = 4
"""Rows of int32 tables begin at whole 16 bytes, as the kernels' copies want."""

LEAST_SPLIT = 4096
"""Own keys from which on the backward pass takes the first half of them last, while the last gradients travel. Of
fewer, two launches take longer than one by more than what they hide."""

MOST_RUNS = 4
"""Runs of rows for one rank that leave as they lie; of more, the host has more to ask for than a GPU has to copy."""

AHEAD = 65536
"""Keys whose gradient parts may have arrived without being added up, of plans that are not worked on in pieces."""


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


def runs_of(x: Tensor, shipment: Shipment) -> list[Tensor]:
    """The rows of a shipment, one run behind another; in one piece where they are many."""
    return [x[first:last] for first, last in shipment.runs] or [picked(x, shipment.rows)]


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


@dataclass(frozen=True)
class Program:
    """All stages for one rank on one device.

    Attributes:
        queries: number of query rows that the rank holds.
        keys: number of key rows that it holds.
        stages: what it does, in order.
        buffers: key rows that lie beside its own.
        piece: see `RankPlan`.
        query_places: (T,) place of each query row among the keys; None if it is the row's own number.
        device: where the launches' tensors are.
        shares: of the keys, for each rank that the plan is for.
        given: which own rows other ranks attend to, in runs: first and one behind the last of each.
    """

    queries: int
    keys: int
    stages: tuple[StageProgram, ...]
    buffers: Buffers
    query_places: Tensor | None
    device: torch.device
    piece: int | None = None
    shares: tuple[Share, ...] = ()
    given: tuple[tuple[int, int], ...] = ()

    @cached_property
    def pulls(self) -> tuple[tuple[Pull, ...], ...]:
        """For each stage, where what the next one attends to is to be found at its owners, in ascending order."""
        following = [*(stage.key_segments for stage in self.stages[1:]), ()]
        wanted = (intersect(tuple(sorted(x.coming)), y) for x, y in zip(self.stages, following, strict=True))
        return tuple(pulls(self.shares, x) for x in wanted)

    @cached_property
    def query_positions(self) -> Tensor:
        """(T,) int32 place of each query row among the keys, for modifiers that depend on it."""
        places = self.query_places
        if places is None:
            return build_to_keep(lambda: segment_positions(((0, self.queries),), self.device), self.device)
        return build_to_keep(lambda: places.int().to(self.device), self.device)

    @cached_property
    def backward_stages(self) -> tuple[tuple[StageProgram, ...], ...]:
        """The pieces of each stage in which the backward pass works.

        The first half of the own keys comes behind everything else: while it is worked on, the gradients of the last
        foreign keys travel. Under a causal mask that half has the more work.
        """
        return build_to_keep(self._backward_stages, self.device)

    def _backward_stages(self) -> tuple[tuple[StageProgram, ...], ...]:
        pieces = [(stage,) if self.piece is None else stage.pieces(self.piece) for stage in self.stages]
        own = self.stages[0]
        half = -(-self.keys // 2 // ALIGNED) * ALIGNED
        alone = own.everything and own.launches and not own.returns and not own.reduces
        if len(self.stages) > 1 and alone and self.keys >= LEAST_SPLIT:
            size = self.piece or self.keys
            late = [own.piece(first, min(first + size, half)) for first in range(0, half, size)]
            early = [own.piece(first, min(first + size, self.keys)) for first in range(half, self.keys, size)]
            pieces[0] = tuple(early)
            pieces[-1] = (*pieces[-1], *late)
            pieces = [tuple(replace(x, is_last=x is late[-1]) for x in stage) for stage in pieces]
        return tuple(pieces)

    @cached_property
    def reduced_ahead(self) -> int:
        """How often `buffers.reduces` is there, so that a rank that is behind does not hold up those that wait for it.

        Gradient parts that have arrived and are still to be added, or that left and have not been taken, are no more
        than twice as many keys as the rank has, nor more than a piece's, or `AHEAD` without pieces.
        """
        parts = sum(bool(piece.reduces or piece.returns) for stage in self.backward_stages for piece in stage)
        size = max(1, self.buffers.reduces, self.buffers.returns)
        return max(1, min(parts, min(2 * self.keys, self.piece or AHEAD) // size))

    @cached_property
    def sums_parts(self) -> bool:
        """Whether gradients of own keys are sums of several parts, which are then kept in fp32."""
        return any(stage.reduces or len(stage.launches) > 1 for stage in self.stages)

    @cached_property
    def _key_positions(self) -> dict[int, Tensor]:
        return {}

    def key_positions(self, index: int) -> Tensor:
        """(S,) int32 global positions of the keys that a stage attends to, for modifiers that depend on it."""
        found = self._key_positions.get(index)
        if found is None:
            segments = self.stages[index].key_segments
            found = build_to_keep(lambda: segment_positions(segments, self.device), self.device)
            self._key_positions[index] = found
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps on its device, for counting bytes; some more than once."""
        pieces = (piece for stage in vars(self).get("backward_stages", ()) for piece in stage)
        for stage in (*self.stages, *pieces):
            for launch in stage.launches:
                yield from launch.tensors()
            shipments = (*stage.sends, *stage.receives, *stage.returns, *stage.reduces)
            rows = (stage.own, stage.arrived, stage.order, stage.kept, *(x.rows for x in shipments))
            yield from (x for x in rows if isinstance(x, Tensor))
        yield from self._key_positions.values()
        yield from (x for x in (self.query_places, vars(self).get("query_positions")) if x is not None)

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()}
        return sum(storages.values())


# One device


def local_program(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Program:
    """One rank that holds all queries and keys.

    Args:
        mask: rules; its own document boundaries are not read.
        boundaries: as in `visibility.position_bounds`, on the device. The host reads them of masks of several layers.
        query_boundaries: likewise.
        queries: T.
        keys: S.
        device: of all tensors.
    """
    if len(mask.layers) > 1:
        query, key = torch.arange(queries, device=device), torch.arange(keys, device=device)
        work = launches(mask, boundaries, query, key, query_boundaries) if queries and keys else ()
        among_keys = None if query_boundaries is None else places(boundaries, query, query_boundaries)
        return _whole(work, queries, keys, among_keys, device)
    table = document_table(mask, boundaries, query_boundaries, queries, keys, device)
    return table_program(mask, table, queries, keys)


def document_table(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Tensor:
    """All that one rank's program owes to boundaries that the host must not read, (R, T rounded up) int32.

    Rows are start, stop and, with two intervals, sink_start and sink_stop of each layer of the mask, then, where
    queries have boundaries of their own, each query's place among the keys.
    """
    table = torch.zeros(table_shape(mask, query_boundaries is not None, queries), dtype=torch.int32, device=device)
    query = torch.arange(queries, device=device)
    bounds = []
    for layer in mask.layers:
        bounds += position_bounds(layer, boundaries, query, query_boundaries)[: 4 if mask.two_intervals else 2]
    table[: len(bounds), :queries] = torch.stack(bounds).clamp_(0, keys)
    if query_boundaries is not None:
        table[-1, :queries] = places(boundaries, query, query_boundaries)
    return table


def table_shape(mask: Mask, with_places: bool, queries: int) -> tuple[int, int]:
    """Shape of `document_table`."""
    return len(mask.layers) * (4 if mask.two_intervals else 2) + with_places, _aligned(queries)


def table_program(mask: Mask, table: Tensor, queries: int, keys: int) -> Program:
    """The program of a `document_table`."""
    rows = table[:, :queries].unbind()
    columns = 4 if mask.two_intervals else 2
    work = [
        Launch(KeyIntervals(rows[i], rows[i + 1], keys, *rows[i + 2 : i + columns]))
        for i in range(0, len(mask.layers) * columns, columns)
    ]
    among_keys = rows[-1] if len(rows) % columns else None
    return _whole(tuple(work) if queries and keys else (), queries, keys, among_keys, table.device)


def _whole(
    work: tuple[Launch, ...], queries: int, keys: int, among_keys: Tensor | None, device: torch.device
) -> Program:
    """A single stage over all own keys."""
    everything = slice(0, keys)
    stage = StageProgram(work, own=everything, key_segments=((0, keys),), kept=everything, everything=True)
    return Program(queries, keys, (stage,), Buffers(), among_keys, device)


# Several ranks


def rank_program(plan: RankPlan, mask: Mask, device: torch.device, shares: tuple[Share, ...] = ()) -> Program:
    """A rank's plan, on a device.

    Args:
        plan: of this rank.
        mask: with its documents.
        device: of the tensors that kernels read.
        shares: of the keys, for each rank that the plan is for.
    """
    queries = segment_positions(plan.queries)
    boundaries, query_boundaries = (
        None if x is None else torch.tensor(x) for x in (mask.boundaries, mask.query_boundaries)
    )
    if len(mask.layers) > 1:
        work = [
            launches(mask, boundaries, queries, segment_positions(stage.work), query_boundaries)
            if stage.work and len(queries)
            else ()
            for stage in plan.stages
        ]
        work = [tuple(launch.to(device) for launch in each) for each in work]
    else:
        work = _interval_launches(plan, mask.layers[0], boundaries, queries, query_boundaries, device)
    last = max((i for i, stage in enumerate(plan.stages) if stage.work), default=-1)
    stages, arrived = [], ()
    for index, (stage, here) in enumerate(zip(plan.stages, work, strict=True)):
        stages.append(_stage(index, stage, here, plan, arrived, index == last, device))
        arrived = tuple(segment for move in stage.receives for segment in move.segments)
    among_keys = places(boundaries, queries, query_boundaries)
    sent = normalize(x for stage in plan.stages for move in stage.sends if not move.relayed for x in move.segments)
    given = tuple(_runs(plan.keys, sent))
    return Program(
        len(queries), count(plan.keys), tuple(stages), plan.buffers, among_keys, device, plan.piece, shares, given
    )


def _stage(
    index: int,
    stage: Stage,
    work: tuple[Launch, ...],
    plan: RankPlan,
    arrived: Segments,
    is_last: bool,
    device: torch.device,
) -> StageProgram:
    """One stage.

    Args:
        index: its place among the stages.
        stage: of the plan.
        work: its launches.
        plan: what it belongs to.
        arrived: positions of the keys that arrived for it, in the order in which they lie in the buffer.
        is_last: no later stage has work.
        device: of row indices.
    """
    own, buffer = plan.keys, plan.buffers.arrivals
    mine, foreign = intersect(stage.work, own), intersect(stage.work, tuple(sorted(arrived)))
    order = _rows((*mine, *foreign), stage.work, device) if mine and foreign else None
    receives, filled = [], 0
    for move in stage.receives:
        size = count(move.segments)
        receives.append(Shipment(move.peer, None if size == buffer else slice(filled, filled + size), size))
        filled += size
    return StageProgram(
        launches=work,
        own=_rows(own, mine, device) if mine or not stage.work else None,
        arrived=_rows(arrived, foreign, device) if foreign else None,
        pulled=slice(0, count(foreign)) if foreign else None,
        beside=_beside(own, mine, foreign) if mine and foreign else (),
        order=None if isinstance(order, slice) else order,
        key_segments=stage.work,
        is_last=is_last,
        sends=tuple(_shipment(move, arrived if move.relayed else own, device) for move in stage.sends),
        receives=tuple(receives),
        received=None if filled == buffer else slice(0, filled),
        coming=tuple(segment for move in stage.receives for segment in move.segments),
        returns=tuple(_shipment(move, stage.work, device) for move in stage.returns),
        reduces=tuple(_shipment(move, own, device) for move in stage.reduces),
        kept=_rows(stage.work, mine, device) if mine else None,
        everything=mine == own and not foreign,
        index=index,
    )


def _beside(held: Segments, mine: Segments, foreign: Segments) -> tuple[tuple[int, int, int, bool], ...]:
    """See `StageProgram.beside`; empty where there are many runs."""
    runs: list[tuple[int, int, int, bool]] = []
    filled = came = 0
    for start, stop, own in sorted([(*x, True) for x in mine] + [(*x, False) for x in foreign]):
        for first, last in _runs(held, ((start, stop),)) if own else ((came, came + stop - start),):
            size = last - first
            if runs and runs[-1][3] == own and runs[-1][1] + runs[-1][2] == first:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + size, own)
            else:
                runs.append((filled, first, size, own))
            filled += size
        came += 0 if own else stop - start
    return tuple(runs) if len(runs) <= 2 * MOST_RUNS else ()


def _side_by_side(own: Tensor, pulled: Tensor, runs: Sequence[tuple[int, int, int, bool]]) -> Tensor:
    result = own.new_empty(sum(run[2] for run in runs), *own.shape[1:])
    for there, first, size, is_own in runs:
        result[there : there + size].copy_((own if is_own else pulled)[first : first + size])
    return result


def _shipment(move: Move, held: Segments, device: torch.device) -> Shipment:
    rows = None if held == move.segments else _rows(held, move.segments, device)
    runs = tuple(_runs(held, move.segments)) if isinstance(rows, Tensor) else ()
    return Shipment(move.peer, rows, count(move.segments), move.relayed, runs if len(runs) <= MOST_RUNS else ())


def _interval_launches(
    plan: RankPlan,
    layer: Mask,
    boundaries: Tensor | None,
    queries: Tensor,
    query_boundaries: Tensor | None,
    device: torch.device,
) -> list[tuple[Launch, ...]]:
    """One launch for each stage with work, all of their intervals in one table that is copied to the device once."""
    columns = 4 if layer.two_intervals else 2
    bounds = position_bounds(layer, boundaries, queries, query_boundaries)[:columns]
    bounds = [bound.int().numpy() for bound in bounds]
    working = [index for index, stage in enumerate(plan.stages) if stage.work and len(queries)]
    table = np.empty((len(working), columns, _aligned(len(queries))), dtype=np.int32)
    for rows, index in zip(table, working, strict=True):
        for row, bound in zip(rows, bounds, strict=True):
            _keys_before(bound, plan.stages[index].work, row[: len(queries)])
    on_device = torch.from_numpy(table).to(device)[..., : len(queries)]
    launches_of: list[tuple[Launch, ...]] = [()] * len(plan.stages)
    for rows, index in zip(on_device.unbind(), working, strict=True):
        start, stop, *sinks = rows.unbind()
        launches_of[index] = (Launch(KeyIntervals(start, stop, count(plan.stages[index].work), *sinks)),)
    return launches_of


def _keys_before(bounds: np.ndarray, keys: Segments, out: np.ndarray) -> None:
    """How many of the key positions lie before each bound, into `out`; bounds never decrease."""
    before = behind = 0
    edges = np.searchsorted(bounds, np.array(keys, dtype=bounds.dtype)).tolist()
    for (start, stop), (first, last) in zip(keys, edges, strict=True):
        out[behind:first] = before
        np.subtract(bounds[first:last], start - before, out=out[first:last])
        before, behind = before + stop - start, last
    out[behind:] = before


def segment_positions(segments: Segments, device: torch.device | None = None) -> Tensor:
    """The positions themselves, (positions,) int64 on the CPU, or int32 on a device."""
    dtype = torch.int64 if device is None else torch.int32
    parts = [torch.arange(start, stop, dtype=dtype, device=device) for start, stop in segments]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=device)


def _rows(held: Segments, wanted: Segments, device: torch.device) -> Rows:
    """Where wanted positions, in ascending order, stand in a tensor that holds the positions `held`, in any order."""
    if held == wanted:
        return slice(0, count(held))
    runs = _runs(held, wanted)
    if len(runs) <= 1:
        return slice(*runs[0]) if runs else slice(0, 0)
    return segment_positions(tuple(runs)).to(device)


def _runs(held: Segments, wanted: Segments) -> list[tuple[int, int]]:
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


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED
