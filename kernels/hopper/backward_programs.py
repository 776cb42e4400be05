"""What a backward launch takes of the intervals, made once for all of their launches.

Which key tile and head each program takes, or the turns in which tiles add where gradients have to repeat; and the
query rows that see each key and tile, for which padding that nobody may see makes them anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.block_lists import query_lists
from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.hopper.backward_order import order_of_lists, order_of_programs
from ringflash.kernels.hopper.backward_tokens import Programs, chunk_count, order_with_chunks, programs_of_tiles
from ringflash.kernels.hopper.dquery_in_turn import (
    BLOCK_BY_BLOCK,
    HEAD_BY_HEAD,
    PARTS,
    heads_in_turn,
    turns_of_tiles,
)
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.modifiers import Modifiers


def programs_in_order(intervals: KeyIntervals, block: int, key_heads: int) -> Tensor:
    """See `order_of_programs`, made once for the intervals."""

    def build() -> Tensor:
        return order_of_programs(intervals.key_tile_rows(block), key_heads, multiprocessors(intervals.start.device))

    return intervals.kept(("programs", block, key_heads), build)


def programs_of_lists(intervals: KeyIntervals, keys: int, queries: int, key_heads: int) -> Tensor:
    """See `order_of_lists`, made once for the intervals and their blocks, for tiles of keys and blocks of queries."""

    def build() -> Tensor:
        entries = query_lists(intervals, keys, queries).entries
        return order_of_lists(entries[:, :, 0], key_heads, multiprocessors(intervals.start.device))

    return intervals.kept(("programs of lists", keys, queries, key_heads), build, of_blocks=True)


def chunks_of_tokens(tiles: int, query_rows: int, key_heads: int, device: torch.device) -> int:
    """See `chunk_count`, of the chunks that `programs_with_tokens` has on a device."""
    return chunk_count(tiles, query_rows, key_heads, multiprocessors(device))


def programs_with_tokens(intervals: KeyIntervals, block: int, key_heads: int) -> tuple[Programs, Tensor]:
    """See `backward_tokens.Programs` and `order_with_chunks`, made once for the intervals."""

    def build() -> tuple[Programs, Tensor]:
        processors = multiprocessors(intervals.start.device)
        of_own, of_tokens = (intervals.key_tile_rows(block, sink_tokens) for sink_tokens in (False, True))
        programs = programs_of_tiles(of_own, of_tokens, intervals.query_count, key_heads, processors)
        tokens = programs.work[: len(of_own), 4] - programs.work[: len(of_own), 3]
        order = order_of_programs(of_own, key_heads, processors, tokens)
        return programs, order_with_chunks(order, programs, key_heads)

    return intervals.kept(("programs with tokens", block, key_heads), build)


def order_of_blocks(intervals: KeyIntervals, width: str, modifiers: Modifiers | None) -> gl.constexpr:
    """In which of the orders of `dquery_in_turn` tiles visit their blocks: head by head where that ran on a GPU."""
    by_head = intervals.even and width in ("64", "128") and modifiers is None
    return HEAD_BY_HEAD if by_head else BLOCK_BY_BLOCK


def adding_turns(
    intervals: KeyIntervals, keys: int, queries: int, heads: tuple[int, int], dim: int, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn of each tile of keys; whose turn it is, (heads, blocks, parts) to write in; heads to work on at a time."""
    tile_rows = intervals.key_tile_rows(keys)

    def build() -> tuple[Tensor, Tensor, Tensor]:
        turns, first_turns = turns_of_tiles(tile_rows, intervals.query_count, queries)
        first_turns = first_turns[None, :, None].expand(heads[0], -1, PARTS.value).contiguous()
        together = heads[0] // heads[1] if order == BLOCK_BY_BLOCK.value else 1
        return turns, first_turns, heads_in_turn(tile_rows, heads[1], together * dim * 8)

    turns, first_turns, section = intervals.kept(("turns", heads, dim, keys, queries, order), build)
    return turns, first_turns.clone(), section


def rows_seeing(
    intervals: KeyIntervals, block: int, visible: Tensor | None, sink_tokens: bool = False
) -> tuple[Tensor, Tensor]:
    """`KeyIntervals.key_tile_rows` of single keys and of tiles, of keys that are `visible` if that is given."""
    of_keys, of_tiles = intervals.key_tile_rows(1, sink_tokens), intervals.key_tile_rows(block, sink_tokens)
    return (of_keys, of_tiles) if visible is None else without_padding(visible.contiguous(), of_keys, of_tiles, block)


def without_padding(visible: Tensor, of_keys: Tensor, of_tiles: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`KeyIntervals.key_tile_rows` of single keys and of tiles of `block` keys, such that no row sees padding."""
    shown = torch.empty_like(of_keys), torch.empty_like(of_tiles)
    hide_padding_kernel[(len(of_tiles),)](visible, of_keys, of_tiles, *shown, len(of_keys), block)
    return shown


@compiled_once
@triton.jit(do_not_specialize=["key_rows"])
def hide_padding_kernel(visible, of_keys, of_tiles, shown_keys, shown_tiles, key_rows, N: tl.constexpr):
    """See `without_padding`. Program = N keys. No row sees all of a tile with padding, so that all are masked."""
    key = tl.program_id(0) * N + tl.arange(0, N)
    shown = tl.load(visible + key, mask=key < key_rows, other=1) != 0
    column = tl.arange(0, 4)
    places = key[:, None] * 4 + column[None, :]
    seeing = tl.load(of_keys + places, mask=key[:, None] < key_rows, other=0)
    tl.store(shown_keys + places, tl.where(shown[:, None], seeing, 0), mask=key[:, None] < key_rows)
    seeing = tl.load(of_tiles + tl.program_id(0) * 4 + column)
    masked = (tl.min(shown.to(tl.int32), 0) == 0) & (column == 2)
    tl.store(shown_tiles + tl.program_id(0) * 4 + column, tl.where(masked, 0, seeing))
