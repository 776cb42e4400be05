"""Ways to break a plan: one fault at a time, for all that can go wrong, and any damage to any field.

Where a fault shows at both ends of a move, both ends are changed alike, so that nothing but the fault gives it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from hypothesis import strategies as st
from plan_oracle import moved, positions, rebuilt, stage_count, stage_of, with_stages

from ringflash.parallel.planning.plan import Buffers, Move, Plan, Stage
from ringflash.parallel.positions.segments import Segments, count, intersect, normalize

AMPLE = Buffers(10**6, 10**6, 10**6)
OTHER_END = {"sends": "receives", "receives": "sends", "returns": "reduces", "reduces": "returns"}
Place = tuple[int, int, int]
"""Rank, stage and number of a move."""


# Edits


def edit(plan: Plan, rank: int, index: int, **changes: object) -> Plan:
    """Change fields of one rank's stage; the rank gets as many stages as that takes, and buffers beyond need."""
    stages = [stage_of(plan.ranks[rank], i) for i in range(max(index + 1, len(plan.ranks[rank].stages)))]
    stages[index] = replace(stages[index], **changes)
    return with_stages(plan, rank, stages, AMPLE)


def places(plan: Plan, name: str) -> list[Place]:
    """Where all moves of a kind stand."""
    return [
        (rank, index, number)
        for rank, mine in enumerate(plan.ranks)
        for index, stage in enumerate(mine.stages)
        for number in range(len(getattr(stage, name)))
    ]


def move_at(plan: Plan, name: str, place: Place) -> Move:
    rank, index, number = place
    return getattr(plan.ranks[rank].stages[index], name)[number]


def with_move(plan: Plan, name: str, place: Place, *instead: Move) -> Plan:
    """Put other moves, or none, in the place of one."""
    rank, index, number = place
    moves = list(getattr(stage_of(plan.ranks[rank], index), name))
    moves[number : number + 1] = instead
    return edit(plan, rank, index, **{name: tuple(moves)})


def add_move(plan: Plan, name: str, rank: int, index: int, move: Move) -> Plan:
    return with_move(plan, name, (rank, index, len(getattr(stage_of(plan.ranks[rank], index), name))), move)


def other_end(plan: Plan, name: str, place: Place) -> Place:
    """The place of what the peer has for a move."""
    rank, index, _ = place
    peer = move_at(plan, name, place).peer
    theirs = getattr(stage_of(plan.ranks[peer], index), OTHER_END[name])
    return peer, index, [move.peer for move in theirs].index(rank)


def at_both_ends(plan: Plan, name: str, place: Place, segments: Segments) -> Plan:
    """Let other positions move, or none, and both ranks agree on it."""
    for kind, at in ((name, place), (OTHER_END[name], other_end(plan, name, place))):
        move = move_at(plan, kind, at)
        plan = with_move(plan, kind, at, *([replace(move, segments=segments)] if segments else []))
    return plan


def add_at_both_ends(plan: Plan, name: str, rank: int, index: int, move: Move) -> Plan:
    plan = add_move(plan, name, rank, index, move)
    return add_move(plan, OTHER_END[name], move.peer, index, Move(rank, move.segments))


def shorter(segments: Segments) -> Segments:
    """Without the first position."""
    (start, stop), *rest = segments
    return ((start + 1, stop), *rest) if stop - start > 1 else tuple(rest)


def without(segments: Segments, gap: tuple[int, int]) -> Segments:
    outside = ((-1, gap[0]), (gap[1], 10**9)) if gap[0] < gap[1] else ((-1, 10**9),)
    return intersect(normalize(segments), outside)


def understated(plan: Plan, which: int, name: str, need: str) -> Plan:
    """A rank's buffer holds one key less than what one of its stages needs."""
    ranks = list(plan.ranks)
    needing = [mine for mine in ranks if any(getattr(stage, need) for stage in mine.stages)]
    mine = needing[which % len(needing)]
    most = max(len(moved(getattr(stage, need))) for stage in mine.stages)
    ranks[mine.rank] = replace(mine, buffers=replace(mine.buffers, **{name: most - 1}))
    return rebuilt(plan, ranks)


