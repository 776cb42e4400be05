"""Draw a plan: who holds what, who computes what when, and who sends what to whom meanwhile.

    python launch/plan.py                                             # text: causal, 4,096 tokens, zigzag over 4 ranks
    python launch/plan.py --ranks 8 --window 511 --partition contiguous --svg window.svg
    python launch/plan.py --documents 0,700,1500,4096 --partition balanced --svg documents.svg

The picture has one column for each stage. On top is the attention matrix (rows are queries, columns are keys): full
colour is computed in this stage by the rank of that colour, pale colour was computed before, grey comes later. Below,
each rank has a lane with the keys that lie there in that stage, and arrows show which of them travel to the next one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import torch

from ringflash.errors import ArgumentError
from ringflash.parallel.planning.plan import Move, Plan, Stage
from ringflash.parallel.planning.ring import ring
from ringflash.parallel.planning.verify import verify
from ringflash.parallel.positions.mask import Interval, Mask
from ringflash.parallel.positions.partition import NAMES, resolve
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
        ranges += [*([(sink_start, sink_stop)] if mask.sink else []), (start, stop)]
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


def pairs(plan: Plan, mask: Mask, index: int, rank: int) -> int:
    """Number of (query, key) pairs that a rank computes in a stage."""
    ranges = visible_ranges(mask, plan.queries.positions(rank))
    return sum(
        int((stop.clamp(max=last) - start.clamp(min=first)).clamp(min=0).sum())
        for start, stop in ranges
        for first, last in stage_of(plan, index, rank).work
    )


def keys_there(plan: Plan, index: int, rank: int) -> Segments:
    """Keys that a rank may use in a stage: what arrived for it, and its own in the first and where it attends them."""
    own = plan.keys.segments[rank]
    arrived = (segment for move in arrivals(plan, index, rank) for segment in move.segments)
    return tuple(sorted((*arrived, *(own if index == 0 else intersect(stage_of(plan, index, rank).work, own)))))


# Text


def as_text(plan: Plan, mask: Mask, title: str) -> str:
    """The plan in words and numbers, a line for each rank of each stage."""
    ranks = plan.queries.ranks
    lines = [title, "", "who holds what"]
    lines += [f"  rank {rank}: {_spans(segments)}" for rank, segments in enumerate(plan.queries.segments)]
    totals = [0] * ranks
    for index in range(stage_count(plan)):
        lines += ["", f"stage {index}"]
        for rank in range(ranks):
            stage, computed = stage_of(plan, index, rank), pairs(plan, mask, index, rank)
            totals[rank] += computed
            sends = [f"sends {_spans(move.segments)} to rank {move.peer}" for move in stage.sends]
            attends = f"attends {_spans(stage.work)}: {computed:,} pairs" if stage.work else "attends nothing"
            lines.append(f"  rank {rank}: " + "; ".join([attends, *sends]))
    level = max(totals) * ranks / sum(totals) if sum(totals) else 1.0
    moved = sum(mine.moved_tokens for mine in plan.ranks)
    lines += ["", f"{moved:,} keys travel; the busiest rank computes {level:.2f} times the mean"]
    return "\n".join(lines)


def _spans(segments: Segments) -> str:
    return " ".join(f"[{start}, {stop})" for start, stop in segments) or "nothing"


# Picture


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


# Command line


def mask_of(options: argparse.Namespace) -> tuple[Mask, str]:
    """The mask that the command line describes, and its name."""
    mask, names = (Mask.bidirectional(), ["bidirectional"]) if options.bidirectional else (Mask.causal(), ["causal"])
    if options.window is not None:
        right = None if options.bidirectional else 0
        mask &= Mask.sliding_window(options.window, right, sink=options.sink)
        names.append(f"window of {options.window} back" + (f", {options.sink} sinks" if options.sink else ""))
    elif options.sink:
        raise ArgumentError(f"--sink {options.sink} needs --window: without one nothing hides the first tokens")
    if options.chunk is not None:
        mask &= Mask.chunked(options.chunk)
        names.append(f"chunks of {options.chunk}")
    if options.documents is not None:
        mask &= Mask.documents(options.documents)
        names.append(f"{len(options.documents) - 1} documents")
    return mask, ", ".join(names)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan that the command line describes, and draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="number of ranks (4)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the whole sequence (4096)")
    parser.add_argument("--partition", choices=NAMES, default="zigzag")
    parser.add_argument("--bidirectional", action="store_true", help="every query sees every key; default is causal")
    parser.add_argument("--window", type=int, help="tokens before the query that it sees")
    parser.add_argument("--sink", type=int, default=0, help="first tokens that stay visible behind the window")
    parser.add_argument("--chunk", type=int, help="a query sees its own chunk of this many tokens only")
    parser.add_argument(
        "--documents", type=lambda text: [int(x) for x in text.split(",")], help="boundaries, for example 0,700,4096"
    )
    parser.add_argument("--svg", type=Path, help="file to draw the plan into")
    options = parser.parse_args(arguments)
    try:
        mask, name = mask_of(options)
        if options.length < 1 or options.ranks < 1:
            raise ArgumentError(f"--length {options.length}, --ranks {options.ranks}; both are at least 1")
        partition = resolve(options.partition, options.length, options.ranks, mask)
        if mask.boundaries and mask.boundaries[-1] != options.length:
            raise ArgumentError(f"--documents ends at {mask.boundaries[-1]}, --length is {options.length}")
    except ArgumentError as error:
        parser.error(str(error))
    plan = ring(mask, partition)
    verify(plan, mask)
    title = f"{name}: {options.length:,} tokens, {options.partition} over {options.ranks} ranks"
    print(as_text(plan, mask, title))
    if options.svg:
        options.svg.write_text(as_svg(plan, mask, title), encoding="utf-8")
        print(f"drawn into {options.svg}")


if __name__ == "__main__":
    main()
