"""How long devices, and links between them, work on a step.

The plan of attention as `ringflash.parallel.planning` predicts it, products of matrices at the rate of attention's
forward pass, all else by the bytes that it reads and writes, and what ranks tell each other of weights and gradients.
What hosts take to start that, and data, are not in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ringflash.configs.schema import Config
from ringflash.parallel.planning.choose import choose
from ringflash.parallel.planning.choose_heads import choose_heads
from ringflash.parallel.planning.cost import Prediction, predict
from ringflash.parallel.planning.generators import plan_named
from ringflash.parallel.planning.level_queries import level_queries
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import Machine, machine_for, measured_machine
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import resolve
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.training.config.derived import sequence_degree
from ringflash.training.estimate.exchanged import exchanging
from ringflash.training.estimate.hardware import CARDS, Hardware
from ringflash.training.estimate.lasting import FP32
from ringflash.training.estimate.sizes import Sizes
from ringflash.training.memory.plan import KEEP


class Attended(NamedTuple):
    """What attention takes of a rank.

    Attributes:
        seconds: of all blocks, both passes, for one sequence of one document.
        memory: bytes of the buffers of its plan, of the block that needs most.
    """

    seconds: float
    memory: float


def attention(config: Config, sizes: Sizes, hardware: Hardware) -> Attended:
    """Both passes of attention to one sequence of one document."""
    found = [(_of_mask(mask, config, sizes, hardware), blocks) for mask, blocks in sizes.masks.items()]
    seconds = sum(each.attention * blocks for each, blocks in found)
    return Attended(seconds, max(each.memory for each, _ in found))


def _of_mask(mask: Mask, config: Config, sizes: Sizes, hardware: Hardware) -> Prediction:
    """Of a block with a mask."""
    degree = sequence_degree(config, hardware.gpus)
    hosts = max(1, -(-degree // hardware.gpus_per_host))
    name = config.attention.partition or "zigzag"
    partition = resolve("zigzag" if name == "balanced" else name, config.train.seqlen, degree, [mask])
    machine, shape = _machine(hardware), sizes.shape
    stays = hosts > 1 or (config.attention.head_ranks or 1) > 1
    level = None if stays else level_queries(partition)
    chosen = choose(mask, partition, hosts=hosts, machine=machine, shape=shape, level=level)
    if chosen.predicted:
        tokens = np.array(partition.counts())
        free = config.attention.head_ranks is None and hosts == 1 and not sizes.shape.heads % degree
        heads = choose_heads(chosen, tokens, sizes.rows_in_groups) if free else None
        return chosen.cost if heads is None else heads.cost
    found = loads(mask, partition, partition, needed_keys(mask, partition.segments, partition.length))
    return predict(plan_named(chosen.name, mask, partition, hosts=hosts).outline, found, machine, shape, hosts)


def seconds(
    config: Config,
    sizes: Sizes,
    hardware: Hardware,
    attended: Attended,
    placements: list[str],
    pairs: bool,
) -> float:
    """Of a step; nan for a card whose rates nobody has measured.

    Args:
        config: of the run.
        sizes: of it.
        hardware: on which.
        attended: from `attention`.
        placements: of the blocks.
        pairs: see `memory.blocks.BlockMemory`.
    """
    if measured_machine() is None and hardware.card.peak != CARDS["h100"].peak:
        return math.nan  # what stands in for a measurement is of H100s
    machine, gpus = _machine(hardware), hardware.gpus
    work = sizes.work(sum(each != KEEP for each in placements), pairs)
    beside = sizes.micro_batches * (work.operations / machine.forward + work.moved / machine.memory)
    of_pairs = attended.seconds * sizes.micro_batches * config.train.micro_batch
    of_pairs *= sizes.load.pairs / sizes.whole_pairs
    steps = sizes.weights.trained / (1 if config.engine.name == "ddp" else gpus) * 10 * FP32 / machine.memory
    between = exchanging(config.engine, sizes.weights, sizes.micro_batches, hardware)
    return beside + of_pairs + steps + between


def _machine(hardware: Hardware) -> Machine:
    return machine_for(hardware.gpus, hardware.hosts)
