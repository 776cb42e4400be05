"""Attention of one round of queries on one device, see `ringflash.parallel.planning.query_rounds`.

Legend: R query rows of the round, T key rows; H query heads, Hk key heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels.devices import on_device_without_autocast
from ringflash.kernels.reference import Carry
from ringflash.kernels.select import select
from ringflash.parallel.planning.query_rounds import QueryRound


@dataclass(frozen=True)
class RoundAttention:
    """How rounds attend.

    Attributes:
        scale: factor of the scores; None: 1 / sqrt(D).
        kernel: name for `ringflash.kernels.select`.
        deterministic: gradients repeat bit for bit.
    """

    scale: float | None
    kernel: str
    deterministic: bool

    def forward(self, query: Tensor, key: Tensor, value: Tensor, around: QueryRound) -> Carry:
        """Out (R, H, D) like the query and lse (H, R) fp32.

        Args:
            query: (R, H, D).
            key: (T, Hk, D), of which only keys that the round sees need be there.
            value: likewise.
            around: the round.
        """
        kernels = select(query.device, query.dtype, query.shape[2], value.shape[2], self.kernel)
        accumulator, carry = torch.promote_types(query.dtype, torch.float32), None
        with on_device_without_autocast(query):
            for intervals in around.shown:
                carry = kernels.attend(
                    query,
                    key[around.keys],
                    value[around.keys],
                    intervals,
                    scale=self._scale(query),
                    carry=carry,
                    out_dtype=query.dtype if intervals is around.shown[-1] else accumulator,
                )
        if carry is None:  # nobody sees anything
            lse = query.new_full(query.shape[1::-1], -torch.inf, dtype=torch.float32)
            return query.new_zeros(*query.shape[:2], value.shape[2]), lse
        return carry

    def backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        around: QueryRound,
        dkey: Tensor,
        dvalue: Tensor,
    ) -> Tensor:
        """Gradient of the query; those of key and value are added to what earlier rounds found.

        Args:
            dout: (R, H, D), gradient of out.
            out: from `forward`.
            lse: from `forward`.
            query: as in `forward`.
            key: likewise.
            value: likewise.
            around: likewise.
            dkey: (T, Hk, D) in fp32 at least, to be added to.
            dvalue: likewise.
        """
        kernels = select(query.device, query.dtype, query.shape[2], value.shape[2], self.kernel)
        accumulator, dquery = dkey.dtype, None
        with on_device_without_autocast(query):
            delta = kernels.row_delta(dout, out)
            for piece in around.pieces():
                first, last = piece.start - around.keys.start, piece.stop - around.keys.start
                for intervals in around.shown:
                    dquery, *parts = kernels.attend_backward(
                        dout,
                        query,
                        key[piece],
                        value[piece],
                        lse,
                        delta,
                        intervals.of_keys(first, last),
                        scale=self._scale(query),
                        carry=dquery,
                        dquery_dtype=accumulator,
                        dkey_dtype=accumulator,
                        deterministic=self.deterministic,
                    )
                    for total, part in zip((dkey, dvalue), parts, strict=True):
                        total[piece] += part
                    del parts  # before the next ones are there
        return torch.zeros_like(query) if dquery is None else dquery.to(query.dtype)

    def _scale(self, query: Tensor) -> float:
        return query.shape[2] ** -0.5 if self.scale is None else self.scale
