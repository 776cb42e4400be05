"""Draws a plan: the picture has one column for each stage.

On top is the attention matrix (rows are queries, columns are keys): full colour is computed in this stage by the rank
of that colour, pale colour was computed before, grey comes later. Below, each rank has a lane with the keys that lie
there in that stage, and arrows show which of them travel to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch

from ringflash.parallel.planning.plan import Move, Plan, Stage
from ringflash.parallel.positions.mask import Interval, Mask
from ringflash.parallel.positions.segments import Segments, count, intersect
from ringflash.parallel.positions.visibility import position_bounds

MATRIX = 176  # pixels of a side; the boundary of a mask is sampled once a pixel
GAP = 40
MARGIN = 64
LANE = 34
STRIP = 13

Point = tuple[float, float]


def visible_ranges(mask: Mask, queries: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(start, stop) key positions that each query sees: the sink prefix if there is one, then the key interval."""
    boundaries = None if mask.boundaries is None else torch.tensor(mask.boundaries)
    ranges = []
    for layer in mask.layers:
        start, stop, sink_start, sink_stop = position_bounds(layer, boundaries, queries)
        ranges += [*([(sink_start, sink_stop)] if mask.two_intervals else []), (start, stop)]
    return ranges


def stage_count(plan: Plan) -> int:
    """Number of stages until every rank is done."""
    return max(len(mine.stages) for mine in plan.ranks)


def stage_of(plan: Plan, index: int, rank: int) -> Stage:
    """What a rank does in a stage: nothing, if it is done before."""
    stages = plan.ranks[rank].stages
    return stages[index] if index < len(stages) else Stage()


def arrivals(plan: Plan, index: int, rank: int) -> tuple[Move, ...]:
    """What reached a rank for a stage, in order of the senders."""
    moves = stage_of(plan, index - 1, rank).receives if index else ()
    return tuple(sorted(moves, key=lambda move: move.peer))


def keys_there(plan: Plan, index: int, rank: int) -> Segments:
    """Keys that a rank may use in a stage: what arrived for it, and its own in the first and where it attends them."""
    own = plan.keys.segments[rank]
    arrived = (segment for move in arrivals(plan, index, rank) for segment in move.segments)
    return tuple(sorted((*arrived, *(own if index == 0 else intersect(stage_of(plan, index, rank).work, own)))))


