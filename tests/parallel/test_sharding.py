"""Sharding tensors and batches over ranks: round trips, gradients, and what language-model training needs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import PARTITIONS, Shape, exact, inputs, masks, problems, visible, visible_in_batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from ringflash import (
    ArgumentError,
    DistributedFlashAttention,
    Mask,
    Partition,
    RankMismatchError,
    Sharding,
    positions,
    shard,
    shard_batch,
    unshard,
)
from ringflash.parallel.positions.partition import resolve


def _held(partition, length, mask=None):
    """Positions of this rank by the partition's own segments."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    segments = resolve(partition, length, ranks, mask or Mask.causal()).segments[rank]
    return [p for start, stop in segments for p in range(start, stop)]


def _values(size, dtype=torch.float32):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 50
    return x > 0 if dtype == torch.bool else x.to(dtype)


def _round_trip(size, dim, partition, mask, dtype):
    x = _values(size, dtype)
    mine = shard(x, dim, partition=partition, mask=mask)
    expected = x.movedim(dim, 0)[_held(partition, size[dim], mask)].movedim(0, dim)
    assert torch.equal(mine, expected)
    assert positions(size[dim], partition=partition, mask=mask).tolist() == _held(partition, size[dim], mask)
    for seqlen in (None, size[dim]):
        whole = unshard(mine, dim, partition=partition, mask=mask, seqlen=seqlen)
        assert whole.dtype == dtype
        assert torch.equal(whole, x)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    length=st.integers(1, 40),
    ranks=st.integers(1, 4),
    partition=st.sampled_from(PARTITIONS),
    mask=st.sampled_from([Mask.causal(), Mask.bidirectional(), Mask.sliding_window(3)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    data=st.data(),
)
def test_unshard_undoes_shard_for_any_shape_dimension_and_number_of_ranks(
    pool, size, length, ranks, partition, mask, dtype, data
):
    dim = data.draw(st.integers(-len(size), len(size) - 1))
    size[dim] = length
    pool(ranks).run(_round_trip, tuple(size), dim, partition, mask, dtype)


def test_a_partition_of_ones_own_and_documents_are_honoured(pool):
    mine = Partition(11, (((0, 1), (4, 9)), (), ((1, 4), (9, 11))))
    pool(3).run(_round_trip, (2, 11), 1, mine, None, torch.float32)
    pool(3).run(_round_trip, (2, 61), 1, "balanced", masks(61)["documents-causal"], torch.float32)


IDS = torch.zeros(1, 8, dtype=torch.int64)


@pytest.mark.parametrize("partition", ["balanced", "contiguous_per_document", "zigzag_per_document"])
def test_a_partition_that_looks_at_the_mask_is_refused_without_one(partition):
    x, message = IDS, f"mask=None with partition='{partition}'"
    for make in (lambda: shard(x, 1, partition=partition), lambda: positions(8, partition=partition)):
        with pytest.raises(ArgumentError, match=message):
            make()
    with pytest.raises(ArgumentError, match=message):
        shard_batch({"input_ids": x}, partition=partition)


def test_without_a_process_group_nothing_is_sharded():
    x = _values((3, 7))
    assert torch.equal(shard(x, 1), x)
    assert torch.equal(unshard(x, 1), x)
    assert positions(7).tolist() == list(range(7))


def _gradients(partition):
    x = _values((2, 13, 3)).requires_grad_()
    weights = _values((2, 13, 3)) + 1
    held = _held(partition, 13)
    (shard(x, 1, partition=partition, mask=Mask.causal()) * weights[:, held]).sum().backward()
    expected = torch.zeros_like(x)
    expected[:, held] = weights[:, held]
    assert torch.equal(x.grad, expected)

    mine = x.detach()[:, held].requires_grad_()
    bias = torch.zeros(2, 13, 3, requires_grad=True)
    share = (dist.get_rank() + 1) * weights
    doubled = 2 * bias  # made before, so its backward runs after, on the gradient that unshard was given too
    ((doubled + unshard(mine, 1, partition=partition, mask=Mask.causal())) * share).sum().backward()
    total = sum(range(1, dist.get_world_size() + 1)) * weights
    torch.testing.assert_close(mine.grad, total[:, held])
    torch.testing.assert_close(bias.grad, 2 * share)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_gradients_pass_through_shard_and_are_summed_over_ranks_by_unshard(pool, partition):
    pool(3).run(_gradients, partition)


def _over_mesh():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    x = _values((2, 9)) + mesh.get_local_rank("data")
    mine = shard(x, 1, mesh["sequence"])
    assert mine.shape[1] in (4, 5)
    assert torch.equal(unshard(mine, 1, mesh["sequence"]), x)
    group = mesh["sequence"].get_group()
    assert torch.equal(unshard(shard(x, 1, group), 1, group), x)


def test_groups_may_be_mesh_dimensions_or_process_groups(pool):
    pool(4).run(_over_mesh)


def _wrong_share():
    rows = 4 if dist.get_rank() == 0 else 6
    with pytest.raises(RankMismatchError, match=r"surplus rows: -1 on rank 0; 1 on rank 1"):
        unshard(torch.zeros(2, rows), 1)
    with pytest.raises(ArgumentError, match=r"6 rows.*10 tokens.*5"):
        unshard(torch.zeros(2, 6), 1, seqlen=10)


def test_shares_that_no_partition_gives_are_refused_on_every_rank(pool):
    pool(2).run(_wrong_share)


def _wrong_share_of_one():
    rows = 5 + (dist.get_rank() == 1)
    with pytest.raises(RankMismatchError, match=r"surplus rows: 0 on rank 0; 1 on rank 1"):
        unshard(torch.zeros(3, rows), 1, seqlen=10)


def test_one_rank_with_a_wrong_share_is_found_on_every_rank(pool):
    pool(2).run(_wrong_share_of_one, timeout=15)


# Batches


def labels_by_definition(input_ids, cu_seqlens):
    size, seqlen = input_ids.shape
    starts = {*cu_seqlens, *range(0, size * seqlen, seqlen)}
    flat = input_ids.flatten().tolist()
    labels = [-100 if t + 1 == len(flat) or t + 1 in starts else flat[t + 1] for t in range(len(flat))]
    places, place = [], 0
    for t in range(len(flat)):
        place = 0 if t in starts else place + 1
        places.append(place)
    return torch.tensor(labels).view(size, seqlen), torch.tensor(places).view(size, seqlen)


def _batch(size, seqlen):
    return torch.randint(0, 1000, (size, seqlen), generator=torch.Generator().manual_seed(1))


def _shard_batch(size, seqlen, cu_seqlens, partition):
    batch = {"input_ids": _batch(size, seqlen)}
    if cu_seqlens is not None:
        batch["cu_seqlens"] = cu_seqlens
    sharded = shard_batch(batch, partition=partition, mask=Mask.causal())
    boundaries = sharded["cu_seqlens"].tolist()
    mask = Mask.causal() & Mask.documents(boundaries) if size == 1 else None
    held = _held(partition, seqlen, mask)
    labels, places = labels_by_definition(batch["input_ids"], cu_seqlens or [])
    assert torch.equal(sharded["input_ids"], batch["input_ids"][:, held])
    assert torch.equal(sharded["labels"], labels[:, held])
    assert torch.equal(sharded["position_ids"], places[:, held])
    assert sharded["seqlen"] == seqlen
    assert {*boundaries} == {*(cu_seqlens or []), *range(0, size * seqlen + 1, seqlen)}
    assert sharded["cu_seqlens"].dtype == torch.int64


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(
    ("size", "seqlen", "cu_seqlens"),
    [
        (1, 23, None),
        (1, 23, [0, 4, 5, 20, 23]),
        (1, 23, [0, 0, 9, 9, 23, 23]),
        (1, 24, list(range(25))),
        (2, 12, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_are_sharded_with_shifted_labels_and_restarting_positions(
    pool, ranks, size, seqlen, cu_seqlens, partition
):
    pool(ranks).run(_shard_batch, size, seqlen, cu_seqlens, partition)


@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cu_seqlens", [[0, 4, 23, 36], [0, 12, 13, 36], [0, 36]], ids=str)
def test_documents_over_a_batch_end_at_each_sequence(pool, cu_seqlens, partition):
    pool(2).run(_shard_batch, 3, 12, cu_seqlens, partition)


def test_given_labels_are_shifted_too_and_ignored_ones_stay_ignored():
    input_ids = _batch(1, 8)
    labels = input_ids.clone()
    labels[0, :3] = -100
    sharded = shard_batch({"input_ids": input_ids, "labels": labels, "cu_seqlens": torch.tensor([0, 5, 8])})
    a = labels[0].tolist()
    assert sharded["labels"].tolist() == [[-100, -100, a[3], a[4], -100, a[6], a[7], -100]]
    assert torch.equal(labels[0, 3:], input_ids[0, 3:])


def test_every_next_token_is_a_label_on_exactly_one_rank(pool):
    whole = shard_batch({"input_ids": _batch(1, 61), "cu_seqlens": [0, 7, 8, 40, 61]})
    counts = pool(4).run(_count_labels)
    assert sum(counts) == int((whole["labels"] != -100).sum()) == 61 - 4


def _count_labels():
    sharded = shard_batch(
        {"input_ids": _batch(1, 61), "cu_seqlens": [0, 7, 8, 40, 61]}, partition="balanced", mask=Mask.causal()
    )
    return int((sharded["labels"] != -100).sum())


def test_a_partition_of_each_document_takes_a_batchs_own_boundaries():
    batch = {"input_ids": torch.arange(12)[None], "cu_seqlens": [0, 4, 12]}
    part = shard_batch(batch, partition="zigzag_per_document", rank=1, ranks=2)
    assert part["input_ids"].tolist() == [[1, 2, 6, 7, 8, 9]]
    assert part["position_ids"].tolist() == [[1, 2, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 8)}, "attention_mask"),
        ({"labels": IDS}, "input_ids"),
        ({"input_ids": IDS[0]}, "input_ids.*8"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels.*7"),
        ({"input_ids": IDS, "cu_seqlens": [0, 9]}, "9"),
        ({"input_ids": IDS, "cu_seqlens": [1, 8]}, "cu_seqlens.*1, 8"),
    ],
)
def test_bad_batches_are_refused_by_name_and_value(batch, message):
    with pytest.raises(ArgumentError, match=message):
        shard_batch(batch)


def _attend_to_batch(partition, rules, size, seqlen, cu_seqlens):
    tensors = inputs(Shape(batch=size, length=seqlen))
    sharded = shard_batch(
        {"input_ids": _batch(size, seqlen), "cu_seqlens": cu_seqlens}, partition=partition, mask=rules
    )
    mask = rules & Mask.documents(sharded["cu_seqlens"].tolist())
    mine = [shard(x, 1, partition=partition, mask=mask if size == 1 else rules) for x in tensors[:3]]
    out = DistributedFlashAttention(rules, partition=partition)(
        *mine, cu_seqlens=sharded["cu_seqlens"], seqlen=sharded["seqlen"]
    )
    assert sharded["input_ids"].shape[1] == out.shape[1]
    return unshard(out, 1, partition=partition, mask=mask if size == 1 else rules)


@pytest.mark.parametrize(("size", "partition"), [*((1, kind) for kind in PARTITIONS), (2, "contiguous"), (2, "zigzag")])
def test_a_sharded_batch_an_attention_and_unshard_give_what_one_device_gives(pool, size, partition):
    rules, seqlen = Mask.causal() & Mask.sliding_window(9, sink=2), 29
    cu_seqlens = [0, 3, 20, size * seqlen]
    tensors = inputs(Shape(batch=size, length=seqlen))
    expected = exact(tensors, visible_in_batch(rules & Mask.documents(cu_seqlens), size, seqlen))["out"]
    for whole in pool(3).run(_attend_to_batch, partition, rules, size, seqlen, cu_seqlens):
        torch.testing.assert_close(whole.double(), expected, atol=1e-5, rtol=1e-5)


def test_balanced_refuses_a_batch_whose_sequences_have_different_documents(pool):
    with pytest.raises(ArgumentError, match=r"balanced.*batch of 2"):
        pool(3).run(_attend_to_batch, "balanced", Mask.causal(), 2, 29, [0, 3, 20, 58])


@settings(max_examples=60, deadline=None)
@given(problem=problems(longest=40, most_ranks=4), layers=st.integers(1, 3))
def test_ranks_together_count_every_visible_pair_once(problem, layers):
    mask, partition = problem
    # A second mask has to have the same documents, and the same shared prefix.
    second = Mask.causal() & Mask(boundaries=mask.boundaries, query_boundaries=mask.query_boundaries)
    both = {mask: 1} if mask.branches is not None or mask == second else {mask: 1, second: layers}
    place = {"seqlen": partition.length, "partition": partition, "ranks": partition.ranks}
    found = sum(Sharding(both, rank=rank, **place).pairs for rank in range(partition.ranks))
    expected = sum(visible(each, partition.length).sum().item() * many for each, many in both.items())
    assert found == pytest.approx(expected / sum(both.values()))


@given(batch=st.integers(1, 3), length=st.integers(0, 30), ranks=st.integers(1, 4))
def test_sequences_of_a_batch_have_pairs_of_their_own_alone(batch, length, ranks):
    found = sum(Sharding(seqlen=length, batch=batch, rank=rank, ranks=ranks).pairs for rank in range(ranks))
    assert found == batch * length * (length + 1) / 2
