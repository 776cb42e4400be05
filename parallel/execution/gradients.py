"""Gradients of keys and values, reduced at the ranks that own them."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ringflash.kernels.sums import Part
from ringflash.parallel.execution.rows import rows_beside
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.row_places import part_of
from ringflash.parallel.planning.stage_program import Shipment, StageProgram, runs_of
from ringflash.parallel.transport.base import Arrived, Delivery
from ringflash.parallel.transport.select import GroupTransport


class KeyGradients:
    """Sums this rank's key and value gradients, its own parts and those that other ranks send, in a fixed order.

    Each foreign part travels once, straight to the owner of the keys, in fp32; the owner adds parts in stage order, so
    the sum repeats bit for bit and its rounding does not grow with the number of ranks.

    Args:
        wanted: key and value, or one of them, or neither: those whose gradients somebody needs.
        kernels: from `ringflash.kernels.select`.
        program: what this rank does.
        transport: between ranks; None on one device.
        partial: what `finish` gives is added to that of other ranks, and not rounded before.
    """

    def __init__(
        self,
        wanted: list[Tensor],
        kernels: ModuleType,
        program: Program,
        transport: GroupTransport | None,
        partial: bool = False,
    ) -> None:
        self._wanted, self._kernels, self._transport = wanted, kernels, transport
        dtype = wanted[0].dtype if wanted else torch.float32  # value's is key's
        accumulator = torch.promote_types(dtype, torch.float32)
        self.dtype = accumulator if program.sums_parts or partial else dtype
        """What the parts of own keys are computed in."""
        self.result_dtype = accumulator if partial else dtype
        """What `finish` gives."""
        self._sums: list[Tensor] | None = None
        self._beside = False
        """Whether these lie in memory with gradients of other keys."""
        self._pending: deque[tuple[Delivery, tuple[Shipment, ...]]] = deque()
        self._used, self._room, self._size = 0, 1, 0
        if transport is not None and wanted:
            self._room = program.reduced_ahead
            self._size = program.buffers.reduces if transport.needs_room(wanted[0].device) else 0
            if self._size:
                self._buffers = rows_beside(wanted, self._room * self._size, accumulator)
            else:
                self._buffers = tuple([_no_rows(x.shape[1:], accumulator, x.device) for x in wanted])

    def settle(self, stage: StageProgram, parts: list[Tensor] | None) -> None:
        """Keep the part of own keys, send the others off, and add what has to be added for new ones to have room.

        Args:
            stage: the stage.
            parts: for each of `wanted` the gradients of the keys attended to; None if there were none.
        """
        failure = None
        try:
            if parts is not None and stage.kept is not None:
                self._keep(stage, parts)
            if len(self._pending) >= self._room:
                self._collect()
        except Exception as error:  # raised when others have got what they wait for
            failure = error
        if self._transport is not None and self._wanted and (stage.returns or stage.reduces):
            self._reduce(stage, parts, self._transport)
        if failure is not None:
            raise failure

    def _reduce(self, stage: StageProgram, parts: list[Tensor] | None, transport: GroupTransport) -> None:
        while self._pending and any([not stage.peers.isdisjoint(delivery.peers) for delivery, _ in self._pending]):
            self._collect()
        # pyrefly: ignore[not-iterable]  # there are parts where there are returns, and a missing one is to be an error
        leaving = [(s.peer, [runs_of(part, s) for part in parts]) for s in stage.returns]
        first = self._used % self._room * self._size
        self._used += bool(stage.reduces)
        room = [x[first : first + self._size] for x in self._buffers] if self._size else self._buffers
        expected = [(s.peer, s.count) for s in stage.reduces]
        delivery = transport.deliver(leaving, expected, room, f"gradients of stage {stage.index}")
        self._pending.append((delivery, stage.reduces))

    def finish(self) -> list[Tensor]:
        """Wait for the last parts; the gradient of each of `wanted`, in `result_dtype`."""
        failure = None
        while self._pending:
            try:
                self._collect()
            except Exception as error:  # others wait for what is still to be written to them
                failure = failure or error
        if failure is not None:
            raise failure
        sums = self._sums or [torch.zeros_like(x) for x in self._wanted]
        return [total.to(self.result_dtype, copy=self._beside) for total in sums]

    def _keep(self, stage: StageProgram, parts: list[Tensor]) -> None:
        own = parts if not stage.returns else [stage.kept_of(part) for part in parts]
        if self._sums is None and stage.everything:
            self._sums = own
        elif self._sums is None and isinstance(stage.own, slice) and isinstance(stage.kept, slice):
            if all(len(x) == len(wanted) for x, wanted in zip(own, self._wanted, strict=True)):
                self._sums, self._beside = own, True  # others' rows there are only read from here on
                return
            self._sums = [torch.empty_like(x, dtype=self.dtype) for x in self._wanted]
            for total, part in zip(self._sums, own, strict=True):
                total[: stage.own.start], total[stage.own], total[stage.own.stop :] = 0, part, 0
        else:
            rows = slice(0, len(own[0])) if stage.own is None else stage.own
            added = [x.to(self.dtype).contiguous() for x in own]
            self._add([Part(index, rows, x.data_ptr(), functools.partial(_itself, x)) for index, x in enumerate(added)])

    def _collect(self) -> None:
        delivery, shipments = self._pending.popleft()

        def add(arrived: Sequence[Arrived]) -> None:
            self._add(
                [
                    Part(tensor, part_of(shipments[which].rows, first, first + count), address, rows)
                    for which, tensor, first, count, address, rows in arrived
                ]
            )

        delivery.collect(add)

    def _add(self, parts: Sequence[Part]) -> None:
        if self._sums is None:
            self._sums = [torch.zeros_like(x, dtype=self.dtype) for x in self._wanted]
        self._kernels.add_rows(self._sums, parts)


def _itself(x: Tensor) -> Tensor:
    return x


@functools.lru_cache(maxsize=64)
def _no_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What rows would be like."""
    return torch.empty((0, *shape), dtype=dtype, device=device)
