"""Which plan: the fastest by prediction that does not take too much memory.

Where keys are passed on from rank to rank, the ring unless another is clearly faster. Where ranks take them from their
owners, plans differ in their launches alone, and fewer also ask less of the host.

    choice = choose(mask, queries, queries)
    choice.name                                   # "counter-ring"
    print(choice.describe())                      # what it does, and what the others would take

Every rank chooses for itself and must find the same, so nothing is looked at but what is the same on all of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ringflash.kernels.kept import Kept
from ringflash.parallel.planning.cost import Prediction, Shape, predict
from ringflash.parallel.planning.generators import in_words, plan_named
from ringflash.parallel.planning.level_queries import crossing_seconds
from ringflash.parallel.planning.loads import loads
from ringflash.parallel.planning.machine import Machine, machine_for
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.visibility import needed_keys

CLEARLY = 0.9
"""Where keys are passed on, a plan is taken instead of the ring if it is predicted to take at most this share of its
time."""

LEAST = 5e-3
"""Seconds of attention by the ring from which on anything else is taken there. Of less, the time of hosts decides, some
milliseconds a call, which the model does not know."""

AT_ALL = 0.99
"""The same where ranks take keys from their owners: for less, none is worth the memory it takes beyond the ring."""

MEMORY = 2**31
"""Bytes that a plan may take beside a rank's own keys, or as many as the ring takes where that is more."""

MOST_RANKS = 128
"""Among more, choosing takes longer than planning; name a plan, which `python launch/plan.py` compares."""

CANDIDATES = ("ring", "counter-ring", "double-ring", "direct-0", "direct-1", "direct-2", "direct-3")
"""Plans among which to choose."""


@dataclass(frozen=True)
class Choice:
    """A plan and why.

    Attributes:
        name: of the plan.
        predicted: what plans would cost, by name; empty where there was nothing to choose.
        machine: that was predicted for.
        shape: of the attention.
        because: why this one, in words.
        level: shares to which queries cross inside of attention; None where they stay.
        crossing: seconds in which they do.
        pairs: of queries and keys that see each other, over all ranks; 0 where nothing was predicted.
    """

    name: str
    predicted: dict[str, Prediction]
    machine: Machine
    shape: Shape
    because: str
    level: Partition | None = None
    crossing: float = 0.0
    pairs: int = 0

    @property
    def cost(self) -> Prediction:
        """What is predicted of the plan, without that queries cross."""
        return self.predicted[self.name]

    def describe(self) -> str:
        """The plan, why it was taken, and what was predicted of all, in words."""
        said = f"{self.name}: {in_words(self.name)}; {self.because}"
        if not self.predicted:
            return said
        shape, lines = self.shape, [said]
        heads = f"{shape.heads} query and {shape.key_heads} key heads of {shape.head_dim}"
        heads += f" in {shape.groups} groups one after another" * (shape.groups > 1)
        lines.append(f"predicted for a layer with {heads} on {self.machine.name}, forward and backward:")
        for name, cost in self.predicted.items():
            lines.append(
                f"  {name}: {cost.total * 1e3:.3g} ms, of it attention {cost.attention * 1e3:.3g} ms; "
                f"{cost.memory / 2**20:,.0f} MiB beside own keys"
            )
        return "\n".join(lines)


def choose(
    mask: Mask,
    queries: Partition,
    keys: Partition | None = None,
    hosts: int = 1,
    machine: Machine | None = None,
    shape: Shape | None = None,
    memory: int = MEMORY,
    token_work: int = 0,
    level: Partition | None = None,
) -> Choice:
    """The plan for a mask.

    Args:
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys; like the queries if None.
        hosts: how many hosts the ranks lie on, equally many on each, in order.
        machine: that attention runs on; what was measured here if None, or H100s.
        shape: of the attention; that of a model of some 8 billion parameters if None.
        memory: see `MEMORY`.
        token_work: see `cost.predict`.
        level: shares to which queries may cross, where that is clearly faster.
    """
    keys, machine, shape = keys or queries, machine or _known(queries.ranks, hosts), shape or Shape()
    rules = hashlib.blake2b(mask.spec().encode(), digest_size=16).digest()
    crossed = None if level is None else level.digest
    known = rules, queries.digest, keys.digest, hosts, machine, shape, memory, token_work, crossed
    found = _choices.get(known)
    if found is None:
        found = _choose(mask, queries, keys, hosts, machine, shape, memory, token_work)
        if level is not None:
            found = _with_level_queries(found, mask, queries, keys, level, memory, token_work)
        _choices.add(known, found)
    return found


