"""Proof, without a device, that a plan computes every visible pair and every gradient exactly once and cannot hang."""

from __future__ import annotations

from ringflash.errors import RingflashError
from ringflash.parallel.planning.plan import Move, Plan, RankPlan, Stage, tokens_at_once
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.segments import Segments, contains, count, intersect, normalize


class PlanError(RingflashError):
    """A plan that would compute a wrong result, hang, or take more memory than it says."""


def verify(plan: Plan, mask: Mask) -> None:
    """Raise PlanError unless the plan is right for the mask, forward and backward.

    Shown, for every rank:
    - It attends to keys that are there: its own, or such as arrived for this very stage. Every key that any of its
      queries sees is attended to once. Queries never move, and a partition holds each position once, so each visible
      pair is computed by exactly one rank.
    - Only keys that are there are sent. What one rank sends in a stage is what the other receives in it, so no rank
      waits for what nobody sends. All transfers of a stage are posted before any is waited for: stages cannot deadlock.
    - The gradient part of each foreign key that a stage works on leaves for its owner behind that stage, once, and the
      owner expects it there; the part of its own keys stays.
    - What arrives and leaves fits in the buffers that the plan names. Of the two for arrivals a stage reads one, which
      was filled in the stage before, and fills the other, so none is overwritten while it is read.
    """
    if plan.queries.ranks != plan.keys.ranks:
        raise PlanError(f"queries lie on {plan.queries.ranks} ranks, keys on {plan.keys.ranks}")
    for rank, mine in enumerate(plan.ranks):
        if mine.rank != rank:
            raise PlanError(f"rank {rank}: has the plan of rank {mine.rank}")
        if mine.piece != plan.ranks[0].piece or (mine.piece is not None and mine.piece < 1):
            raise PlanError(f"rank {rank}: pieces of {mine.piece} positions, on rank 0 of {plan.ranks[0].piece}")
        _check_rank(plan, mine, mask)


def _check_rank(plan: Plan, mine: RankPlan, mask: Mask) -> None:
    if (mine.queries, mine.keys) != (plan.queries.segments[mine.rank], plan.keys.segments[mine.rank]):
        raise PlanError(f"rank {mine.rank}: its plan is for other queries or keys than its partition holds")
    done: Segments = ()
    arrived: Segments = ()
    for index, stage in enumerate(mine.stages):
        where = f"stage {index}, rank {mine.rank}"
        _check_work(where, stage.work, normalize((*mine.keys, *arrived)), done)
        _check_sends(where, stage, mine.keys, arrived)
        _check_gradients(where, stage, plan, mine)
        for ours, theirs in (
            ("sends", "receives"),
            ("receives", "sends"),
            ("returns", "reduces"),
            ("reduces", "returns"),
        ):
            _check_peers(where, plan, index, mine.rank, getattr(stage, ours), ours, theirs)
        for name, moves in (("arrivals", stage.receives), ("returns", stage.returns), ("reduces", stage.reduces)):
            tokens = tokens_at_once(moves, None if name == "arrivals" else mine.piece)
            if tokens > getattr(mine.buffers, name):
                raise PlanError(f"{where}: {tokens} {name} in a buffer of {getattr(mine.buffers, name)}")
        done = normalize((*done, *stage.work))
        arrived = _disjoint(where, "receives", stage.receives)
        if intersect(arrived, mine.keys):
            raise PlanError(f"{where}: receives {intersect(arrived, mine.keys)}, which it has")
    if arrived:
        raise PlanError(f"rank {mine.rank}: receives keys in its last stage")
    seen = normalize(interval for segment in mine.queries for interval in mask.keys_needed(segment))
    needed = intersect(seen, ((0, plan.keys.length),))  # masks without a right bound know no end
    if not contains(done, needed):
        raise PlanError(f"rank {mine.rank}: sees {needed}, attends only {done}")


def _check_work(where: str, work: Segments, present: Segments, done: Segments) -> None:
    if normalize(work) != work:
        raise PlanError(f"{where}: work {work} is not ascending and apart")
    if not contains(present, work):
        raise PlanError(f"{where}: attends {work}, of which only {present} is there")
    if intersect(done, work):
        raise PlanError(f"{where}: attends {intersect(done, work)} a second time")


def _check_sends(where: str, stage: Stage, own: Segments, arrived: Segments) -> None:
    for move in stage.sends:
        if not contains(arrived if move.relayed else own, move.segments):
            raise PlanError(f"{where}: sends {move.segments}, which is not there")


def _check_gradients(where: str, stage: Stage, plan: Plan, mine: RankPlan) -> None:
    """Foreign keys of the work are returned, and only they."""
    if mine.piece is not None and (len(stage.returns) > 1 or (stage.returns and intersect(stage.work, mine.keys))):
        raise PlanError(f"{where}: works on keys of several owners, whose gradients cannot travel in pieces")
    returned = _disjoint(where, "returns", stage.returns)
    if intersect(returned, mine.keys):
        raise PlanError(f"{where}: returns gradients of its own keys")
    kept = intersect(stage.work, mine.keys)
    if normalize((*returned, *kept)) != normalize(stage.work):
        raise PlanError(f"{where}: works on {stage.work}, returns gradients of {returned} and keeps those of {kept}")
    for move in stage.returns:
        if 0 <= move.peer < plan.keys.ranks and not contains(plan.keys.segments[move.peer], move.segments):
            raise PlanError(f"{where}: returns {move.segments} to rank {move.peer}, which does not own all of it")


def _check_peers(
    where: str, plan: Plan, index: int, rank: int, moves: tuple[Move, ...], ours: str, theirs: str
) -> None:
    if len({move.peer for move in moves}) != len(moves):
        raise PlanError(f"{where}: {ours} twice with one rank")
    for move in moves:
        if not 0 <= move.peer < plan.queries.ranks or move.peer == rank:
            raise PlanError(
                f"{where}: {ours} with rank {move.peer}; allowed are other ranks below {plan.queries.ranks}"
            )
        if normalize(move.segments) != move.segments or not move.segments:
            raise PlanError(f"{where}: {ours} {move.segments}, which is empty or not ascending and apart")
        stages = plan.ranks[move.peer].stages
        expected = [x.segments for x in getattr(stages[index], theirs) if x.peer == rank] if index < len(stages) else []
        if expected != [move.segments]:
            raise PlanError(f"{where}: {ours} {move.segments} with rank {move.peer}, which {theirs} {expected}")


def _disjoint(where: str, name: str, moves: tuple[Move, ...]) -> Segments:
    segments = [segment for move in moves for segment in move.segments]
    union = normalize(segments)
    if count(union) != count(tuple(segments)):
        raise PlanError(f"{where}: {name} the same keys twice")
    return union
