"""How long weights and gradients are on their way between ranks, which engines gather and sum in each step.

They go by NCCL, in pieces of as many weights as an engine handles at once, at the rates of this machine's links or,
where nobody has measured them, of NCCL's sends between H100s. Its kernels need processors, which launches of
computation hold until they end, so that little of it hides behind them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ringflash.configs.schema import EngineConfig
from ringflash.parallel.planning.machine import MIB, SEND_RECV, Link, measured_machine
from ringflash.training.engines.room import bucket
from ringflash.training.estimate.hardware import Hardware
from ringflash.training.estimate.lasting import FP32, Weights

DDP_BUCKET = 25 * MIB
"""Bytes of gradients that torch's DDP sums at once."""


class Exchange(NamedTuple):
    """What ranks gather, or sum with each rank having a part of the sums; a sum that all have is both.

    Attributes:
        size: bytes of it, whole, in a step.
        piece: bytes of it at once.
        beside: it goes on beside the backward pass, in pieces so small that devices wait for the last one alone.
    """

    size: float
    piece: float
    beside: bool = False


def exchanges(engine: EngineConfig, weights: Weights, micro_batches: int) -> list[Exchange]:
    """Those of a step.

    Args:
        engine: whose.
        weights: of the model.
        micro_batches: of a step on a rank.
    """
    element, trained, block = weights.element, weights.trained, weights.element * weights.block
    together = element * bucket(weights.largest, weights.all)  # under DeepSpeed
    if engine.name == "ddp":
        return [Exchange(2 * FP32 * trained, DDP_BUCKET, beside=True)]
    if engine.name in ("zero1", "zero2"):  # with ZeRO 2, too, all ranks have the sums, and keep a part of them
        sums = 2 * (micro_batches if engine.name == "zero2" else 1)
        return [Exchange(sums * element * trained, together), Exchange(element * trained, together)]
    # For the forward and the backward pass; the head stays from the end of the one to the beginning of the other.
    gathered = Exchange(micro_batches * element * (2 * weights.all - weights.head), block)
    if engine.name == "zero3":
        return [gathered, Exchange(micro_batches * element * trained, together)]
    summed = element if engine.reduce == "bf16" else FP32
    return [gathered, Exchange(summed * trained, summed * weights.block)]


def exchanging(engine: EngineConfig, weights: Weights, micro_batches: int, hardware: Hardware) -> float:
    """Seconds of a step in which devices do nothing else; arguments as in `exchanges`, and on which hardware.

    Of a piece a rank is sent what it lacks, and over a host's links to others comes what the host lacks.
    """
    ranks, hosts = hardware.gpus, hardware.hosts
    machine = measured_machine() or SEND_RECV
    shares = ((machine.inside, 1 - 1 / ranks), (machine.outside, (1 - 1 / hosts) / hardware.gpus_per_host))
    took = 0.0
    for each in exchanges(engine, weights, micro_batches):
        pieces = 1 if each.beside else each.size / each.piece
        took += pieces * max(_time(link, share * each.piece) for link, share in shares)
    return (1 - SEND_RECV.inside.hidden) * took


def _time(link: Link, size: float) -> float:
    return float(link.time(np.array([size]))[0])
