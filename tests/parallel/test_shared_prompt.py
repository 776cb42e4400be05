"""Answers to one prompt, laid behind it once, give what each gives behind a prompt of its own: trees of prefixes.

A node is a stretch of tokens that sees itself, causally, and its ancestors whole. As a mask that is the causal one and
a layout of blocks, as long as nodes begin and end at blocks; where trees are one prompt and its branches, of any
lengths, it is `Mask.shared_prefix`.
"""

from __future__ import annotations

import pytest
import torch
from cases import PARTITIONS, any_shared_prefix, blocks, group_lists
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ringflash import ArgumentError, Mask, Sharding, shard_batch
from ringflash.functional import attention
from ringflash.parallel.positions.visibility import key_intervals

BLOCK = 8
TREES = {
    "one_prompt": [(-1, 3), (0, 2), (0, 1), (0, 2)],
    "two_turns": [(-1, 2), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1)],
}
"""(parent, number of blocks) of each node, in the order in which nodes are laid end to end."""


def _path(tree, node):
    """A node's ancestors and the node."""
    return [] if node < 0 else [*_path(tree, tree[node][0]), node]


def _blocks_of(tree):
    """The node that each block belongs to."""
    return [node for node, (_, blocks) in enumerate(tree) for _ in range(blocks)]


def _mask(tree):
    nodes = _blocks_of(tree)
    return Mask.causal() & Mask.blocks([[key in _path(tree, query) for key in nodes] for query in nodes], BLOCK)


def _inputs(tree):
    generator = torch.Generator().manual_seed(0)
    tokens = BLOCK * len(_blocks_of(tree))
    shapes = [(1, tokens, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v)], dout


def _apart(tree):
    """out, dq, dk, dv of plain torch, for which each node stands behind copies of its ancestors."""
    (q, k, v), dout = _inputs(tree)
    owner = torch.tensor(_blocks_of(tree)).repeat_interleave(BLOCK)
    out = torch.zeros_like(dout)
    for node in range(len(tree)):
        rows = torch.cat([(owner == each).nonzero().flatten() for each in _path(tree, node)])
        alone = [x[:, rows].transpose(1, 2) for x in (q, k, v)]
        own = scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True).transpose(1, 2)
        out = out.index_copy(1, rows[owner[rows] == node], own[:, owner[rows] == node])
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def _together(tree, partition):
    """The same by one call over the ranks, on every rank."""
    whole, dout = _inputs(tree)
    sharding = Sharding(_mask(tree), seqlen=dout.shape[1], partition=partition)
    shares = [sharding.shard(x.detach(), 1).requires_grad_() for x in whole]
    out, _ = attention(*shares, sharding=sharding)
    found = torch.autograd.grad(out, shares, sharding.shard(dout, 1))
    return [sharding.unshard(x.detach(), 1) for x in (out, *found)]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", TREES)
def test_a_tree_of_prefixes_is_computed_once_and_gives_what_its_branches_give_apart(pool, name, ranks, partition):
    expected = _apart(TREES[name])
    for found in pool(ranks).run(_together, TREES[name], partition):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Mask.shared_prefix


def _shared_prefix(groups):
    return Mask.shared_prefix([prompt for prompt, *_ in groups], [lengths for _, *lengths in groups])


def _alone(groups):
    """For each prompt, and each branch behind its prompt: the rows of the packed sequence that would be a sequence."""
    begin = 0
    for prompt, *lengths in groups:
        of_prompt, begin = torch.arange(begin, begin + prompt), begin + prompt
        yield of_prompt, prompt
        for tokens in lengths:
            yield torch.cat([of_prompt, torch.arange(begin, begin + tokens)]), tokens
            begin += tokens


def _operands(length):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, length, heads, 16, generator=generator) for heads in (4, 2, 2, 4)]


