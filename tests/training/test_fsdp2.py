"""FSDP2: what it says to other ranks and when, in which dtype, and what lies on the host."""

from __future__ import annotations

import collections

import pytest
import recipe
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from ringflash.configs.schema import EngineConfig
from ringflash.errors import ArgumentError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine

CPU = torch.device("cpu")
BLOCKS = recipe.MODEL.num_hidden_layers


def _engine(dtype=torch.float32, **settings):
    model = recipe.build(dist.group.WORLD, device="meta", dtype=dtype)
    return create_engine(model, CPU, EngineConfig("fsdp2", **settings), recipe.OPTIMIZER)


class _Said(TorchDispatchMode):
    """Collectives by name."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        if operator.namespace == "c10d":
            self.calls[operator.overloadpacket.__name__] += 1
        return operator(*arguments, **(named or {}))


def _collectives(memory, micro_batches):
    """How often weights are gathered, and gradients summed, in a step."""
    engine = _engine(memory=memory)
    batches = [engine.model.shard(batch) for batch in recipe.batches(0)[:micro_batches]]
    with _Said() as said:
        engine.train_step(batches, 1e-3)
    return said.calls["_allgather_base_"], said.calls["_reduce_scatter_base_"]


@pytest.mark.parametrize("memory", ["keep", "recompute", "offload", "offload_pairs"])
def test_each_block_is_gathered_once_a_pass_whatever_is_kept_of_it_and_summed_once_a_step(pool, memory):
    # The last block and what is in none stay from one pass to the other.
    gathers = 1 + BLOCKS + (BLOCKS - 1)
    assert pool(2).run(_collectives, memory, 1) == [(gathers, 1 + BLOCKS)] * 2
    assert pool(2).run(_collectives, memory, 3) == [(3 * gathers, 1 + BLOCKS)] * 2


def _dtypes_of_messages(reduce):
    found = collections.defaultdict(set)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), named=None):
            if operator.namespace == "c10d" and "base" in operator.overloadpacket.__name__:
                found[operator.overloadpacket.__name__].add(arguments[1].dtype)
            return operator(*arguments, **(named or {}))

    engine = _engine(dtype=torch.bfloat16, reduce=reduce)
    batch = engine.model.shard(recipe.batches(0)[0])
    with Seen():
        engine.train_step([batch, batch], 1e-3)
    return found["_allgather_base_"], found["_reduce_scatter_base_"]


@pytest.mark.parametrize(("reduce", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_weights_are_gathered_in_bf16_and_gradients_summed_in_the_dtype_that_is_named(pool, reduce, dtype):
    assert pool(2).run(_dtypes_of_messages, reduce) == [({torch.bfloat16}, {dtype})] * 2


def test_sums_in_bf16_learn_nearly_what_those_in_fp32_do(pool):
    (expected, _), (found, _) = (
        pool(2).run(recipe.steps, "fsdp2", degree=2, settings={"reduce": each})[0] for each in ("fp32", "bf16")
    )
    assert found != expected
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), rel=0.02)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_rank_without_tokens_takes_part_in_all_sums(pool, name):
    (expected,) = pool(1).run(_three_tokens, name)
    for found in pool(4).run(_three_tokens, name):
        assert found == pytest.approx(expected, rel=1e-4)
    assert [rank for rank in pool(4).run(_holds_tokens) if not rank]


def _three_tokens(name):
    model = recipe.build(dist.group.WORLD, device="meta")
    engine = create_engine(model, CPU, EngineConfig(name), recipe.OPTIMIZER)
    curve = []
    for _ in range(2):
        loss, norm, _ = engine.train_step([model.shard(_short())], 1e-1)
        curve += [loss.item(), norm.item()]
    return curve


def _short():
    return {"input_ids": torch.tensor([[3, 1, 4]]), "cu_seqlens": [0, 3]}


def _holds_tokens():
    model = recipe.build(dist.group.WORLD, device="meta")
    return model.shard(_short())["input_ids"].numel()


@pytest.mark.parametrize("memory", ["keep", "offload"])
def test_a_model_on_the_host_learns_bit_for_bit_what_one_on_the_device_does(pool, tmp_path, memory):
    job = {"degree": 2, "micro_batch": 2, "memory": memory}
    expected = pool(2).run(recipe.steps, "fsdp2", last=4, **job)[0]
    pool(2).run(recipe.steps, "fsdp2", settings={"offload": True}, folder=str(tmp_path), **job)
    rest = {"first": 2, "last": 4, "resume": str(tmp_path / "step-00000002")}
    curve, state = pool(2).run(recipe.steps, "fsdp2", settings={"offload": True}, **rest, **job)[0]
    assert curve == expected[0][2:]
    assert all(torch.equal(state[name], expected[1][name]) for name in state)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.reduce=bf16"], "engine.reduce=bf16 with engine.name=ddp; it is for fsdp2"),
        (["engine=zero3", "engine.offload=true"], "engine.offload=True with engine.name=zero3; it is for fsdp2"),
        (["engine=fsdp2", "engine.reduce=fp16"], "engine.reduce='fp16'; allowed are fp32, bf16"),
        (
            ["engine=fsdp2", "engine.offload=true", "optimizer.name=muon"],
            "engine.offload=true with optimizer.name=muon",
        ),
        (["engine=fsdp2", "optimizer.name=adamw_8bit"], "optimizer.name=adamw_8bit with engine.name=fsdp2, which cuts"),
    ],
)
def test_what_cannot_work_is_refused_by_name(overrides, said):
    with pytest.raises(ArgumentError) as refused:
        check(load(overrides), 1)
    assert said in str(refused.value)


def _without_blocks():
    model = recipe.build(device="meta")
    model.parts = lambda: [model.embed_tokens]
    with pytest.raises(
        ArgumentError, match=r"engine\.name=fsdp2: the model names no layers that run one after another"
    ):
        create_engine(model, CPU, EngineConfig("fsdp2"), recipe.OPTIMIZER)


def test_a_model_that_would_be_gathered_at_once_is_refused_by_name(pool):
    pool(2).run(_without_blocks)
