"""Transfers by torch.distributed send and receive: works with gloo and NCCL, on any network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor


class Ticket:
    """Transfers under way. Holds on to the tensors they use until `wait`."""

    def __init__(self, works: list[dist.Work], tensors: list[Tensor], what: str) -> None:
        self._works, self._tensors, self._what = works, tensors, what

    def wait(self) -> None:
        """Return when the transfers are done (NCCL: when the current stream waits for them)."""
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            error.add_note(f"while ranks transferred {self._what}")
            raise
        self._works, self._tensors = [], []


class SendRecv:
    """Sends and receives between ranks of one process group.

    Args:
        group: the process group.
    """

    shelf = None

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)  # a transport lives as long as its group, which must not live for it
        self._global_rank = [dist.get_global_rank(group, rank) for rank in range(group.size())]

    def transfer(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        what: str,
        first: bool = False,
    ) -> Ticket:
        """See `Transport`."""
        operations = [self._operation(dist.irecv, rank, tensor) for rank, tensor in receives if tensor.numel()]
        operations += [self._operation(dist.isend, rank, tensor) for rank, tensor in sends if tensor.numel()]
        if not operations:
            return Ticket([], [], what)
        return Ticket(dist.batch_isend_irecv(operations), [operation.tensor for operation in operations], what)

    def _operation(self, function: Callable, rank: int, tensor: Tensor) -> dist.P2POp:
        return dist.P2POp(function, tensor, self._global_rank[rank], self._group())
