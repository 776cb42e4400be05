"""The program of one rank that holds all queries and keys.

Boundaries of documents may be on the device, where the host must not read them: all that a program owes to them is then
one table, which both passes of a call read.

Legend: T query rows, S key rows, R rows of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.parallel.planning.launches import Launch, launches
from ringflash.parallel.planning.plan import Buffers
from ringflash.parallel.planning.program import Program
from ringflash.parallel.planning.row_places import aligned
from ringflash.parallel.planning.stage_program import StageProgram
from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.visibility import places, position_bounds


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
        boundaries: as in `visibility.position_bounds`, on the device. The host reads them of masks of several layers.
        query_boundaries: likewise.
        queries: T.
        keys: S.
        device: of all tensors.
    """
    if len(mask.layers) > 1:
        query, key = torch.arange(queries, device=device), torch.arange(keys, device=device)
        work = launches(mask, boundaries, query, key, query_boundaries) if queries and keys else ()
        among_keys = None if query_boundaries is None else places(boundaries, query, query_boundaries)
        return _whole(work, queries, keys, among_keys, device)
    table = document_table(mask, boundaries, query_boundaries, queries, keys, device)
    return table_program(mask, table, queries, keys)


def document_table(
    mask: Mask,
    boundaries: Tensor | None,
    query_boundaries: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
) -> Tensor:
    """All that one rank's program owes to boundaries that the host must not read, (R, T rounded up) int32.

    Rows are start, stop and, with two intervals, sink_start and sink_stop of each layer of the mask, then, where
    queries have boundaries of their own, each query's place among the keys.
    """
    table = torch.zeros(table_shape(mask, query_boundaries is not None, queries), dtype=torch.int32, device=device)
    query = torch.arange(queries, device=device)
    bounds = []
    for layer in mask.layers:
        bounds += position_bounds(layer, boundaries, query, query_boundaries)[: 4 if mask.two_intervals else 2]
    table[: len(bounds), :queries] = torch.stack(bounds).clamp_(0, keys)
    if query_boundaries is not None:
        table[-1, :queries] = places(boundaries, query, query_boundaries)
    return table


def table_shape(mask: Mask, with_places: bool, queries: int) -> tuple[int, int]:
    """Shape of `document_table`."""
    return len(mask.layers) * (4 if mask.two_intervals else 2) + with_places, aligned(queries)


def table_program(mask: Mask, table: Tensor, queries: int, keys: int) -> Program:
    """The program of a `document_table`."""
    rows = table[:, :queries].unbind()
    columns = 4 if mask.two_intervals else 2
    work = [
        Launch(KeyIntervals(rows[i], rows[i + 1], keys, *rows[i + 2 : i + columns]))
        for i in range(0, len(mask.layers) * columns, columns)
    ]
    among_keys = rows[-1] if len(rows) % columns else None
    return _whole(tuple(work) if queries and keys else (), queries, keys, among_keys, table.device)


def _whole(
    work: tuple[Launch, ...], queries: int, keys: int, among_keys: Tensor | None, device: torch.device
) -> Program:
    """A single stage over all own keys."""
    everything = slice(0, keys)
    stage = StageProgram(work, own=everything, key_segments=((0, keys),), kept=everything, everything=True)
    return Program(queries, keys, (stage,), Buffers(), among_keys, device)
