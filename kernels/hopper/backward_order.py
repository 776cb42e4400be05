"""In which order the backward kernels' programs take key tiles.

Tiles are taken in sections of heads whose query rows fit in the second-level cache together, so that programs which run
at about the same time read the same rows. But tiles differ: under a causal mask the first one of a long document is
visited by as many rows as the document has, the last one by hardly any. Where a long one begins last, all other
multiprocessors wait for it. So the shortest tiles, as many as keep all multiprocessors busy for as long as the longest
takes, are put off to the end, those of all heads together, the longest of them first: whatever tiles end when, these
level it. (Graham, Bounds on Multiprocessing Timing Anomalies, 1969, is why the longest come first.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_of_programs(tile_rows: Tensor, key_heads: int, section: int, processors: int) -> Tensor:
    """The tile and the head of each program, (tiles * key_heads,) int32: tile * key_heads + head.

    Nothing is read by the host.

    Args:
        tile_rows: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        key_heads: number of key heads.
        section: heads taken together; divides `key_heads`.
        processors: programs that run at a time.

    Example:
        >>> rows = torch.tensor([[0, 0, 8, 8], [2, 2, 8, 8], [4, 4, 8, 8], [6, 6, 8, 8]])  # 8, 6, 4 and 2 of them
        >>> order_of_programs(rows, key_heads=2, section=1, processors=1) // 2  # of head 0, of head 1, and the rest
        tensor([0, 1, 2, 0, 1, 2, 3, 3], dtype=torch.int32)
    """
    rows = (tile_rows[:, 3] - tile_rows[:, 0]).long()
    tiles, device = len(rows), rows.device
    by_length = torch.argsort(rows, stable=True)
    place = torch.empty_like(by_length)
    place[by_length] = torch.arange(tiles - 1, -1, -1, device=device)  # the longest has 0
    from_shortest = torch.cumsum(rows[by_length], 0).mul_(key_heads)
    put_off = torch.empty_like(rows, dtype=torch.bool)
    put_off[by_length] = from_shortest <= processors * rows.max()
    head = torch.arange(key_heads, device=device)
    sections = key_heads // section
    turn = (head // section)[None, :] * tiles + torch.arange(tiles, device=device)[:, None]
    turn = torch.where(put_off[:, None], sections * tiles + place[:, None], turn)
    return torch.argsort(turn.flatten(), stable=True).to(torch.int32)
