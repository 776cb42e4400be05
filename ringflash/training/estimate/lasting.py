"""Bytes of weights, gradients and optimizer that an engine holds for each rank, whatever the length."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ringflash.configs.schema import EngineConfig
from ringflash.training.engines.deepspeed_json import read
from ringflash.training.engines.optimizer import matrices_between, trained
from ringflash.training.engines.room import bucket, gathered
from ringflash.training.model.decoder import Decoder

FP32 = 4
"""Bytes of master weights, moments, gradients that are summed, and what is computed in fp32."""

MOMENTS = {"adamw": 2 * FP32, "adamw_8bit": 2, "muon": FP32}
"""Bytes that an optimizer keeps of each weight between embedding and head; of others all keep AdamW's."""

PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS = "parameters", "gradients", "optimizer", "the engine's buffers"
"""What there is."""


@dataclass(frozen=True)
class Weights:
    """How many weights a model has.

    Attributes:
        trained: of all those that learn.
        frozen: of those that do not, as under adapters.
        between: of the former, in matrices between embedding and head.
        largest: of the largest weight of a block.
        block: of a block, on average.
        head: of the output head.
        element: bytes of one that is computed with.
    """

    trained: int
    frozen: int
    between: int
    largest: int
    block: int
    head: int
    element: int

    @property
    def all(self) -> int:
        """Trained or not."""
        return self.trained + self.frozen


def weights_of(model: Decoder) -> Weights:
    """Those of a model that no engine has divided."""
    everything, learned = list(model.parameters()), [weight for _, weight in trained(model)]
    rows = {part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)}
    outside = [weight for weight in everything if weight.dim() == 2 and weight.shape[0] in rows]
    inside = set(everything).difference(outside)
    return Weights(
        trained=_count(learned),
        frozen=_count(everything) - _count(learned),
        between=_count(matrices_between(model).values()),
        largest=max(map(nn.Parameter.numel, inside), default=0),
        block=_count(inside) // len(model.memory.placements),
        head=max(map(nn.Parameter.numel, outside), default=0),
        element=model.dtype.itemsize,
    )


def _count(weights: Collection[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def lasting(engine: str, weights: Weights, ranks: int, optimizer: str = "adamw") -> dict[str, float]:
    """Bytes by what they are.

    Args:
        engine: its name.
        weights: of the model.
        ranks: that share what is shared.
        optimizer: its name.
    """
    found = _ENGINES[engine](weights, ranks, optimizer)
    return dict(zip((PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS), found, strict=True))


@dataclass(frozen=True)
class Held:
    """Bytes of a rank by what they are.

    Attributes:
        device: on its GPU.
        host: in memory of its host.
    """

    device: dict[str, float]
    host: dict[str, float]


def held(engine: EngineConfig, weights: Weights, ranks: int, optimizer: str = "adamw") -> Held:
    """What an engine holds, and where; arguments as in `lasting`."""
    of_zero = {} if engine.deepspeed is None else read(engine.deepspeed).get("zero_optimization", {})
    found, away = lasting(engine.name, weights, ranks, optimizer), _on_host(engine, of_zero)
    if (sharing := of_zero.get("zero_hpz_partition_size", 1)) > 1:  # ranks near each other have the weights once more
        found[BUFFERS] += weights.element * weights.all / sharing
    device, host = ({name: size for name, size in found.items() if (name in away) == on} for on in (False, True))
    return Held(device, host)


def _on_host(engine: EngineConfig, of_zero: Mapping[str, Any]) -> set[str]:
    """What an engine has in memory of the host."""
    if engine.name == "fsdp2" and engine.offload:
        return {PARAMETERS, GRADIENTS, OPTIMIZER}
    away = set()
    if of_zero.get("offload_optimizer", {}).get("device") == "cpu":
        # Gradients go where the optimizer is, once ranks divide them.
        away |= {OPTIMIZER} if engine.name == "zero1" else {GRADIENTS, OPTIMIZER}
    if of_zero.get("offload_param", {}).get("device") == "cpu":
        away.add(PARAMETERS)
    return away


Bytes = tuple[float, float, float, float]


def _ddp(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    """Each rank has everything, and casts a block's weights where it uses them."""
    own = FP32 * weights.trained
    cast = 0 if weights.element == FP32 else weights.element * (weights.block + weights.head)
    return own + weights.element * weights.frozen, own, _moments(weights, optimizer), cast


def _fsdp2(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    """A block's gradients are there whole, and once more in the dtype in which they are summed."""
    own = FP32 * weights.trained / ranks
    summed = (weights.element + FP32) * weights.block * weights.trained / weights.all
    parameters = own + weights.element * weights.frozen / ranks
    return parameters, own, _moments(weights, optimizer) / ranks, _gathered(weights) + summed


def _zero1(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    parameters = weights.element * weights.all
    return parameters, FP32 * weights.trained, 3 * FP32 * weights.trained / ranks, _bucket(weights)


def _zero2(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    parameters, own = weights.element * weights.all, weights.trained / ranks
    return parameters, FP32 * own, 3 * FP32 * own, _bucket(weights)


def _zero3(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    parameters, own = weights.element * weights.all / ranks, weights.trained / ranks
    return parameters, FP32 * own, 3 * FP32 * own, _gathered(weights) + _bucket(weights)


def _bucket(weights: Weights) -> float:
    """Gradients that are summed together."""
    return weights.element * bucket(weights.largest, weights.all)


def _gathered(weights: Weights) -> float:
    """Weights that are whole on a rank at once."""
    return weights.element * min(gathered(weights.block, weights.head), weights.all)


def _moments(weights: Weights, optimizer: str) -> float:
    return MOMENTS[optimizer] * weights.between + MOMENTS["adamw"] * (weights.trained - weights.between)


_ENGINES = {"ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero1, "zero2": _zero2, "zero3": _zero3}
