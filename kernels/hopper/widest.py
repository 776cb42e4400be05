"""Launches of the kernels for head dimension 512, which take no modifiers, sink tokens or blocks: portable ones do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels.gpu.launcher import Description, Launcher, aligned, description_of
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import descriptor, made_addressable, without_memory
from ringflash.kernels.hopper.softmax import LOG2_E, ROWS
from ringflash.kernels.hopper.widest_backward_kernel import dscores_widest_kernel, dvalue_widest_kernel
from ringflash.kernels.hopper.widest_forward_kernel import attend_widest_kernel
from ringflash.kernels.hopper.widths import WIDEST
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.modifiers import Modifiers
from ringflash.kernels.reference import Carry


@dataclass(frozen=True)
class WeightsTiles:
    """Sizes of a launch that sums weights times rows: the forward pass, and the gradient of values.

    Attributes:
        rows: rows of a block: keys, or queries for the gradient.
        scored: columns that are loaded at a time of what scores are computed from, and how many such pieces have room.
        summed: rows that are loaded at a time of what is summed, and how many such pieces of half of the columns each.
        registers: of a thread of the warpgroups that sum, of the one with the scores, and of the warps that load.
    """

    rows: int
    scored: tuple[int, int]
    summed: tuple[int, int]
    registers: tuple[int, int, int]


@dataclass(frozen=True)
class DscoresTiles:
    """Sizes of a launch that sums scores' gradients times rows: the gradients of queries, and of keys.

    Attributes:
        rows: rows of a block: keys for queries, queries for keys.
        stages: blocks that have room.
        other: columns that are loaded at a time of values or dout, and how many such pieces have room.
        registers: see WeightsTiles.
    """

    rows: int
    stages: int
    other: tuple[int, int]
    registers: tuple[int, int, int]


FORWARD_TILES = WeightsTiles(rows=128, scored=(64, 4), summed=(32, 2), registers=(160, 168, 24))
DVALUE_TILES = WeightsTiles(rows=64, scored=(128, 5), summed=(32, 2), registers=(168, 152, 24))
DSCORES_TILES = DscoresTiles(rows=32, stages=2, other=(128, 3), registers=(160, 168, 24))
"""docs/benchmarks/kernels.md has the measurements behind them."""


def takes(intervals: KeyIntervals, modifiers: Modifiers | None) -> bool:
    """Whether these kernels do; the portable ones take the rest."""
    return modifiers is None and not intervals.has_sink_tokens and intervals.blocks is None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    carry: Carry | None,
    out_dtype: torch.dtype,
) -> Carry:
    """See ringflash.kernels.reference.attend. A carry, contiguous, is overwritten where it can hold the result."""
    carry_out, carry_lse = carry or (None, None)
    tensors = (query, key, value, carry_out, carry_lse)
    call = (*_form(tensors, intervals, (query, key, value)), scale, out_dtype)
    prepared = prepared_calls.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, None)
        prepared = PreparedForward(query, key, value, intervals, scale, carry, out_dtype, FORWARD_TILES)
        prepared_calls.add(call, prepared)
    return prepared(query, key, value, intervals, carry)


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
    carry: Tensor | None,
    dquery_dtype: torch.dtype,
    dkey_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ringflash.kernels.reference.attend_backward; dout is rounded to query's dtype. Gradients always repeat."""
    operands = (dout.to(query.dtype), query, key, value)
    numbers = (lse.contiguous(), delta.contiguous(), None if carry is None else carry.contiguous())
    call = (*_form((*operands, *numbers), intervals, operands), scale, dquery_dtype, dkey_dtype)
    prepared = prepared_calls.get(call)
    if prepared is None:
        check_operands(query, key, value, intervals, scale, None)
        prepared = PreparedBackward(operands, numbers, intervals, scale, dquery_dtype, dkey_dtype)
        prepared_calls.add(call, prepared)
    return prepared(operands, numbers, intervals)


prepared_calls = Kept()
"""`PreparedForward` and `PreparedBackward` by what the functions above were asked for."""


def _form(tensors: tuple[Tensor | None, ...], intervals: KeyIntervals, operands: tuple[Tensor, ...]) -> tuple:
    """What launches depend on, of the tensors; operands may have to be copied first."""
    bounds = intervals.start, intervals.stop
    return (
        *map(metadata, tensors), intervals.start.shape, intervals.key_count,
        aligned(*tensors, *bounds) or tuple(map(aligned, operands)),
    )  # fmt: skip


