"""torch's FSDP2 (`fully_shard`): weights, gradients and optimizer state are divided among all ranks.

What a model names as parts that run one after another is gathered part by part, the next one while one computes, and
let go of behind it; the rest of the model is there from the beginning of a pass to its end. Weights are fp32, and
gathered in the dtype of the activations.

A block that is computed again in the backward pass is gathered for that once, as for the backward pass itself.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from ringflash.configs.schema import EngineConfig, OptimizerConfig
from ringflash.errors import ArgumentError
from ringflash.training.engines.base import Read
from ringflash.training.engines.by_torch import TorchEngine
from ringflash.training.engines.materialise import Fill, materialise
from ringflash.training.engines.optimizer import trained
from ringflash.training.model.decoder import Decoder

REDUCED = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes in which gradients are summed over the ranks."""


class Fsdp2Engine(TorchEngine):
    """FSDP2 over all ranks."""

    def __init__(
        self, model: Decoder, device: torch.device, fill: Fill, config: EngineConfig, optimizer: OptimizerConfig
    ) -> None:
        """Divide a model that is on the meta device, then give each rank its part of the weights.

        Args:
            model: on the meta device.
            device: this rank's.
            fill: fills a weight.
            config: of the engine.
            optimizer: its settings.

        Raises:
            ArgumentError: a model that names no blocks, all of whose weights would be gathered at once.
        """
        self._device = device
        self._home = torch.device("cpu") if config.offload else device
        self._sharded = _divided(model, device, config)
        materialise(model, device, fill, frozen=model.dtype, part=self._part)
        super().__init__(model, optimizer)

    @property
    def wrapped(self) -> nn.Module:
        """The model, which FSDP2 changes in place."""
        return self.model

    @torch.no_grad()
    def evaluate(self, batch: dict) -> Tensor:
        """See Engine."""
        losses = super().evaluate(batch)
        for module in self._sharded:  # some wait for a backward pass before they let go of their weights
            module.reshard()
        return losses

    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """See Engine; before the last micro-batch each rank keeps gradients of whole weights."""
        self._sharded[-1].set_requires_gradient_sync(last)
        loss = self.model(**batch)
        (loss * factor).backward()
        return loss.detach()

    def clip(self) -> Tensor:
        """See TorchEngine."""
        weights = [weight for _, weight in trained(self.model)]
        gradients = [_local(weight.grad) for weight in weights if weight.grad is not None]
        squares = nn.utils.get_total_norm(gradients).to(self._device).square()
        dist.all_reduce(squares)  # by hand: what is on the host cannot be summed by NCCL
        norm = squares.sqrt()
        nn.utils.clip_grads_with_norm_(weights, self.highest_norm, norm)
        return norm

    def stretch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """See TorchEngine; of the rows of a tensor a rank holds as many as the others, the last ones fewer."""
        rows, row = -(-shape[0] // dist.get_world_size()), math.prod(shape[1:])
        first, last = (min(shape[0], rows * rank) for rank in (dist.get_rank(), dist.get_rank() + 1))
        return first * row, last * row

    def flat(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """See TorchEngine."""
        return _local(tensor).flatten()

    def stored(self, read: Read, name: str, weight: nn.Parameter) -> Tensor:
        """See TorchEngine."""
        found = torch.zeros_like(weight, requires_grad=False)
        self._fill(read, name, found)
        return found

    def load(self, read: Read, step: int, moments: bool) -> None:
        """See Engine; a rank reads of the weights what it holds."""
        for name, weight in trained(self.model):
            self._fill(read, f"weight/{name}", weight.detach())
        super().load(read, step, moments)

    def _fill(self, read: Read, name: str, tensor: Tensor) -> None:
        own = _local(tensor)
        own.copy_(read(name, *self.stretch(tuple(tensor.shape))).view_as(own))

    def _part(self, weight: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's, without a word to the others, who have the whole as well; nothing holds the whole on."""
        like: Any = weight.data
        shared = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        # Not `DTensor.from_local`, which takes what lies on the host to the devices of the mesh.
        own = torch.empty_like(like, dtype=whole.dtype, device=self._home)
        _local(own).copy_(_local(shared))
        return own


def _divided(model: Decoder, device: torch.device, config: EngineConfig) -> list[FSDPModule]:
    """The modules that gather their weights, in the order in which they run, and behind them the model."""
    parts = model.parts()
    if all(len(list(part.parameters())) < 2 for part in parts):  # an embedding is no block
        raise ArgumentError(
            "engine.name=fsdp2: the model names no layers that run one after another, so that all of its weights would "
            "be gathered at once; allowed are ddp, zero1, zero2 and zero3"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Inputs stay as they are: angles of rotary embeddings are fp32 on purpose.
    precision = MixedPrecisionPolicy(model.dtype, REDUCED[config.reduce], cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.offload else OffloadPolicy()
    options: Any = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    for part in parts:
        # The backward pass begins with the last one.
        fully_shard(part, reshard_after_forward=part is not parts[-1], **options)
    sharded: list[Any] = [*parts, fully_shard(model, **options)]
    # Where the host waits, as it does in the first call of attention for a batch, a gather has begun by then. In the
    # backward pass FSDP2 does the same by itself.
    for part, following in itertools.pairwise(sharded[:-1]):
        part.set_modules_to_forward_prefetch([following])
    return sharded


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()
