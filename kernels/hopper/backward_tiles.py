"""Sizes of the backward launches, and for which head dimensions and modifiers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ringflash.kernels.hopper.widths import WIDTHS, width_of
from ringflash.kernels.modifiers import Modifiers


@dataclass(frozen=True)
class BackwardTiles:
    """Sizes of a backward launch.

    Attributes:
        keys: key rows of a tile.
        queries: query rows of a block.
        stages: blocks of queries and of out's gradient in shared memory; powers of two.
        registers: of a thread of the consumers and of the producer.
    """

    keys: int
    queries: int
    stages: tuple[int, int]
    registers: tuple[int, int] = (240, 24)


BACKWARD_TILES = {
    "64": BackwardTiles(keys=128, queries=128, stages=(2, 2)),
    "128": BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    "192/128": BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    "256": BackwardTiles(keys=64, queries=64, stages=(2, 1)),
}
"""By `WIDTHS`; docs/benchmarks/kernels.md has the measurements behind them."""

BACKWARD_WIDTHS = {name: WIDTHS[name] for name in ("64", "128", "192/128", "256")}
"""Columns that the kernels' blocks have."""


def backward_width(head_dim: int, value_head_dim: int, plain: bool) -> str:
    """The name in `BACKWARD_WIDTHS` of blocks for these head dimensions.

    Blocks of 256 columns take what those of 192/128 do not: gradients that repeat, modifiers, sink tokens, lists of
    blocks, other head dimensions.

    Args:
        head_dim: of queries and keys.
        value_head_dim: of values.
        plain: whether there is nothing of these but perhaps the last.
    """
    width = width_of(head_dim, value_head_dim)
    assert width is not None  # as is checked before
    split = plain and (head_dim, value_head_dim) == (192, 128)
    return width if width in ("64", "128") or split else "256"


def stored_parts(parts: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Columns of a gradient that a warpgroup stores at a time: its rows are some of a larger block's, see `blocks`."""
    if parts == (256,):
        return (128,)  # of all rows
    return parts if sum(parts) == dim else (64,) * len(parts)


POSITIONED_BACKWARD_TILES = {**BACKWARD_TILES, "64": replace(BACKWARD_TILES["64"], stages=(2, 1))}
"""With ALiBi or dropout, for which positions of queries take shared memory as well."""

TWICE_POSITIONED_BACKWARD_TILES = {
    **POSITIONED_BACKWARD_TILES,
    "128": replace(BACKWARD_TILES["128"], stages=(2, 1)),
}
"""With both."""


def backward_tiles(modifiers: Modifiers | None) -> dict[str, BackwardTiles]:
    """Sizes of a launch with these modifiers, by `WIDTHS`."""
    positioned = 0 if modifiers is None else (modifiers.slopes is not None) + bool(modifiers.dropout)
    return (BACKWARD_TILES, POSITIONED_BACKWARD_TILES, TWICE_POSITIONED_BACKWARD_TILES)[positioned]
