"""SageMaker's modules over several ranks: what one device computes, and what they refuse there."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from attention_cases import Answer, Case, Rules, assert_as_exact_as_torch, exact, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_cases import ShardedCase
from small_llama import VOCABULARY, assert_gradients_equal, gradients, llama, loss_sum, replaced

from ringflash import ArgumentError, RankMismatchError, Sharding, positions, shard, unshard
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.sagemaker.nn.attn import FlashGroupedQueryAttention, FlashSelfAttention

# Modules


def _attend(sharded: ShardedCase, layout: str, stacked: bool, by_group: bool) -> Answer:
    """This rank's answer, and zeros for the log-sum-exp that the modules do not return."""
    case, rank, ranks = sharded.case, dist.get_rank(), dist.get_world_size()
    share = sharded.share(rank, ranks)
    axes = layout.split()
    leaves = [x.clone().requires_grad_() for x in (share.query, share.key, share.value)]
    q, k, v = (x.permute(["bshd".index(axis) for axis in axes]) for x in leaves)
    tokens = case.queries // sharded.batch
    sharding = Sharding(batch=sharded.batch, seqlen=tokens, partition=sharded.partition)
    arguments = {
        "attn_mask": share.padding,
        "causal": case.rules.right == 0,
        "layout": layout,
        "sharding": None if by_group else sharding,
    }
    torch.manual_seed(case.seed)
    if case.heads[0] == case.heads[1]:
        attend = FlashSelfAttention(case.dropout, case.scale, group=None)
        out = attend(torch.stack([q, k, v], axes.index("h")) if stacked else (q, k, v), **arguments)
    else:
        attend = FlashGroupedQueryAttention(case.dropout, case.scale, group=dist.group.WORLD)
        out = attend(q, torch.cat([k, v], axes.index("h")) if stacked else (k, v), **arguments)
    out = out.permute([axes.index(axis) for axis in "bshd"])
    found = torch.autograd.grad(out, leaves, share.dout)
    return out.detach(), torch.zeros_like(share.dlse), *found


