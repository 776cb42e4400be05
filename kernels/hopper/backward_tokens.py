"""Programs of the backward kernels where there are sink tokens: their key tiles are seen by nearly all rows.

A key tile is seen by the rows whose own range of keys it is in, and by others as sink tokens. One program takes both
unless the others are so many that the launch would wait for it. Then a program takes the first, and the others are cut
into chunks of equal length, each with a program of its own. What these programs find out about the tile's keys and
values they leave in fp32 side by side, in slots, and `add_slots` adds it up, in the same order every time.

Nothing is read by the host, so there are as many chunks and slots as there may be: those without use end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.compile_once import compiled_once

LEAST_ROWS = 1024
"""Query rows of a chunk: fewer are not worth the way of a tile's gradients through memory."""

ALIGNED = 128
"""Rows: chunks are multiples, so that blocks of 64 or 128 rows end with them."""

CHUNKS = 2
"""For each multiprocessor, of all key heads. Programs that begin last should be short beside the launch."""


class Programs(NamedTuple):
    """Work of a launch for one key head.

    Attributes:
        work: (programs, 6) int32. Key tile, -1 for a program without use; first row that sees the tile in its own range
            of keys, and one behind the last; first row that sees it as sink tokens, a multiple of 4, and one behind the
            last; slot, -1 where the result is the tile's. The first programs are those of the tiles in order.
        split: (splits, 3) int32. Key tile, first slot and number of slots of each tile that has some; 0 for none.
    """

    work: Tensor
    split: Tensor


