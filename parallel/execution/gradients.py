"""Key and value gradients on their way home."""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.parallel.planning.program import Shipment, StageProgram
from ringflash.parallel.transport import Pending, PointToPoint


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
