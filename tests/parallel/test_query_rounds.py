"""Rounds of queries: they show what the mask shows, never look ahead, and give what all queries at once are given."""

from __future__ import annotations

import pickle

import pytest
import torch
from cases import any_mask, masks, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Results, assert_accurate, draw_problem

from ringflash import Mask, Sharding
from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.execution.query_rounds import RoundAttention
from ringflash.parallel.planning import query_rounds as planning
from ringflash.parallel.planning.query_rounds import query_rounds, size_of_rounds
from ringflash.parallel.positions.visibility import key_intervals

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Rounds and pieces of a few rows, so that short sequences have many."""
    monkeypatch.setattr(planning, "ROWS", 4)
    monkeypatch.setattr(planning, "PIECE", 7)


def _whole(mask, length):
    """The mask with an end, as a sharding has it."""
    return mask & Mask.documents([0, length])


@settings(max_examples=200)
@given(data=st.data(), length=st.integers(1, 60), most=st.integers(1, 60))
def test_rounds_show_each_visible_pair_once_and_no_key_behind_them(data, length, most):
    mask = _whole(data.draw(any_mask(length)), length)
    pairs = visible(mask, length)
    rounds = query_rounds(mask, length, most, CPU)
    size = size_of_rounds(length, most)
    ahead = any(pairs[first : first + size, first + size :].any() for first in range(0, length, size))
    assert (rounds is None) == ahead
    if rounds is None:
        return
    assert [row for each in rounds for row in range(length)[each.rows]] == list(range(length))
    for each in rounds:
        found = torch.zeros_like(pairs[each.rows], dtype=torch.int64)
        for intervals in each.shown:
            found[:, each.keys] += intervals.visible().view(len(found), -1)
        assert torch.equal(found, pairs[each.rows].long())
        looked_at = {key for piece in each.pieces() for key in range(length)[piece]}
        assert looked_at >= set(pairs[each.rows].any(0).nonzero()[:, 0].tolist())
        assert all(piece.stop - piece.start <= planning.PIECE for piece in each.pieces())


@given(rows=st.integers(0, 10**7), most=st.integers(0, 10**6))
def test_rounds_are_as_few_and_as_equal_as_they_can_be(rows, most):
    size = size_of_rounds(rows, most)
    assert size % planning.ROWS == 0
    assert size <= max(most, planning.ROWS)
    least = -(-rows // (max(most // planning.ROWS, 1) * planning.ROWS))
    assert -(-rows // size) == least
    assert size * least - rows < planning.ROWS * max(1, least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "window-sink", "documents-window-sink", "chunked-causal-documents"])
def test_attention_in_rounds_is_as_accurate_as_at_once(name, dtype):
    length = 60
    mask = _whole(masks(length)[name], length)
    positions, boundaries = torch.arange(length), torch.tensor(mask.boundaries)
    intervals = key_intervals(mask, boundaries, positions, positions)
    assert isinstance(intervals, KeyIntervals)
    problem = draw_problem(intervals, (4, 2), (16, 16), dtype)
    problem = type(problem)(**{**vars(problem), "dlse": torch.zeros_like(problem.dlse)})
    attention = RoundAttention(problem.scale, "auto", deterministic=True)
    query, key, value = problem.query, problem.key, problem.value
    results = []
    for most in (16, 16, 60):
        rounds = query_rounds(mask, length, most, CPU)
        assert len(rounds) == -(-length // most)
        of_keys = [torch.zeros_like(x, dtype=torch.float32) for x in (key, value)]
        forward = [attention.forward(query[x.rows], key, value, x) for x in rounds]
        dquery = [
            attention.backward(problem.dout[x.rows], *given, query[x.rows], key, value, x, *of_keys)
            for x, given in reversed(list(zip(rounds, forward, strict=True)))
        ]
        out, lse = (torch.cat([each[i] for each in forward], dim=i) for i in (0, 1))
        results.append(Results(out, lse, torch.cat(dquery[::-1]), *(x.to(dtype) for x in of_keys)))
        assert_accurate(results[-1], problem)
    first, again, _ = (vars(each).values() for each in results)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_sharding_of_one_rank_gives_rounds_and_no_other_one_does():
    mask, device = Mask.causal(), torch.device("cpu")
    alone = Sharding(mask, seqlen=20, batch=2, rank=0, ranks=1)
    rounds = alone.query_rounds(mask, 16, device)
    assert [each.rows for each in rounds] == [slice(0, 16), slice(16, 32), slice(32, 40)]
    assert [each.keys for each in rounds] == [slice(0, 16), slice(0, 32), slice(20, 40)]  # two sequences
    assert alone.query_rounds(None, 16, device) is rounds  # not made again in each layer
    assert alone.nbytes() > pickle.loads(pickle.dumps(alone)).nbytes()
    for other in (
        Sharding(mask, seqlen=20, rank=0, ranks=2),
        Sharding(Mask.bidirectional(), seqlen=20, rank=0, ranks=1),
        Sharding(mask, seqlen=20, key_seqlen=24, rank=0, ranks=1),
    ):
        assert other.query_rounds(None, 8, device) is None
