"""A run that cannot fit is refused as it begins, with the keys that make it fit; one that may fit never is."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from folders import write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import _train

from ringflash import ArgumentError, Sharding
from ringflash.configs.schema import LoraConfig, ModelConfig
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.estimate.fitting import (
    refuse_weights_that_cannot_fit,
    refuse_what_cannot_fit,
    remedies,
)
from ringflash.training.estimate.hardware import CARDS, GIB, Card, Hardware
from ringflash.training.estimate.lasting import BUFFERS, Weights, lasting, weights_of
from ringflash.training.estimate.sizes import Load
from ringflash.training.estimate.step import BLOCKS, estimate
from ringflash.training.model.pretrained import Pretrained
from ringflash.training.run import forecast
from ringflash.training.run.throughput import Speed

FOUR = Hardware(4, CARDS["h100"], 1000 * GIB)
SMALL = load(["model=llama3_1b", "engine.precision=bf16"])


def _replaced(config, remedy):
    """A configuration with the keys of a remedy, and the GPUs that it takes."""
    words = remedy.removesuffix(" such GPUs").split()
    gpus = next((int(word) for word in words if word.isdigit()), None)
    for word in (word for word in words if "=" in word):
        key, value = word.split("=")
        part, _, name = (key if "." in key else f"{key}.name").partition(".")
        read = {"null": None, "true": True}.get(value, int(value) if value.isdigit() else value)
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: read})})
    return config, gpus


@settings(max_examples=12, deadline=None)
@given(
    thousands=st.integers(4, 4000),
    gpus=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(["auto", "keep", "recompute", "offload"]),
    engine=st.sampled_from(["ddp", "fsdp2", "zero1", "zero2", "zero3"]),
    alone=st.booleans(),
    micro=st.sampled_from([1, 2]),
    memory=st.floats(10e9, 150e9),
)
def test_refused_is_only_what_does_not_fit_and_every_remedy_does(thousands, gpus, policy, engine, alone, micro, memory):
    train = dataclasses.replace(
        SMALL.train,
        seqlen=1024 * thousands,
        global_batch=4 * micro,
        micro_batch=micro,
        sequence_degree=1 if alone else None,
    )
    settings = dataclasses.replace(SMALL.engine, name=engine, memory=policy)
    config = dataclasses.replace(SMALL, train=train, engine=settings)
    check(config, gpus)
    hardware = Hardware(gpus, Card(memory, CARDS["h100"].peak), 200 * GIB)
    found = estimate(config, hardware)
    assert found.least < found.peak
    if found.fits:
        refuse_what_cannot_fit(config, hardware)
        return
    if found.least > memory:
        with pytest.raises(ArgumentError, match=rf"train\.seqlen={train.seqlen} with engine={engine},"):
            refuse_what_cannot_fit(config, hardware)
    for remedy in remedies(config, hardware):
        changed, more = _replaced(config, remedy)
        check(changed, more or gpus)
        assert estimate(changed, dataclasses.replace(hardware, gpus=more or gpus)).fits


def test_what_is_certain_is_well_below_what_is_estimated_and_without_what_an_engine_need_not_fill():
    found = estimate(load(["experiment=llama3_8b_million"]), FOUR)
    assert found.least < 0.9 * (found.peak - found.device[BUFFERS])


@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["experiment=llama3_8b_long", "engine=ddp"], "it fits with engine=zero3"),
        (["model=llama3_1b", "train.seqlen=524288", "engine.memory=keep"], "it fits with engine.memory=auto"),
        (["experiment=llama3_8b_long", "train.seqlen=8388608"], r"such GPUs; or with train\.seqlen=\d+"),
        (
            ["model=llama3_1b", "train.seqlen=6291456", "train.sequence_degree=1", "train.global_batch=4"],
            r"train\.sequence_degree=null",
        ),
    ],
)
def test_a_refusal_names_the_keys_and_what_takes_memory(overrides, cure):
    config = load([*overrides, "engine.precision=bf16"])
    with pytest.raises(ArgumentError, match=cure) as refused:
        refuse_what_cannot_fit(config, FOUR)
    assert "parameters" in str(refused.value)
    assert f"engine.memory={config.engine.memory}: a step takes about" in str(refused.value)
    assert "of each of 4 GPUs" in str(refused.value)


def test_where_gradients_of_whole_weights_wait_for_the_last_micro_batch_zero3_is_named():
    config = load(["model=llama3_8b", "engine=fsdp2", "train.global_batch=4", "engine.precision=bf16"])
    small = dataclasses.replace(FOUR, card=Card(60e9, CARDS["h100"].peak))
    assert not estimate(config, small).fits
    assert remedies(config, small)[0] == "engine=zero3"
    bf16 = dataclasses.replace(config, engine=dataclasses.replace(config.engine, reduce="bf16"))
    assert "engine=zero3" not in remedies(bf16, small)  # which does not know the key


def test_more_gpus_come_with_the_keys_that_share_among_them_and_what_nothing_helps_is_said():
    tiny = Hardware(1, Card(24e9, math.nan), 8 * GIB)
    config = load(["model=llama3_8b", "engine.precision=bf16", "engine.memory=recompute"])
    with pytest.raises(ArgumentError, match=r"it fits with \d+ such GPUs and engine.memory=auto engine=zero3"):
        refuse_what_cannot_fit(config, tiny)
    muon = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name="muon"))
    with pytest.raises(ArgumentError, match="no key makes it fit"):
        refuse_what_cannot_fit(muon, tiny)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_folder_whose_weights_alone_cannot_fit_is_refused(tmp_path, lora):
    path = write_folder(tmp_path, hidden_size=256, intermediate_size=512)
    model = Pretrained(ModelConfig(path=str(path)), dtype=torch.bfloat16, lora=LoraConfig(rank=lora))
    weights = weights_of(model)
    assert weights.trained + weights.frozen == sum(weight.numel() for weight in model.parameters())
    assert (weights.frozen > 0) == (lora > 0)
    config = load([f"model.path={path}"])
    held = lasting("ddp", weights, 2)
    least = sum(held.values()) - held[BUFFERS]
    assert least == 16 * weights.trained + 2 * weights.frozen
    refuse_weights_that_cannot_fit(config, Hardware(2, Card(1.01 * least, math.nan), GIB), weights)
    with pytest.raises(ArgumentError, match=r"engine=ddp, engine.memory=auto: the model alone takes"):
        refuse_weights_that_cannot_fit(config, Hardware(2, Card(0.99 * least, math.nan), GIB), weights)


def test_weights_that_cannot_fit_fit_where_ranks_share_them():
    weights = Weights(
        trained=8 * 10**9, frozen=0, between=7 * 10**9, largest=10**8, block=2 * 10**8, head=5 * 10**8, element=2
    )
    with pytest.raises(ArgumentError, match="it fits with engine=zero3"):
        refuse_weights_that_cannot_fit(SMALL, FOUR, weights)
    alone = dataclasses.replace(FOUR, gpus=1)
    offloaded = r"engine=fsdp2 engine\.offload=true; or with "
    with pytest.raises(ArgumentError, match=rf"it fits with {offloaded}2 such GPUs and engine=zero3"):
        refuse_weights_that_cannot_fit(SMALL, alone, weights)
    with pytest.raises(ArgumentError, match=r"it fits with 2 such GPUs and engine=zero3"):
        refuse_weights_that_cannot_fit(SMALL, dataclasses.replace(alone, host_bytes=64 * GIB), weights)


def _train_as_on_gpus(folder, memory, *overrides):
    """What a run on CPUs says where GPUs of so much memory are there in their place."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        hardware = Hardware(dist.get_world_size(), Card(memory, CARDS["h100"].peak), GIB)
        patch.setattr(forecast, "hardware_of_all", lambda _: hardware)
        patch.setattr("ringflash.training.run.progress.ProgressDisplay.note", lambda _, text: said.append(text))
        _train(folder, "forecast", "train.steps=2", "data=bytes", *overrides)
    return "\n".join(said)


