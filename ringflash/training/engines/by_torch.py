"""What engines share whose weights torch's own optimizers change: DDP and FSDP2."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
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
    def stretch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Which elements of a flattened weight or moment this rank writes, of those that it has."""

    @abstractmethod
    def flat(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """These elements of a weight or moment as this rank has it."""

    @abstractmethod
    def stored(self, read: Read, name: str, weight: nn.Parameter) -> Tensor:
        """A moment of a weight from a checkpoint, as this rank is to have it."""

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

    def pieces(self) -> Iterator[Piece]:
        """See Engine."""
        for name, shape in self.sizes().items():
            start, stop = self.stretch(shape)
            if start < stop:
                yield Piece(name, start, stop - start, functools.partial(self._elements, name, start, stop))

    def _elements(self, name: str, start: int, stop: int) -> Tensor:
        kind, _, parameter = name.partition("/")
        if kind == "weight":
            return self.flat(self.model.get_parameter(parameter).detach(), start, stop)
        state = self._state(parameter)
        kept = eight_bit.exported(state) if parameter in self._in_8_bits else state
        return self.flat(kept[kind], start, stop)

    def load(self, read: Read, step: int, moments: bool) -> None:
        """See Engine."""
        for name, weight in trained(self.model) if moments else ():
            kept = {moment: self.stored(read, f"{moment}/{name}", weight) for moment in self.moments(name)}
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
