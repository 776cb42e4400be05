"""A plan in numbers of keys, all ranks at once: who attends to whose keys in which stage, and from where they come.

From this the cost model predicts how long a plan takes, without making the plans of all ranks, which for hundreds of
them takes seconds. Whoever makes a plan makes its outline.

Legend: R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEVER = -1
"""Stage of keys that nobody attends to, and the source of keys that nobody sends."""


@dataclass(frozen=True)
class Outline:
    """Stages and routes.

    Attributes:
        stages: how many there are.
        stage: (R, R) int64, in which a rank attends to the keys of an owner, by (rank, owner); its own in the first
            of `own`.
        source: (R, R) int64, from which rank these come, in the stage before; on the diagonal the rank itself.
        own: stages in which ranks attend to equal parts of their own keys.
        piece: see `RankPlan`.
    """

    stages: int
    stage: np.ndarray
    source: np.ndarray
    own: tuple[int, ...] = (0,)
    piece: int | None = None

    def carried(self, keys: np.ndarray) -> np.ndarray:
        """Keys that reach a rank from each owner, (R, R), of which it passes on what the ranks behind it need.

        Args:
            keys: (R, R), how many keys of each owner a rank sees.

        Of several ranks' needs the largest is taken for all: needs are mostly nested.
        """
        carried = keys.copy()
        np.fill_diagonal(carried, 0)
        rank, owner = np.nonzero(self.source != np.arange(len(keys))[None, :])
        latest = np.argsort(-self.stage[rank, owner], kind="stable")
        rank, owner = rank[latest], owner[latest]
        stages = self.stage[rank, owner]
        source = self.source[rank, owner]
        for stage in range(self.stages - 1, 1, -1):
            now = slice(*np.searchsorted(-stages, [-stage, -stage + 1]).tolist())
            np.maximum.at(carried, (source[now], owner[now]), carried[rank[now], owner[now]])
        np.fill_diagonal(carried, 0)
        return carried
