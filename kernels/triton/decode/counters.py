"""Counters that belong to one launch at a time, zero before it and zero behind it: how the last program is known."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ringflash.kernels.kept import Kept, build_to_keep
from triton.runtime import driver

COUNTERS = 1 << 16
"""That are kept for launches in graphs at a time, 256 KiB: at 8 key heads for 8192 launches of one sequence."""

MOST_SUPPLIES = 64
"""That are ever made, 16 MiB: nothing tells when a graph is gone, so none is given back."""


def counters(count: int, device: torch.device) -> Tensor:
    """`count` int32 zeros for one launch on the current stream of the current device, which is to set them back.

    Launches of a stream follow one another, so they share theirs. A launch in a CUDA graph runs wherever the graph is
    replayed, beside whatever runs there: it gets some that no other launch ever gets, from a supply that was set before
    the capture, or where too few are left, zeros that are set within the graph. Streams are told apart by their
    handles, as torch tells its memory apart.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        owned = _take(count, device)
        return torch.zeros(count, dtype=torch.int32, device=device) if owned is None else owned
    if (device not in _supply or _supply[device].numel() < COUNTERS // 2) and len(_supplies) < MOST_SUPPLIES:
        _fill(device)
    stream = device, driver.active.get_current_stream(device.index)
    shared = _shared.get(stream)
    if shared is None or shared.numel() < count:
        size = max(1024, 1 << (count - 1).bit_length())
        shared = build_to_keep(lambda: torch.zeros(size, dtype=torch.int32, device=device), device)
        _shared.add(stream, shared)
    return shared


def _take(count: int, device: torch.device) -> Tensor | None:
    """Counters that were never given out and never are again, or None."""
    taken = -(-count // 4) * 4  # Triton compiles another kernel for addresses that are no multiples of 16.
    with _lock:
        left = _supply.get(device)
        if left is None or left.numel() < taken:
            return None
        _supply[device] = left[taken:]
    return left[:count]


def _fill(device: torch.device) -> None:
    """A new supply. A graph may be replayed on any stream, so the host waits for the zeros, and for nothing else."""

    def build() -> Tensor:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        stream.synchronize()
        return zeros

    zeros = build_to_keep(build, device)
    with _lock:
        _supplies.append(zeros)
        _supply[device] = zeros


_lock = threading.Lock()
_shared = Kept(256)
"""Counters of each stream's launches, by device and handle; allocated on the stream, so they may be forgotten."""
_supply: dict[torch.device, Tensor] = {}
"""What is left of the newest supply."""
_supplies: list[Tensor] = []
"""All supplies, whose addresses are in graphs."""
