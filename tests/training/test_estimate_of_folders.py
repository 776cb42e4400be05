"""What a step of a model of a folder is said to take, against what it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from folders import write_folder
from test_memory import _peak_of
from transformers import AutoConfig

from ringflash import ArgumentError, loss
from ringflash.configs.schema import LoraConfig, ModelConfig
from ringflash.launch.estimate import main
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines import room
from ringflash.training.engines.create import create_engine
from ringflash.training.engines.materialise import materialise
from ringflash.training.estimate.counting import count
from ringflash.training.estimate.fitting import refuse_what_cannot_fit
from ringflash.training.estimate.folder import FolderSizes
from ringflash.training.estimate.hardware import CARDS, GIB, Card, Hardware
from ringflash.training.estimate.own import OwnSizes
from ringflash.training.estimate.sizes import Load
from ringflash.training.estimate.step import estimate, longest, unknown
from ringflash.training.memory import rows
from ringflash.training.memory.plan import KEEP, OFFLOAD, RECOMPUTE
from ringflash.training.model.pretrained import Pretrained
from ringflash.training.run import forecast
from ringflash.training.run.loop import train

FOUR = Hardware(4, CARDS["h100"], 500 * GIB)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _described(folder: Path, kind: str = "llama", **settings) -> Path:
    """A folder of which nothing is there but its config.json."""
    AutoConfig.for_model(kind, **SHAPE | settings).save_pretrained(folder)
    return folder


def _sizes(path: Path, *overrides: str, tokens: int = 4096) -> FolderSizes:
    config = load([f"model.path={path}", "engine.precision=bf16", f"train.seqlen={tokens}", *overrides])
    return FolderSizes.of(config, 1)


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("gemma2", {"head_dim": 16}), ("qwen3_moe", EXPERTS)])
def test_products_of_a_pass_are_those_that_are_useful_and_layers_that_are_computed_again(tmp_path, kind, settings):
    sizes = _sizes(_described(tmp_path, kind, **settings), "engine=zero3")
    useful, forward = sizes.operations.token * sizes.tokens, 2 * sizes.weights.block * sizes.tokens
    assert sizes.work(0, False).operations == pytest.approx(useful, rel=1e-3)
    if kind == "llama":  # whose last product nothing wants again
        forward -= 2 * 64 * 96 * sizes.tokens
    if kind != "qwen3_moe":  # a token is sent to half of its weights
        assert sizes.work(2, False).operations == pytest.approx(useful + 2 * forward, rel=0.005)
        assert sizes.work(2, True).operations == pytest.approx(useful + 3 * forward, rel=0.005)


@pytest.mark.parametrize("lora", [0, 4], ids=["whole", "adapters"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
def test_a_pass_has_as_much_in_use_at_once_as_is_counted(tmp_path, monkeypatch, policy, precision, lora):
    tokens, tile = 4096, 1 << 17
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(rows.TILE_ELEMENTS, device, tile)
        monkeypatch.setitem(loss.CHUNK_ELEMENTS, device, tile)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}  # else attention is most on a CPU
    path = write_folder(tmp_path, hidden_size=256, intermediate_size=512, **heads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def made(**options):
        return Pretrained(ModelConfig(path=str(path)), dtype=dtype, lora=LoraConfig(rank=lora), **options)

    model = made()
    model.keep(policy, torch.device("cpu"))
    stored = torch.float32 if precision == "autocast" else dtype
    materialise(model, torch.device("cpu"), model.initialise, stored, frozen=dtype)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    shard = model.shard(
        {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "cu_seqlens": range(0, tokens + 1, 256)}
    )
    found = _peak_of(lambda: model(**shard).backward())
    said, _ = count(made(read=False), tokens, policy, master=precision == "autocast")
    assert found == pytest.approx(said.kept + max(said.forward, said.head, said.backward), rel=0.1)


def _peak_of_a_step(path, *overrides):
    """Bytes that a step of an engine has in use at once, the engine's own among them, and what is said."""
    cpu = torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        for device in ("cpu", "cuda"):
            patch.setitem(rows.TILE_ELEMENTS, device, 1 << 19)
            patch.setitem(loss.CHUNK_ELEMENTS, device, 1 << 20)
        patch.setattr(room, "BUCKET", 1 << 17)
        keys = ["engine.precision=bf16", "train.seqlen=2048"]
        config = load([f"model.path={path}", *keys, *overrides])
        said = estimate(config, dataclasses.replace(FOUR, gpus=1)).peak
        model = Pretrained(config.model, dist.group.WORLD, None, torch.bfloat16, lora=config.lora, read=False)
        model.initialise = lambda _, weight: weight.normal_(std=0.02)
        tokens = {"input_ids": torch.zeros(1, 2048, dtype=torch.int64), "cu_seqlens": range(0, 2049, 256)}
        shard = model.shard(tokens)

        def steps():
            engine = create_engine(model, cpu, config.engine, config.optimizer)
            for _ in range(2):  # optimizers make their state in the first
                with torch.profiler.record_function("step"):
                    engine.train_step([shard], 1e-4)

        return _peak_of(steps, since="step"), said


