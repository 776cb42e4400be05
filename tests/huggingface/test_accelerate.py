"""Loops of one's own with accelerate: what `accelerator.prepare(loader)` gives each rank, and training with it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.state import PartialState
from batches import KINDS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from trainers import LOSS, assert_same_weights, build, examples, launched, launched_for_fsdp, padded

from ringflash.errors import ArgumentError
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.transformers import SequenceParallel
from ringflash.transformers.loaders import share_batches

# What ranks are given


class Stream(IterableDataset):
    """Numbers up to a length that nobody is told."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


def _taken(size, length, batch, order, split, even):
    """Samples of each batch of this rank in two epochs, and those that it gathers."""
    torch.manual_seed(dist.get_rank())  # ranks must not rely on drawing the same
    with launched():
        config = DataLoaderConfiguration(
            split_batches=split, even_batches=even, use_seedable_sampler=order == "seedable", data_seed=5
        )
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        share_batches(accelerator, dist.new_subgroups(group_size=size)[0])
        data = Stream(length) if order == "stream" else list(range(length))
        batch *= dist.get_world_size() // size if split else 1
        loader = accelerator.prepare(DataLoader(data, batch_size=batch, shuffle=order in ("shuffled", "seedable")))
        assert accelerator.prepare(loader) is loader
        epochs, gathered = [], []
        for _ in range(2):
            epochs.append([x.tolist() for x in loader])
            gathered.append([n for x in loader for n in accelerator.gather_for_metrics(x).tolist()] if even else None)
        return epochs, gathered


@settings(max_examples=15)
@given(
    size=st.sampled_from([2, 4]),
    length=st.integers(1, 30),
    batch=st.integers(1, 4),
    order=st.sampled_from(["in_order", "shuffled", "seedable", "stream"]),
    split=st.booleans(),
    even=st.booleans(),
)
@example(size=4, length=9, batch=2, order="shuffled", split=False, even=True)
@example(size=2, length=9, batch=2, order="shuffled", split=False, even=True)
def test_a_group_gets_one_batch_and_all_groups_together_get_all(pool, size, length, batch, order, split, even):
    ranks = pool(4).run(_taken, size, length, batch, order, split, even)
    groups = ranks[::size]
    assert all(taken == groups[rank // size] for rank, taken in enumerate(ranks))
    for epoch in range(2):
        rounds = [taken[epoch] for taken, _ in groups]
        given = [n for at_once in _by_round(rounds) for x in at_once for n in x]
        assert set(given) == set(range(length))
        if order in ("in_order", "stream") and even:
            assert given[:length] == list(range(length))
        if len(groups) == 1 or not (even or order == "stream"):
            assert len(given) == length
        if even and order != "stream":
            assert sorted(groups[0][1][epoch]) == list(range(length))
    assert order in ("in_order", "stream") or length < 8 or groups[0][0][0] != groups[0][0][1]


def _by_round(groups):
    """Batches that groups get at the same time; the last may be missing in some."""
    for number in range(max(len(x) for x in groups)):
        yield [x[number] for x in groups if number < len(x)]


def _gathered_numbers_and_texts(size):
    with launched():
        accelerator = Accelerator(cpu=True)
        share_batches(accelerator, dist.new_subgroups(group_size=size)[0])
        rank = accelerator.process_index
        sums = accelerator.gather_for_metrics(torch.tensor(float(rank)))
        rows = accelerator.gather_for_metrics({"x": torch.full((2, 1), rank // size)})
        return sums.tolist(), rows["x"].flatten().tolist(), accelerator.gather_for_metrics([f"of group {rank // size}"])


@pytest.mark.parametrize("size", [2, 4])
def test_metrics_gather_rows_and_texts_of_each_group_and_numbers_of_each_rank(pool, size):
    groups = range(4 // size)
    expected = [0, 1, 2, 3], [number for number in groups for _ in range(2)], [f"of group {n}" for n in groups]
    assert pool(4).run(_gathered_numbers_and_texts, size) == [expected] * 4


def _refusals():
    said = []
    with launched():
        strided, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
        accelerator = Accelerator(cpu=True)
        for dispatch, group in ((False, strided), (True, dist.group.WORLD)):
            accelerator.dataloader_config.dispatch_batches = dispatch
            with pytest.raises(ArgumentError) as error:
                share_batches(accelerator, group)
            said.append(str(error.value))
    return said


def test_groups_that_are_not_consecutive_and_dispatched_batches_are_refused(pool):
    for rank, said in enumerate(pool(4).run(_refusals)):
        mine = [rank % 2, rank % 2 + 2]
        assert said == [
            f"group has ranks {mine} of 4; allowed are 2 consecutive ranks, from a multiple of 2 on",
            "dispatch_batches=True: rank 0 reads batches and gives each rank another part of them; allowed is False",
        ]


# Counting


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_counted_as_they_are_sharded(kind):
    documents = KINDS[kind]()
    assert SequenceParallel(build("ring"), ONE_DEVICE).count_targets(documents.batch) == documents.valid


# Training

OPTIMIZER = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
DATA = examples(16, shortest=8)


def _one_device(groups):
    """Losses and weights of steps of two times `groups` batches."""
    model = build("eager")
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses = []
    batches = list(DataLoader(DATA, batch_size=2, collate_fn=padded))
    for start in range(0, len(batches), 2 * groups):
        parts = [model(**batch).loss for batch in batches[start : start + 2 * groups]]
        loss = sum(parts) / len(parts)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, dict(model.named_parameters())


def _loop(accelerator, sequence, model):
    """What users write, with the sharding of batches as its only change."""
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    loader = DataLoader(DATA, batch_size=2, collate_fn=padded)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**sequence.shard(batch), use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(sequence.reported(loss), reduction="mean").item())
    weights = {name.removeprefix("module."): x.detach() for name, x in model.named_parameters()}
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in weights.items()}
    return [sum(losses[i : i + 2]) / 2 for i in range(0, len(losses), 2)], weights


def _with_shared_batches(size):
    with launched():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        mesh = init_device_mesh("cpu", (accelerator.num_processes // size, size), mesh_dim_names=("dp", "cp"))
        model = build("ring")
        sequence = SequenceParallel(model, mesh["cp"])
        sequence.share_batches(accelerator)
        return _loop(accelerator, sequence, model)


def _with_accelerates_mesh(size):
    with launched_for_fsdp():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        config = ParallelismConfig(cp_size=size, dp_shard_size=PartialState().num_processes // size)
        accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=config, gradient_accumulation_steps=2)
        model = build("ring")
        return _loop(accelerator, SequenceParallel(model, accelerator.torch_device_mesh["cp"]), model)


@pytest.mark.parametrize("loop", [_with_shared_batches, _with_accelerates_mesh], ids=["ddp", "fsdp2_cp_mesh"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_loop_of_ones_own_trains_as_one_device_does(pool, ranks, loop):
    losses, weights = _one_device(ranks // 2)
    assert abs(losses[-1] - losses[0]) > 0.1  # something was learned
    for found, state in pool(ranks).run(loop, 2):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=LOSS, atol=0)
        assert_same_weights(state, weights)
