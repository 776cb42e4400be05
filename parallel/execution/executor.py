"""Walks a program, forward and backward: keys travel from rank to rank while the kernels attend to what is there.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ringflash.parallel.execution.call import NEEDS, Inputs, Ready, Settings, prepare, table_of
from ringflash.parallel.execution.gradients import KeyGradients
from ringflash.parallel.planning.launches import attend, attend_backward
from ringflash.parallel.planning.program import Shipment, StageProgram, picked
from ringflash.parallel.positions.segments import count

Rows = tuple[Tensor, ...]
"""The same rows of key, value and, if any, which keys are visible."""


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Returns:
        out (T, H, Dv) like the query, lse (H, T) fp32, and the table that `backward` wants, see `call.table_of`.
    """
    query, value = inputs.query, inputs.value
    table = query.new_empty((0, 0), dtype=torch.int32) if inputs.handle is not None else table_of(inputs, settings)
    ready = prepare(inputs, settings, table, "forward")
    accumulator = torch.promote_types(query.dtype, torch.float32)
    last = query.dtype if inputs.sinks is None else accumulator  # sinks are weighed in before anything is rounded
    carry = None
    room = None
    if ready.transport is not None:
        room = make_room(ready)
        ready.begin()

    def body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal carry
        modifiers = ready.modifiers(stage, at_hand)
        for launch in stage.launches:
            carry = attend(
                ready.kernels,
                launch,
                query,
                *at_hand[:2],
                scale=settings.scale,
                modifiers=modifiers,
                carry=carry,
                out_dtype=last if stage.is_last and launch is stage.launches[-1] else accumulator,
            )

    walk(ready, room, body)
    if carry is None:
        out = query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=last)
        carry = out, out.new_full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float32)
    out, lse = carry if inputs.sinks is None else with_sinks(*carry, inputs.sinks)
    return out.to(query.dtype), lse, table


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, table: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks of this rank, from those of out and lse; empty where nobody needs them.

    Args:
        dout: (T, H, Dv).
        dlse: (H, T) or None.
        out: what `forward` returned.
        lse: what `forward` returned.
        table: what `forward` returned.
        inputs: what `forward` was given.
        settings: what `forward` was given.
    """
    query = inputs.query
    ready = prepare(inputs, settings, table, "backward")
    needs_key, needs_value = settings.needs & NEEDS["key"], settings.needs & NEEDS["value"]
    wanted = ([inputs.key] if needs_key else []) + ([inputs.value] if needs_value else [])
    try:
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        delta = ready.kernels.row_delta(dout, out, dlse)
        gradients = KeyGradients(wanted, ready.program, ready.transport)
    except Exception as error:
        ready.refuse(error)
        raise
    room = None
    if ready.transport is not None:
        room = make_room(ready)
        ready.begin()
    accumulator = torch.promote_types(query.dtype, torch.float32)
    dquery: Tensor | None = None
    parts: list[Tensor] | None = None

    def body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal dquery, parts
        modifiers = ready.modifiers(stage, at_hand)
        for launch in stage.launches:
            dquery, dkey, dvalue = attend_backward(
                ready.kernels,
                launch,
                dout,
                query,
                at_hand[0],
                at_hand[1],
                lse,
                delta,
                scale=settings.scale,
                modifiers=modifiers,
                carry=dquery,
                dquery_dtype=query.dtype if stage.is_last and launch is stage.launches[-1] else accumulator,
                dkey_dtype=accumulator if stage.returns else gradients.dtype,
                deterministic=settings.deterministic,
            )
            found = ([dkey] if needs_key else []) + ([dvalue] if needs_value else [])
            parts = found if parts is None else [a.add_(b) for a, b in zip(parts, found, strict=True)]

    def settle(stage: StageProgram) -> None:
        nonlocal parts
        if parts is None and stage.returns:  # the body failed, and others wait for what this rank owes them
            parts = [x.new_zeros(count(stage.key_segments), *x.shape[1:], dtype=accumulator) for x in wanted]
        gradients.settle(stage, parts)
        parts = None

    walk(ready, room, body, settle)
    of_keys = gradients.finish()
    dquery = torch.zeros_like(query) if dquery is None else dquery
    return (
        dquery if settings.needs & NEEDS["query"] else query.new_empty(0),
        of_keys[0] if needs_key else query.new_empty(0),
        of_keys[-1] if needs_value else query.new_empty(0),
        query.new_empty(0)
        if inputs.sinks is None or not settings.needs & NEEDS["sinks"]
        else sink_gradient(inputs.sinks, lse, delta),
    )


def make_room(ready: Ready) -> tuple[Rows, list[Rows]]:
    """Own keys as they can be sent, and the buffers for those that arrive: before the ranks agree to begin."""
    program, own = ready.program, ready.inputs.keys()
    needed = min(2, sum([bool(stage.receives) for stage in program.stages]))
    try:
        sent = tuple([x.contiguous() for x in own])
        buffers = [tuple([x.new_empty(program.buffers.arrivals, *x.shape[1:]) for x in own]) for _ in range(needed)]
    except Exception as error:
        ready.refuse(error)
        raise
    return sent, buffers


def walk(
    ready: Ready,
    room: tuple[Rows, list[Rows]] | None,
    body: Callable[[StageProgram, Rows], None],
    settle: Callable[[StageProgram], None] | None = None,
) -> None:
    """Go through the stages of a program: post transfers, work on what is there, settle, wait.

    Where a body fails, out of memory say, the transfers go on all the same: other ranks have begun this call, too, and
    would wait for ever. They hear of the error when the call ends on CPUs, on GPUs before the call after their next.

    Args:
        ready: what to walk with.
        room: from `make_room`; None on one device.
        body: the work of a stage, or of a piece of it, on the rows that it attends to.
        settle: what follows the work of each piece of a stage, in the backward pass.
    """
    program, own = ready.program, ready.inputs.keys()
    sent, buffers = room or (own, [])
    arrived: Rows = ()
    failure: Exception | None = None
    filled = 0
    for index, stage in enumerate(program.stages):
        ticket, coming = None, ()
        if stage.sends or stage.receives:
            if stage.receives:
                coming = buffers[filled % 2]
                filled += 1
            assert ready.transport is not None  # one device sends nothing
            sends = [pair for s in stage.sends for pair in _rows_of(s, arrived if s.relayed else sent)]
            ticket = ready.transport.transfer(sends, [pair for s in stage.receives for pair in _rows_of(s, coming)])
        for piece in (stage,) if settle is None else program.backward_stages[index]:
            if piece.launches and failure is None:
                try:
                    body(piece, piece.at_hand(own, arrived))
                except Exception as error:
                    if ready.transport is None:
                        raise
                    failure = error
            if settle is not None:
                settle(piece)
        if ticket is not None:
            ticket.wait()
        arrived = tuple([picked(x, stage.received) for x in coming])
    if ready.transport is not None:
        ready.close(failure)


def _rows_of(shipment: Shipment, tensors: Rows) -> list[tuple[int, Tensor]]:
    return [(shipment.peer, picked(x, shipment.rows)) for x in tensors]


# Learned sinks: one more logit a head in the softmax, without a value (gpt-oss, arXiv 2508.10925)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows shrink by their share of the sum, exp(lse - lse with sink); in place.

    Args:
        out: (T, H, Dv), fp32 or fp64.
        lse: (H, T) fp32.
        sinks: (H,).
    """
    sink = sinks.float()[:, None]
    nothing = torch.isneginf(lse) & torch.isneginf(sink)
    sink = sink.clamp(min=torch.finfo(torch.float32).min)  # finite: the difference of two infinities is nan
    share = torch.sigmoid(lse - sink).T[..., None]
    return out.mul_(share), torch.logaddexp(lse, sink).masked_fill_(nothing, -torch.inf)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the logits, (H,): a sink's value is 0, so only the sum that it joins depends on it.

    Args:
        sinks: (H,).
        lse: (H, T) fp32, sinks among the sum.
        delta: (H, T) fp32, from `row_delta`.
    """
    weights = torch.exp(sinks.float()[:, None] - lse).nan_to_num(nan=0.0)
    return -(weights * delta).sum(1).to(sinks.dtype)
