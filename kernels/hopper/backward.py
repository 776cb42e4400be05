"""Launch of the backward kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Launcher, aligned
from ringflash.kernels.hopper.backward_kernel import attend_backward_kernel
from ringflash.kernels.hopper.backward_order import order_of_programs
from ringflash.kernels.hopper.backward_wide_kernel import attend_backward_wide_kernel
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import (
    addressable,
    description_of,
    descriptor,
    descriptor_of,
    list_descriptor,
    without_memory,
)
from ringflash.kernels.hopper.dquery_accumulate import HALF
from ringflash.kernels.hopper.dquery_in_turn import PARTS, heads_in_turn, turns_of_tiles
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers


@dataclass(frozen=True)
class BackwardTiles:
    """Sizes of a backward launch.

    Attributes:
        keys: key rows of a tile.
        queries: query rows of a block.
        stages: blocks of queries and of out's gradient in shared memory; powers of two.
        registers: of a thread of the consumers and of the producer.
    """

    keys: int
    queries: int
    stages: tuple[int, int]
    registers: tuple[int, int] = (240, 24)


BACKWARD_TILES = {
    64: BackwardTiles(keys=128, queries=128, stages=(2, 2)),
    128: BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    256: BackwardTiles(keys=64, queries=64, stages=(2, 1)),
}
"""By head dimension; docs/benchmarks/kernels.md has the measurements behind them."""


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Tensor | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ringflash.kernels.reference.attend_backward. A carry is overwritten; dout is rounded to query's dtype."""
    dquery_dtype, dkey_dtype = dquery_dtype or query.dtype, dkey_dtype or key.dtype
    operands = (dout, query, key, value)
    numbers = (lse, delta, carry)
    call = _call(operands, numbers, intervals, scale, dkey_dtype, deterministic)
    prepared = prepared_calls.get(call) if modifiers is None else None
    if prepared is None:
        check_operands(query, key, value, intervals, scale, modifiers)
        tiles = BACKWARD_TILES[query.shape[2]]
        prepared = PreparedBackward(operands, numbers, scale, dkey_dtype, tiles, deterministic)
        prepared_calls.add(call, prepared)
    return prepared(operands, numbers, intervals, dquery_dtype)


prepared_calls = Kept()
"""`PreparedBackward` by what `attend_backward` was asked for."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Dout, query, key, value."""
Numbers = tuple[Tensor, Tensor, Tensor | None]
"""Lse, delta, carry."""


def _call(
    operands: Operands,
    numbers: Numbers,
    intervals: KeyIntervals,
    scale: float,
    dkey_dtype: torch.dtype,
    deterministic: bool,
) -> tuple:
    """All that a `PreparedBackward` depends on."""
    return (
        *map(metadata, operands), *map(metadata, numbers), dkey_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink_tokens, scale, deterministic,
        aligned(*operands, *numbers) or tuple(map(aligned, (*operands, *numbers))),
    )  # fmt: skip


