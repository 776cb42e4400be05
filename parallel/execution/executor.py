"""Walks a program, forward and backward: keys travel from rank to rank while the kernels attend to what is there.

Legend: B sequences of S query and Sk key tokens over all ranks; this rank holds T query rows and Tk key rows of them;
H query heads, Hk key heads, D head dimension, Dv the value's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.reference import Carry
from ringflash.parallel.execution.call import NEEDS, Inputs, Ready, Settings, prepare, table_of
from ringflash.parallel.execution.crossing import Crossing
from ringflash.parallel.execution.gradients import KeyGradients
from ringflash.parallel.execution.rows import Rows, rows_beside, rows_of
from ringflash.parallel.planning.launches import attend, attend_backward
from ringflash.parallel.planning.program import StageProgram, picked
from ringflash.parallel.positions.segments import count
from ringflash.parallel.transport.base import Ticket
from ringflash.parallel.transport.head_exchange import HeadExchange


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of this rank's queries to the keys of all ranks.

    Returns:
        out (T, H, Dv) like the query, lse (H, T) fp32, and the table that `backward` wants, see `call.shape_of_table`.
    """
    query, value = inputs.query, inputs.value
    table = query.new_empty((0, 0), dtype=torch.int32) if inputs.handle is not None else table_of(inputs, settings)
    ready = prepare(inputs, settings, table, "forward")
    accumulator = torch.promote_types(query.dtype, torch.float32)
    last = query.dtype if inputs.sinks is None else accumulator  # sinks are weighed in before anything is rounded
    crossing = room = None
    if ready.transport is not None:
        try:
            if ready.exchange is not None:
                ready, crossing = cross(ready, ready.exchange)
                table = table if crossing.table is None else crossing.table
            room = make_room(ready)
        except Exception as error:
            ready.refuse(error)
            raise
        begin(ready, crossing)
    at = ready.inputs
    carry: Carry | None = None

    def body(stage: StageProgram, at_hand: Rows) -> None:
        nonlocal carry
        modifiers = ready.modifiers(stage, at_hand)
        for launch in stage.launches:
            carry = attend(
                ready.kernels,
                launch,
                at.query,
                *at_hand[:2],
                scale=settings.scale,
                modifiers=modifiers,
                carry=carry,
                out_dtype=last if stage.is_last and launch is stage.launches[-1] else accumulator,
            )

    failure, found = walk(ready, room, body), []
    try:
        if carry is None:
            out = query.new_zeros(*at.query.shape[:-1], value.shape[-1], dtype=last)
            carry = out, out.new_full(at.query.shape[1::-1], -torch.inf, dtype=torch.float32)
        out, lse = carry if at.sinks is None else with_sinks(*carry, at.sinks)
        found = [out.to(query.dtype), lse]
    except Exception as error:
        if ready.transport is None:
            raise
        failure = failure or error
    out, lse = found if ready.transport is None else end(ready, crossing, found, failure)
    return out, lse, table


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
    query, needs = inputs.query, settings.needs
    needs_key, needs_value = needs & NEEDS["key"], needs & NEEDS["value"]
    ready = prepare(inputs, settings, table, "backward")
    crossing = room = None
    try:
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        delta = ready.kernels.row_delta(dout, out, dlse)
        of_rows = dout, lse, delta
        if ready.exchange is not None:
            ready, crossing = cross(ready, ready.exchange, of_rows, table)
            of_rows = crossing.of_rows
        at = ready.inputs
        wanted = ([at.key] if needs_key else []) + ([at.value] if needs_value else [])
        gradients = KeyGradients(
            wanted, ready.program, ready.transport, crossing is not None and crossing.shares.copied
        )
        if ready.transport is not None:
            room = make_room(ready)
    except Exception as error:
        ready.refuse(error)
        raise
    if ready.transport is not None:
        begin(ready, crossing)
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
                of_rows[0],
                at.query,
                *at_hand[:2],
                *of_rows[1:],
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

    failure, found = walk(ready, room, body, settle), []
    try:
        if needs & NEEDS["query"]:
            found.append(torch.zeros_like(at.query) if dquery is None else dquery)
        found += gradients.finish()
    except Exception as error:
        if ready.transport is None:
            raise
        failure = failure or error
    if ready.transport is not None:
        found = end(ready, crossing, found, failure)
    nothing = query.new_empty(0)
    return (
        found[0] if needs & NEEDS["query"] else nothing,
        found[-1 - bool(needs_value)] if needs_key else nothing,
        found[-1] if needs_value else nothing,
        nothing if inputs.sinks is None or not needs & NEEDS["sinks"] else sink_gradient(inputs.sinks, lse, delta),
    )


def cross(
    ready: Ready,
    exchange: HeadExchange,
    of_rows: tuple[Tensor, Tensor, Tensor] | None = None,
    table: Tensor | None = None,
) -> tuple[Ready, Crossing]:
    """The call as the plan takes it, all tokens of some heads; its tensors are filled when ranks begin.

    Args:
        ready: the call.
        exchange: of heads for tokens.
        of_rows: of the backward pass: dout, log-sum-exp and delta.
        table: of the backward pass, what `forward` returned.
    """
    crossing = Crossing(exchange, ready.inputs, ready.settings, of_rows, table)
    return replace(ready, inputs=crossing.inputs, first_head=crossing.heads.start), crossing


class Room(NamedTuple):
    """What rows that travel lie in.

    Attributes:
        sent: own keys as they can be sent.
        ahead: of each stage what it sends of own keys, where that can leave before its stage; otherwise nothing.
        gathers: (source, rows, target) of what of that has to be gathered, once the keys are there.
        buffers: for keys that arrive.
    """

    sent: Rows
    ahead: list[list[tuple[int, Tensor]]]
    gathers: list[tuple[Tensor, Tensor, Tensor]]
    buffers: list[Rows]


