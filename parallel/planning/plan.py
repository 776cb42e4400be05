"""A plan: who attends which keys when, and which keys travel meanwhile. Plain data, no torch.

A plan is made for one rank at a time. In stage i the rank attends its own queries to some keys (`work`): its own, those
that arrived for the stage, or both. While it does, keys for stage i + 1 arrive and others leave. The backward pass
walks the same stages and, behind the work of each, sends the gradient parts of foreign keys to the owners of the keys.

    plan = ring(Mask.causal(), Partition.zigzag(4096, 4))
    plan.of(1).stages[0].receives       # (Move(peer=0, segments=((0, 512),)),)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ringflash.parallel.planning.outline import Outline
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, count


@dataclass(frozen=True)
class Move:
    """Rows of some global key positions that go to another rank, or come from it.

    Attributes:
        peer: the other rank.
        segments: which positions.
        relayed: what is sent arrived from elsewhere before; otherwise it is this rank's own.
    """

    peer: int
    segments: Segments
    relayed: bool = False


@dataclass(frozen=True)
class Stage:
    """What one rank does in one step of a plan.

    Attributes:
        work: key segments that its queries attend to.
        receives: keys and values that arrive before the next stage.
        sends: keys and values that leave during this stage.
        returns: gradient parts of foreign keys that leave for their owners after the work, in the backward pass.
        reduces: gradient parts of own keys that arrive after the work, to be added up.
    """

    work: Segments = ()
    receives: tuple[Move, ...] = ()
    sends: tuple[Move, ...] = ()
    returns: tuple[Move, ...] = ()
    reduces: tuple[Move, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.work or self.receives or self.sends or self.returns or self.reduces)


@dataclass(frozen=True)
class Buffers:
    """The most key positions that lie beside a rank's own at one time; what the executor allocates.

    Attributes:
        arrivals: in each of two buffers, which take turns: one is attended to and sent from while the other fills.
        returns: gradient parts that leave at once, in each of two or more (`Program.reduced_ahead`).
        reduces: gradient parts that arrive at once, in each of one or more.
    """

    arrivals: int = 0
    returns: int = 0
    reduces: int = 0

    @staticmethod
    def of(stages: tuple[Stage, ...], piece: int | None = None) -> Buffers:
        """What stages need whose gradient parts travel in pieces of so many positions; whole if None."""
        return Buffers(
            *(
                max((tokens_at_once(getattr(stage, name), piece if gradients else None) for stage in stages), default=0)
                for name, gradients in (("receives", False), ("returns", True), ("reduces", True))
            )
        )


def without_idle_end(stages: list[Stage]) -> tuple[Stage, ...]:
    """Stages without those at the end in which there is nothing to do; at least one."""
    last = max((index for index, stage in enumerate(stages) if stage), default=0)
    return tuple(stages[: last + 1])


def tokens_at_once(moves: tuple[Move, ...], piece: int | None) -> int:
    """Positions of several moves that travel together, each of them in pieces if one says how long."""
    sizes = (count(move.segments) for move in moves)
    return sum(sizes if piece is None else (min(size, piece) for size in sizes))


@dataclass(frozen=True)
class RankPlan:
    """The stages of one rank.

    Attributes:
        rank: which one.
        queries: query positions that it holds.
        keys: key positions that it holds.
        stages: what it does, in order. Those at the end in which it has nothing to do are left out.
        buffers: what lies beside its own keys.
        piece: in the backward pass keys are worked on in pieces of so many positions, whose gradient parts travel one
            after another; each stage then works on keys of a single owner. None: all of a stage at once.
    """

    rank: int
    queries: Segments
    keys: Segments
    stages: tuple[Stage, ...]
    buffers: Buffers
    piece: int | None = None

    def among(self, ranks: Sequence[int]) -> RankPlan:
        """The same plan among some ranks of a larger group, which are the plan's first, second and so on."""
        if list(ranks) == list(range(len(ranks))):
            return self
        names = ("receives", "sends", "returns", "reduces")
        stages = [
            replace(
                stage,
                **{
                    name: tuple(replace(move, peer=ranks[move.peer]) for move in getattr(stage, name)) for name in names
                },
            )
            for stage in self.stages
        ]
        return replace(self, rank=ranks[self.rank], stages=tuple(stages))

    @property
    def moved_tokens(self) -> int:
        """Key positions that leave this rank in the forward pass."""
        return sum(count(move.segments) for stage in self.stages for move in stage.sends)


class Plan:
    """The plans of all ranks, each made when it is asked for.

    Attributes:
        name: of the generator.
        queries: which query positions each rank holds.
        keys: which key positions each rank holds; the same partition in self-attention.
    """

    def __init__(
        self,
        name: str,
        queries: Partition,
        keys: Partition,
        of: Callable[[int], RankPlan],
        outline: Callable[[], Outline] | None = None,
    ) -> None:
        self.name, self.queries, self.keys = name, queries, keys
        self.of = of
        """The plan of one rank."""
        self._outline = outline

    @cached_property
    def outline(self) -> Outline:
        """All ranks' plans in numbers."""
        assert self._outline is not None  # plans by hand may have none
        return self._outline()

    @cached_property
    def ranks(self) -> tuple[RankPlan, ...]:
        """The plans of all ranks, for pictures and proofs; a rank that attends makes only its own."""
        return tuple(map(self.of, range(self.queries.ranks)))
