"""Launch of the backward kernels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ringflash.kernels.gpu.block_lists import (
    NO_LISTS,
    BlockLists,
    ListOperands,
    list_operands,
    query_bits,
    query_lists,
)
from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.gpu.modifiers_given import modifiers_aligned, modifiers_metadata
from ringflash.kernels.gpu.row_delta import row_delta
from ringflash.kernels.hopper import widest
from ringflash.kernels.hopper.backward_kernel import attend_backward_kernel
from ringflash.kernels.hopper.backward_programs import (
    adding_turns,
    chunks_of_tokens,
    order_of_blocks,
    programs_in_order,
    programs_of_lists,
    programs_with_tokens,
    rows_seeing,
)
from ringflash.kernels.hopper.backward_rows import PreparedRows, PreparedSlopes, Results
from ringflash.kernels.hopper.backward_split_kernel import attend_backward_split_kernel
from ringflash.kernels.hopper.backward_tiles import (
    BACKWARD_WIDTHS,
    BackwardTiles,
    backward_tiles,
    backward_width,
    stored_parts,
)
from ringflash.kernels.hopper.backward_tokens import Programs, add_slots
from ringflash.kernels.hopper.backward_wide_kernel import attend_backward_wide_kernel
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import (
    addressable,
    addressable_carry,
    descriptor,
    list_descriptor,
    made_addressable,
    part_descriptors,
    without_memory,
)
from ringflash.kernels.hopper.dquery_accumulate import HALF
from ringflash.kernels.hopper.dropout import dropout_numbers, listed
from ringflash.kernels.hopper.listed_blocks import list_numbers, list_tensors
from ringflash.kernels.hopper.narrow import backward_narrow, tiles_for
from ringflash.kernels.hopper.widths import WIDEST
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.triton import attend as portable
from ringflash.kernels.whole_backward import Gradients


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
    carry = None if carry is None else addressable_carry(carry)
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
        tiles = backward_tiles(modifiers)[_width(query, value, intervals, modifiers, deterministic)]
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
"""Lse, delta or None to find it, carry as `addressable_carry`."""


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


def _width(
    query: Tensor, value: Tensor, intervals: KeyIntervals, modifiers: Modifiers | None, deterministic: bool
) -> str:
    """`backward_width` of a call."""
    plain = not (deterministic or modifiers or intervals.has_sink_tokens or intervals.blocks is not None)
    return backward_width(query.shape[2], value.shape[2], plain)


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
        self.tiles, self.deterministic = tiles, deterministic
        self.heads, self.dim = (heads, key_heads), dim
        self.has_tokens, self.has_lists = intervals.has_sink_tokens, intervals.blocks is not None
        self.width = _width(query, value, intervals, modifiers, deterministic)
        self.order = order_of_blocks(intervals, self.width, modifiers).value if deterministic else 0
        self.dkey_dtype, self.float_out = dkey_dtype, dkey_dtype != key.dtype
        self.stored_dtype = torch.float32 if self.float_out else dkey_dtype
        self.empty = query_rows == 0 or key_rows == 0
        if self.empty:
            return
        direct = aligned(*operands, *numbers) and modifiers_aligned(modifiers)
        # A block may reach as many rows behind the last.
        padded_rows = -(-(query_rows + tiles.queries) // 128) * 128
        self.shape = (query_rows, padded_rows, key_rows, key_heads)
        drops = dropout_numbers(modifiers)
        kept = 1.0 if drops[1] is None else drops[1]
        self.rows = PreparedRows(operands[0], query, *numbers[:2], results, padded_rows, kept)
        self.drops, self.slopes, bend = False, None, None
        if modifiers is not None:
            self.drops, bend = bool(modifiers.dropout), scale / modifiers.softcap if modifiers.softcap else None
            self.slopes = None if modifiers.slopes is None else PreparedSlopes(modifiers.slopes, padded_rows, direct)
        programs = -(-key_rows // tiles.keys)
        if self.has_tokens:
            chunks = chunks_of_tokens(programs, query_rows, key_heads, query.device)
            programs += 2 * chunks
            self.slot_shapes = [(3 * chunks * tiles.keys, *x.shape[1:]) for x in (key, value)]

        reached, self.addressable = made_addressable(operands, partial(_rounded, query.dtype))
        of_dout, of_query, of_key, of_value = (x.stride(1) for x in reached)
        numbers_of_all = of_query, of_dout, of_key, of_value, float(scale), bend
        constants = dict(
            GROUP=heads // key_heads, QUERY_STAGES=tiles.stages[0], DOUT_STAGES=tiles.stages[1],
            FLOAT_OUT=self.float_out, DIMS=(dim, value_dim),
            CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
        )  # fmt: skip
        numbers_of_some = ()
        if self.width != "192/128":
            numbers_of_some, constants["ORDERED"] = (*drops, *list_numbers(self._lists(intervals))), self.order
        self.launch = Launcher(
            programs * key_heads, numbers_of_all + numbers_of_some, constants, {"num_warps": 4}, direct,
            self._descriptions(reached, numbers[2]),
        )  # fmt: skip

    def _descriptions(self, operands: Operands, carry: Tensor | None) -> tuple[Description | None, ...]:
        """Of the tensors that `__call__` launches with, in their order; operands are addressable."""
        _, query, key, value = operands
        (query_rows, padded_rows, *_), tiles, width = self.shape, self.tiles, BACKWARD_WIDTHS[self.width]
        blocks = (tiles.queries, tiles.queries, tiles.keys, tiles.keys)
        parts = (width.values, width.keys, width.keys, width.values)
        (of_dout, *of_others), rest = zip(*map(part_descriptors, operands, blocks, parts), strict=True)
        of_operands = of_others[0], of_dout, *of_others[1:]
        dquery = without_memory(query.shape, torch.float32) if carry is None else carry
        padded = sum(width.keys) > query.shape[2]
        of_dquery = description_of(descriptor(dquery, HALF.value, HALF.value, padded))
        of_dkey, of_dvalue = [None, None], [None, None]
        if not self.float_out:
            of_dkey, of_dvalue = (
                part_descriptors(
                    without_memory(x.shape, self.dkey_dtype), HALF.value, parts, stored_parts(parts, x.shape[2])
                )
                for x, parts in ((key, width.keys), (value, width.values))
            )
        self.has_dkey_rest = of_dkey[1] is not None

        def of_list(count: int) -> Description:
            return description_of(list_descriptor(without_memory((count,), torch.float32), tiles.queries))

        of_numbers = (of_list(self.heads[0] * padded_rows),) * 2
        of_slopes = (None, None) if self.slopes is None else of_numbers
        if self.width == "192/128":
            of_gradients = of_dquery, *of_dkey, of_dvalue[0]
            return *of_operands, *rest[1:3], *of_numbers, *of_gradients, *(None,) * 5, *of_slopes
        of_gradients = of_dquery, of_dkey[0], of_dvalue[0]
        of_positions = of_list(query_rows) if self.drops else None
        return *of_operands, *of_numbers, *of_gradients, *(None,) * 13, *of_slopes, None, None, of_positions

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
        of_rows = scaled_lse, minus_delta, dquery
        order, turns, programs = self._programs(intervals)
        dout, query, key, value = self.addressable(operands)
        written, pointers = ((None, None), (dkey, dvalue)) if self.float_out else ((dkey, dvalue), (None, None))
        visible = None if modifiers is None else modifiers.key_visible
        seeing, tokens = rows_seeing(intervals, self.tiles.keys, visible), (None,) * 5
        if programs is not None:
            slots = tuple(query.new_empty(shape, dtype=torch.float32) for shape in self.slot_shapes)
            tokens = programs.work, *rows_seeing(intervals, self.tiles.keys, visible, sink_tokens=True), *slots
        positioned = self.slopes is not None or self.drops
        sloping, dropping = self._positions(modifiers) if positioned else ((None,) * 3, (None,) * 3)
        if self.width == "192/128":
            dkey_rest = dkey if self.has_dkey_rest else None
            tensors = (
                query, dout, key, value, query, key, *of_rows, written[0], dkey_rest, written[1],
                *pointers, *seeing, order, *sloping, *self.shape,
            )  # fmt: skip
            self.launch(attend_backward_split_kernel, tensors)
        else:
            tensors = (
                query, dout, key, value, *of_rows, *written,
                *pointers, *seeing, order, *turns, *tokens, *sloping, *dropping,
                *(list_tensors(self._lists(intervals)) if self.has_lists else (None,) * 3), *self.shape,
            )  # fmt: skip
            self.launch(attend_backward_wide_kernel if self.width == "256" else attend_backward_kernel, tensors)
        if programs is not None:
            add_slots(programs, slots, dkey, dvalue, self.tiles.keys)
        if self.stored_dtype != self.dkey_dtype:
            dkey, dvalue = dkey.to(self.dkey_dtype), dvalue.to(self.dkey_dtype)
        return dquery.to(dquery_dtype), dkey, dvalue, delta

    def _programs(self, intervals: KeyIntervals) -> tuple[Tensor | None, tuple, Programs | None]:
        """Their order or, where gradients repeat, turns in which they add; and their work with sink tokens."""
        keys, queries, key_heads = self.tiles.keys, self.tiles.queries, self.heads[1]
        no_turns = None, None, None
        if self.deterministic:
            return None, adding_turns(intervals, keys, queries, self.heads, self.dim, self.order), None
        if self.has_tokens:
            programs, order = programs_with_tokens(intervals, keys, key_heads)
            return order, no_turns, programs
        if self.has_lists:
            return programs_of_lists(intervals, keys, queries, key_heads), no_turns, None
        return programs_in_order(intervals, keys, key_heads), no_turns, None

    def _lists(self, intervals: KeyIntervals) -> ListOperands:
        """Blocks of queries; bits are of keys, or of queries where these are the rows of scores."""
        if not self.has_lists:
            return NO_LISTS
        lists = query_lists(intervals, self.tiles.keys, self.tiles.queries)
        if self.width == "256" and lists.bits is not None:
            lists = BlockLists(lists.entries, *query_bits(intervals))
        return list_operands(lists, self.heads[1])

    def _positions(self, modifiers: Modifiers) -> tuple[tuple, tuple]:
        """Positions and what comes with them, for ALiBi and for dropout; None for what there is not."""
        sloping = dropping = None, None, None
        if self.slopes is not None:
            of_queries = self.slopes(modifiers.query_positions, modifiers.slopes)
            sloping = *of_queries, modifiers.key_positions.contiguous()
        if self.drops:
            dropping = modifiers.seed, listed(modifiers.query_positions), modifiers.key_positions.contiguous()
        return sloping, dropping


def _rounded(dtype: torch.dtype, x: Tensor) -> Tensor:
    """An operand as the tensor memory engine takes it, of query's dtype, which dout may not be of."""
    return addressable(x.to(dtype))
