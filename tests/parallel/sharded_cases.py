"""Shards a case of attention_cases.py to the ranks of a pool and puts their results together again.

As in ring.py, shares are cut and joined by the partition's own segments, not by `ringflash.shard`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from attention_cases import Answer, Case, Tensors, assert_as_exact_as_torch, solve, tensors
from cases import PARTITIONS
from hypothesis import strategies as st
from torch import Tensor

from ringflash.functional import attention
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import resolve


@dataclass(frozen=True)
class ShardedCase:
    """A case, and how it reaches the ranks.

    Attributes:
        dense: the case's documents, all alike, are a batch; otherwise one packed sequence.
        boundaries: how those of a packed sequence are given: "list", "tensor", or with the "mask".
        head_ranks: as in `attention`.
    """

    case: Case
    dense: bool
    partition: str = "zigzag"
    boundaries: str = "list"
    head_ranks: int | None = 1

    @property
    def batch(self) -> int:
        return len(self.case.lengths) if self.dense else 1

    @property
    def documents(self) -> Mask:
        """The boundaries of a packed sequence; cross attention has two."""
        queries, keys = self.case.edges()
        return Mask.bidirectional() if self.dense else Mask.documents(keys, None if queries == keys else queries)

    def rows(self, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
        """Places in each sequence of the queries and of the keys that a rank holds."""
        mask = self.case.rules.mask() & self.documents
        any_sharding = (
            resolve(self.partition, n // self.batch, ranks, mask) for n in (self.case.queries, self.case.keys)
        )
        return tuple(deal.positions(rank) for deal in any_sharding)

    def share(self, rank: int, ranks: int) -> Tensors:
        """A rank's tensors, with a dimension of the batch: query, key, value and dout (B, s, ...), dlse (B, H, s)."""
        whole, (query_rows, key_rows) = tensors(self.case), self.rows(rank, ranks)

        def cut(x: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if x is None else x.unflatten(0, (self.batch, x.shape[0] // self.batch))[:, rows]

        return replace(
            whole,
            **{name: cut(getattr(whole, name), query_rows) for name in ("query", "dout")},
            **{name: cut(getattr(whole, name), key_rows) for name in ("key", "value", "padding")},
            dlse=cut(whole.dlse.T, query_rows).transpose(1, 2),
        )

    def attend(self, share: Tensors) -> Callable[..., tuple[Tensor, Tensor]]:
        """`attention` of a share's query, key, value and sinks."""
        case, documents = self.case, self.documents
        edges = (documents.boundaries, documents.query_boundaries)
        if self.boundaries == "tensor":
            edges = tuple(None if x is None else torch.tensor(x) for x in edges)
        mask = case.rules.mask()
        if self.boundaries == "mask":
            mask, edges = mask & documents, (None, None)

        def call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
            return attention(
                query,
                key,
                value,
                mask=mask,
                cu_seqlens=edges[0],
                query_cu_seqlens=edges[1],
                seqlen=case.queries // self.batch,
                key_seqlen=case.keys // self.batch,
                partition=self.partition,
                head_ranks=self.head_ranks,
                scale=case.scale,
                softcap=case.softcap,
                alibi_slopes=share.slopes,
                dropout=case.dropout,
                dropout_seed=share.dropout_seed,
                key_padding_mask=share.padding,
                sinks=sinks,
            )

        return call

    def joined(self, shares: Sequence[Answer]) -> Answer:
        """The whole answer, in flat form, from those of all ranks."""

        def join(parts: Sequence[Tensor], side: int) -> Tensor:
            tokens = (self.case.queries, self.case.keys)[side] // self.batch
            whole = parts[0].new_full((self.batch, tokens, *parts[0].shape[2:]), torch.nan)
            for rank, part in enumerate(parts):
                whole[:, self.rows(rank, len(parts))[side]] = part
            return whole.flatten(0, 1)

        out, lse, dquery, dkey, dvalue, *dsinks = zip(*shares, strict=True)
        return (
            join(out, 0),
            join([x.transpose(1, 2) for x in lse], 0).T,
            join(dquery, 0),
            join(dkey, 1),
            join(dvalue, 1),
            *(sum(parts) for parts in dsinks),  # each rank has its queries' part of a sum
        )


def solve_share(sharded: ShardedCase) -> Answer:
    """This rank's answer; the body that every rank runs."""
    share = sharded.share(dist.get_rank(), dist.get_world_size())
    out, lse, *gradients = solve(sharded.attend(share), share)
    assert out.dtype == share.query.dtype
    assert lse.dtype == torch.float32
    return out, lse, *gradients


def assert_ranks_are_as_exact_as_torch(pool: Callable, ranks: int, sharded: ShardedCase) -> None:
    """Out, log-sum-exp and every gradient, by the rule of attention_cases.py."""
    found = sharded.joined(pool(ranks).run(solve_share, sharded))
    assert_as_exact_as_torch(found, sharded.case, tensors(sharded.case))


@st.composite
def any_sharding(draw: st.DrawFn, case: Case, dense: bool) -> ShardedCase:
    """A case sharded in any way; "balanced" takes self-attention."""
    same = all(queries == keys for queries, keys in case.lengths)
    partition = draw(st.sampled_from(PARTITIONS if same else PARTITIONS[:2]))
    return ShardedCase(case, dense, partition, draw(st.sampled_from(["list", "tensor", "mask"])))
