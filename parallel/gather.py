"""The rows of all ranks put together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash.errors import ArgumentError
from ringflash.parallel.agreement.rounds import agreement
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.transport.select import check_all_alike


def gather_rows(x: Tensor, dim: int, partition: Partition, group: dist.ProcessGroup | None) -> Tensor:
    """The whole tensor on every rank. Differentiable: the gradient of this rank's rows is the sum over ranks.

    Args:
        x: this rank's rows.
        dim: its sequence dimension.
        partition: which positions each rank holds.
        group: the ranks; None for one.

    Raises:
        ArgumentError: x has another number of rows than the partition gives this rank.
        RankMismatchError: ranks disagree on what they gather.
    """
    if group is None:
        return x
    try:
        others = [*x.shape]
        others.pop(dim)
        surplus = x.shape[dim] - partition.count(group.rank())
    except Exception as error:
        agreement(group).refuse(error)
        raise
    known = {
        "dtype": str(x.dtype),
        "dim": dim,
        "other dimensions": others,
        "seqlen": partition.length,
        "partition": partition.digest.hex(),
        "surplus rows": surplus,
    }
    check_all_alike(group, "unshard", known, x.device)
    if surplus:
        raise ArgumentError(
            f"x has {x.shape[dim]} rows in dimension {dim}; its partition of {partition.length} tokens gives rank "
            f"{group.rank()} {x.shape[dim] - surplus}"
        )
    return _Gather.apply(x, dim, group, partition)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: dist.ProcessGroup, partition: Partition) -> Tensor:  # noqa: ANN001
        ctx.dim, ctx.group, ctx.partition = dim, group, partition
        rows = x.movedim(dim, 0).contiguous()
        counts = partition.counts()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded, group=group)
        whole = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
        held = torch.cat([partition.positions(rank) for rank in range(partition.ranks)])
        return whole[held.argsort().to(x.device)].movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # torch's `*grads`: one here
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN001
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may hold what autograd handed us
        dist.all_reduce(gradient, group=ctx.group)
        mine = ctx.partition.positions(ctx.group.rank()).to(gradient.device)
        return gradient.index_select(ctx.dim, mine), None, None, None
