"""Encoders, and decoders that look at an encoder: they do what the eager model does with the whole batch."""

from __future__ import annotations

import pytest
import torch
from batches import IGNORED, draw, gradients, packed, padded
from families import SMALL, VOCABULARY
from families import draw as draw_weights
from learning import GRADIENT, LOSS, assert_learned, assert_same_gradients, assert_same_loss, learn, over_ranks
from torch.nn.functional import cross_entropy, pad
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from ringflash import ArgumentError
from ringflash.parallel.mesh import ONE_DEVICE
from ringflash.transformers import SequenceParallel

NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
BERT = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = SMALL | NO_DROPOUT | {"ffn_dim": 48, "word_embed_proj_dim": 32}
MODERN = SMALL | {
    "local_attention": 10,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
BART = NO_DROPOUT | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
SIDE = SMALL | {
    "head_dim": 8,
    "query_pre_attn_scalar": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 5,
}
T5GEMMA = {"encoder": SIDE, "decoder": SIDE, "vocab_size": VOCABULARY}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig, BERT),
    "roberta": (RobertaForMaskedLM, RobertaConfig, BERT),  # its positions begin behind the padding token's number
    "opt": (OPTForCausalLM, OPTConfig, OPT),  # its positions begin at the first token that is seen
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig, MODERN),
    "bart": (BartForConditionalGeneration, BartConfig, BART),
    "t5gemma": (T5GemmaForConditionalGeneration, T5GemmaConfig, T5GEMMA),
}


def build(name, attn_implementation, **changes):
    """A model with weights that are the same in every process."""
    model, config, settings = MODELS[name]
    built = model._from_config(config(**settings | changes), attn_implementation=attn_implementation)
    draw_weights(built)
    return built


