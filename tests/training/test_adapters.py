"""LoRA: the same as peft's on one device, under every engine; exported with what the adapters add."""

from __future__ import annotations

import contextlib
import json
import re

import peft
import pytest
import recipe
import torch
import torch.distributed as dist
from folders import write_folder
from safetensors.torch import load_file, save_file
from test_finetuning import _tune
from test_finetuning import folder as folder
from test_pretrained import ENGINES, _assert_same, _plain, _steps
from transformers import AutoModelForCausalLM

from ringflash.configs.schema import EngineConfig, LoraConfig, ModelConfig
from ringflash.errors import ArgumentError, CheckpointError
from ringflash.export import export
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.config.checks import check
from ringflash.training.config.composing import load
from ringflash.training.engines.create import create_engine
from ringflash.training.model.adapters import initialise_adapter, is_adapter
from ringflash.training.model.pretrained import Pretrained
from ringflash.training.model.transformer import generator_of

LORA = LoraConfig(rank=3, alpha=5.0, target_modules=["q_proj", "down_proj"])


def _adapted(model):
    """peft's model, its adapters with the initial weights of the recipe's."""
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LORA.target_modules)
    wrapped = peft.get_peft_model(model, config)
    for name, weight in wrapped.base_model.model.named_parameters():
        if is_adapter(name):
            initialise_adapter(name, weight, generator_of(0, f"model.{name}", weight.device))
    return wrapped.base_model.model


@pytest.mark.parametrize("name", ENGINES)
def test_two_ranks_train_adapters_as_peft_does_on_one_device(pool, tmp_path, name):
    path = write_folder(tmp_path, tie_word_embeddings=True)
    expected = _plain(path, adapt=_adapted)
    assert len(expected[1]) == 3 * 2 * 2 * 2  # a weight and two moments, of A and B, of two modules in two layers
    for result in pool(2).run(_steps, path, name, degree=2, lora=LORA):
        _assert_same(result, expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_what_is_kept_of_layers_with_adapters_changes_no_bit(pool, tmp_path, name):
    path = write_folder(tmp_path)
    expected, found = (pool(2).run(_steps, path, name, 2, memory=each, lora=LORA)[0] for each in ("keep", "offload"))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])


def test_bf16_adapters_keep_master_weights_in_fp32_and_the_others_in_bf16(pool, tmp_path):
    path = write_folder(tmp_path)
    expected, _, _ = _plain(path, adapt=_adapted)
    for name in ("ddp", "fsdp2", "zero3"):
        curve, state, _ = pool(2).run(_steps, path, name, degree=2, lora=LORA, dtype=torch.bfloat16)[0]
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=0.03, atol=0.03)
        weight = state["weight/model.layers.0.mlp.down_proj.lora_A.default.weight"]
        assert not torch.equal(weight, weight.bfloat16().float())


def _dtypes(path, name):
    model = Pretrained(ModelConfig(path=str(path)), dist.group.WORLD, dtype=torch.bfloat16, lora=LoraConfig(rank=2))
    engine = create_engine(model, torch.device("cpu"), EngineConfig(name), recipe.OPTIMIZER)
    return {(weight.requires_grad, weight.dtype) for weight in engine.model.parameters()}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_weights_that_stay_as_they_are_take_two_bytes_under_every_engine(pool, tmp_path, name):
    for found in pool(2).run(_dtypes, write_folder(tmp_path), name):
        assert found == {(True, torch.float32), (False, torch.bfloat16)}


def test_all_linear_modules_but_the_head_get_adapters_unless_some_are_named(tmp_path):
    path = write_folder(tmp_path)
    model = Pretrained(ModelConfig(path=str(path)), lora=LoraConfig(rank=2))
    with_adapters = {
        name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name
    }
    assert with_adapters == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    learned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert learned
    assert all(map(is_adapter, learned))


def test_linear_modules_that_give_more_than_a_product_get_none(tmp_path):
    path = write_folder(tmp_path, model_type="llama4_text", head_dim=8, num_local_experts=4, intermediate_size_mlp=48)
    model = Pretrained(ModelConfig(path=str(path)), lora=LoraConfig(rank=2))
    adapted = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert any("q_proj" in name for name in adapted)
    assert not any("router" in name for name in adapted)


@pytest.fixture(scope="module")
def tuned(pool, folder):
    pool(2).run(_tune, folder, "lora", "lora.rank=4", "engine=zero2", "checkpoint.every=3", "optimizer.lr=2e-2")
    return folder


