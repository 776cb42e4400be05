"""Launch of the kernel that finds all gradients of rows that see few keys in one pass, see `narrow_walk_kernel`.

For heads of 64 columns, where every tile of query rows is known to see three blocks of keys at most, and where there
are so many keys that what two programs share is little.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import box_descriptor, descriptor, without_memory
from ringflash.kernels.hopper.narrow import NarrowTiles, Numbers, Operands, boxable
from ringflash.kernels.hopper.narrow_walk_kernel import CONSUMERS, backward_narrow_kernel
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata

COLUMNS = 64
"""Head dimension."""

BLOCK = 64
"""Keys of a block."""

LEAST_SPAN = 8
"""Blocks of keys that a program owns, for the two more whose rows it takes to be worth it."""


@functools.lru_cache(maxsize=1024)
def sees_few_blocks(band: int, reach: tuple[int, int] | None, tokens: int) -> bool:
    """Whether so many query rows, from any multiple of that on, see no more blocks of keys than there are warpgroups.

    Args:
        band: of the intervals.
        reach: see band.
        tokens: of a tile; divides a block.

    Example:
        >>> sees_few_blocks(128, (127, 0), 8), sees_few_blocks(128, None, 8), sees_few_blocks(120, None, 8)
        (True, False, True)
    """
    if band + tokens - 1 <= (CONSUMERS.value - 1) * BLOCK + 1:
        return True
    if reach is None:
        return False
    back, ahead = reach
    rows = range(0, BLOCK, tokens)
    return all((t + tokens - 1 + ahead) // BLOCK - (t - back) // BLOCK < CONSUMERS.value for t in rows)


def span_for(query: Tensor, key: Tensor, intervals: KeyIntervals, tiles: NarrowTiles) -> int | None:
    """Blocks of keys for each program, one on each multiprocessor; None where other kernels are to do the work.

    Args:
        query: (T, H, D).
        key: (S, Hk, D).
        intervals: visible key rows of each query row.
        tiles: as `narrow.tiles_for` gives for them.
    """
    if query.shape[2] != COLUMNS or intervals.band is None:
        return None
    if not sees_few_blocks(intervals.band, intervals.reach, tiles.tokens):
        return None
    together = max(1, multiprocessors(query.device) // key.shape[1])
    blocks = -(-key.shape[0] // BLOCK)
    span = -(-blocks // together)
    return span if span >= LEAST_SPAN else None


class PreparedNarrowWalk:
    """What is worked out once for calls alike, and their launch.

    Args:
        operands: dout, query, key and value of the first call, checked.
        out: of the first call; None where delta is given.
        numbers: lse, delta or None to find it, and if it is to be found dlse or None, of the first call.
        intervals: as in `attend_backward`, of the first call; so are the others.
        scale: see intervals.
        dkey_dtype: see intervals; the key's or float32.
        tiles: sizes of tiles of query rows.
        span: blocks of keys of a program.
    """

    def __init__(
        self,
        operands: Operands,
        out: Tensor | None,
        numbers: Numbers,
        intervals: KeyIntervals,
        scale: float,
        dkey_dtype: torch.dtype,
        tiles: NarrowTiles,
        span: int,
    ) -> None:
        reachable = tuple(map(boxable, operands))
        dout, query, key, value = reachable
        self.all_boxable = all(x is y for x, y in zip(operands, reachable, strict=True))
        (rows, heads, dim), (key_rows, key_heads, _) = query.shape, key.shape

        def of_rows(x: Tensor) -> Description:
            return description_of(box_descriptor(x, tiles.tokens, tiles.pack, COLUMNS))

        def of_keys(x: Tensor) -> Description:
            return description_of(descriptor(x, BLOCK, COLUMNS, padded=True))

        self.dkey_dtype, self.described = dkey_dtype, dkey_dtype == key.dtype
        written = of_keys(without_memory(key.shape, dkey_dtype)) if self.described else None
        blocks = -(-key_rows // BLOCK)
        self.launch = Launcher(
            -(-blocks // span) * key_heads,
            (rows, key_rows, key_heads, span, scale, scale * 1.4426950408889634),
            dict(GROUP=heads // key_heads, DIM=dim),
            {"num_warps": 4},
            aligned(*operands, out, *numbers, intervals.start, intervals.stop),
            (of_rows(query), of_rows(dout), None if out is None else of_rows(boxable(out)), of_keys(key),
             of_keys(value), of_rows(without_memory(query.shape, query.dtype)), written, written),
        )  # fmt: skip

    def __call__(
        self, operands: Operands, out: Tensor | None, numbers: Numbers, intervals: KeyIntervals
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, and delta."""
        dout, query, key, value = operands if self.all_boxable else map(boxable, operands)
        lse, delta, dlse = numbers
        dquery = query.new_empty(query.shape)
        dkey, dvalue = (x.new_empty(x.shape, dtype=self.dkey_dtype) for x in (key, value))
        delta = torch.empty_like(lse) if delta is None else delta
        written = (dkey, dvalue, None, None) if self.described else (None, None, dkey, dvalue)
        seeing = ends_of_blocks(intervals), intervals.key_tile_rows(1), intervals.key_tile_rows(BLOCK)
        tensors = (query, dout, None if out is None else boxable(out), key, value, dquery, *written, lse, dlse, delta)
        self.launch(backward_narrow_kernel, (*tensors, intervals.start, intervals.stop, *seeing))
        return dquery, dkey, dvalue, delta


def ends_of_blocks(intervals: KeyIntervals) -> Tensor:
    """How many rows begin to see in each block of keys or in front of it, (blocks,) int32; made once for the intervals.

    Unlike `KeyIntervals.key_tile_rows` also of blocks that no row sees.
    """

    def build() -> Tensor:
        ends = torch.arange(BLOCK, intervals.key_count + BLOCK, BLOCK, dtype=torch.int32, device=intervals.start.device)
        return torch.searchsorted(intervals.start, ends.clamp(max=intervals.key_count), out_int32=True)

    return intervals.kept(("ends of blocks", BLOCK), build)


def backward_walking(
    operands: Operands,
    out: Tensor | None,
    numbers: Numbers,
    intervals: KeyIntervals,
    scale: float,
    dkey_dtype: torch.dtype | None,
    tiles: NarrowTiles,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and delta, where `span_for` gives a span; out if delta is None."""
    dout, query, key, value = operands
    operands, dkey_dtype = (dout.to(query.dtype), query, key, value), dkey_dtype or key.dtype
    lse, delta, dlse = (None if x is None else x.contiguous() for x in numbers)
    assert lse is not None
    call = (
        *map(metadata, (*operands, out, lse, delta, dlse)), intervals.start.shape, intervals.key_count, scale,
        dkey_dtype, tiles, span,
        aligned(*operands, out, lse, delta, dlse, intervals.start, intervals.stop) or tuple(map(aligned, operands)),
    )  # fmt: skip
    prepared = prepared_walks.get(call)
    if prepared is None:
        check_operands(*operands[1:], intervals, scale, None)
        prepared = PreparedNarrowWalk(operands, out, (lse, delta, dlse), intervals, scale, dkey_dtype, tiles, span)
        prepared_walks.add(call, prepared)
    return prepared(operands, out, (lse, delta, dlse), intervals)


prepared_walks = Kept()
"""`PreparedNarrowWalk` by what `backward_walking` was asked for."""
