"""A user's own DeepSpeed JSON: what it moves and how it is done changes, what is learned stays; the rest is refused."""

from __future__ import annotations

import json

import pytest
import recipe
import torch
from test_engine import assert_same

from ringflash.configs.schema import EngineConfig
from ringflash.errors import ArgumentError, RankMismatchError
from ringflash.training.config.agreement import agree
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines import deepspeed_json
from ringflash.training.engines.create import create_engine

CPU = torch.device("cpu")
ON_HOST = {"device": "cpu", "pin_memory": True}
VARIANTS = {
    "optimizer_1": ("zero1", {"offload_optimizer": ON_HOST}),
    "optimizer_2": ("zero2", {"offload_optimizer": ON_HOST, "overlap_comm": True, "allgather_bucket_size": 1000}),
    "optimizer_3": ("zero3", {"offload_optimizer": ON_HOST, "sub_group_size": 3000}),
    "both_3": ("zero3", {"offload_optimizer": ON_HOST, "offload_param": ON_HOST, "reduce_bucket_size": 1000}),
    "within_hosts_3": ("zero3", {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 10}),
}


def _written(tmp_path, said):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(said))
    return str(path)


def _steps(name, **job):
    from deepspeed.utils import groups

    try:
        return recipe.steps(name, **job)
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of a process, for which the next engine would take it too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_lies_on_the_host_is_trained_saved_and_goes_on(pool, tmp_path, variant, dtype):
    name, of_zero = VARIANTS[variant]
    path = _written(tmp_path, {"zero_optimization": of_zero, "train_batch_size": "auto", "bf16": {"enabled": "auto"}})
    job = {"degree": 2, "micro_batch": 2, "dtype": dtype, "settings": {"deepspeed": path}}
    pool(2).run(_steps, name, folder=str(tmp_path), **job)
    rest = {"first": 2, "last": 4, "resume": str(tmp_path / "step-00000002")}
    found = pool(2).run(_steps, name, **rest, **job)[0]
    if dtype == torch.float32:
        expected = recipe.plain(last=4)
        assert_same(found, (expected[0][2:], expected[1]))
        return
    job["settings"] = None
    curve, state = pool(2).run(recipe.steps, name, last=4, **job)[0]
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(curve[2:]), rtol=1e-3, atol=1e-3)
    for key in state:
        assert (found[1][key] - state[key]).norm() <= 0.02 * state[key].norm(), key


def _settings_of(path):
    engine = create_engine(recipe.build(device="meta"), CPU, EngineConfig("zero3", deepspeed=path), recipe.OPTIMIZER)
    found = engine._engine.config
    masters = [master.device.type for master in engine._zero.fp32_partitioned_groups_flat]
    return found["zero_optimization"], found["gradient_clipping"], engine._zero.offload_optimizer, masters


def test_values_take_the_place_of_the_recipes_and_all_others_stay(pool, tmp_path):
    weights = sum(weight.numel() for weight in recipe.build().parameters())
    ((plain, clip, offloads, _),) = pool(1).run(_settings_of, None)
    assert plain["reduce_bucket_size"] == weights  # as many as the model has; DeepSpeed's own is for any
    assert plain["stage3_max_live_parameters"] <= 2 * weights
    assert not offloads
    said = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 77, "offload_optimizer": ON_HOST}}
    ((found, same, offloads, masters),) = pool(1).run(_settings_of, _written(tmp_path, said))
    assert found == plain | said["zero_optimization"]
    assert same == clip == recipe.OPTIMIZER.clip
    assert offloads
    assert set(masters) == {"cpu"}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"train_batch_size": 8}, "train_batch_size=8: it contradicts the recipe; set train.global_batch"),
        ({"train_micro_batch_size_per_gpu": 2}, "set train.micro_batch"),
        ({"gradient_accumulation_steps": 2}, "set train.global_batch and train.micro_batch"),
        ({"optimizer": {"type": "Adam"}}, 'optimizer={"type": "Adam"}: it contradicts the recipe; set the keys of opt'),
        ({"scheduler": {"type": "WarmupLR"}}, "set optimizer.schedule"),
        ({"gradient_clipping": 1.0}, "set optimizer.clip"),
        (
            {"fp16": {"enabled": True}},
            "fp16.enabled=true: it contradicts the recipe; set engine.precision, which knows",
        ),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true: it contradicts the recipe; set engine.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "set engine.precision"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2: it contradicts the recipe; set engine=zero1"),
        ({"zero_optimization": {"cpu_offload": True}}, "set zero_optimization.offload_optimizer={device: cpu}"),
        ({"activation_checkpointing": {}}, "set engine.memory"),
        ({"gradient_allreduce_op": "sum"}, "the recipe's loss is one for which the mean is right"),
        ({"zero_force_ds_cpu_optimizer": True}, "the recipe's AdamW is torch's, on the host too"),
        ({"zero_optimization": {"bucket": 1}}, "zero_optimization.bucket=1: the recipe hands no such key to DeepSpeed"),
        ({"zero_optimizatoin": {}}, "zero_optimizatoin={}: the recipe hands no such key to DeepSpeed"),
        ({"zero_optimization": 3}, "zero_optimization=3: it has to be an object"),
        ({"zero_optimization": {"offload_param": "cpu"}}, 'offload_param="cpu": it has to be an object'),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'device="nvme": allowed are cpu and none'),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "offload_optimizer.ratio=0.5: the recipe hands"),
        ({"zero_optimization": {"zero_hpz_partition_size": 3}}, "it has to divide the 4 ranks"),
    ],
)
def test_what_contradicts_the_recipe_or_is_unknown_is_refused_by_its_key_before_ranks_meet(tmp_path, said, problem):
    path = _written(tmp_path, said)
    with pytest.raises(ArgumentError) as refused:
        check(load(["engine=zero3", f"engine.deepspeed={path}", "device=cpu"]), 4)
    assert str(refused.value).startswith(f"engine.deepspeed={path}: ")
    assert problem in str(refused.value)