def third(plan: Plan, *others: int) -> int:
    """A rank that is none of two."""
    return next(rank for rank in range(len(plan.ranks)) if rank not in others)


def pick(plan: Plan, name: str, which: int) -> Place:
    found = places(plan, name)
    return found[which % len(found)]


def working(plan: Plan, which: int) -> tuple[int, int, Segments]:
    """Rank, stage and segments of some work."""
    found = [(mine.rank, i, stage.work) for mine in plan.ranks for i, stage in enumerate(mine.stages) if stage.work]
    return found[which % len(found)]


def own_work(plan: Plan, which: int) -> tuple[int, int, Segments]:
    """Rank, stage and segments of some work on the rank's own keys."""
    found = [
        (mine.rank, i, own)
        for mine in plan.ranks
        for i, stage in enumerate(mine.stages)
        if (own := intersect(stage.work, mine.keys))
    ]
    return found[which % len(found)]


# Keys on their way


def drop_a_send(plan: Plan, which: int) -> Plan:
    return with_move(plan, "sends", pick(plan, "sends", which))


def send_what_the_peer_does_not_receive(plan: Plan, which: int) -> Plan:
    return with_move(plan, "receives", pick(plan, "receives", which))


def drop_a_transfer(plan: Plan, which: int) -> Plan:
    return at_both_ends(plan, "sends", pick(plan, "sends", which), ())


def shorten_a_send(plan: Plan, which: int) -> Plan:
    place = pick(plan, "sends", which)
    move = move_at(plan, "sends", place)
    return with_move(plan, "sends", place, replace(move, segments=shorter(move.segments)))


def shorten_a_transfer(plan: Plan, which: int) -> Plan:
    place = pick(plan, "sends", which)
    return at_both_ends(plan, "sends", place, shorter(move_at(plan, "sends", place).segments))


def receive_in_another_stage(plan: Plan, which: int) -> Plan:
    rank, index, number = pick(plan, "receives", which)
    move = move_at(plan, "receives", (rank, index, number))
    late = with_move(plan, "receives", (rank, index, number))
    return add_move(late, "receives", rank, index + 1, move)


def send_what_is_not_held(plan: Plan, which: int) -> Plan:
    rank, index, number = pick(plan, "sends", which)
    move = move_at(plan, "sends", (rank, index, number))
    foreign = plan.keys.segments[third(plan, rank, move.peer)]
    held = foreign if index == 0 else plan.keys.segments[move.peer]
    return at_both_ends(plan, "sends", (rank, index, number), normalize((*move.segments, *held)))


def say_that_what_is_sent_came_from_elsewhere(plan: Plan, which: int) -> Plan:
    place = pick(plan, "sends", which)
    move = move_at(plan, "sends", place)
    return with_move(plan, "sends", place, replace(move, relayed=not move.relayed))


def send_to_itself(plan: Plan, which: int) -> Plan:
    rank, index, number = pick(plan, "sends", which)
    move = move_at(plan, "sends", (rank, index, number))
    plan = at_both_ends(plan, "sends", (rank, index, number), ())
    return add_at_both_ends(plan, "sends", rank, index, replace(move, peer=rank))


def send_to_nobody(plan: Plan, which: int) -> Plan:
    rank = which % len(plan.ranks)
    nobody = len(plan.ranks) if which % 2 else -1
    return add_move(plan, "sends", rank, 0, Move(nobody, plan.keys.segments[rank]))


def send_twice(plan: Plan, which: int) -> Plan:
    rank, index, number = pick(plan, "sends", which)
    return add_at_both_ends(plan, "sends", rank, index, move_at(plan, "sends", (rank, index, number)))


