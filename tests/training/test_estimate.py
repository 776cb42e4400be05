"""What a step is said to take, against what it takes, and against itself."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recipe
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import _peak
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves

from ringflash import loss
from ringflash.configs.schema import AttentionConfig, EngineConfig, ModelConfig
from ringflash.kernels.torch_private import TorchDispatchMode
from ringflash.launch.estimate import main
from ringflash.parallel.planning.machine import SEND_RECV
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.estimate.exchanged import exchanges, exchanging
from ringflash.training.estimate.hardware import CARDS, GIB, STARTED, Card, Hardware
from ringflash.training.estimate.lasting import GRADIENTS, held, lasting, weights_of
from ringflash.training.estimate.own import OwnSizes
from ringflash.training.estimate.sizes import Load
from ringflash.training.estimate.step import BLOCKS, COPY, estimate, longest
from ringflash.training.memory import rows
from ringflash.training.memory.plan import KEEP, OFFLOAD, RECOMPUTE, SPARE
from ringflash.training.model.transformer import attention_mask

CPU = torch.device("cpu")
LONG = load(["experiment=llama3_8b_long"])
FOUR = Hardware(4, CARDS["h100"], 500 * GIB)


def _sized(overrides, ranks):
    shape = ("hidden_size=128", "intermediate_size=256", "num_hidden_layers=4", "num_attention_heads=4")
    keys = [f"model.{each}" for each in (*shape, "num_key_value_heads=2", "head_dim=32", "vocab_size=512")]
    return OwnSizes.of(load(["data=bytes", *keys, *overrides]), ranks)


def _live():
    """Bytes of each tensor's memory, by what holds it."""
    gc.collect()
    # Others are views of these, and what compiled code of an earlier test left has no memory.
    plain = torch.Tensor, torch.nn.Parameter
    tensors = [x for x in gc.get_objects() if type(x) in plain and not x.is_meta and not is_fake(x)]
    return {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}


def _lasting_bytes(name, optimizer):
    before = _live()  # held, as DeepSpeed holds on to some of an engine until the next one
    shape = ModelConfig(128, 256, 4, 4, 2, head_dim=32)
    model = recipe.build(dist.group.WORLD, model=shape, device="meta", dtype=torch.bfloat16)
    weights = sum(weight.numel() for weight in model.parameters())
    engine = create_engine(model, CPU, EngineConfig(name), dataclasses.replace(recipe.OPTIMIZER, name=optimizer))
    if name in ("ddp", "fsdp2"):  # its gradients and its optimizer's state come with the first step
        engine.train_step([model.shard(recipe.batches(0)[1])], 1e-3)
    return weights, sum(storage.nbytes() for place, storage in _live().items() if place not in before)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("ddp", "adamw"), ("ddp", "muon"), ("fsdp2", "adamw"), ("zero1", "adamw"), ("zero3", "adamw")],
)
def test_weights_gradients_and_optimizer_take_what_is_said(pool, name, optimizer):
    sizes = _sized([f"engine={name}", "engine.precision=bf16"], 2)
    for weights, found in pool(2).run(_lasting_bytes, name, optimizer):
        same = dataclasses.replace(sizes.weights, trained=weights)
        said = lasting(name, same, 2, optimizer)
        expected = said["parameters"] + said["optimizer"] + (0 if name == "fsdp2" else said["gradients"])
        expected += 2 * weights if name == "zero3" else 0  # DeepSpeed's bucket, which is no larger than the model
        assert found == pytest.approx(expected, rel=0.02)


