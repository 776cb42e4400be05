"""What would be wrong without a word is refused, with its name and the cure, and on every rank of the group."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from batches import IGNORED, KINDS
from families import SMALL, VOCABULARY, build, draw
from learning import LOSS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ringflash.transformers
from ringflash import ArgumentError, RankMismatchError
from ringflash.transformers import SequenceParallel

PROMPT = 20.0
"""Seconds within which ranks must hear of each other's refusals."""


def _refused(pool, function, *args, ranks=2):
    """The message of the ArgumentError that every rank raises."""
    outcomes = pool(ranks).outcomes(function, *args, timeout=PROMPT)
    for outcome in outcomes:
        assert isinstance(outcome.error, ArgumentError), outcome.details
    assert len({str(outcome.error) for outcome in outcomes}) == 1
    return str(outcomes[0].error)


# Calls whose batch was not sharded


def _whole_call(how):
    model = build("llama", "ring")
    batch = KINDS["one_document"]().batch
    if how == "without SequenceParallel":
        return model(**batch)
    sequence = SequenceParallel(model)
    mine = sequence.shard(batch)
    if how == "generate":
        return model.generate(batch["input_ids"], max_new_tokens=2)
    if how == "after a sharded call":
        model(**mine, use_cache=False)
    if how == "after alone":
        with sequence.alone():
            model(**batch)
    if how == "with the sharding lost":
        del mine["sharding"]
        batch = mine
    return model(**batch, use_cache=False)


WHOLE_CALLS = [
    "without SequenceParallel",
    "at once",
    "generate",
    "after a sharded call",
    "after alone",
    "with the sharding lost",
]


@pytest.mark.parametrize("how", WHOLE_CALLS)
def test_a_call_on_several_ranks_that_was_not_sharded_says_what_to_do(pool, how):
    message = _refused(pool, _whole_call, how)
    assert "SequenceParallel" in message
    assert ".shard" in message
    assert "alone" in message


# Ranks with different batches


def _different(how):
    batch = dict(KINDS["right_padded"]().batch)
    if how == "packed":
        batch = dict(KINDS["packed_by_positions"]().batch)
    odd = dist.get_rank() == dist.get_world_size() - 1
    if odd and how == "input_ids":
        batch["input_ids"] = batch["input_ids"].roll(1, 1)
    elif odd and how == "labels":
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, 3] = IGNORED
    elif odd and how == "attention_mask":
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][1, 14] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    elif odd and how == "packed":
        batch["position_ids"] = batch["position_ids"].flip(0)
    elif odd and how == "length":
        batch = {key: x[:, :-1] for key, x in batch.items()}
    elif odd and how == "keys":
        del batch["labels"]
    elif how == "num_items_in_batch":
        batch["num_items_in_batch"] = 50 + odd
    elif how == "other tensors":
        batch["weights"] = torch.ones(batch["labels"].shape) + odd  # as losses of reinforcement learning have them
    SequenceParallel(build("llama", "ring")).shard(batch)


DIFFERENCES = (
    "input_ids",
    "labels",
    "attention_mask",
    "packed",
    "length",
    "keys",
    "num_items_in_batch",
    "other tensors",
)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("how", DIFFERENCES)
def test_ranks_with_different_batches_are_told(pool, how, ranks):
    for outcome in pool(ranks).outcomes(_different, how, timeout=PROMPT):
        assert isinstance(outcome.error, RankMismatchError), outcome.details


def _one_refuses(odd):
    batch = dict(KINDS["right_padded"]().batch)
    if dist.get_rank() == odd:
        batch["attention_mask"] = 2 * batch["attention_mask"]
    SequenceParallel(build("llama", "ring")).shard(batch)


@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_hear_that_one_of_them_refused_its_batch(pool, odd):
    outcomes = pool(2).outcomes(_one_refuses, odd, timeout=PROMPT)
    assert isinstance(outcomes[odd].error, ArgumentError), outcomes[odd].details
    assert isinstance(outcomes[1 - odd].error, RankMismatchError), outcomes[1 - odd].details


# Models