def test_what_is_of_another_stage_or_no_json_is_refused_too(tmp_path):
    path = _written(tmp_path, {"zero_optimization": {"offload_param": ON_HOST}})
    with pytest.raises(ArgumentError, match=r"offload_param.device=\"cpu\": weights are divided, and can lie on the h"):
        check(load(["engine=zero2", f"engine.deepspeed={path}"]), 2)
    with pytest.raises(ArgumentError, match=r"with engine\.name=fsdp2; it is for zero1, zero2 and"):
        check(load(["engine=fsdp2", f"engine.deepspeed={path}"]), 2)
    twice = '{"zero_optimization": {"overlap_comm": true, "overlap_comm": false}}'
    for text, problem in (
        ("{", "allowed is a file that holds a JSON object"),
        ("[]", "holds no JSON object"),
        (twice, "the key overlap_comm is there twice"),
    ):
        (tmp_path / "deepspeed.json").write_text(text)
        with pytest.raises(ArgumentError, match=problem):
            check(load(["engine=zero2", f"engine.deepspeed={path}"]), 2)
    with pytest.raises(ArgumentError, match=r"cannot read it: .*No such file"):
        check(load(["engine=zero2", "engine.deepspeed=nowhere.json"]), 2)


def test_what_says_the_same_as_the_recipe_or_leaves_it_to_it_is_taken(tmp_path):
    said = {"fp16": {"enabled": False}, "bf16": {"enabled": False, "immediate_grad_update": "auto"}}
    said |= {"optimizer": {"type": "auto", "params": {"lr": "auto"}}, "gradient_clipping": "auto"}
    said |= {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "zero_allow_untested_optimizer": True}
    path = _written(tmp_path, said)
    check(load(["engine=zero2", f"engine.deepspeed={path}", "device=cpu"]), 2)
    ours = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "gradient_clipping": 0.3}
    assert deepspeed_json.merged(ours, path) == ours


def _refused_value(path):
    with pytest.raises(ArgumentError) as refused:
        _settings_of(path)
    return str(refused.value)


def test_values_that_deepspeed_refuses_are_named_on_every_rank(pool, tmp_path):
    path = _written(tmp_path, {"zero_optimization": {"reduce_bucket_size": -1}})
    for said in pool(2).run(_refused_value, path):
        assert said.startswith(f"engine.deepspeed={path}: zero_optimization: ")
        assert "reduce_bucket_size" in said


def _agree(paths):
    config = load(["engine=zero2"])
    config.engine.deepspeed = "deepspeed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_json, "read", lambda path: paths[torch.distributed.get_rank()])
        agree(config)


def test_ranks_whose_files_differ_are_told_so(pool):
    for outcome in pool(2).outcomes(_agree, [{"steps_per_print": 1}, {"steps_per_print": 2}]):
        assert isinstance(outcome.error, RankMismatchError)
        assert "rank 1 was started with engine.deepspeed, in its file=" in str(outcome.error)


def test_each_key_that_is_handed_on_is_one_of_deepspeeds():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Param

    fields = DeepSpeedZeroConfig.model_fields
    assert {(field.alias or name) for name, field in fields.items()} >= deepspeed_json.ALLOWED_OF_ZERO
    for key, kind in (("offload_optimizer", Optimizer), ("offload_param", Param)):
        assert kind.model_fields.keys() >= deepspeed_json.OF_HOST[key]
