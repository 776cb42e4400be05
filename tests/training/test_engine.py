"""A training step is the same function whatever the engine, the sharding and the accumulation."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import math
import time

import pytest
import recipe
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ringflash import shard_batch
from ringflash.configs.schema import EngineConfig
from ringflash.training.engines.create import create_engine
from ringflash.training.engines.schedule import learning_rate
from ringflash.training.memory import rows

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def assert_same(result, expected):
    """Losses, norms, weights and moments agree up to some roundings of fp32, of each tensor's largest value."""
    curve, state = result
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected[0]), rtol=1e-5, atol=1e-5)
    assert state.keys() == expected[1].keys()
    for name, tensor in state.items():
        largest = expected[1][name].abs().max().item()
        torch.testing.assert_close(
            tensor, expected[1][name], rtol=0, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("micro_batch", [4, 1], ids=["one_batch", "accumulated"])
@pytest.mark.parametrize("name", ENGINES)
def test_two_sequence_ranks_train_as_one_device_does(pool, name, micro_batch):
    expected = recipe.plain()
    for result in pool(2).run(recipe.steps, name, degree=2, micro_batch=micro_batch):
        assert_same(result, expected)


@pytest.mark.parametrize("name", ENGINES)
def test_data_and_sequence_ranks_together_train_as_one_device_does(pool, name):
    expected = recipe.plain()
    for result in pool(4).run(recipe.steps, name, degree=2, micro_batch=1):
        assert_same(result, expected)


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_data_ranks_alone_train_as_one_device_does(pool, name):
    expected = recipe.plain(tied=False)
    for result in pool(2).run(recipe.steps, name, degree=1, micro_batch=2, tied=False):
        assert_same(result, expected)


@pytest.mark.parametrize("name", ENGINES)
def test_no_clipping_means_none(pool, name):
    free = dataclasses.replace(recipe.OPTIMIZER, clip=0.0, lr=1e-2)
    expected = recipe.plain(optimizer=free)
    assert expected[0][0][1] > 0.3  # clipping would have changed it
    for result in pool(2).run(recipe.steps, name, degree=2, optimizer=free):
        assert_same(result, expected)


@pytest.mark.parametrize("memory", ["recompute", "offload", "offload_pairs"])
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_kept_of_blocks_changes_no_bit(pool, name, memory):
    expected = pool(2).run(recipe.steps, name, degree=2)
    for result, same in zip(pool(2).run(recipe.steps, name, degree=2, memory=memory), expected, strict=True):
        assert result[0] == same[0]
        assert all(torch.equal(result[1][key], same[1][key]) for key in same[1])


@pytest.mark.parametrize("name", ENGINES)
def test_bf16_keeps_master_weights_in_fp32(pool, name):
    curve, state = pool(2).run(recipe.steps, name, degree=2, dtype=torch.bfloat16)[0]
    expected, _ = recipe.plain()
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.02, atol=0.02)
    weight = state["weight/layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def _initial_weights(name, tied):
    model = recipe.build(device="meta", model=dataclasses.replace(recipe.MODEL, tie_word_embeddings=tied))
    engine = create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    return {name.removeprefix("weight/"): x for name, x in recipe.whole(engine, "weight/").items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_starts_from_the_weights_of_one_device(pool, name, tied):
    expected = recipe.build(model=dataclasses.replace(recipe.MODEL, tie_word_embeddings=tied)).state_dict()
    expected = expected if not tied else {key: x for key, x in expected.items() if key != "lm_head.weight"}
    for weights in pool(2).run(_initial_weights, name, tied):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.items())


def _most_bytes_while_built(name, share):
    """Of tensors, each time that a parameter has its initial values; at least this and at most that are right."""
    model = recipe.build(device="meta", model=dataclasses.replace(recipe.MODEL, num_hidden_layers=8))
    sizes = [4 * weight.numel() for weight in model.parameters()]
    whole, largest = sum(sizes), max(sizes)
    assert 8 * largest < whole
    at_most = share * whole + 1.1 * largest
    draw, most, deadline = model.initialise, 0, time.monotonic() + 20
    gc.collect()
    gc.freeze()  # what is there already does not count, and is not looked through

    def initialise(name, weight):
        nonlocal most
        draw(name, weight)
        most = max(most, _live_bytes_soon(at_most, deadline))

    model.initialise = initialise
    create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    gc.unfreeze()
    return 0.9 * share * whole, most, at_most


def _live_bytes_soon(at_most, deadline):
    """Of tensors, once they are few enough: gloo's thread lets go of a finished collective's a moment late."""
    while (live := _live_bytes()) > at_most and time.monotonic() < deadline:
        time.sleep(0.01)
    return live


def _live_bytes():
    storages = [
        x.untyped_storage()
        for x in gc.get_objects()
        if isinstance(x, torch.Tensor) and not x.is_meta and type(x) is not DTensor
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("name", "share"), [("ddp", 1), ("fsdp2", 0.5), ("zero3", 0.5)])
def test_zero3_holds_one_parameter_and_its_share_of_the_others_while_the_model_is_built(pool, name, share):
    for at_least, most, at_most in pool(2).run(_most_bytes_while_built, name, share):
        assert at_least < most < at_most


def _all_masked(name):
    model = recipe.build(device="meta")
    engine = create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    batch = {"input_ids": ids, "position_ids": ids, "labels": torch.full_like(ids, -100), "seqlen": 16}
    loss, norm, _ = engine.train_step([batch], 1e-3)
    return loss.item(), norm.item(), all(torch.isfinite(weight).all() for weight in recipe.whole(engine).values())


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_without_labels_leaves_finite_weights(pool, name):
    assert pool(2).run(_all_masked, name) == [(0.0, 0.0, True)] * 2


def test_learning_rate_warms_up_then_falls_to_its_floor():
    config = dataclasses.replace(recipe.OPTIMIZER, lr=2.0, warmup_steps=4, min_lr_ratio=0.25)
    rates = [learning_rate(config, step, steps=20) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[4] == 2.0
    assert math.isclose(rates[19], 0.5)
    assert learning_rate(config, 30, steps=20) == rates[19]


def _in_tiles(rows_of_a_tile, name, **job):
    with _again_and_again() as patch:
        if rows_of_a_tile:
            patch.setitem(rows.TILE_ELEMENTS, "cpu", rows_of_a_tile * recipe.MODEL.intermediate_size)
        return recipe.steps(name, degree=2, micro_batch=2, last=20, optimizer=QUICK, **job)[0]


QUICK = dataclasses.replace(recipe.OPTIMIZER, lr=1e-2, eps=1e-4)


@contextlib.contextmanager
def _again_and_again():
    """The same batch in all steps: of others nothing is learned."""
    with pytest.MonkeyPatch.context() as patch:
        batches = recipe.batches
        patch.setattr(recipe, "batches", lambda step: batches(0))
        yield patch


@pytest.mark.parametrize("moved", [False, True], ids=["in_place", "offload_and_tiles"])
@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_twenty_steps_have_the_losses_of_one_device_whatever_the_engine_and_what_moves(pool, tmp_path, name, moved):
    with _again_and_again():
        expected = recipe.plain(last=20, optimizer=QUICK)[0]
    assert expected[-1][0] < expected[0][0] - 1
    settings = {}
    if moved and name == "zero3":
        path = tmp_path / "deepspeed.json"
        on_host = {part: {"device": "cpu"} for part in ("offload_optimizer", "offload_param")}
        path.write_text(json.dumps({"zero_optimization": on_host}))
        settings = {"deepspeed": str(path)}
    elif moved and name == "fsdp2":
        settings = {"offload": True}
    job = {"memory": "offload" if moved else "keep", "settings": settings}
    for curve in pool(2).run(_in_tiles, 7 if moved else 0, name, **job):
        assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=2e-3)


def _state_before_updates(name):
    model = recipe.build(dist.group.WORLD, device="meta")
    engine = create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    batch, seen = recipe.together(recipe.batches(0)), []

    def state():
        return [piece.take().clone() for piece in engine.pieces()]

    for _ in range(2):
        engine.train_step([shard_batch(batch, dist.group.WORLD)], 1e-2)
        before = state()
        engine.before_update = lambda: seen.append(state())
        engine.train_step([shard_batch(batch, dist.group.WORLD)], 1e-2)
        engine.before_update = None
        (at_update,), after = seen, state()
        seen.clear()
        assert all(torch.equal(*pair) for pair in zip(before, at_update, strict=True))
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_a_step_changes_nothing_of_the_state_before_its_update(pool, name):
    pool(2).run(_state_before_updates, name)
