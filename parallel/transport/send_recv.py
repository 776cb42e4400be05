"""Transfers by torch.distributed send and receive: works with gloo and NCCL, on any network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Pending:
    """Transfers under way. Holds on to the tensors they use until `wait`."""

    works: list[dist.Work] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        """Return when the transfers are done (NCCL: when the current stream waits for them)."""
        for work in self.works:
            work.wait()
        self.works.clear()
        self.tensors.clear()


class PointToPoint:
    """Sends and receives between ranks of one process group.

    Args:
        group: the process group.
        device: where the tensors live.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        if device.type == "cuda":
            # NCCL wants every rank in a group's first operation, and a plan may give some ranks nothing to send.
            dist.all_reduce(torch.zeros(1, device=device), group=group)

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """Post all transfers of a stage at once and return without waiting.

        Args:
            sends: (destination rank in the group, contiguous tensor).
            receives: (source rank in the group, contiguous tensor to fill). Between two ranks, tensors are matched in
                the order given.
        """
        operations = [self._operation(dist.irecv, rank, tensor) for rank, tensor in receives if tensor.numel()]
        operations += [self._operation(dist.isend, rank, tensor) for rank, tensor in sends if tensor.numel()]
        if not operations:
            return Pending()
        return Pending(dist.batch_isend_irecv(operations), [operation.tensor for operation in operations])

    def _operation(self, function: object, rank: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(function, tensor, dist.get_global_rank(self.group, rank), self.group)
