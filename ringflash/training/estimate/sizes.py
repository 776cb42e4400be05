"""What an estimate asks of a model and of what a rank has of a batch: how many bytes and operations grow with that.

Of the recipe's own model they are counted tensor by tensor (`own`), of one of Transformers in a pass of tensors without
memory (`folder`).

Legend: T tokens of a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ringflash.configs.schema import Config
from ringflash.parallel.planning.cost import Shape
from ringflash.parallel.planning.heads import rows_in_groups
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import resolve
from ringflash.parallel.positions.visibility import needed_keys
from ringflash.training.config.derived import accumulation, sequence_degree
from ringflash.training.estimate.lasting import FP32, Weights
from ringflash.training.estimate.operations import Operations


@dataclass(frozen=True)
class Load:
    """What a batch asks of the ranks.

    Attributes:
        tokens: of a micro-batch, on the rank that has most.
        pairs: of a query and a key that it sees, in a layer, of all sequences of a step.
    """

    tokens: int
    pairs: float


class Work(NamedTuple):
    """What a device does of a micro-batch, beside attention.

    Attributes:
        operations: of products of matrices.
        moved: bytes that all else reads and writes.
    """

    operations: float
    moved: float


@dataclass(frozen=True)
class Sizes(ABC):
    """Sizes of a model and of what a rank has of a batch.

    Attributes:
        weights: how many.
        blocks: how many.
        element: bytes of an activation.
        load: of the batch.
        mean: tokens of a micro-batch that a rank has on average.
        step_tokens: of a step, over all ranks.
        micro_batches: of a step on a rank.
        masks: of attention, and how many blocks have each.
        whole_pairs: what `load.pairs` is where each sequence is one document.
        operations: the useful ones; None where nobody here knows them.
        exchanging: ranks that exchange heads.
        alone: each rank has whole sequences.
    """

    weights: Weights
    blocks: int
    element: int
    load: Load
    mean: int
    step_tokens: int
    micro_batches: int
    masks: Mapping[Mask, int]
    whole_pairs: float
    operations: Operations | None
    exchanging: int
    alone: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.load.tokens

    @property
    def useful(self) -> float:
        """Useful operations of a step, of all ranks; nan where nobody here knows them."""
        return float("nan") if self.operations is None else self.operations.of(self.step_tokens, self.load.pairs)

    @property
    def shape(self) -> Shape:
        """Of a block's attention."""
        return self.heads.in_groups(self.rows_in_groups, self.exchanging)

    @property
    def rows_in_groups(self) -> int:
        """See `ringflash.parallel.planning.heads`."""
        return rows_in_groups(self.tokens, self.load.pairs / self.step_tokens)

    @property
    def queries(self) -> int:
        """Of a round in which blocks are computed again, see `memory.rounds`; 0 where there is one round."""
        return 0

    @property
    def recomputes(self) -> bool:
        """Whether blocks can be computed again."""
        return True

    @property
    @abstractmethod
    def heads(self) -> Shape:
        """Of a block, before they are worked on in groups."""

    @property
    @abstractmethod
    def casts(self) -> bool:
        """Whether what is at work has all casts of weights in it, which DDP makes where they are used."""

    @abstractmethod
    def kept(self, pairs: bool) -> float:
        """Bytes that a recomputed block keeps: its input, out and log-sum-exp.

        Args:
            pairs: see `memory.blocks.BlockMemory`.
        """

    @property
    @abstractmethod
    def again(self) -> float:
        """Bytes beside these of a block that is kept whole."""

    @abstractmethod
    def transient(self, plan_memory: float, moved: bool, pairs: bool = False) -> float:
        """Bytes at work, at most, where blocks are computed again.

        Args:
            plan_memory: bytes of the buffers of attention's plan.
            moved: what they keep comes back, rows by rows or one block ahead.
            pairs: see `memory.blocks.BlockMemory`.
        """

    @abstractmethod
    def transient_kept(self, plan_memory: float) -> float:
        """Bytes at work, at most, where everything is kept; see `transient`."""

    @abstractmethod
    def work(self, again: int, pairs: bool) -> Work:
        """Of a micro-batch, both passes.

        Args:
            again: blocks that are computed again.
            pairs: see `memory.blocks.BlockMemory`.
        """

    def aside(self, projected: int) -> float:
        """Bytes of gradients of query, key and value in attention's backward pass, beside where they lie in the end.

        They are in fp32 first. Heads that are worked on in groups have theirs in fp32 and rounded.

        Args:
            projected: elements of a token's query, key and value.
        """
        groups = self.shape.groups
        return self.tokens * (FP32 + self.element * (groups > 1)) * projected / groups


def of_batch(config: Config, gpus: int, masks: Mapping[Mask, int], load: Load | None) -> dict[str, object]:
    """What `Sizes` has of the batch.

    Args:
        config: of the run.
        gpus: how many ranks.
        masks: of attention, and how many blocks have each.
        load: of the batch; None: each sequence is one document, and ranks have equally many tokens.
    """
    train, degree = config.train, sequence_degree(config, gpus)
    whole, pairs = resolve("zigzag", train.seqlen, 1, []), 0.0
    for mask, blocks in masks.items():
        found = loads(mask, whole, whole, needed_keys(mask, whole.segments, train.seqlen)).pairs.sum()
        pairs += float(found) * train.global_batch * blocks / sum(masks.values())
    return {
        "load": load or Load(train.micro_batch * -(-train.seqlen // degree), pairs),
        "mean": -(-train.micro_batch * train.seqlen // degree),
        "step_tokens": train.global_batch * train.seqlen,
        "micro_batches": max(1, accumulation(config, gpus)),
        "masks": masks,
        "whole_pairs": pairs,
        "exchanging": config.attention.head_ranks or 1,
        "alone": degree == 1,
    }


def dtype_of(config: Config) -> torch.dtype:
    """Of the activations on a GPU."""
    return torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
