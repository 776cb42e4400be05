"""`Sharding`: one value for how a batch lies on its ranks, attended to, pickled, made elsewhere, held and let go."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import multiprocessing
import os
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from cases import PARTITIONS, Shape, any_mask, exact, inputs, visible, visible_in_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from ringflash import (
    ArgumentError,
    DistributedFlashAttention,
    Mask,
    RankMismatchError,
    Sharding,
    shard,
    shard_batch,
)
from ringflash.functional import attention
from ringflash.parallel.lookup import Shardings, find, shardings
from ringflash.parallel.mesh import ONE_DEVICE


def _attend(mask, sizes, cu_seqlens, partition):
    """This rank's part of attention by a sharding, gathered: out and the gradients of query, key and value."""
    batch, seqlen = sizes
    *tensors, dout = inputs(Shape(batch=batch, length=seqlen))
    sharding = Sharding(mask, batch=batch, seqlen=seqlen, cu_seqlens=cu_seqlens, partition=partition)
    leaves = [sharding.shard(x, 1).requires_grad_() for x in tensors]
    out, _ = attention(*leaves, sharding=sharding)
    gradients = torch.autograd.grad(out, leaves, sharding.shard(dout, 1))
    assert sharding.tokens == out.shape[1] <= sharding.max_tokens
    return [sharding.unshard(x.detach(), 1) for x in (out, *gradients)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), ranks=st.integers(1, 4), partition=st.sampled_from(PARTITIONS))
def test_attention_by_a_sharding_is_that_of_one_device_and_a_tail_sees_nothing(pool, data, ranks, partition):
    seqlen = data.draw(st.integers(2, 40))
    end = data.draw(st.integers(1, seqlen))
    mask = data.draw(any_mask(end)).without_documents()
    cu_seqlens = [0, *sorted(data.draw(st.lists(st.integers(0, end), max_size=3))), end]
    if mask.layout is not None:
        cu_seqlens = [0, end]
    seen = torch.zeros(seqlen, seqlen, dtype=torch.bool)
    seen[:end, :end] = visible(mask & Mask.documents(cu_seqlens), end)
    expected = exact(inputs(Shape(length=seqlen)), seen)
    for found in pool(ranks).run(_attend, mask, (1, seqlen), cu_seqlens, partition):
        for x, right in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)
            assert not x[:, end:].any()


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cu_seqlens", [[0, 5, 13, 24], [0, 5, 13], [0, 12, 20], [0, 3]], ids=str)
def test_documents_of_a_batch_may_end_before_its_tokens(pool, cu_seqlens, partition):
    whole = visible_in_batch(Mask.causal(), 2, 12)
    whole &= visible(Mask.documents(cu_seqlens), 24) if cu_seqlens[-1] == 24 else _documents(cu_seqlens, 24)
    expected = exact(inputs(Shape(batch=2, length=12)), whole)
    for found in pool(3).run(_attend, Mask.causal(), (2, 12), cu_seqlens, partition):
        for x, right in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(x.double(), right, atol=2e-5, rtol=2e-5)


def _documents(cu_seqlens, total):
    seen = torch.zeros(total, total, dtype=torch.bool)
    for start, stop in itertools.pairwise(cu_seqlens):
        seen[start:stop, start:stop] = True
    return seen


def _old_arguments():
    """16 tokens, boundaries that end at 13, two ranks: by attention's own arguments and by shard_batch."""
    whole = inputs(Shape(length=16))[:3]
    mine = [shard(x, 1) for x in whole]
    out = DistributedFlashAttention()(*mine, cu_seqlens=[0, 5, 13])
    batch = shard_batch({"input_ids": torch.arange(16)[None], "cu_seqlens": [0, 5, 13]})
    assert torch.equal(out, DistributedFlashAttention()(*mine, sharding=batch["sharding"]))
    return batch["sharding"].unshard(out, 1), batch["sharding"].unshard(batch["labels"], 1)


def test_padding_behind_the_last_document_is_taken_by_every_interface(pool):
    seen = _documents([0, 5, 13], 16) & torch.ones(16, 16).tril().bool()
    expected = exact(inputs(Shape(length=16)), seen)["out"]
    for out, labels in pool(2).run(_old_arguments):
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
        assert labels.tolist() == [[1, 2, 3, 4, -100, 6, 7, 8, 9, 10, 11, 12, *[-100] * 4]]


# One sharding, several masks