HYBRIDS = {
    "qwen3_next": ("linear_attention", {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"]}),
    "qwen3_5_text": ("linear_attention", {"layer_types": ["linear_attention", "full_attention"]}),
    "mamba": ("linear_attention", {}),
    "mamba2": ("linear_attention", {"num_heads": 8, "n_groups": 2, "state_size": 8}),
    "falcon_h1": ("hybrid", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    "lfm2": ("conv", {"layer_types": ["conv", "full_attention"]}),
    "jamba": ("linear_attention", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "bamba": ("linear_attention", {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]}),
    "zamba2": ("linear_attention", {"mamba_headdim": 8, "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"]}),
    "nemotron_h": (
        "linear_attention",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    ),
    "granitemoehybrid": (
        "linear_attention",
        {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "num_local_experts": 4},
    ),
    "olmo_hybrid": ("linear_attention", {"layer_types": ["linear_attention", "full_attention"]}),
    "minimax": (
        "linear_attention",
        {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": ("linear_attention", {"lru_width": 32}),
    "rwkv": ("RwkvBlock", {"attention_hidden_size": 32}),
    "xlstm": ("xLSTMBlock", {}),
}
"""Models whose first layer carries a state along the sequence: its type, and sizes."""


def _construct(family):
    settings = SMALL | {"head_dim": 8} | HYBRIDS[family][1]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), attn_implementation="ring")
    SequenceParallel(model)


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_that_carry_a_state_along_the_sequence_are_refused_by_name(pool, family):
    message = _refused(pool, _construct, family)
    assert HYBRIDS[family][0] in message
    assert re.search(r"layer 0|blocks\.0", message)


def test_one_device_takes_layers_that_carry_a_state():
    _construct("qwen3_next")


def _construct_other(how):
    if how == "output_router_logits":
        return SequenceParallel(build("mixtral", "ring", output_router_logits=True))
    return SequenceParallel(build("llama", how))


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_another_attention_implementation_is_refused(pool, how):
    message = _refused(pool, _construct_other, how)
    assert "attn_implementation" in message
    assert how in message
    assert "ring" in message


def test_router_losses_are_refused(pool):
    assert "output_router_logits" in _refused(pool, _construct_other, "output_router_logits")


# Batches


def _tensor(*shape):
    return torch.zeros(shape)


def _shard(how):
    batch = dict(KINDS["right_padded"]().batch)
    rows, length = batch["input_ids"].shape
    if how == "4-D attention_mask":
        batch["attention_mask"] = _tensor(rows, 1, length, length)
    elif how == "attention_mask of numbers":
        batch["attention_mask"] = batch["attention_mask"] * 2
    elif how == "attention_mask that is added":
        batch["attention_mask"] = (1.0 - batch["attention_mask"]) * -1e9
    elif how == "attention_mask of another length":
        batch["attention_mask"] = batch["attention_mask"][:, 1:]
    elif how == "pixel_values":
        batch["pixel_values"] = _tensor(rows, 3, 8, 8)
    elif how == "labels of another shape":
        batch["labels"] = batch["labels"][:, 1:]
    elif how == "labels of sequences":
        batch["labels"] = batch["labels"][:, 0]
    elif how == "labels at padding":
        batch["labels"] = batch["input_ids"]
    elif how == "cu_seq_lens":
        batch = dict(KINDS["packed_with_boundaries"]().batch)
        batch["cu_seq_lens_k"] = batch["cu_seq_lens_k"][[0, 2, 3, 4]]
    elif how == "no tokens":
        del batch["input_ids"]
    elif how in ("list of labels", "list of position_ids", "list of seq_idx"):
        batch[how.split()[-1]] = batch["input_ids"].tolist()
    elif how == "array of seq_idx":
        batch["seq_idx"] = batch["input_ids"].numpy()
    elif how == "row of position_ids":
        batch["position_ids"] = torch.arange(length)
    elif how in ("text of cu_seq_lens_q", "halves of cu_seq_lens_q"):
        batch["cu_seq_lens_q"] = "all" if how.startswith("text") else [0.0, length + 0.5, 2.0 * length]
    SequenceParallel(build("llama", "ring")).shard(batch)


BATCHES = {
    "4-D attention_mask": "attention_mask",
    "attention_mask of numbers": "attention_mask",
    "attention_mask that is added": "attention_mask",
    "attention_mask of another length": "attention_mask",
    "pixel_values": "pixel_values",
    "labels of another shape": "labels",
    "labels of sequences": "labels",
    "labels at padding": "labels",
    "cu_seq_lens": "cu_seq_lens",
    "no tokens": "input_ids",
    "list of labels": "labels is list",
    "list of position_ids": "position_ids is list",
    "list of seq_idx": "seq_idx is list",
    "array of seq_idx": "seq_idx is ndarray",
    "row of position_ids": "position_ids is (",
    "text of cu_seq_lens_q": "cu_seq_lens_q is str",
    "halves of cu_seq_lens_q": "cu_seq_lens_q is torch.float32; allowed are integers",
}


@pytest.mark.parametrize("how", BATCHES)
def test_what_cannot_be_sharded_is_refused_by_name(pool, how):
    assert BATCHES[how] in _refused(pool, _shard, how)


# Calls


def _call(how):
    model = build("llama", "ring")
    sequence = SequenceParallel(model)
    mine = sequence.shard(KINDS["one_document"]().batch)
    if how == "a cache that holds tokens":
        cache = DynamicCache(config=model.config)
        with sequence.alone(), torch.no_grad():
            model(input_ids=mine["input_ids"], past_key_values=cache)
    else:
        cache = StaticCache(config=model.config, max_cache_len=64)
    model(**mine, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("how", ["a cache that holds tokens", "a static cache"])
def test_a_sharded_call_refuses_a_cache_with_tokens_in_other_places(pool, how):
    assert "cache" in _refused(pool, _call, how)


def _router_loss_of_one_call():
    model = build("mixtral", "ring")
    sequence = SequenceParallel(model)
    model(**sequence.shard(KINDS["one_document"]().batch), use_cache=False, output_router_logits=True)


PARTS = torch.tensor([0, 5, 12], dtype=torch.int32)


def test_router_losses_that_a_call_asks_for_are_refused(pool):
    assert "output_router_logits" in _refused(pool, _router_loss_of_one_call)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"output_attentions": True}, "output_attentions"),
        (
            {"attention_mask": (torch.arange(12) > 3)[None].long(), "cu_seq_lens_q": PARTS, "cu_seq_lens_k": PARTS},
            "cu_seq_lens_k beside an attention_mask",
        ),
    ],
    ids=["probabilities", "packed_and_padded"],
)
def test_what_a_call_asks_for_and_is_not_given_is_refused(given, words):
    with pytest.raises(ArgumentError, match=words):
        build("llama", "ring")(input_ids=torch.arange(3, 15)[None], use_cache=False, **given)


