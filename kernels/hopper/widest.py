"""Launches of the kernels for head dimension 512."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels.gpu.launcher import Launcher, aligned
from ringflash.kernels.hopper.checks import check_operands
from ringflash.kernels.hopper.descriptors import addressable, description_of, descriptor, descriptor_of, without_memory
from ringflash.kernels.hopper.softmax import ROWS
from ringflash.kernels.hopper.widest_backward_kernel import dscores_widest_kernel, dvalue_widest_kernel
from ringflash.kernels.hopper.widest_forward_kernel import LOG2_E, attend_widest_kernel
from ringflash.kernels.intervals import KeyIntervals
from ringflash.kernels.kept import Kept, metadata
from ringflash.kernels.reference import Carry

WIDTH = 512
"""Columns of queries, keys and values."""


@dataclass(frozen=True)
class ForwardTiles:
    """Sizes of a forward launch.

    Attributes:
        keys: key rows of a block.
        key_piece: columns of the keys that are loaded at a time, and how many such pieces have room.
        value_piece: rows of the values that are loaded at a time, and how many such pieces of half of the columns each.
        registers: of a thread of the warpgroups that sum, of the one with the scores, and of the warps that load.
    """

    keys: int = 64
    key_piece: tuple[int, int] = (128, 5)
    value_piece: tuple[int, int] = (32, 2)
    registers: tuple[int, int, int] = (168, 152, 24)


FORWARD_TILES = ForwardTiles()


class PreparedForward:
    """What is worked out once for calls alike, and their launch; arguments as of `forward.PreparedForward`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        intervals: KeyIntervals,
        scale: float,
        carry: Carry | None,
        out_dtype: torch.dtype,
        tiles: ForwardTiles = FORWARD_TILES,
    ) -> None:
        (query_rows, heads, _), (key_rows, key_heads, _) = query.shape, value.shape
        self.out_shape, self.lse_shape = (query_rows, heads, WIDTH), (heads, query_rows)
        self.out_dtype, self.float_out = out_dtype, out_dtype != query.dtype
        self.stored_dtype = torch.float32 if self.float_out else out_dtype
        self.empty = key_rows == 0 or query_rows == 0
        if self.empty:
            return
        direct = aligned(query, key, value, *(carry or ()), intervals.start, intervals.stop)
        query, key, value = map(addressable, (query, key, value))
        self.descriptions = (
            description_of(descriptor(query, ROWS.value, WIDTH)),
            description_of(descriptor(key, tiles.keys, tiles.key_piece[0])),
            description_of(descriptor(value, tiles.value_piece[0], WIDTH // 2)),
        )
        self.out_description = None
        if not self.float_out:
            out = without_memory(self.out_shape, self.stored_dtype)
            self.out_description = description_of(descriptor(out, ROWS.value, WIDTH // 2))
        tile_count = -(-query_rows // ROWS.value)
        self.launch = Launcher(
            tile_count * heads,
            (
                query_rows, tile_count, heads, query.stride(1), key.stride(1), value.stride(1), scale * LOG2_E.value,
            ),
            dict(
                GROUP=heads // key_heads, KEY_STAGES=tiles.key_piece[1], VALUE_STAGES=tiles.value_piece[1],
                FLOAT_OUT=self.float_out, REGISTERS=tiles.registers,
            ),
            {"num_warps": 4},
            direct,
        )  # fmt: skip

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, intervals: KeyIntervals, carry: Carry | None
    ) -> Carry:
        """Result and lse."""
        carry_out, carry_lse = carry or (None, None)
        out = carry_out if carry and self.float_out else query.new_empty(self.out_shape, dtype=self.stored_dtype)
        lse = carry_lse if carry else query.new_empty(self.lse_shape, dtype=torch.float32)
        if self.empty:
            out, lse = carry or (out.zero_(), lse.fill_(-torch.inf))
            return out.to(self.out_dtype), lse
        operands = map(addressable, (query, key, value))
        self.launch(
            attend_widest_kernel,
            (
                *map(descriptor_of, operands, self.descriptions), descriptor_of(out, self.out_description),
                out if self.float_out else None, lse, carry_out, carry_lse,
                intervals.start, intervals.stop, intervals.query_order(ROWS.value),
            ),
        )  # fmt: skip
        return out.to(self.out_dtype), lse


@dataclass(frozen=True)
class BackwardTiles:
    """Sizes of the launches for one gradient each.

    Attributes:
        dvalue: of the gradient of values, with queries for keys and dout for values.
        rows: rows of a block of the other two.
        stages: blocks that have room.
        piece: columns that are loaded at a time of what is multiplied beside, and how many such pieces have room.
        registers: as of `ForwardTiles`.
    """

    dvalue: ForwardTiles = FORWARD_TILES
    rows: int = 32
    stages: int = 2
    piece: tuple[int, int] = (128, 3)
    registers: tuple[int, int, int] = (168, 152, 24)


BACKWARD_TILES = BackwardTiles()

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Dout, query, key, value."""


class PreparedBackward:
    """What is worked out once for calls alike, and their launches; arguments as of `backward.PreparedBackward`."""

    def __init__(
        self,
        operands: Operands,
        numbers: tuple[Tensor, Tensor, Tensor | None],
        scale: float,
        dquery_dtype: torch.dtype,
        dkey_dtype: torch.dtype,
        tiles: BackwardTiles = BACKWARD_TILES,
    ) -> None:
        _, query, key, _ = operands
        (query_rows, heads, _), (key_rows, key_heads, _) = query.shape, key.shape
        self.dtypes = (dquery_dtype, dkey_dtype)
        self.empty = key_rows == 0 or query_rows == 0
        if self.empty:
            return
        direct = aligned(*operands, *numbers)
        reachable = tuple(map(addressable, operands))
        dout, query, key, value = reachable
        group, rows = heads // key_heads, ROWS.value
        query_tiles, key_tiles = -(-query_rows // rows), -(-key_rows // rows)
        (of_dout, of_query, of_key, of_value) = (x.stride(1) for x in reachable)
        self.owned = [description_of(descriptor(x, rows, WIDTH)) for x in reachable]
        self.blocks = [description_of(descriptor(x, tiles.rows, WIDTH)) for x in (query, key)]
        self.others = [description_of(descriptor(x, tiles.rows, tiles.piece[0])) for x in (dout, value)]
        self.weighed = (
            description_of(descriptor(query, tiles.dvalue.keys, tiles.dvalue.key_piece[0])),
            description_of(descriptor(dout, tiles.dvalue.value_piece[0], WIDTH // 2)),
        )
        self.float_out = [dtype != query.dtype for dtype in self.dtypes]
        self.descriptions = [
            None if float_out else description_of(descriptor(without_memory(x.shape, query.dtype), rows, WIDTH // 2))
            for x, float_out in zip((query, key), self.float_out, strict=True)
        ]
        sizes = {"GROUP": group, "STAGES": tiles.stages, "OTHER_STAGES": tiles.piece[1]}
        self.launch_dquery = Launcher(
            query_tiles * heads,
            (query_rows, query_rows, query_tiles, heads, of_query, of_dout, of_key, of_value, scale),
            dict(**sizes, FLOAT_OUT=self.float_out[0], OWNS_KEYS=False, REGISTERS=tiles.registers),
            {"num_warps": 4},
            direct,
        )
        self.launch_dkey = Launcher(
            key_tiles * key_heads,
            (query_rows, key_rows, key_tiles, key_heads, of_key, of_value, of_query, of_dout, scale),
            dict(**sizes, FLOAT_OUT=self.float_out[1], OWNS_KEYS=True, REGISTERS=tiles.registers),
            {"num_warps": 4},
            direct,
        )
        self.launch_dvalue = Launcher(
            key_tiles * key_heads,
            (query_rows, key_rows, key_tiles, key_heads, of_query, of_dout, of_key, scale),
            dict(
                GROUP=group, QUERY_STAGES=tiles.dvalue.key_piece[1], DOUT_STAGES=tiles.dvalue.value_piece[1],
                FLOAT_OUT=self.float_out[1], REGISTERS=tiles.dvalue.registers,
            ),
            {"num_warps": 4},
            direct,
        )  # fmt: skip

    def __call__(
        self, operands: Operands, numbers: tuple[Tensor, Tensor, Tensor | None], intervals: KeyIntervals
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        _, query, key, value = operands
        lse, delta, carry = numbers
        in_place = carry is not None and self.dtypes[0] == torch.float32
        dquery = carry if in_place else query.new_empty(query.shape, dtype=self._stored(0))
        dkey, dvalue = (x.new_empty(x.shape, dtype=self._stored(1)) for x in (key, value))
        if self.empty:
            dquery = dquery.zero_() if carry is None else carry
            return dquery.to(self.dtypes[0]), dkey.zero_().to(self.dtypes[1]), dvalue.zero_().to(self.dtypes[1])
        dout, query, key, value = operands = tuple(map(addressable, operands))
        owned_dout, owned_query, owned_key, owned_value = map(descriptor_of, operands, self.owned)
        query_blocks, key_blocks = map(descriptor_of, (query, key), self.blocks)
        other_douts, other_values = map(descriptor_of, (dout, value), self.others)
        seeing = intervals.key_tile_rows(1), intervals.key_tile_rows(ROWS.value)
        key_order = intervals.key_order(ROWS.value)
        self.launch_dquery(
            dscores_widest_kernel,
            (
                owned_query, owned_dout, key_blocks, other_values, *self._written(dquery, 0), carry, lse, delta,
                intervals.start, intervals.stop, None, None, intervals.query_order(ROWS.value),
            ),
        )  # fmt: skip
        self.launch_dkey(
            dscores_widest_kernel,
            (
                owned_key, owned_value, query_blocks, other_douts, *self._written(dkey, 1), None, lse, delta,
                None, None, *seeing, key_order,
            ),
        )  # fmt: skip
        weighed = map(descriptor_of, (query, dout), self.weighed)
        self.launch_dvalue(
            dvalue_widest_kernel, (owned_key, *weighed, *self._written(dvalue, 1), lse, *seeing, key_order)
        )
        return dquery.to(self.dtypes[0]), dkey.to(self.dtypes[1]), dvalue.to(self.dtypes[1])

    def _stored(self, of: int) -> torch.dtype:
        """What the kernels store: the operands' dtype or float32."""
        return torch.float32 if self.float_out[of] else self.dtypes[of]

    def _written(self, x: Tensor, of: int) -> tuple:
        """A result as the kernels take it: a descriptor, or the tensor itself if that is in fp32."""
        return (None, x) if self.float_out[of] else (descriptor_of(x, self.descriptions[of]), None)
