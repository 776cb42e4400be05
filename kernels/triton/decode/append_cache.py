"""New keys and values into a cache.

What has no row in the cache is not written, and the word of ringflash.kernels.overrun says so.

Legend: R tokens, D head dimension of keys, V of values.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from ringflash.kernels.decode import Cache, Rotary
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.row_blocks import padded
from ringflash.kernels.overrun import overrun_word, reason_code
from ringflash.kernels.triton.decode.cache_access import (
    cache_constants,
    cache_operands,
    cache_strides,
    load_rotated,
    rotary_operands,
    sequence_entry,
    tokens_before,
)


@compiled_once
@triton.jit(do_not_specialize=["offset", "count", "capacity", "entries", "rotary_rows", "blocks"])
def append_kernel(
    key, value, key_cache, value_cache, overrun, lengths, batch_index, block_table, cos, sin,
    offset, count, capacity, entries, rotary_rows, blocks, key_heads, block_table_row, cos_row, sin_row,
    k_batch, k_row, k_head, v_batch, v_row, v_head,
    kc_batch, kc_row, kc_head, vc_batch, vc_row, vc_head,
    R: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, OVERRUN: tl.constexpr,
):  # fmt: skip
    """Program = (sequence, block of R new tokens, key head), the last fastest."""
    head = tl.program_id(0) % key_heads
    block = tl.program_id(0) // key_heads % blocks
    sequence = tl.cast(tl.program_id(0) // key_heads // blocks, tl.int64)
    token_R = block * R + tl.arange(0, R)
    row_R = tokens_before(sequence, lengths, offset) + token_R
    exists_R = (token_R < count) & (row_R >= 0) & (row_R < capacity)
    if PAGE > 0:
        page_R = tl.load(block_table + sequence * block_table_row + row_R // PAGE, mask=exists_R, other=0)
        exists_R = exists_R & (page_R >= 0) & (page_R < entries)
        entry_R = page_R.to(tl.int64)
        row_R = row_R % PAGE
    else:
        entry_R = sequence_entry(sequence, batch_index) + tl.zeros([R], tl.int64)
    if overrun is not None:
        tl.store(overrun + tl.zeros([R], tl.int32), OVERRUN, mask=(token_R < count) & (exists_R == 0))

    position_R = tokens_before(sequence, lengths, offset) + token_R
    k_RD = load_rotated(
        key + sequence * k_batch + tl.cast(token_R, tl.int64) * k_row + head * k_head, exists_R, position_R,
        cos, sin, cos_row, sin_row, rotary_rows, DIM, PADDED_DIM, ROTATED, INTERLEAVED,
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
    """See ringflash.kernels.cpu.decode.append."""
    (batch, count, heads, dim), value_dim = key.shape, value.shape[3]
    if key.numel() == 0:
        return
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    rows = min(1 << (count - 1).bit_length(), 32)
    blocks = -(-count // rows)
    append_kernel[(batch * blocks * heads,)](
        key, value, cache.key, cache.value, overrun_word(cache), *cache_operands(cache), *rotary_operands(rotary),
        cache.offset, count, cache.capacity, cache.key.shape[0], 0 if rotary is None else rotary.cos.shape[0],
        blocks, heads,
        *cache_strides(cache, rotary), *key.stride()[:3], *value.stride()[:3],
        *cache.key.stride()[:3], *cache.value.stride()[:3],
        R=rows, DIM=dim, PADDED_DIM=padded(dim), VALUE_DIM=value_dim, PADDED_VALUE_DIM=padded(value_dim),
        num_warps=4 if rows > 8 else 1, OVERRUN=reason_code(cache), **cache_constants(cache, rotary),
    )  # fmt: skip
