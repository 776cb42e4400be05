"""Which blocks of keys each block of queries sees.

Kernels read a layout as it is (ringflash/kernels/key_blocks.py). What counts pairs, to plan or to balance, asks a mask
for one run of keys of each query, whose ends never decrease. So a layout that the host may read is cut into layers of
that form, with each run in exactly one of them.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ringflash.errors import ArgumentError
from ringflash.parallel.positions.segments import Interval, Segments, count, intersect


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """Visible key tokens of each block of query tokens; both counted from the start of a document.

    Attributes:
        size: query tokens of a block.
        keys: key tokens that the layout speaks of.
        rows: for each block of queries the runs of key tokens that it sees, apart from each other.
        text: all of that as JSON. It stands for the layout where layouts are compared.
    """

    size: int
    keys: int
    rows: tuple[Segments, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        flat = ", ".join(str([edge for run in runs for edge in run]) for runs in self.rows)
        object.__setattr__(self, "text", f'{{"size": {self.size}, "keys": {self.keys}, "rows": [{flat}]}}')

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        visible = sum(map(count, self.rows)) / max(1, len(self.rows) * self.keys)
        return f"BlockLayout({self.queries} queries by {self.size}, {self.keys} keys, {visible:.1%} visible)"

    @staticmethod
    def of_blocks(layout: Any, block_size: int | tuple[int, int]) -> BlockLayout:
        """From a (query blocks, key blocks) matrix of booleans; arguments as in `Mask.blocks`."""
        query_block, key_block = sizes_of(block_size)
        rows = layout.tolist() if hasattr(layout, "tolist") else layout
        if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Sequence) and row for row in rows):
            raise ArgumentError("blocks: layout has no rows and columns; allowed is (query blocks, key blocks)")
        widths, kinds = {len(row) for row in rows}, {type(x) for row in rows for x in row}
        if len(widths) > 1:
            raise ArgumentError(f"blocks: layout has rows of {min(widths)} and of {max(widths)} key blocks")
        if kinds != {bool}:
            other = next(x for row in rows for x in row if type(x) is not bool)
            raise ArgumentError(
                f"blocks: layout holds {other!r}; allowed are True and False of (query blocks, key blocks), or a "
                "tensor (groups of heads, query blocks, key blocks) of them"
            )
        runs = tuple(tuple((a * key_block, b * key_block) for a, b in _runs(bytes(row))) for row in rows)
        return BlockLayout(query_block, widths.pop() * key_block, runs)

    @staticmethod
    def from_json(values: dict) -> BlockLayout:
        """The layout whose `text` was read as JSON."""
        rows = tuple(tuple(zip(edges[::2], edges[1::2], strict=True)) for edges in values["rows"])
        return BlockLayout(values["size"], values["keys"], rows)

    @property
    def queries(self) -> int:
        """Query tokens that the layout speaks of."""
        return self.size * len(self.rows)

    def check_reach(self, tokens: str, length: int) -> None:
        """Raise ArgumentError unless the layout reaches over the "queries" or "keys" of a document of that length."""
        _check_reach(getattr(self, tokens), tokens, length)

    def row_of(self, query: int) -> int:
        """Index of the row for a query token, counted from the start of its document."""
        self.check_reach("queries", query + 1)
        return query // self.size

    def sees(self, query: int, key: int) -> bool:
        """Whether a query token sees a key token, both counted from the start of their document."""
        return any(start <= key < stop for start, stop in self.rows[self.row_of(query)])

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """Pairs that both show, as far as both reach."""
        size = gcd(self.size, other.size)
        starts = range(0, min(self.queries, other.queries), size)
        rows = (intersect(self.rows[i // self.size], other.rows[i // other.size]) for i in starts)
        return BlockLayout(size, min(self.keys, other.keys), tuple(rows))

    def near(self, left: int | None, right: int | None) -> BlockLayout:
        """Without runs that are hidden by bounds `left` before and `right` behind each query."""
        rows = []
        for index, runs in enumerate(self.rows):
            start = 0 if left is None else max(0, index * self.size - left)
            stop = self.keys if right is None else min(self.keys, (index + 1) * self.size + right)
            rows.append(intersect(runs, ((start, stop),) if start < stop else ()))
        return BlockLayout(self.size, self.keys, tuple(rows))

    @cached_property
    def key_size(self) -> int:
        """Key tokens of a block: the most that all runs begin and end at multiples of."""
        return gcd(*(edge for runs in self.rows for run in runs for edge in run)) or self.keys

    @cached_property
    def matrix(self) -> np.ndarray:
        """Which blocks of `key_size` keys each block of queries sees, (query blocks, key blocks) bool."""
        size = self.key_size
        shown = np.zeros((len(self.rows), -(-self.keys // size)), dtype=bool)
        for row, runs in zip(shown, self.rows, strict=True):
            for start, stop in runs:
                row[start // size : stop // size] = True
        return shown

    @cached_property
    def layers(self) -> tuple[BlockLayout, ...]:
        """Few layouts with one run in a row, whose ends never decrease; together they hold each run once."""
        chains = _chains(self.rows)
        if len(chains) <= 1:
            return (self,)
        rows = ([((run,) if (run := chain.get(i)) else ()) for i in range(len(self.rows))] for chain in chains)
        return tuple(BlockLayout(self.size, self.keys, tuple(x)) for x in rows)

    @cached_property
    def bounds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First and one-behind-last key token of each row of a layer; both never decrease, also over empty rows."""
        bounds, end = [], 0
        for runs in self.rows:
            start, end = runs[0] if runs else (end, end)
            bounds.append((start, end))
        starts, stops = zip(*bounds, strict=True)
        if any(len(runs) > 1 for runs in self.rows) or any(list(x) != sorted(x) for x in (starts, stops)):
            raise ArgumentError(f"{self} shows several intervals to a query; ask each of its layers")
        return starts, stops


