"""What an engine and the training loop ask of a language model, whichever it is.

Legend: B sequences, T this rank's tokens of a sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ringflash.training.memory.blocks import BlockMemory


class Decoder(nn.Module, ABC):
    """A language model whose attention spans the ranks that share a sequence.

    `forward` takes what `shard` returned, on this rank's device, and gives the sum of this rank's cross entropies, a
    scalar; with per_token=True each token's (B, T) fp32 without a gradient, 0 where there is no label.

    Attributes:
        dtype: of the activations.
        vocab_size: rows of the embedding.
        memory: what is kept of its blocks for the backward pass.
    """

    dtype: torch.dtype
    vocab_size: int
    memory: BlockMemory

    def keep(self, policy: str, device: torch.device, host_bytes: int | None = None) -> None:
        """Keep of the blocks what a policy says; arguments are those of `BlockMemory.start`.

        Raises:
            ArgumentError: the model cannot have its blocks computed again.
        """
        self.memory.start(policy, device, host_bytes)

    def whole_blocks(self) -> list[nn.Module]:
        """Modules that use all of their weights in one go: whoever divides weights gathers theirs together."""
        return []

    @abstractmethod
    def compile_blocks(self) -> None:
        """Have torch.compile compile what its blocks compute beside attention and tiles; comes before `keep`."""

    def parts(self) -> list[nn.Module]:
        """Modules in the order in which they run, whose weights are wanted only while each is called."""
        return []

    @abstractmethod
    def attention_width(self) -> int | None:
        """Elements of a token's queries and values, of all query heads and layers; None where that is not known."""

    def experts_share(self) -> float | None:
        """Share of a layer's experts that a token is sent to; None without any, or where that is not known."""
        return None

    @abstractmethod
    def initialise(self, name: str, weight: Tensor) -> None:
        """Fill an fp32 tensor with the initial values of the parameter of that name, the same on every rank."""

    @abstractmethod
    def shard(self, batch: dict[str, Any]) -> dict[str, Any]:
        """This rank's part of a batch that all ranks of the group have whole, on the CPU.

        Runs in a thread beside the step, so it says nothing to other ranks.

        Args:
            batch: "input_ids" (B, S), "cu_seqlens" over the B * S tokens, and optionally "labels" (B, S), not shifted.

        Returns:
            Among others "labels" (B, T), shifted, "position_ids" (B, T) in their documents, and "sharding".
        """

    def source(self) -> str:
        """What tells the files that the model is read from apart from others; of a model without files, nothing."""
        return ""

    def passed_over(self) -> str:
        """What of the files is not read, in a line; of a model without files, nothing."""
        return ""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What the model is, for checkpoints and `ringflash.export`; fits into JSON."""
