"""Which block is kept, recomputed, or moved to the host.

The first blocks of a pass are wanted last in its backward pass, so they are the ones that move; the last blocks are the
ones that are kept whole, whose memory is free again before the backward pass comes to the others.
"""

from __future__ import annotations

from dataclasses import dataclass

KEEP = "keep"
"""Everything that the backward pass wants stays on the device."""

RECOMPUTE = "recompute"
"""A block's input and attention's results stay on the device, the rest is computed again."""

OFFLOAD = "offload"
"""The same in host memory."""

PAIRS = "offload_pairs"
"""The same, but for the input of every second block, which is computed again too."""

AUTO = "auto"
"""One of these for each block, as memory allows."""

SPARE = 0.05
"""Share of a device's memory that is left free: other steps have ranks with more tokens, and memory has gaps."""


@dataclass(frozen=True)
class Measured:
    """What the first step took, in which each block was recomputed, and moved as far as the host had room.

    Attributes:
        free: bytes of the device that nothing took while the step needed most, less what stays since.
        moved: how many blocks moved.
        kept_bytes: of what a block keeps, on average.
        recomputed_bytes: of what is there beside them when a block has been computed again.
    """

    free: int
    moved: int
    kept_bytes: int
    recomputed_bytes: int


def placed(blocks: int, measured: Measured) -> list[str]:
    """Placements with which the next steps fit: as few blocks moved, then as few recomputed, as the device has room."""
    free = max(0, measured.free)
    stay = min(measured.moved, free // max(1, measured.kept_bytes))
    free -= stay * measured.kept_bytes
    moved = measured.moved - stay
    whole = 0 if moved else min(blocks, free // max(1, measured.recomputed_bytes))
    return [OFFLOAD] * moved + [RECOMPUTE] * (blocks - moved - whole) + [KEEP] * whole


def said(placements: list[str], pairs: bool = False, measured: Measured | None = None, queries: int = 0) -> str:
    """A line about placements, what they were decided by, and how many queries are in a round (see `rounds`)."""
    names = {
        KEEP: "kept whole",
        RECOMPUTE: "recomputed from what stays on the device",
        OFFLOAD: "recomputed from what moves to the host as far as there is room",
    }
    counts = {name: placements.count(name) for name in names}
    parts = [f"{count} {names[name]}" for name, count in counts.items() if count]
    line = f"of {len(placements)} blocks {', '.join(parts)}{', in pairs' if pairs else ''}"
    if queries and placements.count(KEEP) < len(placements):
        line += f", those that are recomputed in rounds of {queries:,} queries"
    if measured is None:
        return line
    free, kept, again = (x / 2**30 for x in (measured.free, measured.kept_bytes, measured.recomputed_bytes))
    return (
        f"{line}: the first step left {free:.2f} GiB of each GPU free, "
        f"of a block {kept:.2f} GiB are kept, what is computed again {again:.2f} GiB"
    )
