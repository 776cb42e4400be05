"""Which calls of ranks are one call, whatever a rank tries alone between.

Every rank says one thing after the other: that it makes a call, or that it refused one. The first things of all ranks
that are not over yet meet. Calls that meet are one call. What a rank refused and nobody else came for is over alone,
and calls go on to meet. So which calls meet follows from what ranks say in which order, and from nothing else: not from
when they say it, nor from how far others have gone ahead. All ranks find the same, each for itself.

Refused calls that meet where nobody came for one are over together, as where all ranks refuse the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CALL, TOLD, REFUSED, REFUSED_UNKNOWN, ENDED = range(1, 6)
"""What a rank says: it makes a call; it came to one and was told already that another refused it, before there was a
channel; it refused one; it refused one whose digest is not known, which may be any; it makes none any more."""

KIND, DIGEST = range(2)


class Said(NamedTuple):
    """What one rank says.

    Attributes:
        kind: one of the above.
        digest: of the call; 0 where it is not known.
        nbytes: see `Agreement.check`.
        ahead: 1 where the rank does not wait for the others.
    """

    kind: int
    digest: int = 0
    nbytes: int = 0
    ahead: int = 0


class Meeting(NamedTuple):
    """Of one thing of each rank.

    Attributes:
        over: ranks whose thing is over; the others' meets what comes behind those.
        apart: some ranks came for a call that others did not come for. All are over then.
    """

    over: Sequence[int]
    apart: bool = False


def meeting(said: Sequence[Said]) -> Meeting:
    """What becomes of the first things of all ranks that are not over; none of them has ended.

    Args:
        said: by each rank.
    """
    ranks, first = range(len(said)), said[0]
    if first[KIND] == CALL and all([x[KIND] == CALL and x[DIGEST] == first[DIGEST] for x in said]):
        return Meeting(ranks)
    kinds = {x.kind for x in said}
    best = CALL if CALL in kinds else TOLD  # who was told came, too, but need not be waited for
    came = {x.digest for x in said if x.kind == best}
    alone = [rank for rank in ranks if best < said[rank].kind <= REFUSED and said[rank].digest not in came]
    if came and alone:
        return Meeting(alone)
    if kinds == {CALL, TOLD}:  # those who refused it are known, and were so before
        return Meeting([rank for rank in ranks if said[rank].kind == TOLD])
    return Meeting(ranks, apart=CALL in kinds)
