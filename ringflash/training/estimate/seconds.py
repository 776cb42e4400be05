"""How long the devices work on a step.

The plan of attention as `ringflash.parallel.planning` predicts it, products of matrices at the rate of attention's
forward pass, all else by the bytes that it reads and writes. What hosts take to start that, and data, are not in it.
"""

from __future__ import annotations

import math

import numpy as np

from ringflash.configs.schema import Config
from ringflash.parallel.planning.choose import choose
from ringflash.parallel.planning.choose_heads import choose_heads
from ringflash.parallel.planning.cost import Prediction, predict
from ringflash.parallel.planning.generators import plan_named
from ringflash.parallel.planning.level_queries import level_queries
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import Machine, machine_for, measured_machine
from ringflash.parallel.positions.partition import resolve
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.training.config.derived import sequence_degree
from ringflash.training.estimate.hardware import CARDS, Hardware
from ringflash.training.estimate.lasting import FP32
from ringflash.training.estimate.sizes import Sizes
from ringflash.training.memory.plan import KEEP
from ringflash.training.model.transformer import attention_mask


def attention(config: Config, sizes: Sizes, hardware: Hardware) -> Prediction:
    """Both passes of a block's attention to one sequence of one document."""
    degree = sequence_degree(config, hardware.gpus)
    hosts = max(1, -(-degree // hardware.gpus_per_host))
    mask, name = attention_mask(config.attention), config.attention.partition or "zigzag"
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
    attended: Prediction,
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
    tokens = sizes.tokens * sizes.micro_batches
    again = sum(each != KEEP for each in placements)
    down = sizes.model.hidden_size * sizes.model.intermediate_size
    products = sizes.operations.token + 2 * again * (sizes.weights.block - down)
    products += again // 2 * 2 * sizes.weights.block if pairs else 0
    if sizes.by_rows:  # what attention is given is made once more; in rounds, keys alone
        products += again * 2 * (2 * sizes.key + (0 if sizes.alone else sizes.query)) * sizes.model.hidden_size
    of_pairs = attended.attention * sizes.blocks * sizes.micro_batches * config.train.micro_batch
    of_pairs *= sizes.load.pairs / sizes.whole_pairs
    moved = tokens * (sizes.blocks * _touched(sizes) + again * _touched_again(sizes)) / machine.memory
    steps = sizes.weights.trained / (1 if config.engine.name == "ddp" else gpus) * 10 * FP32 / machine.memory
    return products * tokens / machine.forward + of_pairs + moved + steps


def _machine(hardware: Hardware) -> Machine:
    return machine_for(hardware.gpus, hardware.hosts)


def _touched(sizes: Sizes) -> float:
    """Bytes that a token's forward and backward pass of a block reads and writes beside products and attention.

    SwiGLU's product has two operands and a result, and in the backward pass three of each; gradients of norms read
    two tensors and write one; two sums of the stream have gradients that are added too.
    """
    wide, stream = sizes.element * sizes.model.intermediate_size, sizes.element * sizes.model.hidden_size
    return _touched_again(sizes) + 9 * wide + 2 * (_norm(sizes) + stream) + _rotary(sizes) + 3 * 3 * stream


def _touched_again(sizes: Sizes) -> float:
    """The same of what is computed again: both norms, the rotary embedding, one sum of the stream."""
    return 2 * _norm(sizes) + _rotary(sizes) + 3 * sizes.element * sizes.model.hidden_size


def _norm(sizes: Sizes) -> float:
    """A norm: read and written; where weights are in another dtype by way of fp32, which is written and read twice."""
    aside = 0 if sizes.weight == sizes.element else 4 * FP32
    return sizes.model.hidden_size * (2 * sizes.element + aside)


def _rotary(sizes: Sizes) -> float:
    """Queries and keys, read and written."""
    return 2 * sizes.element * (sizes.query + sizes.key)
