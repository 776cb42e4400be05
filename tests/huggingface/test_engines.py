"""What docs/engines.md says of DDP and FSDP2: which ranks they average, in mixed precision, and what they save."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from finetuning import build, documents_of, gradients_of, scale
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ringflash.deepspeed import import_deepspeed
from ringflash.transformers import SequenceParallel

CPU = torch.device("cpu")


def _fsdp2(model, mesh, **options):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


WRAPPERS = {
    "ddp": lambda model, mesh: DistributedDataParallel(model),
    "fsdp2": lambda model, mesh: _fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),))),
    "fsdp2_by_both_dimensions": lambda model, mesh: _fsdp2(model, mesh),
    "ddp_by_data_ranks": lambda model, mesh: DistributedDataParallel(model, process_group=mesh["data"].get_group()),
    "fsdp2_by_data_ranks": lambda model, mesh: _fsdp2(model, mesh["data"]),
}
"""Engines by the mesh of data and sequence ranks."""


def _step(name):
    """By how much a step of size 1 changes the weights, as this rank would save them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    model = build("ring")
    sequence = SequenceParallel(model, mesh["sequence"])
    wrapped = WRAPPERS[name](model, mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    wrapped(**sequence.shard(documents_of(mesh.get_local_rank("data")).batch), use_cache=False).loss.backward()
    optimizer.step()
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    before = build("eager").state_dict()
    return {key: before[key] - weight for key, weight in saved.items()}


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_by_both_dimensions"])
def test_engines_of_all_ranks_step_as_one_device_does(pool, name):
    for changes in pool(4).run(_step, name):
        assert scale(changes, gradients_of(2)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp_by_data_ranks", "fsdp2_by_data_ranks"])
def test_engines_of_data_ranks_alone_do_not(pool, name):
    assert [scale(changes, gradients_of(2)) for changes in pool(4).run(_step, name)] == [None] * 4


# Mixed precision

LENGTH = 521
"""With 514 targets, half of which bf16 would round to 256."""


def _mixed_loss(engine, fused):
    model = build("ring")
    sequence = SequenceParallel(model)
    if fused:
        sequence.fuse_loss()
    part, context = sequence.shard(documents_of(0, LENGTH).batch), contextlib.nullcontext()
    if engine == "ddp":
        wrapped, context = DistributedDataParallel(model), torch.autocast("cpu", torch.bfloat16)
    elif engine == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrapped = _fsdp2(model, init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    else:
        optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": optimizer}
        zero = {"zero_optimization": {"stage": 2}}
        wrapped, *_ = import_deepspeed(CPU).initialize(
            model=model, model_parameters=model.parameters(), config=config | zero
        )
    with context:
        loss = wrapped(**part, use_cache=False).loss
    loss.backward()
    return sequence.reported(loss).float().item()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_mixed_precision_rounds_no_count_of_targets(pool, engine, fused):
    with torch.no_grad():
        expected = build("eager").bfloat16()(**documents_of(0, LENGTH).batch).loss.item()
    for loss in pool(2).run(_mixed_loss, engine, fused):
        assert loss == pytest.approx(expected, rel=1e-3)
