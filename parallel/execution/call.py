"""What a call to attention asks for, and the program that answers it, made once and kept.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.kept import build_to_keep
from ringflash.parallel.agreement.agreement import agreement, errors_told, signature
from ringflash.parallel.planning.plan import ring
from ringflash.parallel.planning.program import (
    Program,
    document_table,
    local_program,
    rank_program,
    table_program,
    table_shape,
)
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import resolve
from ringflash.parallel.transport import PointToPoint

LONGEST_SHOWN = 200
"""Characters of a mask that ranks show each other; a layout of blocks may have a million."""

SHOWN = {"seqlen": "seqlen (to be passed where lengths do not divide evenly)", "sinks": "sinks given"}
"""Names of a call's arguments as a disagreement shows them, where the name does not say what to do."""


class Call(NamedTuple):
    """The arguments of the operators that are not tensors.

    Attributes:
        mask: `Mask.spec()` without document boundaries.
        documents: `Mask.spec()` of document boundaries alone; of none if `Inputs` has them, or there are none.
        partition: name or `Partition.spec()`.
        group: name of the process group; empty for one device.
        batch: B.
        seqlen: S, query tokens of one sequence over all ranks.
        key_seqlen: Sk, key tokens of one sequence over all ranks; as in self-attention if equal to S and there are no
            query boundaries, otherwise queries are aligned to the end of the keys.
        scale: factor of the scores.
        softcap: see `ringflash.kernels.modifiers`; 0 for none.
        dropout: see `ringflash.kernels.modifiers`; 0 for none.
        kernel: name for `ringflash.kernels.select`.
        deterministic: gradients repeat bit for bit.
        sinks: whether learned sink logits join the softmax behind the operator; here for ranks to agree on.
    """

    mask: str
    documents: str
    partition: str
    group: str
    batch: int
    seqlen: int
    key_seqlen: int
    scale: float
    softcap: float
    dropout: float
    kernel: str
    deterministic: bool
    sinks: bool


class Inputs(NamedTuple):
    """The tensors of a call.

    Attributes:
        query: (T, H, D), this rank's rows in ascending global order.
        key: (Tk, Hk, D).
        value: (Tk, Hk, Dv).
        boundaries: (documents + 1,) int64 global document boundaries over B * Sk keys, or None. On the CPU; on one
            device also where the query is. None where the call has them as text.
        query_boundaries: the same for the B * S queries, where they differ; document i of the queries sees document i
            of the keys.
        slopes: (T, H) fp32 ALiBi slopes of this rank's rows, or None.
        seed: (1,) int64 where the query is, for dropout; the same on every rank.
        key_visible: (Tk,) uint8, 0 for keys that are padding, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    boundaries: Tensor | None
    query_boundaries: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    key_visible: Tensor | None

    def modified(self, call: Call) -> bool:
        """Whether scores or weights are modified (see `ringflash.kernels.modifiers`)."""
        return self.key_visible is not None or self.positioned(call) or bool(call.softcap)

    def positioned(self, call: Call) -> bool:
        """Whether they depend on positions."""
        return self.slopes is not None or bool(call.dropout)

    def on_device(self, call: Call) -> bool:
        """Whether there are boundaries that the host must not read."""
        return not call.group and self.boundaries is not None and self.boundaries.device.type != "cpu"

    def keys(self) -> tuple[Tensor, ...]:
        """What travels: key, value and, if any, which keys are visible."""
        return (self.key, self.value) if self.key_visible is None else (self.key, self.value, self.key_visible)


def table_of(call: Call, inputs: Inputs) -> Tensor:
    """What both passes over boundaries on the device need of them (see `document_table`); else empty."""
    if inputs.on_device(call):
        return _device_table(call, inputs)
    return inputs.query.new_empty((0, 0), dtype=torch.int32)


def shape_of_table(call: Call, inputs: Inputs) -> tuple[int, int]:
    """Shape of `table_of`."""
    if inputs.on_device(call):
        return table_shape(Mask.from_spec(call.mask), call.batch * call.seqlen, inputs.positioned(call))
    return 0, 0


def prepare(call: Call, inputs: Inputs, table: Tensor) -> tuple[Program, PointToPoint | None]:
    """The program of this rank and its transport, after making sure that all ranks are about to do the same.

    Args:
        call: the call's settings.
        inputs: its tensors.
        table: from `table_of`.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    device = query.device
    if inputs.on_device(call):
        rows = call.batch * call.seqlen, call.batch * call.key_seqlen
        return table_program(Mask.from_spec(call.mask), table, *rows, inputs.positioned(call)), None
    documents = _documents(call, inputs)
    if not call.group:
        program = _cached_program(call, documents, None, device)
        _check_rows(call, query.shape[0] - program.queries, key.shape[0] - program.keys, 0)
        return program, None
    group = dist.distributed_c10d._resolve_process_group(call.group)
    with errors_told(group):
        program = _cached_program(call, documents, group, device)
    surplus = query.shape[0] - program.queries, key.shape[0] - program.keys
    heads = (query.shape[1], key.shape[1], value.shape[1])
    given = (inputs.slopes is not None, inputs.key_visible is not None)
    agreement(group).check(
        _signature(call, documents, query.dtype, heads, query.shape[2:] + value.shape[2:], given, surplus)
    )
    _check_rows(call, *surplus, group.rank())
    return program, _transport(group, device)