def in_another_order(plan: Plan, name: str, which: int) -> Plan:
    """Both ranks agree on the order of the rows, but rows of a tensor lie in the order of positions."""
    able = [place for place in places(plan, name) if count(move_at(plan, name, place).segments) > 1]
    place = able[which % len(able)]
    reverse = positions(move_at(plan, name, place).segments)[::-1]
    return at_both_ends(plan, name, place, tuple((position, position + 1) for position in reverse))


def send_in_another_order(plan: Plan, which: int) -> Plan:
    return in_another_order(plan, "sends", which)


def send_nothing(plan: Plan, which: int) -> Plan:
    able = [
        (rank, index, peer)
        for rank in range(len(plan.ranks))
        for index in range(stage_count(plan))
        for peer in range(len(plan.ranks))
        if peer != rank and all(move.peer != peer for move in stage_of(plan.ranks[rank], index).sends)
    ]
    rank, index, peer = able[which % len(able)]
    return add_at_both_ends(plan, "sends", rank, index, Move(peer, ()))


def receive_the_same_keys_from_two(plan: Plan, which: int) -> Plan:
    """A third rank that has what one sends to another sends it too."""
    able = []
    for rank, index, number in places(plan, "receives"):
        move = move_at(plan, "receives", (rank, index, number))
        for third in plan.ranks:
            sends = stage_of(third, index).sends
            if third.rank not in (rank, move.peer) and all(other.peer != rank for other in sends):
                arrived = normalize(
                    x for other in (stage_of(third, index - 1).receives if index else ()) for x in other.segments
                )
                for held, relayed in ((third.keys, False), (arrived, True)):
                    if same := intersect(move.segments, held):
                        able.append((third.rank, index, Move(rank, same, relayed)))
    return add_at_both_ends(plan, "sends", *able[which % len(able)])


def receive_own_keys(plan: Plan, which: int) -> Plan:
    """A rank that has another's keys sends them back to it."""
    there = [place for place in places(plan, "receives") if place[1] + 1 < len(plan.ranks[place[0]].stages)]
    able = [
        (rank, index, owner, own)
        for rank, index, number in there
        for owner in range(len(plan.ranks))
        if (own := intersect(move_at(plan, "receives", (rank, index, number)).segments, plan.keys.segments[owner]))
    ]
    rank, index, owner, own = able[which % len(able)]
    if len(plan.ranks[owner].stages) <= index + 2:  # there is to be a stage that they arrive for
        plan = edit(plan, owner, index + 2)
    existing = [n for n, move in enumerate(stage_of(plan.ranks[rank], index + 1).sends) if move.peer == owner]
    if not existing:
        return add_at_both_ends(plan, "sends", rank, index + 1, Move(owner, own, relayed=True))
    place = (rank, index + 1, existing[0])
    return at_both_ends(plan, "sends", place, normalize((*move_at(plan, "sends", place).segments, *own)))


def end_with_a_send(plan: Plan, which: int) -> Plan:
    rank = which % len(plan.ranks)
    move = Move((rank + 1) % len(plan.ranks), plan.keys.segments[rank])
    return add_at_both_ends(plan, "sends", rank, stage_count(plan) - 1, move)


# Work


def repeat_work(plan: Plan, which: int) -> Plan:
    rank, _, own = own_work(plan, which)
    return edit(plan, rank, stage_count(plan), work=own)


def repeat_foreign_work(plan: Plan, which: int) -> Plan:
    """A rank fetches keys once more, attends to them once more, and returns their gradients."""
    returned = places(plan, "returns")
    rank, index, number = returned[which % len(returned)]
    move, stages = move_at(plan, "returns", (rank, index, number)), stage_count(plan)
    plan = add_at_both_ends(plan, "sends", move.peer, stages - 1, Move(rank, move.segments))
    plan = edit(plan, rank, stages, work=move.segments)
    return add_at_both_ends(plan, "returns", rank, stages, move)


def attend_the_same_keys_twice_in_a_stage(plan: Plan, which: int) -> Plan:
    rank, index, work = working(plan, which)
    return edit(plan, rank, index, work=work * 2)


