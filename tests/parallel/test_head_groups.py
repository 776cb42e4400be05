"""Heads that are worked on in groups, one after another, give what all of them give at once."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from attention_cases import Case, Rules
from hypothesis import given
from hypothesis import strategies as st
from sharded_cases import ShardedCase, solve_share

from ringflash import Mask, Sharding
from ringflash.errors import RingflashError
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.parallel.execution import head_groups as head_groups_module
from ringflash.parallel.lookup import shardings
from ringflash.parallel.planning import heads as planned
from ringflash.parallel.planning.heads import ROOM, head_groups


@given(
    rows=st.integers(0, 2**20),
    key_heads=st.integers(1, 16),
    per_key=st.integers(1, 8),
    head_dim=st.integers(1, 256),
    exchanging=st.integers(1, 8),
)
def test_a_group_fits_or_none_can_be_smaller(rows, key_heads, per_key, head_dim, exchanging):
    heads = key_heads * per_key
    groups = head_groups(rows, heads, key_heads, head_dim, exchanging)

    def allowed(count):
        return key_heads % count == 0 and (heads // count) % exchanging == 0

    room = ROOM if exchanging == 1 else ROOM // 2
    assert groups == 1 or allowed(groups)
    fits = 4 * rows * head_dim * heads <= groups * room
    assert fits or not any(map(allowed, range(groups + 1, key_heads + 1)))
    fewer = [x for x in range(1, groups) if allowed(x)]
    assert not fewer or 4 * rows * head_dim * heads > fewer[-1] * room


EVERY_FEATURE = {"softcap": 2.0, "alibi": "documents", "dropout": 0.5, "padding": True, "sinks": True}


def _in_groups(sharded):
    """A share's answer, and of how many heads each launch was."""
    shardings.clear()  # they know how many groups there are
    with (
        mock.patch.object(planned, "ROOM", 1),
        mock.patch.object(planned, "LONG", 0),
        mock.patch.object(blockwise, "attend", wraps=blockwise.attend) as attend,
    ):
        found = solve_share(sharded)
    shardings.clear()
    return found, {call.args[0].shape[1] for call in attend.call_args_list}


@pytest.mark.parametrize("heads", [(12, 6), (12, 4), (12, 12)], ids=str)
@pytest.mark.parametrize(("ranks", "head_ranks"), [(1, 1), (3, 1), (2, 2), (4, 2)])
def test_every_feature_in_groups_gives_what_it_gives_at_once(pool, ranks, head_ranks, heads):
    lengths = ((40, 40), (0, 0), (5, 5), (1, 1), (33, 33))
    case = Case(lengths, Rules(left=30, right=4, sink=2), heads, dims=(16, 24), seed=1, **EVERY_FEATURE)
    sharded = ShardedCase(case, dense=False, partition="balanced", head_ranks=head_ranks)
    expected = sharded.joined(pool(ranks).run(solve_share, sharded))
    answers, launched = zip(*pool(ranks).run(_in_groups, sharded), strict=True)
    for found, right in zip(sharded.joined(answers), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    groups = head_groups(2**40, *heads, 16, head_ranks)
    assert groups > 1
    assert set().union(*launched) == {heads[0] // groups // head_ranks}


def test_a_batch_in_groups(pool):
    sharded = ShardedCase(Case(((20, 20),) * 2, Rules(), (6, 3), dims=(16, 16), seed=2), dense=True)
    expected, (found, launched) = pool(1).run(solve_share, sharded)[0], pool(1).run(_in_groups, sharded)[0]
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, atol=1e-5, rtol=1e-5)
    assert launched == {2}


@pytest.mark.parametrize("ranks", [1, 4])
def test_only_long_attention_is_done_in_groups(ranks):
    def rows(mask, seqlen, index=0):
        return Sharding(mask, seqlen=seqlen, rank=0, ranks=ranks)._placement.rows_in_groups(index)

    whole, cuts = 1 << 20, list(range(0, (1 << 20) + 1, 1 << 14))
    assert rows(Mask.causal(), whole) == whole // ranks
    assert rows(Mask.causal(), 1 << 14) == 0
    assert rows(Mask.sliding_window(4096), whole) == 0
    assert rows(Mask.causal() & Mask.documents(cuts), whole) == 0
    both = [Mask.sliding_window(4096), Mask.causal()]
    assert [rows(both, whole, index) for index in (0, 1)] == [0, whole // ranks]


def _no_room(self, *_, **__):
    raise torch.OutOfMemoryError("no room")


def _without_room(backward):
    """Rank 0 has no memory for what all groups give; every rank says what it ends with."""
    query = torch.randn(1, 20, 4, 16, requires_grad=True)
    shardings.clear()
    with mock.patch.object(planned, "ROOM", 1), mock.patch.object(planned, "LONG", 0):
        out = attention(query, query, query)[0] if backward else None
        real = head_groups_module._room

        def room(*arguments):
            with mock.patch.object(torch.Tensor, "new_empty", _no_room):
                return real(*arguments)

        try:
            with mock.patch.object(head_groups_module, "_room", room if dist.get_rank() == 0 else real):
                _ = out.sum().backward() if backward else attention(query, query, query)
        except (torch.OutOfMemoryError, RingflashError) as error:
            return type(error).__name__, str(error)
        finally:
            shardings.clear()
    return "nothing", ""


@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_without_room_for_the_results_of_groups_is_heard_by_the_others(pool, backward):
    (first, _), (second, said) = pool(2).run(_without_room, backward)
    assert first == "OutOfMemoryError"
    assert second == "RankMismatchError"
    assert "rank 0" in said
