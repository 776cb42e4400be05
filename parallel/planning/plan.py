"""A plan: who attends which keys when, and which keys travel meanwhile. Pure Python, no torch.

A plan has stages. In stage i each rank attends its own queries to some key intervals (`work`) while keys for stage
i + 1 travel (`sends`). The first stage works on local keys; every later one on what arrived for it. The backward pass
walks the same stages and returns each key gradient to its owner after the work on it.

    plan = ring(Mask.causal(), Partition.zigzag(4096, 4))
    plan.stages[0].sends[0]       # Transfer(source=0, destination=1, segments=((0, 512), (3584, 4096)))
"""

from __future__ import annotations

from dataclasses import dataclass

from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments, count, intersect, normalize


@dataclass(frozen=True)
class Transfer:
    """Keys and values of some global positions on their way from one rank to another."""

    source: int
    destination: int
    segments: Segments


@dataclass(frozen=True)
class Stage:
    """One step of a plan.

    Attributes:
        work: for each rank, the key segments that its queries attend in this stage.
        sends: transfers that run during this stage and arrive before the next one.
    """

    work: tuple[Segments, ...]
    sends: tuple[Transfer, ...]


@dataclass(frozen=True)
class Plan:
    """Stages over a partition.

    Attributes:
        partition: which query positions each rank holds.
        keys: which key positions each rank holds; the same partition in self-attention.
        stages: what happens, in order.
        buffer_tokens: the most key positions that a rank ever receives for one stage.
    """

    partition: Partition
    keys: Partition
    stages: tuple[Stage, ...]
    buffer_tokens: int

    def arrivals(self, stage: int, rank: int) -> tuple[Transfer, ...]:
        """Transfers that reach a rank before a stage, in order of their source."""
        if stage == 0:
            return ()
        incoming = (t for t in self.stages[stage - 1].sends if t.destination == rank)
        return tuple(sorted(incoming, key=lambda t: t.source))

    def returns(self, stage: int) -> tuple[Transfer, ...]:
        """Transfers of key gradients to their owners after a stage's work in the backward pass."""
        transfers = []
        for rank, work in enumerate(self.stages[stage].work):
            for owner, owned in enumerate(self.keys.segments):
                segments = intersect(work, owned) if owner != rank else ()
                if segments:
                    transfers.append(Transfer(rank, owner, segments))
        return tuple(transfers)

    def moved_tokens(self) -> int:
        """Key positions that cross between ranks in the forward pass."""
        return sum(count(transfer.segments) for stage in self.stages for transfer in stage.sends)


def ring(mask: Mask, partition: Partition, keys: Partition | None = None) -> Plan:
    """Each block of keys travels from its owner to the next rank, stage by stage, as far as somebody needs it.

    After Liu et al., Ring Attention (arXiv 2310.01889), except that only the positions that a later rank still needs
    are passed on: a window's ring ends early, and a causal ring drops what lies in the future of all that follow.

    Args:
        mask: which keys a query position sees.
        partition: how queries are dealt.
        keys: how keys are dealt, to as many ranks; like the queries if None.
    """
    keys = keys or partition
    ranks = partition.ranks
    needed = [
        normalize(interval for segment in segments for interval in mask.keys_needed(segment))
        for segments in partition.segments
    ]
    work = [[()] * ranks for _ in range(ranks)]
    sends: list[list[Transfer]] = [[] for _ in range(ranks)]
    for owner, owned in enumerate(keys.segments):
        wanted: Segments = ()
        for hop in reversed(range(ranks)):
            rank = (owner + hop) % ranks
            work[hop][rank] = intersect(owned, needed[rank])
            wanted = normalize((*wanted, *work[hop][rank]))
            travelling = intersect(owned, wanted)
            if hop and travelling:
                sends[hop - 1].append(Transfer((rank - 1) % ranks, rank, travelling))
    stages = [Stage(tuple(w), tuple(sorted(s, key=lambda t: t.source))) for w, s in zip(work, sends, strict=True)]
    while len(stages) > 1 and not any(stages[-1].work):
        stages.pop()
    return Plan(partition, keys, tuple(stages), max(keys.counts()))
