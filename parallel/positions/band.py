"""How near to each other queries and their keys stay, which kernels for narrow masks ask of intervals beforehand."""

from __future__ import annotations

import numpy as np

from ringflash.parallel.positions.documents import longest
from ringflash.parallel.positions.mask import UNBOUNDED, Mask


def band_of_mask(mask: Mask) -> int | None:
    """`KeyIntervals.band` of all positions under a mask, or less of them at an end; None where it is not bounded.

    Document boundaries that the mask does not hold only narrow it.

    Args:
        mask: with or without its documents.

    Example:
        >>> band_of_mask(Mask.sliding_window(127)), band_of_mask(Mask.causal())
        (128, None)
    """
    if mask.two_intervals or mask.has_layout or mask.query_boundaries is not None:
        return None
    # A document or a chunk ends no further than its length from each of its tokens.
    size = min([UNBOUNDED, *mask.chunks, *([] if mask.boundaries is None else [longest(mask.boundaries)])])
    back = ahead = max(0, size - 1)
    if mask.left is not None:
        back = min(back, mask.left)
    if mask.right is not None:
        ahead = min(ahead, mask.right)
    if mask.spans is not None:
        ahead = min(ahead, max((stop - start - 1 for start, stop in mask.spans), default=0))
    if mask.prefix is not None:
        prefix = mask.prefix if isinstance(mask.prefix, int) else max(mask.prefix, default=0)
        ahead = min(ahead, max(0, prefix - 1))
    band = back + 1 + ahead
    return band if band < UNBOUNDED else None


MUCH_LONGER = 3
"""Rows of a sequence, at least, for each key that a row of it sees. Of three rows two are to be in such sequences."""


def is_even(mask: Mask, rows: int) -> bool:
    """`KeyIntervals.even` of all positions under a mask that knows its documents.

    Args:
        mask: without documents of one sequence.
        rows: of all sequences.

    Example:
        >>> is_even(Mask.sliding_window(1022), 16384), is_even(Mask.causal() & Mask.documents([0, 8192, 16384]), 16384)
        (True, False)
    """
    if mask.left is None or mask.chunks or (band := band_of_mask(mask.without_documents())) is None:
        return False
    lengths = np.array([rows]) if mask.boundaries is None else np.diff(mask.boundaries)
    return bool(3 * lengths[lengths >= MUCH_LONGER * band].sum() >= 2 * rows)


def band_of_bounds(start: np.ndarray, stop: np.ndarray) -> int:
    """`KeyIntervals.band` of bounds on the host, the least that there is.

    Args:
        start: (T,), first visible key row of each query row.
        stop: (T,), one behind the last.

    Example:
        >>> band_of_bounds(np.array([0, 0, 1]), np.array([1, 2, 3]))
        2
    """
    if not len(start):
        return 0
    row = np.arange(len(start))
    return max(0, int((stop - row + np.maximum.accumulate(row - start)).max()))