def _alternate():
    full, window = Mask.causal(), Mask.sliding_window(5)
    *tensors, _ = inputs(Shape(length=30))
    sharding = Sharding({full: 1, window: 3}, cu_seqlens=[0, 9, 30], partition="balanced")
    mine = [sharding.shard(x, 1) for x in tensors]
    layers = {mask: DistributedFlashAttention(mask) for mask in (full, window, Mask.bidirectional())}
    return [sharding.unshard(layer(*mine, sharding=sharding), 1) for layer in layers.values()]


def test_one_sharding_serves_masks_that_alternate_and_one_that_was_not_named(pool):
    tensors, documents = inputs(Shape(length=30)), Mask.documents([0, 9, 30])
    for found in pool(3).run(_alternate):
        for out, mask in zip(found, (Mask.causal(), Mask.sliding_window(5), Mask.bidirectional()), strict=True):
            expected = exact(tensors, visible(mask & documents, 30))["out"]
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_balanced_levels_the_sum_over_masks_by_their_layers():
    window, full, length = Mask.sliding_window(63), Mask.causal(), 4096
    of_windows = Sharding({window: 1}, seqlen=length, rank=0, ranks=8, partition="balanced", token_work=0).partition
    of_both = Sharding(
        {window: 1, full: 4}, seqlen=length, rank=0, ranks=8, partition="balanced", token_work=0
    ).partition
    pairs = [sum(p + 1 + 4 * min(p + 1, 64) * 0 for p in of_both.positions(rank).tolist()) for rank in range(8)]
    assert max(pairs) * 8 / sum(pairs) < 1.1
    assert of_both != of_windows


def test_a_layer_has_to_say_which_of_several_masks_is_its_own():
    sharding = Sharding([Mask.causal(), Mask.sliding_window(3)], seqlen=8)
    x = torch.randn(1, 8, 2, 8)
    with pytest.raises(ArgumentError, match="made for 2 masks; pass the layer's"):
        attention(x, x, x, sharding=sharding)


# Made in one way, attended to in another


def _shard_and_attend_otherwise():
    documents = [0, 300, 400, 1600]
    other = Mask.causal() & Mask.documents([0, 1300, 1600])
    x = torch.randn(1, 1600, 2, 8)
    for partition, mask in (("balanced", other), ("contiguous", None)):
        mine = shard(x, 1, partition=partition, mask=mask)
        taken = "balanced" if partition == "balanced" else "zigzag"
        with pytest.raises(ArgumentError, match=r"query was sharded with .*attention is asked for"):
            attention(mine, mine, mine, cu_seqlens=documents, seqlen=1600, partition=taken)
    sharding = Sharding(cu_seqlens=documents, partition="balanced")
    with pytest.raises(ArgumentError, match="query was sharded with"):
        attention(*[shard(x, 1)] * 3, sharding=sharding)
    with pytest.raises(ArgumentError, match="cu_seqlens, partition beside sharding"):
        attention(x, x, x, cu_seqlens=documents, partition="zigzag", sharding=sharding)
    with pytest.raises(RankMismatchError, match=r"query and key tokens beyond the rank's share"):
        attention(*[torch.randn(1, sharding.tokens + 1 + sharding.rank, 2, 8)] * 3, sharding=sharding)
    mine = sharding.shard(x, 1)
    attention(mine, mine, mine, sharding=sharding)  # ranks are still in step


def test_tokens_sharded_in_one_way_and_attended_in_another_are_refused(pool):
    pool(2).run(_shard_and_attend_otherwise)


# Made elsewhere


def _use(pickled):
    sharding = pickle.loads(pickled[dist.get_rank()])
    *tensors, _ = inputs(Shape(length=23))
    mine = [sharding.shard(x, 1) for x in tensors]
    out, _ = attention(*mine, sharding=sharding)
    again = pickle.loads(pickle.dumps(sharding))  # also after it was used
    assert torch.equal(attention(*mine, sharding=again)[0], out)
    assert again.digest == sharding.digest
    return sharding.unshard(out, 1)


def test_it_is_made_by_rank_and_ranks_without_a_group_and_travels_pickled(pool):
    made = [
        pickle.dumps(Sharding(Mask.causal(), cu_seqlens=[0, 8, 23], rank=rank, ranks=3, partition="balanced"))
        for rank in range(3)
    ]
    expected = exact(inputs(Shape(length=23)), visible(Mask.causal() & Mask.documents([0, 8, 23]), 23))["out"]
    for out in pool(3).run(_use, made):
        torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def _of_another_rank():
    sharding = Sharding(seqlen=12, rank=1 - dist.get_rank(), ranks=2)
    x = torch.randn(1, 6, 2, 8)
    with pytest.raises(ArgumentError, match=r"sharding is for rank . of 2; this process is rank . of 2"):
        attention(x, x, x, sharding=sharding)
    with pytest.raises(ArgumentError, match=r"rank=0, ranks=3, but group has this process as rank"):
        Sharding(seqlen=12, rank=0, ranks=3, group=dist.group.WORLD)


