"""What a sharding holds on one rank: partitions, plans, and programs on devices.

Legend: B sequences; S query and Sk key tokens of one sequence over all ranks; this rank holds T query rows of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import build_to_keep, hold_if_captured
from ringflash.kernels.torch_private import is_destroyed
from ringflash.parallel.agreement.rounds import digest_of
from ringflash.parallel.device_boundaries import batch_boundaries, check_on_device
from ringflash.parallel.planning.choose import Choice, choose
from ringflash.parallel.planning.choose_heads import ByHeads, choose_heads
from ringflash.parallel.planning.cost import Shape
from ringflash.parallel.planning.double_ring import check_hosts
from ringflash.parallel.planning.generators import check_plan, plan_named
from ringflash.parallel.planning.heads import UnionRows, rows_in_groups
from ringflash.parallel.planning.level_queries import level_queries
from ringflash.parallel.planning.local_program import local_program
from ringflash.parallel.planning.plan import RankPlan
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.pulls import Share
from ringflash.parallel.planning.query_rounds import QueryRound, query_rounds
from ringflash.parallel.planning.rank_program import rank_program
from ringflash.parallel.positions.documents import rows_apart
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import NAMES, Partition, check_name, default_partition, resolve
from ringflash.parallel.positions.visibility import visible_pairs
from ringflash.parallel.transport.head_exchange import HeadExchange
from ringflash.parallel.transport.row_exchange import RowExchange
from ringflash.parallel.transport.select import GroupTransport, transport_of

LONGEST_SHOWN = 200
"""Characters of a mask or a partition that ranks show each other; a layout of blocks may have a million."""


SOME = 1024
"""Queries that are looked at to know how many keys one sees on average."""

NUMBER_BYTES = 100
"""Of a document boundary, which Python keeps in a few tuples and arrays."""

MOST_FORMS = 256
"""Calls of different forms, by one sharding, whose digests are remembered."""


class Placement:
    """What a handle stands for: partitions, masks, plans and programs of one batch on one rank.

    Attributes:
        rank: of this process among the ranks that share a sequence.
        ranks: how many share it.
        head_ranks: how many of those that follow each other exchange heads for tokens, and stand for one in the plan.
        free: nobody said how many, so that all may, see `for_heads`.
        batch: B.
        seqlen: S.
        key_seqlen: Sk.
        rules: the masks as they were given.
        masks: the masks with all documents.
        documents: boundaries of the query documents that were given, without those that a batch adds; None without.
        on_device: boundaries of keys and queries that the host must not read, or None.
        group: ranks that communicate; None on one device, and until the sharding is first used on a group.
    """

    def __init__(
        self,
        masks: Sequence[Mask],
        weights: Sequence[int],
        place: tuple[int, int],
        sizes: tuple[int, int, int],
        partition: str | Partition | None,
        token_work: int,
        plan: tuple[str | None, int],
        boundaries: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
        on_device: tuple[Tensor, Tensor | None] | None,
        head_ranks: int | None = None,
    ) -> None:
        self.rank, self.ranks = place
        self.head_ranks, self.free = head_ranks or 1, head_ranks is None and self.ranks > 1
        self.batch, self.seqlen, self.key_seqlen = sizes
        self._plan_name, self.hosts = plan
        if self._plan_name is not None:
            check_plan(self._plan_name)
        check_hosts(self.hosts, self.ranks // self.head_ranks)
        self.boundaries, self.on_device = boundaries, on_device
        self.group: dist.ProcessGroup | None = None
        if partition is not None and not (isinstance(partition, str) and partition.startswith("[")):
            check_name(partition)  # a text may also be of a Partition
        self.rules: list[Mask] = []
        self.masks: list[Mask] = []
        self._choices: dict[int, Choice] = {}
        self._heads_choices: dict[int, ByHeads | None] = {}
        self._of_heads: dict[int, Placement] = {}
        self._rows_in_groups: dict[int, int] = {}
        self._crossings: dict[int, tuple[int, ...]] = {}
        self._plans: dict[int, RankPlan] = {}
        self._programs: dict[tuple[int, torch.device], Program] = {}
        self._rounds: dict[tuple[int, int, torch.device], tuple[QueryRound, ...] | None] = {}
        self._slope_rows: dict[tuple[bytes, int, torch.device], Tensor] = {}
        self._unions: dict[torch.device, tuple[UnionRows, UnionRows]] = {}
        self._exchanges: dict[bytes | torch.device, HeadExchange | RowExchange] = {}
        self._digests: dict[int, str] = {}
        self._call_digests: dict[tuple, int] = {}
        for mask in masks:
            self._add(mask)
        if partition is None:
            alike = self.seqlen == self.key_seqlen and self.on_device is None
            partition = default_partition(self.masks[0], self.seqlen, self.batch) if alike else "zigzag"
        self.partition_name = partition if isinstance(partition, str) else "a Partition"
        self._partition: dict[str, Any] = {
            "partition": partition,
            "token_work": token_work,
            "ranks": self.ranks,
            "batch": self.batch,
            "weights": weights,
        }
        if self.ranks > 1:
            for index in range(len(masks)):
                self.plan(index)

    def _add(self, rules: Mask) -> None:
        given = self.boundaries
        if given[0] is not None and rules.boundaries is not None:
            documents = Mask(boundaries=rules.boundaries, query_boundaries=rules.query_boundaries)
            documents &= Mask.documents(given[0], given[1])
            given = documents.boundaries, documents.query_boundaries
        elif given[0] is None:
            given = rules.boundaries, rules.query_boundaries
        bare = rules.without_documents()
        if self.on_device is None:
            rows = rows_apart(*given, self.batch, self.key_seqlen, self.seqlen)
            complete = bare & Mask(boundaries=rows[0], query_boundaries=rows[1])
        else:
            complete = bare
            check_on_device(bare, (self.batch, self.seqlen, self.key_seqlen), *self.on_device)
        if self.masks and (complete.boundaries, complete.query_boundaries) != (
            self.masks[0].boundaries,
            self.masks[0].query_boundaries,
        ):
            raise ArgumentError("masks have different documents; allowed are masks that differ in their rules only")
        if self.masks and complete.branches != self.masks[0].branches:
            raise ArgumentError("masks have different shared prefixes; allowed are masks that all have the same")
        if not self.masks:
            self.documents = given[0] if given[1] is None else given[1]
            known = self.documents if self.on_device is None else self.on_device[0]
            self.given_documents = None if known is None else len(known) - 1
        self.rules.append(rules)
        self.masks.append(complete)

    def __getstate__(self) -> dict[str, object]:
        if self.on_device is not None:
            raise ArgumentError("a Sharding of boundaries on a device does not travel to another process")
        without = ("_programs", "_rounds", "_slope_rows", "_unions", "_exchanges", "_of_heads")
        return vars(self) | {"group": None} | {name: {} for name in without}

    @cached_property
    def partition(self) -> Partition:
        """Which tokens of one sequence of queries each rank holds."""
        masks = self.masks[: len(self._partition["weights"])]
        return resolve(length=self.seqlen, masks=masks, **self._partition)

    @cached_property
    def key_partition(self) -> Partition:
        """The same of keys; the same partition in self-attention."""
        masks = self.masks[: len(self._partition["weights"])]
        same = self.key_seqlen == self.seqlen
        return self.partition if same else resolve(length=self.key_seqlen, masks=masks, **self._partition)

    @cached_property
    def rows(self) -> tuple[int, int]:
        """How many rows of queries and of keys this rank has."""
        return self.batch * self.partition.count(self.rank), self.batch * self.key_partition.count(self.rank)

    @cached_property
    def short(self) -> bool:
        """Whether no mask shows enough for groups of heads, or nobody may know, see `rows_in_groups`."""
        return self.on_device is not None or not rows_in_groups(1, self.key_seqlen)

    def rows_in_groups(self, index: int) -> int:
        """Rows of queries of the rank that has the most, or 0 where a mask shows too little for groups of heads.

        The same on all ranks; see `heads.rows_in_groups`.
        """
        found = self._rows_in_groups.get(index)
        if found is None:
            rows, found = self.batch * max(self.partition.counts()), 0
            if not self.short:
                queries, keys = self.batch * self.seqlen, self.batch * self.key_seqlen
                some = torch.arange(0, queries, max(1, queries // SOME))
                found = rows_in_groups(rows, visible_pairs(self.masks[index], some, keys) / len(some))
            self._rows_in_groups[index] = found
        return found

    def index_of(self, mask: Mask | None) -> int:
        """Which of the masks a call means; one that was not named before is added, None is the only one."""
        if mask is None:
            if len(self.rules) > 1:
                raise ArgumentError(
                    f"mask=None, and the sharding was made for {len(self.rules)} masks; pass the layer's"
                )
            return 0
        for index, rules in enumerate(self.rules):
            if rules is mask or rules == mask:
                return index
        self._add(mask.planned())  # a layout that a call brings is not kept
        return len(self.masks) - 1

    @cached_property
    def pairs(self) -> float:
        """See `Sharding.pairs`."""
        if self.on_device is not None:
            raise ArgumentError("pairs: cu_seqlens are on a device, where the host must not read them")
        queries, weights = self.partition.repeat(self.batch).positions(self.rank), self._partition["weights"]
        keys = self.batch * self.key_seqlen
        found = (weight * visible_pairs(mask, queries, keys) for mask, weight in zip(self.masks, weights, strict=False))
        return sum(found) / sum(weights)

    def bind(self, group: dist.ProcessGroup | None) -> None:
        """Say which group communicates; see `Sharding.bind`."""
        if self.ranks == 1 or (group is not None and group is self.group):
            return
        place = (0, 1) if group is None else (group.rank(), group.size())
        if self.group is not None and not is_destroyed(self.group):
            raise ArgumentError("sharding was made for another group than the one that attention is given")
        if place != (self.rank, self.ranks):
            raise ArgumentError(
                f"sharding is for rank {self.rank} of {self.ranks}; this process is rank {place[0]} of {place[1]} in "
                "the group"
            )
        self.group = group
        self._exchanges.clear()

    def _together(self, partition: Partition) -> Partition:
        """What the ranks hold together that the plan takes for one, of all sequences of the batch."""
        return partition.merged(self.head_ranks).repeat(self.batch)

    def plan(self, index: int) -> RankPlan:
        """This rank's plan for one of the masks."""
        found = self._plans.get(index)
        if found is None:
            queries, keys = self._of_plan(index)
            place, part = divmod(self.rank, self.head_ranks)
            plan = plan_named(self.plan_name(index), self.masks[index], queries, keys, self.hosts).of(place)
            found = self._plans[index] = plan.among(range(part, self.ranks, self.head_ranks))
        return found

    def plan_name(self, index: int) -> str:
        """By which plan keys travel under one of the masks."""
        choice = self.choice(index)
        return choice.name if choice is not None else self._plan_name or "ring"

    def choice(self, index: int) -> Choice | None:
        """Why a plan was chosen for one of the masks; None where it was named, and on one device."""
        if self._plan_name is not None or self.ranks == self.head_ranks:
            return None
        found = self._choices.get(index)
        if found is None:
            shape = Shape().in_groups(self.rows_in_groups(index), self.head_ranks).among(self.head_ranks)
            token_work = self._partition["token_work"] // self.head_ranks
            found = choose(
                self.masks[index],
                *self._laid_end_to_end,
                self.hosts,
                shape=shape,
                token_work=token_work,
                level=self._level,
            )
            self._choices[index] = found
        return found

    def heads_choice(self, index: int) -> ByHeads | None:
        """Why ranks exchange heads under one of the masks without being told to; None where they do not."""
        same = self.key_partition is self.partition and self.on_device is None
        if not (same and self.free and self._plan_name is None and self.hosts == 1):
            return None
        if index not in self._heads_choices:
            choice = self.choice(index)
            tokens = np.array(self._laid_end_to_end[0].counts())
            self._heads_choices[index] = (
                None if choice is None else choose_heads(choice, tokens, self.rows_in_groups(index))
            )
        return self._heads_choices[index]

    def for_heads(self, index: int, heads: int) -> tuple[Placement, int]:
        """What a call with so many query heads goes by, and which mask of that it has."""
        found = None if heads % self.ranks else self.by_heads(index)
        return (self, index) if found is None else (found, 0)

    def by_heads(self, index: int) -> Placement | None:
        """What calls go by under one of the masks whose ranks exchange heads without being told to; None if not."""
        if self.heads_choice(index) is None:
            return None
        found = self._of_heads.get(index)
        if found is None:
            found = self._of_heads[index] = self._exchanging(index)
        if found.group is not self.group:
            found.group = self.group
            found._exchanges.clear()
        return found

    def _exchanging(self, index: int) -> Placement:
        """The same sharding under one of the masks, all of whose ranks exchange heads."""
        sizes, work = (self.batch, self.seqlen, self.key_seqlen), self._partition["token_work"]
        place, plan = (self.rank, self.ranks), (None, 1)
        masks, weights = [self.rules[index]], [1]
        given = self.boundaries, self.on_device
        return Placement(masks, weights, place, sizes, self.partition, work, plan, *given, self.ranks)

    @cached_property
    def _level(self) -> Partition | None:
        """Shares to which queries may cross, of all sequences of the batch; None where they stay in any case."""
        alone = self.head_ranks == self.hosts == 1 and self.key_partition is self.partition
        level = level_queries(self.partition) if alone else None
        return None if level is None or level == self.partition else level.repeat(self.batch)

    def _of_plan(self, index: int) -> tuple[Partition, Partition]:
        """What the plan for one of the masks has on each of its ranks, of queries and of keys."""
        queries, keys = self._laid_end_to_end
        choice = self.choice(index)
        return (queries if choice is None or choice.level is None else choice.level), keys

    @property
    def _shares(self) -> tuple[Share, ...]:
        """The ranks of this one's plan, with the keys that each holds."""
        part = self.rank % self.head_ranks
        return tuple((part + self.head_ranks * i, x) for i, x in enumerate(self._laid_end_to_end[1].segments))

    @cached_property
    def _laid_end_to_end(self) -> tuple[Partition, Partition]:
        """What ranks that the plan takes for one hold together, of queries and keys of all sequences of the batch."""
        queries = self._together(self.partition)
        return queries, queries if self.key_partition is self.partition else self._together(self.key_partition)

    def program(self, index: int, device: torch.device) -> Program:
        """This rank's program for one of the masks, on a device."""
        found = self._programs.get((index, device))
        if found is None:
            found = self._programs[index, device] = build_to_keep(lambda: self._build(index, device), device)
        hold_if_captured(self, device)
        return found

    def _build(self, index: int, device: torch.device) -> Program:
        mask = self.masks[index]
        if self.ranks > 1:
            return rank_program(self.plan(index), mask, device, self._shares)
        bounds = self._on_device(device) if self.on_device is not None else (mask.boundaries, mask.query_boundaries)
        where = torch.device("cpu") if mask.has_layout else device
        keys, queries = (x if x is None or isinstance(x, Tensor) else torch.tensor(x, device=where) for x in bounds)
        return local_program(mask, keys, queries, self.batch * self.seqlen, self.batch * self.key_seqlen, device)

    def query_rounds(self, index: int, most: int, device: torch.device) -> tuple[QueryRound, ...] | None:
        """Queries of one device in rounds of at most so many under one of the masks; None where that cannot be."""
        mask, name = self.masks[index], (index, most, device)
        if self.ranks > 1 or self.on_device is not None or mask.query_boundaries is not None:
            return None
        if self.seqlen != self.key_seqlen:
            return None
        if name not in self._rounds:
            rows = self.batch * self.seqlen
            self._rounds[name] = build_to_keep(lambda: query_rounds(mask, rows, most, device), device)
        return self._rounds[name]

    def _on_device(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        assert self.on_device is not None
        keys, queries = (None if x is None else x.to(device, torch.int64) for x in self.on_device)
        assert keys is not None
        return batch_boundaries(keys, self.batch, self.seqlen), queries

    def slope_rows(self, index: int, documents: int, device: torch.device) -> Tensor | None:
        """Which row of ALiBi slopes (documents, H) belongs to each query row of this rank's plan, int64."""
        queries, _ = self._of_plan(index)
        name = queries.digest, documents, device
        found = self._slope_rows.get(name)
        if found is None:
            found = build_to_keep(lambda: self._rows_of_slopes(queries, documents, device), device)
            self._slope_rows[name] = found
        return found

    def _rows_of_slopes(self, queries: Partition, documents: int, device: torch.device) -> Tensor:
        own = self.documents
        if self.on_device is not None:
            own = self.on_device[0] if self.on_device[1] is None else self.on_device[1]
            own = own.to(device, torch.int64)
        positions = queries.positions(self.rank // self.head_ranks).to(device)
        if own is None or len(own) - 1 != documents:
            return positions // max(1, self.seqlen)
        own = own if isinstance(own, Tensor) else torch.tensor(own, device=device)
        return (torch.searchsorted(own, positions, right=True) - 1).clamp_(max=documents - 1)

    def call_digest(self, index: int, form: tuple) -> int:
        """Digest of a call under one of the masks.

        Args:
            index: which mask.
            form: everything else that must be the same on all ranks.
        """
        found = self._call_digests.get((index, form))
        if found is None:
            if len(self._call_digests) >= MOST_FORMS:
                self._call_digests.clear()
            found = self._call_digests[index, form] = digest_of((self.digest(index), form))
        return found

    @property
    def transport(self) -> GroupTransport:
        """Moves rows between the ranks of the group."""
        assert self.group is not None  # one device moves nothing
        return transport_of(self.group)

    def prepare(self, device: torch.device) -> None:
        """Make on a device what calls under the masks known by now take."""
        for index in range(len(self.masks)):
            by_heads = self.by_heads(index)
            if by_heads is None:
                self.program(index, device)
            else:
                by_heads.prepare(device)
        if self.head_ranks > 1:
            self.unions(device)

    def unions(self, device: torch.device) -> tuple[UnionRows, UnionRows]:
        """Rows of queries and of keys that this rank holds together with those that it exchanges heads with."""
        found = self._unions.get(device)
        if found is None:
            found = self._unions[device] = build_to_keep(lambda: self._new_unions(device), device)
        hold_if_captured(self, device)
        return found

    def _new_unions(self, device: torch.device) -> tuple[UnionRows, UnionRows]:
        first = self.rank - self.rank % self.head_ranks

        def together(partition: Partition) -> UnionRows:
            shares = partition.repeat(self.batch).segments
            return UnionRows.of(shares[first : first + self.head_ranks], device)

        queries = together(self.partition)
        return queries, queries if self.key_partition is self.partition else together(self.key_partition)

    def crossing(self, index: int) -> tuple[int, ...]:
        """See `call.Settings.sizes`."""
        found = self._crossings.get(index)
        if found is None:
            found = ()
            by_heads = self.by_heads(index)
            if by_heads is not None:
                found = by_heads.crossing(0)
            elif self.head_ranks > 1 and self.key_partition is self.partition:
                together = self._together(self.partition).count(self.rank // self.head_ranks)
                found = together, self.head_ranks, self.rows_in_groups(index)
            self._crossings[index] = found
        return found

    def exchange(self, index: int, device: torch.device) -> HeadExchange | RowExchange | None:
        """How this rank exchanges heads for tokens, or query rows, under one of the masks; None if it does not."""
        choice = self.choice(index)
        level = None if choice is None else choice.level
        if self.group is None or (self.head_ranks == 1 and level is None):
            return None
        name = device if level is None else level.digest
        found = self._exchanges.get(name)
        if found is None:
            if level is not None:
                found = RowExchange(self.transport, self.rank, self._laid_end_to_end[0], level)
            else:
                found = HeadExchange(self.transport, self.rank, self.head_ranks, *self.unions(device))
            self._exchanges[name] = found
        return found

    def nbytes(self) -> int:
        """Bytes of everything that lies on devices and of the largest things on the host."""
        programs = sum(program.nbytes() for program in self._programs.values())
        rows = sum(x.nbytes for x in self._slope_rows.values())
        rows += sum(x.nbytes() for x in self._of_heads.values())
        every = (each for found in self._rounds.values() for each in found or ())
        rows += sum(x.nbytes for each in every for shown in each.shown for x in shown.tensors())
        rows += sum(x.nbytes for both in self._unions.values() for union in set(both) for x in union.tensors())
        return programs + rows + NUMBER_BYTES * len(self.masks[0].boundaries or ())

    # What ranks compare

    @cached_property
    def of_all(self) -> dict[str, object]:
        """What must be the same on all ranks, in the order in which a disagreement is to be reported."""
        partition = self.partition_name
        if partition not in NAMES:
            partition = self.partition.spec()
        cu_seqlens = (self.masks[0].boundaries, self.masks[0].query_boundaries)
        return {
            "batch": self.batch,
            "seqlen (to be passed where lengths do not divide evenly)": self.seqlen,
            "key_seqlen": self.key_seqlen,
            "partition": _shown(partition),
            "head_ranks": self.head_ranks,
            "cu_seqlens": _short(b" ".join(np.array(x or (), dtype=np.int64).tobytes() for x in cu_seqlens)),
            "tokens of each rank": _short(self.partition.digest + self.key_partition.digest),
        }

    def shown_mask(self, index: int) -> str:
        """One of the masks, as ranks compare it."""
        return _shown(self.rules[index].spec(documents=False))

    def plan_text(self, index: int) -> str:
        """The plan for it, likewise."""
        choice = self.choice(index)
        crossing = " with level queries" if choice is not None and choice.level is not None else ""
        crossing += " or by heads" if self.heads_choice(index) is not None else ""
        return f"{self.plan_name(index)} on {self.hosts} hosts{crossing}"

    def digest(self, index: int) -> str:
        """`of_all`, the mask and its plan in a few characters."""
        found = self._digests.get(index)
        if found is None:
            rules = self.rules[index].spec(documents=False)
            found = self._digests[index] = _short(f"{self.of_all} {rules} {self.plan_text(index)}".encode())
        return found


def _short(values: bytes) -> str:
    return hashlib.blake2b(values, digest_size=8).hexdigest()


def _shown(text: str) -> str:
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}...)"