class _Exchanged(TorchDispatchMode):
    """Bytes that collectives of a rank gather, or sum; what all ranks have the sum of counts twice."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "broadcast" not in func.__name__:
            given = [sum(x.nbytes for x in tree_leaves(each) if isinstance(x, torch.Tensor)) for each in args]
            self.size += 2 * given[0] if "allreduce" in func.__name__ else max(given)
        return func(*args, **(kwargs or {}))


def _exchanged(name, reduce):
    # DeepSpeed keeps small weights gathered, and the last blocks where the head is small.
    shape, accumulation = ModelConfig(512, 512, 10, 4, 2, head_dim=128), 2
    model = recipe.build(dist.group.WORLD, model=shape, device="meta", dtype=torch.bfloat16)
    weights, config = weights_of(model), EngineConfig(name, reduce=reduce)
    engine = create_engine(model, CPU, config, recipe.OPTIMIZER, accumulation)
    shards = [model.shard(recipe.batches(0)[1])] * accumulation
    engine.train_step(shards, 1e-3)  # ZeRO 3 learns in which order weights are wanted
    with _Exchanged() as found:
        engine.train_step(shards, 1e-3)
    return found.size, sum(each.size for each in exchanges(config, weights, accumulation))


@pytest.mark.parametrize(
    ("name", "reduce"),
    [("ddp", "fp32"), ("fsdp2", "fp32"), ("fsdp2", "bf16"), ("zero1", "fp32"), ("zero2", "fp32"), ("zero3", "fp32")],
)
def test_engines_gather_and_sum_as_much_as_is_said(pool, name, reduce):
    for found, said in pool(2).run(_exchanged, name, reduce):
        assert found == pytest.approx(said, rel=0.05)


def test_steps_on_more_gpus_take_longer_by_what_these_tell_each_other():
    config = load(["experiment=llama3_8b_long", "train.seqlen=32768"])
    weights = OwnSizes.of(config, 4).weights
    ranks = [Hardware(ranks, CARDS["h100"], 0) for ranks in (1, 4, 8, 16)]
    alone, four, eight, hosts = (exchanging(config.engine, weights, 1, each) for each in ranks)
    assert alone == 0 < four < eight < hosts
    # A rank lacks three quarters of what is gathered twice, but for the head, and summed once.
    size = 0.75 * 2 * (3 * weights.all - weights.head)
    fastest = min(
        seconds / size for size, seconds in zip(SEND_RECV.inside.sizes, SEND_RECV.inside.seconds, strict=True)
    )
    assert 1 < four / (1 - SEND_RECV.inside.hidden) / size / fastest < 2
    assert estimate(config, FOUR).seconds > four + 1


@pytest.mark.parametrize(
    ("name", "away", "expected"),
    [
        ("fsdp2", {"offload": True}, {"parameters", "gradients", "optimizer"}),
        ("zero3", {"offload_optimizer": "cpu", "offload_param": "cpu"}, {"parameters", "gradients", "optimizer"}),
        ("zero2", {"offload_optimizer": "cpu"}, {"gradients", "optimizer"}),
        ("zero3", {"offload_optimizer": "none"}, set()),
    ],
)
def test_what_an_engine_has_on_the_host_is_counted_there(tmp_path, name, away, expected):
    weights, stays = _sized([], 2).weights, EngineConfig(name)
    if name == "fsdp2":
        moves = dataclasses.replace(stays, **away)
    else:
        path = tmp_path / "deepspeed.json"
        parts = {key: {"device": device} for key, device in away.items()}
        path.write_text(json.dumps({"zero_optimization": parts}))
        moves = dataclasses.replace(stays, deepspeed=str(path))
    before, after = (held(engine, weights, 2) for engine in (stays, moves))
    assert before.host == {}
    assert set(after.host) == expected
    assert before.device == after.device | after.host


def test_what_checkpoints_take_of_the_host_beside_training_blocks_do_not_get():
    hardware = FOUR
    long = ["experiment=llama3_8b_long", "train.seqlen=1048576"]
    most = {}
    for name, more in {
        "end": [],
        "every": ["checkpoint.every=10"],
        "weights": ["checkpoint.every=10", "checkpoint.only_weights=true"],
        "waiting": ["checkpoint.every=10", "checkpoint.background=false"],
        "too_late": ["checkpoint.every=1000", "train.steps=1000"],
    }.items():
        found = estimate(load([*long, *more]), hardware)
        most[name] = found.host.get(COPY, 0), found.host[BLOCKS]
    assert most["end"] == most["waiting"] == most["too_late"]
    assert most["end"][0] == 0
    assert most["every"][0] == pytest.approx(12 * 8.03e9 / 4, rel=0.05)
    assert most["weights"][0] == pytest.approx(4 * 8.03e9 / 4, rel=0.06)
    assert most["every"][1] <= most["weights"][1] <= most["end"][1]
    assert sum(most["every"]) <= hardware.host_share
    none = dataclasses.replace(hardware, host_bytes=100 * GIB)
    assert COPY not in estimate(load([*long, "checkpoint.every=10"]), none).host


def test_weights_that_some_ranks_have_once_more_are_counted(tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"zero_hpz_partition_size": 2}}))
    weights, once = _sized([], 4).weights, EngineConfig("zero3")
    before, after = (held(each, weights, 4) for each in (once, dataclasses.replace(once, deepspeed=str(path))))
    assert sum(after.device.values()) - sum(before.device.values()) == 2 * weights.all / 2


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_keep_what_is_said(policy, precision):
    tokens, width, wide = 4096, 64, 256
    shape = (f"hidden_size={width}", f"intermediate_size={wide}", "num_attention_heads=1", "num_key_value_heads=1")
    keys = [f"model.{each}" for each in (*shape, "head_dim=16")]
    sizes = _sized([f"engine.precision={precision}", f"train.seqlen={tokens}", *keys], 1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    less, more = (_peak(policy, tokens, blocks, width, wide, dtype=dtype)[0] for blocks in (2, 10))
    assert more - less == pytest.approx(8 * (sizes.kept(False) + (sizes.again if policy == KEEP else 0)), rel=0.05)


@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_has_as_much_in_use_at_once_as_is_said(monkeypatch, policy, precision):
    tokens, width, wide, blocks, tile = 4096, 256, 512, 2, 1 << 17
    monkeypatch.setitem(rows.TILE_ELEMENTS, "cuda", tile)  # which estimates are of
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(loss.CHUNK_ELEMENTS, device, tile)
    shape = (f"hidden_size={width}", f"intermediate_size={wide}", "num_attention_heads=1", "num_key_value_heads=1")
    keys = [f"model.{each}" for each in (*shape, f"num_hidden_layers={blocks}", "head_dim=16")]
    sizes = _sized([f"engine.precision={precision}", f"train.seqlen={tokens}", *keys], 1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    found, _ = _peak(policy, tokens, blocks, width, wide, dtype=dtype)
    at_work = sizes.transient_kept(0) if policy == KEEP else sizes.transient(0, moved=False)
    kept = blocks * (sizes.kept(False) + (sizes.again if policy == KEEP else 0))
    assert found == pytest.approx(kept + at_work, rel=0.1)


SMALL = load(["model=llama3_1b", "engine.precision=bf16"])


@settings(max_examples=20)
@given(
    length=st.integers(4, 200),
    gpus=st.sampled_from([1, 2, 4]),
    policy=st.sampled_from(["auto", "keep", "recompute", "offload", "offload_pairs"]),
    engine=st.sampled_from(["ddp", "fsdp2", "zero1", "zero2", "zero3"]),
)
def test_more_tokens_take_more_and_more_gpus_take_less(length, gpus, policy, engine):
    def of(seqlen, gpus):
        train = dataclasses.replace(SMALL.train, seqlen=1024 * seqlen)
        settings = dataclasses.replace(SMALL.engine, name=engine, memory=policy)
        config = dataclasses.replace(SMALL, train=train, engine=settings)
        return estimate(config, Hardware(gpus, CARDS["h100"], 1000 * GIB))

    def work(found, gpus):
        weights, config = OwnSizes.of(SMALL, gpus).weights, dataclasses.replace(SMALL.engine, name=engine)
        return found.seconds - exchanging(config, weights, 1, Hardware(gpus, CARDS["h100"], 0))

    found, longer, shared = of(length, gpus), of(2 * length, gpus), of(length, 2 * gpus)
    assert 0 < found.mfu < 1
    assert found.seconds < longer.seconds
    assert work(shared, 2 * gpus) < work(found, gpus)
    if policy != "auto":  # which fills what there is
        assert found.peak + sum(found.host.values()) < longer.peak + sum(longer.host.values())
        assert shared.peak <= found.peak
    assert found.fits or not longer.fits
    assert shared.fits or not found.fits


def test_8b_on_four_gpus_is_kept_whole_at_first_and_moves_in_pairs_at_last():
    def placements(seqlen):
        found = estimate(dataclasses.replace(LONG, train=dataclasses.replace(LONG.train, seqlen=seqlen)), FOUR)
        return found.placements, found.pairs, found.fits

    assert placements(32768) == ([KEEP] * 32, False, True)
    million, pairs, fits = placements(1 << 20)
    assert million.count(OFFLOAD) > 24
    assert pairs
    assert fits
    assert not placements(1 << 22)[2]


def test_a_million_tokens_on_four_gpus_pass_every_check_and_take_what_the_page_says():
    config = load(["experiment=llama3_8b_million", "engine.precision=bf16"])
    check(config, 4)
    assert config.train.seqlen == 1 << 20
    assert config.model == LONG.model
    found = estimate(config, Hardware(4, CARDS["h100"], 600 * GIB))
    assert found.fits
    page = " ".join((Path(__file__).parents[2] / "docs" / "training.md").read_text().split())
    said = re.search(
        r"by the estimate for four H100s (\d+) GiB of each GPU and (\d+) GiB of host memory for each", page
    )
    assert [int(x) for x in said.groups()] == [round(found.peak / GIB), round(found.host[BLOCKS] / GIB)]


def _rows_of_page(first, last):
    """Cells of a table of the page, from the row that begins with one word to the row that begins with another."""
    lines = (Path(__file__).parents[2] / "docs" / "training.md").read_text().splitlines()
    found = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    firsts = [row[0] for row in found]
    return found[firsts.index(first) : firsts.index(last) + 1]


def test_one_card_takes_of_each_token_what_the_page_says():
    together, pairs, whole, at_loss, kept = _rows_of_page("together", "what blocks keep, in host memory; in pairs")
    for column, name in enumerate(("llama3_1b", "llama3_8b"), start=1):

        def of_token(take, name=name):
            """KiB that a token more takes."""
            sizes = [OwnSizes.of(load([f"model={name}", f"train.seqlen={1 << 20 << more}"]), 1) for more in (0, 1)]
            return (take(sizes[1]) - take(sizes[0])) / 2**30

        in_rounds = of_token(lambda x: x.transient(0, moved=True))
        assert float(together[column]) == in_rounds
        assert float(pairs[column]) == of_token(lambda x: x.transient(0, moved=True, pairs=True)) - in_rounds
        shared = [
            of_token(lambda x, given=given: dataclasses.replace(x, alone=False, **given(x)).transient(0, moved=True))
            for given in (lambda _: {}, lambda x: {"load": Load(x.tokens, 0)})
        ]
        assert [float(x) for x in whole[column].split(";")] == shared
        assert float(at_loss[column]) == of_token(lambda x: x._loss)
        both = [of_token(lambda x, pairs=pairs: x.blocks * x.kept(pairs)) for pairs in (False, True)]
        assert [float(x) for x in kept[column].split(";")] == both


def test_blocks_go_by_rows_where_ranks_have_more_than_a_tile_on_average_whatever_the_fullest_has():
    for tokens, by_rows in ((1 << 17, False), ((1 << 17) + 4, True)):
        config = load(["model=llama3_8b", f"train.seqlen={tokens}", "train.sequence_degree=4"])
        for fullest in (tokens // 4, tokens // 4 + 999):
            assert OwnSizes.of(config, 4, load=Load(fullest, 1e9)).by_rows == by_rows


def test_one_card_trains_as_long_sequences_as_the_page_says():
    first = "Llama-3.1-8B, `engine=fsdp2 engine.offload=true`, which takes 120 GiB of it"
    hosts, _, *models = _rows_of_page("host memory, GiB", first)
    engines = (["model=llama3_1b", "engine=ddp"], ["model=llama3_8b", "engine=fsdp2", "engine.offload=true"])
    for (_, *said), engine in zip(models, engines, strict=True):
        config = load([*engine, "engine.precision=bf16", "checkpoint.every=never"])
        for host, tokens in zip(hosts[1:], said, strict=True):
            found = longest(config, Hardware(1, CARDS["h100"], int(host) * GIB))
            assert f"{found:,}" == tokens


@pytest.mark.parametrize("policy", ["auto", "recompute"])
def test_the_longest_that_fits_does_and_a_little_more_does_not(policy):
    config = dataclasses.replace(LONG, engine=dataclasses.replace(LONG.engine, memory=policy))
    found = longest(config, FOUR)
    for seqlen, fits in ((found, True), (found + found // 32, False)):
        train = dataclasses.replace(config.train, seqlen=seqlen)
        assert estimate(dataclasses.replace(config, train=train), FOUR).fits == fits


def test_what_ranks_lease_to_reach_each_others_memory_is_beside_tensors_and_has_to_fit():
    sizes = OwnSizes.of(LONG, 4)
    keys = sizes.tokens * 2 * 8 * 128 * 2 // sizes.shape.groups
    found = estimate(LONG, FOUR)
    assert keys + 288 * 2**20 < found.leased < 2 * keys + 320 * 2**20
    alone = dataclasses.replace(LONG, train=dataclasses.replace(LONG.train, sequence_degree=1, global_batch=4))
    assert estimate(alone, FOUR).leased == 0
    assert estimate(LONG, dataclasses.replace(FOUR, gpus_per_host=2)).leased == 0  # by send and receive, in tensors
    kept = dataclasses.replace(LONG, engine=dataclasses.replace(LONG.engine, memory="keep"))
    room = estimate(kept, FOUR).peak + found.leased
    for more, fits in ((1.001, True), (0.999, False)):
        card = Card((room * more) / (1 - SPARE) + STARTED, CARDS["h100"].peak)
        assert estimate(kept, dataclasses.replace(FOUR, card=card)).fits == fits


def test_no_mask_of_training_is_a_layout_of_blocks_whose_lists_grow_with_the_square_of_the_length():
    for mask in ("causal", "sliding_window", "chunked"):
        found = attention_mask(AttentionConfig(mask, window=100, sink=4))
        assert found.layout is None
        assert found.routed is None


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_fsdp2_has_gradients_of_all_weights_between_the_micro_batches_of_a_step(reduce):
    config = load(["model=llama3_1b", "engine=fsdp2", f"engine.reduce={reduce}", "engine.precision=bf16"])
    several = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=3))
    once, more = (estimate(each, FOUR).device[GRADIENTS] for each in (config, several))
    weights = OwnSizes.of(config, 4).weights.trained
    assert once <= 4 * weights / 4
    assert more == 4 * weights / 4 + (4 if reduce == "fp32" else 2) * weights
    away = dataclasses.replace(several, engine=dataclasses.replace(several.engine, offload=True))
    assert estimate(away, FOUR).device[GRADIENTS] == more - 4 * weights / 4
    ddp = [estimate(load(["model=llama3_1b", "engine=ddp", f"train.global_batch={n}"]), FOUR).peak for n in (1, 3)]
    assert ddp[0] == ddp[1]


def test_gradients_of_fsdp2_come_while_what_blocks_keep_goes():
    def of(seqlen, memory):
        keys = ["model=llama3_1b", "engine=fsdp2", "engine.precision=bf16", f"engine.memory={memory}"]
        found = estimate(load([*keys, f"train.seqlen={seqlen}"]), FOUR)
        return found.device[GRADIENTS], found.device["kept for the backward pass"]

    weights = OwnSizes.of(load(["model=llama3_1b"]), 4).weights
    of_blocks = 4 * (weights.trained - weights.head) / 4
    gradients, kept = of(1 << 20, "keep")
    assert kept > of_blocks
    assert gradients == 0
    assert of(1 << 20, "offload") == (of_blocks, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "gpus is missing; give the number of ranks, as gpus=4"),
        (["gpus=0"], "gpus=0; allowed are 1 and more"),
        (["gpus=16", "gpus_per_host=5"], "gpus=16 on hosts of gpus_per_host=5; all hosts have as many"),
        (["gpus=4", "host_gib=nan"], "host_gib=nan; allowed are finite numbers from 0 on"),
        (["gpus=4", "train.seqlen=1M"], "train.seqlen=1M: Value '1M' of type 'str' could not be converted to Integer"),
        (["gpus=4", "engine.memory=none"], "engine.memory='none'; allowed are auto, keep, recompute, offload"),
    ],
)
def test_the_command_names_what_is_wrong(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    assert said in capsys.readouterr().err


def test_the_command_says_what_would_fit_and_takes_hosts_without_memory(capsys):
    main(["experiment=llama3_8b_long", "gpus=1"])
    said = capsys.readouterr().out
    assert "it does NOT fit; it would with engine=fsdp2 engine.offload=true; or with 4 such GPUs" in said
    assert "1 x h100, 1 on a host of 1,024 GiB" in said
    main(["experiment=llama3_8b_long", "gpus=4", "card=H200", "host_gib=0"])
    said = capsys.readouterr().out
    assert "to reach each other" in said
    assert "it fits" in said


def test_the_command_prints_memory_time_and_the_longest(tmp_path):
    words = ["experiment=llama3_8b_long", "train.seqlen=262144", "gpus=4", "host_gib=500"]
    found = subprocess.run(
        [sys.executable, "-m", "ringflash.launch.estimate", *words], capture_output=True, text=True, check=True
    ).stdout
    for said in (
        "262,144 tokens, zero3",
        "optimizer",
        "of its host, GiB for each GPU",
        "tokens/s/GPU, MFU",
        "longest train.seqlen",
    ):
        assert said in found
    wrong = subprocess.run(
        [sys.executable, "-m", "ringflash.launch.estimate", "gpus=3", "train.sequence_degree=2"],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1
    assert "train.sequence_degree=2 does not divide the 3 ranks" in wrong.stderr