def _masked(batch, share=0.2):
    """Targets at some tokens, the first of all among them; of which the ranks have unlike numbers."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(batch["input_ids"].shape, generator=generator) < share
    chosen[:, 0] = True
    chosen[:, -12:] = False
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    return batch | {"labels": batch["input_ids"].masked_fill(~(chosen & real), IGNORED)}


ENCODER_BATCHES = {
    "whole": {"input_ids": torch.stack(draw(37, 37))},
    "right_padded": {key: x for key, x in padded(draw(38, 22), "right").batch.items() if key != "labels"},
}


def _learn(name, batch, **options):
    return learn(build(name, "ring"), batch, **options)


def _learn_from_logits(name, batch):
    """The same with a loss of one's own, for models that compute theirs of a rank's tokens alone."""
    model = build(name, "ring")
    sequence = SequenceParallel(model)
    mine = sequence.shard(batch)
    labels = mine.pop("labels")
    logits = model(**mine).logits
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = total / mine["num_items_in_batch"]
    loss.backward()
    return {
        "mean": over_ranks(loss.detach().clone()),
        "reported": sequence.reported(loss),
        "gradients": {name: over_ranks(x) for name, x in gradients(model).items()},
    }


def _one_device(name, batch, **changes):
    model = build(name, "eager", **changes)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("form", ENCODER_BATCHES)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders_learn_masked_tokens_as_on_one_device(pool, name, form, ranks):
    batch = _masked(ENCODER_BATCHES[form])
    if name == "bert":
        batch["token_type_ids"] = (torch.arange(batch["input_ids"].shape[1]) > 15).long().expand_as(batch["input_ids"])
    expected = _one_device(name, batch)
    step = _learn_from_logits if name == "bert" else _learn
    assert_learned(pool(ranks).run(step, name, batch), *expected, of_model=True)


def test_a_model_that_computes_its_loss_of_a_ranks_tokens_alone_is_refused(pool):
    for outcome in pool(2).outcomes(_learn, "bert", _masked(ENCODER_BATCHES["whole"])):
        assert isinstance(outcome.error, ArgumentError), outcome.details
        assert "BertForMaskedLM computes its loss itself" in str(outcome.error)


def _logits(name, batch):
    model = build(name, "ring")
    mine = SequenceParallel(model).shard(batch)
    with torch.no_grad():
        return mine["sharding"].unshard(model(**mine).logits, 1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta", "opt"])
def test_learned_positions_are_those_of_the_model(pool, name, side):
    batch = padded(draw(21, 34), side).batch
    batch = {key: x for key, x in batch.items() if key != "labels"}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = build(name, "eager")(**batch).logits[real]
    for found in pool(2).run(_logits, name, batch):
        torch.testing.assert_close(found[real], expected, rtol=0, atol=GRADIENT * expected.abs().max().item())


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_packed_documents_of_an_encoder_do_not_see_each_other(pool, name):
    documents = packed([draw(19, 5, 30)], boundaries=False)
    batch = {key: x for key, x in documents.batch.items() if key != "labels"}
    with torch.no_grad():
        expected = torch.cat([build(name, "eager")(input_ids=x[None]).logits[0] for x in documents.ids])
    for found in pool(2).run(_logits, name, batch):
        torch.testing.assert_close(found[0], expected, rtol=0, atol=GRADIENT * expected.abs().max().item())


def _translation(pad_source, pad_target):
    """A source and a target of other lengths, as DataCollatorForSeq2Seq makes them."""
    source = padded(draw(29, 6 if pad_source else 29), "right").batch
    labels = torch.stack(draw(23, 23, seed=1))
    if pad_target:
        labels[1, 11:] = IGNORED
    start = pad(labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, 0), (1, 0), value=2)
    batch = {"input_ids": source["input_ids"], "decoder_input_ids": start, "labels": labels}
    return batch | ({"attention_mask": source["attention_mask"]} if pad_source else {})


TRANSLATIONS = [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("pad_source", "pad_target"), TRANSLATIONS)
def test_a_decoder_that_looks_at_an_encoder_learns_as_on_one_device(pool, pad_source, pad_target, ranks):
    batch = _translation(pad_source, pad_target)
    expected = _one_device("t5gemma", batch)
    assert_learned(pool(ranks).run(_learn, "t5gemma", batch), *expected, of_model=True)


def test_ranks_of_an_encoder_and_a_decoder_may_exchange_heads(pool):
    batch = _translation(True, False)
    expected = _one_device("t5gemma", batch)
    assert_learned(pool(2).run(_learn, "t5gemma", batch, head_ranks=2), *expected, of_model=True)


def test_what_a_decoder_reads_may_be_left_to_its_labels(pool):
    batch = {key: x for key, x in _translation(True, True).items() if key != "decoder_input_ids"}
    expected = _one_device("t5gemma", batch)
    assert_learned(pool(2).run(_learn, "t5gemma", batch), *expected, of_model=True)


def _learn_alone(name, batch):
    """On this device, whatever other ranks do."""
    model = build(name, "ring")
    with SequenceParallel(model, ONE_DEVICE).alone():
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(("pad_source", "pad_target"), TRANSLATIONS)
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_decoder_that_looks_at_an_encoder_learns_alone_as_eager_does(pool, name, pad_source, pad_target):
    batch = _translation(pad_source, pad_target)
    loss, expected = _one_device(name, batch)
    for found, mine in (_learn_alone(name, batch), *pool(2).run(_learn_alone, name, batch)):
        assert_same_loss(found, loss)
        assert_same_gradients(mine, expected, of_model=True)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5gemma"])
def test_a_decoder_that_looks_at_an_encoder_generates_what_eager_does(name, use_cache):
    batch = {key: x for key, x in _translation(True, False).items() if key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    made = [build(name, kind).eval().generate(**batch, **settings) for kind in ("ring", "eager")]
    assert torch.equal(*made)


def test_a_model_that_counts_positions_itself_is_refused_on_several_ranks(pool):
    for outcome in pool(2).outcomes(_learn, "bart", _translation(False, False)):
        assert isinstance(outcome.error, ArgumentError), outcome.details
        assert "BartForConditionalGeneration takes no position_ids" in str(outcome.error)


def test_positions_and_masks_of_these_models_would_be_seen():
    """What the tests above compare changes with what ranks may get wrong."""
    batch = _translation(True, False)
    loss, _ = _one_device("bart", batch)
    unmasked, _ = _one_device("bart", {key: x for key, x in batch.items() if key != "attention_mask"})
    assert not torch.isclose(loss, unmasked, rtol=50 * LOSS, atol=0)
    batch = _masked(ENCODER_BATCHES["whole"])
    loss, _ = _one_device("modernbert", batch)
    wide, _ = _one_device("modernbert", batch, local_attention=64)
    assert not torch.isclose(loss, wide, rtol=50 * LOSS, atol=0)
