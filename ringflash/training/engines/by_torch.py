"""What engines share whose weights torch's own optimizers change: DDP and FSDP2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ringflash.configs.schema import OptimizerConfig
from ringflash.training.engines import eight_bit
from ringflash.training.engines.base import Engine, Read
from ringflash.training.engines.optimizer import (
    MOMENTS,
    MUON_MOMENTS,
    adam_state,
    matrices_between,
    optimizers,
    trained,
)
from ringflash.training.model.decoder import Decoder


class TorchEngine(Engine):
    """fp32 weights, which are the optimizer's own; a subclass says what of each a rank has."""

    def __init__(self, model: Decoder, config: OptimizerConfig) -> None:
        """Begin with a model whose parameters have their values.

        Args:
            model: as the engine spreads it over the ranks.
            config: the optimizer's settings.
        """
        self.model = model
        self.highest_norm = config.clip or float("inf")
        self.optimizers = optimizers(model, config)
        between = matrices_between(model).keys()
        self._by_muon = between if config.name == "muon" else set()
        self._in_8_bits = between if config.name == "adamw_8bit" else set()

    @abstractmethod
    def clip(self) -> Tensor:
        """Scale the gradients down to `highest_norm`; returns the norm of all of them before."""

    @abstractmethod
    def whole(self, part: Tensor) -> Tensor:
        """What all ranks together have of a weight or a moment; a collective."""

    @abstractmethod
    def part(self, weight: nn.Parameter, whole: Tensor) -> Tensor:
        """What this rank has of a moment of a weight."""

    def update(self, lr: float) -> Tensor:
        """See Engine."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        norm = self.clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def moments(self, name: str) -> dict[str, tuple[int, ...]]:
        """See Engine."""
        if name in self._in_8_bits:
            return eight_bit.shapes(self._state(name))
        return dict.fromkeys(MUON_MOMENTS if name in self._by_muon else MOMENTS, self.shapes[name])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine."""
        for name, weight in trained(self.model):
            yield f"weight/{name}", self.whole(weight.detach())
            state = self._state(name)
            kept = eight_bit.exported(state) if name in self._in_8_bits else state
            for moment in self.moments(name):
                yield f"{moment}/{name}", self.whole(kept[moment])

    def load(self, state: Read, step: int) -> None:
        """See Engine."""
        for name, weight in trained(self.model):
            kept = {moment: self.part(weight, state(f"{moment}/{name}")) for moment in self.moments(name)}
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