def test_a_run_on_gpus_says_at_its_start_what_its_first_batch_is_to_take(pool, tmp_path):
    for said in pool(2).run(_train_as_on_gpus, tmp_path, CARDS["h100"].memory):
        assert "\nestimated: " in said
        assert "tokens/s/GPU, MFU" in said
        assert "WARNING" not in said


def test_a_run_that_cannot_fit_is_refused_on_every_rank_before_anything_is_read(pool, tmp_path):
    for outcome in pool(2).outcomes(_train_as_on_gpus, tmp_path, 1e6, f"data.path={tmp_path / 'none'}"):
        assert isinstance(outcome.error, ArgumentError)
        assert "a step takes about" in str(outcome.error)


def test_a_run_that_may_not_fit_is_warned_and_told_what_would(pool, tmp_path):
    for said in pool(2).run(_train_as_on_gpus, tmp_path, 2.0e9, "engine.memory=keep"):
        assert "WARNING: it may not fit (" in said


def _least_of_all(rank_memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(1 + dist.get_rank()))
        patch.setattr(forecast, "card_of", lambda _: Card(*rank_memory[dist.get_rank()]))
        patch.setattr(forecast, "available_bytes", lambda: 100 - dist.get_rank())
        return forecast.hardware_of_all(torch.device("cuda"))


def test_all_ranks_go_by_the_least_that_any_of_them_has(pool):
    first, second = pool(2).run(_least_of_all, ((80, 5.0), (70, 5.0)))
    assert first == second == Hardware(2, Card(70, 5.0), 99, 2)
    for found in pool(2).run(_least_of_all, ((80, 5.0), (80, 4.0))):
        assert math.isnan(found.card.peak)


def _load(bounds):
    rank = dist.get_rank()
    sharding = Sharding(cu_seqlens=bounds[rank // 2], rank=rank % 2, ranks=2)
    return forecast.load_of_all({"sharding": sharding}, 3), sharding.partition.counts()


def test_a_load_is_the_pairs_of_all_ranks_and_the_tokens_of_the_fullest(pool):
    found = pool(4).run(_load, ([0, 100], [0, 10, 33, 100]))
    tokens = max(max(counts) for _, counts in found)
    pairs = 100 * 101 / 2 + 10 * 11 / 2 + 23 * 24 / 2 + 67 * 68 / 2
    assert {load for load, _ in found} == {Load(tokens, 3 * pairs)}


def test_measured_and_estimated_are_lines_of_one_form():
    found = estimate(load(["experiment=llama3_8b_long"]), FOUR)
    before = forecast.estimated(found).removeprefix("estimated: ")
    speed = Speed(4, found.seconds, 4 * found.tokens_per_second, 0.0, found.mfu, found.peak)
    after = forecast.measured(speed, found.host[BLOCKS], found).removeprefix("measured: ")
    assert after == f"{before}; beside the estimate memory +0%, time +0%"
    slower = Speed(4, 1.1 * found.seconds, 4.0, 0.0, None, 0.95 * found.peak)
    assert forecast.measured(slower, 0.0, found).endswith("memory -5%, time +10%")


def test_of_a_card_whose_speed_nobody_measured_no_time_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where a measurement would be
    for peak in (math.nan, 312e12):
        found = estimate(load(["experiment=llama3_8b_long"]), dataclasses.replace(FOUR, card=Card(85e9, peak)))
        assert " s a step" not in forecast.estimated(found)
        assert "GiB of each GPU" in forecast.estimated(found)