def described(x: Tensor, rows: int, columns: int) -> Description:
    """`descriptor` of blocks of a tensor, without the tensor."""
    return description_of(descriptor(x, rows, columns))


class PreparedForward:
    """What is worked out once for calls alike, and their launch.

    Args:
        query: as in `attend`, of the first call and checked; so are the others.
        key: see query.
        value: see query.
        intervals: see query.
        scale: see query.
        carry: see query.
        out_dtype: see query.
        tiles: sizes of the launch.
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
        tiles: WeightsTiles,
    ) -> None:
        (query_rows, heads, _), (key_rows, key_heads, _) = query.shape, value.shape
        self.lse_shape = (heads, query_rows)
        self.out_dtype, self.float_out = out_dtype, out_dtype != query.dtype
        self.stored_dtype = torch.float32 if self.float_out else out_dtype
        self.empty = key_rows == 0 or query_rows == 0
        if self.empty:
            return
        direct = aligned(query, key, value, *(carry or ()), intervals.start, intervals.stop)
        reached, self.addressable = made_addressable((query, key, value))
        first_query, first_key, first_value = reached
        rows = ROWS.value
        out = without_memory(query.shape, self.stored_dtype)
        descriptions = (
            described(first_query, rows, WIDEST),
            described(first_key, tiles.rows, tiles.scored[0]),
            described(first_value, tiles.summed[0], WIDEST // 2),
            None if self.float_out else described(out, rows, WIDEST // 2),
        )
        tile_count = -(-query_rows // rows)
        head_strides = [x.stride(1) for x in reached]
        self.launch = Launcher(
            tile_count * heads,
            (query_rows, tile_count, heads, *head_strides, scale * LOG2_E.value),
            dict(
                GROUP=heads // key_heads, KEY_STAGES=tiles.scored[1], VALUE_STAGES=tiles.summed[1],
                FLOAT_OUT=self.float_out, REGISTERS=tiles.registers,
            ),
            {"num_warps": 4},
            direct,
            descriptions,
        )  # fmt: skip

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, carry: Carry | None
    ) -> Carry:
        """Result and lse."""
        carry_out, carry_lse = carry or (None, None)
        out = carry_out if carry and self.float_out else query.new_empty(query.shape, dtype=self.stored_dtype)
        lse = carry_lse if carry else query.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty:
            out, lse = carry or (out.zero_(), lse.fill_(-torch.inf))
            return out.to(self.out_dtype), lse
        operands = self.addressable((query, key, value))
        tensors = (
            *operands, *((None, out) if self.float_out else (out, None)), lse, carry_out, carry_lse,
            intervals.start, intervals.stop, intervals.query_order(ROWS.value),
        )  # fmt: skip
        self.launch(attend_widest_kernel, tensors)
        return out.to(self.out_dtype), lse


Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Dout, query, key, value."""
Numbers = tuple[Tensor, Tensor, Tensor | None]
"""Lse, delta, carry."""