@lru_cache(maxsize=1024)
def _signature(
    call: Call,
    boundaries: tuple[tuple[int, ...] | None, ...],
    dtype: torch.dtype,
    heads: tuple[int, ...],
    head_dims: tuple[int, ...],
    given: tuple[bool, bool],
    surplus_tokens: tuple[int, int],
) -> str:
    """What must be the same on all ranks."""
    # In the order in which a disagreement is reported: what others follow from comes first.
    values = {"dtype": str(dtype), "heads": heads, "head_dim": head_dims} | call._asdict()
    del values["group"], values["documents"]  # the same for all ranks, and in `boundaries`
    if len(call.mask) > LONGEST_SHOWN:
        digest = hashlib.sha256(call.mask.encode()).hexdigest()[:16]
        values["mask"] = f"{call.mask[:LONGEST_SHOWN]}... (SHA-256 {digest}...)"
    values["cu_seqlens"] = hashlib.sha256(repr(boundaries).encode()).hexdigest()[:16]
    values["alibi_slopes given"], values["key_padding_mask given"] = given
    values["query and key tokens beyond the rank's share of seqlen"] = surplus_tokens
    return signature({SHOWN.get(name, name): value for name, value in values.items()})


def _check_rows(call: Call, queries: int, keys: int, rank: int) -> None:
    if queries or keys:
        raise ArgumentError(
            f"query has {queries:+d} and key {keys:+d} tokens against what partition {call.partition!r} of "
            f"{call.batch} x {call.seqlen} queries and {call.batch} x {call.key_seqlen} keys gives rank {rank}; "
            "pass seqlen where lengths do not divide evenly"
        )


@lru_cache(maxsize=256)
def _cached_program(
    call: Call,
    documents: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Program:
    return build_to_keep(lambda: _program(call, documents, group, device), device)


def _program(
    call: Call,
    documents: tuple[tuple[int, ...] | None, tuple[int, ...] | None],
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> Program:
    mask = Mask.from_spec(call.mask) & _separated(call, documents)
    if group is None:
        bounds = (
            None if x is None else torch.tensor(x, device=device) for x in (mask.boundaries, mask.query_boundaries)
        )
        return local_program(mask, *bounds, call.batch * call.seqlen, call.batch * call.key_seqlen, device)
    queries, keys = (
        resolve(call.partition, tokens, group.size(), mask, call.batch).repeat(call.batch)
        for tokens in (call.seqlen, call.key_seqlen)
    )
    return rank_program(ring(mask, queries, keys), mask, group.rank(), device)


def _separated(call: Call, documents: tuple[tuple[int, ...] | None, tuple[int, ...] | None]) -> Mask:
    """The rows of the batch, and the documents within them."""
    lengths = (call.key_seqlen, call.seqlen)
    rows = Mask.documents(*([i * tokens for i in range(call.batch + 1)] for tokens in lengths))
    for name, bounds, tokens in zip(("cu_seqlens", "query_cu_seqlens"), documents, lengths, strict=True):
        if bounds is not None and bounds[-1:] != (call.batch * tokens,):
            raise ArgumentError(f"{name}={bounds}; it must end at {call.batch} x {tokens} tokens over all ranks")
    # Documents first: a prefix for each document counts them, empty ones too.
    return rows if documents[0] is None else Mask.documents(*documents) & rows


def _device_table(call: Call, inputs: Inputs) -> Tensor:
    mask, boundaries, query_boundaries = Mask.from_spec(call.mask), inputs.boundaries, inputs.query_boundaries
    if mask.layout is not None:  # nobody here knows the lengths of the documents; this is the most that they can be
        mask.layout.check_reach("queries", call.seqlen)
        mask.layout.check_reach("keys", call.key_seqlen)
    if call.batch > 1 and (query_boundaries is not None or isinstance(mask.prefix, tuple)):
        raise ArgumentError(
            f"cu_seqlens on {boundaries.device} with a batch of {call.batch}: pass one packed sequence, or cu_seqlens "
            "on the CPU"
        )
    if isinstance(mask.prefix, tuple) and len(mask.prefix) != boundaries.shape[0] - 1:
        raise ArgumentError(
            f"prefix_lm has {len(mask.prefix)} lengths for {boundaries.shape[0] - 1} documents; allowed is one length "
            "for all, or one for each document"
        )
    bounds = [None if x is None else x.to(torch.int64) for x in (boundaries, query_boundaries)]
    if call.batch > 1:
        rows = torch.arange(0, call.batch + 1, device=boundaries.device) * call.seqlen
        bounds[0] = torch.cat([bounds[0], rows]).sort().values
    rows = call.batch * call.seqlen, call.batch * call.key_seqlen
    return document_table(mask, *bounds, *rows, inputs.positioned(call))


def _documents(call: Call, inputs: Inputs) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Boundaries of keys and of queries, however they came."""
    if inputs.boundaries is None:
        documents = Mask.from_spec(call.documents)
        return documents.boundaries, documents.query_boundaries
    return tuple(None if x is None else tuple(x.tolist()) for x in (inputs.boundaries, inputs.query_boundaries))


@lru_cache(maxsize=64)
def _transport(group: dist.ProcessGroup, device: torch.device) -> PointToPoint:
    return PointToPoint(group, device)
