"""What looks right on each rank and is not: outputs, positions and losses that a rank makes of its own tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ringflash import ArgumentError
from ringflash.transformers import SequenceParallel

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
GPT = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3}
ESM = {"position_embedding_type": "absolute", "mask_token_id": 3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
EXPERTS = {
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def model_of(family: str, attention: str, kind: str = "ForCausalLM", **settings: Any) -> Any:
    """The same weights for each attention, in every process."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | settings)
    return getattr(transformers, f"AutoModel{kind}").from_config(config, attn_implementation=attention).eval()


def ids_of(length: int = 15) -> Tensor:
    """(2, length) with no token that means something else."""
    return torch.randint(4, 128, (2, length), generator=torch.Generator().manual_seed(3))


def left_padded() -> dict[str, Tensor]:
    batch = {"input_ids": ids_of(), "attention_mask": torch.ones(2, 15, dtype=torch.int64)}
    batch["attention_mask"][0, :5] = 0
    batch["input_ids"][0, :5] = SIZES["pad_token_id"]
    return batch


def sharded(model: Any, batch: dict[str, Any], **call: Any) -> Any:
    """Output of a whole batch's part, and how it lies on the ranks."""
    part = SequenceParallel(model).shard(batch)
    return model(**part, **call), part["sharding"]


# Positions that a model counts in a way of its own


@torch.no_grad()
def _logits(family: str, batch: dict[str, Tensor], kind: str, settings: dict[str, Any]) -> Tensor:
    output, sharding = sharded(model_of(family, "ring", kind, **settings), batch)
    return sharding.unshard(output.logits, 1)


@pytest.mark.parametrize("batch", [{"input_ids": ids_of()}, left_padded()], ids=["whole", "left_padded"])
@pytest.mark.parametrize(
    ("family", "kind", "settings"),
    [
        ("roberta", "ForMaskedLM", {}),
        ("esm", "ForMaskedLM", ESM),
        ("opt", "ForCausalLM", OPT),
        ("gpt2", "ForCausalLM", GPT),
        ("qwen2_moe", "ForCausalLM", EXPERTS),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@torch.no_grad()
def test_logits_are_those_of_the_whole_batch(
    pool, family: str, kind: str, settings: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    expected = model_of(family, "eager", kind, **settings)(**batch).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for found in pool(2).run(_logits, family, batch, kind, settings):
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def _hidden_states_of_long_sequences() -> tuple[Tensor, Tensor]:
    settings = {"max_position_embeddings": 27, "rope_parameters": DYNAMIC}
    batch = {"input_ids": ids_of(60)}
    model = model_of("llama", "ring", **settings)
    part = SequenceParallel(model).shard(batch)
    found = part["sharding"].unshard(model.model(**part, use_cache=False).last_hidden_state, 1)
    return found, model_of("llama", "eager", **settings).model(**batch).last_hidden_state


def test_a_model_called_without_its_head_knows_the_longest_sequence(pool) -> None:
    for found, expected in pool(2).run(_hidden_states_of_long_sequences):
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def _loss_of_packed_text(position_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of Qwen2.5-VL over ranks and on one device."""

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = SIZES | {"num_key_value_heads": 2, "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens: dict[str, Any] = {name: number for number, name in enumerate(names)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    batch = {"input_ids": ids_of(), "labels": labels, "position_ids": position_ids}
    losses = []
    for attention in ("ring", "eager"):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
        sequence = SequenceParallel(model) if attention == "ring" else None
        loss = model(**batch if sequence is None else sequence.shard(batch), use_cache=False).loss
        losses.append(loss.detach() if sequence is None else sequence.reported(loss))
    return losses[0], losses[1]


def test_documents_of_multimodal_positions_do_not_see_each_other(pool) -> None:
    position_ids = torch.tensor([*range(6), *range(9)]).expand(4, 2, 15)
    labels = ids_of()
    labels[:, [0, 6]] = -100
    for found, expected in pool(2).run(_loss_of_packed_text, position_ids, labels):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


# What is refused


def _score() -> None:
    sharded(model_of("llama", "ring", "ForSequenceClassification", num_labels=3), {"input_ids": ids_of()})


def _pool() -> None:
    sharded(model_of("bert", "ring", ""), {"input_ids": ids_of()})


def _keep_last() -> None:
    sharded(model_of("llama", "ring"), {"input_ids": ids_of()}, logits_to_keep=1)


def _attend_by_itself() -> None:
    sharded(model_of("openai-gpt", "ring", **GPT), {"input_ids": ids_of()})


def _mix_embeddings() -> None:
    sharded(model_of("mobilebert", "ring", "ForMaskedLM", embedding_size=32), {"input_ids": ids_of()})


def _weigh_masked_tokens() -> None:
    sharded(model_of("esm", "ring", "ForMaskedLM", **ESM | {"token_dropout": True}), {"input_ids": ids_of()})


def _leave_a_rank_without_tokens() -> None:
    sharded(model_of("llama", "ring"), {"input_ids": ids_of(1)})


def _have_no_sequences() -> None:
    sharded(model_of("llama", "ring"), {"input_ids": ids_of()[:0]})


def _ignore_another_label() -> None:
    sharded(model_of("llama", "ring"), {"input_ids": ids_of(), "labels": ids_of().fill_(-1)})


def _twice_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, shift_labels: Tensor, **_: Any) -> Tensor:
    return 2 * cross_entropy(logits.flatten(0, 1), shift_labels.flatten())


def _fuse_another_loss() -> None:
    model = model_of("llama", "ring")
    model.loss_function = _twice_cross_entropy
    SequenceParallel(model).fuse_loss()


def _adapt_a_fused_head() -> None:

    model = model_of("llama", "ring")
    SequenceParallel(model).fuse_loss()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    sharded(adapted, {"input_ids": ids_of(), "labels": ids_of()})


def _refused(call: Callable, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_score, "LlamaForSequenceClassification scores one token of each sequence"),
        (_pool, "BertModel pools each rank's tokens alone"),
        (_keep_last, "logits_to_keep=1"),
        (_attend_by_itself, "OpenAIGPTLMHeadModel computes attention itself"),
        (_mix_embeddings, "MobileBertForMaskedLM has trigram_input=True"),
        (_weigh_masked_tokens, "EsmForMaskedLM has token_dropout=True"),
        (_leave_a_rank_without_tokens, "a sequence of 1 tokens leaves rank 1 of 2 without any"),
        (_have_no_sequences, r"input_ids is \(0, 15\)"),
        (_ignore_another_label, "] is -1; allowed are 0 and more, and -100"),
        (_fuse_another_loss, "loss_function _twice_cross_entropy"),
        (_adapt_a_fused_head, "the output head of LlamaForCausalLM became a peft"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_what_ranks_would_make_of_their_own_tokens_is_refused(pool, call: Callable, message: str) -> None:
    pool(2).run(_refused, call, message)