def _each_behind_its_own_prompt(groups):
    """out, dq, dk, dv of plain torch, for which each branch stands behind a copy of its prompt."""
    *leaves, dout = _operands(sum(map(sum, groups)))
    leaves, out = [x.requires_grad_() for x in leaves], torch.zeros_like(dout)
    for rows, own in _alone(groups):
        if own:
            alone = [x[:, rows].transpose(1, 2) for x in leaves]
            found = scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True).transpose(1, 2)
            out = out.index_copy(1, rows[-own:], found[:, -own:])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _in_one_call(groups, partition):
    *whole, dout = _operands(sum(map(sum, groups)))
    sharding = Sharding(_shared_prefix(groups), partition=partition)
    shares = [sharding.shard(x, 1).requires_grad_() for x in whole]
    out, _ = attention(*shares, sharding=sharding)
    found = torch.autograd.grad(out, shares, sharding.shard(dout, 1))
    return [sharding.unshard(x.detach(), 1) for x in (out, *found)]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.integers(1, 60).flatmap(group_lists),
    ranks=st.integers(1, 4),
    partition=st.sampled_from([None, *PARTITIONS]),
)
def test_a_shared_prefix_gives_what_each_branch_gives_behind_a_prompt_of_its_own(pool, groups, ranks, partition):
    expected = _each_behind_its_own_prompt(groups)
    for found in pool(ranks).run(_in_one_call, groups, partition):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def _batch(groups, tail):
    """Positions and labels of the whole batch, from the parts of all ranks, and its ids."""
    ids = torch.arange(1, sum(map(sum, groups)) + tail + 1)[None]
    part = shard_batch({"input_ids": ids}, partition=None, mask=_shared_prefix(groups))
    return [part["sharding"].unshard(part[name], 1)[0] for name in ("position_ids", "labels")], ids[0]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(groups=st.integers(1, 40).flatmap(group_lists), tail=st.integers(0, 4), ranks=st.integers(1, 3))
def test_positions_go_on_from_the_prompt_in_each_branch_and_labels_end_with_it(pool, groups, tail, ranks):
    for (position_ids, labels), ids in pool(ranks).run(_batch, groups, tail):
        for rows, own in _alone(groups):
            assert position_ids[rows].tolist() == list(range(len(rows)))
            expected = [*ids[rows[1:]].tolist(), -100][-own:] if own else []
            assert labels[rows[len(rows) - own :]].tolist() == expected
        if tail:
            assert (labels[-tail:] == -100).all()


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(8, 30), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    tile=st.integers(1, 8),
)
def test_a_tile_over_the_edge_of_two_groups_works_on_no_more_than_a_prompt_beside_its_own_branches(groups, tile):
    mask = _shared_prefix(groups)
    positions = torch.arange(mask.boundaries[-1])
    intervals = key_intervals(mask, torch.tensor(mask.boundaries), positions, positions)
    first = positions[::tile]
    last = (first + tile - 1).clamp(max=len(positions) - 1)
    assert (intervals.sink_stop[last] - intervals.sink_start[first]).max() <= max(prompt for prompt, *_ in groups)


def test_documents_within_a_group_count_their_own_tokens_only():
    mask = Mask.shared_prefix([4], [[3, 3]]) & Mask.documents([0, 2, 6, 10])
    assert Sharding(mask, rank=0, ranks=1).position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0, 1, 2]]


def test_without_a_name_branches_are_laid_so_that_ranks_take_equally_long():
    assert "balanced" in repr(Sharding(Mask.shared_prefix([64], [[32] * 4]), rank=0, ranks=2))


def test_masks_of_layers_must_have_the_same_shared_prefix():
    shared = Mask.shared_prefix([4], [[3, 3]])
    Sharding([shared, shared & blocks(10, 10, 2, seed=0)], rank=0, ranks=2)
    for other in (Mask.causal() & Mask.documents([0, 10]), Mask.shared_prefix([3], [[3, 4]])):
        with pytest.raises(ArgumentError, match="masks have different shared prefixes"):
            Sharding([shared, other], rank=0, ranks=2)


@settings(max_examples=20, deadline=None)
@given(mask=any_shared_prefix(24) | st.just(Mask.causal([(2, 9)])))
def test_a_batch_is_not_balanced_by_one_sequence_of_branches_or_spans(mask):
    with pytest.raises(ArgumentError, match="takes one packed sequence, not a batch of 2"):
        Sharding(mask, batch=2, seqlen=12, partition="balanced", rank=0, ranks=2)
