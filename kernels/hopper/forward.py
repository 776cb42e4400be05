"""Launch of the forward kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor
from triton.runtime import driver

from ringflash.kernels.gpu.block_lists import NO_LISTS, ListOperands, key_lists, list_operands
from ringflash.kernels.gpu.chips import multiprocessors
from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.gpu.modifiers_given import modifiers_aligned, modifiers_metadata
from ringflash.kernels.hopper import widest
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import (
    addressable_carry,
    list_descriptor,
    made_addressable,
    part_descriptors,
    without_memory,
)
from ringflash.kernels.hopper.dropout import dropout_numbers, listed
from ringflash.kernels.hopper.forward_kernel import attend_kernel
from ringflash.kernels.hopper.listed_blocks import list_numbers, list_tensors
from ringflash.kernels.hopper.narrow import attend_narrow, tiles_for
from ringflash.kernels.hopper.schedule import head_section
from ringflash.kernels.hopper.score_changes import key_numbers
from ringflash.kernels.hopper.sink_tokens import token_pieces
from ringflash.kernels.hopper.softmax import LOG2_E, ROWS
from ringflash.kernels.hopper.widths import WIDEST, WIDTHS, width_of
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry
from ringflash.kernels.requests import draw, unnoted
from ringflash.kernels.sinks import with_sinks
from ringflash.kernels.triton import attend as portable


@dataclass(frozen=True)
class ForwardTiles:
    """Sizes of a forward launch.

    Attributes:
        consumers: warpgroups that compute, 2 or 3, with 64 query rows of a tile each.
        keys: key rows of a block.
        stages: blocks of keys, and of values, in shared memory; a power of two.
        own_staging: whether a carry and the result have shared memory of their own on their way in and out.
        registers: of a thread of the consumers and of the producer.
    """

    consumers: int
    keys: int
    stages: int
    own_staging: bool
    registers: tuple[int, int] = (240, 24)


FORWARD_TILES = {
    "64": ForwardTiles(consumers=3, keys=128, stages=4, own_staging=True, registers=(160, 24)),
    "128": ForwardTiles(consumers=2, keys=128, stages=2, own_staging=True),
    "192/128": ForwardTiles(consumers=2, keys=128, stages=2, own_staging=False),
    "192": ForwardTiles(consumers=2, keys=64, stages=2, own_staging=False),
    "256": ForwardTiles(consumers=2, keys=64, stages=2, own_staging=False),
}
"""By `WIDTHS`; docs/benchmarks/kernels.md has the measurements behind them."""

MODIFIED_FORWARD_TILES = {**FORWARD_TILES, "64": replace(FORWARD_TILES["64"], consumers=2, registers=(240, 24))}
"""With modifiers, which want more registers, and with lists of blocks: 192 rows are no whole blocks."""


SINKS_JOIN = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
"""Head dimensions at which learned sinks join in the kernel, without modifiers: those held against float64 on a GPU."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    modifiers: Modifiers | None = None,
    carry: Carry | None = None,
    out_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> Carry:
    """See ringflash.kernels.reference.attend. A carry is overwritten where its tensors can hold the result.

    Modifiers, sink tokens and blocks at head dimension 512 come from the portable kernels.
    """
    if carry is None and modifiers is None:
        narrow = tiles_for(query, value, intervals, out_dtype, more=sinks is not None)
        if narrow is not None:
            return attend_narrow(query, key, value, intervals, scale, sinks, narrow)
    out_dtype = out_dtype or query.dtype
    if sinks is not None and (modifiers is not None or query.shape[2:] + value.shape[2:] not in SINKS_JOIN):
        settings = {"scale": scale, "modifiers": modifiers, "carry": carry, "out_dtype": torch.float32}
        out, lse = with_sinks(*attend(query, key, value, intervals, **settings), sinks)
        return out.to(out_dtype), lse
    carry = carry and (addressable_carry(carry[0]), carry[1].contiguous())
    if query.shape[2] == WIDEST:
        if not widest.takes(intervals, modifiers):
            settings = {"scale": scale, "modifiers": modifiers, "carry": carry, "out_dtype": out_dtype}
            return portable.attend(query, key, value, intervals, **settings)
        return widest.attend(query, key, value, intervals, scale=scale, carry=carry, out_dtype=out_dtype)
    sinks = None if sinks is None else sinks.contiguous()
    call = _call(query, key, value, intervals, scale, modifiers, carry, out_dtype, sinks)
    prepared = prepared_calls.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, modifiers)
        tiles = FORWARD_TILES if modifiers is None and intervals.blocks is None else MODIFIED_FORWARD_TILES
        tiles = tiles[width_of(query.shape[2], value.shape[2])]
        prepared = PreparedForward(query, key, value, intervals, scale, carry, out_dtype, tiles, modifiers, sinks)
        prepared_calls.add(call, prepared)
    return prepared(query, key, value, intervals, carry, modifiers, sinks)


