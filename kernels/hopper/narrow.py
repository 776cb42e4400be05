"""Launches of the kernels for rows that see few keys, see `narrow_kernels`: for which calls, and in what sizes.

Only what `KeyIntervals.band` says beforehand tells whether all keys of a tile fit. Where nothing is said, and for
modifiers, sink tokens, blocks, carries, and out or a gradient of query in fp32, other kernels of this package do the
same.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import (
    box_descriptor,
    boxable,
    descriptor,
    list_descriptor,
    made_addressable,
    without_memory,
)
from ringflash.kernels.hopper.narrow_kernels import (
    ROWS,
    attend_narrow_kernel,
    dkey_narrow_kernel,
    dquery_narrow_kernel,
)
from ringflash.kernels.hopper.softmax import LOG2_E
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata


class NarrowTiles(NamedTuple):
    """Sizes of launches.

    Attributes:
        tokens: of a tile of query rows.
        pack: heads of a tile.
        passes: tiles of a program, of following tokens.
        keys: key rows of the larger block.
        first_keys: key rows of the block in front of it.
    """

    tokens: int
    pack: int
    passes: int
    keys: int
    first_keys: int


PACKS = (8, 4, 2, 1)
"""Heads of a tile."""

LEAST_TOKENS = 16
"""Of a program, for its keys to be worth their way."""

CHOSEN = {(64, torch.bfloat16), (128, torch.bfloat16)}
"""Head dimensions and dtypes that these kernels are chosen for: those that were held against float64 on a GPU."""

CHOSEN_WITH_MORE = {(64, torch.bfloat16)}
"""The same where learned sinks join, which gradients do not hear of, and for gradients of rows that see keys of other
launches, or of other ranks' keys."""

KEY_TILE = 64
"""Key rows whose gradients a program owns."""

STAGES = 3
"""Tiles of query rows on their way to such a program."""

BLOCKS = ((64, 64), (128, 16), (128, 64))
"""Key rows that a program may have, in both blocks together; of more of them the scores do not fit in registers.

Few, as packed documents are of another greatest length in each step, and every pair is a kernel of its own.
"""


