"""Loss by position in the context: does a longer context help?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.parallel.labels import IGNORED_LABEL

BINS_PER_OCTAVE = 2
"""Ranges of context grow by 2 ** (1 / BINS_PER_OCTAVE)."""


class PositionBin(NamedTuple):
    """Mean loss in nats per token behind `first` to `last` tokens of context."""

    first: int
    last: int
    loss: float
    tokens: int


class PositionLoss:
    """Sums of losses by position in a document, or in the part of it that its sequence holds.

    Attributes:
        totals: (2, seqlen) float64 on the CPU: losses in nats, predictions. Sum it over ranks (all_reduce) before
            `bins`.
    """

    def __init__(self, seqlen: int) -> None:
        self.totals = torch.zeros(2, seqlen, dtype=torch.float64)

    def add(self, position_ids: Tensor, losses: Tensor, labels: Tensor) -> None:
        """Add predictions, three tensors of one shape; those with the label -100 do not count."""
        predicted = labels.cpu() != IGNORED_LABEL
        positions = position_ids.cpu()[predicted]
        values = losses.detach().cpu()[predicted].double()
        self.totals[0].index_add_(0, positions, values)
        self.totals[1].index_add_(0, positions, torch.ones_like(values))

    def bins(self) -> list[PositionBin]:
        """Means over growing ranges of context; ranges without tokens are left out."""
        seqlen = self.totals.shape[1]
        steps = math.ceil(math.log2(seqlen) * BINS_PER_OCTAVE) + 1
        edges = sorted({min(seqlen, round(2 ** (i / BINS_PER_OCTAVE))) for i in range(steps)} | {seqlen})
        starts = [0, *edges]
        sums = [self.totals[:, start:stop].sum(dim=1).tolist() for start, stop in zip(starts, edges, strict=False)]
        return [
            PositionBin(start + 1, stop, nats / count, int(count))
            for start, stop, (nats, count) in zip(starts, edges, sums, strict=False)
            if count
        ]
