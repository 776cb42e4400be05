"""Sharding tensors and batches over the ranks of a group, and putting them together again.

These functions are for a sequence at a time; they make a `ringflash.Sharding` from their arguments. One that is made
once and passed on does all that they do.

Legend: B sequences, S tokens of one sequence over all ranks, s tokens of it on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.agreement.rounds import refuse
from ringflash.parallel.labels import as_int64
from ringflash.parallel.mesh import Group, process_group
from ringflash.parallel.positions.balance import TOKEN_WORK
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import BY_DOCUMENT, Partition
from ringflash.parallel.sharding import Sharding
from ringflash.parallel.transport.select import check_all_alike


def positions(
    seqlen: int, group: Group = None, partition: str | Partition = "zigzag", mask: Mask | None = None
) -> Tensor:
    """Global positions that this rank holds of a sequence, (s,) int64 ascending, on the CPU.

    Args:
        seqlen: S.
        group: as in `DistributedFlashAttention`.
        partition: as in `DistributedFlashAttention`.
        mask: the attention's mask with its documents, which partition "balanced" levels the work for and those of
            each document divide; these alone look at it and must have it, because for another mask they give
            attention the wrong tokens.
    """
    sharding = _of_length(seqlen, group, partition, mask)
    return sharding.partition.positions(sharding.rank)


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
    return _of_length(x.shape[dim], group, partition, mask).shard(x, dim)


def unshard(
    x: Tensor,
    dim: int,
    group: Group = None,
    partition: str | Partition = "zigzag",
    mask: Mask | None = None,
    seqlen: int | None = None,
) -> Tensor:
    """The whole tensor on every rank, from the rows that `shard` gave each. Differentiable.

    The gradient of this rank's rows is the sum over ranks of what each of them sends back for those rows.

    Args:
        x: this rank's rows.
        dim: its sequence dimension, of length s.
        group: as in `shard`.
        partition: as in `shard`.
        mask: as in `shard`.
        seqlen: S; found out from the other ranks if None.
    """
    try:
        ranks = process_group(group)
        if ranks is None or ranks.size() == 1:
            return x
        others = [*x.shape]
        others.pop(dim)
        if seqlen is None:
            seqlen = _summed_over_ranks(x, dim, others, ranks)
        sharding = _of_length(seqlen, group, partition, mask)
    except Exception as error:
        refuse(group, error)
        raise
    return sharding.unshard(x, dim)


def _summed_over_ranks(x: Tensor, dim: int, others: list[int], group: dist.ProcessGroup) -> int:
    """S, from the rows of all ranks."""
    known = {"dtype": str(x.dtype), "dim": dim, "other dimensions": others, "seqlen": None}
    check_all_alike(group, "seqlen", known, x.device)
    tokens = torch.tensor([x.shape[dim]], device=x.device)
    dist.all_reduce(tokens, group=group)
    return int(tokens)


def shard_batch(
    batch: Mapping[str, Tensor | Sequence[int]],
    group: Group = None,
    partition: str | Partition | None = "zigzag",
    mask: Mask | None = None,
    rank: int | None = None,
    ranks: int | None = None,
    head_ranks: int | None = None,
    token_work: int = TOKEN_WORK,
) -> dict[str, Any]:
    """This rank's part of a batch for language-model training; labels are shifted before they are sharded.

    Args:
        batch: "input_ids" (B, S), integers; optionally "labels" (B, S), not shifted, -100 where nothing is to be
            predicted, the input_ids if absent; optionally "cu_seqlens", global document boundaries over the B * S
            tokens laid end to end. Each sequence of the batch starts a document of its own. Tokens behind the last
            boundary, as padding is, belong to none.
        group: as in `ringflash.Sharding`; so is what it refuses in a DataLoader's worker.
        partition: as in `ringflash.Sharding`. None, its own choice, is for models that are given the "sharding":
            attention that is given "cu_seqlens" and "seqlen" instead takes tokens to lie zigzag.
        mask: see `positions`; the documents are added to it.
        rank: as in `ringflash.Sharding`.
        ranks: as in `ringflash.Sharding`.
        head_ranks: as in `ringflash.Sharding`.
        token_work: as in `ringflash.Sharding`.

    Returns:
        "input_ids" (B, s) int64; "labels" (B, s) int64, the next token of the same document, -100 at each document's
        end; "position_ids" (B, s), counted from each document's start; "cu_seqlens" (documents + 1,) int64 on the CPU;
        "seqlen" S; and the "sharding", for `DistributedFlashAttention` in place of the last two.

    Raises:
        ArgumentError: an unknown entry, shapes that do not go together, or a label that is no id and not -100; labels
            on a GPU are left to the loss, which knows the vocabulary too.
    """
    unknown = set(batch) - {"input_ids", "labels", "cu_seqlens"}
    if unknown:
        raise ArgumentError(f"batch has {sorted(unknown)}; allowed are input_ids, labels, cu_seqlens")
    if "input_ids" not in batch:
        raise ArgumentError(f"batch has {sorted(batch)}; input_ids is missing")
    given: Any = batch
    input_ids = as_int64("input_ids", given["input_ids"])
    labels = input_ids if given.get("labels") is None else as_int64("labels", given["labels"])
    if input_ids.dim() != 2 or labels.shape != input_ids.shape or not len(input_ids):
        raise ArgumentError(
            f"input_ids {tuple(input_ids.shape)} and labels {tuple(labels.shape)} must both be (batch, seqlen), of one "
            "sequence and more"
        )
    size, seqlen = input_ids.shape
    sharding = Sharding(
        _known_mask(partition, mask, documents=batch.get("cu_seqlens") is not None),
        batch=size,
        seqlen=seqlen,
        cu_seqlens=batch.get("cu_seqlens"),
        group=group,
        rank=rank,
        ranks=ranks,
        partition=partition,
        head_ranks=head_ranks,
        token_work=token_work,
    )
    return {
        "input_ids": sharding.shard(input_ids, 1),
        "labels": sharding.labels(labels),
        "position_ids": sharding.position_ids.to(input_ids.device),
        "cu_seqlens": sharding.cu_seqlens,
        "seqlen": seqlen,
        "sharding": sharding,
    }


def _of_length(seqlen: int, group: Group, partition: str | Partition, mask: Mask | None) -> Sharding:
    return Sharding(_known_mask(partition, mask), seqlen=seqlen, group=group, partition=partition)


def _known_mask(partition: str | Partition | None, mask: Mask | None, documents: bool = False) -> Mask:
    """The mask, causal if a partition does not look at it; documents may also be known without one."""
    if mask is None and (partition == "balanced" or (partition in BY_DOCUMENT and not documents)):
        raise ArgumentError(f"mask=None with partition={partition!r}; pass the attention's mask, which it looks at")
    return Mask.causal() if mask is None else mask
