"""What a call to attention asks for, and what answers it: a program, kernels, and ranks that agree.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.requests import of_thread
from ringflash.kernels.select import select
from ringflash.kernels.torch_private import process_group
from ringflash.parallel.agreement.rounds import agreement
from ringflash.parallel.device_boundaries import batch_boundaries, check_on_device, on_a_device
from ringflash.parallel.handles import placement_of
from ringflash.parallel.lookup import find
from ringflash.parallel.placement import Placement
from ringflash.parallel.planning.heads import HeadShares, head_groups
from ringflash.parallel.planning.local_program import document_table, table_program, table_shape
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.transport.head_exchange import HeadExchange, Kind, Sections
from ringflash.parallel.transport.row_exchange import RowExchange
from ringflash.parallel.transport.select import GroupTransport, checked
from ringflash.parallel.transport.shelves import bytes_to_publish


class Settings(NamedTuple):
    """The arguments of the operators that are not tensors.

    Attributes:
        request: text of a call from traced code, see `Request`; empty where the handle says everything.
        sizes: B, S and Sk of such a call. Of a handle whose ranks exchange heads, and whose keys lie as the queries do:
            how many rows they hold together, how many ranks they are, and `Placement.rows_in_groups`. Else empty.
        scale: factor of the scores.
        softcap: see `ringflash.kernels.modifiers`; 0 for none.
        dropout: see `ringflash.kernels.modifiers`; 0 for none.
        kernel: name for `ringflash.kernels.select`.
        deterministic: gradients repeat bit for bit.
        needs: gradients that somebody is going to ask for: the sum of `NEEDS` of query, key, value, sinks.
    """

    request: str
    sizes: Sequence[int]
    scale: float
    softcap: float
    dropout: float
    kernel: str
    deterministic: bool
    needs: int


NEEDS = {"query": 1, "key": 2, "value": 4, "sinks": 8}


class Inputs(NamedTuple):
    """The tensors of a call.

    Attributes:
        query: (T, H, D), this rank's rows in ascending global order.
        key: (Tk, Hk, D).
        value: (Tk, Hk, Dv).
        handle: (2,) int64 on the CPU, of a `ringflash.parallel.sharding.Sharding`; None where `Settings` has a request.
        boundaries: (documents + 1,) global document boundaries over B * Sk keys of a request that has them as a tensor:
            on the CPU, or with one rank where the query is.
        query_boundaries: the same for the B * S queries, where they differ; document i of the queries sees document i
            of the keys.
        slopes: fp32 ALiBi slopes (H,), (B, H) or (documents, H), or None.
        seed: (1,) int64 where the query is, for dropout; the same on every rank.
        key_visible: (Tk,) uint8, 0 for keys that are padding, or None.
        blocks: (groups, query blocks, key blocks) bool where the query is, the layout of a mask with blocks that the
            host does not read; groups of the H heads. Or None.
        sinks: (H,) learned logits that join each row's softmax without a value, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    handle: Tensor | None
    boundaries: Tensor | None
    query_boundaries: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    key_visible: Tensor | None
    blocks: Tensor | None
    sinks: Tensor | None

    def of_heads(self, first: int, last: int, key_heads: int) -> dict[str, Tensor | None]:
        """What belongs to heads, for query heads first to last, which see so many key heads."""
        return {
            "slopes": None if self.slopes is None else self.slopes[..., first:last],
            "blocks": None if self.blocks is None else self._blocks_of(first, last, key_heads),
            "sinks": None if self.sinks is None else self.sinks[first:last],
        }

    def _blocks_of(self, first: int, last: int, key_heads: int) -> Tensor:
        """The layouts of some heads: of the groups that they are of, or if these end within them, of each key head."""
        blocks: Any = self.blocks
        each = self.query.shape[1] // len(blocks)
        if first % each == last % each == 0:
            return blocks[first // each : last // each]
        if first // each == (last - 1) // each:
            return blocks[first // each : first // each + 1]
        heads = torch.arange(first, last, (last - first) // key_heads, device=blocks.device)
        return blocks[heads // each]

    def modified(self, settings: Settings) -> bool:
        """Whether something is done to scores and weights, see `ringflash.kernels.modifiers`."""
        given = self.slopes is not None or self.key_visible is not None
        return given or bool(settings.softcap) or bool(settings.dropout)

    def on_device(self) -> bool:
        """Whether there are boundaries that the host must not read."""
        return self.handle is None and on_a_device(self.boundaries)

    def keys(self) -> tuple[Tensor, ...]:
        """What travels: key, value and, if any, which keys are visible."""
        return (self.key, self.value) if self.key_visible is None else (self.key, self.value, self.key_visible)


class Request(NamedTuple):
    """What traced code knows of a call, which is text and numbers: its sharding is found when the operator runs.

    Attributes:
        rules: `Mask.spec()` of the mask, without document boundaries unless there is a handle; empty for the only one
            of a handle's masks.
        documents: `Mask.spec()` of document boundaries alone; empty where there is a handle.
        partition: name or `Partition.spec()`; empty where there is a handle.
        head_ranks: as a number in text; empty where nobody said, and where there is a handle.
        plan: its name; empty where none was named, and where there is a handle.
        group: name of the process group; empty for one device.
    """

    rules: str
    documents: str
    partition: str
    head_ranks: str
    plan: str
    group: str

    def text(self) -> str:
        """All of it; `read` makes it again."""
        return "|".join(self)  # in one line: torch.compile writes it into comments of its code

    @staticmethod
    @lru_cache(maxsize=256)
    def read(text: str) -> tuple[Mask | None, Mask | None, str, int | None, str | None, str]:
        """Rules, documents, partition, head_ranks, plan and group of a text; None for an empty one."""
        rules, documents, partition, head_ranks, plan, group = text.split("|", 5)
        mask, apart = (Mask.from_spec(spec) if spec else None for spec in (rules, documents))
        return mask, apart, partition, int(head_ranks) if head_ranks else None, plan or None, group


@dataclass
class Ready:
    """Everything that a pass walks with.

    Attributes:
        inputs: of the call.
        settings: of the call.
        program: what this rank does.
        placement: what its sharding is; None for boundaries on the device.
        kernels: from `ringflash.kernels.select`.
        modified: whether scores or weights are modified.
        transport: moves rows between ranks; None on one device.
        index: which of the placement's masks the call has.
        form: what must be the same on all ranks beside the sharding.
        exchange: of heads for tokens, or of query rows; None without.
        first_head: number of the first query head at hand among all.
    """

    inputs: Inputs
    settings: Settings
    program: Program
    placement: Placement | None
    kernels: ModuleType
    modified: bool
    transport: GroupTransport | None
    index: int = 0
    form: tuple = ()
    exchange: HeadExchange | RowExchange | None = None
    first_head: int = 0

    def modifiers(self, stage: StageProgram, at_hand: tuple[Tensor, ...]) -> Modifiers | None:
        """What is done to the scores of a stage, or of a piece of it, whose keys are at hand."""
        inputs, settings = self.inputs, self.settings
        if not self.modified:
            return None
        positioned = inputs.slopes is not None or bool(settings.dropout)
        return Modifiers(
            softcap=settings.softcap,
            slopes=None if inputs.slopes is None else self.slopes,
            dropout=settings.dropout,
            seed=inputs.seed,
            query_positions=self.program.query_positions if positioned else None,
            key_positions=self._key_positions(stage, len(at_hand[0])) if positioned else None,
            key_visible=None if inputs.key_visible is None else at_hand[2],
            first_head=self.first_head,
        )

    def _key_positions(self, stage: StageProgram, keys: int) -> Tensor:
        found = self.program.key_positions(stage.index)
        return found if len(found) == keys else found[stage.offset : stage.offset + keys]

    def begin(self) -> None:
        """Make sure that all ranks are about to do the same; nothing is sent before. Everything needed is at hand."""
        placement: Any = self.placement
        digest, nbytes = placement.call_digest(self.index, self.form), bytes_to_publish(self.inputs.keys())
        device = self.inputs.query.device
        describe = partial(described, placement, self.index, self.form)  # kept for some calls: it holds no tensors
        waits = of_thread.noting is not None
        most = agreed(placement, digest, describe, device, nbytes, waits)
        if any(self.form[-1]):
            raise _surplus(placement, self.form[-1])
        placement.transport.open(device, most)

    def refuse(self, error: Exception) -> None:
        """Let the other ranks, if there are any, know that this one cannot begin."""
        if self.transport is not None:
            placement: Any = self.placement
            agreement(placement.group).refuse(error, placement.call_digest(self.index, self.form))

    def close(self, failure: Exception | None) -> None:
        """End a call of several ranks: raise this rank's failure, or hear of another's."""
        placement: Any = self.placement  # there is one where there are several ranks
        agreement(placement.group).close(failure, self.inputs.query.device)
        if failure is not None:
            raise failure

    @cached_property
    def slopes(self) -> Tensor:
        """ALiBi slopes of each of this rank's rows, (T, H)."""
        slopes, rows = self.inputs.slopes, self.inputs.query.shape[0]
        assert slopes is not None
        if slopes.dim() == 1:
            return slopes.expand(rows, -1)
        if self.placement is not None:
            return slopes[self.placement.slope_rows(self.index, slopes.shape[0], slopes.device)]
        own = self.inputs.boundaries if self.inputs.query_boundaries is None else self.inputs.query_boundaries
        assert own is not None  # without a placement the boundaries are tensors
        row = torch.arange(rows, device=slopes.device)
        if len(own) - 1 != slopes.shape[0]:
            return slopes[row // max(1, self.settings.sizes[1])]
        return slopes[(torch.searchsorted(own.long(), row, right=True) - 1).clamp_(max=slopes.shape[0] - 1)]


Located = tuple[Placement, int] | None
"""What a call's sharding is and which of its masks the call has; None for boundaries on the device."""


def locate(inputs: Inputs, settings: Settings) -> Located:
    """Find a call's sharding."""
    if inputs.handle is None and inputs.on_device():
        return None
    handle: Any = inputs.handle  # None only beside a request
    placement, index = _requested(inputs, settings) if settings.request else placement_of(handle)
    return placement.for_heads(index, inputs.query.shape[1]) if placement.free else (placement, index)


def prepare(
    inputs: Inputs, settings: Settings, table: Tensor, which: str, where: Located, first_head: int = 0
) -> Ready:
    """Find the program and the kernels; ranks have not agreed yet, see `Ready.begin`.

    Args:
        inputs: the call's tensors.
        settings: its other arguments.
        table: from `table_of`.
        which: "forward" or "backward".
        where: from `locate`.
        first_head: number of the first query head of the inputs among all of the call.
    """
    query, value, modified = inputs.query, inputs.value, inputs.modified(settings)
    problem = query.device, query.dtype, query.shape[-1], value.shape[-1], settings.kernel
    if where is None:
        program = _program_on_device(inputs, settings, table)
        kernels = select(*problem)
        return Ready(inputs, settings, program, None, kernels, modified, None, first_head=first_head)
    placement, index = where
    device = inputs.query.device
    rows = placement.rows
    surplus = query.shape[0] - rows[0], inputs.key.shape[0] - rows[1]
    if placement.group is None:
        if any(surplus):
            raise _surplus(placement, surplus)
        program, kernels = placement.program(index, device), select(*problem)
        return Ready(inputs, settings, program, placement, kernels, modified, None, first_head=first_head)
    form = form_of(inputs, settings, surplus, which)
    try:
        program, kernels = placement.program(index, device), select(*problem)
        exchange = placement.exchange(index, device)
    except Exception as error:  # which only this rank's machine may raise
        agreement(placement.group).refuse(error, placement.call_digest(index, form))
        raise
    transport = placement.transport
    return Ready(inputs, settings, program, placement, kernels, modified, transport, index, form, exchange, first_head)


def _requested(inputs: Inputs, settings: Settings) -> tuple[Placement, int]:
    """The sharding that traced code asks for, and which of its masks."""
    rules, documents, partition, head_ranks, plan, name = Request.read(settings.request)
    group = process_group(name) if name else None
    with refusals_notified(group):
        if inputs.handle is not None:
            placement, _ = placement_of(inputs.handle)
            if group is not None or placement.group is None:
                placement.bind(group)
            return placement, placement.index_of(rules)
        assert rules is not None  # without a handle a text has both
        assert documents is not None
        boundaries = documents.boundaries, documents.query_boundaries
        if inputs.boundaries is not None:
            boundaries = inputs.boundaries, inputs.query_boundaries
        batch, seqlen, key_seqlen = settings.sizes
        sharding = find(rules, (batch, seqlen, key_seqlen), group, partition, *boundaries, head_ranks, plan)
        return placement_of(sharding.handle(rules))


@contextmanager
def refusals_notified(group: dist.ProcessGroup | None) -> Generator[None]:
    """Around what one rank may fail at before the ranks compare: the others hear of the error and do not wait."""
    try:
        yield
    except Exception as error:
        if group is not None and group.size() > 1:
            agreement(group).refuse(error)
        raise


def as_they_travel(inputs: Inputs, placement: Placement) -> Inputs:
    """The call with contiguous keys; as it is where heads are exchanged, which takes any strides."""
    if placement.head_ranks > 1 or (inputs.key.is_contiguous() and inputs.value.is_contiguous()):
        return inputs
    with refusals_notified(placement.group):
        return inputs._replace(key=inputs.key.contiguous(), value=inputs.value.contiguous())


def form_of(inputs: Inputs, settings: Settings, surplus: tuple[int, int], which: str) -> tuple:
    """What must be the same on all ranks beside the sharding."""
    query, key, value = inputs.query, inputs.key, inputs.value
    return (
        which,
        (str(query.dtype), query.device.type),
        (query.shape[1], key.shape[1], value.shape[1]),
        (query.shape[2], value.shape[2]),
        settings[2:],
        (inputs.sinks is not None, inputs.slopes is not None, inputs.key_visible is not None, keeps(inputs, settings)),
        surplus,
    )


def agreed(
    placement: Placement,
    digest: int,
    describe: Callable[[], dict[str, object]],
    device: torch.device,
    nbytes: int,
    waits: bool = False,
) -> int | None:
    """Make sure that all ranks make the same call; see `Agreement.check`."""
    group: Any = placement.group  # there are several ranks
    return checked(agreement(group), placement.transport, digest, describe, device, nbytes, waits)


def described(placement: Placement, index: int, form: tuple) -> dict[str, object]:
    """Names and values of what must be the same, in the order in which a disagreement is to be reported."""
    which, dtype, heads, head_dims, numbers, given, surplus = form
    scale, softcap, dropout, kernel, deterministic, needs = numbers
    return {
        "pass": which,
        "dtype": dtype[0],
        "device": dtype[1],
        "heads": heads,
        "head_dim": head_dims,
        "mask": placement.shown_mask(index),
        **placement.of_all,
        "plan": placement.plan_text(index),
        "scale": scale,
        "softcap": softcap,
        "dropout": dropout,
        "kernel": kernel,
        "deterministic": deterministic,
        "gradients needed": [name for name, bit in NEEDS.items() if needs & bit],
        "sinks given": given[0],
        "alibi_slopes given": given[1],
        "key_padding_mask given": given[2],
        "what crossed is kept (compiled code keeps it where it is given a sharding)": given[3],
        "query and key tokens beyond the rank's share of seqlen": surplus,
    }


def _surplus(placement: Placement, surplus: tuple[int, int]) -> ArgumentError:
    return ArgumentError(
        f"query has {surplus[0]:+d} and key {surplus[1]:+d} tokens against what partition "
        f"{placement.partition_name!r} of {placement.batch} x {placement.seqlen} queries and {placement.batch} x "
        f"{placement.key_seqlen} keys gives rank {placement.rank}; pass seqlen where lengths do not divide evenly"
    )


# Boundaries on the device


def table_of(inputs: Inputs, settings: Settings) -> Tensor:
    """What both passes over boundaries on the device need of them (see `document_table`); else empty."""
    if not inputs.on_device():
        return inputs.query.new_empty((0, 0), dtype=torch.int32)
    mask = Request.read(settings.request)[0]
    batch, seqlen, key_seqlen = settings.sizes
    assert mask is not None  # as there is no handle
    assert inputs.boundaries is not None
    check_on_device(mask, settings.sizes, inputs.boundaries, inputs.query_boundaries)
    queries = None if inputs.query_boundaries is None else inputs.query_boundaries.long()
    keys = batch_boundaries(inputs.boundaries.long(), batch, seqlen)
    return document_table(mask, keys, queries, batch * seqlen, batch * key_seqlen, inputs.query.device)


def keeps(inputs: Inputs, settings: Settings) -> bool:
    """Whether query, key and value are kept as they crossed, in place of what they were before: they cross once.

    Not where heads are worked on in groups, for which there is no room for all of them as they crossed, nor where key
    heads crossed several times.
    """
    if inputs.handle is None or not settings.sizes or not settings.needs:
        return False
    (_, heads, head_dim), (_, exchanging, rows) = inputs.query.shape, settings.sizes
    if heads % exchanging or HeadShares.of(int(heads), int(inputs.key.shape[1]), exchanging).copied:
        return False
    return head_groups(rows, heads, inputs.key.shape[1], head_dim, exchanging) == 1


def crossing_kinds(inputs: Inputs, ranks: int) -> list[Kind]:
    """What crosses of query, key, value and, if any, of which keys are visible."""
    query, key, value = inputs[:3]
    shares = HeadShares.of(int(query.shape[1]), int(key.shape[1]), ranks)
    kinds = [(shares.queries, query.shape[2]), (shares.keys, key.shape[2]), (shares.keys, value.shape[2])]
    visible = [] if inputs.key_visible is None else [(1, 1, torch.uint8)]
    return [*((heads, dim, query.dtype) for heads, dim in kinds), *visible]


def shape_of_table(inputs: Inputs, settings: Settings) -> tuple[int, int]:
    """Shape of what the forward pass hands to the backward pass: of `table_of`, or of what crossed and is kept."""
    if keeps(inputs, settings):
        rows, ranks, _ = settings.sizes
        return rows, Sections(crossing_kinds(inputs, ranks)).width // torch.int32.itemsize
    if not inputs.on_device():
        return 0, 0
    batch, seqlen, key_seqlen = settings.sizes
    mask = Request.read(settings.request)[0]
    assert mask is not None
    return table_shape(mask, inputs.query_boundaries is not None, batch * seqlen, batch * key_seqlen)


def _program_on_device(inputs: Inputs, settings: Settings, table: Tensor) -> Program:
    mask, (batch, seqlen, key_seqlen) = Request.read(settings.request)[0], settings.sizes
    assert mask is not None
    return table_program(mask, table, batch * seqlen, batch * key_seqlen)
