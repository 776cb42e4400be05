"""Transfers by torch.distributed send and receive: works with gloo and NCCL, on any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor


class Ticket:
    """Transfers under way. Holds on to the tensors they use until `wait`."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Return when the transfers are done (NCCL: when the current stream waits for them)."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []


class SendRecv:
    """Sends and receives between ranks of one process group.

    Args:
        group: the process group.
        members: its ranks that are reached, which are then numbered from 0 on; all of them if None.
    """

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int] | None = None) -> None:
        self._group = group
        members = range(group.size()) if members is None else members
        self._global_rank = [dist.get_global_rank(group, rank) for rank in members]

    def transfer(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Ticket:
        """Post all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination among the members, contiguous tensor).
            receives: (source among the members, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
        """
        operations = [self._operation(dist.irecv, rank, tensor) for rank, tensor in receives if tensor.numel()]
        operations += [self._operation(dist.isend, rank, tensor) for rank, tensor in sends if tensor.numel()]
        if not operations:
            return Ticket([], [])
        return Ticket(dist.batch_isend_irecv(operations), [operation.tensor for operation in operations])

    def _operation(self, function: Callable, rank: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(function, tensor, self._global_rank[rank], self._group)