def forget_work(plan: Plan, which: int) -> Plan:
    rank, index, work = working(plan, which)
    plan = edit(plan, rank, index, work=work[1:])
    for place in [place for place in places(plan, "returns") if place[:2] == (rank, index)][::-1]:
        left = intersect(move_at(plan, "returns", place).segments, work[1:])
        plan = at_both_ends(plan, "returns", place, left)
    return plan


def work_on_absent_keys(plan: Plan, which: int) -> Plan:
    rank = which % len(plan.ranks)
    other = (rank + 1) % len(plan.ranks)
    work = normalize((*plan.ranks[rank].stages[0].work, *plan.keys.segments[other]))
    plan = edit(plan, rank, 0, work=work)
    return add_at_both_ends(plan, "returns", rank, 0, Move(other, plan.keys.segments[other]))


def lose_the_last_stage(plan: Plan, which: int) -> Plan:
    last = stage_count(plan) - 1
    return rebuilt(plan, [replace(mine, stages=mine.stages[:last], buffers=AMPLE) for mine in plan.ranks])


def lose_the_last_stage_of_a_rank(plan: Plan, which: int) -> Plan:
    able = [mine.rank for mine in plan.ranks if len(mine.stages) > 1]
    rank = able[which % len(able)]
    return with_stages(plan, rank, plan.ranks[rank].stages[:-1], AMPLE)


def swap_two_ranks(plan: Plan, which: int) -> Plan:
    ranks = list(plan.ranks)
    one, other = which % len(ranks), (which + 1) % len(ranks)
    ranks[one], ranks[other] = ranks[other], ranks[one]
    return rebuilt(plan, ranks)


def hold_other_queries(plan: Plan, which: int) -> Plan:
    ranks = list(plan.ranks)
    mine = ranks[which % len(ranks)]
    ranks[mine.rank] = replace(mine, queries=shorter(mine.queries))
    return rebuilt(plan, ranks)


def hold_other_keys(plan: Plan, which: int) -> Plan:
    ranks = list(plan.ranks)
    mine = ranks[which % len(ranks)]
    ranks[mine.rank] = replace(mine, keys=normalize((*mine.keys, *ranks[which % len(ranks) - 1].keys)))
    return rebuilt(plan, ranks)


# Gradients


def drop_a_return(plan: Plan, which: int) -> Plan:
    return with_move(plan, "returns", pick(plan, "returns", which))


def drop_a_reduce(plan: Plan, which: int) -> Plan:
    return with_move(plan, "reduces", pick(plan, "reduces", which))


def lose_gradients(plan: Plan, which: int) -> Plan:
    return at_both_ends(plan, "returns", pick(plan, "returns", which), ())


