"""Where the rows of a sequence lie in a cache, and rotary embedding: on the device, and the operands for it.

Legend: R tokens, D head dimension of keys.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from ringflash.kernels.decode import Cache, Rotary


@triton.jit
def load_rotated(
    first_R, exists_R, position_R, cos, sin, cos_row, sin_row, rotary_rows,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows (R, PADDED_DIM) from pointers to their beginnings, of which the first ROTATED dimensions are rotated."""
    column_D = tl.arange(0, PADDED_DIM)
    inside_RD = exists_R[:, None] & (column_D < DIM)[None, :]
    x_RD = tl.load(first_R[:, None] + column_D[None, :], mask=inside_RD, other=0.0)
    if ROTATED > 0:
        if INTERLEAVED:
            partner_D, angle_D, sign_D = column_D ^ 1, column_D // 2, tl.where(column_D % 2 == 0, -1.0, 1.0)
        else:
            low_D = column_D < ROTATED // 2
            partner_D = tl.where(low_D, column_D + ROTATED // 2, column_D - ROTATED // 2)
            angle_D, sign_D = tl.minimum(column_D, partner_D), tl.where(low_D, -1.0, 1.0)
        rotating_RD = exists_R[:, None] & (column_D < ROTATED)[None, :]
        known_RD = rotating_RD & ((position_R >= 0) & (position_R < rotary_rows))[:, None]
        partner_RD = tl.load(first_R[:, None] + partner_D[None, :], mask=rotating_RD, other=0.0).to(tl.float32)
        position_R = tl.cast(position_R, tl.int64)
        cos_RD = tl.load(cos + position_R[:, None] * cos_row + angle_D[None, :], mask=known_RD, other=0.0)
        sin_RD = tl.load(sin + position_R[:, None] * sin_row + angle_D[None, :], mask=known_RD, other=0.0)
        rotated_RD = x_RD.to(tl.float32) * cos_RD.to(tl.float32) + sign_D[None, :] * partner_RD * sin_RD.to(tl.float32)
        x_RD = tl.where(rotating_RD, rotated_RD.to(x_RD.dtype), x_RD)
    return x_RD


@triton.jit
def sequence_entry(sequence, batch_index):
    """Which entry of a cache without pages is a sequence's."""
    entry = sequence
    if batch_index is not None:
        entry = tl.load(batch_index + sequence)
    return tl.cast(entry, tl.int64)


@triton.jit
def last_page_of(used, appended, capacity, block_table, PAGE: tl.constexpr):
    """The page of a sequence's last row, 0 without pages or rows; -1 where the cache does not have all its rows."""
    page = tl.where((used < 0) | (used > capacity - appended), -1, 0)
    if PAGE > 0:
        rows = used + appended
        page = tl.load(block_table + (rows - 1) // PAGE, mask=(page == 0) & (rows > 0), other=page)
    return page


@triton.jit
def page_within(page, entries):
    """A page's number, or that of the last page for one that is not among the `entries` of the cache."""
    return tl.minimum(page.to(tl.uint32), tl.cast(entries - 1, tl.uint32)).to(tl.int64)


@triton.jit
def tokens_before(sequence, lengths, offset):
    """Rows of a sequence that are filled."""
    used = offset
    if lengths is not None:
        used += tl.load(lengths + sequence)
    return used


def cache_operands(cache: Cache) -> tuple[Tensor | None, ...]:
    """lengths, batch_index and block_table as the kernels take them: entry b at address b, rows of pages dense."""
    lengths, batch_index, block_table = cache.lengths, cache.batch_index, cache.block_table
    return (
        lengths if lengths is None else lengths.contiguous(),
        batch_index if batch_index is None else batch_index.contiguous(),
        block_table if block_table is None or block_table.stride(1) == 1 else block_table.contiguous(),
    )


def rotary_operands(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """Cos and sin as the kernels take them."""
    if rotary is None:
        return None, None
    return tuple(x if x.stride(1) == 1 else x.contiguous() for x in (rotary.cos, rotary.sin))


def cache_strides(cache: Cache, rotary: Rotary | None) -> tuple[int, int, int]:
    """Row strides of the block table of `cache_operands` and of `rotary_operands`."""
    block_table, (cos, sin) = cache_operands(cache)[2], rotary_operands(rotary)
    return tuple(0 if x is None else x.stride(0) for x in (block_table, cos, sin))


def cache_constants(cache: Cache, rotary: Rotary | None) -> dict[str, int | bool]:
    """PAGE, ROTATED and INTERLEAVED."""
    return {
        "PAGE": 0 if cache.block_table is None else cache.key.shape[1],
        "ROTATED": 0 if rotary is None else 2 * rotary.cos.shape[1],
        "INTERLEAVED": rotary is not None and rotary.interleaved,
    }