class PreparedBackward:
    """What is worked out once for calls alike, and their launches: one for each gradient.

    Args:
        operands: dout, query, key and value of the first call, checked.
        numbers: lse, delta and carry of the first call.
        intervals: as in `attend_backward`, of the first call; so are the others.
        scale: see intervals.
        dquery_dtype: see intervals.
        dkey_dtype: see intervals.
        dvalue_tiles: sizes of the launch for the gradient of values.
        dscores_tiles: sizes of the other launches.
    """

    def __init__(
        self,
        operands: Operands,
        numbers: Numbers,
        intervals: KeyIntervals,
        scale: float,
        dquery_dtype: torch.dtype,
        dkey_dtype: torch.dtype,
        dvalue_tiles: WeightsTiles = DVALUE_TILES,
        dscores_tiles: DscoresTiles = DSCORES_TILES,
    ) -> None:
        _, query, key, _ = operands
        (query_rows, heads, _), (key_rows, key_heads, _) = query.shape, key.shape
        self.dtypes, self.dtype = (dquery_dtype, dkey_dtype), query.dtype
        self.empty = key_rows == 0 or query_rows == 0
        if self.empty:
            return
        direct = aligned(*operands, *numbers, intervals.start, intervals.stop)
        reached, self.addressable = made_addressable(operands)
        dout, query, key, value = reached
        rows = ROWS.value
        owned_dout, owned_query, owned_key, owned_value = (described(x, rows, WIDEST) for x in reached)
        query_blocks, key_blocks = (described(x, dscores_tiles.rows, WIDEST) for x in (query, key))
        other_douts, other_values = (described(x, dscores_tiles.rows, dscores_tiles.other[0]) for x in (dout, value))
        weighed = (
            described(query, dvalue_tiles.rows, dvalue_tiles.scored[0]),
            described(dout, dvalue_tiles.summed[0], WIDEST // 2),
        )
        of_dquery, of_dkey = (
            described(without_memory(x.shape, x.dtype), rows, WIDEST // 2) if dtype == x.dtype else None
            for x, dtype in zip((query, key), self.dtypes, strict=True)
        )
        of_dout, of_query, of_key, of_value = (x.stride(1) for x in (dout, query, key, value))
        of_queries, of_keys = (query_rows, -(-query_rows // rows), heads), (key_rows, -(-key_rows // rows), key_heads)
        group = {"GROUP": heads // key_heads}
        sizes = {"STAGES": dscores_tiles.stages, "OTHER_STAGES": dscores_tiles.other[1]}
        float_dquery, float_dkey = ({"FLOAT_OUT": x is None} for x in (of_dquery, of_dkey))

        def launcher(
            descriptions: tuple[Description | None, ...],
            owned: tuple[int, int, int],
            numbers: tuple,
            constants: dict[str, object],
        ) -> Launcher:
            _, tiles, owners = owned
            numbers = (query_rows, *owned, *numbers, scale)
            return Launcher(tiles * owners, numbers, constants, {"num_warps": 4}, direct, descriptions)

        self.launch_dquery = launcher(
            (owned_query, owned_dout, key_blocks, other_values, of_dquery),
            of_queries,
            (of_query, of_dout, of_key, of_value),
            {**group, **sizes, **float_dquery, "OWNS_KEYS": False, "REGISTERS": dscores_tiles.registers},
        )
        self.launch_dkey = launcher(
            (owned_key, owned_value, query_blocks, other_douts, of_dkey),
            of_keys,
            (of_key, of_value, of_query, of_dout),
            {**group, **sizes, **float_dkey, "OWNS_KEYS": True, "REGISTERS": dscores_tiles.registers},
        )
        stages = {"QUERY_STAGES": dvalue_tiles.scored[1], "DOUT_STAGES": dvalue_tiles.summed[1]}
        self.launch_dvalue = launcher(
            (owned_key, *weighed, of_dkey),
            of_keys,
            (of_query, of_dout, of_key),
            {**group, **stages, **float_dkey, "REGISTERS": dvalue_tiles.registers},
        )

    def __call__(self, operands: Operands, numbers: Numbers, intervals: KeyIntervals) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        _, query, key, value = operands
        lse, delta, carry = numbers
        stored = [dtype if dtype == self.dtype else torch.float32 for dtype in self.dtypes]
        in_place = carry is not None and stored[0] == torch.float32
        dquery = carry if in_place else query.new_empty(query.shape, dtype=stored[0])
        dkey, dvalue = (x.new_empty(x.shape, dtype=stored[1]) for x in (key, value))
        if self.empty:
            dquery = dquery.zero_() if carry is None else carry
            return dquery.to(self.dtypes[0]), dkey.zero_().to(self.dtypes[1]), dvalue.zero_().to(self.dtypes[1])
        dout, query, key, value = self.addressable(operands)
        bounds = intervals.start, intervals.stop
        seeing = intervals.key_tile_rows(1), intervals.key_tile_rows(ROWS.value)
        query_order, key_order = intervals.query_order(ROWS.value), intervals.key_order(ROWS.value)
        written = self._written(dquery)
        self.launch_dquery(
            dscores_widest_kernel,
            (query, dout, key, value, *written, carry, lse, delta, *bounds, None, None, query_order),
        )
        written = self._written(dkey)
        self.launch_dkey(
            dscores_widest_kernel,
            (key, value, query, dout, *written, None, lse, delta, None, None, *seeing, key_order),
        )
        written = self._written(dvalue)
        self.launch_dvalue(dvalue_widest_kernel, (key, query, dout, *written, lse, *seeing, key_order))
        return dquery.to(self.dtypes[0]), dkey.to(self.dtypes[1]), dvalue.to(self.dtypes[1])

    def _written(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """A gradient as the kernels take it: with a descriptor, or by its address if it is in fp32."""
        return (x, None) if x.dtype == self.dtype else (None, x)
