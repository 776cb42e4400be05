"""What a plan is to do, by brute force: all ranks walk it together, one position at a time, without `verify`.

`walk` raises AssertionError where a plan goes wrong; `direct` makes plans that no generator makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from cases import visible
from torch import Tensor

from ringflash.parallel.planning.plan import Buffers, Move, Plan, RankPlan, Stage
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, intersect, normalize


def positions(segments: Segments) -> list[int]:
    return [position for start, stop in segments for position in range(start, stop)]


def moved(moves: Sequence[Move]) -> list[int]:
    return [position for move in moves for position in positions(move.segments)]


def at_once(moves: Sequence[Move], mine: RankPlan) -> int:
    """Positions of gradient parts that travel together."""
    sizes = [len(positions(move.segments)) for move in moves]
    return sum(sizes if mine.piece is None else [min(size, mine.piece) for size in sizes])


def stage_of(mine: RankPlan, index: int) -> Stage:
    """What a rank does in a stage; nothing behind its last one."""
    return mine.stages[index] if index < len(mine.stages) else Stage()


def stage_count(plan: Plan) -> int:
    return max(len(mine.stages) for mine in plan.ranks)


# The walk


def walk(plan: Plan, mask: Mask) -> None:
    """Run all ranks of a plan forward and backward."""
    for rank, mine in enumerate(plan.ranks):
        assert mine.rank == rank, "the plan of another rank"
        assert positions(mine.queries) == positions(plan.queries.segments[rank]), "other queries than the rank holds"
        assert positions(mine.keys) == positions(plan.keys.segments[rank]), "other keys than the rank holds"
    seen = visible(mask, plan.queries.length, plan.keys.length)
    assert torch.equal(_forward(plan, seen), seen.long()), "a pair is not computed exactly once"
    parts = _backward(plan)
    for rank, queries in enumerate(plan.queries.segments):
        used = seen[positions(queries)].any(0).nonzero().flatten().tolist()
        assert all(parts[position, rank] == 1 for position in used), "a gradient part never reaches its owner"


def _forward(plan: Plan, seen: Tensor) -> Tensor:
    """How often each (query, key) pair is computed."""
    computed = torch.zeros(seen.shape, dtype=torch.int64)
    buffers: list[list[list[int]]] = [[[], []] for _ in plan.ranks]  # two on each rank, which take turns
    for index in range(stage_count(plan)):
        _check_peers(plan, index, "sends", "receives")
        for rank, mine in enumerate(plan.ranks):  # all that arrives does so before anybody reads: that is the worst
            arriving = moved(stage_of(mine, index).receives)
            assert len(arriving) <= mine.buffers.arrivals, "more arrives than there is room for"
            assert len(set(arriving)) == len(arriving), "the same keys arrive twice"
            assert not set(arriving) & set(positions(mine.keys)), "own keys arrive"
            assert not arriving or index + 1 < len(mine.stages), "keys arrive for a stage that there is not"
            buffers[rank][(index + 1) % 2] = arriving
        for rank, mine in enumerate(plan.ranks):
            stage, own, arrived = stage_of(mine, index), set(positions(mine.keys)), set(buffers[rank][index % 2])
            keys, queries = positions(stage.work), positions(mine.queries)
            assert len(set(keys)) == len(keys), "attends the same keys twice in a stage"
            assert set(keys) <= own | arrived, "attends keys that are not there"
            if keys and queries:
                rows, columns = torch.tensor(queries)[:, None], torch.tensor(keys)
                computed[rows, columns] += seen[rows, columns]
            for move in stage.sends:
                assert set(positions(move.segments)) <= (arrived if move.relayed else own), "sends what is not there"
    return computed


def _backward(plan: Plan) -> Counter:
    """How many gradient parts of each key its owner has from each rank at the end, by (key position, rank)."""
    parts: Counter = Counter()
    for index in range(stage_count(plan)):
        _check_peers(plan, index, "returns", "reduces")
        for rank, mine in enumerate(plan.ranks):
            stage, own = stage_of(mine, index), set(positions(mine.keys))
            made = positions(stage.work)
            parts.update((position, rank) for position in made if position in own)
            to_return = Counter(position for position in made if position not in own)
            to_return.subtract(moved(stage.returns))
            assert not any(to_return.values()), "gradient parts are lost, or leave that are not there"
            if mine.piece is not None:
                assert mine.piece > 0
                assert {other.piece for other in plan.ranks} == {mine.piece}, "pieces of other lengths elsewhere"
                assert not stage.returns or len(stage.returns) + bool(set(made) & own) == 1, "keys of several owners"
            assert at_once(stage.returns, mine) <= mine.buffers.returns, "more leaves than there is room for"
            assert at_once(stage.reduces, mine) <= mine.buffers.reduces, "more is reduced than there is room for"
            for move in stage.reduces:
                assert set(positions(move.segments)) <= own, "gradient parts reach a rank that does not own the keys"
                parts.update((position, move.peer) for position in positions(move.segments))
    attended = Counter(
        (position, mine.rank) for mine in plan.ranks for stage in mine.stages for position in positions(stage.work)
    )
    assert parts == attended, "gradient parts are lost or doubled"
    assert set(parts.values()) <= {1}, "a rank attends the same keys in two stages"
    return parts


def _check_peers(plan: Plan, index: int, leaving: str, coming: str) -> None:
    """What a rank sends another in a stage is what that one waits for, message by message and row by row."""
    messages: dict[str, dict[tuple[int, int], list[list[int]]]] = {leaving: {}, coming: {}}
    for rank, mine in enumerate(plan.ranks):
        for name in messages:
            for move in getattr(stage_of(mine, index), name):
                assert 0 <= move.peer < len(plan.ranks), "moves with a rank that there is not"
                assert move.peer != rank, "moves with itself"
                rows = positions(move.segments)
                assert rows, "an empty message"
                assert rows == sorted(set(rows)), "rows are not in the order of positions"
                ends = (rank, move.peer) if name == leaving else (move.peer, rank)
                messages[name].setdefault(ends, []).append(rows)
    assert messages[leaving] == messages[coming], f"{leaving} are not what others have as {coming}"


# Plans by hand


def rebuilt(plan: Plan, ranks: Sequence[RankPlan]) -> Plan:
    """The same plan with other plans of its ranks."""
    return Plan(plan.name, plan.queries, plan.keys, tuple(ranks).__getitem__)


def with_stages(plan: Plan, rank: int, stages: Sequence[Stage], buffers: Buffers | None = None) -> Plan:
    """The same plan with other stages of one rank, and with buffers if they are given."""
    ranks = list(plan.ranks)
    ranks[rank] = replace(ranks[rank], stages=tuple(stages), buffers=buffers or ranks[rank].buffers)
    return rebuilt(plan, ranks)


def direct(
    mask: Mask, queries: Partition, keys: Partition, waves: int, wave_of: Callable[[int, int, int], int]
) -> Plan:
    """Every rank fetches foreign keys from their owners themselves, and attends to its own whenever it likes.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys.
        waves: number of stages.
        wave_of: the stage in which a rank attends to an interval of an owner's keys (rank, owner, index of the
            interval); foreign ones not in the first.
    """
    ranks = range(queries.ranks)
    work = [[{} for _ in range(waves)] for _ in ranks]  # of each rank and stage: owner -> segments
    for rank in ranks:
        seen = normalize(x for segment in queries.segments[rank] for x in mask.keys_needed(segment))
        for owner in ranks:
            for number, interval in enumerate(intersect(normalize(keys.segments[owner]), seen)):
                wave = wave_of(rank, owner, number)
                work[rank][wave][owner] = normalize((*work[rank][wave].get(owner, ()), interval))

    def foreign(rank: int, wave: int) -> dict[int, Segments]:
        return {o: segments for o, segments in work[rank][wave].items() if o != rank} if wave < waves else {}

    def asked(owner: int, wave: int) -> dict[int, Segments]:
        return {r: work[r][wave][owner] for r in ranks if r != owner and owner in work[r][wave]} if wave < waves else {}

    def moves(of: dict[int, Segments]) -> tuple[Move, ...]:
        return tuple(Move(peer, segments) for peer, segments in sorted(of.items()))

    def of(rank: int) -> RankPlan:
        stages = [
            Stage(
                work=normalize(x for segments in work[rank][wave].values() for x in segments),
                receives=moves(foreign(rank, wave + 1)),
                sends=moves(asked(rank, wave + 1)),
                returns=moves(foreign(rank, wave)),
                reduces=moves(asked(rank, wave)),
            )
            for wave in range(waves)
        ]
        while len(stages) > 1 and not stages[-1]:
            stages.pop()
        return RankPlan(rank, queries.segments[rank], keys.segments[rank], tuple(stages), Buffers.of(tuple(stages)))

    return Plan("direct", queries, keys, of)
