"""Schedules of Transformers, epochs, and Muon: each as its library has it, and the same after resuming."""

from __future__ import annotations

import dataclasses

import pytest
import recipe
import torch
from test_finetuning import STEPS, _tune
from test_finetuning import folder as folder
from test_loop import _train
from transformers import get_scheduler

from ringflash.configs.schema import SCHEDULES, OptimizerConfig
from ringflash.errors import ArgumentError, CheckpointError
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.config.derived import steps_of
from ringflash.training.engines.optimizer import matrices_between
from ringflash.training.engines.schedule import learning_rate, schedule

SPECIFIC = {
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2},
    "polynomial": {"lr_end": 0.2 * 3e-3},
    "warmup_stable_decay": {"num_decay_steps": 6, "min_lr_ratio": 0.2},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_that_transformers_steps_through(name):
    config = OptimizerConfig(lr=3e-3, warmup_steps=4, min_lr_ratio=0.2, schedule=name, decay_steps=6)
    found = [schedule(config, 30)(step) for step in range(30)]
    if name == "warmup_cosine":
        assert found == [learning_rate(config, step, 30) for step in range(30)]
        return
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-3)
    stepped = get_scheduler(name, optimizer, 4, 30, SPECIFIC.get(name))
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        stepped.step()
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_stable_part_ends_a_tenth_before_the_end_unless_it_is_said():
    rates = [schedule(OptimizerConfig(schedule="warmup_stable_decay", warmup_steps=5), 100)(s) for s in range(100)]
    assert rates[5:90] == [3e-4] * 85
    assert rates[90:] == sorted(rates[90:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (2, 7), (0.5, 2), (3.0, 10)])
def test_epochs_are_as_many_steps_as_hold_them(epochs, steps):
    config = load([f"train.epochs={epochs}", "train.global_batch=3"])
    assert steps_of(config, samples_per_epoch=10) == steps
    with pytest.raises(ArgumentError, match=r"train\.epochs=.*: nobody knows ahead how long"):
        steps_of(config, samples_per_epoch=None)


def test_a_run_of_so_many_epochs_ends_behind_them(pool, tmp_path):
    job = ("train.epochs=0.5", "train.global_batch=4", "train.seqlen=512", "data.max_bytes=60000", "train.steps=99")
    curve = pool(2).run(_train, tmp_path, "epochs", *job)[0]
    assert 1 < len(curve) < 20
    assert sorted(curve) == list(range(1, len(curve) + 1))


# Muon

MUON = dataclasses.replace(recipe.OPTIMIZER, name="muon", lr=2e-2, momentum=0.9)


