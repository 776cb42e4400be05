"""Walks a plan, forward and backward: keys travel from rank to rank while the kernels attend what is there.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.select import select
from ringflash.parallel.agreement.agreement import tell_peers
from ringflash.parallel.execution.call import Call, Inputs, prepare, table_of
from ringflash.parallel.execution.gradients import KeyGradients
from ringflash.parallel.planning.launches import attend, attend_backward
from ringflash.parallel.planning.program import Program, StageProgram
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.transport import Pending, PointToPoint


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Returns:
        out (T, H, Dv) like the query, lse (H, T) fp32, and the table that `backward` wants, see `call.table_of`.
    """
    query, value = inputs.query, inputs.value
    try:
        kernels = _kernels(inputs, call)
    except Exception as error:  # which only this rank's machine may raise
        if call.group:
            tell_peers(dist.distributed_c10d._resolve_process_group(call.group), error)
        raise
    table = table_of(call, inputs)
    program, transport = prepare(call, inputs, table)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    carry = None
    held = local = inputs.keys()
    for stage in program.stages:
        coming = _post_keys(transport, stage, local, held)
        at_hand = _rows(stage, held) if stage.launches else ()
        for launch in stage.launches:
            carry = attend(
                kernels,
                launch,
                query,
                *at_hand[:2],
                scale=call.scale,
                modifiers=_modifiers(inputs, call, program, stage, at_hand),
                carry=carry,
                out_dtype=query.dtype if stage.is_last and launch is stage.launches[-1] else accumulator,
            )
        held = _receive_keys(coming, stage, held)
    if carry is None:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return out, out.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float32), table
    return *carry, table


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, table: Tensor, inputs: Inputs, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of this rank, from those of out and lse.

    Args:
        dout: (T, H, Dv).
        dlse: (H, T) or None.
        out: what `forward` returned.
        lse: what `forward` returned.
        table: what `forward` returned.
        inputs: what `forward` was given.
        call: what `forward` was given.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    program, transport = prepare(call, inputs, table)
    kernels = _kernels(inputs, call)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = kernels.row_delta(dout, out, dlse)
    several = any(stage.contributions or len(stage.launches) > 1 for stage in program.stages)
    gradients = KeyGradients(key, value, keep_fp32=several)
    dquery = None
    held = local = inputs.keys()
    for stage in program.stages:
        coming = _post_keys(transport, stage, local, held)
        partial = None
        at_hand = _rows(stage, held) if stage.launches else ()
        for launch in stage.launches:
            dquery, *of_keys = attend_backward(
                kernels,
                launch,
                dout,
                query,
                *at_hand[:2],
                lse,
                delta,
                scale=call.scale,
                modifiers=_modifiers(inputs, call, program, stage, at_hand),
                carry=dquery,
                dquery_dtype=query.dtype if stage.is_last and launch is stage.launches[-1] else accumulator,
                dkey_dtype=accumulator if stage.returns else gradients.dtype,
                deterministic=call.deterministic,
            )
            partial = of_keys if partial is None else [a.add_(b) for a, b in zip(partial, of_keys, strict=True)]
        if partial is not None and not stage.returns:
            gradients.add_own(stage, partial)
        gradients.exchange(transport, stage, partial)
        held = _receive_keys(coming, stage, held)
    dkey, dvalue = gradients.finish()
    return torch.zeros_like(query) if dquery is None else dquery, dkey, dvalue


def _kernels(inputs: Inputs, call: Call) -> ModuleType:
    query, value = inputs.query, inputs.value
    modified, sink_tokens = inputs.modified(call), bool(Mask.from_spec(call.mask).sink)
    return select(query.device, query.dtype, query.shape[-1], value.shape[-1], call.kernel, modified, sink_tokens)


def _rows(stage: StageProgram, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that a stage attends to."""
    work = stage.work
    if isinstance(work, slice) and work == slice(0, held[0].shape[0]):
        return held
    return tuple(x[work] for x in held)


def _modifiers(
    inputs: Inputs, call: Call, program: Program, stage: StageProgram, at_hand: tuple[Tensor, ...]
) -> Modifiers | None:
    if not inputs.modified(call):
        return None
    return Modifiers(
        softcap=call.softcap,
        slopes=inputs.slopes,
        dropout=call.dropout,
        seed=inputs.seed,
        query_positions=program.query_positions,
        key_positions=stage.key_positions,
        key_visible=None if inputs.key_visible is None else at_hand[2],
    )


def _post_keys(
    transport: PointToPoint | None, stage: StageProgram, local: tuple[Tensor, ...], held: tuple[Tensor, ...]
) -> tuple[Pending, list[list[Tensor]]] | None:
    if transport is None or not (stage.sends or stage.arrivals):
        return None
    sends = [(s.peer, x[s.rows].contiguous()) for s in stage.sends for x in (local if s.local else held)]
    buffers = [[x.new_empty(s.count, *x.shape[1:]) for x in local] for s in stage.arrivals]
    receives = [(s.peer, x) for s, parts in zip(stage.arrivals, buffers, strict=True) for x in parts]
    return transport.exchange(sends, receives), buffers


def _receive_keys(
    coming: tuple[Pending, list[list[Tensor]]] | None, stage: StageProgram, held: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    if coming is None:
        return held
    pending, buffers = coming
    pending.wait()
    if not buffers:
        return held
    joined = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*buffers, strict=True))
    return tuple(x[stage.arrival_order] for x in joined)
