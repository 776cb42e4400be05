"""New keys and values into a cache, and rotary embedding: what comes before attention when tokens are generated.

Legend: R tokens, D head dimension of keys, V of values.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from ringflash.kernels.decode import Cache, Rotary
from ringflash.kernels.triton.operands import padded


@triton.jit
def load_turned(
    first_R, exists_R, place_R, cos, sin, cos_row, sin_row, places,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows (R, PADDED_DIM) from pointers to their beginnings, the first TURNED dimensions turned at their places."""
    column_D = tl.arange(0, PADDED_DIM)
    inside_RD = exists_R[:, None] & (column_D < DIM)[None, :]
    x_RD = tl.load(first_R[:, None] + column_D[None, :], mask=inside_RD, other=0.0)
    if TURNED > 0:
        if INTERLEAVED:
            partner_D, angle_D, sign_D = column_D ^ 1, column_D // 2, tl.where(column_D % 2 == 0, -1.0, 1.0)
        else:
            low_D = column_D < TURNED // 2
            partner_D = tl.where(low_D, column_D + TURNED // 2, column_D - TURNED // 2)
            angle_D, sign_D = tl.minimum(column_D, partner_D), tl.where(low_D, -1.0, 1.0)
        turned_RD = exists_R[:, None] & (column_D < TURNED)[None, :]
        known_RD = turned_RD & ((place_R >= 0) & (place_R < places))[:, None]
        partner_RD = tl.load(first_R[:, None] + partner_D[None, :], mask=turned_RD, other=0.0).to(tl.float32)
        place_R = tl.cast(place_R, tl.int64)
        cos_RD = tl.load(cos + place_R[:, None] * cos_row + angle_D[None, :], mask=known_RD, other=0.0)
        sin_RD = tl.load(sin + place_R[:, None] * sin_row + angle_D[None, :], mask=known_RD, other=0.0)
        rotated_RD = x_RD.to(tl.float32) * cos_RD.to(tl.float32) + sign_D[None, :] * partner_RD * sin_RD.to(tl.float32)
        x_RD = tl.where(turned_RD, rotated_RD.to(x_RD.dtype), x_RD)
    return x_RD


@triton.jit
def sequence_entry(sequence, batch_index):
    """Which entry of a cache without pages is a sequence's."""
    entry = sequence
    if batch_index is not None:
        entry = tl.load(batch_index + sequence)
    return tl.cast(entry, tl.int64)


@triton.jit
def tokens_before(sequence, lengths, offset):
    """Rows of a sequence that are filled."""
    used = offset
    if lengths is not None:
        used += tl.load(lengths + sequence)
    return used


@triton.jit(do_not_specialize=["offset", "count", "capacity", "places", "blocks"])
def append_kernel(
    key, value, key_cache, value_cache, lengths, batch_index, block_table, cos, sin,
    offset, count, capacity, places, blocks, key_heads, table_row, cos_row, sin_row,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_batch, kc_row, kc_head, vc_batch, vc_row, vc_head,
    R: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Program = (sequence, block of R new tokens, key head), the last fastest."""
    head = tl.program_id(0) % key_heads
    block = tl.program_id(0) // key_heads % blocks
    sequence = tl.cast(tl.program_id(0) // key_heads // blocks, tl.int64)
    token_R = block * R + tl.arange(0, R)
    row_R = tokens_before(sequence, lengths, offset) + token_R
    exists_R = (token_R < count) & (row_R >= 0) & (row_R < capacity)
    if PAGE > 0:
        entry_R = tl.load(block_table + sequence * table_row + row_R // PAGE, mask=exists_R, other=0).to(tl.int64)
        row_R = row_R % PAGE
    else:
        entry_R = sequence_entry(sequence, batch_index) + tl.zeros([R], tl.int64)

    place_R = tokens_before(sequence, lengths, offset) + token_R
    k_RD = load_turned(
        key + sequence * k_batch + tl.cast(token_R, tl.int64) * k_row + head * k_head, exists_R, place_R,
        cos, sin, cos_row, sin_row, places, DIM, PADDED_DIM, TURNED, INTERLEAVED,
    )  # fmt: skip
    k_first_R = key_cache + entry_R * kc_batch + tl.cast(row_R, tl.int64) * kc_row + head * kc_head
    column_D = tl.arange(0, PADDED_DIM)
    tl.store(k_first_R[:, None] + column_D[None, :], k_RD, mask=exists_R[:, None] & (column_D < DIM)[None, :])

    column_V = tl.arange(0, PADDED_VALUE_DIM)
    inside_RV = exists_R[:, None] & (column_V < VALUE_DIM)[None, :]
    v_from_R = value + sequence * v_batch + tl.cast(token_R, tl.int64) * v_row + head * v_head
    v_first_R = value_cache + entry_R * vc_batch + tl.cast(row_R, tl.int64) * vc_row + head * vc_head
    v_RV = tl.load(v_from_R[:, None] + column_V[None, :], mask=inside_RV)
    tl.store(v_first_R[:, None] + column_V[None, :], v_RV, mask=inside_RV)


def append(key: Tensor, value: Tensor, cache: Cache, rotary: Rotary | None = None) -> None:
    """See ringflash.kernels.decode.append."""
    (batch, count, heads, dim), value_dim = key.shape, value.shape[3]
    if key.numel() == 0:
        return
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    rows = min(1 << (count - 1).bit_length(), 32)
    blocks = -(-count // rows)
    append_kernel[(batch * blocks * heads,)](
        key, value, cache.key, cache.value, *index_operands(cache), *rotary_operands(rotary),
        cache.offset, count, cache.capacity, 0 if rotary is None else rotary.cos.shape[0], blocks, heads,
        *index_strides(cache, rotary), *key.stride()[:3], *value.stride()[:3],
        *cache.key.stride()[:3], *cache.value.stride()[:3],
        R=rows, DIM=dim, PADDED_DIM=padded(dim), VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim),
        num_warps=4 if rows > 8 else 1, **index_constants(cache, rotary),
    )  # fmt: skip


def index_operands(cache: Cache) -> tuple[Tensor | None, ...]:
    """lengths, batch_index and block_table as the kernels take them: entry b at address b, a table's rows dense."""
    lengths, batch_index, table = cache.lengths, cache.batch_index, cache.block_table
    return (
        lengths if lengths is None else lengths.contiguous(),
        batch_index if batch_index is None else batch_index.contiguous(),
        table if table is None or table.stride(1) == 1 else table.contiguous(),
    )


def rotary_operands(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """The tables cos and sin as the kernels take them."""
    if rotary is None:
        return None, None
    return tuple(x if x.stride(1) == 1 else x.contiguous() for x in (rotary.cos, rotary.sin))


def index_strides(cache: Cache, rotary: Rotary | None) -> tuple[int, int, int]:
    """Row strides of `index_operands`' table and of `rotary_operands`."""
    table, (cos, sin) = index_operands(cache)[2], rotary_operands(rotary)
    return tuple(0 if x is None else x.stride(0) for x in (table, cos, sin))


def index_constants(cache: Cache, rotary: Rotary | None) -> dict[str, int | bool]:
    """PAGE, TURNED and INTERLEAVED."""
    return {
        "PAGE": 0 if cache.block_table is None else cache.key.shape[1],
        "TURNED": 0 if rotary is None else 2 * rotary.cos.shape[1],
        "INTERLEAVED": rotary is not None and rotary.interleaved,
    }
