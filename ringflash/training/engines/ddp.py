"""torch's DistributedDataParallel."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ringflash.configs.schema import OptimizerConfig
from ringflash.training.engines import eight_bit
from ringflash.training.engines.base import Engine, Piece, Read
from ringflash.training.engines.optimizer import (
    MOMENTS,
    MUON_MOMENTS,
    adam_state,
    matrices_between,
    optimizers,
    trained,
)
from ringflash.training.model.decoder import Decoder


class DdpEngine(Engine):
    """Everything whole on every rank, fp32 weights."""

    def __init__(self, model: Decoder, config: OptimizerConfig) -> None:
        self.model = model
        self.clip = config.clip
        # Without device_ids, which would move the host's document boundaries to the GPU on every step.
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizers = optimizers(model, config)
        between = matrices_between(model).keys()
        self._by_muon = between if config.name == "muon" else set()
        self._in_8_bits = between if config.name == "adamw_8bit" else set()

    @property
    def wrapped(self) -> nn.Module:
        """The DDP module."""
        return self._wrapped

    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """See Engine; gradients are reduced with the last micro-batch only."""
        self._wrapped.require_backward_grad_sync = last
        loss = self._wrapped(**batch)
        (loss * factor).backward()
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_([weight for _, weight in trained(self.model)], self.clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def moments(self, name: str) -> dict[str, tuple[int, ...]]:
        """See Engine."""
        if name in self._in_8_bits:
            return eight_bit.shapes(self._state(name))
        return dict.fromkeys(MUON_MOMENTS if name in self._by_muon else MOMENTS, self.shapes[name])

    def pieces(self) -> Iterator[Piece]:
        """See Engine; all ranks hold everything, so each writes an equal part of each tensor."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        for name, shape in self.sizes().items():
            size = math.prod(shape)
            start, stop = size * rank // ranks, size * (rank + 1) // ranks
            if start < stop:
                yield Piece(name, start, stop - start, functools.partial(self._part, name, start, stop))

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        kind, _, parameter = name.partition("/")
        if kind == "weight":
            whole = self.model.get_parameter(parameter).detach()
        else:
            state = self._state(parameter)
            whole = (eight_bit.exported(state) if parameter in self._in_8_bits else state)[kind]
        return whole.flatten()[start:stop]

    def load(self, read: Read, step: int, moments: bool) -> None:
        """See Engine; everything is read whole."""
        if not moments:
            return
        for name, weight in trained(self.model):
            kept = {moment: read(f"{moment}/{name}").to(weight.device) for moment in self.moments(name)}
            if name in self._in_8_bits:
                eight_bit.restore(self._state(name), kept, step)
            elif name in self._by_muon:
                self._optimizer(name).state[weight] = kept
            else:
                self._optimizer(name).state[weight] = adam_state(weight.detach(), step) | kept

    def _optimizer(self, name: str) -> Optimizer:
        return self.optimizers[0 if name in self._by_muon or name in self._in_8_bits else -1]

    def _state(self, name: str) -> dict[str, Any]:
        return self._optimizer(name).state[self.model.get_parameter(name)]