def chunk_count(tiles: int, query_rows: int, key_heads: int, processors: int) -> int:
    """Chunks that the rows of all tiles together are long enough for.

    As each tile's last one may be shorter, there are up to twice as many, and up to three times as many slots.
    """
    return min(-(-CHUNKS * processors // key_heads), tiles * (query_rows // LEAST_ROWS))


def programs_of_tiles(of_own: Tensor, of_tokens: Tensor, query_rows: int, key_heads: int, processors: int) -> Programs:
    """The programs for key tiles, from the rows that see them.

    Args:
        of_own: (tiles, 4) int32, as of KeyIntervals.key_tile_rows.
        of_tokens: the same of sink tokens.
        query_rows: number of query rows.
        key_heads: number of key heads.
        processors: programs that run at a time.
    """
    device, tiles = of_own.device, len(of_own)
    chunks = chunk_count(tiles, query_rows, key_heads, processors)
    begin, end = of_tokens[:, 0] // 4 * 4, of_tokens[:, 3]
    rows = torch.where(end > of_tokens[:, 0], end - begin, 0)
    tile = torch.arange(tiles, dtype=torch.int32, device=device)
    own = torch.stack([tile, of_own[:, 0], of_own[:, 3]], 1)
    if not chunks:
        whole = torch.stack([begin, begin + rows, torch.full_like(tile, -1)], 1)
        return Programs(torch.cat([own, whole], 1), own.new_empty(0, 3))
    unit = chunks * ALIGNED
    length = ((rows.sum() + unit - 1) // unit * ALIGNED).clamp(min=LEAST_ROWS).to(torch.int32)
    # Longer ones alone are cut, so there are fewer than `chunks` of them, and at most twice as many pieces.
    cut = rows > length
    pieces = torch.where(cut, (rows + length - 1) // length, 0)
    pieces_so_far, cut_so_far = pieces.cumsum(0), cut.cumsum(0)
    first_slot = (pieces_so_far - pieces + cut_so_far - 1).to(torch.int32)
    uncut = torch.where(cut, 0, rows)
    whole = torch.stack([begin, begin + uncut, torch.where(cut, first_slot, -1)], 1)

    piece = torch.arange(2 * chunks, device=device)
    of_tile = torch.searchsorted(pieces_so_far, piece, right=True)
    used = of_tile < tiles
    of_tile = of_tile.clamp(max=tiles - 1)
    place = piece - (pieces_so_far - pieces)[of_tile]
    first = begin[of_tile] + place * length
    behind = torch.minimum(first + length, end[of_tile])
    slot = first_slot[of_tile] + 1 + place
    nothing = torch.zeros_like(piece)
    chunk = torch.stack([torch.where(used, of_tile, -1), nothing, nothing, first, behind, slot], 1).to(torch.int32)

    split = torch.searchsorted(cut_so_far, torch.arange(1, chunks + 1, device=device))
    exists = split < tiles
    split = split.clamp(max=tiles - 1)
    count = torch.where(exists, pieces[split] + 1, 0)
    split = torch.stack([split, first_slot[split], count], 1).to(torch.int32)
    return Programs(torch.cat([torch.cat([own, whole], 1), chunk]), split)


def order_with_chunks(order: Tensor, programs: Programs, key_heads: int) -> Tensor:
    """`backward_order.order_of_programs` with chunks in it: (programs * key_heads,) int32, program * key_heads + head.

    A chunk stands in front of the tile whose own rows begin where the chunk does, of the same head: then it reads what
    others read at that time.
    """
    tiles = len(order) // key_heads
    chunks = programs.work[tiles:]
    if not len(chunks):
        return order
    turn = torch.empty_like(order, dtype=torch.int64)
    turn[order.long()] = torch.arange(len(order), device=order.device)
    begins = programs.work[:tiles, 1].contiguous()
    beside = torch.searchsorted(begins, chunks[:, 3].contiguous()).clamp(max=tiles - 1)
    head = torch.arange(key_heads, device=order.device)
    turns = torch.where(chunks[:, :1] < 0, len(order), turn[beside[:, None] * key_heads + head])
    chunk = (torch.arange(tiles, len(programs.work), device=order.device)[:, None] * key_heads + head).flatten()
    everything = torch.cat([chunk.to(torch.int32), order])
    turn = torch.cat([turns.flatten() * 2, torch.arange(len(order), device=order.device) * 2 + 1])
    return everything[torch.argsort(turn, stable=True)]


def add_slots(programs: Programs, slots: tuple[Tensor, Tensor], dkey: Tensor, dvalue: Tensor, block: int) -> None:
    """Write the gradients of the tiles of `block` keys that have slots: sums of these, (slots * block, Hk, D) fp32."""
    if not len(programs.split):
        return
    for x, gradient in zip(slots, (dkey, dvalue), strict=True):
        key_rows, key_heads, dim = gradient.shape
        grid = (len(programs.split), key_heads, block // SLOT_ROWS.value)
        width = triton.next_power_of_2(dim)
        add_slots_kernel[grid](programs.split, x, gradient, key_rows, key_heads, N=block, DIM=dim, WIDTH=width)


SLOT_ROWS = tl.constexpr(16)
"""Rows that a program of `add_slots_kernel` adds up."""


@compiled_once
@triton.jit(do_not_specialize=["key_rows", "key_heads"])
def add_slots_kernel(
    split_ptr, slots_ptr, gradient_ptr, key_rows, key_heads, N: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """See `add_slots`. Program = (split tile, key head, SLOT_ROWS rows)."""
    entry = split_ptr + tl.program_id(0) * 3
    tile, first_slot, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    row = tl.program_id(2) * SLOT_ROWS + tl.arange(0, SLOT_ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    place = tl.program_id(1) * DIM + column
    inside = (tile * N + row < key_rows) & (column < DIM)
    total = tl.zeros([SLOT_ROWS, WIDTH], tl.float32)
    for slot in range(first_slot, first_slot + count):
        rows = (tl.cast(slot, tl.int64) * N + row) * (key_heads * DIM)
        total += tl.load(slots_ptr + rows + place, mask=inside, other=0.0)
    rows = (tl.cast(tile, tl.int64) * N + row) * (key_heads * DIM)
    tl.store(gradient_ptr + rows + place, total.to(gradient_ptr.dtype.element_ty), mask=inside & (count > 0))


class Tokens(NamedTuple):
    """With sink tokens: programs and the rows that see keys and tiles as such; None without."""

    work_ptr: gl.tensor
    rows_of_key_ptr: gl.tensor
    rows_of_tile_ptr: gl.tensor
    dkey_slots_ptr: gl.tensor
    dvalue_slots_ptr: gl.tensor


@gluon.jit
def mask_of(rows, block, tokens, rows_of_key_ptr):
    """(first, last) of the rows of which a block needs no mask if it lies within; where rows that see keys are."""
    full_begin, full_end, seeing = rows.full_begin, rows.full_end, rows_of_key_ptr
    if tokens.work_ptr is not None:
        own = block < rows.own_blocks
        full_begin = gl.where(own, full_begin, rows.token_full_begin)
        full_end = gl.where(own, full_end, rows.token_full_end)
        seeing = gl.where(own, seeing, tokens.rows_of_key_ptr)
    return full_begin, full_end, seeing
