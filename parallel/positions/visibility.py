"""From a mask over global positions to the row indices that kernels understand, with torch on any device.

`ringflash.parallel.positions.mask.Mask` defines a mask one position at a time; here the same rules are applied to whole
tensors of positions, where the document boundaries live, without a copy to the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, build_to_keep, hold_if_captured
from ringflash.kernels.key_blocks import BlockPlaces, unit_of
from ringflash.parallel.positions.blocks import BlockLayout
from ringflash.parallel.positions.branches import Branches
from ringflash.parallel.positions.mask import UNBOUNDED, Mask
from ringflash.parallel.positions.segments import Segments, intersect, normalize
from ringflash.parallel.positions.spans import tables


def position_bounds(
    mask: Mask, boundaries: Tensor | None, queries: Tensor, query_boundaries: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and one-behind-last visible key position of each query position.

    Args:
        mask: rules of one layer; its own document boundaries are not read.
        boundaries: (documents + 1,) int64 on the queries' device, or None for one document without end.
        queries: (T,) int64 global query positions.
        query_boundaries: (documents + 1,) int64, the queries' own where they differ from the keys' `boundaries`.

    Returns:
        start, stop, sink_start, sink_stop: (T,) int64 global positions. Where sink_stop lies before sink_start, as in
        a prompt that branches share, a query has no second interval.
    """
    if boundaries is None:
        index = after = torch.zeros_like(queries)
        begin, end = index, torch.full_like(queries, UNBOUNDED)
    else:
        own = boundaries if query_boundaries is None else query_boundaries
        # Behind the last boundary there is no document; what is worked out of the last one there is replaced below.
        after = torch.searchsorted(own, queries, right=True).clamp_(max=len(own) - 1)
        index = after - 1
        begin, end = boundaries[index], boundaries[after]
    positions = queries if query_boundaries is None else queries - query_boundaries[after] + end
    start, stop, sink_start, sink_end = begin, end, begin, begin + mask.sink
    if mask.branches is not None:
        own_start, own_stop, sink_start, sink_end = _pieces(mask.branches, positions)
        start, stop = torch.maximum(start, own_start), torch.minimum(stop, own_stop)
        sink_start = torch.maximum(begin, sink_start)
    if mask.right is not None:
        stop = torch.minimum(stop, positions + (mask.right + 1))
    if mask.spans is not None:
        stop = torch.minimum(stop, _stops_of_spans(mask.spans, positions))
    if mask.prefix is not None:
        prefix = mask.prefix
        if isinstance(prefix, tuple):
            prefix = _prefix_on_device(prefix, positions.device)[index]
        stop = torch.minimum(stop, torch.maximum(positions + 1, begin + prefix))
    for size in mask.chunks:
        chunk = begin + (positions - begin) // size * size
        start, stop = torch.maximum(start, chunk), torch.minimum(stop, chunk + size)
    if mask.left is not None:
        start = torch.maximum(start, positions - mask.left)
    if mask.layout is not None:
        document = 0 if boundaries is None else (boundaries if query_boundaries is None else query_boundaries)[index]
        first, last = _layout_bounds(mask.layout, queries.device)
        block = ((queries - document) // mask.layout.size).clamp(max=len(first) - 1)
        # The layout may reach beyond the document; the next one must not start before this one does.
        least = torch.minimum(begin + first[block], end)
        start, sink_start = torch.maximum(start, least), torch.maximum(sink_start, least)
        stop = torch.minimum(stop, begin + last[block])
        sink_end = torch.minimum(sink_end, stop)
    sink_start = sink_stop = start if mask.branches is None else sink_start
    if mask.sink_left is not None:
        start = torch.maximum(start, positions - mask.sink_left)
        sink_stop = torch.maximum(sink_start, torch.minimum(sink_end, start))
    elif mask.branches is not None:
        sink_stop = torch.minimum(sink_end, start)
        if query_boundaries is not None:  # by which places step back from one document to the next
            sink_stop = torch.maximum(sink_start, sink_stop)
    bounds = start, torch.maximum(start, stop), sink_start, sink_stop
    if boundaries is None:
        return bounds
    own = boundaries if query_boundaries is None else query_boundaries
    start, stop, sink_start, sink_stop = (torch.where(queries < own[-1], bound, boundaries[-1]) for bound in bounds)
    return start, stop, sink_start, sink_stop


def places(boundaries: Tensor | None, queries: Tensor, query_boundaries: Tensor | None = None) -> Tensor:
    """Place of each query among the keys, (T,) int64; arguments as in `position_bounds`.

    A query's own position, unless queries have boundaries of their own: then documents are aligned at their ends.
    """
    if query_boundaries is None:
        return queries
    assert boundaries is not None  # come with those of queries
    document = torch.searchsorted(query_boundaries, queries, right=True).clamp_(max=len(query_boundaries) - 1)
    return queries - query_boundaries[document] + boundaries[document]


_tensors = Kept(128 * 2**20, size=lambda tensors: sum(x.nbytes for x in tensors))
"""What masks say in numbers, on devices, as many bytes of it."""


def _pieces(branches: Branches, positions: Tensor) -> list[Tensor]:
    """`branches.pieces` of the prompt or branch that holds each position."""
    found = _kept((branches, positions.device), branches.pieces, positions.device)
    index = (torch.searchsorted(found[0], positions, right=True) - 1).clamp_(min=0)
    return [edges[index] for edges in found]


def _stops_of_spans(spans: Segments, positions: Tensor) -> Tensor:
    """One behind the last token that each position sees: of its span, or itself."""
    starts, stops = _kept((spans, positions.device), tables(spans), positions.device)
    return torch.maximum(positions + 1, stops[torch.searchsorted(starts, positions, right=True)])


def _kept(name: tuple, numbers: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    found = _tensors.get(name) or _tensors.add(name, _on_device(numbers, device))
    return hold_if_captured(found, device)


def _layout_bounds(layout: BlockLayout, device: torch.device) -> tuple[Tensor, ...]:
    """`layout.bounds` as tensors."""
    return _kept((layout, device), layout.bounds, device)


def _prefix_on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _kept((lengths, device), [lengths], device)[0]


def _on_device(numbers: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    return build_to_keep(lambda: tuple(torch.tensor(x, dtype=torch.int64, device=device) for x in numbers), device)


def key_intervals(
    mask: Mask,
    boundaries: Tensor | None,
    query_positions: Tensor,
    key_positions: Tensor,
    query_boundaries: Tensor | None = None,
) -> KeyIntervals:
    """Visible rows of a key tensor for each row of a query tensor.

    Args:
        mask: rules of one layer; its own document boundaries are not read.
        boundaries: as in `position_bounds`.
        query_positions: (T,) int64, ascending global positions of the query rows.
        key_positions: (S,) int64, ascending global positions of the key rows.
        query_boundaries: as in `position_bounds`.
    """
    bounds = position_bounds(mask, boundaries, query_positions, query_boundaries)
    rows = [torch.searchsorted(key_positions, bound).to(torch.int32) for bound in bounds]
    sink = rows[2:] if mask.two_intervals else (None, None)
    return KeyIntervals(rows[0], rows[1], key_positions.shape[0], *sink)


def block_places(
    mask: Mask,
    boundaries: Tensor | None,
    query_positions: Tensor,
    key_positions: Tensor,
    query_boundaries: Tensor | None = None,
) -> BlockPlaces:
    """Where rows stand in a mask's layout of blocks, which counts from each document's start; see `key_intervals`.

    Arguments are as there. Positions on a device are not read, so nothing is known of units there.
    """
    (rows, columns), sizes = mask.block_counts, mask.block_sizes
    own = boundaries if query_boundaries is None else query_boundaries
    query_block = _blocks_of(query_positions, own, sizes[0], rows)
    key_block = _blocks_of(key_positions, boundaries, sizes[1], columns)
    known = query_block.device.type == "cpu"
    return BlockPlaces(query_block, key_block, (unit_of(query_block), unit_of(key_block)) if known else (1, 1))


def _blocks_of(positions: Tensor, boundaries: Tensor | None, size: int, count: int) -> Tensor:
    """Block of each position in its document, (positions,) int32."""
    if boundaries is not None:
        positions = positions - boundaries[torch.searchsorted(boundaries, positions, right=True) - 1]
    # A tail behind the documents may reach beyond the layout; it sees nothing, whichever block it is said to be in.
    return (positions // size).clamp_(max=count - 1).int()


def layout_on_device(layout: BlockLayout, device: torch.device) -> Tensor:
    """`layout.matrix` for all heads, (1, query blocks, key blocks) bool."""

    def build() -> tuple[Tensor]:
        return (torch.from_numpy(layout.matrix)[None].to(device),)

    name = "matrix", layout, device
    found = _tensors.get(name) or _tensors.add(name, build_to_keep(build, device))
    return hold_if_captured(found, device)[0]


def visible_pairs(mask: Mask, queries: Tensor, keys: int) -> int:
    """How many pairs there are of one of these queries and a key that it sees.

    Args:
        mask: with its documents.
        queries: (T,) int64 global positions, on the CPU.
        keys: how many there are; a mask without documents has no end of its own.
    """
    boundaries, own = (None if x is None else torch.tensor(x) for x in (mask.boundaries, mask.query_boundaries))
    pairs = 0
    for layer in mask.layers:
        start, stop, sink_start, sink_stop = (
            bound.clamp(max=keys) for bound in position_bounds(layer, boundaries, queries, own)
        )
        pairs += int((stop - start).clamp_(min=0).sum())
        if mask.two_intervals:
            pairs += int((sink_stop - sink_start).clamp_(min=0).sum())
    return pairs


def needed_keys(mask: Mask, segments: Sequence[Segments], keys: int) -> list[Segments]:
    """For each set of query positions, the keys below `keys` that any of them sees; `Mask.keys_needed` for many."""
    if mask.layout is not None or not any(segments):
        needed = ([interval for segment in each for interval in mask.keys_needed(segment)] for each in segments)
        return [intersect(normalize(each), ((0, keys),)) for each in needed]
    first, behind = torch.tensor([segment for each in segments for segment in each]).T.contiguous()
    boundaries, own = (None if x is None else torch.tensor(x) for x in (mask.boundaries, mask.query_boundaries))
    # Ends never decrease: the first query of a segment sees furthest back, the last one furthest ahead.
    start, _, *sinks = position_bounds(mask, boundaries, first, own)
    _, stop, *_ = position_bounds(mask, boundaries, behind - 1, own)
    bounds = [[start, stop], *([sinks] if mask.two_intervals else [])]
    intervals = torch.stack([torch.stack(x, dim=1) for x in bounds], dim=1).clamp_(max=keys).tolist()
    rows = iter(intervals)
    return [normalize((a, b) for row in itertools.islice(rows, len(each)) for a, b in row) for each in segments]