@pytest.mark.parametrize(
    ("engine", "policy", "lora"),
    [("zero3", KEEP, 16), ("zero3", RECOMPUTE, 0), ("fsdp2", KEEP, 0), ("fsdp2", RECOMPUTE, 16)],
)
def test_a_step_of_an_engine_has_as_much_in_use_at_once_as_is_said(pool, tmp_path, engine, policy, lora):
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}  # else attention is most on a CPU
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096, "tie_word_embeddings": True}
    path = _described(tmp_path, **shape, **heads)
    keys = [f"engine={engine}", f"engine.memory={policy}", f"lora.rank={lora}"]
    ((found, said),) = pool(1).run(_peak_of_a_step, path, *keys)
    assert found == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("policy", [KEEP, RECOMPUTE])
def test_what_is_counted_of_some_layers_and_tokens_is_what_is_counted_of_all(tmp_path, monkeypatch, policy, engine):
    monkeypatch.setitem(rows.TILE_ELEMENTS, "cuda", 96 << 9)
    path = _described(tmp_path, num_hidden_layers=5)
    sizes = _sizes(path, f"engine={engine}", tokens=8192)
    model = Pretrained(ModelConfig(path=str(path)), dtype=torch.bfloat16, read=False)
    whole, heads = count(model, 8192, policy, master=engine == "ddp")
    found, other = sizes._counted(policy)._asdict(), whole._asdict()
    for name in ("kept", "stream", "attention", "operations", "moved"):
        assert found[name] == pytest.approx(other[name], rel=1e-3)
    most, expected = (max(each[name] for name in ("forward", "head", "backward")) for each in (found, other))
    assert most == pytest.approx(expected, rel=0.03)
    assert (heads.query, heads.key, heads.width, heads.value) == (4, 2, 16, 16)


def test_layers_that_differ_are_all_counted(tmp_path):
    settings = {"decoder_sparse_step": 1, "mlp_only_layers": [0], **EXPERTS}
    sizes = _sizes(_described(tmp_path, "qwen3_moe", num_hidden_layers=5, **settings), "engine=zero3")
    assert sizes.passes._fewest == 5
    assert sizes.work(0, False).operations == pytest.approx(sizes.operations.token * sizes.tokens, rel=1e-3)


def test_a_llama_of_a_folder_keeps_what_the_recipes_own_does_where_layers_are_computed_again(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    path = _described(tmp_path, **shape, head_dim=64, tie_word_embeddings=True)
    own = [f"model.{key}={value}" for key, value in (shape | {"num_key_value_heads": 2, "vocab_size": 320}).items()]
    keys = ["engine=zero3", "engine.precision=bf16", "train.seqlen=16384", "data=bytes", *own]
    folder, written = _sizes(path, "engine=zero3", tokens=16384), OwnSizes.of(load(keys), 1)
    for pairs in (False, True):
        assert folder.kept(pairs) == pytest.approx(written.kept(pairs), rel=0.01)
    assert folder.again > 1.2 * written.again  # which are fused there
    assert folder.weights == written.weights
    assert folder.operations == written.operations
    assert folder.shape == written.shape
    assert folder.whole_pairs == written.whole_pairs


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_more_tokens_take_more_and_what_moves_is_on_the_host(tmp_path, engine):
    path = _described(tmp_path)

    def of(tokens, policy, gpus=4, card=CARDS["h100"]):
        keys = [f"engine={engine}", f"engine.memory={policy}", "engine.precision=bf16", f"train.seqlen={tokens}"]
        config = load([f"model.path={path}", *keys])
        return estimate(config, dataclasses.replace(FOUR, gpus=gpus, card=card))

    kept, again, moved = (of(1 << 20, policy) for policy in (KEEP, RECOMPUTE, OFFLOAD))
    assert kept.peak > again.peak > moved.peak
    assert sum(moved.host.values()) > sum(again.host.values()) == sum(kept.host.values())
    assert again.seconds > kept.seconds
    assert of(1 << 21, RECOMPUTE).peak > again.peak > of(1 << 20, RECOMPUTE, gpus=8).peak
    assert 0 < kept.mfu < 1


def test_windows_of_some_layers_make_a_step_shorter(tmp_path):
    seconds = []
    for name, kinds in (("all", ["full_attention"] * 4), ("some", ["sliding_attention"] * 3 + ["full_attention"])):
        path = _described(tmp_path / name, "gemma3_text", layer_types=kinds, sliding_window=512, head_dim=16)
        config = load([f"model.path={path}", "engine=zero3", "engine.precision=bf16", "train.seqlen=1048576"])
        seconds.append(estimate(config, FOUR).seconds)
    assert seconds[1] < 0.6 * seconds[0]


def test_the_longest_that_fits_does_and_more_is_refused(tmp_path):
    path = _described(tmp_path, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    config = load([f"model.path={path}", "engine=fsdp2", "engine.precision=bf16", "engine.memory=recompute"])
    found = longest(config, FOUR)
    for seqlen, fits in ((found, True), (2 * found, False)):
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, seqlen=seqlen))
        assert estimate(longer, FOUR).fits == fits
        if not fits:
            with pytest.raises(ArgumentError, match=r"a step takes about .* it fits with .*engine\.memory=auto"):
                refuse_what_cannot_fit(longer, FOUR)


