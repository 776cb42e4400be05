"""In which order the backward kernel's programs take key tiles and heads.

Each tile is visited by the query rows that see it: under a causal mask the first tile of a document by all of its rows,
the last by hardly any. Two things make a launch fast. What runs at a time should read the same rows, and a long tile
must not begin when most multiprocessors have nothing left to do. So documents come one after the other, the longest
first, and in each its tiles as they lie: those next to each other begin together and walk through the same rows. As
many heads are taken together as fill the multiprocessors with a document's tiles; of a document that has more tiles
than that, all heads. docs/benchmarks/kernels.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_of_programs(tile_rows: Tensor, key_heads: int, processors: int, more_rows: Tensor | None = None) -> Tensor:
    """The tile and the head of each program, (tiles * key_heads,) int32: tile * key_heads + head.

    Tiles that some row sees together, up to the same last one, count as of one document. Nothing is read by the host.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        key_heads: number of key heads.
        processors: programs that run at a time.
        more_rows: (tiles,) what each tile's program visits beside, such as rows that see it as sink tokens; or None.

    Example:
        >>> rows = torch.tensor([[0, 0, 2, 2], [2, 2, 8, 8], [4, 4, 8, 8], [6, 6, 8, 8]])  # documents of 2 and 6
        >>> order = order_of_programs(rows, key_heads=2, processors=4)
        >>> order // 2, order % 2
        (tensor([1, 2, 3, 1, 2, 3, 0, 0], dtype=torch.int32), tensor([0, 0, 0, 1, 1, 1, 0, 1], dtype=torch.int32))
    """
    begin, end = tile_rows[:, 0], tile_rows[:, 3].contiguous()  # neither ever decreases
    tiles, device = len(begin), begin.device
    first, behind = torch.searchsorted(end, end), torch.searchsorted(end, end, right=True)
    length = end - begin if more_rows is None else end - begin + more_rows
    order = torch.argsort(length[first], descending=True, stable=True)  # of equally long ones as they lie
    first, size = first[order], (behind - first)[order]
    document = (torch.diff(first, prepend=first[:1]) != 0).cumsum(0)
    numbers = torch.arange(1, key_heads + 1, device=device)
    fitting = (key_heads % numbers == 0) & (numbers * size[:, None] <= processors)
    together = torch.where(fitting, numbers, 0).amax(1, keepdim=True)
    together = torch.where(together == 0, key_heads, together)
    head, place = numbers - 1, torch.arange(tiles, device=device)[:, None]
    turn = (document[:, None] * key_heads + head // together) * tiles + place
    return (order[:, None] * key_heads + head).flatten()[torch.argsort(turn.flatten(), stable=True)].to(torch.int32)


LONG, SHORT = 4, 16
"""Of lists: parts of a multiprocessor's share of all work that a long tile has at least, and a short one at most."""


def order_of_lists(counts: Tensor, key_heads: int, processors: int) -> Tensor:
    """The same for tiles that visit blocks of lists, of any number each.

    As many heads together as fill the multiprocessors with their tiles, the longest first: tiles that are equally long
    walk through the same rows together. But long ones of all heads begin before that, and short ones fill up the end.

    Args:
        counts: (G, tiles) int32, blocks of each tile for each group of heads.
        key_heads: as in `order_of_programs`.
        processors: see there.

    Example:
        >>> order = order_of_lists(torch.tensor([[1, 9, 5, 30]]), key_heads=2, processors=2)
        >>> order // 2, order % 2
        (tensor([3, 3, 1, 2, 1, 2, 0, 0], dtype=torch.int32), tensor([0, 1, 0, 0, 1, 1, 0, 1], dtype=torch.int32))
    """
    groups, tiles = counts.shape
    counts = counts.repeat_interleave(key_heads // groups, 0).long()
    total = counts.sum()
    fitting = (n for n in range(1, key_heads) if key_heads % n == 0 and n * tiles >= processors)
    heads = torch.arange(key_heads, device=counts.device)[:, None] // next(fitting, key_heads)
    band = torch.where(counts * (processors * LONG) > total, -1, heads)
    band = torch.where(counts * (processors * SHORT) < total, key_heads, band)
    order = torch.argsort(((band << 32) - counts).flatten(), stable=True)
    return (order % tiles * key_heads + order // tiles).to(torch.int32)
