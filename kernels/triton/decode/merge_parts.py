"""Parts of the keys merged by whichever program stores its part last, and the counters by which that one is known.

A second kernel would cost every call its start. Instead every program adds one to a counter of its tile behind the
stores of its part, and the one that finds all others counted merges them: in the order of the parts, whoever does it,
so that the bits are the same every time. With more than FAN parts this happens twice, first for FAN neighbours and then
for what came of them, as one multiprocessor takes long to read 128 parts of many rows.

Counters are zero before a launch and zero behind it. They belong to one launch at a time: counters.py.

Legend: R rows of a tile, P parts, C columns of values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from ringflash.errors import ArgumentError
from ringflash.kernels.gpu.row_blocks import LN_2, LOG2_E

FAN = tl.constexpr(16)
"""Most parts that one program merges at once; FAN ** 2 is the most there may be."""

MERGED_AT_ONCE = 8192
"""fp32 numbers that 4 warps load together: 16 parts of 4 rows of 128 columns. 8 warps load half, to spill nothing."""


@triton.jit
def last_of(counter, members, CDNA: tl.constexpr):
    """Whether all other members have come by; to the last one, all that they stored before is visible.

    The barrier puts the stores of all threads before the one that counts. Its add releases them to the device and
    acquires those of the programs that counted before; the barrier with which its result reaches the other threads
    passes that on. The last one leaves zero behind for the next launch.

    On CDNA the barrier is an instruction that waits for nothing in flight, and the add writes back and waits for its
    own wave only. So there every wave first waits for its stores (read from the assembly, never run).
    """
    if CDNA:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, 0", "=v,v,~{memory}", [members], tl.int32, is_pure=False, pack=1
        )  # fmt: skip
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def merge(
    parts, parts_lse, out, lse, first, members, part_rows, result, key_head, tile, query_count, heads,
    GROUP: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Merge the rows of a tile of parts [first, first + members), R rows and C columns of all of them at a time.

    The rows of the tile's sequence begin at `result`, those of each part `part_rows` behind the one before. Parts are
    weighted by exp(their lse - the lse of all); those without keys are zeros with an lse of -inf.
    """
    part_P = tl.cast(tl.arange(0, FAN), tl.int64)
    exists_P = part_P < members
    ahead_P = (first + part_P) * part_rows
    for first_row in tl.range(0, tl.minimum(M, query_count * GROUP - tile * M), R):
        row_R = tile * M + first_row + tl.arange(0, R)
        query_R, head_R = row_R // GROUP, key_head * GROUP + row_R % GROUP
        exists_R = query_R < query_count
        exists_RP = exists_R[:, None] & exists_P[None, :]
        lse_R = result + head_R * query_count + query_R
        out_R = (result + query_R * heads + head_R) * VALUE_DIM
        for column in range(0, VALUE_DIM, C):
            column_C = column + tl.arange(0, C)
            inside_C = column_C < VALUE_DIM
            # Both loads before the sums, whose barriers would keep them apart: one trip to memory.
            part_RP = parts + out_R[:, None] + ahead_P[None, :] * VALUE_DIM
            inside_RPC = exists_RP[:, :, None] & inside_C[None, None, :]
            part_RPC = tl.load(part_RP[:, :, None] + column_C[None, None, :], mask=inside_RPC, other=0.0)
            lse_RP = tl.load(parts_lse + lse_R[:, None] + ahead_P[None, :], mask=exists_RP, other=float("-inf"))
            maximum_R = tl.max(lse_RP, 1)
            weight_RP = tl.exp2((lse_RP - tl.where(maximum_R == float("-inf"), 0.0, maximum_R)[:, None]) * LOG2_E)
            total_R = tl.sum(weight_RP, 1)
            divisor_R = tl.where(total_R == 0.0, 1.0, total_R)
            out_RC = tl.sum(part_RPC * weight_RP[:, :, None], 1) / divisor_R[:, None]
            inside_RC = exists_R[:, None] & inside_C[None, :]
            tl.store(out + out_R[:, None] + column_C[None, :], out_RC.to(out.dtype.element_ty), mask=inside_RC)
            if column == 0:
                tl.store(lse + lse_R, maximum_R + tl.log2(divisor_R) * LN_2, mask=exists_R)


@triton.jit
def merge_if_last(
    parts, parts_lse, out, lse, counters, counted, part, splits,
    part_rows, result, key_head, tile, query_count, heads, LEVELS: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, VALUE_DIM: tl.constexpr, CDNA: tl.constexpr,
):  # fmt: skip
    """Call behind the stores of a part: merges parts, each `part_rows` rows behind the one before, into out and lse.

    `counted` numbers the tiles of all sequences and key heads. Each has a counter for its parts; with two levels that
    is one for each FAN neighbours, behind one for all of these. The results of neighbours stand behind the parts.
    """
    if LEVELS == 1:
        if last_of(counters + counted, splits, CDNA):
            merge(
                parts, parts_lse, out, lse, 0, splits, part_rows, result, key_head, tile, query_count, heads,
                GROUP, M, R, C, VALUE_DIM,
            )  # fmt: skip
    else:
        fan, fans = part // FAN, tl.cdiv(splits, FAN)
        members = tl.minimum(FAN, splits - fan * FAN)
        counter = counters + counted * (1 + fans)
        if last_of(counter + 1 + fan, members, CDNA):
            ahead = tl.cast(splits + fan, tl.int64) * part_rows
            merge(
                parts, parts_lse, parts + ahead * VALUE_DIM, parts_lse + ahead, fan * FAN, members, part_rows,
                result, key_head, tile, query_count, heads, GROUP, M, R, C, VALUE_DIM,
            )  # fmt: skip
            if last_of(counter, fans, CDNA):
                merge(
                    parts, parts_lse, out, lse, splits, fans, part_rows, result, key_head, tile, query_count, heads,
                    GROUP, M, R, C, VALUE_DIM,
                )  # fmt: skip


def merging(splits: int) -> tuple[int, int, int]:
    """How many times parts are merged, and how many results and counters a tile has."""
    if splits > FAN.value**2:
        raise ArgumentError(f"splits={splits}; allowed are 1 to {FAN.value**2}")
    if splits == 1:
        return 0, 0, 0
    if splits <= FAN.value:
        return 1, splits, 1
    fans = -(-splits // FAN.value)
    return 2, splits + fans, 1 + fans


def shape_of_merge(rows: int, value_dim: int, warps: int) -> tuple[int, int]:
    """R and C (powers of two) for a tile of `rows` rows, `value_dim` padded."""
    together = MERGED_AT_ONCE * 4 // (warps * FAN.value)
    columns = min(value_dim, together)
    return min(1 << (rows - 1).bit_length(), together // columns), columns
