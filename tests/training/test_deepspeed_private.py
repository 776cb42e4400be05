"""DeepSpeed's undocumented names: each does what the recipe relies on, in the version that is installed."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import recipe
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringflash import deepspeed_private as private
from ringflash.configs.schema import EngineConfig
from ringflash.deepspeed import import_deepspeed
from ringflash.training.engines import zero
from ringflash.training.engines.create import create_engine, parameter_shapes
from ringflash.training.engines.optimizer import MOMENTS

CPU = torch.device("cpu")
VARIANTS = {
    "fp32_partitioned_groups_flat": ("zero3", torch.float32),
    "single_partition_of_fp32_groups": ("zero2", torch.float32),
    "fp32_groups_flat_partition": ("zero1", torch.bfloat16),
}


def _engine(name, dtype=torch.float32):
    model = recipe.build(device="meta", dtype=dtype)
    return create_engine(model, CPU, EngineConfig(name), recipe.OPTIMIZER), parameter_shapes(recipe.build())


def _compiled_operator():
    import_deepspeed(CPU)
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShareMemCommBuilder, "load", lambda self: "compiled")
        kept = build_shm_op()
        patch.setitem(deepspeed.ops.__compatible_ops__, ShareMemCommBuilder.NAME, True)
        return kept, build_shm_op()


def test_compatible_ops_decides_whether_cpu_collectives_are_compiled(pool):
    assert pool(2).run(_compiled_operator) == [(None, "compiled")] * 2


def _averaged_ranks():
    groups = import_deepspeed(CPU).utils.groups
    untold = private.averaged_ranks(groups)
    names = ("data_parallel", "sequence_parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "mesh_device", init_device_mesh("cpu", (1, 2), mesh_dim_names=names))
        return untold, private.averaged_ranks(groups)


def test_groups_tells_over_which_ranks_gradients_are_averaged(pool):
    assert pool(2).run(_averaged_ranks) == [(([0, 1], 2), ([rank], 0.5)) for rank in range(2)]


def _holders_of_copies(path):
    groups = import_deepspeed(CPU).utils.groups
    assert groups._get_zero_param_intra_parallel_group() is None
    model = recipe.build(device="meta")
    try:
        engine = create_engine(model, CPU, EngineConfig("zero3", deepspeed=path), recipe.OPTIMIZER)
        group = private.copies_group(groups, 2)
        assert all(weight.ds_zero_param_process_group is group for weight in model.parameters())
        engine.wrapped(**recipe.shard_batch(recipe.batches(0)[0]))  # until the backward pass
        copied = [weight for weight in model.parameters() if weight.ds_secondary_tensor is not None]
        return dist.get_process_group_ranks(group), bool(copied)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def test_ranks_that_hold_all_weights_among_them_are_made_once_and_do(pool, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"zero_hpz_partition_size": 2}}))
    assert pool(4).run(_holders_of_copies, str(path)) == [([0, 1], True)] * 2 + [([2, 3], True)] * 2


def _outlives(name):
    engine, _ = _engine(name)
    model = weakref.ref(engine.model)
    del engine
    gc.collect()
    return model() is not None


def test_a_model_of_stage_3_is_held_until_its_process_ends_so_that_a_benchmark_has_one_in_each(pool):
    assert pool(2).run(_outlives, "zero3") == [True, True]
    assert pool(2).run(_outlives, "fsdp2") == [False, False]


def _masters(name, dtype, attribute):
    engine, shapes = _engine(name, dtype)
    masters = private.master_weights(engine._zero)
    assert masters is getattr(engine._zero, attribute)
    assert all(master.dtype == torch.float32 and master.dim() == 1 for master in masters)
    with torch.no_grad():
        for master in masters:
            master.fill_(0.25)
    whole = {key.removeprefix("weight/"): x for key, x in recipe.whole(engine).items() if key.startswith("weight/")}
    assert all((whole[parameter] == 0.25).all() for parameter in shapes)
    return sum(master.numel() for master in masters), sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("attribute", private.MASTERS)
def test_masters_are_this_ranks_part_of_all_fp32_weights(pool, attribute):
    parts = pool(2).run(_masters, *VARIANTS[attribute], attribute)
    assert sum(mine for mine, _ in parts) >= parts[0][1]
    assert all(mine < whole for mine, whole in parts)


def test_a_version_that_keeps_masters_elsewhere_is_named():
    with pytest.raises(AttributeError, match="object of this DeepSpeed version keeps its fp32 weights elsewhere"):
        private.master_weights(object())


def _state(name, dtype):
    engine, _ = _engine(name, dtype)
    masters, state = private.master_weights(engine._zero), private.optimizer_state(engine._zero)
    assert isinstance(engine._zero.optimizer, torch.optim.AdamW)
    assert len(state) == len(masters)
    for master in masters:
        state[master]["exp_avg"].fill_(0.5)
    return all((x == 0.5).all() for key, x in recipe.whole(engine).items() if key.startswith("exp_avg/"))


@pytest.mark.parametrize(("name", "dtype"), VARIANTS.values(), ids=VARIANTS)
def test_the_wrapped_optimizers_state_is_what_deepspeed_gathers(pool, name, dtype):
    assert pool(2).run(_state, name, dtype) == [True, True]


def _found_before_the_first_step(name, dtype, link):
    with pytest.MonkeyPatch.context() as patch:
        if not link:
            patch.setattr(zero, "link_optimizer_state", lambda _: None)
        engine, shapes = _engine(name, dtype)
    moments = [x for key, x in recipe.whole(engine).items() if not key.startswith("weight/")]
    return len(moments) == len(MOMENTS) * len(shapes)


@pytest.mark.parametrize("variant", ["single_partition_of_fp32_groups", "fp32_groups_flat_partition"])
def test_linking_lets_optimizer_state_be_found_before_the_first_step(pool, variant):
    assert pool(2).run(_found_before_the_first_step, *VARIANTS[variant], True) == [True, True]
    for outcome in pool(1).outcomes(_found_before_the_first_step, *VARIANTS[variant], False):
        assert outcome.error is not None


def _own_parts(name, dtype):
    engine, _ = _engine(name, dtype)
    import deepspeed

    found = 0
    for _, weight in engine.model.named_parameters():
        for moment in (None, *MOMENTS):
            held = private.own_part(weight, moment)
            if held is not None:
                held[1].fill_(dist.get_rank() + 1)  # of what DeepSpeed has, not of a copy
                found += len(held[1])
            if moment is None:
                whole = deepspeed.utils.safe_get_full_fp32_param(weight).flatten()
            else:
                whole = deepspeed.utils.safe_get_full_optimizer_state(weight, moment).flatten()
            if held is not None:
                start, part = held
                assert (whole[start : start + len(part)] == dist.get_rank() + 1).all()
            assert (whole > 0).all()
        if name == "zero3":
            private.cast_own_part(weight)
            with deepspeed.zero.GatheredParameters([weight]):
                assert weight.dtype == dtype
                assert (weight > 0).all()
                assert weight.ds_secondary_tensor is None
    return found, (1 + len(MOMENTS)) * sum(torch.Size(shape).numel() for shape in engine.shapes.values())


@pytest.mark.parametrize(("name", "dtype"), [*VARIANTS.values(), ("zero3", torch.bfloat16)], ids=str)
def test_own_parts_are_views_of_what_deepspeed_gathers_and_of_all_of_it_once(pool, name, dtype):
    found = pool(3).run(_own_parts, name, dtype)
    assert sum(mine for mine, _ in found) == found[0][1]


def _parts():
    engine, shapes = _engine("zero3")
    ranks = dist.get_world_size()
    for name, weight in engine.model.named_parameters():
        size = torch.Size(shapes[name]).numel()
        assert weight.numel() == 0
        assert private.part_size(weight) == weight.ds_tensor.numel() == -(-size // ranks)
        assert private.whole_shape(weight) == weight.ds_shape == torch.Size(shapes[name])
    return True


def test_zero_3_keeps_equal_parts_and_whole_shapes_beside_empty_weights(pool):
    assert pool(2).run(_parts) == [True, True]
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    assert private.whole_shape(weight) == (2, 3)
