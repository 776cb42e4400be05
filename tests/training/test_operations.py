"""Useful operations of a step, against torch's own counting of products."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from folders import write_folder
from torch.utils.flop_counter import FlopCounterMode

from ringflash import shard_batch
from ringflash.configs.schema import LoraConfig, ModelConfig
from ringflash.training.config.composing import load
from ringflash.training.engines.materialise import materialise
from ringflash.training.estimate.hardware import CARDS, peak_of
from ringflash.training.estimate.operations import operations_of
from ringflash.training.estimate.own import OwnSizes
from ringflash.training.memory.plan import RECOMPUTE
from ringflash.training.model import pretrained
from ringflash.training.model.pretrained import Pretrained
from ringflash.training.model.transformer import Transformer
from ringflash.transformers.forward import PROBED

CPU = torch.device("cpu")
TOKENS = 64


def _counted(model, shard):
    """Operations of products in a step; those inside of attention are of one operator, which is not looked into."""
    with FlopCounterMode(display=False) as counter:
        model(**shard).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [True, False])
def test_products_of_the_recipes_own_model_are_those_that_torch_counts(tied):
    shape = ModelConfig(32, 48, 2, 4, 2, head_dim=8, tie_word_embeddings=tied)
    model = Transformer(shape, 65)
    found = operations_of(model)
    assert found is not None
    counted = _counted(model, shard_batch({"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}))
    uncounted = 2 * 2 * shape.hidden_size * shape.intermediate_size * TOKENS  # `addmm_`, one a block, torch passes over
    assert found.token * TOKENS == counted + uncounted
    model.keep(RECOMPUTE, CPU)  # which changes nothing about what is useful
    assert operations_of(model) == found


def _of_folder(path, lora=None, **settings):
    model = Pretrained(ModelConfig(path=str(write_folder(path, **settings))), lora=lora)
    found = operations_of(model)  # before an engine has it
    materialise(model, CPU, model.initialise)
    shard = model.shard({"input_ids": torch.arange(TOKENS)[None], "cu_seqlens": [0, TOKENS]})
    probe = 2 * PROBED * model.vocab_size * model.config.hidden_size  # by which the head is looked at
    return model, found, _counted(model, shard) - probe


def test_products_of_a_model_of_transformers_are_those_that_torch_counts(tmp_path):
    _, found, counted = _of_folder(tmp_path)
    assert found.token * TOKENS == counted


def test_weights_under_adapters_want_no_gradient_of_their_own(tmp_path):
    model, found, counted = _of_folder(tmp_path, LoraConfig(rank=4))
    attention = model.model.model.layers[0].self_attn
    first = [weight for name in "qkv" for weight in attention.get_submodule(f"{name}_proj").parameters()]
    # The gradient of the first layer's input goes nowhere: of q, k, v and A, which all have it as theirs.
    unwanted = sum(weight.numel() for weight in first if weight.shape[1] == model.config.hidden_size)
    assert found.token * TOKENS == counted + 2 * unwanted * TOKENS


def test_a_token_counts_for_the_experts_that_it_is_sent_to(tmp_path):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model, found, counted = _of_folder(tmp_path, model_type="mixtral", **experts)
    of_experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    assert of_experts > 0
    # Grouped products, which torch does not count: half of the experts.
    assert found.token * TOKENS == counted + 6 * of_experts / 2 * TOKENS


def test_what_nobody_knows_is_not_guessed(tmp_path, monkeypatch):
    model = Pretrained(ModelConfig(path=str(write_folder(tmp_path, model_type="mixtral", num_local_experts=4))))
    assert operations_of(model) is not None
    monkeypatch.setattr(pretrained, "EXPERTS", ())
    assert operations_of(model) is None


def test_a_pair_takes_a_score_and_a_sum_over_all_heads_and_twice_that_backward():
    heads, width, tokens = 3, 8, 16
    query, key, value = (torch.randn(heads, tokens, width, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ((query @ key.mT).softmax(-1) @ value).sum().backward()
    model = Transformer(ModelConfig(16, 16, 2, heads, heads, head_dim=width), 65)
    found = operations_of(model)
    assert found is not None
    assert found.of(0, tokens**2) == 2 * counter.get_total_flops()  # of two layers


def test_estimates_count_pairs_as_runs_do():
    keys = ["model=llama3_1b", "engine.precision=bf16", "train.seqlen=20000", "train.global_batch=2"]
    config = load(keys)
    assert OwnSizes.of(config, 4).load.pairs == pytest.approx(20000 * 20001, rel=1e-3)
    window = dataclasses.replace(config.attention, mask="sliding_window", window=99)
    few = OwnSizes.of(dataclasses.replace(config, attention=window), 4).load.pairs
    assert few == pytest.approx(2 * (20000 * 100 - 99 * 50), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", CARDS["h100"].peak),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", CARDS["h200"].peak),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", math.nan),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", math.nan),
        ("NVIDIA GeForce GTX 1080", math.nan),
    ],
)
def test_a_card_is_known_by_the_words_of_its_name(name, peak):
    assert peak_of(name) == pytest.approx(peak, nan_ok=True)
