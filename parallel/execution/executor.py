"""Both passes of a call: keys travel from rank to rank while the kernels attend to what is there.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash.kernels.reference import Carry
from ringflash.kernels.sinks import with_sinks
from ringflash.kernels.whole_backward import whole_backward
from ringflash.parallel.execution.call import (
    NEEDS,
    Inputs,
    Located,
    Ready,
    Settings,
    as_they_travel,
    prepare,
    refusals_notified,
)
from ringflash.parallel.execution.crossing import Crossing
from ringflash.parallel.execution.gradients import KeyGradients
from ringflash.parallel.execution.row_crossing import RowCrossing
from ringflash.parallel.execution.rows import Rows
from ringflash.parallel.execution.walk import Walk
from ringflash.parallel.placement import Placement
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.segments import count
from ringflash.parallel.transport.row_exchange import RowExchange

if TYPE_CHECKING:
    from ringflash.parallel.execution.known_calls import KnownCall
    from ringflash.parallel.transport.symmetric_memory import SymmetricMemory

AnyCrossing = Crossing | RowCrossing


def forward(
    inputs: Inputs, settings: Settings, table: Tensor, where: Located, first_head: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Args:
        inputs: the call's tensors, of all its heads or of some.
        settings: its other arguments.
        table: from `call.table_of`.
        where: from `call.locate`.
        first_head: number of the first query head of the inputs among all of the call.

    Returns:
        out (T, H, Dv) like the query, lse (H, T) fp32, and the table that `backward` wants, see `call.shape_of_table`.
    """
    if where is None or where[0].group is None:
        return _forward(inputs, settings, table, where, first_head)
    inputs = as_they_travel(inputs, where[0])
    memory = _copy_engines(inputs, where[0])
    call = None if memory is None else _known_call()("forward", memory, inputs, settings, where, first_head, ())
    walk = partial(_forward, inputs, settings, table, where, first_head)
    if call is None:
        return walk()
    out, lse = call.results(lambda: walk()[:2])
    return out, lse, table


def _copy_engines(inputs: Inputs, placement: Placement) -> SymmetricMemory | None:
    """What the keys of a call travel by, if that is copy engines and heads are not exchanged."""
    return None if placement.head_ranks > 1 else placement.transport.copy_engines(inputs.query.device)


@lru_cache(maxsize=1)
def _known_call() -> Callable[..., KnownCall | None]:
    """It comes with kernels of GPUs, which machines without any do not import."""
    from ringflash.parallel.execution.known_calls import known_call

    return known_call


