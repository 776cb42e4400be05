"""Every family of models learns on ranks what one device learns from the same documents, however they are batched."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from batches import KINDS, gradients, learn_alone, learn_together
from families import FAMILIES, build
from learning import LOSS, assert_learned, learn_family

COUNTS_TOKENS_OF_ROWS = ("llama4",)
"""For its temperature, whatever position_ids say: eager's batch is the truth, and not each document alone."""


@lru_cache(maxsize=len(KINDS))
def _one_device(family, kind):
    model = build(family, "eager")
    learn = learn_together if family in COUNTS_TOKENS_OF_ROWS else learn_alone
    return learn(model, KINDS[kind]()), gradients(model)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_learn_what_one_device_learns_from_each_document(pool, family, kind, ranks):
    assert_learned(pool(ranks).run(learn_family, family, KINDS[kind]().batch), *_one_device(family, kind))


@pytest.mark.parametrize(("ranks", "head_ranks"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss", "deepseek_v3", "llama4"])
def test_ranks_that_exchange_heads_learn_the_same(pool, family, ranks, head_ranks):
    """Windows, softcaps, sinks, values of another size, chunks; padding; more ranks than key heads."""
    kind = "left_padded"
    results = pool(ranks).run(learn_family, family, KINDS[kind]().batch, head_ranks=head_ranks)
    assert_learned(results, *_one_device(family, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_loss_is_the_same(pool, family):
    kind = "packed_by_positions"
    results = pool(2).run(learn_family, family, KINDS[kind]().batch, fused=True)
    assert_learned(results, *_one_device(family, kind))


UNWINDOWED = {"layer_types": ["full_attention"] * 2}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
WITHOUT = [
    ("llama_dynamic_rope", PLAIN_ROPE),
    ("qwen2", UNWINDOWED),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"sliding_window": None}),
    ("gemma2", UNWINDOWED),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma3", UNWINDOWED),
    ("gpt_oss", UNWINDOWED),
    ("llama4", {"attention_chunk_size": 256}),
    ("llama4", {"attn_temperature_tuning": False}),
    ("llama4", {"no_rope_layers": [1] * 4}),
    ("phi3", {"sliding_window": None}),
    ("phi3_long_rope", PLAIN_ROPE),
    ("smollm3", {"no_rope_layers": [1] * 4}),
    ("cohere2", UNWINDOWED),
    ("olmo3", UNWINDOWED),
    ("granite", {"attention_multiplier": 8**-0.5}),
    ("starcoder2", {"sliding_window": None}),
    ("exaone4", UNWINDOWED),
]
"""What a family has that others have not, left out."""


def _loss(family, **changes):
    return learn_alone(build(family, "eager", **changes), KINDS["one_document"]())


@pytest.mark.parametrize(("family", "changes"), WITHOUT)
def test_a_feature_left_out_would_be_seen(family, changes):
    assert not torch.isclose(_loss(family, **changes), _loss(family), rtol=50 * LOSS, atol=0)


def test_sinks_left_out_would_be_seen():
    model = build("gpt_oss", "eager")
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)
    loss = learn_alone(model, KINDS["one_document"]())
    assert not torch.isclose(loss, _loss("gpt_oss"), rtol=50 * LOSS, atol=0)