def make_room(ready: Ready) -> Room:
    """All that travelling takes, before the ranks agree to begin."""
    program, own, transport = ready.program, ready.inputs.keys(), ready.transport
    needed = min(2, sum([bool(stage.receives) for stage in program.stages]))
    sent = tuple([x.contiguous() for x in own])
    ahead: list[list[tuple[int, Tensor]]] = [[] for _ in program.stages]
    gathers: list[tuple[Tensor, Tensor, Tensor]] = []
    if transport is not None and transport.sends_early:
        for pairs, stage in zip(ahead, program.sent_ahead, strict=True):
            for s in stage.sends:
                if isinstance(s.rows, Tensor):
                    targets = rows_beside(sent, s.count)
                    gathers += [(source, s.rows, x) for source, x in zip(sent, targets, strict=True)]
                    pairs += [(s.peer, x) for x in targets]
                else:
                    pairs += rows_of(s, sent)
    return Room(sent, ahead, gathers, [rows_beside(own, program.buffers.arrivals) for _ in range(needed)])


def begin(ready: Ready, crossing: Crossing | None) -> None:
    """From here on all ranks make this call, and wait for each other."""
    ready.begin()
    if crossing is not None:
        crossing.go()


def end(ready: Ready, crossing: Crossing | None, found: list[Tensor], failure: Exception | None) -> list[Tensor]:
    """Behind the work of several ranks: results come back, and all hear of what failed on one."""
    if crossing is None:
        ready.close(failure)
        return found
    ready.close(crossing.cross_back(found, failure))
    return crossing.results()


def walk(
    ready: Ready,
    room: Room | None,
    body: Callable[[StageProgram, Rows], None],
    settle: Callable[[StageProgram], None] | None = None,
) -> Exception | None:
    """Go through the stages of a program: post transfers, work on what is there, settle, wait.

    Where work fails, out of memory say, the transfers go on all the same: other ranks have begun this call, too, and
    would wait for ever. They hear of the error when the call ends on CPUs, on GPUs some calls later (`Agreement`).

    Args:
        ready: what to walk with.
        room: from `make_room`; None on one device.
        body: the work of a stage, or of a piece of it, on the rows that it attends to.
        settle: what follows the work of each piece of a stage, in the backward pass.

    Returns:
        What failed on this rank of several.
    """
    program, transport = ready.program, ready.transport
    keys = _Keys(ready, room)
    failure: Exception | None = None
    for index, stage in enumerate(program.stages):
        keys.begin(index)
        for piece in (stage,) if settle is None else program.backward_stages[index]:
            try:
                if piece.launches and failure is None:
                    body(piece, piece.at_hand(keys.own, keys.arrived))
            except Exception as error:
                if transport is None:
                    raise
                failure = error
            keys.work_begun()
            try:
                if settle is not None:
                    settle(piece)
            except Exception as error:
                if transport is None:
                    raise
                failure = failure or error
        keys.end()
    keys.close()
    return failure


class _Keys:
    """Keys and values on their way from stage to stage.

    A transfer that cannot begin before the work that was asked for earlier is over is asked for first. Any other is
    asked for behind a stage's first launch, so that the GPU does not wait for the host.
    """

    def __init__(self, ready: Ready, room: Room | None) -> None:
        self._stages, self._transport, self.own = ready.program.stages, ready.transport, ready.inputs.keys()
        self._sent, self._ahead, gathers, self._buffers = room or Room(self.own, [], [], [])
        for source, rows, target in gathers:
            torch.index_select(source, 0, rows, out=target)
        self._start = None if ready.transport is None else ready.transport.mark()
        self._filled = 0
        self._asked: Callable[[], Ticket] | None = None
        self._ticket: Ticket | None = None
        self._leaving: list[Ticket] = []
        self.arrived: Rows = ()
        """What came for the stage at hand."""

    def begin(self, index: int) -> None:
        """A stage begins."""
        stage, self._coming = self._stages[index], ()
        self._received = stage.received
        if not stage.sends and not stage.receives:
            return
        assert self._transport is not None  # one device sends nothing
        if stage.receives:
            self._coming = self._buffers[self._filled % 2]
            self._filled += 1
        ahead = self._ahead[index]
        sends = ahead or [pair for s in stage.sends for pair in rows_of(s, self.arrived if s.relayed else self._sent)]
        receives = [pair for s in stage.receives for pair in rows_of(s, self._coming)]
        now = self._transport.mark() if index else self._start
        ready = self._start if ahead or not sends else now
        free = None if now is None else [now, *(event for x in self._leaving[-1:] for event in x.sent)]
        what = f"keys and values for stage {index + 1}"
        self._asked = partial(self._transport.transfer, sends, receives, what, ready, free)
        if not self._transport.sends_early:
            self.work_begun()

    def work_begun(self) -> None:
        """The first launch of the stage was asked for, if it has one."""
        if self._asked is not None:
            self._ticket, self._asked = self._asked(), None

    def end(self) -> None:
        """The stage is over when the current stream has come here."""
        if self._ticket is not None:
            self._ticket.wait_received()
            self._leaving.append(self._ticket)
        self._ticket = None
        self.arrived = tuple([picked(x, self._received) for x in self._coming])

    def close(self) -> None:
        """Nothing is on its way any more when the current stream has come here."""
        for ticket in self._leaving:
            ticket.wait()


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
