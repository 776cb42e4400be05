"""What an engine is: a model with its optimizer, spread over the ranks.

All engines treat all ranks, data and sequence alike, as one data-parallel group. A rank's gradient is that of
`local loss sum / valid tokens of the whole step * ranks`, and the engine averages over ranks: the result is the
gradient of the mean loss over all tokens of the step, whatever the sharding, the accumulation and the engine.

An engine's state is fp32 tensors by parameter name. Each rank exports pieces of them, and imports what it holds by
name and range: a checkpoint of any engine on any number of ranks continues on any other, and never passes through one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringflash.loss import valid_tokens
from ringflash.training.engines.optimizer import MOMENTS
from ringflash.training.model.decoder import Decoder


class Read(Protocol):
    """Reads an fp32 tensor of a checkpoint, onto the CPU."""

    def __call__(self, name: str, start: int | None = None, stop: int | None = None) -> Tensor:
        """By name (`weight/<parameter>`, `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`, or Muon's).

        Args:
            name: of the tensor.
            start: first element of the flattened tensor that is wanted; None for the whole tensor in its shape.
            stop: behind the last one.

        Returns:
            The tensor, or these elements, flat.
        """
        ...


class Piece(NamedTuple):
    """Elements of a tensor of an engine's state that one rank writes: each element is in a piece of exactly one rank.

    Attributes:
        name: "weight/<parameter>" or "<moment>/<parameter>"; a rank has at most one piece of each.
        start: the first element, of the flattened whole tensor.
        size: how many, at least one.
        take: gives them, flat and in fp32, where they are; a view, if that is how they lie there.
    """

    name: str
    start: int
    size: int
    take: Callable[[], Tensor]


class Engine(ABC):
    """A model with its optimizer, spread over the ranks."""

    model: Decoder
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter that is trained."""
    before_update: Callable[[], None] | None = None
    """Called in each step before anything of the state changes, which may still be copied until then."""

    def train_step(
        self, batches: Sequence[dict], lr: float, stop: Callable[[], bool] = lambda: False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step over this rank's shards of its micro-batches.

        Args:
            batches: arguments of the model for each micro-batch, on its device.
            lr: learning rate.
            stop: whether this rank wants the run to stop; asked at the step's end.

        Returns:
            Mean loss per token over all ranks, the gradient's norm before clipping, and how many ranks want to stop;
            scalars on the device.
        """
        self.model.train()
        self.model.memory.begin_step()
        valid = torch.stack([valid_tokens(batch["labels"]) for batch in batches]).sum()
        dist.all_reduce(valid)
        # A step whose every token is masked has no gradient; without the clamp it would have NaN.
        share = 1 / valid.clamp(min=1)
        total = torch.zeros((), device=valid.device)
        for index, batch in enumerate(batches):
            total += self.accumulate(batch, share * dist.get_world_size(), last=index == len(batches) - 1)
        if self.before_update is not None:
            self.before_update()
        norm = self.update(lr)
        sums = torch.stack([total, torch.full_like(total, float(stop()))])
        dist.all_reduce(sums)
        self.model.memory.end_step()
        return sums[0] * share, norm, sums[1]

    @torch.no_grad()
    def evaluate(self, batch: dict) -> Tensor:
        """Cross entropy (B, T) fp32 of each token of this rank's shard; 0 where there is no label."""
        self.model.eval()
        return self.wrapped(**batch, per_token=True)

    @property
    @abstractmethod
    def wrapped(self) -> nn.Module:
        """What to call instead of the model."""

    @abstractmethod
    def accumulate(self, batch: dict, factor: Tensor, last: bool) -> Tensor:
        """Add the gradient of factor * loss sum; returns the loss sum, detached."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """Clip, step, clear the gradients; returns their norm before clipping."""

    def moments(self, name: str) -> dict[str, tuple[int, ...]]:
        """What the optimizer keeps for a parameter, by name its shape."""
        return dict.fromkeys(MOMENTS, self.shapes[name])

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each whole tensor of the state, by its name."""
        return {
            f"{kind}/{name}": shape
            for name, whole in self.shapes.items()
            for kind, shape in {"weight": whole, **self.moments(name)}.items()
        }

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of the state, as it is until the next update; no collective."""

    @abstractmethod
    def load(self, read: Read, step: int, moments: bool) -> None:
        """Take from a checkpoint what this rank holds.

        An engine that divides weights begins with empty ones; others are given them before.

        Args:
            read: reads it.
            step: optimizer steps that it has behind it.
            moments: whether to continue from the optimizer's state; False starts anew from the weights alone.
        """