bounds_of = attrgetter("start", "stop", "sink_start", "sink_stop")
"""Of intervals."""


prepared_calls = Kept()
"""`PreparedForward` by what `attend` was asked for."""


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    scale: float,
    modifiers: Modifiers | None,
    carry: Carry | None,
    out_dtype: torch.dtype,
    sinks: Tensor | None,
) -> tuple:
    """All that a `PreparedForward` depends on; a carry is contiguous."""
    carry_out, carry_lse = carry or (None, None)
    return (
        *map(metadata, (query, key, value, carry_out, carry_lse, sinks)), out_dtype,
        intervals.start.shape, intervals.key_count, intervals.has_sink_tokens,
        intervals.blocks and intervals.blocks.metadata(), scale,
        modifiers_metadata(modifiers),
        (
            aligned(query, key, value, carry_out, carry_lse, sinks, *bounds_of(intervals))
            and modifiers_aligned(modifiers)
        ) or tuple(map(aligned, (query, key, value))),
    )  # fmt: skip


class PreparedForward:
    """What is worked out once for calls alike, and their launch.

    Args:
        query: as in `attend`, of the first call and checked; so are the others, with carry as `addressable_carry`.
        key: see query.
        value: see query.
        intervals: see query.
        scale: see query.
        carry: see query.
        out_dtype: see query.
        tiles: sizes of the launch.
        modifiers: see query.
        sinks: see query.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        intervals: KeyIntervals,
        scale: float,
        carry: Carry | None,
        out_dtype: torch.dtype,
        tiles: ForwardTiles,
        modifiers: Modifiers | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        (query_rows, heads, dim), (key_rows, key_heads, value_dim) = query.shape, value.shape
        self.out_shape, self.lse_shape = (query_rows, heads, value_dim), (heads, query_rows)
        self.out_dtype, self.float_out = out_dtype, out_dtype != query.dtype
        self.stored_dtype = torch.float32 if self.float_out else out_dtype
        self.empty = key_rows == 0 or query_rows == 0
        if self.empty:
            return
        direct = aligned(query, key, value, *(carry or ()), sinks, *bounds_of(intervals))
        direct &= modifiers_aligned(modifiers)
        (query, key, value), self.addressable = made_addressable((query, key, value))
        self.tiles = tiles.consumers * ROWS.value, tiles.keys
        self.has_tokens, self.has_lists = intervals.has_sink_tokens, intervals.blocks is not None
        rows, width = ROWS.value, WIDTHS[width_of(dim, value_dim)]
        first, rest = zip(
            part_descriptors(query, rows, width.keys),
            part_descriptors(key, tiles.keys, width.keys),
            part_descriptors(value, tiles.keys, width.values),
            strict=True,
        )
        self.has_rest = [x is not None for x in rest]
        # Without staging neither a carry nor a result in fp32 has room in shared memory.
        direct_out = self.float_out and not tiles.own_staging
        carried: Description | None = None
        written: list[Description | None] = [None, None]
        if carry is not None and tiles.own_staging:
            carried, _ = part_descriptors(carry[0], rows, width.values)
        if not direct_out:
            written = part_descriptors(without_memory(self.out_shape, self.stored_dtype), rows, width.values)
        self.carry_described, self.out_described = carried is not None, [x is not None for x in written]
        tile_count = -(-query_rows // (tiles.consumers * rows))
        programs = min(tile_count * heads, multiprocessors(query.device))
        group = heads // key_heads
        unit, bend, slopes_row, slopes_head = scale, None, None, None
        key_numbers_description = positions_description = None
        if modifiers is not None:
            if modifiers.softcap:
                unit, bend = modifiers.softcap, scale / modifiers.softcap
            if modifiers.slopes is not None:
                slopes_row, slopes_head = modifiers.slopes.stride()
            list_description = description_of(list_descriptor(without_memory((key_rows,), torch.float32), tiles.keys))
            if modifiers.slopes is not None or modifiers.key_visible is not None:
                key_numbers_description = list_description
            if modifiers.dropout:
                positions_description = list_description
        self.launch = Launcher(
            programs,
            (
                query_rows, tile_count, heads, head_section(key_rows, key_heads, group, (dim + value_dim) // 2),
                query.stride(1), key.stride(1), value.stride(1), unit * LOG2_E.value,
                bend, slopes_row, slopes_head, None if slopes_row is None else 1 / unit, *dropout_numbers(modifiers),
                *list_numbers(self._lists(intervals)),
            ),
            dict(
                GROUP=group, CONSUMERS=tiles.consumers, STAGES=tiles.stages,
                HAS_CARRY=carry is not None, HIDES_KEYS=modifiers is not None and modifiers.key_visible is not None,
                DIRECT_OUT=direct_out, OWN_STAGING=tiles.own_staging,
                CONSUMER_REGISTERS=tiles.registers[0], PRODUCER_REGISTERS=tiles.registers[1],
            ),
            {"num_warps": 4},
            direct,
            (*first, *rest, *written, None, None, carried, *(None,) * 11, key_numbers_description, None, None,
             positions_description),
        )  # fmt: skip

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        intervals: KeyIntervals,
        carry: Carry | None,
        modifiers: Modifiers | None = None,
        sinks: Tensor | None = None,
    ) -> Carry:
        """Result and lse."""
        carry_out, carry_lse = carry or (None, None)
        out = carry_out if carry and self.float_out else query.new_empty(self.out_shape, dtype=self.stored_dtype)
        lse = carry_lse if carry else query.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty:
            so_far = carry or (out.zero_(), lse.fill_(-torch.inf))
            out, lse = so_far if sinks is None else with_sinks(*so_far, sinks)
            return out.to(self.out_dtype), lse
        operands = self.addressable((query, key, value))
        rest = [x if there else None for x, there in zip(operands, self.has_rest, strict=True)]
        written = (out, out if self.out_described[1] else None, None) if self.out_described[0] else (None, None, out)
        carried = carry_out if self.carry_described else None
        modifying = (None,) * 6 if modifiers is None else self._modifying(modifiers)
        pieces = token_pieces(intervals, *self.tiles) if self.has_tokens else None
        tensors = (
            *operands, *rest, *written, lse, carried, carry_out, carry_lse,
            *bounds_of(intervals), pieces, first_ticket(query.device), sinks, *modifying,
            *(list_tensors(self._lists(intervals)) if self.has_lists else (None,) * 3),
        )  # fmt: skip
        self.launch(attend_kernel, tensors)
        return out if self.stored_dtype == self.out_dtype else out.to(self.out_dtype), lse

    def _lists(self, intervals: KeyIntervals) -> ListOperands:
        return list_operands(key_lists(intervals, *self.tiles), self.lse_shape[0]) if self.has_lists else NO_LISTS

    def _modifying(self, modifiers: Modifiers) -> tuple:
        """For slopes and padding, and for dropout; None for what there is not."""
        positions = None if modifiers.slopes is None else modifiers.query_positions.contiguous()
        changes = positions, modifiers.slopes, key_numbers(modifiers)
        if not modifiers.dropout:
            return *changes, None, None, None
        keys = listed(modifiers.key_positions)
        return *changes, modifiers.seed, modifiers.query_positions.contiguous(), keys


def first_ticket(device: torch.device) -> Tensor:
    """An int32 zero for one launch on the current stream."""
    if device.type == "cuda" and driver.active.get_current_stream(device.index) == DEFAULT_STREAM:
        return drawn_zero(device)
    return torch.zeros(1, dtype=torch.int32, device=device)


def drawn_zero(device: torch.device) -> Tensor:
    """`zero_of`, another one in each call that repeats this one."""
    now: list[Tensor] = []  # it stays alive until there is another

    def another(_: list[int]) -> list[int]:
        now[:] = [zero_of(device)]
        return [now[0].data_ptr()]

    draw("zero", another, (torch.int32.itemsize,))
    return now[0]


DEFAULT_STREAM = 0
"""As CUDA's handle."""

ZEROS = 128
"""Zeros that are allocated at a time."""


def zero_of(device: torch.device) -> Tensor:
    """A zero that no other launch gets, set by earlier work of the default stream, which is the current one.

    A zero of its own would cost each launch an allocation and a memset. Zeros are handed out once and never set back,
    so launches do not meet in one, whichever threads they come from. Other streams have none: nothing orders their work
    behind the memset, and theirs may be work for a CUDA graph, whose every replay needs a memset of its own and whose
    memory must not be kept. The default stream cannot be captured.
    """
    zeros = _zeros.get(device)
    zero = None if zeros is None else next(zeros, None)
    if zero is None:
        # One in 16 bytes: Triton compiles another kernel for other addresses.
        with unnoted():
            zeros = iter(torch.zeros(ZEROS, 4, dtype=torch.int32, device=device).unbind())
        zero = next(zeros)
        _zeros[device] = zeros
    return zero


_zeros: dict[torch.device, Iterator[Tensor]] = {}
"""Zeros left."""
