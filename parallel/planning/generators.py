"""Plans by their names."""

from __future__ import annotations

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.counter_ring import counter_ring
from ringflash.parallel.planning.direct import direct
from ringflash.parallel.planning.double_ring import check_hosts, double_ring
from ringflash.parallel.planning.plan import Plan
from ringflash.parallel.planning.ring import ring
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition

NAMES = ("ring", "counter-ring", "double-ring", "direct-0", "direct-1", "direct-2", "direct-3")
"""Plans; "direct-" takes any number of waves."""

WORDS = {
    "ring": "keys go from rank to rank",
    "counter-ring": "keys go from rank to rank both ways at once, each half as far",
    "double-ring": "keys go round the ranks of a host before they go on to the next host",
    "direct": "keys come straight from the ranks that own them",
}
"""What plans do, for people."""


def check_plan(name: str) -> None:
    """Raise ArgumentError unless a plan has that name."""
    kind, _, waves = name.partition("-") if isinstance(name, str) else ("", "", "")
    named = isinstance(name, str) and name in NAMES
    if not named and not (kind == "direct" and waves.isdecimal()):
        raise ArgumentError(f"plan={name!r}; allowed are {', '.join(NAMES)}, and direct with more waves")


def in_words(name: str) -> str:
    """What a plan does."""
    kind, _, waves = name.partition("-")
    if kind == "direct":
        when = {0: ", before anything is attended to", 1: ", all at once"}
        return WORDS[kind] + when.get(int(waves), f", in {waves} waves")
    return WORDS[name]


def plan_named(name: str, mask: Mask, queries: Partition, keys: Partition | None = None, hosts: int = 1) -> Plan:
    """The plan of that name.

    Args:
        name: one of `NAMES`, or "direct-" with another number of waves.
        mask: which keys a query position sees.
        queries: which query positions each rank holds.
        keys: which keys; like the queries if None.
        hosts: how many hosts the ranks lie on, equally many on each, in order.

    Raises:
        ArgumentError: there is no such plan, or hosts do not divide the ranks.
    """
    check_plan(name)
    check_hosts(hosts, queries.ranks)
    if name == "ring":
        return ring(mask, queries, keys)
    if name == "counter-ring":
        return counter_ring(mask, queries, keys)
    if name == "double-ring":
        return double_ring(mask, queries, keys, hosts)
    return direct(mask, queries, keys, waves=int(name.removeprefix("direct-")))
