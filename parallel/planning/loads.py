"""How many pairs and keys every rank has with every owner of keys, for all ranks at once.

Legend: R ranks, C segments of keys in the order of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ringflash.parallel.positions.mask import Mask
from ringflash.parallel.positions.partition import Partition
from ringflash.parallel.positions.segments import Segments
from ringflash.parallel.positions.visibility import position_bounds

SAMPLES = 2**13
"""Query positions at which pairs are counted; sequences up to this length are looked at everywhere."""


@dataclass(frozen=True)
class Loads:
    """What ranks have to do with each other's keys.

    Attributes:
        queries: (R,) int64 queries on each rank.
        keys: (R, R) int64, by (rank, owner): keys of the owner that any query of the rank sees.
        pairs: (R, R) float64: pairs of a query of the rank and a key of the owner that it sees; whole numbers where
            every query was looked at.
    """

    queries: np.ndarray
    keys: np.ndarray
    pairs: np.ndarray


def loads(mask: Mask, queries: Partition, keys: Partition, needed: Sequence[Segments]) -> Loads:
    """Count them.

    Args:
        mask: with its documents.
        queries: which query positions each rank holds.
        keys: which key positions.
        needed: from `visibility.needed_keys`.
    """
    return Loads(np.array(queries.counts()), shared_keys(keys, needed), _pairs(mask, queries, keys))


def shared_keys(keys: Partition, needed: Sequence[Segments]) -> np.ndarray:
    """`Loads.keys` alone."""
    ranks = np.repeat(np.arange(len(needed)), [len(segments) for segments in needed])
    bounds = np.array([x for segments in needed for x in segments], dtype=np.int64).reshape(-1, 2)
    return _overlaps(ranks, bounds, np.ones(len(bounds), dtype=np.int64), keys)


def _pairs(mask: Mask, queries: Partition, keys: Partition) -> np.ndarray:
    every = max(1, -(-queries.length // SAMPLES))
    samples = np.arange(every // 2, queries.length, every)
    starts, _, owners = queries.owners
    ranks = owners[np.searchsorted(starts, samples, side="right") - 1]
    weights = np.full(len(samples), queries.length / max(1, len(samples)) if every > 1 else 1)
    boundaries, own = (None if x is None else torch.tensor(x) for x in (mask.boundaries, mask.query_boundaries))
    pairs = np.zeros((queries.ranks, keys.ranks))
    for layer in mask.layers:
        start, stop, sink_start, sink_stop = position_bounds(layer, boundaries, torch.from_numpy(samples), own)
        for first, last in ((start, stop), (sink_start, sink_stop)) if mask.two_intervals else ((start, stop),):
            bounds = torch.stack([first, torch.maximum(first, last)], dim=1).clamp_(max=keys.length).numpy()
            pairs += _overlaps(ranks, bounds, weights, keys)
    return pairs


def _overlaps(ranks: np.ndarray, bounds: np.ndarray, weights: np.ndarray, keys: Partition) -> np.ndarray:
    """(R, R) sum over intervals of a rank of how many keys of each owner lie in it, times the interval's weight.

    An interval covers whole segments between its ends: it is counted where it begins and taken off where it stops, in
    a table (R, C) that is then summed along the segments.
    """
    starts, stops, owners = keys.owners
    count = keys.ranks
    if not len(bounds) or not len(starts):
        return np.zeros((count, count), dtype=weights.dtype)
    covered = np.zeros((count, len(starts) + 1), dtype=weights.dtype)
    partial = np.zeros_like(covered)
    for edge, sign in ((bounds[:, 1], 1), (bounds[:, 0], -1)):
        segment = np.searchsorted(stops, edge, side="right")
        inside = np.minimum(segment, len(starts) - 1)
        # Of [0, edge): all segments before the one with the edge, and of that what lies before the edge.
        np.add.at(covered, (ranks, segment), -sign * weights)
        before = np.where(segment < len(starts), edge - starts[inside], 0)
        np.add.at(partial, (ranks, inside), sign * weights * before)
        covered[:, 0] += np.bincount(ranks, sign * weights, minlength=count).astype(weights.dtype)
    whole = covered[:, :-1].cumsum(1) * (stops - starts) + partial[:, :-1]
    order = np.argsort(owners, kind="stable")
    holding, first = np.unique(owners[order], return_index=True)
    summed = np.zeros((count, count), dtype=weights.dtype)
    summed[:, holding] = np.add.reduceat(whole[:, order], first, axis=1)
    return summed
