"""Walks a plan: attention forward and backward over all ranks of a group, as one pair of PyTorch operators.

`ringflash::attention` is opaque to torch.compile, known to autograd, and can be named in a selective-checkpoint policy.
Operators take no Python objects, so mask and partition come as text, the group by its name, and document boundaries as
a tensor (their values must not become compile-time constants).

Legend: B sequences of S query and Sk key tokens in all; this rank holds T query rows and Tk key rows of them; H query
heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.kernels.select import select
from ringflash.mask import Mask
from ringflash.parallel.agreement import agreement
from ringflash.parallel.partition import resolve
from ringflash.parallel.plan import ring
from ringflash.parallel.program import Program, Shipment, StageProgram, local_program, rank_program
from ringflash.parallel.transport import Pending, PointToPoint


@dataclass(frozen=True)
class Call:
    """The arguments of the operators that are not tensors.

    Attributes:
        mask: `Mask.spec()`, without document boundaries.
        partition: name or `Partition.spec()`.
        group: name of the process group; empty for one device.
        batch: B.
        seqlen: S, query tokens of one sequence over all ranks.
        key_seqlen: Sk, key tokens of one sequence over all ranks; as in self-attention if equal to S and there are no
            query boundaries, otherwise queries are aligned to the end of the keys.
        scale: factor of the scores.
        kernel: name for `ringflash.kernels.select`.
        deterministic: gradients repeat bit for bit.
    """

    mask: str
    partition: str
    group: str
    batch: int
    seqlen: int
    key_seqlen: int
    scale: float
    kernel: str
    deterministic: bool


@torch.library.custom_op("ringflash::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    mask: str,
    partition: str,
    group: str,
    batch: int,
    seqlen: int,
    key_seqlen: int,
    scale: float,
    kernel: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        query: (T, H, D), this rank's rows in ascending global order.
        key: (Tk, Hk, D).
        value: (Tk, Hk, Dv).
        boundaries: (documents + 1,) int64 global document boundaries over B * Sk keys, or None. On the CPU; on one
            device also where the query is.
        query_boundaries: the same for the B * S queries, where they differ; document i of the queries sees document i
            of the keys.
        mask: see `Call`; so are the remaining arguments.
        partition: see `Call`.
        group: see `Call`.
        batch: see `Call`.
        seqlen: see `Call`.
        key_seqlen: see `Call`.
        scale: see `Call`.
        kernel: see `Call`.
        deterministic: see `Call`.

    Returns:
        out (T, H, Dv) in the query's dtype, lse (H, T) fp32.
    """
    call = Call(mask, partition, group, batch, seqlen, key_seqlen, scale, kernel, deterministic)
    program, transport = _prepare(call, boundaries, query_boundaries, query, key, value)
    kernels = select(query.device, query.dtype, query.shape[-1], value.shape[-1], kernel)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    carry = None
    held = local = (key, value)
    for stage in program.stages:
        coming = _post_keys(transport, stage, local, held)
        if stage.intervals is not None:
            carry = kernels.attend(
                query,
                held[0][stage.work],
                held[1][stage.work],
                stage.intervals,
                scale=scale,
                carry=carry,
                out_dtype=query.dtype if stage.is_last else accumulator,
            )
        held = _receive_keys(coming, stage, held)
    if carry is None:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return out, out.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float32)
    return carry


