"""A plan in numbers of keys, all ranks at once: who attends to whose keys in which stage, and from where they come.

From this the cost model predicts how long a plan takes, without making the plans of all ranks, which for hundreds of
them takes seconds. Whoever makes a plan makes its outline.

Legend: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outline:
    """Stages and routes.

    Attributes:
        stages: how many there are.
        stage: (R, R), in which a rank attends to the keys of an owner, by (rank, owner).
        source: (R, R), from which rank these come, in the stage before; on the diagonal the rank itself.
        piece: see `RankPlan`.
    """

    stages: int
    stage: np.ndarray
    source: np.ndarray
    piece: int | None = None

    def carried(self, keys: np.ndarray) -> np.ndarray:
        """Keys that reach a rank from each owner, (R, R), of which it passes on what the ranks behind it need.

        Args:
            keys: (R, R), how many keys of each owner a rank sees.

        Of several ranks' needs the largest is taken for all: needs are mostly nested.
        """
        carried = keys.copy()
        np.fill_diagonal(carried, 0)
        rank, owner = np.nonzero(self.source != np.arange(len(keys)))  # what comes from its owner is passed on by none
        stages = self.stage[rank, owner].astype(np.int16)  # of which numpy sorts fast
        order = np.argsort(stages, kind="stable")
        rank, owner = rank[order], owner[order]
        source, edges = self.source[rank, owner], np.searchsorted(stages[order], np.arange(self.stages + 1))
        for stage in range(self.stages - 1, 1, -1):
            now = slice(edges[stage], edges[stage + 1])
            before = source[now], owner[now]  # no two of them alike: a rank passes a block on to one other in a stage
            carried[before] = np.maximum(carried[before], carried[rank[now], owner[now]])
        return carried