@st.composite
def _sharded(draw: st.DrawFn) -> tuple[int, ShardedCase, bool]:
    """How many ranks, what they attend to, and whether its tokens lie as the group alone says."""
    ranks, by_group = draw(st.integers(2, 3)), draw(st.booleans())
    length = draw(st.sampled_from([6, 12, 36] if by_group else [1, 2, 7, 33]))
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    case = Case(
        ((length, length),) * draw(st.integers(1, 2)),
        Rules(right=draw(st.sampled_from([0, None]))),
        (key_heads * group, key_heads),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    partition = "zigzag" if by_group else draw(st.sampled_from(["contiguous", "zigzag", "balanced"]))
    return ranks, ShardedCase(case, dense=True, partition=partition), by_group


@settings(max_examples=30)
@given(problem=_sharded(), layout=st.sampled_from(["b h s d", "b s h d", "s b h d", "d h b s"]), stacked=st.booleans())
def test_any_layout_packing_and_mask_on_any_ranks_is_as_exact_as_torch(pool, problem, layout, stacked):
    ranks, sharded, by_group = problem
    case = sharded.case
    given_tensors = tensors(case)
    if case.dropout:
        torch.manual_seed(case.seed)
        given_tensors = replace(given_tensors, dropout_seed=torch.randint(2**62, (1,)))
    given_tensors = replace(given_tensors, dlse=torch.zeros_like(given_tensors.dlse))
    out, _, *found = sharded.joined(pool(ranks).run(_attend, sharded, layout, stacked, by_group))
    assert_as_exact_as_torch((out, exact(case, given_tensors)[1], *found), case, given_tensors)


def _attend_alone():
    rank = dist.get_rank()
    x = torch.randn(1, 2, 5 + rank, 8)
    alone = FlashSelfAttention()((x, x, x), causal=True)
    assert torch.equal(alone, FlashSelfAttention(group=ONE_DEVICE)((x, x, x), causal=True))
    rows = FlashSelfAttention()((x[:, :, :3], x[:, :, :3], x[:, :, :3]), causal=True)
    torch.testing.assert_close(rows, alone[:, :, :3])


def test_without_a_group_every_rank_attends_to_its_own_as_sagemakers_modules_do(pool):
    pool(2).run(_attend_alone, timeout=15)


def _copy_and_save():
    group = dist.new_group([0, 1])
    attend = FlashSelfAttention(group=group)
    model = torch.nn.Sequential(attend)
    x = shard(torch.randn(1, 8, 2, 8, generator=torch.Generator().manual_seed(0)), 1)
    expected = attend((x, x, x), layout="b s h d")
    assert torch.equal(copy.deepcopy(model)[0]((x, x, x), layout="b s h d"), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)[0]
    with pytest.raises(ArgumentError, match="group was a group of 2 ranks that does not travel in a file"):
        loaded((x, x, x))
    loaded.group = group
    assert torch.equal(loaded((x, x, x), layout="b s h d"), expected)


def test_copies_keep_the_group_and_files_leave_it_behind(pool):
    pool(2).run(_copy_and_save)


def _refuse():
    rank = dist.get_rank()
    x = torch.randn(1, 2, 4, 8)
    sharding = Sharding(seqlen=8)
    with pytest.raises(ArgumentError, match="sharding was made for another group"):
        FlashSelfAttention()((x, x, x), sharding=sharding)
    with pytest.raises(ArgumentError, match="use_alibi=True with causal=True on 2 ranks"):
        FlashSelfAttention(0, None, True, True, group=None)((x, x, x), torch.zeros(1, 2, 1, 4), causal=True)
    with pytest.raises(RankMismatchError if rank else ArgumentError, match="layout='b h s'"):
        FlashSelfAttention(group=None)((x, x, x), layout="b h s d" if rank else "b h s")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(RankMismatchError if rank else ArgumentError, match="says more than causal=True"):
        FlashSelfAttention(group=None)((x, x, x), attn_mask=mask.tril() if rank else mask, causal=True)
    FlashSelfAttention(group=None)((x, x, x), sharding=sharding)  # ranks are still in step


def test_what_one_rank_refuses_all_ranks_hear_of(pool):
    pool(2).run(_refuse, timeout=15)


# Hugging Face's Llama

BATCHES = {
    "one document": {},
    "batch": {"batch": 2},
    "packed": {"cu_seqlens": [0, 5, 6, 23]},
    "tail": {"cu_seqlens": [0, 5, 19]},
    "padded right": {"batch": 2, "lengths": [23, 9]},
}
"""`Sharding`'s arguments, or how many tokens of each sequence are not padding."""


def _batch(name: str, seed: int = 1) -> tuple[dict, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sharding's arguments, ids, next tokens as labels, and what is not padding; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    arguments = {"seqlen": 23, **BATCHES[name]}
    lengths = arguments.pop("lengths", None)
    size = arguments.get("batch", 1)
    ids, labels = torch.randint(VOCABULARY, (2, size, 23), generator=generator)
    visible = None if lengths is None else torch.arange(23) < torch.tensor(lengths)[:, None]
    if visible is not None:
        labels = labels.masked_fill(~visible, -100)
    if edges := arguments.get("cu_seqlens"):
        labels[:, edges[-1] :] = -100
    return arguments, ids, labels, visible


def _llama_on_ranks(name: str, partition: str, implementation: str, use_cache: bool) -> tuple:
    arguments, ids, labels, visible = _batch(name)
    model = replaced(llama(implementation), group=dist.group.WORLD)
    sharding = Sharding(**arguments, partition=partition)
    # Transformers would drop a mask (b, s) on ranks without padding.
    others = {} if visible is None else {"attention_mask": sharding.shard(visible, 1)[:, None, None]}
    logits = model(
        sharding.shard(ids, 1),
        position_ids=sharding.position_ids,
        sharding=sharding,
        use_cache=use_cache,
        **others,
    ).logits
    loss_sum(logits, sharding.shard(labels, 1)).backward()
    for weight in model.parameters():
        dist.all_reduce(weight.grad)
    return sharding.unshard(logits.detach(), 1), gradients(model)


def _llama_on_one_device(name: str) -> tuple:
    arguments, ids, labels, visible = _batch(name)
    model = llama("eager")
    whole = Sharding(**arguments, group=ONE_DEVICE)
    logits = model(
        ids,
        position_ids=whole.position_ids,
        attention_mask=None if visible is None else visible.long(),
        use_cache=False,
    ).logits
    loss_sum(logits, labels).backward()
    return logits.detach(), gradients(model), labels


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", BATCHES)
def test_a_llamas_logits_and_gradients_are_those_of_eager_on_one_device(pool, name, ranks):
    expected, expected_gradients, labels = _llama_on_one_device(name)
    ways = {
        "one document": [("zigzag", "sdpa", False), ("zigzag", "eager", True), ("balanced", "sdpa", True)],
        "batch": [("contiguous", "sdpa", False)],
        "packed": [("zigzag", "eager", False), ("balanced", "sdpa", False)],
        "tail": [("zigzag", "sdpa", False)],
        "padded right": [("zigzag", "sdpa", False), ("contiguous", "eager", True)],
    }
    for partition, implementation, use_cache in ways[name]:
        for logits, found in pool(ranks).run(_llama_on_ranks, name, partition, implementation, use_cache):
            torch.testing.assert_close(logits[labels >= 0], expected[labels >= 0], atol=1e-5, rtol=1e-5)
            assert_gradients_equal(found, expected_gradients)


def _llama_by_group(ids):
    model = replaced(llama("sdpa"), group=None)
    with torch.no_grad():
        mine = positions(ids.shape[1])[None]
        return unshard(model(shard(ids, 1), position_ids=mine).logits, 1)


def test_a_group_alone_says_that_tokens_lie_as_shard_gives_them(pool):
    ids = torch.randint(VOCABULARY, (2, 24))
    with torch.no_grad():
        expected = llama()(ids).logits
    for logits in pool(3).run(_llama_by_group, ids):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def _llama_refused():
    model = replaced(llama("sdpa"), group=dist.group.WORLD)
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    sharding = Sharding(seqlen=24)
    mine = sharding.shard(ids, 1)
    positions_of_mine = sharding.position_ids
    both = (ArgumentError, RankMismatchError)
    for arguments in ({"sharding": sharding}, {}):
        with pytest.raises(both, match="position_ids are 0 to 11, as Transformers counts"):
            model(mine, **arguments)  # the rank whose tokens come first is right, and hears of the other
    with pytest.raises(both, match="position_ids are 0 to 23, as Transformers counts"):
        model(ids)  # not sharded
    with pytest.raises(both, match="against what partition 'zigzag' of 1 x 24 queries"):
        model(ids, sharding=sharding)
    out = model(mine, position_ids=positions_of_mine, sharding=sharding)
    with pytest.raises(ArgumentError, match="past_key_values holds 12 tokens, on 2 ranks"):
        model(ids[:, :1], position_ids=torch.tensor([[24]]), past_key_values=out.past_key_values)
    with pytest.raises(both, match=r"attention_mask is \(1, 1, 12, 12\) on 2 ranks.*cu_seqlens"):
        model(mine, position_ids=positions_of_mine, use_cache=False)  # it may say that there are documents
    padding = torch.ones(1, 12, dtype=torch.long)
    padding[:, 10:] = dist.get_rank()
    with pytest.raises(both, match=r"attention_mask is \(1, 1, 12, 12\) on 2 ranks.*of bool \(1, 1, 1, 12\)"):
        model(mine, position_ids=positions_of_mine, sharding=sharding, attention_mask=padding)
    again = model(mine, position_ids=positions_of_mine, sharding=sharding, use_cache=False)
    torch.testing.assert_close(again.logits, out.logits)


def test_a_llamas_natural_mistakes_are_refused(pool):
    pool(2).run(_llama_refused, timeout=30)