def test_a_sharding_for_another_rank_or_group_is_refused(pool):
    pool(2).run(_of_another_rank)


class Batches(torch.utils.data.Dataset):
    """Batches that a DataLoader's worker shards."""

    def __init__(self, **place):
        self.place = place

    def __len__(self):
        return 2

    def __getitem__(self, index):
        try:
            return shard_batch({"input_ids": torch.arange(12)[None] + index}, **self.place)
        except ArgumentError as error:
            return {"error": str(error)}


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_dataloaders_worker_has_to_say_which_rank_it_is_for(context):
    def load(**place):
        loader = torch.utils.data.DataLoader(
            Batches(**place), batch_size=None, num_workers=1, multiprocessing_context=context
        )
        return list(loader)

    for batch in load():
        assert "DataLoader's worker" in batch["error"]
        assert "rank=" in batch["error"]
    batches = load(rank=1, ranks=2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[list(range(3 + i, 9 + i))] for i in range(2)]
    assert batches[0]["sharding"].rank == 1


def test_a_process_of_torchrun_without_a_group_is_not_taken_for_the_only_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for make in (lambda: Sharding(seqlen=8), lambda: shard(torch.zeros(8), 0)):
        with pytest.raises(ArgumentError, match=r"WORLD_SIZE=4.*init_process_group"):
            make()
    assert Sharding(seqlen=8, group=ONE_DEVICE).tokens == 8


def _made_in_a_worker(queue):
    assert not dist.is_initialized()
    queue.put(pickle.dumps(Sharding(seqlen=9, rank=1, ranks=2)))


def test_making_one_needs_neither_a_group_nor_a_device():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_made_in_a_worker, args=(queue,))
    process.start()
    sharding = pickle.loads(queue.get(timeout=60))
    process.join()
    assert sharding.spans() == (((0, 2), (6, 9)), ((2, 6),))
    assert sharding.shard(torch.arange(9), 0).tolist() == [2, 3, 4, 5]


# Held and let go


def _bytes_of(packings, tokens=4096):
    cache = Shardings(most_bytes=40 * tokens)
    for length in range(1, packings + 1):
        sharding = Sharding(Mask.causal(), cu_seqlens=[0, length, tokens], seqlen=tokens, group=ONE_DEVICE)
        sharding.prepare(torch.device("cpu"))
        cache.add((length,), sharding)
    return sum(x.nbytes() for x in cache._found.values()), len(cache._found)


def test_what_is_found_again_is_bounded_in_bytes():
    size, count = _bytes_of(64)
    assert size <= 40 * 4096
    assert 1 < count < 64


def test_a_program_takes_8_bytes_a_token_where_positions_are_not_asked_for():
    sharding = Sharding(Mask.causal(), cu_seqlens=[0, 5000, 65536], group=ONE_DEVICE)
    sharding.prepare(torch.device("cpu"))
    assert sharding.nbytes() < 9 * 65536


def test_autograd_holds_what_its_backward_pass_needs_when_nobody_else_does():
    x = torch.randn(1, 40, 2, 8, requires_grad=True)
    sharding = Sharding(Mask.causal(), cu_seqlens=[0, 11, 40], group=ONE_DEVICE)
    out, lse = attention(x, x, x, sharding=sharding)
    alive = weakref.ref(sharding._placement)
    del sharding
    shardings.clear()
    gc.collect()
    assert alive() is not None
    out.sum().backward()
    del out, lse
    gc.collect()
    assert alive() is None


def test_a_handle_whose_sharding_is_gone_is_an_error_in_words():
    x = torch.randn(1, 8, 2, 8)
    handle = Sharding(seqlen=8, group=ONE_DEVICE).handle().clone()
    gc.collect()
    with pytest.raises(ArgumentError, match="stands for a Sharding that is gone; hold it until the backward pass"):
        torch.ops.ringflash.attention(
            *[x[0]] * 3, handle, None, None, None, None, None, None, None, "", [], 1.0, 0.0, 0.0, "auto", False, 0
        )


def test_the_same_arguments_find_the_same_sharding_and_changed_ones_another():
    edges = torch.tensor([0, 3, 8])
    first = find(Mask.causal(), (1, 8, 8), None, "zigzag", edges)
    assert find(Mask.causal(), (1, 8, 8), None, "zigzag", edges) is first
    assert find(Mask.causal(), (1, 8, 8), None, "zigzag", torch.tensor([0, 3, 8])) is first
    edges.numpy()[1] = 5  # behind torch's back
    assert find(Mask.causal(), (1, 8, 8), None, "zigzag", edges) is not first
    listed = [0, 3, 8]
    second = find(Mask.causal(), (1, 8, 8), None, "zigzag", listed)
    listed[1] = 4
    assert find(Mask.causal(), (1, 8, 8), None, "zigzag", listed) is not second


