"""What a step of the recipe's own model takes of each GPU, of its host and of time, before anything is started.

Memory is counted tensor by tensor, as the model, the engines and `blocks` hold them. Time is that of the device: the
plan of attention as `ringflash.parallel.planning` predicts it, products of matrices at the rate of attention's forward
pass, all else by the bytes that it reads and writes. What hosts take to start all that, and data, are not in it.

Legend: T tokens of a rank, C hidden size, F width of the feed-forward, H heads, K key heads, D head width, V rows of
the embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ringflash.configs.schema import Config, ModelConfig
from ringflash.errors import ArgumentError
from ringflash.loss import CHUNK_ELEMENTS
from ringflash.parallel.planning.choose import choose
from ringflash.parallel.planning.cost import Prediction, Shape, predict
from ringflash.parallel.planning.generators import plan_named
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import Machine, machine_for
from ringflash.parallel.positions.partition import resolve
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.training.config.checks import SMALLEST_VOCABULARY
from ringflash.training.config.derived import sequence_degree, vocabulary
from ringflash.training.engines.room import bucket, gathered
from ringflash.training.memory.host import USED
from ringflash.training.memory.plan import AUTO, KEEP, OFFLOAD, PAIRS, RECOMPUTE, SPARE, Measured, placed
from ringflash.training.memory.rows import TILE_ELEMENTS
from ringflash.training.model.shape import head_dim
from ringflash.training.model.transformer import Transformer, attention_mask

GIB = 2**30

FP32 = 4
"""Bytes of master weights, moments, gradients that are summed, and what is computed in fp32."""

STARTED = 2 * 10**9
"""Bytes that CUDA, NCCL and libraries take of a GPU beside tensors."""

AT_ONCE = 8
"""Tensors of a tile of the feed-forward that are there at once in its backward pass."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        memory: bytes.
        peak: operations a second of dense products in bfloat16, as its maker says.
    """

    memory: float
    peak: float


CARDS = {"h100": Card(85.0e9, 989e12), "h200": Card(150.1e9, 989e12)}
"""GPUs by name; memory is what torch says of them."""


def card_of(device: torch.device) -> Card:
    """A GPU of this machine; nobody knows the peak of one that is not among `CARDS`."""
    found = torch.cuda.get_device_properties(device)
    known = (card.peak for name, card in CARDS.items() if name in found.name.lower())
    return Card(found.total_memory, next(known, math.nan))


@dataclass(frozen=True)
class Hardware:
    """What a run is to have.

    Attributes:
        gpus: ranks.
        card: each of them.
        host_bytes: memory of a host, free before the run.
        gpus_per_host: ranks of a host.
    """

    gpus: int
    card: Card
    host_bytes: float
    gpus_per_host: int = 8

    @property
    def hosts(self) -> int:
        """How many."""
        return -(-self.gpus // self.gpus_per_host)


@dataclass(frozen=True)
class Estimate:
    """Of one rank: bytes on the device by what they are, bytes of its host, and a step's time.

    Attributes:
        device: bytes by name; they are there at once.
        host: bytes.
        placements: of the blocks.
        pairs: see `blocks.BlockMemory`.
        seconds: of a step.
        mfu: operations of the model, without any that are repeated, by what the cards could do.
        fits: the device has room, for what the host has none for too.
    """

    device: dict[str, float]
    host: float
    placements: list[str]
    pairs: bool
    seconds: float
    mfu: float
    fits: bool

    @property
    def peak(self) -> float:
        """Bytes of tensors on the device."""
        return sum(self.device.values())


def estimate(config: Config, hardware: Hardware, vocab_size: int | None = None) -> Estimate:
    """What a step takes.

    Args:
        config: of a run with the recipe's own model.
        hardware: on which.
        vocab_size: of the tokenizer; None: as data.tokenizer says.

    Raises:
        ArgumentError: a model of a folder, whose insides are not known here; or nobody knows the vocabulary.
    """
    sizes = _Sizes.of(config, hardware.gpus, vocab_size)
    fixed = _fixed(config.engine.name, sizes, hardware.gpus, config.optimizer.name)
    attention = _attention(config, sizes, hardware)
    transient = sizes.transient(attention.memory)
    free = (1 - SPARE) * (hardware.card.memory - STARTED) - sum(fixed.values()) - transient
    of_host = USED * hardware.host_bytes / min(hardware.gpus, hardware.gpus_per_host)
    if config.engine.host_gib is not None:
        of_host = min(of_host, config.engine.host_gib * 2**30)
    placements, pairs = _placements(config.engine.memory, sizes, free, of_host)
    kept = sizes.kept(pairs)
    host = placements.count(OFFLOAD) * kept
    stays = max(0.0, host - of_host)  # what has no room there
    on_device = placements.count(RECOMPUTE) * kept + stays + placements.count(KEEP) * (kept + sizes.again)
    if all(each == KEEP for each in placements):  # nothing is computed again, nor comes back
        transient = sizes.transient_kept(attention.memory)
    device = {**fixed, "kept for the backward pass": on_device, "at work": transient}
    seconds = _seconds(config, sizes, hardware, attention, placements, pairs)
    useful = 3 * (2 * (sizes.block * sizes.blocks + sizes.head) * sizes.step_tokens + sizes.pair_operations)
    fits = sum(device.values()) <= (1 - SPARE) * (hardware.card.memory - STARTED)
    mfu = useful / (seconds * hardware.gpus * hardware.card.peak)
    return Estimate(device, min(host, of_host), placements, pairs, seconds, mfu, fits)


def longest(config: Config, hardware: Hardware, vocab_size: int | None = None, step: int = 1024) -> int:
    """The longest `train.seqlen`, in multiples of `step`, of which a step fits; 0 if none does."""

    def fits(count: int) -> bool:
        train = dataclasses.replace(config.train, seqlen=count * step)
        return estimate(dataclasses.replace(config, train=train), hardware, vocab_size).fits

    return step * _last(fits, max(1, -(-sequence_degree(config, hardware.gpus) // step)))


def _last(holds: Callable[[int], bool], first: int) -> int:
    """The largest number from `first` on of which something holds that holds of all smaller ones; 0 for none."""
    if not holds(first):
        return 0
    low, high = first, 2 * first
    while holds(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a model and of what a rank has of a batch.

    Attributes:
        model: its shape.
        weights: of all.
        block: weights of a block.
        head: weights of the output head.
        blocks: how many.
        element: bytes of an activation.
        weight: bytes of a weight that is computed with.
        tokens: T.
        step_tokens: of a step, over all ranks.
        micro_batches: of a step on a rank.
        pair_operations: of attention's forward pass over all ranks, in a step.
    """

    model: ModelConfig
    weights: int
    block: int
    head: int
    blocks: int
    element: int
    weight: int
    tokens: int
    step_tokens: int
    micro_batches: int
    pair_operations: float

    @staticmethod
    def of(config: Config, gpus: int, vocab_size: int | None = None) -> _Sizes:
        """What a configuration says."""
        model, train = config.model, config.train
        if model.path is not None:
            raise ArgumentError(f"model.path={model.path}: only the recipe's own model can be estimated")
        element = FP32 if config.engine.precision == "fp32" else 2
        if vocab_size is None:
            if config.data.tokenizer not in (None, "bpe", "bytes") and model.vocab_size is None:
                raise ArgumentError("model.vocab_size=null; give it, as a folder's tokenizer is not read here")
            of_bytes = config.data.tokenizer == "bytes" or model.vocab_size is not None
            vocab_size = SMALLEST_VOCABULARY if of_bytes else config.data.vocab_size
        rows = vocabulary(model, vocab_size)
        with torch.device("meta"):
            built = Transformer(model, rows)
        degree = sequence_degree(config, gpus)
        mask, whole = attention_mask(config.attention), resolve("zigzag", train.seqlen, 1, [])
        pairs = loads(mask, whole, whole, needed_keys(mask, whole.segments, train.seqlen)).pairs.sum()
        width = model.num_attention_heads * head_dim(model)
        return _Sizes(
            model=model,
            weights=sum(weight.numel() for weight in built.parameters()),
            block=sum(weight.numel() for weight in built.layers[0].parameters()),
            head=rows * model.hidden_size,
            blocks=model.num_hidden_layers,
            element=element,
            weight=FP32 if config.engine.name == "ddp" else element,
            tokens=train.micro_batch * -(-train.seqlen // degree),
            step_tokens=train.global_batch * train.seqlen,
            micro_batches=max(1, train.global_batch * degree // (train.micro_batch * gpus)),
            pair_operations=4 * width * pairs * train.global_batch * model.num_hidden_layers,
        )

    @property
    def query(self) -> int:
        """H D."""
        return self.model.num_attention_heads * head_dim(self.model)

    @property
    def key(self) -> int:
        """K D."""
        return self.model.num_key_value_heads * head_dim(self.model)

    def kept(self, pairs: bool) -> float:
        """Bytes that a recomputed block keeps: its input, out and log-sum-exp."""
        stream = self.model.hidden_size / (2 if pairs else 1)
        return self.tokens * (self.element * (stream + self.query) + FP32 * self.model.num_attention_heads)

    @property
    def again(self) -> int:
        """Bytes beside these of a block that is kept whole: outputs of norms, q, k, v, stream between, gate and up."""
        model = self.model
        return self.tokens * self.element * (3 * model.hidden_size + self._projected + 2 * model.intermediate_size)

    @property
    def _projected(self) -> int:
        return self.query + 2 * self.key

    def transient(self, plan_memory: float) -> float:
        """Bytes at work, at most, where blocks are computed again and come back one ahead."""
        came_back = 2 * self.tokens * self.element * (self.model.hidden_size + self.query)
        again = self.tokens * self.element * (self.model.hidden_size + self._projected)  # a norm's output, q, k, v
        between = 2 * self.tokens * self.element * self.model.hidden_size  # the stream, and a norm's output
        return max(self._loss, came_back + again + max(self._attention(plan_memory), between + self._feed_forward))

    def transient_kept(self, plan_memory: float) -> float:
        """Bytes at work, at most, where everything is kept."""
        return max(self._loss, self._attention(plan_memory), self._feed_forward)

    def _attention(self, plan_memory: float) -> float:
        """Its backward pass: gradients of stream, out, q, k, v, the last three in fp32 first, and what a plan has."""
        streams = self.element * (self.model.hidden_size + self.query)
        return self.tokens * (streams + (FP32 + self.element) * self._projected) + plan_memory

    @property
    def bucket(self) -> float:
        """Bytes of gradients that are summed together."""
        return self.weight * bucket(self.model.hidden_size * self.model.intermediate_size, self.weights)

    @property
    def gathered(self) -> float:
        """Bytes of weights that are whole on a rank at once, where ranks divide them."""
        return self.weight * min(gathered(self.block, self.head), self.weights)

    @property
    def _feed_forward(self) -> float:
        """Its backward pass: gradients of its output and input, a tile, and gradients of its weights."""
        model = self.model
        tile = min(TILE_ELEMENTS["cuda"], self.tokens * model.intermediate_size)
        streams = 2 * self.tokens * self.element * model.hidden_size
        return streams + AT_ONCE * self.element * tile + 3 * FP32 * model.hidden_size * model.intermediate_size

    @property
    def _loss(self) -> float:
        """Its forward pass: the last stream, its norm and its gradient, that of the head, and logits of a chunk."""
        streams = 3 * self.tokens * self.element * self.model.hidden_size
        logits = min(CHUNK_ELEMENTS["cuda"], self.tokens * self.head // self.model.hidden_size)
        return streams + (FP32 + self.element) * self.head + 3 * FP32 * logits


MOMENTS = {"adamw": 2 * FP32, "adamw_8bit": 2, "muon": FP32}
"""Bytes that an optimizer keeps of each weight between embedding and head; of others all keep AdamW's."""


def _fixed(engine: str, sizes: _Sizes, ranks: int, optimizer: str = "adamw") -> dict[str, float]:
    """Bytes of weights, gradients and optimizer, whatever the length."""
    weights, own = sizes.weights, sizes.weights / ranks
    if engine == "ddp":
        cast = 0 if sizes.element == FP32 else sizes.element * (sizes.block + sizes.head)
        between = sizes.block * sizes.blocks  # matrices, but for norms
        moments = MOMENTS[optimizer] * between + MOMENTS["adamw"] * (weights - between)
        found = (FP32 * weights, FP32 * weights, moments, cast)
    elif engine == "zero1":
        found = (sizes.weight * weights, FP32 * weights, 3 * FP32 * own, sizes.bucket)
    elif engine == "zero2":
        found = (sizes.weight * weights, FP32 * own, 3 * FP32 * own, sizes.bucket)
    elif engine == "zero3":
        found = (sizes.weight * own, FP32 * own, 3 * FP32 * own, sizes.gathered + sizes.bucket)
    else:  # a block's gradients are there whole, and once more in the dtype in which they are summed
        summed = (sizes.weight + FP32) * sizes.block
        found = (FP32 * own, FP32 * own, MOMENTS[optimizer] * own, sizes.gathered + summed)
    return dict(zip(("parameters", "gradients", "optimizer", "the engine's buffers"), found, strict=True))


def _placements(policy: str, sizes: _Sizes, free: float, of_host: float) -> tuple[list[str], bool]:
    """As `BlockMemory` has them behind the first step."""
    if policy != AUTO:
        return [OFFLOAD if policy == PAIRS else policy] * sizes.blocks, policy == PAIRS
    pairs = sizes.blocks * sizes.kept(False) > of_host + max(0.0, free)
    kept = sizes.kept(pairs)
    return placed(sizes.blocks, Measured(int(free), sizes.blocks, int(kept), sizes.again)), pairs


# Time


def _attention(config: Config, sizes: _Sizes, hardware: Hardware) -> Prediction:
    """Both passes of a block's attention to one sequence of one document."""
    model, degree = sizes.model, sequence_degree(config, hardware.gpus)
    hosts = max(1, -(-degree // hardware.gpus_per_host))
    mask, name = attention_mask(config.attention), config.attention.partition or "zigzag"
    partition = resolve("zigzag" if name == "balanced" else name, config.train.seqlen, degree, [mask])
    shape = Shape(model.num_attention_heads, model.num_key_value_heads, head_dim(model), sizes.element)
    machine = _machine(hardware)
    chosen = choose(mask, partition, hosts=hosts, machine=machine, shape=shape)
    if chosen.predicted:
        return chosen.predicted[chosen.name]
    found = loads(mask, partition, partition, needed_keys(mask, partition.segments, partition.length))
    return predict(plan_named(chosen.name, mask, partition, hosts=hosts).outline, found, machine, shape, hosts)


def _machine(hardware: Hardware) -> Machine:
    return machine_for(hardware.gpus, hardware.hosts)


def _seconds(
    config: Config,
    sizes: _Sizes,
    hardware: Hardware,
    attention: Prediction,
    placements: list[str],
    pairs: bool,
) -> float:
    machine, gpus = _machine(hardware), hardware.gpus
    tokens = sizes.tokens * sizes.micro_batches
    again = sum(each != KEEP for each in placements)
    down = sizes.model.hidden_size * sizes.model.intermediate_size
    products = 6 * (sizes.block * sizes.blocks + sizes.head) + 2 * again * (sizes.block - down)
    products += again // 2 * 2 * sizes.block if pairs else 0
    attended = attention.attention * sizes.blocks * sizes.micro_batches * config.train.micro_batch
    moved = tokens * (sizes.blocks * _touched(sizes) + again * _touched_again(sizes)) / machine.memory
    steps = (sizes.weights if config.engine.name == "ddp" else sizes.weights / gpus) * 10 * FP32 / machine.memory
    return products * tokens / machine.forward + attended + moved + steps


def _touched(sizes: _Sizes) -> float:
    """Bytes that a token's forward and backward pass of a block reads and writes beside products and attention.

    SwiGLU's product has two operands and a result, and in the backward pass three of each; gradients of norms read
    two tensors and write one; two sums of the stream have gradients that are added too.
    """
    wide, stream = sizes.element * sizes.model.intermediate_size, sizes.element * sizes.model.hidden_size
    return _touched_again(sizes) + 9 * wide + 2 * (_norm(sizes) + stream) + _rotary(sizes) + 3 * 3 * stream


def _touched_again(sizes: _Sizes) -> float:
    """The same of what is computed again: both norms, the rotary embedding, one sum of the stream."""
    return 2 * _norm(sizes) + _rotary(sizes) + 3 * sizes.element * sizes.model.hidden_size


def _norm(sizes: _Sizes) -> float:
    """A norm: read and written; where weights are in another dtype by way of fp32, which is written and read twice."""
    aside = 0 if sizes.weight == sizes.element else 4 * FP32
    return sizes.model.hidden_size * (2 * sizes.element + aside)


def _rotary(sizes: _Sizes) -> float:
    """Queries and keys, read and written."""
    return 2 * sizes.element * (sizes.query + sizes.key)
