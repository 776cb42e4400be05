"""Attention of a few new queries to a cache of keys and values: the contract of its implementations.

An implementation is a module with two functions, `append` and `attend`, that mean what those of
ringflash.kernels.cpu.decode mean, which runs wherever torch does and is exact in float32 (float64 for float64); the
other is ringflash.kernels.triton.decode. `ringflash.kernels.select` chooses. On a GPU neither reads a tensor's values
on the host: both stay within the cache, and ringflash.kernels.overrun tells of lengths that go beyond it.

Sequence b fills the rows [leftpad[b], used[b]) of its part of the cache. With n keys appended, query i of S stands at
row used[b] + n - S + i, its position: the last query at the last key. It sees the rows from its position - left to its
position + right that are filled; one that sees none gets 0 and a log-sum-exp of -inf.

Legend: B sequences, S queries of each, n new keys of each, C rows of a sequence's part of the cache, H query heads,
Hk key heads, D head dimension of keys, V of values, R rotated dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of earlier tokens, and where those of each sequence lie.

    Attributes:
        key: (batch of the cache, C, Hk, D), or (pages, rows of a page, Hk, D) with block_table.
        value: the same with V.
        lengths: (B,) int32 or None for zeros; used[b] is lengths[b] + offset.
        offset: see lengths.
        leftpad: (B,) int32 first filled row, or None for 0.
        batch_index: (B,) int32 entry of the cache that is sequence b's; None for b.
        block_table: (B, pages of a sequence) int32, or None. Entries behind a sequence's end are never read through.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    offset: int = 0
    leftpad: Tensor | None = None
    batch_index: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """C."""
        return self.key.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding (Su et al., arXiv 2104.09864) of the first R dimensions.

    Attributes:
        cos: (positions, R / 2).
        sin: (positions, R / 2).
        interleaved: rotates dimensions 2j and 2j + 1 together, instead of j and j + R / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Rules:
    """How scores are made and which of them count.

    Attributes:
        scale: factor of the scores.
        left: rows that a query sees before its position; None for no bound.
        right: rows that it sees behind its position; None for no bound.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        slopes: ALiBi slopes (H,) or (B, H) fp32, or None.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    slopes: Tensor | None = None

    @property
    def local(self) -> bool:
        """Whether the position of a query matters to what it sees."""
        return self.left is not None or self.right is not None