# Compiled


def _compiled(head_ranks):
    mask = Mask.causal()
    *tensors, _ = inputs(Shape(length=24))
    module = DistributedFlashAttention(mask)
    compilations = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, s: module(q * 2, k, v, sharding=s), fullgraph=True, backend=count)
    for cuts in ([], [7], [3, 20], [11]):
        sharding = Sharding(mask, cu_seqlens=[0, *cuts, 24], head_ranks=head_ranks)
        mine = [sharding.shard(x, 1).clone() for x in tensors]
        expected = module(mine[0] * 2, *mine[1:], sharding=sharding)
        torch.testing.assert_close(compiled(*mine, sharding), expected)
    return compilations


@pytest.mark.parametrize(("ranks", "head_ranks"), [(1, 1), (2, 1), (2, 2)])
def test_another_packing_does_not_compile_anew(pool, ranks, head_ranks):
    assert pool(ranks).run(_compiled, head_ranks, timeout=120) == [1] * ranks


def _compiled_gradients():
    sharding = Sharding(Mask.causal(), cu_seqlens=[0, 9, 24], partition="balanced")
    leaves = [sharding.shard(x, 1).clone().requires_grad_() for x in inputs(Shape(length=24))[:3]]
    slopes = torch.rand(2, 4)
    layer = lambda q, k, v: attention(q.sin(), k, v, sharding=sharding, alibi_slopes=slopes)[0].square().sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(layer(*leaves), leaves), atol=1e-6, rtol=1e-6)


def test_slopes_of_each_document_compile_under_balanced_too(pool):
    pool(2).run(_compiled_gradients, timeout=120)


# Modules


def _copied():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sequence",))
    x = torch.randn(1, 6, 2, 8)
    for group in (dist.new_group([0, 1]), mesh["sequence"]):
        module = DistributedFlashAttention(Mask.sliding_window(3), group)
        assert torch.equal(copy.deepcopy(module)(x, x, x), module(x, x, x))
        file = io.BytesIO()
        torch.save(module, file)
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        with pytest.raises(ArgumentError, match="group of 2 ranks that does not travel in a file; set it"):
            loaded(x, x, x)
        loaded.group = group
        assert torch.equal(loaded(x, x, x), module(x, x, x))


def test_a_module_with_a_group_is_copied_and_saved(pool):
    pool(2).run(_copied)


# Gradients that nobody needs


class Counting:
    """How many rows of gradients a rank sends."""

    def __init__(self, monkeypatch):
        from ringflash.parallel.execution import gradients

        self.moved = 0
        settle = gradients.KeyGradients.settle

        def counted(this, stage, parts):
            self.moved += 0 if parts is None else len(parts) * sum(s.count for s in stage.returns)
            return settle(this, stage, parts)

        monkeypatch.setattr(gradients.KeyGradients, "settle", counted)


def _sent(needs):
    with pytest.MonkeyPatch.context() as patch:
        counting = Counting(patch)
        tensors = {name: torch.randn(1, 12, 2, 8) for name in ("query", "key", "value")}
        for name in needs:
            tensors[name].requires_grad_()
        attention(**tensors)[0].sum().backward()
        assert [name for name, x in tensors.items() if x.grad is not None] == list(needs)
    return counting.moved