class PreparedBackward:
    """What is worked out once for calls alike, and their launches.

    Args:
        operands: dout, query, key and value of the first call, checked.
        numbers: lse, delta and carry of the first call.
        scale: as in `attend_backward`, of the first call; so are the others.
        dkey_dtype: see scale.
        tiles: sizes of the launch.
        deterministic: see scale.
    """

    def __init__(
        self,
        operands: Operands,
        numbers: Numbers,
        scale: float,
        dkey_dtype: torch.dtype,
        tiles: BackwardTiles,
        deterministic: bool = False,
    ) -> None:
        _, query, key, _ = operands
        (query_rows, heads, dim), (key_rows, key_heads, _) = query.shape, key.shape
        group = heads // key_heads
        self.tiles, self.deterministic = tiles, deterministic
        self.heads, self.dim = (heads, key_heads), dim
        self.dkey_dtype, self.float_out = dkey_dtype, dkey_dtype != key.dtype
        self.stored_dtype = torch.float32 if self.float_out else dkey_dtype
        self.empty = query_rows == 0 or key_rows == 0
        if self.empty:
            return
        direct = aligned(*operands, *numbers)
        reachable = _reachable(operands)
        self.all_addressable = all(x is y for x, y in zip(operands, reachable, strict=True))
        blocks = (tiles.queries, tiles.queries, tiles.keys, tiles.keys)
        self.descriptions = tuple(
            description_of(descriptor(x, rows, dim)) for x, rows in zip(reachable, blocks, strict=True)
        )
        dquery = without_memory(query.shape, torch.float32) if numbers[2] is None else numbers[2].contiguous()
        self.dquery_description = description_of(descriptor(dquery, HALF.value, HALF.value))
        self.dkey_description = None
        if not self.float_out:
            self.dkey_description = description_of(
                descriptor(without_memory(key.shape, dkey_dtype), HALF.value, min(dim, 128))
            )

        # A block may reach as many rows behind the last.
        padded_rows = -(-(query_rows + tiles.queries) // 128) * 128
        self.number_description = description_of(
            list_descriptor(without_memory((heads * padded_rows,), torch.float32), tiles.queries)
        )
        self.number_count = heads * padded_rows
        row_blocks = -(-padded_rows // 1024)
        self.launch_rows = Launcher(row_blocks * heads, (query_rows, padded_rows, row_blocks), {}, {}, direct)

        self.shape = (query_rows, padded_rows, key_rows, key_heads)
        self.launch = Launcher(
            -(-key_rows // tiles.keys) * key_heads,
            (*(x.stride(1) for x in (reachable[1], reachable[0], *reachable[2:])), float(scale)),
            dict(
                GROUP=group, QUERY_STAGES=tiles.stages[0], DOUT_STAGES=tiles.stages[1],
                FLOAT_OUT=self.float_out, ORDERED=deterministic,
                CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
            ),
            {"num_warps": 4},
            direct,
        )  # fmt: skip

    def __call__(
        self, operands: Operands, numbers: Numbers, intervals: KeyIntervals, dquery_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        _, query, key, value = operands
        lse, delta, carry = numbers
        dquery = query.new_zeros(query.shape, dtype=torch.float32) if carry is None else carry.contiguous()
        dkey, dvalue = (x.new_empty(x.shape, dtype=self.stored_dtype) for x in (key, value))
        if self.empty:
            return dquery.to(dquery_dtype), dkey.zero_().to(self.dkey_dtype), dvalue.zero_().to(self.dkey_dtype)

        scaled_lse, minus_delta = prepare_rows(self, lse, delta)
        if self.float_out:
            written = (None, None, dkey, dvalue)
        else:
            written = (*(descriptor_of(x, self.dkey_description) for x in (dkey, dvalue)), None, None)
        order, turns, turn_now, section = None, None, None, None
        if self.deterministic:
            turns, turn_now, section = adding_turns(intervals, self.heads, self.dim, self.tiles)
        else:
            order = programs_in_order(intervals, self.tiles.keys, self.heads[1])
        if not self.all_addressable:
            operands = _reachable(operands)
        dout_desc, query_desc, key_desc, value_desc = map(descriptor_of, operands, self.descriptions)
        tensors = (
            query_desc, dout_desc, key_desc, value_desc,
            descriptor_of(scaled_lse, self.number_description), descriptor_of(minus_delta, self.number_description),
            descriptor_of(dquery, self.dquery_description), *written,
            intervals.key_tile_rows(1), intervals.key_tile_rows(self.tiles.keys), order, turns, turn_now, section,
            *self.shape,
        )  # fmt: skip
        self.launch(attend_backward_wide_kernel if self.dim == 256 else attend_backward_kernel, tensors)
        return dquery.to(dquery_dtype), dkey.to(self.dkey_dtype), dvalue.to(self.dkey_dtype)


def _reachable(operands: Operands) -> Operands:
    """The operands as the tensor memory engine takes them, dout of query's dtype."""
    dout, query, key, value = operands
    return tuple(map(addressable, (dout.to(query.dtype), query, key, value)))


def programs_in_order(intervals: KeyIntervals, block: int, key_heads: int) -> Tensor:
    """See `order_of_programs`, made once for the intervals."""

    def build() -> Tensor:
        return order_of_programs(intervals.key_tile_rows(block), key_heads, multiprocessors(intervals.start.device))

    return intervals.kept(("programs", block, key_heads), build)


def adding_turns(
    intervals: KeyIntervals, heads: tuple[int, int], dim: int, tiles: BackwardTiles
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn of each key tile; whose turn it is, (heads, blocks, parts) to write in; heads to work on at a time."""
    tile_rows = intervals.key_tile_rows(tiles.keys)

    def build() -> tuple[Tensor, Tensor, Tensor]:
        turns, first_turns = turns_of_tiles(tile_rows, intervals.query_count, tiles.queries)
        return turns, first_turns, heads_in_turn(tile_rows, heads[1], heads[0] // heads[1] * dim * 8)

    turns, first_turns, section = intervals.kept(("turns", heads, dim, tiles.keys, tiles.queries), build)
    return turns, first_turns[None, :, None].expand(heads[0], -1, PARTS.value).contiguous(), section


def prepare_rows(prepared: PreparedBackward, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lse times log2 e and minus delta, flat, each head's rows followed by rows of no weight.

    Rows without keys (lse -inf) get +inf, so that no weight is left.
    """
    scaled_lse, minus_delta = lse.new_empty(prepared.number_count), lse.new_empty(prepared.number_count)
    prepared.launch_rows(prepare_rows_kernel, (lse.contiguous(), delta.contiguous(), scaled_lse, minus_delta))
    return scaled_lse, minus_delta


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows", "row_blocks"])
def prepare_rows_kernel(lse_ptr, delta_ptr, scaled_lse_ptr, minus_delta_ptr, rows, padded_rows, row_blocks):
    """See `prepare_rows`. Program = (head, 1,024 rows)."""
    row = tl.program_id(0) % row_blocks * 1024 + tl.arange(0, 1024)
    head = tl.program_id(0) // row_blocks
    lse = tl.load(lse_ptr + head * rows + row, mask=row < rows, other=float("-inf"))
    delta = tl.load(delta_ptr + head * rows + row, mask=row < rows, other=0.0)
    scaled = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(scaled_lse_ptr + head * padded_rows + row, scaled, mask=row < padded_rows)
    tl.store(minus_delta_ptr + head * padded_rows + row, -delta, mask=row < padded_rows)
