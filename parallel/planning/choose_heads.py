"""Whether ranks exchange heads for tokens where nobody says: where that is predicted to be faster than any plan.

All ranks then have all tokens of some heads, and as much to do as the others whatever the mask shows. What crosses is
not hidden behind attention, so it has to be little beside it: of long sequences, and of shares that are not level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ringflash.parallel.planning.choose import AT_ALL, CLEARLY, LEAST, MEMORY, Choice
from ringflash.parallel.planning.cost import Pass, Prediction
from ringflash.parallel.planning.heads import HeadShares, head_groups

COPIES = 2
"""How often what crosses is written and read within a GPU besides: where it is packed and where it is put together."""


@dataclass(frozen=True)
class ByHeads:
    """That ranks exchange heads, and why.

    Attributes:
        cost: what is predicted of it.
        because: in words.
    """

    cost: Prediction
    because: str


def choose_heads(plan: Choice, tokens: np.ndarray, rows: int) -> ByHeads | None:
    """Whether all ranks are to exchange heads, in place of what was chosen among plans.

    Args:
        plan: what was chosen among plans, for ranks that hold these tokens.
        tokens: (R,) that each rank holds.
        rows: see `heads.rows_in_groups`.
    """
    if not plan.predicted or plan.cost.attention < LEAST:
        return None
    cost = by_heads(plan, tokens, rows)
    allowed = max(MEMORY, plan.predicted["ring"].memory)
    share = 1 - (plan.cost.total + plan.crossing - cost.total) / (plan.cost.attention + plan.crossing)
    if cost.memory > allowed or share > (AT_ALL if plan.machine.inside.ahead else CLEARLY):
        return None
    return ByHeads(cost, f"predicted to take {share:.2f} of the time of {plan.name}")


def by_heads(plan: Choice, tokens: np.ndarray, rows: int) -> Prediction:
    """What it costs that all ranks exchange heads in place of a plan; see `choose_heads`.

    Forward, query, key and value cross and the result comes back; backward, the result's gradient crosses and the
    gradients of query, key and value come back. What crossed first is kept, but not by groups of heads nor with copies.
    """
    machine, shape, ranks = plan.machine, plan.shape, len(tokens)
    groups = head_groups(rows, shape.heads, shape.key_heads, shape.head_dim, ranks)
    row = shape.heads * shape.head_dim * shape.element
    sent = groups * _key_heads(shape.heads // groups, shape.key_heads // groups, ranks)
    keys, copied = sent * 2 * shape.head_dim, sent > shape.key_heads
    of_keys, gradients = keys * shape.element, keys * (4 if copied else shape.element)
    again = row + of_keys if groups > 1 or copied else 0
    forward, backward = machine.rates(shape.head_dim)
    passes = []
    for rest, operations, rate, there, back in (
        (plan.cost.forward.rest, 4, forward, row + of_keys, row),
        (plan.cost.backward.rest, 10, backward, row + again, row + gradients),
    ):
        launch = groups * machine.launch
        work = plan.pairs / ranks * operations * shape.heads * shape.head_dim / rate + launch
        leaving = tokens.max() * np.array([there, back]) * (ranks - 1) / ranks
        crossing = float(groups * machine.inside.time(leaving / groups).sum())
        crossing += float(COPIES * 2 * leaving.sum() / machine.memory)
        compute, wait = np.full((1, ranks), work), np.full((1, ranks), crossing)
        passes.append(Pass(compute, wait, rest, float(rest.max()) + work + crossing))
    # What crosses lies packed and as it arrived, and so does what comes back.
    nbytes = int(tokens.max()) * 2 * (2 * row + of_keys) // groups
    return Prediction(passes[0], passes[1], nbytes, 0)


def _key_heads(heads: int, key_heads: int, ranks: int) -> int:
    """How many all ranks have together, some of them several times; of a shape whose heads they need not divide."""
    return max(key_heads, ranks) if heads % ranks else ranks * HeadShares.of(heads, key_heads, ranks).keys
