"""Calls that are not sharded: on one device, and of every rank for itself within `SequenceParallel.alone`."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from batches import KINDS, draw, learn_alone, packed, padded
from families import WINDOW, build
from learning import GRADIENT, assert_same_loss
from transformers import DynamicCache, StaticCache

from ringflash import ArgumentError
from ringflash.transformers import SequenceParallel

FAMILIES = ("llama", "mistral", "gemma2", "gpt_oss", "llama4")
NEW = 8
"""Tokens that are generated: with them chunks of Llama 4 and windows are left behind."""

CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


def _prompts(seed=0):
    """Two prompts, longer than the windows, of which one is padded on the left."""
    batch = padded(draw(2 * WINDOW + 3, 2 * WINDOW - 2, seed=seed), "left").batch
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def _generate(model, batch, cache, **options):
    """Tokens (B, NEW) and their logits (B, NEW, V), the likeliest each time."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | CACHES[cache] | options
    made = model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)
    return made.sequences[:, batch["input_ids"].shape[1] :], torch.stack(made.logits, 1)


@lru_cache(maxsize=4)
def _eager(family, seed=0):
    return _generate(build(family, "eager").eval(), _prompts(seed), "dynamic")


def _assert_same_logits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=GRADIENT * expected.abs().max().item())


def _assert_same_text(found, expected):
    assert torch.equal(found[0], expected[0])
    _assert_same_logits(found[1], expected[1])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_device_generates_what_eager_does(family, cache):
    _assert_same_text(_generate(build(family, "ring").eval(), _prompts(), cache), _eager(family))


def _generate_alone(family, cache):
    model = build(family, "ring").eval()
    sequence = SequenceParallel(model)
    with sequence.alone():
        return _generate(model, _prompts(dist.get_rank()), cache)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_alone_generate_for_prompts_of_their_own(pool, family, cache):
    for rank, found in enumerate(pool(2).run(_generate_alone, family, cache)):
        _assert_same_text(found, _eager(family, rank))


def test_several_beams_are_kept_apart():
    options = {"num_beams": 3, "num_return_sequences": 3}
    batch = _prompts()
    texts = [build("llama", name).eval().generate(**batch, max_new_tokens=NEW, **options) for name in ("eager", "ring")]
    assert torch.equal(*texts)


def _in_parts(family, attn_implementation, static):
    """Logits of a prompt in two parts, then of single tokens: queries stand behind what the cache holds."""
    model = build(family, attn_implementation).eval()
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
    (ids,) = draw(2 * WINDOW + 9)
    parts = ids[None].split([WINDOW + 2, WINDOW + 3, 1, 1, 1, 1], 1)
    with torch.no_grad():
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4"])
def test_a_cache_may_be_filled_in_several_calls(family, static):
    _assert_same_logits(_in_parts(family, "ring", static), _in_parts(family, "eager", static))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_of_chunks_that_let_tokens_go_takes_one_query_at_a_time(static):
    with pytest.raises(ArgumentError, match=r"one query at a time"):
        _in_parts("llama4", "ring", static)


# Without a cache


def _without_targets(documents):
    return {key: x for key, x in documents.batch.items() if key != "labels"}


def _real_logits(model, documents):
    """Logits of the real tokens of an un-sharded call."""
    batch = _without_targets(documents)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        return model(**batch, use_cache=False).logits[real]


def _alone_logits(model, documents):
    with torch.no_grad():
        return torch.cat([model(input_ids=x[None], use_cache=False).logits[0] for x in documents.ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_one_device_sees_each_document_alone(family, kind):
    documents = KINDS[kind]()
    _assert_same_logits(
        _real_logits(build(family, "ring"), documents), _alone_logits(build(family, "eager"), documents)
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "packed" not in kind])
def test_one_device_does_what_eager_does_with_llama_4(kind):
    """Its temperature counts tokens of a row, not of a document."""
    documents = KINDS[kind]()
    found, expected = (_real_logits(build("llama4", name), documents) for name in ("ring", "eager"))
    _assert_same_logits(found, expected)


def _packed_alone():
    documents = packed([draw(17, 9, 14, seed=dist.get_rank())], boundaries=False)
    model = build("mistral", "ring")
    with SequenceParallel(model).alone():
        return _real_logits(model, documents)


def test_ranks_alone_see_each_packed_document_alone(pool):
    for rank, found in enumerate(pool(2).run(_packed_alone)):
        documents = packed([draw(17, 9, 14, seed=rank)], boundaries=False)
        _assert_same_logits(found, _alone_logits(build("mistral", "eager"), documents))


def _evaluate_between_steps():
    """Loss of a sharded step, of a batch alone, and of the sharded step again."""
    model = build("gemma2", "ring")
    sequence = SequenceParallel(model)
    documents = KINDS["right_padded"]()
    losses = []
    for alone in (False, True, False):
        if alone:
            with sequence.alone():
                losses.append(model(**documents.batch, use_cache=False).loss.detach())
        else:
            losses.append(sequence.reported(model(**sequence.shard(documents.batch), use_cache=False).loss))
    return losses


def test_evaluation_between_steps_leaves_both_as_they_are(pool):
    expected = learn_alone(build("gemma2", "eager"), KINDS["right_padded"]())
    for losses in pool(2).run(_evaluate_between_steps):
        for loss in losses:
            assert_same_loss(loss, expected)


def _one_rank_alone():
    """Rank 0 evaluates alone while the others go on."""
    model = build("llama", "ring").eval()
    sequence = SequenceParallel(model)
    if dist.get_rank() == 0:
        with sequence.alone():
            return _generate(model, _prompts(), "dynamic")
    return None


def test_one_rank_may_work_alone_while_the_others_do_not(pool):
    _assert_same_text(pool(2).run(_one_rank_alone)[0], _eager("llama"))