@torch.library.custom_op("ringflash::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    mask: str,
    partition: str,
    group: str,
    batch: int,
    seqlen: int,
    key_seqlen: int,
    scale: float,
    kernel: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` with respect to query, key and value; same arguments, and those of its results."""
    call = Call(mask, partition, group, batch, seqlen, key_seqlen, scale, kernel, deterministic)
    program, transport = _prepare(call, boundaries, query_boundaries, query, key, value)
    kernels = select(query.device, query.dtype, query.shape[-1], value.shape[-1], kernel)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = kernels.row_delta(dout, out, dlse)
    gradients = KeyGradients(key, value, keep_fp32=any(stage.contributions for stage in program.stages))
    accumulator = torch.promote_types(query.dtype, torch.float32)
    dquery = None
    held = local = (key, value)
    for stage in program.stages:
        coming = _post_keys(transport, stage, local, held)
        partial = None
        if stage.intervals is not None:
            dquery, *partial = kernels.attend_backward(
                dout,
                query,
                held[0][stage.work],
                held[1][stage.work],
                lse,
                delta,
                stage.intervals,
                scale=scale,
                carry=dquery,
                dquery_dtype=query.dtype if stage.is_last else accumulator,
                dkey_dtype=accumulator if stage.returns else gradients.dtype,
                deterministic=deterministic,
            )
        if partial is not None and not stage.returns:
            gradients.add_own(stage, partial)
        gradients.exchange(transport, stage, partial)
        held = _receive_keys(coming, stage, held)
    dkey, dvalue = gradients.finish()
    return torch.zeros_like(query) if dquery is None else dquery, dkey, dvalue


class KeyGradients:
    """Sums this rank's key and value gradients, its own and those that other ranks send, in a fixed order.

    Each remote part travels once, straight to its owner, in fp32; the owner adds parts in stage order, so the sum
    repeats bit for bit and its rounding does not grow with the number of ranks.
    """

    def __init__(self, key: Tensor, value: Tensor, keep_fp32: bool) -> None:
        self._key, self._value = key, value
        self.dtype = torch.promote_types(key.dtype, torch.float32) if keep_fp32 else key.dtype
        self._sums: list[Tensor] | None = None
        self._pending: tuple[Pending, list[tuple[Shipment, list[Tensor]]]] | None = None

    def add_own(self, stage: StageProgram, partial: list[Tensor]) -> None:
        """Take over the gradients of keys that this rank owns."""
        if self._sums is None and len(partial[0]) == len(self._key):
            self._sums = partial
        else:
            self._add(stage.work, partial)

    def exchange(self, transport: PointToPoint | None, stage: StageProgram, partial: list[Tensor] | None) -> None:
        """Post a stage's gradients on their way, and add those that the stage before brought."""
        if transport is None or not (stage.returns or stage.contributions):
            return
        sends = [(s.peer, part[s.rows].contiguous()) for s in stage.returns for part in partial]
        incoming = [(s, self._buffers(s.count)) for s in stage.contributions]
        receives = [(s.peer, buffer) for s, buffers in incoming for buffer in buffers]
        posted = transport.exchange(sends, receives), incoming
        self._collect()
        self._pending = posted

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the last parts; (dkey, dvalue) in the dtype of key and value."""
        self._collect()
        sums = self._sums or [torch.zeros_like(self._key), torch.zeros_like(self._value)]
        return sums[0].to(self._key.dtype), sums[1].to(self._value.dtype)

    def _collect(self) -> None:
        if self._pending is None:
            return
        pending, incoming = self._pending
        self._pending = None
        pending.wait()
        for shipment, buffers in incoming:
            self._add(shipment.rows, buffers)

    def _add(self, rows: slice | Tensor, parts: list[Tensor]) -> None:
        if self._sums is None:
            self._sums = [torch.zeros_like(x, dtype=self.dtype) for x in (self._key, self._value)]
        for total, part in zip(self._sums, parts, strict=True):
            total[rows] += part

    def _buffers(self, count: int) -> list[Tensor]:
        return [x.new_empty(count, *x.shape[1:], dtype=self.dtype) for x in (self._key, self._value)]


def _post_keys(
    transport: PointToPoint | None, stage: StageProgram, local: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> tuple[Pending, list[list[Tensor]]] | None:
    if transport is None or not (stage.sends or stage.arrivals):
        return None
    sends = [(s.peer, x[s.rows].contiguous()) for s in stage.sends for x in (local if s.local else held)]
    buffers = [[x.new_empty(s.count, *x.shape[1:]) for x in local] for s in stage.arrivals]
    receives = [(s.peer, x) for s, pair in zip(stage.arrivals, buffers, strict=True) for x in pair]
    return transport.exchange(sends, receives), buffers


def _receive_keys(
    coming: tuple[Pending, list[list[Tensor]]] | None, stage: StageProgram, held: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    if coming is None:
        return held
    pending, buffers = coming
    pending.wait()
    if not buffers:
        return held
    keys, values = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*buffers, strict=True))
    return keys[stage.arrival_order], values[stage.arrival_order]


def _prepare(
    call: Call, boundaries: Tensor | None, query_boundaries: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Program, PointToPoint | None]:
    """The program of this rank and its transport, after making sure that all ranks are about to do the same."""
    device = query.device
    if not call.group and boundaries is not None and boundaries.device.type != "cpu":
        return _device_program(call, boundaries, query_boundaries, device), None
    documents = _as_tuple(boundaries), _as_tuple(query_boundaries)
    if not call.group:
        program = _cached_program(call, documents, None, device)
        _check_rows(call, query.shape[0] - program.queries, key.shape[0] - program.keys, 0)
        return program, None
    group = dist.distributed_c10d._resolve_process_group(call.group)
    program = _cached_program(call, documents, group, device)
    surplus = query.shape[0] - program.queries, key.shape[0] - program.keys
    heads = (query.shape[1], key.shape[1], value.shape[1])
    _agree(group, call, documents, query.dtype, heads, query.shape[2:] + value.shape[2:], surplus)
    return program, _transport(group, device)


@lru_cache(maxsize=1024)
def _agree(
    group: dist.ProcessGroup,
    call: Call,
    boundaries: tuple[tuple[int, ...] | None, ...],
    dtype: torch.dtype,
    heads: tuple[int, ...],
    head_dims: tuple[int, ...],
    surplus_tokens: tuple[int, int],
) -> None:
    """Compare a call with the other ranks; the cache remembers those that agreed."""
    values = asdict(call)
    del values["group"]
    values["cu_seqlens"] = hashlib.sha256(repr(boundaries).encode()).hexdigest()[:16]
    values |= {"dtype": str(dtype), "heads": heads, "head_dim": head_dims, "surplus_tokens": surplus_tokens}
    agreement(group).check(values)
    _check_rows(call, *surplus_tokens, group.rank())


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
    rows = Mask.documents(*([i * tokens for i in range(call.batch + 1)] for tokens in (call.key_seqlen, call.seqlen)))
    mask = Mask.from_spec(call.mask) & rows
    if documents[0] is not None:
        mask = mask & Mask.documents(*documents)
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


def _device_program(call: Call, boundaries: Tensor, query_boundaries: Tensor | None, device: torch.device) -> Program:
    """One rank's program from boundaries that the host must not read."""
    mask = Mask.from_spec(call.mask)
    if call.batch > 1 and (query_boundaries is not None or isinstance(mask.prefix, tuple)):
        raise ArgumentError(
            f"cu_seqlens on {boundaries.device} with a batch of {call.batch}: pass one packed sequence, or cu_seqlens "
            "on the CPU"
        )
    bounds = [None if x is None else x.to(torch.int64) for x in (boundaries, query_boundaries)]
    if call.batch > 1:
        rows = torch.arange(0, call.batch + 1, device=device) * call.seqlen
        bounds[0] = torch.cat([bounds[0], rows]).sort().values
    return local_program(mask, *bounds, call.batch * call.seqlen, call.batch * call.key_seqlen, device)


def _as_tuple(boundaries: Tensor | None) -> tuple[int, ...] | None:
    return None if boundaries is None else tuple(boundaries.tolist())


@lru_cache(maxsize=64)
def _transport(group: dist.ProcessGroup, device: torch.device) -> PointToPoint:
    return PointToPoint(group, device)


@attention.register_fake
def _(query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@attention_backward.register_fake
def _(dout, dlse, query, key, value, *rest):  # noqa: ANN001, ANN002, ANN202
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    query, key, value, boundaries, query_boundaries, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries, query_boundaries)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, dlse: Tensor | None):  # noqa: ANN001, ANN202
    query, key, value, *rest = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.settings))
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(rest[0]) if dout is None else dout
    gradients = attention_backward(dout, dlse, query, key, value, *rest, *ctx.settings)
    return (*gradients, *nothing)


attention.register_autograd(_differentiate, setup_context=_save)