@dataclass(frozen=True)
class RoutedLayout:
    """A layout that nothing but the kernels reads: a router's, on its device, with one for each group of heads.

    Attributes:
        sizes: query tokens and key tokens of a block.
        shape: groups of heads, query blocks, key blocks.
        shown: (shape) bool; None where only the others are known. Layouts are equal that differ in it alone, so what is
            planned for one serves all of a model's.
    """

    sizes: tuple[int, int]
    shape: tuple[int, int, int]
    shown: Tensor | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of_tensor(shown: Tensor, block_size: int | tuple[int, int]) -> RoutedLayout:
        """Arguments as in `Mask.blocks`."""
        shown = shown[None] if shown.dim() == 2 else shown
        if shown.dtype != torch.bool or shown.dim() != 3 or not shown.numel():
            raise ArgumentError(
                f"blocks: layout is {shown.dtype} {tuple(shown.shape)}; allowed is bool (query blocks, key blocks) or "
                "(groups of heads, query blocks, key blocks)"
            )
        groups, rows, columns = shown.shape
        return RoutedLayout(sizes_of(block_size), (groups, rows, columns), shown)

    @property
    def queries(self) -> int:
        """Query tokens that the layout speaks of."""
        return self.sizes[0] * self.shape[1]

    @property
    def keys(self) -> int:
        """Key tokens that it speaks of."""
        return self.sizes[1] * self.shape[2]

    def check_reach(self, tokens: str, length: int) -> None:
        """As of `BlockLayout`."""
        _check_reach(getattr(self, tokens), tokens, length)

    def __and__(self, other: RoutedLayout) -> RoutedLayout:
        """Pairs that both show."""
        if self.sizes != other.sizes or self.shape != other.shape or self.shown is None or other.shown is None:
            raise ArgumentError(
                f"cannot intersect layouts of {self.shape} blocks of {self.sizes} and {other.shape} of {other.sizes} "
                "tokens, which the host does not read; allowed are such of the same blocks"
            )
        return replace(self, shown=self.shown & other.shown)


def sizes_of(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Tokens of a query block and of a key block, checked."""
    sizes = block_size if isinstance(block_size, Sequence) else (block_size, block_size)
    if len(sizes) != 2 or not all(isinstance(x, int) and x > 0 for x in sizes):
        raise ArgumentError(
            f"blocks: block_size={block_size}; allowed is 1 and more, or two such numbers, for queries and for keys"
        )
    return sizes[0], sizes[1]


def _check_reach(reach: int, tokens: str, length: int) -> None:
    if length > reach:
        raise ArgumentError(
            f"blocks: layout reaches over {reach} {tokens}, a document or sequence has {length}; allowed is a layout "
            "that reaches over the longest"
        )


def _runs(row: bytes) -> list[Interval]:
    """Where a row of zeros and ones is one."""
    runs, start = [], row.find(1)
    while start >= 0:
        stop = row.find(0, start)
        stop = len(row) if stop < 0 else stop
        runs.append((start, stop))
        start = row.find(1, stop)
    return runs


def _chains(rows: tuple[Segments, ...]) -> list[dict[int, Interval]]:
    """Each run in one chain of {row: run}; a chain's ends can be continued over its empty rows without a step back.

    Greedy: a run continues the chain whose last run starts furthest right among those that it may continue, so that
    chains further left stay free for runs further left in later rows.
    """
    chains: list[dict[int, Interval]] = []
    ends: list[tuple[int, int, int]] = []  # what the next start and stop must not fall below, and the chain
    for row, runs in enumerate(rows):
        continued = []
        for start, stop in runs:
            place = bisect_right(ends, start, key=lambda end: end[0]) - 1
            while place >= 0 and ends[place][1] > stop:
                place -= 1
            chain = ends.pop(place)[2] if place >= 0 else len(chains)
            if chain == len(chains):
                chains.append({})
            chains[chain][row] = (start, stop)
            continued.append((start, stop, chain))
        # An empty row stands at (stop, stop), because its start must not lie before its stop.
        ends = sorted((stop, stop, chain) for _, stop, chain in ends)
        for end in continued:
            insort(ends, end)
    return chains
