"""The program of one of several ranks, from its part of a plan.

Legend: T query rows of this rank, S key rows that a stage attends to.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.planning.launches import Launch, with_layout
from ringflash.parallel.planning.plan import Move, RankPlan, Stage
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.pulls import Share
from ringflash.parallel.planning.row_places import aligned, rows_at, runs_at, segment_positions
from ringflash.parallel.planning.stage_program import Shipment, StageProgram
from ringflash.parallel.positions.band import band_of_bounds, band_of_mask
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, count, intersect, normalize
from ringflash.parallel.positions.visibility import block_places, places, position_bounds

MOST_RUNS = 4
"""Runs of rows for one rank that leave as they lie; of more, the host has more to ask for than a GPU has to copy."""


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
    work = _launches(plan, mask, boundaries, queries, query_boundaries, device)
    last = max((i for i, stage in enumerate(plan.stages) if stage.work), default=-1)
    stages, arrived = [], ()
    for index, (stage, here) in enumerate(zip(plan.stages, work, strict=True)):
        stages.append(_stage(index, stage, here, plan, arrived, index == last, device))
        arrived = tuple(segment for move in stage.receives for segment in move.segments)
    among_keys = places(boundaries, queries, query_boundaries)
    sent = normalize(x for stage in plan.stages for move in stage.sends if not move.relayed for x in move.segments)
    given = tuple(runs_at(plan.keys, sent))
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
    order = rows_at((*mine, *foreign), stage.work, device) if mine and foreign else None
    receives, filled = [], 0
    for move in stage.receives:
        size = count(move.segments)
        receives.append(Shipment(move.peer, None if size == buffer else slice(filled, filled + size), size))
        filled += size
    return StageProgram(
        launches=work,
        own=rows_at(own, mine, device) if mine or not stage.work else None,
        arrived=rows_at(arrived, foreign, device) if foreign else None,
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
        kept=rows_at(stage.work, mine, device) if mine else None,
        everything=mine == own and not foreign,
        index=index,
    )


def _beside(held: Segments, mine: Segments, foreign: Segments) -> tuple[tuple[int, int, int, bool], ...]:
    """See `StageProgram.beside`; empty where there are many runs."""
    runs: list[tuple[int, int, int, bool]] = []
    filled = came = 0
    for start, stop, own in sorted([(*x, True) for x in mine] + [(*x, False) for x in foreign]):
        for first, last in runs_at(held, ((start, stop),)) if own else ((came, came + stop - start),):
            size = last - first
            if runs and runs[-1][3] == own and runs[-1][1] + runs[-1][2] == first:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + size, own)
            else:
                runs.append((filled, first, size, own))
            filled += size
        came += 0 if own else stop - start
    return tuple(runs) if len(runs) <= 2 * MOST_RUNS else ()


def _shipment(move: Move, held: Segments, device: torch.device) -> Shipment:
    rows = None if held == move.segments else rows_at(held, move.segments, device)
    runs = tuple(runs_at(held, move.segments)) if isinstance(rows, Tensor) else ()
    return Shipment(move.peer, rows, count(move.segments), move.relayed, runs if len(runs) <= MOST_RUNS else ())


def _launches(
    plan: RankPlan,
    mask: Mask,
    boundaries: Tensor | None,
    queries: Tensor,
    query_boundaries: Tensor | None,
    device: torch.device,
) -> list[tuple[Launch, ...]]:
    """Those of each stage, all of their intervals in one table that is copied to the device once."""
    columns = 4 if mask.two_intervals else 2
    bounds = position_bounds(mask.without_layout, boundaries, queries, query_boundaries)[:columns]
    bounds = [bound.int().numpy() for bound in bounds]
    working = [index for index, stage in enumerate(plan.stages) if stage.work and len(queries)]
    table = np.empty((len(working), columns, aligned(len(queries))), dtype=np.int32)
    for rows, index in zip(table, working, strict=True):
        for row, bound in zip(rows, bounds, strict=True):
            _keys_before(bound, plan.stages[index].work, row[: len(queries)])
    on_device = torch.from_numpy(table).to(device)[..., : len(queries)]
    launches_of: list[tuple[Launch, ...]] = [()] * len(plan.stages)
    of_mask = band_of_mask(mask)
    for rows, on_host, index in zip(on_device.unbind(), table, working, strict=True):
        start, stop, *sinks = rows.unbind()
        keys, places = plan.stages[index].work, None
        if mask.has_layout:
            places = block_places(mask, boundaries, queries, segment_positions(keys), query_boundaries).to(device)
        # Where positions leap rows see more keys together; that they may see fewer is no reason for another kernel.
        band = None if of_mask is None else max(of_mask, band_of_bounds(*on_host[:, : len(queries)]))
        launches_of[index] = with_layout(mask, KeyIntervals(start, stop, count(keys), *sinks, band=band), places)
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
