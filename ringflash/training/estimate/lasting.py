"""Bytes of weights, gradients and optimizer that an engine holds on each rank, whatever the length."""

from __future__ import annotations

from ringflash.training.estimate.sizes import FP32, Sizes

BUCKET = 5 * 10**8
"""Elements of DeepSpeed's `reduce_bucket_size`."""

LIVE = 10**9
"""Elements of DeepSpeed's `stage3_max_live_parameters`."""

MOMENTS = {"adamw": 2 * FP32, "adamw_8bit": 2, "muon": FP32}
"""Bytes that an optimizer keeps of each weight between embedding and head; of others all keep AdamW's."""

BUFFERS = "the engine's buffers"


def lasting(engine: str, sizes: Sizes, ranks: int, optimizer: str = "adamw") -> dict[str, float]:
    """Bytes by what they are.

    Args:
        engine: its name.
        sizes: of the model.
        ranks: that share what is shared.
        optimizer: its name.
    """
    found = _ENGINES[engine](sizes, ranks, optimizer)
    return dict(zip(("parameters", "gradients", "optimizer", BUFFERS), found, strict=True))


def _ddp(sizes: Sizes, ranks: int, optimizer: str) -> tuple[float, ...]:
    weights = sizes.weights
    cast = 0 if sizes.element == FP32 else sizes.element * (sizes.block + sizes.head)
    between = sizes.block * sizes.blocks  # matrices, but for norms
    moments = MOMENTS[optimizer] * between + MOMENTS["adamw"] * (weights - between)
    return FP32 * weights, FP32 * weights, moments, cast


def _zero1(sizes: Sizes, ranks: int, optimizer: str) -> tuple[float, ...]:
    weights = sizes.weights
    return sizes.weight * weights, FP32 * weights, 3 * FP32 * weights / ranks, sizes.weight * BUCKET


def _zero2(sizes: Sizes, ranks: int, optimizer: str) -> tuple[float, ...]:
    weights, own = sizes.weights, sizes.weights / ranks
    return sizes.weight * weights, FP32 * own, 3 * FP32 * own, sizes.weight * BUCKET


def _zero3(sizes: Sizes, ranks: int, optimizer: str) -> tuple[float, ...]:
    own = sizes.weights / ranks
    gathered = sizes.weight * min(LIVE, sizes.weights)
    return sizes.weight * own, FP32 * own, 3 * FP32 * own, gathered + sizes.weight * BUCKET


_ENGINES = {"ddp": _ddp, "zero1": _zero1, "zero2": _zero2, "zero3": _zero3}
