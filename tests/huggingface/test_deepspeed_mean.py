"""What DeepSpeed is told of sequence parallelism changes its mean over ranks: what breaks it is refused, by name."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from finetuning import build, documents_of, gradients_of, scale
from torch.distributed.device_mesh import init_device_mesh

from ringflash.deepspeed import import_deepspeed
from ringflash.errors import ArgumentError
from ringflash.transformers import SequenceParallel, sequence_parallel

CPU = {"device": "cpu"}
STAGES = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3_without_reduce_scatter": {"stage": 3, "reduce_scatter": False},
}
OFFLOADED = {
    "1_offload": {"stage": 1, "offload_optimizer": CPU},
    "2_offload": {"stage": 2, "offload_optimizer": CPU},
    "3_offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
SHARING = 2
"""Ranks that share a sequence."""


class Megatron:
    """An `mpu` as Megatron has it, whose data-parallel ranks are those of a group."""

    def __init__(self, group):
        self.get_data_parallel_group = lambda: group
        self.get_data_parallel_rank = lambda: dist.get_rank(group)
        self.get_data_parallel_world_size = lambda: dist.get_world_size(group)
        self.get_data_parallel_group_ranks = lambda: dist.get_process_group_ranks(group)
        self.get_model_parallel_world_size = self.get_tensor_model_parallel_world_size = lambda: 1
        self.get_model_parallel_rank = self.get_tensor_model_parallel_rank = lambda: 0
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = lambda: None


def _deepspeeds_own(mesh):
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(SHARING)
    return {"mpu": parallel_state_sp}, {}


WAYS = {
    "nothing": lambda mesh: ({}, {}),
    "sequence_parallel_size": lambda mesh: ({}, {"sequence_parallel_size": SHARING}),
    "mpu_of_all_ranks": lambda mesh: ({"mpu": Megatron(dist.group.WORLD)}, {}),
    "mpu": _deepspeeds_own,
    "mesh_param": lambda mesh: ({"mesh_param": tuple(mesh.shape)}, {}),
    "both_sizes": lambda mesh: ({}, {"data_parallel_size": mesh.size(0), "sequence_parallel_size": SHARING}),
    "mpu_of_data_ranks": lambda mesh: ({"mpu": Megatron(mesh["data"].get_group())}, {}),
}
"""What may be passed to `deepspeed.initialize`, and stand in its JSON, by the ranks' mesh."""

ACCEPTED = ("nothing", "sequence_parallel_size", "mpu_of_all_ranks")
REFUSED = [way for way in WAYS if way not in ACCEPTED]


@contextmanager
def _initialised(way, zero):
    """The batch's shard, as a function, with engine and model; what DeepSpeed keeps of `way` goes afterwards."""
    deepspeed = import_deepspeed(torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size() // SHARING, SHARING), mesh_dim_names=("data", "sequence"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    model = build("ring")
    sequence = SequenceParallel(model, mesh["sequence"])
    try:
        arguments, keys = WAYS[way](mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | keys, **arguments)
        yield lambda: sequence.shard(documents_of(mesh.get_local_rank("data")).batch), engine, model
    finally:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        deepspeed.utils.groups.mpu = deepspeed.utils.groups.mesh_device = None
        parallel_state_sp._release_sequence_parallel_groups()


def _step(way, zero, checked=True):
    """By how much a step of size 1 changes the weights."""
    import deepspeed

    with pytest.MonkeyPatch.context() as patch, _initialised(way, zero) as (shard, engine, model):
        before = {name: weight.detach() for name, weight in build("eager").named_parameters()}
        if not checked:
            patch.setattr(sequence_parallel, "check_mean", lambda group: None)
        engine.backward(engine(**shard(), use_cache=False).loss)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: before[name] - weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES | OFFLOADED)
@pytest.mark.parametrize("way", ACCEPTED)
def test_what_is_accepted_gives_one_devices_gradients(pool, way, stage):
    for changes in pool(2).run(_step, way, (STAGES | OFFLOADED)[stage]):
        assert scale(changes, gradients_of(1)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES | OFFLOADED)
def test_data_ranks_average_their_losses(pool, stage):
    for changes in pool(4).run(_step, "nothing", (STAGES | OFFLOADED)[stage]):
        assert scale(changes, gradients_of(2)) == pytest.approx(1, rel=1e-4)


def _refused(way, zero):
    with _initialised(way, zero) as (shard, _, _), pytest.raises(ArgumentError) as caught:
        shard()
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", REFUSED)
def test_what_is_refused_is_named_before_a_step(pool, way, stage):
    for text in pool(2).run(_refused, way, STAGES[stage]):
        assert text.startswith("mpu, mesh_param or the JSON of deepspeed.initialize says to sum gradients over ranks")
        assert "pass neither mpu nor mesh_param" in text


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", REFUSED)
def test_what_is_refused_would_have_been_wrong(pool, way, stage):
    """Gradients times the ranks that share a sequence, or others on each rank; stage 3 may be right by chance."""
    scales = [scale(x, gradients_of(2)) for x in pool(4).run(_step, way, STAGES[stage], checked=False)]
    if way == "mpu_of_data_ranks" or (way != "mpu" and stage in "012"):
        assert scales == [None] * 4
    else:
        assert scales == pytest.approx([1 if stage == "3" else SHARING] * 4, rel=1e-4)


def _without_an_engine():
    import_deepspeed(torch.device("cpu"))
    return set(SequenceParallel(build("ring")).shard(documents_of(0).batch))


def test_deepspeed_that_is_only_imported_changes_nothing(pool):
    assert all("sharding" in keys for keys in pool(2).run(_without_an_engine))
