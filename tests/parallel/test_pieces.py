"""The backward pass in pieces of keys: the same gradients, in less memory."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from attention_cases import Answer, cases, tensors
from attention_cases import assert_as_exact_as_torch as assert_answer
from cases import MASKS, Shape, inputs, masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharded_cases import ShardedCase, any_sharding, solve_share

from ringflash import Mask, Sharding
from ringflash.functional import attention
from ringflash.kernels.cpu import blockwise
from ringflash.parallel.lookup import shardings
from ringflash.parallel.planning import program, ring
from ringflash.parallel.planning.verify import verify
from ringflash.parallel.positions.partition import Partition


def _in_pieces(sharded: ShardedCase, piece: int | None, least_split: int) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "PIECE", piece)
        patch.setattr(program, "LEAST_SPLIT", least_split)
        shardings.clear()
        answer = solve_share(sharded)
    shardings.clear()
    return answer


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    dense=st.booleans(),
    ranks=st.integers(2, 3),
    piece=st.integers(1, 9) | st.none(),
    least_split=st.sampled_from([8, 4096]),
)
def test_any_features_in_pieces_of_any_length_are_as_exact_as_torch(pool, data, dense, ranks, piece, least_split):
    case = data.draw(cases(torch.float32, dense=dense))
    sharded = data.draw(any_sharding(case, dense))
    found = sharded.joined(pool(ranks).run(_in_pieces, sharded, piece, least_split))
    assert_answer(found, case, tensors(case))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("piece", [1, 4, 100])
def test_plans_in_pieces_are_proved(name, piece, monkeypatch):
    monkeypatch.setattr(ring, "PIECE", piece)
    mask = masks(60)[name]
    plan = ring.ring(mask, Partition.zigzag(60, 4))
    verify(plan, mask)
    assert all(max(mine.buffers.returns, mine.buffers.reduces) <= piece for mine in plan.ranks)


SHARE = 4096


def _units_alive(piece: int) -> float:
    """The most memory of the backward pass beside its inputs, in this rank's keys and values, dquery left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "PIECE", piece)
        sharding = Sharding(Mask.causal(), seqlen=SHARE * dist.get_world_size(), plan="ring")
        query, key, value, _ = inputs(Shape(length=SHARE, heads=1, key_heads=1, head_dim=64), torch.bfloat16)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out, _ = attention(*leaves, sharding=sharding)
        dout, most, before = torch.randn_like(out), 0, 0

        def alive() -> int:
            found = (x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[-1] == 64)
            return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())

        kernel = blockwise.attend_backward

        def watched(*arguments, **settings):
            nonlocal most
            found = kernel(*arguments, **settings)
            dquery = {
                x.data_ptr(): x.untyped_storage().nbytes() for x in (found[0], settings["carry"]) if x is not None
            }
            most = max(most, alive() - sum(dquery.values()))  # which this kernel does not write in place
            return found

        patch.setattr(blockwise, "attend_backward", watched)
        gc.collect()
        before = alive()
        out.backward(dout)
    return (most - before) / (2 * key.numel() * key.element_size())


def test_the_backward_pass_holds_hardly_more_than_two_blocks_and_the_sums_of_gradients(pool):
    """Keys and values at hand and those that arrive, 2, and the sums in fp32, 2; three pieces; a row of queries."""
    whole, pieces = (max(pool(4).run(_units_alive, piece, timeout=120)) for piece in (SHARE, SHARE // 16))
    assert pieces < 5
    assert pieces < whole / 2
