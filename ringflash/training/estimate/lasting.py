"""Bytes of weights, gradients and optimizer that an engine holds on each rank, whatever the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ringflash.training.engines.optimizer import matrices_between, trained
from ringflash.training.model.decoder import Decoder

FP32 = 4
"""Bytes of master weights, moments, gradients that are summed, and what is computed in fp32."""

BUCKET = 5 * 10**8
"""Elements of DeepSpeed's `reduce_bucket_size`."""

LIVE = 10**9
"""Elements of DeepSpeed's `stage3_max_live_parameters`."""

MOMENTS = {"adamw": 2 * FP32, "adamw_8bit": 2, "muon": FP32}
"""Bytes that an optimizer keeps of each weight between embedding and head; of others all keep AdamW's."""

BUFFERS = "the engine's buffers"


@dataclass(frozen=True)
class Weights:
    """How many weights a model has.

    Attributes:
        trained: of all those that learn.
        frozen: of those that do not, as under adapters.
        between: of the former, in matrices between embedding and head.
        block: of a block, on average.
        head: of the output head.
        element: bytes of one that is computed with.
    """

    trained: int
    frozen: int
    between: int
    block: int
    head: int
    element: int


def weights_of(model: Decoder) -> Weights:
    """Those of a model that no engine has divided."""
    everything, learned = list(model.parameters()), [weight for _, weight in trained(model)]
    rows = {part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)}
    outside = [weight for weight in everything if weight.dim() == 2 and weight.shape[0] in rows]
    return Weights(
        trained=_count(learned),
        frozen=_count(everything) - _count(learned),
        between=_count(list(matrices_between(model).values())),
        block=(_count(everything) - _count(outside)) // len(model.memory.placements),
        head=max(map(nn.Parameter.numel, outside), default=0),
        element=model.dtype.itemsize,
    )


def _count(weights: Sequence[nn.Parameter]) -> int:
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
    return dict(zip(("parameters", "gradients", "optimizer", BUFFERS), found, strict=True))


Bytes = tuple[float, float, float, float]


def _ddp(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    """Each rank has everything, and casts a block's weights where it uses them."""
    own = FP32 * weights.trained
    cast = 0 if weights.element == FP32 else weights.element * (weights.block + weights.head)
    return own + weights.element * weights.frozen, own, _moments(weights, optimizer), cast


def _fsdp2(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    """Two blocks, or one and the head, are whole at once, and a block's gradients, again as they are summed."""
    own = FP32 * weights.trained / ranks
    gathered = weights.element * (weights.block + max(weights.block, weights.head))
    summed = (weights.element + FP32) * weights.block
    parameters = own + weights.element * weights.frozen / ranks
    return parameters, own, _moments(weights, optimizer) / ranks, gathered + summed


def _zero1(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    parameters = weights.element * (weights.trained + weights.frozen)
    return parameters, FP32 * weights.trained, 3 * FP32 * weights.trained / ranks, weights.element * BUCKET


def _zero2(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    parameters, own = weights.element * (weights.trained + weights.frozen), weights.trained / ranks
    return parameters, FP32 * own, 3 * FP32 * own, weights.element * BUCKET


def _zero3(weights: Weights, ranks: int, optimizer: str) -> Bytes:
    everything, own = weights.trained + weights.frozen, weights.trained / ranks
    gathered = weights.element * min(LIVE, everything)
    return weights.element * everything / ranks, FP32 * own, 3 * FP32 * own, gathered + weights.element * BUCKET


def _moments(weights: Weights, optimizer: str) -> float:
    return MOMENTS[optimizer] * weights.between + MOMENTS["adamw"] * (weights.trained - weights.between)


_ENGINES = {"ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero1, "zero2": _zero2, "zero3": _zero3}
