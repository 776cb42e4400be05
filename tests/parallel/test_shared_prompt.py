"""Answers to one prompt, laid behind it once, give what each gives behind a prompt of its own: trees of prefixes.

A node is a stretch of tokens that sees itself, causally, and its ancestors whole. As a mask that is the causal one and
a layout of blocks, as long as nodes begin and end at blocks.
"""

from __future__ import annotations

import pytest
import torch
from cases import PARTITIONS
from torch.nn.functional import scaled_dot_product_attention

from ringflash import Mask, Sharding
from ringflash.functional import attention

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
