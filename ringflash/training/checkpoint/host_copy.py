"""A copy in host memory of what a rank writes, from which a thread writes while training goes on.

Made once and used by every checkpoint: page-locking memory takes longer than filling it. A GPU is copied from on a
stream of its own, beside the next step, which changes nothing of its state before it ends. On a CPU all of this is the
same, in ordinary memory and at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ringflash.training.engines.base import Piece
from ringflash.training.memory.available import available_bytes, local_ranks
from ringflash.training.memory.slabs import SLAB, Slabs
from ringflash.training.ranks import from_all

LEFT = 0.5
"""Share of the free host memory that copies may take at most; what blocks move there, and data, have the rest."""


def copy_bytes(weights: int, ranks: int, only_weights: bool) -> int:
    """What each rank's copy takes, about: fp32 weights and two moments, which ranks divide evenly.

    Args:
        weights: how many are trained.
        ranks: how many there are.
        only_weights: whether no moments are saved.
    """
    return int(1.02 * 4 * (1 if only_weights else 3) * weights / ranks) + SLAB


class HostCopy:
    """Elements of pieces, one behind another, in memory of the host.

    Args:
        device: where the pieces are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slabs: list[torch.Tensor] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.Event | None = None

    def reserve(self, size: int) -> bool:
        """Have room for so many bytes; whether there is, for all ranks alike. A collective."""
        free = min(from_all(available_bytes()))
        fits = size * local_ranks() <= LEFT * free
        fits = all(from_all(fits and self._provide(size)))
        if not fits:
            self._slabs.clear()
        return fits

    def fill(self, pieces: Sequence[Piece]) -> bool:
        """Begin to copy pieces here, in place of those before; False if there is no room.

        Nothing may change them before `protect`.
        """
        if 4 * sum(piece.size for piece in pieces) > sum(slab.nbytes for slab in self._slabs):
            return False
        self._places.clear()
        if self._stream is None:
            self._copy(pieces)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):  # where tensors that are made for this live and end, too
                self._copy(pieces)
                self._copied = self._stream.record_event()
        return True

    def protect(self) -> None:
        """What is asked of the device from now on may change the pieces: it waits until they are copied."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def read(self, piece: Piece) -> Iterator[memoryview]:
        """Bytes of a piece, once it is copied."""
        if self._copied is not None:
            self._copied.synchronize()
        for span in self._spans(*self._places[piece.name]):
            yield memoryview(span.numpy()).cast("B")  # pyrefly: ignore[bad-argument-type]  # stub: arrays are buffers

    def _copy(self, pieces: Sequence[Piece]) -> None:
        offset = 0
        for piece in pieces:
            self._places[piece.name] = offset, offset + piece.size
            source = piece.take()
            for slab in self._spans(offset, offset + piece.size):
                part, source = source[: len(slab)], source[len(slab) :]
                slab.copy_(part, non_blocking=True)
            offset += piece.size

    def _spans(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Where elements lie; a slab ends where it ends."""
        length = SLAB // 4
        while start < stop:
            end = min(stop, (start // length + 1) * length)
            yield self._slabs[start // length][start % length :][: end - start]
            start = end

    def _provide(self, size: int) -> bool:
        missing = max(0, -(-size // SLAB) - len(self._slabs)) * SLAB
        slabs = Slabs(self._device, missing, SLAB)
        slabs.expect(missing)
        while len(self._slabs) * SLAB < size:
            slab = slabs.take()
            if slab is None:  # the system has less than it said
                return False
            self._slabs.append(slab.view(torch.float32))
        return True
