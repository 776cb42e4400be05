"""Proof, without a device, that a plan computes every visible pair exactly once and cannot hang."""

from __future__ import annotations

from ringflash.errors import RingflashError
from ringflash.parallel.planning.plan import Plan, Stage, Transfer
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, contains, count, intersect, normalize


class PlanError(RingflashError):
    """A plan that would compute a wrong result, hang, or take more memory than it says."""


def verify(plan: Plan, mask: Mask) -> None:
    """Raise PlanError unless the plan is right for the mask.

    Shown, for every rank: work lies on keys that are there; no key is attended twice; every key that any of the rank's
    queries sees is attended; only keys that are there are sent, to another rank, at most once a stage; what arrives
    for a stage stays within `plan.buffer_tokens`. Queries never move, and the partition holds each position once, so
    each visible pair is computed by exactly one rank. All transfers of a stage are posted before any is waited for, so
    stages cannot deadlock.
    """
    for index, stage in enumerate(plan.stages):
        _check_ranks(index, stage, plan.partition.ranks)
    for rank, held in enumerate(plan.keys.segments):
        done: Segments = ()
        for index, stage in enumerate(plan.stages):
            arrived = _arrived(plan, index, rank)
            _check_work(f"stage {index}, rank {rank}", stage.work[rank], held if index == 0 else arrived, done)
            done = normalize((*done, *stage.work[rank]))
            _check_sends(index, rank, stage.sends, held, arrived)
            if count(arrived) > plan.buffer_tokens:
                raise PlanError(f"stage {index}, rank {rank}: {count(arrived)} tokens arrive in {plan.buffer_tokens}")
        seen = normalize(
            interval for segment in plan.partition.segments[rank] for interval in mask.keys_needed(segment)
        )
        needed = intersect(seen, ((0, plan.keys.length),))  # masks without a right bound know no end
        if not contains(done, needed):
            raise PlanError(f"rank {rank}: sees {needed}, attends only {done}")
    if plan.stages and plan.stages[-1].sends:
        raise PlanError("the last stage sends keys that nobody attends")


def _check_ranks(index: int, stage: Stage, ranks: int) -> None:
    if len(stage.work) != ranks:
        raise PlanError(f"stage {index}: work for {len(stage.work)} ranks, the partition has {ranks}")
    for transfer in stage.sends:
        if not (0 <= transfer.source < ranks and 0 <= transfer.destination < ranks):
            raise PlanError(f"stage {index}: {transfer} names a rank outside 0 to {ranks - 1}")


def _arrived(plan: Plan, index: int, rank: int) -> Segments:
    arrived: Segments = ()
    for transfer in plan.arrivals(index, rank):
        if intersect(arrived, transfer.segments):
            raise PlanError(f"stage {index}, rank {rank}: the same keys arrive twice")
        arrived = tuple(sorted((*arrived, *transfer.segments)))
    return arrived


def _check_work(where: str, work: Segments, present: Segments, done: Segments) -> None:
    if any(start >= stop for start, stop in work) or count(normalize(work)) != count(work):
        raise PlanError(f"{where}: work {work} is not disjoint")
    if not contains(present, work):
        raise PlanError(f"{where}: attends {work}, of which only {present} is there")
    if intersect(done, normalize(work)):
        raise PlanError(f"{where}: attends {intersect(done, normalize(work))} a second time")


def _check_sends(index: int, rank: int, sends: tuple[Transfer, ...], held: Segments, arrived: Segments) -> None:
    mine = [transfer for transfer in sends if transfer.source == rank]
    if len({transfer.destination for transfer in mine}) != len(mine) or any(t.destination == rank for t in mine):
        raise PlanError(f"stage {index}, rank {rank}: sends to itself or twice to one rank")
    for transfer in mine:
        if not any(contains(present, transfer.segments) for present in (held, arrived)):
            raise PlanError(f"stage {index}, rank {rank}: sends {transfer.segments}, which is not there")
