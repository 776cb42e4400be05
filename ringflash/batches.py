"""Dealing tensors and batches to the ranks of a group, and putting them together again.

Legend: B sequences, S tokens of one sequence over all ranks, s tokens of it on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.agreement.agreement import agreement, errors_told, signature
from ringflash.parallel.mesh import Group, group_rank, group_size, process_group
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition, resolve

IGNORED_LABEL = -100
"""Label of a token that has no next token in its document; torch's cross entropy skips it."""


def positions(
    seqlen: int, group: Group = None, partition: str | Partition = "zigzag", mask: Mask | None = None
) -> Tensor:
    """Global positions that this rank holds of a sequence, (s,) int64 ascending, on the CPU.

    Args:
        seqlen: S.
        group: as in `DistributedFlashAttention`.
        partition: as in `DistributedFlashAttention`.
        mask: the attention's mask with its documents, which partition "balanced" levels the work for; that partition
            alone looks at it and must have it, because another mask's deal would give attention the wrong tokens.
    """
    return _resolve(seqlen, group, partition, mask).positions(group_rank(group))


def shard(
    x: Tensor, dim: int, group: Group = None, partition: str | Partition = "zigzag", mask: Mask | None = None
) -> Tensor:
    """This rank's rows of a tensor that every rank holds whole. Differentiable.

    Args:
        x: any tensor.
        dim: its sequence dimension, of length S.
        group: as in `DistributedFlashAttention`.
        partition: as in `DistributedFlashAttention`.
        mask: see `positions`.

    Returns:
        The same tensor with s rows in `dim`.
    """
    return x.index_select(dim, positions(x.shape[dim], group, partition, mask).to(x.device))


def unshard(
    x: Tensor,
    dim: int,
    group: Group = None,
    partition: str | Partition = "zigzag",
    mask: Mask | None = None,
    seqlen: int | None = None,
) -> Tensor:
    """The whole tensor on every rank, from the rows that `shard` dealt. Differentiable.

    The gradient of this rank's rows is the sum over ranks of what each of them sends back for those rows.

    Args:
        x: this rank's rows.
        dim: its sequence dimension, of length s.
        group: as in `shard`.
        partition: as in `shard`.
        mask: as in `shard`.
        seqlen: S; found out from the other ranks if None.
    """
    ranks = process_group(group)
    if ranks is None or ranks.size() == 1:
        return x
    with errors_told(ranks):
        others = [*x.shape]
        others.pop(dim)
    known = {"dtype": str(x.dtype), "dim": dim, "other dimensions": others, "seqlen": seqlen}
    agreement(ranks).check(signature(known))
    if seqlen is None:
        tokens = torch.tensor([x.shape[dim]], device=x.device)
        dist.all_reduce(tokens, group=ranks)
        seqlen = int(tokens)
    with errors_told(ranks):
        deal = _resolve(seqlen, group, partition, mask)
    surplus = x.shape[dim] - deal.counts()[ranks.rank()]
    agreement(ranks).check(signature({"partition": deal.spec(), "surplus rows": surplus}))
    if surplus:
        raise ArgumentError(
            f"x has {x.shape[dim]} rows in dimension {dim}; partition {partition!r} of {seqlen} tokens gives rank "
            f"{ranks.rank()} {x.shape[dim] - surplus}"
        )
    return _Unshard.apply(x, dim, ranks, deal)


def shard_batch(
    batch: Mapping[str, Tensor | Sequence[int]],
    group: Group = None,
    partition: str | Partition = "zigzag",
    mask: Mask | None = None,
) -> dict[str, Tensor | int]:
    """This rank's part of a batch for language-model training; labels are shifted before they are dealt.

    Args:
        batch: "input_ids" (B, S); optionally "labels" (B, S), not shifted, the input_ids if absent; optionally
            "cu_seqlens", global document boundaries over the B * S tokens laid end to end. Each sequence of the batch
            starts a document of its own.
        group: as in `DistributedFlashAttention`.
        partition: as in `DistributedFlashAttention`.
        mask: see `positions`; the documents are added to it.

    Returns:
        "input_ids" (B, s); "labels" (B, s), the next token of the same document, -100 at each document's end;
        "position_ids" (B, s), counted from each document's start; "cu_seqlens" (documents + 1,) int64 on the CPU, for
        `DistributedFlashAttention`; "seqlen" S.

    Raises:
        ArgumentError: an unknown entry, or shapes that do not go together.
    """
    unknown = set(batch) - {"input_ids", "labels", "cu_seqlens"}
    if unknown:
        raise ArgumentError(f"batch has {sorted(unknown)}; allowed are input_ids, labels, cu_seqlens")
    if "input_ids" not in batch:
        raise ArgumentError(f"batch has {sorted(batch)}; input_ids is missing")
    input_ids = batch["input_ids"]
    labels = input_ids if batch.get("labels") is None else batch["labels"]
    if input_ids.dim() != 2 or labels.shape != input_ids.shape:
        raise ArgumentError(
            f"input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)} must both be (batch, seqlen)"
        )
    size, seqlen = input_ids.shape
    documents = Mask.documents([i * seqlen for i in range(size + 1)])
    if batch.get("cu_seqlens") is not None:
        documents = documents & Mask.documents(batch["cu_seqlens"])
    rules = _balanced_mask(partition, mask) & documents
    boundaries = torch.tensor(rules.boundaries)
    deal = resolve(partition, seqlen, group_size(group), rules, batch=size)
    mine = deal.positions(group_rank(group)).to(input_ids.device)
    return {
        "input_ids": input_ids.index_select(1, mine),
        "labels": _next_tokens(labels, boundaries).index_select(1, mine),
        "position_ids": _positions_in_document(boundaries, size, seqlen).to(input_ids.device).index_select(1, mine),
        "cu_seqlens": boundaries,
        "seqlen": seqlen,
    }


def _resolve(seqlen: int, group: Group, partition: str | Partition, mask: Mask | None) -> Partition:
    return resolve(partition, seqlen, group_size(group), _balanced_mask(partition, mask))


def _balanced_mask(partition: str | Partition, mask: Mask | None) -> Mask:
    if mask is None and partition == "balanced":
        raise ArgumentError("mask=None with partition='balanced'; pass the attention's mask, whose work is levelled")
    return Mask.causal() if mask is None else mask


def _next_tokens(labels: Tensor, boundaries: Tensor) -> Tensor:
    flat = labels.flatten()
    following = torch.cat([flat[1:], flat.new_full((1,), IGNORED_LABEL)])
    last = boundaries[1:][boundaries.diff() > 0] - 1
    following[last.to(flat.device)] = IGNORED_LABEL
    return following.view_as(labels)


def _positions_in_document(boundaries: Tensor, size: int, seqlen: int) -> Tensor:
    flat = torch.arange(size * seqlen)
    document = torch.searchsorted(boundaries, flat, right=True) - 1
    return (flat - boundaries[document]).view(size, seqlen)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup, deal: Partition) -> Tensor:  # noqa: ANN001
        ctx.dim, ctx.group, ctx.deal = dim, group, deal
        rows = x.movedim(dim, 0).contiguous()
        counts = deal.counts()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        whole = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
        dealt = torch.cat([deal.positions(rank) for rank in range(deal.ranks)])
        return whole[dealt.argsort().to(x.device)].movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN001
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold what autograd handed us
        dist.all_reduce(gradient, group=ctx.group)
        mine = ctx.deal.positions(ctx.group.rank()).to(gradient.device)
        return gradient.index_select(ctx.dim, mine), None, None, None