def _with_level_queries(
    stay: Choice, mask: Mask, queries: Partition, keys: Partition, level: Partition, memory: int, token_work: int
) -> Choice:
    """The plan for queries that cross, if that is clearly faster than the one for those that stay."""
    cross = _choose(mask, level, keys, 1, stay.machine, stay.shape, memory, token_work, queries)
    if not stay.predicted or not cross.predicted:
        return stay  # nothing has to move, or there are too many ranks to choose for
    crossing = crossing_seconds(queries, level, stay.machine, stay.shape)
    share = (cross.cost.total + crossing) / stay.cost.total
    if share > CLEARLY:
        return stay
    because = f"queries cross to level shares and results come back, predicted to take {share:.2f} of the time without"
    return replace(cross, because=because, level=level, crossing=crossing)


def _nbytes(choice: Choice) -> int:
    """Of what was predicted, and about as much as the rest takes."""
    passes = [way for cost in choice.predicted.values() for way in (cost.forward, cost.backward)]
    runs = 0 if choice.level is None else sum(map(len, choice.level.segments))
    return 4096 + 200 * runs + sum(x.nbytes for way in passes for x in (way.compute, way.wait, way.rest))


_choices = Kept(32 * 2**20, size=_nbytes)
"""By digests of what was asked for, so that masks are not kept. To choose takes milliseconds, and steps whose sequences
lie alike ask for the same."""


def _choose(
    mask: Mask,
    queries: Partition,
    keys: Partition,
    hosts: int,
    machine: Machine,
    shape: Shape,
    memory: int,
    token_work: int,
    held: Partition | None = None,
) -> Choice:
    """See `choose`; `held` is what ranks hold outside of attention, if that is not the queries."""
    if queries.ranks > MOST_RANKS:
        return Choice("ring", {}, machine, shape, f"among more than {MOST_RANKS} ranks nothing else is taken unasked")
    found = loads(mask, queries, keys, needed_keys(mask, queries.segments, keys.length))
    if found.keys.sum() == found.keys.trace():
        return Choice("ring", {}, machine, shape, "no keys have to move")
    names = [name for name in CANDIDATES if hosts > 1 or name != "double-ring"]
    plans = {name: plan_named(name, mask, queries, keys, hosts) for name in names}
    tokens = np.array((held or queries).counts())
    predicted = {
        name: predict(plan.outline, found, machine, shape, hosts, token_work, tokens) for name, plan in plans.items()
    }
    allowed = max(memory, predicted["ring"].memory)
    owners = machine.inside.ahead and hosts == 1
    fitting = [x for x in names if predicted[x].memory <= allowed]
    fastest = min(fitting, key=lambda x: predicted[x].total)
    gained = predicted["ring"].total - predicted[fastest].total
    share = 1 - gained / (predicted["ring"].attention if owners else predicted["ring"].total)
    name, because = fastest, f"predicted to take {share:.2f} of the ring's time"
    if fastest == "ring":
        because = f"the fastest by prediction of those that take no more than {allowed / 2**20:,.0f} MiB"
    elif not owners and predicted["ring"].attention < LEAST:
        because = f"attention takes it less than {LEAST * 1e3:g} ms, too little to predict what is faster"
        name = "ring"
    elif share > (AT_ALL if owners else CLEARLY):
        because, name = f"{fastest} is predicted to take {share:.2f} of its time, which is not clearly less", "ring"
    return Choice(name, predicted, machine, shape, because, pairs=int(found.pairs.sum()))


@cache
def _known(ranks: int, hosts: int) -> Machine:
    """Read once: it must not change between the shardings of a program."""
    return machine_for(ranks, hosts)