def shorten_a_return(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    move = move_at(plan, "returns", place)
    return with_move(plan, "returns", place, replace(move, segments=shorter(move.segments)))


def lose_some_gradients(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    return at_both_ends(plan, "returns", place, shorter(move_at(plan, "returns", place).segments))


def return_to_the_wrong_rank(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    move = move_at(plan, "returns", place)
    wrong = third(plan, place[0], move.peer)
    plan = at_both_ends(plan, "returns", place, ())
    return add_at_both_ends(plan, "returns", *place[:2], replace(move, peer=wrong))


def return_in_another_stage(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    move = move_at(plan, "returns", place)
    plan = at_both_ends(plan, "returns", place, ())
    return add_at_both_ends(plan, "returns", place[0], place[1] + 1, move)


def return_own_keys(plan: Plan, which: int) -> Plan:
    rank, index, own = own_work(plan, which)
    return add_at_both_ends(plan, "returns", rank, index, Move((rank + 1) % len(plan.ranks), own))


def return_own_keys_to_itself(plan: Plan, which: int) -> Plan:
    rank, index, own = own_work(plan, which)
    return add_at_both_ends(plan, "returns", rank, index, Move(rank, own))


def return_twice(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    return add_at_both_ends(plan, "returns", *place[:2], move_at(plan, "returns", place))


def return_in_another_order(plan: Plan, which: int) -> Plan:
    return in_another_order(plan, "returns", which)


def return_again_later(plan: Plan, which: int) -> Plan:
    place = pick(plan, "returns", which)
    return add_at_both_ends(plan, "returns", place[0], stage_count(plan), move_at(plan, "returns", place))


def return_what_was_not_worked_on(plan: Plan, which: int) -> Plan:
    rank = which % len(plan.ranks)
    other = (rank + 1) % len(plan.ranks)
    return add_at_both_ends(plan, "returns", rank, 0, Move(other, plan.keys.segments[other]))


# Memory


def understate_arrivals(plan: Plan, which: int) -> Plan:
    return understated(plan, which, "arrivals", "receives")


def understate_returns(plan: Plan, which: int) -> Plan:
    return understated(plan, which, "returns", "returns")


def understate_reduces(plan: Plan, which: int) -> Plan:
    return understated(plan, which, "reduces", "reduces")


FAULTS: tuple[Callable[[Plan, int], Plan], ...] = (
    drop_a_send,
    send_what_the_peer_does_not_receive,
    drop_a_transfer,
    shorten_a_send,
    shorten_a_transfer,
    receive_in_another_stage,
    send_what_is_not_held,
    say_that_what_is_sent_came_from_elsewhere,
    send_to_itself,
    send_to_nobody,
    send_twice,
    send_in_another_order,
    send_nothing,
    receive_the_same_keys_from_two,
    receive_own_keys,
    end_with_a_send,
    repeat_work,
    repeat_foreign_work,
    attend_the_same_keys_twice_in_a_stage,
    forget_work,
    work_on_absent_keys,
    lose_the_last_stage,
    lose_the_last_stage_of_a_rank,
    swap_two_ranks,
    hold_other_queries,
    hold_other_keys,
    drop_a_return,
    drop_a_reduce,
    lose_gradients,
    shorten_a_return,
    lose_some_gradients,
    return_to_the_wrong_rank,
    return_in_another_stage,
    return_own_keys,
    return_own_keys_to_itself,
    return_twice,
    return_in_another_order,
    return_again_later,
    return_what_was_not_worked_on,
    understate_arrivals,
    understate_returns,
    understate_reduces,
)


# Any damage


@st.composite
def damaged(draw: st.DrawFn, plan: Plan) -> Plan:
    """A plan with up to three changes anywhere; some of them leave it right."""
    for _ in range(draw(st.integers(1, 3))):
        change = draw(
            st.sampled_from([_change_of_rank, _change_of_work, _change_of_moves, _change_of_transfer, _later])
        )
        plan = change(draw, plan)
    return plan


def _change_of_rank(draw: st.DrawFn, plan: Plan) -> Plan:
    ranks = list(plan.ranks)
    place = draw(st.integers(0, len(ranks) - 1))
    mine = ranks[place]
    field = draw(st.sampled_from([field.name for field in fields(mine)]))
    if field == "rank":
        value: object = draw(st.integers(0, len(ranks) - 1))
    elif field == "stages":
        stages = draw(st.permutations(mine.stages)) if draw(st.booleans()) else list(mine.stages)
        value = tuple(draw(st.sampled_from([stages, stages[:-1], [*stages, Stage()], stages + stages[:1]])))
    elif field == "buffers":
        sizes = st.sampled_from([-1, 0, 1])
        value = Buffers(*(max(0, getattr(mine.buffers, x.name) + draw(sizes)) for x in fields(Buffers)))
    elif field == "piece":
        value = draw(st.sampled_from([None, 0, 1, 3, 32768]))
    else:
        value = draw(_changed(getattr(mine, field), plan.keys.length))
    ranks[place] = replace(mine, **{field: value})
    return rebuilt(plan, ranks)


def _change_of_work(draw: st.DrawFn, plan: Plan) -> Plan:
    rank, index = _stage(draw, plan)
    work = draw(_changed(stage_of(plan.ranks[rank], index).work, plan.keys.length))
    return edit(plan, rank, index, work=work)


def _change_of_moves(draw: st.DrawFn, plan: Plan) -> Plan:
    """One end of a move alone, or a new one."""
    name = draw(st.sampled_from(list(OTHER_END)))
    found = places(plan, name)
    if not found or draw(st.integers(0, 4)) == 0:
        rank, index = _stage(draw, plan)
        segments = draw(_changed(plan.keys.segments[rank], plan.keys.length))
        peer = draw(st.integers(-1, len(plan.ranks)))
        return add_move(plan, name, rank, index, Move(peer, segments, draw(st.booleans())))
    place = draw(st.sampled_from(found))
    move = move_at(plan, name, place)
    changed = draw(
        st.sampled_from(["peer", "segments", "relayed", "gone", "twice"]),
    )
    if changed == "peer":
        return with_move(plan, name, place, replace(move, peer=draw(st.integers(-1, len(plan.ranks)))))
    if changed == "segments":
        return with_move(plan, name, place, replace(move, segments=draw(_changed(move.segments, plan.keys.length))))
    if changed == "relayed":
        return with_move(plan, name, place, replace(move, relayed=not move.relayed))
    return with_move(plan, name, place, *([] if changed == "gone" else [move, move]))


def _change_of_transfer(draw: st.DrawFn, plan: Plan) -> Plan:
    """Both ends of a move, or a new one."""
    name = draw(st.sampled_from(["sends", "returns"]))
    ranks = st.integers(0, len(plan.ranks) - 1)
    rank, index = _stage(draw, plan)
    if draw(st.booleans()):
        segments = draw(st.sampled_from([plan.keys.segments[rank], stage_of(plan.ranks[rank], index).work]))
        return add_at_both_ends(plan, name, rank, index, Move(draw(ranks), normalize(segments), draw(st.booleans())))
    able = [place for place in places(plan, name) if _has_other_end(plan, name, place)]
    if not able:
        return plan
    place = draw(st.sampled_from(able))
    return at_both_ends(plan, name, place, draw(_changed(move_at(plan, name, place).segments, plan.keys.length)))


def _later(draw: st.DrawFn, plan: Plan) -> Plan:
    """Some of a rank's own keys are attended to in another stage: right, and to be accepted if all else is."""
    rank, index = _stage(draw, plan)
    own = intersect(stage_of(plan.ranks[rank], index).work, plan.ranks[rank].keys)
    if not own:
        return plan
    some = own[draw(st.integers(0, len(own) - 1))]
    plan = edit(plan, rank, index, work=without(stage_of(plan.ranks[rank], index).work, some))
    other = draw(st.integers(0, stage_count(plan)))
    return edit(plan, rank, other, work=normalize((*stage_of(plan.ranks[rank], other).work, some)))


CHANGES = (_change_of_rank, _change_of_work, _change_of_moves, _change_of_transfer, _later)


def _stage(draw: st.DrawFn, plan: Plan) -> tuple[int, int]:
    return draw(st.integers(0, len(plan.ranks) - 1)), draw(st.integers(0, stage_count(plan)))


def _has_other_end(plan: Plan, name: str, place: Place) -> bool:
    peer = move_at(plan, name, place).peer
    if not 0 <= peer < len(plan.ranks):
        return False
    theirs: Sequence[Move] = getattr(stage_of(plan.ranks[peer], place[1]), OTHER_END[name])
    return any(move.peer == place[0] for move in theirs)


def _changed(segments: Segments, length: int) -> st.SearchStrategy[Segments]:
    """Other segments: with positions more or less, in another order, or twice."""
    bounds = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).map(tuple)
    return st.one_of(
        bounds.map(lambda gap: without(segments, gap)),
        bounds.map(lambda more: normalize((*segments, more))),
        st.just(shorter(segments) if count(segments) else ()),
        st.sampled_from([(), segments * 2, segments[::-1], tuple((p, p + 1) for p in positions(segments))]),
    )