def test_a_checkpoint_holds_adapters_alone_and_an_export_what_they_add(tuned, tmp_path):
    checkpoint = tuned / "lora" / "checkpoints" / "step-00000006"
    assert all(map(is_adapter, recipe.stored(checkpoint)))
    export(tuned / "lora", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tuned / "model", dtype=torch.float32)
    run = Checkpoint(checkpoint)
    for name, weight in base.named_parameters():
        expected = weight.detach()
        if name.endswith("_proj.weight"):
            own = f"weight/model.{name.removesuffix('.weight')}"
            down, up = (run.read(f"{own}.lora_{part}.default.weight") for part in "AB")
            assert up.abs().max() > 0
            expected = expected + 2 * (up @ down)
        torch.testing.assert_close(found.get_parameter(name), expected.bfloat16(), rtol=1e-2, atol=1e-4)


def _tune_there(folder, name):
    with contextlib.chdir(folder):
        _tune(folder, name, "model.path=model", "lora.rank=4", "train.steps=1", "checkpoint.every=1")


def test_adapters_are_exported_from_anywhere_as_long_as_their_folder_is_where_it_was(pool, folder, tmp_path):
    pool(1).run(_tune_there, folder, "lora-there")
    export(folder / "lora-there", tmp_path / "out")
    state = folder / "lora-there" / "checkpoints" / "step-00000001" / "state.json"
    assert json.loads(state.read_text())["model"]["folder"] == str(folder / "model")
    (folder / "model").rename(folder / "moved")
    try:
        with pytest.raises(CheckpointError, match=rf"are no longer in {folder / 'model'}"):
            export(folder / "lora-there", tmp_path / "again")
    finally:
        (folder / "moved").rename(folder / "model")


def test_adapters_of_experts_and_their_router_are_exported_too(pool, folder, tmp_path):
    shape = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    shape |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    shape |= {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4}
    model = write_folder(tmp_path / "model", model_type="deepseek_v3", **shape)
    job = (f"model.path={model}", "lora.rank=4", "train.steps=1", "optimizer.warmup_steps=0", "optimizer.lr=2e-2")
    pool(2).run(_tune, folder, "lora-experts", *job)
    export(folder / "lora-experts", tmp_path / "out")  # compares logits before and after
    before, after = (load_file(path / "model.safetensors") for path in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(
        before["model.layers.1.mlp.experts.0.up_proj.weight"].bfloat16(),
        after["model.layers.1.mlp.experts.0.up_proj.weight"],
    )


def test_adapters_go_on_bit_for_bit_but_not_upon_other_weights_or_otherwise_scaled(pool, tuned, tmp_path):
    middle = f"checkpoint.resume={tuned / 'lora' / 'checkpoints' / 'step-00000003'}"
    job = (middle, "lora.rank=4", "engine=zero2", "optimizer.lr=2e-2")
    pool(2).run(_tune, tuned, "lora-rest", *job)
    first, second = (recipe.stored(tuned / run / "checkpoints" / "step-00000006") for run in ("lora", "lora-rest"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for outcome in pool(2).outcomes(_tune, tuned, "lora-scaled", *job, "lora.alpha=3"):
        assert isinstance(outcome.error, CheckpointError)
        assert "its adapters had other lora.alpha: None, here 3.0" in str(outcome.error)
    for outcome in pool(2).outcomes(_tune, tuned, "lora-whole", middle):
        assert "holds adapters alone, for lora.rank=4; `python -m ringflash.export` makes a fol" in str(outcome.error)
    other = write_folder(tmp_path / "other", tie_word_embeddings=True)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for outcome in pool(2).outcomes(_tune, tuned, "lora-other", *job, f"model.path={other}"):
        assert isinstance(outcome.error, CheckpointError)
        assert "its adapters had other weights of model.path" in str(outcome.error)


def test_adapters_that_cannot_be_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"lora\.rank=4 is for a model of a folder; give model\.path"):
        check(load(["lora.rank=4"]), 1)
    path = write_folder(tmp_path)
    for key in ("lora.alpha=4.0", "lora.target_modules=['q_proj']"):  # would train all weights without a word
        with pytest.raises(ArgumentError, match=re.escape(f"{key} without adapters; give lora.rank too")):
            check(load([key]), 1)
    with pytest.raises(ArgumentError, match=r"lora\.target_modules=\['nowhere'\]: "):
        Pretrained(ModelConfig(path=str(path)), lora=LoraConfig(rank=4, target_modules=["nowhere"]))
    monkeypatch.setattr("ringflash.training.extras.find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"lora\.rank=4 needs peft: pip install 'ringflash\[huggingface\]'"):
        check(load(["lora.rank=4"]), 1)
