"""Programs name the rows of tensors that their plans mean: rows are gathered and compared, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from cases import MASKS, any_partition, masks, problems, visible
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_oracle import direct, positions
from torch import Tensor

from ringflash.parallel.planning import program
from ringflash.parallel.planning.plan import Plan, RankPlan
from ringflash.parallel.planning.rank_program import rank_program
from ringflash.parallel.planning.ring import ring
from ringflash.parallel.planning.stage_program import StageProgram, picked, runs_of
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition

CPU = torch.device("cpu")
QUICKLY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def check(plan: Plan, mask: Mask) -> None:
    seen = visible(mask, plan.queries.length, plan.keys.length).long()
    for mine in plan.ranks:
        check_rank(mine, mask, seen)


def check_rank(mine: RankPlan, mask: Mask, seen: Tensor) -> None:
    """Carry the positions of keys through a program in the place of keys."""
    program = rank_program(mine, mask, CPU)
    queries, own, arrived = (torch.tensor(positions(x), dtype=torch.int64) for x in (mine.queries, mine.keys, ()))
    assert (program.queries, program.keys, program.buffers) == (len(queries), len(own), mine.buffers)
    working = [index for index, stage in enumerate(mine.stages) if stage.work]
    for index, (stage, made) in enumerate(zip(mine.stages, program.stages, strict=True)):
        work = positions(stage.work)
        assert positions(made.key_segments) == work
        if work:
            at_hand = made.at_hand((own,), (arrived,))[0].tolist()
            assert at_hand == work
            foreign = torch.tensor(sorted(set(work) & set(arrived.tolist())), dtype=torch.int64)
            assert made.at_hand((own,), (foreign,), pulled=True)[0].tolist() == work
            assert torch.equal(shown(made, len(queries), len(work)), seen[queries][:, work])
            assert made.is_last == (index == working[-1])
        attended = torch.tensor(work, dtype=torch.int64)
        sources = [arrived if move.relayed else own for move in stage.sends]
        check_rows(stage.sends, made.sends, sources)
        check_rows(stage.returns, made.returns, [attended] * len(stage.returns))
        check_rows(stage.reduces, made.reduces, [own] * len(stage.reduces))
        kept = attended[:0] if made.kept is None else attended[made.kept]
        assert kept.tolist() == [position for position in work if position in own]
        buffer = torch.full((mine.buffers.arrivals,), -1)
        for move, shipment in zip(stage.receives, made.receives, strict=True):
            assert shipment.peer == move.peer
            picked(buffer, shipment.rows)[:] = torch.tensor(positions(move.segments))
        arrived = picked(buffer, made.received)
        assert len(arrived) == sum(x.count for x in made.receives)


def check_rows(moves, shipments, sources):
    for move, shipment, source in zip(moves, shipments, sources, strict=True):
        assert (shipment.peer, shipment.relayed) == (move.peer, move.relayed)
        assert picked(source, shipment.rows).tolist() == positions(move.segments)
        assert shipment.count == len(positions(move.segments))
        x, runs = runs_of(source, shipment)
        assert torch.cat([x[first:last] for first, last in runs]).tolist() == positions(move.segments)


def shown(made: StageProgram, queries: int, keys: int) -> Tensor:
    """How often the launches of a stage show each pair of its rows."""
    times = torch.zeros(1, queries, keys, dtype=torch.int64)
    for launch in made.launches:
        assert launch.intervals.key_count == keys
        times = times + launch.intervals.visible()
    return times[0]


@settings(max_examples=300, **QUICKLY)
@given(problems(longest=60, most_ranks=6))
def test_the_program_of_a_ring_names_the_rows_of_its_plan(problem):
    mask, partition = problem
    check(ring(mask, partition), mask)


@settings(max_examples=300, **QUICKLY)
@given(problem=problems(longest=60, most_ranks=5), data=st.data())
def test_so_does_the_program_of_stages_that_mix_own_and_foreign_keys_from_several_ranks(problem, data):
    mask, queries = problem
    keys = data.draw(st.just(queries) | any_partition(queries.length, queries.ranks))
    check(direct(mask, queries, keys, 3, lambda rank, owner, _: data.draw(st.integers(int(rank != owner), 2))), mask)


@pytest.mark.parametrize("name", MASKS)
def test_every_kind_of_mask(name):
    mask = masks(60)[name]
    check(ring(mask, Partition.zigzag(60, 4)), mask)


def test_a_layout_that_other_rules_bring_down_to_one_layer():
    layout = [[False, False, True], [True, False, False], [False, False, False]]  # causal hides the first row
    mask = Mask.blocks(layout, 1) & Mask.causal() & Mask.documents([0, 3])
    assert len(mask.layers) == 1
    check(ring(mask, Partition.contiguous(3, 2)), mask)


@settings(max_examples=60, **QUICKLY)
@given(problem=problems(60, 4), piece=st.integers(1, 50) | st.none(), least_split=st.sampled_from([8, 4096]))
def test_backward_pieces_work_on_the_keys_of_their_stages_and_on_half_of_the_own_ones_last(problem, piece, least_split):
    mask, partition = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LEAST_SPLIT", least_split)
        for mine in ring(mask, partition).ranks:
            check_pieces(rank_program(replace(mine, piece=piece), mask, CPU), least_split)


def check_pieces(made: program.Program, least_split: int) -> None:
    pieces = [piece for stage in made.backward_stages for piece in stage]
    assert [stage.index for stage in made.stages] == list(range(len(made.stages)))
    working, asked = ([x for x in found if x.launches] for found in (pieces, made.stages))
    assert sorted(keys_of(working)) == sorted(keys_of(asked))
    assert [x.is_last for x in working] == [x is working[-1] for x in working]
    if made.stages[0].everything and made.keys >= least_split and len(made.stages) > 1 and asked[0].index == 0:
        assert pieces[-1].index == 0
    for stage, parts in zip(made.stages, made.backward_stages, strict=True):
        for name in ("returns", "reduces"):
            moved = sum(x.count for part in parts for x in getattr(part, name))
            assert moved == sum(x.count for x in getattr(stage, name))


def keys_of(stages: Sequence[StageProgram]) -> list[tuple[int, int]]:
    return [(stage.index, position) for stage in stages for position in positions(stage.key_segments)]