def _forward(
    inputs: Inputs, settings: Settings, table: Tensor, where: Located, first_head: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, value = inputs.query, inputs.value
    ready = prepare(inputs, settings, table, "forward", where, first_head)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    carry: Carry | None = None

    def body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal carry
        modifiers = ready.modifiers(stage, at_hand)
        for launch in stage.launches:
            last = stage.is_last and launch is stage.launches[-1]
            carry = ready.kernels.attend(
                ready.inputs.query,
                *at_hand[:2],
                launch.intervals if launch.places is None else launch.showing(ready.inputs.blocks),
                scale=settings.scale,
                modifiers=modifiers,
                carry=carry,
                out_dtype=query.dtype if last else accumulator,
                sinks=ready.inputs.sinks if last else None,
            )

    crossing = None
    try:
        if ready.exchange is not None:
            ready, crossing = cross(ready)
            table = table if crossing.table is None else crossing.table
        walk = Walk(ready, body)
    except Exception as error:
        ready.refuse(error)
        raise
    if ready.transport is not None:
        begin(ready, crossing)
    at, failure, found = ready.inputs, walk.run(), []
    try:
        if carry is None:
            out = query.new_zeros(*at.query.shape[:-1], value.shape[-1])
            carry = out, out.new_full(at.query.shape[1::-1], -torch.inf, dtype=torch.float32)
            carry = carry if at.sinks is None else with_sinks(*carry, at.sinks)
        out, lse = carry
        found = [out if out.dtype == query.dtype else out.to(query.dtype), lse]
    except Exception as error:
        if ready.transport is None:
            raise
        failure = failure or error
    out, lse = found if ready.transport is None else end(ready, crossing, found, failure)
    return out, lse, table


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    inputs: Inputs,
    settings: Settings,
    where: Located,
    first_head: int = 0,
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
        where: what `forward` was given.
        first_head: what `forward` was given.
    """
    needs, call = settings.needs, None
    if dout.stride(-1) != 1:
        with refusals_notified(None if where is None else where[0].group):
            dout = dout.contiguous()
    if where is not None and where[0].group is not None:
        inputs = as_they_travel(inputs, where[0])
        if (memory := _copy_engines(inputs, where[0])) is not None:
            of_rows = dout, dlse, out, lse
            call = _known_call()("backward", memory, inputs, settings, where, first_head, of_rows)
    walk = partial(_backward, dout, dlse, out, lse, table, inputs, settings, where, first_head)
    if call is not None:
        found, of_sinks = call.results(lambda: walk()[0]), None
    else:
        found, of_sinks = walk()
    nothing = _nothing(inputs.query.dtype, inputs.query.device)
    return (
        found[0] if needs & NEEDS["query"] else nothing,
        found[-1 - bool(needs & NEEDS["value"])] if needs & NEEDS["key"] else nothing,
        found[-1] if needs & NEEDS["value"] else nothing,
        nothing if of_sinks is None else of_sinks,
    )


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    inputs: Inputs,
    settings: Settings,
    where: Located,
    first_head: int,
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of query, key and value that somebody needs, and that of sinks."""
    query, needs = inputs.query, settings.needs
    needs_key, needs_value = needs & NEEDS["key"], needs & NEEDS["value"]
    ready = prepare(inputs, settings, table, "backward", where, first_head)
    crossing = None
    accumulator = torch.promote_types(query.dtype, torch.float32)
    dquery: Tensor | None = None
    parts: list[Tensor] | None = None
    alone = ready.transport is None and ready.program.is_one_launch
    delta: Tensor | None = None

    def body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal dquery, parts
        modifiers = ready.modifiers(stage, at_hand)
        for launch in stage.launches:
            dquery, dkey, dvalue = ready.kernels.attend_backward(
                of_rows[0],
                ready.inputs.query,
                *at_hand[:2],
                *of_rows[1:],
                launch.intervals if launch.places is None else launch.showing(ready.inputs.blocks),
                scale=settings.scale,
                modifiers=modifiers,
                carry=dquery,
                dquery_dtype=query.dtype if stage.is_last and launch is stage.launches[-1] else accumulator,
                dkey_dtype=accumulator if stage.returns else gradients.dtype,
                deterministic=settings.deterministic,
            )
            found = ([dkey] if needs_key else []) + ([dvalue] if needs_value else [])
            parts = found if parts is None else [a.add_(b) for a, b in zip(parts, found, strict=True)]

    def only_body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal dquery, parts, delta
        [launch] = stage.launches
        dquery, dkey, dvalue, delta = whole_backward(
            ready.kernels,
            dout,
            query,
            at_hand[0],
            at_hand[1],
            out,
            lse,
            dlse,
            launch.intervals if launch.places is None else launch.showing(ready.inputs.blocks),
            scale=settings.scale,
            modifiers=ready.modifiers(stage, at_hand),
            deterministic=settings.deterministic,
        )
        parts = ([dkey] if needs_key else []) + ([dvalue] if needs_value else [])

    def settle(stage: StageProgram) -> None:
        nonlocal parts
        if parts is None and stage.returns:  # the body failed, and others wait for what this rank owes them
            parts = [x.new_zeros(count(stage.key_segments), *x.shape[1:], dtype=accumulator) for x in wanted]
        gradients.settle(stage, parts)
        parts = None

    try:
        if not alone:
            of_rows = dout, lse, ready.kernels.row_delta(dout, out, dlse)
            delta = of_rows[2]
            if ready.exchange is not None:
                ready, crossing = cross(ready, of_rows, table)
                of_rows = crossing.of_rows
        at = ready.inputs
        wanted = ([at.key] if needs_key else []) + ([at.value] if needs_value else [])
        copied = crossing is not None and crossing.copied
        gradients = KeyGradients(wanted, ready.kernels, ready.program, ready.transport, copied)
        walk = Walk(ready, only_body if alone else body, settle)
    except Exception as error:
        ready.refuse(error)
        raise
    if ready.transport is not None:
        begin(ready, crossing)
    failure, found = walk.run(), []
    try:
        found += gradients.finish()
        if needs & NEEDS["query"]:
            found.insert(0, torch.zeros_like(at.query) if dquery is None else dquery)
    except Exception as error:
        if ready.transport is None:
            raise
        failure = failure or error
    if ready.transport is not None:
        found = end(ready, crossing, found, failure)
    if inputs.sinks is None or not needs & NEEDS["sinks"]:
        return found, None
    return found, ready.kernels.sink_gradient(inputs.sinks, lse, delta)


@lru_cache(maxsize=64)
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """In place of a gradient that nobody needs."""
    return torch.empty(0, dtype=dtype, device=device)


def cross(
    ready: Ready, of_rows: tuple[Tensor, Tensor, Tensor] | None = None, table: Tensor | None = None
) -> tuple[Ready, AnyCrossing]:
    """The call as the plan takes it, all tokens of some heads or other query rows; filled when ranks begin.

    Args:
        ready: the call, with an exchange.
        of_rows: of the backward pass: dout, log-sum-exp and delta.
        table: of the backward pass, what `forward` returned.
    """
    exchange = ready.exchange
    if isinstance(exchange, RowExchange):
        crossing = RowCrossing(exchange, ready.inputs, ready.settings, of_rows)
    else:
        assert exchange is not None
        crossing = Crossing(exchange, ready.inputs, ready.settings, of_rows, table)
    return replace(ready, inputs=crossing.inputs, first_head=ready.first_head + crossing.first_head), crossing


def begin(ready: Ready, crossing: AnyCrossing | None) -> None:
    """From here on all ranks make this call, and wait for each other."""
    ready.begin()
    if crossing is not None:
        crossing.go()


def end(ready: Ready, crossing: AnyCrossing | None, found: list[Tensor], failure: Exception | None) -> list[Tensor]:
    """Behind the work of several ranks: results come back, and all hear of what failed on one."""
    if crossing is None:
        ready.close(failure)
        return found
    ready.close(crossing.cross_back(found, failure))
    return crossing.results()
