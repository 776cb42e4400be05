"""A plan as one rank executes it: positions turned into rows of tensors on a device.

Legend: T query rows of this rank, S key rows that a stage attends to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ringflash.kernels.kept import build_to_keep
from ringflash.parallel.planning.plan import Buffers
from ringflash.parallel.planning.pulls import Pull, Share, pulls
from ringflash.parallel.planning.row_places import ALIGNED, segment_positions
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.segments import intersect

LEAST_SPLIT = 4096
"""Own keys from which on the backward pass takes the first half of them last, while the last gradients travel. Of
fewer, two launches take longer than one by more than what they hide."""

AHEAD = 65536
"""Keys whose gradient parts may have arrived without being added up, of plans that are not worked on in pieces."""


@dataclass(frozen=True)
class Program:
    """All stages for one rank on one device.

    Attributes:
        queries: number of query rows that the rank holds.
        keys: number of key rows that it holds.
        stages: what it does, in order.
        buffers: key rows that lie beside its own.
        piece: see `RankPlan`.
        query_places: (T,) place of each query row among the keys; None if it is the row's own number.
        device: where the launches' tensors are.
        shares: of the keys, for each rank that the plan is for.
        given: which own rows other ranks attend to, in runs: first and one behind the last of each.
    """

    queries: int
    keys: int
    stages: tuple[StageProgram, ...]
    buffers: Buffers
    query_places: Tensor | None
    device: torch.device
    piece: int | None = None
    shares: tuple[Share, ...] = ()
    given: tuple[tuple[int, int], ...] = ()

    @cached_property
    def is_one_launch(self) -> bool:
        """Whether all work is one launch, of all own keys as they lie."""
        launches = [launch for pieces in self.backward_stages for piece in pieces for launch in piece.launches]
        return len(launches) == 1 and self.stages[0].everything

    @cached_property
    def pulls(self) -> tuple[tuple[Pull, ...], ...]:
        """For each stage, where what the next one attends to is to be found at its owners, in ascending order."""
        following = [*(stage.key_segments for stage in self.stages[1:]), ()]
        wanted = (intersect(tuple(sorted(x.coming)), y) for x, y in zip(self.stages, following, strict=True))
        return tuple(pulls(self.shares, x) for x in wanted)

    @cached_property
    def query_positions(self) -> Tensor:
        """(T,) int32 place of each query row among the keys, for modifiers that depend on it."""
        places = self.query_places
        if places is None:
            return build_to_keep(lambda: segment_positions(((0, self.queries),), self.device), self.device)
        return build_to_keep(lambda: places.int().to(self.device), self.device)

    @cached_property
    def backward_stages(self) -> tuple[tuple[StageProgram, ...], ...]:
        """The pieces of each stage in which the backward pass works.

        The first half of the own keys comes behind everything else: while it is worked on, the gradients of the last
        foreign keys travel. Under a causal mask that half has the more work.
        """
        return build_to_keep(self._backward_stages, self.device)

    def _backward_stages(self) -> tuple[tuple[StageProgram, ...], ...]:
        pieces = [(stage,) if self.piece is None else stage.pieces(self.piece) for stage in self.stages]
        own = self.stages[0]
        half = -(-self.keys // 2 // ALIGNED) * ALIGNED
        alone = own.everything and own.launches and not own.returns and not own.reduces
        if len(self.stages) > 1 and alone and self.keys >= LEAST_SPLIT:
            size = self.piece or self.keys
            late = [own.piece(first, min(first + size, half)) for first in range(0, half, size)]
            early = [own.piece(first, min(first + size, self.keys)) for first in range(half, self.keys, size)]
            pieces[0] = tuple(early)
            pieces[-1] = (*pieces[-1], *late)
            pieces = [tuple(replace(x, is_last=x is late[-1]) for x in stage) for stage in pieces]
        return tuple(pieces)

    @cached_property
    def reduced_ahead(self) -> int:
        """How often `buffers.reduces` is there, so that a rank that is behind does not hold up those that wait for it.

        Gradient parts that have arrived and are still to be added, or that left and have not been taken, are no more
        than twice as many keys as the rank has, nor more than a piece's, or `AHEAD` without pieces.
        """
        parts = sum(bool(piece.reduces or piece.returns) for stage in self.backward_stages for piece in stage)
        size = max(1, self.buffers.reduces, self.buffers.returns)
        return max(1, min(parts, min(2 * self.keys, self.piece or AHEAD) // size))

    @cached_property
    def sums_parts(self) -> bool:
        """Whether gradients of own keys are sums of several parts, which are then kept in fp32."""
        return any(stage.reduces or len(stage.launches) > 1 for stage in self.stages)

    @cached_property
    def _key_positions(self) -> dict[int, Tensor]:
        return {}

    def key_positions(self, index: int) -> Tensor:
        """(S,) int32 global positions of the keys that a stage attends to, for modifiers that depend on it."""
        found = self._key_positions.get(index)
        if found is None:
            segments = self.stages[index].key_segments
            found = build_to_keep(lambda: segment_positions(segments, self.device), self.device)
            self._key_positions[index] = found
        return found

    def tensors(self) -> Iterator[Tensor]:
        """Everything that it keeps on its device, for counting bytes; some more than once."""
        pieces = (piece for stage in vars(self).get("backward_stages", ()) for piece in stage)
        for stage in (*self.stages, *pieces):
            for launch in stage.launches:
                yield from launch.tensors()
            shipments = (*stage.sends, *stage.receives, *stage.returns, *stage.reduces)
            rows = (stage.own, stage.arrived, stage.order, stage.kept, *(x.rows for x in shipments))
            yield from (x for x in rows if isinstance(x, Tensor))
        yield from self._key_positions.values()
        yield from (x for x in (self.query_places, vars(self).get("query_positions")) if x is not None)

    def nbytes(self) -> int:
        """Bytes of its tensors."""
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.tensors()}
        return sum(storages.values())