@pytest.mark.parametrize(
    ("needs", "parts"), [(("query",), 0), (("key",), 1), (("query", "value"), 1), (("query", "key", "value"), 2)]
)
def test_gradients_that_nobody_needs_are_not_sent(pool, needs, parts):
    everything = pool(2).run(_sent, ("key", "value"))
    assert pool(2).run(_sent, needs) == [x // 2 * parts for x in everything]


def test_sinks_keep_nothing_more_than_attention_without_them():
    x = torch.randn(1, 512, 4, 32, dtype=torch.bfloat16, requires_grad=True)

    def kept(**settings):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(x, x, x, group=ONE_DEVICE, **settings)
        return sum(storages.values())

    assert kept(sinks=torch.zeros(4, requires_grad=True)) < kept() + 1024


def test_no_environment_is_left_behind():
    assert "WORLD_SIZE" not in os.environ


# What was found wrong once


def test_what_was_made_in_inference_mode_serves_training():
    x = torch.randn(1, 33, 2, 8)
    sharding = Sharding(cu_seqlens=[0, 11, 33], group=ONE_DEVICE)
    with torch.inference_mode():
        attention(x, x, x, sharding=sharding)
        attention(x, x, x, cu_seqlens=[0, 12, 33], group=ONE_DEVICE)
    leaf = x.clone().requires_grad_()
    attention(leaf, leaf, leaf, sharding=sharding)[0].sum().backward()
    attention(leaf, leaf, leaf, cu_seqlens=[0, 12, 33], group=ONE_DEVICE)[0].sum().backward()


def _blocks_before_a_tail():
    mask = Mask.causal() & Mask.blocks(torch.tensor([[1] * 7] * 6 + [[1, 0] * 3 + [1]]) > 0, 3)
    whole = inputs(Shape(length=40))[:3]
    sharding = Sharding(mask, cu_seqlens=[0, 10, 18], seqlen=40)
    out, _ = attention(*(sharding.shard(x, 1) for x in whole), sharding=sharding)
    return sharding.unshard(out, 1), attention(*whole, mask=mask, cu_seqlens=[0, 10, 18], group=ONE_DEVICE)[0]


def test_a_tail_longer_than_a_layout_of_blocks_sees_nothing(pool):
    mask = Mask.causal() & Mask.blocks(torch.tensor([[1] * 7] * 6 + [[1, 0] * 3 + [1]]) > 0, 3)
    seen = torch.zeros(40, 40, dtype=torch.bool)
    seen[:18, :18] = visible(mask & Mask.documents([0, 10, 18]), 18)
    expected = exact(inputs(Shape(length=40)), seen)["out"]
    for found in pool(4).run(_blocks_before_a_tail):
        for out in found:
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_a_batch_of_another_size_than_the_shardings_is_refused():
    sharding = Sharding(cu_seqlens=[0, 5, 11, 16], group=ONE_DEVICE)
    with pytest.raises(ArgumentError, match=r"query has a batch of 2; sharding was made for batch=1"):
        attention(*[torch.randn(2, 8, 2, 8)] * 3, sharding=sharding)


def test_a_sharding_of_several_ranks_is_not_used_by_one_process_alone():
    sharding = Sharding(seqlen=10, rank=0, ranks=2)
    with pytest.raises(ArgumentError, match="sharding is for rank 0 of 2; this process is rank 0 of 1"):
        sharding.unshard(torch.zeros(5), 0)
    with pytest.raises(ArgumentError, match="sharding is for rank 0 of 2"):
        attention(*[torch.randn(1, 5, 2, 8)] * 3, sharding=sharding)


def test_sharded_tensors_are_saved_and_loaded_like_others():
    file = io.BytesIO()
    torch.save(Sharding(seqlen=8, rank=0, ranks=2).shard(torch.arange(8), 0), file)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=True).tolist() == [0, 1, 6, 7]


def _buffers_and_heads():
    x = torch.randn(1, 16, 4, 8)
    buffer = shard(x, 1, partition="contiguous")
    buffer.copy_(shard(x, 1))
    attention(buffer, buffer, buffer)
    heads = shard(x, 2, partition="contiguous")[:, :8]
    attention(heads, heads, heads)
    alone = shard(x, 1, partition="contiguous")
    attention(alone, alone, alone, group=ONE_DEVICE)


def test_only_what_was_sharded_otherwise_in_its_sequence_dimension_is_refused(pool):
    pool(2).run(_buffers_and_heads)


def test_a_module_without_a_mask_of_its_own_takes_the_shardings():
    x, mask = torch.randn(1, 12, 2, 8), Mask.bidirectional() & Mask.documents([0, 5, 12])
    found = DistributedFlashAttention()(x, x, x, sharding=Sharding(mask, group=ONE_DEVICE))
    torch.testing.assert_close(found, attention(x, x, x, mask=mask, group=ONE_DEVICE)[0])
    with pytest.raises(ArgumentError, match=r"sharding='zigzag'; allowed are ringflash.Sharding and None"):
        attention(x, x, x, sharding="zigzag")


def _compiled_over_a_part():
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        sharding = Sharding(seqlen=12, group=group)
        x = sharding.shard(torch.randn(1, 12, 2, 8), 1).clone()
        layer = torch.compile(lambda x, s: attention(x, x, x, sharding=s)[0], fullgraph=True, backend="eager")
        torch.testing.assert_close(layer(x, sharding), attention(x, x, x, sharding=sharding)[0])
    dist.barrier()


def test_a_sharding_of_a_part_of_the_ranks_compiles(pool):
    pool(3).run(_compiled_over_a_part, timeout=120)
