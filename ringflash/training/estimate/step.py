"""What a step takes of each GPU, of its host and of time, before anything is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ringflash.configs.schema import Config
from ringflash.errors import ArgumentError
from ringflash.parallel.transport.select import MOST_RANKS
from ringflash.parallel.transport.symmetric_memory import leased_bytes
from ringflash.training.checkpoint.host_copy import LEFT, copy_bytes
from ringflash.training.config.derived import saves_beside_training, sequence_degree
from ringflash.training.estimate.hardware import Hardware
from ringflash.training.estimate.lasting import BUFFERS, FP32, GRADIENTS, Held, Weights, held
from ringflash.training.estimate.own import OwnSizes
from ringflash.training.estimate.seconds import attention, seconds
from ringflash.training.estimate.sizes import Load, Sizes
from ringflash.training.memory.available import USED
from ringflash.training.memory.first_step import ON_DEVICE
from ringflash.training.memory.plan import AUTO, KEEP, OFFLOAD, PAIRS, RECOMPUTE, Measured, placed

BLOCKS = "moved blocks"
"""What `engine.memory` has in memory of the host."""

COPY = "copy of a checkpoint"
"""What is written while training goes on."""

CERTAIN = 0.85
"""Share of what is estimated that a step surely takes: estimates are to be right within a tenth."""


@dataclass(frozen=True)
class Estimate:
    """Of one rank: bytes on the device and of its host by what they are, and a step's time.

    Attributes:
        device: bytes by name of tensors; they are there at once.
        leased: bytes beside tensors by which ranks that share a sequence reach each other's.
        host: likewise, of its host.
        placements: of the blocks.
        pairs: see `memory.blocks.BlockMemory`.
        queries: of a round in which blocks are computed again, see `memory.rounds`; 0 where there is one round.
        tokens_per_second: of each GPU; nan where the time is.
        seconds: of a step; nan where nobody knows how fast the card is.
        mfu: useful operations by what the cards could do.
        fits: the device has room, for what the host has none for too.
    """

    device: dict[str, float]
    leased: float
    host: dict[str, float]
    placements: list[str]
    pairs: bool
    queries: int
    seconds: float
    tokens_per_second: float
    mfu: float
    fits: bool

    @property
    def peak(self) -> float:
        """Bytes of tensors on the device."""
        return sum(self.device.values())

    @property
    def least(self) -> float:
        """Bytes without which no step is taken: an engine need not fill its buffers, and estimates are not exact."""
        return CERTAIN * (self.peak - self.device[BUFFERS])


def estimate(config: Config, hardware: Hardware, vocab_size: int | None = None, load: Load | None = None) -> Estimate:
    """What a step takes.

    Args:
        config: of a run.
        hardware: on which.
        vocab_size: of the tokenizer; None: as data.tokenizer says. Of a model of a folder it does not matter.
        load: of the batch; None: each sequence is one document.

    Raises:
        ArgumentError: nobody knows the vocabulary; or what a pass of a model of a folder holds.
    """
    sizes = sizes_of(config, hardware.gpus, vocab_size, load)
    engine = _held(config, sizes, hardware)
    attended = attention(config, sizes, hardware)
    copy = _copy(config, sizes.weights.trained, hardware)
    of_host = max(0.0, USED * (hardware.host_share - sum(copy.values()) - sum(engine.host.values())))
    if config.engine.host_gib is not None:
        of_host = min(of_host, config.engine.host_gib * 2**30)
    leased = _leased(config, sizes, hardware)
    free = hardware.room - leased - sum(engine.device.values())
    placements, pairs = _placements(config.engine.memory, sizes, attended.memory, free, of_host)
    kept = sizes.kept(pairs)
    moved = placements.count(OFFLOAD) * kept
    stays = max(0.0, moved - of_host)  # what has no room there
    whole = placements.count(KEEP)
    on_device = placements.count(RECOMPUTE) * kept + stays + (whole * (kept + sizes.again) if whole else 0.0)
    if whole == len(placements):
        transient = sizes.transient_kept(attended.memory)
    else:
        transient = sizes.transient(attended.memory, OFFLOAD in placements, pairs)
    if config.engine.name == "fsdp2" and sizes.micro_batches == 1 and GRADIENTS in engine.device:
        engine.device[GRADIENTS] = _beside(engine.device[GRADIENTS], sizes.weights, on_device, transient)
    device = {**engine.device, "kept for the backward pass": on_device, "at work": transient}
    host = {**engine.host, **copy, BLOCKS: moved - stays}
    took = seconds(config, sizes, hardware, attended, placements, pairs)
    return Estimate(
        device=device,
        leased=leased,
        host=host,
        placements=placements,
        pairs=pairs,
        queries=sizes.queries,
        seconds=took,
        tokens_per_second=sizes.step_tokens / took / hardware.gpus,
        mfu=sizes.useful / (took * hardware.gpus * hardware.card.peak),
        fits=sum(device.values()) + leased <= hardware.room
        and sum(engine.host.values()) + sum(copy.values()) <= hardware.host_share,
    )


def in_seconds(seconds: float) -> str:
    """As text, however short or long a step is."""
    return (
        f"{seconds:.2f} s" if 0.1 <= seconds < 1000 else f"{seconds:,.0f} s" if seconds >= 1000 else f"{seconds:.2g} s"
    )


def sizes_of(config: Config, gpus: int, vocab_size: int | None = None, load: Load | None = None) -> Sizes:
    """Of the model that a configuration names, and of what a rank has of a batch; arguments are those of `estimate`."""
    if config.model.path is None:
        return OwnSizes.of(config, gpus, vocab_size, load)
    from ringflash.training.estimate.folder import FolderSizes  # an optional library

    return FolderSizes.of(config, gpus, load)


def unknown(config: Config, gpus: int) -> str | None:
    """Why nobody can say what a step takes, if so: a model of a folder may do what cannot be counted ahead.

    Args:
        config: of a run.
        gpus: how many ranks.
    """
    if config.model.path is None:
        return None
    try:
        found = sizes_of(config, gpus)
        found.kept(pairs=False)
        found.transient_kept(0)
    except ArgumentError as error:
        return str(error)
    return None


def longest(config: Config, hardware: Hardware, vocab_size: int | None = None, step: int = 1024) -> int:
    """The longest `train.seqlen`, in multiples of `step`, of which a step fits; 0 if none does."""

    def fits(count: int) -> bool:
        train = dataclasses.replace(config.train, seqlen=count * step)
        return estimate(dataclasses.replace(config, train=train), hardware, vocab_size).fits

    least = max(1, -(-sequence_degree(config, hardware.gpus) // step))
    return step * _last(fits, least, max(least, config.train.seqlen // step))


def _last(holds: Callable[[int], bool], first: int, near: int) -> int:
    """The largest number from `first` on of which something holds that holds of all smaller ones; 0 for none.

    It is looked for from `near` on.
    """
    low = near
    while not holds(low):
        if low == first:
            return 0
        low = max(first, low // 2)
    high = 2 * low
    while holds(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _held(config: Config, sizes: Sizes, hardware: Hardware) -> Held:
    """What the engine holds, with what depends on the model and on the batch."""
    found, weights = held(config.engine, sizes.weights, hardware.gpus, config.optimizer.name), sizes.weights
    if sizes.casts and config.engine.name == "ddp":
        found.device[BUFFERS] = 0.0
    if config.engine.name == "fsdp2" and sizes.micro_batches > 1:
        # Between micro-batches each rank has gradients of whole weights on the device, wherever its own are.
        whole = (weights.element if config.engine.reduce == "bf16" else FP32) * weights.trained
        found.device[GRADIENTS] = found.device.get(GRADIENTS, 0.0) + whole
    return found


def _beside(gradients: float, weights: Weights, kept: float, at_work: float) -> float:
    """Bytes that a rank's gradients under FSDP2 take beside what blocks keep and what is at work.

    They come while what blocks keep goes, those of the embedding when nothing is at work any more, and are no more when
    the next step begins.

    Args:
        gradients: bytes of them all.
        weights: of the model.
        kept: bytes that blocks keep on the device.
        at_work: bytes at work, at most.
    """
    last = 0 if weights.frozen else weights.head
    before_the_last = gradients * (weights.trained - last) / weights.trained
    return max(max(kept, before_the_last) + at_work, gradients) - kept - at_work


def _leased(config: Config, sizes: Sizes, hardware: Hardware) -> float:
    """Of a group that reaches each other's memory: the ranks of a host that share a sequence."""
    degree = sequence_degree(config, hardware.gpus)
    if degree == 1 or degree > min(MOST_RANKS, hardware.gpus_per_host):
        return 0.0
    shape = sizes.shape
    return float(leased_bytes(degree, sizes.tokens * shape.key_bytes // shape.groups))


def _copy(config: Config, weights: int, hardware: Hardware) -> dict[str, float]:
    """What checkpoints take of a rank's host, if they are written beside training, and if there is room for it."""
    size = copy_bytes(weights, hardware.gpus, config.checkpoint.only_weights)
    wanted = saves_beside_training(config, config.train.steps) and size <= LEFT * hardware.host_share
    return {COPY: size} if wanted else {}


def _placements(policy: str, sizes: Sizes, plan_memory: float, free: float, of_host: float) -> tuple[list[str], bool]:
    """As `BlockMemory` has them behind the first step, and whether they are in pairs.

    Args:
        policy: `engine.memory`.
        sizes: of the model and its tokens.
        plan_memory: as in `Sizes.transient`.
        free: bytes of the device that the engine leaves.
        of_host: bytes of the host that blocks may have.
    """
    if policy == AUTO and not sizes.recomputes:
        policy = KEEP
    if policy != AUTO:
        return [OFFLOAD if policy == PAIRS else policy] * sizes.blocks, policy == PAIRS
    left = {pairs: free - sizes.transient(plan_memory, True, pairs) for pairs in (False, True)}
    pairs = sizes.blocks * sizes.kept(False) > of_host + ON_DEVICE * max(0.0, free)
    measured = Measured(int(left[pairs]), sizes.blocks, int(sizes.kept(pairs)), int(sizes.again))
    return placed(sizes.blocks, measured), pairs