def _t5(ids):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration._from_config(config, attn_implementation="ring")
    return model(**SequenceParallel(model).shard({"input_ids": ids, "decoder_input_ids": ids}), use_cache=False)


def test_a_bias_of_positions_is_refused(pool):
    ids = torch.arange(3, 23)[None]
    assert "T5ForConditionalGeneration" in _refused(pool, _t5, ids)
    with pytest.raises(ArgumentError, match="position_bias"):
        _t5(ids)


def _gemma3(attn_implementation):
    """Gemma 3 with images, whose tokens see each other both ways."""
    text = SMALL | {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attn_implementation)
    draw(model)
    return model


def _image_batch():
    ids = torch.arange(3, 43)[None]
    kinds = torch.zeros_like(ids)
    kinds[:, 10:14] = 1
    return {"input_ids": ids, "token_type_ids": kinds, "labels": ids}


def _image_tokens():
    model = _gemma3("ring")
    model(**SequenceParallel(model).shard(_image_batch()), use_cache=False)


def _attention_of_its_own():
    settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = AutoConfig.for_model("openai-gpt", **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    model(**SequenceParallel(model).shard(KINDS["one_document"]().batch))


def test_a_model_that_never_calls_the_attention_function_is_refused(pool):
    """It takes attn_implementation="ring" without a word, and attends to each rank's tokens alone."""
    assert "OpenAIGPT" in _refused(pool, _attention_of_its_own)


def test_a_mask_that_a_model_adds_is_refused(pool):
    assert "mask" in _refused(pool, _image_tokens)


def test_one_device_refuses_a_mask_that_a_model_adds():
    with pytest.raises(ArgumentError, match="mask of its own"):
        _gemma3("ring")(**_image_batch(), use_cache=False)


def test_a_model_for_images_takes_text_alone():
    batch = {key: x for key, x in _image_batch().items() if key != "token_type_ids"}
    found, expected = (_gemma3(name)(**batch, use_cache=False).loss for name in ("ring", "eager"))
    torch.testing.assert_close(found, expected, rtol=LOSS, atol=0)


def test_importing_registers_the_name():
    assert ringflash.transformers is not None
    assert callable(ALL_ATTENTION_FUNCTIONS["ring"])
