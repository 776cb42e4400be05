"""`Sharding`: how one batch lies on the ranks of a group. Made once, ahead of the step, and held by whoever uses it.

    sharding = Sharding(Mask.causal(), cu_seqlens=[0, 700, 4096])
    x = sharding.shard(batch, dim=1)                        # this rank's tokens
    out, lse = attention(q, k, v, sharding=sharding)        # in every layer; nothing is worked out again

It joins a mask, a partition and a plan for one batch. All of that is plain data: it needs neither a process group nor a
device, only (rank, ranks), so a worker of a DataLoader makes it, and it travels pickled. The program, the plan in rows
of tensors, is made on the device when attention first asks for it, and lives as long as the sharding.

Legend: B sequences; S query and Sk key tokens of one sequence over all ranks, s and sk of them on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import TensorNotes
from ringflash.parallel.gather import gather_rows
from ringflash.parallel.handles import new_handle
from ringflash.parallel.labels import IGNORED_LABEL, as_int64, check_labels
from ringflash.parallel.mesh import ONE_DEVICE, Group, process_group
from ringflash.parallel.placement import LONGEST_SHOWN, Placement
from ringflash.parallel.planning.generators import in_words
from ringflash.parallel.planning.heads import check_head_ranks
from ringflash.parallel.planning.query_rounds import QueryRound
from ringflash.parallel.positions.balance import TOKEN_WORK
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Interval
from ringflash.parallel.sharding_arguments import (
    Boundaries,
    at_least,
    boundaries_on_host,
    hosts_of,
    length_of,
    masks_and_layers,
    place_of,
)


class Sharding:
    """How one batch lies on the ranks of a group.

    Args:
        mask: which keys a query may see; causal if None. Several, where models alternate them from layer to layer: a
            sequence, or a mapping to the number of layers that have each, by which "balanced" weighs them.
        seqlen: S; taken from `cu_seqlens` or the mask's documents if None.
        cu_seqlens: document boundaries over the B * Sk keys laid end to end, (documents + 1,); on the host, or with
            one rank on a device, where the host does not read them. Tokens behind the last one belong to no document:
            they see nothing, nobody sees them, and their gradients are zero.
        query_cu_seqlens: those of the B * S queries, where they differ.
        key_seqlen: Sk; S if None.
        batch: B.
        group: a ProcessGroup or one-dimensional DeviceMesh over whose ranks each sequence is sharded. None is the
            default group if torch.distributed is initialised, and one device otherwise; but a DataLoader's worker and
            a process of torchrun that has no group yet is refused: it has to say `rank` and `ranks`.
        rank: of the process that is to use it, where that is not this one, and in place of `group`.
        ranks: how many share a sequence.
        partition: "zigzag", "contiguous", "balanced" (equally long for the masks, documents kept whole where they fit),
            or a `Partition` of one sequence; also "stripe" (token by token), "zigzag_per_document" and
            "contiguous_per_document", as other libraries have them. None is "balanced" for one sequence of several
            packed documents or of a shared prefix, and "zigzag" for all else.
        head_ranks: how many ranks that follow each other exchange heads for tokens inside of attention (Ulysses, arXiv
            2309.14509): each of them has all of their tokens for its part of the heads, and the plan is one of such
            ranks (arXiv 2405.07719). It divides the number of ranks; 1 is the plan alone, all ranks no plan at all.
            None is 1, or all ranks where that is predicted to be faster and they divide a layer's query heads. What a
            rank holds outside of attention does not depend on it.
        token_work: what "balanced" takes the rest of a layer to cost a token, in visible pairs of attention: about 5
            times the width of a model. 0 levels attention alone.
        plan: how keys travel: "ring", "counter-ring" (both ways at once), "double-ring" (round each host, then on to
            the next), or "direct-0", "direct-1" and so on (from their owners, in so many waves). None is what is
            predicted to be fastest; queries of uneven shares may then cross to level ones, too. See `describe`.
        hosts: how many hosts the ranks lie on, equally many on each, in order; for predictions, and for "double-ring".
            None is one for every 8 ranks where these divide more than 8, and otherwise one.

    Raises:
        ArgumentError: something is not supported, by name and value.

    Example:
        >>> sharding = Sharding(Mask.causal(), seqlen=10, rank=0, ranks=2)
        >>> sharding.shard(torch.arange(10), dim=0)
        tensor([0, 1, 7, 8, 9])
    """

    def __init__(
        self,
        mask: Mask | Sequence[Mask] | Mapping[Mask, int] | None = None,
        *,
        seqlen: int | None = None,
        cu_seqlens: Boundaries | None = None,
        query_cu_seqlens: Boundaries | None = None,
        key_seqlen: int | None = None,
        batch: int = 1,
        group: Group = None,
        rank: int | None = None,
        ranks: int | None = None,
        partition: str | Partition | None = None,
        head_ranks: int | None = None,
        token_work: int = TOKEN_WORK,
        plan: str | None = None,
        hosts: int | None = None,
    ) -> None:
        masks, weights = masks_and_layers(mask)
        place, found = place_of(group, rank, ranks)
        exchanging = 1 if head_ranks is None else head_ranks
        check_head_ranks(exchanging, place[1])
        boundaries, on_device = boundaries_on_host(cu_seqlens, query_cu_seqlens, masks, place[1])
        if seqlen is None:
            seqlen = length_of(boundaries, on_device, masks, batch)
        key_seqlen = seqlen if key_seqlen is None else key_seqlen
        sizes = at_least("batch", batch, 1), at_least("seqlen", seqlen, 0), at_least("key_seqlen", key_seqlen, 0)
        token_work = at_least("token_work", token_work, 0)
        plans = plan, hosts_of(hosts, place[1] // exchanging)
        self._placement = Placement(
            masks, weights, place, sizes, partition, token_work, plans, boundaries, on_device, head_ranks
        )
        self._placement.group = found
        self._make_handles()

    def _make_handles(self) -> None:
        x = self._placement
        self._crossing = {rules.spec(): found for i, rules in enumerate(x.rules) if (found := x.crossing(i))}
        self._first_crossing = x.crossing(0)
        self.layout_comes_with_calls = x.rules[0].routed is not None
        """Whether the first mask has a layout of blocks that the host does not read."""
        self.documents = self._placement.given_documents
        """How many documents were given; None without any."""
        self._handles = [new_handle(self._placement, index) for index in range(len(self._placement.masks))]
        self._positions: dict[tuple[bool, torch.device], Tensor] = {}

    def __getstate__(self) -> Placement:
        return self._placement

    def __setstate__(self, placement: Placement) -> None:
        self._placement = placement
        self._make_handles()

    def __repr__(self) -> str:
        x = self._placement
        exchanged = f", heads exchanged by {x.head_ranks}" if x.head_ranks > 1 else ""
        return (
            f"Sharding({x.batch} x {x.seqlen:,} tokens, {x.partition_name}, rank {x.rank} of {x.ranks} with "
            f"{self.tokens:,}{exchanged}, {len(x.masks)} mask{'s' * (len(x.masks) > 1)})"
        )

    # What it says

    def crossing(self, mask: Mask | None) -> tuple[int, ...]:
        """What a call by one of the masks tells its operator of ranks that exchange heads; else empty.

        Rows that they hold together, how many ranks they are, and `Placement.rows_in_groups`.
        """
        if self._placement.ranks == 1:
            return ()
        if not torch.compiler.is_compiling():
            return self._placement.crossing(self._placement.index_of(mask))
        # Of masks that it was not made for nothing is kept: what traced code knows of a sharding does not change.
        return self._first_crossing if mask is None else self._crossing.get(mask.spec(), ())

    @property
    def rank(self) -> int:
        """Of the process that it is for."""
        return self._placement.rank

    @property
    def ranks(self) -> int:
        """How many ranks share a sequence."""
        return self._placement.ranks

    @property
    def head_ranks(self) -> int:
        """How many ranks that follow each other exchange heads for tokens; 1 where nobody said."""
        return self._placement.head_ranks

    @property
    def batch(self) -> int:
        """B."""
        return self._placement.batch

    @property
    def seqlen(self) -> int:
        """S."""
        return self._placement.seqlen

    @property
    def key_seqlen(self) -> int:
        """Sk."""
        return self._placement.key_seqlen

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks that it was made for, as they were given."""
        return tuple(self._placement.rules)

    @property
    def partition(self) -> Partition:
        """Which tokens of a sequence of queries each rank holds."""
        return self._placement.partition

    @property
    def key_partition(self) -> Partition:
        """The same of keys."""
        return self._placement.key_partition

    @property
    def tokens(self) -> int:
        """S."""
        return self.partition.count(self.rank)

    @property
    def max_tokens(self) -> int:
        """The most that s is on any rank: known everywhere without asking, for tiles that all ranks need as many of."""
        return max(self.partition.counts())

    @property
    def pairs(self) -> float:
        """Pairs of one of this rank's queries and a key that it sees: what attention works on.

        Of several masks the mean over the layers that have them; masks that were added by a call are not in it.
        """
        return self._placement.pairs

    @property
    def digest(self) -> str:
        """Tells shardings apart; the same on all ranks that mean the same."""
        return self._placement.digest(0)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share a sequence; None on one device, and in a process that has none."""
        return self._placement.group

    def peers(self, group: Group) -> Group:
        """Where an error in the arguments of a call is to be notified, to which `group` was passed as well."""
        if self.ranks == 1:
            return ONE_DEVICE
        return group if self.group is None else self.group

    def nbytes(self) -> int:
        """Bytes that it keeps on devices, and of the largest things on the host."""
        return self._placement.nbytes() + sum(x.nbytes for x in self._positions.values())

    def spans(self) -> tuple[tuple[Interval, ...], ...]:
        """For each rank the positions that it holds of a sequence, as half-open intervals."""
        return self.partition.segments

    def describe(self) -> str:
        """How tokens lie on the ranks, and for each mask by which plan keys travel and why, in words."""
        x = self._placement
        counts = self.partition.counts()
        spread = f"{counts[0]:,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        lines = [f"{x.batch} x {x.seqlen:,} tokens, {x.partition_name} over {x.ranks} ranks: {spread} on each"]
        for index, rules in enumerate(x.rules):
            choice = x.choice(index)
            name = x.plan_name(index)
            said = choice.describe() if choice is not None else f"{name}: {in_words(name)}; as it was named"
            if x.ranks == 1:
                said = "nothing travels on one device"
            elif x.ranks == x.head_ranks:
                said = f"all {x.ranks} ranks exchange heads for tokens"
            elif (heads := x.heads_choice(index)) is not None:
                said = (
                    f"all {x.ranks} ranks exchange heads for tokens where these divide a layer's query heads; "
                    f"{heads.because}, {heads.cost.total * 1e3:.3g} ms\nelse {said}"
                )
            elif x.head_ranks > 1:
                said += f"\n{x.head_ranks} ranks that follow each other exchange heads, and stand for one in this"
            lines.append(f"mask {rules.spec(documents=False)[:LONGEST_SHOWN]}\n  " + said.replace("\n", "\n  "))
        return "\n".join(lines)

    # Documents

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Document boundaries over the B * S queries, (documents + 1,) int64 on the CPU; None if on a device.

        Those of a batch's sequences are among them.
        """
        mask = self._placement.masks[0]
        if self._placement.on_device is not None:
            return None
        return torch.tensor(mask.query_boundaries or mask.boundaries)

    @cached_property
    def _document_starts(self) -> Tensor:
        """Where the document of each query begins, (B * S,) int64; behind the last one, where that ends."""
        edges = self.cu_seqlens
        if edges is None:
            raise ArgumentError("cu_seqlens are on a device, where the host must not read them; pass them on the CPU")
        flat = torch.arange(self.batch * self.seqlen)
        return edges[torch.searchsorted(edges, flat, right=True) - 1]

    @cached_property
    def position_ids(self) -> Tensor:
        """Positions of this rank's tokens in their documents, (B, s) int64 on the CPU.

        Of a shared prefix's branches: counted on from the prompt, as if each stood alone behind it.
        """
        whole, starts = torch.arange(self.batch * self.seqlen), self._document_starts
        branches = self._placement.masks[0].branches
        whole = whole - starts if branches is None else branches.tokens_before(whole, starts)
        return self.shard(whole.view(self.batch, self.seqlen), 1)

    def shifted_labels(self, ids: Tensor) -> Tensor:
        """The next token of the same document for each token of the whole batch, -100 where there is none.

        Nor has a shared prefix's prompt a next token, behind which several branches go on, nor has a branch's last one.

        Args:
            ids: (B, S) labels of the whole batch, not shifted: input ids, or such with -100 where nothing is learned;
                integers.

        Returns:
            (B, S) int64.

        Raises:
            ArgumentError: another shape or dtype; on the CPU also a negative label other than -100, if it is a target.
        """
        flat = as_int64("labels", ids).flatten()
        if tuple(ids.shape) != (self.batch, self.seqlen):
            raise ArgumentError(f"ids is {tuple(ids.shape)}; allowed is {(self.batch, self.seqlen)}, (batch, seqlen)")
        edges = self.cu_seqlens
        if edges is None:
            raise ArgumentError("cu_seqlens are on a device, where the host must not read them; pass them on the CPU")
        # A document's first token is predicted from nothing, and so is what lies behind the last one.
        targets = flat.clone()
        targets[edges[:-1][edges.diff() > 0].to(flat.device)] = IGNORED_LABEL
        targets[int(edges[-1]) :] = IGNORED_LABEL
        if (branches := self._placement.masks[0].branches) is not None:
            targets[torch.tensor(branches.starts, dtype=torch.int64, device=flat.device)] = IGNORED_LABEL
        check_labels("labels", targets.view_as(ids))
        return torch.cat([targets[1:], targets.new_full((1,), IGNORED_LABEL)])[: len(targets)].view_as(ids)

    def labels(self, ids: Tensor) -> Tensor:
        """This rank's part of `shifted_labels`, (B, s)."""
        return self.shard(self.shifted_labels(ids), 1)

    # Tensors

    def shard(self, x: Tensor, dim: int, keys: bool = False) -> Tensor:
        """This rank's rows of a tensor that every rank holds whole. Differentiable.

        Args:
            x: any tensor.
            dim: its sequence dimension, of length S.
            keys: it lies as the keys do, with length Sk, where those differ.
        """
        partition = self.key_partition if keys else self.partition
        if x.shape[dim] != partition.length:
            raise ArgumentError(f"x has {x.shape[dim]} rows in dimension {dim}; allowed are {partition.length}")
        rows = x.index_select(dim, self._positions_on(x, partition, keys))
        _marks.put(rows, _Mark(dim % x.dim(), partition))
        return rows

    def _positions_on(self, x: Tensor, partition: Partition, keys: bool) -> Tensor:
        """Of this rank's rows, on the device of x: copied there once, as the host waits for what the device is at."""
        if type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
            return partition.positions(self.rank).to(x.device)
        found = self._positions.get((keys, x.device))
        if found is None:
            found = self._positions[keys, x.device] = partition.positions(self.rank).to(x.device)
        return found

    def unshard(self, x: Tensor, dim: int, keys: bool = False) -> Tensor:
        """The whole tensor on every rank, from the rows that `shard` gave each. Differentiable.

        The gradient of this rank's rows is the sum over ranks of what each of them sends back for those rows.

        Args:
            x: this rank's rows.
            dim: its sequence dimension.
            keys: as in `shard`.
        """
        if self.group is None:
            self.bind(None)
        return gather_rows(x, dim, self.key_partition if keys else self.partition, self.group)

    # Attention

    def prepare(self, device: torch.device) -> None:
        """Make the programs of all masks on a device ahead of the first call, as in a loader's thread."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._placement.prepare(device)

    def query_rounds(self, mask: Mask | None, most: int, device: torch.device) -> tuple[QueryRound, ...] | None:
        """Queries of all B sequences, of one device, in rounds of at most so many; None where that cannot be.

        It can be where one rank has whole sequences, whose boundaries the host may read, and no query sees keys behind
        its round.

        Args:
            mask: as in `handle`.
            most: how many.
            device: where the rounds are to attend.
        """
        return self._placement.query_rounds(self._placement.index_of(mask), most, device)

    def bind(self, group: Group) -> None:
        """Say which group communicates, where that was not known when it was made.

        Raises:
            ArgumentError: it was made for another rank, or for another group.
        """
        self._placement.bind(None if self.ranks == 1 else process_group(group))

    @property
    def first_handle(self) -> Tensor:
        """Handle of the first mask."""
        return self._handles[0]

    def handle(self, mask: Mask | None = None) -> Tensor:
        """What the operators take: (2,) int64 on the CPU.

        Args:
            mask: one of `masks`; may be None where there is one. Another mask is planned when it is first asked for.
        """
        if mask is self._placement.rules[0]:
            return self._handles[0]
        index = self._placement.index_of(mask)
        while index >= len(self._handles):
            self._handles.append(new_handle(self._placement, len(self._handles)))
        return self._handles[index]


# Tensors that know how they were sharded


class _Mark(NamedTuple):
    """The dimension and the partition by which a tensor was sharded."""

    dim: int
    partition: Partition


_marks: TensorNotes[_Mark] = TensorNotes()


def check_marks(sharding: Sharding, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ArgumentError if one of these very tensors was sharded in another way than it would be attended in."""
    if sharding.ranks == 1:
        return
    for name, x in (("query", query), ("key", key), ("value", value)):
        mark = _marks.get(x)
        if mark is None or mark.dim != 1:
            continue
        partition = sharding.partition if name == "query" else sharding.key_partition
        if mark.partition is partition or mark.partition.digest == partition.digest:
            continue
        raise ArgumentError(
            f"{name} was sharded with {str(mark.partition.segments)[:100]}, and attention is asked for "
            f"{str(partition.segments)[:100]}; shard and attend with one Sharding, or with the same partition, "
            "mask and cu_seqlens"
        )