@functools.lru_cache(maxsize=1024)
def narrow_tiles(band: int, group: int, dim: int) -> NarrowTiles | None:
    """Sizes for rows of such a `KeyIntervals.band`; None where a tile may see too many keys.

    Args:
        band: of the intervals.
        group: query heads that share a key head.
        dim: head dimension.

    Example:
        >>> narrow_tiles(128, group=8, dim=64), narrow_tiles(1024, group=8, dim=64)
        (NarrowTiles(tokens=8, pack=8, passes=2, keys=128, first_keys=16), None)
    """
    # Blocks of more than 64 columns lie in panels, in which the rows of two tiles do not follow each other.
    packs = PACKS if dim <= 64 else [x for x in PACKS if x * LEAST_TOKENS <= ROWS.value]
    pack = next(x for x in packs if group % x == 0)
    tokens = ROWS.value // pack
    passes = max(1, LEAST_TOKENS // tokens)
    blocks = next((x for x in BLOCKS if sum(x) >= band + tokens * passes - 1), None)
    return blocks and NarrowTiles(tokens, pack, passes, *blocks)


def tiles_for(
    query: Tensor, value: Tensor, intervals: KeyIntervals, dtype: torch.dtype | None, more: bool = False
) -> NarrowTiles | None:
    """Sizes of launches of these kernels, without modifiers and carries; None where others are to do the work.

    Args:
        query: (T, H, D).
        value: (S, Hk, Dv).
        intervals: visible key rows of each query row.
        dtype: of out or of the gradient of query; None for the query's.
        more: see `CHOSEN_WITH_MORE`.
    """
    (rows, heads, dim), (keys, key_heads, value_dim) = query.shape, value.shape
    if intervals.band is None or intervals.has_sink_tokens or intervals.blocks is not None or not rows or not keys:
        return None
    if (dim, query.dtype) not in (CHOSEN_WITH_MORE if more else CHOSEN) or dim != value_dim:
        return None
    if rows * heads >= 2**30 or dtype not in (None, query.dtype):  # numbers of rows are counted in 32 bits
        return None
    return narrow_tiles(intervals.band, heads // max(1, key_heads), dim)


def width_of_boxes(dim: int) -> int:
    """Columns of blocks for a head dimension; those behind the last are read as zeros and not written."""
    return 64 if dim <= 64 else 128


class Boxes(NamedTuple):
    """Descriptions of query, key, value and of what is shaped like them."""

    rows: Description
    keys: Description
    first_keys: Description
    values: Description
    first_values: Description

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor, tiles: NarrowTiles) -> Boxes:
        """For addressable tensors."""
        width = width_of_boxes(query.shape[2])

        def of_keys(x: Tensor, rows: int) -> Description:
            return description_of(descriptor(x, rows, width, padded=True))

        return Boxes(
            rows_description(query, tiles, tiles.passes),
            *(of_keys(x, rows) for x in (key, value) for rows in (tiles.keys, tiles.first_keys)),
        )


def rows_description(x: Tensor, tiles: NarrowTiles, passes: int = 1) -> Description:
    """Of so many tiles of an addressable (rows, heads, dim) tensor."""
    return description_of(box_descriptor(x, tiles.tokens * passes, tiles.pack, width_of_boxes(x.shape[2])))


def programs_of(rows: int, heads: int, tiles: NarrowTiles) -> int:
    """How many own tiles of query rows."""
    return -(-rows // (tiles.tokens * tiles.passes)) * (heads // tiles.pack)


class PreparedNarrowForward:
    """What is worked out once for calls alike, and their launch.

    Args:
        query: as in `attend`, of the first call and checked; so are the others.
        key: see query.
        value: see query.
        intervals: see query.
        scale: see query.
        sinks: see query.
        tiles: sizes of the launch.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        intervals: KeyIntervals,
        scale: float,
        sinks: Tensor | None,
        tiles: NarrowTiles,
    ) -> None:
        rows, heads, _ = query.shape
        self.lse_shape = heads, rows
        direct = aligned(query, key, value, sinks, intervals.start, intervals.stop)
        reached, self.addressable = made_addressable((query, key, value), boxable)
        out = rows_description(without_memory(query.shape, query.dtype), tiles)
        self.launch = Launcher(
            programs_of(rows, heads, tiles),
            (rows, heads, scale * LOG2_E.value),
            dict(GROUP=heads // key.shape[1]),
            {"num_warps": 4, "maxnreg": forward_registers(tiles, query.shape[2])},
            direct,
            (*Boxes.of(*reached, tiles), out),
        )

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Result and lse."""
        out = query.new_empty(query.shape)
        lse = query.new_empty(self.lse_shape, dtype=torch.float32)
        query, key, value = self.addressable((query, key, value))
        tensors = (query, key, key, value, value, out, lse, intervals.start, intervals.stop, sinks)
        self.launch(attend_narrow_kernel, tensors)
        return out, lse


def forward_registers(tiles: NarrowTiles, dim: int) -> int:
    """Most registers of a thread: four programs on a multiprocessor where what they compute with lets them."""
    return 128 if tiles.keys + tiles.first_keys <= 144 and dim <= 64 else 168


def attend_narrow(
    query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, scale: float, sinks: Tensor | None,
    tiles: NarrowTiles,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attend` in the query's dtype, without carry and modifiers, where `tiles_for` gives sizes."""
    sinks = None if sinks is None else sinks.contiguous()
    call = (
        *map(metadata, (query, key, value, sinks)), intervals.start.shape, intervals.key_count, scale, tiles,
        aligned(query, key, value, sinks, intervals.start, intervals.stop) or tuple(map(aligned, (query, key, value))),
    )  # fmt: skip
    prepared = prepared_forwards.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, None)
        prepared = PreparedNarrowForward(query, key, value, intervals, scale, sinks, tiles)
        prepared_forwards.add(call, prepared)
    return prepared(query, key, value, intervals, sinks)


prepared_forwards = Kept()
"""`PreparedNarrowForward` by what `attend_narrow` was asked for."""


Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Dout, query, key, value."""

Numbers = tuple[Tensor, Tensor | None, Tensor | None]
"""Lse, delta, dlse."""


class PreparedNarrowBackward:
    """What is worked out once for calls alike, and their launches.

    Args:
        operands: dout, query, key and value of the first call, checked.
        numbers: lse, delta or None to find it, and if it is to be found dlse or None, of the first call.
        intervals: as in `attend_backward`, of the first call; so are the others.
        scale: see intervals.
        dkey_dtype: see intervals; the key's or float32.
        tiles: sizes of the launches.
    """

    def __init__(
        self,
        operands: Operands,
        numbers: Numbers,
        intervals: KeyIntervals,
        scale: float,
        dkey_dtype: torch.dtype,
        tiles: NarrowTiles,
    ) -> None:
        (dout, query, key, value), self.addressable = made_addressable(operands, boxable)
        (rows, heads, dim), (key_rows, key_heads, _) = query.shape, key.shape
        group = heads // key_heads
        direct = aligned(*operands, *numbers, intervals.start, intervals.stop)
        self.dkey_dtype = dkey_dtype
        of_query, *of_keys = Boxes.of(query, key, value, tiles)
        of_dout = rows_description(dout, tiles, tiles.passes)
        of_tiles = rows_description(query, tiles), rows_description(dout, tiles)
        of_dquery = rows_description(without_memory(query.shape, query.dtype), tiles)
        owned = [description_of(descriptor(x, KEY_TILE, width_of_boxes(dim), padded=True)) for x in (key, value)]
        self.described = dkey_dtype == key.dtype
        of_dkey: Description | None = None
        if self.described:
            dkey = without_memory(key.shape, dkey_dtype)
            of_dkey = description_of(descriptor(dkey, KEY_TILE, width_of_boxes(dim), padded=True))
        programs = programs_of(rows, heads, tiles)
        self.number_count = programs * tiles.passes * 2 * ROWS.value
        numbers_of_tiles = without_memory((self.number_count,), torch.float32)
        of_numbers = description_of(list_descriptor(numbers_of_tiles, 2 * ROWS.value))
        scales = scale, scale * LOG2_E.value
        self.launch_dquery = Launcher(
            programs,
            (rows, heads, *scales),
            dict(GROUP=group, FINDS_DELTA=numbers[1] is None),
            {"num_warps": 4, "maxnreg": dquery_registers(tiles, dim)},
            direct,
            (of_query, of_dout, *of_keys, of_dquery),
        )
        self.launch_dkey = Launcher(
            -(-key_rows // KEY_TILE) * key_heads,
            (key_rows, key_heads, *scales),
            dict(GROUP=group, STAGES=STAGES if dim <= 64 else 2, DIM=dim),
            {"num_warps": 4},
            direct,
            (*of_tiles, of_numbers, *owned, of_dkey, of_dkey),
        )

    def __call__(
        self, operands: Operands, numbers: Numbers, intervals: KeyIntervals
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, and delta."""
        dout, query, key, value = self.addressable(operands)
        lse, delta, dlse = numbers
        dquery, delta = query.new_empty(query.shape), torch.empty_like(lse) if delta is None else delta
        dkey, dvalue = (x.new_empty(x.shape, dtype=self.dkey_dtype) for x in (key, value))
        of_tiles = lse.new_empty(self.number_count)
        bounds = intervals.start, intervals.stop
        tensors = (query, dout, key, key, value, value, dquery, lse, dlse, delta, of_tiles, *bounds)
        self.launch_dquery(dquery_narrow_kernel, tensors)
        written = (dkey, dvalue, None, None) if self.described else (None, None, dkey, dvalue)
        seeing = intervals.key_tile_rows(1), intervals.key_tile_rows(KEY_TILE)
        self.launch_dkey(dkey_narrow_kernel, (query, dout, of_tiles, key, value, *written, *seeing))
        return dquery, dkey, dvalue, delta


def dquery_registers(tiles: NarrowTiles, dim: int) -> int:
    """Most registers of a thread: three programs on a multiprocessor where their memory and scores let them, or two."""
    return 168 if tiles.keys + tiles.first_keys <= 160 and dim <= 64 else 255


def backward_narrow(
    operands: Operands,
    numbers: Numbers,
    intervals: KeyIntervals,
    scale: float,
    dkey_dtype: torch.dtype | None,
    tiles: NarrowTiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, and delta, where `tiles_for` gives sizes."""
    dout, query, key, value = operands
    operands, dkey_dtype = (dout.to(query.dtype), query, key, value), dkey_dtype or key.dtype
    lse, delta, dlse = (None if x is None else x.contiguous() for x in numbers)
    assert lse is not None
    call = (
        *map(metadata, (*operands, lse, delta, dlse)), intervals.start.shape, intervals.key_count, scale, dkey_dtype,
        tiles, aligned(*operands, lse, delta, dlse, intervals.start, intervals.stop) or tuple(map(aligned, operands)),
    )  # fmt: skip
    prepared = prepared_backwards.get(call)
    if prepared is None:
        check_operands(*operands[1:], intervals, scale, None)
        prepared = PreparedNarrowBackward(operands, (lse, delta, dlse), intervals, scale, dkey_dtype, tiles)
        prepared_backwards.add(call, prepared)
    return prepared(operands, (lse, delta, dlse), intervals)


prepared_backwards = Kept()
"""`PreparedNarrowBackward` by what `backward_narrow` was asked for."""