def test_of_a_model_whose_passes_depend_on_values_it_is_said_why_nothing_is(tmp_path):
    config = load([f"model.path={_described(tmp_path, rope_parameters={'rope_type': 'dynamic', 'factor': 2.0})}"])
    said = unknown(config, 4)
    assert said is not None
    assert f"model.path={tmp_path}: no pass of a LlamaForCausalLM can be counted without values: " in said
    assert unknown(load(["model=llama3_1b"]), 4) is None


def test_a_load_of_a_batch_counts_its_own_tokens(tmp_path):
    config = load([f"model.path={_described(tmp_path)}", "engine=ddp", "engine.precision=bf16", "train.seqlen=8192"])
    few, many = (estimate(config, FOUR, load=Load(tokens, 1e6)) for tokens in (2048, 4096))
    assert few.peak < many.peak
    assert few.seconds < many.seconds


def test_the_command_needs_no_weights(tmp_path, capsys):
    path = _described(tmp_path, intermediate_size=16384)
    before = torch.get_rng_state()
    main([f"model.path={path}", "engine=fsdp2", "lora.rank=4", "train.seqlen=65536", "gpus=4"])
    found = capsys.readouterr().out
    for said in ("65,536 tokens, fsdp2", "optimizer", "tokens/s/GPU, MFU", "it fits", "longest train.seqlen"):
        assert said in found
    assert torch.equal(torch.get_rng_state(), before)


def _train_as_on_gpus(path, memory, *overrides):
    """What a run on CPUs says where GPUs of so much memory are there in their place."""
    said = []
    config = load(
        [
            f"model.path={path}",
            f"data.path={path / 'text'}",
            f"data.cache_dir={path / 'cache'}",
            f"run_dir={path / 'run'}",
            "logging=quiet",
            "logging.baselines=false",
            "train.steps=1",
            "train.seqlen=128",
            "train.validation_sequences=1",
            *overrides,
        ]
    )
    check(config, dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        hardware = Hardware(dist.get_world_size(), Card(memory, CARDS["h100"].peak), GIB)
        patch.setattr(forecast, "hardware_of_all", lambda _: hardware)
        patch.setattr("ringflash.training.run.progress.ProgressDisplay.note", lambda _, text: said.append(text))
        train(config, torch.device("cpu"))
    return "\n".join(said)


def _with_text(folder, **settings):
    (folder / "text").mkdir()
    for name in ("a", "b"):
        (folder / "text" / f"{name}.txt").write_text("so many words\n" * 2000)
    return write_folder(folder, **settings)


def test_a_run_says_at_its_start_what_its_first_batch_is_to_take(pool, tmp_path):
    for said in pool(2).run(_train_as_on_gpus, _with_text(tmp_path), CARDS["h100"].memory, "engine=fsdp2"):
        assert "\nestimated: " in said
        assert "tokens/s/GPU, MFU" in said


def test_a_run_says_why_nothing_is_estimated(pool, tmp_path):
    path = _with_text(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    for said in pool(2).run(_train_as_on_gpus, path, CARDS["h100"].memory):
        assert f"\nnot estimated: model.path={path}: no pass of a LlamaForCausalLM can be counted" in said
        assert "\nestimated: " not in said


def test_a_run_that_cannot_fit_is_refused_on_every_rank(pool, tmp_path):
    path = _with_text(tmp_path)
    for outcome in pool(2).outcomes(_train_as_on_gpus, path, 2e6, "train.seqlen=4096"):
        assert isinstance(outcome.error, ArgumentError)
        assert "a step takes about" in str(outcome.error)
