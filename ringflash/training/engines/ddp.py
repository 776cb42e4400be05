"""torch's DistributedDataParallel.

Gradients lie in buckets, which DDP lays out anew in the second step, once it has seen in which order they come. NCCL's
process group holds what it sums until somebody waits for that, or until its watchdog, which looks every tenth of a
second, finds it done and another collective begins. DDP waits for futures only, so that the buckets of the first step
were often still there beside those of the second, as many bytes as all gradients. Here each sum is waited for itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ringflash.configs.schema import OptimizerConfig
from ringflash.training.engines.base import Read
from ringflash.training.engines.by_torch import TorchEngine
from ringflash.training.engines.optimizer import trained
from ringflash.training.model.decoder import Decoder


class DdpEngine(TorchEngine):
    """Everything whole on every rank, fp32 weights."""

    def __init__(self, model: Decoder, config: OptimizerConfig) -> None:
        # Without device_ids, which would move the host's document boundaries to the GPU on every step.
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._reductions: list[dist.Work] = []
        # DDP reads annotations, and not those that are strings. What it holds is beyond Python's garbage collection, so
        # the engine must not be in it.
        self._wrapped.register_comm_hook(self._reductions, lambda begun, bucket: _all_reduce(begun, bucket))
        super().__init__(model, config)

    @property
    def wrapped(self) -> nn.Module:
        """The DDP module."""
        return self._wrapped

    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """See Engine; gradients are reduced with the last micro-batch only."""
        self._wrapped.require_backward_grad_sync = last
        loss = self._wrapped(**batch)
        (loss * factor / dist.get_world_size()).backward()
        for work in self._reductions:
            work.wait()
        self._reductions.clear()
        return loss.detach()

    def clip(self) -> Tensor:
        """See TorchEngine."""
        return nn.utils.clip_grad_norm_([weight for _, weight in trained(self.model)], self.highest_norm)

    def stretch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """See TorchEngine; all ranks hold everything, so each writes an equal part of each tensor."""
        size, rank, ranks = math.prod(shape), dist.get_rank(), dist.get_world_size()
        return size * rank // ranks, size * (rank + 1) // ranks

    def flat(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """See TorchEngine."""
        return tensor.flatten()[start:stop]

    def stored(self, read: Read, name: str, weight: nn.Parameter) -> Tensor:
        """See TorchEngine."""
        return read(name).to(weight.device)


def _all_reduce(begun: list[dist.Work], bucket: dist.GradBucket) -> Future[Any]:
    """Sum the gradients of a bucket over all ranks, in place; they are there when what this returns is."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    begun.append(work)
    return work.get_future().then(lambda future: future.value()[0])