def as_svg(plan: Plan, mask: Mask, title: str) -> str:
    """The plan as one SVG picture, the same bytes each time."""
    ranks, stages = plan.queries.ranks, stage_count(plan)
    width = MARGIN + stages * (MATRIX + GAP)
    lanes_top = 64 + MATRIX + 30
    height = lanes_top + ranks * LANE + 34
    body = [_text(12, 22, title, size=15, weight="bold"), *_text_legend(height)]
    for stage in range(stages):
        left = MARGIN + stage * (MATRIX + GAP)
        name = "stage 0: local keys" if stage == 0 else f"stage {stage}"
        body += [_text(left, 48, name, size=12, weight="bold"), *_matrix(plan, mask, stage, left, 64)]
        for rank in range(ranks):
            body += _lane(plan, stage, rank, left, lanes_top + rank * LANE)
        sends = ((rank, move.peer) for rank in range(ranks) for move in stage_of(plan, stage, rank).sends)
        for source, destination in sends:
            start = (left + MATRIX + 3, lanes_top + source * LANE + STRIP / 2)
            stop = (left + MATRIX + GAP - 4, lanes_top + destination * LANE + STRIP / 2)
            body.append(_arrow(start, stop))
    for rank in range(ranks):
        body.append(_text(12, lanes_top + rank * LANE + 11, f"rank {rank}", fill=_colour(rank, ranks), weight="bold"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto">'
            '<path d="M0 0L7 3L0 6Z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _text_legend(height: int) -> list[str]:
    top = "Rows are queries, columns keys. Full colour: this rank computes it now. Pale: done before. Grey: later."
    lanes = "Lanes: the keys that lie on each rank in that stage, in the colour of their owner; pale ones only pass."
    return [_text(12, height - 20, top, size=10, fill="#555"), _text(12, height - 7, lanes, size=10, fill="#555")]


def _matrix(plan: Plan, mask: Mask, stage: int, left: float, top: float) -> list[str]:
    """The attention matrix: what each rank computes in this stage, before it, and later."""
    ranks, length = plan.queries.ranks, plan.queries.length
    frame = f'<rect x="{left}" y="{top}" width="{MATRIX}" height="{MATRIX}" fill="#fafafa" stroke="#999"/>'
    parts = [frame]
    for rank, held in enumerate(plan.queries.segments):
        colour = _colour(rank, ranks)
        done = [stage_of(plan, earlier, rank).work for earlier in range(stage)]
        fills = [("#dcdcdc", 1.0, ((0, length),)), *((colour, 0.3, work) for work in done)]
        for fill, opacity, keys in [*fills, (colour, 1.0, stage_of(plan, stage, rank).work)]:
            path = "".join(
                _path(points, left, top, length)
                for queries in held
                for segment in keys
                for points in _region(mask, queries, segment, length)
            )
            if path:
                parts.append(f'<path d="{path}" fill="{fill}" fill-opacity="{opacity:g}"/>')
        for start, stop in held:
            y, tall = top + start / length * MATRIX, (stop - start) / length * MATRIX
            parts.append(f'<rect x="{left - 7}" y="{y:.1f}" width="4" height="{tall:.1f}" fill="{colour}"/>')
            x = left + start / length * MATRIX
            parts.append(f'<rect x="{x:.1f}" y="{top - 7}" width="{tall:.1f}" height="4" fill="{colour}"/>')
    return parts


def _region(mask: Mask, queries: Interval, keys: Interval, length: int) -> Iterator[list[Point]]:
    """Outlines, in (key, query) positions, of what the queries see of the keys."""
    samples = max(2, min(queries[1] - queries[0], MATRIX * (queries[1] - queries[0]) // length + 1))
    positions = torch.linspace(queries[0], queries[1] - 1, samples, dtype=torch.float64).round().long().unique()
    for start, stop in visible_ranges(mask, positions):
        lows, highs = start.clamp(min=keys[0]).tolist(), stop.clamp(max=keys[1]).tolist()
        rows = [(p, lo, hi) for p, lo, hi in zip(positions.tolist(), lows, highs, strict=True)]
        run: list[tuple[int, int, int]] = []
        for row in [*rows, (queries[1], 1, 0)]:
            if row[1] < row[2]:
                run.append(row)
            elif run:
                last = (row[0] if row[0] == queries[1] else run[-1][0] + 1, *run[-1][1:])
                yield _outline([*run, last])
                run = []


def _outline(rows: Sequence[tuple[int, int, int]]) -> list[Point]:
    """Down the right side, up the left one, without points in the middle of straight lines."""
    points = [(hi, p) for p, _, hi in rows] + [(lo, p) for p, lo, _ in reversed(rows)]
    kept: list[Point] = []
    for point in points:
        while len(kept) > 1 and _straight(kept[-2], kept[-1], point):
            kept.pop()
        kept.append(point)
    return kept


def _straight(a: Point, b: Point, c: Point) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) == (b[1] - a[1]) * (c[0] - a[0])


def _path(points: list[Point], left: float, top: float, length: int) -> str:
    scale = MATRIX / length
    return "M" + "L".join(f"{left + x * scale:.1f} {top + y * scale:.1f}" for x, y in points) + "Z"


def _lane(plan: Plan, stage: int, rank: int, left: float, top: float) -> list[str]:
    """The keys on one rank in one stage, where they lie in the sequence, and where they came from."""
    length, ranks = plan.keys.length, plan.keys.ranks
    parts = [f'<rect x="{left}" y="{top}" width="{MATRIX}" height="{STRIP}" fill="#fafafa" stroke="#999"/>']
    there, work = keys_there(plan, stage, rank), stage_of(plan, stage, rank).work
    for owner, owned in enumerate(plan.keys.segments):
        for keys, opacity in ((intersect(there, owned), 0.3), (intersect(work, owned), 1.0)):
            for start, stop in keys:
                x, wide = left + start / length * MATRIX, (stop - start) / length * MATRIX
                parts.append(
                    f'<rect x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{STRIP}" '
                    f'fill="{_colour(owner, ranks)}" fill-opacity="{opacity:g}"/>'
                )
    if arrived := arrivals(plan, stage, rank):
        news = ", ".join(f"{count(move.segments):,} keys from rank {move.peer}" for move in arrived)
        parts.append(_text(left, top + STRIP + 10, news, size=9, fill="#555"))
    return parts


def _arrow(start: Point, stop: Point) -> str:
    middle = (start[0] + stop[0]) / 2
    curve = f"M{start[0]} {start[1]}C{middle} {start[1]} {middle} {stop[1]} {stop[0]} {stop[1]}"
    return f'<path d="{curve}" fill="none" stroke="#444" marker-end="url(#head)"/>'


def _text(x: float, y: float, text: str, size: int = 11, fill: str = "#222", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(text)}</text>'


def _colour(rank: int, ranks: int) -> str:
    return f"hsl({(210 + 360 * rank // ranks) % 360},58%,50%)"
