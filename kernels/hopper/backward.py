"""Launch of the backward kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from ringflash.kernels.gpu.block_lists import (
    NO_LISTS,
    BlockLists,
    ListOperands,
    list_operands,
    query_bits,
    query_lists,
)
from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.gpu.compile_once import compiled_once
from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.gpu.modifiers_given import modifiers_aligned, modifiers_metadata
from ringflash.kernels.gpu.row_delta import row_delta
from ringflash.kernels.hopper import widest
from ringflash.kernels.hopper.backward_kernel import attend_backward_kernel
from ringflash.kernels.hopper.backward_order import order_of_lists, order_of_programs
from ringflash.kernels.hopper.backward_rows import PreparedRows, Results
from ringflash.kernels.hopper.backward_split_kernel import attend_backward_split_kernel
from ringflash.kernels.hopper.backward_tokens import (
    Programs,
    add_slots,
    chunk_count,
    order_with_chunks,
    programs_of_tiles,
)
from ringflash.kernels.hopper.backward_wide_kernel import attend_backward_wide_kernel
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import (
    addressable,
    descriptor,
    list_descriptor,
    made_addressable,
    part_descriptors,
    without_memory,
)
from ringflash.kernels.hopper.dquery_accumulate import HALF
from ringflash.kernels.hopper.dquery_in_turn import (
    BLOCK_BY_BLOCK,
    HEAD_BY_HEAD,
    PARTS,
    heads_in_turn,
    turns_of_tiles,
)
from ringflash.kernels.hopper.dropout import dropout_numbers, listed
from ringflash.kernels.hopper.listed_blocks import list_numbers, list_tensors
from ringflash.kernels.hopper.narrow import backward_narrow, tiles_for
from ringflash.kernels.hopper.widths import WIDEST, WIDTHS, width_of
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton import attend as portable
from ringflash.kernels.whole_backward import Gradients


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
    "64": BackwardTiles(keys=128, queries=128, stages=(2, 2)),
    "128": BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    "192/128": BackwardTiles(keys=128, queries=64, stages=(2, 2)),
    "256": BackwardTiles(keys=64, queries=64, stages=(2, 1)),
}
"""By `WIDTHS`; docs/benchmarks/kernels.md has the measurements behind them."""

BACKWARD_WIDTHS = {name: WIDTHS[name] for name in ("64", "128", "192/128", "256")}
"""Columns that the kernels' blocks have."""


def backward_width(head_dim: int, value_head_dim: int, plain: bool) -> str:
    """The name in `BACKWARD_WIDTHS` of blocks for these head dimensions.

    Blocks of 256 columns take what those of 192/128 do not: gradients that repeat, modifiers, sink tokens, lists of
    blocks, other head dimensions.

    Args:
        head_dim: of queries and keys.
        value_head_dim: of values.
        plain: whether there is nothing of these but perhaps the last.
    """
    width = width_of(head_dim, value_head_dim)
    assert width is not None  # as is checked before
    split = plain and (head_dim, value_head_dim) == (192, 128)
    return width if width in ("64", "128") or split else "256"


