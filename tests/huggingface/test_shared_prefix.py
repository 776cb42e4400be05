"""A model that is given a sharding of prompts and their branches learns what each branch teaches behind its prompt."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from families import VOCABULARY, build
from learning import assert_same_gradients
from torch.nn.functional import cross_entropy

from ringflash import ArgumentError, Mask, shard_batch

GROUPS = [(9, 4, 0, 7), (5, 6, 6)]
IDS = torch.randint(VOCABULARY, (1, 37), generator=torch.Generator().manual_seed(0))


def _mask():
    return Mask.shared_prefix([prompt for prompt, *_ in GROUPS], [lengths for _, *lengths in GROUPS])


def _learn_apart():
    """Each prompt once, and each branch behind it, with the mean over all tokens that have a next one of their own."""
    model, losses, begin = build("llama", "eager"), [], 0
    for prompt, *lengths in GROUPS:
        first, begin = IDS[:, begin : begin + prompt], begin + prompt
        losses.append(_losses(model, first)[: prompt - 1])
        for tokens in lengths:
            alone, begin = torch.cat([first, IDS[:, begin : begin + tokens]], 1), begin + tokens
            losses.append(_losses(model, alone)[prompt:])
    torch.cat(losses).mean().backward()
    return torch.cat(losses).mean().item(), {name: x.grad for name, x in model.named_parameters()}


def _losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def _learn_together(partition):
    model = build("llama", "ring")
    part = shard_batch({"input_ids": IDS}, partition=partition, mask=_mask())
    whole = part["sharding"].shifted_labels(IDS)
    named = {name: part[name] for name in ("input_ids", "position_ids", "sharding")}
    logits = model(**named, use_cache=False).logits
    loss = cross_entropy(logits[0], part["labels"][0], reduction="sum") / (whole != -100).sum()
    loss.backward()
    sums = {name: x.grad for name, x in model.named_parameters()}
    total = loss.detach()
    if dist.is_initialized():
        for x in (total, *sums.values()):
            dist.all_reduce(x)
    return total.item(), sums


@pytest.mark.parametrize(("ranks", "partition"), [(1, None), (2, None), (3, "zigzag")])
def test_a_llama_learns_from_branches_together_what_it_learns_from_each_behind_its_prompt(pool, ranks, partition):
    loss, gradients = _learn_apart()
    for found, of_ranks in pool(ranks).run(_learn_together, partition):
        assert found == pytest.approx(loss, abs=1e-5)
        assert_same_gradients(of_ranks, gradients)


def test_a_layer_with_a_window_refuses_branches_by_name():
    part = shard_batch({"input_ids": IDS}, partition=None, mask=_mask())
    named = {name: part[name] for name in ("input_ids", "position_ids", "sharding")}
    with pytest.raises(ArgumentError, match="cannot intersect shared_prefix with sliding_window"):
        build("mistral", "ring")(**named, use_cache=False)