def _plain_muon():
    """One step of torch's Muon and AdamW on one device; what Muon adds is there too."""
    model = recipe.build()
    between = {name: x for name, x in model.named_parameters() if name.endswith("proj.weight")}
    assert between.keys() == matrices_between(model).keys()
    others = {name: x for name, x in model.named_parameters() if name not in between}
    muon = torch.optim.Muon(
        between.values(), lr=MUON.lr, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [x for x in others.values() if x.dim() > 1], "weight_decay": 0.1},
        {"params": [x for x in others.values() if x.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=MUON.lr, betas=(MUON.beta1, MUON.beta2), eps=MUON.eps)
    before = {name: x.detach().clone() for name, x in between.items()}
    shard = recipe.shard_batch(recipe.together(recipe.batches(0)))
    labels = shard.pop("labels")
    torch.nn.functional.cross_entropy(model(**shard).flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MUON.clip)
    for optimizer in (muon, adam):
        optimizer.step()
    state = {f"weight/{name}": x.detach() for name, x in model.named_parameters()}
    state |= {f"momentum_buffer/{name}": muon.state[x]["momentum_buffer"] for name, x in between.items()}
    return state, {name: (x.detach() - before[name]).norm().item() for name, x in between.items()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_ranks_train_by_muon_as_one_device_does(pool, engine):
    expected, moved = _plain_muon()
    for _, state in pool(2).run(recipe.steps, engine, degree=2, optimizer=MUON, last=1):
        assert {name for name in state if name.startswith("momentum")} == {n for n in expected if n.startswith("mom")}
        for name, tensor in expected.items():
            if (own := name.removeprefix("weight/")) in moved:  # in bfloat16 Muon enlarges what is almost nothing
                assert (state[name] - tensor).norm() < 0.05 * moved[own], name
            else:
                atol = 2e-5 * tensor.abs().max().item()
                torch.testing.assert_close(state[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: n + m)


def _goes_on(pool, tmp_path, name, engine="ddp"):
    """Go on from the middle of a run over two ranks, bit for bit; returns its losses and the middle's checkpoint."""
    job = (f"optimizer.name={name}", f"engine={engine}", "data.max_bytes=60000")
    whole = pool(2).run(_train, tmp_path, "whole", "checkpoint.every=3", *job)[0]
    middle = tmp_path / "whole" / "checkpoints" / "step-00000003"
    rest = pool(2).run(_train, tmp_path, "rest", f"checkpoint.resume={middle}", *job)[0]
    assert rest == {step: loss for step, loss in whole.items() if step > 3}
    first, second = (recipe.stored(tmp_path / run / "checkpoints" / "step-00000006") for run in ("whole", "rest"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    return whole, middle


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_run_by_muon_goes_on_bit_for_bit_and_not_by_another_optimizer(pool, tmp_path, engine):
    _, middle = _goes_on(pool, tmp_path, "muon", engine)
    for outcome in pool(2).outcomes(_train, tmp_path, "other", f"checkpoint.resume={middle}", "data.max_bytes=60000"):
        assert isinstance(outcome.error, CheckpointError)
        assert "holds what optimizer.name=muon keeps, here it is adamw" in str(outcome.error)


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_optimizers_of_matrices_train_adapters_which_are_nothing_else(pool, folder, name):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    job = (f"optimizer.name={name}", "lora.rank=4", "optimizer.lr=2e-2")
    curve = pool(2).run(_tune, folder, f"adapters-{name}", *job)[0]
    assert curve[STEPS] < curve[1] - 0.1


# 8 bits


def test_moments_in_8_bits_learn_nearly_what_others_do_and_go_on_bit_for_bit_on_any_ranks(pool, tmp_path):
    pytest.importorskip("bitsandbytes")
    found, middle = _goes_on(pool, tmp_path, "adamw_8bit")
    expected = pool(2).run(_train, tmp_path, "adamw", "checkpoint.every=3", "data.max_bytes=60000")[0]
    first = {1: expected[1], 2: expected[2]}  # moments are rounded only behind the first step
    assert {1: found[1], 2: found[2]} == pytest.approx(first, rel=1e-5)
    assert found == pytest.approx(expected, rel=0.01)
    kept, others = (recipe.stored(tmp_path / run / "checkpoints" / middle.name) for run in ("whole", "adamw"))
    coarse = {key.removeprefix("exp_avg_largest/") for key in kept if key.startswith("exp_avg_largest/")}
    assert "layers.1.mlp.up_proj.weight" in coarse
    assert "embed_tokens.weight" not in coarse
    for name in coarse:
        moment, largest = kept[f"exp_avg/{name}"], kept[f"exp_avg_largest/{name}"]
        assert len((moment.flatten()[:256] / largest[0]).unique()) < 256  # 8 bits
        assert (moment - others[f"exp_avg/{name}"]).norm() < 0.1 * moment.norm(), name
    job = (f"checkpoint.resume={middle}", "optimizer.name=adamw_8bit", "data.max_bytes=60000")
    assert pool(4).run(_train, tmp_path, "four", *job)[0] == pytest.approx(
        {4: found[4], 5: found[5], 6: found[6]}, rel=1e-3
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.name=muon", "engine=zero2"], "optimizer.name=muon with engine.name=zero2, which cuts matrices"),
        (["optimizer.name=adamw_8bit", "engine=zero3"], "optimizer.name=adamw_8bit with engine.name=zero3, which cuts"),
        (["optimizer.schedule=reduce_lr_on_plateau"], "optimizer.schedule='reduce_lr_on_plateau'; allowed are warmup_"),
        (["train.epochs=0"], "train.epochs=0.0; it must be positive"),
        (
            ["optimizer.decay_steps=5"],
            "optimizer.decay_steps=5 is for optimizer.schedule=warmup_stable_decay, here it is",
        ),
        (
            ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_steps=95", "train.steps=100"],
            "optimizer.decay_steps=95 and optimizer.warmup_steps=10 are more than train.steps=100",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(overrides, said):
    with pytest.raises(ArgumentError) as refused:
        check(load(overrides), 1)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.schedule=linear", "optimizer.schedule=linear needs transformers: pip install 'ringflash"),
        ("optimizer.name=adamw_8bit", "optimizer.name=adamw_8bit needs bitsandbytes: pip install 'ringflash"),
    ],
)
def test_optional_libraries_are_named(monkeypatch, override, said):
    monkeypatch.setattr("ringflash.training.extras.find_spec", lambda name: None)
    with pytest.raises(ArgumentError) as refused:
        check(load([override]), 1)
    assert str(refused.value).startswith(said)
