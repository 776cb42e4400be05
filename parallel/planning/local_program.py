"""The program of one rank that holds all queries and keys.

Boundaries of documents may be on the device, where the host must not read them: all that a program owes to them is then
one table, which both passes of a call read.

Legend: T query rows, S key rows, R rows of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.key_blocks import BlockPlaces
from ringflash.parallel.planning.launches import Launch, launches, with_layout
from ringflash.parallel.planning.plan import Buffers
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.row_places import aligned
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.band import band_of_mask, is_even
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import block_places, places, position_bounds


def local_program(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Program:
    """One rank that holds all queries and keys.

    Args:
        mask: rules; its own document boundaries are not read.
        boundaries: as in `visibility.position_bounds`: on the device, or where the mask has a layout of blocks and the
            host knows them, on the CPU.
        query_boundaries: likewise.
        queries: T.
        keys: S.
        device: of all tensors.
    """
    if mask.has_layout and (boundaries is None or boundaries.device.type == "cpu"):
        query, key = torch.arange(queries), torch.arange(keys)
        work = launches(mask, boundaries, query, key, query_boundaries) if queries and keys else ()
        among_keys = None if query_boundaries is None else places(boundaries, query, query_boundaries).to(device)
        return _whole(tuple(launch.to(device) for launch in work), queries, keys, among_keys, device)
    table = document_table(mask, boundaries, query_boundaries, queries, keys, device)
    even = (boundaries is None or mask.boundaries is not None) and is_even(mask, keys)
    return table_program(mask, table, queries, keys, even)


def document_table(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Tensor:
    """All that one rank's program owes to boundaries that the host must not read, (R, T rounded up) int32.

    Rows are start, stop and, with two intervals, sink_start and sink_stop; then, where the mask has a layout of blocks,
    the block of each query and that of each key; then, where queries have boundaries of their own, each query's place
    among the keys.
    """
    table = torch.zeros(
        table_shape(mask, query_boundaries is not None, queries, keys), dtype=torch.int32, device=device
    )
    query = torch.arange(queries, device=device)
    bounds = position_bounds(mask.without_layout, boundaries, query, query_boundaries)[: _columns(mask)]
    table[: len(bounds), :queries] = torch.stack(bounds).clamp_(0, keys)
    if mask.has_layout:
        found = block_places(mask, boundaries, query, torch.arange(keys, device=device), query_boundaries)
        table[len(bounds), :queries], table[len(bounds) + 1, :keys] = found.query_block, found.key_block
    if query_boundaries is not None:
        table[-1, :queries] = places(boundaries, query, query_boundaries)
    return table


def table_shape(mask: Mask, with_places: bool, queries: int, keys: int) -> tuple[int, int]:
    """Shape of `document_table`."""
    longest = max(queries, keys) if mask.has_layout else queries
    return _columns(mask) + 2 * mask.has_layout + with_places, aligned(longest)


def _columns(mask: Mask) -> int:
    return 4 if mask.two_intervals else 2


def table_program(mask: Mask, table: Tensor, queries: int, keys: int, even: bool = False) -> Program:
    """The program of a `document_table`; `even` as of `KeyIntervals`."""
    columns = _columns(mask)
    start, stop, *sinks = table[:columns, :queries].unbind()
    found, behind = None, columns
    if mask.has_layout:
        found = BlockPlaces(table[columns, :queries], table[columns + 1, :keys], (1, 1))
        behind += 2
    among_keys = table[behind, :queries] if len(table) > behind else None
    band = band_of_mask(mask) if among_keys is None else None
    work = with_layout(mask, KeyIntervals(start, stop, keys, *sinks, band=band, even=even), found)
    return _whole(work if queries and keys else (), queries, keys, among_keys, table.device)


def _whole(
    work: tuple[Launch, ...], queries: int, keys: int, among_keys: Tensor | None, device: torch.device
) -> Program:
    """A single stage over all own keys."""
    everything = slice(0, keys)
    stage = StageProgram(work, own=everything, key_segments=((0, keys),), kept=everything, everything=True)
    return Program(queries, keys, (stage,), Buffers(), among_keys, device)