def stored_parts(parts: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """Columns of a gradient that a warpgroup stores at a time: its rows are some of a larger block's, see `blocks`."""
    if parts == (256,):
        return (128,)  # of all rows
    return parts if sum(parts) == dim else (64,) * len(parts)


POSITIONED_BACKWARD_TILES = {**BACKWARD_TILES, "64": replace(BACKWARD_TILES["64"], stages=(2, 1))}
"""With ALiBi or dropout, for which positions of queries take shared memory as well."""

TWICE_POSITIONED_BACKWARD_TILES = {
    **POSITIONED_BACKWARD_TILES,
    "128": replace(BACKWARD_TILES["128"], stages=(2, 1)),
}
"""With both."""


def backward_tiles(modifiers: Modifiers | None) -> dict[str, BackwardTiles]:
    """Sizes of a launch with these modifiers, by `WIDTHS`."""
    positioned = 0 if modifiers is None else (modifiers.slopes is not None) + bool(modifiers.dropout)
    return (BACKWARD_TILES, POSITIONED_BACKWARD_TILES, TWICE_POSITIONED_BACKWARD_TILES)[positioned]


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
    """See ringflash.kernels.reference.attend_backward. A carry is overwritten; dout is rounded to query's dtype.

    With sink tokens or blocks, whose tiles are not visited in an order in which programs could wait for one another,
    gradients that have to repeat bit for bit come from the portable kernels. So do those with modifiers, sink tokens or
    blocks at head dimension 512.
    """
    if carry is None and modifiers is None and dkey_dtype in (None, key.dtype, torch.float32):
        narrow = tiles_for(query, value, intervals, dquery_dtype, more=True)
        if narrow is not None:
            operands = dout, query, key, value
            return backward_narrow(operands, (lse, delta, None), intervals, scale, dkey_dtype, narrow)[:3]
    simple = not intervals.has_sink_tokens and intervals.blocks is None
    is_widest = query.shape[2] == WIDEST
    if (deterministic and not simple) or (is_widest and not widest.takes(intervals, modifiers)):
        return portable.attend_backward(
            dout.to(query.dtype), query, key, value, lse, delta, intervals, scale=scale, modifiers=modifiers,
            carry=carry, dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype,
        )  # fmt: skip
    dquery_dtype, dkey_dtype = dquery_dtype or query.dtype, dkey_dtype or key.dtype
    if is_widest:
        return widest.attend_backward(
            dout, query, key, value, lse, delta, intervals, scale=scale, carry=carry,
            dquery_dtype=dquery_dtype, dkey_dtype=dkey_dtype,
        )  # fmt: skip
    operands, numbers = (dout, query, key, value), (lse, delta, carry)
    prepared = prepared_backward(operands, numbers, None, intervals, scale, modifiers, dkey_dtype, deterministic)
    return prepared(operands, numbers, None, intervals, dquery_dtype, modifiers)[:3]


def whole_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    dquery_dtype: torch.dtype | None = None,
    dkey_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Gradients | None:
    """See `ringflash.kernels.whole_backward`. The gradients of narrow kernels repeat bit for bit in any case.

    Delta comes from the pass over memory that sets the gradient of query to zero, or from the gradients' own kernels.
    """
    if modifiers is not None or dkey_dtype not in (None, key.dtype, torch.float32):
        return None
    narrow = tiles_for(query, value, intervals, dquery_dtype, more=dkey_dtype not in (None, key.dtype))
    operands = dout, query, key, value
    if narrow is not None:
        return backward_narrow(operands, (lse, None, dlse), intervals, scale, dkey_dtype, narrow)
    simple = not intervals.has_sink_tokens and intervals.blocks is None
    if (deterministic and not simple) or query.shape[2] == WIDEST:
        return None
    dquery_dtype, dkey_dtype = dquery_dtype or query.dtype, dkey_dtype or key.dtype
    dout, out = (x if x.stride(2) == 1 else x.contiguous() for x in (dout, out))
    operands, numbers, results = (dout, query, key, value), (lse.contiguous(), None, None), (out, dlse)
    prepared = prepared_backward(operands, numbers, results, intervals, scale, None, dkey_dtype, deterministic)
    return prepared(operands, numbers, results, intervals, dquery_dtype)


def prepared_backward(
    operands: Operands,
    numbers: Numbers,
    results: Results | None,
    intervals: KeyIntervals,
    scale: float,
    modifiers: Modifiers | None,
    dkey_dtype: torch.dtype,
    deterministic: bool,
) -> PreparedBackward:
    """What is kept for calls alike, made in the first of them."""
    call = _call(operands, numbers, results, intervals, scale, modifiers, dkey_dtype, deterministic)
    prepared = prepared_calls.get(call)
    if prepared is None:
        _, query, key, value = operands
        check_operands(query, key, value, intervals, scale, modifiers)
        plain = not (deterministic or modifiers or intervals.has_sink_tokens or intervals.blocks is not None)
        tiles = backward_tiles(modifiers)[backward_width(query.shape[2], value.shape[2], plain)]
        prepared = PreparedBackward(
            operands, numbers, results, intervals, scale, dkey_dtype, tiles, deterministic, modifiers
        )
        prepared_calls.add(call, prepared)
    return prepared


prepared_calls = Kept()
"""`PreparedBackward` by what `attend_backward` was asked for."""

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Dout, query, key, value."""
Numbers = tuple[Tensor, Tensor | None, Tensor | None]
"""Lse, delta or None to find it, carry."""


def _call(
    operands: Operands,
    numbers: Numbers,
    results: Results | None,
    intervals: KeyIntervals,
    scale: float,
    modifiers: Modifiers | None,
    dkey_dtype: torch.dtype,
    deterministic: bool,
) -> tuple:
    """All that a `PreparedBackward` depends on."""
    return (
        *map(metadata, operands), *map(metadata, numbers), *map(metadata, results or ()), dkey_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink_tokens, intervals.even,
        intervals.blocks and intervals.blocks.metadata(), scale,
        deterministic, modifiers_metadata(modifiers),
        (aligned(*operands, *numbers, *(results or ())) and modifiers_aligned(modifiers))
        or tuple(map(aligned, (*operands, *numbers, *(results or ())))),
    )  # fmt: skip


class PreparedBackward:
    """What is worked out once for calls alike, and their launches.

    Args:
        operands: dout, query, key and value of the first call, checked.
        numbers: lse, delta and carry of the first call.
        results: of the first call where delta is None.
        intervals: as in `attend_backward`, of the first call; so are the others. No sink tokens or blocks where
            deterministic.
        scale: see intervals.
        dkey_dtype: see intervals.
        tiles: sizes of the launch.
        deterministic: see intervals.
        modifiers: see intervals.
    """

    def __init__(
        self,
        operands: Operands,
        numbers: Numbers,
        results: Results | None,
        intervals: KeyIntervals,
        scale: float,
        dkey_dtype: torch.dtype,
        tiles: BackwardTiles,
        deterministic: bool = False,
        modifiers: Modifiers | None = None,
    ) -> None:
        _, query, key, value = operands
        (query_rows, heads, dim), (key_rows, key_heads, value_dim) = query.shape, value.shape
        group = heads // key_heads
        self.tiles, self.deterministic = tiles, deterministic
        self.heads = heads, key_heads
        sink_tokens, self.has_lists = intervals.has_sink_tokens, intervals.blocks is not None
        self.width = backward_width(dim, value_dim, not (deterministic or modifiers or sink_tokens or self.has_lists))
        self.order = order_of_blocks(intervals, self.width, modifiers).value if deterministic else 0
        self.dkey_dtype, self.float_out = dkey_dtype, dkey_dtype != key.dtype
        self.stored_dtype = torch.float32 if self.float_out else dkey_dtype
        self.empty = query_rows == 0 or key_rows == 0
        if self.empty:
            return
        direct = aligned(*operands, *numbers) and modifiers_aligned(modifiers)
        reached, self.addressable = made_addressable(operands, partial(_rounded, query.dtype))
        width = BACKWARD_WIDTHS[self.width]
        blocks = (tiles.queries, tiles.queries, tiles.keys, tiles.keys)
        parts = (width.values, width.keys, width.keys, width.values)
        of_operands, rest = zip(*map(part_descriptors, reached, blocks, parts), strict=True)
        dquery = without_memory(query.shape, torch.float32) if numbers[2] is None else numbers[2].contiguous()
        padded = sum(width.keys) > dim
        dquery_description = description_of(descriptor(dquery, HALF.value, HALF.value, padded))
        of_dkey: list[Description | None] = [None, None]
        of_dvalue: list[Description | None] = [None, None]
        if not self.float_out:
            of_dkey, of_dvalue = (
                part_descriptors(
                    without_memory(x.shape, dkey_dtype), HALF.value, parts, stored_parts(parts, x.shape[2])
                )
                for x, parts in ((key, width.keys), (value, width.values))
            )
        self.has_dkey_rest = of_dkey[1] is not None

        # A block may reach as many rows behind the last.
        padded_rows = -(-(query_rows + tiles.queries) // 128) * 128
        number_description = description_of(
            list_descriptor(without_memory((heads * padded_rows,), torch.float32), tiles.queries)
        )
        self.number_count = heads * padded_rows
        row_blocks = -(-padded_rows // 1024)
        drops = dropout_numbers(modifiers)
        kept = 1.0 if drops[1] is None else drops[1]
        self.rows = PreparedRows(operands[0], query, *numbers[:2], results, padded_rows, kept)
        self.dropout, dropout_description = modifiers is not None and bool(modifiers.dropout), None
        if self.dropout:
            positions = without_memory((query_rows,), torch.float32)
            dropout_description = description_of(list_descriptor(positions, tiles.queries))
        self.alibi = modifiers is not None and modifiers.slopes is not None
        if self.alibi:
            self.slope_strides = modifiers.slopes.stride()
            self.launch_slopes = Launcher(
                row_blocks * heads, (query_rows, padded_rows, row_blocks, *self.slope_strides), {}, {}, direct
            )
        bend = scale / modifiers.softcap if modifiers is not None and modifiers.softcap else None

        self.shape = (query_rows, padded_rows, key_rows, key_heads)
        programs = -(-key_rows // tiles.keys)
        self.slot_shapes = None
        if sink_tokens:
            chunks = chunk_count(programs, query_rows, key_heads, multiprocessors(query.device))
            programs += 2 * chunks
            self.slot_shapes = [(3 * chunks * tiles.keys, *x.shape[1:]) for x in (key, value)]
        row_description = number_description if self.alibi else None
        if self.width == "192/128":
            described = (
                *(of_operands[i] for i in (1, 0, 2, 3)), *rest[1:3], number_description, number_description,
                dquery_description, *of_dkey, of_dvalue[0], *(None,) * 5, row_description, row_description,
            )  # fmt: skip
        else:
            described = (
                *(of_operands[i] for i in (1, 0, 2, 3)), number_description, number_description,
                dquery_description, of_dkey[0], of_dvalue[0], *(None,) * 13, row_description, row_description,
                None, None, dropout_description,
            )  # fmt: skip
        self.launch = Launcher(
            programs * key_heads,
            (*(x.stride(1) for x in (reached[1], reached[0], *reached[2:])), float(scale), bend,
             *(() if self.width == "192/128" else (*drops, *list_numbers(self._lists(intervals))))),
            dict(
                GROUP=group, QUERY_STAGES=tiles.stages[0], DOUT_STAGES=tiles.stages[1],
                FLOAT_OUT=self.float_out, **({} if self.width == "192/128" else {"ORDERED": self.order}),
                DIMS=(dim, value_dim),
                CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
            ),
            {"num_warps": 4},
            direct,
            described,
        )  # fmt: skip

    def __call__(
        self,
        operands: Operands,
        numbers: Numbers,
        results: Results | None,
        intervals: KeyIntervals,
        dquery_dtype: torch.dtype,
        modifiers: Modifiers | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, and delta."""
        dout, query, key, value = operands
        lse, delta, carry = numbers
        dkey = key.new_empty(key.shape, dtype=self.stored_dtype)
        dvalue = value.new_empty(value.shape, dtype=self.stored_dtype)
        if self.empty:
            delta = row_delta(dout, *results) if delta is None and results is not None else delta
            dquery = query.new_zeros(query.shape, dtype=dquery_dtype) if carry is None else carry.to(dquery_dtype)
            return dquery, dkey.zero_().to(self.dkey_dtype), dvalue.zero_().to(self.dkey_dtype), delta

        scaled_lse, minus_delta, delta, dquery = self.rows(dout, query, lse, delta, results, carry)
        order, turns, turn_now, section, programs, slots = (None,) * 6
        if self.deterministic:
            turns, turn_now, section = adding_turns(intervals, self.heads, query.shape[2], self.tiles, self.order)
        elif self.slot_shapes is not None:
            programs, order = programs_with_tokens(intervals, self.tiles.keys, self.heads[1])
            slots = tuple(query.new_empty(shape, dtype=torch.float32) for shape in self.slot_shapes)
        elif self.has_lists:
            order = programs_of_lists(intervals, self.tiles, self.heads[1])
        else:
            order = programs_in_order(intervals, self.tiles.keys, self.heads[1])
        dout, query, key, value = self.addressable(operands)
        dkey_rest = dkey if self.has_dkey_rest else None
        written, pointers = (
            ((None,) * 3, (dkey, dvalue)) if self.float_out else ((dkey, dkey_rest, dvalue), (None, None))
        )
        visible = None if modifiers is None else modifiers.key_visible
        seeing, tokens = rows_seeing(intervals, self.tiles.keys, visible), (None,) * 5
        if programs is not None:
            tokens = programs.work, *rows_seeing(intervals, self.tiles.keys, visible, sink_tokens=True), *slots
        positions = self._positions(modifiers) if self.alibi else (None, None, None)
        dropping = (None,) * 3
        if self.dropout:
            dropping = modifiers.seed, listed(modifiers.query_positions), modifiers.key_positions.contiguous()
        if self.width == "192/128":
            tensors = (
                query, dout, key, value, query, key, scaled_lse, minus_delta, dquery,
                *written, *pointers, *seeing, order, *positions, *self.shape,
            )  # fmt: skip
            self.launch(attend_backward_split_kernel, tensors)
        else:
            tensors = (
                query, dout, key, value, scaled_lse, minus_delta, dquery, written[0], written[2],
                *pointers, *seeing, order, turns, turn_now, section, *tokens, *positions, *dropping,
                *(list_tensors(self._lists(intervals)) if self.has_lists else (None,) * 3), *self.shape,
            )  # fmt: skip
            self.launch(attend_backward_wide_kernel if self.width == "256" else attend_backward_kernel, tensors)
        if programs is not None:
            add_slots(programs, slots, dkey, dvalue, self.tiles.keys)
        if self.stored_dtype != self.dkey_dtype:
            dkey, dvalue = dkey.to(self.dkey_dtype), dvalue.to(self.dkey_dtype)
        return dquery.to(dquery_dtype), dkey, dvalue, delta

    def _lists(self, intervals: KeyIntervals) -> ListOperands:
        """Blocks of queries; bits are of keys, or of queries where these are the rows of scores."""
        if not self.has_lists:
            return NO_LISTS
        lists = query_lists(intervals, self.tiles.keys, self.tiles.queries)
        if self.width == "256" and lists.bits is not None:
            lists = BlockLists(lists.entries, *query_bits(intervals))
        return list_operands(lists, self.heads[1])

    def _positions(self, modifiers: Modifiers) -> tuple:
        """With ALiBi positions and slopes of query rows, laid out as lse is, and positions of keys."""
        slopes = modifiers.slopes
        positions, scaled_slopes = slopes.new_empty(self.number_count), slopes.new_empty(self.number_count)
        rows = modifiers.query_positions.contiguous(), slopes
        self.launch_slopes(prepare_slopes_kernel, (*rows, positions, scaled_slopes))
        return positions, scaled_slopes, modifiers.key_positions.contiguous()


def _rounded(dtype: torch.dtype, x: Tensor) -> Tensor:
    """An operand as the tensor memory engine takes it, of query's dtype, which dout may not be of."""
    return addressable(x.to(dtype))


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


def programs_in_order(intervals: KeyIntervals, block: int, key_heads: int) -> Tensor:
    """See `order_of_programs`, made once for the intervals."""

    def build() -> Tensor:
        return order_of_programs(intervals.key_tile_rows(block), key_heads, multiprocessors(intervals.start.device))

    return intervals.kept(("programs", block, key_heads), build)


def programs_of_lists(intervals: KeyIntervals, tiles: BackwardTiles, key_heads: int) -> Tensor:
    """See `order_of_lists`, made once for the intervals and their blocks."""

    def build() -> Tensor:
        entries = query_lists(intervals, tiles.keys, tiles.queries).entries
        return order_of_lists(entries[:, :, 0], key_heads, multiprocessors(intervals.start.device))

    return intervals.kept(("programs of lists", tiles.keys, tiles.queries, key_heads), build, of_blocks=True)


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
    intervals: KeyIntervals, heads: tuple[int, int], dim: int, tiles: BackwardTiles, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn of each key tile; whose turn it is, (heads, blocks, parts) to write in; heads to work on at a time."""
    tile_rows = intervals.key_tile_rows(tiles.keys)

    def build() -> tuple[Tensor, Tensor, Tensor]:
        turns, first_turns = turns_of_tiles(tile_rows, intervals.query_count, tiles.queries)
        first_turns = first_turns[None, :, None].expand(heads[0], -1, PARTS.value).contiguous()
        together = heads[0] // heads[1] if order == BLOCK_BY_BLOCK.value else 1
        return turns, first_turns, heads_in_turn(tile_rows, heads[1], together * dim * 8)

    turns, first_turns, section = intervals.kept(("turns", heads, dim, tiles.keys, tiles.queries, order), build)
    return turns, first_turns.clone(), section


@compiled_once
@triton.jit(do_not_specialize=["rows", "padded_rows", "row_blocks", "slopes_row", "slopes_head"])
def prepare_slopes_kernel(
    position_ptr, slope_ptr, prepared_position_ptr, prepared_slope_ptr, rows, padded_rows, row_blocks,
    slopes_row, slopes_head,
):  # fmt: skip
    """Positions, and slopes times log2 e, laid out as lse in `backward_rows`. Program = (head, 1,024 rows)."""
    row = tl.program_id(0) % row_blocks * 1024 + tl.arange(0, 1024)
    head = tl.program_id(0) // row_blocks
    position = tl.load(position_ptr + row, mask=row < rows, other=0).to(tl.float32)
    offset = row.to(tl.int64) * slopes_row + head.to(tl.int64) * slopes_head
    slope = tl.load(slope_ptr + offset, mask=row < rows, other=0.0) * 1.4426950408889634
    tl.store(prepared_position_ptr + head * padded_rows + row, position, mask=row < padded_rows)
    tl.store(prepared_slope_ptr + head * padded_rows + row, slope, mask=row < padded_rows)
