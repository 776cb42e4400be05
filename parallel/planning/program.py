"""A plan as one rank executes it: positions turned into tensor rows, once for each shape and then kept.

Legend: T query rows of this rank, S key rows at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.planning.launches import Launch, launches
from ringflash.parallel.planning.plan import Plan, Transfer
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, contains, count
from ringflash.parallel.positions.visibility import places, position_bounds

Rows = slice | Tensor
"""Rows of a tensor: a slice where they lie together (no copy), otherwise their indices."""


@dataclass(frozen=True)
class Shipment:
    """Rows for another rank.

    Attributes:
        peer: rank in the group.
        rows: which rows of the source tensor go, or which rows of the destination tensor it lands in.
        count: number of rows.
        local: rows are of this rank's own keys rather than of those that arrived for the stage.
    """

    peer: int
    rows: Rows
    count: int
    local: bool = False


@dataclass(frozen=True)
class StageProgram:
    """What this rank does in one stage.

    Attributes:
        launches: calls of the kernels over the rows attended; none if the stage has no work here.
        work: rows attended, of the keys at hand.
        key_positions: (S,) int32 global positions of the rows attended; None where no modifier asks for them.
        is_last: no later stage has work here, so the result may leave in the model's dtype.
        sends: keys to send while attending.
        arrivals: keys that come for the next stage, in the order in which they are laid end to end.
        arrival_order: rows that put the arrived keys into ascending order.
        returns: key gradients to send to their owners after the work in the backward pass; rows of the attended keys.
        contributions: key gradients that come from others; rows of this rank's own keys.
    """

    launches: tuple[Launch, ...]
    work: Rows
    key_positions: Tensor | None
    is_last: bool
    sends: tuple[Shipment, ...]
    arrivals: tuple[Shipment, ...]
    arrival_order: Rows
    returns: tuple[Shipment, ...]
    contributions: tuple[Shipment, ...]


@dataclass(frozen=True)
class Program:
    """All stages for one rank.

    Attributes:
        queries: number of query rows that the rank holds.
        keys: number of key rows that it holds.
        query_positions: (T,) int32 place of each query row among the keys; None where no modifier asks for them.
        stages: what it does, in order.
    """

    queries: int
    keys: int
    query_positions: Tensor | None
    stages: tuple[StageProgram, ...]


def local_program(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Program:
    """One rank that holds all queries and keys."""
    query, key = torch.arange(queries, device=device), torch.arange(keys, device=device)
    work = launches(mask, boundaries, query, key, query_boundaries) if queries and keys else ()
    rows = slice(0, keys)
    stage = StageProgram(work, rows, key.int(), True, (), (), rows, (), ())
    return Program(queries, keys, places(boundaries, query, query_boundaries).int(), (stage,))


def document_table(
    mask: Mask, boundaries: Tensor, query_boundaries: Tensor | None, queries: int, keys: int, positioned: bool
) -> Tensor:
    """All that one rank's program owes to boundaries that the host must not read, (R, queries rounded up) int32.

    Rows are start, stop and, with sinks, sink_start and sink_stop of each layer of the mask, then `query_positions` if
    `positioned`; they begin at addresses of whole 16 bytes. The backward pass takes them from the forward pass.
    """
    table = boundaries.new_zeros(table_shape(mask, queries, positioned), dtype=torch.int32)
    query = torch.arange(queries, device=boundaries.device)
    bounds = []
    for layer in mask.layers:
        bounds += position_bounds(layer, boundaries, query, query_boundaries)[: 4 if mask.sink else 2]
    table[: len(bounds), :queries] = torch.stack(bounds).clamp_(0, keys)
    if positioned:
        table[-1, :queries] = places(boundaries, query, query_boundaries)
    return table


def table_shape(mask: Mask, queries: int, positioned: bool) -> tuple[int, int]:
    """Shape of `document_table`."""
    return len(mask.layers) * (4 if mask.sink else 2) + positioned, (queries + 3) // 4 * 4


def table_program(mask: Mask, table: Tensor, queries: int, keys: int, positioned: bool) -> Program:
    """The program of a `document_table`; without positions if it has none."""
    rows = iter(table[:, :queries].unbind())
    work = []
    if queries and keys:
        for _ in mask.layers:
            start, stop = next(rows), next(rows)
            sinks = (next(rows), next(rows)) if mask.sink else ()
            work.append(Launch(KeyIntervals(start, stop, keys, *sinks)))
    query_positions = table[-1, :queries] if positioned else None
    key_positions = torch.arange(keys, dtype=torch.int32, device=table.device) if positioned else None
    everything = slice(0, keys)
    stage = StageProgram(tuple(work), everything, key_positions, True, (), (), everything, (), ())
    return Program(queries, keys, query_positions, (stage,))


def rank_program(plan: Plan, mask: Mask, rank: int, device: torch.device) -> Program:
    """One rank's part of a plan."""
    boundaries, query_boundaries = (
        None if x is None else torch.tensor(x) for x in (mask.boundaries, mask.query_boundaries)
    )
    queries = plan.partition.positions(rank)
    last = max((i for i, stage in enumerate(plan.stages) if stage.work[rank]), default=-1)
    stages = []
    held = plan.keys.segments[rank]
    for index, stage in enumerate(plan.stages):
        arrivals = plan.arrivals(index + 1, rank) if index + 1 < len(plan.stages) else ()
        work = stage.work[rank]
        here = ()
        if work and len(queries):
            here = launches(mask, boundaries, queries, _positions(work), query_boundaries)
        coming = [segment for transfer in arrivals for segment in transfer.segments]
        stages.append(
            StageProgram(
                launches=tuple(launch.to(device) for launch in here),
                work=_rows(held, work, device),
                key_positions=_positions(work).int().to(device),
                is_last=index == last,
                sends=tuple(_outgoing(t, held, plan.keys, device) for t in stage.sends if t.source == rank),
                arrivals=tuple(Shipment(t.source, slice(None), count(t.segments)) for t in arrivals),
                arrival_order=_ascending_order(coming, device),
                returns=tuple(
                    Shipment(t.destination, _rows(work, t.segments, device), count(t.segments))
                    for t in plan.returns(index)
                    if t.source == rank
                ),
                contributions=tuple(
                    Shipment(t.source, _rows(plan.keys.segments[rank], t.segments, device), count(t.segments))
                    for t in plan.returns(index)
                    if t.destination == rank
                ),
            )
        )
        held = tuple(sorted(coming))
    among_keys = places(boundaries, queries, query_boundaries).int().to(device)
    return Program(len(queries), plan.keys.counts()[rank], among_keys, tuple(stages))


def _outgoing(transfer: Transfer, held: Segments, keys: Partition, device: torch.device) -> Shipment:
    local = not contains(held, transfer.segments)
    source = keys.segments[transfer.source] if local else held
    return Shipment(transfer.destination, _rows(source, transfer.segments, device), count(transfer.segments), local)


def _positions(segments: Segments) -> Tensor:
    parts = [torch.arange(start, stop) for start, stop in segments]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _rows(held: Segments, wanted: Segments, device: torch.device) -> Rows:
    """Where the wanted positions stand in a tensor that holds the positions `held` in ascending order."""
    rows = torch.searchsorted(_positions(held), _positions(wanted))
    return _compact(rows, device)


def _ascending_order(coming: list[tuple[int, int]], device: torch.device) -> Rows:
    return _compact(torch.argsort(_positions(tuple(coming))), device)


def _compact(rows: Tensor, device: torch.device) -> Rows:
    if len(rows) == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows.diff() == 1).all()):
        return slice(first, last + 1)
    return rows.to(device)
