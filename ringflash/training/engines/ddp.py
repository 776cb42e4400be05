"""torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ringflash.configs.schema import OptimizerConfig
from ringflash.training.engines.base import Engine, Read
from ringflash.training.engines.optimizer import MOMENTS, adam_state, adamw, trained
from ringflash.training.model.decoder import Decoder


class DdpEngine(Engine):
    """Everything whole on every rank, fp32 weights."""

    def __init__(self, model: Decoder, config: OptimizerConfig) -> None:
        self.model = model
        self.clip = config.clip
        # Without device_ids, which would move the host's document boundaries to the GPU on every step.
        self._wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.optimizer = adamw(model, config)

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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_([weight for _, weight in trained(self.model)], self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine."""
        for name, weight in trained(self.model):
            yield f"weight/{name}", weight.detach()
            for moment in MOMENTS:
                yield f"{moment}/{name}", self.optimizer.state[weight][moment]

    def load(self, state: Read, step: int) -> None:
        """See Engine."""
        for name, weight in trained(self.model):
            kept = adam_state(weight.detach(), step)
            for moment in MOMENTS:
                kept[moment].copy_(state(f"{moment}/{name}"))
            self.optimizer.state[weight] = kept
