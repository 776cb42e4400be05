"""The model against Transformers' Llama, its published sizes, and its loss against torch's."""

from __future__ import annotations

import pytest
import recipe
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ringflash import ArgumentError, loss, shard_batch
from ringflash.configs.schema import AttentionConfig, ModelConfig, RopeScalingConfig
from ringflash.training.config.composing import load
from ringflash.training.model.rope import as_transformers
from ringflash.training.model.transformer import Transformer, attention_mask

SCALINGS = [
    RopeScalingConfig(),
    RopeScalingConfig("llama3", 8.0, original_max_position_embeddings=64),
    RopeScalingConfig("yarn", 8.0, original_max_position_embeddings=64),
    RopeScalingConfig("linear", 8.0),
    RopeScalingConfig("ntk", 8.0),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "llama3", "yarn", "linear", "ntk"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_computes_what_transformers_llama_computes(tied, scaling):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=65,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            rope_parameters=as_transformers(16, 500.0, scaling),
            max_position_embeddings=512,
        )
    ).eval()
    config = ModelConfig(48, 80, 2, 6, 2, 16, rope_theta=500.0, rope_scaling=scaling, tie_word_embeddings=tied)
    ours = Transformer(config, 65)
    ours.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    ids = torch.randint(65, (2, 200))
    shard = shard_batch({"input_ids": ids})
    shard.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(ours(**shard), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama3_1b", 1_235_814_400), ("llama3_8b", 8_030_261_248)], ids=["1b", "8b"]
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    config = load([f"model={name}"]).model
    with torch.device("meta"):
        model = Transformer(config, config.vocab_size)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_a_packed_document_is_computed_as_if_it_were_alone():
    model = recipe.build()
    ids = torch.randint(recipe.VOCABULARY, (1, 60))
    losses = model(**shard_batch({"input_ids": ids, "cu_seqlens": [0, 23, 60]}), per_token=True)
    for start, stop in ((0, 23), (23, 60)):
        alone = model(**shard_batch({"input_ids": ids[:, start:stop]}), per_token=True)
        torch.testing.assert_close(losses[:, start:stop], alone, rtol=1e-5, atol=1e-5)


def _sharded_losses(attention):
    torch.manual_seed(0)
    model = Transformer(recipe.MODEL, recipe.VOCABULARY, attention)
    batch = recipe.together(recipe.batches(0)[: 1 if attention.partition == "balanced" else None])
    return model(**shard_batch(batch, None, attention.partition, attention_mask(attention)), per_token=True)


MASKS = {
    "causal": AttentionConfig(),
    "contiguous": AttentionConfig(partition="contiguous"),
    "window": AttentionConfig(mask="sliding_window", window=20, sink=2),
    "chunked": AttentionConfig(mask="chunked", chunk=32),
    "balanced": AttentionConfig(mask="sliding_window", window=20, sink=2, partition="balanced"),
}


@pytest.mark.parametrize("name", MASKS)
def test_sharded_losses_sum_to_those_of_one_device(pool, name):
    whole = _sharded_losses(MASKS[name]).double().sum()
    parts = pool(2).run(_sharded_losses, MASKS[name])
    torch.testing.assert_close(sum(part.double().sum() for part in parts), whole, rtol=1e-6, atol=0)


def test_masks_differ():
    sums = {_sharded_losses(MASKS[name]).sum().item() for name in ("causal", "window", "chunked")}
    assert len(sums) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 2}, "num_attention_heads=3 is not divisible by model.num_key_value_heads=2"),
        ({"hidden_size": 31, "head_dim": None}, "hidden_size=31 is not divisible by model.num_attention_heads=3"),
        ({"head_dim": None}, "head_dim=11"),
        ({"head_dim": 258}, "head_dim=258"),
    ],
)
def test_shapes_that_do_not_fit_together_are_refused_by_name(change, said):
    config = ModelConfig(**{**vars(recipe.MODEL), **change})
    with pytest.raises(ArgumentError, match=said):
        Transformer(config, 65)


@given(
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 200),
    ignored=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_chunked_loss_and_gradients_are_those_of_torch(tokens, chunk, ignored, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(17, 8, generator=generator).requires_grad_()
    labels = torch.randint(17, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    exact = torch.nn.functional.cross_entropy(
        x.double() @ weight.to(dtype).double().T, labels, reduction="none", ignore_index=-100
    )
    expected = torch.autograd.grad(exact.sum() * 0.3, (x, weight), allow_unused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_ELEMENTS, "cpu", chunk)
        total = loss.cross_entropy_sum(x, weight, labels)
        found = torch.autograd.grad(total * 0.3, (x, weight))
        each = loss.cross_entropy(x, weight, labels)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(total.double(), exact.sum(), rtol=close["rtol"], atol=close["atol"] * tokens)
    torch.testing.assert_close(each.double(), exact, **close)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, **close)
    assert not found[0][labels == -100].any()


def test_initial_weights_depend_on_seed_and_name_only():
    model, other = (Transformer(recipe.MODEL, recipe.VOCABULARY, seed=seed) for seed in (3, 4))
    weights = dict(model.named_parameters())
    for name in reversed(weights):
        again = torch.empty_like(weights[name])
        torch.rand(7)
        model.initialise(name, again)
        assert torch.equal(again, weights[name])
    twins = [weights[f"layers.{i}.mlp.up_proj.weight"] for i in range(2)] + [other.layers[0].mlp.up_proj.weight]
    assert all(0.015 < twin.std() < 0.025 for twin in twins)
    assert torch.corrcoef(torch.stack([twin.detach().flatten() for twin in twins])).triu(1).abs().max() < 0.1


def _logits(head_ranks):
    model = recipe.build(dist.group.WORLD, attention=AttentionConfig(head_ranks=head_ranks))
    shard = model.shard(recipe.together(recipe.batches(0)[:1]))
    del shard["labels"]
    sharding = shard["sharding"]
    return sharding._placement.head_ranks, sharding.unshard(model(**shard), 1).detach()


@pytest.mark.parametrize("head_ranks", [1, 3])
def test_ranks_that_exchange_heads_as_the_recipe_says_give_one_devices_logits(pool, head_ranks):
    shard = shard_batch(recipe.together(recipe.batches(0)[:1]))
    del shard["labels"]
    expected = recipe.build()(**shard).detach()
    for exchanging, found in pool(3).run(_logits, head_ranks):
        assert exchanging == head_ranks
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
